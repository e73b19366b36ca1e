"""What was made from weights is refused, or gone, beside other weights."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import make_trainer, save_pruned

from hf_maskselect import export_semi_structured, load_pruned, load_semi_structured, pack, verify
from hf_maskselect.export.semi_structured import Choice, Timing
from hf_maskselect.storage.derived import ORIGIN, SEMI_STRUCTURED_FILE, TIMING_FILE, origin_of
from hf_maskselect.storage.pack import unpack
from hf_maskselect.storage.packed_file import PACKED_FILE
from hf_maskselect.storage.state import PruningState
from hf_maskselect.utils.digests import header_checksum

OTHER = "made from other weights"


@pytest.fixture
def saved(tmp_path):
    save_pruned(tmp_path / "out", 0.5, "2:4")
    return tmp_path / "out"


def save_other(folder):
    """Another model of the same shape takes the place of the first, by a writer that knows nothing of us."""
    other = folder.parent / "other"
    save_pruned(other, 0.5, "2:4", seed=1)
    for path in other.iterdir():
        shutil.copyfile(path, folder / path.name)


@pytest.mark.parametrize("make", [export_semi_structured, pack])
def test_a_file_of_an_earlier_model_is_refused(saved, make):
    make(saved, saved)
    verify(saved)
    save_other(saved)
    for pattern in (None, "2:4"):
        with pytest.raises(ValueError, match=OTHER):
            verify(saved, pattern)
    with pytest.raises(ValueError, match=OTHER):
        load_semi_structured(saved) if make is export_semi_structured else unpack(saved, saved.parent / "unpacked")
    make(saved, saved)
    verify(saved, "2:4")


def test_weights_that_were_edited_are_seen_without_a_state(saved):
    (saved / "pruning_state.safetensors").unlink()
    export_semi_structured(saved, saved)
    load_semi_structured(saved)
    weights = load_file(saved / "model.safetensors")
    weights["classifier.bias"] += 1
    save_file(weights, saved / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=OTHER):
        load_semi_structured(saved)


def test_shards_have_the_digest_of_one_file(saved):
    export_semi_structured(saved, saved)
    model = load_pruned(saved)[0]
    (saved / "model.safetensors").unlink()
    model.save_pretrained(saved, max_shard_size="20KB")
    assert (saved / "model.safetensors.index.json").exists()
    load_semi_structured(saved)


def test_the_file_alone_may_be_elsewhere(saved, tmp_path):
    pack(saved, saved)
    export_semi_structured(saved, saved)
    alone = tmp_path / "alone"
    alone.mkdir()
    for name in ("config.json", SEMI_STRUCTURED_FILE, PACKED_FILE):
        shutil.copyfile(saved / name, alone / name)
    load_semi_structured(alone)
    load_pruned(alone)
    moved = saved.rename(tmp_path / "moved")
    load_semi_structured(moved)
    verify(moved)


def test_the_state_of_a_repository_tells_without_its_weights(saved, tmp_path):
    export_semi_structured(saved, saved)
    save_other(saved)
    (saved / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=OTHER):
        load_semi_structured(saved)


@pytest.mark.parametrize("options", [{}, {"values": "bf16"}, {"embeddings": "int8"}])
def test_a_packed_file_may_lie_beside_what_was_unpacked_from_it(saved, tmp_path, options):
    pack(saved, tmp_path / "packed", **options)
    unpack(tmp_path / "packed", tmp_path / "packed")
    load_pruned(tmp_path / "packed")
    if not options:
        verify(tmp_path / "packed")
    unpack(tmp_path / "packed", tmp_path / "again")
    unpack(tmp_path / "packed", tmp_path / "again")


def test_a_saved_model_leaves_nothing_of_another_and_keeps_its_own(tmp_path):
    trainer = make_trainer(tmp_path, method="magnitude", pattern="2:4", sparsity=0.5, num_levels=1, max_steps=2)
    trainer.train()
    trainer.save_model()
    pack(tmp_path, tmp_path)
    export_semi_structured(tmp_path, tmp_path)
    Timing("a GPU", {"eager": Choice(None, [])}, origin_of(tmp_path / SEMI_STRUCTURED_FILE)).save(tmp_path)
    of_no_file = "## Speed on a CPU\n\nof an earlier model\n\n"
    (tmp_path / "README.md").write_text(
        f"# Mine\n\n{of_no_file}## Speed on sparse tensor cores\n\nfast\n\n## Citation\n\nX\n"
    )
    others = ("adapter_config.json", "adapter_model.safetensors", "model-00001-of-00002.safetensors", "model.onnx")
    for name in others:
        (tmp_path / name).write_text("of an earlier model")
    (tmp_path / "runs").mkdir()
    trainer.save_model()
    names = {path.name for path in tmp_path.iterdir()}
    assert names >= {PACKED_FILE, SEMI_STRUCTURED_FILE, TIMING_FILE, "runs"} and not names & set(others)
    card = (tmp_path / "README.md").read_text()
    assert "fast" in card and "CPU" not in card
    verify(tmp_path, "2:4")
    with torch.no_grad():
        trainer.model.classifier.bias += 1
    trainer.save_model()
    assert not names & {path.name for path in tmp_path.iterdir()} & {PACKED_FILE, SEMI_STRUCTURED_FILE, TIMING_FILE}
    assert (tmp_path / "README.md").read_text() == "# Mine\n\n## Citation\n\nX\n"


def test_another_output_folder_gets_one_model(saved, tmp_path):
    out = tmp_path / "files"
    pack(saved, out)
    export_semi_structured(saved, out)
    assert (out / PACKED_FILE).exists() and origin_of(out / PACKED_FILE) == PruningState.load(saved).weights
    save_pruned(tmp_path / "other", 0.5, "2:4", seed=1)
    export_semi_structured(tmp_path / "other", out)
    assert not (out / PACKED_FILE).exists()
    load_semi_structured(out)


def test_files_of_earlier_versions_are_read(saved):
    export_semi_structured(saved, saved)
    path = saved / SEMI_STRUCTURED_FILE
    content = path.read_bytes()
    size = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + size])
    fields = {name: text for name, text in header["__metadata__"].items() if name not in (ORIGIN, "checksum")}
    header["__metadata__"] = fields | {"checksum": header_checksum(fields)}
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + content[8 + size :])
    load_semi_structured(saved)
    verify(saved, "2:4")
