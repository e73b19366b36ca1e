"""Save a pruned model with its card, load it again in two ways, and push it to the Hub if you ask for it.

python examples/by_feature/hub.py
python examples/by_feature/hub.py --push_to_hub --hub_model_id user/name    # needs a login (hf auth login)
"""

import sys
from pathlib import Path

from transformers import AutoModelForSequenceClassification, BertForSequenceClassification, HfArgumentParser, set_seed

from hf_maskselect import PruningConfig, PruningTrainer, load_pruned

sys.path.insert(0, str(Path(__file__).parents[2] / "glue_scripts"))  # the demo task is not installed
from demo_data import demo_model_config, demo_tokenizer, load_demo  # noqa: E402


def main(arguments=None):
    """Train, save, write the card, load, and push."""
    parser = HfArgumentParser(PruningConfig)
    parser.set_defaults(output_dir="out/hub", max_steps=900, save_strategy="no", logging_steps=100)
    parser.set_defaults(per_device_train_batch_size=32, learning_rate=5e-4, warmup_steps=0.1)
    parser.set_defaults(sparsity=0.9, num_levels=1, num_candidates=3, pruning_warmup_steps=0.7, pack_on_save=True)
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
    trainer.evaluate()
    trainer.save_model()  # with pack_on_save also the packed file, for transport
    trainer.create_model_card()
    print((Path(args.output_dir) / "README.md").read_text())

    plain = AutoModelForSequenceClassification.from_pretrained(args.output_dir)  # needs nothing of this package
    model, masks = load_pruned(args.output_dir)  # the masks too: this model can be trained on with its zeros kept
    zeros = sum(int((plain.get_parameter(name) == 0).sum()) for name in masks)
    print(f"{zeros} zeros loaded plainly, {masks.total - masks.kept} in the masks of {type(model).__name__}")

    if args.push_to_hub:
        trainer.push_to_hub()  # weights, masks, card and pictures


if __name__ == "__main__":
    main()
