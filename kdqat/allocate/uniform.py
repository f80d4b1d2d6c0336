"""The same scheme for every layer, with exceptions by role or name."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

from kdqat.allocate.base import BitAllocator, matches, require_matches
from kdqat.spec import DeployOnly, KVCacheScheme, LayerScheme, QuantPlan, parse_kv_cache, parse_scheme
from kdqat.types import EMBEDDING, ROUTER, LayerRef

DEFAULT_IGNORE = ("lm_head",)


class Uniform(BitAllocator):
    """One scheme everywhere.

    Args:
        scheme: a preset ("W4A16_G64") or a mapping with a spec ({weight: {format: int4, ...}}).
        ignore: roles or name globs that stay in full precision; the default asks nothing of a model without a head. The
            routers of a mixture of experts stay so too, unless an override names them (not by a glob).
        overrides: role or name glob -> another scheme; the last match counts.
        embeddings: scheme of the input embeddings; None leaves them in full precision. A tied lm_head shares it: take
            it out of `ignore` then.
        kv_cache: a preset (KV8, KV4, KV_FP8) or a mapping with key and value; None leaves the cache alone.
        kv_position: "after_rope" quantizes what an engine caches; "before_rope" what k_proj and v_proj give (LLM-QAT).
        deploy_only: of activation, output and kv_cache: off while training, on in evaluation and exports.

    Raises:
        ValueError: for an unknown preset or key; from `allocate`, for a pattern of yours that matches no layer.
    """

    def __init__(
        self,
        scheme: str | LayerScheme | dict,
        *,
        ignore: Sequence[str] = DEFAULT_IGNORE,
        overrides: dict[str, str | LayerScheme | dict] | None = None,
        embeddings: str | LayerScheme | dict | None = None,
        kv_cache: str | KVCacheScheme | dict | None = None,
        kv_position: Literal["after_rope", "before_rope"] = "after_rope",
        deploy_only: Sequence[DeployOnly] = (),
    ) -> None:
        if kv_position not in ("after_rope", "before_rope"):
            raise ValueError(f"kv_position {kv_position!r} is unknown: use after_rope or before_rope")
        self.scheme = parse_scheme(scheme)
        self.ignore = tuple(ignore)
        self.overrides = {pattern: parse_scheme(s) for pattern, s in (overrides or {}).items()}
        self.embeddings = None if embeddings is None else parse_scheme(embeddings)
        self.kv_cache = None if kv_cache is None else parse_kv_cache(kv_cache)
        self.kv_position = kv_position
        self.deploy_only = tuple(deploy_only)

    def allocate(self, layers: Sequence[LayerRef]) -> QuantPlan:
        matmuls = [layer for layer in layers if layer.role != EMBEDDING]
        if self.ignore != DEFAULT_IGNORE:  # by value: a resolved recipe spells the default out
            require_matches("plan.ignore", self.ignore, matmuls)
        require_matches("plan.overrides", tuple(self.overrides), matmuls)
        planned: dict[str, LayerScheme] = {}
        ignored = []
        for layer in matmuls:
            named = bool({layer.role, layer.name} & set(self.overrides))  # a router is meant by name, never by a glob
            if (layer.role == ROUTER and not named) or any(matches(pattern, layer) for pattern in self.ignore):
                ignored.append(layer.name)
                continue
            planned[layer.name] = self.scheme
            for pattern, scheme in self.overrides.items():
                if matches(pattern, layer):
                    planned[layer.name] = scheme
        if self.embeddings is not None:
            planned |= {layer.name: self.embeddings for layer in layers if layer.role == EMBEDDING}
        if not planned:
            raise ValueError("plan: every layer is ignored, so there is nothing to quantize")
        after_rope = self.kv_cache if self.kv_position == "after_rope" else None
        if self.kv_cache is not None and after_rope is None:
            self._quantize_outputs(planned, matmuls, self.kv_cache)
        return QuantPlan(planned, tuple(ignored), after_rope, self.deploy_only)

    def _quantize_outputs(
        self, planned: dict[str, LayerScheme], layers: Sequence[LayerRef], cache: KVCacheScheme
    ) -> None:
        roles = {"k": cache.key, "v": cache.value}
        found = [layer for layer in layers if layer.role in roles]
        if not found:
            raise ValueError(
                "kv_position before_rope needs k_proj and v_proj layers; this model fuses them: after_rope"
            )
        for layer in found:
            scheme = planned.get(layer.name, LayerScheme())
            planned[layer.name] = replace(scheme, output=roles[layer.role])
