"""Tiny random models of every supported family, and tiny data, for all tests."""

import torch
import transformers

from hf_maskselect import MaskSet, PruningConfig, PruningState, PruningTrainer, prunable_weights
from hf_maskselect.masking.patterns import parse_pattern

COMMON = {
    "vocab_size": 64,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
FAMILIES = {
    "Bert": {**COMMON, **NO_DROPOUT},
    "Roberta": {**COMMON, **NO_DROPOUT},
    "Electra": {**COMMON, **NO_DROPOUT, "embedding_size": 16},
    "Albert": {**COMMON, **NO_DROPOUT, "embedding_size": 16, "classifier_dropout_prob": 0.0},
    "DebertaV2": {**COMMON, **NO_DROPOUT, "relative_attention": True, "pos_att_type": ["c2p", "p2c"]},
    "ModernBert": {**COMMON, "bos_token_id": 1, "eos_token_id": 2, "cls_token_id": 1, "sep_token_id": 2},
    "DistilBert": {
        "vocab_size": 64,
        "dim": 32,
        "n_layers": 2,
        "n_heads": 2,
        "hidden_dim": 64,
        "dropout": 0.0,
        "attention_dropout": 0.0,
        "seq_classif_dropout": 0.0,
    },
}

# One short run of each kind of method.
METHODS = [
    {"method": "magnitude"},
    {"method": "random", "num_candidates": 3, "trial_steps": 2},
    {"method": "pdp", "num_levels": None, "frozen_steps": 3, "pdp_tau": 1e-3},
    {"method": "gumbel", "num_levels": None, "frozen_steps": 3},
    {"method": "movement", "num_levels": None, "frozen_steps": 3},
]


def make(family="Bert", head="ForSequenceClassification", seed=0, **changes):
    """A tiny random model in training mode, without dropout; large weights, so that no term is lost in rounding."""
    torch.manual_seed(seed)
    config = getattr(transformers, family + "Config")(**{**FAMILIES[family], "initializer_range": 0.2, **changes})
    return getattr(transformers, family + head)(config).train()


def make_rows(count=96, length=8, seed=0, regression=False):
    """Rows whose label depends on their first token; equal lengths."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for _ in range(count):
        ids = torch.randint(3, 64, (length,), generator=generator)
        label = ids[0] / 64 if regression else (ids[0] > 32).long()
        rows.append({"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": label})
    return rows


def make_config(folder, **changes):
    """A short run on the CPU: 12 steps, two levels to 0.75, one deterministic magnitude mask."""
    given = {
        "output_dir": str(folder),
        "method": "magnitude",
        "sparsity": 0.75,
        "num_levels": 2,
        "max_steps": 12,
        "per_device_train_batch_size": 8,
        "per_device_eval_batch_size": 16,
        "learning_rate": 1e-3,
        "criterion_batches": 4,
        "use_cpu": True,
        "disable_tqdm": True,
        "save_strategy": "no",
        "logging_steps": 1,
        "seed": 7,
    }
    return PruningConfig(**{**given, **changes})


def make_trainer(folder, model=None, rows=None, trainer=PruningTrainer, keywords=None, **changes):
    """A trainer over `make_rows`; `changes` go to the config, `keywords` to the trainer."""
    rows = make_rows() if rows is None else rows
    given = {"train_dataset": rows, "eval_dataset": rows[:32]}
    return trainer(make() if model is None else model, make_config(folder, **changes), **{**given, **(keywords or {})})


def save_pruned(folder, sparsity=0.75, pattern="unstructured", family="Bert", dtype=torch.float32, **changes):
    """A pruned model as `PruningTrainer` leaves it."""
    model = make(family, **changes)
    scores = {name: weight.detach().abs() for name, weight in prunable_weights(model).items()}
    masks = MaskSet(parse_pattern(pattern).masks(scores, sparsity))
    masks.apply_(model)
    model.to(dtype).save_pretrained(folder)
    state = PruningState(masks, "magnitude", pattern, sparsity, step=10, level=0, seed=42)
    state.sealed(folder).save(folder)
    return model, masks


def losses(trainer):
    """The logged training losses, in order."""
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def weights_of(model):
    """A copy of the model's state."""
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def same(first, second):
    """Whether two states are equal to the bit."""
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)
