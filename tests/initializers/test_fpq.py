"""FPQ: searched formats and scales lose no more than min-max; the pre-shift costs nothing where exponents are free."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from kdqat.allocate import Uniform
from kdqat.calibrate import Calibration
from kdqat.initializers import FPQ, RTN
from kdqat.initializers.fpq import range_checked
from kdqat.initializers.fpq_search import (
    Target,
    activation_candidates,
    candidate_specs,
    coordinate_search,
    quantized,
    scale_candidates,
    search_weight,
    weight_candidates,
)
from kdqat.models import ModelSource
from kdqat.quant import LSQ, Fixed
from kdqat.quant.formats import grid_of
from kdqat.spec import LayerScheme, QuantSpec, preset
from kdqat.student import load_student, prepare_student, save_student

WEIGHT = QuantSpec(format="e2m1")
TENSOR = QuantSpec(format="e2m1", granularity="tensor")
SHIFTED = QuantSpec(format="e2m1", granularity="feature", scale_rule="pre_shift")
TEXT = Calibration("kdqat:prose", seq_len=32, num_rows=4, max_tokens=128)
GIVEN = ("range", 12, (0.3, 1.2))


def layer(outliers: float = 1.0) -> tuple[torch.Tensor, Target]:
    """A weight [24, 32] and what its output is measured on; one input feature is `outliers` times larger."""
    generator = torch.Generator().manual_seed(0)
    weight, inputs = torch.randn(24, 32, generator=generator), torch.randn(200, 32, generator=generator)
    inputs[:, 3] *= outliers
    return weight, Target(inputs, inputs @ weight.T)


def output_error(weight: torch.Tensor, inputs: torch.Tensor, target: Target) -> float:
    return float((inputs @ weight.T - target.outputs).square().sum())


def at(x: torch.Tensor, spec: QuantSpec, scale: torch.Tensor) -> torch.Tensor:
    return quantized(x, scale, spec, grid_of(spec))


def fpq_student(scheme: str, **kwargs):
    initializer = FPQ(num_candidates=6, num_rounds=2, max_tokens=64, **kwargs)
    return prepare_student(ModelSource("toy:llama"), Uniform(scheme), Fixed, initializer, calibration=TEXT)


def test_four_bits_have_three_splits_and_eight_bits_the_five_of_the_authors_code():
    assert [s.format for s in candidate_specs(WEIGHT, True)] == ["e3m0", "e2m1", "e1m2"]
    eight = candidate_specs(replace(TENSOR, format="e4m3_finite"), True)
    assert [s.format for s in eight] == ["e5m2_finite", "e4m3_finite", "e3m4", "e2m5", "e1m6"]
    assert candidate_specs(WEIGHT, False) == [WEIGHT]


def test_the_papers_search_multiplies_the_exponent_bias_and_ours_the_range():
    scale = torch.tensor([[[0.25]], [[4.0]]])
    bias = scale_candidates(scale, WEIGHT, "bias", 100, (0.01, 1.2))
    assert len(bias) == 101 and torch.equal(bias[0], scale)
    exponents = 1 - torch.log2(torch.stack(bias[1:])).flatten(1)  # b~ = bias - log2 scale: 3 and -1
    expected = torch.linspace(0.01, 1.2, 101)[:100].unsqueeze(1) * torch.tensor([3.0, -1.0])
    torch.testing.assert_close(exponents, expected, rtol=1e-4, atol=1e-4)
    ranges = torch.stack(scale_candidates(scale, WEIGHT, "range", 5, (0.3, 1.2))[1:]).flatten(1) / scale.flatten()
    torch.testing.assert_close(ranges[:, 0], ranges[:, 1])
    torch.testing.assert_close(ranges[[0, 4], 0], torch.tensor([0.3, 1.2]))


def test_the_error_a_search_reports_is_the_error_of_the_layers_output():
    weight, target = layer()
    seen = at(target.inputs, TENSOR, target.inputs.abs().amax().reshape(1) / 6)
    for choice in search_weight(weight, seen, target, weight_candidates(weight, candidate_specs(WEIGHT, True), *GIVEN)):
        true = output_error(at(weight, choice.spec, choice.scale), seen, target)
        assert choice.error == pytest.approx(true, rel=1e-3)


def test_no_channel_is_worse_than_at_its_full_range():
    weight, target = layer()
    candidates = weight_candidates(weight, [WEIGHT], *GIVEN)
    chosen = search_weight(weight, target.inputs, target, candidates)[0]
    full = at(weight, WEIGHT, candidates[0][1][0])
    by_channel = [((target.inputs @ w.T - target.outputs) ** 2).sum(0) for w in (at(weight, *chosen[:2]), full)]
    assert (by_channel[0] <= by_channel[1] * 1.0001).all() and (by_channel[0] < by_channel[1]).any()


@pytest.mark.parametrize("outliers", [1.0, 30.0])
def test_coordinate_search_beats_min_max_and_the_pre_shift_beats_both_where_features_differ(outliers):
    weight, target = layer(outliers)
    weights = weight_candidates(weight, candidate_specs(WEIGHT, True), *GIVEN)
    errors = {}
    for name, spec in {"tensor": TENSOR, "shift": SHIFTED}.items():
        activations = activation_candidates(target.inputs, candidate_specs(spec, True), *GIVEN)
        chosen = coordinate_search(weight, target, weights, activations, WEIGHT, spec, num_rounds=3)
        parts = [at(x, choice.spec, choice.scale) for x, choice in zip((weight, target.inputs), chosen, strict=True)]
        errors[name] = output_error(*parts, target)
        assert chosen[1].error == pytest.approx(errors[name], rel=1e-3)
    full = weight_candidates(weight, [WEIGHT], *GIVEN)[0][1][0]
    minmax = at(target.inputs, TENSOR, target.inputs.abs().amax().reshape(1) / 6)
    assert errors["tensor"] < output_error(at(weight, WEIGHT, full), minmax, target)
    if outliers > 1:
        assert errors["shift"] < 0.5 * errors["tensor"]


@pytest.mark.parametrize("scheme", ["FP4_W4A4", "FP4_W4A4_PRE_SHIFT", "FP4_W4A8", "FP8_W8A8", "FP4_E2M1"])
def test_a_whole_model_is_searched_and_its_plan_names_the_chosen_formats(scheme, tmp_path):
    student = fpq_student(scheme)
    bits = preset(scheme).weight.bits
    for name, built in student.layers.items():
        assert (
            student.plan[name].weight == built.weight_fake_quantizer.spec
            and built.weight_fake_quantizer.spec.bits == bits
        )
        assert built.weight_fake_quantizer.scale.shape == (built.matrix_shape[0], 1, 1)
    save_student(student, tmp_path)
    again = load_student(tmp_path)
    assert again.plan == student.plan
    for name, built in student.layers.items():
        x = torch.randn(3, built.input_width)
        assert torch.equal(built(x), again.layers[name](x))


def test_pre_shifted_activations_keep_shifts_that_are_powers_of_two():
    student = fpq_student("FP4_W4A4_PRE_SHIFT")
    for built in student.layers.values():
        quantizer = built.activation_fake_quantizer
        exponents = -torch.log2(quantizer.scale / quantizer.scale.amax())
        assert torch.equal(exponents, exponents.round())
        assert exponents.max() <= 2**quantizer.spec.number.exponent_bits - 1


def test_range_checked_weights_have_shifted_codes_that_exist():
    student = fpq_student("FP4_W4A4_PRE_SHIFT", mode="range_checked")
    for built in student.layers.values():
        quantizer, activation = built.weight_fake_quantizer, built.activation_fake_quantizer
        assert torch.equal(built.fake_quantized_weight(), built.weight)  # it lies on its grid already
        shifts = (activation.scale / activation.scale.amax()).reshape(-1)
        folded = built.weight / quantizer.scale.reshape(-1, 1) * shifts
        torch.testing.assert_close(at(folded, unrounded(quantizer), torch.ones(len(folded), 1, 1)), folded)
        assert torch.equal(
            range_checked(built.weight, quantizer, activation.scale / activation.scale.amax()), built.weight
        )


def unrounded(quantizer) -> QuantSpec:
    return replace(quantizer.spec, scale_dtype="float32")


def test_an_embedding_is_searched_by_the_error_of_its_own_table():
    source, e2m1 = ModelSource("toy:llama"), {"weight": {"format": "e2m1"}}
    search = FPQ(num_candidates=3, max_tokens=32)
    with pytest.raises(ValueError, match="tied to lm_head, which stays in full precision"):
        plan = Uniform("FP4_W4A4", embeddings=e2m1, ignore=["lm_head"])
        prepare_student(source, plan, Fixed, search, calibration=TEXT)
    with pytest.raises(ValueError, match="both must have the same weight scheme"):
        plan = Uniform("FP4_W4A4", embeddings={"weight": {"format": "e3m0"}}, ignore=[])
        prepare_student(source, plan, Fixed, search, calibration=TEXT)
    plan = Uniform("FP4_W4A4", embeddings=e2m1, ignore=[])
    student = prepare_student(source, plan, Fixed, search, calibration=TEXT)
    table, head = student.layers["model.embed_tokens"], student.layers["lm_head"]
    assert table.weight_fake_quantizer is head.weight_fake_quantizer  # stored once, so searched as one


@pytest.mark.parametrize(
    ("scheme", "message"),
    [
        ("W4A16", "weight: FPQ searches minifloats by tensor or channel, not int4 by channel"),
        ("MXFP4_A16", "not e2m1 by group"),
        (
            LayerScheme(weight=WEIGHT, activation=QuantSpec(format="int8", granularity="tensor")),
            "activation: FPQ searches",
        ),
    ],
)
def test_what_it_cannot_search_is_refused_by_name(scheme, message):
    with pytest.raises(ValueError, match=f"layer model.layers.0.self_attn.q_proj: .*{message}"):
        prepare_student(ModelSource("toy:llama"), Uniform(scheme), LSQ, FPQ(max_tokens=8), calibration=TEXT)


def test_calibration_is_asked_for_where_it_is_missing():
    for scheme, initializer in (("FP4_W4A16", FPQ()), ("W8A8_STATIC", RTN()), ("FP4_W4A4", RTN())):
        scheme = "FP4_E2M1" if scheme == "FP4_W4A16" else scheme
        with pytest.raises(ValueError, match=r"model\.calibration is missing"):
            prepare_student(ModelSource("toy:llama"), Uniform(scheme), Fixed, initializer)


@pytest.mark.parametrize("bad", [{"num_rounds": 0}, {"search": "x"}, {"gammas": (1.0, 0.5)}, {"mode": "x"}])
def test_numbers_that_make_no_search_are_refused(bad):
    with pytest.raises(ValueError, match="FPQ"):
        FPQ(**bad)
