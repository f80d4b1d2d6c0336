"""The verb `cache`: let the live teacher of a recipe's CachedTeacher answer the recipe's rows."""

from __future__ import annotations

import argparse
import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import lightning as L

from kdqat import api
from kdqat.cli.parser import parse_recipe
from kdqat.cli.session import console, device_of, quiet
from kdqat.models import CachedTeacher


def cache(options: argparse.Namespace, overrides: Sequence[str]) -> int:
    """Fill the folder of model.teacher; the run directory is not touched."""
    quiet()
    recipe = parse_recipe(options.recipe, overrides)
    teacher = recipe.model.teacher
    if not isinstance(teacher, CachedTeacher):
        name = "none" if teacher is None else f"a {type(teacher).__name__}"
        raise ValueError(
            f"{options.recipe}: model.teacher is {name}, which caches nothing; cache needs a CachedTeacher, e.g. "
            "teacher: {class_path: CachedTeacher, init_args: {k: 64}}"
        )
    if recipe.data is None:
        raise ValueError(f"{options.recipe}: cache needs a data section (docs/recipes.md)")
    L.seed_everything(recipe.seed, verbose=False)
    device = device_of(recipe.trainer.get("accelerator"))
    with _noted() as received:
        missing = api.cache(recipe.model.source, teacher, recipe.data, device=device, stop=lambda: bool(received))
    if missing:
        console.print(f"stopped with {missing} rows to go; `kdqat cache {options.recipe}` goes on")
        return 128 + received[0]
    return 0


@contextmanager
def _noted() -> Iterator[list[int]]:
    """Collect SIGTERM and Ctrl-C, so that a batch is finished and stored; the second one interrupts at once."""
    received: list[int] = []

    def note(number: int, _: Any) -> None:
        received.append(number)
        if len(received) > 1:
            raise KeyboardInterrupt

    before = {number: signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
