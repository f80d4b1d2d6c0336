"""The examples of docs/extending as importable modules."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from tests.docs.examples import NAMES, PAGES, SOURCE
from tests.exporters.reading import reader_here

__all__ = ["example", "folder", "reader_here"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder on sys.path with the files of all examples."""
    folder = tmp_path_factory.mktemp("examples")
    names = []
    for page in NAMES:
        for text, name in SOURCE.findall((PAGES / f"{page}.md").read_text()):
            (folder / f"{name}.py").write_text(text)
            names.append(name)
    assert len(set(names)) == len(names)
    sys.path.insert(0, str(folder))
    importlib.invalidate_caches()
    yield folder
    sys.path.remove(str(folder))
    for name in names:
        sys.modules.pop(name, None)


@pytest.fixture
def example(folder: Path) -> Any:
    """Import one of the files; `example("power_of_two").PowerOfTwo`."""

    def load(name: str) -> ModuleType:
        return importlib.import_module(name)

    return load
