"""The run directory: one recipe, whole life. Every verb reads what is there and adds its own file.

    runs/NAME/  recipe.yaml  environment.json  every verb
                scores.json scores.png         score
                prepared/                      quantize
                allocation.json                quantize, or fit without it: why each layer got its bits
                checkpoints/ metrics.csv       fit (resume here), with tensorboard/, signals.parquet
                student/ baseline.json         fit
                adapters.json adapter/         fit, with LoraAdapters
                validation.json                validate
                eval.json                      eval, fit
                signals.json                   signals
                export/FORMAT/                 export, fit

A verb refuses when its own output exists; a recipe that differs from the stored one in a section that an earlier verb
used is an error naming the keys. Imports no torch.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any

import yaml

from kdqat.files import write_text

OUTPUTS: dict[str, tuple[str, ...]] = {
    "quantize": ("prepared",),
    "fit": ("checkpoints", "student", "metrics.csv", "tensorboard", "signals.parquet", "adapters.json", "adapter"),
    "validate": ("validation.json",),
    "eval": ("eval.json",),
    "signals": ("signals.json",),
    "export": ("export",),
}
SECTIONS: dict[str, tuple[str, ...]] = {
    "quantize": (
        "seed_everything",
        *(f"model.{key}" for key in ("student", "plan", "quantizer", "initializer")),
        *(f"model.{key}" for key in ("activation_quantizer", "calibration")),
    ),
    "fit": ("seed_everything", "model", "data", "trainer"),
    "validate": (),
    "eval": (),
    "signals": (),
    "export": (),
}
# numbers about a student that is no longer there, once it is overwritten
_MEASURED = ("eval.json", "validation.json", "signals.json")
_PACKAGES = ("kdqat", "torch", "transformers", "lightning", "jsonargparse", "safetensors", "gguf")


class RunDir:
    """The files of one run under `path`."""

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        self.prepared, self.student = self.path / "prepared", self.path / "student"
        self.checkpoints, self.export = self.path / "checkpoints", self.path / "export"
        self.recipe = self.path / "recipe.yaml"

    def claim(self, verb: str, recipe: Mapping[str, Any], *, overwrite: bool = False, resume: bool = False) -> None:
        """Check that `verb` may run here with `recipe`; touches nothing.

        Raises:
            ValueError: if its output exists, or the recipe changed under an earlier verb's output.
        """
        mine = [name for name in OUTPUTS[verb] if (self.path / name).exists()]
        if mine and not overwrite and not resume:
            how = "--overwrite to replace it" + (" or --resume to continue" if verb == "fit" else "")
            raise ValueError(f"{self.path / mine[0]} exists already: use {how}, or another trainer.default_root_dir")
        if not self.recipe.is_file():
            return
        stored = read_yaml(self.recipe)
        for earlier, names in OUTPUTS.items():
            replaced = earlier == verb and not resume
            if replaced or not any((self.path / name).exists() for name in names):
                continue
            changed = {key for section in SECTIONS[earlier] for key in _differences(stored, recipe, section)}
            changed -= {"trainer.default_root_dir"}  # a run directory may be moved
            if changed:
                raise ValueError(
                    f"{self.path}: the recipe differs from the one `kdqat {earlier}` used here in "
                    f"{', '.join(sorted(changed)[:5])}; use another trainer.default_root_dir, "
                    f"or run `kdqat {earlier} --overwrite`"
                )

    def make(self) -> None:
        """Make the directory.

        Raises:
            ValueError: if it cannot be made or written.
        """
        with self._explained():
            self.path.mkdir(parents=True, exist_ok=True)
            if not os.access(self.path, os.W_OK):
                raise PermissionError(13, "no permission to write")

    def start(self, verb: str, recipe: Mapping[str, Any], environment: Mapping[str, Any], *, overwrite: bool) -> None:
        """Write recipe and environment and drop what `verb` overwrites: called when all input has proved good.

        Raises:
            ValueError: if it cannot be written.
        """
        with self._explained():
            if overwrite:
                for name in (*OUTPUTS[verb], *(_MEASURED if verb in ("quantize", "fit") else ())):
                    _remove(self.path / name)
            write_text(self.recipe, yaml.safe_dump(dict(recipe), sort_keys=False))
            write_text(self.path / "environment.json", json.dumps(dict(environment), indent=1))

    @contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            remedy = "choose another trainer.default_root_dir"
            raise ValueError(f"{self.path}: cannot be written ({error.strerror}); {remedy}") from error

    def read_json(self, name: str) -> dict[str, Any] | None:
        """The content of `name`, or None if it is not there.

        Raises:
            ValueError: if it is damaged.
        """
        path = self.path / name
        if not path.is_file():
            return None
        try:
            return json.loads(path.read_text())
        except ValueError as error:
            raise ValueError(f"{path} is damaged ({error}); delete it and run the verb that wrote it again") from error

    def write_json(self, name: str, content: Mapping[str, Any]) -> None:
        """Write `name`, whole or not at all."""
        write_text(self.path / name, json.dumps(dict(content), indent=1))


def environment(hardware: str) -> dict[str, Any]:
    """What made a run: command, versions, commit, hardware."""
    versions = {}
    for package in _PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = "missing"
    return {
        "command": " ".join(["kdqat", *sys.argv[1:]]),
        "python": platform.python_version(),
        "versions": versions,
        "commit": commit(),
        "hardware": hardware,
        "cpus": os.cpu_count(),
    }


def commit() -> str | None:
    """The git commit of this copy of kdqat, "+" appended if it has changes; None outside a repository."""
    here = Path(__file__).parent
    try:
        head = subprocess.run(["git", "rev-parse", "--short=12", "HEAD"], cwd=here, capture_output=True, text=True)
        dirty = subprocess.run(["git", "status", "--porcelain"], cwd=here, capture_output=True, text=True)
    except OSError:
        return None
    if head.returncode:
        return None
    return head.stdout.strip() + ("+" if dirty.stdout.strip() else "")


def read_yaml(path: Path) -> dict[str, Any]:
    """A YAML mapping.

    Raises:
        ValueError: naming file and line if it is none.
    """
    try:
        content = yaml.safe_load(path.read_text())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is no YAML: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path}: a recipe is a mapping of sections, this is {type(content).__name__}")
    return content


def _differences(old: Mapping[str, Any], new: Mapping[str, Any], section: str) -> Iterator[str]:
    """Dotted keys under `section` where two recipes differ."""
    for part in section.split("."):
        old, new = (old or {}).get(part), (new or {}).get(part)  # type: ignore[assignment]
    yield from _walk(old, new, section)


def _walk(old: Any, new: Any, path: str) -> Iterator[str]:
    if isinstance(old, dict) and isinstance(new, dict):
        for key in {**old, **new}:
            yield from _walk(old.get(key), new.get(key), f"{path}.{key}")
    elif old != new:
        yield path


def _remove(path: Path) -> None:
    shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
