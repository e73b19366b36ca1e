"""Models with a smaller vocabulary compute the same, whatever their family."""

import copy
import itertools

import pytest
import tiny_tokenizers as tokenizers
import torch
from tiny import make, same, weights_of
from tiny_tokenizers import ENGLISH, texts
from transformers import (
    AutoModel,
    AutoTokenizer,
    BartConfig,
    BartForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    MPNetConfig,
    MPNetForMaskedLM,
    PreTrainedTokenizerFast,
    RobertaTokenizer,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTModel,
    XLMRobertaConfig,
    XLMRobertaForTokenClassification,
)

from hf_maskselect import trim_vocabulary

CORPUS = texts(40, words=ENGLISH)
SMALL = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}


def of(tokenizer, family, head="ForMaskedLM", **changes):
    """A tiny model of a tokenizer."""
    ids = {name: getattr(tokenizer, name) for name in ("pad_token_id", "cls_token_id", "sep_token_id")}
    return make(family, head, vocab_size=len(tokenizer) + 8, **{**ids, **changes}).eval()


def gpt2(tokenizer):
    ids = {"bos_token_id": 0, "eos_token_id": 0}
    return GPT2LMHeadModel(GPT2Config(vocab_size=len(tokenizer), n_embd=32, n_layer=1, n_head=2, **ids))


def t5(tokenizer):
    return T5ForConditionalGeneration(
        T5Config(vocab_size=len(tokenizer) + 9, d_model=32, d_kv=16, d_ff=32, num_layers=1, num_heads=2)
    )


def xlm_roberta(tokenizer):
    return XLMRobertaForTokenClassification(XLMRobertaConfig(vocab_size=len(tokenizer), num_labels=3, **SMALL))


MODELS = {
    "bert": lambda t: of(t, "Bert"),
    "bert, untied": lambda t: of(t, "Bert", tie_word_embeddings=False),
    "distilbert": lambda t: of(t, "DistilBert", "ForSequenceClassification", max_position_embeddings=64),
    "electra": lambda t: of(t, "Electra"),
    "albert": lambda t: of(t, "Albert"),
    "modernbert": lambda t: of(t, "ModernBert"),
    "roberta": lambda t: of(t, "Roberta"),
    "mpnet": lambda t: MPNetForMaskedLM(MPNetConfig(vocab_size=len(t), **SMALL)),
    "xlm_roberta": xlm_roberta,
    "deberta_v2": lambda t: of(t, "DebertaV2"),
    "deberta_v2, new head": lambda t: of(t, "DebertaV2", legacy=False),
    "gpt2": gpt2,
    "t5": t5,
}
TOKENIZERS = {
    **dict.fromkeys(MODELS, tokenizers.bert),
    **{name: getattr(tokenizers, name.split(",")[0]) for name in MODELS if hasattr(tokenizers, name.split(",")[0])},
    "mpnet": tokenizers.roberta,
}


def outputs(model, tokenizer, corpus=CORPUS[:6]):
    """Logits of a batch, or of its first text where there is no padding."""
    pads = tokenizer.pad_token is not None
    batch = tokenizer(
        corpus if pads else corpus[:1], padding=pads, truncation=True, max_length=20, return_tensors="pt"
    )
    inputs = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
    if model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = batch["input_ids"]
    with torch.no_grad():
        return model.eval()(**inputs).logits


FAST = ("bert", "electra", "roberta", "xlm_roberta", "deberta_v2", "gpt2", "t5")


@pytest.mark.parametrize("name", [pytest.param(n, marks=() if n in FAST else pytest.mark.slow) for n in MODELS])
def test_outputs_are_the_same(name, tmp_path):
    tokenizer = TOKENIZERS[name]()
    model = MODELS[name](tokenizer).eval()
    before, weights, settings = outputs(model, tokenizer), weights_of(model), copy.deepcopy(model.config.to_dict())
    small, small_tokenizer, report = trim_vocabulary(model, tokenizer, CORPUS)
    assert same(weights_of(model), weights) and model.config.to_dict() == settings
    after, rows = outputs(small, small_tokenizer), small.config.vocab_size
    assert report.rows == (model.config.vocab_size, rows) and rows < model.config.vocab_size
    assert small.get_input_embeddings().weight.shape[0] == rows
    if before.shape != after.shape:  # a head over tokens: the logits of those that stay
        tokens = small_tokenizer.convert_ids_to_tokens(range(len(small_tokenizer)))
        places = tokenizer.convert_tokens_to_ids(tokens)
        before, after = before[..., places], after[..., : len(places)]
        assert torch.allclose(before, after, rtol=0, atol=1e-5)  # a product of another size is rounded elsewhere
    else:
        assert torch.equal(before, after)
    small.save_pretrained(tmp_path)
    small_tokenizer.save_pretrained(tmp_path)
    loaded, info = type(model).from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values()) and same(weights_of(loaded), weights_of(small))
    assert torch.equal(outputs(loaded, AutoTokenizer.from_pretrained(tmp_path)), outputs(small, small_tokenizer))
    AutoModel.from_pretrained(tmp_path)


def test_the_head_and_its_bias_shrink_along():
    tokenizer = tokenizers.bert()
    model = of(tokenizer, "Bert")
    torch.nn.init.normal_(model.cls.predictions.bias)
    small, small_tokenizer, report = trim_vocabulary(model, tokenizer, CORPUS)
    head, table = small.get_output_embeddings(), small.get_input_embeddings()
    assert head.weight is table.weight and head.bias is small.cls.predictions.bias
    ids = tokenizer.convert_tokens_to_ids(small_tokenizer.convert_ids_to_tokens(range(len(small_tokenizer))))
    assert torch.equal(head.bias, model.cls.predictions.bias[ids])
    removed = report.rows[0] - report.rows[1]
    assert report.parameters[0] - report.parameters[1] == removed * 33  # a row of 32 and a bias
    assert report.bytes[0] - report.bytes[1] == removed * 33 * 4


def test_ids_in_the_configurations_follow():
    tokenizer = tokenizers.t5()
    model, size = t5(tokenizer), len(tokenizer)
    rare = [size - 9, size - 8]  # pieces that no text needs, at the end of the vocabulary
    model.config.forced_eos_token_id, model.config.other_token_ids = None, [1, -1, size + 3]
    model.generation_config.bad_words_ids, model.generation_config.suppress_tokens = [rare, [rare[0]]], [rare[1]]
    small, small_tokenizer, report = trim_vocabulary(model, tokenizer, CORPUS)
    new = small_tokenizer.convert_tokens_to_ids(tokenizer.convert_ids_to_tokens(rare))
    assert new < rare
    assert small.generation_config.bad_words_ids == [new, [new[0]]] and small.generation_config.suppress_tokens == [
        new[1]
    ]
    assert model.generation_config.suppress_tokens == [rare[1]]
    assert small.config.other_token_ids == [
        1,
        -1,
        report.rows[1] - 1,
    ]  # a row beyond the tokenizer stays if it is named


def test_positions_that_count_from_the_padding_stay():
    """RoBERTa's positions begin after the id of padding, so that ids below it stay though no text has them."""
    content = tokenizers._byte_level(["never", *tokenizers.ROBERTA, "<mask>"])
    tokenizer = RobertaTokenizer(**content)
    assert tokenizer.pad_token_id == 2
    model = of(tokenizer, "Roberta", "ForSequenceClassification")
    small, small_tokenizer, _ = trim_vocabulary(model, tokenizer, CORPUS)
    assert small_tokenizer.pad_token_id == small.config.pad_token_id == 2
    assert torch.equal(outputs(small, small_tokenizer), outputs(model, tokenizer))


def test_the_second_corpus_is_compared():
    tokenizer = tokenizers.bert()
    model = of(tokenizer, "Bert", "ForSequenceClassification")
    other = texts(50, seed=3)
    _, small, report = trim_vocabulary(model, tokenizer, CORPUS, check=iter([*CORPUS, *other]))
    second = report.second
    assert second.texts == 90 and second.unknown[0] == second.unknown[1]
    alike = [tokenizer.tokenize(text) == small.tokenize(text) for text in other]
    assert second.same == 40 + sum(alike) and 0 < sum(alike) < 50
    for place, each in enumerate((tokenizer, small)):
        assert second.tokens[place] == sum(len(each.tokenize(text)) for text in [*CORPUS, *other])
    assert "90 texts keep their tokens" in str(report)


def test_rows_iterators_and_tokens_to_keep():
    tokenizer = tokenizers.bert()
    model = of(tokenizer, "Bert", "ForSequenceClassification")
    pairs = list(itertools.pairwise(CORPUS))
    rows = [{"first": first, "second": second, "label": 1} for first, second in pairs]
    sizes = {trim_vocabulary(model, tokenizer, each)[2].rows for each in (CORPUS, iter(CORPUS), pairs, rows)}
    assert len(sizes) == 1
    gone = next(t for t in tokenizer.get_vocab() if t not in trim_vocabulary(model, tokenizer, CORPUS)[1].get_vocab())
    for keep in ([gone], [tokenizer.convert_tokens_to_ids(gone)]):
        assert gone in trim_vocabulary(model, tokenizer, CORPUS, keep=keep)[1].get_vocab()


def test_the_given_tokenizer_and_the_state_of_the_model_stay():
    tokenizer = tokenizers.bert()
    tokenizer.backend_tokenizer.enable_truncation(7)
    tokenizer.backend_tokenizer.enable_padding(pad_id=tokenizer.pad_token_id, length=9)
    model = of(tokenizer, "Bert", "ForSequenceClassification").to(torch.bfloat16).train()
    model.bert.pooler.requires_grad_(False)
    small, small_tokenizer, _ = trim_vocabulary(model, tokenizer, CORPUS)
    for each in (tokenizer, small_tokenizer):
        assert each.backend_tokenizer.truncation["max_length"] == 7
        assert each.backend_tokenizer.padding["length"] == 9
        assert each.backend_tokenizer.padding["pad_id"] == each.pad_token_id
    assert model.training and small.training and small.dtype == torch.bfloat16
    assert not small.bert.pooler.dense.weight.requires_grad and small.classifier.weight.requires_grad
    with torch.no_grad():
        small.classifier.weight.zero_()
    assert model.classifier.weight.any()  # nothing is shared


@pytest.mark.parametrize(
    ("corpus", "message"),
    [
        ([], "the texts hold no tokens"),
        (["", ""], "the texts hold no tokens"),
        ("a text", "texts is one str: give a list of texts"),
        ([3], "texts holds 3, which has no text"),
        ([{"label": 1}], "which has no text"),
        (["ჟღერადობა შესანიშნავი"] * 3, "100% of the tokens of the texts are unknown"),
    ],
)
def test_bad_texts_are_one_sentence(corpus, message):
    tokenizer = tokenizers.bert()
    with pytest.raises(ValueError, match=message):
        trim_vocabulary(of(tokenizer, "Bert"), tokenizer, corpus)


def test_other_bad_input_is_one_sentence():
    tokenizer = tokenizers.bert()
    model = of(tokenizer, "Bert")
    with pytest.raises(ValueError, match=f"has the id {len(tokenizer) - 1} but the model 64 tokens"):
        trim_vocabulary(make(), tokenizer, CORPUS)
    with pytest.raises(ValueError, match="ViTModel has no table of tokens"):
        trim_vocabulary(ViTModel(ViTConfig(**SMALL)), tokenizer, CORPUS)
    with pytest.raises(ValueError, match="Linear is not a transformers model"):
        trim_vocabulary(torch.nn.Linear(2, 2), tokenizer, CORPUS)
    for keep, message in (
        (["qqqq"], "'qqqq', which is no token"),
        ([9999], "9999, which"),
        ("the", "'the' is one text"),
    ):
        with pytest.raises(ValueError, match=message):
            trim_vocabulary(model, tokenizer, CORPUS, keep=keep)
    changed = copy.deepcopy(model)
    changed.cls.predictions.extra = torch.nn.Linear(2, 2)
    with pytest.raises(
        ValueError, match="cls.predictions.extra.bias is not in both the model and the BertForMaskedLM"
    ):
        trim_vocabulary(changed, tokenizer, CORPUS)
    changed = copy.deepcopy(model)
    changed.bert.encoder.half()
    with pytest.raises(
        ValueError, match="is not what the configuration makes of it, such as a tied weight or another"
    ):
        trim_vocabulary(changed, tokenizer, CORPUS)
    changed = copy.deepcopy(model)
    changed.config.vocab_size += 1
    with pytest.raises(ValueError, match="the embedding table has .* rows but the configuration another vocab_size"):
        trim_vocabulary(changed, tokenizer, CORPUS)


def test_a_tokenizer_that_does_not_survive_saving_is_refused():
    """BERT's class builds its normalizer anew when it is loaded."""
    tokenizer = tokenizers.bert()
    model = of(tokenizer, "Bert")
    tokenizer.backend_tokenizer.normalizer = None
    with pytest.raises(ValueError, match="the trimmed tokenizer would split .* into other tokens"):
        trim_vocabulary(model, tokenizer, [text.upper() for text in CORPUS] + CORPUS)
    plain = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer, **tokenizer.special_tokens_map)
    assert trim_vocabulary(model, plain, CORPUS)[2].texts == 40


def test_a_model_that_reads_ids_in_another_way_is_refused():
    tokenizer = tokenizers.bert()

    class Odd(type(of(tokenizer, "Bert", "Model"))):
        def forward(self, input_ids, **inputs):
            return (super().forward(input_ids, **inputs)[0] + (input_ids % 7)[..., None],)

    model = Odd(of(tokenizer, "Bert", "Model").config)
    with pytest.raises(ValueError, match="Odd makes other outputs of renamed ids"):
        trim_vocabulary(model, tokenizer, CORPUS)


def test_bart_classifies_by_the_renamed_end_of_a_text():
    tokenizer = tokenizers.roberta()
    size = {"encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32, "d_model": 32}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2}
    model = BartForSequenceClassification(BartConfig(vocab_size=len(tokenizer), **size, **heads)).eval()
    small, small_tokenizer, _ = trim_vocabulary(model, tokenizer, CORPUS)
    for text in CORPUS[:3]:
        with torch.no_grad():
            pair = [
                m(**t(text, return_tensors="pt")).logits for m, t in ((model, tokenizer), (small, small_tokenizer))
            ]
        assert torch.equal(*pair)
