"""A run that was killed and resumed, however often, ends with the very bits of one that was left alone.

SIGKILL at random moments: between steps, while a checkpoint is half written (slowed down, so that many kills fall
there), before the first checkpoint, and after the last step. Micro-batches are accumulated and the run validates.
"""

from __future__ import annotations

import csv
import random
import signal
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.cli.fork_server import Command, server
from tests.cli.recipes import DROP, write

STEPS = 12
RESULT = ("model.safetensors", "quantizers.safetensors", "quant_plan.json")


def training(folder: Path) -> None:
    """A recipe with everything that has a state: accumulation, clipping, warm-up, validation, best val/kl."""
    checkpoints = {"class_path": "Checkpoints", "init_args": {"every_n_steps": 2, "keep_last": 2}}
    write(folder, evaluate=DROP, export=DROP, trainer={
        "accelerator": "cpu", "max_steps": STEPS, "accumulate_grad_batches": 2, "gradient_clip_val": 1.0,
        "val_check_interval": 8, "log_every_n_steps": 1, "default_root_dir": "run", "callbacks": [checkpoints],
    }, data__init_args__limit=None)  # fmt: skip


def result(folder: Path) -> dict[str, bytes]:
    """The files of the student, and the weights that had the best val/kl."""
    best = torch.load(folder / "run" / "checkpoints" / "best.ckpt", weights_only=True)
    weights = {name: value.numpy().tobytes() for name, value in best["state_dict"].items()}
    files = {name: (folder / "run" / "student" / name).read_bytes() for name in RESULT}
    return {**files, **weights, "best step": str(best["global_step"]).encode()}


def curve(folder: Path) -> list[dict[str, str]]:
    """The rows of metrics.csv, empty cells left out."""
    with (folder / "run" / "metrics.csv").open(newline="") as file:
        return [{key: value for key, value in row.items() if value} for row in csv.DictReader(file)]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("uninterrupted")
    training(folder)
    done = server().run(folder, "fit", "recipe.yaml")
    assert done.code == 0, done.err
    return folder


def until(command: Command, happened: Callable[[], object]) -> bool:
    """Wait for something; False if the command ended before."""
    while not happened():
        if not command.running():
            return False
        time.sleep(0.001)
    return True


def moment(kind: str, command: Command, rng: random.Random, directory: str = "run") -> bool:
    """Wait for a moment of this kind; False if the command ended before it came."""
    run = command.folder / directory
    seen = set((run / "checkpoints").glob("*.ckpt"))
    if kind == "between":
        came = until(command, lambda: set((run / "checkpoints").glob("*.ckpt")) - seen)
        time.sleep(rng.uniform(0, 0.15))
    elif kind == "saving":
        came = until(command, lambda: list((run / "checkpoints").glob(".*.part")))
        time.sleep(rng.uniform(0, 0.09))
    elif kind in MARKERS:
        (run / MARKERS[kind]).unlink(missing_ok=True)
        came = until(command, (run / MARKERS[kind]).exists)
        time.sleep(rng.uniform(0, 0.3))
    else:
        came = True
        time.sleep(rng.uniform(0, 0.2))
    return came and command.running()


SABOTAGE = {"between": "slow_steps", "saving": "slow_saves", "after": "slow_end", "early": "slow_steps",
            "validating": "slow_validation"}  # fmt: skip
MARKERS = {"after": "training_is_over", "validating": "validating"}


def kill_and_resume(folder: Path, kinds: list[str], rng: random.Random, seen: Counter[str]) -> None:
    """Run to the end, killed once at a moment of each of `kinds`; counts what was killed."""
    training(folder)
    how: list[str] = []
    for kind in [*kinds, None]:
        before = f"tests.cli.sabotage:{SABOTAGE[kind]}" if kind else None
        command = server().start(folder, "fit", "recipe.yaml", *how, before=before)
        killed = kind is not None and moment(kind, command, rng)
        if killed:
            command.kill()
        done = command.wait()
        assert done.code == (-9 if killed else 0), done.err
        if kind and killed:
            seen[kind] += 1
            seen["half a file"] += any((folder / "run" / "checkpoints").glob(".*.part"))
        if not killed:
            break
        how = ["--resume"]
        if not list((folder / "run" / "checkpoints").glob("step=*.ckpt")):
            refused = server().run(folder, "fit", "recipe.yaml", "--resume")
            assert refused.code == 2 and "no checkpoint to resume from" in refused.err
            how, seen["before the first checkpoint"] = ["--overwrite"], seen["before the first checkpoint"] + 1


RUNS = [
    ["early", "between", "saving", "after"],
    ["saving", "validating", "saving", "validating"],
    ["saving", "early", "between", "between"],
    ["between", "saving", "saving", "after"],
    ["early", "validating", "between", "saving"],
]


@pytest.mark.parametrize("number", range(len(RUNS)))
def test_a_killed_and_resumed_run_ends_with_the_bits_of_an_uninterrupted_one(
    number: int, uninterrupted: Path, tmp_path: Path
) -> None:
    seen: Counter[str] = Counter()
    kill_and_resume(tmp_path, RUNS[number], random.Random(number), seen)
    print(dict(seen))
    assert sum(seen[kind] for kind in SABOTAGE) == len(RUNS[number]), seen
    assert seen["half a file"] >= RUNS[number].count("saving"), seen
    assert result(tmp_path) == result(uninterrupted)
    killed, whole = curve(tmp_path), {row["step"]: row for row in curve(uninterrupted)}
    assert all(row.items() <= whole[row["step"]].items() for row in killed)
    # a step's row is written after its checkpoint: a kill between the two costs the log that row
    assert sum(row in killed for row in whole.values()) >= len(whole) - len(RUNS[number])
    validated = [[row for row in rows if "val/kl" in row] for rows in (killed, whole.values())]
    assert [row["val/kl"] for row in validated[0]] == [row["val/kl"] for row in validated[1]]
    leftovers = [p.name for p in (tmp_path / "run").rglob("*") if p.name.startswith(".")]
    assert not leftovers


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_stops_and_the_resumed_run_ends_with_the_same_bits(
    number: int, uninterrupted: Path, tmp_path: Path
) -> None:
    training(tmp_path)
    command = server().start(tmp_path, "fit", "recipe.yaml", before="tests.cli.sabotage:slow_steps")
    assert until(command, lambda: list((tmp_path / "run" / "checkpoints").glob("step=*.ckpt")))
    time.sleep(0.07)  # into a step without a regular checkpoint, or out of it
    command.kill(number)
    done = command.wait()
    assert done.code == 128 + number
    assert "saved; `kdqat fit run --resume` goes on" in done.err and "Traceback" not in done.err
    assert not (tmp_path / "run" / "student").exists()
    stopped_at = int(done.err.rpartition("stopped at step ")[2].split(",")[0])
    assert 0 < stopped_at < STEPS
    assert (tmp_path / "run" / "checkpoints" / f"step={stopped_at:08d}.ckpt").is_file()
    resumed = server().run(tmp_path, "fit", "recipe.yaml", "--resume")
    assert resumed.code == 0, resumed.err
    assert result(tmp_path) == result(uninterrupted) and curve(tmp_path) == curve(uninterrupted)


def test_ctrl_c_before_training_is_one_line(tmp_path: Path) -> None:
    training(tmp_path)
    command = server().start(tmp_path, "fit", "recipe.yaml", before="tests.cli.sabotage:slow_source")
    assert until(command, (tmp_path / "loading").exists)
    command.kill(signal.SIGINT)
    done = command.wait()
    assert done.code == 130
    assert done.err.splitlines() == ["kdqat fit: interrupted"]


def test_a_second_ctrl_c_stops_at_once(tmp_path: Path) -> None:
    training(tmp_path)
    command = server().start(tmp_path, "fit", "recipe.yaml", before="tests.cli.sabotage:slow_steps")
    assert until(command, lambda: list((tmp_path / "run" / "checkpoints").glob("step=*.ckpt")))
    for _ in range(2):
        command.kill(signal.SIGINT)
        time.sleep(0.005)
    done = command.wait()
    assert done.code == 130
    assert done.err.splitlines()[-1] == "kdqat fit: interrupted" and "Traceback" not in done.err


def test_a_full_disk_leaves_the_earlier_checkpoint_from_which_the_run_resumes(
    uninterrupted: Path, tmp_path: Path
) -> None:
    training(tmp_path)
    done = server().run(tmp_path, "fit", "recipe.yaml", before="tests.cli.sabotage:full_disk")
    assert done.code == 2
    assert "No space left on device" in done.err and "earlier ones are intact" in done.err and "--resume" in done.err
    assert {p.name for p in (tmp_path / "run" / "checkpoints").iterdir()} <= {"step=00000002.ckpt", "best.ckpt"}
    resumed = server().run(tmp_path, "fit", "recipe.yaml", "--resume")
    assert resumed.code == 0, resumed.err
    assert result(tmp_path) == result(uninterrupted)


def test_a_checkpoint_cut_short_is_passed_over(uninterrupted: Path, tmp_path: Path) -> None:
    training(tmp_path)
    command = server().start(tmp_path, "fit", "recipe.yaml", before="tests.cli.sabotage:slow_end")
    assert moment("after", command, random.Random(0))
    command.kill()
    command.wait()
    older, newer = sorted((tmp_path / "run" / "checkpoints").glob("step=*.ckpt"))
    newer.write_bytes(newer.read_bytes()[:-5000])
    resumed = server().run(tmp_path, "fit", "recipe.yaml", "--resume")
    assert resumed.code == 0, resumed.err
    assert f"{newer.name} is incomplete; resuming from {older.name} instead" in resumed.err
    assert result(tmp_path) == result(uninterrupted)


@pytest.mark.parametrize("what", ["data", "moments"])
def test_the_comparison_tells_a_resumed_run_that_forgot_something(
    what: str, uninterrupted: Path, tmp_path: Path
) -> None:
    training(tmp_path)
    command = server().start(tmp_path, "fit", "recipe.yaml", before="tests.cli.sabotage:slow_steps")
    assert moment("between", command, random.Random(0))
    command.kill()
    command.wait()
    resumed = server().run(tmp_path, "fit", "recipe.yaml", "--resume", before=f"tests.cli.sabotage:forget_the_{what}")
    assert resumed.code == 0, resumed.err
    assert result(tmp_path) != result(uninterrupted)
