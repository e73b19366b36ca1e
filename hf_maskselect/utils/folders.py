"""Folders that are replaced or deleted in one step, so that a kill leaves the old one or the new one, whole."""

import os
import shutil
from pathlib import Path

REMOVED = "_removed"  # what begins with an underscore is never uploaded, and is no checkpoint


def remove_folder(folder: Path) -> None:
    """Delete a folder. It loses its name first, so that a kill never leaves half of it under that name."""
    hidden = folder.with_name(f"{REMOVED}.{folder.name}")
    shutil.rmtree(hidden, ignore_errors=True)  # left by a process that was killed
    os.rename(folder, hidden)
    if hidden.is_symlink():
        hidden.unlink()  # what it leads to is not ours
    else:
        shutil.rmtree(hidden, ignore_errors=True)


def remove_leftovers(parent: Path) -> None:
    """Delete what killed processes have left of the folders in `parent` that they were deleting."""
    for hidden in parent.glob(f"{REMOVED}.*"):
        shutil.rmtree(hidden, ignore_errors=True)
