"""What the layers of a Hugging Face model are for. The only file that knows HF module names.

A family says where the blocks, the body and the head are, and which suffix inside a block has which role (q k v o
gate up down, and in a mixture of experts router). New architectures are one row here (docs/extending/model_family.md).
A model that is only the body of its family, such as a sentence encoder, is known by the same row (`Family.headless`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from kdqat.quant import matmul_weights
from kdqat.types import EMBEDDING, LayerRef

ROLES = ("q", "k", "v", "qkv", "o", "gate", "up", "gate_up", "down", "router", "pooler", "lm_head", EMBEDDING)


@dataclass(frozen=True)
class Fold:
    """A factor for each feature that can move from a producer into its consumers and change nothing in between.

    The producer's outputs are divided by it, the consumers' input columns multiplied. It must be all that reads the
    producer, and nothing but products and positively homogeneous functions (ReLU, attention over values) may lie
    between. Names are suffixes inside a block; layers that a block does not have are left out.
    """

    producer: str  # a norm, or a linear layer whose rows are divided
    consumers: tuple[str, ...]
    unit_offset: bool = False  # of a norm that multiplies by 1 + weight (Gemma)


@dataclass(frozen=True)
class Family:
    """Where things are in one architecture; all paths are relative to the causal (or masked) LM module."""

    blocks: str
    roles: Mapping[str, str]  # by suffix inside a block; by path for what is outside of the blocks
    body: str = "model"
    head: str | None = "lm_head"
    causal: bool = True
    packs: bool = True  # restarting position_ids separate packed documents (tests/models/test_split.py)
    folds: tuple[Fold, ...] = ()  # what AWQ may scale; empty: nothing is known

    def headless(self) -> Family:
        """The same family where the model is the body itself: paths begin there, and there is no head."""
        return replace(self, blocks=self.blocks.removeprefix(self.body + "."), body="", head=None)


_ATTENTION = {"self_attn.q_proj": "q", "self_attn.k_proj": "k", "self_attn.v_proj": "v", "self_attn.o_proj": "o"}
_GATED_MLP = {"mlp.gate_proj": "gate", "mlp.up_proj": "up", "mlp.down_proj": "down"}
_QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
_GATE_UP = ("mlp.gate_proj", "mlp.up_proj")
_INSIDE = (Fold("self_attn.v_proj", ("self_attn.o_proj",)), Fold("mlp.up_proj", ("mlp.down_proj",)))


def _pre_norm(mlp_norm: str = "post_attention_layernorm", *, unit_offset: bool = False) -> tuple[Fold, ...]:
    """Of a block with a norm before attention and one, called `mlp_norm`, before the gated MLP."""
    norms = Fold("input_layernorm", _QKV, unit_offset), Fold(mlp_norm, _GATE_UP, unit_offset)
    return norms + _INSIDE


_LLAMA = Family("model.layers", {**_ATTENTION, **_GATED_MLP}, folds=_pre_norm())
_GEMMA = replace(_LLAMA, folds=_pre_norm(unit_offset=True))
_GEMMA2 = replace(_LLAMA, folds=_pre_norm("pre_feedforward_layernorm", unit_offset=True))
# The experts own their weights (`kdqat.quant.experts`); the dense MLP is for blocks that a config leaves dense.
_EXPERTS = {"mlp.experts.gate_up_proj": "gate_up", "mlp.experts.down_proj": "down", "mlp.gate": "router"}
_SHARED_EXPERT = {
    "mlp.shared_expert.gate_proj": "gate",
    "mlp.shared_expert.up_proj": "up",
    "mlp.shared_expert.down_proj": "down",
    "mlp.shared_expert_gate": "router",
}
_MOE = Family(
    "model.layers",
    {**_ATTENTION, **_GATED_MLP, **_EXPERTS, **_SHARED_EXPERT},
    # the norm before experts is read by their router too: only a dense MLP has one of its own
    folds=(*_pre_norm(), Fold("mlp.shared_expert.up_proj", ("mlp.shared_expert.down_proj",))),
)

FAMILIES: dict[str, Family] = {
    **dict.fromkeys(("llama", "mistral", "qwen2", "qwen3", "granite"), _LLAMA),
    "gemma": _GEMMA,
    **dict.fromkeys(("gemma2", "gemma3_text"), _GEMMA2),
    "cohere": replace(_LLAMA, folds=(Fold("input_layernorm", (*_QKV, *_GATE_UP)), *_INSIDE)),  # parallel branches
    **dict.fromkeys(("mixtral", "qwen2_moe", "qwen3_moe"), _MOE),
    "phi": Family(
        "model.layers",
        {**_ATTENTION, "self_attn.dense": "o", "mlp.fc1": "up", "mlp.fc2": "down"},
        folds=(
            Fold("input_layernorm", (*_QKV, "mlp.fc1")),  # parallel branches; a GELU before fc2
            Fold("self_attn.v_proj", ("self_attn.dense",)),
        ),
    ),
    "phi3": Family(
        "model.layers",
        {"self_attn.qkv_proj": "qkv", "self_attn.o_proj": "o", "mlp.gate_up_proj": "gate_up", "mlp.down_proj": "down"},
        folds=(
            Fold("input_layernorm", ("self_attn.qkv_proj",)),
            Fold("post_attention_layernorm", ("mlp.gate_up_proj",)),
        ),
    ),
    "gpt2": Family(
        "transformer.h",
        {"attn.c_attn": "qkv", "attn.c_proj": "o", "mlp.c_fc": "up", "mlp.c_proj": "down"},
        body="transformer",
        folds=(Fold("ln_1", ("attn.c_attn",)), Fold("ln_2", ("mlp.c_fc",))),
    ),
    "opt": Family(
        "model.decoder.layers",
        {**_ATTENTION, "self_attn.out_proj": "o", "fc1": "up", "fc2": "down"},
        packs=False,
        folds=(
            Fold("self_attn_layer_norm", _QKV),
            Fold("self_attn.v_proj", ("self_attn.out_proj",)),
            Fold("final_layer_norm", ("fc1",)),
            Fold("fc1", ("fc2",)),  # a ReLU between them
        ),
    ),
    "bert": Family(
        "bert.encoder.layer",
        {
            "attention.self.query": "q",
            "attention.self.key": "k",
            "attention.self.value": "v",
            "attention.output.dense": "o",
            "intermediate.dense": "up",
            "output.dense": "down",
            "pooler.dense": "pooler",  # reads the first token; mean pooling never uses it
        },
        body="bert",
        head="cls",
        causal=False,
        packs=False,
    ),
}


def family_of(model: nn.Module) -> Family:
    """The family of a Hugging Face model, headless if the model is the body alone (BertModel, not BertForMaskedLM).

    Raises:
        ValueError: for an architecture this version does not know; the message lists the known ones.
    """
    model_type = getattr(getattr(model, "config", None), "model_type", None)
    if model_type not in FAMILIES:
        raise ValueError(
            f"model type {model_type!r} is not known: kdqat knows {', '.join(sorted(FAMILIES))}; "
            "a new one is a row in kdqat/models/roles.py (docs/extending/model_family.md)"
        )
    family = FAMILIES[model_type]
    return family if _has(model, family.body) else family.headless()


def layer_refs(model: nn.Module) -> list[LayerRef]:
    """Every module of `model` that owns a matmul weight, in module order; works on swapped models too.

    Not only what can be fake-quantized: an unknown kind of layer must be seen to be ignored.
    """
    family = family_of(model)
    refs = []
    for owner, module in model.named_modules():
        for name, shape in matmul_weights(owner, module).items():
            block, role = _place(name, family)
            refs.append(LayerRef(name=name, block=block, role=role, shape=shape))
    return refs


def embedding_refs(model: nn.Module) -> list[LayerRef]:
    """The input embedding as a layer that a plan can name: role "embedding", shape [V, H].

    Apart from `layer_refs`: an embedding is a lookup and not a matmul, so nobody misses it in a plan.
    """
    family_of(model)
    embedding = model.get_input_embeddings()  # type: ignore[operator]
    name = next(name for name, module in model.named_modules() if module is embedding)
    return [LayerRef(name=name, block=None, role=EMBEDDING, shape=tuple(embedding.weight.shape))]


def plannable_refs(model: nn.Module) -> list[LayerRef]:
    """Every layer that a plan can name: what has a matmul, then the input embedding."""
    return [*layer_refs(model), *embedding_refs(model)]


def blocks_of(model: nn.Module) -> list[nn.Module]:
    """The transformer blocks, in order."""
    return list(model.get_submodule(family_of(model).blocks).children())


def block_prefix(model: nn.Module) -> str:
    """The name in front of a block's index, e.g. "model.layers."."""
    return family_of(model).blocks + "."


def _has(model: nn.Module, path: str) -> bool:
    try:
        model.get_submodule(path)
    except AttributeError:
        return False
    return True


def _place(name: str, family: Family) -> tuple[int | None, str]:
    if family.head is not None and f"{name}.".startswith(f"{family.head}."):
        return None, "lm_head"
    if not name.startswith(family.blocks + "."):
        return None, family.roles.get(name, name.rpartition(".")[2])
    index, _, suffix = name.removeprefix(family.blocks + ".").partition(".")
    return int(index), family.roles.get(suffix, suffix.rpartition(".")[2])


def logit_transform(config: Any) -> tuple[float, float | None]:
    """(scale, soft-cap) that a family applies to the head's output: logits = cap * tanh(scale * x / cap).

    Gemma 2 caps, Cohere multiplies by logit_scale, Granite divides by logits_scaling.
    """
    scale = getattr(config, "logit_scale", None)
    if scale is None:
        scaling = getattr(config, "logits_scaling", None)
        scale = 1.0 / scaling if scaling else 1.0
    return float(scale), getattr(config, "final_logit_softcapping", None)
