"""A digest of all that a search depends on: a killed run keeps its trials only if none of that has changed."""

import hashlib
import json
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.trainer_pt_utils import nested_numpify

from ..utils.files import bytes_of
from .batches import Batches
from .borrowed import BorrowedTrainer
from .sandbox import Sandbox

# Fields that say where a run writes, what it resumes from and how far it got, and do not affect what it computes.
_IRRELEVANT = {"output_dir", "logging_dir", "run_name", "resume_from_checkpoint", "hub_token", "push_to_hub_token"}
_IRRELEVANT |= {"ddp_timeout", "enable_jit_checkpoint", "save_strategy", "save_steps", "save_total_limit"}
_IRRELEVANT |= {"disable_tqdm", "local_rank", "pruning", "_name_or_path", "transformers_version"}
_IRRELEVANT |= {"architectures", "dtype", "problem_type"}  # the first save or forward writes them into a config


def search_fingerprint(trainer: BorrowedTrainer, sandbox: Sandbox, batches: Batches, level: int) -> str:
    """Return the SHA-256 of weights, teacher, arguments, optimizer and samples of the data."""
    facts = _relevant({**trainer.args.to_dict(), **trainer.args.resolved().record()})
    facts |= {"level": level, "metric": trainer.selection_metric}
    facts |= {"rows": [len(trainer.train_dataset), len(batches.held_out)]}
    facts |= {"step": [trainer._train_batch_size, batches.rows_per_step()]}
    if trainer.given_optimizer is not None:
        facts["optimizer"] = str(trainer.given_optimizer)
    elif trainer.optimizer_cls_and_kwargs is not None:
        cls, arguments = trainer.optimizer_cls_and_kwargs
        plain = {k: v for k, v in arguments.items() if isinstance(v, int | float | str | tuple)}  # an address changes
        facts["optimizer"] = [cls.__qualname__, plain]
    if isinstance(trainer.model, PreTrainedModel):
        facts["model"] = _relevant(trainer.model.config.to_dict())
    with sandbox.random_state():  # for a collator that draws
        for dataset in (trainer.train_dataset, batches.held_out):
            spread = range(0, len(dataset), max(1, len(dataset) // 32))
            facts[f"batch of {len(facts)}"] = [_plain(batch) for batch in batches.load(dataset, 4, spread)]
    return _digest_of(facts, [model for model in (trainer.model, trainer.teacher) if model is not None])


def _relevant(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments, or entries of a model's configuration, that results depend on."""
    return {name: value for name, value in fields.items() if name not in _IRRELEVANT}


def _plain(value: Any) -> Any:
    """Return a batch as numbers and text; of any other value its type, since it may print its address."""
    if isinstance(value, torch.Tensor):
        return nested_numpify(value)
    if isinstance(value, Mapping):
        return {str(key): _plain(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(entry) for entry in value]
    return value if value is None or isinstance(value, str | int | float | np.ndarray) else type(value).__name__


def _digest_of(facts: Mapping[str, Any], models: Iterable[nn.Module]) -> str:
    sha = hashlib.sha256(json.dumps(facts, sort_keys=True, default=_text).encode())
    for model in models:
        for name, tensor in model.state_dict().items():
            sha.update(name.encode())
            sha.update(bytes_of(tensor))
    return sha.hexdigest()


def _text(value: Any) -> str:
    """Return as text, with all its digits, a value that JSON does not know."""
    return str(value.tolist()) if isinstance(value, np.ndarray) else str(value)
