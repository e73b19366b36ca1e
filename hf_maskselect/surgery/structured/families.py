"""Where each family has its layers, neurons and heads, and by which fields its configuration says how many."""

from dataclasses import dataclass, replace
from typing import Any

import transformers
from torch import nn
from transformers import PreTrainedModel

from ..permute_channels import COUPLINGS, Coupling

_MOST_ZEROS = 0.05  # share of zeros in a dense model's weights


@dataclass(frozen=True)
class Family:
    """The layers of a family of models; all names are those of modules inside a layer.

    attention, ffn: producer and consumer of the channels of heads and of the neurons. sums: the modules whose input is
    the sum of a sublayer's output and its residual, after attention and after the feed-forward part; an empty name is
    the output of the layer. gates: further producers of the neurons. queries: further producers of the heads; a layer
    may lack some of them. head_counts, channel_counts: attributes that hold the number of heads, and of their
    channels. plain_heads: the configuration can say fewer heads. biased: name of the module that takes position biases
    of all heads, where layers share one table of them. stack: the list of layers inside the base model. depth, width:
    fields of the configuration. by_layer: fields with one entry a layer. first_stays: the first layer is built in
    another way than the others. shared: layers run at several depths, so that neither they nor their heads can go.
    """

    attention: Coupling
    ffn: Coupling
    sums: tuple[str, str]
    gates: tuple[str, ...] = ()
    queries: tuple[str, ...] = ()
    head_counts: tuple[str, ...] = ()
    channel_counts: tuple[str, ...] = ()
    plain_heads: bool = False
    biased: str = ""
    stack: str = "encoder.layer"
    depth: str = "num_hidden_layers"
    width: str = "intermediate_size"
    by_layer: tuple[str, ...] = ()
    first_stays: bool = False
    shared: bool = False

    @property
    def neurons(self) -> tuple[str, ...]:
        """Names of the layers that produce the neurons."""
        return (self.ffn.producer, *self.gates)

    def heads(self, layer: nn.Module) -> list[str]:
        """Return the names of what produces the heads of a layer."""
        names = {name for name, _ in layer.named_modules()}
        return [name for name in (self.attention.producer, *self.queries) if name in names]

    def layers(self, model: PreTrainedModel) -> list[nn.Module]:
        """Return the layers of a model, in their order; of shared layers each once."""
        stack: Any = model.base_model.get_submodule(self.stack)
        return [layer for group in stack for layer in group.albert_layers] if self.shared else list(stack)

    def consumers(self, layer: nn.Module) -> tuple[nn.Linear, nn.Linear]:
        """Return the matrices that read the heads and the neurons."""
        attention: Any = layer.get_submodule(self.attention.consumer)
        ffn: Any = layer.get_submodule(self.ffn.consumer)
        return attention, ffn


_BERT = Family(
    *COUPLINGS["bert"],
    sums=("attention.output.LayerNorm", "output.LayerNorm"),
    queries=("attention.self.query", "attention.self.key"),
    head_counts=("attention.self.num_attention_heads",),
    channel_counts=("attention.self.all_head_size",),
)
FAMILIES = {
    **dict.fromkeys(("bert", "roberta", "xlm-roberta", "camembert", "electra"), _BERT),
    "albert": Family(
        *COUPLINGS["albert"],
        sums=("attention.LayerNorm", "full_layer_layer_norm"),
        stack="encoder.albert_layer_groups",
        shared=True,
    ),
    "deberta-v2": replace(
        _BERT,
        attention=COUPLINGS["deberta-v2"][0],
        queries=tuple(f"attention.self.{name}_proj" for name in ("query", "key", "pos_key", "pos_query")),
    ),
    "distilbert": Family(
        *COUPLINGS["distilbert"],
        sums=("sa_layer_norm", "output_layer_norm"),
        queries=("attention.q_lin", "attention.k_lin"),
        head_counts=("attention.n_heads",),
        stack="transformer.layer",
        depth="n_layers",
        width="hidden_dim",
    ),
    "modernbert": Family(
        *COUPLINGS["modernbert"],
        sums=("mlp_norm", ""),
        stack="layers",
        by_layer=("layer_types",),
        first_stays=True,
    ),
    "mpnet": Family(
        *COUPLINGS["mpnet"],
        sums=("attention.LayerNorm", "output.LayerNorm"),
        queries=("attention.attn.q", "attention.attn.k"),
        head_counts=("attention.attn.num_attention_heads",),
        channel_counts=("attention.attn.all_head_size",),
        biased="attention.attn",
    ),
    "nomic_bert": Family(
        Coupling("self_attn.v_proj", "self_attn.o_proj", heads=True),
        Coupling("mlp.up_proj", "mlp.down_proj"),
        sums=("post_attention_layernorm", "post_mlp_layernorm"),
        gates=("mlp.gate_proj",),
        queries=("self_attn.q_proj", "self_attn.k_proj"),
        plain_heads=True,
        stack="layers",
    ),
    "vit": Family(
        *COUPLINGS["vit"],
        sums=("layernorm_after", ""),
        queries=("attention.q_proj", "attention.k_proj"),
        head_counts=("attention.num_attention_heads",),
        plain_heads=True,
        stack="layers",
    ),
}


def family_of(model: nn.Module) -> Family:
    """Return the family of a model.

    Raises:
        ValueError: the family is not known, or the model is built in another way than its family.
    """
    if not isinstance(model, PreTrainedModel):
        raise ValueError(f"{type(model).__name__} is not a transformers model: pass one, such as a BERT")
    kind, config = model.config.model_type, model.config
    if kind not in FAMILIES:
        raise ValueError(
            f"the layers of a {kind!r} model are not known, so it cannot be made smaller: use one of "
            f"{', '.join(FAMILIES)}"
        )
    if getattr(config, "is_decoder", False) or getattr(config, "conv_kernel_size", 0):
        what = "a decoder" if getattr(config, "is_decoder", False) else "a convolution between its layers"
        raise ValueError(f"this {kind!r} model has {what}, so its layers cannot be removed: use a plain encoder")
    family = FAMILIES[kind]
    names = {name for name, _ in model.base_model.named_modules()}
    if family.stack not in names:
        raise ValueError(
            f"this {kind!r} model of transformers {transformers.__version__} has no {family.stack}: use a model class "
            "and a version of transformers that have it"
        )
    for coupling in (family.attention, family.ffn):
        for layer in family.layers(model):
            for name in (coupling.producer, coupling.consumer):
                if name not in dict(layer.named_modules()) or type(layer.get_submodule(name)) is not nn.Linear:
                    raise ValueError(
                        f"{name} of a layer is no plain linear layer, so its {kind!r} model cannot be made smaller: "
                        "merge adapters first, and use a model that is not quantized"
                    )
    return family


def checked_family(model: nn.Module) -> Family:
    """Return the family of a model that can be made smaller.

    Raises:
        ValueError: the family is not known, or the model has zeros of a mask, which the fit would fill.
    """
    family = family_of(model)
    assert isinstance(model, PreTrainedModel)
    weights = [consumer.weight for layer in family.layers(model) for consumer in family.consumers(layer)]
    zeros = sum(int((weight == 0).sum()) for weight in weights) / sum(weight.numel() for weight in weights)
    if zeros > _MOST_ZEROS:
        raise ValueError(
            f"{zeros:.0%} of the weights to fit are zero, and the fit would fill them: shrink the dense model, and "
            "prune the small one"
        )
    return family
