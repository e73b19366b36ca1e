"""How much more memory does a mask search need than plain training under the same trainer?

Two processes train MiniLM on short rows, so that activations stay small beside the weights: one with `method="random"`
and one with `method="magnitude"`, which does not search. Live tensor bytes are counted exactly, from the operator that
returns a storage until it is freed; resident memory is sampled. The unit is one copy of the trained weights. The bound
is 3 copies: one of the weights and two for AdamW's moments in a trial. For each peak the script lists the live tensors
by the line of code that made them.

    python benchmarks/memory.py
    python benchmarks/memory.py --vocab-size 1000 --candidates 8    # nearly all weights are prunable: the worst case
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import io
import json
import os
import subprocess
import sys
import tempfile
import threading
import weakref
from pathlib import Path

import torch
from common import QUIET, TokenRows, encoder, machine
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers.utils import logging

from hf_maskselect import PruningConfig, PruningTrainer, prunable_weights
from hf_maskselect.utils.tables import text_table

BOUND = 3
PHASES = {
    "_draw_first": "making candidates",
    "_draw_share": "making candidates",
    "_race": "trials",
    "untouched": "trials",
    "restore": "trials",
}
OUTER = "training"
KINDS = {"optim": "optimizer", "autograd": "backward", "models": "forward"}


class LiveBytes(TorchDispatchMode):
    """Count the bytes of every live storage that an operator returned, with the code that called the operator."""

    def __init__(self) -> None:
        super().__init__()
        self.phase, self.live, self._counted = OUTER, 0, set()
        self._by_origin: collections.Counter = collections.Counter()
        self.peaks: dict[str, tuple[int, dict[str, int]]] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.see(out)
        return out

    def see(self, *tensors) -> None:
        """Count the storages of `tensors` until they are freed."""
        for tensor in tree_leaves(tensors):
            if not isinstance(tensor, torch.Tensor) or tensor.device.type == "meta":
                continue
            storage = tensor.untyped_storage()
            if storage._cdata not in self._counted:
                self._counted.add(storage._cdata)
                self.phase, origin = whereabouts()
                weakref.finalize(storage, self._drop, storage._cdata, storage.nbytes(), origin).atexit = False
                self._add(storage.nbytes(), origin)

    def _add(self, size: int, origin: str) -> None:
        self.live += size
        self._by_origin[origin] += size
        if self.live > self.peaks.get(self.phase, (0,))[0]:
            self.peaks[self.phase] = self.live, dict(self._by_origin)

    def _drop(self, key: int, size: int, origin: str) -> None:
        self._counted.discard(key)
        self.live -= size
        self._by_origin[origin] -= size


def whereabouts() -> tuple[str, str]:
    """Return the phase of the run, and the innermost line of the package with the kind of work it does."""
    frame, phase, origin, kind = sys._getframe(2), OUTER, None, ""
    while frame is not None:
        path, name = Path(frame.f_code.co_filename), frame.f_code.co_name
        if not kind and "site-packages" in path.parts:
            kind = next((KINDS[part] for part in path.parts if part in KINDS), "")
        if "hf_maskselect" in path.parts:
            origin = origin or f"{path.name}:{frame.f_lineno} {name}"
            phase = PHASES.get(name, phase)
        frame = frame.f_back
    return phase, " ".join(filter(None, (origin if phase != OUTER or not kind else OUTER, kind))) or "before training"


class Resident(threading.Thread):
    """Sample resident memory every 2 ms, and keep the largest value of each phase."""

    def __init__(self, live: LiveBytes) -> None:
        super().__init__(daemon=True)
        self._live, self._done, self.peaks = live, threading.Event(), collections.Counter()

    def run(self) -> None:
        """Sample until `stop`."""
        page = os.sysconf("SC_PAGE_SIZE")
        while not self._done.wait(0.002):
            now = int(Path("/proc/self/statm").read_text().split()[1]) * page
            self.peaks[self._live.phase] = max(self.peaks[self._live.phase], now)

    def stop(self) -> None:
        """End the thread."""
        self._done.set()
        self.join()


def measure(args, method: str) -> dict:
    """Train once and return the peaks in bytes; at the second level the outer AdamW already has its moments."""
    torch.set_num_threads(args.threads)
    logging.set_verbosity_error()
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        model = encoder(args.vocab_size)
        searched = {"num_candidates": args.candidates, "trial_steps": args.trial_steps, "criterion_batches": 4}
        searched["refit_rows"] = 0 if args.trial_steps else 256
        config = PruningConfig(
            output_dir=folder,
            method=method,
            num_levels=2,
            max_steps=6,
            per_device_train_batch_size=args.batch,
            per_device_eval_batch_size=args.batch,
            criterion_batch_size=args.batch,
            use_cpu=True,
            **QUIET,
            **(searched if method == "random" else {}),
        )
        data = TokenRows(64 * args.batch, args.length, model.config.vocab_size)
        trainer = PruningTrainer(model=model, args=config, train_dataset=data)
        live = LiveBytes()
        live.see(*model.parameters(), *model.buffers())
        resident = Resident(live)
        resident.start()
        with live:
            trainer.train()
        resident.stop()
    trained = [p for p in model.parameters() if p.requires_grad]
    return {
        "copy": sum(p.numel() * p.element_size() for p in trained),
        "prunable": sum(w.numel() for w in prunable_weights(model).values()) / sum(p.numel() for p in trained),
        "live": live.peaks,
        "resident": resident.peaks,
    }


def in_own_process(args, method: str) -> dict:
    """Run `measure` in a new process."""
    command = [sys.executable, __file__, "--child", method, *sys.argv[1:]]
    done = subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    """Measure both runs and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--length", type=int, default=16, help="tokens in a row")
    parser.add_argument("--batch", type=int, default=8, help="rows of every batch: training, scores, gradients")
    parser.add_argument("--candidates", type=int, default=4)
    parser.add_argument("--trial-steps", type=int, default=2, help="0: candidates are scored after refit on 256 rows")
    parser.add_argument("--vocab-size", type=int, help="shrink the embedding, so that more of the model is prunable")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--top", type=int, default=9, help="origins to list for each peak")
    parser.add_argument("--child", choices=("random", "magnitude"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        print(json.dumps(measure(args, args.child)))
        return
    search, plain = in_own_process(args, "random"), in_own_process(args, "magnitude")
    copy, base, base_resident = plain["copy"], plain["live"][OUTER][0], plain["resident"][OUTER]
    print(machine(f"; MiniLM, batch {args.batch}, length {args.length}, {args.candidates} candidates"))
    print(f"one copy of the trained weights: {copy / 2**20:.1f} MiB, {plain['prunable']:.2f} of them prunable\n")
    rows = [["plain training", f"{base / copy:.2f}", "", f"{base_resident / copy:.2f}", ""]]
    for phase, (peak, _) in search["live"].items():
        resident = search["resident"].get(phase, 0)
        extra = [f"{(peak - base) / copy:.2f}", f"{resident / copy:.2f}", f"{(resident - base_resident) / copy:.2f}"]
        rows.append([f"search run: {phase}", f"{peak / copy:.2f}", *extra])
    print(text_table(["peak, in copies", "live tensors", "extra", "resident", "extra resident"], rows))
    worst = max(peak for peak, _ in search["live"].values()) - base
    verdict = "kept" if worst <= 1.001 * BOUND * copy else "BROKEN"  # 1.001: step counters
    print(f"\nextra peak of live tensors: {worst / copy:.3f} copies; bound {BOUND}: {verdict}")
    for title, run, phase in [("plain", plain, OUTER), *(("search", search, p) for p in search["live"] if p != OUTER)]:
        origins = sorted(run["live"][phase][1].items(), key=lambda item: -item[1])[: args.top]
        print(f"\nlive at the peak of the {title} run: {phase}")
        print(text_table(["made by", "copies"], [[o, f"{size / copy:.3f}"] for o, size in origins]))


if __name__ == "__main__":
    main()
