"""The dense model: a pruned model starts from it and distils from it."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path

from transformers import Trainer, TrainingArguments

from arguments import ModelArguments
from hf_maskselect import PruningConfig
from hf_maskselect.utils.reading import read_object
from job import Job, evaluate, load_model

# Fields of `TrainingArguments` that change the dense weights; fields that people hardly ever change are left out.
SHAPING = (
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "world_size",
    "data_seed",
    "bf16",
    "fp16",
    "warmup_steps",
    "lr_scheduler_type",
    "optim",
    "adam_beta1",
    "adam_beta2",
    "adam_epsilon",
    "weight_decay",
    "max_grad_norm",
    "label_smoothing_factor",
    "train_sampling_strategy",
)


class DenseTrainer(Trainer):
    """Plain `Trainer` with the correct loss scale under gradient accumulation (transformers#47688)."""

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.model_accepts_loss_kwargs = False


def dense_recipe(job: Job, model: ModelArguments, config: PruningConfig) -> dict:
    """Return the content of `recipe.json`: everything that the dense model and its score depend on."""
    recipe = {
        "task": job.task.name,
        "train_rows": len(job.train),
        "max_length": job.max_length,
        "start": str(model.model_name_or_path),
        "revision": model.model_revision,
        "tokenizer": model.tokenizer_name,
        "epochs": model.dense_epochs,
        "learning_rate": model.dense_learning_rate,
        "seed": config.seed,
        "evaluated": {split: len(rows) for split, rows in job.evaluation.items()},
        **{name: getattr(config, name) for name in SHAPING},
    }
    return json.loads(json.dumps(recipe))  # turns enumerations into their names


def check_recipe(recorded: Mapping, recipe: Mapping, where: str | Path) -> None:
    """Refuse a dense model that was made by another recipe.

    Args:
        recorded: recipe of the finished model.
        recipe: recipe of this run.
        where: place of the finished model, for the message.

    Raises:
        ValueError: the recipes differ; the message lists the differences.
    """
    names = [name for name in {**recorded, **recipe} if recorded.get(name) != recipe.get(name)]
    if names:
        differences = ", ".join(
            f"{name} {recorded.get(name, 'unknown')} and not {recipe.get(name, 'unknown')}" for name in names
        )
        raise ValueError(f"{where} was made with {differences}: give the flags that made it, or delete it")


def read_dense(folder: Path) -> dict[str, dict] | None:
    """Return `told` (the recipe) and `results` of a finished dense model; None if the folder has none.

    Raises:
        ValueError: one of its files cannot be read.
    """
    if not (folder / "all_results.json").is_file():
        return None
    remedy = f"delete {folder}"
    return {
        "told": read_object(folder / "recipe.json", remedy),
        "results": read_object(folder / "all_results.json", remedy),
    }


def fine_tune_dense(job: Job, model: ModelArguments, config: PruningConfig) -> str:
    """Fine-tune the dense model in `output_dir/dense`, or reuse a finished one, and return the folder.

    Raises:
        ValueError: the folder holds a dense model of another recipe.
    """
    folder, recipe = Path(config.output_dir) / "dense", dense_recipe(job, model, config)
    finished = read_dense(folder)
    if finished is not None:
        check_recipe(finished["told"], recipe, folder)
        return str(folder)
    plain_fields = {field.name for field in dataclasses.fields(TrainingArguments) if field.init}
    arguments = {name: value for name, value in vars(config).items() if name in plain_fields}
    arguments |= {
        "output_dir": str(folder),
        "num_train_epochs": model.dense_epochs,
        "max_steps": -1,
        "learning_rate": model.dense_learning_rate,
        "eval_strategy": "no",
        "save_strategy": "no",
        "load_best_model_at_end": False,
        "enable_jit_checkpoint": False,  # an interrupted dense run starts again
        "push_to_hub": False,
        "hub_model_id": None,
    }
    trainer = DenseTrainer(
        load_model(model.model_name_or_path, job.task, model),
        TrainingArguments(**arguments),
        train_dataset=job.train,
        **job.trainer_arguments,
    )
    trainer.train()
    trainer.save_model()
    if trainer.is_world_process_zero():
        (folder / "recipe.json").write_text(json.dumps(recipe, indent=1))
    trainer.save_metrics("eval", evaluate(trainer, job))
    return str(folder)
