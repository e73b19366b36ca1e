"""What a CPU model's files say: how it runs, how fast it was, and what it scored."""

import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..storage.derived import CPU_FILE, CPU_JSON
from ..storage.folders import find_folder
from ..storage.pack import open_packed
from ..utils.layer_names import layer_of
from ..utils.tables import escaped, markdown_table, text_table, visible
from .embeddings import INT8, TIED
from .files import LayerRecord, Runtime, dense_bytes
from .timing import DENSE, ONNX_INT8, OURS

_FEW_BLOCKS = 0.5  # below this share of zero blocks the 1x4 product does not pay
_LOADING = """```python
from hf_maskselect import load_cpu

model = load_cpu("path/or/repository")
```"""


@dataclass(frozen=True)
class CpuReport:
    """What `export_cpu` wrote: the path of the weights, how they run, and the bytes before and after."""

    path: Path
    runtime: Runtime
    dense_bytes: int
    bytes: int

    @classmethod
    def load(cls, path_or_repo: str | os.PathLike) -> "CpuReport":
        """Read the report of a CPU model, from a folder or a Hub repository.

        Raises:
            ValueError: the files are missing, damaged or of another model.
        """
        folder = find_folder(path_or_repo, weights=[CPU_FILE])
        packed, runtime = open_packed(folder, CPU_FILE, "export --format cpu"), Runtime.load(folder)
        runtime.check_weights(packed)
        for name, record in runtime.layers.items():
            record.choice(f"{folder / CPU_JSON}: {name}")
        return cls(packed.path, runtime, dense_bytes(packed), packed.path.stat().st_size)

    def table(self, show: Callable[[Sequence[str], Sequence[Sequence[object]]], str]) -> str:
        """Return the milliseconds at each shape, formatted by `show`; empty if the model was not timed here."""
        names = list(dict.fromkeys(name for time in self.runtime.times for name in time.ms))
        rivals = [name for name in (DENSE, ONNX_INT8) if name in names]
        rows = []
        for time in self.runtime.times:
            shown = {name: f"{median:.2f} ({late:.2f})" for name, (median, late) in time.ms.items()}
            medians = {name: median for name, (median, _) in time.ms.items()}
            times = [
                f"{medians[name] / medians[OURS]:.2f}" if {name, OURS} <= medians.keys() else "-" for name in rivals
            ]
            rows.append([f"{time.batch} x {time.length}", *(shown.get(name, "-") for name in names), *times])
        header = ["batch x length", *names, *(f"than {name}" for name in rivals)]
        return show(header, rows) if names else ""

    def lines(self) -> Iterator[str]:
        """Yield the size, the scores, how the layers run, and where they were timed."""
        runtime = self.runtime
        yield f"{self.bytes / 1e6:,.2f} MB, of {self.dense_bytes / 1e6:,.2f} MB in float32"
        if runtime.scores:
            yield "Scores: " + ", ".join(f"{score:.4f} ({name})" for name, score in runtime.scores.items())
        if runtime.divergence is not None:
            yield f"Divergence of the outputs from float32 on held-out rows: {runtime.divergence:.2g}"
        for matrices, kinds in layer_kinds(runtime.layers).items():
            yield f"{', '.join(matrices)}: {kinds}"
        yield f"Token embeddings: {self._embeddings}"
        if runtime.fused:
            lengths = f"in bf16 from {runtime.bf16} tokens on" if runtime.bf16 else "in float32"
            yield f"Layers whose matrices all have 8 bits are computed as a whole, with attention {lengths}"
        if runtime.zero_blocks < _FEW_BLOCKS:
            yield (
                f"Only {runtime.zero_blocks:.0%} of the 1x4 blocks of its matrices are zero, so that dense int8 may "
                "be the fastest: prune with pattern='1x4' for more"
            )
        yield f"{self.machine}, torch {runtime.torch}"

    @property
    def _embeddings(self) -> str:
        kinds = self.runtime.embeddings.values()
        if INT8 in kinds:
            return "8 bits, and one scale a token"
        return "float32, since an output head shares them" if TIED in kinds else "float32"

    @property
    def machine(self) -> str:
        """The CPU and the number of threads that the times are of."""
        return f"{self.runtime.cpu}, {self.runtime.threads} thread{'s' * (self.runtime.threads > 1)}"

    def section(self) -> str:
        """Return the text of the section in the model card, in Markdown."""
        lines = "\n".join(f"* {escaped(line)}" for line in self.lines())
        return "\n\n".join([_LOADING, lines, _explained(self.table(markdown_table))])

    def __str__(self) -> str:
        lines = [f"{self.path}: {visible(text)}" if i == 0 else visible(text) for i, text in enumerate(self.lines())]
        return "\n".join([*lines, _explained(self.table(text_table))])


def layer_kinds(layers: dict[str, LayerRecord]) -> dict[tuple[str, ...], str]:
    """Return which products compute which matrices: (names of matrices of a layer) -> kinds.

    Matrices that run alike in equally many layers stand together.
    """
    counts: dict[str, Counter[str]] = {}
    for name, record in layers.items():
        matrix = layer_of(f"{name}.weight")[2].removesuffix(".dense")
        kinds = [str(kind) for _, kind in record.kinds]
        limits = [f" to {limit} tokens" for limit, _ in record.kinds[:-1]]
        text = ", ".join(kind + limit for kind, limit in zip(kinds, [*limits, ""], strict=True))
        counts.setdefault(matrix, Counter())[text] += 1
    groups: dict[str, list[str]] = {}
    for matrix, by_kinds in counts.items():
        alike = "; ".join(f"{text} in {count} layer{'s' * (count > 1)}" for text, count in sorted(by_kinds.items()))
        groups.setdefault(alike, []).append(matrix)
    return {tuple(matrices): text for text, matrices in groups.items()}


def _explained(table: str) -> str:
    if not table:
        return "It was not timed here as a whole: export it again for a table of its speed."
    return f"Milliseconds, median (95th percentile), and how many times faster this model is:\n\n{table}"
