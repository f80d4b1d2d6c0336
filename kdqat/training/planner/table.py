"""The plan on the terminal: every part, what of it exists at the peak, the sum against what is there, the time."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from kdqat.training.planner.moments import PARTS
from kdqat.training.planner.plan import MemoryPlan


def print_plan(plan: MemoryPlan, console: Console) -> None:
    """The whole table."""
    table = Table(title=f"memory on each device ({plan.device})", title_justify="left")
    table.add_column("part")
    for column in ("most", "at the peak"):
        table.add_column(column, justify="right", no_wrap=True)
    at_peak = plan.moments[plan.peak]
    for part in PARTS:
        if plan.parts[part]:
            table.add_row(part, _size(plan.parts[part]), _size(at_peak.get(part, 0)))
    table.add_section()
    table.add_row(f"peak: {plan.peak}", "", _size(plan.total))
    table.add_row("there", "", "unknown" if plan.available is None else _size(plan.available))
    console.print(table)
    counts = plan.counts
    console.print(
        f"{counts['parameters']:,} parameters: {counts['quantized']:,} fake-quantized, {counts['full_precision']:,} in "
        f"full precision; {counts['trainable']:,} are trained, {counts['scales']:,} of them scales and zero points",
        soft_wrap=True,
    )
    for note in plan.notes:
        console.print(note, soft_wrap=True)
    console.print(_time(plan), soft_wrap=True)
    _warn(plan, console)


def describe(plan: MemoryPlan, console: Console) -> None:
    """The plan in a line, and a warning where it does not fit."""
    there = "" if plan.available is None else f" of {_size(plan.available)}"
    console.print(f"memory: about {_size(plan.total)}{there} (peak: {plan.peak}); {_time(plan)}", soft_wrap=True)
    _warn(plan, console)


def _warn(plan: MemoryPlan, console: Console) -> None:
    if plan.fits is False:
        assert plan.available is not None
        console.print(
            f"WARNING: {_size(plan.total - plan.available)} more than there is. Lower data.batch_size or data.seq_len, "
            "set model.parallel.checkpoint_blocks, or take an optimizer with less state (docs/memory.md)",
            style="bold red",
            soft_wrap=True,
        )


def _time(plan: MemoryPlan) -> str:
    if plan.seconds_per_step is None:
        return "time: unknown, the device is not here"
    each = f"{plan.seconds_per_step:.2g} s a step"
    if plan.steps is None:
        return f"time: about {each}"
    whole = _duration(plan.steps * plan.seconds_per_step)
    return f"time: about {whole} ({each}, {plan.steps} steps), evaluation not counted"


def _duration(seconds: float) -> str:
    for unit, length in (("h", 3600), ("min", 60)):
        if seconds >= length:
            return f"{seconds / length:.1f} {unit}"
    return f"{seconds:.1f} s"


def _size(size: int) -> str:
    return f"{size / 2**30:.2f} GiB" if abs(size) >= 2**30 / 10 else f"{size / 2**20:.1f} MiB"
