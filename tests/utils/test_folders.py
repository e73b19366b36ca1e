"""A folder is replaced whole, keeps what is not replaced, and is put back together after a kill."""

import errno
import os

import pytest

from hf_maskselect.utils import folders
from hf_maskselect.utils.folders import finish, put, remove_folder, replacing_folder


def refuse(*paths):
    raise OSError(errno.ENOTSUP, "no exchange here")


@pytest.fixture(params=["exchange", "moves"])
def mode(request, monkeypatch):
    if request.param == "moves":
        monkeypatch.setattr(folders, "exchange", refuse)
    return request.param


def fill(folder, **files):
    for name, text in files.items():
        path = folder / name.replace("__", "/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return folder


def content(folder):
    return {str(path.relative_to(folder)): path.read_text() for path in folder.rglob("*") if path.is_file()}


def test_new_files_replace_old_ones_and_the_rest_stays(tmp_path, mode):
    out = fill(tmp_path / "out", model="old", shard="old", runs__log="a log", sub__file="old", sub__other="old")
    with replacing_folder(out, keeps=lambda name: name != "shard") as new:
        fill(new, model="new", config="new", sub__file="new")
        assert content(out)["model"] == "old"
    assert content(out) == {"model": "new", "config": "new", "runs/log": "a log", "sub/file": "new"}
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_new_folder_is_made_with_its_parents(tmp_path, mode):
    with replacing_folder(tmp_path / "a" / "out") as new:
        fill(new, model="new")
    assert content(tmp_path) == {"a/out/model": "new"}


def test_nothing_is_copied_and_an_open_log_goes_on(tmp_path):
    out = fill(tmp_path / "out", checkpoint__weights="large", runs__log="first")
    number = (out / "checkpoint" / "weights").stat().st_ino
    with open(out / "runs" / "log", "a") as log:
        with replacing_folder(out) as new:
            fill(new, model="new")
        log.write(", second")
    assert (out / "checkpoint" / "weights").stat().st_ino == number
    assert content(out) == {"model": "new", "checkpoint/weights": "large", "runs/log": "first, second"}


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError, OSError(errno.ENOSPC, "x"), RuntimeError("x")])
def test_a_block_that_raises_leaves_the_old_folder(tmp_path, mode, error):
    out = fill(tmp_path / "out", model="old")
    with pytest.raises(BaseException) as raised, replacing_folder(out) as new:  # noqa: PT011
        fill(new, model="new")
        raise error
    assert content(tmp_path) == {"out/model": "old"} and [path.name for path in tmp_path.iterdir()] == ["out"]
    assert ("make room" in str(raised.value)) == isinstance(error, OSError)


def test_a_link_to_a_folder_stays_one(tmp_path, mode):
    fill(tmp_path / "real", model="old")
    (tmp_path / "out").symlink_to(tmp_path / "real")
    with replacing_folder(tmp_path / "out") as new:
        fill(new, model="new")
    assert (tmp_path / "out").is_symlink() and content(tmp_path / "real") == {"model": "new"}


def test_the_folder_that_a_process_stands_in_stays_the_same_one(tmp_path, monkeypatch):
    out = fill(tmp_path / "out", model="old", log="kept")
    monkeypatch.chdir(out)
    with replacing_folder(".") as new:
        fill(new, model="new")
    assert open("model").read() == "new" and content(tmp_path) == {"out/model": "new", "out/log": "kept"}


def test_links_inside_are_kept_as_links(tmp_path, mode):
    out = fill(tmp_path / "out", model="old")
    elsewhere = fill(tmp_path / "elsewhere", file="far")
    (out / "link").symlink_to(elsewhere)
    (out / "broken").symlink_to(tmp_path / "nowhere")
    with replacing_folder(out) as new:
        fill(new, model="new")
    assert (out / "link").is_symlink() and (out / "broken").is_symlink() and content(elsewhere) == {"file": "far"}


def test_permissions_stay(tmp_path, mode):
    out = fill(tmp_path / "out", model="old")
    out.chmod(0o2775)
    with replacing_folder(out) as new:
        fill(new, model="new")
    assert out.stat().st_mode & 0o7777 == 0o2775


def test_a_folder_can_be_put_in_place_of_another(tmp_path, mode):
    put(fill(tmp_path / "new", a="new"), fill(tmp_path / "out", a="old", b="old", c__d="old"))
    assert content(tmp_path) == {"out/a": "new"}


def test_an_interrupted_move_is_finished_once(tmp_path):
    out = fill(tmp_path / "out", model="old", shard="old", other="kept")
    fill(out / "_saved", model="new", _gone__shard="")
    finish(out)
    finish(out)
    assert content(out) == {"model": "new", "other": "kept"}


def test_a_folder_that_cannot_be_finished_is_named(tmp_path, monkeypatch):
    out = fill(tmp_path / "out", model="old")
    fill(out / "_saved", model="new")
    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(ValueError, match="a save that was interrupted .* make the folder writable"):
        finish(out)


def test_what_a_link_leads_to_is_not_moved(tmp_path):
    out, far = fill(tmp_path / "out", model="old"), fill(tmp_path / "far", model="far", _gone__model="")
    (out / "_saved").symlink_to(far)
    finish(out)
    assert content(far) == {"model": "far", "_gone/model": ""} and (out / "model").read_text() == "old"


def test_leftovers_of_killed_writers_go(tmp_path, mode):
    out = fill(tmp_path / "out", model="old", _saving__model="half")
    fill(tmp_path / "_out.saving", model="half")
    fill(tmp_path / "_removed.out", model="half")
    with replacing_folder(out) as new:
        fill(new, model="new")
    remove_folder(out)
    assert not os.listdir(tmp_path)
