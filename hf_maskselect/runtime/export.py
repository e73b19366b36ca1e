"""Make a model that is as fast as this machine's CPU allows, within the accuracy that the user asks for."""

import contextlib
import copy
import math
import os
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from ..storage.derived import CPU_FILE, ORIGIN, beside_model
from ..storage.folders import check_output, find_folder
from ..storage.models import config_digest, load_strictly, model_class, own_names
from ..storage.packed_file import PackedFile
from ..storage.state import PruningState
from ..storage.weights import check_unpacked, check_weights
from ..utils.tables import text_table
from ..utils.wrappers import plain_model
from .choose import Timer, clock, fastest, usable, zeros_of
from .files import Runtime, ShapeTime, cpu_name, record_of, write_weights
from .kernels import EXACT_KINDS, INT8_KINDS, missing, quantized_rows
from .linears import Choice, Int8Plan, Step
from .model import Attention, ExactPlan, install, layers_of, linear_names
from .quantize import RANGES, Batch, Judge, Observed, batches_of, observe

Evaluate = Callable[[PreTrainedModel], float]
_Plans = dict[str, ExactPlan | Int8Plan]
_SECONDS = 2.0  # time spent on a whole model at one shape


@dataclass(frozen=True)
class CpuReport:
    """What `export_cpu` wrote: the path of the weights, how they run, and the bytes before and after."""

    path: Path
    runtime: Runtime
    dense_bytes: int
    bytes: int
    hints: tuple[str, ...]

    def __str__(self) -> str:
        kinds = Counter("/".join(str(kind) for _, kind in each.kinds) for each in self.runtime.layers.values())
        rows = [
            [f"{t.batch} x {t.length}", *(f"{x:.2f}" for x in (*t.dense, *t.cpu)), f"{t.dense[0] / t.cpu[0]:.2f}"]
            for t in self.runtime.times
        ]
        header = ["batch x length", "dense fp32 ms", "p95", "exported ms", "p95", "times faster"]
        text = (
            f"{self.path}: {self.bytes / 1e6:,.2f} MB for {self.dense_bytes / 1e6:,.2f} MB dense; linear layers: "
            + ", ".join(f"{count} {kind}" for kind, count in kinds.most_common())
        )
        if self.runtime.divergence is not None:
            text += f"; divergence from float32 {self.runtime.divergence:.2g} on held-out rows"
        machine = f"{self.runtime.cpu}, {self.runtime.threads} threads, torch {self.runtime.torch}"
        return "\n".join([text, *self.hints, machine, text_table(header, rows)])


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
) -> CpuReport:
    """Time what runs on this machine, choose, and write `cpu_model.safetensors` and `cpu_model.json`.

    Args:
        model_or_path: a transformers model, or a folder or Hub repository.
        output: a folder, created if needed. Configuration and tokenizer are copied there.
        calibration: tokenized rows or batches of the *train* split, such as 128 rows; needed for `int8`. Every fourth
            is held out, to judge the outputs.
        int8: allow 8-bit weights and activations, and attention in bf16. Outputs then differ a little.
        bf16: allow bf16 in linear layers that are not in 8 bits.
        max_kl: largest divergence of the outputs (see `Judge`) on held-out rows; layers stay exact until it holds.
        max_drop: largest loss of `evaluate`'s value; layers stay exact until it holds.
        evaluate: maps a model to a number that is better when larger, such as the accuracy on held-out rows.
        batch_sizes: batch sizes to be fast at.
        seq_lens: lengths to be fast at, in tokens.
        threads: number of threads to time with, by default `torch.get_num_threads()`.

    Raises:
        ValueError: there is no such model, a shape does not fit it, or `int8` lacks calibration rows.
    """
    if (max_drop is None) != (evaluate is None):
        raise ValueError("max_drop and evaluate belong together: pass both or none")
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
    with _threads(threads):
        search = _Search(model, shapes, bf16, max_kl, max_drop, evaluate)
        plans, attention, ranges, divergence = search.best(batches)
        fast = install(copy.deepcopy(model), plans, attention)
        times = [
            ShapeTime(*shape, each["dense"], each["cpu"])
            for shape, each in time_models({"dense": model, "cpu": fast}, shapes).items()
        ]
        count = torch.get_num_threads()
    source, layers = check_weights(folder, {}), {name: record_of(plan) for name, plan in plans.items()}
    with beside_model(folder, output, lambda: source) as new:
        write_weights(new / CPU_FILE, model, plans, {"config": config_digest(folder), ORIGIN: source})
        runtime = Runtime(
            cpu=cpu_name(),
            threads=count,
            torch=torch.__version__,
            source=source,
            weights=PackedFile(new / CPU_FILE).metadata["checksum"],
            fused=attention.fused,
            bf16=attention.bf16,
            divergence=divergence,
            ranges=ranges,
            layers=layers,
            times=times,
        )
        runtime.save(new)
    path = output / CPU_FILE
    dense = sum(tensor.numel() * 4 for tensor in model.state_dict().values())
    return CpuReport(path, runtime, dense, path.stat().st_size, search.hints())


class _Search:
    """Chooses how each layer runs."""

    def __init__(
        self,
        model: PreTrainedModel,
        shapes: Sequence[tuple[int, int]],
        bf16: bool,
        max_kl: float | None,
        max_drop: float | None,
        evaluate: Evaluate | None,
    ) -> None:
        self._model, self._shapes = model, shapes
        self._max_kl, self._max_drop, self._evaluate = max_kl, max_drop, evaluate
        self._names = linear_names(model)
        self._timer = Timer([batch * length for batch, length in shapes])
        exact = (*EXACT_KINDS, "bf16") if bf16 else EXACT_KINDS
        self._exact: dict[str, ExactPlan] = {}
        for name in self._names:
            linear: Any = model.get_submodule(name)
            self._exact[name] = ExactPlan(self._choice(linear.weight, exact), linear.weight, linear.bias)

    def best(self, batches: Sequence[Batch]) -> tuple[_Plans, Attention, str, float | None]:
        """Return the plans, how whole layers run, the kind of ranges, and the divergence on held-out rows."""
        if not batches:
            return dict(self._exact), Attention(False), "", None
        held_out = list(batches[::4])
        judge = Judge(self._model, held_out)
        seen = observe(self._model, self._names, [batch for i, batch in enumerate(batches) if i % 4])
        choices = {name: self._choice(plan.weight, INT8_KINDS) for name, plan in self._exact.items()}
        attention = self._fastest_attention(self._int8_plans(seen, "minmax", choices))
        if attention is None:
            return dict(self._exact), Attention(False), "", None
        by_ranges = {how: self._int8_plans(seen, how, choices) for how in RANGES}
        divergences = {how: judge(self._installed(plans, attention)) for how, plans in by_ranges.items()}
        ranges = min(divergences, key=divergences.__getitem__)
        plans = self._within_bounds(by_ranges[ranges], attention, judge)
        return plans, attention, ranges, judge(self._installed(plans, attention))

    def hints(self) -> tuple[str, ...]:
        """Say what kind of zeros the model lacks for the fastest product."""
        blocks = statistics.fmean(zeros_of(plan.weight, "1x4") for plan in self._exact.values())
        if blocks >= 0.5:
            return ()
        return (
            f"only {blocks:.0%} of the 1x4 blocks of its matrices are zero, so that dense int8 may be the fastest: "
            "prune with pattern='1x4' for more",
        )

    def _choice(self, weight: torch.Tensor, kinds: Sequence[str]) -> Choice:
        names = usable(weight, kinds)
        return fastest(self._timer.times(weight, names), weight)

    def _installed(self, plans: Mapping[str, ExactPlan | Int8Plan], attention: Attention) -> PreTrainedModel:
        return install(copy.deepcopy(self._model), plans, attention)

    def _int8_plans(
        self, seen: Mapping[str, tuple[Observed, Observed]], how: str, choices: Mapping[str, Choice]
    ) -> _Plans:
        task_of = {linear: task for six in layers_of(self._model).values() for task, linear in six.items()}
        plans: _Plans = {}
        for name, choice in choices.items():
            linear: Any = self._model.get_submodule(name)
            inputs, outputs = seen[name]
            output: Step | torch.Tensor = outputs.units()  # some channels are a hundred times as large as others
            if (task := task_of.get(name)) is not None and task not in ("context", "down"):
                output = outputs.step(how) if task == "up" else outputs.centred(how)
            values, scales = quantized_rows(linear.weight.detach())
            plans[name] = Int8Plan(choice, values, scales, linear.bias, inputs.step(how), output)
        return plans

    def _fastest_attention(self, plans: _Plans) -> Attention | None:
        """Time whole layers as they are, in 8 bits, and in 8 bits with attention in bf16; None if exact was faster."""
        lengths = sorted({length for _, length in self._shapes})
        kinds: list[Attention | None] = [None, Attention(False)]
        if layers_of(self._model):
            kinds += [Attention(True, bf16) for bf16 in (0, *([] if missing("bf16") else lengths))]
        models = {
            str(index): self._installed(plans if kind else self._exact, kind or Attention(False))
            for index, kind in enumerate(kinds)
        }
        times = time_models(models, self._shapes)
        loss = {
            name: sum(each[name][0] / min(median for median, _ in each.values()) for each in times.values())
            for name in models
        }
        return kinds[int(min(loss, key=loss.__getitem__))]

    def _within_bounds(self, plans: _Plans, attention: Attention, judge: Judge) -> _Plans:
        """Leave those layers exact whose 8 bits hurt most, until the bounds hold."""
        if self._holds(plans, attention, judge):
            return plans
        hurt = {}
        for name in plans:
            only = {each: plan if each == name else self._exact[each] for each, plan in plans.items()}
            hurt[name] = judge(self._installed(only, Attention(False)))
        plans = dict(plans)
        for name in sorted(hurt, key=hurt.__getitem__, reverse=True):
            plans[name] = self._exact[name]
            if self._holds(plans, attention, judge):
                break
        return plans

    def _holds(self, plans: _Plans, attention: Attention, judge: Judge) -> bool:
        model = self._installed(plans, attention)
        if self._max_kl is not None and judge(model) > self._max_kl:
            return False
        if self._evaluate is None or self._max_drop is None:
            return True
        return self._evaluate(self._model) - self._evaluate(model) <= self._max_drop


def time_models(
    models: Mapping[str, PreTrainedModel], shapes: Sequence[tuple[int, int]]
) -> dict[tuple[int, int], dict[str, list[float]]]:
    """Return median and 95th percentile of the milliseconds (see `clock`) of each model at each (batch, length)."""
    times = {}
    for batch, length in shapes:
        size = next(iter(models.values())).config.vocab_size
        ids = torch.randint(size // 2, size, (batch, length), generator=torch.Generator().manual_seed(0))
        taken: dict[str, list[float]] = {name: [] for name in models}
        with torch.inference_mode():
            for model in models.values():
                model(ids)
            start = time.perf_counter()
            while len(min(taken.values(), key=len)) < 5 or (
                time.perf_counter() - start < _SECONDS * len(models) and len(min(taken.values(), key=len)) < 100
            ):
                for name, model in models.items():
                    begin = clock()
                    model(ids)
                    taken[name].append((clock() - begin) * 1000)
        times[batch, length] = {
            name: [statistics.median(each), sorted(each)[math.ceil(0.95 * len(each)) - 1]]
            for name, each in taken.items()
        }
    return times


def _shapes(model: PreTrainedModel, batch_sizes: Sequence[int], lengths: Sequence[int]) -> list[tuple[int, int]]:
    """Return the shapes to be fast at; raises a ValueError if the model takes none of token ids, or not these."""
    if model.main_input_name != "input_ids":
        raise ValueError(f"{type(model).__name__} takes {model.main_input_name}: only text models can be exported")
    if not batch_sizes or not lengths or min(*batch_sizes, *lengths) < 1:
        raise ValueError(f"batch sizes {list(batch_sizes)} and lengths {list(lengths)} must be whole numbers above 0")
    longest = getattr(model.config, "max_position_embeddings", math.inf)
    if max(lengths) > longest:
        raise ValueError(f"length {max(lengths)} exceeds the {longest} positions of the model: give shorter lengths")
    return [(batch, length) for batch in batch_sizes for length in lengths]


@contextlib.contextmanager
def _threads(count: int | None) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)
