"""A smaller vocabulary for the texts of a task: fewer rows of the embedding table, and the same outputs."""

import inspect
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..utils.wrappers import eager, plain_model
from .tokenizer_vocabulary import needed_ids, order_of, tokenizer_content, trimmed_tokenizer
from .vocabulary_rows import ids_of_model, model_with_rows, number_of_rows
from .vocabulary_texts import Reader, SecondCorpus, batches, check_same, compare

_COMPARED = 4  # texts on which the outputs of both models are compared
_ROUNDING = 0.01  # allowed difference of logits, relative to the largest: enough for bfloat16
_MOST_UNKNOWN = 0.5  # share of unknown tokens, above which the texts are not meant for the tokenizer


@dataclass(frozen=True)
class TrimReport:
    """What `trim_vocabulary` has removed.

    texts: number of texts; unknown: share of their tokens that are unknown, in [0, 1]; rows: of the embedding table,
    before and after; parameters, bytes: of the model, before and after; second: on the texts of `check`, or None.
    """

    texts: int
    unknown: float
    rows: tuple[int, int]
    parameters: tuple[int, int]
    bytes: tuple[int, int]
    second: SecondCorpus | None = None

    def __str__(self) -> str:
        text = (
            f"{self.rows[1]:,} of {self.rows[0]:,} tokens, {self.parameters[1]:,} of {self.parameters[0]:,} "
            f"parameters and {self.bytes[1] / 1e6:,.2f} of {self.bytes[0] / 1e6:,.2f} MB stay; {self.texts:,} texts "
            f"are split as before ({self.unknown:.2%} of their tokens are unknown)"
        )
        return text if self.second is None else f"{text}\n{self.second}"


def trim_vocabulary(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Iterable[Any],
    *,
    keep: Iterable[str | int] = (),
    check: Iterable[Any] = (),
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, TrimReport]:
    """Return a copy of a model and of its tokenizer without the tokens that the texts do not need.

    The texts are split into the same tokens, which get other ids, and the model's outputs stay the same. A head over
    tokens shrinks too: its logits are those of the tokens that stay. Other texts may be split into more tokens, but no
    character becomes unknown, since single characters and bytes stay, as special tokens do.

    Args:
        model: a transformers model that takes token ids. It stays as it is.
        tokenizer: its fast tokenizer, of the kind WordPiece, BPE or Unigram. It stays as it is.
        texts: all texts of the task: strings, or rows of strings (tuples, lists or dictionaries, whose other values
            are left out). They are read twice; an iterator is held in memory.
        keep: tokens or ids that stay although no text has them, such as the ids of rows that were tokenized by words.
        check: a second corpus, as `texts`. The report tells how the trimmed tokenizer splits it.

    Returns:
        The new model, the new tokenizer and the [`TrimReport`].

    Raises:
        ValueError: there are no texts, most of their tokens are unknown, the tokenizer is no fast one or not the
            model's, or the model is not the one that its configuration describes.
    """
    model = plain_model(model)
    if not isinstance(model, PreTrainedModel):
        raise ValueError(f"{type(model).__name__} is not a transformers model: pass one, and merge adapters first")
    content, rows = tokenizer_content(tokenizer), number_of_rows(model)
    if (largest := max(tokenizer.get_vocab().values(), default=0)) >= rows:
        raise ValueError(f"the tokenizer has the id {largest} but the model {rows} tokens: pass its own tokenizer")
    if isinstance(texts, Iterator):
        texts = list(texts)
    reader = Reader(tokenizer)
    used, count, unknown = _read(reader, texts)
    wanted = used | ids_of_model(model, rows) | {*tokenizer.all_special_ids} | _ids_of(keep, tokenizer, rows)
    kept = order_of(content, needed_ids(content, wanted))
    renaming = {old: new for new, old in enumerate(kept)}
    small_tokenizer = trimmed_tokenizer(tokenizer, renaming)
    small_reader = Reader(small_tokenizer)
    for batch in batches(texts, "texts"):
        check_same(reader, small_reader, batch, renaming)
    small = model_with_rows(model, kept)
    _check_outputs(model, small, reader.batch(next(batches(texts, "texts"))[:_COMPARED]), renaming)
    report = TrimReport(
        count,
        unknown,
        (rows, len(kept)),
        (model.num_parameters(), small.num_parameters()),
        (_bytes(model), _bytes(small)),
        compare(reader, small_reader, check, renaming),
    )
    return small, small_tokenizer, report


def _read(reader: Reader, texts: Iterable[Any]) -> tuple[set[int], int, float]:
    """Return the ids that the texts use, the number of texts, and the share of their tokens that are unknown."""
    used: set[int] = set()
    count = tokens = unknown = 0
    for batch in batches(texts, "texts"):
        encoded = reader.ids(batch)
        used.update(*encoded)
        count += len(batch)
        tokens += sum(map(len, encoded))
        unknown += reader.unknown(encoded)
    if not tokens:
        raise ValueError("the texts hold no tokens: give the texts of your task, such as those of its train split")
    if unknown > _MOST_UNKNOWN * tokens:
        raise ValueError(
            f"{unknown / tokens:.0%} of the tokens of the texts are unknown: give texts in a language of the tokenizer"
        )
    return used, count, unknown / tokens


def _ids_of(keep: Iterable[str | int], tokenizer: PreTrainedTokenizerBase, rows: int) -> set[int]:
    """Return the ids of tokens or ids to keep."""
    if isinstance(keep, str):
        raise ValueError(f"keep={keep!r} is one text: give a list of tokens or ids")
    vocabulary = tokenizer.get_vocab()
    found = set()
    for token in keep:
        index = vocabulary.get(token, -1) if isinstance(token, str) else int(token)
        if not 0 <= index < rows:
            raise ValueError(f"keep has {token!r:.60}, which is no token of the tokenizer: give its tokens or ids")
        found.add(index)
    return found


def _bytes(model: PreTrainedModel) -> int:
    return sum(parameter.nbytes for parameter in model.parameters())


@torch.no_grad()
def _check_outputs(
    model: PreTrainedModel, small: PreTrainedModel, batch: Mapping[str, Tensor], renaming: Mapping[int, int]
) -> None:
    """Raise a ValueError unless both models make the same of a batch: the same hidden states, or else logits."""
    renamed = batch["input_ids"].clone().apply_(renaming.__getitem__)
    outputs = []
    for each, ids in ((model, batch["input_ids"]), (small, renamed)):
        inputs = {name: tensor.to(model.device) for name, tensor in {**batch, "input_ids": ids}.items()}
        base, training = each.base_model, each.training
        if "decoder_input_ids" in inspect.signature(base.forward).parameters:
            inputs["decoder_input_ids"] = inputs["input_ids"]
        with eager():
            outputs.append(base.eval()(**inputs)[0])
        each.train(training)
    old, new = outputs
    if old.shape == new.shape:
        same = torch.equal(old, new)
    else:  # logits of tokens: products of another size may be rounded in another way
        old = old[..., list(renaming)].float()
        same = torch.allclose(old, new.float(), rtol=_ROUNDING, atol=_ROUNDING * float(old.abs().max()))
    if not same:
        raise ValueError(
            f"{type(model).__name__} makes other outputs of renamed ids, so its vocabulary cannot be trimmed exactly"
        )
