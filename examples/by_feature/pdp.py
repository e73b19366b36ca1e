"""Prune with PDP: train through soft masks, which harden near the end of the run.

    python examples/by_feature/pdp.py
    python examples/by_feature/pdp.py --max_steps 100 --pdp_tau 1e-3

The model trains dense for the first part of the run (`pruning_warmup_steps`). Then it is fitted to its target and
trains through soft masks. At the end the mask hardens, and the kept weights train on (`frozen_steps`).
"""

import sys
from pathlib import Path

from transformers import BertForSequenceClassification, HfArgumentParser, set_seed

from hf_maskselect import PruningConfig, PruningTrainer, sparsity_report

sys.path.insert(0, str(Path(__file__).parents[2] / "glue_scripts"))  # the demo task is not installed
from demo_data import demo_model_config, demo_tokenizer, load_demo  # noqa: E402


def accuracy(prediction):
    """Return the share of rows that were classified correctly."""
    return {"accuracy": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())}


def main(arguments=None):
    """Train, evaluate, save and count the zeros."""
    parser = HfArgumentParser(PruningConfig)
    parser.set_defaults(output_dir="out/pdp", max_steps=1200, save_strategy="no", logging_steps=100)
    parser.set_defaults(per_device_train_batch_size=32, per_device_eval_batch_size=64)
    parser.set_defaults(learning_rate=5e-4, warmup_steps=0.1)
    parser.set_defaults(method="pdp", sparsity=0.9, pruning_warmup_steps=0.5, frozen_steps=0.2)
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
        compute_metrics=accuracy,
    )
    trainer.train()
    print(trainer.evaluate())  # sees the hard mask, as every evaluation does
    trainer.save_model()
    print(f"zeros in the encoder: {sparsity_report(args.output_dir).sparsity:.4f}")


if __name__ == "__main__":
    main()
