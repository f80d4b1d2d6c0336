"""Turns what jsonargparse says about a bad recipe into one line that names the key and the remedy."""

from __future__ import annotations

import difflib
import inspect
import re
from collections.abc import Iterable, Sequence
from types import ModuleType
from typing import Any


def nearest(word: str, candidates: Iterable[str]) -> str:
    """ "; did you mean ...?" with the closest candidate, or the list of all of them."""
    candidates = list(candidates)
    close = difflib.get_close_matches(word, candidates, n=1, cutoff=0.6)
    return f"; did you mean {close[0]!r}?" if close else f"; use one of {', '.join(candidates)}"


def explain(message: str, parser: Any, methods: Sequence[ModuleType]) -> str:
    """One line for jsonargparse's `message`.

    Args:
        parser: to list the keys there are.
        methods: packages whose classes can be named in a recipe.
    """
    key = ".".join(re.findall(r'Parser key "([^"]+)"', message))
    where = f"{key}: " if key else ""
    if found := re.search(r"Expected a dot import path string: (\S+)", message):
        return f"{where}unknown class {found[1]!r}{nearest(found[1], _candidates(key, methods))}"
    if found := re.search(r"class_path '([\w.]+)'[^']*(?:\n.*)*?Option '(\w+)' is not accepted", message):
        accepted = _parameters(found[1], methods)
        return f"{where}{found[1].rpartition('.')[2]} has no argument {found[2]!r}{nearest(found[2], accepted)}"
    if found := re.search(r"Group '([\w.]+)' does not accept option '([\w.]+)'", message):
        keys = _keys(parser, found[1])
        return f"{found[1]}: unknown key {found[2]!r}{nearest(found[2].split('.')[0], keys)}"
    if found := re.search(r"(?:unrecognized arguments|Unrecognized arguments): (--)?(\S+)", message):
        return f"unknown argument {found[2]!r}{nearest(found[2], _keys(parser, ''))}"
    if found := re.search(r"Key \"?'?([\w.]+)'?\"? is required|arguments are required: (.+)", message):
        return f"the key {(found[1] or found[2]).strip()} is missing"
    if found := re.search(r"Expected a (.+?)\. Got value: (.*)", message):
        return f"{where}{found[2].strip()!r} is no {_type_name(found[1])}"
    if found := re.search(r"not importable|No module named '([\w.]+)'", message):
        return f"{where}the class could not be imported ({_first_lines(message)})"
    return f"{_first_lines(message)}"


def _candidates(key: str, methods: Sequence[ModuleType]) -> list[str]:
    """Names of the concrete classes of ours that fit a key, by the package the key's classes live in."""
    homes = {
        "plan": "allocate",
        "quantizer": "quant",
        "loss": "losses",
        "terms": "losses",
        "teacher": "models",
        "initializer": "initializers",
        "data": "data",
        "evaluate": "evaluate",
        "export": "export",
        "callbacks": "callbacks",
        "scheduler": "training",
    }
    home = next((homes[part] for part in reversed(re.split(r"\W+", key)) if part in homes), None)
    names = []
    for package in methods:
        if home is not None and package.__name__ != f"kdqat.{home}":
            continue
        for name in getattr(package, "__all__", ()):
            item = getattr(package, name)
            if inspect.isclass(item) and not inspect.isabstract(item) and name not in ("Coverage", "FakeQuantLinear"):
                names.append(name)
    return names


def _parameters(class_path: str, methods: Sequence[ModuleType]) -> list[str]:
    name = class_path.rpartition(".")[2]
    for package in methods:
        item = getattr(package, name, None)
        if inspect.isclass(item):
            names = []
            for base in item.__mro__:  # a **kwargs constructor passes them to its base
                if "__init__" in vars(base) and base is not object:
                    names += [p for p in inspect.signature(base.__init__).parameters if p not in ("self", "kwargs")]  # type: ignore[misc]
            return list(dict.fromkeys(names))
    return ["the arguments its documentation lists"]


def _keys(parser: Any, group: str) -> list[str]:
    prefix = f"{group}." if group else ""
    keys = [a.dest for a in parser._actions if a.dest.startswith(prefix) and a.dest not in ("help", "print_config")]
    return list(dict.fromkeys(k.removeprefix(prefix).split(".")[0] if group else k for k in keys))


def _type_name(text: str) -> str:
    found = re.fullmatch(r"<class '([\w.]+)'>", text)
    return found[1] if found else text.replace("typing.", "")


def _first_lines(message: str) -> str:
    return " ".join(" ".join(line.strip() for line in message.splitlines()[:6]).split())
