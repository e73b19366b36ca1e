"""Prune to 2:4, check the pattern, and write the file for sparse tensor cores.

    python examples/by_feature/two_to_four.py
    python examples/by_feature/two_to_four.py --max_steps 100 --method magnitude

The demo model is trained from scratch, so it first trains dense (`pruning_warmup_steps`). A fine-tuned model needs no
such phase.
"""

import sys
from pathlib import Path

from transformers import BertForSequenceClassification, HfArgumentParser, set_seed

from hf_maskselect import PruningConfig, PruningTrainer, export_semi_structured, load_semi_structured, verify

sys.path.insert(0, str(Path(__file__).parents[2] / "glue_scripts"))  # the demo task is not installed
from demo_data import demo_model_config, demo_tokenizer, load_demo  # noqa: E402


def accuracy(prediction):
    """Return the share of rows that were classified correctly."""
    return {"accuracy": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())}


def main(arguments=None):
    """Train, save, verify, export and load again."""
    parser = HfArgumentParser(PruningConfig)
    parser.set_defaults(output_dir="out/two_to_four", max_steps=1200, save_strategy="no", logging_steps=100)
    parser.set_defaults(per_device_train_batch_size=32, per_device_eval_batch_size=64)
    parser.set_defaults(learning_rate=5e-4, warmup_steps=0.1, pattern="2:4", pruning_warmup_steps=0.7)
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
    print(trainer.evaluate())
    trainer.save_model()

    print(verify(args.output_dir, "2:4"))  # raises ValueError if a group keeps more than two weights
    folder = f"{args.output_dir}/nm"
    print(export_semi_structured(args.output_dir, folder))
    model = load_semi_structured(folder, "cpu")  # on a GPU with sparse tensor cores the weights stay packed
    print(f"loaded {type(model).__name__} with {model.num_parameters():,} parameters")


if __name__ == "__main__":
    main()
