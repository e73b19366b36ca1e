"""How fast is 2:4 packing for sparse tensor cores, against torch's own, and what does permuting channels gain?

The weights are random and have the shapes of BERT-base (84.9 M); the permutation also runs on the real 6-layer MiniLM.
Rates are in bytes of dense weights, in the packed dtype.

    python benchmarks/semi_structured.py
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch
from common import alternate, encoder, machine, spread
from torch.sparse._semi_structured_conversions import (
    sparse_semi_structured_from_dense_cutlass,
    sparse_semi_structured_to_dense_cutlass,
)
from transformers import BertConfig, BertForSequenceClassification, PreTrainedModel
from transformers.utils import logging

from hf_maskselect import permute_channels, prunable_weights
from hf_maskselect.masking.patterns import NM
from hf_maskselect.storage.two_of_four import compress, decompress
from hf_maskselect.utils.tables import text_table


def packing(repeats: int) -> list[list[str]]:
    """Time packing and unpacking of all matrices, in turns with torch."""
    shapes = [(768, 768)] * 4 + [(3072, 768), (768, 3072)]
    generator, rows = torch.Generator().manual_seed(0), []
    for dtype in (torch.bfloat16, torch.int8):
        dense = []
        for shape in shapes:  # one layer; all twelve have these shapes
            weight = torch.randn(shape, generator=generator)
            weight *= NM(2, 4).masks({"w": weight.abs()}, 0.5)["w"]
            dense.append(weight.mul(30).clamp(-127, 127).to(dtype))
        packed = [compress("w", weight) for weight in dense]
        assert all(torch.equal(decompress(*pair), weight) for pair, weight in zip(packed, dense, strict=True))
        jobs = {
            "pack": lambda dense=dense: [compress("w", weight) for weight in dense * 12],
            "torch": lambda dense=dense: [sparse_semi_structured_from_dense_cutlass(weight) for weight in dense * 12],
            "unpack": lambda packed=packed: [decompress(*pair) for pair in packed * 12],
            "torch unpack": lambda packed=packed: [
                sparse_semi_structured_to_dense_cutlass(*pair) for pair in packed * 12
            ],
        }
        times = alternate(jobs, repeats)
        size = 12 * sum(weight.numel() * dtype.itemsize for weight in dense) / 1e6
        for job, rival in (("pack", "torch"), ("unpack", "torch unpack")):
            rate = size / statistics.median(times[job])
            ratio = statistics.median(r / own for r, own in zip(times[rival], times[job], strict=True))
            rows.append([f"{job} {str(dtype)[6:]}", spread(times[job], 3), f"{rate:.0f}", f"{ratio:.2f}"])
    return rows


def permuting(name: str, model: PreTrainedModel) -> list[str]:
    """Permute all matrices of a model that allow it, and return a row of the table."""
    start = time.perf_counter()
    report = permute_channels(model, "2:4", prunable_weights(model))
    seconds = time.perf_counter() - start
    gains = [after / before - 1 for _, before, after in report.rows]
    assert min(gains) >= 0
    return [
        name,
        str(len(gains)),
        f"{seconds:.1f}",
        f"{report.mean_gain:.2%}",
        f"{min(gains):.2%}",
        f"{max(gains):.2%}",
    ]


def main() -> None:
    """Print both tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    print(machine() + "\n")
    print(text_table(["job", "seconds", "MB/s", "times faster than torch"], packing(args.repeats)) + "\n")
    rows = [
        permuting("MiniLM, pre-trained", encoder()),
        permuting("BERT-base, random", BertForSequenceClassification(BertConfig())),
    ]
    print(text_table(["permutation", "matrices", "seconds", "mean gain", "least", "largest"], rows))


if __name__ == "__main__":
    main()
