"""Text that is always there: Python's own documentation, and a few pages of prose.

The first is for trials without a network: the topics of `help()` and the docstrings of the standard library, about
two megabytes of technical English. Modules are parsed, never imported. Every fifth topic and every fifth module is
held out. The second, `prose.txt`, is about nothing technical: it shows what a student trained on the first lost
elsewhere.
"""

from __future__ import annotations

import ast
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

CORPORA = ("python_docs:train", "python_docs:heldout", "kdqat:prose")

# Not documentation (tests, demos), or data that we read otherwise.
_SKIPPED = {"test", "idlelib", "lib2to3", "turtledemo", "pydoc_data", "antigravity", "this"}
_HELD_OUT_EVERY = 5


def iter_corpus(name: str) -> Iterator[str]:
    """The documents of one of `CORPORA`, in a fixed order: topics first, then modules, both by name."""
    if name == "kdqat:prose":
        yield Path(__file__).with_name("prose.txt").read_text(encoding="utf-8")
        return
    held_out = name == "python_docs:heldout"
    stdlib = Path(sysconfig.get_paths()["stdlib"])
    yield from _topics(stdlib / "pydoc_data" / "topics.py", held_out)
    modules = [path for path in _module_files(stdlib) if path.stat().st_size]
    for index, path in enumerate(modules):
        if _is_held_out(index) == held_out and (text := _docstrings(path, stdlib)):
            yield text


def corpus_fingerprint(name: str) -> str:
    """What decides a corpus's text without reading it: prose by its bytes, documentation by the Python."""
    if name == "kdqat:prose":
        return Path(__file__).with_name("prose.txt").read_text(encoding="utf-8")
    return f"python {sys.version}"


def _is_held_out(index: int) -> bool:
    return index % _HELD_OUT_EVERY == _HELD_OUT_EVERY - 1


def _topics(path: Path, held_out: bool) -> Iterator[str]:
    if not path.exists():
        raise ValueError(f"python_docs: this Python has no {path}; use a Python with its standard library")
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign):
            topics: dict[str, str] = ast.literal_eval(node.value)
            names = sorted(topics)
            yield from (topics[name] for i, name in enumerate(names) if _is_held_out(i) == held_out)


def _module_files(stdlib: Path) -> Iterator[Path]:
    for name in sorted(sys.stdlib_module_names):
        if name.startswith("_") or name in _SKIPPED:
            continue
        if (stdlib / f"{name}.py").is_file():
            yield stdlib / f"{name}.py"
        yield from sorted(p for p in (stdlib / name).rglob("*.py") if "test" not in p.parts and "tests" not in p.parts)


def _docstrings(path: Path, stdlib: Path) -> str:
    """A module's docstring, then every function and class that has one, as `help()` would head them."""
    try:
        tree = ast.parse(path.read_text(encoding="utf-8"))
    except (SyntaxError, UnicodeDecodeError):
        return ""  # the standard library keeps a few files that are meant not to parse
    name = ".".join(path.relative_to(stdlib).with_suffix("").parts).removesuffix(".__init__")
    parts = [f"{name}\n\n{doc}"] if (doc := ast.get_docstring(tree)) else []
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef) and (doc := ast.get_docstring(node)):
            parts.append(f"class {node.name}\n{doc}")
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and (doc := ast.get_docstring(node)):
            parts.append(f"{node.name}({ast.unparse(node.args)})\n{doc}")
    return "\n\n".join(parts)
