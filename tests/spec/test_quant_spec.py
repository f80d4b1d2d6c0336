"""A spec refuses what no format holds and says what to do; its shapes and bits are counted by hand here."""

from __future__ import annotations

import dataclasses
import itertools

import pytest

from kdqat.spec import LayerScheme, QuantSpec

GROUP = {"format": "int4", "granularity": "group"}
ASYM = {"symmetric": False, "zero_point": "integer"}
MINIMUM = {"symmetric": False, "zero_point": "minimum"}


@pytest.mark.parametrize(
    ("fields", "remedy"),
    [
        ({"format": "int9"}, "use int1 ... int8"),
        ({"format": "int0"}, "use int1 ... int8"),
        ({"format": "INT4"}, "use int1 ... int8"),
        ({"format": "int4 "}, "use int1 ... int8"),
        ({"format": "int42"}, "use int1 ... int8"),
        ({"format": 4}, "use a name such as int4"),
        ({"format": "int4", "granularity": "row"}, "use tensor, channel, group, token, feature"),
        ({"format": "int4", "scale_rule": "mse"}, "use absmax, absmax_half, signed_max"),
        ({"format": "int4", "scale_dtype": "float64"}, "use float32, float16, bfloat16"),
        ({"format": "int4", "zero_point": "float", "symmetric": False}, "use none, half, integer, minimum"),
        (GROUP, "group_size goes with granularity='group', and only with it"),
        ({"format": "int4", "group_size": 32}, "group_size goes with granularity='group', and only with it"),
        (
            {"format": "int4", "granularity": "tensor", "group_size": 32},
            "group_size goes with granularity='group', and only with it",
        ),
        ({**GROUP, "group_size": 0}, "at least 1"),
        ({**GROUP, "group_size": -1}, "at least 1"),
        ({**GROUP, "group_size": "64"}, "whole number"),
        ({"format": "int4", "symmetric": False}, "symmetric=False with 'integer' or 'minimum'"),
        ({"format": "int4", "zero_point": "integer"}, "symmetric=True goes with zero_point 'none' or 'half'"),
        ({"format": "int4", "scale_rule": "absmax_half", **ASYM}, "needs symmetric=True"),
        ({"format": "int4", "scale_rule": "signed_max", **ASYM}, "needs symmetric=True"),
        ({"format": "int1"}, "use format binary, or symmetric=False"),
    ],
    ids=str,
)
def test_what_no_format_holds_is_refused_with_a_remedy(fields, remedy):
    with pytest.raises(ValueError, match=r".") as error:
        QuantSpec(**fields)
    assert remedy in str(error.value)


def test_every_other_combination_is_a_spec():
    made = 0
    for bits, granularity, symmetric, rule, dtype in itertools.product(
        range(1, 9),
        ("tensor", "channel", "group"),
        (True, False),
        ("absmax", "absmax_half", "signed_max"),
        ("float32", "float16", "bfloat16"),
    ):
        if (symmetric and bits == 1) or (not symmetric and rule != "absmax"):
            continue
        spec = QuantSpec(
            format=f"int{bits}",
            granularity=granularity,
            group_size=32 if granularity == "group" else None,
            symmetric=symmetric,
            scale_rule=rule,
            scale_dtype=dtype,
            zero_point="none" if symmetric else "integer",
        )
        assert spec.bits == bits
        made += 1
    assert made == (7 * 3 * 3 + 8 * 3) * 3


def test_positional_arguments_and_later_changes_are_refused():
    with pytest.raises(TypeError):
        QuantSpec("int4")
    spec, scheme = QuantSpec(format="int4"), LayerScheme(weight=QuantSpec(format="int4"))
    with pytest.raises(dataclasses.FrozenInstanceError):
        spec.format = "int8"
    with pytest.raises(dataclasses.FrozenInstanceError):
        scheme.weight = None
    assert hash(scheme) == hash(LayerScheme(weight=QuantSpec(format="int4")))


@pytest.mark.parametrize(
    ("bits", "symmetric", "expected"),
    [
        (8, True, (-128, 127)),
        (4, True, (-8, 7)),
        (3, True, (-4, 3)),
        (2, True, (-2, 1)),
        (8, False, (0, 255)),
        (4, False, (0, 15)),
        (2, False, (0, 3)),
        (1, False, (0, 1)),
    ],
)
def test_the_code_range_uses_every_code_of_its_width(bits, symmetric, expected):
    zero_point = "none" if symmetric else "integer"
    spec = QuantSpec(format=f"int{bits}", symmetric=symmetric, zero_point=zero_point)
    other = QuantSpec(format="int8", symmetric=symmetric, zero_point=zero_point)
    assert spec.qrange() == other.qrange(bits) == expected
    assert expected[1] - expected[0] + 1 == 2**bits


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"format": "int4", "narrow": True}, (-7, 7)),
        ({"format": "int8", "narrow": True}, (-127, 127)),
        ({"format": "int2", "zero_point": "half"}, (-1.5, 1.5)),
        ({"format": "int1", "zero_point": "half"}, (-0.5, 0.5)),
        ({"format": "int4", "symmetric": False, "zero_point": "minimum"}, (0, 15)),
        ({"format": "ternary"}, (-1, 1)),
        ({"format": "binary", "zero_point": "half"}, (-0.5, 0.5)),
        ({"format": "e2m1"}, (-6, 6)),
        ({"format": "e4m3"}, (-448, 448)),
        ({"format": "e4m3_finite"}, (-480, 480)),
        ({"format": "e5m2"}, (-57344, 57344)),
        ({"format": "nf4"}, (-1, 1)),
        ({"format": "codebook", "levels": [-0.5, 0, 2]}, (-0.5, 2)),
    ],
    ids=str,
)
def test_the_range_goes_from_the_lowest_to_the_highest_level(fields, expected):
    assert QuantSpec(**fields).qrange() == expected


@pytest.mark.parametrize("bits", [0, 9, -1])
def test_a_width_that_no_integer_format_has_gives_no_range(bits):
    with pytest.raises(ValueError, match="1 to 8"):
        QuantSpec(format="int4", **ASYM).qrange(bits)


def test_one_bit_gives_no_symmetric_range():
    with pytest.raises(ValueError, match="symmetric=False"):
        QuantSpec(format="int4").qrange(1)


def test_the_shape_of_scales_says_who_shares_them_and_is_never_scalar():
    assert QuantSpec(format="int4", granularity="tensor").qparam_shape((12, 64)) == (1,)
    assert QuantSpec(format="int4").qparam_shape((12, 64)) == (12, 1, 1)
    assert QuantSpec(**GROUP, group_size=16).qparam_shape((12, 64)) == (12, 4, 1)
    assert QuantSpec(**GROUP, group_size=64).qparam_shape((12, 64)) == (12, 1, 1)


def test_a_group_size_that_does_not_divide_is_refused_and_the_message_names_those_that_do():
    """SmolLM2 is 576 wide: the popular 128 does not fit."""
    with pytest.raises(ValueError, match="group_size 128 does not divide input width 576") as error:
        QuantSpec(**GROUP, group_size=128).qparam_shape((192, 576))
    assert "use group_size 32 or 64" in str(error.value)
    assert QuantSpec(**GROUP, group_size=64).qparam_shape((192, 576)) == (192, 9, 1)
    with pytest.raises(ValueError, match="use granularity='channel'"):
        QuantSpec(**GROUP, group_size=32).qparam_shape((8, 7))


@pytest.mark.parametrize(
    ("fields", "bits"),
    [
        ({"format": "int4", "scale_dtype": "float16"}, 8 * 64 * 4 + 8 * 16),
        ({"format": "int4"}, 8 * 64 * 4 + 8 * 32),
        ({"format": "int8", "granularity": "tensor", "scale_dtype": "bfloat16"}, 8 * 64 * 8 + 16),
        ({**GROUP, "group_size": 32, "scale_dtype": "float16"}, 8 * 64 * 4 + 16 * 16),
        ({**GROUP, "group_size": 32, "scale_dtype": "float16", **ASYM}, 8 * 64 * 4 + 16 * (16 + 4)),
        ({**GROUP, "format": "int2", "group_size": 16, **ASYM}, 8 * 64 * 2 + 32 * (32 + 2)),
        ({**GROUP, "group_size": 32, "scale_dtype": "float16", **MINIMUM}, 8 * 64 * 4 + 16 * (16 + 16)),
        ({**GROUP, "format": "e2m1", "group_size": 32, "scale_dtype": "e8m0"}, 8 * 64 * 4 + 16 * 8),
        ({**GROUP, "format": "e2m1", "group_size": 16, "scale_dtype": "e4m3_global"}, 8 * 64 * 4 + 32 * 8 + 32),
        ({**GROUP, "format": "nf4", "group_size": 64, "scale_dtype": "double"}, 8 * 64 * 4 + 8 * 8 + 32 + 32),
        ({**GROUP, "group_size": 8, "scale_dtype": "k6", **MINIMUM}, 8 * 64 * 4 + 64 * 12 + 8 * 32),
        ({"format": "ternary", "scale_dtype": "float16"}, 8 * 64 * 8 / 5 + 8 * 16),
    ],
    ids=str,
)
def test_stored_bits_count_codes_scales_and_zero_points(fields, bits):
    assert QuantSpec(**fields).storage_bits((8, 64)) == bits
