"""A small recipe as plain data, changed by dotted keys, for tests of the command line."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
DROP = object()  # as a value: take the key out

BASE: dict[str, Any] = {
    "seed_everything": 1,
    "model": {
        "student": {"path": "toy:llama"},
        "teacher": {"class_path": "FrozenTeacher", "init_args": {"dtype": "float32"}},
        "plan": {"class_path": "Uniform", "init_args": {"scheme": "W4A16_G32"}},
        "quantizer": {"class_path": "LSQ"},
        "initializer": {"class_path": "MSEGrid", "init_args": {"num_steps": 4}},
        "loss": {"class_path": "ForwardKL"},
        "optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"lr": 1.0e-3}},
        "scheduler": {"class_path": "WarmupCosine", "init_args": {"warmup_steps": 1}},
    },
    "data": {
        "class_path": "PackedText",
        "init_args": {"text": "kdqat:prose", "seq_len": 32, "batch_size": 2, "val_rows": 4},
    },
    "trainer": {"accelerator": "cpu", "max_steps": 2, "log_every_n_steps": 1, "default_root_dir": "run"},
    "evaluate": [{"class_path": "TeacherAgreement", "init_args": {"text": "kdqat:prose", "seq_len": 32, "limit": 4}}],
    "export": [{"class_path": "DequantizedHF"}],
}


def recipe(**changes: Any) -> dict[str, Any]:
    """BASE with keys such as `model__plan__init_args__scheme` set (a dot is written as two underscores)."""
    content = copy.deepcopy(BASE)
    for path, value in changes.items():
        *parents, last = path.split("__")
        place = content
        for parent in parents:
            place = place.setdefault(parent, {})
        if value is DROP:
            del place[last]
        else:
            place[last] = value
    return content


def write(folder: Path, content: dict[str, Any] | None = None, name: str = "recipe.yaml", **changes: Any) -> Path:
    """Write a recipe into `folder`."""
    path = folder / name
    path.write_text(yaml.safe_dump(recipe(**changes) if content is None else content, sort_keys=False))
    return path


def named_loss(class_path: str) -> dict[str, Any]:
    """A loss section."""
    return {"class_path": class_path}


def stories() -> Path:
    """A real small model beside the repository; a checkout alone does not have it."""
    for shared in (ROOT.parent / "shared", ROOT / "shared"):
        if (shared / "models" / "stories260K").is_dir():
            return shared / "models" / "stories260K"
    pytest.skip(f"needs ../shared/models/stories260K beside {ROOT}")
