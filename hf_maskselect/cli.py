"""`hf-maskselect COMMAND PATH`. Exit code 0: good, 1: the check failed, 2: bad usage."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from transformers import HfArgumentParser
from transformers.utils.logging import disable_progress_bar

from .config import PruningConfig
from .export.onnx import export_onnx
from .export.semi_structured import EXPORT_DTYPES, export_semi_structured
from .export.timing import time_export
from .masking.targets import check_module_names
from .reporting.plots import plot
from .reporting.record import RunRecord
from .reporting.sparsity import sparsity_report
from .storage.load import find_folder
from .storage.pack import pack, unpack
from .storage.packed_file import LOSSY
from .storage.verify import parse_groups, verify
from .training.search_cost import check_run, cost_text, workload

PLAN_USAGE = "hf-maskselect plan PATH [--ranks N ...] [--train_rows N] --max_steps N [any field of PruningConfig]"


def make_parser() -> argparse.ArgumentParser:
    """Every command and its options."""
    parser = argparse.ArgumentParser(prog="hf-maskselect", description="Look at pruned models, pack and unpack them.")
    commands = parser.add_subparsers(dest="command", required=True)
    found = {}
    for name, text in (
        ("report", "count the zeros: per tensor, over the prunable weights, over the whole model"),
        ("verify", "check that the zeros are the masks, the count is the target and the model loads plainly"),
        ("plot", "draw what is kept where, the candidates of the search and the run over its steps, as PNG"),
        ("pack", "write the model as one small file for transport, with what belongs to it beside"),
        ("unpack", "write a packed model as an ordinary one, which plain from_pretrained loads"),
        ("export", "write a 2:4 model packed for sparse tensor cores, or any model as ONNX"),
        ("plan", "tell beforehand what the searches of a run cost on so many ranks"),
    ):
        found[name] = commands.add_parser(name, help=text, description=text.capitalize() + ".")
        found[name].add_argument(
            "path", help="folder of a saved model; for report, verify, export and plan also user/name on the Hub"
        )
    for name in ("pack", "unpack", "export"):
        found[name].add_argument("--output", required=True, help="folder to write into, made if need be")
    found["plot"].add_argument("--output", help="folder to write into; by default that of the model")
    found["pack"].add_argument("--values", choices=LOSSY, help="round all values to 16 bits (lossy)")
    found["pack"].add_argument("--embeddings", choices=["int8"], help="round embedding tables to 8 bits (lossy)")
    found["verify"].add_argument(
        "--pattern", type=groups, help="also that every pruned matrix holds this N:M pattern, such as 2:4"
    )
    found["export"].add_argument("--format", choices=["nm", "onnx"], default="nm", help="nm: 2:4 values and metadata")
    found["export"].add_argument("--dtype", choices=EXPORT_DTYPES, help="nm: of the weights (bf16)")
    found["export"].add_argument(
        "--exclude-modules", nargs="+", type=module_name, help="nm: modules (suffix or regex) that stay dense"
    )
    found["export"].add_argument(
        "--benchmark", action="store_true", help="nm: then time dense against sparse on this machine's GPU"
    )
    found["export"].add_argument("--batch-sizes", nargs="+", type=positive, help="of the benchmark (1 8 32)")
    found["export"].add_argument("--seq-lens", nargs="+", type=positive, help="of the benchmark, in tokens (128)")
    found["plan"].usage = PLAN_USAGE
    found["plan"].add_argument("--ranks", nargs="+", type=positive, default=[1, 8, 64, 512], help="(1 8 64 512)")
    found["plan"].add_argument(
        "--train_rows", "--train-rows", type=positive, default=10_000, help="of the train split (10000)"
    )
    return parser


def positive(text: str) -> int:
    """A whole number from 1 on."""
    if not text.isdigit() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text} is no whole number above 0")
    return int(text)


def groups(text: str) -> str:
    """An N:M pattern."""
    try:
        parse_groups(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    return text


def module_name(text: str) -> str:
    """A suffix or a regex."""
    try:
        check_module_names(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    return text


def make_config(fields: Sequence[str]) -> PruningConfig:
    """Of the run to be planned."""
    parser = HfArgumentParser(PruningConfig, prog="hf-maskselect plan", usage=PLAN_USAGE)
    try:
        config, unknown = parser.parse_args_into_dataclasses(fields, return_remaining_strings=True)
        check_run(config)
    except ValueError as error:
        parser.error(str(error))
    if unknown:
        parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    return config


def run(options: argparse.Namespace) -> str:
    """One command; returns what it has to say."""
    if options.command == "report":
        return str(sparsity_report(options.path))
    if options.command == "pack":
        return str(pack(options.path, options.output, options.values, options.embeddings))
    if options.command == "plot":
        written = plot(RunRecord.load(options.path), options.output or options.path)
        return "\n".join(f"wrote {path}" for path in written)
    if options.command == "unpack":
        unpack(options.path, options.output)
        return f"wrote {options.output}"
    if options.command == "export":
        return export(options)
    if options.command == "plan":
        return cost_text(workload(options.config, options.path, options.train_rows), options.ranks)
    state = verify(options.path, options.pattern)
    zeros = state.masks.total - state.masks.kept
    return f"good: {zeros:,} of {state.masks.total:,} prunable weights are zero ({state.masks.sparsity():.6f})"


def export(options: argparse.Namespace) -> str:
    """The command of that name."""
    if options.format == "onnx":
        return str(export_onnx(options.path, options.output))
    told = str(export_semi_structured(options.path, options.output, options.dtype or "bf16", options.exclude_modules))
    if not options.benchmark:
        return told
    print(told, flush=True)  # it is done, whatever comes of the timing
    return str(time_export(options.output, options.batch_sizes or (1, 8, 32), options.seq_lens or (128,)))


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    parser = make_parser()
    options, options.fields = parser.parse_known_args(arguments)
    if options.fields and options.command != "plan":
        parser.error(f"unrecognized arguments: {' '.join(options.fields)}")
    if options.command == "plan":
        options.config = make_config(options.fields)
    if options.command == "export":
        only_nm = {"--dtype": options.dtype, "--exclude-modules": options.exclude_modules}
        only_timed = {"--batch-sizes": options.batch_sizes, "--seq-lens": options.seq_lens}
        if options.format == "onnx" and (given := [flag for flag, value in only_nm.items() if value]):
            parser.error(f"{given[0]} belongs to --format nm")
        if options.format == "onnx" and options.benchmark:
            parser.error("--benchmark belongs to --format nm: ONNX Runtime has no sparse kernels to time")
        if not options.benchmark and (given := [flag for flag, value in only_timed.items() if value]):
            parser.error(f"{given[0]} belongs to --benchmark")
    disable_progress_bar()  # of transformers' loading: the answer is one line
    online = options.command in ("report", "verify", "export") and options.path.count("/") == 1
    online = online or options.command == "plan"  # bert-base-uncased
    online = online and not Path(options.path).exists()
    if not Path(options.path).is_dir() and not online:
        parser.error(f"{options.path} is no folder: give the folder of a saved model")
    output = Path(getattr(options, "output", None) or ".").absolute()
    nearest = next(path for path in (output, *output.parents) if path.exists())
    if not nearest.is_dir():
        parser.error(f"{nearest} is a file: give a folder to write into as --output")
    try:
        if online and options.command not in ("export", "plan"):  # which download what they need themselves
            options.path = find_folder(options.path)
        print(run(options))
    except (ValueError, OSError) as error:
        print(f"{options.command} failed: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
