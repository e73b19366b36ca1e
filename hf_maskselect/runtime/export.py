"""Make a model that is as fast as this machine's CPU allows, within the accuracy that the user asks for."""

import contextlib
import copy
import math
import numbers
import os
import statistics
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.utils import logging

from ..storage.derived import CPU_FILE, CPU_JSON, ORIGIN, beside_model, write_section
from ..storage.folders import check_output, find_folder
from ..storage.models import config_digest, load_strictly, model_class, own_names
from ..storage.packed_file import PackedFile
from ..storage.state import PruningState
from ..storage.weights import check_unpacked, check_weights
from ..utils.judge import Judge
from ..utils.token_limits import longest_row
from ..utils.wrappers import plain_model
from .choose import Timer, fastest, usable, zeros_of
from .embeddings import Int8Table, int8_tables, storage_of
from .files import Runtime, ShapeTime, cpu_name, dense_bytes, record_of, write_weights
from .kernels import EXACT_KINDS, INT8_KINDS, missing, quantized_rows
from .linears import Choice, Int8Plan, Step
from .model import Attention, ExactPlan, LinearPlan, Plans, install, layers_of, linear_names
from .quantize import RANGES, Batch, Observed, batches_of, observe
from .report import CpuReport
from .timing import BF16, DENSE, OURS, Job, Shape, bf16_is_fast, bf16_job, check_onnx, onnx_jobs, time_jobs

logger = logging.get_logger(__name__)
Evaluate = Callable[[PreTrainedModel], float]
_SECONDS = 2.0  # time spent on a whole model at one shape


def export_cpu(
    model_or_path: PreTrainedModel | str | os.PathLike,
    output: str | os.PathLike,
    calibration: Iterable[Mapping[str, Any]] = (),
    *,
    int8: bool = True,
    bf16: bool = False,
    max_kl: float | None = None,
    max_drop: float | None = None,
    evaluate: Evaluate | None = None,
    batch_sizes: Sequence[int] = (1, 8),
    seq_lens: Sequence[int] = (32, 128),
    threads: int | None = None,
    rivals: bool = False,
) -> CpuReport:
    """Time what runs on this machine, choose, and write `cpu_model.safetensors` and `cpu_model.json`.

    The times and scores also go into the model card, `README.md`.

    Args:
        model_or_path: a transformers model, or a folder or Hub repository.
        output: a folder, created if needed. Configuration and tokenizer are copied there.
        calibration: tokenized rows or batches of the *train* split, such as 128 rows; needed for `int8`. Every fourth
            is held out, to judge the outputs.
        int8: allow 8-bit weights, activations and token embeddings, and attention in bf16. Outputs then differ a
            little.
        bf16: allow bf16 in linear layers that are not in 8 bits.
        max_kl: largest divergence of the outputs (see `Judge`) on held-out rows; layers and embeddings stay exact
            until it holds.
        max_drop: largest loss of `evaluate`'s value; layers and embeddings stay exact until it holds.
        evaluate: maps a model to a number that is better when larger, such as the accuracy on held-out rows. The
            report then has the scores of the float32 and of the CPU model.
        batch_sizes: batch sizes to be fast at.
        seq_lens: lengths to be fast at, in tokens.
        threads: number of threads to time with, by default `torch.get_num_threads()`.
        rivals: time also the float32 model in ONNX Runtime, as it is and in dynamic int8, and in bf16 if this CPU is
            fast at that. This needs the `onnx` extra.

    Raises:
        ValueError: there is no such model, a shape does not fit it, `int8` lacks calibration rows, `rivals` lacks
            packages, or `evaluate` returns no finite number.
    """
    if max_drop is not None and evaluate is None:
        raise ValueError("max_drop bounds the loss of evaluate's value: pass evaluate as well")
    if max_kl is not None and not max_kl >= 0:
        raise ValueError(f"max_kl={max_kl} must be a number of at least 0")
    if max_drop is not None and math.isnan(max_drop):
        raise ValueError("max_drop=nan must be a number")
    if threads is not None and threads < 1:
        raise ValueError(f"threads={threads} must be at least 1, or None for those of torch")
    if rivals:
        check_onnx()
    model_or_path = plain_model(model_or_path)
    if isinstance(model_or_path, nn.Module):
        if not isinstance(model_or_path, PreTrainedModel):
            raise ValueError(f"{type(model_or_path).__name__} is not a transformers model: pass one, or a folder")
        with tempfile.TemporaryDirectory() as temporary:
            with own_names(model_or_path):
                model_or_path.save_pretrained(temporary)
            return export_cpu(
                temporary,
                output,
                calibration,
                int8=int8,
                bf16=bf16,
                max_kl=max_kl,
                max_drop=max_drop,
                evaluate=evaluate,
                batch_sizes=batch_sizes,
                seq_lens=seq_lens,
                threads=threads,
                rivals=rivals,
            )
    folder, output = find_folder(model_or_path), Path(output)
    check_unpacked(folder)
    check_output(folder, output)
    state = PruningState.find(folder)
    if state is not None:
        state.check_saved(folder)
    model = load_strictly(model_class(folder)[0], folder, dtype=torch.float32).eval().requires_grad_(False)
    shapes = _shapes(model, batch_sizes, seq_lens)
    int8 = int8 and not missing("int8")
    batches = batches_of(calibration, model) if int8 else []
    if problem := missing("numba"):
        logger.warning(f"{problem}. Its products are the fastest for single zeros, and for blocks without AVX-512.")
    with _threads(threads):
        scores = {DENSE: _checked(evaluate, model, DENSE)} if evaluate else {}
        search = _Search(model, shapes, bf16, max_kl, max_drop, evaluate, scores.get(DENSE))
        plans, attention, ranges, divergence = search.best(batches)
        fast = install(copy.deepcopy(model), plans, attention)
        if evaluate:
            scores[OURS] = _checked(evaluate, fast, OURS)
        times = _times(model, fast, shapes, bf16, rivals)
        count = torch.get_num_threads()
    source = check_weights(folder, {})
    with beside_model(folder, output, lambda: source) as new:
        write_weights(new / CPU_FILE, model, plans, {"config": config_digest(folder), ORIGIN: source})
        packed = PackedFile(new / CPU_FILE)
        runtime = Runtime(
            cpu=cpu_name(),
            threads=count,
            torch=torch.__version__,
            source=source,
            weights=packed.metadata["checksum"],
            fused=attention.fused,
            bf16=attention.bf16,
            divergence=divergence,
            ranges=ranges,
            zero_blocks=search.zero_blocks(),
            layers={name: record_of(plan) for name, plan in plans.items() if not isinstance(plan, Int8Table)},
            times=times,
            scores=scores,
            embeddings=storage_of(model, plans) if batches else {},
        )
        runtime.save(new)
        report = CpuReport(output / CPU_FILE, runtime, dense_bytes(packed), (new / CPU_FILE).stat().st_size)
        write_section(output, new, CPU_JSON, report.section())
    return report


def _times(
    model: PreTrainedModel, fast: PreTrainedModel, shapes: Sequence[Shape], bf16: bool, rivals: bool
) -> list[ShapeTime]:
    """Time the float32 model and the CPU model, and what else the caller of `export_cpu` wants to see."""
    jobs: dict[str, Job] = {DENSE: model}
    if (bf16 or rivals) and bf16_is_fast():
        jobs[BF16] = bf16_job(model)
    with tempfile.TemporaryDirectory() as graphs:
        if rivals:
            jobs.update(onnx_jobs(model, Path(graphs)))
        times = time_jobs({**jobs, OURS: fast}, shapes, model.config.vocab_size, _SECONDS)
    return [ShapeTime(*shape, ms) for shape, ms in times.items()]


class _Search:
    """Chooses how each layer runs."""

    def __init__(
        self,
        model: PreTrainedModel,
        shapes: Sequence[Shape],
        bf16: bool,
        max_kl: float | None,
        max_drop: float | None,
        evaluate: Evaluate | None,
        score: float | None,
    ) -> None:
        self._model, self._shapes = model, shapes
        self._max_kl, self._max_drop, self._evaluate, self._score = max_kl, max_drop, evaluate, score
        self._names = linear_names(model)
        self._timer = Timer([batch * length for batch, length in shapes])
        exact = (*EXACT_KINDS, "bf16") if bf16 else EXACT_KINDS
        self._exact: dict[str, ExactPlan] = {}
        for name in self._names:
            linear: Any = model.get_submodule(name)
            self._exact[name] = ExactPlan(self._choice(linear.weight, exact), linear.weight, linear.bias)

    def best(self, batches: Sequence[Batch]) -> tuple[Plans, Attention, str, float | None]:
        """Return the plans, how whole layers run, the kind of ranges, and the divergence on held-out rows."""
        if not batches:
            return dict(self._exact), Attention(False), "", None
        held_out = list(batches[::4])
        judge = Judge(self._model, held_out)
        seen = observe(self._model, self._names, [batch for i, batch in enumerate(batches) if i % 4])
        choices = {name: self._choice(plan.weight, INT8_KINDS) for name, plan in self._exact.items()}
        attention = self._fastest_attention(self._int8_plans(seen, "minmax", choices))
        tables = int8_tables(self._model)
        by_ranges: dict[str, Plans] = {}
        if attention is None:  # only the embeddings get 8 bits, which makes the model smaller
            attention = Attention(False)
            by_ranges[""] = {**self._exact, **tables}
        else:
            by_ranges = {how: {**self._int8_plans(seen, how, choices), **tables} for how in RANGES}
        divergences = {how: judge(self._installed(plans, attention)) for how, plans in by_ranges.items()}
        ranges = min(divergences, key=divergences.__getitem__)
        plans = self._within_bounds(by_ranges[ranges], attention, judge)
        return plans, attention, ranges, judge(self._installed(plans, attention))

    def zero_blocks(self) -> float:
        """Return the mean share of the 1x4 blocks that are zero, over the matrices."""
        return statistics.fmean(zeros_of(plan.weight, "1x4") for plan in self._exact.values())

    def _choice(self, weight: torch.Tensor, kinds: Sequence[str]) -> Choice:
        names = usable(weight, kinds)
        return fastest(self._timer.times(weight, names), weight)

    def _installed(self, plans: Plans, attention: Attention) -> PreTrainedModel:
        return install(copy.deepcopy(self._model), plans, attention)

    def _int8_plans(
        self, seen: Mapping[str, tuple[Observed, Observed]], how: str, choices: Mapping[str, Choice]
    ) -> dict[str, LinearPlan]:
        task_of = {linear: task for six in layers_of(self._model).values() for task, linear in six.items()}
        plans: dict[str, LinearPlan] = {}
        for name, choice in choices.items():
            linear: Any = self._model.get_submodule(name)
            inputs, outputs = seen[name]
            output: Step | torch.Tensor = outputs.units()  # some channels are a hundred times as large as others
            if (task := task_of.get(name)) is not None and task not in ("context", "down"):
                output = outputs.step(how) if task == "up" else outputs.centred(how)
            values, scales = quantized_rows(linear.weight.detach())
            plans[name] = Int8Plan(choice, values, scales, linear.bias, inputs.step(how), output)
        return plans

    def _fastest_attention(self, plans: Plans) -> Attention | None:
        """Time whole layers as they are, in 8 bits, and in 8 bits with attention in bf16; None if exact was faster."""
        lengths = sorted({length for _, length in self._shapes})
        kinds: list[Attention | None] = [None, Attention(False)]
        if layers_of(self._model):
            kinds += [Attention(True, bf16) for bf16 in (0, *([] if missing("bf16") else lengths))]
        models = {
            str(index): self._installed(plans if kind else self._exact, kind or Attention(False))
            for index, kind in enumerate(kinds)
        }
        times = time_jobs(models, self._shapes, self._model.config.vocab_size, _SECONDS)
        loss = {
            name: sum(each[name][0] / min(median for median, _ in each.values()) for each in times.values())
            for name in models
        }
        return kinds[int(min(loss, key=loss.__getitem__))]

    def _within_bounds(self, plans: Plans, attention: Attention, judge: Judge) -> Plans:
        """Leave those layers and embeddings exact whose 8 bits hurt most, until the bounds hold."""
        if self._holds(plans, attention, judge):
            return plans
        hurt = {}
        for name, plan in plans.items():
            if plan is not self._exact.get(name):
                hurt[name] = judge(self._installed({**self._exact, name: plan}, Attention(False)))
        plans = dict(plans)
        for name in sorted(hurt, key=hurt.__getitem__, reverse=True):
            if name in self._exact:
                plans[name] = self._exact[name]
            else:
                del plans[name]
            if self._holds(plans, attention, judge):
                break
        return plans

    def _holds(self, plans: Plans, attention: Attention, judge: Judge) -> bool:
        model = self._installed(plans, attention)
        if self._max_kl is not None and judge(model) > self._max_kl:
            return False
        if self._evaluate is None or self._max_drop is None or self._score is None:
            return True
        return self._score - _checked(self._evaluate, model, OURS) <= self._max_drop


def _checked(evaluate: Evaluate, model: PreTrainedModel, name: str) -> float:
    """Return the score of a model; raises a ValueError if it is no finite number."""
    score: Any = evaluate(model)
    if isinstance(score, torch.Tensor) and score.numel() == 1:
        score = score.item()
    if not isinstance(score, numbers.Real) or not math.isfinite(score):
        raise ValueError(
            f"evaluate returned {score!r:.60} for {name}: return one finite number that is better when larger"
        )
    return float(score)


def _shapes(model: PreTrainedModel, batch_sizes: Sequence[int], lengths: Sequence[int]) -> list[Shape]:
    """Return the shapes to be fast at; raises a ValueError if the model takes none of token ids, or not these."""
    if model.main_input_name != "input_ids":
        raise ValueError(f"{type(model).__name__} takes {model.main_input_name}: only text models can be exported")
    if model.config.is_encoder_decoder:
        raise ValueError(
            f"{type(model).__name__} has an encoder and a decoder: only models of one of them can be exported"
        )
    sizes = (*batch_sizes, *lengths)
    if not batch_sizes or not lengths or not all(isinstance(n, numbers.Integral) and n > 0 for n in sizes):
        raise ValueError(f"batch sizes {list(batch_sizes)} and lengths {list(lengths)} must be whole numbers above 0")
    longest = longest_row(model)
    if max(lengths) > longest:
        raise ValueError(f"length {max(lengths)} exceeds the {longest} positions of the model: give shorter lengths")
    return list(dict.fromkeys((int(batch), int(length)) for batch in batch_sizes for length in lengths))


@contextlib.contextmanager
def _threads(count: int | None) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(before if count is None else count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
