"""Stop a run in the middle, resume it, and compare it with a run that was not stopped.

    python examples/by_feature/resume.py
    python examples/by_feature/resume.py --max_steps 100 --method taylor

Here a callback stops the run. A kill does the same: the run then resumes from its last checkpoint.
"""

import sys
from pathlib import Path

import torch
from transformers import BertForSequenceClassification, HfArgumentParser, TrainerCallback, set_seed

from hf_maskselect import PruningConfig, PruningTrainer

sys.path.insert(0, str(Path(__file__).parents[2] / "glue_scripts"))  # the demo task is not installed
from demo_data import demo_model_config, demo_tokenizer, load_demo  # noqa: E402


class StopHalfway(TrainerCallback):
    """Write a checkpoint and stop in the middle of the run."""

    def on_step_end(self, args, state, control, **kwargs):
        """Ask the trainer to save and to stop."""
        if state.global_step == state.max_steps // 2:
            control.should_save = control.should_training_stop = True


def train(arguments, folder, stop=False, resume=None):
    """Train in `output_dir/folder` and return the model."""
    parser = HfArgumentParser(PruningConfig)
    parser.set_defaults(output_dir="out/resume", max_steps=400, save_strategy="no", logging_steps=100)
    parser.set_defaults(per_device_train_batch_size=32, learning_rate=5e-4, sparsity=0.75, num_levels=2)
    (args,) = parser.parse_args_into_dataclasses(arguments)
    args.output_dir = f"{args.output_dir}/{folder}"

    set_seed(args.seed)
    tokenizer = demo_tokenizer()
    data = load_demo()["train"].map(lambda rows: tokenizer(rows["sentence"]), batched=True)
    model = BertForSequenceClassification(demo_model_config())
    trainer = PruningTrainer(model, args, train_dataset=data, processing_class=tokenizer)
    if stop:
        trainer.add_callback(StopHalfway())
    trainer.train(resume_from_checkpoint=resume)
    return trainer.model


def main(arguments=None):
    """Train once without a stop and once with one."""
    whole = train(arguments, "whole").state_dict()
    train(arguments, "stopped", stop=True)
    resumed = train(arguments, "stopped", resume=True).state_dict()
    equal = all(torch.equal(weight, resumed[name]) for name, weight in whole.items())
    print("the resumed run has", "the same weights, to the bit" if equal else "OTHER weights")
    return equal


if __name__ == "__main__":
    main()
