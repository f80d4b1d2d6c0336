"""Parses recipes and prints a line for each that cannot be parsed: `python -m kdqat.cli.check RECIPE ...`."""

from __future__ import annotations

import sys
from pathlib import Path

from kdqat.cli.parser import parse_recipe
from kdqat.cli.session import quiet


def check(paths: list[Path]) -> int:
    """How many recipes are bad; what is wrong with them goes to stdout."""
    bad = 0
    for path in paths:
        try:
            parse_recipe(path)
        except (ValueError, OSError) as error:
            bad += 1
            print(f"{path.stem}: {' '.join(str(error).split())}", flush=True)
    return bad


if __name__ == "__main__":
    sys.path.insert(0, "")
    quiet()
    sys.exit(bool(check([Path(path) for path in sys.argv[1:]])))
