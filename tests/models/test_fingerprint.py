"""Other weights have another fingerprint, wherever in the files they differ; the same ones have the same."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from kdqat.models import ModelSource
from kdqat.models.fingerprint import files_fingerprint


def test_toys_are_told_by_their_weights() -> None:
    assert ModelSource("toy:llama").fingerprint() == ModelSource("toy:llama", "bfloat16").fingerprint()
    assert ModelSource("toy:llama").fingerprint() != ModelSource("toy:qwen2").fingerprint()


def test_a_folder_is_its_config_and_weights_wherever_it_lies(tmp_path: Path) -> None:
    model = ModelSource("toy:llama").load_model()
    prints = []
    for name in ("a", "b", "c", "d"):
        if name == "c":
            with torch.no_grad():
                model.model.norm.weight[5] += 0.5
        model.save_pretrained(tmp_path / name)
    config = json.loads((tmp_path / "d" / "config.json").read_text())
    (tmp_path / "d" / "config.json").write_text(json.dumps({**config, "rope_theta": 5.0}))
    (tmp_path / "b" / "README.md").write_text("what the weights do not know")
    prints = [ModelSource(str(tmp_path / name)).fingerprint() for name in ("a", "b", "c", "d")]
    assert prints[0] == prints[1] and len(set(prints)) == 3


@pytest.mark.parametrize("suffix", ["safetensors", "gguf"])
def test_of_large_files_head_size_and_every_sixty_fourth_count(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"large.{suffix}"
    save_file({"a": torch.zeros(6 << 20)}, path)  # 24 MiB
    size, before = path.stat().st_size, files_fingerprint([path])
    assert files_fingerprint([path]) == before
    for place in (20, size // 2, size - 1):
        data = bytearray(path.read_bytes())
        for at in range(place, min(place + size // 63, size)):
            data[at] ^= 1
        other = tmp_path / f"other.{suffix}"
        other.write_bytes(data)
        assert files_fingerprint([other]) != before, place
    path.write_bytes(path.read_bytes() + b"\0")
    assert files_fingerprint([path]) != before


def test_a_model_of_the_hub_is_its_commit(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked = []

    def cached_file(path: str, name: str, revision: str | None = None) -> str:
        asked.append((path, name, revision))
        return str(tmp_path / "snapshots" / f"commit-of-{revision}" / name)

    monkeypatch.setattr("transformers.utils.cached_file", cached_file)
    one, same, other = (ModelSource("org/model", revision=r).fingerprint() for r in ("v1", "v1", "v2"))
    assert one == same != other and asked[0] == ("org/model", "config.json", "v1")


def test_a_model_that_is_not_there_is_said(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no such folder"):
        ModelSource(str(tmp_path / "nowhere")).fingerprint()
