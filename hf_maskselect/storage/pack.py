"""Folders of saved models to and from the packed file, and `load_pruned`, which reads either."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError, HTTPError
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from ..masking.maskset import MaskSet, pack_bits, packed_digest, unpack_bits
from ..utils.files import bytes_of, replacing, write_safetensors
from .models import load_strictly, model_class, pruned_modules_of, skeleton
from .packed_file import DENSE, PACKED_FILE, PackedFile, PackedWriter
from .state import (
    STATE_FILE,
    PruningState,
    WeightsDigest,
    changed,
    check_weights,
    check_zeros,
    config_digest,
    saved_tensors,
)

# What makes a model folder besides its weights; not what a checkpoint keeps for the trainer.
_COMPANIONS = ("*.json", "*.txt", "*.model", "*.jinja", "*.md", "*.png")
_WEIGHT_FILES = ("model*.safetensors", SAFE_WEIGHTS_INDEX_NAME)
_WEIGHTS = (SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME)
_LEFT_OUT = (SAFE_WEIGHTS_INDEX_NAME, "trainer_state.json")


@dataclass(frozen=True)
class PackReport:
    """Sizes in bytes: of the tensors unpacked, of the packed file, and the least that the file could have.

    bound: the entropy of each sparse tensor's mask at its density, plus its kept values, plus all else, at the dtypes
    stored.
    """

    path: Path
    dense: int
    packed: int
    bound: float

    def __str__(self) -> str:
        return (
            f"{self.path}: {self.packed / 1e6:,.2f} MB, {self.dense / self.packed:.2f}x smaller than the dense "
            f"{self.dense / 1e6:,.2f} MB and {self.packed / self.bound:.4f}x the entropy bound"
        )


def pack(
    folder: str | os.PathLike,
    output: str | os.PathLike,
    values: str | None = None,
    embeddings: str | None = None,
) -> PackReport:
    """Write the model saved in `folder` as `output/packed_model.safetensors`, with its configuration and tokenizer.

    Every weight comes back to the bit, but for the sign of a pruned zero. One tensor is in memory at a time.

    Args:
        folder: a folder of `PruningTrainer`, or of any saved model of transformers with zeros.
        output: another folder (made if need be), or `folder` itself to put the packed file beside the weights.
        values: `"bf16"` or `"fp16"` rounds all floating values (lossy).
        embeddings: `"int8"` rounds embedding tables to 255 steps a row (lossy).

    Raises:
        ValueError: no such model, weights that are not those of its masks, or an option that does not exist.
    """
    folder, output = Path(folder), Path(output)
    if embeddings not in (None, "int8"):
        raise ValueError(f"embeddings={embeddings!r} must be 'int8', or left out to keep every bit")
    writer = PackedWriter(values)
    model = skeleton(folder)
    known = {name: tensor.shape for name, tensor in model.state_dict().items()}
    tables = {f"{name}.weight" for name, module in model.named_modules() if isinstance(module, nn.Embedding)}
    bits, shapes, fields = {}, {}, {}
    metadata = {"config": config_digest(folder)}
    if (folder / STATE_FILE).is_file():
        bits, shapes, fields = MaskSet.load_packed(folder / STATE_FILE)
        metadata["pruning"] = json.dumps({**fields, "masked": sorted(bits)})

    def encoded() -> Iterator[tuple[str, Tensor, str, Tensor | None]]:
        digest = WeightsDigest()
        for name, tensor in saved_tensors(folder):
            digest.add(name, tensor)
            mask = unpack_bits(bits[name], shapes[name]) if name in bits else None
            if mask is not None:
                check_zeros(folder, name, tensor, mask)
            if embeddings and name in tables:
                yield name, tensor, "int8", None
            else:
                yield name, tensor, "sparse" if known.get(name) == tensor.shape else "raw", mask
        if bits and digest.hex() != fields["weights"]:
            raise ValueError(changed(folder, "the weights are not those"))

    check_output(folder, output)
    output.mkdir(parents=True, exist_ok=True)
    copy_companions(folder, output)
    path = output / PACKED_FILE
    writer.write(path, encoded(), metadata)
    return PackReport(path, writer.dense_bytes, path.stat().st_size, writer.bound_bits / 8)


def unpack(folder: str | os.PathLike, output: str | os.PathLike) -> None:
    """Write the packed model of `folder` as an ordinary one in `output` (it may be `folder`).

    Raises:
        ValueError: no packed model there, damaged, or not of the model that its `config.json` describes.
    """
    folder, output = Path(folder), Path(output)
    packed = open_packed(folder)
    names, state = _pruning_fields(packed)
    if (output / SAFE_WEIGHTS_NAME).exists() or (output / SAFE_WEIGHTS_INDEX_NAME).exists():
        raise ValueError(f"{output} holds weights already: choose another output folder")
    bits, shapes = {}, {}

    def chunks() -> Iterator[memoryview]:
        for name in packed.entries:
            tensor, mask = packed.tensor_and_mask(name)
            if name in names:
                mask = torch.ones_like(tensor, dtype=torch.bool) if mask is None else mask
                bits[name], shapes[name] = pack_bits(mask), tuple(mask.shape)
            yield bytes_of(tensor)

    check_output(folder, output)
    output.mkdir(parents=True, exist_ok=True)
    copy_companions(folder, output)
    with replacing(output / SAFE_WEIGHTS_NAME) as temporary:
        with open(temporary, "wb") as file:
            write_safetensors(file, packed.layout, chunks(), {"format": "pt"})
        if names and packed_digest(bits, shapes) != state["digest"]:
            raise ValueError(f"{packed.path} is damaged: its masks do not match their digest; restore the file")
    if names:
        masks = _Unpacked(bits, shapes)
        told = {"weights": check_weights(output, masks), "config": config_digest(output)}
        state = {name: text for name, text in state.items() if name in PruningState.from_fields(masks, state).fields}
        with replacing(output / STATE_FILE) as temporary:
            MaskSet.save_packed(temporary, bits, shapes, {**state, **told})


class _Unpacked(Mapping[str, Tensor]):
    """Masks that are unpacked one at a time, when they are asked for."""

    def __init__(self, bits: dict[str, Tensor], shapes: dict[str, tuple[int, ...]]) -> None:
        self._bits, self._shapes = bits, shapes

    def __getitem__(self, name: str) -> Tensor:
        return unpack_bits(self._bits[name], self._shapes[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self._bits)

    def __len__(self) -> int:
        return len(self._bits)


def open_packed(folder: str | os.PathLike, file: str = PACKED_FILE, command: str = "pack") -> PackedFile:
    """The packed file of a folder, checked against the `config.json` beside it; command: what writes such a file.

    Raises:
        ValueError: none there, damaged, or of another model.
    """
    folder = Path(folder)
    if not (folder / file).is_file():
        raise ValueError(f"{folder} has no {file}: give a folder that `hf-maskselect {command}` wrote")
    packed = PackedFile(folder / file)
    if config_digest(folder) != packed.metadata.get("config"):
        raise ValueError(f"{folder}: config.json is not the one that {file} was made with; restore the file")
    known = {name: tuple(tensor.shape) for name, tensor in skeleton(folder).state_dict().items()}
    for name, entry in packed.entries.items():
        # A sparse tensor may be far larger than its bytes: its size must be the model's before it is made.
        if entry.coding not in DENSE and known.get(name) != entry.shape:
            raise ValueError(
                f"{packed.path}: {name} has shape {entry.shape} but config.json describes {known.get(name)}; the file "
                "is of another model"
            )
    return packed


def load_pruned(path_or_repo: str | os.PathLike, **options) -> tuple[PreTrainedModel, MaskSet]:
    """The model and its masks, ready to be trained on with its zeros kept.

    Args:
        path_or_repo: a folder or a Hub repository: of `PruningTrainer`, packed (`hf-maskselect pack`), or any saved
            model of transformers with zeros, whose masks are then taken from `MaskSet.from_zeros`. Of a folder that
            holds both, the ordinary weights are read; of a repository, the packed ones are downloaded.
        options: for `from_pretrained`, those of the configuration (such as `hidden_dropout_prob=0.3`) among them;
            `revision`, `token` and `cache_dir` also for the download.

    Raises:
        ValueError: nothing to load there, or files that are damaged or do not fit each other.
    """
    if elsewhere := {"subfolder", "variant", "gguf_file"} & options.keys():
        raise ValueError(f"load_pruned takes no {sorted(elsewhere)[0]}: what is checked lies in the folder itself")
    told = {name: options.pop(name) for name in ("revision", "token", "cache_dir") if name in options}
    folder = find_folder(path_or_repo, packed=True, **told)
    if (folder / SAFE_WEIGHTS_NAME).is_file() or (folder / SAFE_WEIGHTS_INDEX_NAME).is_file():
        state = PruningState.find(folder)
        if state is not None:
            state.check_saved(folder)
        model = load_strictly(model_class(folder)[0], folder, folder, ("missing_keys",), **options)
        return model, _of_zeros(model) if state is None else state.masks
    if not (folder / PACKED_FILE).is_file():
        raise ValueError(
            f"{folder} has no {PACKED_FILE} and no {SAFE_WEIGHTS_NAME}: give the folder of a saved model, or one that "
            "`hf-maskselect pack` wrote"
        )
    packed = open_packed(folder)
    names, state = _pruning_fields(packed)
    tensors, masks = {}, {}
    for name in packed.entries:
        tensors[name], mask = packed.tensor_and_mask(name)
        if name in names:
            masks[name] = torch.ones_like(tensors[name], dtype=torch.bool) if mask is None else mask
    found = MaskSet(masks)
    if names and found.digest() != state["digest"]:
        raise ValueError(f"{packed.path} is damaged: its masks do not match their digest; restore the file")
    # The configuration by its folder: from_pretrained takes what of the options belongs to it only when it reads it.
    options = {"config": folder, **options}
    model = load_strictly(model_class(folder)[0], folder, None, ("missing_keys",), state_dict=tensors, **options)
    return model, found if names else _of_zeros(model)


def _of_zeros(model: PreTrainedModel) -> MaskSet:
    """`MaskSet.from_zeros`, over what the model's run pruned where its configuration tells that."""
    return MaskSet.from_zeros(model, **pruned_modules_of(model))


def find_folder(
    path_or_repo: str | os.PathLike, packed: bool = False, weights: Sequence[str] = _WEIGHT_FILES, **told
) -> Path:
    """The folder itself, or the files of a Hub repository that loading needs.

    Args:
        packed: take the packed weights of a repository that has them, if they are those its state belongs to.
        weights: names (or globs) of the files to download else.
        told: `revision`, `token` and `cache_dir` of the download.

    Raises:
        ValueError: there is neither.
    """
    if Path(path_or_repo).is_dir():
        return Path(path_or_repo)
    repo = os.fspath(path_or_repo)
    try:
        if packed:
            folder = Path(snapshot_download(repo, allow_patterns=[*_COMPANIONS, STATE_FILE, PACKED_FILE], **told))
            if _belongs(folder):
                return folder
        return Path(snapshot_download(repo, allow_patterns=[*_COMPANIONS, STATE_FILE, *weights], **told))
    except (OSError, HTTPError, HFValidationError) as error:
        raise ValueError(
            f"{repo} is no folder, and cannot be had from the Hub ({str(error).splitlines()[0]}): check the name "
            "and the connection"
        ) from error


def _belongs(folder: Path) -> bool:
    """Whether the packed weights of a repository are there and not left over from an earlier model."""
    if not (folder / PACKED_FILE).is_file():
        return False
    state, (_, fields) = PruningState.find(folder), _pruning_fields(PackedFile(folder / PACKED_FILE))
    return state is None or fields.get("weights") == state.weights


def _pruning_fields(packed: PackedFile) -> tuple[set[str], dict[str, str]]:
    """(names of the masked tensors, fields of their `PruningState` and digest); empty for a foreign model."""
    if "pruning" not in packed.metadata:
        return set(), {}
    try:
        fields = json.loads(packed.metadata["pruning"])
        names = set(fields.pop("masked"))
        PruningState.from_fields(MaskSet({}), fields)
        if not names <= packed.entries.keys() or "digest" not in fields:
            raise ValueError("masks of tensors it does not hold")
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{packed.path} is damaged: its header does not describe masks ({error})") from error
    return names, fields


def check_output(folder: Path, output: Path) -> None:
    """Raise a ValueError where writing a model into `output` would mix two models."""
    if output.resolve() != folder.resolve() and any((output / name).exists() for name in _WEIGHTS):
        raise ValueError(f"{output} holds the weights of a model already: choose another output folder")


def copy_companions(folder: Path, output: Path) -> None:
    """Copy what belongs to a model besides its weights; the output folder is there."""
    if output.resolve() == folder.resolve():
        return
    for pattern in _COMPANIONS:
        for file in sorted(folder.glob(pattern)):
            if file.name not in _LEFT_OUT and not file.name.startswith("optimizer"):
                shutil.copyfile(file, output / file.name)
