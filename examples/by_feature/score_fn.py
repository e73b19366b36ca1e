"""Rank weights by your own score.

    python examples/by_feature/score_fn.py
    python examples/by_feature/score_fn.py --max_steps 100 --scope layer --num_candidates 8

The score replaces the criterion of `method="random"`. Every scope, every pattern and the search work with it.
The demo model is trained from scratch, so it first trains dense (`pruning_warmup_steps`). A fine-tuned model needs no
such phase.
"""

import sys
from pathlib import Path

from transformers import BertForSequenceClassification, HfArgumentParser, set_seed

from hf_maskselect import PruningConfig, PruningTrainer

sys.path.insert(0, str(Path(__file__).parents[2] / "glue_scripts"))  # the demo task is not installed
from demo_data import demo_model_config, demo_tokenizer, load_demo  # noqa: E402


def score_fn(name, weight, grad_stats):
    """Return a score for each weight: its size times the root of its summed squared gradients."""
    return weight.detach().abs() * grad_stats.square.sqrt()


def accuracy(prediction):
    """Return the share of rows that were classified correctly."""
    return {"accuracy": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())}


def main(arguments=None):
    """Train with the score, evaluate and show what the search chose."""
    parser = HfArgumentParser(PruningConfig)
    parser.set_defaults(output_dir="out/score_fn", max_steps=1200, save_strategy="no", logging_steps=100)
    parser.set_defaults(per_device_train_batch_size=32, per_device_eval_batch_size=64, learning_rate=5e-4)
    parser.set_defaults(warmup_steps=0.1, sparsity=0.9, num_levels=2, pruning_warmup_steps=0.5)
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
        score_fn=score_fn,
    )
    trainer.train()  # prints the candidates of each level
    print(trainer.evaluate())
    trainer.save_model()


if __name__ == "__main__":
    main()
