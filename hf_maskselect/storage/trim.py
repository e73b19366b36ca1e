"""Write a saved model with a smaller vocabulary into another folder."""

import functools
import os
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

from transformers.utils import GENERATION_CONFIG_NAME

from ..surgery.trim_vocabulary import TrimReport, trim_vocabulary
from .derived import beside_model
from .folders import check_output, find_folder
from .models import load_strictly, model_class, own_names
from .state import PruningState
from .tokenizer import load_tokenizer
from .weights import check_unpacked, check_weights, has_weights

# Files of tokenizers that save_pretrained no longer writes, and which would hold the tokens of before.
_OLD_FILES = ("*.model", "vocab.*", "merges.txt", "added_tokens.json", "special_tokens_map.json", "tokenizer*.json")


def trim_folder(
    folder: str | os.PathLike,
    output: str | os.PathLike,
    texts: Iterable[Any],
    *,
    keep: Iterable[str | int] = (),
    check: Iterable[Any] = (),
) -> TrimReport:
    """Trim the vocabulary of a saved model by [`trim_vocabulary`], and write it with its masks into another folder.

    Args:
        folder: a folder or Hub repository, written by `PruningTrainer` or by `save_pretrained`, with its tokenizer.
        output: another folder, created if needed. The card and other files of the model are copied there.
        texts: all texts of the task.
        keep: tokens or ids that stay although no text has them.
        check: a second corpus, for the report.

    Raises:
        ValueError: as `trim_vocabulary`; or there is no such model or tokenizer, the weights were changed after
            pruning, the vocabulary itself is pruned, or `output` holds a model. Nothing is written then.
    """
    folder, output = find_folder(folder), Path(output)
    check_unpacked(folder)
    if has_weights(output):
        check_output(folder, output)
        raise ValueError(f"{output} holds the model to trim: choose another output folder")
    state = PruningState.find(folder)
    if state is not None:
        state.check_saved(folder)
    model = load_strictly(model_class(folder)[0], folder)
    small, tokenizer, report = trim_vocabulary(model, load_tokenizer(folder), texts, keep=keep, check=check)
    for name, mask in state.masks.items() if state is not None else ():
        if small.get_parameter(name).shape != mask.shape:
            raise ValueError(
                f"{name} has a row for each token and is pruned, so its share of zeros would change: "
                "leave it dense with exclude_modules"
            )
    with beside_model(folder, output, functools.cache(lambda: check_weights(new, {}))) as new:
        for pattern in (*_OLD_FILES, GENERATION_CONFIG_NAME):
            for path in new.glob(pattern):
                path.unlink()
        tokenizer.save_pretrained(new)
        with own_names(small):
            small.save_pretrained(new)
        if state is not None:
            replace(state, needs="").sealed(new).save(new)  # a run cannot go on from it
    return report
