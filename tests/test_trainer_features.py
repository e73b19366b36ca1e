"""What people use of `Trainer` besides its defaults: own losses, odd batches, several runs, changed arguments."""

import dataclasses
import functools
import json

import pytest
import torch
import torch.nn.functional as F
import transformers
from tiny import METHODS, losses, make, make_config, make_rows, make_trainer, same, weights_of
from tokenizers import Tokenizer, models
from torch.testing import assert_close
from transformers import Trainer

from hf_maskselect import MaskSet, PruningTrainer, export_semi_structured, load_semi_structured, verify
from hf_maskselect.search.results import SEARCH_FILE

SEARCHES = [
    {"method": "random", "num_candidates": 3},
    {"method": "random", "num_candidates": 3, "trial_steps": 2, "refit_rows": 0},
]
each_search = pytest.mark.parametrize("search", SEARCHES, ids=["as fitted", "trials"])


def share_of_all(outputs, labels, num_items_in_batch):
    """As `compute_loss_func` is documented: the labels of all micro-batches are counted together."""
    return F.cross_entropy(outputs.logits, labels, reduction="sum") / num_items_in_batch


class ScaledLoss:
    """As `loss_is_scaled_for_ga` is documented."""

    loss_is_scaled_for_ga = True

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        outputs = model(**inputs)
        loss = share_of_all(outputs, inputs["labels"], num_items_in_batch)
        return (loss, outputs) if return_outputs else loss


class ScaledPruning(ScaledLoss, PruningTrainer):
    pass


class ScaledPlain(ScaledLoss, Trainer):
    pass


def scores_of(trainer):
    return [score for search in trainer.run.search.history for c in search.candidates for score in c.scores]


# -- losses -----------------------------------------------------------------------------------------------------------


@each_search
@pytest.mark.parametrize("given", ["compute_loss_func", pytest.param("loss_is_scaled_for_ga", marks=pytest.mark.slow)])
def test_a_loss_that_counts_the_labels_of_a_step_is_that_of_the_model(tmp_path, search, given):
    # Plain gradient steps: neither Adam nor clipping would tell a loss from its double.
    steps = {"optim": "sgd", "learning_rate": 0.02, "max_grad_norm": 0.0}
    size = {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 4, "max_steps": 10}  # before rows run out
    changes = {**size, **steps, **search}
    plain = make_trainer(tmp_path / "plain", **changes)
    plain.train()
    own = {"keywords": {"compute_loss_func": share_of_all}} if given == "compute_loss_func" else {}
    own = own or {"trainer": ScaledPruning}
    counted = make_trainer(tmp_path / "counted", **own, **changes)
    counted.train()
    assert_close(scores_of(counted), scores_of(plain), rtol=1e-4, atol=1e-4)
    assert_close(weights_of(counted.model), weights_of(plain.model), rtol=1e-3, atol=1e-3)
    assert_close(losses(counted), losses(plain), rtol=1e-4, atol=1e-5)
    assert counted.evaluate()["eval_loss"] == pytest.approx(plain.evaluate()["eval_loss"], rel=1e-4)


def test_a_loss_scaled_by_a_subclass_is_trained_as_trainer_trains_it(tmp_path):
    dense = {"pruning_warmup_steps": 11, "num_levels": 1, "lr_rewind": False, "gradient_accumulation_steps": 2}
    pruning = make_trainer(tmp_path / "pruning", trainer=ScaledPruning, **dense)
    pruning.train()
    plain = ScaledPlain(make(), make_config(tmp_path / "plain", **dense), train_dataset=make_rows())
    plain.train()
    assert losses(pruning)[:11] == losses(plain)[:11]


def test_a_loss_that_is_told_not_to_be_scaled_is_that_of_the_model(tmp_path):
    """The model must not be believed then, either: on several ranks `Trainer` would multiply its loss by them."""
    unscaled = make_trainer(
        tmp_path / "unscaled", trainer=type("Unscaled", (PruningTrainer,), {"loss_is_scaled_for_ga": False})
    )
    unscaled.train()
    plain = make_trainer(tmp_path / "plain")
    plain.train()
    assert not unscaled.model_accepts_loss_kwargs and losses(unscaled) == losses(plain)


# -- batches ----------------------------------------------------------------------------------------------------------


class OfTensors(PruningTrainer):
    def compute_loss(self, model, inputs, *args, **kwargs):
        tensors = {name: value for name, value in inputs.items() if isinstance(value, torch.Tensor)}
        return super().compute_loss(model, tensors, *args, **kwargs)


@pytest.mark.parametrize("extra", [None, False, 8, ["text"] * 8, {"of": object()}], ids=lambda v: type(v).__name__)
def test_a_batch_may_hold_what_is_no_tensor(tmp_path, extra):
    def collate(rows):
        return {**{name: torch.stack([row[name] for row in rows]) for name in rows[0]}, "extra": extra}

    trainer = make_trainer(
        tmp_path,
        trainer=OfTensors,
        keywords={"data_collator": collate},
        remove_unused_columns=False,
        **SEARCHES[1],
    )
    trainer.train()
    assert trainer.pruning_state().masks.sparsity() == 0.75


@pytest.mark.parametrize(
    "holder",
    ["collator", *(pytest.param(name, marks=pytest.mark.slow) for name in ("partial", "collator of another"))],
)
def test_the_model_that_a_collator_holds_is_never_copied(tmp_path, monkeypatch, holder):
    words = Tokenizer(models.WordLevel({"[PAD]": 0, "[UNK]": 1}, unk_token="[UNK]"))
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=words, pad_token="[PAD]", unk_token="[UNK]")
    sizes = {"vocab_size": 64, "d_model": 32, "d_kv": 16, "d_ff": 64, "num_layers": 2, "num_heads": 2}
    config = transformers.T5Config(**sizes, decoder_start_token_id=0, pad_token_id=0)
    model = transformers.T5ForConditionalGeneration(config)
    held = transformers.T5ForConditionalGeneration(config) if "another" in holder else model
    collator = transformers.DataCollatorForSeq2Seq(tokenizer, model=held)
    if holder == "partial":
        collator = functools.partial(lambda rows, holder, made=collator: made(rows), holder=model)
    ids = [row["input_ids"] for row in make_rows()]
    rows = [{"input_ids": i.tolist(), "attention_mask": [1] * 8, "labels": i.flip(0)[:5].tolist()} for i in ids]
    keywords = {"processing_class": tokenizer, "train_dataset": rows, "data_collator": collator}

    def refuse(self, memo):
        raise AssertionError("a parameter is copied")

    monkeypatch.setattr(torch.nn.Parameter, "__deepcopy__", refuse)
    trainer = make_trainer(tmp_path, model, keywords=keywords, **SEARCHES[0])
    trainer.train()
    assert len(scores_of(trainer)) > 2


def test_an_own_dataloader_does_not_replace_the_rows_of_a_search(tmp_path):
    class Own(PruningTrainer):
        def get_train_dataloader(self):
            return torch.utils.data.DataLoader(make_rows(), batch_size=8)

    keywords = {"train_dataset": None}
    with pytest.raises(ValueError, match="there is no train_dataset, and trials.*method='magnitude'"):
        make_trainer(tmp_path, trainer=Own, keywords=keywords, **SEARCHES[0]).train()
    trainer = make_trainer(tmp_path, trainer=Own, keywords=keywords)
    trainer.train()  # by magnitude
    # At its target no mask is made.
    make_trainer(tmp_path, trainer.model, trainer=Own, keywords=keywords, method="taylor").train()


@dataclasses.dataclass(slots=True)
class Slotted:
    keys: tuple = ("input_ids", "attention_mask", "labels")

    def __call__(self, rows):
        return {key: torch.stack([row[key] for row in rows]) for key in self.keys}


def test_a_collator_needs_no_dictionary(tmp_path):
    trainer = make_trainer(tmp_path, keywords={"data_collator": Slotted()}, **SEARCHES[0])
    trainer.train()
    assert len(scores_of(trainer)) > 2


# -- runs -------------------------------------------------------------------------------------------------------------


def test_every_run_of_a_model_init_begins_anew(tmp_path):
    keywords = {"model_init": lambda: make()}
    trainer = make_trainer(tmp_path, keywords=keywords, trainer=fresh, **SEARCHES[0])
    runs = []
    for _ in range(2):
        trainer.train()
        found = trainer.search_summary()
        runs.append((weights_of(trainer.model), found["search_step_equivalents"], found["search_cost_ratio"]))
        assert len(json.loads((tmp_path / SEARCH_FILE).read_text())) == len(trainer.run.search.history) == 2
    assert same(runs[0][0], runs[1][0]) and runs[0][1:] == runs[1][1:]


def fresh(model, config, **keywords):
    """A trainer that makes its model itself."""
    return PruningTrainer(None, config, **keywords)


def test_a_second_run_of_one_model_keeps_the_table_of_its_searches(tmp_path):
    trainer = make_trainer(tmp_path, **SEARCHES[0])
    trainer.train()
    table = (tmp_path / SEARCH_FILE).read_text()
    trainer.train()
    assert (tmp_path / SEARCH_FILE).read_text() == table
    make_trainer(tmp_path, method="magnitude").train()
    assert len(json.loads((tmp_path / SEARCH_FILE).read_text())[0]["candidates"]) == 1


# -- arguments that are set later -------------------------------------------------------------------------------------

LATER = [
    (METHODS[2], {"pdp_tau": 1.0}),
    (METHODS[2], {"scope": "layer"}),
    (METHODS[3], {"gumbel_learning_rate": 0.01}),
    (METHODS[3], {"seed": 11}),
    (METHODS[1], {"level_eval_steps": 2}),
    (METHODS[1], {"distill_hidden": 0.0}),
    (METHODS[1], {"selection_metric": "loss"}),
]
each_later = pytest.mark.parametrize(
    ("method", "later"), LATER, ids=lambda fields: "-".join(map(str, fields.values()))
)


def set_later(trainer, later):
    for name, value in later.items():
        setattr(trainer.args, name, value)


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    """(method, later) -> the trainer of a run that was given everything at once; trained once for all tests."""
    trained = {}

    def run(method, later, **making):
        key = json.dumps({**method, **later}), len(making)
        if key not in trained:
            keywords = {"teacher": make(seed=3), **({"model_init": lambda: make()} if making else {})}
            folder = tmp_path_factory.mktemp("reference")
            trained[key] = make_trainer(folder, keywords=keywords, **making, **{**method, **later})
            trained[key].train()
        return trained[key]

    return run


@each_later
@pytest.mark.slow
def test_what_is_set_later_counts_for_a_model_init(tmp_path, reference, method, later):
    keywords = {"model_init": lambda: make(), "teacher": make(seed=3)}
    asked = make_trainer(tmp_path, keywords=keywords, trainer=fresh, **method)
    asked.train()
    before = weights_of(asked.model)
    assert same(before, weights_of(reference(method, {}, trainer=fresh).model))
    set_later(asked, later)
    asked.train()
    assert same(weights_of(asked.model), weights_of(reference(method, later, trainer=fresh).model))
    assert not same(weights_of(asked.model), before)


USED = [*((method, later) for method, later in LATER if "seed" not in later), (METHODS[0], {"keep_zeros": False})]
USED += [(METHODS[1], {"selection": "survivors"}), (METHODS[1], {"num_candidates": 1})]
USED += [(METHODS[1], {"selection_fraction": 0.3}), (METHODS[1], {"max_selection_samples": 4})]


@pytest.mark.slow
@pytest.mark.parametrize(("method", "later"), USED, ids=str)
def test_a_run_reads_the_fields_afresh(tmp_path, reference, method, later):
    told = reference(method, later)
    asked = make_trainer(tmp_path, keywords={"teacher": make(seed=3)}, **method)
    set_later(asked, later)
    asked.train()
    assert same(weights_of(asked.model), weights_of(told.model))
    assert len(asked.train_dataset) == len(told.train_dataset)


def test_a_second_run_of_one_model_reads_the_fields_afresh(tmp_path):
    """It goes on from the pruned model, with another method and target."""
    trainer = make_trainer(tmp_path)
    trainer.train()
    zeros = MaskSet.from_zeros(trainer.model)
    set_later(trainer, {"method": "gumbel", "num_levels": None, "frozen_steps": 2, "sparsity": 0.9})
    trainer.train()
    assert trainer.pruning_state().masks.overlap(zeros) == 1
    set_later(trainer, {"sparsity": 0.95, "gumbel_learning_rate": 0.1})
    trainer.train()
    trainer.save_model()
    assert verify(tmp_path).masks.sparsity() == pytest.approx(0.95, abs=1e-4)
    logits = trainer.run.method.parameter_groups()[0]["params"]
    assert sum(group["params"][0] is logits[0] for group in trainer.optimizer.param_groups) == 1
    assert len(trainer.optimizer.param_groups) == 4


COUNTS = [
    ({**METHODS[3], "data_seed": 1}, {"seed": 11}),
    (METHODS[0], {"scope": "global"}),
    ({**METHODS[1], "selection": "halving"}, {"selection": "early"}),
    ({**METHODS[1], "level_eval_steps": 2}, {"level_eval_steps": 3}),
    (METHODS[1], {"selection_metric": "eval_loss"}),  # as it is without a teacher
    (METHODS[0], {"selection_fraction": 0.3, "distill_logits": 0.0}),  # nobody has used them
]


@pytest.mark.slow
@pytest.mark.parametrize(("method", "later"), COUNTS, ids=str)
def test_what_is_set_later_counts_where_it_can(tmp_path, method, later):
    told = make_trainer(tmp_path / "told", **{**method, **later})
    told.train()
    asked = make_trainer(tmp_path / "asked", **method)
    set_later(asked, later)
    asked.train()
    assert same(weights_of(asked.model), weights_of(told.model))


def test_a_hyper_parameter_search_may_write_what_a_configuration_may(tmp_path):
    trainer = make_trainer(tmp_path, keywords={"model_init": lambda: make()}, trainer=fresh, **METHODS[1])
    trainer.args.selection_metric = "eval_loss"
    trainer.train()
    trainer.args.selection_metric = "accuracy"
    with pytest.raises(ValueError, match="selection_metric='accuracy' needs compute_metrics"):
        trainer.train()
    trainer.args.selection_metric, trainer.args.trial_learning_rate = None, "1"
    with pytest.raises(ValueError, match="trial_learning_rate='1' must be"):
        trainer.train()


def test_runs_of_a_model_init_do_not_depend_on_their_order(tmp_path):
    """Attention maps want another implementation of the teacher's attention, too."""
    keywords = {"model_init": lambda: make(), "teacher": make(seed=3)}
    trainer = make_trainer(tmp_path, keywords=keywords, trainer=fresh, distill_hidden=0.0)
    found = []
    for weight in (0.0, 1.0, 0.0):
        trainer.args.distill_attention = weight
        trainer.train()
        found.append(weights_of(trainer.model))
    assert same(found[0], found[2]) and not same(found[0], found[1])


def test_rows_are_held_out_once_a_run_chooses(tmp_path):
    trainer = make_trainer(tmp_path, method="random", num_candidates=1)
    trainer.args.num_candidates = 3
    trainer.train()
    assert scores_of(trainer) and (len(trainer.train_dataset), len(trainer.selection_dataset)) == (86, 10)
    trainer.args.num_candidates = 1
    trainer.train()
    assert len(trainer.train_dataset) == 96 and trainer.selection_dataset is None
    keywords = {"selection_dataset": make_rows(16, seed=5)}
    trainer = make_trainer(tmp_path, method="random", num_candidates=1, keywords=keywords)
    trainer.args.num_candidates, trainer.args.selection_fraction = 3, 0.5
    trainer.train()
    assert scores_of(trainer)


def test_rows_assigned_between_runs_are_the_ones_to_choose_on(tmp_path):
    trainer = make_trainer(tmp_path, method="random", num_candidates=3, max_steps=4)
    first, rows = trainer.selection_dataset, make_rows(16, seed=5)
    trainer.selection_dataset = rows
    trainer.train()
    assert trainer.selection_dataset is trainer.run.bench.batches.held_out is rows
    assert len(trainer.train_dataset) == 96  # nothing is held out of them any more
    trainer.selection_dataset = None
    trainer.train()
    assert (len(trainer.train_dataset), list(trainer.selection_dataset)) == (86, list(first))
    trainer.train_dataset = make_rows(40, seed=7)  # which may hold rows that were held out before
    trainer.train()
    assert (len(trainer.train_dataset), len(trainer.selection_dataset)) == (36, 4)
    unchanged = trainer.selection_dataset
    trainer.train()
    assert trainer.selection_dataset is unchanged


def test_batch_options_are_checked_before_every_run(tmp_path):
    search = {"method": "random", "num_candidates": 3, "trial_steps": 2, "refit_rows": 0}
    trainer = make_trainer(tmp_path, **search, trial_batch_size=16)
    trainer.args.per_device_train_batch_size = 3
    with pytest.raises(ValueError, match="trial_batch_size=16 is no multiple of per_device_train_batch_size=3"):
        trainer.train()
    trainer = make_trainer(tmp_path, **search)
    trainer.args.train_sampling_strategy = "batch_rebalance"
    with pytest.raises(ValueError, match="train_sampling_strategy='batch_rebalance'"):
        trainer.train()


@pytest.mark.parametrize("method", METHODS[2:], ids=lambda method: method["method"])
def test_a_run_after_an_interrupted_step_begins_from_the_trained_weights(tmp_path, method):
    """With other arguments, for which another method is made."""
    trainer, calls = make_trainer(tmp_path, **method), []
    compute_loss = trainer.compute_loss

    def interrupted(*args, **kwargs):
        calls.append(None)
        if len(calls) == 6:
            raise KeyboardInterrupt
        return compute_loss(*args, **kwargs)

    trainer.compute_loss = interrupted
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    old = trainer.run.method
    trained = {name: rows.clone() for name, rows in old._trained.items()}
    assert trained and any(not torch.equal(trained[name], weight) for name, weight in old.weights.items())
    trainer.compute_loss, trainer.args.seed, seen = compute_loss, 8, {}
    begin = type(old).begin

    def begins(self, *args):
        seen.update({name: weight.detach().clone() for name, weight in self.weights.items()})
        return begin(self, *args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(old), "begin", begins)
        trainer.train()
    assert trainer.run.method is not old and same(seen, trained)


def test_scores_follow_another_evaluation_batch_size(tmp_path):
    trainer = make_trainer(tmp_path, keywords={"teacher": make(seed=3)}, **SEARCHES[0])
    before = trainer.run.bench.score()
    trainer.args.per_device_eval_batch_size = 3
    assert trainer.run.bench.score() == pytest.approx(before, rel=1e-5)


# -- saving -----------------------------------------------------------------------------------------------------------


def test_a_save_pretrained_of_the_users_own_is_called_and_kept(tmp_path):
    model, folders = make(), []
    saves = model.save_pretrained

    def own(folder, **options):
        folders.append(folder)
        saves(folder, **options)

    model.save_pretrained = own
    trainer = make_trainer(tmp_path, model, save_strategy="steps", save_steps=6)
    trainer.train()
    trainer.save_model()
    assert len(folders) == 3 and model.save_pretrained is own
    verify(tmp_path)


class Narrow(transformers.BertForSequenceClassification):
    def save_pretrained(self, save_directory, is_main_process=True, state_dict=None):
        super().save_pretrained(save_directory, is_main_process=is_main_process, state_dict=state_dict)


def test_a_class_may_save_with_fewer_options(tmp_path):
    trainer = make_trainer(tmp_path, Narrow(make().config))
    trainer.train()
    trainer.save_model()
    assert trainer.pruning_state().masks.sparsity() == 0.75


def test_a_class_may_be_exported_though_it_saves_with_fewer_options(tmp_path):
    named = type("BertForSequenceClassification", (Narrow,), {})  # as a file can tell it
    trainer = make_trainer(tmp_path / "run", named(make().config), pattern="2:4", sparsity=None)
    trainer.train()
    export_semi_structured(trainer.model, tmp_path / "out")
    exported = load_semi_structured(tmp_path / "out")
    assert same(weights_of(exported), weights_of(trainer.model.bfloat16()))
