"""How much more memory do the soft methods need than training under a hard mask?

Each method trains MiniLM in a process of its own, on short rows at the target sparsity. Live tensor bytes are counted
exactly, at the peak of a step and between steps (with optimizer state, without gradients). The unit is one copy of the
prunable weights.

    python benchmarks/soft_memory.py
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import subprocess
import sys
import tempfile

import torch
from common import QUIET, TokenRows, encoder, machine
from memory import LiveBytes
from transformers import TrainerCallback
from transformers.utils import logging

from hf_maskselect import PruningConfig, PruningTrainer, prunable_weights
from hf_maskselect.utils.tables import text_table

METHODS = {
    "magnitude": {"num_levels": 1},
    "pdp": {"criterion_batches": 1, "pruning_warmup_steps": 0, "frozen_steps": 0, "soft_ramp": 0.1},
    "gumbel": {"criterion_batches": 1, "pruning_warmup_steps": 0, "frozen_steps": 0, "soft_ramp": 0.1},
}


class BetweenSteps(TrainerCallback):
    """Record the live bytes at the end of each step, when the gradients are freed."""

    def __init__(self, live: LiveBytes) -> None:
        self._live, self.sizes = live, []

    def on_step_end(self, args, state, control, **kwargs) -> None:
        """Record the bytes."""
        self.sizes.append(self._live.live)


def measure(method: str, batch: int, length: int) -> dict:
    """Train six steps and return the live bytes at the peak and between steps."""
    torch.set_num_threads(2)
    logging.set_verbosity_error()
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        model = encoder()
        config = PruningConfig(
            output_dir=folder,
            method=method,
            max_steps=6,
            per_device_train_batch_size=batch,
            use_cpu=True,
            **QUIET,
            **METHODS[method],
        )
        live = LiveBytes()
        live.see(*model.parameters(), *model.buffers())
        between = BetweenSteps(live)
        data = TokenRows(64 * batch, length, model.config.vocab_size)
        trainer = PruningTrainer(model=model, args=config, train_dataset=data, callbacks=[between])
        with live:
            trainer.train()
    copy = sum(w.numel() * w.element_size() for w in prunable_weights(model).values())
    peak = max(size for size, _ in live.peaks.values())
    return {"copy": copy, "peak": peak, "between": max(between.sizes[2:-1])}


def main() -> None:
    """Measure every method in a new process and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--length", type=int, default=16, help="tokens in a row")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--child", choices=METHODS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        print(json.dumps(measure(args.child, args.batch, args.length)))
        return
    runs = {}
    for method in METHODS:
        command = [sys.executable, __file__, "--child", method, *sys.argv[1:]]
        done = subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True)
        runs[method] = json.loads(done.stdout.splitlines()[-1])
    copy, base = runs["magnitude"]["copy"], runs["magnitude"]
    print(machine(f"; MiniLM, batch {args.batch}, length {args.length}"))
    print(f"one copy of the prunable weights: {copy / 2**20:.1f} MiB\n")
    rows = [
        [
            name,
            *(f"{run[key] / copy:.2f}" for key in ("peak", "between")),
            *(f"{(run[key] - base[key]) / copy:+.2f}" for key in ("peak", "between")),
        ]
        for name, run in runs.items()
    ]
    print(text_table(["in copies", "peak", "between steps", "peak, extra", "between, extra"], rows))


if __name__ == "__main__":
    main()
