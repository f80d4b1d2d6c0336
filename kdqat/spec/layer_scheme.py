"""What one layer does with its weight, its input and its output, and what a model does with its KV cache."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from kdqat.spec.quant_spec import QuantSpec


@dataclass(frozen=True, kw_only=True)
class LayerScheme:
    """What one layer does; None leaves a tensor in full precision.

    Args:
        weight: granularity tensor, channel or group; never dynamic.
        activation: the layer's input: tensor (static or dynamic), token and group (dynamic), feature (static).
        output: likewise; on k_proj and v_proj it is the KV cache before RoPE.

    Raises:
        ValueError: for a granularity that the tensor does not have.
    """

    weight: QuantSpec | None = None
    activation: QuantSpec | None = None
    output: QuantSpec | None = None

    def __post_init__(self) -> None:
        if self.weight is not None:
            if self.weight.granularity not in ("tensor", "channel", "group"):
                raise ValueError(
                    f"weight: granularity {self.weight.granularity!r} is for activations: use channel or group"
                )
            if self.weight.dynamic:
                raise ValueError("weight: dynamic=True is for activations; a weight's scales are stored")
        _check_activation("activation", self.activation)
        _check_activation("output", self.output)


@dataclass(frozen=True, kw_only=True)
class KVCacheScheme:
    """How keys and values are cached after RoPE: through transformers' AttentionInterface, as an engine caches them.

    Before RoPE the cache is the `output` of k_proj and v_proj instead (see `Uniform.kv_cache`).

    Args:
        key, value: granularity "token" (one scale for each token and head, dynamic) or "feature" (one for each head
            channel, static), or "tensor".

    Raises:
        ValueError: if both are None, or for a granularity that the cache does not have.
    """

    key: QuantSpec | None = None
    value: QuantSpec | None = None

    def __post_init__(self) -> None:
        if self.key is None and self.value is None:
            raise ValueError("kv_cache: give a spec for key or for value")
        _check_activation("kv_cache.key", self.key)
        _check_activation("kv_cache.value", self.value)


DeployOnly = Literal["activation", "output", "kv_cache"]


def _check_activation(key: str, spec: QuantSpec | None) -> None:
    if spec is None:
        return
    if spec.granularity == "channel":
        raise ValueError(f"{key}: granularity 'channel' is for weights: use token, tensor, group or feature")
    if spec.granularity in ("token", "group") and not spec.dynamic:
        raise ValueError(f"{key}: a scale for each {spec.granularity} cannot be stored: set dynamic: true")
