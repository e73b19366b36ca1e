"""Which tokens a tokenizer needs to split some texts as before, and the tokenizer without the others."""

import json
import re
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Set
from itertools import pairwise
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast
from transformers.utils import logging

logger = logging.get_logger(__name__)

TOKENIZER_FILE, TOKENIZER_CONFIG = "tokenizer.json", "tokenizer_config.json"
_KINDS = ("BPE", "Unigram", "WordPiece")
_BYTE = re.compile("<0x[0-9A-F]{2}>")  # stands for a byte of a character that has no token
_ENDS = {"sep", "cls"}  # fields (token, id) of the post-processors of BERT and RoBERTa
_ID_KEY = re.compile(r"(\w+_)?token_(ids?|index)|unk_id")  # not `pad_token_type_id`, which is no token


def tokenizer_content(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """Return the content of a tokenizer's `tokenizer.json`.

    Raises:
        ValueError: it has none, or is of a kind whose tokens cannot be removed exactly.
    """
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise ValueError(
            f"{type(tokenizer).__name__} has no tokenizer.json: pass the tokenizer that AutoTokenizer.from_pretrained "
            "returns, and convert slow tokenizers to fast ones first"
        )
    content = json.loads(tokenizer.backend_tokenizer.to_str())
    model = content["model"]
    if model["type"] not in _KINDS:
        raise ValueError(
            f"a tokenizer of the kind {model['type']} knows only whole words, so that text would become unknown: only "
            f"{', '.join(_KINDS)} can be trimmed"
        )
    if model.get("dropout"):
        raise ValueError(
            f"the tokenizer leaves out merges at random (dropout={model['dropout']}): set "
            "tokenizer.backend_tokenizer.model.dropout = None"
        )
    return content


def needed_ids(content: Mapping[str, Any], wanted: Iterable[int]) -> set[int]:
    """Return the wanted ids and those of all tokens that the tokenizer needs beside them.

    These are added and special tokens, single characters and bytes, without which characters would become unknown, and
    what is specific to the kind: the merges of BPE that lead to a token, or the least likely piece of Unigram, which
    sets the price of an unknown character.

    Args:
        content: of `tokenizer.json`.
        wanted: ids of the tokens of the texts, and others to keep.
    """
    model = content["model"]
    vocabulary = _vocabulary(model)
    wanted = {*wanted, *(token["id"] for token in content["added_tokens"]), *_processor_ids(content)}
    names = {index: token for token, index in vocabulary.items()}
    tokens = {names[index] for index in wanted if index in names}
    if model.get("unk_token") in vocabulary:
        tokens.add(model["unk_token"])
    tokens |= _characters_and_bytes(model, vocabulary, tokens)
    if model["type"] == "BPE":
        tokens |= _intermediate(model, tokens)
    elif model["type"] == "Unigram":
        tokens.add(min(model["vocab"], key=lambda piece: piece[1])[0])
        # Many tokenizers of transformers have this id in their code, so the unknown token has to keep it.
        wanted |= set(range((model["unk_id"] or 0) + 1))
    return wanted | {vocabulary[token] for token in tokens}


def order_of(content: Mapping[str, Any], kept: Iterable[int]) -> list[int]:
    """Return the kept ids in the order of their new ones.

    As in any `tokenizer.json`, the tokens of the model come first, and then those that were added. Ids that have no
    token are last. Within these groups the order stays.
    """
    own = set(_vocabulary(content["model"]).values())
    added = {token["id"] for token in content["added_tokens"]}
    return sorted(kept, key=lambda index: (0 if index in own else 1 if index in added else 2, index))


def trimmed_tokenizer(tokenizer: PreTrainedTokenizerBase, renaming: Mapping[int, int]) -> PreTrainedTokenizerBase:
    """Return a new tokenizer of the same class, with the tokens of `renaming` (new ids by old ids) only."""
    content = tokenizer_content(tokenizer)
    _trim(content["model"], renaming)
    content["added_tokens"] = [{**token, "id": renaming[token["id"]]} for token in content["added_tokens"]]
    for part in _processors(content):
        for special in part.get("special_tokens", {}).values():
            special["ids"] = [renaming[index] for index in special["ids"]]
        for name in _ENDS & part.keys():
            part[name] = [part[name][0], renaming[part[name][1]]]
    if content.get("padding"):
        padding = content["padding"]
        padding["pad_id"] = renaming.get(padding["pad_id"], padding["pad_id"])
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        (Path(folder) / TOKENIZER_FILE).write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")
        path = Path(folder) / TOKENIZER_CONFIG
        settings = rename_ids(json.loads(path.read_text(encoding="utf-8")), renaming)
        path.write_text(json.dumps(settings, ensure_ascii=False), encoding="utf-8")
        trimmed = type(tokenizer).from_pretrained(folder, local_files_only=True)
    trimmed.name_or_path = tokenizer.name_or_path
    return trimmed


def ids_in(settings: Mapping[str, Any], keys: Iterable[str] = ()) -> set[int]:
    """Return the ids where a key ends in `token_id`, `token_ids` or `token_index`, or is in `keys`."""
    return {index for key, value in settings.items() if _holds_ids(key, keys) for index in _ids(value)}


def rename_ids(settings: Mapping[str, Any], renaming: Mapping[int, int], keys: Iterable[str] = ()) -> dict[str, Any]:
    """Return settings with new ids in the places of `ids_in`. Ids that `renaming` lacks stay, such as -1 for none."""
    return {key: _with_new_ids(value, renaming) if _holds_ids(key, keys) else value for key, value in settings.items()}


def _holds_ids(key: str, keys: Iterable[str]) -> bool:
    return key in keys or _ID_KEY.fullmatch(key) is not None


def _ids(value: Any) -> Iterator[int]:
    """Yield the ids in a number, or in nested lists and in the keys of dictionaries."""
    if isinstance(value, list | tuple | dict):
        for each in value:
            yield from _ids(each)
    elif type(value) is int:
        yield value


def _with_new_ids(value: Any, renaming: Mapping[int, int]) -> Any:
    if isinstance(value, dict):
        return {_with_new_ids(key, renaming): each for key, each in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_with_new_ids(each, renaming) for each in value)
    return renaming.get(value, value) if type(value) is int else value


def _vocabulary(model: Mapping[str, Any]) -> dict[str, int]:
    """Return the ids of a tokenizer's model by token, without tokens that were added to it."""
    if model["type"] == "Unigram":
        return {token: index for index, (token, _) in enumerate(model["vocab"])}
    return model["vocab"]


def _affixes(model: Mapping[str, Any]) -> tuple[str, str]:
    """Return what stands before each token inside a word, and after the last token of a word."""
    return model.get("continuing_subword_prefix") or "", model.get("end_of_word_suffix") or ""


def _symbols(token: str, prefix: str, suffix: str) -> list[str]:
    """Split a token into the tokens of its single characters, with their affixes."""
    start, end = token.startswith(prefix), token.endswith(suffix)
    core = token[len(prefix) if start else 0 : len(token) - (len(suffix) if end else 0)]
    if not core:  # it is an affix
        return [token]
    symbols = [prefix + character for character in core]
    symbols[0] = (prefix if start else "") + core[0]
    symbols[-1] += suffix if end else ""
    return symbols


def _characters_and_bytes(model: Mapping[str, Any], vocabulary: Mapping[str, int], tokens: Set[str]) -> set[str]:
    """Return the tokens without which characters could become unknown; `tokens` stay anyway.

    A character that has no token of its own is known inside longer tokens only. These stay too.
    """
    affixes = _affixes(model)
    found, lone = set(), set()
    for token in vocabulary:
        symbols = _symbols(token, *affixes)
        if len(symbols) == 1 or (model.get("byte_fallback") and _BYTE.fullmatch(token)):
            found.add(token)
        elif token not in tokens and not vocabulary.keys() >= set(symbols):
            lone.add(token)
    if lone and model["type"] != "BPE":  # BPE begins with single characters
        logger.warning(
            f"{len(lone)} tokens, such as {min(lone)!r}, hold characters that have no token of their own: they stay, "
            "but a word with such a character may become unknown if another token of the word is removed"
        )
    return found | lone


def _intermediate(model: Mapping[str, Any], tokens: Set[str]) -> set[str]:
    """Return the tokens that BPE makes on its way to `tokens`."""
    prefix, suffix = _affixes(model)
    ranks: dict[tuple[str, str], int] = {}
    pairs: dict[str, list[tuple[str, str]]] = {}  # by the token that they make
    for rank, (left, right) in enumerate(model["merges"]):
        ranks[left, right] = rank
        pairs.setdefault(left + right[len(prefix) :], []).append((left, right))
    found: set[str] = set()
    waiting = list(tokens & pairs.keys())
    while waiting:
        token = waiting.pop()
        steps = _merged(_symbols(token, prefix, suffix), ranks, len(prefix))
        if not steps or steps[-1] != token:  # another way leads to it, so all are kept
            steps = [part for pair in pairs[token] for part in pair]
            waiting += {*steps} & pairs.keys() - found - {token}
        found.update(steps)
    return found


def _merged(symbols: list[str], ranks: Mapping[tuple[str, str], int], skipped: int) -> list[str]:
    """Merge neighbours in the order of their ranks, as BPE does, and return what each merge makes.

    skipped: length of the prefix inside words, which a merge takes off its second token.
    """
    made = []
    while len(symbols) > 1:
        rank, place = min((ranks.get(pair, len(ranks)), place) for place, pair in enumerate(pairwise(symbols)))
        if rank == len(ranks):
            break
        made.append(symbols[place] + symbols[place + 1][skipped:])
        symbols = [*symbols[:place], made[-1], *symbols[place + 2 :]]
    return made


def _trim(model: dict[str, Any], renaming: Mapping[int, int]) -> None:
    """Remove the tokens that `renaming` lacks from the model of a `tokenizer.json`."""
    vocabulary = _vocabulary(model)
    if model["type"] == "Unigram":
        model["vocab"] = [piece for index, piece in enumerate(model["vocab"]) if index in renaming]
        model["unk_id"] = renaming.get(model["unk_id"])
        return
    kept = {token: renaming[index] for token, index in vocabulary.items() if index in renaming}
    model["vocab"] = dict(sorted(kept.items(), key=lambda item: item[1]))
    if model["type"] == "BPE":
        prefix = len(_affixes(model)[0])
        model["merges"] = [
            [left, right]
            for left, right in model["merges"]
            if left in kept and right in kept and left + right[prefix:] in kept
        ]


def _processors(content: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the parts of a post-processor, which adds special tokens by their ids."""
    processor = content["post_processor"]
    if processor is None:
        return []
    return processor["processors"] if processor["type"] == "Sequence" else [processor]


def _processor_ids(content: Mapping[str, Any]) -> set[int]:
    """Return the ids that the post-processor adds."""
    found: set[int] = set()
    for part in _processors(content):
        found.update(index for special in part.get("special_tokens", {}).values() for index in special["ids"])
        found.update(part[name][1] for name in _ENDS & part.keys())
    return found
