"""The codes and scales a GGUF file stores of each layer, under Hugging Face names: where an imported student starts.

transformers reads a GGUF file too, and dequantizes it: its values are the same, but what was a code and what a scale is
forgotten. llama.cpp gives output and embedding other block types than the rest, Q6_K in its own Q4_0 files: where no
codes are kept of such a type, these two stay in full precision, with the values that the file gives.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from kdqat.models.gguf_file import FAMILIES, num_rope_heads, tensor_names, to_halves
from kdqat.quant.layouts.gguf import LAYOUTS, unpack_gguf
from kdqat.quant.layouts.packing import Blocks

log = logging.getLogger(__name__)

IMPORTED = ("q4_0", "q4_1", "q8_0")
_OUTER = ("model.embed_tokens", "lm_head")
_PLAIN = ("F32", "F16", "BF16", "F64")


class StoredLayer(NamedTuple):
    """One quantized tensor: the preset that its block type is, and its blocks, rows in Hugging Face's order."""

    preset: str
    blocks: Blocks


def stored_kinds(path: Path, config: Any) -> dict[str, str]:
    """Module name -> block type of the file's quantized tensors; of a tied model the lm_head has the embedding's.

    Raises:
        ValueError: naming the tensor, if the architecture or a block type is none that can be imported. Of embedding
            and output another type is no error: they are left out, and a warning says so.
    """
    found, left = _quantized(path, config)
    for module, kind in left.items():
        log.warning(
            "%s: %s is %s there, of which no codes are kept: it starts from its dequantized weights and stays in full "
            "precision",
            path,
            module,
            kind,
        )
    return {module: kind for module, (kind, _) in found.items()}


def stored_layers(path: Path, config: Any) -> dict[str, StoredLayer]:
    """Module name -> what the file stores of it; names and errors as `stored_kinds`."""
    found: dict[str, StoredLayer] = {}
    for module, (kind, tensor) in _quantized(path, config)[0].items():
        rows = torch.from_numpy(np.array(tensor.data))
        heads = num_rope_heads(module, config)
        blocks = unpack_gguf(kind, rows if heads is None else to_halves(rows, heads))
        found[module] = StoredLayer(LAYOUTS[kind].preset, blocks)
    return found


def _quantized(path: Path, config: Any) -> tuple[dict[str, tuple[str, Any]], dict[str, str]]:
    """(module -> block type and tensor, module -> block type of what is left in full precision)."""
    from gguf import GGUFReader

    if config.model_type not in FAMILIES:
        raise ValueError(
            f"{path}: codes of model type {config.model_type} are not read here, only of {', '.join(FAMILIES)}; as a "
            "model source the file gives its dequantized weights"
        )
    modules = {tensor: module for module, tensor in tensor_names(config).items()}
    found: dict[str, tuple[str, Any]] = {}
    left: dict[str, str] = {}
    for tensor in GGUFReader(path).tensors:
        module, kind = modules.get(tensor.name.removesuffix(".weight")), tensor.tensor_type.name
        if kind in _PLAIN or module is None:
            continue
        if kind.lower() not in IMPORTED and module in _OUTER:
            left[module] = kind
            continue
        if kind.lower() not in IMPORTED:
            raise ValueError(
                f"{path}: {tensor.name} is {kind}; codes are kept of {', '.join(IMPORTED)}. As a model source the file "
                "gives its dequantized weights, to be planned anew"
            )
        found[module] = (kind.lower(), tensor)
    if config.tie_word_embeddings and "model.embed_tokens" in found:
        found["lm_head"] = found["model.embed_tokens"]
    return found, left
