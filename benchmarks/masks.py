"""How fast does the package make masks, and do its random masks follow the law of the paper?

The script makes masks for the 72 encoder matrices of BERT-base (85 M weights) at 16x, each against a named rival in
the same run: random masks against the paper's repeated draws (timed for a few draws of each shape and extrapolated),
global magnitude against `torch.nn.utils.prune.global_unstructured`, 2:4 against topk + scatter, the thresholds of PDP
against `kthvalue`, bit packing against NumPy. For the law, it compares repeated draws and the shortcut entry by entry
on one 768x768 matrix.

    python benchmarks/masks.py
    python benchmarks/masks.py --layers 2 --repeats 3 --law-repeats 5 --only random law
"""

from __future__ import annotations

import argparse
import statistics

import numpy as np
import torch
from common import alternate, machine, seconds, spread
from torch import Tensor, nn
from torch.nn.utils import prune

from hf_maskselect.masking.allocation import kept_count
from hf_maskselect.masking.maskset import MaskSet, pack_bits
from hf_maskselect.masking.patterns import NM, Unstructured
from hf_maskselect.masking.proposals import Proposal, propose
from hf_maskselect.masking.ranking import top_k_masks
from hf_maskselect.masking.votes import number_of_draws, votes
from hf_maskselect.methods.boundary import Boundary
from hf_maskselect.utils.tables import text_table

SPARSITY = 0.9375
SHAPES = (((768, 768), 4), ((3072, 768), 1), ((768, 3072), 1))  # shapes of one layer, with their number
HEADER = ["job", "package s", "rival", "rival s", "times faster"]


def bert_base(layers: int) -> dict[str, Tensor]:
    """Make Gaussian weights with the shapes of the encoder of BERT-base."""
    torch.manual_seed(0)
    shapes = [shape for shape, count in SHAPES for _ in range(count)] * layers
    return {f"matrix.{i}": torch.randn(shape) * 0.04 for i, shape in enumerate(shapes)}


def package_masks(proposal: Proposal, weights: dict[str, Tensor], allowed: MaskSet) -> MaskSet:
    """Make masks as the package does, with its scores and checks."""
    return propose(
        proposal,
        1,
        weights=weights,
        stats=None,
        masks=allowed,
        pattern=Unstructured(proposal.scope),
        sparsity=SPARSITY,
        level=0,
        seed=0,
    )


def repeated_draws(weight: Tensor, keep: int, draws: int) -> Tensor:
    """Count votes as in the paper: draw `keep` entries without replacement, p ~ |w|^5, `draws` times."""
    p = weight.abs().pow(5).view(-1)
    counts = torch.zeros_like(p)
    for _ in range(draws):
        counts[torch.multinomial(p, keep)] += 1
    return counts.view(weight.shape)


def top_k(counts: Tensor, keep: int) -> Tensor:
    """Make the mask of the paper: the `keep` entries with the most votes."""
    mask = torch.zeros(counts.numel(), dtype=torch.bool)
    return mask.scatter_(0, counts.view(-1).topk(keep).indices, True).view(counts.shape)


def random_masks(weights: dict[str, Tensor], layers: int, repeats: int, draws: int, ratio: float) -> list:
    """Time the shortcut (all of it) against repeated draws (extrapolated)."""
    allowed, proposal = MaskSet.ones(weights), Proposal("magnitude", "layer", ratio)
    jobs = {"package": lambda: package_masks(proposal, weights, allowed)}
    total = {}
    for shape, count in SHAPES:
        weight = next(w for w in weights.values() if w.shape == shape)
        keep = kept_count(weight.numel(), SPARSITY)
        total[shape] = number_of_draws(weight.numel() - keep, ratio), count * layers
        jobs[shape] = lambda weight=weight, keep=keep: repeated_draws(weight, keep, draws)
        # One topk for each matrix, whatever the number of draws.
        jobs[(shape, "top")] = lambda weight=weight, keep=keep: top_k(weight, keep)
    package_masks(proposal, weights, allowed)  # warm-up
    times = alternate(jobs, repeats)
    rounds = [
        sum(n * (times[s][i] / draws * t + times[(s, "top")][i]) for s, (t, n) in total.items())
        for i in range(repeats)
    ]
    whole = sum(t * n for t, n in total.values())
    rival = f"repeated draws (extrapolated from {draws} draws a shape to {whole:,} draws)"
    return row(f"random masks, ratio {ratio:g}", times["package"], rival, rounds)


def global_magnitude(weights: dict[str, Tensor], repeats: int) -> tuple[list, str]:
    """Time one ranking over all matrices, from weights to masks and masked weights, and count differing entries."""
    allowed, result = MaskSet.ones(weights), {}

    def package() -> None:
        result["package"] = package_masks(Proposal("magnitude", "global"), weights, allowed)
        result["masked"] = [w * m for w, m in zip(weights.values(), result["package"].values(), strict=True)]

    def rival() -> None:
        prune.global_unstructured(
            [(m, "weight") for m in linears], pruning_method=prune.L1Unstructured, amount=SPARSITY
        )

    times = {"package": [], "rival": []}
    package()  # warm-up
    for _ in range(repeats):
        linears = [nn.Linear(*reversed(w.shape), bias=False, device="meta") for w in weights.values()]
        for linear, weight in zip(linears, weights.values(), strict=True):
            linear.weight = nn.Parameter(weight)  # the rival replaces the parameter, so each round needs new modules
        times["package"].append(seconds(package))
        times["rival"].append(seconds(rival))
    differing = 0
    for linear, (name, mask) in zip(linears, result["package"].items(), strict=True):
        differ = linear.weight_mask.bool() != mask
        differing += int(differ.sum())
        if bool(differ.any()):
            result.setdefault("values", []).append(weights[name][differ].abs())
    ties = torch.cat(result["values"]).unique().numel() if differing else 0
    agreement = f"global magnitude: {differing} entries differ from the rival's"
    agreement += f", which have {ties} magnitude(s) in all (1 means ties at the threshold)" if differing else ""
    name = "torch.nn.utils.prune.global_unstructured"
    return row("global magnitude", times["package"], name, times["rival"]), agreement


def two_four(weights: dict[str, Tensor], repeats: int) -> list:
    """Time 2:4 masks from scores."""
    scores = {name: w.abs() for name, w in weights.items()}

    def rival() -> None:
        for score in scores.values():
            best = score.view(-1, 4).topk(2, dim=1).indices
            torch.zeros(best.shape[0], 4, dtype=torch.bool).scatter_(1, best, True)

    times = alternate({"package": lambda: NM(2, 4).masks(scores, 0.5), "rival": rival}, repeats)
    return row("2:4", times["package"], "topk + scatter", times["rival"])


def thresholds(weights: dict[str, Tensor], repeats: int, steps: int = 5) -> list:
    """Time PDP's update of all thresholds, on weights that drift as in training while the ramp rises.

    The rival finds one of the two values that enclose the threshold.
    """
    boundaries = {name: Boundary() for name in weights}
    counts = {name: int(0.9 * w.numel()) for name, w in weights.items()}
    magnitudes = {name: w.abs() for name, w in weights.items()}
    times: dict[str, list[float]] = {"package": [], "rival": []}
    jobs = {
        "package": lambda: [boundaries[n].find(m, counts[n]) for n, m in magnitudes.items()],
        "rival": lambda: [m.view(-1).kthvalue(counts[n]) for n, m in magnitudes.items()],
    }
    jobs["package"]()  # the first search does not know a range yet
    for _ in range(repeats):
        for _ in range(steps):
            for name, magnitude in magnitudes.items():
                magnitude.add_(torch.randn_like(magnitude), alpha=1e-4).abs_()
                counts[name] += magnitude.numel() // 1000
            last = seconds(jobs["package"])
        times["package"].append(last)
        times["rival"].append(seconds(jobs["rival"]))
    return row("PDP thresholds", times["package"], "kthvalue a matrix", times["rival"])


def packing(weights: dict[str, Tensor], repeats: int) -> list:
    """Time the packing of boolean masks into bits."""
    masks = [w.abs() > 0.07 for w in weights.values()]
    jobs = {
        "package": lambda: [pack_bits(m) for m in masks],
        "rival": lambda: [np.packbits(m.numpy()) for m in masks],
    }
    times = alternate(jobs, repeats + 1)
    return row("pack bits", times["package"][1:], "numpy.packbits", times["rival"][1:])


def row(job: str, package: list[float], rival: str, other: list[float]) -> list:
    """Make a row of the table: medians, and the ratios of each round."""
    ratios = [b / a for a, b in zip(package, other, strict=True)]
    return [job, f"{statistics.median(package):.3f}", rival, f"{statistics.median(other):.3f}", spread(ratios)]


def law(ratio: float, repeats: int, bins: int = 20) -> list:
    """Compare the shortcut with repeated draws on one matrix.

    Measures the share of entries that differ from plain top-k, and how often entries are kept by their magnitude (bins
    from 0.7 to 1.3 of the threshold).
    """
    torch.manual_seed(1)
    weight = torch.randn(768, 768) * 0.04
    size, keep = weight.abs(), kept_count(weight.numel(), SPARSITY)
    draws = number_of_draws(weight.numel() - keep, ratio)
    plain = top_k_masks([size], keep)[0]
    place = torch.bucketize(size / size[plain].min(), torch.linspace(0.7, 1.3, bins + 1)).view(-1)
    generator = torch.Generator().manual_seed(2)
    makers = {
        "oracle": lambda: top_k(repeated_draws(weight, keep, draws), keep),
        "shortcut": lambda: top_k_masks(votes([size], keep, draws, 5.0, generator), keep)[0],
    }
    share, kept = {}, {}
    for name, make in makers.items():
        masks = [make() for _ in range(repeats)]
        share[name] = [float((m != plain).float().mean()) for m in masks]
        kept[name] = sum(torch.bincount(place, m.view(-1).double(), minlength=bins + 2) for m in masks)[1:-1]
    entries = torch.bincount(place, minlength=bins + 2)[1:-1] * repeats
    pooled = (kept["oracle"] + kept["shortcut"]) / (2 * entries)
    error = (2 * pooled * (1 - pooled) / entries).sqrt().clamp_min(1e-12)
    z = ((kept["shortcut"] - kept["oracle"]) / entries / error)[(pooled > 0) & (pooled < 1)]
    a, b = (statistics.mean(share[name]) for name in makers)
    noise = sum(statistics.stdev(s) ** 2 / repeats for s in share.values()) ** 0.5 / a if repeats > 1 else float("nan")
    gap = ((kept["shortcut"] - kept["oracle"]) / entries).abs().max()
    relative = f"{100 * (b / a - 1):+.2f} % +- {100 * noise:.2f}"
    return [f"{ratio:g}", draws, repeats, f"{a:.5f}", f"{b:.5f}", relative, f"{gap:.4f}", f"{z.abs().max():.2f}"]


def main() -> None:
    """Run the chosen parts and print their tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=12, help="encoder layers; 12 is BERT-base")
    parser.add_argument("--repeats", type=int, default=5, help="rounds of every timing")
    parser.add_argument("--draws", type=int, default=2, help="timed draws of each shape and round")
    parser.add_argument("--law-repeats", type=int, default=20, help="masks of each kind for the comparison of the law")
    parser.add_argument("--threads", type=int, default=2)
    parts = ("random", "global", "2:4", "thresholds", "pack", "law")
    parser.add_argument("--only", nargs="+", choices=parts, default=parts)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    print(machine(f"; medians of {args.repeats} rounds, ratios with (smallest-largest)"))
    weights, rows, notes = bert_base(args.layers), [], []
    print(f"{len(weights)} matrices, {sum(w.numel() for w in weights.values()):,} weights, sparsity {SPARSITY}\n")
    if "random" in args.only:
        rows.append(random_masks(weights, args.layers, args.repeats, args.draws, 1e-4))
    if "global" in args.only:
        done, note = global_magnitude(weights, args.repeats)
        rows.append(done)
        notes.append(note)
    if "2:4" in args.only:
        rows.append(two_four(weights, args.repeats))
    if "thresholds" in args.only:
        rows.append(thresholds(weights, args.repeats))
    if "pack" in args.only:
        rows.append(packing(weights, args.repeats))
    if rows:
        print(text_table(HEADER, rows), *notes, "", sep="\n")
    if "law" in args.only:
        header = ["ratio", "draws", "masks", "oracle differs", "shortcut differs"]
        header += ["relative", "largest gap", "max |z|"]
        print("Law on one 768x768 matrix: share of entries that differ from plain top-k (oracle: repeated draws;")
        print("relative: with its standard error), and share kept in bins of magnitude (largest gap, max |z|):\n")
        print(text_table(header, [law(ratio, args.law_repeats) for ratio in (5e-5, 1e-4)]))


if __name__ == "__main__":
    main()
