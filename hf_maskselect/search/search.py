"""Which candidate: proposals, trials and the race between them ("mask candidate selection strategy" and "early mask
evaluation pipeline" of arXiv 2310.13183, with successive halving beside the paper's single trial)."""

from __future__ import annotations

import functools
import hashlib
import json
import math
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TypeVar

from tqdm.auto import tqdm
from transformers.utils import logging

from ..config import PruningConfig
from ..masking.maskset import MaskSet
from ..masking.proposals import Proposal, propose
from ..masking.schedule import LevelPlan
from ..masking.scores import Criterion, GradientStats, StoredStats
from ..methods.base import Method
from ..surgery.refit import Refit
from ..utils.files import replacing
from ..utils.processes import Processes, deal, deal_to_holders
from ..utils.seeds import key_seed
from .bench import EARLY_EVALUATIONS, Trial, TrialBench
from .best_fit import BestFit, errors_of
from .journal import Journal
from .pool import candidate_pool, statistics_needed
from .results import SEARCH_FILE, Candidate, LevelSearch, read_searches
from .schedule import search_rungs, survivors
from .weight_files import Survivors

T = TypeVar("T")
logger = logging.get_logger(__name__)
_FOLDER = "_search-"  # of the masks that wait; and a random ending
_STATS = "statistics.safetensors"


class MaskSearch:
    """Chooses the masks of a level and writes down why.

    The candidates' masks wait on disk (packed, in a folder `_search-*` of `output_dir`; where masks are compared as
    they are fitted, the weights of the best fit so far beside them), so that a search needs no more memory than one
    copy of the trained weights and one trial optimizer, or the activations of a fit. Of several ranks each draws and
    tries its share; only digests and scores are exchanged (and the winner's weights, where survivors race or matrices
    are fitted), and a rank that needs a mask which another one drew draws it again.
    """

    def __init__(
        self,
        config: PruningConfig,
        bench: TrialBench,
        method: Method,
        criteria: dict[str, Criterion],
        journal: Journal,
        ranks: Processes,
        quiet: bool,
    ) -> None:
        self.settings = config.resolved()
        self._config, self._bench, self._method, self._criteria = config, bench, method, criteria
        self._journal, self._ranks, self._quiet = journal, ranks, quiet
        self._survivors = Survivors(config.output_dir) if config.selection == "survivors" else None
        self.history: list[LevelSearch] = []
        self.adopted: float | None = None  # score of the weights that the last choice put into the model
        self._fits: bool | None = None  # whether any matrix can be fitted, once it is known
        # Of the search at hand: where its masks wait, what it draws from, which ranks have drawn which candidate, and
        # the fit of the best one tried here.
        self._folder = Path()
        self._pool: list[Proposal] = []
        self._stats: StoredStats | None = None
        self._holders: dict[int, set[int]] = {}
        self._best_fit = BestFit(self._folder)

    def needs(self) -> set[str]:
        """`statistics_needed` of this run."""
        return statistics_needed(self._config, self._criteria)

    def rungs(self, plan: LevelPlan, level: int) -> list[tuple[int, int]]:
        """`search_rungs` of this run."""
        if not self.settings.searches:
            return []
        if self._fits is None:
            self._fits = self.settings.scores_after_refit and self._bench.steps_of_refit(level) > 0
        return search_rungs(self._config, plan, level, self._bench.steps_per_epoch(), self._fits)

    def choose(self, level: int, plan: LevelPlan, step: int) -> MaskSet:
        """The masks of `level`, found from the model as it stands; all ranks must call it together.

        Raises:
            RuntimeError: the ranks came to different masks, or one of them failed.
        """
        start, self.adopted = time.monotonic(), None
        done = LevelSearch(level, plan.levels[level], step, [])
        Path(self._config.output_dir).mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=_FOLDER, dir=self._config.output_dir) as folder:
            self._folder = Path(folder)
            self._best_fit = BestFit(self._folder)
            self._draw(done)
            if len(done.candidates) > 1:
                self._race(done, plan)
            else:
                done.candidates[0].chosen = True
            chosen = next(c for c in done.candidates if c.chosen)
            self._together(lambda: self._hold([chosen], done))
            masks = self._load(chosen)
            adopts = chosen.steps > 0 and self._config.selection == "survivors"
            if not (adopts and self._adopt(chosen)) and self.settings.refit_rows:
                self._cut(chosen, masks, done)
        self._ranks.agree(masks.digests, f"the masks of level {level + 1}")
        done.seconds = round(time.monotonic() - start, 2)
        self.history.append(done)
        return masks

    def _adopt(self, chosen: Candidate) -> bool:
        """The run goes on from the weights that the winner has trained, unless even these have diverged; whether it
        does."""
        if math.isnan(chosen.scores[-1]):
            return False
        survivors, ranks, digest = self._survivors, self._ranks, chosen.digest
        trained = ranks.together(lambda: max(survivors.scores(digest), default=0))
        if chosen.steps not in trained:
            raise RuntimeError(survivors.gone(chosen.index))
        source = trained.index(chosen.steps)
        weights = self._together(lambda: survivors.load(digest) if ranks.rank == source else None)
        self._bench.put(ranks.share(weights, source))
        self.adopted = chosen.scores[-1]
        return True

    def _cut(self, chosen: Candidate, masks: MaskSet, search: LevelSearch) -> None:
        """Prune the model by the chosen masks and refit what they keep; all ranks get the weights of one. A candidate
        that was compared as it was fitted is not fitted again, unless a search that was killed had done it: on rank 0,
        whose fit is that of the rank which tried it, as their masks are, on devices of the same kind."""
        bench, method, ranks = self._bench, self._method, self._ranks
        compared = bool(chosen.scores) and chosen.steps == 0
        fits = ranks.together(lambda: self._best_fit.find(chosen.index)) if compared else [None]
        source = next((rank for rank, fit in enumerate(fits) if fit is not None), None)
        if source is None:

            def cut() -> Refit:
                before = {name: weight.detach().clone() for name, weight in method.weights.items()}
                method.set_masks(masks)
                return bench.refit(before, search.level)

            done = self._together(cut)
            bench.put(ranks.share(bench.refitted(done) if ranks.rank == 0 else None, 0))
            errors = errors_of(done)
        else:
            method.set_masks(masks)
            weights = self._together(lambda: self._best_fit.load() if ranks.rank == source else None)
            bench.put(ranks.share(weights, source))
            errors = fits[source]
        if errors.matrices:
            search.cut_error, search.refit_error = errors.cut, errors.fitted
        if not compared:
            search.step_equivalents += bench.steps_of_refit(search.level)
        left = len(method.weights) - errors.matrices
        if left and self._ranks.rank == 0:
            logger.warning_once(
                f"{left} of {len(method.weights)} matrices stay as they were cut: refit_rows fits linear layers that "
                "are used once a pass, see at least twice as many tokens as an output keeps weights, and become better"
            )

    def _together(self, work: Callable[[], T]) -> T:
        """This rank's result of what every rank does; an error of one stops all. With sharded weights the work is a
        collective itself, in which nobody can wait for another's error."""
        if self._method.shards is not None:
            return work()
        result: list[T] = []
        self._ranks.together(lambda: result.append(work()))
        return result[0]

    def _on_first(self, work: Callable[[], T]) -> T:
        """Rank 0's result of what it does alone."""
        return self._ranks.together(work if self._ranks.rank == 0 else lambda: None)[0]

    def _draw(self, search: LevelSearch) -> None:
        """Make every candidate's masks and put them on disk; a mask that was already drawn is not tried twice."""
        config, ranks = self._config, self._ranks
        needs = self.needs() if config.criterion_batches else set()
        self._pool, self._stats, before = candidate_pool(config, self._criteria), None, self._method.masks

        def draw_first() -> tuple[GradientStats | StoredStats | None, MaskSet]:
            stats = self._bench.gradient_stats(needs, search.level) if needs else None
            if needs and ranks.count > 1 and len(self._pool) > 1:  # asked for again, perhaps
                stats.save(self._folder / _STATS)
                self._stats = stats = StoredStats(self._folder / _STATS, self._bench.device)
            return stats, self._make(0, search, stats, before)

        stats, first = self._together(draw_first)
        if needs:
            rows = config.criterion_batches * config.criterion_batch_size
            search.step_equivalents += rows / self._bench.rows_of_training()
        ranks.agree(first.digests, f"the masks drawn for level {search.level + 1}")
        # Every rank has drawn candidate 0, which the others are compared with.
        mine = [i for i in range(len(self._pool)) if i == 0 or i % ranks.count == ranks.rank]

        def draw() -> list[Candidate]:
            drawn = []
            for index in mine:
                masks = first if index == 0 else self._make(index, search, stats, before)
                proposal = self._pool[index]
                candidate = Candidate(index, str(proposal), proposal.ratio, masks.overlap(first), masks.digest())
                if all(candidate.digest != other.digest for other in drawn):
                    masks.save(self._path(candidate))
                drawn.append(candidate)
            return drawn

        drawn = ranks.together(draw)
        self._holders = {index: set() for index in range(len(self._pool))}
        for rank, share in enumerate(drawn):
            for candidate in share:
                self._holders[candidate.index].add(rank)
        for candidate in sorted((c for share in drawn for c in share), key=lambda c: c.index):
            if all(candidate.digest != other.digest for other in search.candidates):
                search.candidates.append(candidate)

    def _make(
        self, index: int, search: LevelSearch, stats: GradientStats | StoredStats | None, before: MaskSet
    ) -> MaskSet:
        """A candidate's masks, from the model as it was when the search began; before: the masks in force then."""
        config, method, proposal = self._config, self._method, self._pool[index]
        if self.settings.soft:
            return method.candidate(proposal.ratio, key_seed(config.seed, "votes", search.level, index))
        return propose(
            proposal,
            index,
            weights=method.weights,
            stats=stats,
            masks=before,
            sparsity=search.sparsity,
            level=search.level,
            seed=config.seed,
            pattern=self.settings.pattern,
            criteria=self._criteria,
        )

    def _hold(self, candidates: Sequence[Candidate], search: LevelSearch) -> None:
        """Draw the masks of `candidates` that this rank has not drawn before.

        Raises:
            RuntimeError: they are not those that another rank drew.
        """
        missing = [candidate for candidate in candidates if not self._path(candidate).is_file()]
        if missing:
            before = self._method.masks
            for candidate in missing:
                masks = self._make(candidate.index, search, self._stats, before)
                if masks.digest() != candidate.digest:
                    other = min(self._holders[candidate.index])
                    raise RuntimeError(
                        f"candidate {candidate.index} of level {search.level + 1} is another mask on rank "
                        f"{self._ranks.rank} than on rank {other}: start all ranks on the same kind of device, with "
                        "the same number of threads"
                    )
                masks.save(self._path(candidate))

    def _race(self, search: LevelSearch, plan: LevelPlan) -> None:
        config, bench, racing = self._config, self._bench, search.candidates
        early = config.selection == "early"
        rate = config.trial_learning_rate or bench.peak_rate * (4 if early else 1)
        rungs = self.rungs(plan, search.level)
        steps_of_fit = bench.steps_of_refit(search.level) if self.settings.refit_rows else 0.0
        # Duplicates have left the pool, so a rung may have fewer candidates than planned.
        work = sum(min(count, len(racing)) * max(steps, 1) for count, steps in rungs)
        bar = tqdm(
            total=work,
            desc=f"mask search, level {search.level + 1}/{len(plan.levels)}",
            leave=False,
            disable=self._quiet,
        )
        if self._survivors is None:
            self._on_first(lambda: self._journal.open(bench.fingerprint(search.level)))
        else:
            told = f"{bench.fingerprint(search.level)} {rungs}"
            key = self._on_first(lambda: hashlib.sha256(told.encode()).hexdigest())
            self._ranks.together(lambda: self._survivors.open(key))
        with bar:
            for count, steps in rungs:
                if len(racing) > count:
                    racing = survivors(racing, count)
                marks = min(EARLY_EVALUATIONS if early else 1, max(steps, 1))
                before = 0 if self._survivors is None else racing[0].steps
                scores = self._try_all(racing, search, Trial(steps, rate, marks, before), bar)
                for candidate in racing:
                    candidate.scores.append(scores[candidate.index])
                    candidate.steps += steps
                    trained = steps * bench.rows_per_step() / bench.rows_of_training()
                    refitted = steps_of_fit if before == 0 else 0.0
                    search.step_equivalents += refitted + trained + marks * bench.steps_of_score()
        if not any(len(done.candidates) > 1 for done in self.history):  # the first race
            search.step_equivalents += bench.steps_of_teaching()
        min(racing, key=lambda c: c.rank).chosen = True

    def _try_all(self, racing: Sequence[Candidate], search: LevelSearch, trial: Trial, bar: tqdm) -> dict[int, float]:
        """Scores by index. The trials that no earlier run has finished are dealt out anew among the ranks, which tell
        each other after every one, so that rank 0 can write it down."""
        bench, journal, ranks, kept = self._bench, self._journal, self._ranks, self._survivors
        length = trial.before + trial.steps
        by_index = {c.index: c for c in racing}
        if kept is None:
            known = self._on_first(lambda: {c.index: journal.find(c.digest, trial.steps) for c in racing})
        else:
            told = ranks.together(lambda: {c.index: kept.scores(c.digest) for c in racing})
            known = {i: next((of[i][length] for of in told if length in of[i]), None) for i in by_index}
        scores = {index: score for index, score in known.items() if score is not None}
        bar.update(trial.ticks * len(scores))
        work = [index for index in by_index if index not in scores]
        if trial.before:  # who has its weights goes on with it
            able = {i: [rank for rank, of in enumerate(told) if max(of[i], default=0) == trial.before] for i in work}
            if gone := [i for i in work if not able[i]]:
                raise RuntimeError(kept.gone(gone[0]))
            shares = deal_to_holders(work, able, ranks.count)
        else:
            shares = deal(work, self._holders, ranks.count)
        mine = [by_index[index] for index in shares[ranks.rank]]
        self._together(lambda: self._hold(mine, search))  # before the model is changed
        for rank, share in enumerate(shares):
            for index in share:
                self._holders[index].add(rank)

        def next_trial() -> tuple[int, float] | None:
            if not mine:
                return None
            candidate = mine.pop(0)
            bar.set_postfix_str(candidate.proposal)
            masks = self._path(candidate)
            load_start = functools.partial(kept.load, candidate.digest) if trial.before else None
            score = bench.trial(lambda: MaskSet.load(masks)[0], trial, search.level, bar, load_start)
            if kept is not None:
                so_far = kept.scores(candidate.digest) if trial.before else {}
                kept.keep(candidate.digest, {**so_far, length: score}, bench.trained())
            elif not trial.steps and bench.fit is not None:
                self._best_fit.offer(candidate.index, score, bench.fit, bench.refitted(bench.fit))
            return candidate.index, score

        with bench.untouched():
            for _ in range(max(map(len, shares))):
                finished = [pair for pair in ranks.together(next_trial) if pair is not None]
                scores |= dict(finished)
                others = [index for index, _ in finished if index not in shares[ranks.rank]]
                bar.update(trial.ticks * len(others))
                found = {by_index[index].digest: score for index, score in finished}
                if kept is None:
                    self._on_first(lambda found=found: journal.add(found, trial.steps))
        return scores

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
        """Remove the masks that a killed run left waiting, and the tables of an earlier trainer where a new run
        begins."""
        if anew:
            (Path(self._config.output_dir) / SEARCH_FILE).unlink(missing_ok=True)
        if self.history:  # the same model is trained once more
            self.write()
        for folder in Path(self._config.output_dir).glob(f"{_FOLDER}*"):
            if folder.is_dir():
                shutil.rmtree(folder)

    def forget(self) -> None:
        """Remove what a killed run would need: the run is over. Every rank must call it."""
        if self._ranks.rank == 0:
            self._journal.forget()
        Survivors(self._config.output_dir).forget()  # also those of a killed run with another selection

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
