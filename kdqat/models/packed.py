"""Checkpoints that are quantized already - compressed-tensors, GPTQ, AWQ - read as the start of a student.

A folder becomes a plain model whose weights are scale * (code - zero point) in fp32; each quantized layer keeps what it
was stored with (`StoredLayer`, under the attribute `stored_qparams`), from which `FromCheckpoint` makes the plan and
`StoredScales` the first scales. Rounding such a weight by its own scale gives its code back, so that a student that was
not trained exports the codes it came with. Only safetensors are read; nothing is unpickled, and no library of these
formats is needed.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from kdqat.models.packed_layers import StoredLayer, reader_for

STORED = "stored_qparams"  # attribute of a layer


@dataclass(frozen=True)
class PackedCheckpoint:
    """What a folder holds: its quantized layers by name, and all other tensors by their full names."""

    layers: Mapping[str, StoredLayer]
    rest: Mapping[str, Tensor]


def quantization_of(folder: Path) -> dict[str, Any] | None:
    """The `quantization_config` of a folder in one of these formats (also from quantize_config.json); else None."""
    for file, key in (("config.json", "quantization_config"), ("quantize_config.json", None)):
        if (folder / file).is_file():
            data = json.loads((folder / file).read_text(encoding="utf-8"))
            config = data.get(key) if key else {"quant_method": "gptq", **data}
            if isinstance(config, dict) and config.get("quant_method") in ("compressed-tensors", "gptq", "awq"):
                return config
    return None


def read_packed(folder: Path) -> PackedCheckpoint:
    """Read the folder's safetensors.

    Raises:
        ValueError: naming folder and layer, for what no student can start from, or files that are damaged or missing.
    """
    config = quantization_of(folder)
    if config is None:
        raise ValueError(f"{folder}: its config names no quantization by compressed-tensors, gptq or awq")
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise ValueError(f"{folder}: it has no safetensors weights, and kdqat does not unpickle foreign files")
    tensors: dict[str, Tensor] = {}
    try:
        for file in files:
            tensors |= load_file(file)
    except SafetensorError as error:
        raise ValueError(f"{folder}: {file.name} is damaged ({error}); fetch or write it again") from error
    marker, own_names, read = reader_for(config)
    layers: dict[str, StoredLayer] = {}
    for name in [key.removesuffix(marker) for key in tensors if key.endswith(marker)]:
        own = {last: tensors.pop(f"{name}.{last}") for last in own_names if f"{name}.{last}" in tensors}
        try:
            layers[name] = read(name, own, config)
        except (ValueError, KeyError) as error:
            missing = f"its tensor {error} is missing" if isinstance(error, KeyError) else error
            raise ValueError(f"{folder}: layer {name}: {missing}") from error
    return PackedCheckpoint(layers, tensors)


def load_packed_model(
    folder: Path, config: Any, auto: Any, dtype: torch.dtype, *, trust_remote_code: bool
) -> nn.Module:
    """The plain model of `folder` on the CPU, each quantized layer with its `stored_qparams`.

    Args:
        config: of transformers, as it is in the folder; it is left alone.
        auto: the auto class that makes the model.

    Raises:
        ValueError: as `read_packed`, or if tensors and model do not fit each other.
    """
    checkpoint = read_packed(folder)
    model = auto.from_config(plain_config(config), dtype=dtype, trust_remote_code=trust_remote_code)
    state = {f"{name}.weight": layer.weight for name, layer in checkpoint.layers.items()} | dict(checkpoint.rest)
    try:
        missing, unexpected = model.load_state_dict(state, strict=False)
    except RuntimeError as error:
        raise ValueError(f"{folder}: {' '.join(str(error).split())[:300]}") from error
    model.tie_weights()
    tied = set(getattr(model, "all_tied_weights_keys", ()) or ())
    wrong = sorted(set(missing) - tied) or sorted(unexpected)
    if wrong:
        fault = "is missing" if set(missing) - tied else "belongs to nothing in the model"
        raise ValueError(f"{folder}: tensor {wrong[0]} {fault}; such layers cannot be the start of a student")
    for name, layer in checkpoint.layers.items():
        setattr(model.get_submodule(name), STORED, layer)
    return model.eval()


def plain_config(config: Any) -> Any:
    """A copy of `config` that says nothing of quantization: the weights are plain now."""
    config = copy.deepcopy(config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    return config
