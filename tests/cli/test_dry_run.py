"""`kdqat fit --dry_run` prints what a run will take and leaves nothing behind; `fit` says it in a line."""

from __future__ import annotations

from pathlib import Path

import pytest

from kdqat.cli.main import main
from tests.cli.fork_server import run, server
from tests.cli.recipes import DROP, write


def files(folder: Path) -> dict[Path, int]:
    """What is in a folder and when it was written, but for what the test's server keeps there."""
    found = [p for p in folder.rglob("*") if p.name not in (".stdout", ".stderr")]
    return {p: p.stat().st_mtime_ns for p in found}


def test_a_dry_run_prints_the_table_and_leaves_no_file(tmp_path: Path) -> None:
    write(tmp_path)
    text = run(tmp_path, "fit", "recipe.yaml", "--dry_run")
    for word in ("student weights", "gradients", "optimizer state", "activations", "at the peak", "there", "2 steps"):
        assert word in text
    assert set(files(tmp_path)) == {tmp_path / "recipe.yaml"}


def test_a_dry_run_takes_overrides_and_leaves_a_finished_run_alone(tmp_path: Path) -> None:
    write(tmp_path, evaluate=DROP, export=None)
    done = server().run(tmp_path, "fit", "recipe.yaml")
    assert done.code == 0 and "memory: about" in done.err
    before = files(tmp_path)
    assert "7 steps" in run(tmp_path, "fit", "recipe.yaml", "--dry_run", "--trainer.max_steps", "7")
    assert before == files(tmp_path)


def test_a_run_that_does_not_fit_is_warned_of_loudly(tmp_path: Path) -> None:
    write(tmp_path, data__init_args__batch_size=2**31)
    text = run(tmp_path, "fit", "recipe.yaml", "--dry_run")
    assert "WARNING" in text and "more than there is" in text


TYPO = {"roles": ["qq"]}


@pytest.mark.parametrize(
    "name", ["Freeze", "LoraAdapters", "FreezeWindow", "GradientLog", "SignalLog", "OscillationLog"]
)
def test_a_selection_without_layers_is_found_before_anything_is_written(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path, trainer__callbacks=[{"class_path": name, "init_args": TYPO}])
    for options in (["--dry_run"], []):
        with pytest.raises(SystemExit) as stop:
            main(["fit", "recipe.yaml", *options])
        error = capsys.readouterr().err
        assert stop.value.code == 2 and f"{name}: roles 'qq' matches no layer of the plan" in error
        assert {path for path in files(tmp_path) if path.is_file()} == {tmp_path / "recipe.yaml"}


def test_callbacks_choose_among_the_layers_of_prepared(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(tmp_path, trainer__default_root_dir=str(tmp_path / "run"), evaluate=DROP, export=DROP)
    with pytest.raises(SystemExit):
        main(["quantize", str(path)])
    before = files(tmp_path / "run")
    write(tmp_path, trainer__default_root_dir=str(tmp_path / "run"), evaluate=DROP, export=DROP,
          trainer__callbacks=[{"class_path": "SignalLog", "init_args": TYPO}])  # fmt: skip
    with pytest.raises(SystemExit) as stop:
        main(["fit", str(path)])
    assert stop.value.code == 2 and "SignalLog: roles 'qq'" in capsys.readouterr().err
    assert files(tmp_path / "run") == before


def test_a_dry_run_of_a_bad_recipe_says_one_line(tmp_path: Path) -> None:
    write(tmp_path, data=DROP)
    done = server().run(tmp_path, "fit", "recipe.yaml", "--dry_run")
    assert done.code == 2 and "fit needs a data section" in done.err
