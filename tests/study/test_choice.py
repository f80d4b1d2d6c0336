"""Who goes on after short runs, and what a table says of seeds."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from kdqat.study import variations
from kdqat.study.plot import roles
from kdqat.study.screen import survivors
from kdqat.study.summary import rows, table
from tests.study.cases import METRIC, study_of

VARY = {
    "freeze": {"none": {}, "ov": {"trainer.precision": "32"}},
    "model.optimizer.lr": [1e-5, 1e-4, 1e-3],
}


def result(*values: float) -> list[dict[str, Any]]:
    return [
        {"name": "x", "metrics": {METRIC: value, "ptb.kl_mean": 2 * value}, "rtn": {METRIC: 9.0}, "seconds": 1.0}
        for value in values
    ]


def results(*values: float) -> dict[str, list[dict[str, Any]]]:
    """For the six variations of VARY, freeze by freeze."""
    names = [f"freeze-{freeze}_lr-{lr}" for freeze in VARY["freeze"] for lr in VARY["model.optimizer.lr"]]
    return {name: result(value) for name, value in zip(names, values, strict=True)}


def chosen(tmp_path: Path, measured: dict[str, Any], best: str = "lowest", **screen: Any) -> list[str]:
    study = study_of(tmp_path, vary=VARY, best=best, screen={"max_steps": 2, **screen})
    assert study.screen
    return [v.name for v in survivors(study, study.screen, variations(study), measured)]


def test_the_best_go_on_in_the_file_s_order(tmp_path: Path) -> None:
    measured = results(3, 1, 2, 0.5, 4, 5)
    assert chosen(tmp_path, measured, keep=2) == ["freeze-none_lr-0.0001", "freeze-ov_lr-1e-05"]
    assert chosen(tmp_path, measured, "highest", keep=2) == ["freeze-ov_lr-0.0001", "freeze-ov_lr-0.001"]


def test_the_choice_can_be_made_within_groups(tmp_path: Path) -> None:
    measured = results(3, 1, 2, 14, 15, 13)
    assert chosen(tmp_path, measured, keep=1, per=["freeze"]) == ["freeze-none_lr-0.0001", "freeze-ov_lr-0.001"]
    assert len(chosen(tmp_path, measured, keep=1, per=["lr"])) == 3


def test_a_run_that_diverged_or_failed_does_not_go_on(tmp_path: Path) -> None:
    measured = results(math.nan, 1, 2, 3, 4, 5)
    assert "freeze-none_lr-1e-05" not in chosen(tmp_path, measured, keep=5)
    assert "freeze-none_lr-1e-05" not in chosen(tmp_path, measured, "highest", keep=5)
    del measured["freeze-none_lr-0.0001"]
    assert "freeze-none_lr-0.0001" not in chosen(tmp_path, measured, keep=6)


def test_a_metric_that_nobody_measured_is_an_error_that_names_those_there_are(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"'c4\.kl_mean' was not measured.*ptb\.kl_mean"):
        chosen(tmp_path, results(1, 2, 3, 4, 5, 6), keep=1, metric="c4.kl_mean")


def test_mean_and_sample_deviation_over_seeds(tmp_path: Path) -> None:
    study = study_of(tmp_path, vary=VARY)
    which = variations(study)
    measured = {which[0].name: result(1.0, 2.0, 3.0), which[1].name: result(1.0), which[2].name: result(1.0, math.nan)}
    found = rows(which, measured)
    assert [row.n for row in found] == [3, 1, 2]
    assert found[0].mean[METRIC] == 2.0 and found[0].std[METRIC] == 1.0 and found[0].std["ptb.kl_mean"] == 2.0
    assert found[1].std[METRIC] is None and math.isnan(found[2].mean[METRIC])
    columns, lines = table(study, found, METRIC)
    assert columns == ["freeze", "lr", METRIC, "ptb.kl_mean", f"RTN {METRIC}", "n"]
    assert lines[0] == ["none", "1e-05", "2 ± 1", "4 ± 2", "9", "3"]
    assert lines[1][2] == "1"


def test_a_table_of_short_runs_is_sorted_and_says_who_goes_on(tmp_path: Path) -> None:
    study = study_of(tmp_path, vary=VARY, best="highest")
    found = rows(variations(study), results(3, 1, 2, math.nan, 4, 5))
    _, lines = table(study, found, METRIC, ["freeze-ov_lr-0.001"])
    assert [line[2] for line in lines] == ["5", "4", "3", "2", "1", "nan"]
    assert [line[-1] for line in lines] == ["yes", "", "", "", "", ""]


def test_the_plot_takes_the_number_as_x_and_the_name_as_lines(tmp_path: Path) -> None:
    study = study_of(
        tmp_path, vary=VARY, variations=[{"name": "w4"}, {"name": "w3", "set": {"model.plan.scheme": "W3A16"}}]
    )
    which = variations(study)
    found = rows(which, {v.name: result(1.0) for v in which})
    assert roles(found) == ("lr", "variation", ["freeze"])
    assert roles(found[:3]) == ("lr", None, [])
    assert roles([row for row in found if row.variation.labels["lr"] == 1e-5]) == (None, "variation", ["freeze"])
