"""Trimmed tokenizers split the texts as before, know every character that was known, and reload."""

import random

import pytest
from tiny_tokenizers import ENGLISH, KINDS, WORDS, gpt2, roberta, texts, with_byte_fallback
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from hf_maskselect.surgery.tokenizer_vocabulary import needed_ids, order_of, tokenizer_content, trimmed_tokenizer

OTHER = "ẞ⅞漢ж𝄞ñ~|" + "".join(WORDS)  # characters of which some are in no vocabulary


def trim(tokenizer, corpus):
    """The trimmed tokenizer, and the new ids by the old ones."""
    content = tokenizer_content(tokenizer)
    used = {index for ids in tokenizer(corpus)["input_ids"] for index in ids}
    renaming = {old: new for new, old in enumerate(order_of(content, needed_ids(content, used)))}
    return trimmed_tokenizer(tokenizer, renaming), renaming


def renamed(ids, renaming):
    return [renaming[index] for index in ids]


@pytest.mark.parametrize("kind", KINDS)
def test_texts_keep_their_tokens_after_a_reload(kind, tmp_path):
    tokenizer, corpus = kind(), texts(40, words=ENGLISH)
    small, renaming = trim(tokenizer, corpus)
    small.save_pretrained(tmp_path)
    for loaded in (small, AutoTokenizer.from_pretrained(tmp_path)):
        assert len(loaded) == len(renaming) < len(tokenizer)
        assert loaded.special_tokens_map == tokenizer.special_tokens_map
        old, new = tokenizer(corpus)["input_ids"], loaded(corpus)["input_ids"]
        assert [renamed(ids, renaming) for ids in old] == new
        assert loaded.batch_decode(new) == tokenizer.batch_decode(old)
        padding = "max_length" if tokenizer.pad_token else False
        for first, second in zip(corpus, corpus[1:], strict=False):
            options = {"truncation": True, "max_length": 9, "padding": padding}
            before, after = dict(tokenizer(first, second, **options)), dict(loaded(first, second, **options))
            assert {**before, "input_ids": renamed(before["input_ids"], renaming)} == after


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_becomes_unknown(kind):
    tokenizer = kind()
    small, _ = trim(tokenizer, texts(5, words=ENGLISH))
    draw = random.Random(0)
    unknown = 0
    for text in [*texts(100), *("".join(draw.choices(OTHER, k=draw.randint(1, 12))) for _ in range(200))]:
        before = tokenizer(text)["input_ids"].count(tokenizer.unk_token_id)
        assert small(text)["input_ids"].count(small.unk_token_id) == before, text
        unknown += before
    assert (unknown == 0) == (kind in (roberta, gpt2, with_byte_fallback))  # those know all bytes


@pytest.mark.parametrize("seed", range(5))
def test_any_texts_keep_their_tokens_under_bpe_with_many_ways_to_a_token(seed):
    """Llama lists every pair that makes a token; only the pairs on the way that the texts take need to stay."""
    tokenizer, corpus = with_byte_fallback(), texts(4, seed)
    small, renaming = trim(tokenizer, corpus)
    assert [renamed(ids, renaming) for ids in tokenizer(corpus)["input_ids"]] == small(corpus)["input_ids"]
    assert len(small) < len(tokenizer)


def test_every_token_alone_is_enough_for_its_text():
    """The closure of each token of BPE, tried one by one on a small vocabulary."""
    merges = [("a", "b"), ("c", "d"), ("b", "c"), ("ab", "cd"), ("a", "bc"), ("abc", "d"), ("d", "abcd")]
    vocab = {
        token: index for index, token in enumerate(["a", "b", "c", "d", *dict.fromkeys(x + y for x, y in merges)])
    }
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE(vocab, merges)))
    for text in ("abcd", "dabcd", "bc", "ab", "abc", "bcabcd", "dd"):
        small, renaming = trim(tokenizer, [text])
        assert renamed(tokenizer(text)["input_ids"], renaming) == small(text)["input_ids"]
    content = tokenizer_content(tokenizer)
    assert needed_ids(content, [vocab["abcd"]]) == {vocab[token] for token in ("a", "b", "c", "d", "ab", "cd", "abcd")}


def test_words_that_skip_the_merges_stay_whole():
    """With `ignore_merges` a token may have no way that leads to it."""
    vocab = {token: index for index, token in enumerate(["a", "b", "ab", "bab", "abba"])}
    bpe = Tokenizer(models.BPE(vocab, [("a", "b")], ignore_merges=True))
    bpe.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe)
    small, renaming = trim(tokenizer, ["abba ab"])
    assert sorted(renaming) == [0, 1, 2, 4] and small("abba ab bab")["input_ids"] == [3, 2, 1, 2]


def test_the_price_of_an_unknown_character_stays():
    """Unigram takes it from its least likely piece, here `zz`: without it `?` would cost more than `a?b` does."""
    pieces = [("<unk>", 0.0), ("a", -1.0), ("b", -1.0), ("z", -1.0), ("ab", -3.0), ("zz", -30.0)]
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.Unigram(pieces, 0)), unk_token="<unk>")
    content = tokenizer_content(tokenizer)
    assert needed_ids(content, [1]) == {0, 1, 2, 3, 5}


def test_characters_only_inside_longer_tokens_stay_with_them(caplog):
    vocab = {token: index for index, token in enumerate(["[UNK]", "a", "##a", "##b", "ab", "aba", "ay", "##yb"])}
    pieces = Tokenizer(models.WordPiece(vocab, unk_token="[UNK]"))
    pieces.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=pieces, unk_token="[UNK]")
    small, _ = trim(tokenizer, ["a"])
    assert (
        small.tokenize("ay ayb aayb") == tokenizer.tokenize("ay ayb aayb") == ["ay", "ay", "##b", "a", "##a", "##yb"]
    )
    assert "aba" not in small.get_vocab()
    assert "2 tokens, such as '##yb', hold characters that have no token" in caplog.text


def test_tokens_that_a_user_added_stay():
    for kind in KINDS:
        tokenizer = kind()
        tokenizer.add_tokens([AddedToken("<one>"), "zweitens"])
        tokenizer.add_special_tokens({"extra_special_tokens": ["<three>"]})
        small, renaming = trim(tokenizer, texts(3, words=ENGLISH))
        assert {"<one>", "zweitens", "<three>"} <= small.get_vocab().keys()
        assert tokenizer.tokenize("<one><three>") == small.tokenize("<one><three>")
        assert renamed(tokenizer("<one><three>")["input_ids"], renaming) == small("<one><three>")["input_ids"]


def test_ids_in_the_post_processor_and_the_padding_follow():
    tokenizer = KINDS[0]()
    shift = ["[unused0]", "[unused1]"]
    content = tokenizer_content(tokenizer)
    vocab = {token: index for index, token in enumerate([*shift, *content["model"]["vocab"]])}
    tokenizer = type(tokenizer)(vocab=vocab)
    tokenizer.backend_tokenizer.enable_padding(pad_id=tokenizer.pad_token_id, length=12)
    small, renaming = trim(tokenizer, ["the film"])
    assert [renaming[index] for index in tokenizer.all_special_ids] == small.all_special_ids
    assert small.backend_tokenizer.padding is None  # calling a tokenizer clears what its file said


@pytest.mark.parametrize("change", ["words", "dropout", "slow"])
def test_tokenizers_that_cannot_be_trimmed_are_refused(change):
    if change == "slow":
        with pytest.raises(ValueError, match="str has no tokenizer.json: pass the tokenizer"):
            tokenizer_content("bert-base-uncased")
        return
    model = models.WordLevel({"a": 0}, unk_token="a") if change == "words" else models.BPE({"a": 0}, [], dropout=0.1)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(model))
    message = "WordLevel knows only whole words" if change == "words" else r"at random \(dropout=0.1\)"
    with pytest.raises(ValueError, match=message):
        tokenizer_content(tokenizer)
