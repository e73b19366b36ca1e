"""Load data with the columns of GLUE: files, rows, and one clear sentence for each mistake."""

import json
from pathlib import Path

import pytest
from datasets import ClassLabel, Dataset, Features, Value
from transformers import DataCollatorWithPadding

from demo_data import demo_tokenizer
from tasks import TASKS, GlueTask, get_task, load_task, tokenize


def rows(task: GlueTask, count: int = 4) -> dict[str, list]:
    columns = {
        column: [f"the {column} was good {i} ." for i in range(count)] for column in task.text_columns if column
    }
    labels = [i % task.num_labels for i in range(count)] if task.labels else [1.25 * i for i in range(count)]
    return {**columns, "label": labels, "idx": list(range(count))}


def write(path: Path, columns: dict[str, list], features: Features | None = None) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        Dataset.from_dict(columns, features=features).to_parquet(path)
    else:
        lines = [json.dumps(dict(zip(columns, row, strict=True))) for row in zip(*columns.values(), strict=True)]
        path.write_text("\n".join(lines))


@pytest.fixture
def rte(tmp_path):
    """Make a data_dir with a valid rte folder, which tests then damage."""
    for split in ("train", "validation"):
        write(tmp_path / "rte" / f"{split}.jsonl", rows(TASKS["rte"]))
    return tmp_path


class TestTable:
    def test_holds_every_task_under_its_own_name(self):
        assert set(TASKS) == {"cola", "sst2", "mrpc", "stsb", "qqp", "mnli", "qnli", "rte", "wnli", "demo"}
        assert all(name == task.name for name, task in TASKS.items())

    @pytest.mark.parametrize("task", TASKS.values(), ids=TASKS)
    def test_main_metric_is_reported(self, task):
        assert task.main_metric in task.metrics

    def test_head_sizes(self):
        assert {name: task.num_labels for name, task in TASKS.items() if task.num_labels != 2} == {
            "stsb": 1,
            "mnli": 3,
        }
        assert [name for name, task in TASKS.items() if task.is_regression] == ["stsb"]

    def test_unknown_task_lists_the_known(self):
        with pytest.raises(ValueError, match=r"unknown task 'boolq': choose one of cola, .*demo"):
            get_task("boolq")


class TestLoad:
    @pytest.mark.parametrize("suffix", [".parquet", ".jsonl", ".json"])
    @pytest.mark.parametrize("name", ["cola", "mrpc", "stsb"])
    def test_each_format_gives_the_same_rows(self, tmp_path, name, suffix):
        task = TASKS[name]
        for split in ("train", "validation"):
            write(tmp_path / name / f"{split}{suffix}", rows(task))
        splits = load_task(name, tmp_path)
        assert list(splits) == ["train", "validation"]
        assert splits["train"].to_dict() == rows(task)
        expected = Value("float32") if task.is_regression else ClassLabel(names=task.labels)
        assert splits["train"].features["label"] == expected

    def test_reports_mnli_matched_first_and_ignores_other_files(self, tmp_path):
        folder = tmp_path / "mnli"
        for split in ("train", "validation_mismatched", "validation_matched", "train_extra", "notes"):
            write(folder / f"{split}.parquet", rows(TASKS["mnli"]))
        (folder / "README.md").write_text("text")
        assert list(load_task("mnli", tmp_path)) == ["train", "validation_matched", "validation_mismatched"]

    @pytest.mark.parametrize("labels", [[-1] * 4, None], ids=["hidden", "absent"])
    def test_test_labels_may_be_missing(self, rte, labels):
        columns = rows(TASKS["rte"])
        del columns["label"]
        write(rte / "rte" / "test.jsonl", columns | ({"label": labels} if labels else {}))
        splits = load_task("rte", rte)
        assert list(splits) == ["train", "validation", "test"]
        assert ("label" in splits["test"].column_names) == bool(labels)

    def test_label_names_become_ids(self, rte):
        names = ["not_entailment", "entailment", "entailment", "not_entailment"]
        write(rte / "rte" / "train.jsonl", rows(TASKS["rte"]) | {"label": names})
        assert load_task("rte", rte)["train"]["label"][:] == [1, 0, 0, 1]

    def test_whole_number_scores_become_floats(self, tmp_path):
        for split in ("train", "validation"):
            write(tmp_path / "stsb" / f"{split}.jsonl", rows(TASKS["stsb"]) | {"label": [0, 5, 3, 1]})
        train = load_task("stsb", tmp_path)["train"]
        assert train.features["label"] == Value("float32") and train["label"][:] == [0.0, 5.0, 3.0, 1.0]

    def test_demo_needs_no_data(self, tmp_path):
        splits = load_task("demo", tmp_path)
        assert list(splits) == ["train", "validation"] and splits["train"].features["label"].names == [
            "negative",
            "positive",
        ]


class TestErrors:
    def test_missing_data_dir(self, tmp_path):
        with pytest.raises(ValueError, match="nowhere is not a folder"):
            load_task("rte", tmp_path / "nowhere")

    def test_missing_task_folder_lists_what_is_there(self, rte):
        with pytest.raises(ValueError, match=r"no folder .*cola for task 'cola': add it; .* holds rte$"):
            load_task("cola", rte)

    @pytest.mark.parametrize(
        ("gone", "message"),
        [
            ("train", r"no train split: .*holds validation\.jsonl"),
            ("validation", "no validation split: add validation"),
        ],
    )
    def test_missing_split(self, rte, gone, message):
        (rte / "rte" / f"{gone}.jsonl").unlink()
        with pytest.raises(ValueError, match=message):
            load_task("rte", rte)

    def test_two_files_for_one_split(self, rte):
        write(rte / "rte" / "train.parquet", rows(TASKS["rte"]))
        with pytest.raises(ValueError, match=r"train\.jsonl and .*train\.parquet hold split 'train'"):
            load_task("rte", rte)

    @pytest.mark.parametrize("column", ["sentence2", "label"])
    def test_missing_column_names_the_file(self, rte, column):
        columns = rows(TASKS["rte"])
        del columns[column]
        write(rte / "rte" / "validation.jsonl", columns)
        with pytest.raises(
            ValueError, match=rf"validation\.jsonl has no column '{column}'.*its columns are sentence1"
        ):
            load_task("rte", rte)

    @pytest.mark.parametrize(
        "labels",
        [[0, 1, 2, 0], [0, -1, 1, 0], [0, 0.5, 1, 0], [0, None, 1, 0], [True, False, True, True], ["yes"] * 4],
    )
    def test_label_out_of_range(self, rte, labels):
        write(rte / "rte" / "train.jsonl", rows(TASKS["rte"]) | {"label": labels})
        with pytest.raises(
            ValueError, match=r"train\.jsonl has labels that task 'rte' does not have.*0 \(entailment\)"
        ):
            load_task("rte", rte)

    @pytest.mark.parametrize("labels", [[0.5, None, 1.0, 2.0], [0.5, float("nan"), 1.0, 2.0], ["a", "b", "c", "d"]])
    def test_score_is_not_a_number(self, tmp_path, labels):
        write(tmp_path / "stsb" / "train.parquet", rows(TASKS["stsb"]) | {"label": labels})
        write(tmp_path / "stsb" / "validation.parquet", rows(TASKS["stsb"]))
        with pytest.raises(ValueError, match="give every row a finite number"):
            load_task("stsb", tmp_path)

    def test_labels_numbered_otherwise(self, rte):
        names = ClassLabel(names=["not_entailment", "entailment"])
        text = Value("string")
        features = Features({"sentence1": text, "sentence2": text, "label": names, "idx": Value("int32")})
        (rte / "rte" / "train.jsonl").unlink()
        write(rte / "rte" / "train.parquet", rows(TASKS["rte"]), features)
        with pytest.raises(ValueError, match=r"train\.parquet numbers its labels .*renumber"):
            load_task("rte", rte)

    @pytest.mark.parametrize(
        ("texts", "message"), [([1, 2, 3, 4], "holds .*int64.* in column"), (["a", None, "b", "c"], "rows without")]
    )
    def test_text_is_not_text(self, rte, texts, message):
        write(rte / "rte" / "train.jsonl", rows(TASKS["rte"]) | {"sentence1": texts})
        with pytest.raises(ValueError, match=message):
            load_task("rte", rte)

    @pytest.mark.parametrize("content", ["", "{not json", "PAR1"])
    def test_unreadable_file(self, rte, content):
        (rte / "rte" / "train.jsonl").write_text(content)
        with pytest.raises(ValueError, match=r"train\.jsonl holds no rows"):
            load_task("rte", rte)

    def test_no_rows(self, rte):
        (rte / "rte" / "train.jsonl").unlink()
        text = Value("string")
        features = Features({"sentence1": text, "sentence2": text, "label": Value("int64"), "idx": Value("int32")})
        write(rte / "rte" / "train.parquet", {column: [] for column in features}, features)
        with pytest.raises(ValueError, match=r"train\.parquet holds no rows that can be read as parquet"):
            load_task("rte", rte)


class TestTokenize:
    def test_pairs_keep_their_label_and_are_cut_but_not_padded(self, rte):
        splits = tokenize(load_task("rte", rte), TASKS["rte"], demo_tokenizer(), max_length=9)
        assert set(splits["train"].column_names) == {"input_ids", "token_type_ids", "attention_mask", "label"}
        assert {len(ids) for ids in splits["train"]["input_ids"]} == {9}
        assert set(splits["train"][0]["token_type_ids"]) == {0, 1}

    def test_batches_through_the_collator(self):
        task, tokenizer = TASKS["demo"], demo_tokenizer()
        texts = ["the soup was cold .", "the soup was not very cold ."]
        data = tokenize(Dataset.from_dict({"sentence": texts, "label": [0, 1]}), task, tokenizer)
        assert [len(ids) for ids in data["input_ids"]] == [7, 9]
        batch = DataCollatorWithPadding(tokenizer)(list(data))
        assert batch["input_ids"].shape == (2, 9) and batch["labels"].tolist() == [0, 1]

    def test_never_longer_than_the_model_takes(self):
        tokenizer = demo_tokenizer()
        data = Dataset.from_dict({"sentence": ["good " * 500], "label": [1]})
        longest = tokenizer.model_max_length
        assert len(tokenize(data, TASKS["demo"], tokenizer, max_length=400)["input_ids"][0]) == longest

    def test_refuses_no_tokens(self):
        with pytest.raises(ValueError, match="max_length=0"):
            tokenize(Dataset.from_dict({"sentence": ["a"]}), TASKS["demo"], demo_tokenizer(), max_length=0)
