"""Command line of the scripts: the flags of transformers' own run_glue.py, every `PruningConfig` field, and
recipes."""

from __future__ import annotations

import difflib
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from transformers import HfArgumentParser

from hf_maskselect import PruningConfig


@dataclass
class DataArguments:
    """What to train and evaluate on."""

    task_name: str | None = field(
        default=None, metadata={"help": "cola, sst2, mrpc, stsb, qqp, mnli, qnli, rte, wnli, demo."}
    )
    data_dir: str | None = field(
        default=None,
        metadata={"help": "Folder with one sub-folder a task (train and validation files); else the Hub."},
    )
    max_seq_length: int | None = field(
        default=None, metadata={"help": "Cut in tokens (64 for cola and sst2, else 128)."}
    )
    pad_to_max_length: bool = field(
        default=False, metadata={"help": "Pad to max_seq_length instead of the batch's longest."}
    )
    max_train_samples: int | None = field(default=None, metadata={"help": "Use so many seeded random train rows."})
    max_eval_samples: int | None = field(default=None, metadata={"help": "Use only the first validation rows."})
    max_predict_samples: int | None = field(default=None, metadata={"help": "Use only the first test rows."})
    always_hold_out: bool = field(
        default=False,
        metadata={
            "help": "Hold the selection split out even where nothing is chosen, so that all methods train alike."
        },
    )
    evaluate_held_out: bool = field(
        default=False,
        metadata={"help": "Evaluate on half of the held-out train rows (choose on the other half), not validation."},
    )


@dataclass
class ModelArguments:
    """What to start from."""

    model_name_or_path: str | None = field(
        default=None, metadata={"help": "Hub name or folder of the model to prune."}
    )
    tokenizer_name: str | None = field(default=None, metadata={"help": "If not that of the model."})
    cache_dir: str | None = field(default=None, metadata={"help": "Where to keep downloads."})
    model_revision: str = field(default="main", metadata={"help": "Branch, tag or commit of the model."})
    ignore_mismatched_sizes: bool = field(
        default=False, metadata={"help": "Replace a head of another size by a new one."}
    )
    teacher_name_or_path: str | None = field(
        default=None,
        metadata={"help": "Fine-tuned dense model to distil from. Without it the model is fine-tuned dense first."},
    )
    dense_epochs: float = field(
        default=3.0, metadata={"help": "Epochs of that dense fine-tuning; 0: prune without it and without a teacher."}
    )
    dense_learning_rate: float = field(default=5e-5, metadata={"help": "Its learning rate."})


def parse_arguments(
    arguments: Sequence[str] | None = None, defaults: Mapping[str, object] | None = None
) -> tuple[DataArguments, ModelArguments, PruningConfig]:
    """Flags, or one JSON or YAML recipe with flags after it that override it; both override `defaults`.

    Raises:
        ValueError: the recipe cannot be read or holds an unknown field.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    parser = HfArgumentParser((DataArguments, ModelArguments, PruningConfig))
    parser.set_defaults(**(defaults or {}))
    if arguments and arguments[0].endswith((".json", ".yaml", ".yml")):
        recipe = read_recipe(Path(arguments.pop(0)))
        known = [action.dest for action in parser._actions]
        for name in recipe:
            if name not in known:
                close = difflib.get_close_matches(name, known, n=1)
                hint = f"did you mean {close[0]!r}" if close else "see --help for the fields"
                raise ValueError(f"the recipe has the unknown field {name!r}: {hint}")
        parser.set_defaults(**recipe)
    data, model, config = parser.parse_args_into_dataclasses(arguments)
    if data.task_name is None:
        raise ValueError(
            "--task_name is missing: name a GLUE task, or 'demo' for the generated one that needs no download"
        )
    if not (config.do_train or config.do_eval or config.do_predict):
        config.do_train = config.do_eval = True
    return data, model, config


def read_recipe(path: Path) -> dict:
    """The fields of a recipe file."""
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
            recipe = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise ValueError(f"the recipe {path} is not valid YAML: {error}") from error
    if not isinstance(recipe, dict):
        raise ValueError(f"the recipe {path} must be one mapping from field to value")
    return recipe
