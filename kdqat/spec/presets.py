"""Schemes by the names the market uses: W4A16_G128 is 4-bit weights, 16-bit activations, groups of 128.

All scales are stored in fp16, which is what the serving formats of the W?A16 family hold.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from kdqat.spec.quant_spec import LayerScheme, QuantSpec


def _weights(bits: int, group_size: int | None = None, *, symmetric: bool = True) -> LayerScheme:
    return LayerScheme(
        weight=QuantSpec(
            format=f"int{bits}",
            granularity="channel" if group_size is None else "group",
            group_size=group_size,
            symmetric=symmetric,
            zero_point="none" if symmetric else "integer",
            scale_dtype="float16",
        )
    )


def _family() -> dict[str, LayerScheme]:
    presets: dict[str, LayerScheme] = {}
    for bits in (8, 4, 3, 2):
        presets[f"W{bits}A16"] = _weights(bits)
        presets[f"W{bits}A16_ASYM"] = _weights(bits, symmetric=False)
        for group_size in (32, 64, 128):
            presets[f"W{bits}A16_G{group_size}"] = _weights(bits, group_size)
            presets[f"W{bits}A16_ASYM_G{group_size}"] = _weights(bits, group_size, symmetric=False)
    return presets


PRESETS: dict[str, LayerScheme] = _family()


def preset(name: str) -> LayerScheme:
    """The scheme called `name`.

    Raises:
        ValueError: for an unknown name; the message lists the nearest ones.
    """
    if name in PRESETS:
        return PRESETS[name]
    nearest = difflib.get_close_matches(name.upper(), PRESETS, n=3, cutoff=0.3) or sorted(PRESETS)
    raise ValueError(f"scheme {name!r} is no preset; the nearest are {', '.join(nearest)}")


def preset_name(scheme: LayerScheme) -> str | None:
    """The name under which `scheme` is known, or None."""
    return next((name for name, known in PRESETS.items() if known == scheme), None)


def parse_scheme(value: str | LayerScheme | Mapping[str, Any]) -> LayerScheme:
    """A scheme from a preset's name, from a mapping (a recipe, JSON), or from a scheme.

    Raises:
        ValueError: for an unknown name, key or value; the message names it.
    """
    if isinstance(value, LayerScheme):
        return value
    if isinstance(value, str):
        return preset(value)
    if not isinstance(value, Mapping):
        raise ValueError(f"scheme: {value!r} is neither a preset's name nor a mapping such as {{weight: {{...}}}}")
    _known_keys("scheme", value, LayerScheme)
    return LayerScheme(weight=_parse_spec("weight", value.get("weight")))


def _parse_spec(key: str, data: Any) -> QuantSpec | None:
    if data is None or isinstance(data, QuantSpec):
        return data
    if not isinstance(data, Mapping):
        raise ValueError(f"{key}: {data!r} is no mapping; write e.g. {{format: int4}}")
    _known_keys(key, data, QuantSpec)
    if "format" not in data:
        raise ValueError(f"{key}: the key 'format' is missing, e.g. format: int4")
    return QuantSpec(**data)


def _known_keys(where: str, data: Mapping[str, Any], cls: type) -> None:
    known = [f.name for f in fields(cls)]
    for key in data:
        if key not in known:
            raise ValueError(f"{where}: unknown key {key!r}; it has the keys {', '.join(known)}")
