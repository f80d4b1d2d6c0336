"""The exporter contract, for every exporter in `kdqat.exporters` under every word of the command line; a new file is
found and imported.

The flagship: what a reader process that has never heard of kdqat computes is what the student computed. In float32
through transformers that is bit for bit: last hidden states, and logits where there is a head. Other formats hold the
student's codes and scales bit for bit, and logits within the tolerance of the dtype in which their reader computes.
"""

from __future__ import annotations

import importlib
import inspect
import json
import os
import pkgutil
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

import kdqat.exporters
from kdqat import api
from kdqat.allocate import Uniform
from kdqat.calibrate import Calibration
from kdqat.exporters import Exporter
from kdqat.exporters.parity_layers import compare_layers
from kdqat.exporters.parity_logits import answers_of, compare_answers, fault_of, tolerance_for
from kdqat.exporters.parity_reader import READERS
from kdqat.exporters.words import exporter_of, format_words
from kdqat.initializers import RTN, MSEGrid
from kdqat.models import ModelSource, SplitModel
from kdqat.models.toy import toy_model
from kdqat.quant import LSQ, full_precision
from kdqat.spec import PLAN_FILE, PRESETS, QuantPlan
from kdqat.student import Student, as_rtn, prepare_student
from tests.exporters.gguf_students import moved
from tests.models.stories import stories260k

# tried in this order until a format holds one
SCHEMES = ("W4A16_G32", "GGUF_Q4_0", "GGUF_Q4_1", "GGUF_Q8_0", "W4A16_ASYM_G32", "W8A16", "W8A8", "W4A8_G32",
           "NVFP4_A16", "MXFP4_A16", "NVFP4", "MXFP4", *PRESETS)  # fmt: skip

READ_ALL = """
import json, runpy, sys
reader, request, folders = sys.argv[1], sys.argv[2], sys.argv[3:]
for folder in folders:
    sys.argv = [reader, folder, request, folder + ".answer"]
    runpy.run_path(reader, run_name="__main__")
assert "kdqat" not in sys.modules
"""
IDS = torch.randint(3, 256, (2, 32), generator=torch.Generator().manual_seed(0))


def found_exporters() -> list[type[Exporter]]:
    found: set[type[Exporter]] = set()
    for module in pkgutil.walk_packages(kdqat.exporters.__path__, "kdqat.exporters."):
        for value in vars(importlib.import_module(module.name)).values():
            if inspect.isclass(value) and issubclass(value, Exporter) and not inspect.isabstract(value):
                found.add(value)
    return sorted(found, key=lambda cls: cls.__name__)


# formats that hold nothing of a toy Llama whole, and the tests in tests/exporters that are theirs
ELSEWHERE = {
    "onnx": "encoders: test_onnx.py",
    "gguf:q4_k": "widths of 256: test_gguf.py",
}
WORDS = [word for word in format_words() if word not in ELSEWHERE]
every_word = pytest.mark.parametrize("word", WORDS)
MODELS = (
    *("toy:llama", "toy:llama untied", "toy:llama with its head", "toy:gemma2"),
    *("toy:bert", "toy:bert_encoder", "stories260K"),
)
CASES = [(word, model) for word in WORDS for model in (MODELS if word == "dequantized" else MODELS[:1])]
every_case = pytest.mark.parametrize("word, name", CASES)


def trained(name: str, scheme: str = "W4A16_G32") -> Student:
    """A student whose weights and scales have moved since they were initialized, as training moves them."""
    tie, ignore, split = "tied" not in name and "head" not in name, ("lm_head",), None
    if name == "stories260K":
        source, scheme = ModelSource(stories260k()), "W3A16"
    else:
        source = ModelSource(name.split()[0])
        split = SplitModel(toy_model(source.path.removeprefix("toy:"), tie=tie).eval())
    if "with its head" in name:
        ignore = ()
    text = Calibration("kdqat:prose", seq_len=32, num_rows=4)  # for static activation ranges
    student = prepare_student(
        source, Uniform(scheme, ignore=ignore), LSQ, MSEGrid(num_steps=5), calibration=text, split=split
    )
    return moved(student)


def scheme_for(word: str) -> str:
    """The first of SCHEMES that the format holds on toy:llama."""
    for scheme in SCHEMES:
        try:
            student = api.quantize("toy:llama", scheme, initializer=RTN())
        except ValueError:  # groups wider than the toy, static ranges without text
            continue
        if exporter_of(word).refuses(student) is None:
            return scheme
    pytest.fail(f"{word} holds no preset on toy:llama")


@pytest.fixture(scope="module")
def exports(tmp_path_factory):
    """(word, model name) -> (student, folder, file of what another process read)."""
    made: dict[str, dict] = {}

    def get(word: str, name: str):
        if name == "stories260K":
            stories260k()  # skips where it is missing
        exporter = exporter_of(word)
        if missing := exporter.reader_missing():
            pytest.skip(missing)
        if word not in made:
            made[word] = {}
            scheme = scheme_for(word)
            for model in [model for case, model in CASES if case == word and (model in MODELS[:-1] or have_stories())]:
                made[word][model] = (trained(model, scheme), tmp_path_factory.mktemp("export") / "out")
                api.export(made[word][model][0], exporter, made[word][model][1], verify=False)
            if exporter.reader is not None:
                run_reader(exporter.reader, [folder for _, folder in made[word].values()])
        student, folder = made[word][name]
        return student, folder, folder.with_name(f"{folder.name}.answer")

    return get


def have_stories() -> bool:
    try:
        return bool(stories260k())
    except pytest.skip.Exception:
        return False


def run_reader(reader: str, folders) -> None:
    """One plain process for all: no kdqat on its path, as many threads as here (sums depend on the split)."""
    save_file({"input_ids": IDS}, ids := folders[0].parent / "ids")
    env = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads()), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-I", "-c", READ_ALL, str(READERS / reader), str(ids), *map(str, folders)]
    done = subprocess.run(command, env=env, cwd=ids.parent, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_walk_finds_the_exporters_and_all_of_them_are_public():
    assert {"DequantizedHF"} <= {cls.__name__ for cls in found_exporters()} <= set(kdqat.exporters.__all__)
    assert {type(exporter_of(word)) for word in format_words()} == set(found_exporters())


@every_word
def test_a_format_says_what_it_is(word):
    exporter = exporter_of(word)
    assert exporter.name and exporter.name == os.path.basename(exporter.name) and "." not in exporter.name
    assert exporter.compute_dtype in ("float32", "bfloat16", "float16")
    assert exporter.reader is None or (READERS / exporter.reader).is_file()
    assert word.partition(":")[0].partition("-")[0] in exporter.name  # one finds the folder by the word


@every_case
def test_what_an_independent_reader_reads_is_what_the_student_holds_and_computes(exports, word, name):
    exporter, (student, _, answer) = exporter_of(word), exports(word, name)
    if exporter.reader is None:
        pytest.skip("nothing independent reads this format")
    findings = compare_layers(student, answer, exporter.compute_dtype, stored=exporter.stored)
    assert not findings.faults
    total = sum(layer.weight.numel() for layer in student.layers.values())
    assert max(findings.counts["codes"]["compared"], findings.counts["weights"]["compared"]) >= total
    kind, ours = answers_of(student, IDS, activations=exporter.applies_activations)
    read = load_file(answer)
    assert (kind == "hidden") == (name == "toy:bert_encoder")
    if kind in read:
        numbers = compare_answers(kind, ours, read[kind])
        assert fault_of(kind, numbers, tolerance_for(exporter.compute_dtype, exporter.plain_dtype)[1]) is None
        assert word != "dequantized" or torch.equal(ours, read[kind])  # bit for bit


@every_word
def test_the_test_would_notice_latent_or_requantized_weights(exports, word):
    student, _, answer = exports(word, "toy:llama")
    exporter = exporter_of(word)
    if exporter.reader is None:
        pytest.skip("nothing independent reads this format")
    with as_rtn(student):
        assert len(compare_layers(student, answer, exporter.compute_dtype).faults) >= len(student.layers)
    read = load_file(answer)
    if "logits" in read:
        with full_precision(student.model):
            latent = answers_of(student, IDS, activations=False)[1]
        numbers = compare_answers("logits", latent, read["logits"])
        assert fault_of("logits", numbers, tolerance_for("float32")[1])


@every_word
def test_plan_tokenizer_card_and_parity_lie_in_the_folder(exports, word):
    student, folder, _ = exports(word, "toy:llama")
    assert QuantPlan.load(folder) == student.plan
    files = {path.name for path in folder.iterdir()}
    assert {PLAN_FILE, "README.md", "parity.json"} <= files
    assert not any(name.endswith((".bin", ".pt", ".pth", ".pkl")) or name.startswith(".") for name in files)
    if not any(name.endswith(".gguf") for name in files):  # a GGUF holds its tokenizer and config
        assert {"config.json", "tokenizer.json", "tokenizer_config.json"} <= files
    assert json.loads((folder / "parity.json").read_text())["format"] == exporter_of(word).name
    card = (folder / "README.md").read_text()
    assert card.startswith("---\nlibrary_name:") and "quantization-aware-training" in card and "## Parity" in card


def left_as_it_was(exporter: Exporter, scheme: str, tmp_path) -> None:
    """Exporting touches neither tensors nor config, and ties hold."""
    student = trained("toy:llama", scheme)
    before = {key: value.clone() for key, value in student.model.state_dict().items()}
    student.model.config.architectures = ["kept as it is, or set by save_pretrained"]
    config = student.model.config.to_dict()
    api.export(student, exporter, tmp_path / "out", verify=False)
    after = student.model.state_dict()
    assert list(before) == list(after) and all(torch.equal(before[key], after[key]) for key in before)
    assert {**student.model.config.to_dict(), "architectures": config["architectures"]} == config
    assert len(student.layers) == 14 and student.model.lm_head.weight is student.model.model.embed_tokens.weight


@every_word
def test_exporting_leaves_the_student_as_it_was(word, tmp_path):
    left_as_it_was(exporter_of(word), scheme_for(word), tmp_path)


def refuses_with_a_reason(exporter: Exporter) -> None:
    """What does not fit is refused naming a layer."""
    for scheme in ("W4A16", "W4A16_G32", "W2A16_ASYM_G32", "W8A16", "TERNARY", "NF4", "QUEST_W4A16"):
        student = api.quantize("toy:llama", scheme, initializer=RTN())
        reason = exporter.refuses(student)
        assert reason is None or "model.layers." in reason


@every_word
def test_what_it_refuses_is_a_reason_that_names_a_layer_or_nothing(word):
    refuses_with_a_reason(exporter_of(word))
