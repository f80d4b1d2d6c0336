"""The serving engine itself, beside the reader of its files: what llama.cpp computes of an export, if it is there.

An engine rounds where no file can forbid it (llama.cpp: inputs of matmuls, to 8 bits), so it proves less than a reader
and is judged by a wide limit: it loads the file and predicts the text as the student does. Rows in a wrong order or a
forgotten tensor move tokens by nats.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

from kdqat.exporters.base import Exporter
from kdqat.exporters.parity_reader import CannotRead, ReaderFailed, ask_reader

NUM_TOKENS = 48  # of the first window: an engine is asked for one token at a time
LIMIT = 0.5  # nats by which tokens may differ on average; SmolLM2 in Q4_0: 0.05


def ask_engine(
    exporter: Exporter, folder: Path, ids: Tensor, logits: Tensor, scratch: Path
) -> tuple[dict[str, Any] | str, str | None]:
    """Run the exporter's engine on the first tokens of `ids` [B, T].

    Args:
        logits: the student's answer to `ids`, [B, T, V].

    Returns:
        Numbers for parity.json, or why there are none; and a fault, if it is one.
    """
    assert exporter.engine is not None
    if missing := exporter.engine_missing():
        return f"not run: {missing}", None
    row = ids[:1, :NUM_TOKENS]
    scratch.mkdir()
    try:
        answer = ask_reader(exporter.engine, folder, row, scratch)
    except CannotRead as error:
        return f"cannot run this model: {error}", None
    except ReaderFailed as error:
        return f"failed: {error}", str(error)
    theirs = load_file(answer.path)["nll"][0]
    ours = F.cross_entropy(logits[0, : row.shape[1] - 1], row[0, 1:], reduction="none")
    apart = float((theirs - ours).abs().mean())
    numbers = {
        "engine": exporter.engine,
        "versions": answer.versions,
        "tokens": len(theirs),
        "perplexity": float(theirs.mean().exp()),
        "student_perplexity": float(ours.mean().exp()),
        "nll_difference": apart,
        "limit": LIMIT,
    }
    fault = f"{exporter.engine}: tokens differ by {apart:.3g} nats on average, above {LIMIT}"
    return numbers, None if apart <= LIMIT else fault  # NaN is a fault
