"""Command line of run_glue.py: the flags of the transformers example, every `PruningConfig` field, and recipes."""

from __future__ import annotations

import difflib
import json
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from transformers import HfArgumentParser

from hf_maskselect import PruningConfig


@dataclass
class DataArguments:
    """Rows to train and evaluate on."""

    task_name: str | None = field(
        default=None, metadata={"help": "cola, sst2, mrpc, stsb, qqp, mnli, qnli, rte, wnli, demo."}
    )
    data_dir: str | None = field(
        default=None,
        metadata={"help": "Folder with a sub-folder for each task (train and validation files); default: the Hub."},
    )
    max_seq_length: int | None = field(
        default=None,
        metadata={"help": "Cut rows to this many tokens (default 64 for cola and sst2, else 128)."},
    )
    pad_to_max_length: bool = field(
        default=False, metadata={"help": "Pad every row to max_seq_length, not to the longest of its batch."}
    )
    max_train_samples: int | None = field(default=None, metadata={"help": "Use this many random train rows (seeded)."})
    max_eval_samples: int | None = field(default=None, metadata={"help": "Use only this many validation rows."})
    max_predict_samples: int | None = field(default=None, metadata={"help": "Use only this many test rows."})
    always_hold_out: bool = field(
        default=False,
        metadata={
            "help": "Hold rows out even if no mask is chosen on them, so that all methods train on the same rows."
        },
    )
    evaluate_held_out: bool = field(
        default=False,
        metadata={
            "help": "Evaluate on half of the held-out rows and choose on the other half; do not read validation."
        },
    )


@dataclass
class ModelArguments:
    """Model to start from."""

    model_name_or_path: str | None = field(
        default=None, metadata={"help": "Hub name or folder of the model to prune."}
    )
    tokenizer_name: str | None = field(default=None, metadata={"help": "Tokenizer, if not that of the model."})
    cache_dir: str | None = field(default=None, metadata={"help": "Folder for downloads."})
    model_revision: str = field(default="main", metadata={"help": "Branch, tag or commit of the model."})
    ignore_mismatched_sizes: bool = field(
        default=False, metadata={"help": "Replace a head of another size with a new one."}
    )
    teacher_name_or_path: str | None = field(
        default=None,
        metadata={"help": "Fine-tuned dense model to distil from. Default: fine-tune the model dense first."},
    )
    dense_epochs: float = field(
        default=3.0,
        metadata={"help": "Epochs of that dense fine-tuning; 0: no dense fine-tuning, no teacher."},
    )
    dense_learning_rate: float = field(default=5e-5, metadata={"help": "Learning rate of that dense fine-tuning."})
    shrink_speedup: float | None = field(
        default=None,
        metadata={
            "help": "Remove layers and neurons of the dense model first, until it is this many times as fast. "
            "Default: keep its shape."
        },
    )
    export_cpu: str | None = field(
        default=None,
        metadata={"help": "Folder for a fast CPU model of the pruned model; True: output_dir/cpu. Default: none."},
    )
    cpu_batch_sizes: list[int] = field(
        default_factory=lambda: [1, 8], metadata={"help": "Batch sizes that the CPU model is to be fast at."}
    )
    cpu_seq_lens: list[int] = field(
        default_factory=lambda: [32, 128], metadata={"help": "Lengths that the CPU model is to be fast at, in tokens."}
    )
    cpu_threads: int = field(
        default=1, metadata={"help": "Threads to time the CPU model with; one is timed by its processor time."}
    )
    cpu_calibration_rows: int = field(
        default=128, metadata={"help": "Train rows that the ranges of 8-bit numbers are observed on."}
    )
    cpu_max_drop: float | None = field(
        default=None,
        metadata={
            "help": "Largest drop of the main metric such as 0.01, on held-out train rows. Layers stay exact until "
            "it holds. Default: no bound."
        },
    )


def parse_arguments(
    arguments: Sequence[str] | None = None, defaults: Mapping[str, object] | None = None
) -> tuple[DataArguments, ModelArguments, PruningConfig]:
    """Parse flags, or one JSON or YAML recipe followed by flags.

    Args:
        arguments: command line; None reads `sys.argv`. Flags override the recipe.
        defaults: values that replace the defaults of the fields; recipe and flags override them.

    Without `do_train`, `do_eval` and `do_predict` the run trains and evaluates; with `--do_train False` it evaluates.

    Raises:
        ValueError: the recipe cannot be read or has an unknown field, or the task is missing.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    parser = HfArgumentParser((DataArguments, ModelArguments, PruningConfig))
    parser.set_defaults(**(defaults or {}))
    if arguments and arguments[0].endswith((".json", ".yaml", ".yml")):
        recipe = read_recipe(Path(arguments.pop(0)))
        fields = [action.dest for action in parser._actions]
        for name in recipe:
            if name not in fields:
                close = difflib.get_close_matches(name, fields, n=1)
                hint = f"did you mean {close[0]!r}" if close else "see --help for the fields"
                raise ValueError(f"the recipe has the unknown field {name!r}: {hint}")
        parser.set_defaults(**recipe)
    data, model, config = parser.parse_args_into_dataclasses(arguments)
    if data.task_name is None:
        raise ValueError(
            "--task_name is missing: give a GLUE task, or 'demo' for a generated task that needs no download"
        )
    if not (config.do_train or config.do_eval or config.do_predict):
        config.do_eval = True
        config.do_train = not any(text.partition("=")[0] == "--do_train" for text in arguments)  # it is not off
    return data, model, config


def read_recipe(path: Path) -> dict:
    """Read the fields of a recipe file.

    Raises:
        ValueError: the file is missing, or is not a JSON or YAML mapping.
    """
    if not path.is_file():
        raise ValueError(f"the recipe {path} does not exist")
    text = path.read_text()
    if path.suffix == ".json":
        try:
            recipe = json.loads(text)
        except json.JSONDecodeError as error:
            raise ValueError(f"the recipe {path} is not valid JSON: {error}") from error
    else:
        import yaml  # comes with huggingface_hub

        try:
            recipe = yaml.load(text, _yaml_loader())
        except yaml.YAMLError as error:
            raise ValueError(f"the recipe {path} is not valid YAML: {error}") from error
    if not isinstance(recipe, dict):
        raise ValueError(f"the recipe {path} must be one mapping from field to value")
    return recipe


def _yaml_loader() -> type:
    """Return a loader by the rules of YAML 1.2, where no and 2:4 are text, and 1e-4 is a number."""
    import yaml

    class Loader(yaml.SafeLoader):
        """Reads plain values by the core schema of YAML 1.2."""

        yaml_implicit_resolvers: dict = {}

    for tag, pattern, first in (
        ("null", "~|null|Null|NULL|", ["~", "n", "N", ""]),
        ("bool", "true|True|TRUE|false|False|FALSE", list("tTfF")),
        ("int", r"[-+]?(0|[1-9][0-9]*)", list("-+0123456789")),
        ("float", r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.inf|\.nan", list("-+.0123456789")),
    ):
        Loader.add_implicit_resolver(f"tag:yaml.org,2002:{tag}", re.compile(f"^({pattern})$"), first)
    return Loader
