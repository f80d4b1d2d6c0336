"""Whatever is wrong with a recipe, a file or a folder: exit code 2 and one line that says what, where, and what to do.

Every case goes through the real entry `kdqat.cli.main.main(argv)` in a process of its own (fork_server.py); a few go
through `python -m kdqat` as well, which imports everything anew.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.cli.case import OURS, Case
from tests.cli.cases_recipe import CLASSES, FORMATS, KEYS, VALUES
from tests.cli.cases_run import DATA, MODELS, RECIPES, RUNS
from tests.cli.fork_server import ROOT, Done, server
from tests.cli.recipes import recipe, stories, write

CASES = [*KEYS, *CLASSES, *VALUES, *FORMATS, *MODELS, *DATA, *RECIPES, *RUNS]


def execute(case: Case, folder: Path) -> tuple[str, Done]:
    if case.setup is not None:
        case.setup(folder)
    content = recipe(**case.changes)
    for place in (content["model"].get("student"), (content["model"].get("teacher") or {}).get("init_args", {})):
        if isinstance(place, dict) and place.get("path") == "STORIES":
            place["path"] = str(stories())
    write(folder, content)
    argv = case.argv or (case.verb, "recipe.yaml", *case.options)
    return argv[0], server().run(folder, *argv, before=case.before)


def require_one_clear_line(verb: str, done: Done, says: tuple[str, ...]) -> None:
    assert done.code == 2, done.err
    lines = done.err.splitlines()
    assert [line for line in lines if not OURS.match(line)] == lines[-1:], done.err  # no line of a library
    assert lines[-1].startswith(f"kdqat {verb}: ") and "Traceback" not in done.err
    assert len(lines[-1]) < 600, lines[-1]
    for words in says:
        assert words in lines[-1], lines[-1]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_bad_input_is_one_clear_line_and_exit_code_2(case: Case, tmp_path: Path) -> None:
    require_one_clear_line(*execute(case, tmp_path), case.says)


ANEW = ["an unknown key of model", "a data file that is missing"]


@pytest.mark.parametrize("name", ANEW)
def test_bad_input_is_one_clear_line_in_a_process_that_imports_everything(name: str, tmp_path: Path) -> None:
    case = next(case for case in CASES if case.name == name)
    write(tmp_path, **case.changes)
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-m", "kdqat", case.verb, "recipe.yaml"], cwd=tmp_path, env=env,
                          capture_output=True, text=True)  # fmt: skip
    require_one_clear_line(case.verb, Done(done.returncode, done.stdout, done.stderr), case.says)


def test_every_case_has_a_name_of_its_own() -> None:
    assert len({case.name for case in CASES}) == len(CASES) >= 40
