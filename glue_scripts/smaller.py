"""A smaller model to prune: the dense one without some layers and neurons, fitted on rows of train."""

from __future__ import annotations

from pathlib import Path

from accelerate import PartialState

from arguments import ModelArguments
from cpu_model import calibration_rows
from hf_maskselect import PruningConfig, shrink_model
from hf_maskselect.surgery.structured.record import StructureRecord
from hf_maskselect.utils.folders import replacing_folder
from job import Job, load_config, load_model

ROWS = 2048  # of train


def shrink_first(job: Job, model: ModelArguments, config: PruningConfig, start: str) -> str:
    """Shrink the model in `start` and save it in `output_dir/small`, or reuse it; return the folder.

    The speed-up is that of the largest of `cpu_batch_sizes` and `cpu_seq_lens`, in float32.

    Raises:
        ValueError: no shape reaches the speed-up, or the folder holds a model of another one.
    """
    folder = Path(config.output_dir) / "small"
    with PartialState().main_process_first():
        if not (folder / "config.json").is_file():
            dense = load_model(start, job.task, model).eval()
            rows = calibration_rows(job, ROWS, config.seed)
            timed = max(model.cpu_batch_sizes), max(model.cpu_seq_lens)
            small, report = shrink_model(
                dense, rows, speedup=model.shrink_speedup, latency_shape=timed, seed=config.seed
            )
            print(report)
            with replacing_folder(folder, keeps=lambda _: False) as new:  # a kill leaves no half of it
                job.tokenizer.save_pretrained(new)
                small.save_pretrained(new)
        record = StructureRecord.find(load_config(str(folder), job.task, model))
        if record is None or record.target != f"speedup={model.shrink_speedup}":
            told = None if record is None else record.target
            raise ValueError(
                f"{folder} was made with {told} and not with speedup={model.shrink_speedup}: give the flags that made "
                "it, or delete it"
            )
    return str(folder)
