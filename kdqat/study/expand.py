"""From a study file to a list of runs: axes, their product, names, recipes.

An axis is one line of `vary`:

    model.optimizer.lr: [1e-4, 3e-4]                     a dotted key and its values
    trainer.callbacks: {none: [], ov: [...]}             a dotted key, its values with names
    freeze: {none: {}, ov: {trainer.callbacks+: ...}}    a label; each name stands for any number of settings

and a name is made of the axes' labels, so a run is found again by what it is.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from kdqat.files import sha256_of
from kdqat.study.file import Study, require_items
from kdqat.study.settings import SECTIONS, changed, read_mapping

Label = str | int | float | bool
VARIATION = "variation"  # the axis of named variations
NAME_LENGTH = 180  # file systems take 255 bytes, and endings are added


@dataclass(frozen=True)
class Variation:
    """One point of the grid: its place on every axis, and the settings that make it."""

    name: str
    labels: dict[str, Label]
    settings: dict[str, Any]


@dataclass(frozen=True)
class Trial:
    """One run: a variation and a seed, short or in full."""

    name: str
    variation: Variation
    seed: int
    stage: Literal["screen", "full"]
    recipe: dict[str, Any]

    @property
    def settings_hash(self) -> str:
        """Of everything that is measured: not of where the run lies and what it exports."""
        trainer = {k: v for k, v in self.recipe.get("trainer", {}).items() if k != "default_root_dir"}
        return sha256_of({**self.recipe, "trainer": trainer, "export": None})


def variations(study: Study) -> list[Variation]:
    """Every variation of the study, in the file's order.

    Raises:
        ValueError: for axes that cannot be read, or two variations with one name.
    """
    found: list[Variation] = []
    for entry in study.variations or [{}]:
        unknown = {*entry} - {"name", "set", "vary"}
        if unknown or (study.variations and not isinstance(entry.get("name"), str)):
            raise ValueError(f"variations: {entry!r:.80}: an entry has name, and may have set and vary")
        for part in ("set", "vary"):
            if not isinstance(entry.get(part), dict | None):
                raise ValueError(
                    f"variations: {entry['name']}: {part}: expected a mapping, this is {entry[part]!r:.60}"
                )
            require_items(entry.get(part) or {}, str, f"variations: {entry.get('name')}: {part}")
        axes = {**study.vary, **(entry.get("vary") or {})}
        fixed: list[Point] = [(entry["name"], entry.get("set") or {})] if study.variations else []
        names = [VARIATION] * len(fixed) + _labels(list(axes))
        points = [fixed] * len(fixed) + [_points(key, values) for key, values in axes.items()]
        for combination in itertools.product(*points):
            labels = dict(zip(names, (label for label, _ in combination), strict=True))
            _require_apart([part for _, part in combination], ", ".join(f"{k} {v}" for k, v in labels.items()))
            settings = {key: value for _, part in combination for key, value in part.items() if not key.endswith("+")}
            appended = _appended(part for _, part in combination)
            found.append(Variation(_name(labels), labels, {**settings, **appended}))
    for name, same in itertools.groupby(sorted(v.name for v in found)):
        if len(list(same)) > 1:
            raise ValueError(f"two variations are called {name!r}: give values names, as in {{name: value}}")
        if len(name) > NAME_LENGTH:
            raise ValueError(
                f"the name {name!r} is too long for a file: give values shorter names, as in {{name: value}}"
            )
    if study.screen:
        for axis in study.screen.per:
            if any(axis not in v.labels for v in found):
                raise ValueError(
                    f"screen.per: {axis!r} is no axis of every variation; there are {list(found[0].labels)}"
                )
    return found


def trials(study: Study, which: Sequence[Variation], stage: Literal["screen", "full"]) -> list[Trial]:
    """The runs of these variations, seed by seed.

    Raises:
        ValueError: if a setting leads nowhere in the base recipe.
    """
    base = changed(read_mapping(study.recipe), study.set)
    short, seeds = study.screen if stage == "screen" else None, study.seeds
    if short:
        seeds = short.seeds or study.seeds[:1]
    made = []
    for variation, seed in itertools.product(which, seeds):
        name = f"{'screen_' if short else ''}{variation.name}_seed-{seed}"
        content = changed(base, variation.settings)
        content = changed(content, dict.fromkeys(study.seed_keys, seed))
        if short:
            content = changed(content, {"trainer.max_steps": short.max_steps, **short.set})
        if "export" not in study.keep:
            content.pop("export", None)  # it would be written, and deleted
        content = changed(content, {"trainer.default_root_dir": str(Path(study.out) / "runs" / name)})
        made.append(Trial(name, variation, seed, stage, content))
    return made


Point = tuple[Label, Mapping[str, Any]]


def _points(key: str, values: Any) -> list[Point]:
    """Label and settings of every value of an axis."""
    dotted = key.split(".")[0].removesuffix("+") in SECTIONS
    if not isinstance(values, list | dict) or not values:
        raise ValueError(f"vary: {key}: expected a list of values, or a mapping of named ones, not {values!r}")
    if isinstance(values, list):
        if not dotted:
            raise ValueError(
                f"vary: {key}: values without names need a dotted key of the recipe ({', '.join(SECTIONS)})"
            )
        return [(_label(value), {key: value}) for value in values]
    if dotted:
        return [(str(name), {key: value}) for name, value in values.items()]
    for name, part in values.items():
        if not isinstance(part, dict | None):
            raise ValueError(f"vary: {key}: {name}: expected a mapping of dotted keys, this is {part!r}")
        require_items(part or {}, str, f"vary: {key}: {name}")
    return [(str(name), part or {}) for name, part in values.items()]


def _require_apart(parts: Sequence[Mapping[str, Any]], where: str) -> None:
    """
    Raises:
        ValueError: if a later setting replaces an earlier one, or all around it: the earlier would do nothing.
    """
    before: dict[str, str] = {}
    for key in (key for part in parts for key in part if not key.endswith("+")):
        plain = _plain(key)
        lost = next((old for path, old in before.items() if f"{path}.".startswith(f"{plain}.")), None)
        if lost is not None:
            raise ValueError(f"{where}: {key} undoes {lost}, which is set there too; leave one of the two out")
        before[plain] = key


def _plain(key: str) -> str:
    """A dotted key without what may be left out of it."""
    return ".".join(part for part in key.split(".") if part != "init_args")


def _appended(parts: Any) -> dict[str, Any]:
    """What several axes append to one list, one after the other."""
    appended: dict[str, Any] = {}
    for part in parts:
        for key, value in part.items():
            if key.endswith("+"):
                appended[key] = [*appended.get(key, []), *(value if isinstance(value, list) else [value])]
    return appended


def _label(value: Any) -> Label:
    if isinstance(value, str | int | float):
        return value
    if value is None:
        return "null"
    if not isinstance(value, list | dict):
        return str(value)
    if isinstance(value, list):
        return "+".join(str(_label(item)) for item in value) or "none"
    if "class_path" not in value:
        return "+".join(f"{key}-{_label(item)}" for key, item in value.items())
    given = value.get("init_args")  # whatever it is: the recipe's parser says what is wrong with it
    arguments = "".join(f"-{_label(item)}" for item in (given.values() if isinstance(given, dict) else ()))
    return str(value["class_path"]).rpartition(".")[2] + arguments


def _labels(keys: list[str]) -> list[str]:
    """The shortest ends of dotted keys that differ: lr, max_steps."""
    ends = {key: key.removesuffix("+").split(".") for key in keys}
    for depth in range(1, 1 + max((len(parts) for parts in ends.values()), default=1)):
        short = {key: ".".join(parts[-depth:]) for key, parts in ends.items()}
        if len({*short.values()}) == len(keys):
            return list(short.values())
    return keys


def _name(labels: Mapping[str, Label]) -> str:
    parts = [str(label) if axis == VARIATION else f"{axis}-{label}" for axis, label in labels.items()]
    return re.sub(r"[^\w.+-]+", "-", "_".join(parts)) or "base"
