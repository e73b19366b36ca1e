"""What does a training step with hard masks cost, against the same step of a plain `Trainer`?

Both trainers run MiniLM (6 layers, two-class head) on generated token ids with the same arguments, in short
alternating blocks of `train()`; a step is the time from one step's begin to the next one's, so everything the trainers
do is inside. "mask hooks" is the time spent in the mask multiplications themselves, within the same steps. Aim: at
most 1.03x.

    python benchmarks/step.py
    python benchmarks/step.py --length 128 --blocks 4
"""

from __future__ import annotations

import argparse
import contextlib
import io
import statistics
import tempfile
import time

import torch
from common import TokenRows, encoder, machine, spread
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.utils import logging

from hf_maskselect import PruningConfig, PruningTrainer
from hf_maskselect.report import text_table

SPARSITY = 0.9375


def now() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


class Clock(TrainerCallback):
    """Begin of every step, in seconds."""

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        self.begins: list[float] = []

    def on_step_begin(self, args, state, control, **kwargs) -> None:
        self.begins.append(now())

    def steps(self, skipped: int) -> list[float]:
        """Seconds of each step but the first `skipped` (mask search, warm-up) and the last (it has no next)."""
        return [b - a for a, b in zip(self.begins, self.begins[1:], strict=False)][skipped:]


class HookTimer:
    """Adds up what a bound method costs."""

    def __init__(self, method, name: str) -> None:
        self._call, self.spent = getattr(method, name), 0.0
        setattr(method, name, self)

    def __call__(self) -> None:
        start = now()
        self._call()
        self.spent += now() - start


def trainer_of(kind: type[Trainer], config: type[TrainingArguments], args, folder: str, **fields) -> Trainer:
    """A trainer with a clock; only its class and the pruning fields differ."""
    shared = {
        "output_dir": folder,
        "max_steps": args.skip + args.steps + 1,
        "per_device_train_batch_size": args.batch,
        "save_strategy": "no",
        "logging_strategy": "no",
        "report_to": "none",
        "dataloader_pin_memory": False,
        "disable_tqdm": True,
        "seed": 0,
    }
    model = encoder()
    data = TokenRows(shared["max_steps"] * args.batch, args.length, model.config.vocab_size)
    trainer = kind(model=model, args=config(**shared, **fields), train_dataset=data)
    trainer.clock = Clock()
    trainer.add_callback(trainer.clock)
    return trainer


def block(trainer: Trainer, skipped: int) -> list[float]:
    """Step times of one short `train()`, its printing swallowed."""
    with contextlib.redirect_stdout(io.StringIO()):
        trainer.train()
    return trainer.clock.steps(skipped)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--length", type=int, default=64, help="tokens in a row")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--blocks", type=int, default=6, help="alternations (pairs of blocks)")
    parser.add_argument("--steps", type=int, default=10, help="timed steps of one block")
    parser.add_argument("--skip", type=int, default=3, help="first steps of a block that are not counted")
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    logging.set_verbosity_error()
    print(machine(f"; MiniLM, batch {args.batch}, length {args.length}, fp32, {SPARSITY} unstructured, no teacher"))
    with tempfile.TemporaryDirectory() as folder:
        plain = trainer_of(Trainer, TrainingArguments, args, folder)
        masked = trainer_of(
            PruningTrainer, PruningConfig, args, folder, method="magnitude", num_levels=1, sparsity=SPARSITY
        )
        hooks = [HookTimer(masked._method, name) for name in ("before_clipping", "on_optimizer_step")]
        for trainer in (plain, masked):  # warm-up, and the cut
            block(trainer, args.skip)
        times, in_hooks = {plain: [], masked: []}, []
        for round_ in range(args.blocks):
            for trainer in (plain, masked) if round_ % 2 == 0 else (masked, plain):
                for hook in hooks:
                    hook.spent = 0.0
                times[trainer].append(block(trainer, args.skip))
                if trainer is masked:
                    in_hooks.append([hook.spent / masked.state.max_steps * 1e3 for hook in hooks])
    zeros = masked._method.masks.sparsity()
    all_ = {t: [step for b in blocks for step in b] for t, blocks in times.items()}
    base = statistics.median(all_[plain])
    pairs = [statistics.median(m) / statistics.median(p) for p, m in zip(times[plain], times[masked], strict=True)]
    mean_hooks = [statistics.median(h) for h in zip(*in_hooks, strict=True)]
    rows = [
        [name, f"{1e3 * statistics.median(all_[t]):.1f}", f"{statistics.median(all_[t]) / base:.3f}"]
        for name, t in (("transformers.Trainer", plain), (f"PruningTrainer, {zeros:.4f} zeros", masked))
    ] + [
        [f"  within it: {name}", f"{spent:.1f}", f"{spent / (1e3 * base):.3f}"]
        for name, spent in zip(("gradient mask", "weight mask"), mean_hooks, strict=True)
    ]
    print(f"median of {args.blocks} blocks of {args.steps} steps each, alternating\n")
    print(text_table(["step", "ms", "ratio"], rows))
    print(f"ratio of the block medians, pair by pair: {spread(pairs, 3)}; aim: at most 1.03")


if __name__ == "__main__":
    main()
