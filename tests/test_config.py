"""`PruningConfig`: defaults, refusals that say what to do, the command line."""

import copy
import dataclasses
import json

import pytest
from transformers import HfArgumentParser, TrainingArguments

from hf_maskselect import PruningConfig
from hf_maskselect.masking.patterns import NM, Unstructured


@pytest.fixture
def make(tmp_path):
    return lambda **fields: PruningConfig(output_dir=str(tmp_path), use_cpu=True, **fields)


def parse(tmp_path, text):
    arguments = ["--output_dir", str(tmp_path), "--use_cpu", *text.split()]
    return HfArgumentParser(PruningConfig).parse_args_into_dataclasses(arguments)[0]


# -- defaults ---------------------------------------------------------------------------------------------------------


def test_the_defaults_are_those_of_the_docstring(make):
    config = make()
    settings = config.resolved()
    assert isinstance(config, TrainingArguments)
    assert (settings.method, settings.sparsity, settings.pattern) == ("random", 0.9375, Unstructured("balanced"))
    assert (settings.criterion, settings.scope, settings.num_candidates) == ("taylor", "balanced", 4)
    assert len(settings.levels) == 4 and settings.levels[-1] == settings.sparsity
    assert (settings.refit_rows, settings.frozen_steps, settings.gumbel) == (256, 0, None)
    assert settings.searches and settings.needs_selection_split and not settings.soft and not settings.emergent
    with pytest.raises(ValueError, match="load_best_model_at_end"):  # the checks of TrainingArguments still run
        make(load_best_model_at_end=True, save_strategy="steps", eval_strategy="no")


@pytest.mark.parametrize("method", ["magnitude", "fisher", "taylor", "platon", "obert"])
def test_a_deterministic_method_is_its_criterion_and_chooses_nothing(make, method):
    settings = make(method=method).resolved()
    assert (settings.criterion, settings.num_candidates) == (method, 1)
    assert settings.scope == ("layer" if method == "magnitude" else "balanced")
    assert not settings.searches and not settings.needs_selection_split
    assert make(method=method, level_eval_steps=5).resolved().needs_selection_split


def test_the_papers_proposals_bring_the_papers_criterion_and_scope(make):
    config = make(proposals="paper")
    settings = config.resolved()
    assert (settings.proposals, settings.criterion, settings.scope) == (("paper",), "magnitude", "layer")
    assert config.sampling_ratios == [5e-5, 1e-4, 8e-5, 3e-4]
    assert make(proposals="paper", criterion="fisher").resolved().criterion == "fisher"


TRAINS = [
    {"refit_rows": 0},
    {"proposals": "paper"},
    {"criterion": "magnitude"},
    {"selection": "survivors"},
    {"selection": "early"},
    {"trial_steps": 3},
    {"trial_batch_size": 4},
    {"trial_learning_rate": 1e-4},
    {"method": "taylor"},
    {"method": "pdp", "pdp_tau": 1e-4, "num_candidates": 2},
]


@pytest.mark.parametrize("fields", TRAINS, ids=str)
def test_masks_are_scored_after_their_refit_where_they_have_one(make, fields):
    config = make()
    assert all(c.resolved().scores_after_refit for c in (config, make(pattern="2:4"), make(trial_steps=0)))
    assert not make(**fields).resolved().scores_after_refit
    assert not dataclasses.replace(config, trial_steps=3).resolved().scores_after_refit
    config.refit_rows = 0  # as a hyper-parameter search sets fields
    assert not config.resolved().scores_after_refit


def test_a_given_scope_and_floor_reach_the_pattern(make):
    settings = make(method="magnitude", scope="global", layer_floor=0.25).resolved()
    assert settings.pattern == Unstructured("global", 0.25)


def test_an_nm_pattern_implies_sparsity_scope_and_one_level(make):
    settings = make(pattern="2:4").resolved()
    assert (settings.sparsity, settings.scope, settings.levels) == (0.5, "layer", (0.5,))
    assert settings.pattern == NM(2, 4)
    assert make(pattern="1:4", num_levels=9).resolved().levels == (0.25, 0.5, 0.75)  # groups lose whole weights
    assert make(pattern="2:4", levels=[0.25, 0.5], sparsity=0.5).resolved().levels == (0.25, 0.5)


@pytest.mark.parametrize("pattern", ["3:7", "1:3", "5:32", "4:9", "2:49"])
def test_any_nm_pattern_accepts_its_own_levels(make, pattern):
    n, m = map(int, pattern.split(":"))
    for count in (None, 3):
        settings = make(pattern=pattern, num_levels=count).resolved()
        assert settings.sparsity == pytest.approx(1 - n / m)
        for level in settings.levels:
            assert level * m == pytest.approx(round(level * m))


def test_own_levels_decide_their_number(make):
    assert len(make(levels=[0.5, 0.9], sparsity=0.9).resolved().levels) == 2
    assert len(make(num_levels=7, sparsity=0.99).resolved().levels) == 7


@pytest.mark.parametrize("field", ["proposals", "target_modules", "exclude_modules"])
def test_one_string_is_a_list_of_one(make, field):
    config = make(**{field: "fisher:layer"})
    assert getattr(config, field) == "fisher:layer" and getattr(config.resolved(), field) == ("fisher:layer",)


def test_a_metric_may_have_the_prefix_of_evaluations(make):
    config = make(selection_metric="eval_loss")
    assert (config.selection_metric, config.resolved().selection_metric) == ("eval_loss", "loss")


# -- what was given stays ---------------------------------------------------------------------------------------------

FIELDS = [{}, {"pattern": "2:4"}, {"proposals": "paper"}, {"method": "pdp"}, {"method": "pdp", "pattern": "channel"}]
FIELDS += [{"method": "gumbel"}, {"method": "gumbel", "gumbel_untrained": True}, {"method": "taylor", "num_levels": 2}]
FIELDS += [{"trial_steps": 0}, {"levels": [0.5, 0.9], "sparsity": 0.9}, {"target_modules": "query"}]
FIELDS += [{"selection_metric": "eval_loss"}]


@pytest.mark.parametrize("fields", FIELDS, ids=str)
def test_no_field_is_written(make, fields):
    config = make(**fields)
    before = config.to_dict()
    config.resolved()
    own = [f for f in dataclasses.fields(PruningConfig) if f.name in config.pruning_fields()]
    defaults = {f.name: f.default if f.default_factory is dataclasses.MISSING else f.default_factory() for f in own}
    assert config.pruning_fields() == {**defaults, **fields} and config.to_dict() == before
    assert not [name for name in before if name.startswith("_")]


@pytest.mark.parametrize("fields", FIELDS, ids=str)
def test_copies_give_what_a_fresh_configuration_gives(make, fields):
    config = make(**fields)
    copies = [copy.deepcopy(config), dataclasses.replace(config), PruningConfig(**config.to_dict())]
    for other in copies:
        assert other.to_dict() == config.to_dict() and other.resolved() == config.resolved()


CHANGES = [{"method": "magnitude"}, {"method": "pdp"}, {"pattern": "2:4"}, {"sparsity": 0.5}, {"num_levels": 2}]
CHANGES += [{"method": "gumbel", "gumbel_untrained": True}, {"proposals": ["paper"]}, {"criterion": "magnitude"}]


@pytest.mark.parametrize("changes", CHANGES, ids=str)
def test_a_changed_field_gives_what_a_fresh_configuration_gives(make, changes):
    fresh, config = make(**changes), make()
    assert dataclasses.replace(config, **changes).resolved() == fresh.resolved()
    assert PruningConfig(**{**config.to_dict(), **changes}).resolved() == fresh.resolved()
    for name, value in changes.items():  # as a hyper-parameter search sets fields
        setattr(config, name, value)
    assert config.resolved() == fresh.resolved() and config.to_dict() == fresh.to_dict()


def test_a_field_that_is_set_is_checked_when_it_is_read(make):
    config = make()
    config.levels = [0.25, 0.5]
    with pytest.raises(ValueError, match="end at 0.5 but sparsity=0.9375"):
        config.resolved()


@pytest.mark.parametrize("fields", FIELDS, ids=str)
def test_a_record_has_the_resolved_values(make, fields):
    config = make(**fields)
    settings, record = config.resolved(), config.resolved().record()
    assert record.keys() <= config.to_dict().keys() and record == json.loads(json.dumps(record))
    assert (record["num_levels"], record["scope"]) == (len(settings.levels), settings.scope)
    placeholders = {"sparsity", "levels"} if settings.emergent else set()
    again = {name: value for name, value in record.items() if name not in placeholders}
    assert dataclasses.replace(config, **again).resolved() == settings


# -- refusals ---------------------------------------------------------------------------------------------------------

REFUSED = [
    # fields (the message names the first), the value as it is shown, and the remedy
    ({"sparsity": 0}, "=0 ", r"inside \(0, 1\)"),
    ({"sparsity": 1}, "=1 ", r"inside \(0, 1\)"),
    ({"sparsity": 1.2}, "=1.2 ", r"inside \(0, 1\).*0.9375"),
    ({"sparsity": float("nan")}, "=nan ", "finite number"),
    ({"levels": [0.9, 0.5, 0.9375]}, "0.9, 0.5", "strictly increasing"),
    ({"levels": [0.5, 0.9]}, "0.9.*0.9375", "last level the target"),
    ({"levels": []}, "empty", "at least the target"),
    ({"levels": [0.0, 0.9375]}, "0.0", r"inside \(0, 1\)"),
    ({"num_levels": 0}, "=0", "at least 1"),
    ({"method": "magnitud"}, "'magnitud'", "did you mean 'magnitude'.*random"),
    ({"method": "zebra"}, "'zebra'", "choose one of random"),
    ({"criterion": "tailor"}, "'tailor'", "did you mean 'taylor'"),
    ({"scope": "layr"}, "'layr'", "did you mean 'layer'"),
    ({"selection": "halvin"}, "'halvin'", "did you mean 'halving'"),
    ({"pattern": "blocks"}, "'blocks'", "'unstructured', 'channel' or 'N:M'"),
    ({"pattern": "4:2"}, "'4:2'", "0 < N < M"),
    ({"sparsity": 0.9, "pattern": "2:4"}, "=0.9.*pattern='2:4'", "leave sparsity unset"),
    ({"scope": "global", "pattern": "2:4"}, "'global'.*pattern='2:4'", "leave scope unset"),
    ({"pattern": "2:4", "levels": [0.3, 0.5]}, "0.3", "multiple of 1/4"),
    ({"num_candidates": 4, "method": "magnitude"}, "=4.*method='magnitude'", "method='random'"),
    ({"criterion": "taylor", "method": "fisher"}, "'taylor'.*method='fisher'", "leave criterion unset"),
    ({"num_candidates": 0}, "=0", "at least 1"),
    ({"proposals": []}, "empty", "'mixed', 'paper'"),
    ({"sampling_ratios": []}, r"=\[\]", "positive numbers"),
    ({"sampling_ratios": [1e-4, 0.0]}, "0.0", "positive numbers"),
    ({"criterion_batches": -1}, "=-1", "at least 0"),
    ({"criterion_batches": 0}, "=0.*'taylor'", "64 or more.*proposals='paper'"),
    ({"criterion_batches": 0, "method": "fisher"}, "=0.*'fisher'", "64 or more.*method='magnitude'"),
    ({"criterion_batches": 0, "method": "platon"}, "=0.*'platon'", "64 or more.*method='magnitude'"),
    ({"criterion_batches": 0, "method": "obert"}, "=0.*'obert'", "64 or more.*method='magnitude'"),
    ({"obert_damping": 0, "method": "obert"}, "=0 ", "positive, such as 0.1"),
    ({"obert_memory": 0, "method": "obert"}, "=0 ", "positive, such as 1"),
    ({"obert_damping": 1.0}, "=1.0.*criterion='taylor'", "leave it unset"),
    ({"obert_memory": 4.0, "method": "pdp"}, "=4.0", "leave it unset"),
    ({"criterion_batch_size": 0}, "=0", "at least 1"),
    ({"trial_steps": -1}, "=-1", "at least 0"),
    ({"trial_steps": 0, "refit_rows": 0}, "trial_steps=0", "needs refit_rows, which is 0"),
    ({"trial_steps": 0, "selection": "survivors"}, "trial_steps=0", "selection='halving'"),
    ({"trial_learning_rate": 1e-4, "trial_steps": 0}, "=0.0001.*trial_steps=0", "leave trial_steps unset"),
    ({"trial_batch_size": 8, "trial_steps": 0}, "=8.*trial_steps=0", "leave trial_steps unset"),
    ({"last_level_weight": None}, "=None", "finite number"),
    ({"trial_learning_rate": -1e-3}, "=-0.001", "positive"),
    ({"last_level_weight": 0}, "=0", "positive"),
    ({"level_eval_steps": -1}, "=-1", "at least 0"),
    ({"pruning_warmup_steps": -1}, "=-1", "share below 1 or a whole number"),
    ({"pruning_warmup_steps": 1.5}, "=1.5", "share below 1 or a whole number"),
    ({"max_selection_samples": 0}, "=0", "at least 1"),
    ({"selection_fraction": 0}, "=0", r"inside \(0, 1\).*selection_dataset"),
    ({"selection_fraction": 1.0}, "=1.0", r"inside \(0, 1\).*selection_dataset"),
    ({"layer_floor": 1.5}, "=1.5", r"\[0, 1\]"),
    ({"bf16_full_eval": True}, "fp16_full_eval", "use bf16=True"),
]


@pytest.mark.parametrize(("fields", "value", "remedy"), REFUSED, ids=lambda x: str(x) if isinstance(x, dict) else "")
def test_bad_fields_are_refused_by_name_value_and_remedy(make, fields, value, remedy):
    with pytest.raises(ValueError, match=f"(?s){value}.*{remedy}") as refusal:
        make(**fields)
    assert next(iter(fields)) in str(refusal.value)


@pytest.mark.parametrize(
    "fields",
    [
        {"layer_floor": 0.0},
        {"layer_floor": 1.0},
        {"pruning_warmup_steps": 0.1},
        {"pruning_warmup_steps": 10},
        {"criterion_batches": 0, "method": "magnitude"},
        {"criterion_batches": 0, "proposals": "paper"},
        {"obert_damping": 1e-3, "obert_memory": 0.5, "method": "obert"},
        {"obert_damping": 1e-3, "proposals": ["fisher:layer", "obert:layer", "magnitude:layer:votes"]},
        {"num_candidates": 1},
        {"num_candidates": 1, "method": "magnitude"},
        {"criterion": "fisher", "method": "fisher"},
        {"num_levels": 1},
        {"sparsity": 0.01},
        {"trial_steps": 1, "trial_learning_rate": 1e-5, "selection": "early"},
    ],
    ids=str,
)
def test_values_at_the_edge_are_taken_as_given(make, fields):
    config = make(**fields)
    assert {name: getattr(config, name) for name in fields} == fields


# -- command line and copies ------------------------------------------------------------------------------------------


def test_the_command_line_gives_what_the_constructor_gives(tmp_path, make):
    parsed = parse(
        tmp_path,
        "--proposals taylor:global fisher:balanced:votes --levels 0.5 0.9375 --sampling_ratios 1e-4 2e-3 "
        "--target_modules query key --exclude_modules value --method random --sparsity 0.9375 --no_lr_rewind "
        "--num_candidates 3 --trial_steps 7 --pruning_warmup_steps 0.2",
    )
    built = make(
        proposals=["taylor:global", "fisher:balanced:votes"],
        levels=[0.5, 0.9375],
        sampling_ratios=[1e-4, 2e-3],
        target_modules=["query", "key"],
        exclude_modules=["value"],
        sparsity=0.9375,
        lr_rewind=False,
        num_candidates=3,
        trial_steps=7,
        pruning_warmup_steps=0.2,
    )
    own = {f.name for f in dataclasses.fields(PruningConfig)} - {f.name for f in dataclasses.fields(TrainingArguments)}
    assert {name: getattr(parsed, name) for name in own} == {name: getattr(built, name) for name in own}
    assert (parsed.levels, parsed.lr_rewind, parsed.resolved().scope) == ([0.5, 0.9375], False, "balanced")


def test_an_empty_command_line_gives_the_defaults(tmp_path, make):
    parsed, default = parse(tmp_path, ""), make()
    assert {f.name for f in dataclasses.fields(PruningConfig)} <= vars(parsed).keys()
    assert parsed.pruning_fields() == default.pruning_fields() and parsed.resolved() == default.resolved()


def test_the_command_line_refuses_unknown_methods(tmp_path, capsys):
    with pytest.raises(SystemExit):
        parse(tmp_path, "--method magnitud")
    assert "magnitude" in capsys.readouterr().err


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"method": "fisher", "sparsity": 0.8},
        {"pattern": "1:4", "num_levels": 3},
        {"method": "pdp"},
        {"method": "gumbel", "frozen_steps": 0.1},
        {"method": "gumbel", "gumbel_untrained": True},
    ],
)
def test_a_copy_with_one_field_changed_keeps_the_others(make, fields):
    config = make(**fields)
    copy = dataclasses.replace(config, learning_rate=1e-3)
    assert copy.learning_rate == 1e-3 != config.learning_rate
    assert copy.pruning_fields() == config.pruning_fields() and copy.resolved() == config.resolved()
    with pytest.raises(ValueError, match="sparsity|levels"):
        dataclasses.replace(config, sparsity=2.0)


def test_a_config_can_be_written_as_json(make):
    text = make(pattern="2:4").to_json_string()
    assert '"pattern": "2:4"' in text and '"levels"' in text


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("levels", 0.9),
        ("levels", ["0.5", 0.9375]),
        ("sampling_ratios", 1e-4),
        ("sampling_ratios", [float("nan")]),
        ("num_levels", 2.5),
        ("trial_steps", 2.5),
        ("num_candidates", 2.5),
        ("sparsity", "0.5"),
        ("trial_learning_rate", float("nan")),
        ("proposals", ["entropy:layer"]),
    ],
)
def test_wrong_types_are_refused_by_name(tmp_path, name, value):
    with pytest.raises(ValueError, match=name.removesuffix("s")):
        PruningConfig(output_dir=str(tmp_path), use_cpu=True, **{name: value})
