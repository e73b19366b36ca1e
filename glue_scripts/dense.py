"""The dense model that a pruned one starts from and is taught by."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path

from transformers import Trainer, TrainingArguments

from arguments import ModelArguments
from hf_maskselect import PruningConfig
from hf_maskselect.utils.files import read_object
from job import Job, evaluate, load_model

SHAPING = (  # what else in `TrainingArguments` its weights depend on, but for what is hardly ever changed
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
    """The plain trainer with the right loss scale under gradient accumulation (transformers#47688)."""

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.model_accepts_loss_kwargs = False


def dense_recipe(job: Job, model: ModelArguments, config: PruningConfig) -> dict:
    """What a dense model is made and judged by, as its `recipe.json` has it."""
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
    return json.loads(json.dumps(recipe))  # names instead of enumerations


def check_recipe(made: Mapping, recipe: Mapping, where: str | Path) -> None:
    """Refuse a dense model that was made by another recipe.

    Args:
        where: it is.

    Raises:
        ValueError: it was; the sentence tells what differs.
    """
    differ = [name for name in {**made, **recipe} if made.get(name) != recipe.get(name)]
    if differ:
        told = ", ".join(
            f"{name} {made.get(name, 'unknown')} and not {recipe.get(name, 'unknown')}" for name in differ
        )
        raise ValueError(f"{where} was made with {told}: give the flags that made it, or delete it")


def read_dense(folder: Path) -> dict[str, dict] | None:
    """`told` (its recipe) and `results` of a dense model that was finished in `folder`; None of one that was not.

    Raises:
        ValueError: a file of it cannot be read.
    """
    if not (folder / "all_results.json").is_file():
        return None
    remedy = f"delete {folder}"
    return {
        "told": read_object(folder / "recipe.json", remedy),
        "results": read_object(folder / "all_results.json", remedy),
    }


def fine_tune_dense(job: Job, model: ModelArguments, config: PruningConfig) -> str:
    """Fine-tune the dense model into `output_dir/dense`; a finished one is used again. Returns the folder."""
    folder, recipe = Path(config.output_dir) / "dense", dense_recipe(job, model, config)
    made = read_dense(folder)
    if made is not None:
        check_recipe(made["told"], recipe, folder)
        return str(folder)
    plain = {f.name for f in dataclasses.fields(TrainingArguments) if f.init}
    arguments = {name: value for name, value in vars(config).items() if name in plain}
    arguments |= {
        "output_dir": str(folder),
        "num_train_epochs": model.dense_epochs,
        "max_steps": -1,
        "learning_rate": model.dense_learning_rate,
        "eval_strategy": "no",
        "save_strategy": "no",
        "load_best_model_at_end": False,
        "enable_jit_checkpoint": False,  # it is fine-tuned again from its start
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
