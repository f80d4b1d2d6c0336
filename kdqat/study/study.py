"""A study from its file to its table: short runs, the choice, full runs, what came out.

A survivor starts anew and does not go on from its short run: the schedule of the learning rate depends on the length
of a run, so the first steps of a short run are not those of a long one.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from rich.console import Console

from kdqat.files import write_text
from kdqat.study.expand import Trial, Variation, trials, variations
from kdqat.study.file import Study
from kdqat.study.launch import Fresh, Launcher, claim, devices, slots, visible_gpus
from kdqat.study.plot import draw
from kdqat.study.results import Results
from kdqat.study.runner import Stop, run_all
from kdqat.study.screen import metric_of, survivors
from kdqat.study.summary import Row, as_json, as_markdown, print_rich, rows, table

Launch = Callable[[Any], Launcher]
ByVariation = dict[str, list[dict[str, Any]]]


def run_study(study: Study, console: Console, launch: Launch = Fresh, *, screen_only: bool = False) -> int:
    """Run what is not done, write study.md, study.json and study.png, print the tables.

    Args:
        console: with markup off, for what is printed has brackets in it.
        launch: makes what starts runs, given the lock that each of them holds.
        screen_only: leave the full runs for the next call.

    Returns:
        0; 1 if runs failed; 128 + n if signal n stopped it.

    Raises:
        ValueError: for a study that cannot be run, or whose settings changed under results that are there.
    """
    which = variations(study)
    results = Results(study.out)
    runs = planned(study, which)
    for trial in runs:  # what changed is said before anything runs
        results.read(trial)
    each = max(devices(trial.recipe) for trial in runs)
    if study.reuse_imports and each > 1:
        raise ValueError(f"reuse_imports: a run on {each} GPUs starts processes of its own; leave reuse_imports out")
    on_cpu = all((trial.recipe.get("trainer") or {}).get("accelerator") == "cpu" for trial in runs)
    places = slots([] if on_cpu else visible_gpus(), study.workers, study.workers_per_gpu, each)
    if study.workers and len(places) < study.workers:
        console.print(f"{study.workers} workers asked for, {len(places)} fit on the GPUs of this machine")
    lock = claim(study.out)
    stop = Stop()
    failures: list[dict[str, Any]] = []
    try:
        launcher = launch(lock)
        with stop.listening():
            going = which
            if study.screen:
                short = trials(study, which, "screen")
                console.print(f"short runs of {study.screen.max_steps} steps")
                metric = metric_of(study, study.screen)
                failures += run_all(study, short, results, launcher, places, stop, console, metric)
                going = survivors(study, study.screen, which, finished(results, short, metric))
                if not stop.received:
                    console.print(f"{len(going)} of {len(which)} variations go on; they start anew")
            if not stop.received and not screen_only:
                full = trials(study, going, "full")
                failures += run_all(study, full, results, launcher, places, stop, console, study.metric)
    finally:
        lock.close()
    summarize(study, which, results, console, failures)
    if not study.keep:
        console.print("weights of finished runs are deleted, numbers and logs stay (keep: [student] keeps them)")
    if stop.received:
        console.print("stopped; the same command goes on")
        return 128 + stop.received[0]
    return 1 if failures else 0


def planned(study: Study, which: Sequence[Variation]) -> list[Trial]:
    """Every run there may be: short ones, and full ones of all variations."""
    return [*(trials(study, which, "screen") if study.screen else []), *trials(study, which, "full")]


def finished(results: Results, runs: Sequence[Trial], metric: str) -> ByVariation:
    """Results of those runs that are done and have `metric`, by variation."""
    found: ByVariation = {}
    for trial in runs:
        result = results.done(trial)
        if result and metric in result["metrics"]:
            found.setdefault(trial.variation.name, []).append(result)
    return found


def summarize(
    study: Study, which: Sequence[Variation], results: Results, console: Console, failures: Sequence[Mapping[str, Any]]
) -> None:
    """Tables on the terminal; study.md, study.json and study.png."""
    stages: dict[str, list[Row]] = {}
    page = [f"# {study.out.name}", "", f"`{study.recipe}`, compared by {study.metric} ({study.best} is best).", ""]
    content: dict[str, Any] = {"recipe": str(study.recipe), "metric": study.metric, "seeds": study.seeds}
    everything: ByVariation = {}
    for stage in ("screen", "full"):
        if stage == "screen" and not study.screen:
            continue
        metric = metric_of(study, study.screen) if stage == "screen" and study.screen else study.metric
        found = finished(results, trials(study, which, stage), metric)
        if not found:
            continue
        for name, runs in found.items():
            everything.setdefault(name, []).extend(runs)
        title, chosen = "Full runs: mean ± standard deviation over n seeds", None
        if stage == "screen" and study.screen:
            chosen = [v.name for v in survivors(study, study.screen, which, found)]
            title = f"Short runs of {study.screen.max_steps} steps"
            content["survivors"] = chosen
        stages[title] = rows(which, found)
        content[stage] = as_json(stages[title])
        columns, lines = table(study, stages[title], metric, chosen)
        print_rich(console, title, columns, lines)
        page += [f"## {title}", "", as_markdown(columns, lines), ""]
        if chosen is not None:
            page += ["Those that go on started anew: a schedule depends on the length of its run.", ""]
    every = [result for runs in everything.values() for result in runs]
    content["failed"] = [{key: result[key] for key in ("name", "why", "log")} for result in failures]
    content["commits"] = sorted({str(result["commit"]) for result in every})
    content["hardware"] = sorted({str(result["hardware"]) for result in every})
    page += [f"- {result['name']} failed: {result['why']}" for result in failures] + ([""] if failures else [])
    names = {name for result in every for name in result["metrics"]}
    missing = [name for name in study.metrics or () if name not in names] if every else []
    if missing:
        note = f"metrics: nobody measured {', '.join(missing)}; there is {', '.join(sorted(names))}"
        console.print(note)
        page += [f"{note}.", ""]
    if every:
        minutes = sum(result["seconds"] for result in every) / 60
        page += [f"{len(every)} runs, {minutes:.1f} minutes of their own, on {', '.join(content['hardware'])}; "
                 f"commit {', '.join(content['commits'])}.", ""]  # fmt: skip
    problem = draw(study, stages, study.out / "study.png") if stages else None
    if problem:
        console.print(problem)
    elif stages:
        page += ["![mean and spread](study.png)", ""]
    write_text(study.out / "study.md", "\n".join(page))
    write_text(study.out / "study.json", json.dumps(content, indent=1))
    console.print(f"{study.out / 'study.md'}, study.json" + ("" if problem or not stages else ", study.png"))
