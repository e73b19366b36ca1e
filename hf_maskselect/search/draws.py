"""The masks of the candidates of one level: drawn, shared among processes, and kept on disk until one is chosen."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..config import PruningConfig
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
    needs a mask which another one has drawn draws it again.

    Args:
        folder: the temporary folder of the search.
        record: the search; `draw` writes the candidates and the cost of gradient samples into it.
        config, settings: as given by the user, and resolved.
        bench: makes gradient samples, and knows the method whose masks are in force.
        criteria: scores by name.
        team: the processes.
    """

    def __init__(
        self,
        folder: Path,
        record: LevelSearch,
        config: PruningConfig,
        settings: Any,
        bench: TrialBench,
        criteria: Mapping[str, Criterion],
        team: Team,
    ) -> None:
        self._folder, self._record, self._config, self._settings = folder, record, config, settings
        self._bench, self._method, self._criteria, self._team = bench, bench.method, criteria, team
        self._pool = candidate_pool(config, criteria)
        self._stats: GradientStats | StoredStats | None = None
        self._holders: dict[int, set[int]] = {index: set() for index in range(len(self._pool))}  # ranks, by candidate

    def draw(self) -> None:
        """Draw every candidate once; a mask that an earlier candidate has already is left out."""
        processes, record = self._team.processes, self._record
        first = self._team.each(self._draw_first)
        processes.agree(first.digests, f"the masks drawn for level {record.level + 1}")
        # Every process has drawn candidate 0, which the others are compared with.
        mine = [i for i in range(len(self._pool)) if i == 0 or i % processes.count == processes.rank]
        shares = processes.together(lambda: self._draw_share(mine, first))
        self._stats = self._stats if isinstance(self._stats, StoredStats) else None  # the gradients need memory
        for rank, share in enumerate(shares):
            for candidate in share:
                self._holders[candidate.index].add(rank)
        for candidate in sorted((c for share in shares for c in share), key=lambda c: c.index):
            if all(candidate.digest != other.digest for other in record.candidates):
                record.candidates.append(candidate)

    def _draw_first(self) -> MaskSet:
        """Make the gradient samples that the pool needs, and draw candidate 0."""
        config, bench = self._config, self._bench
        needs = statistics_needed(config, self._criteria) if config.criterion_batches else set()
        if needs:
            self._stats = stats = bench.gradient_stats(needs, self._record.level)
            if self._team.processes.count > 1 and len(self._pool) > 1:  # masks may have to be drawn again
                path = self._folder / "statistics.safetensors"
                stats.save(path)
                self._stats = StoredStats(path, bench.device)
            rows = config.criterion_batches * config.criterion_batch_size
            self._record.step_equivalents += rows / bench.batches.rows_of_training()
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
        config, record, proposal = self._config, self._record, self._pool[index]
        learned = self._method.candidate(proposal.ratio, key_seed(config.seed, "votes", record.level, index))
        if learned is not None:
            return learned
        return propose(
            proposal,
            index,
            weights=self._method.weights,
            stats=self._stats,
            masks=self._method.masks,
            sparsity=record.sparsity,
            level=record.level,
            seed=config.seed,
            pattern=self._settings.mask_pattern,
            criteria=self._criteria,
        )

    def deal(self, candidates: Sequence[Candidate], able: Holders | None = None) -> list[list[Candidate]]:
        """Return the share of each process, and draw the masks that this process lacks for its own.

        Args:
            candidates: those to try.
            able: the processes that can try each; by default any, and those that hold its mask come first.
        """
        by_index, processes = {c.index: c for c in candidates}, self._team.processes
        if able is None:
            shares = deal(list(by_index), self._holders, processes.count)
        else:
            shares = deal_to_holders(list(by_index), able, processes.count)
        mine = [by_index[index] for index in shares[processes.rank]]
        self._team.each(lambda: self._hold(mine))  # now, since trials change the model
        for rank, share in enumerate(shares):
            for index in share:
                self._holders[index].add(rank)
        return [[by_index[index] for index in share] for share in shares]

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
                    f"{self._team.processes.rank} than on rank {min(self._holders[candidate.index])}: start all ranks "
                    "on the same kind of device, with the same number of threads"
                )
            masks.save(self._path(candidate))

    def _path(self, candidate: Candidate) -> Path:
        return self._folder / f"candidate-{candidate.index}.safetensors"
