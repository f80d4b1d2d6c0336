"""metrics.csv: one row a logged step, appended to when a run resumes."""

from __future__ import annotations

import csv
from argparse import Namespace
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers.logger import Logger
from lightning.pytorch.utilities import rank_zero_only

from kdqat.files import write_text


class CSVMetrics(Logger):
    """Writes RUN/metrics.csv. Lightning's own CSVLogger deletes the curve of the run it resumes; this one keeps the
    rows up to the step it resumes at.

    Args:
        folder: the run directory.
    """

    def __init__(self, folder: str) -> None:
        super().__init__()
        self.path = Path(folder) / "metrics.csv"
        self._rows: list[dict[str, Any]] | None = None
        self._unsaved = 0

    @property
    def name(self) -> str:
        return "csv"

    @property
    def version(self) -> str:
        return ""

    def log_hyperparams(self, params: dict[str, Any] | Namespace, *args: Any, **kwargs: Any) -> None:
        """The recipe lies beside the metrics already."""

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        step = 0 if step is None else step
        if self._rows is None:
            self._rows = [row for row in _read(self.path) if row["step"] <= step]
        place = len(self._rows)  # observers' values come while the next step runs, of which somebody may have logged
        while place and self._rows[place - 1]["step"] > step:
            place -= 1
        if place and self._rows[place - 1]["step"] == step:
            self._rows[place - 1].update(metrics)
        else:
            self._rows.insert(place, {"step": step, **metrics})
        self._unsaved += 1
        if self._unsaved >= 20:
            self.save()

    @rank_zero_only
    def save(self) -> None:
        if not self._rows:
            return
        columns = list(dict.fromkeys(key for row in self._rows for key in row))
        lines = [",".join(columns)]
        lines += [",".join(str(row.get(c, "")) for c in columns) for row in self._rows]
        write_text(self.path, "\n".join(lines) + "\n")
        self._unsaved = 0

    @rank_zero_only
    def finalize(self, status: str) -> None:
        self.save()


def _read(path: Path) -> list[dict[str, Any]]:
    if not path.is_file():
        return []
    with path.open(newline="") as file:
        rows = [{k: v for k, v in row.items() if v != ""} for row in csv.DictReader(file)]
    return [{**row, "step": int(row["step"])} for row in rows]
