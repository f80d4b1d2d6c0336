"""The verb `study`: many runs of one recipe. Loads no torch; its runs do."""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import yaml
from rich.console import Console

from kdqat.study import Study, Trial, planned, read_study, run_study, variations
from kdqat.study.launch import Forked, Fresh
from kdqat.study.results import Results


def study(options: argparse.Namespace, rest: Sequence[str], main: Callable[[list[str]], None]) -> int:
    """Run a study file, or say what it would run."""
    if rest:
        raise ValueError(f"unknown argument {rest[0]!r}; a study is changed in its file")
    asked = read_study(options.study)
    given = {"workers": options.workers, "workers_per_gpu": options.workers_per_gpu}
    for key, value in given.items():
        if value is not None and value < 1:
            raise ValueError(f"--{key} must be at least 1, not {value}")
    asked = replace(asked, **{key: value for key, value in given.items() if value is not None})
    console = Console(highlight=False, markup=False, soft_wrap=True)
    if options.dry_run:
        return dry_run(asked, console)
    launch = partial(Forked, verb=main, preload="kdqat.cli.preload") if asked.reuse_imports else Fresh
    return run_study(asked, console, launch, screen_only=options.screen_only)


def dry_run(asked: Study, console: Console) -> int:
    """List the runs with their states, and parse the recipe of each variation; nothing is written.

    Raises:
        ValueError: if recipes cannot be parsed, or settings changed under results that are there.
    """
    which = variations(asked)
    runs = planned(asked, which)
    results = Results(asked.out)
    left = 0
    for trial in runs:
        result = results.read(trial)
        state = result["status"] if result else "to do"
        left += state != "done"
        if trial.stage == "full" and asked.screen and state != "done":
            state = "if it survives"
        console.print(f"{trial.stage:6}  {state:14}  {trial.name}")
    note = ""
    if asked.screen:
        count = sum(trial.stage == "screen" for trial in runs)
        within = f" in each {' and '.join(asked.screen.per)}" if asked.screen.per else ""
        note = f": {count} short runs, then the best {asked.screen.keep}{within}, which start anew"
    console.print(f"{len(which)} variations, {len(runs)} runs at most, {left} of them not done{note}")
    problems = _parse([next(t for t in runs if t.variation == variation) for variation in which])
    if problems:
        raise ValueError(f"{len(problems)} recipes cannot be parsed, the first one: {problems[0]}")
    return 0


def _parse(trials: Sequence[Trial]) -> list[str]:
    """What is wrong with the recipes of `trials`: found in a process of its own, for it needs torch."""
    with tempfile.TemporaryDirectory() as folder:
        paths = [Path(folder) / f"{trial.name}.yaml" for trial in trials]
        for path, trial in zip(paths, trials, strict=True):
            path.write_text(yaml.safe_dump(trial.recipe, sort_keys=False))
        command = [sys.executable, "-m", "kdqat.cli.check", *map(str, paths)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode and not done.stdout.strip():
            raise ValueError(f"the recipes could not be checked: {done.stderr.strip().splitlines()[-1:]}")
    return done.stdout.splitlines() if done.returncode else []
