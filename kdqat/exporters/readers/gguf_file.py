"""Reads a GGUF file with the `gguf` package and transformers; knows nothing of kdqat.

    python -I gguf_file.py FOLDER REQUEST.safetensors ANSWER.safetensors

Codes and scales are taken off the bytes here, dequantized weights come from `gguf.quants`, logits from transformers,
which dequantizes into float32. Names are Hugging Face's, and so is the order of rows. What `quant_plan.json` leaves
alone is answered with weights: an embedding in 8 bits has codes that nobody trained. Sizes, rope, eps and ids of tokens
in the metadata must be those of the folder's config.json and tokenizer.
"""

import json
import sys
from pathlib import Path

import numpy as np
import torch
from gguf import GGUFReader
from gguf.quants import dequantize
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

Decoded = tuple[np.ndarray, np.ndarray, np.ndarray | None]  # codes, scales, minima

NAMES = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
}


def half(stored: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(stored).view(np.float16)[..., 0].astype(np.float32)


def nibbles(stored: np.ndarray) -> np.ndarray:
    return np.concatenate([stored & 15, stored >> 4], axis=-1).astype(np.int16)


def q4_0(blocks: np.ndarray) -> Decoded:
    return nibbles(blocks[..., 2:]) - 8, half(blocks[..., :2]), None


def q4_1(blocks: np.ndarray) -> Decoded:
    return nibbles(blocks[..., 4:]), half(blocks[..., :2]), half(blocks[..., 2:4])


def q8_0(blocks: np.ndarray) -> Decoded:
    return np.ascontiguousarray(blocks[..., 2:]).view(np.int8).astype(np.int16), half(blocks[..., :2]), None


def mxfp4(blocks: np.ndarray) -> Decoded:
    return nibbles(blocks[..., 1:]), np.exp2(blocks[..., 0].astype(np.float32) - 127), None


def q4_k(blocks: np.ndarray) -> Decoded:
    codes = nibbles(blocks[..., 16:].reshape(*blocks.shape[:2], 4, 32)).reshape(*blocks.shape[:2], 256)
    packed = blocks[..., 4:16].astype(np.int32)
    scale, minimum = np.zeros((2, *blocks.shape[:2], 8), np.float32)
    for i in range(4):
        scale[..., i], minimum[..., i] = packed[..., i] & 63, packed[..., i + 4] & 63
        scale[..., i + 4] = (packed[..., i + 8] & 15) | (packed[..., i] >> 6 << 4)
        minimum[..., i + 4] = (packed[..., i + 8] >> 4) | (packed[..., i + 4] >> 6 << 4)
    d, dmin = half(blocks[..., :2])[..., None], half(blocks[..., 2:4])[..., None]
    rows = blocks.shape[0]
    return codes, (d * scale).reshape(rows, -1), -(dmin * minimum).reshape(rows, -1)


DECODERS = {"Q4_0": (18, q4_0), "Q4_1": (20, q4_1), "Q8_0": (34, q8_0), "MXFP4": (17, mxfp4), "Q4_K": (144, q4_k)}


def hf_names(name: str, tied: bool) -> list[str]:
    """Names of the modules that a tensor is the weight of."""
    stem = name.removesuffix(".weight")
    if stem == "token_embd":
        return ["model.embed_tokens", "lm_head"] if tied else ["model.embed_tokens"]
    if stem in ("output", "output_norm"):
        return ["lm_head" if stem == "output" else "model.norm"]
    _, block, part, *bias = stem.split(".")
    return [".".join(["model.layers", block, NAMES[part], *bias])]


def in_halves(rows: np.ndarray, heads: int) -> np.ndarray:
    """llama.cpp's rows of q and k, whose rotary pairs are neighbours, in the order of transformers."""
    return rows.reshape(heads, rows.shape[0] // heads // 2, 2, -1).swapaxes(1, 2).reshape(rows.shape)


def check_metadata(folder: str, reader: GGUFReader, arch: str) -> None:
    """Raise naming the first key that says otherwise than config.json, or the tokenizer beside it."""
    config, tokenizer = AutoConfig.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    expected = {
        "block_count": config.num_hidden_layers,
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.key_length": head_dim,
        "attention.value_length": head_dim,
        "rope.dimension_count": head_dim,
        "rope.freq_base": np.float32(config.rope_parameters["rope_theta"]),
        "attention.layer_norm_rms_epsilon": np.float32(config.rms_norm_eps),
        "vocab_size": config.vocab_size,
    }
    for key, value in expected.items():
        field = reader.fields.get(f"{arch}.{key}")
        found = None if field is None else field.contents()
        assert found is not None and type(value)(found) == value, f"{arch}.{key} is {found}, config.json says {value}"
    for kind in ("bos", "eos"):
        field, value = reader.fields.get(f"tokenizer.ggml.{kind}_token_id"), getattr(tokenizer, f"{kind}_token_id")
        found = None if field is None else field.contents()
        assert found is None or value is None or found == value, (
            f"{kind}_token_id is {found}, the tokenizer has {value}"
        )
    tokens = len(reader.fields["tokenizer.ggml.tokens"].data)
    assert tokens == config.vocab_size, f"tokenizer.ggml.tokens has {tokens}, config.json says {config.vocab_size}"


def main(folder: str, request: str, answer: str) -> None:
    (path,) = Path(folder).glob("*.gguf")
    reader = GGUFReader(path)
    arch = reader.fields["general.architecture"].contents()
    check_metadata(folder, reader, arch)
    heads = {
        ".attn_q.": reader.fields[f"{arch}.attention.head_count"].contents(),
        ".attn_k.": reader.fields[f"{arch}.attention.head_count_kv"].contents(),
    }
    tied = not any(tensor.name == "output.weight" for tensor in reader.tensors)
    planned = json.loads((Path(folder) / "quant_plan.json").read_text())["layers"]
    tensors = {}
    for tensor in reader.tensors:
        if tensor.name == "rope_freqs.weight":
            continue
        stored = np.asarray(tensor.data)
        found = {"weights": dequantize(stored, tensor.tensor_type)}
        if tensor.tensor_type.name in DECODERS:
            num_bytes, decode = DECODERS[tensor.tensor_type.name]
            codes, scales, minimum = decode(stored.reshape(stored.shape[0], -1, num_bytes))
            found |= {"codes": codes.reshape(stored.shape[0], -1), "scales": scales}
            if minimum is not None:
                found["zero_points"] = minimum  # value = scale * code + minimum
        for kind, numbers in found.items():
            for part, count in heads.items() if arch == "llama" else ():
                if part in tensor.name:
                    numbers = in_halves(numbers, count)
            for name in (name for name in hf_names(tensor.name, tied) if name in planned or kind == "weights"):
                tensors[f"{kind}/{name}"] = torch.from_numpy(np.ascontiguousarray(numbers)).clone()
    inputs = load_file(request)
    config = AutoConfig.from_pretrained(folder, gguf_file=path.name)
    config.head_dim = reader.fields[f"{arch}.attention.key_length"].contents()  # of Qwen3 transformers passes it over
    model = AutoModelForCausalLM.from_pretrained(folder, config=config, gguf_file=path.name, dtype=torch.float32)
    model.eval()
    for tensor in reader.tensors:
        if tensor.name == "rope_freqs.weight":  # llama.cpp divides by it, transformers passes it over
            for buffer in (buffer for key, buffer in model.named_buffers() if key.endswith("inv_freq")):
                buffer /= torch.from_numpy(np.array(tensor.data))
    with torch.no_grad():
        tensors["logits"] = model(**inputs).logits.float().contiguous()
    save_file(tensors, answer)


if __name__ == "__main__":
    main(*sys.argv[1:])
