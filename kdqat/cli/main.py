"""`kdqat VERB ...`: finds the verb, keeps help, version and report free of torch, turns errors into one line."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import kdqat

EPILOG = """\
Any key of the recipe can be overridden by its dotted path:
  kdqat fit recipes/quickstart.yaml --trainer.max_steps 50 --model.plan.scheme W3A16_G64
Further options: --config FILE (its keys win), --print_config (the resolved recipe), --model.quantizer.help LSQ.
"""

VERBS = {
    "quantize": "prepare a student: plan, swap, first scales             -> prepared/",
    "score": "how much each block or layer matters                   -> scores.json scores.png",
    "cache": "let the teacher answer the recipe's rows beforehand     -> the cache folder",
    "fit": "train it against its teacher, evaluate, export        -> student/ eval.json export/",
    "validate": "KL and perplexity on the recipe's validation rows     -> validation.json",
    "eval": "perplexity and agreement with the teacher             -> eval.json",
    "signals": "what quantization does to every layer's signal        -> signals.json",
    "export": "write serving formats, read back to prove them        -> export/FORMAT/",
    "generate": "let a run's student continue a prompt",
    "study": "many runs of one recipe: variations, seeds, screening -> results, table, plot",
    "report": "what is in a run directory, without loading torch",
}


def build_parser() -> argparse.ArgumentParser:
    """The outer parser; whatever it does not know are overrides for the recipe's parser."""
    parser = argparse.ArgumentParser(
        prog="kdqat",
        description="A low-bit student that is as good as its teacher, exported as it was trained.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=EPILOG,
    )
    parser.add_argument("--version", action="version", version=f"kdqat {kdqat.__version__}")
    verbs = parser.add_subparsers(dest="verb", metavar="VERB", required=True)
    for name, text in VERBS.items():
        verb = verbs.add_parser(name, help=text, description=text, epilog=EPILOG,
                                formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
        if name == "report":
            verb.add_argument("run", nargs="+", type=Path, help="run directories")
            verb.add_argument("--json", action="store_true", help="JSON instead of Markdown")
            verb.add_argument("--html", nargs="?", const="", metavar="FILE",
                              help="write a page with heatmaps and curves; comes behind the runs")  # fmt: skip
            continue
        if name == "study":
            verb.add_argument("study", type=Path, help="a study file (YAML, docs/study.md)")
            verb.add_argument(
                "--dry_run", action="store_true", help="list the runs and parse their recipes; run nothing"
            )
            verb.add_argument("--screen_only", action="store_true", help="leave the full runs for the next call")
            verb.add_argument("--workers", type=int, help="runs at once, instead of the file's")
            verb.add_argument("--workers_per_gpu", type=int, help="runs that share a GPU, instead of the file's")
            continue
        verb.add_argument("recipe", type=Path, help="a recipe (YAML) or a run directory")
        if name == "generate":
            verb.add_argument("prompt", help="text to continue")
            verb.add_argument("--max_new_tokens", type=int, default=64)
            verb.add_argument("--chat", action="store_true", help="the prompt is a user's turn of the chat template")
            continue
        if name == "cache":
            continue
        verb.add_argument("--overwrite", action="store_true", help="replace this verb's earlier output")
        if name == "signals":
            verb.add_argument("--text", default="python_docs:heldout", help="what both models read")
            verb.add_argument("--num_rows", type=int, default=8, help="rows of it")
            verb.add_argument("--num_tokens", type=int, default=256, help="tokens of each")
        if name in ("fit", "export"):
            verb.add_argument("--no_verify", action="store_true", help="do not read exports back to prove them")
        if name == "export":
            verb.add_argument("--format", action="append", metavar="NAME[:VARIANT]",
                              help="a format, e.g. gguf:q4_0, instead of the recipe's; may be repeated")  # fmt: skip
            verb.add_argument("--out", type=Path, metavar="DIR", help="write DIR/FORMAT/ instead of RUN/export/FORMAT/")
        if name == "fit":
            verb.add_argument("--resume", action="store_true", help="go on from the newest complete checkpoint")
            verb.add_argument("--dry_run", action="store_true", help="print memory and time of the run; run nothing")
    return parser


def main(arguments: Sequence[str] | None = None) -> None:
    """Run a verb. Exit codes: 0 done, 2 bad input (one line on stderr), 128 + n stopped by signal n.

    With KDQAT_TRACEBACK=1 in the environment an error keeps its traceback, for who writes an own method.
    """
    options, rest = build_parser().parse_known_args(arguments)
    try:
        if options.verb == "report":
            from kdqat.report import report

            if rest:
                raise ValueError(f"unknown argument {rest[0]!r}")
            if options.html is not None:
                from kdqat.report.page import write_page

                print(write_page(options.run, Path(options.html) if options.html else None))
                return
            print(report(options.run, options.json))
            return
        if options.verb == "study":
            from kdqat.cli.study import study

            sys.exit(study(options, rest, main))
        sys.path.insert(0, "")  # classes in a file beside the recipe, as under `python -m`
        from kdqat.cli import verbs

        code = getattr(verbs, options.verb)(options, rest)
    except (ValueError, OSError, ModuleNotFoundError) as error:
        if os.environ.get("KDQAT_TRACEBACK"):
            raise
        text = " ".join(str(error).split())
        if isinstance(error, ModuleNotFoundError):
            text = f"the package {error.name!r} is missing: `pip install {(error.name or '').partition('.')[0]}`"
        print(f"kdqat {options.verb}: {text}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:  # Ctrl-C outside of training, or twice
        print(f"kdqat {options.verb}: interrupted", file=sys.stderr)
        sys.exit(130)
    sys.exit(code or 0)


if __name__ == "__main__":
    main()
