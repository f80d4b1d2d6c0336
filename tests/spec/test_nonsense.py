"""What no format holds: every nonsense combination of a spec, a scheme or a KV cache is one error with a remedy."""

from __future__ import annotations

import pytest

from kdqat.spec import KVCacheScheme, LayerScheme, QuantSpec, number_format, parse_kv_cache, parse_scheme

INT4, E2M1, NF4 = {"format": "int4"}, {"format": "e2m1"}, {"format": "nf4"}
GROUP = {"granularity": "group", "group_size": 32}
ASYM = {"symmetric": False, "zero_point": "integer"}
MINIMUM = {"symmetric": False, "zero_point": "minimum"}
HALF = {"zero_point": "half"}


@pytest.mark.parametrize(
    ("name", "levels", "message"),
    [
        ("e0m3", None, "a minifloat such as e2m1"),  # one exponent bit at least
        ("e2m7", None, "at most 8 bits, the sign included"),
        ("e4m4", None, "at most 8 bits, the sign included"),
        ("E2M1", None, "is unknown"),
        ("fp4", None, "is unknown"),
        ("e2m1_finite", None, "only e4m3 and e5m2 have codes that are no numbers; leave _finite out"),
        ("codebook", None, "needs levels: 2 to 256 different numbers in ascending order"),
        ("codebook", (0.0,), "2 to 256"),
        ("codebook", tuple(map(float, range(257))), "2 to 256"),
        ("codebook", (1.0, 0.0), "ascending"),
        ("codebook", (0.0, 0.0, 1.0), "different numbers"),
        ("codebook", (0.0, float("inf")), "levels must be finite"),
        ("nf4", (0.0, 1.0), "levels go with format 'codebook', not with 'nf4'"),
        ("int4", (0.0, 1.0), "levels go with format 'codebook', not with 'int4'"),
    ],
    ids=str,
)
def test_a_number_format_that_is_none_is_refused(name, levels, message):
    for make in (lambda: number_format(name, levels), lambda: QuantSpec(format=name, levels=levels)):
        with pytest.raises(ValueError, match=r".") as error:
            make()
        assert message in str(error.value)


@pytest.mark.parametrize(
    ("fields", "remedy"),
    [
        ({**E2M1, **ASYM}, "format e2m1 is symmetric: leave symmetric, zero_point and narrow at their defaults"),
        ({**E2M1, **HALF}, "format e2m1 is symmetric"),
        ({**E2M1, "narrow": True}, "format e2m1 is symmetric"),
        ({**NF4, **MINIMUM}, "format nf4 is symmetric"),
        ({"format": "codebook", "levels": [0, 1], **ASYM}, "format codebook is symmetric"),
        ({**INT4, **ASYM, "narrow": True}, "narrow=True is for symmetric integers"),
        ({**INT4, **HALF, "narrow": True}, "narrow=True is for symmetric integers"),
        ({"format": "ternary", "narrow": True}, "narrow=True is for symmetric integers"),
        ({"format": "ternary", **HALF}, "binary goes with zero_point='half', ternary with zero_point='none'"),
        ({"format": "ternary", **ASYM}, "binary goes with zero_point='half', ternary with zero_point='none'"),
        ({"format": "binary"}, "binary goes with zero_point='half'"),
        ({"format": "binary", **MINIMUM}, "binary goes with zero_point='half'"),
        ({**INT4, **HALF, "symmetric": False}, "symmetric=False with 'integer' or 'minimum'"),
        ({**INT4, **MINIMUM, "symmetric": True}, "symmetric=True goes with zero_point 'none' or 'half'"),
        ({**INT4, **MINIMUM, "scale_rule": "mean"}, "scale_rule='mean' needs symmetric=True"),
        ({**E2M1, "scale_rule": "absmax_half"}, "is for integers; floats and codebooks use 'absmax' or 'mx'"),
        ({**E2M1, "scale_rule": "signed_max"}, "is for integers"),
        ({**NF4, "scale_rule": "gaussian"}, "is for integers"),
        ({**INT4, "scale_rule": "gaussian"}, "goes with zero_point='half' (QuEST)"),
        ({**INT4, "scale_rule": "mx"}, "is for minifloats such as e2m1"),
        ({**NF4, "scale_rule": "mx"}, "is for minifloats such as e2m1"),
        ({**INT4, "granularity": "feature", "scale_rule": "pre_shift"}, "is for minifloats such as e2m1"),
        ({**E2M1, "scale_rule": "pre_shift"}, "use granularity='feature'"),
        ({**INT4, "scale_rule": "signed_max", "scale_dtype": "e8m0"}, "gives negative scales, which e8m0 does not"),
        ({**INT4, "scale_rule": "signed_max", "scale_dtype": "double"}, "gives negative scales, which double does not"),
        ({**INT4, **GROUP, "scale_dtype": "k6"}, "goes with granularity='group' and zero_point='minimum' (GGUF Q4_K)"),
        ({**INT4, **MINIMUM, "scale_dtype": "k6"}, "goes with granularity='group' and zero_point='minimum'"),
        ({**INT4, **MINIMUM, "scale_dtype": "e8m0"}, "is stored like a scale, which e8m0 cannot: use float16"),
        ({**INT4, **MINIMUM, "scale_dtype": "e4m3_global"}, "which e4m3_global cannot: use float16"),
        ({**INT4, "dynamic": True}, "goes with granularity tensor, token or group, not 'channel'"),
        ({**INT4, "granularity": "feature", "dynamic": True}, "tensor, token or group, not 'feature'"),
        ({**NF4, "granularity": "token", "dynamic": True, "scale_dtype": "double"}, "dynamic=True has none"),
        ({**INT4, "hadamard": 48}, "hadamard 48: blocks are powers of two, e.g. 64"),
        ({**INT4, "hadamard": 0}, "hadamard must be a whole number of at least 1"),
        ({**INT4, "hadamard": 2.0}, "hadamard must be a whole number of at least 1"),
        ({**INT4, "scale_dtype": "fp16"}, "scale_dtype 'fp16' is unknown: use float32, float16"),
        ({**INT4, "levels": [0, 1]}, "levels go with format 'codebook'"),
    ],
    ids=str,
)
def test_a_spec_that_no_format_holds_is_refused_with_a_remedy(fields, remedy):
    with pytest.raises(ValueError, match=r".") as error:
        QuantSpec(**fields)
    assert remedy in str(error.value)


@pytest.mark.parametrize(
    ("key", "fields", "message"),
    [
        ("weight", {**INT4, "granularity": "token", "dynamic": True}, "weight: granularity 'token' is for activations"),
        ("weight", {**INT4, "granularity": "feature"}, "weight: granularity 'feature' is for activations"),
        ("weight", {**INT4, **GROUP, "dynamic": True}, "weight: dynamic=True is for activations"),
        ("activation", INT4, "activation: granularity 'channel' is for weights: use token, tensor, group or feature"),
        ("activation", {**INT4, "granularity": "token"}, "activation: a scale for each token cannot be stored"),
        ("activation", {**INT4, **GROUP}, "activation: a scale for each group cannot be stored: set dynamic: true"),
        ("output", INT4, "output: granularity 'channel' is for weights"),
        ("output", {**INT4, "granularity": "token"}, "output: a scale for each token cannot be stored"),
    ],
    ids=str,
)
def test_a_scheme_refuses_what_its_tensor_does_not_have_and_names_the_tensor(key, fields, message):
    for make in (lambda: LayerScheme(**{key: QuantSpec(**fields)}), lambda: parse_scheme({key: fields})):
        with pytest.raises(ValueError, match=r".") as error:
            make()
        assert message in str(error.value)


@pytest.mark.parametrize(
    ("cache", "message"),
    [
        ({}, "kv_cache: give a spec for key or for value"),
        ({"key": INT4}, "kv_cache.key: granularity 'channel' is for weights"),
        ({"value": {**INT4, "granularity": "token"}}, "kv_cache.value: a scale for each token cannot be stored"),
        ({"keys": INT4}, "kv_cache: unknown key 'keys'; it has the keys key, value"),
        ({"key": {"bits": 4}}, "kv_cache.key: unknown key 'bits'"),
        ({"key": {"format": "int9"}}, "kv_cache.key: format 'int9' is unknown"),
        ("KV5", "kv_cache 'KV5' is no preset: use KV8, KV4, KV_FP8"),
        (8, "kv_cache: 8 is neither a preset's name nor a mapping"),
    ],
    ids=str,
)
def test_a_kv_cache_that_is_none_is_refused_with_the_key(cache, message):
    with pytest.raises(ValueError, match=r".") as error:
        parse_kv_cache(cache)
    assert message in str(error.value)


def test_a_kv_cache_without_any_spec_is_refused_by_its_class_too():
    with pytest.raises(ValueError, match="give a spec for key or for value"):
        KVCacheScheme()


@pytest.mark.parametrize("shape", [(8, 576), (8, 96)])
def test_a_hadamard_block_that_does_not_fit_names_the_largest_that_does(shape):
    largest = shape[1] & -shape[1]
    with pytest.raises(ValueError, match=f"hadamard 128 does not divide input width {shape[1]}: use {largest} or less"):
        QuantSpec(format="int4", hadamard=128).qparam_shape(shape)
    assert QuantSpec(format="int4", hadamard=largest).qparam_shape(shape) == (8, 1, 1)


@pytest.mark.parametrize(
    ("fields", "bits"), [(E2M1, 4), (NF4, 4), ({"format": "ternary"}, 2), ({"format": "binary", **HALF}, 1)], ids=str
)
def test_only_integers_change_their_width(fields, bits):
    spec = QuantSpec(**fields)
    assert spec.qrange(bits) == spec.qrange()
    with pytest.raises(ValueError, match=rf"has one width, {bits} bits; only intN changes it"):
        spec.qrange(5)
