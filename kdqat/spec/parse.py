"""Schemes, specs and KV caches from what people write: a preset's name, or a mapping in a recipe or in JSON."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from kdqat.spec.layer_scheme import KVCacheScheme, LayerScheme
from kdqat.spec.presets import KV_PRESETS, PRESETS
from kdqat.spec.quant_spec import QuantSpec


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
    return LayerScheme(**_specs("scheme", "weight", value, LayerScheme))


def parse_kv_cache(value: str | KVCacheScheme | Mapping[str, Any]) -> KVCacheScheme:
    """A KV cache from a preset's name (KV8, KV4, KV_FP8), from a mapping with key and value, or as it is.

    Raises:
        ValueError: for an unknown name, key or value; the message names it.
    """
    if isinstance(value, KVCacheScheme):
        return value
    if isinstance(value, str):
        if value not in KV_PRESETS:
            raise ValueError(
                f"kv_cache {value!r} is no preset: use {', '.join(KV_PRESETS)}, or a mapping with key and value"
            )
        return KVCacheScheme(key=KV_PRESETS[value], value=KV_PRESETS[value])
    return KVCacheScheme(**_specs("kv_cache", "key", value, KVCacheScheme, prefix="kv_cache."))


def parse_spec(key: str, data: Any) -> QuantSpec | None:
    """A spec from a mapping; None and a spec pass through. `key` names it in errors."""
    if data is None or isinstance(data, QuantSpec):
        return data
    if not isinstance(data, Mapping):
        raise ValueError(f"{key}: {data!r} is no mapping; write e.g. {{format: int4}}")
    _known_keys(key, data, QuantSpec)
    if "format" not in data:
        raise ValueError(f"{key}: the key 'format' is missing, e.g. format: int4")
    try:
        return QuantSpec(**data)
    except ValueError as error:
        raise ValueError(f"{key}: {error}") from None


def _specs(where: str, example: str, value: Any, cls: type, prefix: str = "") -> dict[str, QuantSpec | None]:
    """The arguments of `cls`, each a spec, from a mapping called `where`; errors name a key behind `prefix`."""
    if not isinstance(value, Mapping):
        raise ValueError(f"{where}: {value!r} is neither a preset's name nor a mapping such as {{{example}: {{...}}}}")
    _known_keys(where, value, cls)
    return {key: parse_spec(prefix + key, spec) for key, spec in value.items()}


def _known_keys(where: str, data: Mapping[str, Any], cls: type) -> None:
    known = [f.name for f in fields(cls)]
    for key in data:
        if key not in known:
            raise ValueError(f"{where}: unknown key {key!r}; it has the keys {', '.join(known)}")
