"""No matmul weight stays in full precision unless somebody asked for it: Conv1D and fused experts are seen too."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from kdqat.allocate import Uniform
from kdqat.initializers import RTN
from kdqat.models import ModelSource, layer_refs
from kdqat.models.toy import toy_model
from kdqat.quant import LSQ, FakeQuantConv1D, apply_plan, matmul_weights, measure_coverage, require_coverage
from kdqat.spec import LayerScheme, QuantPlan
from kdqat.student import prepare_student
from tests.quant.specs import make_spec

W4 = LayerScheme(weight=make_spec(4))


class Experts(nn.Module):
    """Two fused experts: 3-D parameters and no nn.Linear anywhere."""

    def __init__(self) -> None:
        super().__init__()
        self.gate_up_proj, self.down_proj = nn.Parameter(torch.zeros(2, 8, 16)), nn.Parameter(torch.zeros(2, 8, 8))


def test_a_matmul_weight_is_everything_but_embeddings_norms_biases_and_scales():
    assert matmul_weights("a.b", nn.Linear(3, 5)) == {"a.b": (5, 3)}
    assert matmul_weights("a.b", nn.Conv2d(3, 4, 2)) == {"a.b": (4, 12)}  # as a matrix
    assert matmul_weights("a.b", Experts()) == {"a.b": (2, 8, 16)}  # of no known kind: in its own shape
    assert matmul_weights("", nn.Linear(3, 5)) == {"": (5, 3)}
    for module in (
        nn.Embedding(9, 4),
        nn.LayerNorm(4),
        LSQ(W4.weight, torch.Size((8, 8))),
        nn.Sequential(nn.Linear(3, 5)),
    ):
        assert matmul_weights("a", module) == {}


def test_weights_are_sorted_into_quantized_ignored_and_missed_and_counted():
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 4), Experts(), nn.LayerNorm(4), nn.Embedding(50, 8))
    apply_plan(model, QuantPlan({"0": W4}), LSQ)
    coverage = measure_coverage(model, {"1"}.__contains__)
    assert (coverage.quantized, coverage.ignored, coverage.missed) == (64, {"1": 32}, {"2": 256 + 128})
    assert coverage.share_full_precision == pytest.approx((32 + 384) / (64 + 32 + 384))
    with pytest.raises(ValueError, match=r"80\.0 % of the matmul weights .*: 2; put them into the plan"):
        require_coverage(coverage)
    require_coverage(measure_coverage(model, {"1", "2"}.__contains__))


def test_a_planned_layer_without_a_weight_spec_counts_as_full_precision():
    model = apply_plan(nn.Sequential(nn.Linear(8, 8)), QuantPlan({"0": LayerScheme()}), LSQ)
    assert measure_coverage(model, lambda name: False).missed == {"0": 64}


def test_the_text_for_the_log_says_the_share_and_the_names():
    model = apply_plan(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)), QuantPlan({"0": W4}), LSQ)
    text = str(measure_coverage(model, {"1"}.__contains__))
    assert text == "50.0 % of the matmul weights are fake-quantized; left in full precision: 1"


@pytest.mark.parametrize("tie", [True, False])
def test_a_head_is_counted_once_as_the_linear_it_is_tied_or_not(tie):
    model = toy_model("llama", tie=tie)
    plan = Uniform("W4A16").allocate(layer_refs(model))
    coverage = measure_coverage(apply_plan(model, plan, LSQ), set(plan.ignored).__contains__)
    block = 2 * 64 * 64 + 2 * 32 * 64 + 3 * 64 * 128  # q o, k v, gate up down
    assert coverage.quantized == 2 * block
    assert coverage.ignored == {"lm_head": 260 * 64} and not coverage.missed


def test_gpt2s_conv1d_layers_are_quantized_as_the_transposed_linears_they_are():
    student = prepare_student(ModelSource("toy:gpt2"), Uniform("W4A16_G32"), LSQ, RTN())
    assert len(student.layers) == 8 and all(type(layer) is FakeQuantConv1D for layer in student.layers.values())
    assert student.coverage.quantized == 2 * (64 * 192 + 64 * 64 + 2 * 64 * 128) and not student.coverage.missed
    layer = student.layers["transformer.h.0.attn.c_attn"]
    assert layer.weight.shape == (64, 192) and layer.matrix_shape == (192, 64)
    assert layer.weight_fake_quantizer.scale.shape == (192, 2, 1)  # groups of inputs, not of outputs


def test_conv1d_layers_can_be_ignored_on_purpose_and_are_then_counted():
    model = toy_model("gpt2", tie=False)
    plan = Uniform("W4A16", ignore=["transformer.h.*"]).allocate(layer_refs(model))
    coverage = measure_coverage(apply_plan(model, plan, LSQ), set(plan.ignored).__contains__)
    require_coverage(coverage)
    assert coverage.quantized == 260 * 64
    assert sum(coverage.ignored.values()) == 2 * (64 * 192 + 64 * 64 + 2 * 64 * 128)


def test_conv1d_layers_that_nobody_planned_or_ignored_stop_the_preparation():
    model = toy_model("gpt2", tie=False)
    apply_plan(model, QuantPlan({"lm_head": W4}), LSQ)
    with pytest.raises(ValueError, match=r"transformer\.h\.0\.attn\.c_attn and 7 more"):
        require_coverage(measure_coverage(model, lambda name: False))
