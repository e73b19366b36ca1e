"""What does a training step with masks cost, against the same step of a plain `Trainer`?

Both trainers run MiniLM (6 layers, two-class head) on generated token ids with the same arguments, in short blocks of
`train()` that alternate. A step lasts from its begin to the begin of the next step, so it contains everything that the
trainer does. The rows "within it" show the time for the masks alone, in the same steps. Aim: at most 1.03x for hard
masks, 1.15x for PDP, 1.25x for Gumbel (both timed at the target sparsity).

    python benchmarks/step.py
    python benchmarks/step.py --method pdp
    python benchmarks/step.py --method gumbel
    python benchmarks/step.py --length 128 --blocks 4
"""

from __future__ import annotations

import argparse
import contextlib
import io
import statistics
import tempfile
import time
from dataclasses import dataclass

import torch
from common import QUIET, TokenRows, encoder, machine, spread
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.utils import logging

from hf_maskselect import PruningConfig, PruningTrainer
from hf_maskselect.utils.tables import text_table

SPARSITY = 0.9375
AIMS = {"magnitude": 1.03, "pdp": 1.15, "gumbel": 1.25}
FIELDS = {
    "magnitude": {"num_levels": 1},
    "pdp": {"criterion_batches": 1, "pruning_warmup_steps": 0, "soft_ramp": 0.01, "frozen_steps": 0},
    "gumbel": {"criterion_batches": 1, "soft_ramp": 0.01, "frozen_steps": 0},
}
HOOKS = {"on_step_begin": "effective weights", "before_clipping": "gradients", "on_optimizer_step": "weight mask"}


def now() -> float:
    """Return the time in seconds, when the device has finished its work."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


class Clock(TrainerCallback):
    """Record when each step begins, in seconds."""

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        """Forget the steps of an earlier run."""
        self.begins: list[float] = []

    def on_step_begin(self, args, state, control, **kwargs) -> None:
        """Record the time."""
        self.begins.append(now())

    def steps(self, skipped: int) -> list[float]:
        """Seconds of each step, without the first `skipped` (mask search, warm-up) and the last one."""
        return [b - a for a, b in zip(self.begins, self.begins[1:], strict=False)][skipped:]


class HookTimer:
    """Replace a bound method by one that also records the seconds of each call."""

    def __init__(self, method, name: str) -> None:
        self._call, self.spent = getattr(method, name), []
        setattr(method, name, self)

    def __call__(self, *arguments) -> None:
        """Call the method and record its time."""
        start = now()
        self._call(*arguments)
        self.spent.append(now() - start)


@dataclass
class Block:
    """Result of one block: seconds of each step, median seconds in each hook, and the share of zeros at the end."""

    steps: list[float]
    hooks: list[float]
    zeros: float


def block(kind: type[Trainer], config: type[TrainingArguments], args, folder: str, **fields) -> Block:
    """Run one short `train()` of a new trainer, without its output; only class and pruning fields differ."""
    shared = {
        "output_dir": folder,
        "max_steps": args.skip + args.steps + 1,
        "per_device_train_batch_size": args.batch,
        "dataloader_pin_memory": False,
        "seed": 0,
        **QUIET,
    }
    model = encoder()
    data = TokenRows(shared["max_steps"] * args.batch, args.length, model.config.vocab_size)
    trainer, clock = kind(model=model, args=config(**shared, **fields), train_dataset=data), Clock()
    trainer.add_callback(clock)
    masked = isinstance(trainer, PruningTrainer)
    hooks = [HookTimer(trainer.run.method, name) for name in HOOKS] if masked else []
    with contextlib.redirect_stdout(io.StringIO()):
        trainer.train()
    zeros = trainer.run.method.masks.sparsity() if masked else 0.0
    return Block(clock.steps(args.skip), [statistics.median(hook.spent[args.skip :]) for hook in hooks], zeros)


def main() -> None:
    """Time blocks of both trainers in turns and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--method", choices=FIELDS, default="magnitude")
    parser.add_argument("--length", type=int, default=64, help="tokens in a row")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--blocks", type=int, default=6, help="pairs of blocks")
    parser.add_argument("--steps", type=int, default=10, help="timed steps of one block")
    parser.add_argument("--skip", type=int, default=3, help="first steps of a block that are not counted")
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    logging.set_verbosity_error()
    print(machine(f"; MiniLM, batch {args.batch}, length {args.length}, fp32, {SPARSITY} unstructured, no teacher"))
    kinds = {
        "plain": (Trainer, TrainingArguments, {}),
        "masked": (
            PruningTrainer,
            PruningConfig,
            {"method": args.method, "sparsity": SPARSITY, **FIELDS[args.method]},
        ),
    }
    blocks: dict[str, list[Block]] = {name: [] for name in kinds}
    with tempfile.TemporaryDirectory() as folder:
        for round_ in range(args.blocks + 1):
            for name in kinds if round_ % 2 == 0 else reversed(kinds):
                kind, config, fields = kinds[name]
                blocks[name].append(block(kind, config, args, folder, **fields))
    blocks = {name: runs[1:] for name, runs in blocks.items()}  # the first round is warm-up
    medians = {name: [statistics.median(b.steps) for b in runs] for name, runs in blocks.items()}
    whole = {name: statistics.median([s for b in runs for s in b.steps]) for name, runs in blocks.items()}
    base, masked = whole["plain"], blocks["masked"]
    pairs = [m / p for p, m in zip(medians["plain"], medians["masked"], strict=True)]
    hooks = [statistics.median(spent) for spent in zip(*(b.hooks for b in masked), strict=True)]
    rows = [
        ["transformers.Trainer", f"{1e3 * base:.1f}", "1.000"],
        [
            f"PruningTrainer, {args.method}, {masked[-1].zeros:.4f} zeros",
            f"{1e3 * whole['masked']:.1f}",
            f"{whole['masked'] / base:.3f}",
        ],
        *(
            [f"  within it: {name}", f"{1e3 * spent:.1f}", f"{spent / base:.3f}"]
            for name, spent in zip(HOOKS.values(), hooks, strict=True)
        ),
    ]
    print(f"median of {args.blocks} blocks of {args.steps} steps each, alternating\n")
    print(text_table(["step", "ms", "ratio"], rows))
    print(f"ratio of the block medians, pair by pair: {spread(pairs, 3)}; aim: at most {AIMS[args.method]}")


if __name__ == "__main__":
    main()
