"""The console command `hf-maskselect COMMAND PATH`. Exit code 0: success, 1: the command failed, 2: bad usage."""

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from datasets import disable_progress_bars
from transformers import HfArgumentParser
from transformers.utils.logging import disable_progress_bar

from .config import PruningConfig
from .export.onnx import export_onnx
from .export.semi_structured import EXPORT_DTYPES, export_semi_structured
from .export.timing import time_export
from .masking.targets import check_module_names
from .reporting.card import card_text, write_card
from .reporting.latency import plot_cpu_models
from .reporting.plots import plot
from .reporting.record import RunRecord
from .runtime.export import export_cpu
from .runtime.quantize import rows_of_file
from .runtime.report import CpuReport
from .storage.configs import load_config
from .storage.derived import CPU_JSON
from .storage.folders import find_folder
from .storage.models import load_strictly, model_class, of_transformers
from .storage.pack import pack, unpack
from .storage.packed_file import LOSSY
from .storage.reload import check_apart, loaders, save_reloadable, seconds_of_call
from .storage.state import PruningState
from .storage.text_files import text_rows
from .storage.trim import trim_folder
from .storage.verify import check_smaller, parse_checkable, verify
from .storage.weights import has_weights
from .surgery.structured.batches import batches_of, rows_of
from .surgery.structured.record import STRUCTURED, StructureRecord
from .surgery.structured.shrink import shrink_model
from .surgery.structured.target import KEPT_SHAPES
from .training.search_cost import check_run, cost_text, workload
from .utils.tables import visible

PLAN_USAGE = "hf-maskselect plan PATH [--ranks N ...] [--train_rows N] --max_steps N [any field of PruningConfig]"
TIMED_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
COMMANDS = {
    "report": "count the zeros per tensor and over the whole model, or tell how a CPU model runs and how fast",
    "verify": "check that zeros and masks agree, that they meet the target, and that the model loads plainly",
    "plot": "draw the kept weights of each layer, the candidates of the search and the course of the run, as PNG",
    "pack": "write the model as one small file for transport, with its configuration and tokenizer",
    "unpack": "write a packed model as an ordinary one, which from_pretrained loads",
    "export": "write a 2:4 model for sparse tensor cores, or any model as ONNX or for this machine's CPU",
    "shrink": "write a smaller, ordinary model: layers and neurons removed, and the rest fitted, without training",
    "trim": "write the model without the tokens that texts do not need: a smaller file with the same outputs",
    "plan": "estimate what the searches of a run would cost on different numbers of ranks",
}


def make_parser() -> argparse.ArgumentParser:
    """Build the parser of all commands and their options."""
    parser = argparse.ArgumentParser(
        prog="hf-maskselect", description="Inspect, pack, unpack, export and shrink models, and plan runs."
    )
    subparsers = parser.add_subparsers(dest="command", required=True)
    commands = {}
    for name, text in COMMANDS.items():
        commands[name] = subparsers.add_parser(name, help=text, description=f"{text[0].upper()}{text[1:]}.")
        where = "folder of a saved model; report, verify, export, shrink, trim and plan also take user/name on the Hub"
        several = "folder of a saved model, or folders of CPU models that were exported with scores"
        if name == "plot":
            commands[name].add_argument("paths", nargs="+", metavar="path", help=several)
        else:
            commands[name].add_argument("path", help=where)
    for name in ("pack", "unpack", "export", "shrink", "trim"):
        commands[name].add_argument("--output", required=True, help="folder to write to, created if needed")
    add = commands["plot"].add_argument
    add("--output", help="folder to write to (default: the first model's folder)")
    add("--batch-sizes", nargs="+", type=positive, help="CPU models: batch sizes to draw (default: the first timed)")
    add("--seq-lens", nargs="+", type=positive, help="CPU models: lengths to draw (default: the first timed)")
    add = commands["pack"].add_argument
    add("--values", choices=LOSSY, help="round all values to 16 bits (lossy)")
    add("--embeddings", choices=["int8"], help="round embedding tables to 8 bits (lossy)")
    add = commands["verify"].add_argument
    add("--pattern", type=checked(parse_checkable), help="check also this pattern of every pruned matrix (2:4, 1x4)")
    add = commands["export"].add_argument
    formats = "nm: 2:4 values and metadata (default); onnx; cpu: the fastest layers on this machine"
    add("--format", choices=["nm", "onnx", "cpu"], default="nm", help=formats)
    dtypes = "nm: dtype of the weights (default: bf16); cpu: the narrowest allowed (default: int8)"
    add("--dtype", choices=[*EXPORT_DTYPES, "fp32"], help=dtypes)
    names = checked(check_module_names)
    add("--exclude-modules", nargs="+", type=names, help="nm: modules (suffix or regex) to leave dense")
    add("--benchmark", action="store_true", help="nm: then time dense against sparse on this machine's GPU")
    add("--batch-sizes", nargs="+", type=positive, help="batch sizes to time (default: 1 8 32; cpu: 1 8)")
    add("--seq-lens", nargs="+", type=positive, help="lengths to time, in tokens (default: 128; cpu: 32 128)")
    add("--threads", type=positive, help="cpu: number of threads to time with (default: those of torch)")
    add(
        "--calibration",
        help="cpu with int8: .jsonl or .parquet file of rows of the train split, 128 of which are used",
    )
    add("--rivals", action="store_true", help="cpu: time also ONNX Runtime, in float32 and int8, and torch in bf16")
    _add_shrink(commands["shrink"])
    add = commands["trim"].add_argument
    texts = "files with all texts of the task: .txt (a text a line), .jsonl or .parquet (all columns of text)"
    add("--texts", nargs="+", required=True, metavar="FILE", help=texts)
    add("--keep", nargs="+", default=[], metavar="TOKEN", help="tokens that stay although no text has them")
    add("--check", nargs="+", default=[], metavar="FILE", help="files with other texts, on which to compare")
    commands["plan"].usage = PLAN_USAGE
    add = commands["plan"].add_argument
    add("--ranks", nargs="+", type=positive, default=[1, 8, 64, 512], help="numbers of ranks (default: 1 8 64 512)")
    rows = "rows of the training set (default: 10000)"
    add("--train_rows", "--train-rows", type=positive, default=10_000, help=rows)
    return parser


def _add_shrink(parser: argparse.ArgumentParser) -> None:
    """Add the options of `shrink`."""
    target = parser.add_mutually_exclusive_group(required=True)
    target.add_argument("--speedup", type=float, help="how many times as fast the whole model shall be, such as 2")
    target.add_argument("--sparsity", type=float, help="share of the layers' parameters to remove, such as 0.5")
    rows = ".jsonl or .parquet file of rows of the train split, 2,000 of which are used; labels are not needed"
    parser.add_argument("--rows", required=True, help=rows)
    add = parser.add_argument
    shapes = "uniform: plain transformers loads the model (default); free: heads too, and sizes layer by layer"
    add("--keep-shape", choices=KEPT_SHAPES, default="uniform", help=shapes)
    add("--candidates", type=positive, default=16, help="number of shapes to try (default: 16)")
    add("--batch-size", type=positive, default=8, help="batch size to time (default: 8)")
    add("--seq-len", type=positive, default=128, help="length to time, in tokens (default: 128)")
    add("--dtype", choices=TIMED_DTYPES, help="dtype to time (default: that of the model)")


def positive(text: str) -> int:
    """Parse a whole number of at least 1."""
    if not text.isdigit() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text} is not a whole number above 0")
    return int(text)


def checked(check: Callable[[str], object]) -> Callable[[str], str]:
    """Make an argument type of a check that raises a ValueError; argparse would hide the error's message."""

    def argument(text: str) -> str:
        try:
            check(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from error
        return text

    return argument


def make_config(fields: Sequence[str]) -> PruningConfig:
    """Parse the configuration of the run to plan."""
    config_class: Any = PruningConfig
    parser = HfArgumentParser(config_class, prog="hf-maskselect plan", usage=PLAN_USAGE)
    try:
        config, unknown = parser.parse_args_into_dataclasses(list(fields), return_remaining_strings=True)
        check_run(config)
    except ValueError as error:
        parser.error(str(error))
    if unknown:
        parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    return config


def run(options: argparse.Namespace) -> str:
    """Run one command and return the text to print."""
    if options.command == "report":
        return report(options.path)
    if options.command == "pack":
        return str(pack(options.path, options.output, options.values, options.embeddings))
    if options.command == "plot":
        return "\n".join(f"wrote {path}" for path in draw(options))
    if options.command == "unpack":
        unpack(options.path, options.output)
        return f"wrote {options.output}"
    if options.command == "export":
        return export(options)
    if options.command == "shrink":
        return _shrink(options)
    if options.command == "trim":
        texts, check = read_texts(options.texts), read_texts(options.check)
        trimmed = trim_folder(options.path, options.output, texts, keep=options.keep, check=check)
        return f"{trimmed}\nwrote {options.output}"
    if options.command == "plan":
        return cost_text(workload(options.config, options.path, options.train_rows), options.ranks)
    return _verified(options)


def _verified(options: argparse.Namespace) -> str:
    """Run the command `verify`. A model that `shrink` wrote has no pruning state."""
    record = StructureRecord.find(load_config(options.path)) if of_transformers(options.path) else None
    if record is not None and PruningState.find(options.path) is None:
        check_smaller(options.path)
    else:
        state = verify(options.path, options.pattern)
        record = record if state.pattern == STRUCTURED else None
    if record is not None:
        seconds = seconds_of_call(options.path, record.timed_shape)
        return (
            f"good: a fresh process loads it with the same outputs\n{record}\nnow: {1000 * seconds:.2f} ms a call, "
            f"{record.milliseconds[1]:.2f} when it was made"
        )
    masks = state.masks
    zeros = masks.total - masks.kept
    return f"good: {zeros:,} of {masks.total:,} prunable weights are zero ({masks.sparsity():.6f})"


def report(path: str) -> str:
    """Run the command `report` and return the text to print."""
    folder = find_folder(path)
    if _is_cpu_model(folder):
        return str(CpuReport.load(path))
    record = RunRecord.load(folder)
    parts = [record.structure, record.report if record.sparse else None]
    return "\n".join(str(part) for part in parts if part is not None)


def draw(options: argparse.Namespace) -> list[Path]:
    """Run the command `plot` and return the paths of the pictures."""
    paths, output = options.paths, options.output or options.paths[0]
    if len(paths) > 1 or _is_cpu_model(Path(paths[0])):
        return plot_cpu_models(paths, output, options.batch_sizes, options.seq_lens)
    return plot(RunRecord.load(paths[0]), output)


def _is_cpu_model(folder: Path) -> bool:
    """Return whether a folder holds a CPU model alone; beside ordinary weights these count."""
    return (folder / CPU_JSON).is_file() and not has_weights(folder)


def read_texts(paths: Sequence[str]) -> list[str]:
    """Return the texts of all files."""
    return [text for path in paths for row in text_rows(path) for text in row.values() if text is not None]


def export(options: argparse.Namespace) -> str:
    """Run the command `export` and return the text to print."""
    if options.format == "onnx":
        return str(export_onnx(options.path, options.output))
    if options.format == "cpu":
        return str(_export_cpu(options))
    exported = export_semi_structured(options.path, options.output, options.dtype or "bf16", options.exclude_modules)
    if not options.benchmark:
        return str(exported)
    print(exported, flush=True)  # the export is complete even if the timing fails
    return str(time_export(options.output, options.batch_sizes or (1, 8, 32), options.seq_lens or (128,)))


def check_export(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    """End the command with its usage if an option of `export` belongs to another format."""
    timed = {"--batch-sizes": options.batch_sizes, "--seq-lens": options.seq_lens}
    belongs = {
        "nm": {"--exclude-modules": options.exclude_modules, "--benchmark": options.benchmark},
        "cpu": {"--threads": options.threads, "--calibration": options.calibration, "--rivals": options.rivals},
        "nm or cpu": {"--dtype": options.dtype},
        "cpu, or to nm with --benchmark": {} if options.benchmark else timed,
    }
    for formats, flags in belongs.items():
        given = [flag for flag, value in flags.items() if value]
        if given and options.format not in formats.split(",")[0].split(" or "):
            parser.error(f"{given[0]} belongs to --format {formats}")
    if options.dtype == ("fp32" if options.format == "nm" else "fp16"):
        parser.error(f"--format {options.format} has no --dtype {options.dtype}")


def _export_cpu(options: argparse.Namespace) -> CpuReport:
    folder, int8 = find_folder(options.path), options.dtype in (None, "int8")
    return export_cpu(
        folder,
        options.output,
        rows_of_file(options.calibration, folder, 128) if int8 and options.calibration else (),
        int8=int8,
        bf16=options.dtype == "bf16",
        batch_sizes=options.batch_sizes or (1, 8),
        seq_lens=options.seq_lens or (32, 128),
        threads=options.threads,
        rivals=options.rivals,
    )


def _shrink(options: argparse.Namespace) -> str:
    folder = find_folder(options.path)
    check_apart(folder, Path(options.output))  # before the search, which takes minutes
    model = load_strictly(model_class(folder)[0], folder, dtype="auto").eval()
    rows = rows_of_file(options.rows, folder, 2000)
    small, report = shrink_model(
        model,
        rows,
        speedup=options.speedup,
        sparsity=options.sparsity,
        keep_shape=options.keep_shape,
        num_candidates=options.candidates,
        latency_shape=(options.batch_size, options.seq_len),
        latency_dtype=TIMED_DTYPES.get(options.dtype),
    )
    save_reloadable(small, options.output, batches_of(rows_of(rows, small)[:8], small)[0], folder)
    name = Path(options.output).resolve().name
    text = card_text(RunRecord.load(options.output), name, Path(options.output))
    write_card(options.output, "---\nlibrary_name: transformers\ntags:\n- pruned\n- hf_maskselect\n---", text)
    return f"{report}\nwrote {options.output}, which {loaders(small)} loads with the same outputs"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    parser = make_parser()
    options, fields = parser.parse_known_args(arguments)
    if options.command == "plan":
        options.config = make_config(fields)
    elif fields:
        parser.error(f"unrecognized arguments: {' '.join(fields)}")
    if options.command == "export":
        check_export(parser, options)
    disable_progress_bar()  # the bars of loading: our output is one line
    disable_progress_bars()
    paths = options.paths if options.command == "plot" else [options.path]
    online = options.command in ("report", "verify", "export", "shrink", "trim") and paths[0].count("/") == 1
    online = online or options.command == "plan"  # which also takes names without a user, such as bert-base-uncased
    online = online and not Path(paths[0]).exists()
    for path in paths:
        if not Path(path).is_dir() and not online:
            parser.error(f"{path} is not a folder: give the folder of a saved model")
    output = Path(getattr(options, "output", None) or ".").absolute()
    nearest = next(path for path in (output, *output.parents) if path.exists())
    if not nearest.is_dir():
        parser.error(f"{nearest} is a file: give a folder as --output")
    try:
        if online and options.command == "verify":  # the others download their own files
            options.path = find_folder(options.path)
        print(run(options))
    except (ValueError, OSError) as error:
        print(f"{options.command} failed: {visible(str(error))}", file=sys.stderr)  # it may name what a file says
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
