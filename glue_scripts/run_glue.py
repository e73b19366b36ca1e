"""Prune a model while it is fine-tuned on a GLUE task.

    python glue_scripts/run_glue.py --task_name demo
    python glue_scripts/run_glue.py --task_name mrpc --model_name_or_path bert-base-uncased --output_dir out
    python glue_scripts/run_glue.py glue_scripts/recipes/random_16x.json --task_name rte --data_dir DATA ...
    python glue_scripts/run_glue.py glue_scripts/recipes/cpu_fast.json --task_name sst2 --export_cpu True ...

Without a teacher, the script first fine-tunes the dense model, on the same train rows that pruning will use. The dense
model is then both the start and the teacher of the pruned one. Run it plainly or under `accelerate launch`. It writes
`all_results.json` with the metrics of the task, the exact sparsity and the cost of the search. With `--export_cpu` it
ends with a fast CPU model of the pruned model, its scores, its size and its times; `--do_train False` exports a model
that was pruned before. `--shrink_speedup 2` removes layers and neurons before it prunes.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import sys
import time
from collections.abc import Mapping
from pathlib import Path

import torch
from accelerate import PartialState
from transformers import AutoModelForSequenceClassification, BatchEncoding, set_seed
from transformers.utils.logging import DEBUG
from transformers.utils.logging import get_verbosity as get_level

from arguments import DataArguments, ModelArguments, parse_arguments
from cpu_model import export_and_score
from demo_data import demo_model_config, demo_tokenizer
from dense import fine_tune_dense
from hf_maskselect import PruningConfig, PruningTrainer, prunable_weights
from hf_maskselect.masking.dtensors import reshard
from hf_maskselect.masking.targets import transposed_weights
from hf_maskselect.storage.runs import last_checkpoint
from hf_maskselect.training.checks import check_shapes
from hf_maskselect.training.search_cost import check_run
from hf_maskselect.utils.tables import text_table
from job import Job, evaluate, load_config, load_model, prepare
from smaller import shrink_first
from tasks import GlueTask


def check_early(job: Job, model: ModelArguments, config: PruningConfig) -> None:
    """Run the package's checks of target, pattern and plan before time is spent on the dense model.

    Raises:
        ValueError: pruning would refuse the model or the arguments.
    """
    with torch.device("meta"):
        skeleton = AutoModelForSequenceClassification.from_config(
            load_config(model.model_name_or_path, job.task, model)
        )
    settings = config.resolved()
    weights = prunable_weights(skeleton, settings.target_modules, settings.exclude_modules)
    check_shapes(config, weights, transposed_weights(skeleton))
    planned = copy.copy(config)
    if planned.max_steps <= 0:
        rows = config.per_device_train_batch_size * config.gradient_accumulation_steps * config.world_size
        planned.max_steps = math.ceil(config.num_train_epochs * len(job.train) / rows)
    check_run(planned)


def prune(
    job: Job,
    model: ModelArguments,
    config: PruningConfig,
    start: str,
    teacher: str | None,
    dense: dict[str, float] | None = None,
) -> dict[str, float]:
    """Prune the model in `start` and return the content of `all_results.json`.

    Args:
        job: the task and its rows.
        model: flags of the model.
        config: flags of the run.
        start: model to prune.
        teacher: dense model to distil from; None for no distillation.
        dense: results of the dense model, to store beside those of the pruned one.
    """
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
    if model.export_cpu and trainer.is_world_process_zero():
        cpu = export_and_score(job, config.output_dir if config.do_train else start, model, config)
        trainer.save_metrics("cpu", cpu)
        results |= cpu
    return results


def stop_here(trainer: PruningTrainer) -> None:
    """Exit after a run that SIGTERM stopped before its end (`enable_jit_checkpoint`)."""
    leave_process_group()
    status = f"stopped after step {trainer.state.global_step} of {trainer.state.max_steps}"
    remedy = f"the checkpoint is in {trainer.args.output_dir}; resume with --resume_from_checkpoint last"
    sys.exit(f"{status}: {remedy}" if trainer.is_world_process_zero() else 1)


def check_batch(job: Job) -> BatchEncoding:
    """Return a batch of up to eight rows of the first validation split, without labels."""
    first = next(iter(job.evaluation.values()))
    rows = [{k: v for k, v in row.items() if k != "label"} for row in first.select(range(min(8, len(first))))]
    return job.collator(rows)


def check_reload(trainer: PruningTrainer, job: Job) -> None:
    """Load the saved model with plain transformers and compare logits on a few rows.

    Raises:
        ValueError: the logits differ from those of the trained model.
    """
    batch = check_batch(job)
    trained = trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False).eval()
    with torch.no_grad():  # on all processes, because FSDP shards the model
        expected = trained(**batch.to(trainer.args.device)).logits.float().cpu()
    reshard(trained)
    if not trainer.is_world_process_zero():
        return
    plain = AutoModelForSequenceClassification.from_pretrained(trainer.args.output_dir, dtype=torch.float32).eval()
    with torch.no_grad():
        logits = plain(**batch.to(plain.device)).logits
    if not torch.allclose(logits, expected, atol=1e-4):
        raise ValueError(
            f"the model in {trainer.args.output_dir} gives other logits than the trained model: do not use it, and "
            "report the flags of this run as a bug"
        )


def write_predictions(trainer: PruningTrainer, job: Job) -> None:
    """Write `predict_results_<task>.txt` for every test split, in the format of the transformers example."""
    for split, dataset in job.test.items():
        outputs = trainer.predict(
            dataset.remove_columns([c for c in dataset.column_names if c == "label"])
        ).predictions
        values = outputs.squeeze(-1) if job.task.is_regression else outputs.argmax(-1)
        if trainer.is_world_process_zero():
            path = Path(trainer.args.output_dir) / f"predict_results_{job.task.name}{split.removeprefix('test')}.txt"
            texts = [f"{v:.3f}" if job.task.is_regression else job.task.labels[v] for v in values]
            path.write_text("index\tprediction\n" + "".join(f"{i}\t{text}\n" for i, text in enumerate(texts)))


def run(data: DataArguments, model: ModelArguments, config: PruningConfig) -> dict[str, float]:
    """Prune for one task, after dense fine-tuning where no teacher is given, and return the results.

    Raises:
        ValueError: the flags do not name a model, or pruning refuses them.
    """
    if model.model_name_or_path is None:
        raise ValueError("--model_name_or_path is missing: give a Hub name or a folder with a pretrained model")
    set_seed(config.seed)
    job = prepare(data, model, config)
    start, teacher = model.model_name_or_path, model.teacher_name_or_path
    dense: dict[str, float] = {}
    if config.do_train:
        check_early(job, model, config)
    if teacher is None and model.dense_epochs > 0 and config.do_train:
        start = teacher = fine_tune_dense(job, model, config)
        dense = dense_results(start, job.task) if config.process_index == 0 else {}
    if model.shrink_speedup is not None and config.do_train:
        start = shrink_first(job, model, config, start)
    return prune(job, model, config, start, teacher, dense)


def dense_results(folder: str, task: GlueTask) -> dict[str, float]:
    """Metrics and loss of the dense model, under keys that begin with `dense_`."""
    names = {f"eval_{metric}" for metric in task.metrics} | {"eval_loss"}
    results = json.loads((Path(folder) / "all_results.json").read_text())
    return {f"dense_{name}": value for name, value in results.items() if name in names}


DEMO = {
    "per_device_train_batch_size": 32,
    "learning_rate": 5e-4,
    "dense_learning_rate": 5e-4,
    "num_train_epochs": 1.0,
    "warmup_steps": 0.1,
    "logging_steps": 50,
    "save_strategy": "no",
    "criterion_batches": 64,
    "cpu_seq_lens": [32],
}


def run_demo(arguments: list[str]) -> None:
    """Train a small BERT on generated sentences, prune it 16x with each method, and export the last one for the CPU.

    It prints a table of the methods, and one of the CPU model beside the dense one.
    """
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--method")
    method = parser.parse_known_args(arguments)[0].method
    methods = [method] if method else ["magnitude", "random"]
    rows, folder = [], Path()
    for method in methods:
        single = [] if method == "random" else ["--num_candidates", "1"]
        data, model, config = parse_arguments([*arguments, "--method", method, *single], DEMO)
        folder = Path(config.output_dir)
        if model.model_name_or_path is None:
            model.model_name_or_path = str(make_demo_model(folder / "untrained", config.seed))
        data.always_hold_out = True  # so that methods without a search train on the same rows
        job = prepare(data, model, config)
        check_early(job, model, config)
        start = teacher = model.teacher_name_or_path or fine_tune_dense(job, model, config)
        if not rows:
            dense = dense_results(start, job.task)
            rows.append(["dense", "0.0000", f"{dense['dense_eval_accuracy']:.4f}", "-", "-"])
        config.output_dir = str(folder / method)
        model.export_cpu = model.export_cpu or "True" if method == methods[-1] else None
        results = prune(job, model, config, start, teacher)
        cost = [f"{results['train_runtime']:.0f}", f"{results['search_cost_ratio']:.2f}"]
        rows.append([method, f"{results['eval_sparsity']:.4f}", f"{results['eval_accuracy']:.4f}", *cost])
    print("\n" + text_table(["model", "sparsity", "accuracy", "seconds", "search cost / training"], rows))
    if config.process_index == 0:
        print(f"\n{cpu_table(dense['dense_eval_accuracy'], methods[-1], results)}")
    print(
        f"\nEach pruned model was reloaded with plain AutoModel and gave the same logits. To inspect one:\n"
        f"  hf-maskselect report {folder / methods[-1]}\n  hf-maskselect verify {folder / methods[-1]}\n"
        "The matrices of this model are too small to gain much speed. Larger models do, with blocks of four zeros\n"
        "(docs/cpu.md):\n"
        "  python glue_scripts/run_glue.py glue_scripts/recipes/cpu_fast.json --task_name sst2 \\\n"
        "      --model_name_or_path FINE_TUNED --teacher_name_or_path FINE_TUNED --output_dir out"
    )


def cpu_table(dense_accuracy: float, method: str, results: Mapping[str, float]) -> str:
    """Format accuracy, size and milliseconds on one thread of the dense model and of the CPU model."""
    shapes = [name.removeprefix("cpu_ms_") for name in results if name.startswith("cpu_ms_")]
    header = ["model", "accuracy", "MB", *(f"ms at {shape}" for shape in shapes)]
    dense = [f"{dense_accuracy:.4f}", f"{results['dense_mb']:.2f}"]
    fast = [f"{results['cpu_eval_accuracy']:.4f}", f"{results['cpu_mb']:.2f}"]
    rows = [
        ["dense fp32", *dense, *(f"{results[f'dense_ms_{shape}']:.2f}" for shape in shapes)],
        [f"{method}, CPU model", *fast, *(f"{results[f'cpu_ms_{shape}']:.2f}" for shape in shapes)],
        ["times faster", "", "", *(f"{results[f'cpu_times_faster_{shape}']:.2f}" for shape in shapes)],
    ]
    return text_table(header, rows)


def make_demo_model(folder: Path, seed: int) -> Path:
    """Save a small untrained BERT and its tokenizer in `folder`, and return `folder`."""
    set_seed(seed)
    AutoModelForSequenceClassification.from_config(demo_model_config()).save_pretrained(folder)
    demo_tokenizer().save_pretrained(folder)
    return folder


def leave_process_group() -> None:
    """End a distributed run cleanly.

    After the last gather, gloo's threads still free tensors and take the interpreter's lock to do so. A thread that
    asks for the lock while the interpreter shuts down would abort a process that has finished its work.
    """
    if torch.distributed.is_initialized():
        PartialState().destroy_process_group()
        time.sleep(0.5)  # until these threads are done


def main() -> None:
    """Parse the flags, run, and report bad input in one sentence."""
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
        if get_level() <= DEBUG:  # with TRANSFORMERS_VERBOSITY=debug the traceback is wanted
            raise
        sys.exit(f"error: {error} (TRANSFORMERS_VERBOSITY=debug shows the traceback)")


if __name__ == "__main__":
    main()
