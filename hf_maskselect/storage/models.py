"""What a configuration tells of a saved model: its class, the modules it was pruned in, and the model itself, whose
weights are found by their names."""

from __future__ import annotations

import contextlib
import functools
import inspect
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
import transformers
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel
from transformers.utils import CONFIG_NAME

from ..masking.targets import known_modules


def model_class(folder: str | os.PathLike) -> tuple[type[PreTrainedModel], PretrainedConfig]:
    """The transformers class named in `config.json` (a look-up, no code from the config) and the configuration.

    Raises:
        ValueError: the configuration names no class of transformers.
    """
    if not (Path(folder) / CONFIG_NAME).is_file():
        raise ValueError(
            f"{folder} has no config.json, so it is no saved model of transformers: give the folder of one that "
            "save_pretrained or PruningTrainer wrote"
        )
    try:
        config = AutoConfig.from_pretrained(folder)
    except (OSError, AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{folder}: config.json cannot be read ({error}); restore the file") from error
    cls = named_class(config)
    if cls is None:
        name = (config.architectures or [""])[0]
        raise ValueError(f"{folder}: config.json names the architecture {name!r}, which transformers does not have")
    return cls, config


def named_class(config: PretrainedConfig) -> type[PreTrainedModel] | None:
    """The class of transformers that a configuration names, if it names one."""
    name = (config.architectures or [""])[0]
    cls = getattr(transformers, name, None) if name else None
    return cls if isinstance(cls, type) and issubclass(cls, PreTrainedModel) else None


def of_transformers(folder: str | os.PathLike) -> bool:
    """Whether `config.json` is there and names a class of transformers."""
    try:
        model_class(folder)
    except ValueError:
        return False
    return True


def pruned_modules(config: PretrainedConfig) -> dict[str, list[str]]:
    """`target_modules` and `exclude_modules` of the run that a model comes from, where they were set."""
    told = vars(config).get("pruning")
    names = ("target_modules", "exclude_modules")
    return {name: told[name] for name in names if told.get(name)} if isinstance(told, dict) else {}


def pruned_modules_of(model: PreTrainedModel) -> dict[str, list[str]]:
    """The same, of what the model still has: its head may have been dropped, and names with it."""
    told = {name: known_modules(model, patterns) for name, patterns in pruned_modules(model.config).items()}
    return {name: patterns for name, patterns in told.items() if patterns}


def skeleton(folder: str | os.PathLike) -> PreTrainedModel:
    """The model that `config.json` describes, without weights: names and shapes only."""
    cls, config = model_class(folder)
    with torch.device("meta"):
        return cls._from_config(config)


def load_strictly(
    cls: type[PreTrainedModel], folder: str | os.PathLike, source, refused: Sequence[str], **options
) -> PreTrainedModel:
    """`cls.from_pretrained(source, ...)` that refuses what it would only warn of.

    Args:
        folder: where the model lies, for the messages.
        refused: names of the loading report that must be empty.

    Raises:
        ValueError: the weights are not those of the class and configuration.
    """
    try:
        model, info = cls.from_pretrained(source, output_loading_info=True, use_safetensors=True, **options)
    except RuntimeError as error:
        raise ValueError(
            f"{folder}: its weights do not fit {cls.__name__} as config.json describes it ({error})"
        ) from error
    for kind in refused:
        if info[kind]:
            raise ValueError(
                f"{folder}: loads with {kind.replace('_', ' ')} {sorted(info[kind])[:3]} in {cls.__name__}; its "
                "weights are of another model"
            )
    return model


@contextlib.contextmanager
def own_names(model: torch.nn.Module) -> Iterator[None]:
    """Inside, `model.save_pretrained` keeps the names that the weights have in memory.

    transformers writes some models (NomicBERT, GTE, ViT) under the names of older files instead. By those neither a
    mask nor `Trainer`, when it resumes or loads its best model, finds a weight again; `from_pretrained` reads both.
    """
    if not isinstance(model, PreTrainedModel) or not _takes_names(model.save_pretrained):
        yield
        return
    given = vars(model).get("save_pretrained")  # of this one model, which a user has set
    model.save_pretrained = functools.partial(model.save_pretrained, save_original_format=False)
    try:
        yield
    finally:
        del model.save_pretrained
        if given is not None:
            model.save_pretrained = given


def _takes_names(save: Callable) -> bool:
    """Whether it can be told which names to save under; a user's own class may save as it is named in any case."""
    takes = inspect.signature(save).parameters
    return "save_original_format" in takes or any(p.kind is p.VAR_KEYWORD for p in takes.values())
