"""The plan is the artifact that travels: it survives JSON and disk, counts its bits, and a damaged one is named."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest

from kdqat.spec import PLAN_FILE, KVCacheScheme, LayerScheme, QuantPlan, QuantSpec, parse_kv_cache, preset
from kdqat.types import LayerRef

ODD = LayerScheme(weight=QuantSpec(format="int5", granularity="tensor", scale_rule="signed_max"))
PLAN = QuantPlan({"a": preset("W4A16_G32"), "b": ODD, "c": preset("W4A16_G32"), "d": LayerScheme()}, ("head", "e"))


def ref(name: str, *shape: int) -> LayerRef:
    return LayerRef(name=name, block=0, role="q", shape=shape)


def test_a_plan_is_a_mapping_in_its_own_order():
    assert list(PLAN) == ["a", "b", "c", "d"] and len(PLAN) == 4
    assert PLAN["b"] is ODD and "head" not in PLAN
    with pytest.raises(dataclasses.FrozenInstanceError):
        PLAN.ignored = ()


def test_a_plan_survives_json():
    again = QuantPlan.from_json(json.loads(json.dumps(PLAN.to_json())))
    assert again == PLAN and list(again) == list(PLAN) and again.ignored == ("head", "e")


LEVELS = QuantSpec(format="codebook", levels=(-1.0, -0.25, 0.0, 0.5, 1.0), granularity="group", group_size=16)
HEADS = QuantSpec(format="int4", granularity="feature", hadamard=32)


@pytest.mark.parametrize(
    "plan",
    [
        QuantPlan({"a": preset("W4A8"), "b": preset("NVFP4"), "c": preset("W8A8_STATIC")}),
        QuantPlan({"a": LayerScheme(weight=LEVELS), "b": LayerScheme(weight=LEVELS, output=HEADS)}),
        QuantPlan({"a": preset("W4A16")}, kv_cache=parse_kv_cache("KV4")),
        QuantPlan({"a": preset("W4A16")}, kv_cache=KVCacheScheme(key=HEADS), deploy_only=("kv_cache",)),
        QuantPlan({"a": preset("W4A4")}, ("head",), None, ("activation", "output", "kv_cache")),
    ],
    ids=["activations", "levels", "kv preset", "keys only", "deploy only"],
)
def test_everything_a_plan_can_say_survives_json_and_disk(plan, tmp_path):
    assert QuantPlan.from_json(json.loads(json.dumps(plan.to_json()))) == plan
    plan.save(tmp_path)
    again = QuantPlan.load(tmp_path)
    assert again == plan and (again.kv_cache, again.deploy_only) == (plan.kv_cache, plan.deploy_only)
    assert all(again[name].weight == plan[name].weight for name in plan)


def test_a_plan_written_before_there_were_caches_still_loads():
    data = PLAN.to_json()
    del data["kv_cache"], data["deploy_only"]
    assert QuantPlan.from_json(data) == PLAN


def test_an_unknown_word_in_deploy_only_is_refused_also_when_it_comes_from_json():
    data = QuantPlan({"a": preset("W4A4")}).to_json()
    for word in ("weight", "kv"):
        with pytest.raises(ValueError, match=f"deploy_only: '{word}' is unknown: use activation, output, kv_cache"):
            QuantPlan({"a": preset("W4A4")}, deploy_only=(word,))
        with pytest.raises(ValueError, match=f"deploy_only: '{word}' is unknown"):
            QuantPlan.from_json({**data, "deploy_only": [word]})


def test_equal_schemes_are_written_once_and_known_ones_by_their_name():
    data = PLAN.to_json()
    assert data["layers"] == {"a": "W4A16_G32", "b": "scheme1", "c": "W4A16_G32", "d": "scheme2"}
    assert list(data["schemes"]) == ["W4A16_G32", "scheme1", "scheme2"]


def test_a_plan_is_saved_to_a_file_or_into_a_folder(tmp_path):
    PLAN.save(tmp_path)
    PLAN.save(tmp_path / "other.json")
    assert (tmp_path / PLAN_FILE).read_text() == (tmp_path / "other.json").read_text()
    assert QuantPlan.load(tmp_path) == QuantPlan.load(tmp_path / "other.json") == PLAN
    assert sorted(p.name for p in tmp_path.iterdir()) == ["other.json", PLAN_FILE]


def test_a_missing_plan_is_named_with_who_writes_one(tmp_path):
    with pytest.raises(ValueError, match=r"quant_plan\.json: no such file; .*`kdqat quantize`"):
        QuantPlan.load(tmp_path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "Expecting value"),
        ('{"version": 1, "schemes": {', "Expecting"),
        ("\x00\x01", "Expecting value"),
        ("[]", "no quantization plan"),
        ("{}", "no quantization plan of version 1"),
        ('{"version": 2, "schemes": {}, "layers": {}}', "version 1"),
        ('{"version": 1, "schemes": {}, "layers": {"a": "W9"}}', "schemes it does not define: ['W9']"),
        ('{"version": 1, "schemes": {"s": {"weight": {"format": "int99"}}}, "layers": {}}', "use int1 ... int8"),
        ('{"version": 1, "schemes": {"s": {"wait": 1}}, "layers": {}}', "unknown key 'wait'"),
        ('{"version": 1, "schemes": [], "layers": {}}', "list"),
        ('{"version": 1, "schemes": {}, "layers": {"a": ["x"]}}', "unhashable"),
    ],
)
def test_a_damaged_plan_is_an_error_that_names_the_file(tmp_path, text, message):
    (tmp_path / PLAN_FILE).write_text(text)
    with pytest.raises(ValueError, match=r"quant_plan\.json: ") as error:
        QuantPlan.load(tmp_path)
    assert message in str(error.value)


def test_a_plan_that_is_no_text_is_an_error_that_names_the_file(tmp_path):
    (tmp_path / PLAN_FILE).write_bytes(b"\xff\xfe\x00\xd8")
    with pytest.raises(ValueError, match=r"quant_plan\.json: "):
        QuantPlan.load(tmp_path)


def test_average_bits_are_counted_with_scales_and_nominal_bits_without():
    layers = [ref("a", 8, 64), ref("b", 4, 10), ref("d", 100, 100), ref("head", 50, 50)]
    counted = (8 * 64 * 4 + 8 * 2 * 16) + (4 * 10 * 5 + 32)  # d has no weight spec, head is no part of the plan
    assert PLAN.average_bits(layers) == pytest.approx(counted / (8 * 64 + 40), rel=1e-15)
    assert PLAN.nominal_bits(layers) == pytest.approx((8 * 64 * 4 + 40 * 5) / (8 * 64 + 40), rel=1e-15)
    assert PLAN.average_bits([ref("a", 8, 64)]) == 4.5  # W4 G32 with fp16 scales: 4 + 16 / 32


def test_a_plan_that_quantizes_nothing_has_no_average():
    with pytest.raises(ValueError, match="quantizes none of these layers"):
        PLAN.average_bits([ref("d", 4, 4), ref("head", 4, 4)])


def test_reading_a_plan_imports_no_torch():
    code = "import sys, kdqat.spec; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).resolve().parents[2])
