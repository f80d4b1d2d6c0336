"""Tokenizers as GGUF's keys: by what rule text is split, in which order tokens merge, which ids are special."""

from __future__ import annotations

from typing import Any

import pytest
from gguf import TokenType
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from kdqat.exporters.gguf_tokenizer import add_tokenizer, refuses_tokenizer
from kdqat.models.toy import toy_tokenizer
from tests.models.stories import stories260k

LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|"
    r"\s+(?!\S)|\s+"
)


class Writer:
    """Notes what a `gguf.GGUFWriter` would write: method without add_ -> argument."""

    def __init__(self) -> None:
        self.written: dict[str, Any] = {}

    def __getattr__(self, method: str):
        return lambda value: self.written.__setitem__(method.removeprefix("add_"), value)


def written(tokenizer, vocab_size: int) -> dict[str, Any]:
    writer = Writer()
    add_tokenizer(writer, tokenizer, vocab_size)
    return writer.written


def byte_level(*steps, use_regex: bool = True) -> PreTrainedTokenizerFast:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: i for i, token in enumerate(["<s>", "</s>", *alphabet, "ab", "abc"])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[("a", "b"), ("ab", "c")]))
    last = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=use_regex)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*steps, last]) if steps else last
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")


@pytest.mark.parametrize(
    ("steps", "use_regex", "name"),
    [
        ([], True, "gpt-2"),
        ([pre_tokenizers.Digits(individual_digits=True)], True, "smollm"),
        ([pre_tokenizers.Split(Regex(LLAMA3), "isolated")], False, "llama-bpe"),
        ([pre_tokenizers.Split(Regex(LLAMA3.replace("{1,3}", "")), "isolated")], False, "qwen2"),
    ],
)
def test_the_way_of_splitting_text_is_known_by_its_rule(steps, use_regex, name):
    keys = written(byte_level(*steps, use_regex=use_regex), 262)
    assert keys["tokenizer_model"] == "gpt2" and keys["tokenizer_pre"] == name
    assert keys["token_merges"] == ["a b", "ab c"] and keys["add_space_prefix"] is False
    assert keys["token_list"][:2] == ["<s>", "</s>"] and keys["token_list"][-2:] == ["[PAD260]", "[PAD261]"]
    assert keys["token_types"][0] is TokenType.CONTROL and keys["token_types"][-1] is TokenType.UNUSED
    assert (keys["bos_token_id"], keys["eos_token_id"], keys["add_bos_token"]) == (0, 1, False)


@pytest.mark.parametrize("step", [pre_tokenizers.Digits(individual_digits=False), pre_tokenizers.Punctuation()])
def test_a_way_of_splitting_without_a_name_is_refused(step):
    reason = refuses_tokenizer(byte_level(step))
    assert "none that is known by name" in reason and "ByteLevel" in reason
    assert refuses_tokenizer(toy_tokenizer()) is None


def test_sentencepiece_tokens_have_scores_that_fall_with_the_rank_of_their_merge():
    tokenizer = AutoTokenizer.from_pretrained(stories260k())
    keys = written(tokenizer, 512)
    scores = dict(zip(keys["token_list"], keys["token_scores"], strict=True))
    assert scores["▁t"] == 0 > scores["he"] > scores["▁a"] > scores["a"]
    assert keys["tokenizer_model"] == "llama" and keys["add_space_prefix"] and keys["add_bos_token"]
    types = keys["token_types"]
    assert types[0] is TokenType.UNKNOWN and types[1] is types[2] is TokenType.CONTROL
    assert {types[i] for i in range(3, 259)} == {TokenType.BYTE} and types[300] is TokenType.NORMAL


def test_merges_that_no_score_of_a_token_can_order_are_refused():
    vocab = {token: i for i, token in enumerate(["a", "b", "c", "ab", "bc", "abc"])}
    merges = [("a", "b"), ("ab", "c"), ("b", "c"), ("a", "bc")]
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE(vocab, merges, byte_fallback=True)))
    assert "merges into 'abc' have different ranks" in refuses_tokenizer(tokenizer)


def test_a_chat_template_goes_along_and_other_models_than_bpe_are_refused():
    tokenizer = byte_level()
    tokenizer.chat_template = "{{ messages }}"
    assert written(tokenizer, 260)["chat_template"] == "{{ messages }}"
    words = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a": 0}, unk_token="a")))
    assert "its model is WordLevel" in refuses_tokenizer(words)
