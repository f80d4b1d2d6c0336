"""What a format stores of quantized inputs against the student's: bits, static ranges, NVFP4's global scales.

How a live range is taken is the engine's affair and in no file; the rest is compared bit for bit like weights' scales.
"""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from kdqat.exporters.parity_layers import LayerFindings
from kdqat.quant.swap import QuantizedLayer
from kdqat.student import Student

INPUT_KINDS = ("input_bits", "input_scales", "input_zero_points", "input_global_scales")


@torch.no_grad()
def compare_inputs(student: Student, answer: Path, findings: LayerFindings) -> None:
    """Compare every KIND/NAME tensor of `answer`, KIND one of `INPUT_KINDS`, and add to `findings`.

    Args:
        student: on the CPU.
        answer: safetensors file; a kind that the student has and nobody answered is a fault, and the other way round.
    """
    with safe_open(answer, framework="pt") as tensors:
        read = {key for key in tensors.keys() if key.partition("/")[0] in INPUT_KINDS}  # noqa: SIM118 - no mapping
        for name, layer in student.layers.items():
            for kind, ours in inputs_of(layer).items():
                key = f"{kind}/{name}"
                if key in read:
                    read.remove(key)
                    findings.compare(kind, name, tensors.get_tensor(key), ours)
                else:
                    findings.faults.append(f"{name}: the reader answered without {kind.replace('_', ' ')}")
        for kind, _, name in (key.partition("/") for key in sorted(read)):
            findings.faults.append(f"{name}: {kind.replace('_', ' ')} read, which the student has not")


def inputs_of(layer: QuantizedLayer) -> dict[str, Tensor]:
    """KIND -> what a file holds of the layer's inputs; {} where they are not quantized."""
    quantizer = layer.activation_fake_quantizer
    if quantizer is None:
        return {}
    spec, tensor = quantizer.spec, quantizer.scale.new_zeros(quantizer.shape)
    held = {"input_bits": torch.tensor([int(spec.bits)])}
    if spec.scale_dtype == "e4m3_global":
        return held | {"input_global_scales": quantizer.second_level(tensor)["global_scale"]}
    if spec.dynamic:
        return held
    stored = quantizer.stored_qparams(tensor)
    return held | {"input_scales": stored.scale} | ({} if spec.symmetric else {"input_zero_points": stored.zero_point})
