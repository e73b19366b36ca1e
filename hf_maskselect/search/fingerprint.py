"""What a search depends on, as one number: a killed run keeps its trials only if nothing of that has changed."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping

import numpy as np
import torch
from torch import nn
from transformers.trainer_pt_utils import nested_numpify

from ..utils.files import bytes_of

# What says where a run writes, what it resumes from and how far it got, and nothing about what it computes.
_ANY = {"output_dir", "logging_dir", "run_name", "resume_from_checkpoint", "hub_token", "push_to_hub_token"}
_ANY |= {"ddp_timeout", "enable_jit_checkpoint", "save_strategy", "save_steps", "save_total_limit", "disable_tqdm"}
_ANY |= {"local_rank", "pruning", "_name_or_path", "transformers_version"}
_ANY |= {"architectures", "dtype", "problem_type"}  # written into a configuration by its first save and forward


def relevant(fields: Mapping[str, object]) -> dict[str, object]:
    """Those of arguments or of a model's configuration that results depend on."""
    return {name: value for name, value in fields.items() if name not in _ANY}


def plain_batch(value):
    """A batch as numbers and text; of anything else its type, since it may print its address."""
    if isinstance(value, torch.Tensor):
        return nested_numpify(value)
    if isinstance(value, Mapping):
        return {str(key): plain_batch(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [plain_batch(entry) for entry in value]
    return value if value is None or isinstance(value, str | int | float | np.ndarray) else type(value).__name__


def digest_of(told: Mapping[str, object], models: Iterable[nn.Module]) -> str:
    """SHA-256 of what is told and of all weights and buffers."""
    sha = hashlib.sha256(json.dumps(told, sort_keys=True, default=_text).encode())
    for model in models:
        for name, tensor in model.state_dict().items():
            sha.update(name.encode())
            sha.update(bytes_of(tensor))
    return sha.hexdigest()


def _text(value) -> str:
    """A value that JSON does not know, with all its digits."""
    return str(value.tolist()) if isinstance(value, np.ndarray) else str(value)
