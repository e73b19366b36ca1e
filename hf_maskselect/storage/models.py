"""Build and load the model class that `config.json` names."""

import contextlib
import functools
import hashlib
import inspect
import json
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import PretrainedConfig, PreTrainedModel
from transformers.utils import ADAPTER_CONFIG_NAME, CONFIG_NAME

from ..masking.targets import is_regex, known_modules
from ..surgery.structured.cut import give_shapes
from ..utils.reading import read_object, typed
from .configs import first_line, guarded, load_config
from .weights import has_weights, weight_files

_SMALL = 1 << 24  # numbers that a model may hold besides its weights, such as tables of positions
# Keys of config.json that do not affect the model's outputs.
_DESCRIPTIVE = ("_name_or_path", "finetuning_task", "id2label", "label2id", "transformers_version")


def model_class(folder: str | os.PathLike) -> tuple[type[PreTrainedModel], PretrainedConfig]:
    """Return the transformers class that `config.json` names, and the configuration. Runs no code from the folder.

    Raises:
        ValueError: there is no readable `config.json`, or it names no transformers class.
    """
    config = load_config(folder)
    cls = named_class(config)
    if cls is None:
        name = architecture_of(config)
        raise ValueError(f"{folder}: config.json names the architecture {name!r}, which transformers does not have")
    if not isinstance(config, cls.config_class or PretrainedConfig):
        raise ValueError(
            f"{folder}: config.json names the architecture {cls.__name__} but the model type {config.model_type!r}: "
            "restore the file"
        )
    return cls, config


def architecture_of(config: PretrainedConfig) -> str:
    """Return the class name that a configuration gives first, or an empty text."""
    return (config.architectures or [""])[0]


def named_class(config: PretrainedConfig) -> type[PreTrainedModel] | None:
    """Return the transformers class that a configuration names, or None."""
    name = architecture_of(config)
    cls = getattr(transformers, name, None) if name else None
    return cls if isinstance(cls, type) and issubclass(cls, PreTrainedModel) else None


def of_transformers(folder: str | os.PathLike) -> bool:
    """Return whether the folder has a `config.json` that names a transformers class."""
    try:
        model_class(folder)
    except ValueError:
        return False
    return True


def pruned_modules(config: PretrainedConfig) -> dict[str, list[str]]:
    """Return the `target_modules` and `exclude_modules` that the model was pruned with, those that were set.

    Raises:
        ValueError: they are no names, or regexes, which are never run if they come from a file.
    """
    pruning = vars(config).get("pruning")
    if not isinstance(pruning, dict):
        return {}
    found = {}
    for field in ("target_modules", "exclude_modules"):
        where = f"config.pruning: {field}"
        names = typed(pruning.get(field), list[str] | None, where, "remove pruning from config.json")
        if regexes := [name for name in names or () if is_regex(name)]:
            raise ValueError(
                f"{where} holds the regex {regexes[0]!r:.60}, and a regex from a file is never run: write the names "
                "of the modules there, or remove it and set the field"
            )
        if names:
            found[field] = names
    return found


def pruned_modules_of(model: PreTrainedModel) -> dict[str, list[str]]:
    """Return `pruned_modules` without names that match no layer: the model may have lost its head."""
    fields = {name: known_modules(model, patterns) for name, patterns in pruned_modules(model.config).items()}
    return {name: patterns for name, patterns in fields.items() if patterns}


def config_digest(folder: str | os.PathLike) -> str:
    """Return the SHA-256 of the `config.json` keys that affect the model's outputs; empty if there is no such file."""
    path = Path(folder) / CONFIG_NAME
    if not path.is_file():
        return ""
    config = read_object(path)
    hashed = {name: value for name, value in config.items() if name not in _DESCRIPTIVE}
    labels = config.get("id2label")  # the names may change; their number, by default 2, is the size of the head
    hashed["labels"] = len(labels) if isinstance(labels, dict) else 2
    return hashlib.sha256(json.dumps(hashed, sort_keys=True).encode()).hexdigest()


def skeleton(folder: str | os.PathLike) -> PreTrainedModel:
    """Build the model that `config.json` describes, without memory for weights: names and shapes only."""
    return _unfilled(*model_class(folder), folder)


def _unfilled(
    cls: type[PreTrainedModel], config: PretrainedConfig, folder: str | os.PathLike, saved: int | None = None
) -> PreTrainedModel:
    if saved is None and has_weights(folder):
        saved = sum(len(file.shapes) for file in weight_files(folder))
    try:
        with torch.device("meta"), guarded(saved):
            model = cls._from_config(config)
            give_shapes(model)
            return model
    except Exception as error:  # whatever a class makes of sizes that do not go together
        raise ValueError(
            f"{folder}: config.json describes no {cls.__name__} ({first_line(error)}): restore the file"
        ) from error


def load_strictly(
    cls: type[PreTrainedModel],
    folder: str | os.PathLike,
    refused: Sequence[str] = ("missing_keys",),
    remedy: str = "its weights are of another model",
    **options,
) -> PreTrainedModel:
    """Load a model by `from_pretrained`, and raise where that only warns.

    folder: folder or Hub repository; with the option `state_dict`, only named in messages. refused: lists of the
    loading report that must be empty. remedy: end of the message about them.

    Raises:
        ValueError: the weights are not those of the class and configuration.
    """
    source = None if "state_dict" in options else folder
    if source is not None and os.path.lexists(Path(source) / ADAPTER_CONFIG_NAME):
        raise ValueError(
            f"{folder} holds an adapter, which from_pretrained would add to the weights: merge it by "
            f"merge_adapter_with_masks, or move {ADAPTER_CONFIG_NAME} elsewhere"
        )
    shapes: dict[str, Sequence[int]] | None = None
    if source is None:
        shapes = {name: tensor.shape for name, tensor in options["state_dict"].items()}
    elif has_weights(source):
        shapes = {name: shape for file in weight_files(source) for name, shape in file.shapes.items()}
    if shapes is not None:
        _check_size(cls, folder, shapes)
    try:
        with guarded(None if shapes is None else len(shapes)):
            loaded: Any = cls.from_pretrained(source, output_loading_info=True, use_safetensors=True, **options)
    except OSError:
        raise  # the Hub's own message
    except Exception as error:  # whatever transformers makes of files that do not go together
        if isinstance(error, TypeError) and any(repr(name) in str(error) for name in options):
            raise  # the caller's mistake
        raise ValueError(
            f"{folder}: its weights do not fit {cls.__name__} as config.json describes it ({first_line(error)})"
        ) from error
    model, info = loaded
    for kind in refused:
        if keys := sorted(info[kind]):
            raise ValueError(
                f"{folder}: {len(keys)} {kind.replace('_', ' ')} in {cls.__name__}, such as {keys[0]!r}; {remedy}"
            )
    return model


def _check_size(cls: type[PreTrainedModel], folder: str | os.PathLike, shapes: Mapping[str, Sequence[int]]) -> None:
    """Raise a ValueError if the model of a folder is far larger than its weights, for which memory would be taken."""
    model = _unfilled(cls, load_config(folder), folder, len(shapes))
    described = sum(tensor.numel() for tensor in (*model.parameters(), *model.buffers()))
    saved = sum(math.prod(shape) for shape in shapes.values())
    if described > 4 * saved + _SMALL:
        raise ValueError(
            f"{folder}: config.json describes {described:,} numbers but {saved:,} are saved: restore the file"
        )


@contextlib.contextmanager
def own_names(model: torch.nn.Module) -> Iterator[None]:
    """Make `model.save_pretrained` write the parameter names of the model in memory, inside the block.

    For some models (NomicBERT, GTE, ViT) transformers writes the names of older files. Masks would not match those
    names, nor would `Trainer` when it resumes or loads its best model. `from_pretrained` reads both.
    """
    if not isinstance(model, PreTrainedModel) or not _takes_names(model.save_pretrained):
        yield
        return
    attributes = vars(model)
    own = attributes.get("save_pretrained")  # a function that the user set on this instance
    attributes["save_pretrained"] = functools.partial(model.save_pretrained, save_original_format=False)
    try:
        yield
    finally:
        del attributes["save_pretrained"]
        if own is not None:
            attributes["save_pretrained"] = own


def _takes_names(save: Callable) -> bool:
    """Return whether `save` takes `save_original_format`; a user's own class may not."""
    takes = inspect.signature(save).parameters
    return "save_original_format" in takes or any(p.kind is p.VAR_KEYWORD for p in takes.values())
