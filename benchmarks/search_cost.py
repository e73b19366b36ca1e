r"""What does a level with several candidates cost, and how many positions does a refit need?

    python benchmarks/search_cost.py --task mrpc --dense runs/mrpc/42/dense --sparsity 0.9 --output_dir search_cost \
        --data_dir DATA [flags of run_glue.py]

Seconds of processor time of a level: gradient samples, refits and scores of `--candidates` masks. "Before" is how it
was done before: every candidate runs the uncut model beside its own, padding included, and is fitted at all positions
with 16 iterations. The other rows run the uncut model once and leave padding out. "All positions" fits at all, the
others at samples of several sizes; with "half the rows" there are half as many rows as well. All candidates have the
same mask here, since their refits take equally long. The score is that of the mask of `taylor:balanced` after its
refit, on every second held-out row: disagreement with the teacher, lower is better.
"""

from __future__ import annotations

import argparse
import contextlib
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar
from unittest import mock

from common import machine
from transformers import set_seed
from trials import bench_of, cut, level_flags

from arguments import parse_arguments
from hf_maskselect.masking.proposals import Proposal
from hf_maskselect.masking.scores import CRITERIA
from hf_maskselect.search import bench as bench_module
from hf_maskselect.surgery import dense_outputs, least_squares
from hf_maskselect.utils.tables import text_table
from job import prepare

T = TypeVar("T")
ALL = 1 << 30
BEFORE = "before"
LIMIT, SAMPLE, WIDE = bench_module.MOST_POSITIONS, dense_outputs.LEAST_SAMPLED, dense_outputs.SAMPLED_PER_INPUT
# Most positions of the rows, least positions of a sample, positions for each input.
SETTINGS = {
    BEFORE: (LIMIT, ALL, WIDE),
    "all positions": (LIMIT, ALL, WIDE),
    "the package": (LIMIT, SAMPLE, WIDE),
    "half the sample": (LIMIT, SAMPLE // 2, WIDE // 2),
    "a quarter": (LIMIT, SAMPLE // 4, WIDE // 4),
    "half the rows": (LIMIT // 2, SAMPLE, WIDE),
}


def processor_seconds(job: Callable[[], T]) -> tuple[float, T]:
    """Return the processor time of a call and its result."""
    start = time.process_time()
    result = job()
    return time.process_time() - start, result


def main() -> None:
    """Time the parts, and print the table."""
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False, formatter_class=formatter)
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--task", required=True)
    parser.add_argument("--sparsity", type=float, required=True)
    parser.add_argument("--dense", required=True, help="folder of the dense model: start and teacher")
    parser.add_argument("--candidates", type=int, default=4)
    parser.add_argument("--settings", nargs="+", default=list(SETTINGS), choices=list(SETTINGS))
    options, flags = parser.parse_known_args()
    options.steps = 1
    data, model, config = parse_arguments([*level_flags(flags, options), "--output_dir", str(options.output_dir)])
    set_seed(config.seed)
    trainer, bench = bench_of(prepare(data, model, config), model, config, options.dense)
    print(machine())
    samples, stats = processor_seconds(lambda: bench.gradient_stats({"product"}, 0))
    masks, table, whole = cut(trainer, Proposal("taylor", "balanced"), 0, stats, CRITERIA), [], list[float]()

    def level(shares: bool) -> tuple[float, float, float, float]:
        """Return the seconds of a level's refits and of one score, and the error and score after a refit."""
        with bench.sandbox.untouched(), bench.shared_dense():
            times = []
            for _ in range(2 if shares else 1):
                bench.sandbox.restore()
                trainer.run.method.set_masks(masks)
                seconds, done = processor_seconds(lambda: bench.refit(bench.sandbox.saved, 0))
                times.append(seconds)
            refits = times[0] + (options.candidates - 1) * times[-1]
            seconds, scores = processor_seconds(lambda: bench.measure(0))
            return refits, 2 * seconds, done.mean_refit_error, scores["teacher"]  # half of the held-out rows

    for name in options.settings:
        most, least, wide = SETTINGS[name]
        with contextlib.ExitStack() as stack:
            patch = lambda *what, stack=stack: stack.enter_context(mock.patch.object(*what))  # noqa: E731
            patch(bench_module, "MOST_POSITIONS", most)
            patch(dense_outputs, "LEAST_SAMPLED", least)
            patch(dense_outputs, "SAMPLED_PER_INPUT", wide)
            if name == BEFORE:
                patch(least_squares, "LEAST_GAIN", 0.0)
                patch(dense_outputs.Positions, "apply", lambda self, forward, values: forward(values))
            refits, score, error, taught = level(shares=name != BEFORE)
        whole.append(samples + refits + options.candidates * score)
        cells = [f"{value:.1f}" for value in (refits, options.candidates * score, whole[-1])]
        table.append([name, *cells, f"{whole[-1] / whole[0]:.2f}", f"{error:.4f}", f"{taught:.4f}"])
    print(f"{options.candidates} candidates, sparsity {options.sparsity}; gradient samples {samples:.1f} s\n")
    print(text_table(["rows and sample", "refits, s", "scores, s", "level, s", "ratio", "error", "score"], table))


if __name__ == "__main__":
    main()
