"""The verb `export`: formats by their words, proved, described, and rejected in one line."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from safetensors.torch import load_file, save_file

from tests.cli.fork_server import run, server
from tests.cli.recipes import write


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("exported")
    write(folder)
    run(folder, "fit", "recipe.yaml")
    return folder


def card(folder: Path) -> tuple[dict[str, Any], str]:
    """Front matter and text of a model card."""
    _, head, text = (folder / "README.md").read_text().split("---\n", 2)
    return yaml.safe_load(head), text


def parity(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "parity.json").read_text())


def test_fit_ends_with_an_export_that_is_proved_and_described(finished: Path) -> None:
    folder = finished / "run" / "export" / "dequantized"
    assert parity(folder)["verified"] and parity(folder)["logits"]["max_difference"] == 0
    head, text = card(folder)
    assert head["library_name"] == "transformers" and head["pipeline_tag"] == "text-generation"
    assert {"kdqat", "dequantized"} <= set(head["tags"]) and "base_model" not in head  # a toy is not on the hub
    table = run(finished, "report", "run")
    row = next(line for line in table.splitlines() if "| kdqat:prose | student |" in line)
    assert row in text and "| kdqat:prose | RTN |" in text and "| kdqat:prose | teacher |" in text
    assert "2 steps on kdqat:prose, 2 rows of 32 tokens each: 128 tokens" in text
    assert "4.50 bits a weight" in text and "| 14 | W4A16_G32 |" in text
    assert "class_path: kdqat.ForwardKL" in text and 'from_pretrained("dequantized")' in text


def test_words_name_formats_beside_the_recipes_and_elsewhere(finished: Path, tmp_path: Path) -> None:
    done = server().run(finished, "export", "run", "--format", "dequantized")
    assert done.code == 2 and "run/export/dequantized exists already: use --overwrite" in done.err
    run(finished, "export", "recipe.yaml", "--format", "dequantized:bfloat16", "--out", str(tmp_path))
    assert parity(tmp_path / "dequantized")["compute_dtype"] == "bfloat16"
    assert parity(finished / "run" / "export" / "dequantized")["compute_dtype"] == "float32"
    run(finished, "export", "run", "--out", str(tmp_path / "again"))  # the recipe's section, elsewhere
    assert parity(tmp_path / "again" / "dequantized")["verified"]


def test_a_students_folder_stands_for_its_run(finished: Path, tmp_path: Path) -> None:
    shutil.copytree(finished / "run" / "student", tmp_path / "mine")
    run(tmp_path, "export", "mine", "--format", "dequantized")
    _, text = card(tmp_path / "mine" / "export" / "dequantized")
    assert parity(tmp_path / "mine" / "export" / "dequantized")["verified"] and "## Recipe" not in text


@pytest.mark.parametrize("options, says", [
    (("--format", "dequantised"), "--format 'dequantised' is unknown; did you mean 'dequantized'"),
    (("--format", "GGUF"), "unknown; use one of gguf:q4_0, gguf:q4_1, gguf:q8_0, gguf:q4_k, gguf:mxfp4, gguf:mixed"),
    (("--format", "Dequantized", "--format", "dequantized:float16"), "two formats would be written into"),
    (("--format", "dequantized", "--trainer.max_steps", "3"), "a recipe's keys mean nothing here"),
])  # fmt: skip
def test_what_cannot_be_asked_is_one_line(finished: Path, tmp_path: Path, options: Any, says: str) -> None:
    done = server().run(finished, "export", "run", *options, "--out", str(tmp_path / "out"))
    assert done.code == 2 and says in done.err and len(done.err.strip().splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_a_students_folder_without_a_format_is_told_what_to_say(finished: Path) -> None:
    done = server().run(finished, "export", "run/student")
    assert done.code == 2 and "or --format, e.g. --format " in done.err


def corrupt() -> None:
    """Every export gets one wrong weight."""
    from kdqat.exporters import DequantizedHF

    whole = DequantizedHF.export

    def export(self: Any, student: Any, out_dir: Path) -> None:
        whole(self, student, out_dir)
        tensors = load_file(out_dir / "model.safetensors")
        tensors["model.layers.1.mlp.down_proj.weight"][3, 4] *= 1.0000001
        save_file(tensors, out_dir / "model.safetensors", {"format": "pt"})

    DequantizedHF.export = export  # type: ignore[method-assign]


def test_a_wrong_weight_ends_the_verb_with_the_layers_name_and_keeps_the_folder(finished: Path, tmp_path: Path) -> None:
    options = ("export", "run", "--format", "dequantized", "--out", str(tmp_path))
    done = server().run(finished, *options, before="tests.cli.test_export:corrupt")
    last = done.err.strip().splitlines()[-1]
    assert done.code == 2 and "model.layers.1.mlp.down_proj: 1 of 8192 weights differ, the first at [3, 4]" in last
    assert [path.name for path in tmp_path.iterdir()] == ["dequantized.rejected"]
    assert parity(tmp_path / "dequantized.rejected")["rejected"]


def test_no_verify_skips_the_gate_and_the_folder_says_so(finished: Path, tmp_path: Path) -> None:
    options = ("export", "run", "--format", "dequantized", "--out", str(tmp_path), "--no_verify")
    assert server().run(finished, *options, before="tests.cli.test_export:corrupt").code == 0
    assert parity(tmp_path / "dequantized")["why"] == "nobody asked for it"


def test_the_reader_is_a_process_of_its_own(finished: Path, tmp_path: Path) -> None:
    shutil.copytree(finished / "run" / "student", tmp_path / "mine")
    options = ("export", "mine", "--format", "dequantized", "--out", "out")
    done = server().run(tmp_path, *options, READER_ALONE="1")
    assert done.code == 0, done.err
    assert {"python", "torch", "transformers"} <= set(parity(tmp_path / "out" / "dequantized")["versions"])
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["dequantized"]  # request and answer are gone


def refuse() -> None:
    """A format that holds nothing."""
    from kdqat.exporters import DequantizedHF

    DequantizedHF.refuses = lambda self, student: "model.layers.0.x: too wide; use another"  # type: ignore


def test_fit_refuses_before_it_trains(tmp_path: Path) -> None:
    write(tmp_path)
    done = server().run(tmp_path, "fit", "recipe.yaml", before="tests.cli.test_export:refuse")
    assert done.code == 2 and "export dequantized: model.layers.0.x: too wide" in done.err
    assert not (tmp_path / "run" / "checkpoints").exists() and not (tmp_path / "run" / "metrics.csv").exists()


def fail() -> None:
    """One format finds a number that it cannot hold while it writes, another one a full disk, a third is wrong."""
    from kdqat.exporters import AWQ, GGUF

    def too_large(self: Any, key: str, module: str, value: Any) -> Any:
        raise ValueError(f"{key} has numbers that float16 does not hold")

    def full(self: Any, student: Any, out_dir: Path) -> None:
        raise OSError(28, "No space left on device")

    GGUF._plain, AWQ.export = too_large, full  # type: ignore[method-assign]
    corrupt()


def test_formats_that_fail_stop_no_other_and_every_one_is_named_at_the_end(finished: Path, tmp_path: Path) -> None:
    words = ("dequantized", "gguf:q4_0", "awq", "gptq")
    options = ("export", "run", "--out", str(tmp_path), *(part for word in words for part in ("--format", word)))
    done = server().run(finished, *options, before="tests.cli.test_export:fail")
    last = done.err.strip().splitlines()[-1]
    assert done.code == 2 and "Traceback" not in done.err
    assert "export dequantized is not what the student computes: model.layers.1.mlp.down_proj" in last
    assert "export gguf_q4_0: " in last and "float16 does not hold" in last
    assert "export awq: [Errno 28] No space left on device" in last and "gptq" not in last
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dequantized.rejected", "gptq"]


def hide_packages() -> None:
    """torchao and onnxscript are not installed."""
    import importlib.util

    found = importlib.util.find_spec

    def find_spec(name: str, *rest: Any) -> Any:
        return None if name in ("torchao", "onnxscript") else found(name, *rest)

    importlib.util.find_spec = find_spec


def test_fit_asks_for_the_package_that_writes_a_format_before_it_trains(tmp_path: Path) -> None:
    write(tmp_path, export=[{"class_path": "TorchAO"}, {"class_path": "GPTQ"}])
    done = server().run(tmp_path, "fit", "recipe.yaml", before="tests.cli.test_export:hide_packages")
    assert done.code == 2 and 'export torchao writes with torchao; pip install "kdqat[torchao]"' in done.err
    assert not (tmp_path / "run" / "checkpoints").exists() and not (tmp_path / "run" / "metrics.csv").exists()


def test_every_refusal_is_told_at_once(finished: Path, tmp_path: Path) -> None:
    options = ("--format", "onnx", "--format", "gguf:q8_0", "--format", "gptq", "--out", str(tmp_path / "out"))
    done = server().run(finished, "export", "run", *options)
    assert done.code == 2 and "export onnx: " in done.err and "export gguf_q8_0: " in done.err
    assert not (tmp_path / "out").exists()


def test_a_good_export_takes_the_rejected_one_away_and_one_that_nobody_proved_does_not(
    finished: Path, tmp_path: Path
) -> None:
    options = ("export", "run", "--format", "dequantized", "--out", str(tmp_path))
    assert server().run(finished, *options, before="tests.cli.test_export:corrupt").code == 2
    run(finished, *options, "--no_verify")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dequantized", "dequantized.rejected"]
    run(finished, *options, "--overwrite")
    assert [path.name for path in tmp_path.iterdir()] == ["dequantized"]


@pytest.mark.parametrize("file", ["out", "out/gptq", "out/gptq.rejected"])
def test_a_file_where_a_folder_goes_is_named_and_left_alone(finished: Path, tmp_path: Path, file: str) -> None:
    (tmp_path / file).parent.mkdir(exist_ok=True)
    (tmp_path / file).write_text("mine")
    options = ("--format", "gptq", "--out", str(tmp_path / "out"), "--overwrite")
    done = server().run(finished, "export", "run", *options)
    assert done.code == 2 and f"{tmp_path / file} is a file, and a folder goes there" in done.err
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == [tmp_path / file]
    assert (tmp_path / file).read_text() == "mine"
