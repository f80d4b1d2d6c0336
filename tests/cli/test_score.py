"""`kdqat score`, then `quantize` and `fit` by its scores, through the real command line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from kdqat.spec import QuantPlan, Scores, explain_allocation
from tests.cli.case import named
from tests.cli.fork_server import server
from tests.cli.recipes import DROP, write

LEVELS = ["W4A16_G32", "W2A16_G32"]
TEXT = {"text": "kdqat:prose", "seq_len": 32, "num_rows": 4}


def changes(**more: Any) -> dict[str, Any]:
    plan = named("ByImportance", scores="run/scores.json", levels=LEVELS, average_bits=3.5)
    score = {"scorer": named("LIM"), "calibration": TEXT}
    return {"model__plan": plan, "score": score, "evaluate": DROP, "export": DROP, **more}


def test_score_then_fit_spends_the_bits_where_the_scores_say(tmp_path: Path) -> None:
    write(tmp_path, **changes())
    refused = server().run(tmp_path, "quantize", "recipe.yaml")
    assert refused.code == 2 and "run/scores.json: no such file; `kdqat score RECIPE` writes it" in refused.err
    assert not (tmp_path / "run" / "prepared").exists()
    scored = server().run(tmp_path, "score", "recipe.yaml")
    assert scored.code == 0 and "scores of 2 blocks by LIM: run/scores.json" in scored.err, scored.err
    scores = Scores.load(tmp_path / "run")
    assert scores.method == "LIM" and scores.text and scores.model and (tmp_path / "run" / "scores.png").is_file()
    assert server().run(tmp_path, "quantize", "recipe.yaml").code == 0
    plan = QuantPlan.load(tmp_path / "run" / "prepared")
    best = scores.ranking()[0]
    high = {name for name in plan if plan[name].weight.bits == 4}
    assert high == set(scores.members[best]) and len(plan.families) == 4
    content = json.loads((tmp_path / "run" / "allocation.json").read_text())
    assert [row["scheme"] for row in explain_allocation(content)] == LEVELS
    assert server().run(tmp_path, "fit", "recipe.yaml").code == 0
    assert QuantPlan.load(tmp_path / "run" / "student") == plan


def test_fit_alone_writes_the_reasons_and_a_uniform_plan_has_none(tmp_path: Path) -> None:
    write(tmp_path, **changes())
    assert server().run(tmp_path, "score", "recipe.yaml").code == 0
    assert server().run(tmp_path, "fit", "recipe.yaml").code == 0
    assert (tmp_path / "run" / "allocation.json").is_file()
    uniform = ["--model.plan", "Uniform", "--model.plan.scheme", "W4A16_G32"]
    again = server().run(tmp_path, "fit", "recipe.yaml", "--overwrite", *uniform)
    assert again.code == 0 and not (tmp_path / "run" / "allocation.json").exists(), again.err


def test_existing_scores_are_kept_unless_overwriting_is_asked_for(tmp_path: Path) -> None:
    write(tmp_path, **changes())
    assert server().run(tmp_path, "score", "recipe.yaml").code == 0
    before = (tmp_path / "run" / "scores.json").read_bytes()
    refused = server().run(tmp_path, "score", "recipe.yaml", "--score.scorer", "ZD")
    assert refused.code == 2 and "run/scores.json exists already: use --overwrite" in refused.err
    assert (tmp_path / "run" / "scores.json").read_bytes() == before
    assert server().run(tmp_path, "score", "recipe.yaml", "--overwrite", "--score.scorer", "ZD").code == 0
    assert Scores.load(tmp_path / "run").method == "ZD"


@pytest.mark.parametrize(
    ("score", "message"),
    [
        (DROP, "score needs a score section"),
        ({"scorer": named("LIM")}, "score.calibration is missing: LIM is measured on text"),
        ({"scorer": named("LIMM")}, "did you mean 'LIM'"),
        ({"scorer": named("LIM", unit="layer")}, "unit is block, not 'layer'"),
    ],
    ids=["none", "no text", "typo", "unit"],
)
def test_bad_input_is_one_line_and_leaves_no_scores(score: Any, message: str, tmp_path: Path) -> None:
    given = changes(score=score)
    if score is DROP:
        del given["score"]
    write(tmp_path, **given)
    refused = server().run(tmp_path, "score", "recipe.yaml")
    assert refused.code == 2 and message in refused.err and len(refused.err.strip().splitlines()) == 1, refused.err
    assert not (tmp_path / "run" / "scores.json").exists()


def test_costs_feed_the_knapsack_and_the_calibration_of_the_model_will_do(tmp_path: Path) -> None:
    scorer = named("OutputKL", schemes=LEVELS, unit="layer", start="rtn")
    plan = named("Knapsack", scores="run/scores.json", average_bits=3.5)
    write(tmp_path, **changes(model__plan=plan, model__calibration=TEXT, score={"scorer": scorer}))
    scored = server().run(tmp_path, "score", "recipe.yaml")
    assert scored.code == 0, scored.err
    assert server().run(tmp_path, "quantize", "recipe.yaml").code == 0
    content = json.loads((tmp_path / "run" / "allocation.json").read_text())
    assert content["allocator"] == "Knapsack" and content["used_bits"] <= content["budget_bits"]
