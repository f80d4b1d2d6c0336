"""The recipe parser: YAML with class_path and init_args, dotted overrides, short class names.

The only file that knows jsonargparse. It speaks the dialect of LightningCLI without being one: LightningCLI builds a
Trainer for every verb (`eval` on a laptop of a recipe for four GPUs would fail there), takes subcommands from
Trainer methods and silently prefers a checkpoint's hyperparameters to the command line (docs/architecture.md, 11).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning as L
import yaml
from jsonargparse import ArgumentError, ArgumentParser

from kdqat import (
    allocate,
    callbacks,
    data,
    evaluators,
    exporters,
    importance,
    initializers,
    losses,
    models,
    quant,
    student,
    training,
)
from kdqat.cli.explain import explain, keys_of, nearest
from kdqat.data import TextData
from kdqat.evaluators import Evaluator
from kdqat.exporters import Exporter
from kdqat.importance import Scoring
from kdqat.models import Teacher
from kdqat.report import RunDir, read_yaml
from kdqat.study.settings import SECTIONS
from kdqat.training import KDQATModule

METHODS = (
    allocate, callbacks, data, evaluators, exporters, importance, initializers, losses, models, quant, student,
    training,
)  # fmt: skip


@dataclass
class Recipe:
    """A parsed recipe: its resolved content, and everything it names, built (constructors are cheap)."""

    content: dict[str, Any]
    seed: int
    model: KDQATModule
    data: TextData | None
    trainer: dict[str, Any]
    evaluators: list[Evaluator]
    exporters: list[Exporter]
    run: RunDir
    scoring: Scoring | None = None
    judge: Teacher | None = None  # measures where nobody teaches


def parse_recipe(path: Path, arguments: Sequence[str] = ()) -> Recipe:
    """Read a recipe (or the recipe.yaml of a run directory) with overrides.

    Args:
        path: a YAML file, or a run directory.
        arguments: dotted overrides, further `--config FILE`, `--print_config`.

    Raises:
        ValueError: one message naming key and remedy.
    """
    file = path / "recipe.yaml" if path.is_dir() else path
    if not file.is_file():
        kind = "the folder holds no recipe.yaml, so it is no run directory" if path.is_dir() else "no such recipe"
        raise ValueError(f"{path}: {kind}")
    parser = build_parser()
    _require_known_keys(file, parser)
    here = ["--trainer.default_root_dir", str(path)] if path.is_dir() else []  # wherever it was moved to
    try:
        config = parser.parse_args(["--config", str(file), *here, *arguments])
        if config.trainer.default_root_dir is None:
            config.trainer.default_root_dir = str(Path("runs") / file.stem)
        content = _without_empty_arguments(yaml.safe_load(parser.dump(config, skip_unset=True)))
        if config.trainer.check_val_every_n_epoch is None:  # the one null that says something; see api.make_trainer
            content["trainer"]["check_val_every_n_epoch"] = None
        built = parser.instantiate(config)
    except (ArgumentError, ValueError) as error:  # ValueError: what a constructor refuses
        raise ValueError(f"{file}: {explain(str(error), parser, METHODS)}") from error
    return Recipe(
        content=content,
        seed=built.seed_everything,
        model=built.model,
        data=built.get("data"),
        trainer=built.trainer.as_dict(),
        evaluators=list(built.evaluate or ()),
        exporters=list(built.export or ()),
        run=RunDir(built.trainer.default_root_dir),
        scoring=built.get("score"),
    )


def build_parser() -> ArgumentParser:
    """The parser of recipes; its keys are the sections of a recipe."""
    parser = ArgumentParser(prog="kdqat VERB RECIPE", exit_on_error=False)
    parser.add_argument("--config", action="config", help="a further recipe file whose keys win")
    parser.add_argument("--seed_everything", type=int, default=0, help="seed of Python, NumPy and torch")
    parser.add_class_arguments(KDQATModule, "model")
    # not add_subclass_arguments, which would take a text file named in init_args for a further recipe and read it
    parser.add_argument("--data", type=TextData | None, default=None, help="what to train on")
    parser.add_class_arguments(L.Trainer, "trainer", instantiate=False)
    parser.add_argument("--score", type=Scoring | None, default=None, help="how much each block or layer matters")
    parser.add_argument("--evaluate", type=list[Evaluator], default=[], help="what to measure")
    parser.add_argument("--export", type=list[Exporter], default=[], help="formats to write")
    return parser


def _without_empty_arguments(content: Any) -> Any:
    """`content` without `init_args: {}`: a class named by an override has it, the same class read from a file has not,
    and a run directory compares the two."""
    if isinstance(content, list):
        return [_without_empty_arguments(item) for item in content]
    if not isinstance(content, dict):
        return content
    return {key: _without_empty_arguments(value) for key, value in content.items() if (key, value) != ("init_args", {})}


def _require_known_keys(file: Path, parser: ArgumentParser) -> None:
    """Refuse unknown sections, and unknown keys that jsonargparse overlooks because they are empty.

    Raises:
        ValueError: naming the key and the nearest one there is.
    """
    for section, content in read_yaml(file).items():
        if section not in SECTIONS:
            raise ValueError(f"{file}: unknown section {section!r}{nearest(str(section), SECTIONS)}")
        if section not in ("model", "trainer"):
            continue
        if not isinstance(content, dict):
            raise ValueError(f"{file}: {section} is a mapping of keys, this is {type(content).__name__}")
        known = keys_of(parser, section)
        for key in content:
            if key not in known:
                raise ValueError(f"{file}: {section}: unknown key {key!r}{nearest(str(key), known)}")
