"""Reading an export in this process: a reader of its own costs seconds, and only the contract needs to see it alone."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig

from kdqat.models.source import auto_class
from tests.docs.examples import PAGES, SOURCE
from tests.exporters.here import HERE


def loaded(folder: Path) -> Any:
    """The plain model in `folder`, in evaluation mode."""
    return auto_class(AutoConfig.from_pretrained(folder)).from_pretrained(folder).eval()


@pytest.fixture
def reader_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Readers run inside this process, and everything else of the gate as it is."""
    monkeypatch.setattr("kdqat.exporters.parity_reader.subprocess", HERE)


@pytest.fixture(scope="module")
def codes_file(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The exporter of docs/extending/exporter.md, with its reader beside it."""
    folder = tmp_path_factory.mktemp("codes_file")
    for text, name in SOURCE.findall((PAGES / "exporter.md").read_text()):
        (folder / f"{name}.py").write_text(text)
    sys.path.insert(0, str(folder))
    importlib.invalidate_caches()
    sys.modules.pop("codes_file", None)
    try:
        return importlib.import_module("codes_file").CodesFile
    finally:
        sys.path.remove(str(folder))
        sys.modules.pop("codes_file", None)
