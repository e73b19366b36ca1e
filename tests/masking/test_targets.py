"""Which weights are prunable, for every supported family, against names written down by hand."""

import pytest
import torch
import transformers
from torch import nn
from transformers import BertConfig, BertForMaskedLM, BertForSequenceClassification, BertModel, BertPreTrainedModel

from hf_maskselect import prunable_weights

SIZES = {
    "vocab_size": 40,
    "hidden_size": 16,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "max_position_embeddings": 32,
    "pad_token_id": 0,
}
DEBERTA = {**SIZES, "relative_attention": True, "pos_att_type": ["c2p", "p2c"], "position_buckets": 8}
BERT_LAYER = ["self.query", "self.key", "self.value", "output.dense"]
BERT_LAYER = [f"attention.{name}" for name in BERT_LAYER] + ["intermediate.dense", "output.dense"]
ALBERT_LAYER = ["attention.query", "attention.key", "attention.value", "attention.dense", "ffn", "ffn_output"]
DEBERTA_LAYER = [name + "_proj" if ".self." in name else name for name in BERT_LAYER]
DISTILBERT_LAYER = [f"attention.{name}_lin" for name in ("q", "k", "v", "out")] + ["ffn.lin1", "ffn.lin2"]
DISTILBERT = {"vocab_size": 40, "dim": 16, "n_layers": 3, "n_heads": 2, "hidden_dim": 24}
ALBERT_STACK = "albert.encoder.albert_layer_groups.{}.albert_layers.0."

# label -> (family, configuration, prefix of the i-th block of weights, number of blocks, names in a block)
FAMILIES = {
    "bert": ("Bert", SIZES, "bert.encoder.layer.{}.", 3, BERT_LAYER),
    "roberta": ("Roberta", SIZES, "roberta.encoder.layer.{}.", 3, BERT_LAYER),
    "electra": ("Electra", {**SIZES, "embedding_size": 8}, "electra.encoder.layer.{}.", 3, BERT_LAYER),
    "distilbert": ("DistilBert", DISTILBERT, "distilbert.transformer.layer.{}.", 3, DISTILBERT_LAYER),
    "albert": ("Albert", {**SIZES, "embedding_size": 8}, ALBERT_STACK, 1, ALBERT_LAYER),
    "albert-2-groups": (
        "Albert",
        {**SIZES, "embedding_size": 8, "num_hidden_groups": 2},
        ALBERT_STACK,
        2,
        ALBERT_LAYER,
    ),
    "deberta-v2": (
        "DebertaV2",
        DEBERTA,
        "deberta.encoder.layer.{}.",
        3,
        [*DEBERTA_LAYER, "attention.self.pos_key_proj", "attention.self.pos_query_proj"],
    ),
    "deberta-v3": (
        "DebertaV2",
        {**DEBERTA, "share_att_key": True, "norm_rel_ebd": "layer_norm"},
        "deberta.encoder.layer.{}.",
        3,
        DEBERTA_LAYER,
    ),
    "modernbert": (
        "ModernBert",
        {**SIZES, "bos_token_id": 1, "eos_token_id": 2, "cls_token_id": 1, "sep_token_id": 2},
        "model.layers.{}.",
        3,
        ["attn.Wqkv", "attn.Wo", "mlp.Wi", "mlp.Wo"],
    ),
}


def classifier(family, config):
    return getattr(transformers, family + "ForSequenceClassification")(
        getattr(transformers, family + "Config")(**config)
    )


def tiny_bert(cls=BertForSequenceClassification, **changes):
    return cls(BertConfig(**{**SIZES, **changes}))


def modules(*args, **kwargs):
    return {name.removesuffix(".weight") for name in prunable_weights(*args, **kwargs)}


@pytest.mark.parametrize("label", FAMILIES)
def test_exactly_the_linear_weights_of_the_encoder(label):
    family, config, prefix, blocks, names = FAMILIES[label]
    model = classifier(family, config)
    found = prunable_weights(model)
    assert set(found) == {f"{prefix.format(i)}{name}.weight" for i in range(blocks) for name in names}
    parameters = dict(model.named_parameters())
    assert all(parameters[name] is weight and weight.dim() == 2 for name, weight in found.items())
    assert list(found) == [name for name in parameters if name in found]  # model order


def test_bert_base_has_the_papers_number_of_prunable_weights():
    with torch.device("meta"):
        model = BertModel(BertConfig())
    assert sum(weight.numel() for weight in prunable_weights(model).values()) == 84_934_656


def test_a_head_changes_only_the_prefix():
    bare, headed = prunable_weights(tiny_bert(BertModel)), prunable_weights(tiny_bert())
    assert [f"bert.{name}" for name in bare] == list(headed)


def test_a_stack_of_heads_stays_dense():
    class Heads(BertPreTrainedModel):
        def __init__(self, config):
            super().__init__(config)
            self.heads = nn.ModuleList([nn.Linear(16, 2), nn.Linear(16, 2)])
            self.bert = BertModel(config)
            self.post_init()

    model = tiny_bert(Heads)
    assert modules(model) == modules(tiny_bert())
    assert modules(model, ["heads.1", "query"]) >= {"heads.1"}


def test_a_suffix_chooses_whole_name_parts():
    model = classifier(*FAMILIES["albert"][:2])
    assert {name.rpartition(".")[2] for name in modules(model, ["ffn"])} == {"ffn"}
    with pytest.raises(ValueError, match="uery"):
        prunable_weights(model, ["uery"])
    both = modules(tiny_bert(), "output.dense")
    assert both == {name for name in modules(tiny_bert()) if name.endswith(".output.dense")} and len(both) == 6


def test_a_regex_must_match_the_full_name():
    model = tiny_bert()
    first = modules(model, r".*layer\.0\..*")
    assert first == {name for name in modules(model) if ".layer.0." in name}
    with pytest.raises(ValueError, match="no weight to prune"):
        prunable_weights(model, r"layer\.0")


def test_targets_may_be_mixed_and_may_name_a_head():
    model = tiny_bert()
    chosen = modules(model, ["classifier", r".*\.1\..*\.(query|key)"])
    layer = "bert.encoder.layer.1.attention.self"
    assert chosen == {"classifier", f"{layer}.query", f"{layer}.key"}


def test_exclusion_wins_over_both_choices():
    model = tiny_bert()
    everything = modules(model)
    assert modules(model, exclude_modules=["query", r".*layer\.2.*"]) == {
        name for name in everything if not name.endswith(".query") and ".layer.2." not in name
    }
    assert modules(model, ["query", "key"], "query") == {name for name in everything if name.endswith(".key")}


def test_a_matrix_tied_to_an_embedding_is_never_chosen():
    with pytest.raises(ValueError, match="decoder"):
        prunable_weights(tiny_bert(BertForMaskedLM), ["decoder"])
    untied = tiny_bert(BertForMaskedLM, tie_word_embeddings=False)
    assert modules(untied, ["decoder"]) == {"cls.predictions.decoder"}


def test_a_shared_matrix_appears_once_under_its_first_name():
    model = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)])
    model[2].weight = model[0].weight
    assert list(prunable_weights(nn.ModuleDict({"stack": model}))) == ["stack.0.weight", "stack.1.weight"]


def test_what_matches_nothing_is_refused_with_names_that_would():
    with pytest.raises(ValueError, match="q_proj.*bert.encoder.layer.0.attention.self.query"):
        prunable_weights(tiny_bert(), ["q_proj"])
    with pytest.raises(ValueError, match="no weight to prune"):
        prunable_weights(tiny_bert(), exclude_modules=".*")
    with pytest.raises(ValueError, match="Sequential"):
        prunable_weights(nn.Sequential(nn.Linear(2, 2)))  # lies in no stack of layers


def test_every_entry_must_match_a_layer():
    model = tiny_bert()
    for fields, message in (
        ({"target_modules": ["query", "vlaue", "kye"]}, r"target_modules names \['vlaue', 'kye'\].*BertForSequence"),
        ({"exclude_modules": ["query", "layer.9.*"]}, r"exclude_modules names \['layer.9.\*'\]"),
        ({"target_modules": ["query"], "exclude_modules": "uery"}, r"exclude_modules names \['uery'\]"),
    ):
        with pytest.raises(ValueError, match=message):
            prunable_weights(model, **fields)


def test_what_is_dense_anyway_may_be_excluded():
    model = tiny_bert()
    assert modules(model, exclude_modules=["classifier", "pooler.dense"]) == modules(model)


def test_an_entry_that_names_a_second_use_of_a_matrix_is_no_mistake():
    model = nn.ModuleDict({"stack": nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])})
    model["stack"][1].weight = model["stack"][0].weight
    assert modules(model, ["stack.0", "stack.1"]) == {"stack.0"}
