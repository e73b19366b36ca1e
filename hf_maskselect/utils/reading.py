"""Read JSON that anyone may have written: bounded, typed, and one sentence for whatever is wrong."""

import dataclasses
import json
import os
import types
from collections.abc import Mapping
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any, TypeGuard, TypeVar, Union, get_args, get_origin, get_type_hints

MOST_BYTES = 1 << 26  # of a JSON file: the trainer's log of a very long run has some megabytes
MOST_DEPTH = 64  # of nested lists and objects
MOST_OBJECTS = 1_000_000  # lists and objects in a file; brackets in texts count too

Content = TypeVar("Content")


def leaves_folder(name: str) -> bool:
    """Return whether a name read from a file is anything but the plain name of a file in the same folder."""
    plain = name == PurePosixPath(name).name == PureWindowsPath(name).name
    return not plain or name in ("", ".", "..") or "\0" in name


def check_file(path: str | os.PathLike, remedy: str = "restore the file") -> Path:
    """Return the path of a regular file that lies in its folder; links of the Hub's cache count as such.

    Raises:
        ValueError: there is no such file, or it is a link that leaves the folder.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path} is not a file: {remedy}")
    if path.is_symlink():
        folder, target = path.parent.resolve(), path.resolve()
        # models--user--name/snapshots/REVISION/config.json links to models--user--name/blobs/SHA
        blobs = [snapshots.parent / "blobs" for snapshots in folder.parents if snapshots.name == "snapshots"]
        if not any(target.is_relative_to(allowed) for allowed in (folder, *blobs)):
            raise ValueError(
                f"{path} is a link to {target}, outside its folder, and is not followed: put a copy of the file there"
            )
    return path


def parse_json(text: str | bytes, where: object, remedy: str = "restore the file") -> Any:
    """Parse JSON of at most `MOST_BYTES` bytes and `MOST_DEPTH` levels.

    Args:
        text: the JSON; bytes are UTF-8.
        where: what the error message names, such as the path of the file.
        remedy: end of the message.

    Raises:
        ValueError: the text is too long, too deep or no JSON.
    """
    try:
        if len(text) > MOST_BYTES:
            raise ValueError(f"it is longer than {MOST_BYTES:,} bytes")
        brackets = ("[", "{") if isinstance(text, str) else (b"[", b"{")
        if sum(map(text.count, brackets)) > MOST_OBJECTS:  # type: ignore[arg-type]
            raise ValueError(f"it holds more than {MOST_OBJECTS:,} lists and objects")
        content = json.loads(text)
        _check_depth(content)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where} cannot be read ({error}): {remedy}") from error
    return content


def _check_depth(content: Any) -> None:
    level = [content]
    for _ in range(MOST_DEPTH):
        level = [item for each in level for item in _items(each)]
        if not level:
            return
    raise ValueError(f"it is nested more than {MOST_DEPTH} levels deep")


def _items(content: Any) -> list:
    items = content.values() if isinstance(content, dict) else content if isinstance(content, list) else ()
    return [item for item in items if isinstance(item, dict | list)]


def read_json_file(path: str | os.PathLike, remedy: str = "restore the file") -> Any:
    """Read a JSON file by `check_file` and `parse_json`.

    Raises:
        ValueError: the file cannot be read, or holds no JSON.
    """
    path = check_file(path, remedy)
    try:
        with open(path, "rb") as file:
            text = file.read(MOST_BYTES + 1)
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({error}): {remedy}") from error
    return parse_json(text, path, remedy)


def read_object(path: str | os.PathLike, remedy: str = "restore the file") -> dict[str, Any]:
    """Read the object that a JSON file holds, by `read_json_file`; raises a ValueError if it holds none."""
    return typed(read_json_file(path, remedy), dict, path, remedy)


def typed(content: object, hint: Any, where: object, remedy: str = "restore the file") -> Any:
    """Return `content` if it has the type `hint`, such as `dict[str, list[float]]` or `int | None`.

    A `bool` is no `int`, and an `int` is also a `float`.

    Raises:
        ValueError: it has another type.
    """
    if not _matches(content, hint):
        name = hint.__name__ if isinstance(hint, type) and not get_args(hint) else str(hint)
        raise ValueError(f"{where} holds {_shown(content)} where {name} belongs: {remedy}")
    return content


def build(cls: type[Content], content: object, where: object, remedy: str = "restore the file") -> Content:
    """Build a dataclass from a JSON object with its fields, each checked by `typed`; lists become tuples where asked.

    Raises:
        ValueError: a field is missing, unknown or has another type.
    """
    values = dict(typed(content, dict, where, remedy))
    hints = get_type_hints(cls)
    fields = {field.name: field for field in dataclasses.fields(cls)}  # type: ignore[arg-type]
    needed = {
        name
        for name, field in fields.items()
        if field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
    }
    if wrong := sorted(needed - values.keys()) or sorted(map(str, values.keys() - fields.keys())):
        what = "lacks" if wrong[0] in needed else "has the unknown field"
        raise ValueError(f"{where} {what} {_shown(wrong[0])}: {remedy}")
    for name, value in values.items():
        if get_origin(hints[name]) is tuple and isinstance(value, list):
            values[name] = value = tuple(value)
        typed(value, hints[name], f"{where}: {name}", remedy)
    return cls(**values)


def is_number(content: object) -> TypeGuard[float]:
    """Return whether a JSON value is a number that a float can hold. NaN, infinity and `bool` count, as in Python."""
    return isinstance(content, float) or (isinstance(content, int) and abs(content) < 1 << 1023)


def _matches(content: object, hint: Any) -> bool:
    origin, arguments = get_origin(hint), get_args(hint)
    if hint is Any:
        return True
    if origin in (Union, types.UnionType):
        return any(_matches(content, argument) for argument in arguments)
    if hint is float:
        return not isinstance(content, bool) and is_number(content)
    if hint is int:
        return type(content) is int and abs(content) < 1 << 63
    if origin is None:
        return content is None if hint is type(None) else isinstance(content, hint)
    if origin is dict:
        return isinstance(content, Mapping) and all(
            _matches(key, arguments[0]) and _matches(value, arguments[1]) for key, value in content.items()
        )
    return isinstance(content, origin) and all(_matches(item, arguments[0]) for item in content)


def _shown(content: object) -> str:
    text = repr(content)
    return text if len(text) <= 60 else f"{text[:57]}..."
