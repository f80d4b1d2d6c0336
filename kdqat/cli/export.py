"""The verb `export`, and the exports at the end of `fit`: several formats, each proved; one that fails stops none.

kdqat export RUN                                   the recipe's export section, into RUN/export/FORMAT/
kdqat export RUN --format gguf:q4_0 --format awq   these formats instead, beside what is there
kdqat export STUDENT_FOLDER --format ... --out DIR a saved student without its run
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import yaml

from kdqat import api
from kdqat.cli.parser import parse_recipe
from kdqat.cli.session import begin, console, quiet, run_of, start, student_folder
from kdqat.exporters import Exporter
from kdqat.exporters.card import About
from kdqat.exporters.parity import ParityError
from kdqat.exporters.words import exporter_of, format_words
from kdqat.report import RunDir, read_yaml
from kdqat.report.table import markdown
from kdqat.student import Student, load_student
from kdqat.student.folder import STUDENT_FILE
from kdqat.training.checkpoint import checkpoint_steps


def export(options: argparse.Namespace, overrides: Sequence[str]) -> None:
    """Write the formats that the command line names, else those of the recipe's export section."""
    if options.format or options.out or (options.recipe / STUDENT_FILE).is_file():
        return _export_elsewhere(options, overrides)
    recipe = begin("export", options, overrides)
    _require_some(recipe.exporters, options)
    student = load_student(student_folder(recipe.run))
    require_exportable(student, recipe.exporters, recipe.run.export, overwrite=options.overwrite)
    start("export", recipe, options)
    write_exports(student, recipe.exporters, recipe.run.export, recipe.run, options)


def _export_elsewhere(options: argparse.Namespace, overrides: Sequence[str]) -> None:
    """Formats that are named, or another folder: what lies in export/ stays, and the recipe is not claimed anew."""
    quiet()
    alone = (options.recipe / STUDENT_FILE).is_file()
    if overrides and (options.format or alone):
        raise ValueError(f"{overrides[0]!r}: formats are named with --format, so a recipe's keys mean nothing here")
    exporters = [exporter_of(word) for word in options.format or ()]
    if not exporters and not alone:
        exporters = parse_recipe(options.recipe, overrides).exporters
    _require_some(exporters, options)
    run = None if alone else run_of(options.recipe)
    student = load_student(options.recipe if run is None else student_folder(run))
    out_dir = options.out or (options.recipe / "export" if run is None else run.export)
    require_exportable(student, exporters, out_dir, overwrite=options.overwrite)
    write_exports(student, exporters, out_dir, run, options)


def _require_some(exporters: Sequence[Exporter], options: argparse.Namespace) -> None:
    if not exporters:
        raise ValueError(
            f"{options.recipe}: export needs an export section (docs/recipes.md), or --format, e.g. --format "
            f"{next(iter(format_words()))}"
        )


def require_exportable(student: Student, exporters: Sequence[Exporter], out_dir: Path, *, overwrite: bool) -> None:
    """Ask every exporter, before a file is written and before anything is trained.

    Raises:
        ValueError: of every format that does not fit, naming layer, reason and the formats that do; or two formats of
            one folder.
    """
    names = [exporter.name for exporter in exporters]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"export: two formats would be written into {out_dir / name}; ask for them one by one")
    failed: list[Exception] = []
    for exporter in exporters:
        try:
            api.require_exportable(student, exporter, out_dir / exporter.name, overwrite=overwrite)
        except ValueError as error:
            failed.append(error)
    _raise_all(failed)


def write_exports(
    student: Student, exporters: Sequence[Exporter], out_dir: Path, run: RunDir | None, options: argparse.Namespace
) -> None:
    """Write `exporters` into `out_dir`/NAME and prove them.

    Args:
        run: whose recipe and numbers the model card tells; None: there is none.
        options: `no_verify` and `overwrite` (or `resume`) of the command line.

    Raises:
        ValueError: of every format that failed or was rejected (ParityError, if all of them were rejected), after all
            others were written.
    """
    overwrite = options.overwrite or getattr(options, "resume", False)  # of the interrupted run's after its training
    about = About() if run is None else about_run(run)
    failed: list[Exception] = []
    for exporter in exporters:
        try:
            where = api.export(
                student,
                exporter,
                out_dir / exporter.name,
                overwrite=overwrite,
                verify=not options.no_verify,
                about=about,
            )
        except ParityError as error:  # it names its format
            failed.append(error)
        except (ValueError, OSError, ModuleNotFoundError) as error:
            failed.append(ValueError(f"export {exporter.name}: {error}"))
        else:
            console.print(f"exported {exporter.name}: {where}")
    _raise_all(failed)


def _raise_all(errors: Sequence[Exception]) -> None:
    """One error that says what all of them say, if there are any; a command ends with one line."""
    if errors:
        kind = ParityError if all(isinstance(error, ParityError) for error in errors) else ValueError
        raise kind("; ".join(map(str, errors)))


def about_run(run: RunDir) -> About:
    """What a run directory has to tell in a model card."""
    evaluation = run.read_json("eval.json")
    trained = run.student.is_dir()
    recipe = read_yaml(run.recipe) if run.recipe.is_file() else None
    return About(
        recipe=None if recipe is None else yaml.safe_dump(recipe, sort_keys=False),
        trained_on=trained_on(run, recipe) if trained and recipe is not None else None,
        table=markdown(evaluation)
        if evaluation is not None and evaluation["folder"] == student_folder(run).name
        else None,
    )


def trained_on(run: RunDir, recipe: dict) -> str | None:
    """Steps and tokens, from the name of the newest checkpoint; tokens where every row has as many."""
    saved = checkpoint_steps(run.checkpoints) if run.checkpoints.is_dir() else {}
    if not saved:  # somebody needed the space
        return None
    steps = max(saved)
    trainer, data = recipe.get("trainer") or {}, (recipe.get("data") or {}).get("init_args") or {}
    text = f"{steps} steps on {data.get('text') or 'the text of its recipe'}"
    devices = trainer.get("devices", 1)
    if trainer.get("accelerator") == "cpu" and devices == "auto":
        devices = 1  # what it means there
    if {"batch_size", "seq_len"} <= set(data) and isinstance(devices, int) and devices > 0:
        rows = data["batch_size"] * int(trainer.get("accumulate_grad_batches") or 1) * devices
        tokens = steps * rows * data["seq_len"]
        text += f", {rows} rows of {data['seq_len']} tokens each: {tokens:,} tokens"
    return text
