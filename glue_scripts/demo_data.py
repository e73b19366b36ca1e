"""Generate a sentence task for `--task_name demo`: no download, and training takes a minute on two cores.

The sentences come from a small grammar and are labelled positive or negative. Counting words does not solve the task:

* a negation flips a word ("the soup was far from cold"),
* a contrast selects a clause ("although the soup was cold , the view was lovely"),
* a verdict flips a whole report ("the guide claimed that the soup was cold , and nobody agreed").
"""

from __future__ import annotations

import random
from collections.abc import Callable

from datasets import ClassLabel, Dataset, DatasetDict, Features, Value
from transformers import BertConfig, BertTokenizerFast, PreTrainedTokenizerFast

LABELS = ["negative", "positive"]
SPECIAL_TOKENS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]

ADJECTIVES = {
    1: """good great lovely bright warm fresh clever kind gentle pleasant charming elegant funny brilliant superb
        delightful friendly helpful honest generous cheerful comfortable clean quiet tasty splendid graceful lively
        wonderful""".split(),
    0: """bad awful ugly dull cold stale foolish rude harsh unpleasant boring clumsy sad dreadful terrible horrible
        hostile useless dishonest greedy gloomy painful dirty noisy bland shabby awkward tedious nasty""".split(),
}
THINGS = """film book meal soup bread hotel room garden concert song lecture story train market museum beach party game
    coffee dinner painting play village harbour kitchen window chair lamp jacket letter""".split()
PEOPLE = "teacher waiter driver doctor farmer singer painter writer sailor baker guide nurse clerk cook judge".split()
COPULAS = "was seemed felt looked remained".split()
DEGREES = ["", "", "very", "really", "quite", "rather", "truly"]
NEGATIONS = ["was not", "was never", "was hardly", "was far from", "was anything but"]
REPORTS = "said claimed believed wrote insisted".split()


def _clause(rng: random.Random, polarity: int) -> str:
    """Draw a statement about one thing; one in four is negated and has an adjective of the other polarity."""
    negated = rng.random() < 0.25
    copula = rng.choice(NEGATIONS if negated else COPULAS)
    adjective = rng.choice(ADJECTIVES[polarity ^ negated])
    return " ".join(f"the {rng.choice(THINGS)} {copula} {rng.choice(DEGREES)} {adjective}".split())


def _contrast(rng: random.Random, label: int) -> str:
    """Draw a sentence with a main clause, which decides the label, and a contrasting clause."""
    main, aside = _clause(rng, label), _clause(rng, rng.randrange(2))
    return rng.choice([f"although {aside} , {main}", f"{main} although {aside}", f"{aside} , but {main}"])


def _report(rng: random.Random, label: int) -> str:
    """Draw a sentence that reports a statement, with a verdict that keeps or flips its label."""
    believed = rng.random() < 0.65
    said = _clause(rng, label if believed else 1 - label)
    verdict = rng.choice(["everyone", "everybody"] if believed else ["nobody", "hardly anyone"])
    return f"the {rng.choice(PEOPLE)} {rng.choice(REPORTS)} that {said} , and {verdict} agreed"


# Kinds of sentences, with their number in ten.
FRAMES: list[tuple[Callable[[random.Random, int], str], int]] = [(_clause, 3), (_contrast, 4), (_report, 3)]


def make_sentences(count: int, seed: int = 0) -> tuple[list[str], list[int]]:
    """Draw `count` different sentences with their labels (0 negative, 1 positive), alternating so both are balanced.

    The same seed gives the same sentences, and a larger `count` begins with the sentences of a smaller one.

    Raises:
        ValueError: `count` is below 1.
    """
    if count < 1:
        raise ValueError(f"count={count} is not a number of sentences: give 1 or more")
    rng = random.Random(seed)
    frames, shares = zip(*FRAMES, strict=True)
    drawn: dict[str, int] = {}
    while len(drawn) < count:
        label = len(drawn) % 2
        frame = rng.choices(frames, shares)[0]
        drawn.setdefault(f"{frame(rng, label)} .", label)
    return list(drawn), list(drawn.values())


def load_demo(train_size: int = 8000, validation_size: int = 1000, seed: int = 0) -> DatasetDict:
    """Return the demo task with the columns `sentence`, `label` (0 or 1) and `idx`; no sentence is in both splits.

    Raises:
        ValueError: a size is below 1.
    """
    for name, size in {"train_size": train_size, "validation_size": validation_size}.items():
        if size < 1:
            raise ValueError(f"{name}={size} leaves the split empty: give 1 or more")
    sentences, labels = make_sentences(train_size + validation_size, seed)
    features = Features({"sentence": Value("string"), "label": ClassLabel(names=LABELS), "idx": Value("int32")})
    # Validation comes first, so that it stays the same with more train sentences.
    slices = {"train": slice(validation_size, None), "validation": slice(0, validation_size)}
    return DatasetDict(
        {
            split: Dataset.from_dict(
                {"sentence": sentences[part], "label": labels[part], "idx": list(range(len(labels[part])))},
                features=features,
            )
            for split, part in slices.items()
        }
    )


def demo_vocabulary() -> list[str]:
    """List the tokens of the demo: special tokens, single characters (which spell any plain text), then words."""
    lists = (*ADJECTIVES.values(), THINGS, PEOPLE, COPULAS, DEGREES, NEGATIONS, REPORTS)
    words = {word for phrases in lists for phrase in phrases for word in phrase.split()}
    words.update("although the but and that".split())
    words.update("everyone everybody nobody anyone agreed".split())
    letters = "abcdefghijklmnopqrstuvwxyz0123456789"
    characters = [*letters, *(f"##{letter}" for letter in letters), *".,!?'-"]
    return [*SPECIAL_TOKENS, *characters, *sorted(words)]


def demo_tokenizer() -> PreTrainedTokenizerFast:
    """Return a BERT tokenizer over `demo_vocabulary()`; `AutoTokenizer.from_pretrained` loads it once it is saved."""
    vocabulary = {token: index for index, token in enumerate(demo_vocabulary())}
    return BertTokenizerFast(vocab=vocabulary, model_max_length=64)


def demo_model_config() -> BertConfig:
    """Return the configuration of a small BERT: 4 layers of width 128, 0.8 M encoder weights, 64 positions.

    Three epochs (750 steps) with batches of 32 and a learning rate of 5e-4, after 10 % warm-up and with linear decay,
    gave an accuracy of 0.985 to 1.000 with four seeds. After a magnitude cut of 93.75 % of the encoder and one more
    epoch, the accuracy was 0.81.
    """
    return BertConfig(
        vocab_size=len(demo_vocabulary()),
        hidden_size=128,
        num_hidden_layers=4,
        num_attention_heads=4,
        intermediate_size=512,
        max_position_embeddings=64,
        # So small a model does not memorise these sentences, so dropout would only slow down the training.
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        # Larger than BERT's 0.02: a narrow model that trains from scratch leaves the flat start much sooner.
        initializer_range=0.05,
        num_labels=len(LABELS),
        id2label=dict(enumerate(LABELS)),
        label2id={name: index for index, name in enumerate(LABELS)},
    )
