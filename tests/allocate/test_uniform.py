"""Uniform: one scheme, with exceptions by role or name; a pattern that means nothing is refused."""

from __future__ import annotations

import pytest

from kdqat.allocate import Uniform
from kdqat.spec import LayerScheme, QuantSpec, preset
from kdqat.types import LayerRef

LAYERS = [
    *(LayerRef(f"model.layers.{i}.{name}", i, role, (8, 8)) for i in range(3) for name, role in
      (("self_attn.q_proj", "q"), ("self_attn.o_proj", "o"), ("mlp.down_proj", "down"))),
    LayerRef("lm_head", None, "lm_head", (100, 8)),
]  # fmt: skip


def test_every_layer_but_the_head_gets_the_scheme():
    plan = Uniform("W4A16").allocate(LAYERS)
    assert len(plan) == 9 and set(plan.values()) == {preset("W4A16")} and plan.ignored == ("lm_head",)


def test_layers_are_ignored_by_role_or_by_glob():
    plan = Uniform("W4A16", ignore=["o", "*.layers.1.*"]).allocate(LAYERS)
    assert list(plan) == [
        "model.layers.0.self_attn.q_proj",
        "model.layers.0.mlp.down_proj",
        "model.layers.2.self_attn.q_proj",
        "model.layers.2.mlp.down_proj",
        "lm_head",
    ]
    assert len(plan.ignored) == 5


def test_a_role_is_the_whole_word_and_not_a_part_of_a_name():
    plan = Uniform("W4A16", ignore=["o"]).allocate(LAYERS)
    assert all(name.endswith("o_proj") for name in plan.ignored) and len(plan.ignored) == 3


def test_the_last_matching_override_counts_and_ignoring_beats_overriding():
    overrides = {"q": "W8A16", "*.layers.2.*": "W2A16", "*.2.mlp.*": "W3A16", "lm_head": "W8A16"}
    plan = Uniform("W4A16", overrides=overrides).allocate(LAYERS)
    bits = {name: scheme.weight.bits for name, scheme in plan.items()}
    assert [bits[f"model.layers.{i}.self_attn.q_proj"] for i in range(3)] == [8, 8, 2]
    assert [bits[f"model.layers.{i}.mlp.down_proj"] for i in range(3)] == [4, 4, 3]
    assert "lm_head" in plan.ignored


def test_a_scheme_may_be_written_out():
    plan = Uniform({"weight": {"format": "int5"}}, ignore=()).allocate(LAYERS)
    assert set(plan.values()) == {LayerScheme(weight=QuantSpec(format="int5"))} and len(plan) == 10


@pytest.mark.parametrize(
    ("arguments", "key"),
    [({"ignore": ["head"]}, "plan.ignore: 'head'"), ({"overrides": {"gate": "W8A16"}}, "plan.overrides: 'gate'")],
)
def test_a_pattern_that_matches_no_layer_is_a_typo_and_the_roles_are_named(arguments, key):
    with pytest.raises(ValueError, match=r".") as error:
        Uniform("W4A16", **arguments).allocate(LAYERS)
    assert f"{key} matches no layer" in str(error.value)
    assert "(down, lm_head, o, q)" in str(error.value) and "'model.layers.0.self_attn.q_proj'" in str(error.value)


@pytest.mark.parametrize("written", [{}, {"ignore": ["lm_head"]}], ids=["default", "default in a resolved recipe"])
def test_the_default_asks_nothing_of_a_model_without_a_head(written):
    plan = Uniform("W4A16", **written).allocate(LAYERS[:-1])
    assert len(plan) == 9 and plan.ignored == ()


@pytest.mark.parametrize("arguments", [{"ignore": ["lm_head", "o"]}, {"overrides": {"lm_head": "W8A16"}}], ids=str)
def test_a_head_that_is_named_beyond_the_default_must_be_there(arguments):
    with pytest.raises(ValueError, match=r"plan\.\w+: 'lm_head' matches no layer"):
        Uniform("W4A16", **arguments).allocate(LAYERS[:-1])


def test_nothing_left_to_quantize_is_an_error():
    with pytest.raises(ValueError, match="nothing to quantize"):
        Uniform("W4A16", ignore=["*"]).allocate(LAYERS)


def test_an_unknown_preset_is_refused_before_any_model_is_loaded():
    with pytest.raises(ValueError, match="W4A16_G64"):
        Uniform("W4A16_G65")
    with pytest.raises(ValueError, match="nearest"):
        Uniform("W4A16", overrides={"q": "W4B16"})
