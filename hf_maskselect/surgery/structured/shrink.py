"""A smaller, ordinary model from a dense one, in minutes and without training."""

import copy
import functools
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from ...utils.judge import Judge
from ...utils.tables import text_table
from ...utils.wrappers import plain_model
from .batches import Batch, batches_of, rows_of, timed_batch
from .cut import Cutter
from .families import Family, family_of
from .fit import Calls, fit
from .latency import Latency
from .moments import consumer_grams
from .order import removal_order
from .search import Candidate, ShapeSearch, WidthOf
from .shapes import STEP, Shape

_TRIAL_POSITIONS = 8192  # that neurons are ordered by, and candidates fitted on
_HELD_OUT = 512  # rows
_POSITIONS = 32768  # that the chosen one is fitted on
_NARROWED = 6  # times that the chosen width is measured
_MOST_ZEROS = 0.05  # share of zeros in a dense model's weights
_ROOM = 1.05  # a measured speed-up may exceed the target by so much


@dataclass(frozen=True)
class ShrinkReport:
    """What `shrink_model` chose and reached.

    dense, shape: sizes before and after. candidates: the shapes that were tried, the best first. divergence: of the
    returned model's outputs from the dense ones, on held-out rows (KL divergence of the logits in nats; without
    classes the squared error as a share of the variance). parameters: of all of the model, before and after.
    layers_removed: share of the layers' parameters that is gone. milliseconds: of one call, before and after. timed:
    what was timed. seconds: that everything took.
    """

    dense: Shape
    shape: Shape
    candidates: tuple[Candidate, ...]
    divergence: float
    parameters: tuple[int, int]
    layers_removed: float
    milliseconds: tuple[float, float]
    timed: str
    seconds: float

    @property
    def speedup(self) -> float:
        """How many times as fast as before the model is."""
        return self.milliseconds[0] / self.milliseconds[1]

    def __str__(self) -> str:
        gone = {
            c.shape: [layer for layer in self.dense.layers if layer not in c.shape.layers] for c in self.candidates
        }
        rows = [
            [", ".join(map(str, gone[c.shape])) or "none", c.shape.width, c.shape.heads, f"{c.divergence:.4f}"]
            for c in self.candidates
        ]
        before, after = self.parameters
        lines = [
            f"before: {self.dense}",
            f"after:  {self.shape}",
            f"parameters: {before:,} -> {after:,} ({self.layers_removed:.1%} of those in layers removed)",
            f"milliseconds: {self.milliseconds[0]:.2f} -> {self.milliseconds[1]:.2f}, {self.speedup:.2f} times as "
            f"fast ({self.timed})",
            f"divergence from the dense model on held-out rows: {self.divergence:.4f}",
            f"searched and fitted in {self.seconds:.0f} s; candidates, as fitted on fewer rows:",
        ]
        return "\n".join([*lines, text_table(["layers removed", "width", "heads", "divergence"], rows)])


def shrink_model(
    model: PreTrainedModel,
    rows: Iterable[Mapping[str, Any]],
    *,
    speedup: float | None = None,
    sparsity: float | None = None,
    num_candidates: int = 16,
    latency_shape: Sequence[int] = (8, 128),
    latency_dtype: torch.dtype | None = None,
    latency_device: torch.device | str | None = None,
    seed: int = 42,
) -> tuple[PreTrainedModel, ShrinkReport]:
    """Make a smaller model of the same class: some layers removed, and narrower feed-forward parts in the others.

    The result is an ordinary model whose configuration says its shape, so that `save_pretrained` and plain
    `from_pretrained` work. Heads go too where the configuration can say it (NomicBERT, ViT). The neurons that go are
    chosen as in ZipLM (arXiv 2302.04089, section 3). The layers that go are searched: each candidate is fitted by
    least squares, and scored by the divergence of its outputs on held-out rows.

    Args:
        model: a dense model of BERT, RoBERTa, XLM-R, CamemBERT, DistilBERT, ELECTRA, ALBERT (width only), MPNet,
            DeBERTa-v2 or v3, ModernBERT, NomicBERT or ViT. It stays as it is.
        rows: tokenized rows, or batches, of the train split, such as 2,000; labels are not used. Every fourth row is
            held out, up to 512. Of the others as many are used as have 32,768 positions.
        speedup: how many times as fast the model shall be, such as 2.0.
        sparsity: share of the layers' parameters that shall go, such as 0.5. Pass one of the two.
        num_candidates: number of shapes to try. Where more than one layer must go, or where there are more layers than
            candidates, each layer is removed alone besides.
        latency_shape: batch size, and length in tokens, that are timed.
        latency_dtype: dtype that is timed; by default that of the model.
        latency_device: device that is timed; by default that of the model.
        seed: of the search.

    Returns:
        The smaller model, in the dtype, on the device and in the mode of `model`; and the report.

    Raises:
        ValueError: the target is none that a shape can reach, the family is not known, the rows are missing or of
            another tokenizer, or the model has zeros of a mask.
    """
    begin = time.perf_counter()
    _check_target(speedup, sparsity, num_candidates)
    model = plain_model(model)
    family = family_of(model)
    _check_zeros(model, family)
    given = rows_of(rows, model)
    timed = timed_batch(given[0], model, latency_shape)
    job = _Job(model, family, given)
    encoder = job.encoder
    device = torch.device(latency_device or model.device)
    latency = Latency(job.cutter, timed, latency_dtype or model.dtype, device)
    if speedup is not None:
        width_of = functools.partial(latency.width_of_time, latency.dense / speedup)
    else:
        kept = (1 - (sparsity or 0)) * encoder.parameters(encoder.full())
        width_of = functools.partial(encoder.width_of_size, int(kept))
    candidates = job.search(width_of, num_candidates, seed)
    if not candidates:
        raise ValueError(_unreachable(job, latency, speedup, sparsity))
    shape = candidates[0].shape if speedup is None else _narrowed(latency, candidates[0].shape, speedup)
    small, divergence = job.fitted(shape)
    small.train(model.training)
    seconds = latency.measured(small)
    report = ShrinkReport(
        dense=encoder.full(),
        shape=shape,
        candidates=tuple(candidates),
        divergence=divergence,
        parameters=(model.num_parameters(), small.num_parameters()),
        layers_removed=1 - encoder.parameters(shape) / encoder.parameters(encoder.full()),
        milliseconds=(1000 * seconds[0], 1000 * seconds[1]),
        timed=str(latency),
        seconds=time.perf_counter() - begin,
    )
    return small, report


class _Job:
    """Fits and scores smaller models, on rows of which every fourth is held out.

    All of its models are in float32 and in eval mode.
    """

    def __init__(self, model: PreTrainedModel, family: Family, rows: Sequence[Batch]) -> None:
        dense: Any = copy.deepcopy(model)
        self.dense, self.family, self._dtype = dense.float().eval(), family, model.dtype
        self.rows = _few([row for number, row in enumerate(rows) if number % 4], model.main_input_name, _POSITIONS)
        self._few = batches_of(_few(self.rows, model.main_input_name, _TRIAL_POSITIONS), model)
        self._judge = Judge(self.dense, batches_of(rows[::4][:_HELD_OUT], model))
        grams = consumer_grams(self.dense, family, self._few, bool(family.queries))
        orders = []
        for layer, (head_gram, gram) in zip(family.layers(self.dense), grams, strict=True):
            attention, ffn = family.consumers(layer)
            size = attention.in_features // model.config.num_attention_heads
            heads = torch.empty(0) if head_gram is None else removal_order(attention.weight, head_gram, size, 1)
            orders.append((heads, removal_order(ffn.weight, gram)))
        self.cutter = Cutter(self.dense, family, orders, grams)
        self.encoder = self.cutter.encoder

    def search(self, width_of: WidthOf, count: int, seed: int) -> list[Candidate]:
        """Return the shapes that were tried, the best first."""
        calls = None if self.family.shared else Calls(self.dense, self.family, self._few, keeps=True)
        with tqdm(total=count, desc="shapes", leave=False) as bar:

            def evaluate(shape: Shape) -> float:
                bar.update()
                return self._fitted(shape, calls)[1]

            search = ShapeSearch(
                self.encoder,
                first_stays=self.family.first_stays,
                cuts_heads=bool(self.family.queries),
                width_of=width_of,
                evaluate=evaluate,
                count=count,
                seed=seed,
            )
            return search.run()

    def fitted(self, shape: Shape) -> tuple[PreTrainedModel, float]:
        """Return the model of a shape, fitted on all rows, in the dtype of the model given, and its divergence."""
        calls = None if self.family.shared else Calls(self.dense, self.family, batches_of(self.rows, self.dense))
        fitted: tuple[Any, float] = self._fitted(shape, calls)
        return fitted[0].to(self._dtype), fitted[1]

    def _fitted(self, shape: Shape, calls: Calls | None) -> tuple[PreTrainedModel, float]:
        small = self.cutter.cut(shape)
        if calls is not None:
            fit(small, self.family, shape.layers, calls)
        return small, self._judge(small)


def _few(rows: Sequence[Batch], name: str, positions: int) -> list[Batch]:
    """Return the first rows that have so many tokens together."""
    few, count = [], 0
    for row in rows:
        few.append(row)
        count += row[name].shape[-1]
        if count >= positions:
            break
    return few


def _narrowed(latency: Latency, shape: Shape, speedup: float) -> Shape:
    """Change the width until the measured time of the whole model meets the target, by at most 5 % too much."""
    met: list[Shape] = []
    tried: set[Shape] = set()
    while len(tried) < _NARROWED and shape.width >= STEP and shape not in tried:
        tried.add(shape)
        dense, small = latency.measured(shape)
        if dense / small >= speedup:
            met.append(shape)
        if speedup <= dense / small <= speedup * _ROOM:
            break
        aim = latency.predicted(shape) * dense / small / (speedup * (1 + _ROOM) / 2)
        shape = replace(shape, width=latency.width_of_time(aim, shape.layers, shape.heads))
    return max(met or tried, key=lambda each: each.width if met else -each.width)


def _unreachable(job: _Job, latency: Latency, speedup: float | None, sparsity: float | None) -> str:
    """Name the most that a shape reaches."""
    encoder, heads = job.encoder, 1 if job.family.queries else job.encoder.heads
    layers = tuple(range(encoder.depth if encoder.shared else 1))
    least = Shape(layers, STEP, heads)
    if speedup is not None:
        wanted, best = f"speedup={speedup}", f"{latency.dense / latency.predicted(least):.1f} times as fast"
    else:
        share = 1 - encoder.parameters(least) / encoder.parameters(encoder.full())
        wanted, best = f"sparsity={sparsity}", f"without {share:.1%} of the layers' parameters"
    return f"{wanted} is reached by no shape: the smallest, {least}, is {best}; ask for less"


def _check_target(speedup: float | None, sparsity: float | None, num_candidates: int) -> None:
    if (speedup is None) == (sparsity is None):
        raise ValueError("pass speedup, such as 2.0, or sparsity, such as 0.5, and not both")
    if speedup is not None and not 1 < speedup < float("inf"):
        raise ValueError(f"speedup={speedup} must be a number above 1, such as 2.0")
    if sparsity is not None and not 0 < sparsity < 1:
        raise ValueError(f"sparsity={sparsity} must be between 0 and 1, such as 0.5")
    if num_candidates < 1:
        raise ValueError(f"num_candidates={num_candidates} must be at least 1")


def _check_zeros(model: PreTrainedModel, family: Family) -> None:
    weights = [consumer.weight for layer in family.layers(model) for consumer in family.consumers(layer)]
    zeros = sum(int((weight == 0).sum()) for weight in weights) / sum(weight.numel() for weight in weights)
    if zeros > _MOST_ZEROS:
        raise ValueError(
            f"{zeros:.0%} of the weights to fit are zero, and the fit would fill them: shrink the dense model, and "
            "prune the small one"
        )
