"""Texts, and how a tokenizer and its trimmed copy split them."""

import copy
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ..utils.tables import visible

_BATCH = 1000  # texts that are tokenized at a time
_SHORT = 24  # tokens of the texts that are truncated and padded


@dataclass(frozen=True)
class SecondCorpus:
    """How a trimmed tokenizer splits other texts than those that it was trimmed for.

    texts: number of texts; same: how many of them keep their tokens; tokens, unknown: numbers of all and of unknown
    tokens, without special ones, before and after.
    """

    texts: int
    same: int
    tokens: tuple[int, int]
    unknown: tuple[int, int]

    def __str__(self) -> str:
        before, after = (count / self.texts for count in self.tokens)
        return (
            f"second corpus: {self.same / self.texts:.1%} of {self.texts:,} texts keep their tokens; {after:.2f} "
            f"tokens a text instead of {before:.2f}; {self.unknown[1]:,} unknown tokens instead of {self.unknown[0]:,}"
        )


class Reader:
    """Splits texts with a copy of a tokenizer, whose own settings of truncation and padding stay as they are."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = copy.deepcopy(tokenizer)
        self._pads = tokenizer.pad_token is not None

    def ids(self, texts: list[str], special: bool = False) -> list[list[int]]:
        """Return the ids of each text, not truncated; with the special tokens around it if `special`."""
        options = {"padding": False, "truncation": False, "return_attention_mask": False, "verbose": False}
        return self._tokenizer(texts, add_special_tokens=special, **options)["input_ids"]

    def unknown(self, encoded: list[list[int]]) -> int:
        """Return the number of unknown tokens."""
        return sum(ids.count(self._tokenizer.unk_token_id) for ids in encoded)

    def pair(self, first: str, second: str) -> dict[str, list[int]]:
        """Return what a truncated and padded pair of texts is encoded to."""
        padding = "max_length" if self._pads else False
        return dict(self._tokenizer(first, second, truncation=True, max_length=_SHORT, padding=padding))

    def batch(self, texts: list[str]) -> dict[str, Tensor]:
        """Return `input_ids` and `attention_mask` of some texts, truncated; of the first, if none can be padded."""
        texts = texts if self._pads else texts[:1]
        options = {"truncation": True, "max_length": _SHORT, "padding": self._pads}
        batch = self._tokenizer(texts, return_tensors="pt", **options)
        return {name: batch[name] for name in ("input_ids", "attention_mask")}


def batches(texts: Iterable[Any], what: str) -> Iterator[list[str]]:
    """Yield lists of the strings in texts or rows.

    what: name of the argument, for the message.

    Raises:
        ValueError: `texts` is one string, or an item holds no text.
    """
    if isinstance(texts, str | bytes | Mapping):
        raise ValueError(f"{what} is one {type(texts).__name__}: give a list of texts")
    batch: list[str] = []
    for row in texts:
        batch += _strings(row, what)
        if len(batch) >= _BATCH:
            yield batch
            batch = []
    if batch:
        yield batch


def check_same(before: Reader, after: Reader, texts: list[str], renaming: Mapping[int, int]) -> None:
    """Raise a ValueError unless both tokenizers split the texts into the same tokens."""
    pairs = zip(texts, before.ids(texts, special=True), after.ids(texts, special=True), strict=True)
    wrong = next((text for text, old, new in pairs if [renaming.get(index) for index in old] != new), None)
    if wrong is None:
        old, new = before.pair(texts[0], texts[-1]), after.pair(texts[0], texts[-1])
        old["input_ids"] = [renaming.get(index, -1) for index in old["input_ids"]]
        wrong = None if old == new else texts[0]
    if wrong is not None:
        raise ValueError(
            f"the trimmed tokenizer would split {visible(wrong)!r:.60} into other tokens, so nothing is trimmed: save "
            "the tokenizer by save_pretrained, and pass what AutoTokenizer.from_pretrained loads"
        )


def compare(before: Reader, after: Reader, texts: Iterable[Any], renaming: Mapping[int, int]) -> SecondCorpus | None:
    """Compare two tokenizers on other texts; None if there are none."""
    count = same = 0
    tokens, unknown = [0, 0], [0, 0]
    for batch in batches(texts, "check"):
        encoded = before.ids(batch), after.ids(batch)
        count += len(batch)
        same += sum([renaming.get(index) for index in old] == new for old, new in zip(*encoded, strict=True))
        for place, reader in enumerate((before, after)):
            tokens[place] += sum(map(len, encoded[place]))
            unknown[place] += reader.unknown(encoded[place])
    return SecondCorpus(count, same, (tokens[0], tokens[1]), (unknown[0], unknown[1])) if count else None


def _strings(row: Any, what: str) -> list[str]:
    if isinstance(row, str):
        return [row]
    parts = list(row.values()) if isinstance(row, Mapping) else row
    found = [part for part in parts if isinstance(part, str)] if isinstance(parts, list | tuple) else []
    if not found:
        raise ValueError(f"{what} holds {row!r:.60}, which has no text: give strings, or rows of strings")
    return found
