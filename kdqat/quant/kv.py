"""Fake quantization of a KV cache after RoPE: what an attention module reads back for its keys and values.

One module beside each attention, called with keys and values as attention gets them (`models/kv_cache.py` puts it
there). Every number it makes depends on one token only, or on stored ranges: a token is rounded alike whether it was
computed a moment ago, came out of a cache, or stands in a row of training. Before RoPE the cache is the `output` of
k_proj and v_proj instead, with one scale for each token over all heads (LLM-QAT, https://arxiv.org/abs/2305.17888).
"""

from __future__ import annotations

from collections.abc import Callable, Collection

from torch import Tensor, nn

from kdqat.quant.layer import default_activation_quantizer, make_activation_quantizer
from kdqat.quant.quantizer import FakeQuantizer, QuantizerFactory
from kdqat.spec import KVCacheScheme, QuantSpec

KV_CACHE_NAME = "kv_cache_fake_quantizer"  # of the submodule; keys that hold "_fake_quantizer." are not the HF model's

Observer = Callable[[str, Tensor], None]


class KVCacheFakeQuantizer(nn.Module):
    """Fake quantizers for the keys and values of one attention module.

    Args:
        scheme: granularity token and group share a scale inside one head of one token (dynamic); feature has one for
            each channel of each head, tensor one for all keys (static).
        num_heads, head_dim: of keys and values, before they are repeated for grouped queries.
        activation_quantizer: makes the two from a spec and a shape.
        deploy_only: with "kv_cache" in it, off in training mode, on in evaluation.

    Attributes:
        key, value: None where the scheme has no spec.
        fake_quantize: False switches both off (see `swap.full_precision`).
        observer: called with "key" or "value" and the tensor [rows, features] that its fake quantizer rounds, before
            it is rounded and also where fake quantization is off: what calibration of static ranges sees. Else None.

    Raises:
        ValueError: if a spec does not fit.
    """

    key: FakeQuantizer | None
    value: FakeQuantizer | None

    def __init__(
        self,
        scheme: KVCacheScheme,
        *,
        num_heads: int,
        head_dim: int,
        activation_quantizer: QuantizerFactory = default_activation_quantizer,
        deploy_only: Collection[str] = (),
    ) -> None:
        super().__init__()
        for part, spec in (("key", scheme.key), ("value", scheme.value)):
            width = head_dim if spec is None or _within_a_head(spec) else num_heads * head_dim
            if spec is not None and spec.dynamic and spec.granularity == "tensor":
                raise ValueError(
                    f"kv_cache.{part}: granularity 'tensor' with dynamic=True would let a token's rounding depend on "
                    "tokens after it: use granularity 'token', or dynamic: false"
                )
            rests = "kv_cache" in deploy_only
            setattr(self, part, make_activation_quantizer(f"kv_cache.{part}", spec, width, activation_quantizer, rests))
        self.fake_quantize = True
        self.deploy_only = frozenset(deploy_only)
        self.observer: Observer | None = None

    def quantizers(self) -> dict[str, FakeQuantizer]:
        """Its fake quantizers by "key" and "value"."""
        parts = {"key": self.key, "value": self.value}
        return {part: quantizer for part, quantizer in parts.items() if quantizer is not None}

    def forward(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values [B, heads, T, D] as they are read from the cache."""
        return self._pass("key", key, self.key), self._pass("value", value, self.value)

    def _pass(self, part: str, x: Tensor, quantizer: FakeQuantizer | None) -> Tensor:
        if quantizer is None:
            return x
        off = not self.fake_quantize or (self.training and "kv_cache" in self.deploy_only)
        if off and self.observer is None:
            return x
        rows = x if _within_a_head(quantizer.spec) else x.transpose(1, 2).flatten(2)  # [B, T, heads * D]
        if self.observer is not None:
            self.observer(part, rows.reshape(-1, rows.shape[-1]))
        if off:
            return x
        values = quantizer(rows)
        return values if rows is x else values.unflatten(2, (x.shape[1], x.shape[3])).transpose(1, 2)


def kv_caches(model: nn.Module) -> dict[str, KVCacheFakeQuantizer]:
    """The KV caches' fake quantizers in `model`, by the full name of their attention module."""
    found = ((name, module) for name, module in model.named_modules() if isinstance(module, KVCacheFakeQuantizer))
    return {name.removesuffix(KV_CACHE_NAME).removesuffix("."): module for name, module in found}


def _within_a_head(spec: QuantSpec) -> bool:
    return spec.granularity in ("token", "group")
