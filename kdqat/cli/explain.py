"""Turns what jsonargparse says about a bad recipe into one line that names the key and the remedy."""

from __future__ import annotations

import difflib
import importlib
import inspect
import re
from collections.abc import Iterable, Sequence
from types import ModuleType
from typing import Any

import lightning as L
from torch import optim
from torch.optim.lr_scheduler import LRScheduler

from kdqat.allocate import BitAllocator
from kdqat.data import TextData
from kdqat.evaluators import Evaluator
from kdqat.exporters import Exporter
from kdqat.importance import ImportanceScorer
from kdqat.initializers import Initializer
from kdqat.losses import DistillLoss
from kdqat.models import Teacher
from kdqat.quant import FakeQuantizer

_BASES: dict[str, type] = {
    "plan": BitAllocator,
    "quantizer": FakeQuantizer,
    "activation_quantizer": FakeQuantizer,
    "loss": DistillLoss,
    "terms": DistillLoss,
    "teacher": Teacher,
    "initializer": Initializer,
    "data": TextData,
    "scorer": ImportanceScorer,
    "evaluate": Evaluator,
    "export": Exporter,
    "callbacks": L.Callback,
    "scheduler": LRScheduler,
    "optimizer": optim.Optimizer,
}
_GIVEN = ("self", "args", "kwargs", "spec", "shape", "params", "optimizer")  # by us, not by the recipe
_EXTRAS = ("torchao", "bitsandbytes")  # of kdqat's own, in pyproject.toml
_GENERIC = ("Expected a", "Not a valid", "Does not validate", "Subtypes:", "Errors:", "Subclass types", "a class path",
            "a dict with", "Given value", "Problem with", "Parser key")  # fmt: skip


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
    key = ".".join(dict.fromkeys(re.findall(r'Parser key "([^"]+)"', message)))
    where = f"{key}: " if key else ""
    if found := re.search(r"Expected a dot import path string: (\S+)", message):
        return f"{where}unknown class {found[1]!r}{nearest_class(found[1], key, methods)}"
    if found := re.search(r"module '[\w.]+' has no attribute '(\w+)'", message):
        return f"{where}unknown class {found[1]!r}{nearest_class(found[1], key, methods)}"
    if found := re.search(r"No module named '(\w+)'", message):
        return f"{where}{missing_package(found[1])}"
    if found := re.search(r"Import path ([\w.]+) does not correspond to a subclass of (\w+)", message):
        return f"{where}{found[1]} is no {found[2]}{nearest_class(found[1], key, methods)}"
    if found := (
        # the class nearest before the option: a teacher may stand in a teacher
        re.search(r"(?s)class_path '(?P<path>[\w.]+)'((?!class_path ').)*?Option '(?P<option>\w+)' is not acc", message)
        or re.search(r"Option '(?P<option>\w+)' is not accepted.*?class_path='(?P<path>[\w.]+)'", message)
    ):
        name, accepted = found["path"].rpartition(".")[2], _parameters(found["path"])
        return f"{where}{name} has no argument {found['option']!r}{nearest(found['option'], accepted)}"
    if found := re.search(r"Group '([\w.]+)' does not accept option '([\w.]+)'", message):
        group, _, option = f"{found[1]}.{found[2]}".rpartition(".")
        return f"{group}: unknown key {option!r}{nearest(option, keys_of(parser, group))}"
    if found := re.search(r"(?:unrecognized arguments|Unrecognized arguments): (--)?(\S+)", message):
        group, _, option = found[2].rpartition(".")
        if not keys_of(parser, group):  # the section itself is unknown
            group, option = "", found[2].partition(".")[0]
        return f"unknown argument '--{found[2]}'{nearest(option, keys_of(parser, group))}"
    if found := re.search(r"Key \"?'?([\w.]+)'?\"? is required|arguments are required: (.+)", message):
        return f"{where}the key {(found[1] or found[2]).strip()} is missing"
    if found := re.search(r"Unable to load config [\"'](.+?)[\"']", message):
        return f"{where}{found[1]!r} is no mapping; its keys are {', '.join(keys_of(parser, key))}"
    if ("Not a valid subclass of" in message and "Union" not in message) or "instantiatable class" in message:
        return f"{where}write it as {{class_path: NAME, init_args: {{...}}}}{nearest_class('', key, methods)}"
    if found := re.search(r"Expected a (.+?)\. Got value: (.*)", message):
        return f"{where}{found[2].strip()!r} is no {_type_name(found[1])}"
    if "Does not validate against any of the Union" in message:
        return where + _explain_union(message)
    return where + _one_line(re.sub(r'Parser key "[^"]+":', "", message))


def missing_package(name: str) -> str:
    """What to do about a class path whose first part cannot be imported."""
    if name in _EXTRAS:
        return f"the package {name} is missing: `pip install 'kdqat[{name}]'`"
    return f"the package {name} is missing: `pip install {name}`; a file of your own is looked for where kdqat runs"


def keys_of(parser: Any, group: str) -> list[str]:
    """The keys a recipe may have directly under `group` ("" for its sections)."""
    prefix = f"{group}." if group else ""
    dests = [action.dest.removesuffix(".help") for action in parser._actions if action.dest.startswith(prefix)]
    keys = [dest.removeprefix(prefix).split(".")[0] for dest in dests]
    return [key for key in dict.fromkeys(keys) if key not in ("help", "print_config", "print_shtab")]


def nearest_class(word: str, key: str, methods: Sequence[ModuleType]) -> str:
    """As `nearest`, for a class at `key`; a class of torch's is shown with the module it needs."""
    by_name = {path.rpartition(".")[2]: path for path in _candidates(key, methods)}
    close = difflib.get_close_matches(word.rpartition(".")[2], by_name, n=1, cutoff=0.6)
    return f"; did you mean {by_name[close[0]]!r}?" if close else f"; use one of {', '.join(by_name.values())}"


def _candidates(key: str, methods: Sequence[ModuleType]) -> list[str]:
    """Concrete classes that fit a key: ours by name, torch's optimizers with their module."""
    base = next((_BASES[part] for part in reversed(re.split(r"\W+", key)) if part in _BASES), object)
    places = [(package, "") for package in methods]
    if base is optim.Optimizer:
        places.append((optim, "torch.optim."))
    names = []
    for place, prefix in places:
        for name in getattr(place, "__all__", vars(place)):
            item = getattr(place, name)
            if inspect.isclass(item) and issubclass(item, base) and item is not base and not inspect.isabstract(item):
                names.append(prefix + name)
    return names


def _parameters(class_path: str) -> list[str]:
    module, _, name = class_path.rpartition(".")
    item = getattr(importlib.import_module(module), name)
    names: list[str] = []
    for base in item.__mro__:  # a **kwargs constructor passes them to its base
        if "__init__" in vars(base) and base is not object:
            names += [p for p in inspect.signature(base.__init__).parameters if p not in _GIVEN]
    return list(dict.fromkeys(names))


def _explain_union(message: str) -> str:
    """What our own code said to one of the types, else the innermost value and the types it could have had."""
    said = [line for line in _bullets(message.partition("Errors:")[2]) if line and not line.startswith(_GENERIC)]
    if said:
        return said[0]
    head, _, tail = message.partition("Given value: ")
    lines = _bullets(head.rpartition("Errors:")[2])
    types = [_type_name(line.removeprefix("Expected a ")) for line in lines if line.startswith("Expected a ")]
    types += [
        f"{base} (class_path, init_args)" for base in re.findall(r"Not a valid subclass of (\w+)", "\n".join(lines))
    ]
    value = tail.partition("\n")[0]
    return f"{value!r} is no {', no '.join(name for name in dict.fromkeys(types) if name != 'NoneType')}"


def _bullets(text: str) -> list[str]:
    return [line.strip().removeprefix("- ") for line in text.splitlines()]


def _type_name(text: str) -> str:
    if found := re.fullmatch(r"(?:typing\.)?Literal\[(.+)\]", text):
        return f"choice of {found[1]}"
    found = re.fullmatch(r"<class '([\w.]+)'>", text)
    return found[1] if found else text.replace("typing.", "")


def _one_line(message: str) -> str:
    return " ".join(" ".join(line.strip() for line in message.splitlines()[:6]).split())
