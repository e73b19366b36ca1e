"""Prune to 2:4, check the pattern, export the model for sparse tensor cores and load it again.

    python examples/by_feature/two_to_four.py
    python examples/by_feature/two_to_four.py --max_steps 100 --method magnitude

Without a GPU with sparse tensor cores the exported file loads as the exact dense weights.
"""

import sys
from pathlib import Path

import torch
from transformers import BertForSequenceClassification, HfArgumentParser, set_seed

from hf_maskselect import PruningConfig, PruningTrainer, export_semi_structured, load_semi_structured, verify

sys.path.insert(0, str(Path(__file__).parents[2] / "glue_scripts"))  # the demo task is not installed
from demo_data import demo_model_config, demo_tokenizer, load_demo  # noqa: E402


def main(arguments=None):
    """Train to 2:4, verify the saved model, export it and compare the loaded weights with the saved ones."""
    parser = HfArgumentParser(PruningConfig)
    parser.set_defaults(output_dir="out/two_to_four", max_steps=900, save_strategy="no", logging_steps=100)
    parser.set_defaults(per_device_train_batch_size=32, learning_rate=5e-4, warmup_steps=0.1)
    parser.set_defaults(method="taylor", pattern="2:4", pruning_warmup_steps=0.7)
    (args,) = parser.parse_args_into_dataclasses(arguments)

    set_seed(args.seed)
    tokenizer = demo_tokenizer()
    data = load_demo().map(lambda rows: tokenizer(rows["sentence"]), batched=True)
    trainer = PruningTrainer(
        BertForSequenceClassification(demo_model_config()),
        args,
        train_dataset=data["train"],
        eval_dataset=data["validation"],
        processing_class=tokenizer,
    )
    trainer.train()
    print(trainer.evaluate())
    trainer.save_model()

    state = verify(args.output_dir, "2:4")  # raises if any group of four keeps more than two weights
    print(f"2:4 holds in {len(state.masks)} matrices")
    folder = Path(args.output_dir) / "exported"
    print(export_semi_structured(args.output_dir, folder, dtype="bf16"))
    loaded = load_semi_structured(folder, device="cpu").state_dict()
    saved = BertForSequenceClassification.from_pretrained(args.output_dir, dtype=torch.bfloat16).state_dict()
    print(f"the same weights: {all(torch.equal(loaded[name], saved[name]) for name in saved)}")


if __name__ == "__main__":
    main()
