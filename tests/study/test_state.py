"""What is done stays done, what failed is tried again, what changed is refused; runs are pretended."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest

from kdqat.cli.main import main
from kdqat.study import Study
from kdqat.study.launch import claim, devices, slots, visible_gpus
from tests.study.cases import METRIC, Logs, Pretends, lr_of, said, study_of

VARY = {"model.optimizer.lr": [1e-4, 1e-3]}


def by_lr(recipe: dict[str, Any]) -> float:
    return lr_of(recipe) * recipe["seed_everything"]


def study(folder: Path, **keys: Any) -> Study:
    return study_of(folder, **{"vary": VARY, "seeds": [1, 2], **keys})


def results(folder: Path) -> dict[str, dict[str, Any]]:
    return {path.stem: json.loads(path.read_text()) for path in (folder / "out" / "results").iterdir()}


def test_a_second_call_runs_nothing_and_says_the_same(tmp_path: Path) -> None:
    runs, again = Pretends(by_lr), Pretends(by_lr)
    assert said(study(tmp_path), runs)[0] == 0 and len(runs.calls) == 4
    page = (tmp_path / "out" / "study.md").read_text()
    assert "0.00015 ± 7.1e-05" in page
    code, text = said(study(tmp_path), again)
    assert code == 0 and not again.calls and "4 runs, 4 of them done" in text
    assert (tmp_path / "out" / "study.md").read_text() == page
    assert (tmp_path / "out" / "study.png").read_bytes()[:4] == b"\x89PNG"


def test_only_the_results_need_to_be_carried_to_another_machine(tmp_path: Path) -> None:
    said(study(tmp_path), Pretends(by_lr))
    there = tmp_path / "there"
    there.mkdir()
    shutil.copytree(tmp_path / "out" / "results", there / "out" / "results")
    again = Pretends(by_lr)
    code, _ = said(study(there, seeds=[1, 2, 3]), again)  # a seed more
    assert code == 0 and again.names() == ["lr-0.0001_seed-3", "lr-0.001_seed-3"]
    assert json.loads((there / "out" / "study.json").read_text())["full"][0]["n"] == 3


def test_a_result_says_what_was_run_where(tmp_path: Path) -> None:
    said(study(tmp_path), Pretends(by_lr))
    result = results(tmp_path)["lr-0.001_seed-2"]
    assert result["metrics"][METRIC] == 0.002 and result["rtn"][METRIC] == 9.0
    assert (result["commit"], result["hardware"], result["seed"], result["labels"]) == ("abc", "none", 2, {"lr": 1e-3})
    assert result["recipe"]["model"]["optimizer"]["init_args"]["lr"] == 1e-3 and len(result["settings_hash"]) == 64


def test_a_changed_setting_under_a_name_that_is_done_is_an_error_before_anything_runs(tmp_path: Path) -> None:
    said(study(tmp_path), Pretends(by_lr))
    again = Pretends(by_lr)
    with pytest.raises(
        ValueError, match=r"lr-0\.0001_seed-1 was run with another data\.init_args\.seq_len, trainer\.max"
    ):
        said(study(tmp_path, set={"trainer.max_steps": 9, "data.seq_len": 16}), again)
    assert not again.calls


def test_a_study_may_be_moved_and_its_export_changed(tmp_path: Path) -> None:
    said(study(tmp_path), Pretends(by_lr))
    (tmp_path / "out").rename(tmp_path / "moved")
    again = Pretends(by_lr)
    said(study(tmp_path, out=str(tmp_path / "moved"), keep=["export"]), again)
    assert not again.calls


def test_failures_are_recorded_with_their_log_and_tried_again_anew(tmp_path: Path) -> None:
    runs = Pretends(lambda recipe: 7 if lr_of(recipe) == 1e-3 else by_lr(recipe))
    code, text = said(study(tmp_path), runs)
    assert code == 1 and len(runs.calls) == 4 and "FAILED: exit code 7: the last line" in text
    result = results(tmp_path)["lr-0.001_seed-1"]
    assert result["status"] == "failed" and result["log"] == ["first line", "the last line"]
    page = (tmp_path / "out" / "study.md").read_text()
    assert "- lr-0.001_seed-2 failed: exit code 7: the last line" in page and "| 0.0001 |" in page
    checkpoint = tmp_path / "out" / "runs" / "lr-0.001_seed-1" / "checkpoints" / "step=1.ckpt"
    checkpoint.parent.mkdir(parents=True)
    checkpoint.touch()
    again = Pretends(by_lr)
    assert said(study(tmp_path), again)[0] == 0
    assert again.names() == ["lr-0.001_seed-1", "lr-0.001_seed-2"]
    assert [how for _, how in again.calls] == ["--overwrite", "--overwrite"]


def test_a_run_whose_logged_metric_is_nan_is_the_worst_and_the_study_goes_on(tmp_path: Path) -> None:
    made = study(tmp_path, metric="val/kl", vary={"model.optimizer.lr": [1.0, 0.1, 0.2]}, seeds=[0],
                 screen={"max_steps": 1, "keep": 1})  # fmt: skip
    code, text = said(made, Logs(lambda recipe: math.nan if lr_of(recipe) == 1.0 else lr_of(recipe)))
    assert code == 0 and "lr-1.0_seed-0: val/kl nan" in text, text
    assert json.loads((tmp_path / "out" / "study.json").read_text())["survivors"] == ["lr-0.1"]
    assert math.isnan(results(tmp_path)["screen_lr-1.0_seed-0"]["metrics"]["val/kl"])


def test_a_run_that_did_not_measure_the_metric_has_failed_and_the_others_go_on(tmp_path: Path) -> None:
    code, text = said(study(tmp_path, metric="val/kl"), Logs(lambda recipe: "" if lr_of(recipe) == 1e-3 else 2.0))
    assert code == 1 and "lr-0.001_seed-1: FAILED: metric 'val/kl' was not measured" in text, text
    assert "- lr-0.001_seed-2 failed: metric 'val/kl'" in (tmp_path / "out" / "study.md").read_text()
    assert [row["variation"] for row in json.loads((tmp_path / "out" / "study.json").read_text())["full"]] == [
        "lr-0.0001"
    ]
    again = Logs(by_lr)
    code, text = said(study(tmp_path, metric="val/kl"), again)  # nothing is lost, nothing is hidden
    assert code == 1 and not again.calls


def test_metrics_that_nobody_measured_are_named(tmp_path: Path) -> None:
    _, text = said(study(tmp_path, metrics=[METRIC, "val/perplx"]), Pretends(by_lr))
    note = f"metrics: nobody measured val/perplx; there is {METRIC}"
    assert note in text and note in (tmp_path / "out" / "study.md").read_text()


@pytest.mark.parametrize("option", ["--workers", "--workers_per_gpu"])
@pytest.mark.parametrize("number", ["-1", "0"])
def test_a_number_of_workers_below_1_is_an_error_and_does_not_hang(
    option: str, number: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kdqat.cli.study.run_study", lambda *_, **__: 0)  # it would wait for ever
    study(tmp_path)
    with pytest.raises(SystemExit) as stop:
        main(["study", str(tmp_path / "study.yaml"), option, number])
    assert stop.value.code == 2 and f"{option} must be at least 1, not {number}" in capsys.readouterr().err


def test_a_metric_that_no_finished_run_has_is_an_error(tmp_path: Path) -> None:
    said(study(tmp_path), Pretends(by_lr))
    with pytest.raises(ValueError, match=r"'val/kl' was not measured in lr-0\.0001_seed-1; there is"):
        said(study(tmp_path, metric="val/kl"), Pretends(by_lr))


def test_a_failed_run_may_be_mended_by_other_settings(tmp_path: Path) -> None:
    said(study(tmp_path), Pretends(lambda recipe: 7))
    assert said(study(tmp_path, set={"trainer.max_steps": 9}), Pretends(by_lr))[0] == 0


def test_an_interrupted_run_goes_on_from_its_checkpoint_with_its_own_settings_only(tmp_path: Path) -> None:
    def interrupted(recipe: dict[str, Any]) -> int:
        run = Path(recipe["trainer"]["default_root_dir"])
        if recipe["seed_everything"] == 2:
            (run / "checkpoints").mkdir(parents=True)
            (run / "checkpoints" / "step=1.ckpt").touch()
        return 143

    code, text = said(study(tmp_path), Pretends(interrupted))
    assert "stopped lr-0.001_seed-2" in text and not (tmp_path / "out" / "results").exists()
    assert code == 1  # nobody stopped the study: a run that is killed is not done
    with pytest.raises(ValueError, match=r"lr-0\.0001_seed-2 was run with another trainer\.max_steps"):
        said(study(tmp_path, set={"trainer.max_steps": 9}), Pretends(by_lr))
    again = Pretends(by_lr)
    (tmp_path / "out").rename(tmp_path / "moved")
    assert said(study(tmp_path, out=str(tmp_path / "moved")), again)[0] == 0
    assert [how for _, how in again.calls] == ["--overwrite", "--resume", "--overwrite", "--resume"]


def test_a_signal_lets_no_further_run_begin(tmp_path: Path) -> None:
    def signalled(recipe: dict[str, Any]) -> float:
        os.kill(os.getpid(), signal.SIGTERM)
        return by_lr(recipe)

    runs = Pretends(signalled)
    code, text = said(study(tmp_path, workers=2), runs)
    assert code == 128 + signal.SIGTERM and len(runs.calls) == 1 and "the same command goes on" in text
    assert len(results(tmp_path)) == 1  # what ended by then is not lost
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_short_runs_first_then_the_survivors_with_every_seed(tmp_path: Path) -> None:
    screen = {"max_steps": 2, "keep": 1}
    only = Pretends(by_lr)
    assert said(study(tmp_path, screen=screen), only, screen_only=True)[0] == 0
    assert only.names() == ["screen_lr-0.0001_seed-1", "screen_lr-0.001_seed-1"]
    runs = Pretends(by_lr)
    _, text = said(study(tmp_path, screen=screen), runs)
    assert runs.names() == ["lr-0.0001_seed-1", "lr-0.0001_seed-2"] and "start anew" in text
    assert [how for _, how in runs.calls] == ["--overwrite"] * 2
    content = json.loads((tmp_path / "out" / "study.json").read_text())
    assert content["survivors"] == ["lr-0.0001"] and len(content["screen"]) == 2 and content["full"][0]["n"] == 2


def test_weights_of_finished_runs_go_and_what_is_asked_for_stays(tmp_path: Path) -> None:
    _, text = said(study(tmp_path), Pretends(by_lr))
    run = tmp_path / "out" / "runs" / "lr-0.001_seed-2"
    assert "weights of finished runs are deleted" in text
    assert (run / "eval.json").is_file() and not (run / "student").exists()
    (run / "student").mkdir()  # as if killed between recording and deleting
    said(study(tmp_path), Pretends(by_lr))
    assert not (run / "student").exists()
    kept = tmp_path / "kept"
    kept.mkdir()
    _, text = said(study(kept, keep=["student"]), Pretends(by_lr))
    assert (kept / "out" / "runs" / run.name / "student").is_dir() and "deleted" not in text


def test_a_wrong_metric_ends_the_study_with_the_names_there_are_and_loses_nothing(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"'c4\.kl_mean' was not measured in lr-0\.0001_seed-1; there is kdqat:prose"):
        said(study(tmp_path, metric="c4.kl_mean"), Pretends(by_lr))
    again = Pretends(by_lr)
    assert said(study(tmp_path), again)[0] == 0 and len(again.calls) == 3


def test_a_damaged_result_is_an_error_with_the_remedy(tmp_path: Path) -> None:
    said(study(tmp_path), Pretends(by_lr))
    (tmp_path / "out" / "results" / "lr-0.001_seed-1.json").write_text("{")
    with pytest.raises(ValueError, match=r"lr-0\.001_seed-1\.json is damaged .*delete it"):
        said(study(tmp_path), Pretends(by_lr))


def test_without_matplotlib_there_is_the_table_and_the_command_to_get_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "matplotlib", None)
    code, text = said(study(tmp_path), Pretends(by_lr))
    assert code == 0 and "pip install 'kdqat[report]'" in text
    assert not (tmp_path / "out" / "study.png").exists() and (tmp_path / "out" / "study.md").is_file()


def test_a_study_that_runs_is_not_started_twice(tmp_path: Path) -> None:
    with claim(tmp_path / "out"), pytest.raises(ValueError, match="going on"):
        said(study(tmp_path), Pretends(by_lr))


def test_every_run_gets_a_gpu_of_its_own_or_shares_one_when_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,5, 7")
    gpus = visible_gpus()

    def places(*args: Any) -> list[str | None]:
        return [slot.get("CUDA_VISIBLE_DEVICES") for slot in slots(*args)]

    assert places(gpus, None, 1) == ["2", "5", "7"] and places(gpus, 2, 1) == ["2", "5"]
    assert places(gpus, 4, 2) == ["2", "5", "7", "2"] and places(gpus, 9, 1) == ["2", "5", "7"]
    assert places(gpus, None, 1, devices({"trainer": {"devices": 2}})) == ["2,5"]
    assert places([], None, 1) == [None] and places([], 3, 1) == [None] * 3
    with pytest.raises(ValueError, match=r"trainer\.devices: 4 GPUs a run, and this machine has 3"):
        slots(gpus, None, 1, 4)
    monkeypatch.delenv("OMP_NUM_THREADS")
    assert "OMP_NUM_THREADS" in slots([], 2, 1)[0] and "OMP_NUM_THREADS" not in slots([], 1, 1)[0]


def test_forked_runs_are_for_one_gpu_each(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="leave reuse_imports out"):
        said(study(tmp_path, reuse_imports=True, set={"trainer.devices": 2}), Pretends(by_lr))
