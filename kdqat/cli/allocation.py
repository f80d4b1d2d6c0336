"""Why layers got their bits, beside the plan: `allocation.json` in the run directory."""

from __future__ import annotations

from kdqat.cli.parser import Recipe
from kdqat.models import plannable_refs
from kdqat.spec import ALLOCATION_FILE
from kdqat.student import Student


def write_allocation(recipe: Recipe, student: Student) -> None:
    """Write what the recipe's allocator says of its plan; an allocator that weighs nothing up leaves no file."""
    content = recipe.model.allocator.explain(plannable_refs(student.model))
    if content is None:
        (recipe.run.path / ALLOCATION_FILE).unlink(missing_ok=True)
    else:
        recipe.run.write_json(ALLOCATION_FILE, content)
