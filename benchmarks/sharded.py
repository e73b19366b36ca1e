"""How fast are masks of sharded weights (rows on two processes, FSDP2), against masks of the whole in one process?

The script uses 72 matrices of the encoder of BERT-base (84,934,656 scores) and one thread for each process, and counts
the collectives.

    python benchmarks/sharded.py
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time

import torch
import torch.distributed as dist
import torch.multiprocessing
from common import machine, seconds, spread

from hf_maskselect.masking.patterns import Unstructured
from hf_maskselect.masking.sharded import Shards
from hf_maskselect.utils.tables import text_table

SHAPES = [(768, 768)] * 48 + [(3072, 768), (768, 3072)] * 12
RANKS = 2
CASES = {
    "global": Unstructured("global", 0.0),
    "global, floors": Unstructured("global"),
    "balanced, floors": Unstructured("balanced"),
    "layer": Unstructured("layer"),
}


class Counted(Shards):
    """Shards that record the bytes of every all-reduce."""

    def _summed(self, counts):
        self.messages.append(counts.nbytes)
        return super()._summed(counts)


def make_scores() -> dict[str, torch.Tensor]:
    """Make scores whose scale differs between matrices, as in trained models, so that some fall below their floor."""
    generator = torch.Generator().manual_seed(0)
    scale = torch.rand(len(SHAPES), generator=generator) + 0.3
    return {str(i): torch.randn(s, generator=generator).abs_() * scale[i] for i, s in enumerate(SHAPES)}


def process(index: int, folder: str, repeats: int, results) -> None:
    """Run every case `repeats` times in one process; rank 0 also times the whole and writes `results`."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder}/store", rank=index, world_size=RANKS)
    whole = make_scores()
    mine = {name: score.chunk(RANKS)[index].clone() for name, score in whole.items()}
    sizes = [score.numel() for score in whole.values()]
    for name, pattern in CASES.items():
        shards, times = Counted(), []
        for _ in range(repeats):
            shards.messages = []
            dist.barrier()
            times.append(seconds(lambda p=pattern, s=shards: p.sharded_masks(mine, 0.9375, s, None, (sizes, sizes))))
        if index == 0:
            time.sleep(0.1)
            alone = [seconds(lambda p=pattern: p.masks(whole, 0.9375)) for _ in range(repeats)]
            results[name] = times, alone, shards.messages
        dist.barrier()
    dist.destroy_process_group()


def main() -> None:
    """Start the processes and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    print(machine(f"; {RANKS} processes"))
    with tempfile.TemporaryDirectory() as folder, torch.multiprocessing.Manager() as manager:
        results = manager.dict()
        torch.multiprocessing.spawn(process, (folder, args.repeats, results), nprocs=RANKS)
        rows = [
            [
                name,
                f"{statistics.median(times):.2f}",
                f"{statistics.median(alone):.2f}",
                spread([a / b for a, b in zip(alone, times, strict=True)]),
                len(messages),
                max(messages),
                sum(messages),
            ]
            for name, (times, alone, messages) in dict(results).items()
        ]
    print(
        text_table(["scope", "sharded s", "whole s", "times faster", "all-reduces", "largest, bytes", "bytes"], rows)
    )


if __name__ == "__main__":
    main()
