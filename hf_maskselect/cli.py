"""`hf-maskselect report|verify PATH`. Exit code 0: good, 1: the check failed, 2: bad usage."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from transformers.utils.logging import disable_progress_bar

from .checkpoint import verify
from .report import sparsity_report


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    parser = argparse.ArgumentParser(prog="hf-maskselect", description="Look at pruned models.")
    commands = parser.add_subparsers(dest="command", required=True)
    for name, text in (
        ("report", "count the zeros: per tensor, over the prunable weights, over the whole model"),
        ("verify", "check that the zeros are the masks, the count is the target and the model loads plainly"),
    ):
        command = commands.add_parser(name, help=text, description=text.capitalize() + ".")
        command.add_argument("path", help="folder of a saved model")
    options = parser.parse_args(arguments)
    disable_progress_bar()  # of transformers' loading: the answer is one line
    if not Path(options.path).is_dir():
        parser.error(f"{options.path} is no folder: give the folder of a saved model")
    try:
        if options.command == "report":
            print(sparsity_report(options.path))
        else:
            state = verify(options.path)
            zeros = state.masks.total - state.masks.kept
            print(f"good: {zeros:,} of {state.masks.total:,} prunable weights are zero ({state.masks.sparsity():.6f})")
    except ValueError as error:
        print(f"{options.command} failed: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
