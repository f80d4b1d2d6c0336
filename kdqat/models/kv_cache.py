"""Put `QuantPlan.kv_cache` into a model: keys and values pass fake quantizers on their way into attention, after RoPE.

transformers lets a model choose its attention function by name (AttentionInterface). "kdqat_sdpa" and "kdqat_eager" are
the functions of those names behind the fake quantizer of the calling module; a module without one computes as before,
so the names may be known to every model while only this one's config asks for them.

transformers updates its cache first and calls attention with all of it, so the cache holds keys as they were computed,
and every step rounds each of them anew, once: generating with a cache rounds as training does. Rounding what was
rounded would do no harm under the presets' rules, absmax and min-max, but moves others (`tests/quant/test_kv.py`).
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import nn

from kdqat.models.roles import family_of, layer_refs
from kdqat.quant.kv import KV_CACHE_NAME, KVCacheFakeQuantizer
from kdqat.quant.layer import default_activation_quantizer
from kdqat.quant.quantizer import QuantizerFactory
from kdqat.spec import QuantPlan

M = TypeVar("M", bound=nn.Module)

_PREFIX = "kdqat_"
_BASES = ("sdpa", "eager")


def apply_kv_cache(
    model: M, plan: QuantPlan, activation_quantizer: QuantizerFactory = default_activation_quantizer
) -> M:
    """Give every attention module of `model` the fake quantizers that `plan.kv_cache` asks for; returns the model.

    Everything is checked before the first change. It also refuses what would be no KV cache: `output` of a fused qkv
    layer, which holds queries as well. Works before and after `apply_plan`.

    Raises:
        ValueError: naming the model type, the layer or the spec, and what to do.
    """
    _check_outputs(model, plan)
    if plan.kv_cache is None:
        return model
    base = _check_attention(model)
    config: Any = model.config
    num_heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    made = []
    for attention in attention_modules(model).values():
        with torch.device(next(attention.parameters()).device):
            cache = KVCacheFakeQuantizer(
                plan.kv_cache,
                num_heads=num_heads,
                head_dim=head_dim,
                activation_quantizer=activation_quantizer,
                deploy_only=plan.deploy_only,
            )
        made.append((attention, cache.train(attention.training)))
    for attention, cache in made:
        attention.add_module(KV_CACHE_NAME, cache)
    _register()
    model.set_attn_implementation(_PREFIX + base)  # type: ignore[operator]
    return model


def strip_kv_cache(model: M) -> M:
    """Take out what `apply_kv_cache` put in; returns the model, whose cache is in full precision again."""
    for module in model.modules():
        if isinstance(module._modules.get(KV_CACHE_NAME), KVCacheFakeQuantizer):
            delattr(module, KV_CACHE_NAME)
    implementation = _implementation(model)
    if implementation.startswith(_PREFIX):
        model.set_attn_implementation(implementation.removeprefix(_PREFIX))  # type: ignore[operator]
    return model


def use_eager_attention(model: nn.Module) -> None:
    """Attention that materialises its weights; a fake-quantized KV cache stays so."""
    prefix = _PREFIX if _implementation(model).startswith(_PREFIX) else ""
    model.set_attn_implementation(prefix + "eager")  # type: ignore[operator]


def attention_modules(model: nn.Module) -> dict[str, nn.Module]:
    """The module around the k (or qkv) layer of every block, by full name."""
    refs = [ref for ref in layer_refs(model) if ref.block is not None and ref.role in ("k", "qkv")]
    names = [ref.name.rpartition(".")[0] for ref in refs]
    return {name: model.get_submodule(name) for name in names}


def _check_outputs(model: nn.Module, plan: QuantPlan) -> None:
    for ref in layer_refs(model):
        if ref.name not in plan or plan[ref.name].output is None:
            continue
        if ref.role == "qkv":
            raise ValueError(
                f"layer {ref.name}: output: its output holds queries beside keys and values, which is no KV cache; "
                "quantize the cache after RoPE instead (QuantPlan.kv_cache)"
            )
        if plan.kv_cache is not None and {"k": plan.kv_cache.key, "v": plan.kv_cache.value}.get(ref.role) is not None:
            raise ValueError(
                f"layer {ref.name}: output: the plan's kv_cache quantizes it again after RoPE; choose one of the two"
            )


def _check_attention(model: Any) -> str:
    """The attention implementation that the fake quantizers go in front of."""
    kind, family, implementation = model.config.model_type, family_of(model), _implementation(model)
    if not family.causal:
        raise ValueError(f"kv_cache: {kind} is an encoder and keeps no KV cache; leave kv_cache out of the plan")
    if not model._can_set_attn_implementation():
        raise ValueError(
            f"kv_cache: the attention of {kind} does not go through transformers' AttentionInterface; quantize the "
            "cache before RoPE instead (`output` of the k and v layers)"
        )
    if implementation.startswith(_PREFIX):
        raise ValueError("kv_cache: the model has a fake-quantized KV cache already; strip_kv_cache first")
    if implementation not in _BASES:
        raise ValueError(
            f"kv_cache: attn_implementation {implementation!r} cannot be fake-quantized: use {' or '.join(_BASES)}"
        )
    if implementation == "eager" and getattr(model.config, "reorder_and_upcast_attn", False):
        raise ValueError(
            f"kv_cache: {kind} with reorder_and_upcast_attn passes eager attention by the AttentionInterface; load "
            "it with attn_implementation 'sdpa'"
        )
    return implementation


def _implementation(model: nn.Module) -> str:
    return model.config._attn_implementation or "eager"  # type: ignore[union-attr,return-value]


def _register() -> None:
    """Make the two names known to transformers, masks included; once more does no harm."""
    from transformers import AttentionInterface
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    sdpa = ALL_ATTENTION_FUNCTIONS["sdpa"]
    for name, base in (("sdpa", lambda module: sdpa), ("eager", _eager)):
        AttentionInterface.register(_PREFIX + name, _behind_fake_quantizer(base))
        AttentionMaskInterface.register(_PREFIX + name, ALL_MASK_ATTENTION_FUNCTIONS[name])


def _eager(module: nn.Module) -> Callable[..., Any]:
    """Each architecture's own: transformers keeps no common one."""
    return sys.modules[type(module).__module__].eager_attention_forward


def _behind_fake_quantizer(base: Callable[[nn.Module], Callable[..., Any]]) -> Callable[..., Any]:
    def attention(module: nn.Module, query: Any, key: Any, value: Any, *args: Any, **kwargs: Any) -> Any:
        cache = getattr(module, KV_CACHE_NAME, None)
        if cache is not None:
            key, value = cache(key, value)
        return base(module)(module, query, key, value, *args, **kwargs)

    return attention
