"""The parts of a model card that tell of a smaller shape instead of zeros."""

from ..surgery.structured.record import StructureRecord
from ..surgery.structured.shapes import told
from ..utils.tables import escaped, markdown_table


def smaller_summary(record: StructureRecord | None, kind: str) -> str:
    """Return the first sentences of the card of a smaller model. `kind`: its task and class."""
    if record is None:
        return f"A dense {kind}: the run of `hf_maskselect` had not made it smaller yet."
    return (
        f"A smaller {kind}: {record.removed:.1%} of the parameters of the layers are gone, and one call is "
        f"**{record.speedup:.2f} times as fast** as that of the dense model ({escaped(record.timed)}). It is an "
        "ordinary model without zeros. Made by `hf_maskselect`."
    )


def shape_table(record: StructureRecord) -> str:
    """Return a table of the dense shape and the new one."""
    dense, small = record.dense, record.shape
    gone = [str(layer) for layer in dense.layers if layer not in small.layers]
    before, after = record.milliseconds
    rows = [
        ["layers", str(len(dense.layers)), str(len(small.layers))],
        ["neurons of a feed-forward part", told(dense.widths), told(small.widths)],
        ["attention heads", told(dense.heads), told(small.heads)],
        ["milliseconds of one call", f"{before:.2f}", f"{after:.2f}"],
    ]
    removed = f"Removed layers, counted from 0: {', '.join(gone)}." if gone else "No layer was removed."
    table = markdown_table(["", "dense", "small"], rows)
    timed = f"Timed at {escaped(record.timed)}. Of several levels, the milliseconds are those of the last."
    return f"{table}\n\n{removed} {timed}"
