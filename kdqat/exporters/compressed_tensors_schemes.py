"""A scheme in the words of compressed-tensors: which of its formats holds it, and the config group that says so.

pack-quantized        integers without quantized activations, 2 ... 8 bits, by channel or group (vLLM serves 4 and 8)
int-quantized         integers with int8 or int4 activations, one int8 a weight (W8A8, W4A8)
nvfp4-pack-quantized  e2m1, groups of 16 with e4m3 scales under a global one; activations the same, or none
mxfp4-pack-quantized  e2m1, groups of 32 with e8m0 scales; activations the same, or none

https://github.com/vllm-project/compressed-tensors, `quantization/quant_args.py`; names as in 0.20.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from kdqat.spec import LayerScheme, QuantSpec

PACK, INT, NVFP4, MXFP4 = "pack-quantized", "int-quantized", "nvfp4-pack-quantized", "mxfp4-pack-quantized"
_FP4 = {(16, "e4m3_global"): NVFP4, (32, "e8m0"): MXFP4}


@dataclass(frozen=True)
class Group:
    """One config group: its format, and arguments of weights and inputs as compressed-tensors writes them."""

    format: str
    weights: tuple[tuple[str, Any], ...]
    inputs: tuple[tuple[str, Any], ...] | None

    def to_json(self, targets: list[str]) -> dict[str, Any]:
        return {
            "targets": targets,
            "weights": dict(self.weights),
            "input_activations": None if self.inputs is None else dict(self.inputs),
            "output_activations": None,
            "format": self.format,
        }


def group_of(scheme: LayerScheme) -> Group:
    """The config group for `scheme`.

    Raises:
        ValueError: saying what does not fit and the nearest scheme that does.
    """
    weight, inputs = scheme.weight, scheme.activation
    assert weight is not None
    if scheme.output is not None:
        raise ValueError("outputs are not quantized by the engines; use kv_cache: KV_FP8 for a quantized KV cache")
    if weight.number.kind == "float":
        return _fp4(weight, inputs)
    arguments = _integer_weight(weight)
    if inputs is None:
        if weight.scale_dtype == "float32":
            raise ValueError("engines hold scales of packed weights in 16 bits; use scale_dtype: float16 (W4A16)")
        return Group(PACK, arguments, None)
    if weight.zero_point != "none":
        raise ValueError("with quantized activations weights are symmetric; use W8A8 or W4A8")
    return Group(INT, arguments, _integer_input(inputs))


def _integer_weight(spec: QuantSpec) -> tuple[tuple[str, Any], ...]:
    if not spec.format.startswith("int") or spec.bits < 2:
        raise ValueError(f"format {spec.format} has no place in it; use W4A16_G32, or an exporter for that format")
    if spec.zero_point not in ("none", "integer"):
        raise ValueError(f"zero_point {spec.zero_point!r} has no place in it; use W4A16_ASYM_G32 (integer zero points)")
    if spec.granularity == "tensor":
        raise ValueError("one scale for the whole tensor is not served; use granularity channel, as W4A16 does")
    if spec.scale_dtype not in ("float16", "bfloat16", "float32"):
        raise ValueError(f"scale_dtype {spec.scale_dtype} has no place in it; use float16")
    return _arguments(int(spec.bits), "int", spec.granularity, spec.group_size, spec.symmetric, dynamic=False)


def _integer_input(spec: QuantSpec) -> tuple[tuple[str, Any], ...]:
    fits = spec.format in ("int8", "int4") and spec.zero_point in ("none", "integer") and spec.hadamard is None
    if not fits or (spec.granularity, spec.dynamic) not in (("token", True), ("tensor", False)):
        raise ValueError("its activations fit no engine; use int8 by token and dynamic (W8A8, W4A8), or W8A8_STATIC")
    return _arguments(int(spec.bits), "int", spec.granularity, None, spec.symmetric, dynamic=spec.dynamic)


def _fp4(weight: QuantSpec, inputs: QuantSpec | None) -> Group:
    form = _FP4.get((weight.group_size or 0, weight.scale_dtype))
    if weight.format != "e2m1" or form is None:
        raise ValueError(f"{weight.format} with scales in {weight.scale_dtype} has no place in it; use NVFP4 or MXFP4")
    scale = "torch.float8_e4m3fn" if form == NVFP4 else "torch.uint8"
    strategy = "tensor_group" if form == NVFP4 else "group"
    arguments = _arguments(4, "float", strategy, weight.group_size, True, dynamic=False)
    arguments += (("scale_dtype", scale), ("zp_dtype", scale))
    if inputs is None:
        return Group(form, arguments, None)
    same = ("format", "group_size", "scale_dtype")
    if not inputs.dynamic or any(getattr(inputs, key) != getattr(weight, key) for key in same):
        raise ValueError("activations beside FP4 weights have the weights' own format; use NVFP4, MXFP4 or their _A16")
    dynamic = "local" if form == NVFP4 else True
    own = _arguments(4, "float", strategy, weight.group_size, True, dynamic=dynamic)
    return Group(form, arguments, (*own, ("scale_dtype", scale), ("zp_dtype", scale)))


def _arguments(
    bits: int, kind: str, strategy: str, group_size: int | None, symmetric: bool, *, dynamic: bool | str
) -> tuple[tuple[str, Any], ...]:
    return (
        ("num_bits", bits),
        ("type", kind),
        ("symmetric", symmetric),
        ("strategy", strategy),
        ("group_size", group_size),
        ("dynamic", dynamic),
    )
