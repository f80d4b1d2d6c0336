"""The pages of docs/extending, their examples and recipe snippets, for the tests that run them."""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any

import yaml

from kdqat import api
from kdqat.cli.parser import Recipe, parse_recipe
from kdqat.initializers import RTN
from tests.cli.recipes import BASE

PAGES = Path(__file__).resolve().parents[2] / "docs" / "extending"
NAMES = sorted(page.stem for page in PAGES.glob("*.md") if page.stem != "README")
SOURCE = re.compile(r"^```python\n(# (\w+)\.py\n.*?)^```$", re.DOTALL | re.MULTILINE)
SNIPPET = re.compile(r"^```yaml\n(.*?)^```$", re.DOTALL | re.MULTILINE)


def student(scheme: Any = "W4A16_G32", **kwargs: Any) -> Any:
    return api.quantize("toy:llama", scheme, **{"initializer": RTN(), **kwargs})


def snippet(page: str) -> dict[str, Any]:
    (text,) = SNIPPET.findall((PAGES / f"{page}.md").read_text())
    return yaml.safe_load(text)


def laid_over(base: Any, top: Any) -> Any:
    """`top` on `base`; what names a class replaces the whole entry."""
    if not isinstance(base, dict) or not isinstance(top, dict) or "class_path" in top:
        return top
    return {**base, **{key: laid_over(base.get(key), value) for key, value in top.items()}}


def parsed(page: str, tmp_path: Path) -> Recipe:
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(laid_over(copy.deepcopy(BASE), snippet(page)), sort_keys=False))
    return parse_recipe(path)
