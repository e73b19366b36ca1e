"""The levels of a run with `pattern="structured"`: choose a smaller shape on the trainer's rows, and take it."""

import dataclasses

import torch
from transformers import PreTrainedModel

from ..config import PruningConfig
from ..fields.resolved import StructureOptions
from ..search.bench import TrialBench
from ..search.journal import Journal
from ..surgery.structured.adopt import adopt, reshape
from ..surgery.structured.batches import FEWEST, Batch, rows_of
from ..surgery.structured.families import checked_family
from ..surgery.structured.layer_shapes import LayerShapes
from ..surgery.structured.record import StructureRecord
from ..surgery.structured.report import ShrinkReport
from ..surgery.structured.shrink import make_smaller
from ..surgery.structured.target import Target
from ..utils.processes import Processes
from ..utils.seeds import key_seed

_MET = 1.02  # a level is reached by a speed-up that is this factor too low: times are not exact
_WAIT = 10  # times `ddp_timeout` that the other ranks wait for the search


class Structure:
    """Makes a model smaller, level by level. Targets are relative to the dense model, which its record describes.

    Args:
        config: the arguments of the run.
        options: those of the structure.
        bench: has the rows of train and the held-out rows.
        processes: the processes of the run. Rank 0 searches and fits, and sends the weights to the others.
    """

    def __init__(
        self, config: PruningConfig, options: StructureOptions, bench: TrialBench, processes: Processes
    ) -> None:
        self._config, self._options, self._bench, self._processes = config, options, bench, processes
        self._levels = config.resolved().levels
        self.seconds = 0.0  # of all searches and fits of this run

    def target(self, level: int) -> Target:
        """Return what a level shall reach, relative to the dense model."""
        value = self._levels[level]
        return Target(speedup=value) if self._options.by_speedup else Target(sparsity=value)

    def shrink(self, model: PreTrainedModel, level: int) -> ShrinkReport | None:
        """Give `model` the shape of a level in place; all ranks call it together.

        Returns:
            what was chosen; None if the model has reached the level before.

        Raises:
            ValueError: no shape reaches the target, or the model cannot be made smaller.
        """
        before, processes = StructureRecord.find(model.config), self._processes
        remaining = remaining_target(self.target(level), before)
        if remaining is None:
            if before is not None:  # so that a checkpoint tells of the level that it belongs to
                dataclasses.replace(before, target=str(self.target(level))).write(model.config)
            return None
        processes.open(_WAIT * self._config.ddp_timeout)
        made: list[PreTrainedModel] = []

        def make() -> tuple[ShrinkReport, LayerShapes | None] | None:
            if processes.rank:
                return None
            small, report = self._made(model, level, remaining)
            made.append(small)
            return report, LayerShapes.of(small.config)

        found = processes.together(make)[0]
        assert found is not None
        report, layer_shapes = found
        if made:
            adopt(model, made[0])
        else:
            reshape(model, report.shape, layer_shapes)
        if processes.count > 1:
            weights = processes.share(model.state_dict() if made else None, 0)
            model.load_state_dict(dict(weights))
        StructureRecord.of(report, str(self.target(level)), before).write(model.config)
        self.seconds += report.seconds
        if processes.rank == 0:
            report.warn_if_missed(remaining.speedup)
        return report

    def _made(self, model: PreTrainedModel, level: int, target: Target) -> tuple[PreTrainedModel, ShrinkReport]:
        """Choose a shape that meets a target relative to `model`, and fit it."""
        config, options = self._config, self._options
        family = checked_family(model)
        rows, held_out = self._rows(model, level)
        later = level + 1 < len(self._levels)
        return make_smaller(
            model,
            family,
            rows,
            held_out,
            target,
            free=options.free,
            num_candidates=options.num_candidates,
            latency_shape=options.latency_shape,
            latency_dtype=options.latency_dtype,
            latency_device=options.latency_device,
            seed=key_seed(config.seed, "structure", level),
            notes=JournalNotes(config.output_dir or "", self._bench.identity.of_search(level, {})),
            last=remaining_target(self.target(-1), StructureRecord.find(model.config)) if later else None,
            quiet=bool(config.disable_tqdm),
        )

    def _rows(self, model: PreTrainedModel, level: int) -> tuple[list[Batch], list[Batch]]:
        """Return random rows of train to fit on, and the held-out rows."""
        batches, train = self._bench.batches, self._bench.trainer.train_dataset
        if (count := len(batches.held_out)) < FEWEST:
            raise ValueError(
                f"{count} held-out rows are too few to choose a shape on: raise selection_fraction, or pass a "
                "selection_dataset"
            )
        generator = torch.Generator().manual_seed(key_seed(self._config.seed, "structure rows", level))
        order = torch.randperm(len(train), generator=generator)[: self._options.rows].tolist()
        fit = batches.load(train, 1, order)  # one at a time, so that a row has no padding
        held_out = batches.load(batches.held_out, 1, None, batches.first_collator)
        return rows_of(map(dict, fit), model), rows_of(map(dict, held_out), model)


def remaining_target(target: Target, record: StructureRecord | None) -> Target | None:
    """Return what is left of a target for a model that is smaller already; None if nothing is."""
    if record is None:
        return target
    if target.speedup is not None:
        return Target(speedup=target.speedup / record.speedup) if target.speedup > _MET * record.speedup else None
    left = (1 - (target.sparsity or 0.0)) / (1 - record.removed)
    return Target(sparsity=1 - left) if left < 1 else None


class JournalNotes:
    """Notes of a search in the journal of trials in `folder`, so that a killed run repeats none.

    Args:
        folder: the output folder.
        identity: all that the search depends on. What was noted under another one does not count.
    """

    def __init__(self, folder: str, identity: dict[str, str]) -> None:
        self._journal = Journal(folder)
        self._journal.open(identity)

    def __contains__(self, name: object) -> bool:
        return self._journal.find(str(name), 0) is not None

    def __getitem__(self, name: str) -> float:
        found = self._journal.find(name, 0)
        if found is None:
            raise KeyError(name)
        return found

    def __setitem__(self, name: str, value: float) -> None:
        self._journal.add({name: value}, 0)
