"""The GLUE tasks and the generated demo: their columns, their metrics, and how to load their rows."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from datasets import ClassLabel, Dataset, DatasetDict, Value, load_dataset
from datasets.exceptions import DatasetGenerationError
from transformers import PreTrainedTokenizerBase

from demo_data import load_demo


@dataclass(frozen=True)
class GlueTask:
    """One sentence or sentence-pair task.

    Args:
        name: name of the task on the Hub.
        text_columns: column of the first text, and of the second one or None.
        labels: class names by label id; empty for regression.
        metrics: names of the scores that `metrics.GlueMetric` reports.
        main_metric: the score that ranks models (higher is better).
        max_length: default length of a row, in tokens.
        validation_splits: names of the validation splits; the first one is the one to report.
    """

    name: str
    text_columns: tuple[str, str | None]
    labels: list[str]
    metrics: list[str]
    main_metric: str
    max_length: int = 128
    validation_splits: tuple[str, ...] = ("validation",)

    @property
    def is_regression(self) -> bool:
        """Whether labels are numbers and not classes."""
        return not self.labels

    @property
    def num_labels(self) -> int:
        """Outputs of the model's head: one for each class, a single one for regression."""
        return len(self.labels) or 1


_ACCURACY = {"metrics": ["accuracy"], "main_metric": "accuracy"}
_ACCURACY_AND_F1 = {"metrics": ["accuracy", "f1"], "main_metric": "accuracy"}
_PAIR = ("sentence1", "sentence2")
_ENTAILMENT = ["entailment", "not_entailment"]

TASKS: dict[str, GlueTask] = {
    task.name: task
    for task in [
        GlueTask(
            name="cola",
            text_columns=("sentence", None),
            labels=["unacceptable", "acceptable"],
            metrics=["matthews_correlation"],
            main_metric="matthews_correlation",
            max_length=64,
        ),
        GlueTask("sst2", ("sentence", None), ["negative", "positive"], **_ACCURACY, max_length=64),
        GlueTask("mrpc", _PAIR, ["not_equivalent", "equivalent"], **_ACCURACY_AND_F1),
        GlueTask(
            name="stsb",
            text_columns=_PAIR,
            labels=[],
            metrics=["pearson", "spearmanr", "combined_score"],
            main_metric="combined_score",
        ),
        GlueTask("qqp", ("question1", "question2"), ["not_duplicate", "duplicate"], **_ACCURACY_AND_F1),
        GlueTask(
            "mnli",
            ("premise", "hypothesis"),
            ["entailment", "neutral", "contradiction"],
            **_ACCURACY,
            validation_splits=("validation_matched", "validation_mismatched"),
        ),
        GlueTask("qnli", ("question", "sentence"), _ENTAILMENT, **_ACCURACY),
        GlueTask("rte", _PAIR, _ENTAILMENT, **_ACCURACY),
        GlueTask("wnli", _PAIR, ["not_entailment", "entailment"], **_ACCURACY),
        GlueTask("demo", ("sentence", None), ["negative", "positive"], **_ACCURACY, max_length=32),
    ]
}

# File ending -> loader of `datasets`.
LOADERS = {".parquet": "parquet", ".jsonl": "json", ".json": "json"}


def get_task(name: str) -> GlueTask:
    """Return a task by its name.

    Raises:
        ValueError: there is no such task.
    """
    if name not in TASKS:
        raise ValueError(f"unknown task {name!r}: choose one of {', '.join(TASKS)}")
    return TASKS[name]


def load_task(task_name: str, data_dir: str | Path | None = None) -> DatasetDict:
    """Load a task with the columns of the Hub's `glue`: one or two texts, `label` and (usually) `idx`.

    Args:
        task_name: name of the task; the demo is always generated.
        data_dir: folder with `<task>/train`, `<task>/validation*` and `<task>/test*` files (.parquet, .jsonl or
            .json, with the Hub's columns); other files are ignored. None loads from the Hub.

    Returns:
        The splits. Labels are class ids from 0 (files may hold names instead), or floats for regression. Labels of
        test splits are not checked.

    Raises:
        ValueError: the task is unknown, or a folder, split, column or label is missing or wrong.
    """
    task = get_task(task_name)
    if task.name == "demo":
        return load_demo()
    if data_dir is None:
        splits = load_dataset("nyu-mll/glue", task.name)
        sources = {split: f"nyu-mll/glue, split {split}" for split in splits}
    else:
        files = _find_split_files(Path(data_dir), task)
        # One call for each file, because splits may have different columns (test often has no label).
        splits = DatasetDict({split: _read(path) for split, path in files.items()})
        sources = {split: str(path) for split, path in files.items()}
    for split, dataset in splits.items():
        labelled = not split.startswith("test")
        _check_columns(dataset, task, sources[split], labelled)
        splits[split] = _unify_labels(dataset, task, sources[split]) if labelled else dataset
    return splits


def tokenize(
    dataset: Dataset | DatasetDict,
    task: GlueTask,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int | None = None,
) -> Dataset | DatasetDict:
    """Turn text into model inputs; keep `label` where there is one, and drop every other column.

    Rows are cut to `max_length` tokens (default: that of the task), and never exceed the model's maximum. They are not
    padded: the collator pads each batch to its longest row and renames `label` to `labels`.

    Raises:
        ValueError: `max_length` is below 1.
    """
    if max_length is not None and max_length < 1:
        raise ValueError(f"max_length={max_length} leaves no tokens: give 1 or more, or leave it out")
    limit = min(max_length or task.max_length, tokenizer.model_max_length)
    first, second = task.text_columns

    def encode(batch: dict[str, list]) -> dict[str, list]:
        texts = (batch[first],) if second is None else (batch[first], batch[second])
        return tokenizer(*texts, truncation=True, max_length=limit)

    if isinstance(dataset, DatasetDict):
        return DatasetDict({split: tokenize(part, task, tokenizer, max_length) for split, part in dataset.items()})
    dropped = [column for column in dataset.column_names if column != "label"]
    return dataset.map(encode, batched=True, remove_columns=dropped, desc="Tokenizing")


def _find_split_files(data_dir: Path, task: GlueTask) -> dict[str, Path]:
    """Map split names to files, train first, in a stable order."""
    if not data_dir.is_dir():
        raise ValueError(f"data_dir {data_dir} is not a folder: give the folder that has a sub-folder for each task")
    folder = data_dir / task.name
    if not folder.is_dir():
        raise ValueError(f"no folder {folder} for task {task.name!r}: add it; {data_dir} holds {_listing(data_dir)}")
    files: dict[str, Path] = {}
    for path in sorted(folder.iterdir()):
        # Only "train" itself: some collections also have files such as train_augmented.parquet.
        wanted = path.stem == "train" or path.stem.startswith(("validation", "test"))
        if not wanted or path.suffix not in LOADERS:
            continue
        if path.stem in files:
            raise ValueError(f"both {files[path.stem]} and {path} hold split {path.stem!r}: keep one of them")
        files[path.stem] = path
    validation = [split for split in files if split.startswith("validation")]
    kinds = "|".join(kind.lstrip(".") for kind in LOADERS)
    if "train" not in files:
        raise ValueError(f"no train split: add train.({kinds}) to {folder}, which holds {_listing(folder)}")
    if not validation:
        names = " or ".join(task.validation_splits)
        raise ValueError(f"no validation split: add {names}.({kinds}) to {folder}, which holds {_listing(folder)}")
    # In the order of the task, so that the first validation split is the one to report (matched for mnli).
    ordered = [split for split in task.validation_splits if split in files]
    return {split: files[split] for split in dict.fromkeys(["train", *ordered, *files])}


def _listing(folder: Path) -> str:
    """Names of the files in a folder, for messages."""
    return ", ".join(sorted(path.name for path in folder.iterdir())) or "nothing"


def _read(path: Path) -> Dataset:
    """Read the rows of one file."""
    kind = LOADERS[path.suffix]
    # `datasets` raises a bare StopIteration for an empty JSON file.
    if path.stat().st_size == 0:
        raise ValueError(f"{path} holds no rows: write the split into it")
    try:
        return load_dataset(kind, data_files={"part": str(path)}, split="part")
    # The first is raised for broken content, the second for a file without rows.
    except (DatasetGenerationError, ValueError) as error:
        raise ValueError(f"{path} holds no rows that can be read as {kind}: write it again") from error


def _check_columns(dataset: Dataset, task: GlueTask, source: str, labelled: bool) -> None:
    """Refuse columns that would fail later in training; `source` names the split in messages."""
    texts = [column for column in task.text_columns if column]
    for column in [*texts, "label"] if labelled else texts:
        if column not in dataset.column_names:
            raise ValueError(
                f"{source} has no column {column!r}, which task {task.name!r} needs: add it; "
                f"its columns are {', '.join(dataset.column_names)}"
            )
    for column in texts:
        if getattr(dataset.features[column], "dtype", None) not in ("string", "large_string"):
            raise ValueError(f"{source} holds {dataset.features[column]} in column {column!r}: store text there")
        if None in dataset.unique(column):
            raise ValueError(f"{source} has rows without {column!r}: fill them in or drop them")


def _unify_labels(dataset: Dataset, task: GlueTask, source: str) -> Dataset:
    """Check every label and give the column one type: `ClassLabel` with the task's names, or float32."""
    feature = dataset.features["label"]
    if isinstance(feature, ClassLabel) and task.labels and feature.names != task.labels:
        raise ValueError(f"{source} numbers its labels {feature.names}, not {task.labels}: renumber them")
    values = dataset.unique("label")
    if task.is_regression:
        bad = [value for value in values if type(value) not in (int, float) or not math.isfinite(value)]
        remedy = "give every row a finite number"
    else:
        # All ids or all names. `type` instead of isinstance, because True is an instance of int.
        allowed = task.labels if feature.dtype == "string" else range(task.num_labels)
        bad = [value for value in values if type(value) not in (int, str) or value not in allowed]
        remedy = "use " + ", ".join(f"{index} ({name})" for index, name in enumerate(task.labels))
    if bad:
        raise ValueError(f"{source} has labels that task {task.name!r} does not have, such as {bad[0]!r}: {remedy}")
    return dataset.cast_column("label", Value("float32") if task.is_regression else ClassLabel(names=task.labels))
