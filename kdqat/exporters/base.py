"""What an exporter is: it writes the codes and scales a student trained with, and never recomputes them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from pathlib import Path
from typing import ClassVar

from torch import nn

from kdqat.spec import QuantPlan
from kdqat.student import Student


class Exporter(ABC):
    """One serving format. `name` is its folder under export/ and its word on the command line."""

    name: ClassVar[str]

    @abstractmethod
    def refuses(self, plan: QuantPlan) -> str | None:
        """Why this format cannot hold `plan` losslessly: layer, reason, nearest format that fits; None if it can."""

    @abstractmethod
    def export(self, student: Student, out_dir: Path) -> None:
        """Write the student into the empty folder `out_dir`, the plan with it."""

    @abstractmethod
    def reload(self, out_dir: Path) -> nn.Module:
        """Read the folder back through an independent reader, as a user would."""
