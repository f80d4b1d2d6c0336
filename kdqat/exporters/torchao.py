"""torchao's IntxUnpackedToInt8Tensor in safetensors: every code one int8, with its scales and zero points (ExecuTorch).

Where the plan has int8 activations with a live range and zero point for each token, the tensor says so and torchao
quantizes them: its Int8DynamicActivationIntxWeight, "8da4w" at 4 bits. It divides by a scale as a multiplication with
the inverse, so that an activation on the edge of two codes may fall to the other one.

torchao saves tensor subclasses with torch.save, which is a pickle, and nobody should unpickle a file of others. Its own
flattening (`torchao.prototype.safetensors`) says the same in plain tensors and metadata: that is what is written here.
Arithmetic is float32, which holds every stored scale, so that torchao dequantizes to the student's bits.
transformers loads the folder as it is, since `quantization_config` in config.json tells it to.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from safetensors.torch import save_file

from kdqat.exporters.base import Exporter, besides_weights
from kdqat.exporters.hf_files import save_hf_files
from kdqat.exporters.hf_folder import linears_left
from kdqat.exporters.use import loaded
from kdqat.quant import FakeQuantLinear
from kdqat.spec import LayerScheme, QuantPlan, QuantSpec
from kdqat.student import Student, plain_state


class TorchAO(Exporter):
    """Integer weights of linear layers for torchao, codes of 2 to 8 bits, by group or channel; weight-only, or with
    dynamic int8 activations (the presets TORCHAO_8DA4W_G32, _G64, _G128)."""

    name: ClassVar[str] = "torchao"
    reader: ClassVar[str] = "torchao_reader.py"

    def leaves(self, plan: QuantPlan) -> str:
        schemes = [replace(s, activation=None) if _dynamic_int8(s) else s for s in plan.values()]
        return besides_weights(schemes, plan.kv_cache is not None)

    def writer_missing(self) -> str | None:
        return self.reader_missing()

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
        self.require_writer()
        from torchao.prototype.safetensors.safetensors_support import flatten_tensor_state_dict

        self.say_what_is_left(student.plan)
        state: dict[str, torch.Tensor] = {}
        seen: set[int] = set()
        for key, value in plain_state(student).items():
            if value.data_ptr() in seen:
                continue  # tied: whoever loads ties again
            seen.add(value.data_ptr())
            layer = student.layers.get(key.removesuffix(".weight"))
            if layer is not None and layer.weight_fake_quantizer is not None:
                state[key] = intx_tensor(layer, _dynamic_int8(student.plan[key.removesuffix(".weight")]))
            else:
                value = value.float() if value.is_floating_point() else value  # one dtype for all products
                state[key] = value.detach().cpu().clone()
        tensors, metadata = flatten_tensor_state_dict(state)
        save_file({key: value.contiguous() for key, value in tensors.items()}, out_dir / "model.safetensors", metadata)
        save_hf_files(student, out_dir, dtype=torch.float32, quantization_config=_config(student))

    def serving(self, student: Student, folder: str) -> Mapping[str, str]:
        return loaded(student, folder, package="torchao")


def intx_tensor(layer: Any, dynamic_int8: bool) -> Any:
    """The layer's weight as torchao has it: codes and zero points in -2^(b-1) ... 2^(b-1) - 1, scales fp32 [O, N].

    Args:
        dynamic_int8: torchao is to quantize the layer's inputs.
    """
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
        activation_quantization="int8_asym_per_token" if dynamic_int8 else None,
    )


def _config(student: Student) -> dict[str, Any] | None:
    """What transformers asks of config.json to load torchao's tensors as such: without it, it would take the model for
    one of floats, find none of them, and compute with random weights. The numbers are those of the tensors."""
    from torchao.quantization import FqnToConfig
    from transformers import TorchAoConfig

    held = {name: layer for name, layer in student.layers.items() if layer.weight_fake_quantizer is not None}
    if not held:
        return None
    alike = {_settings(layer, student.plan[name]): name for name, layer in held.items()}
    settings = {name: _intx_config(*_settings(layer, student.plan[name])) for name, layer in held.items()}
    how = next(iter(settings.values())) if len(alike) == 1 else FqnToConfig(settings)
    left = [*linears_left(student), *(name for name in student.layers if name not in held)]
    return dict(TorchAoConfig(how, modules_to_not_convert=left).to_dict())


def _settings(layer: Any, scheme: LayerScheme) -> tuple[int, int | None, bool, bool]:
    spec = layer.weight_fake_quantizer.spec
    return int(spec.bits), spec.group_size, spec.symmetric, _dynamic_int8(scheme)


def _intx_config(bits: int, group_size: int | None, symmetric: bool, dynamic_int8: bool) -> Any:
    from torchao.quantization import (
        Int8DynamicActivationIntxWeightConfig,
        IntxWeightOnlyConfig,
        MappingType,
        PerAxis,
        PerGroup,
    )

    dtype, groups = getattr(torch, f"int{bits}"), PerGroup(group_size) if group_size else PerAxis(0)
    mapping = MappingType.SYMMETRIC if symmetric else MappingType.ASYMMETRIC
    if not dynamic_int8:
        return IntxWeightOnlyConfig(weight_dtype=dtype, granularity=groups, mapping_type=mapping)
    return Int8DynamicActivationIntxWeightConfig(
        weight_dtype=dtype, weight_granularity=groups, weight_mapping_type=mapping
    )


def _dynamic_int8(scheme: LayerScheme) -> bool:
    spec = scheme.activation
    return (
        spec is not None
        and (spec.format, spec.granularity, spec.zero_point) == ("int8", "token", "integer")
        and spec.dynamic
        and spec.hadamard is None
    )


def _holds(spec: QuantSpec) -> bool:
    integer = spec.number.kind == "integer" and spec.format.startswith("int")
    shared = spec.granularity in ("group", "channel") and spec.hadamard is None
    return integer and spec.zero_point in ("none", "integer") and shared
