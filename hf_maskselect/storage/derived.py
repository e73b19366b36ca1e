"""Files that were made from weights: they name the weights, and are refused or deleted beside others."""

import importlib.util
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from transformers.utils import SAFE_WEIGHTS_INDEX_NAME

from ..masking.tensor_files import TensorFile
from ..utils.digests import WeightsDigest
from ..utils.files import read_json
from ..utils.folders import replacing_folder
from ..utils.reading import parse_json, typed
from ..utils.tables import without_section
from .folders import copy_companions
from .packed_file import PACKED_FILE, PackedFile
from .state import STATE_FILE, PruningState
from .weights import check_weights, has_weights

SEMI_STRUCTURED_FILE = "semi_structured_model.safetensors"
TIMING_FILE = "semi_structured_timing.json"
ONNX_FILE = "model.onnx"
CPU_FILE, CPU_JSON = "cpu_model.safetensors", "cpu_model.json"
CARD = "README.md"
SECTIONS = {  # file -> heading of its section in the model card
    TIMING_FILE: "## Speed on sparse tensor cores",
    CPU_JSON: "## Speed on a CPU",
}
ORIGIN = "weights"  # the field with the digest of the weights
_COMMANDS = {  # file -> the console command that makes it
    PACKED_FILE: "pack",
    SEMI_STRUCTURED_FILE: "export --format nm",
    TIMING_FILE: "export --format nm --benchmark",
    ONNX_FILE: "export --format onnx",
    CPU_FILE: "export --format cpu",
    CPU_JSON: "export --format cpu",
}
_OF_WEIGHTS = re.compile(
    rf"(adapter_)?model(-\d{{5}}-of-\d{{5}})?\.safetensors|{re.escape(SAFE_WEIGHTS_INDEX_NAME)}|adapter_config\.json|"
    rf"generation_config\.json|{re.escape(STATE_FILE)}|{re.escape(ONNX_FILE)}\.data|"
    + "|".join(map(re.escape, _COMMANDS))
)


def of_weights(name: str) -> bool:
    """Return whether a file of this name holds weights, belongs to them or was made from them."""
    return _OF_WEIGHTS.fullmatch(name) is not None


@contextmanager
def beside_model(folder: Path | None, output: Path, weights: Callable[[], str], outdated: str = "") -> Iterator[Path]:
    """Add files that are made from a model to `output`, all or none: yields an empty folder for them.

    If `output` is another folder than that of the model, the model's configuration, tokenizer and card come with them,
    and files that were made from other weights are deleted there.

    Args:
        folder: of the model; None for a model in memory, beside whose files everything stays.
        output: the folder to write into; it need not exist.
        weights: returns the digest of the model's weights; called at the end.
        outdated: name of a file in `output` that was made from an earlier one of the new files, and is deleted.
    """
    beside = folder is None or output.resolve() == folder.resolve()

    def keeps(name: str) -> bool:
        return name != outdated and (beside or stays(output / name, weights))

    with replacing_folder(output, keeps) as new:
        if folder is not None and not beside:
            copy_companions(folder, new)
            for file in SECTIONS:  # of exports that stay in the other folder
                (new / file).unlink(missing_ok=True)
                write_section(new, new, file)
        yield new


def stays(path: Path, weights: Callable[[], str]) -> bool:
    """Return whether a file may stay in a folder that gets other weights, whose digest `weights` returns."""
    if not of_weights(path.name):
        return True
    origin = origin_of(path)
    return origin != "" and origin == weights()


def origin_of(path: Path) -> str:
    """Return the digest of the weights that a file was made from; empty if it names none, or is damaged."""
    try:
        if path.name in (PACKED_FILE, SEMI_STRUCTURED_FILE, CPU_FILE):
            return _origin(TensorFile(path).metadata)
        if path.name == CPU_JSON:
            return _origin(TensorFile(path.with_name(CPU_FILE)).metadata)
        if path.name == TIMING_FILE:
            return str(typed(read_json(path, "delete it"), dict, path).get(ORIGIN, ""))
        if path.name.startswith(ONNX_FILE) and importlib.util.find_spec("onnx") is not None:
            return _origin_of_graph(path.with_name(ONNX_FILE))
    except ValueError:
        pass
    return ""


def _origin(metadata: Mapping[str, str]) -> str:
    if ORIGIN in metadata or "pruning" not in metadata:
        return metadata.get(ORIGIN, "")
    fields = parse_json(metadata["pruning"], "pruning")  # earlier versions named the weights there
    return str(typed(fields, dict, "pruning").get(ORIGIN, ""))


def _origin_of_graph(path: Path) -> str:
    import onnx
    from google.protobuf.message import DecodeError

    try:
        fields = onnx.load(path, load_external_data=False).metadata_props
    except (OSError, DecodeError) as error:
        raise ValueError(f"{path} cannot be read as a graph ({error}): export it again") from error
    return next((field.value for field in fields if field.key == ORIGIN), "")


def check_derived(folder: Path, weights: str) -> None:
    """Raise a ValueError if a file in `folder` was made from other weights than those with the digest `weights`."""
    for name, command in _COMMANDS.items():
        path = folder / name
        if not path.is_file() or origin_of(path) in ("", weights):
            continue
        # What was unpacked beside a packed file has other signs of zeros, or was rounded, and so another digest.
        if name != PACKED_FILE or content_of(PackedFile(path)) != weights:
            raise ValueError(
                f"{path} was made from other weights than those beside it: run `hf-maskselect {command}` again, or "
                "delete the file"
            )


def weights_beside(folder: Path) -> str:
    """Return the digest of the weights in a folder, else that of its pruning state; empty if it has neither."""
    if has_weights(folder):
        return check_weights(folder, {})
    state = PruningState.find(folder)
    return "" if state is None else state.weights


def write_section(folder: Path, new: Path, file: str, section: str = "") -> None:
    """Write the model card that `new` has, or else that of `folder`, into `new` with another section on a file.

    Args:
        folder: the folder that gets the files of `new`.
        new: folder of the new files.
        file: name of an exported file in `SECTIONS`.
        section: the text below the heading. An empty one removes the section.
    """
    cards = [card for card in (new / CARD, folder / CARD) if card.is_file() and not card.is_symlink()]
    text = (
        cards[0].read_text(encoding="utf-8", errors="surrogateescape") if cards else ""
    )  # a user may have written it
    changed = without_section(text, SECTIONS[file])
    if section:
        changed = f"{changed.rstrip()}\n\n{SECTIONS[file]}\n\n{section}\n".lstrip()
    if changed != text:
        (new / CARD).write_text(changed, encoding="utf-8", errors="surrogateescape")


def content_of(packed: PackedFile) -> str:
    """Return the digest of the dense tensors that a packed file decodes to."""
    digest = WeightsDigest()
    for name in packed.entries:
        digest.add(name, packed.tensor(name))
    return digest.hex()
