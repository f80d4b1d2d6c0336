"""What the layers of a Hugging Face model are for. The only file that knows HF module names.

A family says where the blocks, the body and the head are, and which suffix inside a block has which role (q k v o
gate up down). New architectures are one row here (docs/extending/model_family.md).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from kdqat.quant.coverage import matmul_shape
from kdqat.types import LayerRef

ROLES = ("q", "k", "v", "qkv", "o", "gate", "up", "gate_up", "down", "lm_head")


@dataclass(frozen=True)
class Family:
    """Where things are in one architecture; all paths are relative to the causal (or masked) LM module."""

    blocks: str
    roles: Mapping[str, str]
    body: str = "model"
    head: str = "lm_head"
    causal: bool = True
    packs: bool = True  # restarting position_ids separate packed documents (tests/models/test_split.py)


_ATTENTION = {"self_attn.q_proj": "q", "self_attn.k_proj": "k", "self_attn.v_proj": "v", "self_attn.o_proj": "o"}
_GATED_MLP = {"mlp.gate_proj": "gate", "mlp.up_proj": "up", "mlp.down_proj": "down"}
_LLAMA = Family("model.layers", {**_ATTENTION, **_GATED_MLP})

FAMILIES: dict[str, Family] = {
    **dict.fromkeys(
        ("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "cohere", "granite"), _LLAMA
    ),
    "phi": Family(
        "model.layers",
        {**_ATTENTION, "self_attn.dense": "o", "mlp.fc1": "up", "mlp.fc2": "down"},
    ),
    "phi3": Family(
        "model.layers",
        {"self_attn.qkv_proj": "qkv", "self_attn.o_proj": "o", "mlp.gate_up_proj": "gate_up", "mlp.down_proj": "down"},
    ),
    "gpt2": Family(
        "transformer.h",
        {"attn.c_attn": "qkv", "attn.c_proj": "o", "mlp.c_fc": "up", "mlp.c_proj": "down"},
        body="transformer",
    ),
    "opt": Family(
        "model.decoder.layers",
        {**_ATTENTION, "self_attn.out_proj": "o", "fc1": "up", "fc2": "down"},
        packs=False,
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
        },
        body="bert",
        head="cls",
        causal=False,
        packs=False,
    ),
}


def family_of(model: nn.Module) -> Family:
    """The family of a Hugging Face model.

    Raises:
        ValueError: for an architecture this version does not know; the message lists the known ones.
    """
    model_type = getattr(getattr(model, "config", None), "model_type", None)
    if model_type not in FAMILIES:
        raise ValueError(
            f"model type {model_type!r} is not known: kdqat knows {', '.join(sorted(FAMILIES))}; "
            "a new one is a row in kdqat/models/roles.py (docs/extending/model_family.md)"
        )
    return FAMILIES[model_type]


def layer_refs(model: nn.Module) -> list[LayerRef]:
    """Every module of `model` that owns a matmul weight, in module order; works on swapped models too.

    Not only nn.Linear: what cannot be fake-quantized (GPT-2's Conv1D, fused experts) must be seen to be ignored.
    """
    family = family_of(model)
    refs = []
    for name, module in model.named_modules():
        shape = matmul_shape(module)
        if shape is not None:
            block, role = _place(name, family)
            refs.append(LayerRef(name=name, block=block, role=role, shape=shape))
    return refs


def blocks_of(model: nn.Module) -> list[nn.Module]:
    """The transformer blocks, in order."""
    return list(model.get_submodule(family_of(model).blocks).children())


def block_prefix(model: nn.Module) -> str:
    """The name in front of a block's index, e.g. "model.layers."."""
    return family_of(model).blocks + "."


def _place(name: str, family: Family) -> tuple[int | None, str]:
    if name == family.head or name.startswith(family.head + "."):
        return None, "lm_head"
    if not name.startswith(family.blocks + "."):
        return None, name.rpartition(".")[2]
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
