"""Rules that the groups of fields share: types, choices and ranges."""

import difflib
import functools
import math
import re
import types
import typing
from collections.abc import Collection, Sequence
from dataclasses import field

import numpy as np

from ..masking.scores import CRITERIA

SOFT_METHODS = ("pdp", "gumbel", "movement")
METHODS = ("random", *CRITERIA, *SOFT_METHODS)
SELECTIONS = ("halving", "survivors", "early")
SELECTION_LOSSES = ("loss", "teacher")

# Words in names of metrics, and endings of words. Metrics without any of them are greater is better.
_LOWER = "losses errors err mistakes miss misclassification false mase rae rse medae msle rmsle crps pinball brier ece"
_LOWER += " mce hinge hamming deviance distance divergence kl kld xent ce nll ppl bpc bpb bits wer cer mer ter der eer"
_LOWER += " fpr fnr fdr cost risk regret fid lpips"
_LOWER_ENDINGS = ("loss", "error", "mse", "mae", "mape", "entropy", "perplexity")
_GREATER = "accuracy acc f precision recall auc auroc auprc likelihood correlation kappa bleu rouge iou dice map mrr"
_NEGATED = ("neg", "negative", "negated", "minus")  # as a first word, as in scikit-learn

_TYPES: dict[object, str] = {
    int: "a whole number",
    float: "a finite number",
    bool: "true or false",
    str: "text",
    list[float]: "a list of finite numbers, such as [0.5, 0.9]",
    list[int]: "a list of whole numbers, such as [8, 128]",
    list[str]: "a list of text",
}


def greater_is_better(metric: str) -> bool:
    """Return whether a greater value of a metric is better, by its name: True unless it is a known loss or error.

    Of several words the last known one decides: "accuracy_loss" is a loss. A first word "neg" turns it round.
    """
    words = re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+", metric.removeprefix("eval_"))
    words = [word.lower() for word in words]
    for word in reversed(words):
        if word in _GREATER.split() or word in _LOWER.split() or word.endswith(_LOWER_ENDINGS):
            return (word in _GREATER.split()) != (words[0] in _NEGATED)
    return True


def option(default: typing.Any, text: str, choices: Sequence[str] | None = None) -> typing.Any:
    """Return a dataclass field with its default and its help text; a tuple is the default of a list."""
    metadata = {"help": text, **({"choices": choices} if choices else {})}
    if isinstance(default, tuple):
        return field(default_factory=lambda: list(default), metadata=metadata)
    return field(default=default, metadata=metadata)


def check_types(config: object, group: type) -> None:
    """Check that every field of `group` has a value of its annotated type, and make NumPy numbers those of Python.

    Recipes are JSON or YAML, where a number easily becomes a string, a fraction or a list. Where text is listed, one
    string stands for a list of one.

    Args:
        config: has the values.
        group: the dataclass that annotates its own fields.

    Raises:
        ValueError: a value has another type, or is not finite.
    """
    for name, kinds in _annotated(group).items():
        value = _plain(getattr(config, name))
        setattr(config, name, value)
        if not any(_is(value, kind) for kind in kinds):
            wanted = next(text for kind, text in _TYPES.items() if kind in kinds)
            raise ValueError(f"{name}={value!r} must be {wanted}{_hint(name, value, wanted)}")


def check_inherited_types(config: object, group: type) -> None:
    """Do as `check_types` for the numbers and switches of a class that is not ours, and which takes more than it says.

    Only what is surely wrong is refused: text, lists, mappings and NaN.

    Raises:
        ValueError: a value is one of these.
    """
    for name, kinds in _annotated(group).items():
        kind = next((kind for kind in (float, int, bool) if kind in kinds), None)
        others = [other for other in kinds if other not in (float, int, bool, type(None))]
        if kind is None or others:
            continue
        value = _plain(getattr(config, name))
        setattr(config, name, value)
        if isinstance(value, str | list | tuple | dict | set) or (isinstance(value, float) and math.isnan(value)):
            wanted = "a number" if kind is float else _TYPES[kind]
            raise ValueError(f"{name}={value!r} must be {wanted}{_hint(name, value, wanted)}")


def _plain(value: object) -> object:
    """Return NumPy's numbers and arrays as those of Python, alone and in a list; anything else as it is."""
    if isinstance(value, np.generic | np.ndarray):
        return value.tolist()
    return [_plain(entry) for entry in value] if isinstance(value, list) else value


def _hint(name: str, value: object, wanted: str) -> str:
    """Return how to write a value that YAML, or the user, has made another type of; empty where that is clear."""
    if name == "pattern" and type(value) is int and value >= 60:
        return (
            f": YAML reads N:M without quotes as a number in base 60, so write '{value // 60}:{value % 60}' in quotes"
        )
    if isinstance(value, bool) and wanted == _TYPES[str]:
        return ": YAML reads yes, no, on and off as true and false, so write the text in quotes"
    if not isinstance(value, str):
        return ""
    if wanted == _TYPES[bool]:
        return ", without quotes"
    try:
        number = float(value)
    except ValueError:
        return ""
    form = "" if wanted == _TYPES[int] else f", and in YAML with a point and a sign, such as {number:.1e}"
    return f": write it without quotes{form}"


@functools.cache
def _annotated(group: type) -> dict[str, tuple[object, ...]]:
    """Return the possible types of each field that `group` itself annotates."""
    hints = {name: hint for name, hint in typing.get_type_hints(group).items() if name in group.__annotations__}
    unions = (typing.Union, types.UnionType)
    return {n: typing.get_args(hint) if typing.get_origin(hint) in unions else (hint,) for n, hint in hints.items()}


def _is(value: object, kind: object) -> bool:
    if typing.get_origin(kind) is list:
        (entry,) = typing.get_args(kind)
        value = [value] if entry is str and isinstance(value, str) else value
        return isinstance(value, list | tuple) and all(_is(v, entry) for v in value)
    if isinstance(value, bool):
        return kind is bool
    if kind is float:
        return isinstance(value, int | float) and math.isfinite(value)
    return isinstance(value, typing.cast(type, kind))


def check_choice(name: str, value: object, choices: Collection[str]) -> None:
    """Raise a ValueError that names the field, the value and the choices, unless `value` is one of them."""
    if value not in choices:
        close = difflib.get_close_matches(str(value), list(choices), n=1)
        hint = f"did you mean {close[0]!r}? " if close else ""
        raise ValueError(f"{name}={value!r} is unknown: {hint}choose one of {', '.join(choices)}")


def no_meaning(name: str, value: object, beside: str, why: str) -> ValueError:
    """Return the error for a field that has no meaning beside another one. `why` ends with the remedy."""
    return ValueError(f"{name}={value!r} has no meaning with {beside}, {why}")


def check_least(config: object, **least: int) -> None:
    """Raise a ValueError if a field, by name, is below its least value. None passes."""
    for name, low in least.items():
        if (value := getattr(config, name)) is not None and value < low:
            raise ValueError(f"{name}={value} must be at least {low}")


def check_positive(config: object, **examples: float) -> None:
    """Raise a ValueError with an example if a field, by name, is 0 or below. None passes."""
    for name, example in examples.items():
        if (value := getattr(config, name)) is not None and value <= 0:
            raise ValueError(f"{name}={value} must be positive, such as {example:g}")


def check_steps(name: str, value: float) -> None:
    """Raise a ValueError unless the value is a share below 1, or a whole number, of steps."""
    if value < 0 or (value > 1 and value % 1):
        raise ValueError(f"{name}={value} must be a share below 1 or a whole number of steps")


def listed(value: str | Sequence[str]) -> tuple[str, ...]:
    """Return the texts of a field; a plain string is a list of one."""
    return (value,) if isinstance(value, str) else tuple(value)
