"""Which settings of a `quantization_config` hold for one layer, searched as the libraries that write them search."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from kdqat.spec import KVCacheScheme, parse_kv_cache

_CLASSES = ("Linear", "Module")  # of a quantized layer, as compressed-tensors names classes


def group_of(name: str, config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The config group of layer `name`: by its name, else by a regex, else by its class (compressed-tensors).

    https://github.com/vllm-project/compressed-tensors, `utils/match.py`, 0.20: of regexes the first by alphabet counts,
    of a target in two groups the last group.

    Raises:
        ValueError: if no group targets it, or `ignore` names it.
    """
    for ignored in config.get("ignore") or ():
        if ignored in (name, *_CLASSES) or _is_regex_of(ignored, name):
            raise ValueError(f"its scales are stored, but ignore has it by {ignored!r}; one of the two is wrong")
    groups = {target: group for group in config["config_groups"].values() for target in group["targets"]}
    regexes = sorted(target for target in groups if _is_regex_of(target, name))
    for target in (name, *regexes, *_CLASSES):
        if target in groups:
            return groups[target]
    raise ValueError("no config group targets it")


def gptq_settings(name: str, config: Mapping[str, Any]) -> dict[str, Any]:
    """bits, group_size and sym of layer `name`: the first rule of `dynamic` that matches it counts (GPTQModel).

    https://github.com/ModelCloud/GPTQModel, `dynamic_get`.

    Raises:
        ValueError: if that rule leaves the layer unquantized ("-:").
    """
    settings = {key: config[key] for key in ("bits", "group_size", "sym") if key in config}
    for rule, override in (config.get("dynamic") or {}).items():
        if re.match(rule.removeprefix("-:").removeprefix("+:"), name):
            if rule.startswith("-:"):
                raise ValueError(f"it is packed, but dynamic leaves it out by {rule!r}; one of the two is wrong")
            return settings | override
    return settings


def kv_cache_of(config: Mapping[str, Any]) -> KVCacheScheme | None:
    """The KV cache as a plan says it: KV_FP8, e4m3 under one static scale; None if there is none or another."""
    asked = config.get("kv_cache_scheme") or {}
    kind = tuple(asked.get(key) for key in ("type", "num_bits", "strategy", "dynamic", "symmetric"))
    return parse_kv_cache("KV_FP8") if kind == ("float", 8, "tensor", False, True) else None


def _is_regex_of(target: str, name: str) -> bool:
    return target.startswith("re:") and re.match(target.removeprefix("re:"), name) is not None
