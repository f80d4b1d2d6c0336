"""One layer of a quantized checkpoint, from its packed tensors to scheme, scales and weight."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from kdqat.models.packed_config import gptq_settings, group_of
from kdqat.quant.formats import decode
from kdqat.quant.grouping import to_groups
from kdqat.quant.layouts import awq, fp4, gptq, pack_quantized
from kdqat.spec import LayerScheme, QuantSpec, preset
from kdqat.types import QParams

_DTYPES = {torch.float16: "float16", torch.bfloat16: "bfloat16", torch.float32: "float32"}
INPUTS = ("input_global_scale", "input_scale", "input_zero_point")  # ranges of activations, which are not taken over
Read = Callable[[str, Mapping[str, Tensor], Mapping[str, Any]], "StoredLayer"]


@dataclass(frozen=True)
class StoredLayer:
    """What a checkpoint stores of a layer.

    Attributes:
        scheme: its format, as a plan says it.
        qparams: scale and zero point, fp32, of `scheme.weight.qparam_shape`.
        codes: [O, I], numbers as `FakeQuantizer.codes` has them, a byte each.
        second_level: of nested scales (NVFP4's global_scale).
    """

    scheme: LayerScheme
    qparams: QParams
    codes: Tensor
    second_level: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def weight(self) -> Tensor:
        """[O, I] fp32: scale * (code - zero point)."""
        spec, (scale, zero_point) = self.scheme.weight, self.qparams
        assert spec is not None
        return (scale * (to_groups(decode(self.codes, spec), spec) - zero_point)).flatten(1)


def reader_for(config: Mapping[str, Any]) -> tuple[str, Sequence[str], Read]:
    """(the suffix that marks a quantized layer, its tensors' last names, the function that reads it)."""
    if config["quant_method"] == "compressed-tensors":
        own = ("weight_scale", "weight_packed", "weight", "weight_shape", "weight_zero_point", "weight_global_scale")
        return ".weight_scale", (*own, *INPUTS), _compressed
    words = ("qweight", "qzeros", "scales", "g_idx")
    return ".qweight", words, _gptq if config["quant_method"] == "gptq" else _awq


def _compressed(name: str, own: Mapping[str, Tensor], config: Mapping[str, Any]) -> StoredLayer:
    group = group_of(name, config)
    args, inputs, scale = group["weights"], group.get("input_activations"), own["weight_scale"]
    if args.get("actorder"):
        raise ValueError("its inputs are reordered (actorder), which a group of neighbours cannot hold")
    if args["symmetric"] and _shifts(own.get("weight_zero_point")):
        raise ValueError("its config says symmetric, but a weight_zero_point is stored; one of the two is wrong")
    if args["type"] == "float":
        if args["num_bits"] != 4 or args.get("group_size") not in (16, 32):
            raise ValueError(f"float {args['num_bits']} weights are not known; integers, NVFP4 and MXFP4 are")
        return _fp4(own, inputs)
    bits, symmetric = args["num_bits"], args["symmetric"]
    if args["strategy"] not in ("channel", "group"):
        raise ValueError(f"scales by {args['strategy']} are not known; channel and group are")
    width = int(own["weight_shape"][1]) if "weight_shape" in own else own["weight"].shape[1]
    if "weight_packed" in own:
        codes = pack_quantized.unpack_weight(own["weight_packed"], bits, width, symmetric=symmetric)
    elif symmetric:
        codes = own["weight"].to(torch.int16)
    else:
        raise ValueError("asymmetric int8 weights are not known; symmetric ones are")
    zero_point = torch.zeros_like(scale)
    if not symmetric:
        zero_point = pack_quantized.unpack_zero_points(own["weight_zero_point"], bits, len(codes))
    size = args["group_size"] if args["strategy"] == "group" else None
    activation = None if inputs is None else _activation(inputs)
    return _integers(codes, scale, zero_point, bits, size, symmetric, activation)


def _activation(inputs: Mapping[str, Any]) -> QuantSpec:
    kind, bits, how = inputs["type"], inputs["num_bits"], (inputs["strategy"], inputs["dynamic"])
    if kind != "int" or bits not in (4, 8) or how not in (("token", True), ("tensor", False)):
        live = "dynamic" if inputs["dynamic"] else "static"
        raise ValueError(
            f"{live} activations of {kind} {bits} by {inputs['strategy']} are not known; int 8 and 4 by token and "
            "dynamic, or by tensor and static, are"
        )
    return QuantSpec(
        format=f"int{bits}",
        granularity=inputs["strategy"],
        dynamic=inputs["dynamic"],
        symmetric=inputs["symmetric"],
        zero_point="none" if inputs["symmetric"] else "integer",
    )


def _shifts(zero_point: Tensor | None) -> bool:
    """Whether a zero point is stored that is not plainly 0, as some symmetric checkpoints have it; int32 is packed."""
    return zero_point is not None and (zero_point.dtype == torch.int32 or bool(zero_point.any()))


def _fp4(own: Mapping[str, Tensor], inputs: Mapping[str, Any] | None) -> StoredLayer:
    codes, scale = fp4.unpack_fp4(own["weight_packed"]), own["weight_scale"]
    second = {}
    if "weight_global_scale" in own:
        second = {"global_scale": own["weight_global_scale"].float().reshape(1)}
        scale, kind = fp4.decode_e4m3(scale, second["global_scale"]), "NVFP4"
    else:
        scale, kind = fp4.decode_e8m0(scale), "MXFP4"
    scheme = preset(kind if inputs is not None else f"{kind}_A16")
    scale = scale.unsqueeze(-1)
    return StoredLayer(scheme, QParams(scale, torch.zeros_like(scale)), codes.to(torch.uint8), second)


def _gptq(name: str, own: Mapping[str, Tensor], config: Mapping[str, Any]) -> StoredLayer:
    settings = gptq_settings(name, config)
    bits, scales = settings["bits"], own["scales"]
    version = 2 if (config.get("checkpoint_format") or config.get("format")) == "gptq_v2" else 1
    width = own["qweight"].shape[0] * 32 // bits
    size = None if settings["group_size"] == -1 else settings["group_size"]
    if "g_idx" in own and len(own["g_idx"]) != width:
        raise ValueError(
            f"in {bits} bits, as its config says, it has {width} inputs, but its g_idx {len(own['g_idx'])}"
        )
    if "g_idx" in own and not torch.equal(own["g_idx"].int(), gptq.group_index(width, size or width)):
        raise ValueError("its inputs are reordered (desc_act), which a group of neighbours cannot hold")
    codes = gptq.unpack_weight(own["qweight"], bits, width)
    zeros = gptq.unpack_zero_points(own["qzeros"], bits, scales.shape[1], version=version)
    if zeros.max() >= 2**bits:
        raise ValueError("a zero point lies outside the codes; the folder is damaged, or it is gptq_v2 and says not so")
    return _unsigned(codes, scales, zeros, bits, size)


def _awq(name: str, own: Mapping[str, Tensor], config: Mapping[str, Any]) -> StoredLayer:
    if config.get("version", "gemm").lower() != "gemm" or config["bits"] != awq.BITS:
        raise ValueError("only AWQ's GEMM layout of 4 bits is known")
    size = None if config["group_size"] == -1 else config["group_size"]
    return _unsigned(awq.unpack(own["qweight"]), own["scales"], awq.unpack(own["qzeros"]), awq.BITS, size)


def _unsigned(codes: Tensor, scales: Tensor, zeros: Tensor, bits: int, size: int | None) -> StoredLayer:
    """Codes [O, I], zero points [O, N] and scales [N, O]; symmetric where every zero point is the middle."""
    middle = 2 ** (bits - 1)
    symmetric = bool((zeros == middle).all())
    shift = middle if symmetric else 0
    return _integers(codes - shift, scales.t(), zeros - shift, bits, size, symmetric)


def _integers(
    codes: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    bits: int,
    size: int | None,
    symmetric: bool,
    activation: QuantSpec | None = None,
) -> StoredLayer:
    spec = QuantSpec(
        format=f"int{bits}",
        granularity="channel" if size is None else "group",
        group_size=size,
        symmetric=symmetric,
        zero_point="none" if symmetric else "integer",
        scale_dtype=_DTYPES[scale.dtype],  # type: ignore[arg-type]
    )
    shape = spec.qparam_shape(codes.shape)
    scale, zero_point = scale.float().reshape(shape), zero_point.float().reshape(shape)
    if (scale == 0).any():
        raise ValueError("it has a scale of 0, by which nothing can be rounded")
    codes = codes.to(torch.int8 if symmetric else torch.uint8)
    return StoredLayer(LayerScheme(weight=spec, activation=activation), QParams(scale, zero_point), codes)
