"""Load a CPU model: an ordinary transformers model with fast layers."""

import ctypes
import os
import platform
from dataclasses import replace

import torch
from torch import nn
from transformers import PreTrainedModel

from ..storage.derived import CPU_FILE, CPU_JSON
from ..storage.folders import find_folder
from ..storage.models import load_strictly, model_class
from ..storage.pack import open_packed
from .choose import Timer, fastest, usable
from .embeddings import shared
from .files import Runtime, StoredPlans, cpu_name, record_of
from .kernels import EXACT_KINDS, INT8_KINDS, missing
from .linears import Choice, Int8Plan
from .model import ExactPlan, LinearPlan, install


def load_cpu(path_or_repo: str | os.PathLike, retime: bool | None = None) -> PreTrainedModel:
    """Load a model that `export_cpu` wrote, in eval mode, in float32 outside of its fast layers.

    It is of the same class as the exported model, and works in `pipeline`. It cannot be trained or saved. It uses
    `torch.get_num_threads()` threads.

    Args:
        path_or_repo: a folder, or a Hub repository.
        retime: whether the products are timed again on this machine, for the rows that they were chosen for. By
            default they are timed on another CPU than that of the export, and the result is kept in the folder.

    Raises:
        ValueError: the files are missing, damaged or of another model, or the folder's own weights have changed since.
    """
    folder = find_folder(path_or_repo, weights=[CPU_FILE])
    packed = open_packed(folder, CPU_FILE, "export --format cpu")
    runtime = Runtime.load(folder)
    plans = StoredPlans(packed, runtime)
    if retime or (retime is None and runtime.cpu != cpu_name()):
        runtime = _retimed(runtime, plans)
        if os.access(folder, os.W_OK) and not (folder / CPU_JSON).is_symlink():
            runtime.save(folder)
    cls, config = model_class(folder)
    # Nobody reads what stands for the weights of the fast layers, so it takes no memory.
    places = {f"{name}.weight": torch.empty(shape) for name, shape in plans.shapes().items()}
    tensors = {**plans.others(), **places}
    model = load_strictly(cls, folder, config=config, state_dict=tensors, dtype=torch.float32)
    for name, shape in plans.shapes().items():
        module, table = model.get_submodule(name), name in plans.tables
        if not isinstance(module, nn.Embedding if table else nn.Linear) or module.weight.shape != shape:
            what = "embedding" if table else "linear layer"
            raise ValueError(f"{folder}: {name} of {CPU_JSON} is no {what} of that shape: export the model again")
        if table and shared(model, name):
            raise ValueError(f"{folder}: {name} of {CPU_JSON} is shared with other modules: export the model again")
    model = install(model, StoredPlans(packed, runtime, runnable), runtime.attention)
    _give_back()
    return model


def runnable(plan: LinearPlan) -> LinearPlan:
    """Return a plan without the kinds that this machine lacks. Dense float32 is always there."""
    kept = tuple(pair for pair in plan.choice.kinds if not missing(pair[1]))
    if len(kept) == len(plan.choice.kinds):
        return plan
    if isinstance(plan, ExactPlan):
        return replace(plan, choice=Choice(kept) if kept else Choice.always("dense"))
    if kept or not missing("int8"):
        return replace(plan, choice=Choice(kept) if kept else Choice.always("int8"))
    return ExactPlan(Choice.always("dense"), plan.values * plan.scales[:, None], plan.bias)


def _give_back() -> None:
    """Return to the system what decoding the weights took: glibc keeps as much as the model itself takes."""
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).malloc_trim(0)


def _retimed(runtime: Runtime, plans: StoredPlans) -> Runtime:
    """Choose again for the rows of the shapes that were timed: among exact kinds, or among those in 8 bits."""
    timer = Timer([each.batch * each.length for each in runtime.times] or [128])
    layers = {}
    for name in runtime.layers:
        plan = plans.linear(name)
        weight = plan.values * plan.scales[:, None] if isinstance(plan, Int8Plan) else plan.weight
        kinds = INT8_KINDS if isinstance(plan, Int8Plan) else (*EXACT_KINDS, *plan.choice.names() & {"bf16"})
        if names := usable(weight, kinds):
            plan = replace(plan, choice=fastest(timer.times(weight, names), weight))
        layers[name] = record_of(plan)
    shapes = [replace(each, ms={}) for each in runtime.times]  # their times are of the machine before
    return replace(
        runtime, cpu=cpu_name(), threads=torch.get_num_threads(), torch=torch.__version__, layers=layers, times=shapes
    )
