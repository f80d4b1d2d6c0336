"""Presets mean what their names say, and a scheme that is misspelled is answered with the right spelling."""

from __future__ import annotations

import re

import pytest

from kdqat.spec import PRESETS, LayerScheme, QuantSpec, parse_scheme, preset, preset_name


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_is_what_its_name_says(name):
    bits, asymmetric, group = re.fullmatch(r"W(\d)A16(_ASYM)?(?:_G(\d+))?", name).groups()
    assert preset(name).weight == QuantSpec(
        format=f"int{bits}",
        granularity="group" if group else "channel",
        group_size=int(group) if group else None,
        symmetric=not asymmetric,
        scale_rule="absmax",
        scale_dtype="float16",
        zero_point="integer" if asymmetric else "none",
    )


def test_the_presets_people_ask_for_are_there_and_each_has_one_name():
    assert {"W4A16", "W4A16_G128", "W4A16_ASYM_G64", "W8A16", "W3A16_G64", "W2A16_G64"} <= set(PRESETS)
    assert len(set(PRESETS.values())) == len(PRESETS) == 32
    assert [preset_name(scheme) for scheme in PRESETS.values()] == list(PRESETS)
    assert preset_name(LayerScheme(weight=QuantSpec(format="int5"))) is None


@pytest.mark.parametrize(
    ("name", "nearest"), [("W4A16G128", "W4A16_G128"), ("w4a16", "W4A16"), ("W4A16_G46", "W4A16_G64")]
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


@pytest.mark.parametrize(
    ("scheme", "message"),
    [
        ({"weights": {"format": "int4"}}, "scheme: unknown key 'weights'; it has the keys weight"),
        ({"weight": {"format": "int4", "bits": 4}}, "weight: unknown key 'bits'; it has the keys format, granularity"),
        ({"weight": {"granularity": "channel"}}, "weight: the key 'format' is missing, e.g. format: int4"),
        ({"weight": {"format": "int4", "group_size": 32}}, "goes with granularity='group'"),
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
