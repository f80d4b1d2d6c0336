"""The study file: what is varied, how often, how it is screened, and where it all goes. Keys: docs/study.md."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Mapping
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

from kdqat.study.settings import read_mapping

WEIGHTS = ("student", "prepared", "checkpoints", "export")  # what is large in a run directory


@dataclass(frozen=True, kw_only=True)
class Screen:
    """Short runs of every variation; those that do best are run in full.

    Attributes:
        max_steps: of a short run.
        keep: how many variations go on (in each group, with `per`).
        per: axes; the choice is made within each combination of their values. Empty: among all.
        metric: None: the study's.
        seeds: None: the study's first.
        set: further settings of short runs, e.g. a smaller evaluation.
    """

    max_steps: int
    keep: int
    per: list[str] = field(default_factory=list)
    metric: str | None = None
    seeds: list[int] | None = None
    set: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Study:
    """A study file, checked.

    Attributes:
        recipe: the base recipe.
        out: where everything of the study lies.
        metric: what is compared, "LABEL.NUMBER" of eval.json or a column of metrics.csv.
        best: whether low or high values of it are good.
        metrics: what stands beside it in tables; None: the same number of the other texts.
        set: settings of every run.
        vary: axes; see `kdqat.study.expand`.
        variations: named points of one more axis, each {name, set, vary}.
        seeds: every variation is run with each of them.
        seed_keys: which settings a seed goes to. Without dropout the order of the rows is all that differs.
        workers: runs at once; None: one a GPU, or one.
        workers_per_gpu: runs that share a GPU.
        reuse_imports: fork each run from a process that has imported what it needs.
        keep: which weights of finished runs stay.
    """

    recipe: Path
    out: Path
    metric: str
    best: Literal["lowest", "highest"] = "lowest"
    metrics: list[str] | None = None
    set: dict[str, Any] = field(default_factory=dict)
    vary: dict[str, Any] = field(default_factory=dict)
    variations: list[dict[str, Any]] = field(default_factory=list)
    seeds: list[int] = field(default_factory=lambda: [0])
    seed_keys: list[str] = field(default_factory=lambda: ["seed_everything", "data.init_args.shuffle_seed"])
    screen: Screen | None = None
    workers: int | None = None
    workers_per_gpu: int = 1
    reuse_imports: bool = False
    keep: list[str] = field(default_factory=list)


_KINDS: dict[str, tuple[type, ...]] = {
    "recipe": (str,), "out": (str,), "metric": (str,), "best": (str,), "metrics": (list,), "set": (dict,),
    "vary": (dict,), "variations": (list,), "seeds": (list,), "seed_keys": (list,), "screen": (dict,),
    "workers": (int,), "workers_per_gpu": (int,), "reuse_imports": (bool,), "keep": (list,), "max_steps": (int,),
    "per": (list,),
}  # fmt: skip


_ITEMS: dict[str, type] = {"metrics": str, "seed_keys": str, "per": str, "keep": str, "variations": dict}
_KEYED = ("set", "vary")  # mappings whose keys are settings or labels


def read_study(path: Path) -> Study:
    """Read and check a study file. Its paths, as those of a recipe, start where the command is run.

    Raises:
        ValueError: naming the key and the remedy.
    """
    content = read_mapping(path)
    _check(content, Study, f"{path}: ")
    screen = content.get("screen")
    if screen is not None:
        _check(screen, Screen, f"{path}: screen.", {"keep": (int,)})
        screen = Screen(**screen)
    given = {key: value for key, value in content.items() if value is not None}
    study = Study(**{**given, "recipe": Path(given["recipe"]), "out": Path(given["out"]), "screen": screen})
    if study.best not in ("lowest", "highest"):
        raise ValueError(f"{path}: best is lowest or highest, not {study.best!r}")
    for kind in study.keep:
        if kind not in WEIGHTS:
            raise ValueError(f"{path}: keep: {kind!r} is none of {', '.join(WEIGHTS)}{_nearest(str(kind), WEIGHTS)}")
    for key, seeds in (("seeds", study.seeds), ("screen.seeds", screen.seeds if screen else None)):
        if seeds is not None and (not seeds or any(type(s) is not int for s in seeds) or len({*seeds}) < len(seeds)):
            raise ValueError(f"{path}: {key} is a list of different whole numbers, not {seeds!r}")
    return study


def _check(content: Any, kind: type, where: str, kinds: Mapping[str, tuple[type, ...]] | None = None) -> None:
    if not isinstance(content, dict):
        raise ValueError(f"{where.rstrip('. ')}: expected a mapping of keys, this is {content!r}")
    expected = {**_KINDS, **(kinds or {})}
    known = {f.name: f for f in fields(kind)}
    for key, value in content.items():
        if key not in known:
            raise ValueError(f"{where}{key}: no such key{_nearest(str(key), known)}")
        if value is not None and (
            not isinstance(value, expected[key]) or (type(value) is bool) != (bool in expected[key])
        ):
            raise ValueError(f"{where}{key}: expected {expected[key][0].__name__}, this is {value!r}")
        if isinstance(value, list):
            require_items(value, _ITEMS.get(key, object), f"{where}{key}")
        if key in _KEYED and isinstance(value, dict):
            require_items(value, str, f"{where}{key}")
        if isinstance(value, int) and expected[key] == (int,) and value < 1:
            raise ValueError(f"{where}{key} must be at least 1, not {value}")
    for name, f in known.items():
        if f.default is MISSING and f.default_factory is MISSING and content.get(name) is None:
            raise ValueError(f"{where}{name}: missing (docs/study.md)")


def require_items(items: Any, kind: type, where: str) -> None:
    """
    Raises:
        ValueError: for an item of a list, or a key of a mapping, that is of another type.
    """
    for item in items:
        if not isinstance(item, kind):
            what = "words" if kind is str else "mappings of keys"
            kinds = "keys are" if isinstance(items, dict) else "items are"
            raise ValueError(f"{where}: its {kinds} {what}, this is {item!r:.60}")


def _nearest(word: str, words: Collection[str]) -> str:
    close = difflib.get_close_matches(word, list(words), n=1)
    return f"; did you mean {close[0]!r}?" if close else ""
