"""Read the texts of a file."""

import os
from pathlib import Path

from datasets import Dataset, Value, load_dataset

_KINDS = {".parquet": "parquet", ".jsonl": "json", ".json": "json", ".txt": "text"}


def text_rows(path: str | os.PathLike, remedy: str = "give the texts of your task") -> Dataset:
    """Open a file and return its columns of text: .txt (a text a line), .jsonl or .parquet.

    remedy: end of the messages.

    Raises:
        ValueError: the file cannot be read, or holds no text.
    """
    kind = _KINDS.get(Path(path).suffix)
    if not Path(path).is_file():
        raise ValueError(f"there is no file {path}: {remedy}")
    if kind is None:
        raise ValueError(f"{path} is no .txt, .parquet or .jsonl file: {remedy}")
    try:
        rows = load_dataset(kind, data_files=str(path), split="train")
    except (OSError, ValueError, RuntimeError) as error:
        raise ValueError(f"{path} cannot be read ({str(error).splitlines()[0]}): {remedy}") from error
    texts = [name for name, column in rows.features.items() if column == Value("string")]
    if not texts:
        raise ValueError(f"{path} has no columns of text: {remedy}")
    return rows.select_columns(texts)
