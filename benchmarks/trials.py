"""Is a trial worth its steps? One level, many masks, each trained to the end, under several orders of the data.

    python benchmarks/trials.py run --task sst2 --sparsity 0.9375 --dense runs/sst2/42/dense --output_dir studies \\
        --data_dir DATA [flags of run_glue.py]
    python benchmarks/trials.py table --output_dir studies

Every mask of `POOL` is trained from the dense model through one whole level, once for every seed (order of the rows
and dropout; all masks see the same under one seed). The rows held out of train are cut in two: on the first part the
model is scored on the way, as a trial would, on the second it is judged at the end. So one run tells how well a trial
of any length, a prefix of the level, would have chosen; `--fresh` also runs trials of their own schedule, as the
search does. A curve is a file: finished ones are not run again.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from datasets import Dataset
from torch.nn.functional import cross_entropy, mse_loss
from tqdm.auto import tqdm
from transformers import EvalPrediction, PreTrainedModel, set_seed

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "glue_scripts"))

from trials_table import print_tables

from arguments import parse_arguments
from hf_maskselect import PruningTrainer
from hf_maskselect.masking.maskset import MaskSet
from hf_maskselect.masking.proposals import Proposal, propose
from hf_maskselect.masking.scores import CRITERIA, Criterion
from hf_maskselect.search.bench import Trial, TrialBench
from job import Job, load_model, prepare

MARKS = (5, 10, 20, 40, 80, 160)
ROW_STRIDES = (2, 4, 8)  # also scored on every 2nd, 4th and 8th row
FRESH_SEED = 1000
POOL = [
    Proposal("taylor", "balanced"),
    Proposal("taylor", "global"),
    Proposal("taylor", "layer"),
    Proposal("fisher", "balanced"),
    Proposal("fisher", "global"),
    Proposal("activation", "layer"),
    Proposal("magnitude", "layer"),
    Proposal("taylor", "balanced", 5e-5),
    Proposal("taylor", "balanced", 3e-4),
    Proposal("fisher", "balanced", 1e-4),
    Proposal("magnitude", "layer", 5e-5),
    Proposal("magnitude", "layer", 3e-4),
]


@dataclass(frozen=True)
class Level(Trial):
    """A trial as long as the level, scored after each of `MARKS`."""

    @property
    def marks(self) -> set[int]:
        return {mark for mark in MARKS if mark < self.steps} | {self.steps}


class Scribe(TrialBench):
    """A bench that writes down all measures at once: label loss, disagreement with the teacher (mean squared error
    for a regression) and minus the metric; lower is better.

    Args:
        parts: rows that trials are scored on, rows that only the end is judged on.
        metric: its name in what `compute_metrics` returns.
    """

    def __init__(self, trainer: PruningTrainer, parts: list[Dataset], metric: str) -> None:
        super().__init__(trainer, trainer.run.method, parts[0])
        self._parts, self._metric = parts, metric
        self._teachers = [self._logits(trainer.teacher, part) for part in parts]
        self._labels = [torch.tensor(part["label"]) for part in parts]
        self.seen: list[dict[str, float]] = []

    def score(self) -> float:
        self.seen.append(self.measure(0))
        return self.seen[-1]["loss"]

    def measure(self, part: int) -> dict[str, float]:
        """Of the model as it is, on one of the parts."""
        logits, taught, labels = (
            self._logits(self._trainer.model, self._parts[part]),
            self._teachers[part],
            self._labels[part],
        )
        if logits.shape[1] == 1:
            loss = mse_loss(logits[:, 0], labels.float())
        else:
            loss = cross_entropy(logits, labels)
        teacher = self._disagreement(logits, taught)
        metrics = self._trainer.compute_metrics(EvalPrediction(logits.numpy(), labels.numpy()))
        found = {"loss": float(loss), "teacher": teacher, "metric": -metrics[self._metric]}
        if part == 0:
            for every in ROW_STRIDES:
                found[f"teacher, 1/{every} of the rows"] = self._disagreement(logits[::every], taught[::every])
        return found

    @staticmethod
    def _disagreement(logits: torch.Tensor, taught: torch.Tensor) -> float:
        return float(mse_loss(logits, taught) if logits.shape[1] == 1 else cross_entropy(logits, taught.softmax(1)))

    @torch.no_grad()
    def _logits(self, model: PreTrainedModel, part: Dataset) -> torch.Tensor:
        model.eval()
        batches = []
        with self.random_state():
            for inputs in self._loader(part, 64):
                known = {k: v for k, v in self._trainer._prepare_inputs(inputs).items() if k != "labels"}
                batches.append(model(**known).logits.float().cpu())
        return torch.cat(batches)


def input_norms(trainer: PruningTrainer, samples: int = 64) -> dict[str, torch.Tensor]:
    """Weight name -> root of the sum of squares of what enters each of its columns, over train rows, padding too."""
    names = {id(weight): name for name, weight in trainer.run.method.weights.items()}
    norms = {name: weight.new_zeros(weight.shape[1]) for name, weight in trainer.run.method.weights.items()}

    def collect(module, inputs) -> None:
        norms[names[id(module.weight)]] += inputs[0].detach().flatten(0, -2).square().sum(0)

    modules = [m for m in trainer.model.modules() if id(getattr(m, "weight", None)) in names]
    hooks = [module.register_forward_pre_hook(collect) for module in modules]
    rows = range(min(8 * samples, len(trainer.train_dataset)))
    trainer.model.eval()
    with torch.no_grad():
        for inputs in trainer.run.bench._loader(trainer.train_dataset, 8, rows):
            trainer.model(**trainer._prepare_inputs(inputs))
    for hook in hooks:
        hook.remove()
    return {name: norm.sqrt() for name, norm in norms.items()}


def main() -> None:
    """`run` makes the curves of one setting, `table` prints what all of them say."""
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False, formatter_class=formatter)
    parser.add_argument("what", choices=["run", "table"])
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--task")
    parser.add_argument("--sparsity", type=float)
    parser.add_argument("--dense", help="folder of the fine-tuned dense model: start and teacher")
    parser.add_argument("--steps", type=int, default=240, help="length of the level")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--fresh", type=int, nargs="*", default=[], help="lengths of trials with their own schedule")
    options, flags = parser.parse_known_args()
    if options.what == "table":
        print_tables(options.output_dir, POOL)
        return
    flags = level_flags(flags, options)
    folder = options.output_dir / f"{options.task}-{options.sparsity:g}"
    data, model, config = parse_arguments([*flags, "--output_dir", str(folder / "run")])
    folder.mkdir(parents=True, exist_ok=True)
    made, told = folder / "made_by.json", {"steps": options.steps, "flags": flags}
    if made.is_file() and json.loads(made.read_text()) != told:
        parser.error(f"{folder} was made with other flags ({made.read_text()}): choose another output_dir")
    made.write_text(json.dumps(told))
    set_seed(config.seed)
    run(prepare(data, model, config), model, config, options, folder)


def level_flags(flags: list[str], options: argparse.Namespace) -> list[str]:
    """Those of `run_glue.py` for one level of `options.steps`, from and distilled from the dense model."""
    flags = [*flags, "--task_name", options.task, "--always_hold_out", "--save_strategy", "no", "--num_levels", "1"]
    flags += ["--sparsity", str(options.sparsity), "--max_steps", str(options.steps), "--method", "random"]
    return [*flags, "--model_name_or_path", options.dense, "--teacher_name_or_path", options.dense]


def bench_of(job: Job, model, config, dense: str) -> tuple[PruningTrainer, Scribe]:
    """A trainer before its first step, and the bench that tries masks on its model."""
    rows = range(len(job.selection))  # which are in the order of their lengths
    parts = [job.selection.select(rows[0::2]), job.selection.select(rows[1::2])]
    trainer = PruningTrainer(
        load_model(dense, job.task, model),
        config,
        train_dataset=job.train,
        selection_dataset=job.selection,
        teacher=dense,
        **job.trainer_arguments,
    )
    trainer.run.method.attach(trainer.model)
    return trainer, Scribe(trainer, parts, job.task.main_metric)


def cut(trainer: PruningTrainer, proposal: Proposal, index: int, stats, criteria: dict[str, Criterion]) -> MaskSet:
    """The masks of a proposal at the trainer's sparsity, in one level from the weights and masks it has."""
    args, settings, method = trainer.args, trainer.run.settings, trainer.run.method
    return propose(
        proposal,
        index,
        weights=method.weights,
        stats=stats,
        masks=method.masks,
        sparsity=settings.sparsity,
        level=0,
        seed=args.seed,
        pattern=settings.pattern,
        criteria=criteria,
    )


def run(job: Job, model, config, options: argparse.Namespace, folder: Path) -> None:
    """Make the curves that are missing."""
    trainer, bench = bench_of(job, model, config, options.dense)
    kinds = [(f"level-{seed}", Level(options.steps, config.learning_rate), seed) for seed in options.seeds]
    # In an order of the data that no level has.
    kinds += [(f"trial-{steps}", Trial(steps, config.learning_rate), FRESH_SEED) for steps in options.fresh]
    cells = [(kind, trial, seed, index) for kind, trial, seed in kinds for index in range(len(POOL))]
    missing = [cell for cell in cells if not (folder / cell[0] / f"{cell[3]}.json").is_file()]
    if not missing:
        return
    stats = bench.gradient_stats({"square", "product"}, 0)
    norms = input_norms(trainer)
    criteria = {**CRITERIA, "activation": Criterion(lambda n, w, _: w.detach().abs().float() * norms[n], (), 5.0)}
    before_cut = {name: weight.detach().clone() for name, weight in trainer.run.method.weights.items()}
    masks = [cut(trainer, proposal, index, stats, criteria) for index, proposal in enumerate(POOL)]
    with bench.untouched():
        for kind, trial, seed, index in tqdm(missing, desc=folder.name, unit="curve"):
            bench.seen = []
            bench.restore()
            trainer.run.method.set_masks(masks[index])
            if trainer.run.settings.refit_rows:
                bench.refit(before_cut, seed)
            bench.score()
            bench.trial(lambda index=index: masks[index], trial, seed, tqdm(disable=True))
            told = {
                "proposal": str(POOL[index]),
                "overlap": masks[index].overlap(masks[0]),
                "scores": dict(zip([0, *sorted(trial.marks)], bench.seen, strict=True)),
                "judged": bench.measure(1),
            }
            path = folder / kind / f"{index}.json"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(told, indent=1))


if __name__ == "__main__":
    main()
