"""How gradients pass rounding: trust and attenuated by hand, for integers, minifloats and codebooks."""

from __future__ import annotations

import pytest
import torch

from kdqat.quant import LSQ, LSQPlus, MinMax
from kdqat.spec import QuantSpec
from kdqat.types import QParams
from tests.quant.specs import make_spec


def gradients(spec: QuantSpec, ste: str, steps: list[float], scale: float = 0.5, quantizer=LSQ) -> list[float]:
    """dL/dw for L = sum(w_hat), of weights that lie so many scales from zero."""
    weight = (torch.tensor([steps]) * scale).requires_grad_()
    made = quantizer(spec, weight.shape, ste=ste)
    if made.uses_stored_qparams:
        made.load_qparams(QParams(torch.full_like(made.scale, scale), torch.zeros_like(made.scale)))
    made(weight).sum().backward()
    return weight.grad[0].tolist()


INT4, E2M1, NF4 = make_spec(4), QuantSpec(format="e2m1"), QuantSpec(format="nf4")


@pytest.mark.parametrize(
    ("spec", "steps", "expected"),
    [
        (INT4, [0.0, 2.4, 7.0, 7.4, 7.6, -8.4, -8.6, 90.0], [1, 1, 1, 1, 0, 1, 0, 0]),
        (E2M1, [0.2, 4.8, 5.2, 6.0, 6.9, 7.1, -6.9, -7.1], [1, 1, 1, 1, 1, 0, 1, 0]),  # 4 and 6 are the last two
        (NF4, [0.9, 1.0, -0.9, -0.99], [1, 1, 1, 1]),
    ],
    ids=["int4", "e2m1", "nf4"],
)
def test_trust_stops_at_half_a_step_beyond_the_last_level(spec, steps, expected):
    assert gradients(spec, "trust", steps) == expected
    assert gradients(spec, "plain", steps) == [1] * len(steps)
    low, high = spec.qrange()
    assert gradients(spec, "clipped", steps) == [float(low <= x <= high) for x in steps]


@pytest.mark.parametrize(
    ("spec", "steps", "expected"),
    [
        # full within 3/4 of the way to the threshold, then straight down to 0 on it
        (INT4, [2.0, 2.3, 2.45, 2.5, 2.55, -2.45, 7.0, 7.4], [1, 1, 0.4, 0, 0.4, 0.4, 1, 0]),
        (E2M1, [2.4, 4.8, 4.7, 0.24, 0.2], [0.8, 0.8, 1, 0.16, 0.8]),  # steps of 1, 2 and 0.5
    ],
    ids=["int4", "e2m1"],
)
def test_attenuated_falls_to_zero_at_the_threshold(spec, steps, expected):
    assert gradients(spec, "attenuated", steps) == pytest.approx(expected, abs=1e-5)


def test_attenuation_knows_the_uneven_gaps_of_a_codebook():
    low, high = NF4.number.levels[14:16]
    middle, gap = (low + high) / 2, (high - low) / 2
    found = gradients(NF4, "attenuated", [middle - 0.1 * gap, middle - 0.3 * gap, middle + 0.1 * gap, high])
    assert found == pytest.approx([0.4, 1.0, 0.4, 1.0], abs=1e-4)


@pytest.mark.parametrize("quantizer", [LSQ, LSQPlus, MinMax])
@pytest.mark.parametrize("ste", ["plain", "clipped", "trust", "attenuated"])
def test_every_quantizer_with_an_ste_takes_all_of_them_and_rounds_alike(quantizer, ste):
    steps = [-7.0, 2.45, 5.0, 7.0]
    expected = 0.4 if ste == "attenuated" else 1.0
    assert gradients(INT4, ste, steps, 1.0, quantizer)[1] == pytest.approx(expected, abs=1e-5)
    with pytest.raises(ValueError, match="use plain, clipped, trust, attenuated"):
        quantizer(INT4, torch.Size((1, 4)), ste="soft")


def test_the_scale_learns_from_clipped_weights_under_every_ste_that_clips():
    """LSQ's gradient of the scale: the level outside, level - w/s inside."""
    for ste, expected in (("clipped", 7.0), ("attenuated", 7.0), ("trust", 7.0), ("plain", 7.0 - 9.0)):
        quantizer = LSQ(INT4, torch.Size((1, 1)), gradient_scale="none", ste=ste)
        quantizer(torch.tensor([[9.0]])).sum().backward()
        assert quantizer.scale.grad.item() == expected


@pytest.mark.parametrize("scale_dtype", ["float32", "float16", "e4m3"])
def test_fp8_and_fp16_round_values_but_never_gradients(scale_dtype):
    """A cast to fp8 and back casts the gradient too, and 1e-9 becomes 0."""
    quantizer = LSQ(QuantSpec(format="e4m3", scale_dtype=scale_dtype), torch.Size((1, 4)), gradient_scale="none")
    weight = torch.tensor([[0.3, -2.7, 5.1, 11.0]], requires_grad=True)
    quantizer(weight).backward(torch.full((1, 4), 1e-9))
    assert weight.grad.tolist() == [[pytest.approx(1e-9)] * 4]
    assert 0 < quantizer.scale.grad.abs().item() < 1e-8
