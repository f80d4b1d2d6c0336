"""Starting a run in a process of its own, and where: which GPU, how many threads.

Either a fresh interpreter (`python -m kdqat`), or, with `reuse_imports`, a fork of a process that has imported torch
and what goes with it, and has touched neither CUDA nor a random number: the same run, without the seconds of imports.
"""

from __future__ import annotations

import fcntl
import multiprocessing
import os
import subprocess
import sys
import threading
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

Verb = Callable[[list[str]], None]


class Child(Protocol):
    """A process that runs."""

    @property
    def pid(self) -> int | None: ...
    def poll(self) -> int | None:
        """Its exit code, negative for a signal; None while it runs."""


class Launcher(Protocol):
    """What starts runs."""

    def start(self, arguments: list[str], environment: Mapping[str, str], log: Path) -> Child:
        """Start `kdqat arguments...` with more environment variables, its output in `log`."""


class Fresh:
    """Starts interpreters.

    Args:
        lock: a file that every run holds open, so that nobody starts the study twice (`claim`).
    """

    def __init__(self, lock: Any) -> None:
        self.lock = lock

    def start(self, arguments: list[str], environment: Mapping[str, str], log: Path) -> Child:
        with log.open("w") as file:
            return subprocess.Popen(
                [sys.executable, "-m", "kdqat", *arguments],
                env={**os.environ, **environment},
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # Ctrl-C reaches the study alone, which passes it on once
                pass_fds=(self.lock.fileno(),),
            )


class Forked:
    """Forks runs from one process.

    Args:
        lock: as of `Fresh`.
        verb: what a run calls with its arguments; an importable function.
        preload: a module that the process imports beforehand.
    """

    def __init__(self, lock: Any, verb: Verb, preload: str) -> None:
        self.lock, self.verb = lock, verb
        os.environ.setdefault(
            "PYTORCH_NVML_BASED_CUDA_CHECK", "1"
        )  # looking for GPUs must not start CUDA before a fork
        self.context: Any = multiprocessing.get_context("forkserver")
        self.context.set_forkserver_preload([preload])

    def start(self, arguments: list[str], environment: Mapping[str, str], log: Path) -> Child:
        process = self.context.Process(
            target=_forked, args=(self.verb, arguments, dict(environment), str(log), self.lock.name)
        )
        process.start()
        return _ForkedChild(process)


class _ForkedChild:
    def __init__(self, process: Any) -> None:
        self.process = process

    @property
    def pid(self) -> int | None:
        return self.process.pid

    def poll(self) -> int | None:
        return self.process.exitcode


def _forked(verb: Verb, arguments: list[str], environment: dict[str, str], log: str, lock: str) -> None:
    os.setsid()
    held = open(lock)  # noqa: SIM115 (until the process ends)
    fcntl.flock(held, fcntl.LOCK_SH)
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    for stream in (1, 2):
        os.dup2(file, stream)
    sys.stdout = open(1, "w", closefd=False)  # noqa: SIM115
    sys.stderr = open(2, "w", buffering=1, closefd=False)  # noqa: SIM115
    os.environ.update(environment)
    sys.argv = ["kdqat", *arguments]
    if "OMP_NUM_THREADS" in environment:  # torch read it when it was imported
        import torch

        torch.set_num_threads(int(environment["OMP_NUM_THREADS"]))
    threading.Thread(target=_end_with_parent, daemon=True).start()
    try:
        verb(arguments)
    except SystemExit:
        raise
    except BaseException:
        traceback.print_exc()
        sys.exit(1)


def _end_with_parent() -> None:
    """A study that was killed takes its runs with it; they save first."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os.kill(os.getpid(), 15)


def claim(out: Path) -> Any:
    """The lock of a study: exclusive for a moment, then shared with its runs.

    Raises:
        ValueError: if another process runs this study, or runs of a killed one go on.
    """
    out.mkdir(parents=True, exist_ok=True)
    lock = (out / ".lock").open("w")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        raise ValueError(
            f"{out}: runs of this study are going on; wait for their end, or choose another out"
        ) from error
    fcntl.flock(lock, fcntl.LOCK_SH)
    return lock


def devices(recipe: Mapping[str, Any]) -> int:
    """How many GPUs a run of this recipe wants: trainer.devices where it is a number."""
    asked = (recipe.get("trainer") or {}).get("devices")
    return asked if isinstance(asked, int) and asked > 0 else 1


def slots(gpus: Sequence[str], workers: int | None, per_gpu: int, each: int = 1) -> list[dict[str, str]]:
    """The environment of every run that goes on at once.

    Args:
        gpus: those there are; without any, runs share the CPU.
        workers: at most so many runs; None: as many as GPUs allow, or one.
        each: GPUs of one run.

    Raises:
        ValueError: if a run wants more GPUs than there are.
    """
    if gpus and len(gpus) < each:
        raise ValueError(f"trainer.devices: {each} GPUs a run, and this machine has {len(gpus)}")
    places = [",".join(gpus[i : i + each]) for i in range(0, len(gpus) - each + 1, each)]
    if places:
        found = [{"CUDA_VISIBLE_DEVICES": place} for _ in range(per_gpu) for place in places][:workers]
    else:
        found = [{} for _ in range(workers or 1)]
    if len(found) > 1 and "OMP_NUM_THREADS" not in os.environ:
        threads = str(max(1, (os.cpu_count() or 1) // len(found)))
        found = [{**slot, "OMP_NUM_THREADS": threads} for slot in found]
    return found


def visible_gpus() -> list[str]:
    """What may stand in CUDA_VISIBLE_DEVICES, without loading torch."""
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
    if chosen is not None:
        return [gpu.strip() for gpu in chosen.split(",") if gpu.strip()]
    return [str(index) for index in range(len(list(Path("/dev").glob("nvidia[0-9]*"))))]
