"""Every number format: its codes, its levels, and rounding to the nearest one against brute force, torch and papers."""

from __future__ import annotations

import math

import pytest
import torch

from kdqat.quant.formats import decode, encode, grid_of, half_gap, nearest
from kdqat.quant.functional import fake_quantize
from kdqat.spec import QuantSpec, number_format
from kdqat.types import QParams

MINIFLOATS = [f"e{e}m{m}" for e in range(1, 8) for m in range(8 - e)] + ["e4m3_finite", "e5m2_finite"]
CODEBOOK = (-1.5, -0.75, -0.1, 0.0, 0.2, 0.35, 2.0)
ASYM = {"symmetric": False, "zero_point": "integer"}
HALF = {"zero_point": "half"}
SPECS = [
    *(QuantSpec(format=name) for name in MINIFLOATS),
    QuantSpec(format="nf4"),
    QuantSpec(format="codebook", levels=CODEBOOK),
    QuantSpec(format="ternary"),
    QuantSpec(format="binary", **HALF),
    *(QuantSpec(format=f"int{bits}") for bits in range(2, 9)),
    *(QuantSpec(format=f"int{bits}", narrow=True) for bits in range(2, 9)),
    *(QuantSpec(format=f"int{bits}", **HALF) for bits in range(1, 9)),
    *(QuantSpec(format=f"int{bits}", **ASYM) for bits in range(1, 9)),
]
every_spec = pytest.mark.parametrize("spec", SPECS, ids=lambda s: f"{s.format}-{s.zero_point}{'-narrow' * s.narrow}")


def table(spec: QuantSpec) -> tuple[torch.Tensor, torch.Tensor]:
    """(code, value) of every code that is a number, from the format's definition alone, in float64."""
    if spec.number.kind == "integer":
        offset = 0.5 if spec.zero_point == "half" else 0.0
        low, high = (int(level - offset) for level in spec.qrange())
        codes = torch.arange(low, high + 1)
        return codes, codes.double() + offset
    values = torch.tensor(spec.number.code_values()).double()  # a codebook's levels are fp32 numbers
    codes = torch.arange(len(values))[values.isfinite()]
    return codes, values[codes]


@every_spec
def test_every_code_has_a_value_and_every_value_is_encoded_as_its_code(spec):
    codes, values = table(spec)
    decoded = decode(codes, spec)
    assert torch.equal(decoded.double(), values)
    again = encode(decoded, grid_of(spec))
    assert again.dtype == torch.int16 and torch.equal(again.long(), codes)  # the sign of a float's zero included


@every_spec
def test_a_format_has_as_many_codes_as_its_bits_say(spec):
    codes, values = table(spec)
    unused = 0
    if spec.format in ("e4m3", "e5m2"):  # NaN; NaN and infinities
        unused = {"e4m3": 2, "e5m2": 8}[spec.format]
    elif spec.format == "codebook" or spec.narrow:
        unused = 1
    expected = 3 if spec.format == "ternary" else 2**spec.bits - unused
    assert len(codes) == expected
    assert (values.min(), values.max()) == spec.qrange()


def preference(spec: QuantSpec, levels: torch.Tensor) -> torch.Tensor:
    """Which level wins a tie, the larger number: even integers, even codes on halves, even significands of floats."""
    if spec.number.kind == "integer":
        offset = 0.5 if spec.zero_point == "half" else 0.0
        return ((levels - offset) % 2 == 0).double()
    if spec.number.mantissa_bits == 0:  # significands 1 and 2 of a step: 1.5 is rounded up to 2, and 0.5 down to 0
        return torch.where(levels == 0, math.inf, levels.abs())
    codes, values = table(spec)
    even = {value: code % 2 == 0 for code, value in zip(codes.tolist(), values.tolist(), strict=True)}
    return torch.tensor([even[level] for level in levels.tolist()]).double()


def samples(levels: torch.Tensor, *, half: bool = False) -> torch.Tensor:
    """Thousands of values between the extremes, many of them small, and every threshold with its two neighbours.

    Halves: with values 1e-4 beside them, because fp32 rounds x - 1/2.
    """
    low, high, generator = levels.min().item(), levels.max().item(), torch.Generator().manual_seed(0)
    spread = torch.rand(3000, generator=generator) * (high - low) + low
    small = torch.randn(1000, generator=generator).mul(levels[levels > 0].min().item() * 2).clamp(low, high)
    middles = ((levels[1:] + levels[:-1]) / 2).float()
    up, down = (torch.nextafter(middles, torch.full_like(middles, end)) for end in (math.inf, -math.inf))
    if half:
        up, down = middles + 1e-4, middles - 1e-4
    return torch.cat((spread, small, middles, up, down))


@pytest.mark.parametrize("spec", [s for s in SPECS if s.number.kind != "codebook"], ids=lambda s: repr(s)[10:70])
def test_nearest_is_the_argmin_over_all_levels_with_ties_to_even(spec):
    levels = table(spec)[1].unique()
    x = samples(levels, half=spec.zero_point == "half")
    distance = (x.double().unsqueeze(1) - levels).abs()
    tied = distance == distance.amin(1, keepdim=True)
    assert (tied.sum(1) == 2).sum() >= len(levels) - 1
    chosen = torch.where(tied, preference(spec, levels), -1.0).argmax(1)
    assert torch.equal(nearest(x, grid_of(spec)).double(), levels[chosen])


@pytest.mark.parametrize("spec", [s for s in SPECS if s.number.kind == "codebook"], ids=lambda s: s.format)
def test_nearest_in_a_codebook_is_the_argmin_with_ties_down(spec):
    levels = table(spec)[1]
    x = samples(levels)
    middles = (levels.float()[1:] + levels.float()[:-1]) / 2  # thresholds are fp32 numbers, as in bitsandbytes
    clear = (x.unsqueeze(1) != middles).all(1)
    argmin = (x.double().unsqueeze(1) - levels).abs().argmin(1)
    close = (x.unsqueeze(1) - middles).abs().amin(1) < 1e-6  # a threshold moves by the rounding of fp32
    ours = nearest(x, grid_of(spec)).double()
    assert torch.equal(ours[~close], levels[argmin[~close]]) and (~close).sum() > 3900
    assert torch.equal(ours[~clear][: len(middles)], levels[:-1])  # exactly on a threshold: down
    assert torch.equal(nearest(middles + 1e-6, grid_of(spec)).double(), levels[1:])


@pytest.mark.parametrize(("name", "dtype"), [("e4m3", torch.float8_e4m3fn), ("e5m2", torch.float8_e5m2)])
def test_fp8_equals_torchs_cast_with_subnormals_and_saturation(name, dtype):
    spec = QuantSpec(format=name)
    grid = grid_of(spec)
    generator = torch.Generator().manual_seed(0)
    magnitudes = torch.exp2(torch.rand(20000, generator=generator) * 40 - 22)  # 2^-22 ... 2^18
    x = torch.cat((magnitudes, -magnitudes, torch.tensor([0.0, -0.0, 2.0**-9, 2.0**-10, 1.5 * 2.0**-10, 448.0, 464.0])))
    clamped = x.clamp(grid.low, grid.high)
    cast = clamped.to(dtype)
    ours = nearest(clamped, grid)
    assert torch.equal(ours, cast.float())
    assert torch.equal(encode(ours, grid).to(torch.uint8), cast.view(torch.uint8))
    assert ours[-1] == 448 if name == "e4m3" else ours.max() == 57344
    subnormal = ours.abs() < 2.0 ** grid.min_exponent.item()
    assert 0 < ours[subnormal & (ours != 0)].unique().numel() <= 2 * (2**spec.number.mantissa_bits - 1)
    every = torch.arange(256, dtype=torch.uint8).view(dtype).float()
    mine = torch.tensor(spec.number.code_values())
    assert torch.equal(every.nan_to_num(7e9, 8e9, -8e9), mine.nan_to_num(7e9, 8e9, -8e9))


X = torch.tensor([-2.5, -0.9, -0.33, -0.05, 0, 0.07, 0.2, 0.6, 1.1, 3])


@pytest.mark.parametrize(
    ("name", "bias", "expected"),
    [
        ("e1m2", 0.222392, [-2.571429, -0.857143, -0.428571, 0, 0, 0, 0, 0.428571, 1.285714, 3]),
        ("e2m1", 2.0, [-2, -1, -0.25, 0, 0, 0, 0.25, 0.5, 1, 3]),
        ("e3m0", 5.415037, [-3, -0.75, -0.375, -0.046875, 0, 0.046875, 0.1875, 0.75, 0.75, 3]),
    ],
)
def test_fp4_gives_the_golden_vectors_of_llm_fp4(name, bias, expected):
    """Largest magnitude 3. The paper's alpha~ = 2^-b~ is our scale / 2^bias: its grids have no bias of their own."""
    spec = QuantSpec(format=name)
    scale = torch.tensor([[[3 / spec.number.max_value]]])
    assert -math.log2(scale.item() / 2**spec.number.bias) == pytest.approx(bias, abs=1e-6)
    values = fake_quantize(X.reshape(1, 1, -1), QParams(scale, torch.zeros_like(scale)), grid_of(spec), spec)
    torch.testing.assert_close(values.flatten(), torch.tensor(expected), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("name", "grid"),
    [
        ("e1m2", [0, 0.5, 1, 1.5, 2, 2.5, 3, 3.5]),
        ("e2m1", [0, 1, 2, 3, 4, 6, 8, 12]),
        ("e3m0", [0, 2, 4, 8, 16, 32, 64, 128]),
        ("e2m2", [0, 0.5, 1, 1.5, 2, 2.5, 3, 3.5, 4, 5, 6, 7, 8, 10, 12, 14]),
        ("e3m1", [0, 1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192]),
    ],
)
def test_positive_grids_are_the_papers_in_its_units(name, grid):
    number = number_format(name)
    half = number.code_values()[: 2 ** (number.bits - 1)]
    assert [value * 2**number.bias for value in half] == grid


def test_the_half_gap_is_that_on_the_side_of_the_value_and_at_the_ends_that_to_the_only_neighbour():
    grid = grid_of(QuantSpec(format="codebook", levels=CODEBOOK))
    x = torch.tensor([-1.5, -1.4, 0.1, 0.3, 1.9, 2.0])
    expected = [0.375, 0.375, 0.1, 0.075, 0.825, 0.825]
    assert half_gap(x, nearest(x, grid), grid).tolist() == pytest.approx(expected)
    floats = grid_of(QuantSpec(format="e2m1"))
    x = torch.tensor([-6.0, 0.2, 1.1, 4.5, 6.0])
    assert half_gap(x, nearest(x, floats), floats).tolist() == [1.0, 0.25, 0.25, 1.0, 1.0]


def test_the_trust_ste_lets_codebooks_learn_half_a_gap_outside_on_both_sides_and_no_further():
    spec = QuantSpec(format="codebook", levels=CODEBOOK)
    x = torch.tensor([-9.0, -1.9, -1.8, -1.0, 1.0, 2.8, 2.9, 9.0], requires_grad=True)
    qparams = QParams(torch.ones(1, 1, 1), torch.zeros(1, 1, 1))
    fake_quantize(x.reshape(1, 1, -1), qparams, grid_of(spec), spec, "trust").sum().backward()
    assert x.grad.tolist() == [0, 0, 1, 1, 1, 1, 0, 0]


@every_spec
def test_gradients_of_values_and_scales_are_finite_for_every_way_through_rounding(spec):
    grid = grid_of(spec)
    high = spec.qrange()[1]
    x = (torch.randn(4, 2, 16, generator=torch.Generator().manual_seed(0)) * high * 0.5).requires_grad_()
    for ste in ("plain", "clipped", "trust", "attenuated"):
        scale = torch.full((4, 2, 1), 1.1, requires_grad=True)
        values = fake_quantize(x, QParams(scale, torch.zeros(4, 2, 1)), grid, spec, ste)
        upstream = torch.randn(values.shape, generator=torch.Generator().manual_seed(1))
        gradients = torch.autograd.grad(values, (x, scale), upstream)
        assert all(g.isfinite().all() and g.any() for g in gradients), ste
