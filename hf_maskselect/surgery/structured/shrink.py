"""A smaller, ordinary model from a dense one, in minutes and without training."""

import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from transformers import PreTrainedModel

from ...utils.wrappers import plain_model
from .batches import Batch, rows_of, timed_batch
from .families import Family, checked_family
from .job import ShapeJob
from .latency import Latency
from .notes import Notes
from .record import StructureRecord
from .report import ShrinkReport
from .target import KEPT_SHAPES, Target, check_reachable, choose_shape


def shrink_model(
    model: PreTrainedModel,
    rows: Iterable[Mapping[str, Any]],
    *,
    speedup: float | None = None,
    sparsity: float | None = None,
    keep_shape: str = "uniform",
    num_candidates: int = 16,
    latency_shape: Sequence[int] = (8, 128),
    latency_dtype: torch.dtype | None = None,
    latency_device: torch.device | str | None = None,
    seed: int = 42,
) -> tuple[PreTrainedModel, ShrinkReport]:
    """Make a smaller model of the same class: some layers removed, and narrower feed-forward parts in the others.

    The result is an ordinary model whose configuration says its shape, so that `save_pretrained` and plain
    `from_pretrained` work. Heads go too where the configuration can say it (NomicBERT, ViT), or with
    `keep_shape="free"`. The neurons that go are chosen as in ZipLM (arXiv 2302.04089, section 3). The layers that go
    are searched: each candidate is fitted by least squares, and scored by the divergence of its outputs on held-out
    rows.

    Args:
        model: a dense model of BERT, RoBERTa, XLM-R, CamemBERT, DistilBERT, ELECTRA, ALBERT (width only), MPNet,
            DeBERTa-v2 or v3, ModernBERT, NomicBERT or ViT. It stays as it is.
        rows: tokenized rows, or batches, of the train split, such as 2,000; labels are not used. Every fourth row is
            held out, up to 512. Of the others as many are used as have 32,768 positions.
        speedup: how many times as fast the model shall be, such as 2.0.
        sparsity: share of the layers' parameters that shall go, such as 0.5. Pass one of the two.
        keep_shape: `"uniform"` keeps to shapes that the configuration can say. `"free"` takes any number of heads and
            neurons in each layer; the model then loads after `import hf_maskselect`.
        num_candidates: number of shapes to try; with `"free"` as many more, in which heads and neurons are moved
            between layers. Where more than one layer must go, or where there are more layers than candidates, each
            layer is removed alone besides.
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
    target = Target(speedup, sparsity)
    target.check()
    if keep_shape not in KEPT_SHAPES:
        raise ValueError(f"keep_shape={keep_shape!r} must be {' or '.join(map(repr, KEPT_SHAPES))}")
    if num_candidates < 1:
        raise ValueError(f"num_candidates={num_candidates} must be at least 1")
    model = plain_model(model)
    family, before = checked_family(model), StructureRecord.find(model.config)
    given = rows_of(rows, model)
    small, report = make_smaller(
        model,
        family,
        [row for number, row in enumerate(given) if number % 4],
        given[::4],
        target,
        free=keep_shape == "free",
        num_candidates=num_candidates,
        latency_shape=latency_shape,
        latency_dtype=latency_dtype,
        latency_device=latency_device,
        seed=seed,
        notes={},
    )
    report.warn_if_missed(target.speedup)
    StructureRecord.of(report, str(target), before).write(small.config)
    return small, report


def make_smaller(
    model: PreTrainedModel,
    family: Family,
    rows: Sequence[Batch],
    held_out: Sequence[Batch],
    target: Target,
    *,
    free: bool,
    num_candidates: int,
    latency_shape: Sequence[int],
    latency_dtype: torch.dtype | None,
    latency_device: torch.device | str | None,
    seed: int,
    notes: Notes,
    last: Target | None = None,
    quiet: bool = False,
) -> tuple[PreTrainedModel, ShrinkReport]:
    """Choose a shape that meets a target, and fit it; `shrink_model` and each level of a run do this.

    Args:
        model: as it is now; it stays so.
        family: from `checked_family`.
        rows: to fit on, from `rows_of`.
        held_out: rows to choose on.
        target: relative to `model`.
        free: each layer may get heads and neurons of its own.
        num_candidates: as in `shrink_model`, like the next four.
        latency_shape: what is timed.
        latency_dtype: what is timed.
        latency_device: what is timed.
        seed: of the search.
        notes: what was measured before, and is not measured again.
        last: a target of a later level, which must be within reach too.
        quiet: whether to show no progress bar.

    Raises:
        ValueError: no shape meets a target.
    """
    begin = time.perf_counter()
    timed = timed_batch(rows[0], model, latency_shape)
    job = ShapeJob(model, family, rows, held_out, notes, free, quiet)
    device = torch.device(latency_device or model.device)
    latency = Latency(job.cutter, timed, latency_dtype or model.dtype, device, notes, job.cuts_heads)
    if last is not None:
        check_reachable(job, latency, last)
    shape, candidates = choose_shape(job, latency, target, num_candidates, seed)
    small, divergence = job.fitted(shape)
    small.train(model.training)
    seconds = time.perf_counter() - begin
    return small, ShrinkReport.of(job, latency, small, shape, candidates, divergence, seconds)
