"""GPTQ: its error is the one it says, smaller than RTN's, and the student computes with the codes it found."""

from __future__ import annotations

import logging

import pytest
import torch
from torch import nn

from kdqat.allocate import Uniform
from kdqat.calibrate import Calibration, Hessian, stream_blocks
from kdqat.initializers import GPTQ, RTN
from kdqat.initializers.gptq_solve import factor, solve
from kdqat.models import ModelSource
from kdqat.quant import SEQ, FakeQuantLinear, Fixed, MinMax
from kdqat.quant.grouping import rotate
from kdqat.spec import LayerScheme, QuantSpec, preset
from kdqat.student import prepare_student
from tests.initializers.error import hidden_error
from tests.quant.specs import NESTED_GRIDS, SOME_GRIDS, make_spec, spec_id

TEXT = Calibration("kdqat:prose", seq_len=64, num_rows=4)
GROUPS = make_spec(3, "group", group_size=8)


def problem(width: int = 32, tokens: int = 200) -> tuple[torch.Tensor, torch.Tensor]:
    """A weight [24, I] and correlated inputs [T, I]."""
    generator = torch.Generator().manual_seed(0)
    mixing = torch.randn(width, width, generator=generator) / width**0.5 + 0.5 * torch.eye(width)
    return torch.randn(24, width, generator=generator), torch.randn(tokens, width, generator=generator) @ mixing


def solved(spec: QuantSpec, weight: torch.Tensor, inputs: torch.Tensor, **options):
    return solve(weight, inputs.T @ inputs, Fixed(spec, weight.shape), **options)


def output_error(values: torch.Tensor, weight: torch.Tensor, inputs: torch.Tensor, spec: QuantSpec) -> float:
    return float((inputs @ (rotate(values, spec.hadamard) - weight).T).square().sum())


def rtn(spec: QuantSpec, weight: torch.Tensor) -> torch.Tensor:
    quantizer = Fixed(spec, weight.shape)
    quantizer.load_qparams(quantizer.initial_qparams(quantizer.groups(weight)))
    return quantizer.groups(quantizer(weight)).reshape(weight.shape)


@pytest.mark.parametrize("options", [{}, {"act_order": True, "static_groups": True}, {"mse": True}, {"block_size": 5}])
@pytest.mark.parametrize("spec", [GROUPS, make_spec(4), make_spec(2, "group", symmetric=False)], ids=spec_id)
def test_the_accumulated_column_error_is_the_output_error_under_the_damped_hessian(spec, options):
    weight, inputs = problem()
    found = solved(spec, weight, inputs, damping=0.02, **options)
    hessian = (inputs.T @ inputs).double()
    hessian += 0.02 * hessian.diagonal().mean() * torch.eye(32)
    lost = (found.values - weight).double()
    assert found.error == pytest.approx(float((lost @ hessian * lost).sum()), rel=1e-4)


def test_the_factor_is_upper_triangular_and_inverts_the_hessian():
    _, inputs = problem()
    upper, damped = factor(inputs.T @ inputs, 0.01)
    assert torch.equal(upper, upper.triu())
    torch.testing.assert_close(upper.double().T @ upper.double() @ damped, torch.eye(32).double(), rtol=0, atol=1e-4)


@pytest.mark.parametrize("spec", [s for s in SOME_GRIDS + NESTED_GRIDS if s.format != "int1"], ids=spec_id)
def test_on_correlated_inputs_the_output_error_is_below_rtns_on_every_grid(spec):
    """But int1 with a zero point, whose groups chase what the groups before them lost."""
    weight, inputs = problem()
    found = solved(spec, weight, inputs)
    theirs = output_error(rtn(spec, weight), weight, inputs, spec)
    assert output_error(found.values, weight, inputs, spec) < 0.95 * theirs


def test_without_correlation_it_is_rtn():
    weight, _ = problem()
    found = solve(weight, torch.eye(32), Fixed(make_spec(4), weight.shape))
    assert torch.equal(found.values, rtn(make_spec(4), weight))


def test_the_column_block_changes_speed_and_nothing_else():
    weight, inputs = problem(64)
    whole = solved(GROUPS, weight, inputs, block_size=64).values
    for block_size in (1, 8, 20, 128):  # groups of 8 stay whole: 20 becomes 16
        torch.testing.assert_close(solved(GROUPS, weight, inputs, block_size=block_size).values, whole)


def test_a_group_gets_its_scale_from_the_weights_as_compensated_or_from_those_given():
    weight, inputs = problem()
    quantizer = Fixed(GROUPS, weight.shape)
    given = quantizer.as_stored(quantizer.initial_qparams(quantizer.groups(weight))).scale
    static, found = (solved(GROUPS, weight, inputs, static_groups=static).qparams.scale for static in (True, False))
    assert torch.equal(static, given)
    assert torch.equal(found[:, 0], given[:, 0]) and not torch.isclose(found[:, 1:], given[:, 1:]).all()


def test_scales_with_a_second_level_are_those_of_the_weight_as_given():
    weight, inputs = problem()
    for spec in NESTED_GRIDS:
        quantizer = Fixed(spec, weight.shape)
        quantizer.load_qparams(quantizer.initial_qparams(quantizer.groups(weight)))
        assert torch.equal(solved(spec, weight, inputs).qparams.scale, quantizer.scale)


def test_inputs_that_are_always_zero_round_to_nearest_and_disturb_nobody():
    spec, (weight, inputs) = make_spec(4), problem()
    weight[:, [3, 17]] *= 0.1  # so that the scales are those of the other columns
    inputs[:, [3, 17]] = 0
    alive = [i for i in range(32) if i not in (3, 17)]
    found = solved(spec, weight, inputs).values
    assert torch.equal(found[:, [3, 17]], rtn(spec, weight)[:, [3, 17]])
    torch.testing.assert_close(found[:, alive], solved(spec, weight[:, alive], inputs[:, alive]).values)
    assert solved(spec, weight, inputs, damping=0.0).values.isfinite().all()  # they do not make H singular


def test_few_tokens_make_a_singular_hessian_which_damping_mends():
    weight, inputs = problem(tokens=3)
    found = solved(make_spec(4), weight, inputs)
    assert found.values.isfinite().all()
    theirs = output_error(rtn(make_spec(4), weight), weight, inputs, GROUPS)
    assert output_error(found.values, weight, inputs, GROUPS) < theirs
    with pytest.raises(ValueError, match="singular under any damping"):
        factor(-(inputs.T @ inputs), 0.0)
    with pytest.raises(ValueError, match="not finite"):
        factor(inputs.T @ inputs * float("nan"), 0.01)


@pytest.mark.parametrize("scheme", ["W4A16_G32", "W3A16_ASYM_G32", "NVFP4_A16", "QUEST_W4A16"])
def test_the_stored_latent_weight_is_what_its_codes_mean(scheme):
    student = prepare_student(ModelSource("toy:llama"), Uniform(scheme), Fixed, GPTQ(), calibration=TEXT)
    for layer in student.layers.values():
        latent = layer.as_matrix(layer.weight)
        torch.testing.assert_close(layer.weight_fake_quantizer(latent), latent, rtol=1e-5, atol=1e-6)
        half = latent.bfloat16()
        assert torch.equal(layer.weight_fake_quantizer.codes(half.float()), layer.weight_fake_quantizer.codes(latent))


def test_gpt2s_transposed_weights_are_solved_as_matrices():
    plan = Uniform("W3A16_G32")
    source = ModelSource("toy:gpt2")
    errors = []
    for initializer in (RTN(), GPTQ()):
        student = prepare_student(source, plan, Fixed, initializer, calibration=TEXT)
        errors.append(hidden_error(student, TEXT))
    assert errors[1] < 0.8 * errors[0]


def test_a_block_is_solved_on_what_the_quantized_blocks_before_it_give():
    """Its second block, solved once more by hand on the inputs of the finished student."""
    student = prepare_student(ModelSource("toy:llama"), Uniform("W2A16_G32"), Fixed, GPTQ(), calibration=TEXT)
    original = ModelSource("toy:llama").load_model()
    name = "model.layers.1.self_attn.k_proj"
    batches, hessian = TEXT.batches(student.tokenizer), Hessian()
    calls = list_calls(student.split, batches, name, hessian)
    assert calls == 2
    layer = student.layers[name]
    quantizer = Fixed(layer.weight_fake_quantizer.spec, layer.matrix_shape)
    again = solve(original.get_submodule(name).weight.data, hessian.matrix, quantizer)
    assert (again.values == layer.weight).float().mean() > 0.99


def list_calls(split, batches, name, hessian) -> int:
    """Blocks run; the Hessian hears `name`."""
    count = 0
    for call in stream_blocks(split, batches, sequential=True):
        count += call.index is not None
        if name.startswith(call.prefix + ".") and call.prefix:
            call.run(on_input={name: hessian.update})
    return count


def test_embeddings_and_a_head_tied_to_them_round_to_nearest_and_it_is_said(caplog):
    plan = Uniform("W4A16_G32", embeddings="W4A16_G32", ignore=[])
    with caplog.at_level(logging.WARNING):
        student = prepare_student(ModelSource("toy:llama"), plan, Fixed, GPTQ(), calibration=TEXT)
    assert "GPTQ rounds layer model.embed_tokens to nearest" in caplog.text and "layer lm_head" in caplog.text
    original = ModelSource("toy:llama").load_model()
    assert torch.equal(student.layers["lm_head"].weight, original.lm_head.weight)


def test_experts_and_convolutions_are_refused_by_name():
    with pytest.raises(
        ValueError, match=r"layer 'model\.layers\.0\.mlp\.experts\.gate_up_proj' is one weight of fused"
    ):
        prepare_student(ModelSource("toy:mixtral"), Uniform("W4A16_G32"), Fixed, GPTQ(), calibration=TEXT)
    layer = FakeQuantLinear.wrap(nn.Linear(32, 4), preset("W4A16_G32"), Fixed)
    with pytest.raises(ValueError, match="16 features and its weight 32 columns, as in a convolution: use MSEGrid"):
        GPTQ()._initialize(layer, torch.eye(16))


def test_quantizers_without_scales_of_their_own_and_senseless_arguments_are_refused():
    with pytest.raises(ValueError, match=r"layer model\.layers\.0\.self_attn\.q_proj: MinMax recomputes"):
        prepare_student(ModelSource("toy:llama"), Uniform("W4A16_G32"), MinMax, GPTQ(), calibration=TEXT)
    with pytest.raises(ValueError, match="static_groups: true"):
        GPTQ(act_order=True)
    for bad in ({"damping": -1}, {"block_size": 0}):
        with pytest.raises(ValueError, match="GPTQ needs damping"):
            GPTQ(**bad)


def test_seq_starts_from_its_own_ranges():
    spec = QuantSpec(format="int2", zero_point="half")
    weight, inputs = problem()
    found = solve(weight, inputs.T @ inputs, SEQ(spec, weight.shape))
    torch.testing.assert_close(found.qparams.scale.squeeze(), weight.abs().amax(1) / 2)
    assert LayerScheme(weight=spec)  # a scheme of its own
