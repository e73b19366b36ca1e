"""What was measured on the way to a shape, so that an interrupted search finds it again and makes the same choice."""

from typing import Protocol


class Notes(Protocol):
    """What was measured, by name. A dict is one; another one may write itself to a file."""

    def __contains__(self, name: object, /) -> bool: ...
    def __getitem__(self, name: str, /) -> float: ...
    def __setitem__(self, name: str, value: float, /) -> None: ...
