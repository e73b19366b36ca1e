"""The teacher: loading, checks that it fits its student, and its forward pass."""

import inspect
import os
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_MULTIPLE_CHOICE_MAPPING_NAMES
from transformers.utils.generic import find_labels

from ..storage.configs import find_config
from ..storage.models import architecture_of, load_strictly, named_class
from ..surgery.structured.layer_shapes import LayerShapes
from ..surgery.structured.record import StructureRecord
from ..utils.wrappers import plain_model
from .losses import FIELDS, DistillWeights, Outputs


class Teacher:
    """A frozen model and its forward pass without labels.

    It is frozen in place, and switched to `eager` attention if attention maps have a weight.

    Attributes:
        arguments: names of the inputs that its forward takes, never labels.
        outputs: the forward arguments that ask for hidden states and attention maps.
    """

    def __init__(self, model: PreTrainedModel, weights: DistillWeights) -> None:
        self.model = model.eval().requires_grad_(False)
        self.arguments = argument_names(model) - set(find_labels(type(model)))
        needed = {"output_hidden_states": weights.hidden > 0, "output_attentions": weights.attention > 0}
        self.outputs = {name: True for name, asked in needed.items() if asked}
        self._own_attention = model.config._attn_implementation
        if weights.attention > 0:
            model.set_attn_implementation("eager")

    def __call__(self, inputs: Mapping[str, Any]) -> Outputs:
        """Return the outputs for a batch; entries that the forward does not take are left out."""
        taken = {name: value for name, value in inputs.items() if name in self.arguments}
        # Not inference_mode: the losses save the teacher's tensors for their backward.
        with torch.no_grad():
            return self.model(**taken, **self.outputs, return_dict=True)

    def release(self) -> None:
        """Give the model its own attention implementation back; it stays frozen."""
        if "output_attentions" in self.outputs:
            self.model.set_attn_implementation(self._own_attention)


def load_teacher(teacher: PreTrainedModel | str | os.PathLike, student: nn.Module) -> PreTrainedModel:
    """Return the teacher as a model: `teacher` itself, or the checkpoint it names, loaded in float32 on the CPU.

    The class is the transformers class that the checkpoint names first in `architectures`. No code from the checkpoint
    is run and only safetensors files are read.

    Args:
        teacher: a model (returned unchanged), or a folder or Hub repository with a fine-tuned model of the student's
            task.
        student: the model to teach; named in the messages.

    Raises:
        ValueError: `teacher` is neither, or the checkpoint names no transformers class, one of another model type, or
            lacks some of its weights, which would be random (usually the head of a model that was not fine-tuned).
        OSError: from transformers, if there is no checkpoint or it has no safetensors file.
    """
    teacher = plain_model(teacher)
    if isinstance(teacher, PreTrainedModel):
        return teacher
    if not isinstance(teacher, str | os.PathLike):
        raise ValueError(
            f"the teacher must be a transformers model or the name of one, got {type(teacher).__name__}: pass one of "
            f"the task of this {type(student).__name__}"
        )
    config = find_config(teacher)
    cls, name = named_class(config), architecture_of(config)
    if cls is None:
        raise ValueError(
            f"the teacher {str(teacher)!r} names the architecture {name!r}, which transformers does not have: load it "
            f"yourself and pass the model as teacher of this {type(student).__name__}"
        )
    if cls.config_class is not type(config):
        raise ValueError(
            f"the teacher {str(teacher)!r} names the architecture {name!r} but its model_type is "
            f"{config.model_type!r}: mend its config.json, or load it yourself and pass the model"
        )
    remedy = "these weights of the teacher would be random: fine-tune it on the task first"
    return load_strictly(cls, teacher, remedy=remedy, config=config, dtype=torch.float32)


def argument_names(model: nn.Module) -> frozenset[str]:
    """Names of the forward arguments of a model, without its `*args` and `**kwargs`."""
    variadic = (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)
    parameters = inspect.signature(model.forward).parameters.values()
    return frozenset(parameter.name for parameter in parameters if parameter.kind not in variadic)


def problem_type(config: PreTrainedConfig) -> str | None:
    """The problem type in a config, else regression for a single label (as in `transformers`), else None."""
    return config.problem_type or ("regression" if config.num_labels == 1 else None)


def check_separate(teacher: nn.Module, student: nn.Module) -> None:
    """Refuse a teacher that shares parameters with the student."""
    own = {id(parameter) for parameter in student.parameters()}
    if any(id(parameter) in own for parameter in teacher.parameters()):
        raise ValueError(
            "the teacher shares its parameters with the student, and pruning one would prune the other: pass a copy, "
            "such as copy.deepcopy(model)"
        )


def check_fit(teacher: PreTrainedModel, student: PreTrainedModel, weights: DistillWeights) -> tuple[int, ...] | None:
    """Refuse a teacher that does not fit the student; return its layer for each layer of the student.

    None if no layers are compared.
    """
    logits, hidden, attention = weights.logits, weights.hidden, weights.attention
    check_separate(teacher, student)
    t, s = teacher.config, student.config
    if not s.return_dict and (logits > 0 or hidden > 0 or attention > 0):
        raise ValueError("the student returns tuples, in which nothing has a name: set config.return_dict=True")
    if logits > 0:
        _check_task(teacher, student)

    def differ(attribute: str, remedy: str) -> None:
        # A vision config has no vocab_size, on either side: equal.
        theirs, ours = getattr(t, attribute, None), getattr(s, attribute, None)
        if theirs != ours:
            raise ValueError(f"the teacher has {attribute}={theirs} and the student {attribute}={ours}: {remedy}")

    differ("vocab_size", "use a teacher with the student's tokenizer, so that the same token ids mean the same")
    if hidden > 0:
        differ("hidden_size", "set distill_hidden=0 or use a teacher of the student's width")
    if attention > 0:
        differ("num_attention_heads", "set distill_attention=0 or use a teacher with as many heads as the student")
        if LayerShapes.of(t) != LayerShapes.of(s):
            raise ValueError(
                "layers of the student have other heads than those of the teacher: set distill_attention=0"
            )
    if hidden == 0 and attention == 0:
        return None
    if type(student).__name__ in MODEL_FOR_MULTIPLE_CHOICE_MAPPING_NAMES.values():
        raise ValueError(
            f"the student is a {type(student).__name__}, which takes every choice as a row, so its layers do not fit "
            "the attention mask: set distill_hidden=0 and distill_attention=0, which leaves the logits"
        )
    theirs, ours = t.num_hidden_layers, s.num_hidden_layers
    shrunk = StructureRecord.find(s)
    if shrunk is not None and len(shrunk.shape.layers) == ours and theirs % len(shrunk.dense.layers) == 0:
        ratio = theirs // len(shrunk.dense.layers)
        return tuple(ratio * (layer + 1) - 1 for layer in shrunk.shape.layers)
    if theirs % ours:
        raise ValueError(
            f"the teacher has {theirs} layers, which is no multiple of the student's {ours}: set "
            "distill_hidden=0 and distill_attention=0, or use a teacher whose layers are a multiple"
        )
    ratio = theirs // ours
    return tuple(range(ratio - 1, theirs, ratio))


def _check_task(teacher: PreTrainedModel, student: PreTrainedModel) -> None:
    """Refuse a teacher whose logits are not about the student's classes."""
    for who, model in (("teacher", teacher), ("student", student)):
        if "labels" not in argument_names(model):
            raise ValueError(
                f"the {who} is a {type(model).__name__}, which has no logits over labels: set distill_logits=0 or use "
                "a classification or regression model"
            )
    t, s = teacher.config, student.config
    if t.num_labels != s.num_labels:
        raise ValueError(
            f"the teacher has {t.num_labels} labels and the student {s.num_labels}: use a teacher fine-tuned on the "
            "student's task"
        )
    theirs, ours = problem_type(t), problem_type(s)
    if theirs and ours and theirs != ours:
        raise ValueError(
            f"the teacher's problem type is {theirs!r} and the student's {ours!r}: use a teacher fine-tuned on the "
            "student's task"
        )
    # Checkpoints of one task disagree about the order of its classes (MNLI): the loss would teach the wrong ones.
    names = [[str(label).lower() for _, label in sorted((config.id2label or {}).items())] for config in (t, s)]
    if names[0] != names[1] and sorted(names[0]) == sorted(names[1]):
        raise ValueError(
            f"the teacher orders the labels {names[0]} and the student {names[1]}: give the student the teacher's "
            "id2label and number the dataset's labels accordingly"
        )


def logits_of(who: str, outputs: Any) -> Tensor:
    """Return the logits of a model, by the outputs of its forward pass.

    Raises:
        ValueError: there are none.
    """
    if not isinstance(outputs, Mapping) or outputs.get("logits") is None:
        found = ", ".join(outputs) if isinstance(outputs, Mapping) else f"a {type(outputs).__name__}"
        raise ValueError(
            f"the {who} returned no logits but {found}: set distill_logits=0, or override distilled to learn from "
            "something else"
        )
    return outputs["logits"]


def check_states(who: str, outputs: Outputs, config: PreTrainedConfig, asked: Mapping[str, bool]) -> None:
    """Refuse outputs without one hidden state or attention map a layer (hidden states: and one for the embeddings)."""
    if asked and not isinstance(outputs, Mapping):
        raise ValueError(
            f"the {who} returned a {type(outputs).__name__}, in which nothing is named: return a ModelOutput"
        )
    for key, field in FIELDS.items():
        number, expected = len(outputs.get(key) or ()), config.num_hidden_layers + (key == "hidden_states")
        if f"output_{key}" in asked and number != expected:
            raise ValueError(
                f"the {who} returned {number} {key} where its {config.num_hidden_layers} layers should give "
                f"{expected}: call the student with **self.distiller.student_kwargs, or set {field}=0 for this "
                "architecture"
            )
