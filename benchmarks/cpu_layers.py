"""At which sparsity does which product pay on this CPU?

Times each product of `export_cpu` for the two matrices of BERT-base's FFN (3072 x 768 and 768 x 3072) at several
sparsities and numbers of tokens, by the processor time of one thread. Prints a table, and draws how many times faster
than the best dense float32 product each of them is. `1x4` products get blocks of four zeros, the others single zeros.

    python benchmarks/cpu_layers.py --output docs/figures/cpu_layers.png
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from common import machine
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from hf_maskselect.runtime.choose import built, least_seconds
from hf_maskselect.runtime.files import cpu_name
from hf_maskselect.runtime.kernels import EXACT_KINDS, INT8_KINDS, KINDS, missing
from hf_maskselect.utils.tables import text_table

SHAPES = ((3072, 768), (768, 3072))
TOKENS = (32, 128, 1024)
SPARSITIES = (0.5, 0.7, 0.8, 0.9, 0.9375, 0.97, 0.99)
DENSE = ("dense", "onednn", "bf16", "int8")
_SHADES = "#24292f #6a737d #b08800 #0b61a4 #d8dee4 #a8b0b9 #e36209 #c0303f".split()
COLOURS = dict(zip(KINDS, _SHADES, strict=True))


def pruned(shape: tuple[int, int], sparsity: float, block: int) -> torch.Tensor:
    """Make a matrix whose smallest blocks are zero."""
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    sums = weight.abs().view(len(weight), -1, block).sum(-1)
    limit = sums.flatten().kthvalue(round(sparsity * sums.numel())).values
    return weight * (sums > limit).repeat_interleave(block, 1)


def seconds(kinds: list[str], sparsity: float, tokens: int) -> dict[str, float]:
    """Return the seconds of both matrices together, by kind."""
    total = dict.fromkeys(kinds, 0.0)
    for shape in SHAPES:
        rows = torch.randn(tokens, shape[1])
        linears = {kind: built(kind, pruned(shape, sparsity, 4 if kind.endswith("1x4") else 1)) for kind in kinds}
        jobs = {kind: (lambda linear=linear, rows=rows: linear(rows)) for kind, linear in linears.items()}
        with torch.inference_mode():
            for kind, least in least_seconds(jobs, 0.3).items():
                total[kind] += least
    return total


def draw(times: dict[tuple[int, float], dict[str, float]], path: Path) -> None:
    """Draw one panel a number of tokens, one line a product."""
    figure = Figure(figsize=(3.4 * len(TOKENS) + 1.2, 3.6), layout="constrained", dpi=150)
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, len(TOKENS), sharey=True)
    for axes, tokens in zip(panels, TOKENS, strict=True):
        for kind in next(iter(times.values())):
            speeds = [
                min(times[tokens, s][k] for k in ("dense", "onednn")) / times[tokens, s][kind] for s in SPARSITIES
            ]
            dense = kind in DENSE
            style = (
                {"linestyle": "--", "linewidth": 1} if dense else {"marker": "o", "markersize": 3, "linewidth": 1.6}
            )
            axes.plot(range(len(SPARSITIES)), speeds, color=COLOURS[kind], label=kind, **style)
        axes.set_xticks(range(len(SPARSITIES)), [f"{100 * s:g}" for s in SPARSITIES], fontsize=8)
        axes.set_yscale("log", base=2)
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}x")
        axes.set_title(f"{tokens} tokens", fontsize=9)
        axes.set_xlabel("sparsity in %", fontsize=8)
        axes.tick_params(labelsize=8)
        axes.grid(axis="y", linewidth=0.4, color="#d8dee4")
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("times faster than dense float32", fontsize=8)
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside right center", fontsize=8, frameon=False)
    figure.savefig(path)


def main() -> None:
    """Measure, print and draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="PNG file to draw")
    args = parser.parse_args()
    torch.set_num_threads(1)
    print(f"{cpu_name()}; {machine()}\n", flush=True)
    kinds = [kind for kind in (*EXACT_KINDS, "bf16", *INT8_KINDS) if not missing(kind)]
    if not torch.cpu._is_avx512_bf16_supported():
        kinds.remove("bf16")  # it would be emulated
    times = {(tokens, s): seconds(kinds, s, tokens) for tokens in TOKENS for s in SPARSITIES}
    rows = [
        [str(tokens), f"{s:g}", *(f"{1000 * by_kind[kind]:.2f}" for kind in kinds)]
        for (tokens, s), by_kind in times.items()
    ]
    print(text_table(["tokens", "sparsity", *(f"{kind} ms" for kind in kinds)], rows))
    if args.output:
        draw(times, args.output)


if __name__ == "__main__":
    main()
