"""torch.compile, with a C++ compiler and without one."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch._dynamo.testing import CompileCounter

from steepest import data
from steepest.train.learner import Learner

from .conftest import MakeConfig

SCRIPT = """
import json, sys
from pathlib import Path
from steepest.train import RunConfig, Runtime, run
result = run(RunConfig.from_toml(Path(sys.argv[1])), Path(sys.argv[2]), runtime=Runtime(threads=1))
print(json.dumps(result))
"""


def train(
    config_file: Path, runs: Path, environment: dict[str, str]
) -> tuple[dict[str, object], str]:
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(config_file), str(runs)],
        env=environment, text=True, capture_output=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    result: dict[str, object] = json.loads(done.stdout.splitlines()[-1])
    return result, done.stderr


@pytest.mark.parametrize("packing", ["contiguous", "documents"])
def test_what_was_compiled_beforehand_is_what_steps_run(
    packing: str, make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make_config(
        name="sophia_g", compile=True, packing=packing, gradient_accumulation=2, clip_norm=0.0
    )
    counter, whole = CompileCounter(), torch.compile
    monkeypatch.setattr(torch, "compile", lambda *a, **k: whole(*a, **k, backend=counter))
    torch._dynamo.reset()
    learner = Learner(config, torch.device("cpu"))
    assert (counter.frame_count, learner.warnings) == (1, [])
    tokens = data.prepare(config.data.corpus, config.data.vocab_size)
    loader = data.Loader(
        tokens.train, batch_size=4, sequence_length=16, seed=0, packing=config.data.as_packing()
    )
    for step in range(2):
        learner.gradient(loader.rows(step))
    assert counter.frame_count == 1


@pytest.mark.slow
def test_without_a_compiler_the_run_is_eager_and_says_so(
    make_config: MakeConfig, tmp_path: Path, child_environment: dict[str, str]
) -> None:
    file = tmp_path / "run.toml"
    (tmp_path / "empty").mkdir()
    bare = {
        **child_environment,
        "PATH": str(tmp_path / "empty"),
        "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "inductor"),
    }
    bare.pop("CXX", None)
    file.write_text(make_config(compile=True).to_toml())
    fallen_back, errors = train(file, tmp_path / "bare", bare)
    warning = "torch.compile failed, so this run is not compiled"
    assert [warning in sentence for sentence in fallen_back["warnings"]] == [True]  # type: ignore[attr-defined]
    assert errors.count(warning) == 1

    file.write_text(make_config(compile=False).to_toml())
    eager, _ = train(file, tmp_path / "eager", bare)
    assert fallen_back["val_loss"] == eager["val_loss"]


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
def test_compiled_is_eager_up_to_rounding(
    make_config: MakeConfig, tmp_path: Path, child_environment: dict[str, str]
) -> None:
    results = []
    for compiled in (True, False):
        file = tmp_path / "run.toml"
        file.write_text(make_config(compile=compiled).to_toml())
        result, _ = train(file, tmp_path / "runs", child_environment)
        assert result["warnings"] == []
        results.append(result)
    assert results[0]["hash"] != results[1]["hash"]
    assert results[0]["val_loss"] == pytest.approx(results[1]["val_loss"], abs=1e-3)
