"""What the verbs share: opening a run directory, the RTN baseline, the comparison, quiet libraries."""

from __future__ import annotations

import argparse
import hashlib
import json
import logging
import os
import platform
import warnings
from collections.abc import Sequence
from pathlib import Path

import lightning as L
import torch
from rich.console import Console
from transformers.utils.logging import disable_progress_bar

from kdqat import api
from kdqat.allocate import FromFile
from kdqat.cli.parser import Recipe, parse_recipe
from kdqat.files import whole_folder
from kdqat.initializers import RTN
from kdqat.models import FrozenTeacher, Teacher
from kdqat.quant import MinMax
from kdqat.report import RunDir, environment, print_table, read_yaml
from kdqat.student import Student, as_rtn, prepare_student, save_student, stored_bytes

console = Console(stderr=True, highlight=False)


def begin(verb: str, options: argparse.Namespace, overrides: Sequence[str], *, resume: bool = False) -> Recipe:
    """Parse the recipe, seed, claim the run directory; nothing that is there is touched yet.

    Raises:
        ValueError: for anything wrong with recipe or directory, before a weight is loaded.
    """
    quiet()
    recipe = parse_recipe(options.recipe, overrides)
    L.seed_everything(recipe.seed, verbose=False)
    if first_process():
        if resume and options.overwrite:
            raise ValueError("--resume and --overwrite exclude each other")
        recipe.run.claim(verb, recipe.content, overwrite=options.overwrite, resume=resume)
        recipe.run.make()
    return recipe


def start(verb: str, recipe: Recipe, options: argparse.Namespace) -> None:
    """Model and data have proved good: record recipe and environment, drop what is overwritten."""
    if first_process():
        recipe.run.start(verb, recipe.content, environment(hardware()), overwrite=options.overwrite)


def save(student: Student, folder: Path) -> None:
    """Save a student as `folder`, whole or not at all."""
    with whole_folder(folder, overwrite=True) as part:
        save_student(student, part)


def measure_rtn(recipe: Recipe, untrained: Student | None) -> dict[str, dict[str, float]]:
    """The RTN baseline's numbers, from baseline.json if it was measured the same way.

    Args:
        untrained: the student before training, to measure on; None: load the source anew.
    """
    relevant = [recipe.content.get("evaluate"), recipe.content["model"]]
    key = hashlib.sha256(json.dumps(relevant, sort_keys=True).encode()).hexdigest()
    stored = recipe.run.read_json("baseline.json")
    if stored is not None and stored["key"] == key:
        return stored["rtn"]
    device = device_of(recipe.trainer.get("accelerator"))
    if untrained is None:
        plan = FromFile(str(student_folder(recipe.run)))
        untrained = prepare_student(
            recipe.model.source, plan, MinMax, RTN(), calibration=recipe.model.calibration, device=device
        )
    with as_rtn(untrained) as rtn:
        numbers = api.evaluate(rtn, recipe.evaluators, teacher_of(recipe), device=device, name="RTN")
    recipe.run.write_json("baseline.json", {"key": key, "rtn": numbers})
    return numbers


def compare(recipe: Recipe, student: Student, folder: Path) -> None:
    """Evaluate the student beside RTN and teacher; write eval.json, print the table."""
    device = device_of(recipe.trainer.get("accelerator"))
    numbers = api.evaluate(student, recipe.evaluators, teacher_of(recipe), device=device)
    models = {"rtn": measure_rtn(recipe, None), "student": numbers}
    evaluation = {"folder": folder.name, "models": models, "bytes": stored_bytes(student), **student.summary()}
    recipe.run.write_json("eval.json", evaluation)
    print_table(evaluation, title=str(recipe.run.path))


def teacher_of(recipe: Recipe) -> Teacher:
    """Whom students are measured against: the recipe's teacher, else the student's source in float32; that as well in
    place of a teacher in the student's own weights, unless these were left alone (merged adapters are in them)."""
    teacher = recipe.model.teacher
    if teacher is not None and not (teacher.shares_weights and recipe.model.trainable != "scales"):
        return teacher
    if recipe.judge is None:
        recipe.judge = FrozenTeacher(dtype="float32")
    return recipe.judge


def run_of(path: Path) -> RunDir:
    """The run directory a recipe or a directory stands for."""
    if path.is_dir():
        return RunDir(path)
    if not path.is_file():
        raise ValueError(f"{path}: no such recipe or run directory")
    folder = (read_yaml(path).get("trainer") or {}).get("default_root_dir")
    return RunDir(folder or Path("runs") / path.stem)


def student_folder(run: RunDir) -> Path:
    """student/ of a run, else prepared/.

    Raises:
        ValueError: if it has neither.
    """
    for folder in (run.student, run.prepared):
        if folder.is_dir():
            return folder
    raise ValueError(f"{run.path}: there is neither student/ nor prepared/; run `kdqat fit` or `kdqat quantize` first")


def device_of(accelerator: str | None) -> torch.device:
    """Where preparing and evaluation compute: the CPU if the recipe says so or there is nothing else; one GPU for each
    process that Lightning has started."""
    if accelerator == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())


def first_process() -> bool:
    """Whether this process speaks for the run; Lightning starts the verb once more on every further device."""
    if "RANK" in os.environ:
        return int(os.environ["RANK"]) == 0
    return all(int(os.environ.get(name, "0")) == 0 for name in ("NODE_RANK", "LOCAL_RANK"))


def hardware() -> str:
    """The machine, in words."""
    if torch.cuda.is_available():
        return f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}"
    return f"{platform.machine()}, {torch.get_num_threads()} threads"


def quiet() -> None:
    """Let kdqat speak and the libraries only warn."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    logging.getLogger("kdqat").setLevel(logging.INFO if first_process() else logging.WARNING)
    for name in ("lightning.pytorch", "lightning.fabric", "torch.utils._pytree", "torchao"):
        logging.getLogger(name).setLevel(logging.ERROR)
    disable_progress_bar()
    warnings.filterwarnings("ignore", module=r"lightning\..*")
    warnings.filterwarnings("ignore", category=FutureWarning)
