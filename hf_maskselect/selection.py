"""Which candidate: proposals, trials and the race between them ("mask candidate selection strategy" and "early mask
evaluation pipeline" of arXiv 2310.13183, with successive halving beside the paper's single trial)."""

from __future__ import annotations

import functools
import itertools
import json
import math
import os
import shutil
import tempfile
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

from tqdm.auto import tqdm

from .config import PruningConfig
from .files import replacing
from .journal import Journal
from .masking.maskset import MaskSet
from .masking.schedule import LevelPlan
from .masking.scores import Criterion
from .methods.hard import HardMasks
from .proposals import Proposal, gradient_needs, key_seed, proposal_pool, propose
from .report import text_table
from .trials import EARLY_EVALUATIONS, TrialBench

SEARCH_FILE = "search.json"
_FOLDER = "_search-"  # of the masks that wait; and a random ending


@dataclass
class Candidate:
    """One row of the table of candidates. overlap: share of its kept weights that the deterministic mask keeps too."""

    index: int
    proposal: str
    ratio: float | None
    overlap: float
    digest: str
    scores: list[float] = field(default_factory=list)
    steps: int = 0
    chosen: bool = False

    @property
    def rank(self) -> tuple[float, int]:
        """By last score, ties by index; a diverged trial (NaN) comes last."""
        score = self.scores[-1]
        return (math.inf if math.isnan(score) else score, self.index)


@dataclass
class LevelSearch:
    """What one search did. step_equivalents: its whole cost in optimizer steps of the outer run's batch size per
    process, a forward pass counted as a third."""

    level: int
    sparsity: float
    step: int
    candidates: list[Candidate]
    step_equivalents: float = 0.0
    seconds: float = 0.0

    def metrics(self) -> dict[str, float]:
        """The `search_*` values that are logged."""
        last = [c.scores[-1] for c in self.candidates if c.scores]
        logged = {
            "search_level": self.level + 1,
            "search_step_equivalents": self.step_equivalents,
            "search_seconds": self.seconds,
        }
        if last:
            chosen = next(c for c in self.candidates if c.chosen)
            logged |= {
                "search_best_score": chosen.scores[-1],
                "search_deterministic_score": self.candidates[0].scores[-1],
                "search_spread": max(last) - min(last),
                "search_chosen": chosen.index,
            }
        return logged

    def table(self) -> str:
        """The candidates as text, one a line, best last score first."""
        rungs = max(len(c.scores) for c in self.candidates)
        header = ["#", "proposal", "overlap", *(f"rung {i + 1}" for i in range(rungs)), "steps", ""]
        ranked = sorted(self.candidates, key=lambda c: (-len(c.scores), c.scores[-1] if c.scores else 0, c.index))
        rows = [
            [c.index, c.proposal, f"{c.overlap:.3f}", *(f"{s:.4f}" for s in c.scores), *[""] * (rungs - len(c.scores))]
            + [c.steps, "<- chosen" if c.chosen else ""]
            for c in ranked
        ]
        return text_table(header, rows)


def halving_rungs(candidates: int, first_steps: int, longest: int) -> list[tuple[int, int]]:
    """(candidates, steps) of each rung: the better half goes on with twice the steps, until two have met or trials
    are `longest` steps long. Every trial of a rung starts afresh and has the same budget.

    >>> halving_rungs(8, 40, 240)
    [(8, 40), (4, 80), (2, 160)]
    """
    rungs = [(candidates, min(first_steps, longest))]
    while rungs[-1][0] > 2 and rungs[-1][1] < longest:
        count, steps = (rungs[-1][0] + 1) // 2, min(2 * rungs[-1][1], longest)
        rungs.append((count, steps))
    return rungs


def survivors(candidates: list[Candidate], count: int) -> list[Candidate]:
    """The `count` best by last score, ties by index; candidate 0 is always among them, so that the winner has been
    compared with the deterministic mask at the longest trial."""
    ranked = sorted(candidates, key=lambda c: c.rank)[:count]
    if all(c.index for c in ranked):
        ranked[-1] = candidates[0]
    return sorted(ranked, key=lambda c: c.index)


def read_searches(path: Path) -> list[LevelSearch]:
    """What `MaskSearch.write` wrote.

    Raises:
        ValueError: the file is no such table.
    """
    try:
        told = json.loads(path.read_text())
        if not all(type(e[key]) is int for e in told for key in ("level", "step")):
            raise ValueError("levels and steps are whole numbers")
        return [LevelSearch(**{**e, "candidates": [Candidate(**c) for c in e["candidates"]]}) for e in told]
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{path} is damaged ({error}): delete it, and the searches it tells of are left out of the totals"
        ) from error


class MaskSearch:
    """Chooses the masks of a level and writes down why.

    The candidates' masks wait on disk (packed, in a folder `_search-*` of `output_dir`), so that a search needs no
    more memory than one copy of the trained weights and one trial optimizer.
    """

    def __init__(
        self,
        config: PruningConfig,
        bench: TrialBench,
        method: HardMasks,
        criteria: dict[str, Criterion],
        journal: Journal,
        quiet: bool,
    ) -> None:
        self._config, self._bench, self._method, self._criteria = config, bench, method, criteria
        self._journal, self._quiet = journal, quiet
        self.history: list[LevelSearch] = []

    def pool(self) -> list[Proposal]:
        """The proposals of every level; those of a soft method are its own mask and random neighbours."""
        config = self._config
        if config.soft:
            others = itertools.islice(itertools.cycle(config.sampling_ratios), config.num_candidates - 1)
            return [Proposal(config.method, config.scope), *(Proposal(config.method, config.scope, r) for r in others)]
        return proposal_pool(
            config.proposals,
            "score_fn" if "score_fn" in self._criteria else config.criterion,
            config.scope,
            config.num_candidates,
            config.sampling_ratios,
            self._criteria,
            layer_only=config.pattern != "unstructured",
        )

    def needs(self) -> set[str]:
        """Which gradient statistics the proposals read."""
        return set() if self._config.soft else gradient_needs(self.pool(), self._criteria)

    def rungs(self, plan: LevelPlan, level: int) -> list[tuple[int, int]]:
        """(candidates, steps) of each rung at a level; empty when nothing is chosen."""
        config = self._config
        if not config.searches:
            return []
        if config.selection == "early":
            steps = config.trial_steps or min(self._bench.steps_per_epoch(), plan.length(level))
            return [(config.num_candidates, steps)]
        first = config.trial_steps or -(-plan.length(level) // 3)
        return halving_rungs(config.num_candidates, first, max(plan.length(level), first))

    def choose(self, level: int, plan: LevelPlan, step: int) -> MaskSet:
        """The masks of `level`, found from the model as it stands."""
        start = time.monotonic()
        done = LevelSearch(level, plan.levels[level], step, [])
        Path(self._config.output_dir).mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=_FOLDER, dir=self._config.output_dir) as folder:
            self._folder = Path(folder)
            self._draw(done)
            if len(done.candidates) > 1:
                with self._bench.untouched():
                    self._race(done, plan)
            else:
                done.candidates[0].chosen = True
            masks = self._load(next(c for c in done.candidates if c.chosen))
        done.seconds = round(time.monotonic() - start, 2)
        self.history.append(done)
        return masks

    def _draw(self, search: LevelSearch) -> None:
        """Make every candidate's masks and put them on disk; a mask that was already drawn is not tried twice."""
        config, method = self._config, self._method
        needs = self.needs() if config.criterion_batches else set()
        stats = None
        if needs:
            stats = self._bench.gradient_stats(needs, search.level)
            rows = config.criterion_batches * config.criterion_batch_size
            search.step_equivalents += rows / self._bench.rows_per_step()
        masks, first = method.masks, None
        for index, proposal in enumerate(self.pool()):
            if config.soft:
                drawn = method.candidate(proposal.ratio, key_seed(config.seed, "votes", search.level, index))
            else:
                drawn = propose(
                    proposal,
                    index,
                    weights=method.weights,
                    stats=stats,
                    masks=masks,
                    sparsity=search.sparsity,
                    level=search.level,
                    seed=config.seed,
                    pattern=config.mask_pattern,
                    criteria=self._criteria,
                )
            first = drawn if first is None else first
            digest = drawn.digest()
            if all(digest != c.digest for c in search.candidates):
                candidate = Candidate(index, str(proposal), proposal.ratio, drawn.overlap(first), digest)
                search.candidates.append(candidate)
                drawn.save(self._path(candidate))

    def _race(self, search: LevelSearch, plan: LevelPlan) -> None:
        config, bench, racing = self._config, self._bench, search.candidates
        early = config.selection == "early"
        rate = config.trial_learning_rate or config.learning_rate * (4 if early else 1)
        evaluations = EARLY_EVALUATIONS if early else 1
        rungs = self.rungs(plan, search.level)
        # Duplicates have left the pool, so a rung may have fewer candidates than planned.
        work = sum(min(count, len(racing)) * steps for count, steps in rungs)
        bar = tqdm(
            total=work,
            desc=f"mask search, level {search.level + 1}/{len(plan.levels)}",
            leave=False,
            disable=self._quiet,
        )
        self._journal.open(bench.fingerprint(search.level))
        with bar:
            for count, steps in rungs:
                if len(racing) > count:
                    racing = survivors(racing, count)
                for candidate in racing:
                    bar.set_postfix_str(candidate.proposal)
                    marks = min(evaluations, steps)
                    score = self._journal.find(candidate.digest, steps)
                    if score is None:
                        load = functools.partial(self._load, candidate)
                        score = bench.trial(load, steps, rate, search.level, marks, bar)
                        self._journal.add(candidate.digest, steps, score)
                    else:
                        bar.update(steps)
                    candidate.scores.append(score)
                    candidate.steps += steps
                    search.step_equivalents += steps + marks * bench.steps_of_score()
        min(racing, key=lambda c: c.rank).chosen = True

    def _path(self, candidate: Candidate) -> Path:
        return self._folder / f"candidate-{candidate.index}.safetensors"

    def _load(self, candidate: Candidate) -> MaskSet:
        return MaskSet.load(self._path(candidate))[0]

    def write(self, folder: str | os.PathLike | None = None) -> None:
        """Keep the tables of all levels in `search.json` of a folder, by default `output_dir`."""
        path = Path(self._config.output_dir if folder is None else folder) / SEARCH_FILE
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as temporary:
            temporary.write_text(json.dumps([asdict(search) for search in self.history], indent=1))

    def clean(self, anew: bool) -> None:
        """Remove the masks that a killed run left waiting, and the tables of an earlier run where a new one begins."""
        if anew:
            (Path(self._config.output_dir) / SEARCH_FILE).unlink(missing_ok=True)
        for folder in Path(self._config.output_dir).glob(f"{_FOLDER}*"):
            if folder.is_dir():
                shutil.rmtree(folder)

    def recall(self, step: int, checkpoint: str | os.PathLike) -> None:
        """Take up the tables written before optimizer step `step` of a run that is being resumed.

        Raises:
            ValueError: the file is no such table.
        """
        path = Path(checkpoint) / SEARCH_FILE
        if path.is_file():
            self.history = [search for search in read_searches(path) if search.step < step]

    def summary(self, main_steps: int) -> dict[str, float]:
        """Whole cost: `search_step_equivalents`, `search_seconds`, and `search_cost_ratio` to the main training
        steps."""
        steps = sum(s.step_equivalents for s in self.history)
        return {
            "search_step_equivalents": round(steps, 1),
            "search_seconds": round(sum(s.seconds for s in self.history), 1),
            "search_cost_ratio": round(steps / max(main_steps, 1), 3),
        }
