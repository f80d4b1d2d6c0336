"""A study of toys, and things that start runs without starting an interpreter each time."""

from __future__ import annotations

import io
import itertools
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console

from kdqat.study import Study, read_study, run_study
from tests.cli.fork_server import Command, server
from tests.cli.recipes import write

METRIC = "kdqat:prose.kl_mean"


def study_of(folder: Path, recipe: Mapping[str, Any] | None = None, **keys: Any) -> Study:
    """A study file in `folder` beside the tests' small recipe; see docs/study.md for `keys`."""
    base = write(folder, **{"trainer__max_steps": 3, "export": [], **(recipe or {})})
    content = {"recipe": str(base), "out": str(folder / "out"), "metric": METRIC, **keys}
    (folder / "study.yaml").write_text(yaml.safe_dump(content, sort_keys=False))
    return read_study(folder / "study.yaml")


class Pretended:
    """A run that ended before it began."""

    pid = None

    def __init__(self, code: int) -> None:
        self.code = code

    def poll(self) -> int:
        return self.code


class Pretends:
    """Instead of `kdqat fit`: writes what a run directory holds, with the number that `value` gives for a recipe.

    Attributes:
        calls: (recipe, "--resume" or "--overwrite") of every run that was started.
    """

    def __init__(self, value: Callable[[dict[str, Any]], float | int]) -> None:
        self.value, self.calls = value, []  # type: ignore[var-annotated]

    def __call__(self, lock: Any) -> Pretends:
        return self

    def start(self, arguments: list[str], environment: Mapping[str, str], log: Path) -> Pretended:
        recipe = yaml.safe_load(Path(arguments[1]).read_text())
        self.calls.append((recipe, arguments[2]))
        value = self.value(recipe)
        log.write_text("first line\nthe last line\n")
        if isinstance(value, int):
            return Pretended(value)
        run = Path(recipe["trainer"]["default_root_dir"])
        (run / "student").mkdir(parents=True, exist_ok=True)
        (run / "recipe.yaml").write_text("{}")
        (run / "environment.json").write_text(json.dumps({"commit": "abc", "hardware": "none"}))
        models = {"rtn": {"kdqat:prose": {"kl_mean": 9.0}}, "student": {"kdqat:prose": {"kl_mean": value}}}
        (run / "eval.json").write_text(json.dumps({"models": models, "bytes": {}}))
        return Pretended(0)

    def names(self) -> list[str]:
        """Which runs were started."""
        return [Path(recipe["trainer"]["default_root_dir"]).name for recipe, _ in self.calls]


class Served:
    """Starts real runs, as forks of the tests' server.

    Args:
        folder: for what they print.
        before: what each calls first (tests/cli/sabotage.py).
    """

    def __init__(self, folder: Path, before: str | None = None) -> None:
        self.folder, self.before, self.count = folder, before, itertools.count()

    def __call__(self, lock: Any) -> Served:
        return self

    def start(self, arguments: list[str], environment: Mapping[str, str], log: Path) -> _ServedChild:
        folder = self.folder / f"printed{next(self.count)}"
        folder.mkdir(parents=True)
        return _ServedChild(server().start(folder, *arguments, before=self.before, **environment), log)


class _ServedChild:
    def __init__(self, command: Command, log: Path) -> None:
        self.command, self.log, self.code = command, log, None  # type: ignore[var-annotated]

    @property
    def pid(self) -> int:
        return self.command.pid

    def poll(self) -> int | None:
        if self.code is None and not self.command.running():
            done = self.command.wait()
            self.code = done.code
            self.log.write_text(done.err)
        return self.code


class Logs(Pretends):
    """Instead of `kdqat fit`: a run directory with a metrics.csv only, whose last val/kl is what `value` gives."""

    def start(self, arguments: list[str], environment: Mapping[str, str], log: Path) -> Pretended:
        recipe = yaml.safe_load(Path(arguments[1]).read_text())
        self.calls.append((recipe, arguments[2]))
        run = Path(recipe["trainer"]["default_root_dir"])
        run.mkdir(parents=True, exist_ok=True)
        (run / "recipe.yaml").write_text("{}")
        (run / "metrics.csv").write_text(f"step,val/kl\n1,{self.value(recipe)}\n")
        log.write_text("the last line\n")
        return Pretended(0)


def lr_of(recipe: Mapping[str, Any]) -> float:
    return recipe["model"]["optimizer"]["init_args"]["lr"]


def said(study: Study, launch: Any, **options: Any) -> tuple[int, str]:
    """Exit code and what a study prints."""
    text = io.StringIO()
    code = run_study(study, Console(file=text, highlight=False, markup=False, soft_wrap=True), launch, **options)
    return code, text.getvalue()
