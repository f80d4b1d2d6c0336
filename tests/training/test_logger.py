"""metrics.csv: one row a step, whole at all times, and continued by a run that resumes."""

from __future__ import annotations

import csv
from pathlib import Path

from kdqat.training import CSVMetrics


def rows(folder: Path) -> list[dict[str, str]]:
    with (folder / "metrics.csv").open(newline="") as file:
        return [{k: v for k, v in row.items() if v} for row in csv.DictReader(file)]


def test_metrics_of_one_step_share_a_row_and_columns_may_come_later(tmp_path: Path) -> None:
    logger = CSVMetrics(str(tmp_path))
    logger.log_metrics({"train/loss": 1.0}, 0)
    logger.log_metrics({"train/loss": 0.5}, 1)
    logger.log_metrics({"val/kl": 0.25}, 1)
    logger.finalize("success")
    assert rows(tmp_path) == [{"step": "0", "train/loss": "1.0"}, {"step": "1", "train/loss": "0.5", "val/kl": "0.25"}]


def test_a_resumed_run_keeps_what_came_before_and_replaces_what_comes_again(tmp_path: Path) -> None:
    first = CSVMetrics(str(tmp_path))
    for step in range(6):
        first.log_metrics({"train/loss": float(step)}, step)
    first.save()
    second = CSVMetrics(str(tmp_path))  # resumes after step 2: its first row is step 3
    second.log_metrics({"train/loss": 30.0, "val/kl": 1.0}, 3)
    second.log_metrics({"train/loss": 40.0}, 4)
    second.save()
    assert [row["step"] for row in rows(tmp_path)] == ["0", "1", "2", "3", "4"]
    assert [row["train/loss"] for row in rows(tmp_path)] == ["0.0", "1.0", "2.0", "30.0", "40.0"]


def test_validation_that_a_resumed_run_makes_up_for_joins_the_row_of_its_step(tmp_path: Path) -> None:
    first = CSVMetrics(str(tmp_path))
    first.log_metrics({"train/loss": 1.0}, 3)
    first.save()
    second = CSVMetrics(str(tmp_path))
    second.log_metrics({"val/kl": 0.5}, 3)
    second.save()
    assert rows(tmp_path) == [{"step": "3", "train/loss": "1.0", "val/kl": "0.5"}]


def test_a_run_that_logs_nothing_writes_nothing(tmp_path: Path) -> None:
    CSVMetrics(str(tmp_path)).finalize("success")
    assert list(tmp_path.iterdir()) == []


def test_rows_are_on_disk_every_twenty_and_no_temporary_file_stays(tmp_path: Path) -> None:
    logger = CSVMetrics(str(tmp_path))
    for step in range(25):
        logger.log_metrics({"train/loss": 1.0}, step)
    assert len(rows(tmp_path)) == 20
    assert [p.name for p in tmp_path.iterdir()] == ["metrics.csv"]


def test_values_that_come_a_step_late_join_their_row(tmp_path):
    logger = CSVMetrics(str(tmp_path))
    for step, name in ((0, "loss"), (1, "lr"), (0, "signal"), (1, "loss"), (5, "loss"), (3, "signal")):
        logger.log_metrics({name: float(step)}, step)
    logger.finalize("success")
    lines = (tmp_path / "metrics.csv").read_text().splitlines()
    assert lines == ["step,loss,signal,lr", "0,0.0,0.0,", "1,1.0,,1.0", "3,,3.0,", "5,5.0,,"]
