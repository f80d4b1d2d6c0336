"""A Hugging Face tokenizer as GGUF's keys. llama.cpp has its own code for splitting text, so a key names the rule.

Byte-level BPE is GGUF's "gpt2", with the regular expressions by name; SentencePiece BPE its "llama", which merges by
the score of the result, where Hugging Face keeps a list of merges. What llama.cpp would split otherwise is refused.
A student that came out of a GGUF file takes that file's keys along: transformers forgets some on reading it.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_REGEX_NAMES = {f"{_CONTRACTIONS}\\p{{N}}{{1,3}}{_REST}": "llama-bpe", f"{_CONTRACTIONS}\\p{{N}}{_REST}": "qwen2"}
_SPACE = "▁"


def refuses_tokenizer(tokenizer: Any) -> str | None:
    """Why llama.cpp would split text otherwise than this tokenizer, or None."""
    try:
        parts = _parts(tokenizer)
        if not _is_spm(parts):
            _pre_tokenizer_name(parts)
        else:
            _scores(parts)
    except ValueError as error:
        return f"tokenizer: {error}"
    return None


def copy_tokenizer(writer: Any, path: Path) -> None:
    """The tokenizer's keys of the GGUF file `path` into a `gguf.GGUFWriter`."""
    from gguf import GGUFReader, GGUFValueType

    for key, field in GGUFReader(path).fields.items():
        if key.startswith("tokenizer."):
            inner = field.types[-1] if field.types[0] is GGUFValueType.ARRAY else None
            writer.add_key_value(key, field.contents(), field.types[0], inner)


def add_tokenizer(writer: Any, tokenizer: Any, vocab_size: int) -> None:
    """`tokenizer` into a `gguf.GGUFWriter`, filled with unused tokens up to the rows of the embedding."""
    from gguf import TokenType

    parts = _parts(tokenizer)
    spm, vocab = _is_spm(parts), tokenizer.get_vocab()
    texts = {index: text for text, index in vocab.items()}
    tokens = [texts.get(i, f"[PAD{i}]") for i in range(vocab_size)]
    types = [TokenType.NORMAL if i in texts else TokenType.UNUSED for i in range(vocab_size)]
    for token in parts["added_tokens"]:
        types[token["id"]] = TokenType.CONTROL if token["special"] else TokenType.USER_DEFINED
    writer.add_tokenizer_model("llama" if spm else "gpt2")
    writer.add_tokenizer_pre("default" if spm else _pre_tokenizer_name(parts))
    if spm:
        for byte in range(256):
            if (index := vocab.get(f"<0x{byte:02X}>")) is not None:
                types[index] = TokenType.BYTE
        if tokenizer.unk_token_id is not None:
            types[tokenizer.unk_token_id] = TokenType.UNKNOWN
        scores = _scores(parts)
        writer.add_token_scores([scores.get(token, -float(len(scores))) for token in tokens])
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    if not spm:
        writer.add_token_merges([" ".join(pair) for pair in parts["model"]["merges"]])
    writer.add_add_space_prefix(spm and _adds_space(parts))
    _add_special_tokens(writer, tokenizer)


def _add_special_tokens(writer: Any, tokenizer: Any) -> None:
    ids = {kind: getattr(tokenizer, f"{kind}_token_id") for kind in ("bos", "eos", "unk", "pad")}
    for kind, index in ids.items():
        if index is not None:
            getattr(writer, f"add_{kind}_token_id")(index)
    around = tokenizer("a").input_ids
    writer.add_add_bos_token(ids["bos"] is not None and around[0] == ids["bos"])
    writer.add_add_eos_token(ids["eos"] is not None and around[-1] == ids["eos"])
    if tokenizer.chat_template:
        writer.add_chat_template(tokenizer.chat_template)


def _parts(tokenizer: Any) -> dict[str, Any]:
    """tokenizer.json as plain data."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise ValueError(f"{type(tokenizer).__name__} has no tokenizer.json, which says how text is split")
    parts: dict[str, Any] = json.loads(backend.to_str())
    if parts["model"]["type"] != "BPE":
        raise ValueError(f"its model is {parts['model']['type']}, and only BPE is written as GGUF here")
    return parts


def _is_spm(parts: dict[str, Any]) -> bool:
    return bool(parts["model"].get("byte_fallback"))


def _steps(part: dict[str, Any] | None, inner: str) -> list[dict[str, Any]]:
    """A pre-tokenizer or normalizer as a list, whether or not it is a sequence."""
    if part is None:
        return []
    return list(part[inner]) if part["type"] == "Sequence" else [part]


def _pre_tokenizer_name(parts: dict[str, Any]) -> str:
    """What llama.cpp calls the way of splitting text before merges."""
    steps = _steps(parts["pre_tokenizer"], "pretokenizers")
    kinds = [step["type"] for step in steps]
    byte_level = steps[-1] if steps and kinds[-1] == "ByteLevel" else {}
    foreign = [step["type"] for step in _steps(parts["normalizer"], "normalizers") if step["type"] != "NFC"]
    if byte_level and not byte_level["add_prefix_space"] and not foreign:
        if kinds == ["ByteLevel"] and byte_level["use_regex"]:
            return "gpt-2"
        if kinds == ["Digits", "ByteLevel"] and byte_level["use_regex"] and steps[0]["individual_digits"]:
            return "smollm"
        regex = steps[0]["pattern"].get("Regex") if kinds == ["Split", "ByteLevel"] else None
        if regex in _REGEX_NAMES and not byte_level["use_regex"]:
            return _REGEX_NAMES[regex]
    raise ValueError(
        f"the way it splits text ({', '.join(foreign + kinds) or 'not at all'}) is none that is known by name in GGUF "
        "here (gpt-2, smollm, llama-bpe, qwen2)"
    )


def _adds_space(parts: dict[str, Any]) -> bool:
    """Whether a text gets a blank in front."""
    steps = _steps(parts["pre_tokenizer"], "pretokenizers")
    if any(step["type"] == "Metaspace" and step.get("prepend_scheme", "always") != "never" for step in steps):
        return True
    return any(
        step["type"] == "Prepend" and step["prepend"] == _SPACE for step in _steps(parts["normalizer"], "normalizers")
    )


def _scores(parts: dict[str, Any]) -> dict[str, float]:
    """Token -> score, so that the best score is merged first; tokens that no merge makes have none."""
    scores: dict[str, float] = {}
    last = None
    for rank, pair in enumerate(parts["model"]["merges"]):
        token = "".join(pair)
        if token in scores and token != last:
            raise ValueError(f"its merges into {token!r} have different ranks, which scores of tokens cannot say")
        scores.setdefault(token, -float(rank))
        last = token
    return scores
