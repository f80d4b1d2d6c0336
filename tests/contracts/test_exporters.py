"""The exporter contract, for every exporter in `kdqat.exporters`; a new file is found and imported.

The flagship: what a reader process that has never heard of kdqat computes is what the student computed, bit for bit:
last hidden states, and logits where there is a head. A format whose reader computes in other numbers states its
tolerance in TOLERANCE.
"""

from __future__ import annotations

import importlib
import inspect
import os
import pkgutil
import subprocess
import sys

import pytest
import torch

import kdqat.exporters
from kdqat import api
from kdqat.allocate import Uniform
from kdqat.calibrate import Calibration
from kdqat.exporters import Exporter
from kdqat.initializers import MSEGrid
from kdqat.models import ModelSource, SplitModel
from kdqat.models.toy import toy_model
from kdqat.quant import LSQ, full_precision
from kdqat.spec import PLAN_FILE, QuantPlan, preset
from kdqat.student import Student, as_rtn, prepare_student
from tests.models.stories import stories260k

TOLERANCE: dict[str, float] = {}  # exporter's class name -> absolute tolerance of answers; 0 where it is not named

READER = """
import sys, torch, transformers
ids, folders = torch.load(sys.argv[1]), sys.argv[2:]
for folder in folders:
    (name,) = transformers.AutoConfig.from_pretrained(folder).architectures
    model = getattr(transformers, name).from_pretrained(folder).eval()
    assert len(transformers.AutoTokenizer.from_pretrained(folder)("hello world").input_ids) > 1
    with torch.no_grad():
        output = model(input_ids=ids, output_hidden_states=True)
    torch.save([output.hidden_states[-1], *([output.logits] if "logits" in output else [])], folder + ".answers")
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


every_exporter = pytest.mark.parametrize("cls", found_exporters(), ids=lambda cls: cls.__name__)
MODELS = (
    *("toy:llama", "toy:llama untied", "toy:llama with its head", "toy:gemma2"),
    *("toy:bert", "toy:bert_encoder", "stories260K"),
)


def answers(model) -> list[torch.Tensor]:
    """Last hidden states, and logits if the model has a head; as READER has them."""
    with torch.no_grad():
        output = model(input_ids=IDS, output_hidden_states=True)
    return [output.hidden_states[-1], *([output.logits] if "logits" in output else [])]


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
    with torch.no_grad(), torch.random.fork_rng():
        torch.manual_seed(0)
        for layer in student.layers.values():
            layer.weight.add_(torch.randn_like(layer.weight) * layer.weight.std() * 0.1)
            layer.weight_fake_quantizer.scale.mul_(torch.rand_like(layer.weight_fake_quantizer.scale) * 0.2 + 0.85)
    return student


@pytest.fixture(scope="module")
def exports(tmp_path_factory):
    """(exporter, model name) -> (student, folder, answers that another process got)."""
    made: dict[type[Exporter], dict] = {}

    def get(cls: type[Exporter], name: str):
        if name == "stories260K":
            stories260k()  # skips where it is missing
        if cls not in made:
            made[cls] = {}
            for model in MODELS if have_stories() else MODELS[:-1]:
                made[cls][model] = (trained(model), tmp_path_factory.mktemp("export") / "out")
                api.export(made[cls][model][0], cls(), made[cls][model][1])
            run_reader([folder for _, folder in made[cls].values()])
        student, folder = made[cls][name]
        return student, folder, torch.load(f"{folder}.answers")

    return get


def have_stories() -> bool:
    try:
        return bool(stories260k())
    except pytest.skip.Exception:
        return False


def run_reader(folders) -> None:
    """A plain process: no kdqat on its path, as many threads as here (sums depend on the split)."""
    torch.save(IDS, ids := folders[0].parent / "ids")
    env = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads()), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-I", "-c", READER, str(ids), *map(str, folders)]
    done = subprocess.run(command, env=env, cwd=ids.parent, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_walk_finds_the_exporters_and_all_of_them_are_public():
    assert {"DequantizedHF"} <= {cls.__name__ for cls in found_exporters()} <= set(kdqat.exporters.__all__)
    names = [cls.name for cls in found_exporters()]
    assert len(set(names)) == len(names) and all(name.isidentifier() for name in names)


@every_exporter
@pytest.mark.parametrize("name", MODELS)
def test_exported_answers_equal_fake_quantized_answers(exports, cls, name):
    student, folder, read_elsewhere = exports(cls, name)
    ours = answers(student.model)
    tolerance = TOLERANCE.get(cls.__name__, 0)
    assert len(ours) == (1 if name == "toy:bert_encoder" else 2)
    torch.testing.assert_close(read_elsewhere, ours, rtol=0, atol=tolerance)
    torch.testing.assert_close(answers(cls().reload(folder)), ours, rtol=0, atol=tolerance)


@every_exporter
def test_the_test_would_notice_latent_or_requantized_weights(exports, cls):
    student, _, read_elsewhere = exports(cls, "stories260K")
    with full_precision(student.model):
        latent = answers(student.model)
    with as_rtn(student):
        requantized = answers(student.model)
    for other in (latent, requantized):
        assert all((a - b).abs().max() > 0.1 for a, b in zip(other, read_elsewhere, strict=True))


@every_exporter
@pytest.mark.parametrize("name", MODELS)
def test_every_weight_is_scale_times_code_and_everything_else_is_as_it_was(exports, cls, name):
    student, folder, _ = exports(cls, name)
    read = cls().reload(folder).state_dict()
    for key, value in student.model.state_dict().items():
        if "_fake_quantizer." in key:
            assert key not in read
            continue
        layer = student.layers.get(key.removesuffix(".weight"))
        if layer is not None:
            quantizer = layer.weight_fake_quantizer
            stored = quantizer.stored_qparams(layer.weight)
            codes = quantizer.codes(layer.weight).reshape(*stored.scale.shape[:2], -1)
            value = (stored.scale * (codes - stored.zero_point)).reshape(layer.weight.shape)
        assert torch.equal(read[key], value), key


@every_exporter
@pytest.mark.parametrize("name", MODELS[:2])
def test_plan_and_tokenizer_lie_in_the_folder(exports, cls, name):
    student, folder, _ = exports(cls, name)
    assert QuantPlan.load(folder) == student.plan
    files = {path.name for path in folder.iterdir()}
    assert {PLAN_FILE, "config.json", "tokenizer.json", "tokenizer_config.json"} <= files
    assert any(name.endswith(".safetensors") for name in files)
    assert not any(name.endswith((".bin", ".pt", ".pth", ".pkl")) or name.startswith(".") for name in files)


@every_exporter
def test_exporting_leaves_the_student_as_it_was(cls, tmp_path):
    student = trained("toy:llama")
    before = {key: value.clone() for key, value in student.model.state_dict().items()}
    student.model.config.architectures = ["kept as it is, or set by save_pretrained"]
    config = student.model.config.to_dict()
    api.export(student, cls(), tmp_path / "out")
    after = student.model.state_dict()
    assert list(before) == list(after) and all(torch.equal(before[key], after[key]) for key in before)
    assert {**student.model.config.to_dict(), "architectures": config["architectures"]} == config
    assert len(student.layers) == 14 and student.model.lm_head.weight is student.model.model.embed_tokens.weight


@every_exporter
def test_what_it_refuses_is_a_reason_or_nothing(cls):
    for scheme in ("W4A16", "W4A16_G32", "W2A16_ASYM_G32", "W8A16"):
        reason = cls().refuses(QuantPlan({"model.layers.0.mlp.up_proj": preset(scheme)}))
        assert reason is None or "up_proj" in reason
