"""Tiny tokenizers of every kind, trained on words of several scripts, and texts for them."""

import json
import random

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import (
    BertTokenizer,
    DebertaV2Tokenizer,
    GPT2Tokenizer,
    PreTrainedTokenizerFast,
    RobertaTokenizer,
    T5Tokenizer,
    XLMRobertaTokenizer,
)

WORDS = """
the film was slow but the actors were good and we liked the ending unhappiness unhappily happier happiest likely
unlikely walking walked walker talks talking talkative der Film war langsam aber schön gemacht straße größer müde
le film était long mais très drôle η ταινία ήταν αργή αλλά όμορφη фильм был длинным но хорошим актёры играли
прекрасно الفيلم كان طويلا لكنه جميل फ़िल्म लंबी थी पर अच्छी 映画は長かったが良かった 这部电影很慢但是很好看
영화는 길었지만 좋았다 1984 2001 !! ? ... naïve 😀 👍🏽
""".split()
ENGLISH = WORDS[:33]
BERT = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
ROBERTA = ["<s>", "<pad>", "</s>", "<unk>"]


def texts(count, seed=0, words=WORDS):
    """Texts of one to nine words."""
    draw = random.Random(seed)
    return [" ".join(draw.choices(words, k=draw.randint(1, 9))) for _ in range(count)]


def trained(tokenizer, trainer):
    """The model of the tokenizer's `tokenizer.json` after training."""
    tokenizer.train_from_iterator(texts(300, seed=1), trainer)
    return json.loads(tokenizer.to_str())["model"]


def bert():
    """WordPiece."""
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    trainer = trainers.WordPieceTrainer(vocab_size=400, special_tokens=BERT, show_progress=False)
    return BertTokenizer(vocab=trained(tokenizer, trainer)["vocab"], model_max_length=64)


def _byte_level(names):
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=500, special_tokens=names, initial_alphabet=alphabet, show_progress=False)
    model = trained(tokenizer, trainer)
    return {"vocab": model["vocab"], "merges": [tuple(pair) for pair in model["merges"]], "model_max_length": 64}


def roberta():
    """BPE over bytes."""
    return RobertaTokenizer(**_byte_level([*ROBERTA, "<mask>"]))


def gpt2():
    """BPE over bytes, without padding."""
    return GPT2Tokenizer(**_byte_level(["<|endoftext|>"]))


def _unigram(names, last, size=300):
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    trainer = trainers.UnigramTrainer(vocab_size=size, special_tokens=names, unk_token=names[-1], show_progress=False)
    return [*map(tuple, trained(tokenizer, trainer)["vocab"]), *((name, 0.0) for name in last)]


def xlm_roberta():
    """Unigram, with the mask at its end."""
    return XLMRobertaTokenizer(vocab=_unigram(ROBERTA, ["<mask>"]), model_max_length=64)


def deberta_v2():
    """Unigram, with the mask as an added token."""
    return DebertaV2Tokenizer(vocab=_unigram(["[PAD]", "[CLS]", "[SEP]", "[UNK]"], []), unk_id=3, model_max_length=64)


def t5():
    """Unigram, with sentinels at its end."""
    sentinels = [f"<extra_id_{index}>" for index in (2, 1, 0)]
    return T5Tokenizer(vocab=_unigram(["<pad>", "</s>", "<unk>"], sentinels), extra_ids=3, model_max_length=64)


def with_suffix():
    """BPE whose tokens at the end of a word have a suffix, with tokens that a user added."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", end_of_word_suffix="</w>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    names = ["<unk>", "<pad>", "<s>", "</s>"]
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=names, end_of_word_suffix="</w>", show_progress=False)
    trained(tokenizer, trainer)
    tokenizer.post_processor = processors.BertProcessing(("</s>", 3), ("<s>", 2))
    tokenizer.add_tokens([AddedToken("<user>"), AddedToken("FILM", normalized=False)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", pad_token="<pad>", bos_token="<s>", model_max_length=64
    )


def with_byte_fallback():
    """BPE as Llama has it: bytes for unknown characters, and every pair that makes a token among the merges."""
    spaced = Tokenizer(models.BPE(unk_token="<unk>"))
    spaced.pre_tokenizer = pre_tokenizers.Metaspace()
    names = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=600, special_tokens=names, show_progress=False, limit_alphabet=60)
    vocab = trained(spaced, trainer)["vocab"]
    merges = [
        (token[:cut], token[cut:])
        for token in sorted(vocab, key=vocab.get)
        if token not in names
        for cut in range(1, len(token))
        if token[:cut] in vocab and token[cut:] in vocab
    ]
    tokenizer = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>", model_max_length=64
    )


KINDS = (bert, roberta, gpt2, xlm_roberta, deberta_v2, t5, with_suffix, with_byte_fallback)
