"""Links, paths, tests and classes that the documentation names exist."""

from __future__ import annotations

import ast
import builtins
import importlib
import inspect
import pkgutil
import re
from pathlib import Path

import pytest

import kdqat
from kdqat.cli.explain import _GIVEN
from kdqat.cli.parser import METHODS
from kdqat.importance import Scoring
from kdqat.spec import PRESETS, KVCacheScheme, LayerScheme, QuantSpec
from kdqat.training import KDQATModule

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted([*ROOT.glob("docs/**/*.md"), *ROOT.glob("*.md"), *ROOT.glob("recipes/**/*.md")])
EXTENDING = sorted((ROOT / "docs" / "extending").glob("*.md"))

LINK = re.compile(r"\[[^\]\n]*\]\(([^)\s]+)\)")
EXAMPLE = re.compile(r"^```python\n(.*?)^```$", re.DOTALL | re.MULTILINE)
FENCE = re.compile(r"^```.*?^```$", re.DOTALL | re.MULTILINE)
CODE = re.compile(r"`([^`\n]+)`")
PATH = re.compile(r"(?:[\w.-]+/)+[\w.-]*(?:::\w+)?")
RECIPE = re.compile(r"\brecipes/[\w./-]+\.ya?ml")
CLASS = re.compile(r"\b([A-Z]\w*)((?:\.[a-z_]\w*)?)")

OURS = ("kdqat", "tests", "docs", "recipes", ".ci")  # a path that begins so is a path of this repository
PACKAGES = tuple(path.name for path in (ROOT / "kdqat").iterdir() if path.is_dir())  # and so is `data/texts.py`
ELSEWHERE = {
    "BertModel",
    "Callback",
    "Linear",
    *vars(builtins),
}  # classes of other libraries that docs/extending may name
CONSTANTS = {"ARGUMENTS", "VARIANTS", "EXPECTED", "TAKES", "PYTHONPATH"}  # of tests and of the shell

every_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))


def prose(page: Path) -> str:
    """A page without its fenced blocks."""
    return FENCE.sub("", page.read_text())


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    titles = re.findall(r"^#+ (.+)$", prose(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.replace("`", "").lower()).replace(" ", "-") for title in titles}


def named_paths(page: Path) -> set[str]:
    """Paths of this repository in inline code, with a test's name behind "::" where one is given."""
    found = set()
    for code in CODE.findall(prose(page)):
        for path in PATH.findall(code):
            first, last = path.split("/")[0], path.split("::")[0].rsplit("/", 1)[1]
            if (first in OURS and path == code) or (first in PACKAGES and last.endswith(".py")):
                found.add(path)
    return found


def test_there_are_pages():
    assert {"README.md", "docs/glossary.md", "docs/recipes.md", "docs/data.md"} <= {
        str(page.relative_to(ROOT)) for page in PAGES
    }
    assert any(named_paths(page) for page in PAGES)


@every_page
def test_relative_links_lead_somewhere(page):
    for target in LINK.findall(prose(page)):
        if re.match(r"[a-z]+:", target):
            continue  # another site
        path, _, anchor = target.partition("#")
        where = page.parent / path if path else page
        assert where.exists(), f"{target}: no such file"
        if anchor and where.suffix == ".md":
            assert anchor in anchors(where), f"{target}: no such heading"


@every_page
def test_paths_and_tests_that_are_named_exist(page):
    for named in named_paths(page):
        path, _, test = named.partition("::")
        where = next((root / path for root in (ROOT, ROOT / "kdqat") if (root / path).exists()), None)
        assert where is not None, f"{named}: no such file"
        assert not test or f"def {test}(" in where.read_text(), f"{named}: no such test"


@every_page
def test_recipes_that_are_named_exist(page):
    for named in RECIPE.findall(page.read_text()):
        assert (ROOT / named).is_file(), f"{named}: no such recipe"


@pytest.fixture(scope="module")
def known() -> dict[str, object]:
    """Everything with a name in any module of kdqat; of Triton kernels where there is Triton."""
    names: dict[str, object] = {}
    for module in pkgutil.walk_packages(kdqat.__path__, "kdqat."):
        if module.name.endswith("__main__"):
            continue
        try:
            names.update(vars(importlib.import_module(module.name)))
        except ModuleNotFoundError as error:
            if error.name != "triton":
                raise
    return names


@pytest.mark.parametrize("page", EXTENDING, ids=lambda page: page.name)
def test_classes_that_the_extending_pages_name_exist(page, known):
    examples = "\n".join(source for other in EXTENDING for source in EXAMPLE.findall(other.read_text()))
    own = {node.name for node in ast.walk(ast.parse(examples)) if isinstance(node, ast.ClassDef)}
    others = own | CONSTANTS | ELSEWHERE | set(PRESETS)
    for code in CODE.findall(prose(page)):
        if "/" in code:
            continue
        for name, attribute in CLASS.findall(code):
            if name in others or len(name) == 1:
                continue
            assert name in known, f"{code}: kdqat has no {name}"
            assert not attribute or hasattr(known[name], attribute[1:]), f"{code}: {name} has no {attribute}"


PARTS = (  # mappings of a recipe that nobody calls by a class's name
    kdqat.Calibration,
    kdqat.ModelSource,
    kdqat.Parallel,
    kdqat.TextSource,
    KDQATModule,
    KVCacheScheme,
    LayerScheme,
    QuantSpec,
    Scoring,
)


def recipe_classes() -> list[type]:
    """What a recipe can name: the public, concrete classes of the method packages that take arguments from a recipe."""
    found = {value for package in METHODS for value in vars(package).values() if inspect.isclass(value)}
    bases = {"BitAllocator", "Callback", "DistillLoss", "Evaluator", "Exporter", "FakeQuantizer", "Initializer"}
    bases |= {"ImportanceScorer"}
    bases |= {"LRScheduler", "Optimizer", "Teacher", "TextData"}
    kinds = {"Observer", "Steer"}  # bases without an abstract method
    concrete = {
        cls
        for cls in found
        if not inspect.isabstract(cls) and cls.__name__ not in kinds and bases & {base.__name__ for base in cls.__mro__}
    }
    return sorted([*concrete, *PARTS], key=lambda cls: cls.__name__)


@pytest.mark.parametrize("cls", recipe_classes(), ids=lambda cls: cls.__name__)
def test_every_argument_of_a_recipe_is_documented(cls):
    pages = ROOT / "docs" / "recipes.md", ROOT / "docs" / "data.md"
    words = {word for page in pages for code in CODE.findall(prose(page)) for word in re.findall(r"\w+", code)}
    arguments = set(inspect.signature(cls).parameters) - set(_GIVEN)
    if cls.__name__ == "ProgressLine":
        return  # added by itself
    assert cls in PARTS or cls.__name__ in words
    assert arguments <= words
