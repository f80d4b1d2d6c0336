"""Where models come from, and what is said when they cannot be had. No test here needs a network."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
import torch

from kdqat.models import ModelSource
from kdqat.models.toy import TOYS, toy_model, toy_tokenizer
from tests.models.stories import ROOT, stories260k

IDS = torch.randint(3, 256, (2, 12), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def folder(tmp_path):
    """A toy Llama as a Hugging Face folder."""
    toy_model("llama").save_pretrained(tmp_path)
    toy_tokenizer().save_pretrained(tmp_path)
    return tmp_path


def why(source: ModelSource) -> str:
    with pytest.raises(ValueError, match=f"model '?{source.path}") as error:
        source.load_model()
    return str(error.value)


def state(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """All tensors of a model, those that are in no file too."""
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_a_folder_loads_in_the_asked_dtype_in_eval_mode(folder, dtype):
    source = ModelSource(str(folder), dtype)
    model = source.load_model()
    assert model.dtype == getattr(torch, dtype) and not model.training
    expected = toy_model("llama").to(getattr(torch, dtype))
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), expected.parameters(), strict=True))
    assert source.load_tokenizer().get_vocab() == toy_tokenizer().get_vocab()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_a_toy_is_in_every_dtype_what_its_folder_loads_as(folder, dtype):
    ours, theirs = (state(ModelSource(path, dtype).load_model()) for path in ("toy:llama", str(folder)))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert ours["model.rotary_emb.inv_freq"].dtype == torch.float32  # rounded frequencies are another model
    planned = state(ModelSource("toy:llama", dtype).load_meta())
    assert {name: t.dtype for name, t in planned.items()} == {name: t.dtype for name, t in ours.items()}


def test_a_trained_model_loads_from_its_folder_and_knows_its_language():
    source = ModelSource(stories260k())
    model, tokenizer = source.load_model(), source.load_tokenizer()
    ids = tokenizer("Once upon a time", return_tensors="pt").input_ids
    with torch.no_grad():
        answer = model.generate(ids, max_new_tokens=12, do_sample=False, pad_token_id=2)
    assert "there was a little girl named" in tokenizer.decode(answer[0])


@pytest.mark.parametrize("kind", TOYS)
def test_every_toy_loads_with_a_tokenizer_that_fits_it(kind):
    source = ModelSource(f"toy:{kind}")
    model, tokenizer = source.load_model(), source.load_tokenizer()
    text = "naïve 12\n"
    ids = tokenizer(text).input_ids
    assert len(ids) == len(text.encode()) and tokenizer.decode(ids) == text
    assert max(tokenizer.get_vocab().values()) < model.get_input_embeddings().num_embeddings
    assert not model.training


@pytest.mark.parametrize(
    ("model", "name"),
    [
        (toy_model("bert"), "BertForMaskedLM"),
        (toy_model("bert_encoder"), "BertModel"),
        (toy_model("gpt2"), "GPT2LMHeadModel"),
        (toy_model("llama").model, "LlamaModel"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_folder_is_loaded_as_what_its_config_names_and_gets_no_head_of_random_weights(tmp_path, model, name):
    model.save_pretrained(tmp_path)
    loaded = ModelSource(str(tmp_path)).load_model()
    assert type(loaded).__name__ == name and set(loaded.state_dict()) == set(model.state_dict())


def test_an_unknown_toy_is_answered_with_all_of_them():
    text = why(ModelSource("toy:lama"))
    assert all(f"toy:{kind}" in text for kind in TOYS)


def test_a_folder_without_a_config_is_no_model(tmp_path):
    assert "holds no config.json" in why(ModelSource(str(tmp_path)))


@pytest.mark.parametrize("path", ["/no/such/model", "./nothing", "~/no-such-model-folder", "a/b/c"])
def test_a_path_that_is_none_is_not_asked_of_the_hub(path):
    assert "no such folder" in why(ModelSource(path))


@pytest.mark.parametrize("path", ["/no/such/model.gguf", "model.gguf"])
def test_a_missing_gguf_file_is_named(path):
    assert "no such file" in why(ModelSource(path))


def test_a_folder_with_only_pickled_weights_is_refused_and_nothing_is_unpickled(folder):
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'touch " + str(folder).encode() + b"/ran'\ntR.")
    text = why(ModelSource(str(folder)))
    assert "no safetensors weights and kdqat does not unpickle foreign files" in text
    assert not (folder / "ran").exists()


def test_damaged_weights_are_said_to_be_damaged(folder):
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:5000])
    assert "weights file is damaged" in why(ModelSource(str(folder)))


def test_a_folder_with_foreign_code_does_not_run_it(folder):
    (folder / "config.json").write_text('{"model_type": "mine", "auto_map": {"AutoConfig": "mine.Config"}}')
    (folder / "mine.py").write_text("raise SystemExit('the code ran')")
    assert "read it, then set trust_remote_code: true" in why(ModelSource(str(folder)))


def test_a_hub_id_without_a_network_is_answered_with_what_to_do():
    code = """
import kdqat.models
for load in ("load_model", "load_tokenizer"):
    try:
        getattr(kdqat.models.ModelSource("no-such-org/no-such-model"), load)()
    except ValueError as error:
        print(error)
"""
    env = {"HF_HUB_OFFLINE": "1", "PATH": "", "HOME": "/nonexistent", "OMP_NUM_THREADS": "1"}
    run = subprocess.run([sys.executable, "-c", code], env=env, cwd=ROOT, capture_output=True, text=True, check=True)
    lines = run.stdout.strip().splitlines()
    assert len(lines) == 2
    for line in lines:
        assert line.startswith("model no-such-org/no-such-model: ")
        assert "check the spelling and the network" in line and "hf download" in line


def write_gguf(model, path) -> None:
    """`model` as an F32 GGUF, the way llama.cpp's converter writes a Llama (q and k rows interleaved for RoPE)."""
    import gguf

    config, state = model.config, {key: value.numpy() for key, value in model.state_dict().items()}
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(config.vocab_size)
    vocab = [token for token, _ in sorted(toy_tokenizer().get_vocab().items(), key=lambda item: item[1])]
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list([*vocab, "ab"])
    writer.add_token_types([3, 3, 3, *[1] * 257])
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for key, value in state.items():
        heads = {"q_proj.weight": config.num_attention_heads, "k_proj.weight": config.num_key_value_heads}
        for suffix, num in heads.items():
            if key.endswith(suffix):
                rows = value.reshape(num, 2, -1, value.shape[1])
                value = rows.swapaxes(1, 2).reshape(value.shape)
        writer.add_tensor(names.get_name(key, (".weight",)), np.ascontiguousarray(value))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_a_gguf_loads_as_the_model_it_was_made_of_and_can_be_saved(tmp_path):
    original = toy_model("llama", tie=False).eval()
    write_gguf(original, tmp_path / "toy.gguf")
    source = ModelSource(str(tmp_path / "toy.gguf"))
    model = source.load_model()
    with torch.no_grad():
        torch.testing.assert_close(model(IDS).logits, original(IDS).logits, rtol=1e-4, atol=1e-5)
    assert {p.dtype for p in model.parameters()} == {torch.float32} and not model.training
    model.save_pretrained(tmp_path / "saved")  # transformers' own notes about GGUF would refuse this
    again = ModelSource(str(tmp_path / "saved")).load_model()
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), model.parameters(), strict=True))
    ids = source.load_tokenizer()("cabx", add_special_tokens=False).input_ids
    assert ids == [*toy_tokenizer()("c").input_ids, 259, *toy_tokenizer()("x").input_ids]
