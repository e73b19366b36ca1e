"""The prunable weights of a model."""

import re
from collections.abc import Collection, Sequence

from torch import nn

from ..utils.wrappers import plain_model

# A module name holding one of these is read as a regex, any other as a suffix.
_REGEX_CHARACTERS = frozenset("*+?[](){}|^$\\")


def prunable_weights(
    model: nn.Module,
    target_modules: str | Sequence[str] | None = None,
    exclude_modules: str | Sequence[str] | None = None,
) -> dict[str, nn.Parameter]:
    r"""Prunable weight matrices by name, in model order, each parameter once.

    By default these are the weights of every `nn.Linear`, `nn.Conv2d` and `Conv1D` (a linear layer of transformers
    that is stored transposed) in a stack of layers (an `nn.ModuleList`): the encoder of BERT-like models, the stages
    of a ResNet. Embeddings and their projections, poolers, heads, biases and norms lie outside a stack or have another
    type, and stay dense. In a model of transformers only stacks of its `base_model` count, since others belong to
    heads.

    Args:
        model: any `nn.Module`. Wrappers (DDP, `torch.compile`) do not count, nor do their prefixes in names.
        target_modules: module names to prune instead of the default choice, as in PEFT: a suffix (`"query"`,
            `"output.dense"`) or a regex that must match the full module name (`r".*layer\.[0-5]\..*"`), or a list.
        exclude_modules: module names, in the same notation, that stay dense.

    Returns:
        dict from parameter name (`"...query.weight"`) to a parameter of shape `(out_features, in_features)`; for a
        convolution `(out, in / groups, height, width)`, for `Conv1D` `(in, out)`. A layer that depths share (ALBERT)
        appears once, under its first name. A matrix that a model of transformers ties has the name under which it is
        saved. A matrix tied to an embedding is left out.

    Raises:
        ValueError: nothing is left to prune, or an entry of one of the lists is no regex or matches no layer.
    """
    for patterns in (target_modules, exclude_modules):
        check_module_names(patterns or ())
    model = plain_model(model)
    embeddings = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    lists = [f"{name}." for name, module in model.named_modules() if isinstance(module, nn.ModuleList)]
    stacks = tuple(name for name in lists if name.startswith(_body(model)))
    every = {name: module.weight for name, module in model.named_modules() if is_layer(module)}
    layers = {name: weight for name, weight in every.items() if id(weight) not in embeddings}
    # A layer that stays dense anyway may also be named in exclude_modules.
    targets, excluded = _matched(layers, target_modules), _matched(every, exclude_modules)
    named, left = set().union(*targets.values()), set().union(*excluded.values())
    saved = _ties(model)
    weights: dict[str, nn.Parameter] = {}
    seen = set()
    for name, weight in layers.items():
        wanted = name.startswith(stacks) if target_modules is None else name in named
        if wanted and name not in left and id(weight) not in seen:
            seen.add(id(weight))
            weights[saved.get(f"{name}.weight", f"{name}.weight")] = weight
    if not weights:
        raise ValueError(
            f"no weight to prune: target_modules={target_modules!r} with exclude_modules={exclude_modules!r} "
            f"matches no linear or convolution layer of {type(model).__name__}; its layers are named like "
            f"{_examples(model)}, so name one of their suffixes (or leave target_modules unset for every such layer "
            "of the encoder)"
        )
    for field, matched in (("target_modules", targets), ("exclude_modules", excluded)):
        if idle := [pattern for pattern, names in matched.items() if not names]:
            raise ValueError(
                f"{field} names {idle!r}, which matches no linear or convolution layer of {type(model).__name__}; its "
                f"layers are named like {_examples(model)}: mend the spelling or leave it out"
            )
    return weights


def check_module_names(patterns: str | Sequence[str]) -> None:
    """Raise a ValueError if a module name is neither a suffix nor a regex."""
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        if is_regex(pattern):
            try:
                re.compile(pattern)
            except re.error as error:
                raise ValueError(f"{pattern!r} in target_modules or exclude_modules is no regex: {error}") from error


def _is_of_transformers(model: nn.Module) -> bool:
    # Compared by name, since `masking` does not import transformers.
    classes = {(kind.__module__, kind.__name__) for kind in type(model).__mro__}
    return ("transformers.modeling_utils", "PreTrainedModel") in classes


def _body(model: nn.Module) -> str:
    """The prefix of all module names outside the heads."""
    if not _is_of_transformers(model):
        return ""
    prefix = model.base_model_prefix
    return f"{prefix}." if prefix in dict(model.named_children()) else ""  # else it is a base model itself


def _ties(model: nn.Module) -> dict[str, str]:
    """For each tied parameter, the name under which it is saved."""
    if not _is_of_transformers(model):
        return {}
    named = dict(model.named_parameters(remove_duplicate=False))
    ties = vars(model).get("all_tied_weights_keys", {})  # missing if a user's class does not call post_init
    return {name: source for name, source in ties.items() if name in named and named.get(source) is named[name]}


def transposed_weights(model: nn.Module) -> set[str]:
    """Names of the weights that are stored `(in, out)`."""
    return {f"{name}.weight" for name, module in model.named_modules() if _is_transposed(module)}


def _is_transposed(module: nn.Module) -> bool:
    # Compared by name, as above.
    return type(module).__name__ == "Conv1D" and type(module).__module__ == "transformers.pytorch_utils"


def is_layer(module: nn.Module) -> bool:
    """Whether the module has a type whose weight may be pruned."""
    return isinstance(module, nn.Linear | nn.Conv2d) or _is_transposed(module)


def known_modules(model: nn.Module, patterns: Sequence[str]) -> list[str]:
    """The module names, as in `prunable_weights`, that match a layer of the model."""
    names = [name for name, module in model.named_modules() if is_layer(module)]
    return [pattern for pattern, matched in _matched(names, patterns).items() if matched]


def without_regexes(model: nn.Module, patterns: Sequence[str]) -> list[str]:
    """The module names with the layers that each regex matches in its place, as suffixes that need no head."""
    names = [name for name, module in model.named_modules() if is_layer(module)]
    plain: list[str] = []
    for pattern, matched in _matched(names, patterns).items():
        found = [name.removeprefix(_body(model)) for name in names if name in matched]
        plain += found if is_regex(pattern) else [pattern]
    return list(dict.fromkeys(plain))


def is_regex(pattern: str) -> bool:
    """Whether a module name is read as a regex, and not as a suffix."""
    return bool(_REGEX_CHARACTERS & set(pattern))


def _matched(names: Collection[str], patterns: str | Sequence[str] | None) -> dict[str, set[str]]:
    """For each pattern, the names that it matches."""
    patterns = [patterns] if isinstance(patterns, str) else patterns or ()
    return {pattern: {name for name in names if _matches(name, pattern)} for pattern in patterns}


def _matches(name: str, pattern: str) -> bool:
    if is_regex(pattern):
        return re.fullmatch(pattern, name) is not None
    return name == pattern or name.endswith(f".{pattern}")


def _examples(model: nn.Module) -> list[str]:
    names = [name for name, module in model.named_modules() if is_layer(module)]
    return names[:2] + names[-1:]
