"""The verb `signals` in a run directory."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from kdqat.cli.main import main


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    content = {
        "model": {
            "student": {"path": "toy:llama"},
            "plan": {"class_path": "Uniform", "init_args": {"scheme": "W4A16_G32"}},
            "quantizer": {"class_path": "LSQ"},
            "initializer": {"class_path": "RTN"},
        },
        "trainer": {"accelerator": "cpu", "default_root_dir": str(tmp_path / "run")},
    }
    path = tmp_path / "toy.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


def call(*arguments: str | Path) -> int:
    with pytest.raises(SystemExit) as stop:
        main([*map(str, arguments), "--text", "kdqat:prose", "--num_rows", "2", "--num_tokens", "16"])
    return int(stop.value.code or 0)


def test_it_prints_a_table_and_an_answer_and_writes_them(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call("signals", recipe) == 0
    printed = capsys.readouterr().out
    assert "| role | layers | sqnr_db |" in printed and "freeze " in printed
    content = json.loads((recipe.parent / "run" / "signals.json").read_text())
    assert content["student"] == "not saved" and set(content["recommendation"]["ratios"]) >= {"q", "o", "down"}
    assert {row["metric"] for row in content["rows"]} >= {"sqnr_db", "ce_weight_energy_ratio"}


def test_rows_of_one_token_are_refused_and_nothing_is_written(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["signals", str(recipe), "--text", "kdqat:prose", "--num_tokens", "1"])
    assert stop.value.code == 2 and "--num_tokens must be at least 2, not 1" in capsys.readouterr().err
    assert not (recipe.parent / "run").exists()


def test_what_was_measured_is_kept_where_nothing_can_be_recommended(
    recipe: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuses(rows: object) -> None:
        raise ValueError("nothing to recommend from")

    monkeypatch.setattr("kdqat.cli.signals.recommend", refuses)
    assert call("signals", recipe) == 2 and "nothing to recommend from" in capsys.readouterr().err
    assert json.loads((recipe.parent / "run" / "signals.json").read_text())["rows"]


def test_it_refuses_its_own_output_unless_it_may_overwrite_it(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call("signals", recipe) == 0
    capsys.readouterr()
    assert call("signals", recipe) == 2
    assert "signals.json exists already: use --overwrite" in capsys.readouterr().err
    assert call("signals", recipe.parent / "run", "--overwrite") == 0
