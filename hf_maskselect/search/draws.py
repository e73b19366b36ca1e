"""The masks of the candidates of one level: drawn, shared among processes, and kept on disk until one is chosen."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from ..masking.maskset import MaskSet
from ..masking.proposals import propose
from ..masking.scores import Criterion, GradientStats, StoredStats
from ..utils.processes import deal, deal_to_holders
from ..utils.seeds import key_seed
from .bench import TrialBench
from .pool import candidate_pool, statistics_needed
from .results import Candidate, LevelSearch
from .sharing import Holders, Team


class CandidateMasks:
    """Draws the masks of a level from the model as it is when the search begins.

    Each process draws its share and writes it, packed, into a folder; only digests are exchanged. A process that
    needs a mask which another one has drawn draws it again. `draw` writes the candidates and the cost of gradient
    samples into `record`.
    """

    def __init__(
        self, bench: TrialBench, criteria: Mapping[str, Criterion], team: Team, folder: Path, record: LevelSearch
    ) -> None:
        self._bench, self._criteria, self._team, self._processes = bench, criteria, team, team.processes
        self._config, self._folder, self._record = bench.trainer.args, folder, record
        self._pool = candidate_pool(self._config, criteria)
        self._stats: GradientStats | StoredStats | None = None
        self._holders: dict[int, set[int]] = {index: set() for index in range(len(self._pool))}  # ranks, by candidate

    def draw(self) -> None:
        """Draw every candidate; leave out a mask that an earlier candidate has already."""
        count, rank, racing = self._processes.count, self._processes.rank, self._record.candidates
        first = self._team.each(self._draw_first)
        self._processes.agree(first.digests, f"the masks drawn for level {self._record.level + 1}")
        # Every process has drawn candidate 0, which the others are compared with.
        mine = [i for i in range(len(self._pool)) if i == 0 or i % count == rank]
        shares = self._processes.together(lambda: self._draw_share(mine, first))
        if isinstance(self._stats, GradientStats):  # they need memory, and no mask is drawn again
            self._stats = None
        for rank, share in enumerate(shares):
            for candidate in share:
                self._holders[candidate.index].add(rank)
        for candidate in sorted((c for share in shares for c in share), key=lambda c: c.index):
            if all(candidate.digest != other.digest for other in racing):
                racing.append(candidate)

    def _draw_first(self) -> MaskSet:
        """Make the gradient samples that the pool needs, except those of a soft method, and draw candidate 0."""
        config, bench = self._config, self._bench
        sampled = config.criterion_batches and not bench.settings.soft
        needs = statistics_needed(config, self._criteria) if sampled else set()
        if needs:
            self._stats = stats = bench.gradient_stats(needs, self._record.level)
            if self._processes.count > 1 and len(self._pool) > 1:  # masks may have to be drawn again
                path = self._folder / "statistics.safetensors"
                stats.save(path)
                self._stats = StoredStats(path, config.device)
            self._record.step_equivalents += bench.sampled_rows(needs) / bench.batches.rows_of_training()
        return self._make(0)

    def _draw_share(self, indices: Sequence[int], first: MaskSet) -> list[Candidate]:
        drawn: list[Candidate] = []
        for index in indices:
            masks, proposal = first if index == 0 else self._make(index), self._pool[index]
            candidate = Candidate(index, str(proposal), proposal.ratio, masks.overlap(first), masks.digest())
            if all(candidate.digest != other.digest for other in drawn):
                masks.save(self._path(candidate))
            drawn.append(candidate)
        return drawn

    def _make(self, index: int) -> MaskSet:
        method, record, proposal, seed = self._bench.method, self._record, self._pool[index], self._config.seed
        learned = method.candidate(proposal.ratio, key_seed(seed, "votes", record.level, index))
        if learned is not None:
            return learned
        return propose(
            proposal,
            index,
            weights=method.weights,
            stats=self._stats,
            masks=method.masks,
            sparsity=record.sparsity,
            level=record.level,
            seed=seed,
            pattern=self._bench.settings.pattern,
            criteria=self._criteria,
        )

    def deal(self, candidates: Sequence[Candidate], able: Holders | None) -> list[list[Candidate]]:
        """Return the share of each process, and draw the masks that this process lacks for its own.

        `able` are the processes that can try each candidate; None allows any, and prefers those that hold its mask.
        """
        by_index, count = {c.index: c for c in candidates}, self._processes.count
        work = list(by_index)
        shares = deal(work, self._holders, count) if able is None else deal_to_holders(work, able, count)
        dealt = [[by_index[index] for index in share] for share in shares]
        self._team.each(lambda: self._hold(dealt[self._processes.rank]))  # now, since trials change the model
        for rank, share in enumerate(shares):
            for index in share:
                self._holders[index].add(rank)
        return dealt

    def take(self, winner: Candidate) -> MaskSet:
        """Return the winner's masks, on all processes."""
        self._team.each(lambda: self._hold([winner]))
        return self.load(winner)

    def load(self, candidate: Candidate) -> MaskSet:
        """Return masks that this process holds."""
        return MaskSet.load(self._path(candidate))[0]

    def _hold(self, candidates: Sequence[Candidate]) -> None:
        """Draw the masks of `candidates` that this process has not drawn before.

        Raises:
            RuntimeError: a mask is not the one that another process drew.
        """
        for candidate in candidates:
            if self._path(candidate).is_file():
                continue
            masks = self._make(candidate.index)
            if masks.digest() != candidate.digest:
                raise RuntimeError(
                    f"candidate {candidate.index} of level {self._record.level + 1} is another mask on rank "
                    f"{self._processes.rank} than on rank {min(self._holders[candidate.index])}: start all ranks on "
                    "the same kind of device, with the same number of threads"
                )
            masks.save(self._path(candidate))

    def _path(self, candidate: Candidate) -> Path:
        return self._folder / f"candidate-{candidate.index}.safetensors"
