"""What every exporter of a Hugging Face folder does: tensors, config with `quantization_config`, tokenizer, plan.

Also what such formats ask of a layer before its numbers count: that it is an nn.Linear whose product is one matmul.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from kdqat.exporters.hf_files import save_hf_model
from kdqat.quant import FakeQuantLinear, QuantizedLayer
from kdqat.spec import QuantSpec
from kdqat.student import Student, plain_state

# Sibling layers that serving engines run as one matmul, under the name they give it.
FUSED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}


def write_hf_folder(
    student: Student,
    out_dir: Path,
    quantized: Mapping[str, Mapping[str, Tensor]],
    *,
    dtype: torch.dtype,
    quantization_config: Mapping[str, Any],
    extra: Mapping[str, Tensor] | None = None,
) -> None:
    """Write the folder: each layer's tensors in the place of its weight, everything else in `dtype`.

    Args:
        quantized: layer -> its tensors by their last names, e.g. {"qweight": ...}.
        extra: further tensors by their full names, such as scales of a KV cache.
    """
    state: dict[str, Tensor] = {}
    converted: dict[Any, Tensor] = {}  # what is tied is converted and written once
    for key, value in plain_state(student).items():
        name = key.removesuffix(".weight")
        if name in quantized and key.endswith(".weight"):
            continue
        if value.is_floating_point():
            value = converted.setdefault((value.data_ptr(), value.shape), value.detach().to("cpu", dtype))
        state[key] = value
    for name, tensors in quantized.items():
        state |= {f"{name}.{last}": tensor.detach().cpu().contiguous() for last, tensor in tensors.items()}
    state |= extra or {}
    save_hf_model(student, out_dir, state, dtype=dtype, quantization_config=quantization_config)


def refuses_layer(name: str, layer: QuantizedLayer) -> str | None:
    """Why formats for linear layers cannot hold this one at all; None if they can."""
    if not isinstance(layer, FakeQuantLinear):
        kind = type(layer).__name__.removeprefix("FakeQuant")
        return f"{name}: this format holds nn.Linear and no {kind}; leave it out of the plan, or use DequantizedHF"
    if layer.weight_fake_quantizer is None:
        return f"{name}: its weight stays in full precision; leave the layer out of the plan, or use DequantizedHF"
    if layer.adapter is not None and layer.adapter.placement == "outside":
        return f"{name}: a LoRA adapter beside Q(W) is no part of this format; merge it, or use DequantizedHF"
    if layer.weight_fake_quantizer.spec.hadamard is not None:
        return f"{name}: engines do not rotate its activations (hadamard); use W4A16_G32, or DequantizedHF"
    return None


def codes_and_qparams(layer: QuantizedLayer) -> tuple[Tensor, Tensor, Tensor]:
    """What the layer trained with, on the CPU: codes [O, I] int64, scale and zero point [O, N] fp32."""
    quantizer, matrix = layer.weight_fake_quantizer, layer.latent_matrix()
    assert quantizer is not None
    stored = quantizer.stored_qparams(matrix)
    rows = matrix.shape[0]
    scale, zero_point = (x.detach().float().cpu().reshape(-1).reshape(rows, -1) for x in stored)
    return quantizer.codes(matrix).detach().cpu().long(), scale, zero_point


def counted_from_zero(layer: QuantizedLayer) -> tuple[QuantSpec, Tensor, Tensor, Tensor]:
    """The layer's spec, and its integers as formats without signs have them: codes [O, I] and zero points [O, N] int64
    from 0 up, a symmetric grid's zero in the middle; scales [O, N] fp32."""
    codes, scale, zero_point = codes_and_qparams(layer)
    assert layer.weight_fake_quantizer is not None
    spec = layer.weight_fake_quantizer.spec
    shift = 2 ** (int(spec.bits) - 1) if spec.symmetric else 0
    return spec, codes + shift, scale, zero_point.long() + shift


def linears_left(student: Student) -> Iterator[str]:
    """Names of the model's linear layers, and experts, that the plan leaves in full precision."""
    planned = set(student.layers)
    for name, module in student.model.named_modules():
        if isinstance(module, nn.Linear) and name not in planned:
            yield name
    for name in student.plan.ignored:
        owner, _, last = name.rpartition(".")
        if last == "down_proj" and owner.endswith("experts"):
            yield owner  # fused experts: engines know them by their module


def split_families(student: Student) -> list[str]:
    """Fused matmuls of serving engines whose parts the plan treats differently, in words; vLLM refuses these."""
    found = []
    owners = dict.fromkeys(name.rpartition(".")[0] for name in student.layers)
    modules = dict(student.model.named_modules())
    for owner in owners:
        for fused, parts in FUSED.items():
            names = [f"{owner}.{part}" for part in parts]
            if all(name in modules for name in names) and len({student.plan.get(name) for name in names}) > 1:
                found.append(f"{owner}.{fused} ({', '.join(parts)})")
    return found
