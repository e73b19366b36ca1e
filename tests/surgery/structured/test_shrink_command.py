"""The command `shrink`: what it writes loads in a process without this package, or nothing is written."""

import json

import pytest
from small_models import make_model, rows_for
from transformers import AutoModelForSequenceClassification, BertTokenizerFast

from hf_maskselect.cli import main
from hf_maskselect.storage.reload import save_reloadable
from hf_maskselect.storage.verify import check_smaller
from hf_maskselect.surgery.structured.batches import batches_of, rows_of
from hf_maskselect.surgery.structured.layer_shapes import LayerShapes


@pytest.fixture
def folder(tmp_path):
    make_model().save_pretrained(tmp_path / "dense")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(f"w{number}" for number in range(59))]
    (tmp_path / "vocab.txt").write_text("\n".join(words))
    BertTokenizerFast(str(tmp_path / "vocab.txt")).save_pretrained(tmp_path / "dense")
    rows = [
        {"text": " ".join(f"w{(7 * row + word) % 59}" for word in range(3 + row % 5)), "label": 0} for row in range(40)
    ]
    (tmp_path / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return tmp_path


def shrink(folder, *options):
    given = [str(folder / "dense"), "--rows", str(folder / "train.jsonl"), "--output", str(folder / "small")]
    return main(["shrink", *given, "--batch-size", "1", "--seq-len", "8", "--candidates", "3", *options])


@pytest.mark.slow
def test_the_command_writes_a_model_that_reloads(folder, capsys):
    assert shrink(folder, "--sparsity", "0.4") == 0
    assert "plain transformers loads" in capsys.readouterr().out
    small = AutoModelForSequenceClassification.from_pretrained(folder / "small")
    assert small.num_parameters() < make_model().num_parameters()
    assert (folder / "small" / "tokenizer.json").is_file()
    assert shrink(folder, "--sparsity", "0.4") == 1  # the folder holds a model now
    assert "already holds the weights of a model" in capsys.readouterr().err


@pytest.mark.slow
def test_free_shapes_reload_after_the_import(folder, capsys):
    assert shrink(folder, "--sparsity", "0.6", "--keep-shape", "free") == 0
    assert "which transformers after `import hf_maskselect` loads" in capsys.readouterr().out
    small = AutoModelForSequenceClassification.from_pretrained(folder / "small")
    assert LayerShapes.of(small.config) is not None and not hasattr(small.config, "quantization_config")
    assert "import hf_maskselect  # gives" in (folder / "small" / "README.md").read_text()
    assert main(["report", str(folder / "small")]) == 0
    assert "heads" in capsys.readouterr().out
    check_smaller(folder / "small")


def test_bad_usage(folder, capsys):
    with pytest.raises(SystemExit):
        shrink(folder)
    assert "one of the arguments --speedup --sparsity is required" in capsys.readouterr().err
    assert shrink(folder, "--speedup", "0.5") == 1
    assert "shrink failed: speedup=0.5 must be a number above 1" in capsys.readouterr().err
    assert not (folder / "small").exists()


@pytest.mark.slow
def test_what_does_not_reload_is_not_saved(folder):
    model = make_model()
    batch = batches_of(rows_of(rows_for(model), model), model)[0]
    model.config.num_hidden_layers = 2
    with pytest.raises(ValueError, match="does not reload by plain transformers .*: nothing was saved"):
        save_reloadable(model, folder / "small", batch, folder / "dense")
    assert not (folder / "small").exists()
    with pytest.raises(ValueError, match="holds the model to start from"):
        save_reloadable(model, folder / "dense", batch, folder / "dense")
