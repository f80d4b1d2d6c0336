"""GGUF files as kdqat meets them: where a source's file is, and which of its tensors is which layer.

llama.cpp's llama architecture rotates neighbouring features (rope type NORM), Hugging Face the two halves of a head, so
that its files have the rows of q and k in another order. A row's blocks run along its inputs: rows of bytes are
permuted like rows of numbers, codes and scales together.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from kdqat.models.package import find_model_in_package
from kdqat.models.source import ModelSource


@dataclass(frozen=True)
class GGUFFamily:
    """An architecture of Hugging Face as GGUF has it."""

    architecture: str
    permutes_qk: bool


# model_type -> how llama.cpp's convert_hf_to_gguf.py writes it
FAMILIES: dict[str, GGUFFamily] = {
    "llama": GGUFFamily("llama", permutes_qk=True),
    "mistral": GGUFFamily("llama", permutes_qk=True),
    "qwen2": GGUFFamily("qwen2", permutes_qk=False),
    "qwen3": GGUFFamily("qwen3", permutes_qk=False),
}


def gguf_path(source: ModelSource) -> Path | None:
    """The .gguf file a source loads from; None if it loads from something else, or the file is gone."""
    path = Path(source.path).expanduser()
    if source.path.startswith("package:"):
        try:
            path = find_model_in_package(source.path.removeprefix("package:"))
        except ValueError:
            return None
    return path if path.suffix == ".gguf" and path.is_file() else None


def tensor_names(config: Any) -> dict[str, str]:
    """Module name -> GGUF's name of its tensor, both without ".weight"; of every module this family can have.

    `config.model_type` must be one of FAMILIES.
    """
    from gguf import MODEL_ARCH_NAMES, get_tensor_name_map

    name = FAMILIES[config.model_type].architecture
    arch = next(arch for arch, its_name in MODEL_ARCH_NAMES.items() if its_name == name)
    found = get_tensor_name_map(arch, config.num_hidden_layers)
    parts = ("input_layernorm", "post_attention_layernorm", *(f"mlp.{part}_proj" for part in ("gate", "up", "down")))
    parts += tuple(f"self_attn.{part}" for part in ("q_proj", "k_proj", "v_proj", "o_proj", "q_norm", "k_norm"))
    blocks = [f"model.layers.{i}.{part}" for i in range(config.num_hidden_layers) for part in parts]
    names = {module: found.get_name(module) for module in ("model.embed_tokens", "model.norm", "lm_head", *blocks)}
    return {module: tensor for module, tensor in names.items() if tensor is not None}


def num_rope_heads(module: str, config: Any) -> int | None:
    """How many heads' rows of `module` GGUF has in its own order; None if it has them as they are."""
    if not FAMILIES[config.model_type].permutes_qk:
        return None
    if module.endswith(".q_proj"):
        return int(config.num_attention_heads)
    return int(config.num_key_value_heads) if module.endswith(".k_proj") else None


def to_neighbours(rows: Tensor, num_heads: int) -> Tensor:
    """Rows [O, ..] of q or k in Hugging Face's order as GGUF has them."""
    return rows.unflatten(0, (num_heads, 2, -1)).transpose(1, 2).flatten(0, 2)


def to_halves(rows: Tensor, num_heads: int) -> Tensor:
    """The inverse of `to_neighbours`."""
    return rows.unflatten(0, (num_heads, -1, 2)).transpose(1, 2).flatten(0, 2)
