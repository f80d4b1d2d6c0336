"""Codes of b bits in 32-bit words, without gaps: code i lies at bit i * b, the lowest bit first.

The rule of compressed-tensors' `pack-quantized` (along inputs) and of GPTQ (along inputs for weights, along outputs for
zero points). Where b does not divide 32, a code may lie in two words; GPTQ's 3-bit pattern 10-1-10-1-10 is this rule.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

_WORD = 32


def num_words(num_codes: int, bits: int) -> int:
    """Words that `num_codes` codes of `bits` bits take."""
    return -(-num_codes * bits // _WORD)


def pack_words(codes: Tensor, bits: int) -> Tensor:
    """Unsigned codes [.., n] -> int32 words [.., ceil(n * bits / 32)]; what is left of the last word is 0.

    Raises:
        ValueError: for a width outside 1 ... 8, or a code that does not fit: it would run over into its neighbour.
    """
    _check_bits(bits)
    if codes.numel() and (codes.min() < 0 or codes.max() >= 2**bits):
        raise ValueError(f"codes {int(codes.min())} ... {int(codes.max())} do not fit {bits} unsigned bits")
    n = codes.shape[-1]
    padded = F.pad(codes.long(), (0, -n % _WORD))
    rows = padded.reshape(-1, _WORD)  # 32 codes fill `bits` words
    word, offset = _places(bits, codes.device)
    words = rows.new_zeros(len(rows), bits + 1)  # one more, for what the last code never carries over
    words.index_add_(1, word, (rows << offset) & 0xFFFFFFFF)
    words.index_add_(1, word + 1, (rows << offset) >> _WORD)
    words = words[:, :bits].reshape(*padded.shape[:-1], -1)[..., : num_words(n, bits)]
    return torch.where(words >= 2**31, words - 2**32, words).to(torch.int32)


def unpack_words(words: Tensor, bits: int, num_codes: int) -> Tensor:
    """Inverse of `pack_words`: int32 words [.., w] -> unsigned codes [.., num_codes], int16.

    Raises:
        ValueError: for a width outside 1 ... 8, or another number of words than the codes take.
    """
    _check_bits(bits)
    if words.shape[-1] != num_words(num_codes, bits):
        raise ValueError(
            f"{num_codes} codes of {bits} bits take {num_words(num_codes, bits)} words, not {words.shape[-1]}"
        )
    unsigned = F.pad(words.long() & 0xFFFFFFFF, (0, -words.shape[-1] % bits))
    rows = F.pad(unsigned.reshape(-1, bits), (0, 1))
    word, offset = _places(bits, words.device)
    codes = ((rows[:, word] | (rows[:, word + 1] << _WORD)) >> offset) & (2**bits - 1)
    return codes.reshape(*words.shape[:-1], -1)[..., :num_codes].to(torch.int16)


def _places(bits: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """(word, bit within it) at which each of 32 codes begins."""
    first = torch.arange(_WORD, device=device) * bits
    return first // _WORD, first % _WORD


def _check_bits(bits: int) -> None:
    if not 1 <= bits <= 8:
        raise ValueError(f"words hold codes of 1 to 8 bits, not {bits}")
