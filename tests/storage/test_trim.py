"""A trimmed folder keeps its masks, and goes on through every other command."""

import json
import shutil

import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file, save_file
from tiny import save_pruned
from tiny_tokenizers import ENGLISH, bert, texts
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from hf_maskselect import (
    MaskSet,
    PruningState,
    export_cpu,
    load_cpu,
    load_pruned,
    pack,
    sparsity_report,
    trim_folder,
    unpack,
    verify,
)
from hf_maskselect.cli import main

CORPUS = texts(40, words=ENGLISH)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A folder with a model of 1x4 blocks, its tokenizer in the files of today and of before, and a card."""
    folder = tmp_path_factory.mktemp("saved")
    tokenizer = bert()
    save_pruned(folder, 0.75, "1x4", vocab_size=len(tokenizer))
    tokenizer.save_pretrained(folder)
    (folder / "vocab.txt").write_text("\n".join(tokenizer.get_vocab()))
    (folder / "special_tokens_map.json").write_text("{}")
    (folder / "README.md").write_text("# A card")
    return folder


@pytest.fixture(scope="module")
def trimmed(saved, tmp_path_factory):
    folder = tmp_path_factory.mktemp("trimmed")
    trim_folder(saved, folder, CORPUS)
    return folder


def logits(model, folder):
    batch = AutoTokenizer.from_pretrained(folder)(CORPUS[:8], padding=True, return_tensors="pt")
    with torch.no_grad():
        return model.eval()(**batch).logits


def test_the_folder_reloads_plainly_with_the_same_outputs(saved, trimmed):
    before, after = (AutoModelForSequenceClassification.from_pretrained(folder) for folder in (saved, trimmed))
    assert torch.equal(logits(before, saved), logits(after, trimmed))
    assert {path.name for path in trimmed.iterdir()} == {
        "README.md",
        "config.json",
        "model.safetensors",
        "pruning_state.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    }


def test_masks_stay_true(saved, trimmed):
    assert verify(trimmed, "1x4").masks.digest() == PruningState.load(saved).masks.digest()
    model, masks = load_pruned(trimmed)
    assert masks.digest() == MaskSet.from_zeros(model).digest()
    assert sparsity_report(trimmed).sparsity == sparsity_report(saved).sparsity == 0.75


def test_a_trimmed_folder_is_packed_and_unpacked(trimmed, tmp_path):
    pack(trimmed, tmp_path / "packed")
    unpack(tmp_path / "packed", tmp_path / "back")
    assert verify(tmp_path / "back").sparsity == 0.75
    model = AutoModelForSequenceClassification.from_pretrained(trimmed)
    assert torch.equal(logits(load_pruned(tmp_path / "packed")[0], tmp_path / "packed"), logits(model, trimmed))


@pytest.mark.slow
def test_a_trimmed_folder_is_exported_for_the_cpu(trimmed, tmp_path):
    export_cpu(trimmed, tmp_path, int8=False, batch_sizes=[1], seq_lens=[8])
    model = AutoModelForSequenceClassification.from_pretrained(trimmed)
    assert torch.allclose(logits(load_cpu(tmp_path), tmp_path), logits(model, trimmed), atol=1e-5)


def test_the_command_trims(saved, tmp_path, capsys):
    (tmp_path / "a.txt").write_text("\n".join(CORPUS[:20]))
    rows = [
        {"first": text, "label": 1, "second": other} for text, other in zip(CORPUS[20:30], CORPUS[30:], strict=True)
    ]
    Dataset.from_list(rows).to_parquet(tmp_path / "b.parquet")
    with open(tmp_path / "c.jsonl", "w") as file:
        file.writelines(json.dumps({"text": text, "more": None}) + "\n" for text in texts(30))
    files = [str(tmp_path / name) for name in ("a.txt", "b.parquet", "c.jsonl")]
    output = tmp_path / "small"
    arguments = [
        "trim",
        str(saved),
        "--output",
        str(output),
        "--texts",
        *files[:2],
        "--check",
        files[2],
        "--keep",
        "film",
    ]
    assert main(arguments) == 0
    printed = capsys.readouterr().out.splitlines()
    tokenizer = AutoTokenizer.from_pretrained(output)
    assert printed[0].startswith(f"{len(tokenizer)} of 400 tokens") and "40 texts are split as before" in printed[0]
    assert "of 30 texts keep their tokens" in printed[1] and printed[2] == f"wrote {output}"
    assert main(["verify", str(output), "--pattern", "1x4"]) == 0 and main(["report", str(output)]) == 0
    assert main(["trim", str(saved), "--output", str(tmp_path / "x"), "--texts", str(tmp_path / "none.txt")]) == 1
    assert "none.txt: give the texts of your task" in capsys.readouterr().err
    Dataset.from_list([{"label": 1}]).to_parquet(tmp_path / "d.parquet")
    assert main(["trim", str(saved), "--output", str(tmp_path / "x"), "--texts", str(tmp_path / "d.parquet")]) == 1
    assert "has no columns of text" in capsys.readouterr().err
    assert not (tmp_path / "x").exists()


def test_files_that_do_not_go_together_are_refused(saved, trimmed, tmp_path):
    with pytest.raises(ValueError, match="holds the model to trim: choose another output folder"):
        trim_folder(saved, saved, CORPUS)
    with pytest.raises(ValueError, match="already holds the weights of a model: choose another output folder"):
        trim_folder(saved, trimmed, CORPUS)
    pack(saved, tmp_path / "packed")
    with pytest.raises(ValueError, match="holds a packed model: unpack it first"):
        trim_folder(tmp_path / "packed", tmp_path / "x", CORPUS)
    changed = shutil.copytree(saved, tmp_path / "changed")
    weights = load_file(changed / "model.safetensors")
    save_file(
        {**weights, "classifier.bias": weights["classifier.bias"] + 1}, changed / "model.safetensors", {"format": "pt"}
    )
    with pytest.raises(ValueError, match="the weights are not those that"):
        trim_folder(changed, tmp_path / "x", CORPUS)
    bare = shutil.copytree(saved, tmp_path / "bare")
    for name in ("tokenizer.json", "tokenizer_config.json", "vocab.txt", "special_tokens_map.json"):
        (bare / name).unlink()
    with pytest.raises(ValueError, match="has no tokenizer"):
        trim_folder(bare, tmp_path / "x", CORPUS)
    assert not (tmp_path / "x").exists()


def test_a_pruned_vocabulary_is_refused(saved, tmp_path):
    folder = shutil.copytree(saved, tmp_path / "table")
    state = PruningState.load(folder)
    name = "bert.embeddings.word_embeddings.weight"
    masks = MaskSet(
        {**state.masks, name: torch.ones_like(load_file(folder / "model.safetensors")[name], dtype=torch.bool)}
    )
    PruningState(masks, "magnitude", "1x4", 0.5, step=1, level=0, seed=1).sealed(folder).save(folder)
    with pytest.raises(ValueError, match="word_embeddings.weight has a row for each token and is pruned"):
        trim_folder(folder, tmp_path / "x", CORPUS)


def test_a_model_without_masks_is_trimmed(saved, tmp_path):
    folder = shutil.copytree(saved, tmp_path / "dense")
    (folder / "pruning_state.safetensors").unlink()
    report = trim_folder(folder, tmp_path / "small", CORPUS, check=texts(20))
    assert report.second.texts == 20 and not (tmp_path / "small" / "pruning_state.safetensors").exists()
