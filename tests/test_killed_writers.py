"""Whatever writes a folder leaves the old output or the new one, whole, where it is killed or the disk is full."""

import pytest
from forked import returned
from killable_writers import kill_all

WRITERS = ["save_model", "checkpoint", "pack", "pack_beside", "unpack", "export", "onnx", "push"]


def kill(folder, step, *jobs):
    told = returned(kill_all, folder, step, *jobs, folder=folder, limit=900)
    assert told.keys() == set(jobs) and all(each["old"] for each in told.values())
    return told


@pytest.mark.parametrize(
    "writer", [WRITERS[0], *(pytest.param(writer, marks=pytest.mark.slow) for writer in WRITERS[1:])]
)
def test_some_kills_leave_a_whole_folder(tmp_path, writer):
    kill(tmp_path, 9, f"{writer}:exchange")


@pytest.mark.slow
@pytest.mark.exhaustive
@pytest.mark.parametrize("writer", WRITERS)
def test_every_kill_leaves_a_whole_folder(tmp_path, writer):
    kill(tmp_path, 4, f"{writer}:full")
    modes = ("exchange",) if writer == "push" else ("exchange", "moves")
    done = kill(tmp_path, 1, *(f"{writer}:{mode}" for mode in modes))
    assert done[f"{writer}:exchange"]["kills"] == done[f"{writer}:exchange"]["events"]
    for each in done.values():
        assert each["old"] + each["new"] == each["kills"] and bool(each["new"]) == (writer != "push")
