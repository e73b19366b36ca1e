"""The longest row that a model takes, by trying it."""

import pytest
import torch
from transformers import (
    BertConfig,
    BertModel,
    DebertaV2Config,
    DebertaV2Model,
    MPNetConfig,
    MPNetModel,
    RobertaConfig,
    RobertaModel,
)

from hf_maskselect.utils.token_limits import longest_row

SIZES = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8, "vocab_size": 14}


@pytest.mark.parametrize(
    ("kind", "config", "expected"),
    [
        (BertModel, BertConfig(max_position_embeddings=14, **SIZES), 14),
        (RobertaModel, RobertaConfig(max_position_embeddings=14, **SIZES), 12),
        (MPNetModel, MPNetConfig(max_position_embeddings=14, **SIZES), 12),
        (DebertaV2Model, DebertaV2Config(max_position_embeddings=14, **SIZES), 14),
    ],
)
def test_a_row_of_the_longest_length_runs_and_a_longer_one_does_not(kind, config, expected):
    model = kind(config).eval()
    assert longest_row(model) == expected
    model(torch.full((1, expected), 7))
    with pytest.raises((IndexError, RuntimeError)):
        model(torch.full((1, expected + 1), 7))
