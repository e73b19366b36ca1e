"""Time whole models on this machine: a CPU model, and other ways to run the model that it was made from."""

import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..export.onnx import check_packages, export_onnx
from ..storage.derived import ONNX_FILE
from ..utils.clock import clock
from .choose import Timer, usable

Job = Callable[[Tensor], object]  # from token ids, int64 (rows, tokens), to outputs
Shape = tuple[int, int]  # batch size, and length in tokens
Times = dict[Shape, dict[str, list[float]]]
# The names of times in files and tables. The rivals are the model before the export.
DENSE, BF16, OURS = "dense fp32", "dense bf16", "this model"
ONNX, ONNX_INT8 = "ONNX Runtime fp32", "ONNX Runtime int8"
_LEAST, _MOST = 5, 200  # calls of one job at one shape


def time_jobs(jobs: Mapping[str, Job], shapes: Sequence[Shape], vocab_size: int, seconds: float) -> Times:
    """Return median and 95th percentile of the milliseconds (see `clock`) of each job at each shape.

    The jobs take turns, in an order that is reversed in every other round.

    Args:
        jobs: by name.
        shapes: shapes of the token ids, which are drawn at random.
        vocab_size: number of tokens.
        seconds: time spent on one job at one shape; at least five calls are timed.
    """
    times = {}
    for batch, length in shapes:
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(vocab_size // 2, vocab_size, (batch, length), generator=generator)
        taken: dict[str, list[float]] = {name: [] for name in jobs}
        with torch.inference_mode():
            for job in jobs.values():
                job(ids)
            start = time.perf_counter()
            for turn in range(_MOST):
                if turn >= _LEAST and time.perf_counter() - start > seconds * len(jobs):
                    break
                for name in jobs if turn % 2 == 0 else reversed(list(jobs)):
                    begin = clock()
                    jobs[name](ids)
                    taken[name].append((clock() - begin) * 1000)
        times[batch, length] = {
            name: [statistics.median(each), sorted(each)[math.ceil(0.95 * len(each)) - 1]]
            for name, each in taken.items()
        }
    return times


def bf16_is_fast() -> bool:
    """Return whether a product is faster here in bf16 than in float32; a CPU without bf16 emulates it, very slowly."""
    weight = torch.randn(768, 768, generator=torch.Generator().manual_seed(0))
    times = Timer([128]).times(weight, usable(weight, ("dense", "bf16")))[128]
    return times.get("bf16", math.inf) < times["dense"]


def bf16_job(model: PreTrainedModel) -> Job:
    """Return a job that runs a float32 model in bf16, by autocast."""

    def run(ids: Tensor) -> object:
        with torch.autocast("cpu", torch.bfloat16):
            return model(ids)

    return run


def check_onnx() -> None:
    """Raise a ValueError unless the packages are installed that `onnx_jobs` needs."""
    check_packages("timing ONNX Runtime")


def onnx_jobs(model: PreTrainedModel, folder: Path) -> dict[str, Job]:
    """Return jobs that run a float32 model in ONNX Runtime, in float32 and in dynamic int8, with torch's threads.

    folder: where the graphs are written, and stay for as long as the jobs are in use.

    Raises:
        ValueError: packages of the `onnx` extra are missing, or the model cannot be exported.
    """
    check_onnx()
    import onnx
    from onnxruntime.quantization import quantize_dynamic

    export_onnx(model, folder)
    graph = onnx.load(folder / ONNX_FILE)
    del graph.graph.value_info[:]  # the exporter's, at which shape inference takes offence
    quantize_dynamic(graph, folder / "int8.onnx")
    return {ONNX: _onnx_job(folder / ONNX_FILE), ONNX_INT8: _onnx_job(folder / "int8.onnx")}


def _onnx_job(path: Path) -> Job:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = torch.get_num_threads(), 3
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    names = [node.name for node in session.get_inputs()]

    def run(ids: Tensor) -> object:
        given = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "token_type_ids": torch.zeros_like(ids)}
        return session.run(None, {each: given[each].numpy() for each in names})

    return run
