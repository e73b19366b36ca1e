"""The GLUE tasks (and the generated demo): what their columns are called, how they are scored, where to load them."""

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

    `labels` lists the class names by label id and is empty for regression. `metrics` are the names that
    `metrics.GlueMetric` reports, `main_metric` the one that ranks models (higher is better). `max_length` is the
    usual cut in tokens.
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
        return not self.labels

    @property
    def num_labels(self) -> int:
        """Outputs of the model's head: one per class, a single one for regression."""
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

# Which loader of `datasets` reads which file ending.
LOADERS = {".parquet": "parquet", ".jsonl": "json", ".json": "json"}


def get_task(name: str) -> GlueTask:
    """Look a task up by name; raises `ValueError` for an unknown one."""
    if name not in TASKS:
        raise ValueError(f"Unknown task {name!r}; choose one of {', '.join(TASKS)}.")
    return TASKS[name]


def load_task(task_name: str, data_dir: str | Path | None = None) -> DatasetDict:
    """Load a task in the schema of the Hub's `glue`: text column(s), `label` and (usually) `idx`.

    Without `data_dir` the splits come from the Hub. With it, from `<data_dir>/<task>/`: `train`, every `validation*`
    and every `test*`, as .parquet, .jsonl or .json (rows of the Hub's columns); other files are left alone. The demo
    is generated either way. Labels come back as class ids counted from 0 (files may hold the names instead), or as
    floats for regression; those of test splits are not looked at.

    Raises:
        ValueError: for an unknown task, and for a folder, split, column or label that is missing or wrong.
    """
    task = get_task(task_name)
    if task.name == "demo":
        return load_demo()
    if data_dir is None:
        splits = load_dataset("nyu-mll/glue", task.name)
        sources = {split: f"nyu-mll/glue, split {split}" for split in splits}
    else:
        files = _find_split_files(Path(data_dir), task)
        # One file at a time: splits may differ in columns (test often has no label), which one call would refuse.
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
    """Turn text into model inputs, keeping `label` (where there is one) and dropping every other column.

    Texts are cut to `max_length` tokens (the task's own by default, never more than the model takes), not padded: the
    Trainer's collator pads each batch to its own longest text and renames `label` to `labels`.
    """
    if max_length is not None and max_length < 1:
        raise ValueError(f"max_length={max_length} leaves no tokens; give 1 or more, or leave it out.")
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
    """Split name -> file, training first, in a stable order."""
    if not data_dir.is_dir():
        raise ValueError(f"data_dir {data_dir} is not a folder; give the one that holds a folder per task.")
    folder = data_dir / task.name
    if not folder.is_dir():
        raise ValueError(f"No folder {folder} for task {task.name!r}; {data_dir} holds: {_listing(data_dir)}.")
    found: dict[str, Path] = {}
    for path in sorted(folder.iterdir()):
        # Only "train" itself: files such as train_augmented.parquet lie beside it in some collections.
        wanted = path.stem == "train" or path.stem.startswith(("validation", "test"))
        if not wanted or path.suffix not in LOADERS:
            continue
        if path.stem in found:
            raise ValueError(f"Both {found[path.stem]} and {path} hold split {path.stem!r}; keep one of them.")
        found[path.stem] = path
    validation = [split for split in found if split.startswith("validation")]
    kinds = "|".join(kind.lstrip(".") for kind in LOADERS)
    if "train" not in found:
        raise ValueError(f"No train split: add train.({kinds}) to {folder}, which holds: {_listing(folder)}.")
    if not validation:
        names = " or ".join(task.validation_splits)
        raise ValueError(f"No validation split: add {names}.({kinds}) to {folder}, which holds: {_listing(folder)}.")
    # The task's own order comes first, so that the first validation split is the one to report (mnli: matched).
    ordered = [split for split in task.validation_splits if split in found]
    return {split: found[split] for split in dict.fromkeys(["train", *ordered, *found])}


def _listing(folder: Path) -> str:
    return ", ".join(sorted(path.name for path in folder.iterdir())) or "nothing"


def _read(path: Path) -> Dataset:
    kind = LOADERS[path.suffix]
    # An empty JSON file would surface as a bare StopIteration.
    if path.stat().st_size == 0:
        raise ValueError(f"{path} holds no rows; write the split into it.")
    try:
        return load_dataset(kind, data_files={"part": str(path)}, split="part")
    # Broken content is the former, a file without rows the latter.
    except (DatasetGenerationError, ValueError) as error:
        raise ValueError(f"{path} holds no rows that can be read as {kind}; write it again.") from error


def _check_columns(dataset: Dataset, task: GlueTask, source: str, labelled: bool) -> None:
    """Refuse columns that training would only trip over later; `source` names the split in messages."""
    texts = [column for column in task.text_columns if column]
    for column in [*texts, "label"] if labelled else texts:
        if column not in dataset.column_names:
            raise ValueError(
                f"{source} has no column {column!r}, which task {task.name!r} needs; "
                f"its columns are: {', '.join(dataset.column_names)}."
            )
    for column in texts:
        if getattr(dataset.features[column], "dtype", None) not in ("string", "large_string"):
            raise ValueError(f"{source} holds {dataset.features[column]} in column {column!r}; store text there.")
        if None in dataset.unique(column):
            raise ValueError(f"{source} has rows without {column!r}; fill them in or drop them.")


def _unify_labels(dataset: Dataset, task: GlueTask, source: str) -> Dataset:
    """Check every label and give the column one type: `ClassLabel` with the task's names, or float32."""
    feature = dataset.features["label"]
    if isinstance(feature, ClassLabel) and task.labels and feature.names != task.labels:
        raise ValueError(f"{source} numbers its labels {feature.names}, not {task.labels}; renumber them.")
    values = dataset.unique("label")
    if task.is_regression:
        bad = [value for value in values if type(value) not in (int, float) or not math.isfinite(value)]
        remedy = "give every row a finite number"
    else:
        # Either ids or names throughout; `type`, because True would pass for 1.
        known = task.labels if feature.dtype == "string" else range(task.num_labels)
        bad = [value for value in values if type(value) not in (int, str) or value not in known]
        remedy = "use " + ", ".join(f"{index} ({name})" for index, name in enumerate(task.labels))
    if bad:
        raise ValueError(f"{source} has labels that task {task.name!r} does not know, such as {bad[0]!r}; {remedy}.")
    return dataset.cast_column("label", Value("float32") if task.is_regression else ClassLabel(names=task.labels))
