"""Presets mean what their names say, and a scheme that is misspelled is answered with the right spelling."""

from __future__ import annotations

import json
import re
from dataclasses import asdict

import pytest

from kdqat.spec import (
    KV_PRESETS,
    PRESETS,
    KVCacheScheme,
    LayerScheme,
    QuantPlan,
    QuantSpec,
    parse_kv_cache,
    parse_scheme,
    preset,
    preset_name,
)

WEIGHT_ONLY = re.compile(r"W(\d)A16(_ASYM)?(?:_G(\d+))?")
ALIASES = {  # what their own worlds call them
    **{f"GPTQ_4BIT_G{size}": f"W4A16_G{size}" for size in (32, 64, 128)},
    **{f"AWQ_4BIT_G{size}": f"W4A16_ASYM_G{size}" for size in (32, 64, 128)},
}
WIDTHS = {  # what a name says of the bits of weights and activations
    "W8A8": (8, 8), "W4A8": (4, 8), "W4A4": (4, 4), "W8A8_STATIC": (8, 8), "FP8_W8A8": (8, 8), "FP4_W4A8": (4, 8),
    "FP4_W4A4": (4, 4), "FP4_W4A4_PRE_SHIFT": (4, 4), "FP8": (8, 8), "FP8_STATIC": (8, 8), "NVFP4": (4, 4),
    "MXFP4": (4, 4), "MXFP6": (6, 6), "MXFP6_E3M2": (6, 6), "MXFP8": (8, 8), "MXFP8_E5M2": (8, 8),
    "QUEST_W4A4": (4, 4), "TORCHAO_8DA4W": (4, 8),
}  # fmt: skip


@pytest.mark.parametrize("name", filter(WEIGHT_ONLY.fullmatch, PRESETS))
def test_a_weight_only_integer_preset_is_what_its_name_says(name):
    bits, asymmetric, group = WEIGHT_ONLY.fullmatch(name).groups()
    scheme = preset(name)
    assert scheme.activation is None and scheme.output is None
    assert scheme.weight == QuantSpec(
        format=f"int{bits}",
        granularity="group" if group else "channel",
        group_size=int(group) if group else None,
        symmetric=not asymmetric,
        scale_rule="absmax",
        scale_dtype="float16",
        zero_point="integer" if asymmetric else "none",
    )


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_parses_by_its_name_from_its_own_plain_data_and_in_a_plan(name):
    scheme = PRESETS[name]
    data = json.loads(json.dumps(asdict(scheme)))
    assert parse_scheme(name) == parse_scheme(data) == scheme
    plan = QuantPlan({"layer": scheme})
    assert QuantPlan.from_json(json.loads(json.dumps(plan.to_json()))) == plan


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_has_the_group_and_the_widths_of_its_name(name):
    scheme = PRESETS[name]
    group = re.search(r"_G(\d+)$", name)
    if group:
        assert scheme.weight.group_size == int(group[1])
    widths = WIDTHS.get(re.sub(r"_G\d+$", "", name))
    assert (scheme.activation is None) == (widths is None)
    if widths is not None:
        assert (scheme.weight.bits, scheme.activation.bits) == widths
    if "FP" in name and name.endswith("_A16"):  # NVFP4_A16: the weights of NVFP4, the activations left alone
        assert scheme.weight == PRESETS[name.removesuffix("_A16")].weight


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("NVFP4", ("e2m1", 16, "e4m3_global", "absmax")),
        ("MXFP4", ("e2m1", 32, "e8m0", "mx")),
        ("MXFP6", ("e2m3", 32, "e8m0", "mx")),
        ("MXFP6_E3M2", ("e3m2", 32, "e8m0", "mx")),
        ("MXFP8", ("e4m3", 32, "e8m0", "mx")),
        ("MXFP8_E5M2", ("e5m2", 32, "e8m0", "mx")),
        ("GGUF_Q4_0", ("int4", 32, "float16", "signed_max")),
        ("GGUF_Q4_1", ("int4", 32, "float16", "absmax")),
        ("GGUF_Q8_0", ("int8", 32, "float16", "absmax")),
        ("GGUF_Q4_K", ("int4", 32, "k6", "absmax")),
        ("NF4", ("nf4", 64, "float32", "absmax")),
        ("NF4_DOUBLE", ("nf4", 64, "double", "absmax")),
    ],
)
def test_a_named_format_is_the_one_its_specification_describes(name, expected):
    weight = PRESETS[name].weight
    assert (weight.format, weight.group_size, weight.scale_dtype, weight.scale_rule) == expected
    activation = PRESETS[name].activation
    assert activation is None or (activation.dynamic and activation.format == weight.format)


@pytest.mark.parametrize(
    ("name", "bits"),
    [
        ("NVFP4", 4 + 8 / 16 + 32 / (64 * 1024)),
        ("MXFP4", 4 + 8 / 32),
        ("MXFP8", 8 + 8 / 32),
        ("GGUF_Q4_0", 18 * 8 / 32),  # bytes of a block of 32 in llama.cpp
        ("GGUF_Q4_1", 20 * 8 / 32),
        ("GGUF_Q8_0", 34 * 8 / 32),
        ("GGUF_Q4_K", 144 * 8 / 256),  # bytes of a super-block of 256
        ("NF4", 4 + 32 / 64),
        ("NF4_DOUBLE", 4 + 8 / 64 + 32 / (64 * 256) + 32 / (64 * 1024)),
        ("TERNARY_G64", 8 / 5 + 16 / 64),
        ("BINARY_G64", 1 + 16 / 64),
        ("AWQ_4BIT_G128", 4 + (16 + 4) / 128),
    ],
)
def test_counted_bits_are_those_of_the_files(name, bits):
    assert PRESETS[name].weight.storage_bits((64, 1024)) / (64 * 1024) == pytest.approx(bits, rel=1e-12)


def test_the_presets_people_ask_for_are_there_and_only_the_aliases_have_two_names():
    assert {"W4A16", "W4A16_G128", "W4A16_ASYM_G64", "W8A16", "W3A16_G64", "W2A16_G64", "W8A8", "W4A8", "W4A4"} <= set(
        PRESETS
    )
    for alias, name in ALIASES.items():
        assert PRESETS[alias] == PRESETS[name] and preset_name(PRESETS[alias]) == name
    own = [name for name in PRESETS if name not in ALIASES]
    assert [preset_name(PRESETS[name]) for name in own] == own
    assert preset_name(LayerScheme(weight=QuantSpec(format="int5"))) is None


@pytest.mark.parametrize("name", KV_PRESETS)
def test_a_kv_preset_is_for_keys_and_values_and_survives_its_own_plain_data(name):
    cache = parse_kv_cache(name)
    assert cache == KVCacheScheme(key=KV_PRESETS[name], value=KV_PRESETS[name])
    assert parse_kv_cache(json.loads(json.dumps(asdict(cache)))) == parse_kv_cache(cache) == cache
    assert cache.key.bits == (4 if "4" in name else 8)


@pytest.mark.parametrize(
    ("name", "nearest"),
    [
        ("W4A16G128", "W4A16_G128"),
        ("w4a16", "W4A16"),
        ("W4A16_G46", "W4A16_G64"),
        ("NVFP", "NVFP4"),
        ("q4_k", "GGUF_Q4_K"),
    ],
)
def test_an_unknown_preset_gives_the_nearest_ones(name, nearest):
    with pytest.raises(ValueError, match="is no preset") as error:
        parse_scheme(name)
    assert nearest in str(error.value).partition("nearest are")[2].replace(",", " ").split()


def test_a_name_like_no_preset_gives_all_of_them():
    with pytest.raises(ValueError, match=r"W2A16, .*W8A16_G64"):
        preset("?")


def test_a_scheme_is_read_from_a_name_a_mapping_or_a_scheme():
    spec = {"format": "int4", "granularity": "group", "group_size": 32, "scale_dtype": "float16"}
    expected = PRESETS["W4A16_G32"]
    assert parse_scheme("W4A16_G32") == parse_scheme({"weight": spec}) == parse_scheme(expected) == expected
    assert parse_scheme({"weight": QuantSpec(**spec)}) == expected
    assert parse_scheme({}) == parse_scheme({"weight": None}) == LayerScheme()
    levels = parse_scheme({"weight": {"format": "codebook", "levels": [-1, 0, 0.5, 1]}})
    assert levels.weight.levels == (-1.0, 0.0, 0.5, 1.0) and hash(levels) is not None


@pytest.mark.parametrize(
    ("scheme", "message"),
    [
        ({"weights": {"format": "int4"}}, "scheme: unknown key 'weights'; it has the keys weight, activation, output"),
        ({"weight": {"format": "int4", "bits": 4}}, "weight: unknown key 'bits'; it has the keys format, granularity"),
        ({"weight": {"granularity": "channel"}}, "weight: the key 'format' is missing, e.g. format: int4"),
        ({"weight": {"format": "int4", "group_size": 32}}, "goes with granularity='group'"),
        ({"activation": {"format": "int4", "group_size": 32}}, "activation: group_size goes with granularity='group'"),
        ({"weight": "int4"}, "weight: 'int4' is no mapping"),
        ({"weight": 4}, "weight: 4 is no mapping"),
        (4, "scheme: 4 is neither a preset's name nor a mapping"),
        (["W4A16"], "is neither a preset's name nor a mapping"),
    ],
    ids=str,
)
def test_a_scheme_that_cannot_be_read_is_an_error_naming_the_key(scheme, message):
    with pytest.raises(ValueError, match=r".") as error:
        parse_scheme(scheme)
    assert message in str(error.value)
