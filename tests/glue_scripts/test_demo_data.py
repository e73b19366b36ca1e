"""The generated task is reproducible and balanced, has no leaks, and cannot be solved by counting words."""

import numpy as np
import pytest
from transformers import AutoTokenizer, BertForSequenceClassification

import demo_data
from demo_data import demo_model_config, demo_tokenizer, load_demo, make_sentences
from tasks import TASKS


@pytest.fixture(scope="module")
def demo():
    return load_demo(train_size=2000, validation_size=500)


def test_schema(demo):
    assert demo["train"].column_names == ["sentence", "label", "idx"]
    assert demo["train"].features["label"].names == TASKS["demo"].labels == demo_data.LABELS
    assert demo["validation"]["idx"][:] == list(range(500))


def test_same_seed_same_sentences(demo):
    assert load_demo(2000, 500)["train"].to_dict() == demo["train"].to_dict()
    assert make_sentences(20, seed=1) != make_sentences(20, seed=2)
    # Pins the data across machines and Python versions, on which reported numbers rest.
    assert make_sentences(2) == (
        [
            "the writer believed that the beach felt really friendly , and hardly anyone agreed .",
            "the village felt truly useless , but the song remained warm .",
        ],
        [0, 1],
    )


def test_more_training_sentences_leave_validation_alone(demo):
    assert load_demo(3000, 500)["validation"].to_dict() == demo["validation"].to_dict()


def test_splits_are_balanced_and_disjoint(demo):
    train, validation = set(demo["train"]["sentence"]), set(demo["validation"]["sentence"])
    assert len(train) == 2000 and len(validation) == 500 and not train & validation
    assert np.mean(demo["train"]["label"]) == np.mean(demo["validation"]["label"]) == 0.5


def test_labels_follow_from_the_words():
    """Read the sentences clause by clause, independently of the generator."""
    good, bad = (set(demo_data.ADJECTIVES[polarity]) for polarity in (1, 0))

    def clause(text: str) -> int:
        assert len(set(text.split()) & (good | bad)) == 1
        return bool(set(text.split()) & good) ^ any(negation in text for negation in demo_data.NEGATIONS)

    for sentence, label in zip(*make_sentences(1000, seed=3), strict=True):
        text = sentence.removesuffix(" .")
        if text.endswith("agreed"):
            said, verdict = text.split(" that ")[1].split(" , and ")
            expected = clause(said) ^ verdict.startswith(("nobody", "hardly"))
        elif text.startswith("although"):
            expected = clause(text.split(" , ")[1])
        elif " although " in text:
            expected = clause(text.split(" although ")[0])
        else:
            expected = clause(text.split(" , but ")[-1])
        assert expected == label, sentence


def test_counting_words_is_not_enough(demo):
    text = pytest.importorskip("sklearn.feature_extraction.text")
    linear = pytest.importorskip("sklearn.linear_model")
    counter = text.CountVectorizer()
    features = counter.fit_transform(demo["train"]["sentence"])
    model = linear.LogisticRegression(max_iter=1000).fit(features, demo["train"]["label"])
    score = model.score(counter.transform(demo["validation"]["sentence"]), demo["validation"]["label"])
    assert score < 0.8


def test_tokenizer_knows_every_word_and_loads_back(demo, tmp_path):
    tokenizer = demo_tokenizer()
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    sentences = demo["train"]["sentence"][:200] + ["Unknown words are spelt!"]
    assert loaded(sentences)["input_ids"] == tokenizer(sentences)["input_ids"]
    assert loaded.model_max_length == tokenizer.model_max_length == demo_model_config().max_position_embeddings
    for sentence in sentences[:200]:
        assert tokenizer.tokenize(sentence) == sentence.split()
    assert tokenizer.unk_token not in tokenizer.tokenize(sentences[-1])


def test_vocabulary_has_no_repeats():
    vocabulary = demo_data.demo_vocabulary()
    assert len(set(vocabulary)) == len(vocabulary) == demo_model_config().vocab_size == len(demo_tokenizer())


def test_longest_sentence_fits(demo):
    lengths = [len(ids) for ids in demo_tokenizer()(demo["train"]["sentence"][:])["input_ids"]]
    assert max(lengths) <= TASKS["demo"].max_length


def test_model_takes_the_tokens(demo):
    model = BertForSequenceClassification(demo_model_config())
    batch = demo_tokenizer()(demo["train"]["sentence"][:2], padding=True, return_tensors="pt")
    assert model(**batch).logits.shape == (2, 2)
    assert model.config.id2label == {0: "negative", 1: "positive"}


@pytest.mark.parametrize("sizes", [{"train_size": 0}, {"validation_size": -1}])
def test_empty_split_is_refused(sizes):
    with pytest.raises(ValueError, match=f"{next(iter(sizes))}=.* leaves the split empty"):
        load_demo(**sizes)


def test_no_sentences_is_refused():
    with pytest.raises(ValueError, match="count=0"):
        make_sentences(0)
