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
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from kdqat.models.packed_config import kv_cache_of
from kdqat.models.packed_layers import INPUTS, StoredLayer, reader_for
from kdqat.spec import KVCacheScheme

log = logging.getLogger(__name__)

STORED = "stored_qparams"  # attribute of a layer
_CACHE = tuple(f".{part}_{kind}" for part in "qkv" for kind in ("scale", "zero_point"))


@dataclass(frozen=True)
class PackedCheckpoint:
    """What a folder holds.

    Attributes:
        layers: its quantized layers by name.
        rest: all other tensors by their full names.
        kv_cache: as a plan says it.
        dropped: names of the stored ranges of activations and KV cache: calibration sets them anew.
    """

    layers: Mapping[str, StoredLayer]
    rest: Mapping[str, Tensor]
    kv_cache: KVCacheScheme | None
    dropped: Sequence[str]


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
    kv_cache, has_cache = kv_cache_of(config), bool(config.get("kv_cache_scheme"))
    if has_cache and kv_cache is None:
        log.warning("%s: its kv_cache_scheme is none that kdqat knows; say kv_cache in the plan yourself", folder)
    dropped = [key for key in tensors if has_cache and key.endswith(_CACHE)]
    for key in dropped:
        del tensors[key]
    for name in [key.removesuffix(marker) for key in tensors if key.endswith(marker)]:
        own = {last: tensors.pop(f"{name}.{last}") for last in own_names if f"{name}.{last}" in tensors}
        try:
            layers[name] = read(name, own, config)
        except (ValueError, KeyError) as error:
            missing = f"its tensor {error} is missing" if isinstance(error, KeyError) else error
            raise ValueError(f"{folder}: layer {name}: {missing}") from error
        dropped += [f"{name}.{last}" for last in INPUTS if last in own]
    return PackedCheckpoint(layers, tensors, kv_cache, dropped)


def load_packed_model(folder: Path, model: nn.Module) -> nn.Module:
    """`model`, with the weights of `folder`, in eval mode; each quantized layer with its `stored_qparams`.

    Args:
        model: as the folder's `plain_config` makes it, with any weights.

    Raises:
        ValueError: as `read_packed`, or if tensors and model do not fit each other.
    """
    checkpoint = read_packed(folder)
    state = {f"{name}.weight": layer.weight for name, layer in checkpoint.layers.items()} | dict(checkpoint.rest)
    try:
        missing, unexpected = model.load_state_dict(state, strict=False)
    except RuntimeError as error:
        raise ValueError(f"{folder}: {' '.join(str(error).split())[:300]}") from error
    model.tie_weights()  # type: ignore[operator]
    tied = set(getattr(model, "all_tied_weights_keys", ()) or ())
    wrong = sorted(set(missing) - tied) or sorted(unexpected)
    if wrong:
        fault = "is missing" if set(missing) - tied else "belongs to nothing in the model"
        raise ValueError(f"{folder}: tensor {wrong[0]} {fault}; such layers cannot be the start of a student")
    for name, layer in checkpoint.layers.items():
        setattr(model.get_submodule(name), STORED, layer)
    if checkpoint.dropped:
        log.warning(
            "%s: %d stored ranges of activations or KV cache (%s ...) are not taken over: plan these with "
            "FromCheckpoint, and set them anew on text with model.calibration",
            folder,
            len(checkpoint.dropped),
            checkpoint.dropped[0],
        )
    return model.eval()


def plain_config(config: Any) -> Any:
    """A copy of `config` that says nothing of quantization: the weights are plain now."""
    config = copy.deepcopy(config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    return config
