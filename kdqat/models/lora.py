"""Adapter folders as peft reads them. The only file that imports peft.

`adapter_config.json` is a `LoraConfig`, `adapter_model.safetensors` holds the two matrices of every layer under peft's
names, so that `PeftModel.from_pretrained(model, folder)` takes what was trained here. peft is imported where it is
called: it takes seconds, and most runs have no adapter.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from kdqat.quant import FakeQuantConv1D, LoraAdapter, QuantizedLayer

WEIGHTS_FILE = "adapter_model.safetensors"
_PREFIX = "base_model.model."


def save_adapters(layers: Mapping[str, QuantizedLayer], folder: Path, *, base: str) -> None:
    """Write the adapters of `layers` (by full name; at least one has one) into the existing `folder`.

    Args:
        base: where the model comes from, for peft's `base_model_name_or_path`.
    """
    from peft import LoraConfig, TaskType

    adapters = {name: layer.adapter for name, layer in layers.items() if layer.adapter is not None}
    (rank, _), *_ = Counter(adapter.rank for adapter in adapters.values()).most_common()
    (alpha, _), *_ = Counter(adapter.alpha for adapter in adapters.values()).most_common()
    config = LoraConfig(
        task_type=TaskType.CAUSAL_LM,
        base_model_name_or_path=base,
        r=rank,
        lora_alpha=alpha,  # type: ignore[arg-type]  # said to be an int, used as a number
        lora_dropout=max(adapter.dropout for adapter in adapters.values()),
        target_modules=sorted(adapters),
        rank_pattern={name: a.rank for name, a in adapters.items() if a.rank != rank},
        alpha_pattern={name: a.alpha for name, a in adapters.items() if a.alpha != alpha},
        fan_in_fan_out=any(isinstance(layer, FakeQuantConv1D) for layer in layers.values()),
        inference_mode=True,
    )
    config.save_pretrained(str(folder))
    matrices = ("lora_A", "lora_B")
    state = {f"{_PREFIX}{n}.{m}.weight": getattr(a, m).detach().cpu() for n, a in adapters.items() for m in matrices}
    save_file({key: value.clone().contiguous() for key, value in state.items()}, folder / WEIGHTS_FILE)


def load_adapters(layers: Mapping[str, Any], folder: Path, settings: Mapping[str, Mapping[str, Any]]) -> None:
    """Give `layers` the adapters that `save_adapters` wrote into `folder`.

    Args:
        settings: arguments of `LoraAdapter` by layer; peft's config does not say where the fake quantizer is.

    Raises:
        ValueError: naming the folder, if it is incomplete or damaged or does not fit the layers; then nothing is
            attached.
    """
    found: dict[str, LoraAdapter] = {}
    try:
        state = load_file(folder / WEIGHTS_FILE)
        for name, arguments in settings.items():
            with torch.device(layers[name].weight.device):
                found[name] = LoraAdapter(layers[name].matrix_shape, **arguments)
            found[name].load_state_dict({m: state[f"{_PREFIX}{name}.{m}.weight"] for m in ("lora_A", "lora_B")})
    except (OSError, SafetensorError, KeyError, TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"{folder}: {WEIGHTS_FILE} is missing, damaged or of other layers ({error})") from error
    for name, adapter in found.items():
        layers[name].adapter = adapter
