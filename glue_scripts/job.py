"""One task with one model: rows, tokenizer, metrics, and how a model for it is loaded and evaluated."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from datasets import Dataset, DatasetDict
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Trainer,
    default_data_collator,
)

from arguments import DataArguments, ModelArguments
from hf_maskselect import PruningConfig
from hf_maskselect.training.held_out import hold_out
from metrics import make_compute_metrics
from tasks import GlueTask, get_task, load_task, tokenize


@dataclass
class Job:
    """Everything a run needs besides the pruning arguments. selection: rows held out of train, None if nothing is
    chosen; max_length: where rows are cut, in tokens."""

    task: GlueTask
    tokenizer: PreTrainedTokenizerBase
    train: Dataset
    selection: Dataset | None
    evaluation: dict[str, Dataset]
    test: dict[str, Dataset]
    collator: object
    max_length: int

    @property
    def trainer_arguments(self) -> dict:
        return {
            "processing_class": self.tokenizer,
            "data_collator": self.collator,
            "compute_metrics": make_compute_metrics(self.task),
        }


def prepare(data: DataArguments, model: ModelArguments, config: PruningConfig) -> Job:
    """Load and tokenize the task; hold the selection split out before anything is trained on it."""
    task = get_task(data.task_name)
    splits = load_task(task.name, data.data_dir)
    tokenizer = AutoTokenizer.from_pretrained(
        model.tokenizer_name or model.model_name_or_path, cache_dir=model.cache_dir, revision=model.model_revision
    )
    train = splits["train"]
    if data.max_train_samples is not None:
        train = train.shuffle(seed=config.data_seed or 42).select(range(min(data.max_train_samples, len(train))))
    splits = DatasetDict({**splits, "train": train})
    for split in splits:
        limit = data.max_predict_samples if split.startswith("test") else data.max_eval_samples
        if split != "train" and limit is not None:
            splits[split] = splits[split].select(range(min(limit, len(splits[split]))))
    tokens = tokenize(splits, task, tokenizer, data.max_seq_length)
    train, selection = tokens["train"], None
    if config.resolved().needs_selection_split or data.always_hold_out or data.evaluate_held_out:
        train, selection = hold_out(train, config.selection_fraction, config.seed, config.max_selection_samples)
        lengths = [len(ids) for ids in selection["input_ids"]]
        selection = selection.select(sorted(range(len(lengths)), key=lambda row: lengths[row]))  # little padding
    evaluation = {split: tokens[split] for split in task.validation_splits if split in tokens}
    if data.evaluate_held_out:  # on rows that nothing was chosen on
        rows = range(len(selection))
        selection, evaluation = selection.select(rows[0::2]), {"held out": selection.select(rows[1::2])}
    length = data.max_seq_length or task.max_length
    padding = {"padding": "max_length", "max_length": length} if data.pad_to_max_length else {}
    return Job(
        task,
        tokenizer,
        train,
        selection,
        evaluation,
        {split: tokens[split] for split in tokens if split.startswith("test")},
        DataCollatorWithPadding(tokenizer, **padding) if tokenizer.pad_token else default_data_collator,
        length,
    )


def load_model(path: str, task: GlueTask, model: ModelArguments) -> PreTrainedModel:
    """The model in float32, whatever its checkpoint's type: small updates would be lost in bf16 weights."""
    options = {"cache_dir": model.cache_dir, "revision": model.model_revision}
    names = dict(enumerate(task.labels)) or {0: "score"}
    config = AutoConfig.from_pretrained(
        path,
        num_labels=task.num_labels,
        id2label=names,
        label2id={name: index for index, name in names.items()},
        problem_type="regression" if task.is_regression else "single_label_classification",
        finetuning_task=task.name,
        **options,
    )
    return AutoModelForSequenceClassification.from_pretrained(
        path, config=config, dtype=torch.float32, ignore_mismatched_sizes=model.ignore_mismatched_sizes, **options
    )


def evaluate(trainer: Trainer, job: Job) -> dict[str, float]:
    """`eval_*` on every validation split; a second one (mnli's mismatched) is marked in the key."""
    metrics: dict[str, float] = {}
    for split, dataset in job.evaluation.items():
        found = trainer.evaluate(dataset)
        suffix = "_mm" if split.endswith("mismatched") else ""
        metrics |= {f"{name}{suffix}": value for name, value in found.items() if name != "epoch"}
    metrics["eval_samples"] = sum(len(dataset) for dataset in job.evaluation.values())
    return metrics
