"""One task with one model: prepare the rows, load the model, evaluate it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from datasets import Dataset, DatasetDict
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollator,
    DataCollatorWithPadding,
    PretrainedConfig,
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
    """Everything that a run needs besides the pruning arguments.

    Args:
        task: the GLUE task.
        tokenizer: tokenizer of the model.
        train: tokenized train rows, without the held-out rows.
        selection: held-out rows, shortest first; None if nothing is chosen on them.
        evaluation: rows to evaluate on, by split; the first split is the one to report.
        test: rows to predict, by split.
        collator: makes batches of rows.
        max_length: longest row, in tokens.
    """

    task: GlueTask
    tokenizer: PreTrainedTokenizerBase
    train: Dataset
    selection: Dataset | None
    evaluation: dict[str, Dataset]
    test: dict[str, Dataset]
    collator: DataCollator
    max_length: int

    @property
    def trainer_arguments(self) -> dict:
        """Arguments that every trainer of this job takes."""
        return {
            "processing_class": self.tokenizer,
            "data_collator": self.collator,
            "compute_metrics": make_compute_metrics(self.task),
        }


def prepare(data: DataArguments, model: ModelArguments, config: PruningConfig) -> Job:
    """Load and tokenize the task, and hold rows out of train before any model is trained on them."""
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
    chooses = config.resolved().needs_selection_split or model.cpu_max_drop is not None
    if chooses or data.always_hold_out or data.evaluate_held_out:
        train, selection = hold_out(train, config.selection_fraction, config.seed, config.max_selection_samples)
        lengths = [len(ids) for ids in selection["input_ids"]]
        # Rows of similar length share a batch, which leaves little padding.
        selection = selection.select(sorted(range(len(lengths)), key=lambda row: lengths[row]))
    evaluation = {split: tokens[split] for split in task.validation_splits if split in tokens}
    if data.evaluate_held_out:  # choose on one half and evaluate on the other
        rows = range(len(selection))
        selection, evaluation = selection.select(rows[0::2]), {"held out": selection.select(rows[1::2])}
    length = data.max_seq_length or task.max_length
    padding = {"padding": "max_length", "max_length": length} if data.pad_to_max_length else {}
    return Job(
        task=task,
        tokenizer=tokenizer,
        train=train,
        selection=selection,
        evaluation=evaluation,
        test={split: tokens[split] for split in tokens if split.startswith("test")},
        collator=DataCollatorWithPadding(tokenizer, **padding) if tokenizer.pad_token else default_data_collator,
        max_length=length,
    )


def load_config(path: str, task: GlueTask, model: ModelArguments) -> PretrainedConfig:
    """Load the model's configuration, with the head of the task."""
    names = dict(enumerate(task.labels)) or {0: "score"}
    return AutoConfig.from_pretrained(
        path,
        num_labels=task.num_labels,
        id2label=names,
        label2id={name: index for index, name in names.items()},
        problem_type="regression" if task.is_regression else "single_label_classification",
        finetuning_task=task.name,
        cache_dir=model.cache_dir,
        revision=model.model_revision,
    )


def load_model(path: str, task: GlueTask, model: ModelArguments) -> PreTrainedModel:
    """Load the model in float32, whatever dtype its checkpoint has: bf16 weights would lose small updates."""
    return AutoModelForSequenceClassification.from_pretrained(
        path,
        config=load_config(path, task, model),
        dtype=torch.float32,
        ignore_mismatched_sizes=model.ignore_mismatched_sizes,
        cache_dir=model.cache_dir,
        revision=model.model_revision,
    )


def evaluate(trainer: Trainer, job: Job) -> dict[str, float]:
    """Evaluate on every validation split; keys of MNLI's mismatched split end in `_mm`."""
    metrics: dict[str, float] = {}
    for split, dataset in job.evaluation.items():
        suffix = "_mm" if split.endswith("mismatched") else ""
        for name, value in trainer.evaluate(dataset).items():
            if name != "epoch":
                metrics[f"{name}{suffix}"] = value
    metrics["eval_samples"] = sum(len(dataset) for dataset in job.evaluation.values())
    return metrics
