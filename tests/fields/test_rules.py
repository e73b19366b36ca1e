"""Fields with a value of the wrong type: one sentence that names the field, or it simply works."""

from dataclasses import fields

import numpy as np
import pytest
import yaml
from tiny import losses, make_config, make_trainer

from hf_maskselect import PruningConfig
from hf_maskselect.config import _GROUPS

OWN = [own.name for group in _GROUPS for own in fields(group)]
STRANGE = ["x", "", [], [[1]], {"a": 1}, True, float("nan"), float("inf"), 10**30, -1, b"x", {1}, object(), 1j]


@pytest.mark.parametrize("name", OWN)
def test_a_strange_value_gives_a_sentence_or_works(tmp_path, name):
    for value in STRANGE:
        try:
            make_config(tmp_path, **{name: value})
        except ValueError as error:
            assert "\n" not in str(error) and (name in str(error) or name.rstrip("s") in str(error))


@pytest.mark.parametrize("pattern", ["2:4", "1:4", "4:8"])
def test_a_pattern_that_yaml_reads_in_base_60_is_named(tmp_path, pattern):
    given = yaml.safe_load(f"pattern: {pattern}")
    assert isinstance(given["pattern"], int)
    with pytest.raises(ValueError, match=f"pattern=.*base 60, so write '{pattern}' in quotes"):
        make_config(tmp_path, **given)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("scope: off", "scope=False must be text: .*quotes"),
        ("method: 1", "method=1 must be text"),
        ("pdp_tau: 1e-4", r"pdp_tau='1e-4' must be a finite number: write it without quotes, .* 1.0e-04"),
        ("learning_rate: 1e-4", r"learning_rate='1e-4' must be a number: write it without quotes, .* 1.0e-04"),
        ("keep_zeros: 'no'", "keep_zeros='no' must be true or false, without quotes"),
        ("bf16: 'no'", "bf16='no' must be true or false, without quotes"),
        ("max_steps: [3]", r"max_steps=\[3\] must be a whole number"),
        ("max_steps: '12'", "max_steps='12' must be a whole number: write it without quotes$"),
        ("weight_decay: .nan", "weight_decay=nan must be a number"),
        ("levels: 0.75", r"levels=0.75 must be a list of finite numbers, such as \[0.5, 0.9\]"),
        ("num_levels: 1000000000", "num_levels=1000000000 must be at most 10000"),
    ],
)
def test_what_yaml_makes_of_a_value_is_explained(tmp_path, text, message):
    with pytest.raises(ValueError, match=message):
        make_config(tmp_path, **yaml.safe_load(text))


def test_numbers_of_numpy_work(tmp_path):
    plain = {"sparsity": 0.75, "levels": [0.5, 0.75], "keep_zeros": True, "refit_rows": 16, "learning_rate": 0.5}
    numpy = {
        "sparsity": np.float32(0.75),
        "levels": np.array([0.5, 0.75], np.float32),
        "keep_zeros": np.bool_(True),
        "refit_rows": np.int64(16),
        "learning_rate": np.float32(0.5),
    }
    runs = []
    for given in (plain, numpy):
        trainer = make_trainer(tmp_path, num_levels=None, **given)
        trainer.train()
        runs.append((losses(trainer), trainer.args.pruning_fields(), trainer.args.learning_rate))
    assert runs[0] == runs[1] and type(runs[1][1]["sparsity"]) is float
    mixed = make_config(tmp_path, num_levels=None, levels=[np.float32(0.5), np.float64(0.75)])
    assert [type(level) for level in mixed.levels] == [float, float]


def test_what_transformers_takes_is_left_alone(tmp_path):
    given = {"max_grad_norm": float("inf"), "logging_steps": 0.5, "eval_strategy": "no", "report_to": ["none"]}
    assert isinstance(make_config(tmp_path, debug="", fsdp_config=None, **given), PruningConfig)
