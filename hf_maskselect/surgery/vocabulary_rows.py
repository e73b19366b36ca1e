"""The model's part of a vocabulary: tensors with one row for each token, and the ids in its configurations."""

import copy
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedConfig, PreTrainedModel

from .structured.cut import give_shapes
from .structured.layer_shapes import for_loading
from .tokenizer_vocabulary import ids_in, rename_ids

# Fields of a generation configuration that hold ids under other names than `..._token_id`.
_ID_FIELDS = ("suppress_tokens", "begin_suppress_tokens", "bad_words_ids", "force_words_ids", "sequence_bias")
_MOST_BELOW_PADDING = 1024


def number_of_rows(model: PreTrainedModel) -> int:
    """Return the number of tokens that the embedding table of a model has.

    Raises:
        ValueError: it takes no token ids, or its configuration has another number.
    """
    embeddings: Any = model.get_input_embeddings() if model.main_input_name == "input_ids" else None
    if not isinstance(embeddings, nn.Embedding):
        raise ValueError(
            f"{type(model).__name__} has no table of tokens: only models that take token ids can be trimmed"
        )
    rows = embeddings.num_embeddings
    if not any(getattr(config, "vocab_size", None) == rows for config in _configs(model.config)):
        raise ValueError(
            f"the embedding table has {rows} rows but the configuration another vocab_size: change the table by "
            "model.resize_token_embeddings, which sets both"
        )
    return rows


def ids_of_model(model: PreTrainedModel, rows: int) -> set[int]:
    """Return the ids below `rows` that have to stay because of the model's configurations.

    These are the ids that they name. RoBERTa also counts positions from the id of padding, so that this id may not
    change: all ids below it stay, unless there are more of them than a table has positions.
    """
    found: set[int] = set()
    for config in (*_configs(model.config), *([model.generation_config] if model.can_generate() else ())):
        settings = vars(config)
        found |= ids_in(settings, _ID_FIELDS)
        padding = settings.get("pad_token_id")
        if isinstance(padding, int) and padding < _MOST_BELOW_PADDING:
            found |= set(range(padding))
    return {index for index in found if 0 <= index < rows}


@torch.no_grad()
def model_with_rows(model: PreTrainedModel, kept: Sequence[int]) -> PreTrainedModel:
    """Return a copy of a model that has only the rows `kept` of its embedding table, and of its head over tokens.

    Which tensors have a row for each token is seen from the shapes of the model that the new configuration describes.

    Args:
        model: it stays as it is.
        kept: old ids, in the order of their new ones.

    Raises:
        ValueError: the model is not the one that its configuration describes.
    """
    rows, renaming = number_of_rows(model), {old: new for new, old in enumerate(kept)}
    config = copy.deepcopy(model.config)
    for each in _configs(config):
        if getattr(each, "vocab_size", None) == rows:
            each.vocab_size = len(kept)
        _rename(each, renaming)
    with torch.device("meta"):
        skeleton = type(model)._from_config(copy.deepcopy(config))
        give_shapes(skeleton)
    described = skeleton.state_dict()
    tensors = model.state_dict()
    if strange := sorted(tensors.keys() ^ described.keys()):
        raise ValueError(
            f"{strange[0]} is not in both the model and the {type(model).__name__} that its configuration describes: "
            "merge adapters and undo changes of its modules before it is trimmed"
        )
    index = torch.tensor(kept)
    tensors = {name: _with_rows(name, tensor, described[name].shape, rows, index) for name, tensor in tensors.items()}
    options: dict[str, Any] = {"config": for_loading(config), "state_dict": dict(tensors), "dtype": model.dtype}
    trimmed: Any = type(model).from_pretrained(None, **options)
    for name, tensor in trimmed.state_dict().items():
        if tensor.dtype != tensors[name].dtype or not torch.equal(tensor, tensors[name]):
            raise ValueError(
                f"{name} is not what the configuration makes of it, such as a tied weight or another dtype: save the "
                "model, load it by from_pretrained, and trim that"
            )
    for name, parameter in model.named_parameters():
        trimmed.get_parameter(name).requires_grad_(parameter.requires_grad)
    if model.can_generate():
        trimmed.generation_config = copy.deepcopy(model.generation_config)
        _rename(trimmed.generation_config, renaming)
    trimmed.name_or_path = trimmed.config.name_or_path = model.name_or_path
    return trimmed.to(model.device).train(model.training)


def _configs(config: PreTrainedConfig) -> Iterator[PreTrainedConfig]:
    """Yield a configuration and those of its parts."""
    yield config
    for part in vars(config).values():
        if isinstance(part, PreTrainedConfig):
            yield from _configs(part)


def _rename(config: PreTrainedConfig | GenerationConfig, renaming: Mapping[int, int]) -> None:
    """Give the ids in a configuration their new numbers."""
    for key, value in rename_ids(vars(config), renaming, _ID_FIELDS).items():
        if value != vars(config)[key]:
            setattr(config, key, value)


def _with_rows(name: str, tensor: Tensor, shape: torch.Size, rows: int, kept: Tensor) -> Tensor:
    """Return a copy of a tensor with the rows `kept` along the dimension that has to shrink to `shape`, if one has."""
    if tensor.shape == shape:
        return tensor.clone()
    smaller = [dim for dim, (old, new) in enumerate(zip(tensor.shape, shape, strict=False)) if old != new]
    if tensor.dim() != len(shape) or [(tensor.shape[dim], shape[dim]) for dim in smaller] != [(rows, len(kept))]:
        raise ValueError(
            f"{name} has shape {tuple(tensor.shape)} where the configuration describes {tuple(shape)}: undo changes "
            "of the model's modules before it is trimmed"
        )
    return tensor.index_select(smaller[0], kept.to(tensor.device))
