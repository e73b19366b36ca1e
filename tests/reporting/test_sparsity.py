"""Counts, the check of a saved folder, and the console's exit codes."""

import dataclasses
import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import make
from transformers import BertForSequenceClassification

from hf_maskselect import MaskSet, PruningState, prunable_weights, sparsity_report, verify
from hf_maskselect.cli import main
from hf_maskselect.masking.patterns import Unstructured
from hf_maskselect.storage.state import STATE_FILE

WEIGHTS = "model.safetensors"
QUERY = "bert.encoder.layer.0.attention.self.query.weight"


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A pruned model and its state as they are saved; do not change."""
    folder = tmp_path_factory.mktemp("saved")
    model = make()
    scores = {name: weight.detach().abs() for name, weight in prunable_weights(model).items()}
    masks = MaskSet(Unstructured("global").masks(scores, 0.75))
    masks.apply_(model)
    model.save_pretrained(folder)
    PruningState(masks, "magnitude", "unstructured", 0.75, step=10, level=0, seed=42).sealed(folder).save(folder)
    return folder


@pytest.fixture
def copied(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / "copy")


def change_weights(folder, change):
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS, {"format": "pt"})


def change_state(folder, **fields):
    dataclasses.replace(PruningState.load(folder), **fields).save(folder)


def revive(tensors):
    row, column = (tensors[QUERY] == 0).nonzero()[0]
    tensors[QUERY][row, column] = 1e-6


# -- report -----------------------------------------------------------------------------------------------------------


def test_a_report_counts_the_saved_tensors_with_their_denominators(saved):
    report = sparsity_report(saved)
    tensors = load_file(saved / WEIGHTS)
    assert {t.name: (t.zeros, t.total, t.shape) for t in report.tensors} == {
        name: (int((tensor == 0).sum()), tensor.numel(), tuple(tensor.shape)) for name, tensor in tensors.items()
    }
    layer = 4 * 32 * 32 + 2 * 32 * 64
    assert (report.prunable_zeros, report.prunable_total, report.sparsity) == (layer * 2 * 3 // 4, layer * 2, 0.75)
    assert report.total == sum(tensor.numel() for tensor in tensors.values())
    assert report.zeros == sum(int((tensor == 0).sum()) for tensor in tensors.values()) > report.prunable_zeros
    text = str(report)
    assert QUERY in text and "embeddings" not in text
    for zeros, total in ((report.prunable_zeros, report.prunable_total), (report.zeros, report.total)):
        assert any(f"{zeros:,}" in line and f"{total:,}" in line for line in text.splitlines())


def test_folder_and_model_in_memory_are_counted_alike(saved):
    model = BertForSequenceClassification.from_pretrained(saved)
    in_memory, on_disk = sparsity_report(model), sparsity_report(str(saved))
    assert set(in_memory.tensors) == set(on_disk.tensors)


def test_what_was_left_out_of_pruning_is_left_out_of_the_count():
    model = make()
    whole, part = sparsity_report(model), sparsity_report(model, exclude_modules=["query"])
    assert whole.prunable_total - part.prunable_total == 2 * 32 * 32 and whole.total == part.total
    assert sparsity_report(model, target_modules=["query"]).prunable_total == 2 * 32 * 32


def test_a_dense_folder_without_state_is_reported(tmp_path):
    model = make("Roberta")
    model.save_pretrained(tmp_path)
    report = sparsity_report(tmp_path)
    assert report.prunable_zeros == 0 and report.prunable_total == 2 * (4 * 32 * 32 + 2 * 32 * 64)
    assert {t.name for t in report.tensors if t.prunable} == set(prunable_weights(model))
    assert main(["report", str(tmp_path)]) == 0


def test_the_state_says_what_was_prunable(copied):
    state = PruningState.load(copied)
    change_state(copied, masks=MaskSet({QUERY: state.masks[QUERY]}))
    report = sparsity_report(copied)
    assert [t.name for t in report.tensors if t.prunable] == [QUERY] and report.prunable_total == 32 * 32


# -- verify -----------------------------------------------------------------------------------------------------------


def test_a_good_folder_is_verified(saved, capsys):
    assert main(["verify", str(saved)]) == 0
    assert "12,288 of 16,384" in capsys.readouterr().out
    assert verify(saved).sparsity == 0.75


def test_a_folder_in_shards_is_verified_and_counted(saved, copied):
    model = make()
    model.load_state_dict(load_file(copied / WEIGHTS))
    (copied / WEIGHTS).unlink()
    model.save_pretrained(copied, max_shard_size="40KB")
    assert len(list(copied.glob("model-*.safetensors"))) > 1
    assert main(["verify", str(copied)]) == 0
    assert set(sparsity_report(copied).tensors) == set(sparsity_report(saved).tensors)
    shard = json.loads((copied / "model.safetensors.index.json").read_text())["weight_map"][QUERY]
    tensors = load_file(copied / shard)
    revive(tensors)
    save_file(tensors, copied / shard, {"format": "pt"})
    assert main(["verify", str(copied)]) == 1


def tampered_weight(folder):
    change_weights(folder, revive)
    return f"{QUERY} has 1 non-zero"


def target_not_met(folder):
    change_state(folder, sparsity=0.9)
    return "keeps 1638"


def missing_tensor(folder):
    change_weights(folder, lambda tensors: tensors.pop(QUERY))
    return QUERY


def unexpected_tensor(folder):
    change_weights(folder, lambda tensors: tensors.update({"mask.logits": torch.zeros(3)}))
    return "the weights are not those"


def missing_bias(folder):
    change_weights(folder, lambda tensors: tensors.pop("bert.pooler.dense.bias"))
    return "the weights are not those"


def no_state(folder):
    (folder / STATE_FILE).unlink()
    return STATE_FILE


def no_weights(folder):
    (folder / WEIGHTS).unlink()
    return WEIGHTS


def no_config(folder):
    (folder / "config.json").unlink()
    return "config.json"


def unreadable_config(folder):
    (folder / "config.json").write_text("{")
    return "config.json"


def foreign_architecture(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "architectures": ["BertTokenizer"]}))
    PruningState.load(folder).sealed(folder).save(folder)
    return "'BertTokenizer'"


def changed_config(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "hidden_act": "relu"}))
    return "config.json is not the one"


def unexpected_tensor_of_a_sealed_state(folder):
    unexpected_tensor(folder)
    PruningState.load(folder).sealed(folder).save(folder)
    return "mask.logits"


def missing_bias_of_a_sealed_state(folder):
    missing_bias(folder)
    PruningState.load(folder).sealed(folder).save(folder)
    return "bert.pooler.dense.bias"


def truncated_state(folder):
    (folder / STATE_FILE).write_bytes((folder / STATE_FILE).read_bytes()[:-5])
    return STATE_FILE


def truncated_weights(folder):
    (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:-5])
    return WEIGHTS


def state_of_another_size(folder):
    change_state(folder, masks=MaskSet.ones(prunable_weights(make(hidden_size=64))))
    return QUERY.partition(".self")[0]


def state_of_another_model(folder):
    change_state(folder, masks=MaskSet.ones(prunable_weights(make("Roberta"))))
    return "roberta"


def masks_without_a_run(folder):
    PruningState.load(folder).masks.save(folder / STATE_FILE)
    return STATE_FILE


BROKEN = [tampered_weight, target_not_met, missing_tensor, unexpected_tensor, missing_bias, no_state, no_weights]
BROKEN += [no_config, unreadable_config, foreign_architecture, truncated_state, truncated_weights]
BROKEN += [changed_config, unexpected_tensor_of_a_sealed_state, missing_bias_of_a_sealed_state]
BROKEN += [state_of_another_size, state_of_another_model, masks_without_a_run]


@pytest.mark.parametrize("change", BROKEN, ids=lambda change: change.__name__)
def test_a_broken_folder_fails_with_its_reason(copied, capsys, change):
    named = change(copied)
    assert main(["verify", str(copied)]) == 1
    captured = capsys.readouterr()
    assert captured.out == "" and "verify failed: " in captured.err and named in captured.err


@pytest.mark.parametrize(
    "change",
    [truncated_weights, truncated_state, masks_without_a_run, state_of_another_model],
    ids=lambda c: c.__name__,
)
def test_a_damaged_folder_is_not_reported(copied, capsys, change):
    named = change(copied)
    assert main(["report", str(copied)]) == 1
    assert named in capsys.readouterr().err


def test_an_empty_folder_fails(tmp_path, capsys):
    assert main(["verify", str(tmp_path)]) == 1
    assert main(["report", str(tmp_path)]) == 1
    assert "verify failed" in (errors := capsys.readouterr().err) and "report failed" in errors


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["report"],
        ["verify"],
        ["frobnicate", "."],
        ["verify", "no/such/folder"],
        ["verify", ".", "--pattern", "foo"],
        ["verify", ".", "--pattern", "channel"],
        ["export", ".", "--output", "out", "--exclude-modules", "("],
        *([command, ".", "--output", __file__] for command in ("pack", "unpack", "plot", "export")),
        ["pack", ".", "--output", f"{__file__}/out"],
    ],
)
def test_bad_usage_exits_with_2(arguments, capsys):
    with pytest.raises(SystemExit) as exit_:
        main(arguments)
    assert exit_.value.code == 2 and "usage: hf-maskselect" in capsys.readouterr().err


def test_a_file_is_no_folder(saved):
    with pytest.raises(SystemExit) as exit_:
        main(["verify", str(saved / WEIGHTS)])
    assert exit_.value.code == 2


def test_labels_and_versions_in_the_configuration_may_change(copied):
    config = json.loads((copied / "config.json").read_text())
    told = {"id2label": {"0": "bad", "1": "good"}, "label2id": {"bad": 0, "good": 1}, "transformers_version": "5.99"}
    (copied / "config.json").write_text(json.dumps({**config, **told}))
    verify(copied)


# -- state ------------------------------------------------------------------------------------------------------------


def test_a_state_comes_back_from_its_folder(saved, tmp_path):
    state = PruningState.load(saved)
    other = dataclasses.replace(state, method="random", pattern="2:4", sparsity=1 / 3, step=0, level=-1, seed=2**40)
    other.save(tmp_path)
    back = PruningState.load(tmp_path)
    for field in dataclasses.fields(back):
        if field.name != "masks":
            assert getattr(back, field.name) == getattr(other, field.name), field.name
    assert back.masks.digest() == state.masks.digest()
    assert PruningState.find(tmp_path).step == 0


def test_a_folder_without_state_has_none(tmp_path):
    assert PruningState.find(tmp_path) is None
    with pytest.raises(ValueError, match=f"no {STATE_FILE}"):
        PruningState.load(tmp_path)


def test_a_flipped_bit_in_the_state_never_gives_other_masks(copied):
    path = copied / STATE_FILE
    content, masks = path.read_bytes(), PruningState.load(copied).masks
    for position in range(0, len(content), 3):
        damaged = bytearray(content)
        damaged[position] ^= 1 << (position % 7)
        path.write_bytes(bytes(damaged))
        try:
            state = PruningState.load(copied)
        except ValueError:
            continue
        assert state.masks.digest() == masks.digest(), position


@pytest.mark.parametrize(
    "other", [("random", "unstructured", 0.75), ("magnitude", "2:4", 0.75), ("magnitude", "unstructured", 0.7)]
)
def test_another_run_cannot_resume(saved, other):
    state = PruningState.load(saved)
    state.check_resumes("magnitude", "unstructured", 0.75)
    with pytest.raises(ValueError, match="resume with the same"):
        state.check_resumes(*other)
