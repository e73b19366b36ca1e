"""What does a refit cost, compared with training and with one factorization for each output?

    python benchmarks/refit.py [--bf16]

First table: seconds of `refit` on `--rows` rows, beside training on the same rows (forward and backward in batches of
16, and a teacher's forward pass). With `--bf16` the training and the forward passes of the refit run under autocast;
the least squares stay in fp32. The search counts a row of the uncut model's pass as `DENSE_COST` and a row of a
candidate's refit as `REFIT_COST` rows of training. Second table: `solve_masked` beside the direct way, which
factorizes, for every output, the part of the Gram matrix that belongs to its kept weights (`torch.linalg.cholesky`,
outputs in blocks of equal size); and the share of the direct way's gain that `solve_masked` reaches.
"""

from __future__ import annotations

import argparse
import functools

import torch
from common import TokenRows, alternate, encoder, machine, spread
from torch import Tensor

from hf_maskselect import prunable_weights, refit
from hf_maskselect.search.bench import DENSE_COST, REFIT_COST
from hf_maskselect.surgery.least_squares import ridge, solve_masked
from hf_maskselect.utils.tables import text_table

BATCH = 16
BLOCK = 1 << 24  # numbers in one block of the direct way


def batches(rows: int, length: int, vocab: int, size: int) -> list[dict[str, Tensor]]:
    """Make batches of `size` random rows."""
    data = TokenRows(rows, length, vocab)
    chunks = [[data[i] for i in range(first, min(first + size, rows))] for first in range(0, rows, size)]
    return [{name: torch.stack([row[name] for row in chunk]) for name in chunk[0]} for chunk in chunks]


def beside_training(args: argparse.Namespace) -> None:
    """Time refit and training on the same rows, and print the table."""
    table = []
    for sparsity in (0.9375, 0.5):
        model, teacher = encoder(), encoder().eval()
        weights, vocab = prunable_weights(model), model.config.vocab_size
        before = {name: weight.detach().clone() for name, weight in weights.items()}
        generator = torch.Generator().manual_seed(0)
        keep = {name: torch.rand(w.shape, generator=generator) > sparsity for name, w in weights.items()}
        (whole,), parts = (batches(args.rows, args.length, vocab, size) for size in (args.rows, BATCH))
        del whole["labels"]

        @torch.no_grad()
        def cut(weights=weights, before=before, keep=keep, model=model) -> None:
            for name, weight in weights.items():
                weight.copy_(before[name] * keep[name])
            model.eval()

        def train(model=model, teacher=teacher, parts=parts) -> None:
            model.train()
            for inputs in parts:
                with torch.autocast("cpu", torch.bfloat16, enabled=args.bf16):
                    with torch.no_grad():
                        teacher(**inputs)
                    loss = model(**inputs).loss
                loss.backward()
                model.zero_grad()

        def fit(model=model, weights=weights, before=before, whole=whole) -> None:
            with torch.autocast("cpu", torch.bfloat16, enabled=args.bf16):
                refit(model, weights, before, whole)

        times = alternate({"train": train, "fit": fit}, args.repeats, before=cut)
        ratios = [f / t for f, t in zip(times["fit"], times["train"], strict=True)]
        table.append([sparsity, spread(times["train"]), spread(times["fit"]), spread(ratios)])
    counted = f"a refit row counts as {DENSE_COST + REFIT_COST:.2f} rows of training"
    print(f"MiniLM, {args.rows} rows of {args.length} tokens; {counted}\n")
    print(text_table(["sparsity", "training, seconds", "refit, seconds", "ratio"], table), "\n")


def direct(gram: Tensor, cross: Tensor, keep: Tensor) -> Tensor:
    """Solve one linear system for each output: the exact solution that `solve_masked` approaches."""
    gram = gram + ridge(gram) * torch.eye(len(gram))
    counts, delta = keep.sum(1).long(), torch.zeros_like(cross)
    order = counts.argsort()
    block = max(1, BLOCK // int(counts.max()) ** 2)
    for outputs in order.split(block):
        size = int(counts[outputs].max())
        columns = keep[outputs].argsort(dim=1, descending=True, stable=True)[:, :size]
        real = torch.arange(size) < counts[outputs, None]
        systems = gram[columns[:, :, None], columns[:, None, :]]
        systems = torch.where(real[:, :, None] & real[:, None, :], systems, torch.eye(size))
        right = cross.gather(0, outputs[:, None].expand(-1, cross.shape[1])).gather(1, columns) * real
        solved = torch.cholesky_solve(right[..., None], torch.linalg.cholesky(systems))[..., 0]
        delta[outputs] = delta[outputs].scatter(1, columns, solved * real)
    return delta


def beside_factorizations(args: argparse.Namespace) -> None:
    """Time `solve_masked` and the direct way, and print the table."""
    table = []
    for (outputs, inputs), sparsity in (((384, 1536), 0.9375), ((384, 1536), 0.5), ((768, 3072), 0.5)):
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(8192, inputs, generator=generator) @ torch.randn(inputs, inputs, generator=generator)
        weight = torch.randn(outputs, inputs, generator=generator)
        keep = (torch.rand(outputs, inputs, generator=generator) > sparsity).float()
        gram, missing = x.T @ x, weight * (1 - keep)
        cross = missing @ gram
        times = alternate(
            {
                "direct": functools.partial(direct, gram, cross, keep),
                "package": functools.partial(solve_masked, gram, cross, keep),
            },
            args.repeats,
        )

        def error(delta: Tensor, missing=missing, gram=gram) -> float:
            left = missing - delta
            return float(((left @ gram) * left).sum())

        start = error(torch.zeros_like(cross))
        gained = (start - error(solve_masked(gram, cross, keep))) / (start - error(direct(gram, cross, keep)))
        ratios = [d / o for d, o in zip(times["direct"], times["package"], strict=True)]
        shape = f"{outputs} x {inputs}, {sparsity}"
        table.append([shape, spread(times["direct"]), spread(times["package"]), spread(ratios), f"{gained:.2%}"])
    header = ["matrix, sparsity", "direct, seconds", "solve_masked, seconds", "times faster", "of the gain"]
    print(text_table(header, table))


def main() -> None:
    """Print both tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=256)
    parser.add_argument("--length", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--bf16", action="store_true", help="train under autocast")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    print(machine("; bf16 autocast" if args.bf16 else "; fp32"))
    beside_training(args)
    beside_factorizations(args)


if __name__ == "__main__":
    main()
