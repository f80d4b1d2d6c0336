"""Recipes as plain data: read, changed by dotted keys, compared. Nothing is parsed here, so no torch is imported."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

SECTIONS = (
    "seed_everything",
    "model",
    "data",
    "trainer",
    "score",
    "evaluate",
    "export",
)  # of a recipe, for its parser too


class _Loader(yaml.SafeLoader):
    """YAML in which 1e-5 is a number and 2024-05-01 a string, as for the recipe's parser; YAML 1.1 reads 1.0e-5 only,
    and a date, which no result could hold."""


_Loader.yaml_implicit_resolvers = {
    key: [(tag, pattern) for tag, pattern in value if tag != "tag:yaml.org,2002:timestamp"]
    for key, value in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?\d+(\.\d*)?[eE][-+]?\d+$"), list("-+0123456789")
)


def read_mapping(path: Path) -> dict[str, Any]:
    """A YAML file that holds a mapping.

    Raises:
        ValueError: if there is no such file, or it holds something else.
    """
    if not path.is_file():
        raise ValueError(f"{path}: no such file")
    try:
        content = yaml.load(path.read_text(), _Loader)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is no YAML: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path}: expected a mapping of keys, this is {type(content).__name__}")
    return content


def changed(recipe: Mapping[str, Any], settings: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of `recipe` with dotted keys set, in the order given.

    Args:
        settings: "model.optimizer.init_args.lr": value. init_args may be left out where there is a class_path; a number
            is a place in a list; a key that ends in "+" appends to a list what it is given, one item or several.

    Raises:
        ValueError: for a key that leads nowhere.
    """
    content = copy.deepcopy(dict(recipe))
    for key, value in settings.items():
        _set(content, key, copy.deepcopy(value))
    return content


def _set(content: dict[str, Any], key: str, value: Any) -> None:
    *parents, last = key.removesuffix("+").split(".")
    if (parents or [last])[0] not in SECTIONS:
        raise ValueError(f"{key}: a setting begins with a section of a recipe ({', '.join(SECTIONS)})")
    place: Any = content
    for depth, part in enumerate(parents):
        place = _step(place, part, key, ".".join(parents[:depth]))
    if isinstance(place, dict) and "class_path" in place and last not in ("class_path", "init_args"):
        place = _step(place, "init_args", key, ".".join(parents))
    index = _index(place, last, key, ".".join(parents))
    if key.endswith("+"):
        before = place.get(index) if isinstance(place, dict) else place[index]
        if not isinstance(before, list | None):
            raise ValueError(f"{key}: appends to a list, and {key[:-1]} is {type(before).__name__}")
        value = [*(before or []), *(value if isinstance(value, list) else [value])]
    place[index] = value


def _step(place: Any, part: str, key: str, where: str) -> Any:
    """The mapping or list under `part`, made where there is none."""
    if isinstance(place, dict) and "class_path" in place and part not in ("class_path", "init_args"):
        place = _step(place, "init_args", key, where)
    index = _index(place, part, key, where)
    if isinstance(place, dict) and place.get(index) is None:
        place[index] = {}
    return place[index]


def _index(place: Any, part: str, key: str, where: str) -> Any:
    if isinstance(place, dict):
        return part
    if isinstance(place, list) and part.isdigit() and int(part) < len(place):
        return int(part)
    raise ValueError(f"{key}: {where} is {place!r:.60}, which has no {part!r}; write the whole of it as one value")


def differing_keys(old: Any, new: Any, path: str = "") -> Iterator[str]:
    """Dotted keys where two recipes differ in what they measure: not in where the run lies and what is exported."""
    if path in ("trainer.default_root_dir", "export"):
        return
    if isinstance(old, dict) and isinstance(new, dict):
        for key in {**old, **new}:
            yield from differing_keys(old.get(key), new.get(key), f"{path}.{key}" if path else str(key))
    elif old != new:
        yield path
