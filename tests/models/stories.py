"""stories260K, a trained Llama of 260 thousand parameters, beside the repository; a checkout alone lacks it."""

from __future__ import annotations

from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def shared(*parts: str) -> Path:
    """A path in the folder `shared` beside (or in) the repository; skips the test where there is none."""
    for folder in (ROOT.parent / "shared", ROOT / "shared"):
        if folder.joinpath(*parts).exists():
            return folder.joinpath(*parts)
    pytest.skip(f"needs ../shared/{'/'.join(parts)} beside {ROOT}")


def stories260k() -> str:
    """The model's folder."""
    return str(shared("models", "stories260K"))


def stories_text() -> str:
    """Five stories it has not been trained on."""
    return str(shared("data", "lm", "tinystories_sample_5.txt"))
