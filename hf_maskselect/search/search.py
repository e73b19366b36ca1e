"""The choice of a level's masks: draw candidates, race them, keep the winner, refit what it keeps.

"Mask candidate selection strategy" and "early mask evaluation pipeline" of arXiv 2310.13183, and successive halving.
"""

import math
import os
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor
from tqdm.auto import tqdm
from transformers.utils import logging

from ..masking.dtensors import local_rows
from ..masking.maskset import MaskSet
from ..masking.schedule import LevelPlan
from ..masking.scores import Criterion, WeightStats, checked_score
from ..surgery.refit import Refit
from ..utils.folders import remove
from ..utils.processes import Processes
from .bench import DENSE_COST, EARLY_EVALUATIONS, REFIT_COST, Trial, TrialBench
from .continued import ContinuedTrials
from .draws import CandidateMasks
from .identity import key_of
from .journal import Journal, journaled
from .pool import criterion_of, statistics_needed
from .race import ScoreAll, race
from .results import SEARCH_FILE, Candidate, LevelSearch, read_searches, write_searches
from .schedule import search_rungs
from .sharing import Team, Trials, shared_trials
from .weight_files import BestRefit, RefitErrors

logger = logging.get_logger(__name__)
_FOLDER = "_search-"  # of the masks that wait; a random ending follows


class MaskSearch:
    """Chooses the masks of each level and records why.

    A search needs no more memory than one copy of the trained weights, the uncut model's outputs that refits aim at
    (`DenseOutputs`), and one trial optimizer or the activations of a refit: masks wait on disk, in a folder
    `_search-*` of `output_dir`. Processes exchange digests and scores, and the winner's weights where candidates go on
    from trained weights or matrices are refitted.

    Args:
        bench: tries masks on the trainer's model.
        criteria: scores by name.
        processes: those of the run.
        quiet: whether to show no progress bar.
    """

    def __init__(
        self, bench: TrialBench, criteria: Mapping[str, Criterion], processes: Processes, quiet: bool
    ) -> None:
        self._config, self._settings, self._bench, self._criteria = bench.trainer.args, bench.settings, bench, criteria
        self._output_dir, self._quiet = Path(self._config.output_dir or ""), quiet
        self._team = Team(processes, bench.method)
        self._journal, self._continued = Journal(self._output_dir), ContinuedTrials(self._output_dir, self._team)
        self._continues = self._config.selection == "survivors"
        self.history: list[LevelSearch] = []
        # Time and cost of `begin_soft_phase`, until the record of its level has them.
        self._seconds_before = self._steps_before = 0.0
        self.adopted: float | None = None  # score of the trained weights that the last choice put into the model
        self._refits: bool | None = None  # whether any matrix can be refitted; None until it is tried

    def rungs(self, plan: LevelPlan, level: int) -> list[tuple[int, int]]:
        """Return `search_rungs` of this run."""
        if not self._settings.searches:
            return []
        if self._refits is None:
            self._refits = self._settings.scores_after_refit and self._bench.steps_of_refit(level) > 0
        return search_rungs(self._config, plan, level, self._bench.batches.steps_per_epoch(), self._refits)

    @property
    def criterion(self) -> str:
        """The criterion of candidate 0, or the one that a soft phase starts from."""
        return criterion_of(self._config, self._criteria)

    def begin_soft_phase(self) -> dict[str, float]:
        """Score all weights for a soft method, and fit the model to the mask that its soft phase begins with.

        Either happens only where the run asks for it. All processes must call it together.

        Returns:
            the errors of the fit, to be logged; empty without one.

        Raises:
            RuntimeError: the processes came to different scores or masks, or one of them failed.
        """
        start, errors = time.monotonic(), {}
        if self._settings.criterion != "magnitude":
            self._take_scores()
        if self._settings.fits_start:
            errors = self._fit()
        self._seconds_before, self._steps_before = time.monotonic() - start, self._steps_of_start()
        return errors

    def _steps_of_start(self) -> float:
        """Return the cost of the scores and the fit that a soft phase begins with, in training steps."""
        needs = statistics_needed(self._config, self._criteria) if self._config.criterion_batches else set()
        samples = self._bench.sampled_rows(needs) / self._bench.batches.rows_of_training() if needs else 0.0
        if not self._settings.fits_start:
            return samples
        return samples + self._bench.steps_of_refit(0) * (1 + DENSE_COST / REFIT_COST)

    def _take_scores(self) -> None:
        """Let a soft method begin from the scores of the criterion."""
        bench, criterion = self._bench, self._criteria[self.criterion]
        method = bench.method

        def begin() -> dict[str, str]:
            needs = set(criterion.needs) if self._config.criterion_batches else set()
            stats = bench.gradient_stats(needs, level=0) if needs else None

            def score_of(name: str) -> Tensor:
                of_weight = WeightStats(None, None, 0) if stats is None else stats.of(name)
                return checked_score(criterion.score, name, local_rows(method.weights[name].detach()), of_weight)

            return method.take_scores(score_of, criterion.degree)

        digests = self._team.each(begin)
        self._team.processes.agree(lambda: digests, "the scores that the soft phase starts from")

    def _fit(self) -> dict[str, float]:
        """Let a soft method begin from the model that is refitted under the mask it would end with now."""
        method = self._bench.method
        masks = self._team.each(lambda: method.candidate(None, 0))
        assert masks is not None
        self._team.processes.agree(masks.digests, "the masks that the soft phase starts from")
        before, errors = self._cut_and_refit(lambda: masks.apply_(method.weights), level=0)
        self._team.each(lambda: method.take_fit(before, masks))
        self._warn_of_others(errors, "; soft_ramp lets the sparsity rise where no layer can be refitted")
        return {"soft_cut_error": errors.cut, "soft_fit_error": errors.refit} if errors.matrices else {}

    def choose(self, level: int, plan: LevelPlan, step: int) -> tuple[MaskSet, LevelSearch]:
        """Choose the masks of `level` from the model as it is; all processes must call it together.

        Returns:
            the masks, and the record, which belongs into `history` as soon as the masks are in force.

        Raises:
            RuntimeError: the processes came to different masks, or one of them failed.
        """
        start, self.adopted = time.monotonic(), None
        record = LevelSearch(level, plan.levels[level], step, [])
        self._output_dir.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=_FOLDER, dir=self._output_dir) as name, self._bench.shared_dense():
            folder = Path(name)
            candidates = CandidateMasks(self._bench, self._criteria, self._team, folder, record)
            best_refit = BestRefit(folder)
            candidates.draw()
            if self._settings.soft:  # also in a run that was resumed since its soft phase began
                record.step_equivalents += self._steps_before or self._steps_of_start()
            winner = record.candidates[0]
            if len(record.candidates) > 1:
                winner = self._race(record, plan, candidates, best_refit)
            winner.chosen = True
            masks = candidates.take(winner)
            if not self._adopt(winner) and self._settings.refits_cuts:
                self._refit(winner, masks, record, best_refit)
        self._team.processes.agree(masks.digests, f"the masks of level {level + 1}")
        record.seconds = round(time.monotonic() - start + self._seconds_before, 2)
        self._seconds_before = self._steps_before = 0.0
        return masks, record

    def _race(
        self, record: LevelSearch, plan: LevelPlan, candidates: CandidateMasks, best_refit: BestRefit
    ) -> Candidate:
        """Let the candidates race and return the winner."""
        bench, level, rungs = self._bench, record.level, self.rungs(plan, record.level)

        def score_one(candidate: Candidate, steps: int) -> float:
            bar.set_postfix_str(candidate.proposal)
            trial = self._trial(candidate, steps)
            start = self._continued.start_of(candidate) if self._continues else None
            score = bench.trial(lambda: candidates.load(candidate), trial, level, bar, start)
            if self._continues:
                self._continued.keep(candidate, steps, score, bench.sandbox.trained())
            elif not steps and bench.last_refit is not None:
                weights = bench.sandbox.of_layers(bench.last_refit.refitted)
                best_refit.offer(candidate.index, score, bench.last_refit, weights)
            return score

        # Fewer than planned may race: equal masks are tried once.
        work = sum(min(count, len(record.candidates)) * max(steps, 1) for count, steps in rungs)
        title = f"mask search, level {level + 1}/{len(plan.levels)}"
        with tqdm(total=work, desc=title, leave=False, disable=self._quiet) as bar:
            trials = shared_trials(self._team, bench.sandbox, candidates.deal, score_one, bar)
            remembered = self._remembered(trials, level, rungs)
            winner = race(record.candidates, rungs, self._counted(remembered, record, bar))
        if not any(len(done.candidates) > 1 for done in self.history):  # the first race
            record.step_equivalents += bench.scorer.steps_of_teaching()
        return winner

    def _trial(self, candidate: Candidate, steps: int) -> Trial:
        config, early = self._config, self._config.selection == "early"
        rate = config.trial_learning_rate or (self._bench.trainer.peak_rate or 0.0) * (4 if early else 1)
        evaluations = min(EARLY_EVALUATIONS if early else 1, max(steps, 1))
        return Trial(steps, rate, evaluations, before=candidate.steps if self._continues else 0)

    def _remembered(self, trials: Trials, level: int, rungs: list[tuple[int, int]]) -> ScoreAll:
        """Wrap `trials` so that those which a killed run has finished are not repeated."""
        first = self._team.first

        def identity() -> dict[str, str]:
            return self._bench.identity.of_search(level, self._criteria)

        if not self._continues:
            first(lambda: self._journal.open(identity()))
            return journaled(trials, self._journal, self._team)
        key = first(lambda: key_of({**identity(), "rungs": str(rungs)}))
        self._team.processes.together(lambda: self._continued.open(key))
        return self._continued.remembered(trials)

    def _counted(self, score_all: ScoreAll, record: LevelSearch, bar: tqdm) -> ScoreAll:
        """Wrap `score_all` so that the record has its cost, and the bar the trials that are not repeated."""
        batches, scorer, done = self._bench.batches, self._bench.scorer, 0
        refit = self._bench.steps_of_refit(record.level) if self._settings.refits_cuts else 0.0

        def counted(candidates: Sequence[Candidate], steps: int) -> Mapping[int, float]:
            nonlocal done
            scores, trial = score_all(candidates, steps), self._trial(candidates[0], steps)
            trained = steps * batches.rows_per_step() / batches.rows_of_training()
            refits = bool(refit) and not trial.before
            dense = refits * refit * DENSE_COST / REFIT_COST  # once for all, unless they train
            cost = refits * refit + dense * (steps > 0) + trained + trial.evaluations * scorer.steps_of_score()
            record.step_equivalents += dense * (steps == 0)
            for _ in candidates:
                record.step_equivalents += cost
            done += max(steps, 1) * len(candidates)
            bar.update(done - bar.n)
            return scores

        return counted

    def _adopt(self, winner: Candidate) -> bool:
        """Load what the winner has trained into the model; return False if there is nothing, or it diverged."""
        if not (self._continues and winner.steps) or math.isnan(winner.scores[-1]):
            return False
        self._bench.sandbox.put(self._continued.winner_weights(winner))
        self.adopted = winner.scores[-1]
        return True

    def _refit(self, winner: Candidate, masks: MaskSet, record: LevelSearch, best_refit: BestRefit) -> None:
        """Prune the model by the winner's masks and refit what they keep; all processes get the weights of one.

        The winner's refit is reused if a process kept it. After a resumed search nobody has it, so rank 0 refits;
        identical devices give the same result.
        """
        method, team = self._bench.method, self._team
        scored_after_refit = bool(winner.scores) and winner.steps == 0
        kept = team.processes.together(lambda: best_refit.find(winner.index)) if scored_after_refit else []
        source, errors = next(((rank, errors) for rank, errors in enumerate(kept) if errors is not None), (0, None))
        if errors is not None:
            method.set_masks(masks)
            self._bench.sandbox.put(team.share(best_refit.load, source))
        else:
            _, errors = self._cut_and_refit(lambda: method.set_masks(masks), record.level)
        self._warn_of_others(errors)
        if errors.matrices:
            record.cut_error, record.refit_error = errors.cut, errors.refit
        if not scored_after_refit:
            record.step_equivalents += self._bench.steps_of_refit(record.level) * (1 + DENSE_COST / REFIT_COST)

    def _cut_and_refit(self, cut: Callable[[], None], level: int) -> tuple[dict[str, Tensor], RefitErrors]:
        """Cut the model and refit it towards its outputs before; all processes get the weights of rank 0.

        Returns:
            the weights before the cut, and the errors.
        """
        bench, team = self._bench, self._team

        def cut_and_refit() -> tuple[dict[str, Tensor], Refit]:
            before = bench.sandbox.copied(bench.method.weights.items())
            with torch.no_grad():
                cut()
            return before, bench.refit(before, level)

        before, done = team.each(cut_and_refit)
        bench.sandbox.put(team.share(lambda: bench.sandbox.of_layers(bench.method.weights), 0))
        return before, RefitErrors.of(done)

    def _warn_of_others(self, errors: RefitErrors, remedy: str = "") -> None:
        """Warn of matrices that were not refitted."""
        others = len(self._bench.method.weights) - errors.matrices
        if others and self._team.processes.rank == 0:
            logger.warning_once(
                f"{others} of {len(self._bench.method.weights)} matrices were not refitted: a refit needs a linear "
                "layer that runs once per forward pass, at least two tokens per kept weight of an output (raise "
                f"refit_rows), and it must lower the error{remedy}"
            )

    # -- the tables --------------------------------------------------------------------------------------------------

    def write(self, folder: str | os.PathLike | None = None) -> None:
        """Write the tables of all levels into `search.json` of a folder, by default of `output_dir`."""
        write_searches(self._output_dir if folder is None else Path(folder), self.history)

    def recall(self, step: int, checkpoint: str | os.PathLike) -> None:
        """Read the tables of a checkpoint: those of searches before optimizer step `step`, where the run resumes.

        Raises:
            ValueError: the file is damaged.
        """
        path = Path(checkpoint) / SEARCH_FILE
        if path.is_file():
            self.history = [search for search in read_searches(path) if search.step < step]

    def clean(self, new_run: bool) -> None:
        """Remove the masks that a killed run has left, and at the start of a new run the tables of an earlier one."""
        if new_run:
            (self._output_dir / SEARCH_FILE).unlink(missing_ok=True)
        if self.history:  # the same trainer trains once more
            self.write()
        for folder in self._output_dir.glob(f"{_FOLDER}*"):
            if folder.is_dir():
                remove(folder)

    def forget(self) -> None:
        """Remove what a killed run would need: the run is over. All processes must call it."""
        if self._team.processes.rank == 0:
            self._journal.forget()
        self._continued.forget()  # also where a killed run had another `selection`

    def summary(self, main_steps: int) -> dict[str, float]:
        """Return the whole cost: `search_step_equivalents`, `search_seconds`, `search_cost_ratio` to the training."""
        steps = sum(search.step_equivalents for search in self.history) + self._steps_before
        seconds = sum(search.seconds for search in self.history) + self._seconds_before
        return {
            "search_step_equivalents": round(steps, 1),
            "search_seconds": round(seconds, 1),
            "search_cost_ratio": round(steps / max(main_steps, 1), 3),
        }
