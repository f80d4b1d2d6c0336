"""A layer with an adapter: what it computes, what its gradients are, and what it keeps for the backward pass."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from kdqat.models import layer_refs
from kdqat.models.toy import toy_model
from kdqat.quant import (
    LSQ,
    SEQ,
    FakeQuantConv1D,
    FakeQuantLayer,
    FakeQuantLinear,
    LoraAdapter,
    MinMax,
    QuEST,
    apply_plan,
    full_precision,
    stored_state,
    strip_fake_quant,
)
from kdqat.spec import LayerScheme, QuantPlan, QuantSpec, preset

CASES: list[tuple[Any, str]] = [
    (MinMax, "W4A16_G32"),
    (LSQ, "W4A16_G32"),
    (LSQ, "W4A16"),
    (MinMax, "W3A16_ASYM_G32"),
    (SEQ, "W2A16_HALF"),
    (QuEST, "QUEST_W4A16"),
    (LSQ, "NVFP4"),
]
every_quantizer = pytest.mark.parametrize(
    ("method", "name"), CASES, ids=lambda v: v if isinstance(v, str) else v.__name__
)
both = pytest.mark.parametrize("placement", ["inside", "outside"])


def make_layer(
    placement: Any = "inside", method: Any = LSQ, name: str = "W4A16_G32", plain: nn.Module | None = None
) -> FakeQuantLayer:
    """A layer of 128 inputs and 64 outputs with an adapter that matters."""
    torch.manual_seed(0)
    plain = plain if plain is not None else nn.Linear(128, 64)
    kind = FakeQuantLinear if isinstance(plain, nn.Linear) else FakeQuantConv1D
    scheme = preset(name)
    layer = kind.wrap(plain, LayerScheme(weight=scheme.weight), method)
    quantizer = layer.weight_fake_quantizer
    assert quantizer is not None
    if quantizer.uses_stored_qparams:
        quantizer.load_qparams(quantizer.initial_qparams(quantizer.groups(layer.as_matrix(layer.weight))))
    layer.adapter = LoraAdapter(layer.matrix_shape, rank=4, placement=placement)
    layer.adapter.draw("layer")
    with torch.no_grad():
        layer.adapter.lora_B.normal_(std=0.02)
    layer.weight.requires_grad_(False)
    return layer


def merged(layer: FakeQuantLayer) -> Tensor:
    assert layer.adapter is not None
    update = layer.adapter.scaling * layer.adapter.lora_B @ layer.adapter.lora_A
    return layer.as_matrix(layer.weight) + update


def gradients(layer: nn.Module, y: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(y.square().sum(), [p for p in layer.parameters() if p.requires_grad]))


@every_quantizer
def test_inside_the_sum_is_quantized_with_the_gradients_of_ordinary_autograd(method: Any, name: str) -> None:
    layer, x = make_layer("inside", method, name), torch.randn(3, 128)
    quantizer = layer.weight_fake_quantizer
    assert quantizer is not None
    expected = F.linear(x, quantizer.composed(merged(layer), torch.float32), layer.bias)
    answer = layer(x)
    assert (answer != make_layer("outside", method, name)(x)).any()
    torch.testing.assert_close(answer, expected, rtol=1e-5, atol=1e-5)
    for mine, other in zip(gradients(layer, answer), gradients(layer, expected), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-4)


def test_outside_a_branch_is_added_and_the_codes_are_those_of_the_weight() -> None:
    layer, x = make_layer("outside"), torch.randn(3, 128)
    quantizer, adapter = layer.weight_fake_quantizer, layer.adapter
    assert quantizer is not None and adapter is not None
    branch = adapter.scaling * x @ adapter.lora_A.t() @ adapter.lora_B.t()
    torch.testing.assert_close(layer(x), F.linear(x, quantizer(layer.weight), layer.bias) + branch)
    assert torch.equal(layer.latent_matrix(), layer.weight)
    torch.testing.assert_close(F.linear(x, layer.dequantized_weight(), layer.bias), layer(x))
    plain = strip_fake_quant(nn.Sequential(layer))[0]
    torch.testing.assert_close(plain(x), layer(x))
    assert type(plain) is nn.Linear and not hasattr(plain, "adapter")


def test_outside_the_branch_reads_the_input_before_it_is_quantized() -> None:
    scheme = preset("W4A16_G32")
    activation = QuantSpec(format="int4", granularity="token", dynamic=True)
    layer = FakeQuantLinear.wrap(
        nn.Linear(128, 64), LayerScheme(weight=scheme.weight, activation=activation), MinMax, MinMax
    )
    layer.adapter = LoraAdapter(layer.matrix_shape, rank=4, placement="outside")
    layer.adapter.draw("layer")
    nn.init.normal_(layer.adapter.lora_B)
    x = torch.randn(3, 128)
    weight = layer.fake_quantized_weight()
    expected = F.linear(layer.quantized_input(x), weight, layer.bias) + layer.adapter(x)
    assert torch.equal(layer(x), expected) and not torch.equal(layer.quantized_input(x), x)


@both
def test_a_new_adapter_changes_nothing_and_every_rank_draws_the_same(placement: Any) -> None:
    layer, x = make_layer(placement), torch.randn(3, 128)
    assert layer.adapter is not None
    nn.init.zeros_(layer.adapter.lora_B)
    answer, first = layer(x), layer.adapter.lora_A.clone()
    layer.adapter.draw("other")
    assert not torch.equal(layer.adapter.lora_A, first) and layer.adapter.lora_A.abs().max() <= 128**-0.5
    torch.rand(3)
    state = torch.get_rng_state()
    layer.adapter.draw("layer")
    assert torch.equal(layer.adapter.lora_A, first) and torch.equal(torch.get_rng_state(), state)
    layer.adapter = None
    assert torch.equal(layer(x), answer)


@both
def test_full_precision_leaves_the_adapter_out(placement: Any) -> None:
    layer, x = make_layer(placement), torch.randn(3, 128)
    with full_precision(layer):
        assert torch.equal(layer(x), F.linear(x, layer.weight, layer.bias))


@both
def test_the_transposed_linear_of_gpt2_has_the_same_adapter(placement: Any) -> None:
    linear, conv = nn.Linear(128, 64), Conv1D(64, 128)
    with torch.no_grad():
        conv.weight.copy_(linear.weight.t())
        conv.bias.copy_(linear.bias)
    x = torch.randn(3, 128)
    layers = [make_layer(placement, plain=plain) for plain in (linear, conv)]
    assert torch.equal(layers[0](x), layers[1](x))
    torch.testing.assert_close(layers[1].dequantized_weight().t(), layers[0].dequantized_weight())


def kept(layer: FakeQuantLayer, function: Callable[[Tensor], Tensor]) -> list[Tensor]:
    """Float32 tensors of the weight's size that the backward pass keeps and that are no parameters."""
    found: list[Tensor] = []
    own = {p.data_ptr() for p in layer.parameters()}

    def note(tensor: Tensor) -> Tensor:
        if tensor.numel() == layer.weight.numel() and tensor.dtype == torch.float32 and tensor.data_ptr() not in own:
            found.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        function(torch.randn(3, 128, requires_grad=True))
    return found


def test_inside_under_autocast_the_sum_is_fp32_and_is_not_kept() -> None:
    layer = make_layer("inside")
    expected = layer.latent_matrix()
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(layer.latent_matrix(), expected)
        assert layer(torch.randn(3, 128)).dtype == torch.bfloat16
        assert kept(layer, layer) == []


@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs a C++ compiler")
@both
def test_compiled_it_is_one_graph_that_keeps_no_sum_either(placement: Any) -> None:
    torch._dynamo.reset()
    layer, x = make_layer(placement), torch.randn(3, 128)
    compiled: Any = torch.compile(layer, fullgraph=True)
    with torch.autocast("cpu", torch.bfloat16):
        ours, theirs = compiled(x), layer(x)
        assert kept(layer, compiled) == []
    torch.testing.assert_close(ours, theirs, rtol=0.02, atol=0.02)
    for mine, other in zip(gradients(layer, ours), gradients(layer, theirs), strict=True):
        torch.testing.assert_close(mine, other, rtol=0.05, atol=0.05 * float(other.abs().max()))


def test_what_is_stored_of_a_live_range_is_that_of_the_merged_weight() -> None:
    layer = make_layer("inside", MinMax)
    before = stored_state(nn.ModuleDict({"a": layer}))["a.scale"]
    with torch.no_grad():
        layer.weight.copy_(layer.latent_matrix())
    layer.adapter = None
    assert torch.equal(stored_state(nn.ModuleDict({"a": layer}))["a.scale"], before)


def test_a_frozen_bf16_weight_has_an_fp32_adapter_and_merges_exactly() -> None:
    layer = make_layer("inside", plain=nn.Linear(128, 64, dtype=torch.bfloat16))
    assert layer.adapter is not None and layer.adapter.lora_A.dtype == torch.float32
    values = layer.fake_quantized_weight().detach()
    with torch.no_grad():
        layer.weight.copy_(layer.latent_matrix())
    layer.adapter = None
    assert layer.weight.dtype == torch.bfloat16 and torch.equal(layer.fake_quantized_weight(), values)
    outside = make_layer("outside", plain=nn.Linear(128, 64, dtype=torch.bfloat16))
    assert outside(torch.randn(3, 128, dtype=torch.bfloat16)).dtype == torch.bfloat16


def test_dropout_is_the_branchs_own_and_off_in_evaluation() -> None:
    layer, x = make_layer("outside"), torch.randn(3, 128)
    layer.adapter = LoraAdapter(layer.matrix_shape, placement="outside", dropout=0.5)
    nn.init.normal_(layer.adapter.lora_A)
    nn.init.normal_(layer.adapter.lora_B)
    assert not torch.equal(layer(x), layer(x))
    assert torch.equal(layer.eval()(x), layer(x))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"placement": "beside"}, "placement 'beside' is unknown: use inside or outside"),
        ({"rank": 0}, "rank 0 is no rank: use 1 or more"),
        ({"rank": 65}, r"rank 65 does not fit a weight \(64, 128\): use 1 to 64"),
        ({"dropout": 0.1}, "set dropout: 0"),
        ({"dropout": 1.0, "placement": "outside"}, "use 0 to below 1"),
    ],
)
def test_settings_that_cannot_be_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LoraAdapter(torch.Size((64, 128)), **settings)


def test_nobody_takes_an_adapter_for_a_layer() -> None:
    model = toy_model("llama")
    names = [ref.name for ref in layer_refs(model)]
    name = "model.layers.0.self_attn.q_proj"
    apply_plan(model, QuantPlan({name: preset("W4A16_G32")}), MinMax)
    layer = model.get_submodule(name)
    layer.adapter = LoraAdapter(layer.matrix_shape)
    assert [ref.name for ref in layer_refs(model)] == names
