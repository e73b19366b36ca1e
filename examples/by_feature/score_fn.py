"""Choose the weights to keep by a score of your own.

    python examples/by_feature/score_fn.py
    python examples/by_feature/score_fn.py --max_steps 100 --num_candidates 1

The score replaces the criterion of `method="random"`. Every scope and pattern works with it, and the search compares its
masks with those of the built-in criteria.
"""

import sys
from pathlib import Path

from transformers import BertForSequenceClassification, HfArgumentParser, set_seed

from hf_maskselect import PruningConfig, PruningTrainer

sys.path.insert(0, str(Path(__file__).parents[2] / "glue_scripts"))  # the demo task is not installed
from demo_data import demo_model_config, demo_tokenizer, load_demo  # noqa: E402


def magnitude_by_gradient(name, weight, grad_stats):
    """Return `|w|` times the root mean square of its gradient: larger scores are kept.

    `weight` has the shape (out, in), and so have the statistics and the result.
    """
    return weight.abs() * (grad_stats.square / grad_stats.samples).sqrt()


def main(arguments=None):
    """Train with the score and print what the search compared."""
    parser = HfArgumentParser(PruningConfig)
    parser.set_defaults(output_dir="out/score_fn", max_steps=900, save_strategy="no", logging_steps=100)
    parser.set_defaults(per_device_train_batch_size=32, learning_rate=5e-4, warmup_steps=0.1)
    parser.set_defaults(sparsity=0.9, num_levels=1, num_candidates=3, pruning_warmup_steps=0.7)
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
        score_fn=magnitude_by_gradient,
    )
    trainer.train()  # prints the candidates of each level; those called score_fn use the score above
    print(trainer.evaluate())
    trainer.save_model()


if __name__ == "__main__":
    main()
