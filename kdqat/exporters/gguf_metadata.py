"""What llama.cpp must know of a model besides its tensors: GGUF's keys, as convert_hf_to_gguf.py writes them."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from kdqat.models.gguf_file import FAMILIES

FILE_TYPES = {
    "q4_0": "MOSTLY_Q4_0",
    "q4_1": "MOSTLY_Q4_1",
    "q8_0": "MOSTLY_Q8_0",
    "q4_k": "MOSTLY_Q4_K_S",
    "mxfp4": "MOSTLY_MXFP4_MOE",
}
_QUANTIZATION_VERSION = 2


def refuses_config(config: Any) -> str | None:
    """Why GGUF cannot say what this architecture computes, or None."""
    otherwise = "export DequantizedHF and convert that with llama.cpp's own convert_hf_to_gguf.py"
    if config.model_type not in FAMILIES:
        known = ", ".join(FAMILIES)
        return f"model type {config.model_type} is not written as GGUF here, only {known}: {otherwise}"
    rope = rope_of(config)["rope_type"]
    if rope not in ("default", "llama3"):
        return f"rope type {rope} is not written as GGUF here, only default and llama3: {otherwise}"
    window = getattr(config, "sliding_window", None)
    if window is not None and window < config.max_position_embeddings:
        return f"sliding_window {window} is nothing llama.cpp does for {config.model_type}: {otherwise}"
    if config.hidden_act != "silu":
        return (
            f"hidden_act {config.hidden_act} is nothing llama.cpp does for {config.model_type}, only silu: {otherwise}"
        )
    return None


def add_metadata(writer: Any, config: Any, *, name: str, file_type: str) -> None:
    """Architecture, sizes, rope and file type into a `gguf.GGUFWriter`."""
    from gguf import LlamaFileType

    heads, head_dim = config.num_attention_heads, head_dim_of(config)
    writer.add_type("model")
    writer.add_name(name)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_rope_dimension_count(head_dim)
    writer.add_rope_freq_base(float(rope_of(config)["rope_theta"]))
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_file_type(LlamaFileType[FILE_TYPES.get(file_type, "MOSTLY_F16")])
    writer.add_quantization_version(_QUANTIZATION_VERSION)


def head_dim_of(config: Any) -> int:
    """Features of one attention head."""
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def rope_of(config: Any) -> dict[str, Any]:
    """Rope parameters, rope_type and rope_theta among them."""
    rope = dict(config.rope_parameters)
    return {"rope_type": "default", **rope}


def rope_factors(config: Any) -> Tensor | None:
    """llama3's divisors of the frequencies [head_dim / 2], fp32, which GGUF holds as the tensor rope_freqs.weight."""
    rope = rope_of(config)
    if rope["rope_type"] != "llama3":
        return None
    head_dim = head_dim_of(config)
    wavelength = 2 * math.pi * rope["rope_theta"] ** (torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    turns = rope["original_max_position_embeddings"] / wavelength
    smooth = ((turns - low) / (high - low)).clamp(0, 1)  # 1: as it is, 0: divided by the factor
    return (1 / ((1 - smooth) / rope["factor"] + smooth)).float()
