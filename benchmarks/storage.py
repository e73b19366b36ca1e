"""How small is a packed model, how fast is packing, and what do masks add to a checkpoint?

A model with the shapes of BERT-base and random weights (110 M, 85 M of them prunable) gets random masks of four
sparsities, and is packed and unpacked. Sizes are compared with the entropy bound; speeds are in bytes of dense
weights. Then plain `Trainer` and `PruningTrainer` save checkpoints of the same model in turns.

    python benchmarks/storage.py
    python benchmarks/storage.py --only checkpoint --repeats 15 --folder /dev/shm   # in memory, without a disk
"""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import shutil
import statistics
import tempfile
import time
from pathlib import Path

import torch
from common import QUIET, TokenRows, alternate, machine, seconds, spread
from safetensors.torch import load_file
from transformers import BertConfig, BertForSequenceClassification, PreTrainedModel, Trainer, TrainingArguments
from transformers.utils import logging

from hf_maskselect import MaskSet, PruningConfig, PruningState, PruningTrainer, pack, prunable_weights, unpack
from hf_maskselect.utils.folders import sync_tree
from hf_maskselect.utils.tables import text_table

SPARSITIES = (0.8, 0.9, 0.9375, 0.99)
LOSSY = {"lossless": {}, "bf16 values, int8 tables": {"values": "bf16", "embeddings": "int8"}}


def cut(model: PreTrainedModel, sparsity: float) -> MaskSet:
    """Give the model new random weights under random masks, and return the masks."""
    with torch.no_grad():
        masks = {}
        for name, weight in prunable_weights(model).items():
            masks[name] = torch.rand_like(weight) >= sparsity
            weight.copy_(torch.randn_like(weight).mul_(0.04) * masks[name])
    return MaskSet(masks)


def storage(model: PreTrainedModel, root: Path, repeats: int) -> None:
    """Pack and unpack at every sparsity, and print sizes and speeds."""
    rows = []
    for sparsity in SPARSITIES:
        masks = cut(model, sparsity)
        folder = root / "saved"
        model.save_pretrained(folder)
        PruningState(masks, "random", "unstructured", sparsity, 1, 0, 0).sealed(folder).save(folder)
        for title, options in LOSSY.items():
            packing, unpacking = [], []
            for _ in range(repeats):
                for name in ("packed", "again"):
                    shutil.rmtree(root / name, ignore_errors=True)
                start = time.perf_counter()
                report = pack(folder, root / "packed", **options)
                packing.append(time.perf_counter() - start)
                unpacking.append(seconds(lambda: unpack(root / "packed", root / "again")))
            if not options:
                before, after = (
                    load_file(folder / "model.safetensors"),
                    load_file(root / "again" / "model.safetensors"),
                )
                assert before.keys() == after.keys() and all(torch.equal(before[n], after[n]) for n in before)
            rate = [report.dense / 1e6 / statistics.median(times) for times in (packing, unpacking)]
            rows.append(
                [f"{sparsity:g}, {title}", f"{report.packed / 1e6:.1f}", f"{report.dense / report.packed:.2f}"]
                + [f"{report.packed / report.bound:.4f}", f"{rate[0]:.0f}", f"{rate[1]:.0f}"]
            )
    print(text_table(["sparsity", "MB", "times smaller", "of the bound", "pack MB/s", "unpack MB/s"], rows))


def checkpoints(model: PreTrainedModel, root: Path, repeats: int) -> None:
    """Save checkpoints in turns with `Trainer`, `Trainer` and fsync, and `PruningTrainer`, and print the table."""
    common = {
        "per_device_train_batch_size": 2,
        "max_steps": 1,
        "use_cpu": True,
        **QUIET,
    }
    data = TokenRows(8, 8, model.config.vocab_size)
    with contextlib.redirect_stdout(io.StringIO()):
        plain = Trainer(model, TrainingArguments(str(root / "plain"), **common), train_dataset=data)
        plain.train()
        other = BertForSequenceClassification(model.config)
        config = PruningConfig(str(root / "pruned"), method="magnitude", num_levels=1, **common)
        pruned = PruningTrainer(other, config, train_dataset=data)
        pruned.train()

    def calm() -> None:
        """Remove old files and empty the write cache, so that no save waits for the files of another."""
        for name in ("plain", "pruned"):
            shutil.rmtree(root / name / "checkpoint-1", ignore_errors=True)
        os.sync()

    def save(trainer: Trainer) -> None:
        trainer._save_checkpoint(trainer.model, None)

    def save_to_disk() -> None:
        save(plain)
        sync_tree(root / "plain" / "checkpoint-1")

    jobs = {
        "Trainer": lambda: save(plain),
        "Trainer, then fsync": save_to_disk,
        "PruningTrainer": lambda: save(pruned),
    }
    times = alternate(jobs, repeats, calm)
    sizes = {}
    for name, folder in zip(jobs, ("plain", "plain", "pruned"), strict=True):
        jobs[name]()
        sizes[name] = sum(f.stat().st_size for f in (root / folder / "checkpoint-1").iterdir())
    base = list(jobs)[0]
    # The median of the ratios of each round, because a slow disk slows all saves of one round.
    ratios = {name: [own / its for own, its in zip(times[name], times[base], strict=True)] for name in jobs}
    rows = [
        [name, spread(times[name]), f"{statistics.median(ratios[name]):.3f}"]
        + [f"{sizes[name] / 1e6:.1f}", f"{sizes[name] / sizes[base]:.4f}"]
        for name in jobs
    ]
    print(text_table(["checkpoint", "seconds", "ratio", "MB", "ratio of size"], rows))


def main() -> None:
    """Print the chosen tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--folder", help="folder to write to (default: the temporary folder of the system)")
    parser.add_argument("--only", choices=("pack", "checkpoint"), help="one of the two tables")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    model = BertForSequenceClassification(BertConfig())
    print(machine("; BERT-base, random weights and masks") + "\n")
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        if args.only != "checkpoint":
            storage(model, Path(folder), args.repeats)
            print()
        if args.only != "pack":
            checkpoints(model, Path(folder), args.repeats)


if __name__ == "__main__":
    main()
