"""Prune a model while it is fine-tuned on a GLUE task.

    python glue_scripts/run_glue.py --task_name demo
    python glue_scripts/run_glue.py --task_name mrpc --model_name_or_path bert-base-uncased --output_dir out
    python glue_scripts/run_glue.py glue_scripts/recipes/random_16x.json --task_name rte --data_dir DATA ...

Without a teacher the model is first fine-tuned dense (on the train rows only that pruning will use) and then is both
start and teacher. Runs plain or under `accelerate launch`. Writes `all_results.json` with the task's metrics, the
exact sparsity and the cost of the search.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from pathlib import Path

import torch
from accelerate import PartialState
from transformers import AutoConfig, AutoModelForSequenceClassification, BatchEncoding, set_seed
from transformers.utils.logging import DEBUG
from transformers.utils.logging import get_verbosity as get_level

from arguments import DataArguments, ModelArguments, parse_arguments
from demo_data import demo_model_config, demo_tokenizer
from dense import fine_tune_dense
from hf_maskselect import PruningConfig, PruningTrainer, prunable_weights
from hf_maskselect.masking.dtensors import reshard
from hf_maskselect.storage.runs import last_checkpoint
from hf_maskselect.training.plan import rewound_rate
from hf_maskselect.utils.tables import text_table
from job import Job, evaluate, load_model, prepare
from tasks import GlueTask


def check_plan(job: Job, model: ModelArguments, config: PruningConfig) -> None:
    """Refuse what pruning would refuse (targets, pattern, plan) before time goes into the dense model."""
    start = AutoConfig.from_pretrained(
        model.model_name_or_path, cache_dir=model.cache_dir, revision=model.model_revision
    )
    with torch.device("meta"):
        skeleton = AutoModelForSequenceClassification.from_config(start)
    settings = config.resolved()
    for name, weight in prunable_weights(skeleton, settings.target_modules, settings.exclude_modules).items():
        settings.pattern.check(name, weight.shape)
    rows = config.per_device_train_batch_size * config.gradient_accumulation_steps * config.world_size
    steps = config.max_steps if config.max_steps > 0 else math.ceil(config.num_train_epochs * len(job.train) / rows)
    plan = settings.plan(steps)
    if config.lr_rewind:
        rewound_rate(config, plan)


def prune(
    job: Job,
    model: ModelArguments,
    config: PruningConfig,
    start: str,
    teacher: str | None,
    dense: dict[str, float] | None = None,
) -> dict[str, float]:
    """Prune from the model in `start`; returns what goes into `all_results.json` (beside the `dense` model's
    results)."""
    trainer = PruningTrainer(
        load_model(start, job.task, model),
        config,
        train_dataset=job.train,
        eval_dataset=next(iter(job.evaluation.values())),
        selection_dataset=job.selection,
        teacher=teacher,
        **job.trainer_arguments,
    )
    results: dict[str, float] = dict(dense or {})
    if config.do_train:
        checkpoint = config.resume_from_checkpoint
        checkpoint = last_checkpoint(config.output_dir) if checkpoint in ("last", "True", "true") else checkpoint
        results |= trainer.train(resume_from_checkpoint=checkpoint).metrics
        if trainer.state.global_step < trainer.state.max_steps:
            stop_here(trainer)
        trainer.save_model()
        trainer.save_state()
        results |= {"train_steps": trainer.state.global_step, **trainer.search_summary()}
        check_reload(trainer, job)
    if config.do_eval:
        results |= evaluate(trainer, job)
    trainer.save_metrics("eval", results)
    if config.do_predict:
        write_predictions(trainer, job)
    if config.push_to_hub:
        trainer.push_to_hub()
    return results


def stop_here(trainer: PruningTrainer) -> None:
    """Leave the process: the run was stopped before its end (SIGTERM with `enable_jit_checkpoint`)."""
    leave_process_group()
    done = f"stopped after step {trainer.state.global_step} of {trainer.state.max_steps}"
    remedy = f"the checkpoint is in {trainer.args.output_dir}; --resume_from_checkpoint last goes on from it"
    sys.exit(f"{done}: {remedy}" if trainer.is_world_process_zero() else 1)


def check_batch(job: Job) -> BatchEncoding:
    """A few rows of the first validation split, without labels."""
    first = next(iter(job.evaluation.values()))
    rows = [{k: v for k, v in row.items() if k != "label"} for row in first.select(range(min(8, len(first))))]
    return job.collator(rows)


def check_reload(trainer: PruningTrainer, job: Job) -> None:
    """Load the saved model plainly and compare its logits with the trained one's on a few rows."""
    batch = check_batch(job)
    trained = trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False).eval()
    with torch.no_grad():  # on all ranks, among which FSDP has cut the model
        expected = trained(**batch.to(trainer.args.device)).logits.float().cpu()
    reshard(trained)
    if not trainer.is_world_process_zero():
        return
    plain = AutoModelForSequenceClassification.from_pretrained(trainer.args.output_dir, dtype=torch.float32).eval()
    with torch.no_grad():
        found = plain(**batch.to(plain.device)).logits
    if not torch.allclose(found, expected, atol=1e-4):
        raise ValueError(f"{trainer.args.output_dir} loads plainly but gives other logits than the trained model")


def write_predictions(trainer: PruningTrainer, job: Job) -> None:
    """`predict_results_<task>.txt` for every test split, as the transformers example writes it."""
    for split, dataset in job.test.items():
        outputs = trainer.predict(
            dataset.remove_columns([c for c in dataset.column_names if c == "label"])
        ).predictions
        values = outputs.squeeze(-1) if job.task.is_regression else outputs.argmax(-1)
        if trainer.is_world_process_zero():
            path = Path(trainer.args.output_dir) / f"predict_results_{job.task.name}{split.removeprefix('test')}.txt"
            shown = [f"{v:.3f}" if job.task.is_regression else job.task.labels[v] for v in values]
            path.write_text("index\tprediction\n" + "".join(f"{i}\t{v}\n" for i, v in enumerate(shown)))


def run(data: DataArguments, model: ModelArguments, config: PruningConfig) -> dict[str, float]:
    """One run: dense fine-tuning where there is no teacher, then pruning."""
    if model.model_name_or_path is None:
        raise ValueError("--model_name_or_path is missing: give a Hub name or a folder with a pretrained model")
    set_seed(config.seed)
    job = prepare(data, model, config)
    start, teacher = model.model_name_or_path, model.teacher_name_or_path
    dense: dict[str, float] = {}
    if config.do_train:
        check_plan(job, model, config)
    if teacher is None and model.dense_epochs > 0 and config.do_train:
        start = teacher = fine_tune_dense(job, model, config)
        dense = json.loads((Path(start) / "all_results.json").read_text()) if config.process_index == 0 else {}
    return prune(
        job, model, config, start, teacher, {f"dense_{k}": v for k, v in dense.items() if k in kept(job.task)}
    )


def kept(task: GlueTask) -> set[str]:
    """The dense model's results that stand beside the pruned one's."""
    return {f"eval_{metric}" for metric in task.metrics} | {"eval_loss"}


DEMO = {
    "per_device_train_batch_size": 32,
    "learning_rate": 5e-4,
    "dense_learning_rate": 5e-4,
    "num_train_epochs": 1.0,
    "warmup_steps": 0.1,
    "logging_steps": 50,
    "save_strategy": "no",
    "criterion_batches": 64,
}


def run_demo(arguments: list[str]) -> None:
    """Train a small BERT from scratch on generated sentences, prune it 16x, and show the methods side by side."""
    chosen = argparse.ArgumentParser(add_help=False)
    chosen.add_argument("--method")
    method = chosen.parse_known_args(arguments)[0].method
    methods = [method] if method else ["magnitude", "random"]
    rows, folder = [], Path()
    for method in methods:
        single = [] if method == "random" else ["--num_candidates", "1"]
        data, model, config = parse_arguments([*arguments, "--method", method, *single], DEMO)
        folder = Path(config.output_dir)
        if model.model_name_or_path is None:
            model.model_name_or_path = str(make_demo_model(folder / "untrained", config.seed))
        data.always_hold_out = True  # nothing is chosen by the single-mask methods, but all are to see the same rows
        job = prepare(data, model, config)
        check_plan(job, model, config)
        start = teacher = model.teacher_name_or_path or fine_tune_dense(job, model, config)
        if not rows:
            dense = json.loads((Path(start) / "all_results.json").read_text())
            rows.append(["dense", "0.0000", f"{dense['eval_accuracy']:.4f}", "-", "-"])
        config.output_dir = str(folder / method)
        results = prune(job, model, config, start, teacher)
        cost = [f"{results['train_runtime']:.0f}", f"{results['search_cost_ratio']:.2f}"]
        rows.append([method, f"{results['eval_sparsity']:.4f}", f"{results['eval_accuracy']:.4f}", *cost])
    print("\n" + text_table(["model", "sparsity", "accuracy", "seconds", "search cost / training"], rows))
    print(
        f"\nEach pruned model was reloaded with plain AutoModel and gave the same logits. Look at one:\n"
        f"  hf-maskselect report {folder / methods[-1]}\n  hf-maskselect verify {folder / methods[-1]}"
    )


def make_demo_model(folder: Path, seed: int) -> Path:
    """An untrained small BERT with its tokenizer, saved in `folder`."""
    set_seed(seed)
    AutoModelForSequenceClassification.from_config(demo_model_config()).save_pretrained(folder)
    demo_tokenizer().save_pretrained(folder)
    return folder


def leave_process_group() -> None:
    """End a distributed run cleanly. gloo's threads still free the tensors of the last gather, for which they take the
    interpreter's lock: one that asks while the interpreter is shutting down aborts a rank that had finished its
    work."""
    if torch.distributed.is_initialized():
        PartialState().destroy_process_group()
        time.sleep(0.5)


def main() -> None:
    """Parse, run, and turn bad input into one sentence."""
    try:
        data, model, config = parse_arguments()
        if data.task_name == "demo":
            run_demo(sys.argv[1:])
        else:
            results = run(data, model, config)
            if config.process_index == 0:
                print(json.dumps(results, indent=1, sort_keys=True))
        leave_process_group()
    except ValueError as error:
        if get_level() <= DEBUG:  # TRANSFORMERS_VERBOSITY=debug shows where it came from
            raise
        sys.exit(f"error: {error} (TRANSFORMERS_VERBOSITY=debug shows the traceback)")


if __name__ == "__main__":
    main()
