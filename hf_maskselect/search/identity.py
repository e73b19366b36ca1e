"""What makes a run another run: a digest of each part that its trials and scores depend on."""

import functools
import hashlib
import json
import platform
import sys
import types
import uuid
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
from transformers import PreTrainedModel, set_seed

from ..fields.rules import SELECTION_LOSSES
from ..utils.digests import weights_digest
from .batches import Batches
from .borrowed import BorrowedTrainer
from .contents import Contents, NoDigest, digest_of, version_of
from .sandbox import Sandbox

# Fields that say where a run writes, what it resumes from and how far it got, and do not affect what it computes.
_IRRELEVANT = {"output_dir", "logging_dir", "run_name", "resume_from_checkpoint", "hub_token", "push_to_hub_token"}
_IRRELEVANT |= {"ddp_timeout", "enable_jit_checkpoint", "save_strategy", "save_steps", "save_total_limit"}
_IRRELEVANT |= {"disable_tqdm", "local_rank", "obert_memory", "pruning", "_name_or_path", "transformers_version"}
_IRRELEVANT |= {"architectures", "dtype", "problem_type"}  # the first save or forward writes them into a config
_NOT_KNOWN = "?"  # begins the entry of a part that has no digest
_METHODS = (types.FunctionType, types.MethodType, functools.partial)
_METRICS = {"compute_metrics", "preprocess_logits_for_metrics"}  # of the score, if they are used at all
# Methods of a subclass that make a score. Any other may serve anything, and counts only for trials.
_SCORING = ("compute_loss", "prediction_step", "evaluate", "evaluation_loop")

Parts = Mapping[str, str]  # name of a part -> its digest


class Identity:
    """The identity of a run, in parts, so that a message can name the one that has changed.

    A part whose content is not known has an entry that equals no other, and a warning says so.
    """

    def __init__(self, trainer: BorrowedTrainer, sandbox: Sandbox, batches: Batches) -> None:
        self._trainer, self._sandbox, self._batches = trainer, sandbox, batches
        self._noted: tuple[list[Any], str] = ([], "")  # functions of the score, with their digest

    @functools.cached_property
    def teacher(self) -> str:
        """Digest of the teacher's weights; empty without one."""
        teacher = self._trainer.teacher
        return "" if teacher is None else weights_digest(teacher.state_dict())

    @functools.cached_property
    def held_out(self) -> str:
        """Digest of all held-out rows."""
        return self._digest("held-out rows", lambda contents: self._rows(contents, self._batches.held_out))

    @functools.cached_property
    def train(self) -> str:
        """Digest of all train rows."""
        return self._digest("train rows", lambda contents: self._rows(contents, self._trainer.train_dataset))

    def of_scores(self) -> dict[str, str]:
        """Return the parts on which the score of given weights depends."""
        trainer: Any = self._trainer
        metric = [trainer.selection_metric, trainer.args.resolved().selection_greater_is_better]
        return {
            "selection metric": repr(metric),
            "teacher": self.teacher,
            "held-out rows": self.held_out,
            "functions of the score": self.note_functions(),
        }

    def note_functions(self) -> str:
        """Return the digest of the functions that a score is computed with, as they were when they were first noted.

        Call it before the first score: a function that counts or remembers its calls has another state afterwards.
        """
        trainer: Any = self._trainer
        functions = [trainer.compute_loss_func, *(vars(trainer).get(name) for name in _SCORING)]
        functions += [_own(getattr(type(trainer), name, None)) for name in _SCORING]
        if trainer.selection_metric not in SELECTION_LOSSES:
            functions += [trainer.compute_metrics, trainer.preprocess_logits_for_metrics]
        if list(map(id, functions)) != list(map(id, self._noted[0])):
            digest = self._digest("functions of the score", lambda contents: contents.add(functions))
            self._noted = functions, digest
        return self._noted[1]

    def of_search(self, level: int, criteria: Mapping[str, Any]) -> dict[str, str]:
        """Return the parts on which the trials of a search depend."""
        trainer: Any = self._trainer
        model = trainer.model
        fields = _relevant({**trainer.args.to_dict(), **trainer.args.resolved().record()})
        arguments = [str(sorted(fields.items())), trainer._train_batch_size, self._batches.rows_per_step()]
        config = str(sorted(_relevant(model.config.to_dict()).items())) if isinstance(model, PreTrainedModel) else ""
        assigned = {
            name: value for name, value in vars(trainer).items() if isinstance(value, _METHODS) and _own(value)
        }
        functions = [type(trainer), {name: assigned[name] for name in sorted(assigned.keys() - _METRICS)}]
        functions += [self._batches.first_collator, dict(criteria)]
        trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
        versions = [platform.machine(), sys.version, torch.__version__, *_versions(), *_device(trainer.args.device)]
        return {
            **self.of_scores(),
            "level": str(level),
            "arguments": digest_of(arguments, known={}),
            "model": self._digest("model", lambda contents: contents.add([type(model), config, str(model)])),
            "weights": weights_digest(model.state_dict()),
            "trained parameters": digest_of(trained, known={}),
            "train rows": self.train,
            "functions": self._digest("functions", lambda contents: contents.add(functions)),
            "optimizer": self._digest("optimizer", lambda contents: contents.add(self._optimizer())),
            "versions": digest_of(versions, known={}),
        }

    def _optimizer(self) -> list[Any]:
        trainer = self._trainer
        if trainer.given_optimizer is not None:
            return [type(trainer.given_optimizer), str(trainer.given_optimizer)]
        if trainer.optimizer_cls_and_kwargs is None:
            return []
        cls, arguments = trainer.optimizer_cls_and_kwargs
        plain = {k: v for k, v in arguments.items() if isinstance(v, int | float | str | tuple)}  # not the parameters
        return [cls, plain]

    def _rows(self, contents: Contents, dataset: Any) -> None:
        if dataset is None:
            return
        with self._sandbox.random_state():  # for rows and collators that draw
            set_seed(self._trainer.args.seed)
            contents.rows(dataset)

    def _digest(self, part: str, fill: Callable[[Contents], None]) -> str:
        """Return the digest of a part. One that is not known equals no other, and a warning says why."""
        trainer: Any = self._trainer
        own = {"trainer": trainer, "model": trainer.model, "teacher": trainer.teacher}
        own |= {"train rows": trainer.train_dataset, "held-out rows": self._batches.held_out}
        own |= {"evaluation rows": trainer.eval_dataset, "arguments": trainer.args}
        contents = Contents({id(value): name for name, value in own.items() if value is not None})
        try:
            fill(contents)
        except (NoDigest, RecursionError) as error:
            warnings.warn(
                f"the {part} of this run cannot be told from those of another, because they hold {error}: after a "
                "kill its trials are repeated",
                stacklevel=2,
            )
            return f"{_NOT_KNOWN}{uuid.uuid4().hex}"
        return contents.hex()


def key_of(parts: Parts) -> str:
    """Return the SHA-256 of an identity."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def changed_parts(then: Parts, now: Parts) -> list[str]:
    """Return the names of the parts that both know and that differ."""
    both = [name for name in then if name in now and _NOT_KNOWN not in (then[name][:1], now[name][:1])]
    return [name for name in both if then[name] != now[name]]


def _relevant(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments, or entries of a model's configuration, that results depend on."""
    return {name: value for name, value in fields.items() if name not in _IRRELEVANT}


def _own(function: Any) -> Any:
    """Return a method that a user has written; None for one of a library."""
    return function if version_of(getattr(function, "__module__", None)) is None else None


def _versions() -> list[str]:
    """Return the versions of the libraries that compute."""
    return [f"{name} {version_of(name)}" for name in ("transformers", "accelerate", "numpy", __name__)]


def _device(device: torch.device) -> list[str]:
    """Return the kind of device, since other hardware adds in another order; and the threads of a CPU."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{torch.get_num_threads()} threads"
    return [device.type, name]
