"""Other attributes of an object for a while."""

import contextlib
from collections.abc import Iterator
from typing import Any


@contextlib.contextmanager
def swapped(target: Any, **values: Any) -> Iterator[None]:
    """Inside the block, these attributes of the object have other values; a method may be one, too."""
    own = {name: vars(target)[name] for name in values if name in vars(target)}
    for name, value in values.items():
        setattr(target, name, value)
    try:
        yield
    finally:
        for name in values:
            vars(target).pop(name, None)
        for name, value in own.items():
            setattr(target, name, value)


def overrides(target: Any, name: str, base: type) -> bool:
    """Return whether a method of the object is another one than that of `base`, by its class or by assignment."""
    return name in vars(target) or getattr(type(target), name) is not getattr(base, name)
