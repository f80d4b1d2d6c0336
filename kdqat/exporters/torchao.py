"""torchao's IntxUnpackedToInt8Tensor in safetensors: every code one int8, with its scales and zero points (ExecuTorch).

torchao saves tensor subclasses with torch.save, which is a pickle, and nobody should unpickle a file of others. Its own
flattening (`torchao.prototype.safetensors`) says the same in plain tensors and metadata: that is what is written here.
Arithmetic is float32, which holds every stored scale, so that torchao dequantizes to the student's bits.
"""

from __future__ import annotations

import importlib.util
import logging
from pathlib import Path
from typing import Any, ClassVar

import torch
from safetensors.torch import save_file

from kdqat.exporters.base import Exporter
from kdqat.exporters.dequantized import activations_of
from kdqat.exporters.hf_files import save_hf_files
from kdqat.quant import FakeQuantLinear
from kdqat.spec import QuantSpec
from kdqat.student import Student, plain_state

log = logging.getLogger(__name__)


class TorchAO(Exporter):
    """Integer weights of linear layers for torchao, `intx` weight-only; codes of 2 to 8 bits, by group or channel."""

    name: ClassVar[str] = "torchao"
    reader: ClassVar[str] = "torchao_reader.py"

    def reader_missing(self) -> str | None:
        if importlib.util.find_spec("torchao") is None:
            return 'torchao; pip install "kdqat[torchao]"'
        return None

    def refuses(self, student: Student) -> str | None:
        for name, layer in student.layers.items():
            if layer.weight_fake_quantizer is None:
                continue
            if not isinstance(layer, FakeQuantLinear):
                return f"{name}: torchao has quantized tensors for linear layers; leave it out, or export DequantizedHF"
            if layer.adapter is not None and layer.adapter.placement == "outside":
                return f"{name}: its adapter is not part of its codes: place it inside, or export DequantizedHF"
            spec = layer.weight_fake_quantizer.spec
            if not _holds(spec):
                near = f"W{int(spec.bits)}A16" if spec.bits in (2, 3, 4, 8) else "W4A16"
                return (
                    f"{name}: torchao's intx holds integers with a scale and an integer zero point for each channel or "
                    f"group, and this is {spec.format}, {spec.granularity}, zero_point {spec.zero_point}; "
                    f"train under {near}, or export DequantizedHF"
                )
        return None

    @torch.no_grad()
    def export(self, student: Student, out_dir: Path) -> None:
        missing = self.reader_missing()
        if missing:
            raise ValueError(f"export {self.name} writes with {missing}")
        from torchao.prototype.safetensors.safetensors_support import flatten_tensor_state_dict

        lost = activations_of(student.plan)
        if lost:
            log.warning("export %s holds weights only: %s of the plan are for the engine to apply", self.name, lost)
        state: dict[str, torch.Tensor] = {}
        seen: set[int] = set()
        for key, value in plain_state(student).items():
            if value.data_ptr() in seen:
                continue  # tied: whoever loads ties again
            seen.add(value.data_ptr())
            layer = student.layers.get(key.removesuffix(".weight"))
            if layer is not None and layer.weight_fake_quantizer is not None:
                state[key] = intx_tensor(layer)
            else:
                state[key] = value.detach().cpu().clone()
        tensors, metadata = flatten_tensor_state_dict(state)
        save_file({key: value.contiguous() for key, value in tensors.items()}, out_dir / "model.safetensors", metadata)
        save_hf_files(student, out_dir)


def intx_tensor(layer: Any) -> Any:
    """The layer's weight as torchao has it: codes and zero points in -2^(b-1) ... 2^(b-1) - 1, scales fp32 [O, N]."""
    from torchao.quantization import IntxUnpackedToInt8Tensor

    quantizer, matrix = layer.weight_fake_quantizer, layer.latent_matrix()
    spec, stored = quantizer.spec, quantizer.stored_qparams(matrix)
    shift = 0 if spec.symmetric else 2 ** (int(spec.bits) - 1)
    scale = stored.scale.squeeze(2).cpu()
    return IntxUnpackedToInt8Tensor(
        qdata=(quantizer.codes(matrix) - shift).to(torch.int8).cpu(),
        scale=scale,
        zero_point=(stored.zero_point.squeeze(2).cpu() - shift).to(torch.int8),
        target_dtype=getattr(torch, f"int{int(spec.bits)}"),
        block_size=(1, matrix.shape[1] // scale.shape[1]),
        dtype=torch.float32,
        activation_quantization=None,
    )


def _holds(spec: QuantSpec) -> bool:
    integer = spec.number.kind == "integer" and spec.format.startswith("int")
    shared = spec.granularity in ("group", "channel") and spec.hadamard is None
    return integer and spec.zero_point in ("none", "integer") and shared
