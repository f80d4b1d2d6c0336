"""Writing an export: refused, or written whole, read back, described, and only then given its name."""

from __future__ import annotations

import logging
import os
import shutil
from pathlib import Path

from kdqat.exporters.base import Exporter
from kdqat.exporters.card import About, write_card
from kdqat.exporters.parity import TEXT, Parity, ParityError, verify_export
from kdqat.exporters.words import words_that_hold
from kdqat.files import whole_folder
from kdqat.student import Student

log = logging.getLogger(__name__)


def export(
    student: Student,
    exporter: Exporter,
    out_dir: str | Path,
    *,
    overwrite: bool = False,
    verify: bool = True,
    text: str = TEXT,
    about: About | None = None,
) -> Path:
    """Write `student` into `out_dir`, whole or not at all, and prove it; returns the folder.

    An OUT_DIR.rejected of an earlier time is removed once a proved export has the name.

    Args:
        overwrite: an export that is there is replaced once the new one has been proved.
        verify: read the folder back with an independent reader (`parity.py`); off, parity.json says so.
        text: what student and reader are compared on.
        about: what the model card says besides.

    Raises:
        ValueError: as `require_exportable`.
        ParityError: naming the first layer that differs; the export then lies in OUT_DIR.rejected, and an earlier one
            of the name `out_dir` is as it was.
    """
    out_dir = Path(out_dir)
    rejected = _rejected(out_dir)
    require_exportable(student, exporter, out_dir, overwrite=overwrite)
    with whole_folder(out_dir, overwrite=overwrite) as folder:
        exporter.export(student, folder)
        if verify:
            parity = verify_export(student, exporter, folder, text=text)
        else:
            parity = Parity(why="nobody asked for it", numbers={"format": exporter.name})
            parity.save(folder)
        write_card(student, exporter, folder, parity, about or About(), name=out_dir.name)
        if parity.rejected:
            shutil.rmtree(rejected, ignore_errors=True)
            os.replace(folder, rejected)
            raise ParityError(f"export {exporter.name} is not what the student computes: {parity.why}; see {rejected}")
    if parity.verified:
        shutil.rmtree(rejected, ignore_errors=True)
    elif verify:
        log.warning("export %s is not verified: %s", exporter.name, parity.why)
    return out_dir


def require_exportable(student: Student, exporter: Exporter, out_dir: Path, *, overwrite: bool) -> None:
    """
    Raises:
        ValueError: if the format cannot hold the plan, the package that writes it is missing, the folder exists and may
            not be overwritten, or a file lies where a folder goes.
    """
    reason = exporter.refuses(student)
    if reason:
        held = words_that_hold(student)
        which = f" (formats that hold this plan: {', '.join(held)})" if held else ""
        raise ValueError(f"export {exporter.name}: {reason}{which}")
    exporter.require_writer()
    for path in (out_dir, *out_dir.parents, _rejected(out_dir)):
        if path.exists() and not path.is_dir():
            raise ValueError(f"{path} is a file, and a folder goes there: move it away, or use another folder")
    if out_dir.exists() and not overwrite:
        raise ValueError(f"{out_dir} exists already: use --overwrite (overwrite=True) or another folder")


def _rejected(out_dir: Path) -> Path:
    return out_dir.with_name(f"{out_dir.name}.rejected")
