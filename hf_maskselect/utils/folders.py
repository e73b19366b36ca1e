"""Folders that are replaced or deleted in one step, so that a kill leaves the old one or the new one, whole.

A new folder is written beside the old one under a name that begins with an underscore: such names are never uploaded,
and are no checkpoints. It is brought to the disk and exchanged with the old folder by one system call. Where a system
cannot do that, the complete new folder becomes `_saved` inside the old one, again by one call, and its files are then
moved to their places. `finish` goes on with these moves if they were interrupted; every reader calls it.
"""

import ctypes
import errno
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from .files import sync

if sys.platform != "win32":
    import fcntl

REMOVED, STAGING, SAVED = "_removed", "_saving", "_saved"
_GONE = "_gone"  # in SAVED: a folder with the names of old files that have no place beside the new ones
_LAST = ".safetensors"  # goes first and comes last: without its weights nothing takes a folder for a model
_FULL, _SCARCE = (errno.ENOSPC, errno.EDQUOT), 1 << 20


@contextmanager
def replacing_folder(target: str | os.PathLike, keeps: Callable[[str], bool] = lambda name: True) -> Iterator[Path]:
    """Write new files into a folder, all or none: yields an empty folder for them, which becomes `target` at the end.

    If the block raises, or the process is killed, `target` stays as it was.

    Args:
        target: the folder; it need not exist.
        keeps: tells of a name that `target` has and the new folder has not, whether it stays. By default all do.

    Raises:
        OSError: the disk is full, or the folder cannot be written.
    """
    target = Path(target).resolve()  # a link to a folder stays one
    beside, inside = target.with_name(f"_{target.name}.saving"), target / STAGING
    with discarding(target, beside, inside):
        target.parent.mkdir(parents=True, exist_ok=True)
        finish(target)
        staging = _make_empty(beside, inside)
        yield staging
        put(staging, target, keeps)


@contextmanager
def discarding(target: Path, *staging: Path) -> Iterator[None]:
    """Remove the folders from which `target` was to be made, if the block raises; tell of a full disk by name."""
    try:
        yield
    except BaseException as error:
        full = _is_full(error, target)
        for folder in staging:
            remove(folder)
        if full:
            text = f"no room on the disk of {target}, which is left as it was: make room there, and save again"
            raise OSError(errno.ENOSPC, text) from error
        raise


def put(new: Path, target: Path, keeps: Callable[[str], bool] = lambda name: False) -> None:
    """Give the complete folder `new` the name `target` in one step, and delete what has no place there any more.

    Both lie on one disk. By default nothing stays that `target` held before.
    """
    sync_tree(new)
    if not target.exists():
        os.rename(new, target)
        sync(target.parent)
        return
    gone = {name for name in os.listdir(target) if not (new / name).exists() and not keeps(name)}
    if new.parent != target and not _stands_in(target) and _took_place(new, target, gone):
        sync(target.parent)
        _link_rest(new, target, gone)  # what another process has written meanwhile; `new` is the old folder now
        remove(new)
        return
    (new / _GONE).mkdir()
    for name in gone:
        (new / _GONE / name).touch()
    sync(new / _GONE)
    sync(new)
    os.rename(new, target / SAVED)  # from here on the new folder holds
    sync(target)
    finish(target)


def finish(folder: str | os.PathLike) -> None:
    """Move the files of a save that was interrupted to their places. Does nothing for any other folder.

    Raises:
        ValueError: the folder may not be written.
    """
    folder = Path(folder)
    saved = folder / SAVED
    if saved.is_symlink() or not saved.is_dir():
        return
    try:
        _move(saved, folder)
    except OSError as error:
        raise ValueError(
            f"{folder} holds a save that was interrupted and cannot be finished ({error}): make the folder writable"
        ) from error


def _move(saved: Path, folder: Path) -> None:
    """Move the files of `saved` into `folder`, in an order that never shows a mixture of two models."""
    with _alone(saved):
        names = set(os.listdir(saved)) if saved.is_dir() else set()  # another process may have moved them
        gone = set(os.listdir(saved / _GONE)) - names if _GONE in names else set()
        for name in sorted(gone | {name for name in names if name.endswith(_LAST)}):
            remove(folder / name)
        for name in sorted(names - {_GONE}, key=lambda name: (name.endswith(_LAST), name)):
            if (folder / name).is_dir():  # a rename cannot replace a folder
                remove(folder / name)
            os.replace(saved / name, folder / name)
        sync(folder)
        remove(saved)


def sync_tree(folder: Path) -> None:
    """Flush every file and every folder below `folder`, and its own names, to the disk."""
    for path in folder.rglob("*"):
        sync(path)
    sync(folder)


def remove_folder(folder: Path) -> None:
    """Delete a folder. It loses its name first, so that a kill never leaves half of it under that name."""
    hidden = folder.with_name(f"{REMOVED}.{folder.name}")
    remove(hidden)  # left by a process that was killed
    os.rename(folder, hidden)
    remove(hidden)


def remove_leftovers(parent: Path) -> None:
    """Delete what killed processes have left of the folders in `parent` that they were deleting."""
    for hidden in parent.glob(f"{REMOVED}.*"):
        remove(hidden)


def link_tree(source: Path, target: Path) -> None:
    """Give a file or a folder a second name. Nothing is copied: both names lead to the same content."""
    if source.is_symlink() or not source.is_dir():
        os.link(source, target, follow_symlinks=False)
        return
    target.mkdir()
    for path in source.iterdir():
        link_tree(path, target / path.name)
    shutil.copystat(source, target)
    sync(target)


def remove(path: Path) -> None:
    """Delete a file, a link, or a folder with all that it holds, if it exists."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Let one process after the other into the block, where the system has locks."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        if sys.platform != "win32":
            with suppress(OSError):  # a network disk without locks
                fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def _make_empty(beside: Path, inside: Path) -> Path:
    """Make an empty folder for new files: beside the target if it can be exchanged with the target, else in it."""
    for left in (beside, inside):
        remove(left)  # by a process that was killed
    if not inside.parent.exists():
        beside.mkdir()
        return beside
    inside.mkdir()
    with suppress(OSError):
        beside.mkdir()
        exchange(beside, inside)  # also tells whether both are on one file system, and may be written
        inside.rmdir()
        return beside
    remove(beside)
    return inside


def _took_place(new: Path, target: Path, gone: set[str]) -> bool:
    """Exchange two folders after the new one has got second names of all that stays; return False where it cannot."""
    linked: list[Path] = []
    try:
        shutil.copystat(target, new)
        if (owner := target.stat()).st_uid != new.stat().st_uid:
            os.chown(new, owner.st_uid, owner.st_gid)
        _link_rest(target, new, gone, linked)
        sync(new)
        exchange(new, target)
    except OSError as error:
        for path in linked:
            remove(path)
        if _is_full(error, target):
            raise
        return False
    return True


def _link_rest(source: Path, into: Path, gone: set[str], linked: list[Path] | None = None) -> None:
    """Link what `into` lacks of `source`, and note the new names in `linked`."""
    for path in source.iterdir():
        if path.name not in gone and not os.path.lexists(into / path.name):
            if linked is not None:
                linked.append(into / path.name)
            link_tree(path, into / path.name)


def _stands_in(folder: Path) -> bool:
    """Return whether this process works in `folder`: after an exchange it would stand in the old one."""
    try:
        return Path.cwd().is_relative_to(folder.resolve())
    except FileNotFoundError:  # the folder that it worked in was deleted
        return False


def _is_full(error: BaseException, folder: Path) -> bool:
    """Return whether an error is that of a full disk, on which `folder` lies."""
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno in _FULL
    if any(os.strerror(number) in str(error) for number in _FULL):  # safetensors, `shutil.copytree`
        return True
    nearest = next(path for path in (folder, *folder.parents) if path.exists())
    return (
        isinstance(error, RuntimeError) and shutil.disk_usage(nearest).free < _SCARCE
    )  # `torch.save` gives no reason


def exchange(first: Path, second: Path) -> None:
    """Exchange the names of two files or folders in one step; raises an OSError where that is not possible."""
    if sys.platform not in ("linux", "darwin"):
        raise OSError(errno.ENOTSUP, "this system cannot exchange two folders")
    library: Any = ctypes.CDLL(None, use_errno=True)
    names = os.fsencode(first), os.fsencode(second)
    if sys.platform == "darwin":
        failed = library.renamex_np(*names, 2)  # RENAME_SWAP
    else:
        here = -100  # AT_FDCWD: paths are relative to the current folder
        failed = library.renameat2(here, names[0], here, names[1], 2)  # RENAME_EXCHANGE
    if failed:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), str(first), None, str(second))
