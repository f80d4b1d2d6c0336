"""The model card: README.md of an export, with the front matter that the Hugging Face hub reads.

It says what a user of the folder cannot see in it: what it was made from and how, how good it is beside its teacher and
the RTN baseline, whether the files were proved to be what was trained, and the commands that serve it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from kdqat.exporters.base import Exporter
from kdqat.exporters.parity import PARITY_FILE, Parity
from kdqat.files import write_text
from kdqat.spec import PLAN_FILE, QuantSpec
from kdqat.spec.parse import preset_name
from kdqat.student import Student, stored_bytes

_LICENCE_KEYS = ("license", "license_name", "license_link")


@dataclass(frozen=True)
class About:
    """What only the run knows.

    Args:
        recipe: the resolved recipe as YAML.
        trained_on: how long and on what, in words, e.g. "600 steps of 16 rows of 512 tokens: 4.9 million tokens".
        table: teacher, RTN and student as Markdown.
    """

    recipe: str | None = None
    trained_on: str | None = None
    table: str | None = None


def write_card(
    student: Student, exporter: Exporter, folder: Path, parity: Parity, about: About, *, name: str | None = None
) -> None:
    """Write README.md into `folder`; `name` is what the folder will be called."""
    parts = [
        front_matter(student, exporter),
        f"# {base_name(student)}, {plan_words(student)}\n\nA low-bit student of `{student.source.path}`, trained with "
        f"[kdqat](https://pypi.org/project/kdqat) and written as {exporter.name}. These files hold what it was trained "
        "with: nothing was quantized anew on the way here.",
        _plan(student),
        _training(about),
        _quality(about),
        _parity(parity),
        _serving(exporter.serving(student, name or folder.name)),
        f"## Recipe\n\n```yaml\n{about.recipe.strip()}\n```" if about.recipe else "",
    ]
    write_text(folder / "README.md", "\n\n".join(part for part in parts if part) + "\n")


def front_matter(student: Student, exporter: Exporter) -> str:
    """The YAML head of the card: what the base's card says of its licence is passed on."""
    head: dict[str, Any] = {key: value for key, value in base_card(student).items() if key in _LICENCE_KEYS}
    path = student.source.path
    if path.count("/") == 1 and not Path(path).exists() and ":" not in path:  # an id on the hub
        head |= {"base_model": path, "base_model_relation": "quantized"}
    head["library_name"] = exporter.library_name
    if student.split.has_head and student.split.family.causal:
        head["pipeline_tag"] = "text-generation"
    head["tags"] = ["kdqat", "quantization-aware-training", "knowledge-distillation", exporter.name]
    return f"---\n{yaml.safe_dump(head, sort_keys=False).strip()}\n---"


def base_card(student: Student) -> dict[str, Any]:
    """The front matter of the base model's card, from its folder or the hub's cache; {} where there is none."""
    path: Any = Path(student.source.path) / "README.md"
    if not path.is_file():
        from huggingface_hub import try_to_load_from_cache
        from huggingface_hub.errors import HFValidationError

        try:
            path = try_to_load_from_cache(student.source.path, "README.md", revision=student.source.revision)
        except HFValidationError:  # a toy, a package, a GGUF file
            return {}
        if not isinstance(path, str):
            return {}
    text = Path(path).read_text(encoding="utf-8", errors="replace")
    if not text.startswith("---\n") or "\n---" not in text[4:]:
        return {}
    try:
        head = yaml.safe_load(text[4:].partition("\n---")[0])
    except yaml.YAMLError:
        return {}
    return head if isinstance(head, dict) else {}


def base_name(student: Student) -> str:
    """The base model's name without the way to it."""
    return student.source.path.removeprefix("package:").rstrip("/").rpartition("/")[2]


def plan_words(student: Student) -> str:
    """Its schemes, the commonest first: "W4A16_G64 and 1 other scheme"."""
    names = [preset_name(scheme) or "own scheme" for scheme in student.plan.values()]
    (first, _), *others = Counter(names).most_common()
    return first if not others else f"{first} and {len(others)} other scheme{'s' * (len(others) > 1)}"


def spec_words(spec: QuantSpec | None) -> str:
    """A spec in a cell of a table; what a reader would assume anyway is left out."""
    if spec is None:
        return "16 bits"
    group = f"groups of {spec.group_size}" if spec.group_size else f"per {spec.granularity}"
    zero = "" if spec.number.kind != "integer" else f", zero point {spec.zero_point}"
    scale = "dynamic" if spec.dynamic else f"scales {spec.scale_dtype}"
    return f"{spec.format}, {group}, {scale}{zero}"


def _plan(student: Student) -> str:
    summary, sizes = student.summary(), stored_bytes(student)
    rows = ["| layers | scheme | weights | activations |", "| ---: | --- | --- | --- |"]
    for scheme, number in Counter(student.plan.values()).most_common():
        cells = (preset_name(scheme) or "", spec_words(scheme.weight), spec_words(scheme.activation))
        rows.append(f"| {number} | {' | '.join(cells)} |")
    ignored = ", ".join(f"`{name}`" for name in summary["ignored"]) or "nothing"
    text = (
        f"{summary['average_bits']:.2f} bits a weight with scales and zero points, {summary['nominal_bits']:.2f} "
        f"without, over {summary['layers']} layers; {sizes['student'] / 1e6:.1f} MB instead of "
        f"{sizes['teacher'] / 1e6:.1f} in 16 bits, the rest of the model counted in 16 bits. "
        f"In full precision on purpose: {ignored}. The plan, layer by layer: `{PLAN_FILE}`."
    )
    return "\n".join(["## Quantization", "", text, "", *rows])


def _training(about: About) -> str:
    return f"## Training\n\nDistilled from the base model: {about.trained_on}." if about.trained_on else ""


def _quality(about: About) -> str:
    return f"## Beside teacher and round-to-nearest\n\n{about.table}" if about.table else ""


def _parity(parity: Parity) -> str:
    if not parity.verified:
        state = "REJECTED" if parity.rejected else "Not verified"
        return f"## Parity\n\n{state}: {parity.why}."
    rows = ["| compared with the student | numbers | differ |", "| --- | ---: | ---: |"]
    for kind in ("codes", "scales", "zero_points", "weights"):
        counts = parity.numbers[kind]
        if counts["compared"]:
            rows.append(f"| {kind.replace('_', ' ')} | {counts['compared']} | {counts['changed']} |")
    versions = ", ".join(f"{name} {version}" for name, version in parity.numbers["versions"].items())
    text = f"Read back by `{parity.numbers['reader']}` ({versions}), in a process without kdqat."
    logits = parity.numbers.get("logits")
    if logits:
        source = parity.numbers["text"]
        text += (
            f" On {' x '.join(map(str, source['shape']))} tokens of {source['source']}, activations "
            f"{parity.numbers['activations']}: largest difference of two logits {logits['max_difference']:.3g}, KL "
            f"mean {logits['kl_mean']:.3g}, p95 {logits['kl_p95']:.3g}, top-1 {100 * logits['top1']:.1f} %."
        )
    return "\n".join(["## Parity", "", f"{text} All numbers: `{PARITY_FILE}`.", "", *rows])


def _serving(commands: Mapping[str, str]) -> str:
    blocks = []
    for engine, command in commands.items():
        language = "python" if "import " in command or "(" in command.split()[0] else "sh"
        blocks.append(f"{engine}:\n\n```{language}\n{command}\n```")
    return "\n\n".join(["## Use", *blocks]) if blocks else ""
