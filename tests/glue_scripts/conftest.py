"""Shared inputs of the script tests: a tiny model, and generated files with the columns of GLUE."""

import json

import pytest
from tiny import make

from demo_data import demo_tokenizer, make_sentences


@pytest.fixture(scope="session")
def start(tmp_path_factory):
    """A tiny untrained BERT with the demo's tokenizer."""
    folder = tmp_path_factory.mktemp("start")
    tokenizer = demo_tokenizer()
    make(head="Model", vocab_size=len(tokenizer)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def data_dir(tmp_path_factory):
    """sst2 (classes), stsb (regression) and mnli (two validation splits), 64 and 24 rows."""
    folder = tmp_path_factory.mktemp("data")
    sentences, labels = make_sentences(88)

    def write(task, split, rows):
        (folder / task).mkdir(exist_ok=True)
        (folder / task / f"{split}.jsonl").write_text("\n".join(json.dumps(row) for row in rows))

    for split, part in (("train", slice(64)), ("validation", slice(64, 88))):
        rows = list(zip(sentences[part], labels[part], strict=True))
        write("sst2", split, [{"sentence": s, "label": y, "idx": i} for i, (s, y) in enumerate(rows)])
        pairs = [{"sentence1": s, "sentence2": s[::-1], "label": y * 3.5, "idx": i} for i, (s, y) in enumerate(rows)]
        write("stsb", split, pairs)
        three = [{"premise": s, "hypothesis": s[:9], "label": i % 3, "idx": i} for i, (s, _) in enumerate(rows)]
        for name in [split] if split == "train" else ["validation_matched", "validation_mismatched"]:
            write("mnli", name, three)
    return str(folder)
