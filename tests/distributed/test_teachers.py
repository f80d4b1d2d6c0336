"""Two processes read one cache, and two processes are their own teachers, whole or sharded: as one process does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.cli.fork_server import server
from tests.distributed.runs import DDP, SHARDED, SINGLE, Jobs, curve, curve_difference, fsdp2

pytestmark = pytest.mark.slow  # `pytest -m slow tests/distributed`

CACHED = {
    "class_path": "CachedTeacher",
    "init_args": {"kind": "hidden", "teacher": {"class_path": "FrozenTeacher", "init_args": {"dtype": "float32"}}},
}
MODELS: dict[str, dict[str, Any]] = {
    "cached": {"teacher": CACHED},
    "shared": {"teacher": {"class_path": "SharedTeacher"}, "trainable": "scales"},
}


def add(jobs: Jobs, name: str, kind: str, trainer: dict[str, Any], **recipe: Any) -> None:
    jobs.add(name, trainer, **recipe)
    path = jobs.folder / f"{name}.yaml"
    content = yaml.safe_load(path.read_text())
    content["model"].update(MODELS[kind])
    content["trainer"]["max_steps"] = 3
    path.write_text(yaml.safe_dump(content))


@pytest.fixture(scope="module")
def runs(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        cache = str(tmp_path_factory.mktemp("cache"))
        patch.setenv("KDQAT_CACHE", cache)
        one, two = Jobs(folder, "teachers-one"), Jobs(folder, "teachers-two")
        for kind in MODELS:
            add(one, f"{kind}-single", kind, SINGLE, accumulate=4)
            add(two, f"{kind}-ddp", kind, DDP)
            add(two, f"{kind}-fsdp2", kind, fsdp2(), parallel=SHARDED, evaluate=True)
        before = "tests.distributed.worker:find_disturb"
        filled = server().run(folder, "cache", "cached-single.yaml", before=before, KDQAT_CACHE=cache)
        assert filled.code == 0, filled.err
        one.run(1)
        two.run(2)
    for jobs in (one, two):
        assert all(set(jobs.codes(name)) == {0} for name in jobs.calls), "\n".join(jobs.logs)
    return folder


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_two_processes_learn_what_one_does(kind: str, strategy: str, runs: Path) -> None:
    assert len(set(curve(runs / f"{kind}-single", "train/kl").values())) == 3
    assert curve_difference(runs / f"{kind}-single", runs / f"{kind}-{strategy}") < 1e-5
    assert curve_difference(runs / f"{kind}-single", runs / f"{kind}-{strategy}", "val/kl") < 1e-5
