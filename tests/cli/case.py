"""What a case of bad input is, and the pieces the cases are made of."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.cli.fork_server import server
from tests.cli.recipes import write

OURS = re.compile(
    r"(plan|data|vocabulary|memory|fake quantization|optimizer): |packed |evaluating |prepared student|trained student|"
    r"exported |step \d+/"
)


@dataclass
class Case:
    """One thing that is wrong.

    Args:
        says: texts that the message must hold: key, layer or file, and the remedy.
        changes: dotted keys of the recipe, see recipes.py.
        verb, options: the command is `kdqat VERB recipe.yaml OPTIONS`.
        setup: called with the folder first; may write files and run verbs.
        argv: the whole command instead.
        before: see fork_server.py.
    """

    name: str
    says: tuple[str, ...]
    changes: dict[str, Any] = field(default_factory=dict)
    verb: str = "fit"
    options: tuple[str, ...] = ()
    setup: Callable[[Path], None] | None = None
    argv: tuple[str, ...] | None = None
    before: str | None = None


def stories_recipe(**changes: Any) -> dict[str, Any]:
    return {"model__student": {"path": "STORIES"}, **changes}


def file(name: str, text: str) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)

    return make


def ran(*verbs: str, **changes: Any) -> Callable[[Path], None]:
    """Verbs that ran here before, with a recipe called earlier.yaml."""

    def run(folder: Path) -> None:
        write(folder, name="earlier.yaml", **changes)
        for verb in verbs:
            done = server().run(folder, verb, "earlier.yaml")
            assert done.code == 0, done.err

    return run


def cut_checkpoint(folder: Path) -> None:
    ran("fit")(folder)
    (path,) = (folder / "run" / "checkpoints").glob("step=*.ckpt")
    path.write_bytes(path.read_bytes()[:1000])


def cut_student(folder: Path) -> None:
    ran("quantize")(folder)
    path = folder / "run" / "prepared" / "quantizers.safetensors"
    path.write_bytes(path.read_bytes()[:100])


def damaged_eval(folder: Path) -> None:
    ran("quantize")(folder)
    (folder / "run" / "eval.json").write_text('{"models":')


def teacher(path: str) -> dict[str, Any]:
    return {"class_path": "FrozenTeacher", "init_args": {"path": path, "dtype": "float32"}}


def plan(**init_args: Any) -> dict[str, Any]:
    return {"class_path": "Uniform", "init_args": {"scheme": "W4A16_G32", **init_args}}


def scheme(**weight: Any) -> dict[str, Any]:
    return plan(scheme={"weight": weight})


def named(class_path: str, **init_args: Any) -> dict[str, Any]:
    return {"class_path": class_path, "init_args": init_args}


def text(path: str, **init_args: Any) -> dict[str, Any]:
    return named("PackedText", text=path, **{"seq_len": 32, "batch_size": 2, "val_rows": 4, **init_args})


AGREEMENT = named("TeacherAgreement", text="kdqat:prose", seq_len=32, limit=4)
