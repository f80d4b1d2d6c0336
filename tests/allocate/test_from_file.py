"""FromFile: a plan made before, for exactly this model."""

from __future__ import annotations

import pytest

from kdqat.allocate import FromFile
from kdqat.spec import QuantPlan, preset
from kdqat.types import LayerRef

LAYERS = [LayerRef(name, 0, name, (8, 8)) for name in ("a", "b", "head")]
PLAN = QuantPlan({"b": preset("W4A16"), "a": preset("W2A16")}, ("head",))


def test_the_plan_comes_back_from_a_file_or_a_folder(tmp_path):
    PLAN.save(tmp_path)
    PLAN.save(tmp_path / "mine.json")
    assert FromFile(str(tmp_path)).allocate(LAYERS) == FromFile(str(tmp_path / "mine.json")).allocate(LAYERS) == PLAN


def test_a_plan_for_another_model_names_the_layer_and_the_file(tmp_path):
    PLAN.save(tmp_path)
    with pytest.raises(ValueError, match=r"no layer 'b'; was the plan made for another model"):
        FromFile(str(tmp_path)).allocate([LAYERS[0], LAYERS[2]])
    extra = LayerRef("c", 0, "c", (8, 8))
    with pytest.raises(ValueError, match=f"{tmp_path}: layer 'c' is neither planned nor in `ignored`"):
        FromFile(str(tmp_path)).allocate([*LAYERS, extra])


def test_a_missing_file_is_an_error_and_building_reads_nothing(tmp_path):
    allocator = FromFile(str(tmp_path / "none.json"))
    with pytest.raises(ValueError, match=r"none\.json: no such file"):
        allocator.allocate(LAYERS)
