"""Load the tokenizer of a saved model."""

import os

from transformers import AutoTokenizer, PreTrainedTokenizerBase


def load_tokenizer(folder: str | os.PathLike) -> PreTrainedTokenizerBase:
    """Load the tokenizer that lies in a folder.

    Raises:
        ValueError: there is none. transformers may make one of special tokens only then.
    """
    reason = "only special tokens"
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder)
        if len(tokenizer) > len(tokenizer.all_special_ids):
            return tokenizer
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
    raise ValueError(f"{folder} has no tokenizer ({reason}): copy the files of the model's tokenizer there")
