"""Studies of toys, really run: the same run as `kdqat fit`, stopped and resumed, forked, in fresh interpreters."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from kdqat.study.launch import claim
from tests.cli.fork_server import ROOT, run
from tests.study.cases import METRIC, Served, said, study_of

VARY = {"model.optimizer.lr": [1e-4, 1e-2]}


def student(run: Path) -> dict[str, torch.Tensor]:
    return {**load_file(run / "student" / "model.safetensors"), **load_file(run / "student" / "quantizers.safetensors")}


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def fitted(folder: Path, study_out: Path, name: str) -> dict[str, torch.Tensor]:
    """What `kdqat fit` makes of the recipe of a study's run."""
    recipe = yaml.safe_load((study_out / "recipes" / f"{name}.yaml").read_text())
    recipe["trainer"]["default_root_dir"] = str(folder / "alone")
    (folder / "alone.yaml").write_text(yaml.safe_dump(recipe))
    run(folder, "fit", "alone.yaml")
    return student(folder / "alone")


def command(folder: Path, *options: str) -> subprocess.Popen[str]:
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "",
           "KDQAT_CACHE": str(ROOT / ".pytest_cache" / "kdqat")}  # fmt: skip
    argv = [sys.executable, "-m", "kdqat", "study", str(folder / "study.yaml"), *options]
    return subprocess.Popen(argv, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, cwd=folder)


@pytest.mark.slow
def test_a_run_of_a_study_is_the_run_that_fit_makes_alone(tmp_path: Path) -> None:
    study = study_of(tmp_path, vary=VARY, seeds=[0, 1], keep=["student"])
    code, text = said(study, Served(tmp_path))
    assert code == 0, text
    made = {path.name: student(path) for path in (tmp_path / "out" / "runs").iterdir()}
    assert len(made) == 4
    assert same(made["lr-0.01_seed-1"], fitted(tmp_path, study.out, "lr-0.01_seed-1"))
    assert not same(made["lr-0.01_seed-0"], made["lr-0.01_seed-1"])  # seeds reach the order of the rows
    result = json.loads((study.out / "results" / "lr-0.01_seed-1.json").read_text())
    assert result["metrics"][METRIC] > 0 and "train/loss" in result["metrics"] and result["rtn"][METRIC] > 0
    assert not (study.out / "runs" / "lr-0.01_seed-1" / "checkpoints").exists()


def test_a_bad_variation_fails_and_the_others_go_on(tmp_path: Path) -> None:
    study = study_of(tmp_path, vary={"model.quantizer": {"good": {"class_path": "LSQ"}, "bad": {"class_path": "LSQQ"}}})
    code, text = said(study, Served(tmp_path))
    assert code == 1 and "quantizer-bad_seed-0: FAILED" in text and "unknown class 'LSQQ'" in text
    assert json.loads((study.out / "results" / "quantizer-good_seed-0.json").read_text())["status"] == "done"


def test_a_stopped_study_goes_on_where_it_was_and_ends_with_the_same_bits(tmp_path: Path) -> None:
    recipe = {"trainer__max_steps": 12, "trainer__callbacks": [{"class_path": "Checkpoints"}]}
    study = study_of(tmp_path, recipe=recipe, vary=VARY, keep=["student", "checkpoints"])
    first = study.out / "runs" / "lr-0.0001_seed-0"

    def stop_in_the_middle() -> None:
        while not any(first.glob("metrics.csv")) and not (first / "tensorboard").is_dir():
            time.sleep(0.02)
        time.sleep(0.3)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=stop_in_the_middle, daemon=True).start()
    code, text = said(study, Served(tmp_path / "one", "tests.cli.sabotage:slow_steps"))
    assert code == 128 + signal.SIGTERM and "stopped lr-0.0001_seed-0" in text, text
    (checkpoint,) = (first / "checkpoints").glob("step=*.ckpt")
    assert 0 < int(checkpoint.stem.partition("=")[2]) < 12
    assert not (study.out / "results").exists()
    code, text = said(study, Served(tmp_path / "two"))
    assert code == 0, text
    assert same(student(first), fitted(tmp_path, study.out, "lr-0.0001_seed-0"))


@pytest.fixture(scope="module")
def forked(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, str]]:
    """A study through the real command line, with reuse_imports and two runs at once; what it printed."""
    folder = tmp_path_factory.mktemp("forked")
    study_of(folder, vary=VARY, seeds=[0, 1], keep=["student"], reuse_imports=True, workers=2,
             screen={"max_steps": 2, "keep": 1})  # fmt: skip
    process = command(folder)
    text, _ = process.communicate()
    assert process.returncode == 0, text
    yield folder, text


def test_forked_runs_are_the_runs_that_fit_makes_alone(forked: tuple[Path, str], tmp_path: Path) -> None:
    folder, text = forked
    (survivor,) = json.loads((folder / "out" / "study.json").read_text())["survivors"]
    for seed in (0, 1):
        name = f"{survivor}_seed-{seed}"
        assert same(student(folder / "out" / "runs" / name), fitted(tmp_path, folder / "out", name))
        (tmp_path / "alone").rename(tmp_path / f"alone{seed}")
    made = json.loads((folder / "out" / "runs" / name / "environment.json").read_text())
    assert made["command"] == f"kdqat fit {folder / 'out' / 'recipes' / name}.yaml --overwrite"
    assert "about" in text and "min" in text and "± " in text


def test_the_command_line_has_the_study_done_when_called_again(forked: tuple[Path, str]) -> None:
    folder, _ = forked
    file = str(folder / "study.yaml")
    code = (
        "import sys\nfrom kdqat.cli.main import main\n"
        f"try: main(['study', {file!r}])\nexcept SystemExit as end: assert not end.code, end.code\n"
        "print('\\n@', [n for n in ('torch', 'transformers', 'lightning') if n in sys.modules])"
    )
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
    assert "2 runs, 2 of them done" in done.stdout and done.stdout.rstrip().endswith("@ []")


def test_a_dry_run_lists_the_runs_parses_the_recipes_and_writes_nothing(tmp_path: Path) -> None:
    study_of(tmp_path, vary={"model.quantizer.class_path": ["LSQ", "LSQQ"]}, screen={"max_steps": 2, "keep": 1})
    process = command(tmp_path, "--dry_run")
    text, _ = process.communicate()
    assert process.returncode == 2
    assert "screen  to do           screen_class_path-LSQ_seed-0" in text and "full    if it survives" in text
    assert "2 variations, 4 runs at most, 4 of them not done: 2 short runs, then the best 1" in text
    assert "1 recipes cannot be parsed, the first one: screen_class_path-LSQQ_seed-0" in text and "LSQQ" in text
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_fresh_interpreters_are_stopped_in_order_and_nothing_is_left_running(tmp_path: Path) -> None:
    study_of(tmp_path, recipe={"trainer__max_steps": 100_000, "model__scheduler": None}, vary=VARY)
    process = command(tmp_path)
    run_dir = tmp_path / "out" / "runs" / "lr-0.0001_seed-0"
    while not (run_dir / "metrics.csv").is_file():
        assert process.poll() is None, process.communicate()
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    text, _ = process.communicate(timeout=60)
    assert process.returncode == 130 and "stopped lr-0.0001_seed-0" in text
    assert list((run_dir / "checkpoints").glob("step=*.ckpt"))
    commands = [path.read_bytes() for path in Path("/proc").glob("[0-9]*/cmdline") if path.exists()]
    assert not [line for line in commands if str(tmp_path).encode() in line]


@pytest.mark.slow
def test_forked_runs_of_a_study_that_is_killed_save_and_end(tmp_path: Path) -> None:
    recipe = {"trainer__max_steps": 100_000, "model__scheduler": None}
    study_of(tmp_path, recipe=recipe, vary=VARY, reuse_imports=True)
    process = command(tmp_path)
    run_dir = tmp_path / "out" / "runs" / "lr-0.0001_seed-0"
    while not (run_dir / "metrics.csv").is_file():
        assert process.poll() is None, process.communicate()
        time.sleep(0.1)
    process.kill()
    process.communicate()
    deadline = time.monotonic() + 30
    while not list((run_dir / "checkpoints").glob("step=*.ckpt")) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert list((run_dir / "checkpoints").glob("step=*.ckpt"))
    while time.monotonic() < deadline:
        try:
            claim(tmp_path / "out").close()
            return
        except ValueError:  # it is ending
            time.sleep(0.1)
    pytest.fail("the run goes on")


@pytest.mark.slow
def test_what_is_imported_before_a_fork_does_not_touch_cuda() -> None:
    code = (
        "import torch, sys\ncalls = []\n"
        "for name in ('is_available', 'device_count', 'init', '_lazy_init', 'get_device_capability'):\n"
        "    setattr(torch.cuda, name, lambda *args, name=name: calls.append(name))\n"
        "state = torch.get_rng_state()\nimport kdqat.cli.preload\n"
        "print(calls, 'torchao' in sys.modules, torch.equal(state, torch.get_rng_state()))"
    )
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
    assert done.stdout.split("\n")[-2] == "[] False True"


def test_numbers_of_a_study_of_nothing_but_training_come_from_its_log(tmp_path: Path) -> None:
    study = study_of(tmp_path, recipe={"evaluate": []}, metric="train/loss")
    code, text = said(study, Served(tmp_path))
    assert code == 0 and "train/loss" in text and any_number(study.out)


def any_number(out: Path) -> Any:
    return json.loads((out / "study.json").read_text())["full"][0]["mean"]["train/loss"] > 0
