"""compressed-tensors, the format of vLLM, SGLang and transformers: packed codes and scales in a Hugging Face folder.

Which spec goes into which of its formats is said in `compressed_tensors_schemes.py`. Layers of one scheme are one
config group; where there is only one, it is "Linear" with the rest ignored, else layers are targeted by name. Written
for compressed-tensors 0.20; the package itself is needed to read the folder, not to write it.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any, ClassVar, get_args

import torch
from torch import Tensor

from kdqat.exporters.base import Exporter
from kdqat.exporters.compressed_tensors_schemes import INT, MXFP4, NVFP4, PACK, Group, group_of
from kdqat.exporters.hf_folder import codes_and_qparams, linears_left, refuses_layer, split_families, write_hf_folder
from kdqat.exporters.use import loaded, served
from kdqat.models.source import Dtype
from kdqat.quant import FakeQuantizer, QuantizedLayer
from kdqat.quant.kv import kv_caches
from kdqat.quant.layouts import fp4, pack_quantized
from kdqat.spec import KVCacheScheme, LayerScheme, QuantPlan
from kdqat.student import Student

log = logging.getLogger(__name__)
_VERSION = "0.20.0"  # of compressed-tensors, whose layout this is
_SERVED_BITS = (4, 8)


class CompressedTensors(Exporter):
    """Packed integers (W4A16, W8A16 ..., symmetric or not), int8 with int8 activations, NVFP4 and MXFP4.

    Args:
        dtype: of what is not quantized, and the folder's own, in which engines hold scales and compute. It must be that
            of the scales, or float32, in which a reader's logits are the student's bit for bit.
    """

    name: ClassVar[str] = "compressed-tensors"
    words: ClassVar[dict[str, dict[str, Any]]] = {
        "compressed-tensors": {},
        "compressed-tensors:bfloat16": {"dtype": "bfloat16"},
        "compressed-tensors:float32": {"dtype": "float32"},
    }
    reader: ClassVar[str] = "compressed_tensors_reader.py"
    holds_kv_cache: ClassVar[bool] = True
    holds_inputs: ClassVar[bool] = True

    def __init__(self, *, dtype: Dtype = "float16") -> None:
        if dtype not in get_args(Dtype):
            raise ValueError(f"dtype {dtype!r} is unknown: use {', '.join(get_args(Dtype))}")
        self.dtype: Dtype = dtype

    @property
    def compute_dtype(self) -> str:
        return self.dtype

    def leaves(self, plan: QuantPlan) -> str:
        """Live ranges of symmetric integers and of MX; a plan whose activations the format cannot say is refused."""
        live = [s.activation for s in plan.values() if s.activation is not None and s.activation.dynamic]
        own = any((spec.number.kind == "integer" and spec.symmetric) or spec.scale_dtype == "e8m0" for spec in live)
        return "live ranges of activations" if own else ""

    def say_what_is_left(self, plan: QuantPlan) -> None:
        if left := self.leaves(plan):
            log.warning(
                "export %s: compressed-tensors takes %s by its own rule, so that activations round a little otherwise "
                "than in training (docs/serving.md)",
                self.name,
                left,
            )

    def reader_missing(self) -> str | None:
        if find_spec("compressed_tensors") is not None:
            return None
        return "compressed-tensors is not installed; `pip install compressed-tensors==0.20.0`"

    def refuses(self, student: Student) -> str | None:
        for name, layer in student.layers.items():
            if reason := refuses_layer(name, layer):
                return reason
            try:
                group = group_of(student.plan[name])
            except ValueError as error:
                return f"{name}: compressed-tensors cannot hold it: {error}"
            if group.format in (NVFP4, MXFP4) and layer.matrix_shape[1] % 2:
                return f"{name}: FP4 packs two inputs to a byte, and it has {layer.matrix_shape[1]}; use W4A16"
            spec = student.plan[name].weight
            stored = "" if spec is None else spec.scale_dtype
            if stored in get_args(Dtype) and self.dtype not in (stored, "float32"):
                return (
                    f"{name}: its scales are {stored}, and who loads a folder in {self.dtype} rounds them to that; use "
                    f"CompressedTensors with dtype {stored}, or scale_dtype: {self.dtype}"
                )
        return _refuses_kv_cache(student.plan.kv_cache)

    def serving(self, student: Student, folder: str) -> Mapping[str, str]:
        asymmetric = any(s.weight is not None and not s.weight.symmetric for s in student.plan.values())
        config = "CompressedTensorsConfig(dequantize=True)" if asymmetric else ""  # 5.23 packs no zero points
        return served(student, folder) | loaded(student, folder, package="compressed-tensors", config=config)

    @torch.no_grad()
    def export(self, student: Student, out_dir: Path) -> None:
        if reason := self.refuses(student):
            raise ValueError(reason)
        groups: dict[Group, list[str]] = {}
        quantized: dict[str, dict[str, Tensor]] = {}
        for name, layer in student.layers.items():
            group = group_of(student.plan[name])
            groups.setdefault(group, []).append(name)
            quantized[name] = _weight_tensors(layer, student.plan[name], group) | _input_tensors(layer, group)
        self.say_what_is_left(student.plan)
        _warn(student, groups)
        write_hf_folder(
            student,
            out_dir,
            quantized,
            dtype=getattr(torch, self.dtype),
            quantization_config=_config(student, groups),
            extra=_kv_tensors(student),
        )


def _weight_tensors(layer: QuantizedLayer, scheme: LayerScheme, group: Group) -> dict[str, Tensor]:
    codes, scale, zero_point = codes_and_qparams(layer)
    spec = scheme.weight
    assert spec is not None
    if group.format == INT:
        return {"weight": codes.to(torch.int8), "weight_scale": scale.to(getattr(torch, spec.scale_dtype))}
    if group.format == PACK:
        bits, dtype = int(spec.bits), getattr(torch, spec.scale_dtype)
        tensors = {
            "weight_packed": pack_quantized.pack_weight(codes, bits, symmetric=spec.symmetric),
            "weight_scale": scale.to(dtype),
            "weight_shape": torch.tensor(codes.shape),
        }
        if not spec.symmetric:
            tensors["weight_zero_point"] = pack_quantized.pack_zero_points(zero_point.long(), bits)
        return tensors
    packed = {"weight_packed": fp4.pack_fp4(codes)}
    if group.format == MXFP4:
        return packed | {"weight_scale": fp4.encode_e8m0(scale)}
    quantizer = layer.weight_fake_quantizer
    assert quantizer is not None
    global_scale = quantizer.second_level(layer.latent_matrix())["global_scale"].float().cpu()
    return packed | {"weight_scale": fp4.encode_e4m3(scale, global_scale), "weight_global_scale": global_scale}


def _input_tensors(layer: QuantizedLayer, group: Group) -> dict[str, Tensor]:
    """What is stored of quantized inputs: static ranges, and the global scale under NVFP4's live ones."""
    quantizer = layer.activation_fake_quantizer
    if quantizer is None or group.inputs is None:
        return {}
    inputs, tensor = dict(group.inputs), quantizer.scale.new_zeros(quantizer.shape)
    if group.format == NVFP4:
        return {"input_global_scale": quantizer.second_level(tensor)["global_scale"].float()}
    if inputs["dynamic"]:
        return {}
    scale, zero_point = quantizer.stored_qparams(tensor)
    tensors = {"input_scale": scale.float().reshape(1)}
    if not inputs["symmetric"]:
        shift = 2 ** (inputs["num_bits"] - 1)
        tensors["input_zero_point"] = (zero_point.reshape(1) - shift).to(torch.int8)
    return tensors


def _config(student: Student, groups: dict[Group, list[str]]) -> dict[str, Any]:
    formats = {group.format for group in groups}
    return {
        "quant_method": "compressed-tensors",
        "format": formats.pop() if len(formats) == 1 else "mixed-precision",
        "quantization_status": "compressed",
        "config_groups": {
            f"group_{i}": group.to_json(["Linear"] if len(groups) == 1 else names)
            for i, (group, names) in enumerate(groups.items())
        },
        "ignore": list(linears_left(student)),
        "kv_cache_scheme": _kv_config(student.plan.kv_cache),
        "global_compression_ratio": None,
        "version": _VERSION,
    }


def _refuses_kv_cache(scheme: KVCacheScheme | None) -> str | None:
    if scheme is None:
        return None
    spec = scheme.key
    if (
        spec is None
        or spec != scheme.value
        or (spec.format, spec.granularity, spec.dynamic) != ("e4m3", "tensor", False)
    ):
        return "kv_cache: engines cache e4m3 with one static scale; use kv_cache: KV_FP8, or leave it to the engine"
    return None


def _kv_config(scheme: KVCacheScheme | None) -> dict[str, Any] | None:
    if scheme is None:
        return None
    return {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "tensor", "dynamic": False}


def _kv_tensors(student: Student) -> dict[str, Tensor]:
    tensors = {}
    for owner, cache in kv_caches(student.model).items():
        for part, quantizer in cache.quantizers().items():
            tensors[f"{owner}.{part[0]}_scale"] = _one_scale(quantizer)
    return tensors


def _one_scale(quantizer: FakeQuantizer) -> Tensor:
    return quantizer.stored_qparams(quantizer.scale.new_zeros(quantizer.shape)).scale.detach().float().cpu().reshape(1)


def _warn(student: Student, groups: dict[Group, list[str]]) -> None:
    """Says what transformers reads and vLLM does not, or not losslessly."""
    if split := split_families(student):
        log.warning("vLLM runs %s as one matmul and refuses different schemes within it", "; ".join(split))
    for group, names in groups.items():
        bits = dict(group.weights)["num_bits"]
        if group.format == PACK and bits not in _SERVED_BITS:
            log.warning("%s: vLLM serves 4 and 8 bits of pack-quantized; %d bits are for transformers", names[0], bits)
        if group.format == NVFP4:
            log.warning(
                "%s: vLLM runs q, k and v (gate and up) under the largest of their global scales, which changes scales "
                "where these differ; transformers reads each as it is",
                names[0],
            )
