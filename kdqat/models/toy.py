"""Tiny random models with a byte tokenizer, for tests, dry runs and the five lines of Python in the README.

`toy:llama` has 2 blocks of width 64. Weights come from a fixed seed: the same model on every machine.
"""

from __future__ import annotations

from typing import Any

import torch

_SIZES = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
_MOE = {"num_key_value_heads": 2, "num_experts_per_tok": 2}
_EXTRA: dict[str, dict[str, Any]] = {
    "llama": {"num_key_value_heads": 2},
    "mistral": {"num_key_value_heads": 2, "sliding_window": None},
    "qwen2": {"num_key_value_heads": 2},
    "qwen3": {"num_key_value_heads": 2, "head_dim": 16},
    "gemma": {"num_key_value_heads": 2, "head_dim": 16},
    "gemma2": {"num_key_value_heads": 2, "head_dim": 16, "sliding_window": 16, "query_pre_attn_scalar": 16},
    "gemma3_text": {"num_key_value_heads": 2, "head_dim": 16, "sliding_window": 16, "query_pre_attn_scalar": 16},
    "cohere": {"num_key_value_heads": 2, "logit_scale": 0.25},
    "granite": {"num_key_value_heads": 2, "logits_scaling": 8.0},
    "phi": {},
    "phi3": {"num_key_value_heads": 2},
    "opt": {"ffn_dim": 128, "word_embed_proj_dim": 64},
    "gpt2": {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_inner": 128, "n_positions": 512},
    "bert": {},
    "bert_encoder": {},  # BertModel, without a head
    "mixtral": {**_MOE, "num_local_experts": 4},
    "qwen2_moe": {**_MOE, "num_experts": 4, "moe_intermediate_size": 64, "shared_expert_intermediate_size": 128},
    "qwen3_moe": {**_MOE, "num_experts": 4, "moe_intermediate_size": 64, "head_dim": 16},
}
TOYS = tuple(_EXTRA)
NUM_POSITIONS = 512
_SPECIALS = ("<pad>", "<bos>", "<eos>")


def toy_model(kind: str, *, tie: bool = True, vocab_size: int = 260) -> Any:
    """A random fp32 model of `kind` (one of TOYS) with `vocab_size` tokens and 512 positions."""
    from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForMaskedLM

    sizes = {} if kind == "gpt2" else {**_SIZES, "max_position_embeddings": NUM_POSITIONS}
    ids = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    arguments = {**sizes, **_EXTRA[kind], **ids, "vocab_size": vocab_size, "tie_word_embeddings": tie}
    config = AutoConfig.for_model(kind.removesuffix("_encoder"), **arguments)
    auto: Any = {"bert": AutoModelForMaskedLM, "bert_encoder": AutoModel}.get(kind, AutoModelForCausalLM)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return auto.from_config(config, dtype=torch.float32)


def toy_tokenizer() -> Any:
    """A byte-level tokenizer of 259 tokens: <pad>, <bos>, <eos> and the 256 bytes."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: i for i, token in enumerate((*_SPECIALS, *alphabet))}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    pad, bos, eos = _SPECIALS
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=pad, bos_token=bos, eos_token=eos, model_max_length=NUM_POSITIONS
    )
