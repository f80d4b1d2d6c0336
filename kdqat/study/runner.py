"""Runs what is not done, several at once, until all are done, somebody says stop, or nothing is left but failures."""

from __future__ import annotations

import os
import signal
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from rich.console import Console

from kdqat.study.expand import Trial
from kdqat.study.file import Study
from kdqat.study.launch import Child, Launcher
from kdqat.study.results import Results, measured, unmeasured

POLL_SECONDS = 0.1
STOPPED = (130, 143, -signal.SIGINT, -signal.SIGTERM)  # a run that was told to stop, not one that failed


@dataclass
class Running:
    """A run that goes on, in its slot."""

    trial: Trial
    child: Child
    slot: int
    started: float = field(default_factory=time.monotonic)


class Stop:
    """Signals that arrived; the first lets runs save and end, a second one interrupts them."""

    def __init__(self) -> None:
        self.received: list[int] = []

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Collect SIGTERM and Ctrl-C instead of dying of them."""
        kinds = (signal.SIGTERM, signal.SIGINT)
        before = {kind: signal.signal(kind, lambda number, _: self.received.append(number)) for kind in kinds}
        try:
            yield
        finally:
            for kind, handler in before.items():
                signal.signal(kind, handler)


def run_all(
    study: Study,
    trials: Sequence[Trial],
    results: Results,
    launcher: Launcher,
    places: Sequence[Mapping[str, str]],
    stop: Stop,
    console: Console,
    metric: str,
) -> list[dict[str, Any]]:
    """Run those of `trials` that are not done.

    Args:
        places: the environment of every run that goes on at once.
        metric: shown for every run that ends; a run that has none has failed, and keeps its result.

    Returns:
        The results of runs that failed, and of those that somebody else stopped; the latter are not recorded.

    Raises:
        ValueError: if the first runs to end, or all there are, did not measure `metric`: it is a typo.
    """
    done = [trial for trial in trials if results.done(trial)]
    for trial in done:
        results.drop_weights(trial, study.keep)
    waiting = deque(trial for trial in trials if trial not in done)
    before = [result for trial in done if (result := results.done(trial))]
    known = any(metric in result["metrics"] for result in before)
    if before and not known and not waiting:
        measured(before[0], metric)
    running: list[Running] = []
    free = list(range(len(places)))[::-1]
    failures = [_unmeasured(result, metric) for result in before if metric not in result["metrics"]]
    times: list[float] = []
    signalled = 0
    console.print(f"{len(trials)} runs, {len(done)} of them done, {min(len(places), max(len(waiting), 1))} at once")
    try:
        while running or (waiting and not stop.received):
            while free and waiting and not stop.received:
                trial, slot = waiting.popleft(), free.pop()
                results.log(trial).parent.mkdir(parents=True, exist_ok=True)
                child = launcher.start(results.begin(trial), places[slot], results.log(trial))
                running.append(Running(trial, child, slot))
            if len(stop.received) > signalled:
                signalled = len(stop.received)
                console.print(f"stopping {len(running)} runs, which save first" if signalled == 1 else "interrupting")
                _tell(running)
            ended = [run for run in running if run.child.poll() is not None]
            for run in ended:
                running.remove(run)
                free.append(run.slot)
                seconds = time.monotonic() - run.started
                result = _ended(run, seconds, results, study.keep)
                if result is None:
                    console.print(f"stopped {run.trial.name}")
                    if not stop.received:  # by somebody else
                        failures.append({"name": run.trial.name, "why": "it was told to stop", "log": []})
                    continue
                times.append(seconds)
                if result["status"] == "done" and metric not in result["metrics"] and known:
                    result = _unmeasured(result, metric)
                failures += [result] if result["status"] == "failed" else []
                known |= result["status"] == "done"  # or the next line raises
                left = len(waiting) + len(running)
                minutes = sum(times) / len(times) * left / len(places) / 60
                text = (
                    f"{metric} {measured(result, metric):.4g}"
                    if result["status"] == "done"
                    else f"FAILED: {result['why']}"
                )
                console.print(
                    f"[{len(trials) - left}/{len(trials)}] {run.trial.name}: {text}, {seconds:.0f} s; "
                    f"{left} left, about {minutes:.0f} min"
                )
            if not ended:
                time.sleep(POLL_SECONDS)
    finally:
        if running:  # an error of the study's own: nothing is left behind
            _tell(running)
            while any(run.child.poll() is None for run in running):
                time.sleep(POLL_SECONDS)
    return failures


def _tell(running: Sequence[Running]) -> None:
    for run in running:
        if run.child.poll() is None and run.child.pid is not None:
            os.kill(run.child.pid, signal.SIGTERM)


def _unmeasured(result: Mapping[str, Any], metric: str) -> dict[str, Any]:
    """A finished run without the number that is compared, as a failure: the others are compared without it."""
    return {**result, "status": "failed", "why": unmeasured(result, metric), "log": []}


def _ended(run: Running, seconds: float, results: Results, keep: list[str]) -> dict[str, Any] | None:
    """The result of a run that ended, recorded; None if it was stopped."""
    code = run.child.poll()
    if code in STOPPED:
        return None
    if code:
        return results.fail(run.trial, seconds, f"exit code {code}")
    try:
        return results.finish(run.trial, seconds, keep)
    except ValueError as error:
        return results.fail(run.trial, seconds, str(error))
