"""Schemes by the names the market uses: W4A16_G128 is 4-bit weights, 16-bit activations, groups of 128.

Scales of the W?A? family are stored in fp16, which is what its serving formats hold. NVFP4, MXFP4 ... quantize weights
and activations alike, as the hardware wants it; a name that ends in A16 leaves the activations alone.
"""

from __future__ import annotations

from typing import Any

from kdqat.spec.layer_scheme import LayerScheme
from kdqat.spec.quant_spec import QuantSpec


def _weight(bits: int, group_size: int | None = None, *, symmetric: bool = True) -> QuantSpec:
    return QuantSpec(
        format=f"int{bits}",
        granularity="channel" if group_size is None else "group",
        group_size=group_size,
        symmetric=symmetric,
        zero_point="none" if symmetric else "integer",
        scale_dtype="float16",
    )


def _token(format: str, *, symmetric: bool = True) -> QuantSpec:
    """Dynamic, one scale for each token: what W?A8 engines do with activations and KV caches."""
    zero_point: Any = "none" if symmetric else "integer"
    return QuantSpec(format=format, granularity="token", dynamic=True, symmetric=symmetric, zero_point=zero_point)


def _integers() -> dict[str, LayerScheme]:
    presets: dict[str, LayerScheme] = {}
    for bits in (8, 4, 3, 2):
        presets[f"W{bits}A16"] = LayerScheme(weight=_weight(bits))
        presets[f"W{bits}A16_ASYM"] = LayerScheme(weight=_weight(bits, symmetric=False))
        for group_size in (16, 32, 64, 128):
            presets[f"W{bits}A16_G{group_size}"] = LayerScheme(weight=_weight(bits, group_size))
            presets[f"W{bits}A16_ASYM_G{group_size}"] = LayerScheme(weight=_weight(bits, group_size, symmetric=False))
    for bits, width in ((8, 8), (4, 8), (4, 4)):
        presets[f"W{bits}A{width}"] = LayerScheme(weight=_weight(bits), activation=_token(f"int{width}"))
        for group_size in (32, 64, 128) if bits == 4 else ():
            weight = _weight(bits, group_size)
            presets[f"W{bits}A{width}_G{group_size}"] = LayerScheme(weight=weight, activation=_token(f"int{width}"))
    static = QuantSpec(format="int8", granularity="tensor", symmetric=False, zero_point="integer")
    presets["W8A8_STATIC"] = LayerScheme(weight=_weight(8), activation=static)
    return presets


def _block_floats() -> dict[str, LayerScheme]:
    presets: dict[str, LayerScheme] = {}
    rows = {
        "NVFP4": ("e2m1", 16, "e4m3_global"),
        "MXFP4": ("e2m1", 32, "e8m0"),
        "MXFP6": ("e2m3", 32, "e8m0"),
        "MXFP6_E3M2": ("e3m2", 32, "e8m0"),
        "MXFP8": ("e4m3", 32, "e8m0"),
        "MXFP8_E5M2": ("e5m2", 32, "e8m0"),
    }
    for name, (number, group_size, dtype) in rows.items():
        shared: dict[str, Any] = {
            "format": number,
            "granularity": "group",
            "group_size": group_size,
            "scale_dtype": dtype,
        }
        shared["scale_rule"] = "mx" if dtype == "e8m0" else "absmax"
        weight = QuantSpec(**shared)
        presets[name] = LayerScheme(weight=weight, activation=QuantSpec(**shared, dynamic=True))
        presets[f"{name}_A16"] = LayerScheme(weight=weight)
    return presets


def _floats() -> dict[str, LayerScheme]:
    presets: dict[str, LayerScheme] = {}
    fp8 = QuantSpec(format="e4m3")
    presets["FP8"] = LayerScheme(weight=fp8, activation=_token("e4m3"))
    presets["FP8_STATIC"] = LayerScheme(weight=fp8, activation=QuantSpec(format="e4m3", granularity="tensor"))
    for number in ("e1m2", "e2m1", "e3m0"):
        presets[f"FP4_{number.upper()}"] = LayerScheme(weight=QuantSpec(format=number))
    # LLM-FP4: weights by channel, activations by tensor; the format is what a search starts from
    tensor = QuantSpec(format="e2m1", granularity="tensor")
    shifted = QuantSpec(format="e2m1", granularity="feature", scale_rule="pre_shift")
    wide = QuantSpec(format="e4m3_finite", granularity="tensor")
    presets["FP4_W4A4"] = LayerScheme(weight=QuantSpec(format="e2m1"), activation=tensor)
    presets["FP4_W4A4_PRE_SHIFT"] = LayerScheme(weight=QuantSpec(format="e2m1"), activation=shifted)
    presets["FP4_W4A8"] = LayerScheme(weight=QuantSpec(format="e2m1"), activation=wide)
    presets["FP8_W8A8"] = LayerScheme(weight=QuantSpec(format="e4m3_finite"), activation=wide)
    return presets


def _low_bit() -> dict[str, LayerScheme]:
    half: dict[str, Any] = {"zero_point": "half", "scale_dtype": "float16"}
    group: dict[str, Any] = {"granularity": "group", "group_size": 64}
    return {
        "TERNARY": LayerScheme(weight=QuantSpec(format="ternary", scale_rule="mean", scale_dtype="float16")),
        "TERNARY_G64": LayerScheme(
            weight=QuantSpec(format="ternary", scale_rule="mean", scale_dtype="float16", **group)
        ),
        "BINARY": LayerScheme(weight=QuantSpec(format="binary", scale_rule="mean", **half)),
        "BINARY_G64": LayerScheme(weight=QuantSpec(format="binary", scale_rule="mean", **half, **group)),
        "W2A16_HALF": LayerScheme(weight=QuantSpec(format="int2", **half)),
        "W2A16_HALF_G64": LayerScheme(weight=QuantSpec(format="int2", **half, **group)),
    }


def _quest() -> dict[str, LayerScheme]:
    """QuEST; its blocks of 128 inputs are 64 here, which divides the widths of more models (SmolLM2: 576)."""
    shared: dict[str, Any] = {"zero_point": "half", "scale_rule": "gaussian", "hadamard": 64}
    presets = {
        f"QUEST_W{bits}A16": LayerScheme(weight=QuantSpec(format=f"int{bits}", scale_dtype="float16", **shared))
        for bits in (4, 3, 2)
    }
    token = QuantSpec(format="int4", granularity="token", dynamic=True, **shared)
    return presets | {"QUEST_W4A4": LayerScheme(weight=presets["QUEST_W4A16"].weight, activation=token)}


def _named() -> dict[str, LayerScheme]:
    group32: dict[str, Any] = {"granularity": "group", "group_size": 32, "scale_dtype": "float16"}
    minimum: dict[str, Any] = {"symmetric": False, "zero_point": "minimum"}
    nf4: dict[str, Any] = {"format": "nf4", "granularity": "group", "group_size": 64}
    specs = {
        "GGUF_Q4_0": QuantSpec(format="int4", scale_rule="signed_max", **group32),
        "GGUF_Q4_1": QuantSpec(format="int4", **minimum, **group32),
        "GGUF_Q8_0": QuantSpec(format="int8", **group32, narrow=True),
        "GGUF_Q4_K": QuantSpec(format="int4", granularity="group", group_size=32, scale_dtype="k6", **minimum),
        **{f"GPTQ_4BIT_G{size}": _weight(4, size) for size in (32, 64, 128)},
        **{f"AWQ_4BIT_G{size}": _weight(4, size, symmetric=False) for size in (32, 64, 128)},
        "NF4": QuantSpec(**nf4),
        "NF4_DOUBLE": QuantSpec(**nf4, scale_dtype="double"),
    }
    dynamic = {  # torchao's and ExecuTorch's 8da4w
        f"TORCHAO_8DA4W_G{size}": LayerScheme(weight=_weight(4, size), activation=_token("int8", symmetric=False))
        for size in (32, 64, 128)
    }
    return {**{name: LayerScheme(weight=spec) for name, spec in specs.items()}, **dynamic}


PRESETS: dict[str, LayerScheme] = _integers() | _block_floats() | _floats() | _low_bit() | _quest() | _named()

KV_PRESETS: dict[str, QuantSpec] = {
    "KV8": _token("int8"),
    "KV4": _token("int4", symmetric=False),
    "KV_FP8": QuantSpec(format="e4m3", granularity="tensor"),
}
