"""Stop a run in the middle, resume it, and compare it with a run that was never stopped.

python examples/by_feature/resume.py
python examples/by_feature/resume.py --max_steps 40
"""

import sys
from pathlib import Path

import torch
from transformers import BertForSequenceClassification, HfArgumentParser, TrainerCallback, set_seed

from hf_maskselect import PruningConfig, PruningTrainer

sys.path.insert(0, str(Path(__file__).parents[2] / "glue_scripts"))  # the demo task is not installed
from demo_data import demo_model_config, demo_tokenizer, load_demo  # noqa: E402


class StopAfterFirstCheckpoint(TrainerCallback):
    """Ends the run as soon as it has a checkpoint, in place of a crash."""

    def on_save(self, args, state, control, **kwargs):
        """Ask the trainer to stop."""
        control.should_training_stop = True


def make_trainer(folder, arguments):
    """Return a trainer of the same run, which saves a checkpoint at three quarters of it."""
    parser = HfArgumentParser(PruningConfig)
    parser.set_defaults(max_steps=400, save_strategy="steps", save_steps=0.75, logging_steps=100)
    parser.set_defaults(per_device_train_batch_size=32, learning_rate=5e-4, warmup_steps=0.1)
    parser.set_defaults(
        output_dir="out/resume", sparsity=0.9, num_levels=2, num_candidates=3, pruning_warmup_steps=0.5
    )
    (args,) = parser.parse_args_into_dataclasses(arguments)
    args.output_dir = str(Path(args.output_dir) / folder)
    set_seed(args.seed)
    tokenizer = demo_tokenizer()
    data = load_demo().map(lambda rows: tokenizer(rows["sentence"]), batched=True)
    model = BertForSequenceClassification(demo_model_config())
    return PruningTrainer(model, args, train_dataset=data["train"], processing_class=tokenizer)


def main(arguments=None):
    """Train once in one go and once in two, and compare the weights to the bit."""
    whole = make_trainer("whole", arguments)
    whole.train()

    stopped = make_trainer("stopped", arguments)
    stopped.add_callback(StopAfterFirstCheckpoint())
    stopped.train()  # warns that the target is not reached yet

    resumed = make_trainer("stopped", arguments)
    resumed.train(resume_from_checkpoint=True)
    weights, expected = resumed.model.state_dict(), whole.model.state_dict()
    print(f"the same weights: {all(torch.equal(weights[name], expected[name]) for name in expected)}")


if __name__ == "__main__":
    main()
