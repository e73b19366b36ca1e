"""Read `config.json`: nothing in it runs code, loads other files or takes memory before it is checked."""

import contextlib
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from torch.nn.modules.module import register_module_parameter_registration_hook
from transformers import CONFIG_MAPPING, AutoConfig, PretrainedConfig, dynamic_module_utils
from transformers.utils import CONFIG_NAME, cached_file

from ..surgery.structured.layer_shapes import TRIGGER
from ..utils.folders import finish
from ..utils.reading import read_object
from ..utils.swapped import swapped

LARGEST = 1 << 40  # of any number
MOST_PARTS = 10_000  # layers, stages or blocks, each of which is built in a loop
MOST_LABELS = 100_000  # for each of which a name is made; a configuration that transformers wrote lists the names
MOST_PARAMETERS = 100_000  # of a model whose weights are not there to compare with
_PARTS = ("layer", "depth", "block", "stage", "repeat", "attention_types")  # in the keys of numbers of parts
_ATTENTION = ("attn_implementation", "_attn_implementation", "_attn_implementation_internal")


def load_config(folder: str | os.PathLike) -> PretrainedConfig:
    """Load the configuration of a folder.

    Raises:
        ValueError: there is no readable `config.json`, transformers does not know its model type, or
            `from_pretrained` would run code, load other files or take absurd memory for it.
    """
    finish(folder)
    path = Path(folder) / CONFIG_NAME
    if not path.is_file():
        raise ValueError(
            f"{folder} has no config.json, so it is not a saved transformers model: give a folder that "
            "save_pretrained or PruningTrainer wrote"
        )
    content = read_object(path)
    check_plain(content, path)
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        if not isinstance(config.architectures, list | None) or not all(
            isinstance(name, str) for name in config.architectures or ()
        ):
            raise ValueError("its architectures are no list of names")
    except Exception as error:  # whatever a model type makes of values that it does not expect
        raise ValueError(f"{folder}: config.json cannot be read ({first_line(error)}): restore the file") from error
    return config


def find_config(path_or_repo: str | os.PathLike) -> PretrainedConfig:
    """Load the configuration of a folder, or of a Hub repository of which only `config.json` is downloaded.

    Raises:
        OSError: from transformers, if there is no such repository.
        ValueError: as `load_config`.
    """
    if Path(path_or_repo).is_dir():
        return load_config(path_or_repo)
    return load_config(Path(str(cached_file(path_or_repo, CONFIG_NAME))).parent)


def check_plain(config: Mapping[str, Any], where: object) -> None:
    """Raise a ValueError if a configuration is more than the description of a transformers model of usual size.

    where: what the message names, such as the path of the file.
    """
    kind = config.get("model_type")
    if not isinstance(kind, str) or kind not in CONFIG_MAPPING:
        raise ValueError(
            f"{where} names the model type {kind!r}, which transformers does not have: code that lies beside a model "
            "is never run, so load the model yourself and pass it"
        )
    for each in _objects(config):
        _check_sources(each, where)
        for key, value in each.items():
            numbers = [number for number in _flat(value) if type(number) is int]
            limit = MOST_PARTS if any(part in key for part in _PARTS) else LARGEST
            limit = MOST_LABELS if key == "num_labels" else limit
            if sum(map(abs, numbers)) > limit:
                raise ValueError(f"{where}: {key}={value!r:.60} is too large for a model: restore the file")


def _check_sources(config: Mapping[str, Any], where: object) -> None:
    """Raise a ValueError if a configuration makes transformers read anything but the ordinary weights."""
    for key in ("quantization_config", "compression_config"):
        if config.get(key) and config[key] != TRIGGER:  # that of this package quantizes nothing
            raise ValueError(
                f"{where} has a {key}: masks need weights that are not quantized, so dequantize the model"
            )
    for key in ("transformers_weights", "configuration_files"):
        if config.get(key):
            raise ValueError(f"{where} names other files in {key}, which are not read: save the model again")
    for key in _ATTENTION:
        value = config.get(key)
        names = value.values() if isinstance(value, dict) else [value]
        if any(isinstance(name, str) and "/" in name for name in names):
            raise ValueError(f"{where} names a kernel of the Hub in {key}, whose code is never run: remove the entry")
    backbone = config.get("backbone")
    if config.get("use_pretrained_backbone") or (backbone and config.get("model_type") != "timm_backbone"):
        raise ValueError(f"{where} names a backbone {backbone!r:.60} that lies elsewhere: save the whole model again")


@contextlib.contextmanager
def guarded(saved: int | None = None) -> Iterator[None]:
    """Inside, transformers runs no code that a configuration names, asks for none, and builds no endless model.

    saved: number of tensors that are saved for the model, if they are known.

    Raises:
        ValueError: the model has many more parameters than there are tensors.
    """
    most = MOST_PARAMETERS if saved is None else 4 * saved + 1_000  # one tensor may hold several parameters
    built = 0

    def count(*_: object) -> None:
        nonlocal built
        built += 1
        if built > most:
            raise ValueError(f"it has more than {most:,} parameters")

    counting = register_module_parameter_registration_hook(count)
    try:
        # Parts of a model may be built by classes that a nested configuration names: passing trust_remote_code to the
        # whole does not reach them. With no time to answer, transformers refuses and does not ask.
        with swapped(dynamic_module_utils, TIME_OUT_REMOTE_CODE=0):
            yield
    finally:
        counting.remove()


def _flat(value: Any) -> Iterator[Any]:
    """Yield a value, or what lists within lists hold."""
    waiting = [value]
    while waiting:
        each = waiting.pop()
        if isinstance(each, list):
            waiting += each
        else:
            yield each


def _objects(config: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """Yield a configuration and all objects in it."""
    waiting: list[Any] = [config]
    while waiting:
        each = waiting.pop()
        if isinstance(each, Mapping):
            yield each
            waiting += each.values()
        elif isinstance(each, list):
            waiting += each


def first_line(error: Exception) -> str:
    """Return the first line of an error's message, or else its type."""
    return str(error).strip().partition("\n")[0] or type(error).__name__
