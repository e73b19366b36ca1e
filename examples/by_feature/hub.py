"""Write the model card, load the saved model again, and push it to the Hub if you ask for that.

    python examples/by_feature/hub.py
    python examples/by_feature/hub.py --push_to_hub --hub_model_id your-name/small-bert

Without `--push_to_hub` nothing leaves this machine: the folder has the files that a push would send.
The demo model is trained from scratch, so it first trains dense (`pruning_warmup_steps`). A fine-tuned model needs no
such phase.
"""

import sys
from pathlib import Path

from transformers import AutoModelForSequenceClassification, BertForSequenceClassification, HfArgumentParser, set_seed

from hf_maskselect import PruningConfig, PruningTrainer, load_pruned

sys.path.insert(0, str(Path(__file__).parents[2] / "glue_scripts"))  # the demo task is not installed
from demo_data import demo_model_config, demo_tokenizer, load_demo  # noqa: E402


def accuracy(prediction):
    """Return the share of rows that were classified correctly."""
    return {"accuracy": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())}


def main(arguments=None):
    """Train, save, write the card, load and push."""
    parser = HfArgumentParser(PruningConfig)
    parser.set_defaults(output_dir="out/hub", max_steps=1200, save_strategy="no", logging_steps=100)
    parser.set_defaults(per_device_train_batch_size=32, per_device_eval_batch_size=64, learning_rate=5e-4)
    parser.set_defaults(warmup_steps=0.1, sparsity=0.9, pruning_warmup_steps=0.5, pack_on_save=True)
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
    trainer.evaluate()  # the card shows the last scores
    trainer.save_model()
    trainer.create_model_card()
    print(Path(args.output_dir, "README.md").read_text())

    AutoModelForSequenceClassification.from_pretrained(args.output_dir)  # an ordinary model
    model, masks = load_pruned(args.output_dir)  # with its masks; a name on the Hub works, too
    print(f"{type(model).__name__} with {masks.sparsity():.4f} zeros in the encoder")
    if args.push_to_hub:
        trainer.push_to_hub()


if __name__ == "__main__":
    main()
