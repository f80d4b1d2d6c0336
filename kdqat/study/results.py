"""What a study remembers: one small file a run, written whole. Run directories may be gone, or on another machine.

OUT/results/NAME.json   settings and their hash, metrics, seconds, commit, hardware; or the end of a failed run's log
OUT/recipes/NAME.yaml   the recipe as it is run
OUT/runs/NAME/          the run directory
OUT/logs/NAME.log       what the run printed
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from kdqat.files import write_text
from kdqat.report import describe
from kdqat.study.expand import Trial
from kdqat.study.file import WEIGHTS
from kdqat.study.settings import differing_keys, read_mapping

TAIL_LINES = 20


class Results:
    """The results under `out`.

    Args:
        out: the study's folder.
    """

    def __init__(self, out: Path) -> None:
        self.out = Path(out)

    def run(self, trial: Trial) -> Path:
        return self.out / "runs" / trial.name

    def log(self, trial: Trial) -> Path:
        return self.out / "logs" / f"{trial.name}.log"

    def recipe(self, trial: Trial) -> Path:
        return self.out / "recipes" / f"{trial.name}.yaml"

    def read(self, trial: Trial) -> dict[str, Any] | None:
        """The result of a run, or None.

        Raises:
            ValueError: if the file is damaged, or the run was made with other settings; names them.
        """
        path = self.out / "results" / f"{trial.name}.json"
        if not path.is_file():
            self._require_same(trial)
            return None
        try:
            result = json.loads(path.read_text())
            before, status = result["recipe"], result["status"]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path} is damaged ({error!r}); delete it and run the study again") from error
        if status == "done" and result["settings_hash"] != trial.settings_hash:
            raise ValueError(_changed(trial.name, before, trial.recipe, f"{path} and {self.run(trial)}"))
        return result

    def _require_same(self, trial: Trial) -> None:
        """An interrupted run goes on only with the settings it was begun with."""
        if self.run(trial).is_dir() and self.recipe(trial).is_file():
            before = read_mapping(self.recipe(trial))
            if any(differing_keys(before, trial.recipe)):
                raise ValueError(_changed(trial.name, before, trial.recipe, str(self.run(trial))))

    def done(self, trial: Trial) -> dict[str, Any] | None:
        """The result of a run that came to its end, or None."""
        result = self.read(trial)
        return result if result and result["status"] == "done" else None

    def begin(self, trial: Trial) -> list[str]:
        """Write the run's recipe; how `kdqat` is to be called: anew, or from the newest checkpoint."""
        failed = self.read(trial) is not None
        write_text(self.recipe(trial), yaml.safe_dump(trial.recipe, sort_keys=False))
        begun = any((self.run(trial) / "checkpoints").glob("step=*.ckpt")) and not failed
        return ["fit", str(self.recipe(trial)), "--resume" if begun else "--overwrite"]

    def finish(self, trial: Trial, seconds: float, keep: list[str]) -> dict[str, Any]:
        """Record what a finished run measured, then delete its weights but for what is in `keep`."""
        facts = describe(self.run(trial))
        evaluation = (facts["eval"] or {}).get("models", {})
        logged = {key: float(value) for key, value in facts["last_metrics"].items() if _is_number(value)}
        environment = facts["environment"] or {}
        result = self._write(
            trial,
            "done",
            {
                "metrics": {**logged, **_flat(evaluation.get("student", {}))},
                "rtn": _flat(evaluation.get("rtn", {})),
                "seconds": round(seconds, 1),
                "commit": environment.get("commit"),
                "hardware": environment.get("hardware"),
            },
        )
        self.drop_weights(trial, keep)
        return result

    def fail(self, trial: Trial, seconds: float, why: str) -> dict[str, Any]:
        """Record that a run failed, with the end of its log."""
        log = self.log(trial)
        lines = log.read_text(errors="replace").splitlines() if log.is_file() else []
        why = ": ".join([why, *lines[-1:]])
        return self._write(trial, "failed", {"why": why, "seconds": round(seconds, 1), "log": lines[-TAIL_LINES:]})

    def drop_weights(self, trial: Trial, keep: list[str]) -> None:
        """Delete what is large of a finished run."""
        for name in WEIGHTS:
            if name not in keep:
                shutil.rmtree(self.run(trial) / name, ignore_errors=True)

    def _write(self, trial: Trial, status: str, content: Mapping[str, Any]) -> dict[str, Any]:
        result = {
            "name": trial.name,
            "status": status,
            "stage": trial.stage,
            "variation": trial.variation.name,
            "labels": trial.variation.labels,
            "seed": trial.seed,
            **content,
            "finished": time.strftime("%Y-%m-%d %H:%M:%S"),
            "settings_hash": trial.settings_hash,
            "recipe": trial.recipe,
        }
        write_text(self.out / "results" / f"{trial.name}.json", json.dumps(result, indent=1))
        return result


def measured(result: Mapping[str, Any], metric: str) -> float:
    """The number that is compared; NaN of a run that diverged.

    Raises:
        ValueError: if the run did not measure it; names what it did.
    """
    if metric not in result["metrics"]:
        raise ValueError(unmeasured(result, metric))
    return result["metrics"][metric]


def unmeasured(result: Mapping[str, Any], metric: str) -> str:
    """That there is no such number, and which there are."""
    there = ", ".join(result["metrics"]) or "nothing"
    return f"metric {metric!r} was not measured in {result['name']}; there is {there}"


def _changed(name: str, before: Any, now: Any, what: str) -> str:
    keys = ", ".join(sorted(differing_keys(before, now))[:5]) or "the recipe"
    return f"{name} was run with another {keys}; undo the change, choose another `out`, or delete {what}"


def _flat(models: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    return {f"{label}.{key}": value for label, numbers in models.items() for key, value in numbers.items()}


def _is_number(text: Any) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
