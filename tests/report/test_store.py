from __future__ import annotations

import json

import fake_race
import pytest

from steepest.errors import UserError
from steepest.study.store import load_race

ONE = fake_race.RACERS[:1]


@pytest.fixture
def folder(tmp_path):
    return fake_race.build(tmp_path, ONE, seeds=(7, 8))


def run_folder(folder, stage="final", index=0):
    manifest = json.loads((folder / "race.json").read_text())
    return folder / "runs" / manifest[stage]["adamw"][index]


def test_a_race_is_read_as_it_was_written(folder):
    race = load_race(folder)
    assert (race.baseline, race.optimizers, race.seconds) == ("adamw", ("adamw",), 731.4)
    assert race.protocol == fake_race.PROTOCOL
    assert [run.seed for run in race.final_runs] == [7, 8]
    assert [run.lr for run in race.tuning_runs] == [1e-3, 3e-3, 1e-2, 3e-2]
    assert [run.status for run in race.tuning_runs] == ["finished"] * 3 + ["diverged"]
    assert race.tuning_runs[3].reason == "The training loss was nan at step 150."
    assert race.unfinished == ()
    assert race.environments[race.final_runs[0].hash]["cpu"] == "Imaginary CPU @ 3 GHz"


def test_a_run_has_its_result_and_its_curves(folder):
    path = run_folder(folder)
    result = json.loads((path / "result.json").read_text())
    run = load_race(folder).final_runs[0]
    for name in ("hash", "optimizer", "lr", "seed", "steps", "val_loss", "state_bytes", "step_ms"):
        assert getattr(run, name) == result[name]
    assert run.bits_per_byte == result["val_bits_per_byte"]
    assert [e.step for e in run.evaluations] == list(range(0, 601, 60))
    assert run.evaluations[-1].val_loss == run.val_loss
    assert [step for step, _ in run.train_curve] == list(range(10, 601, 10))


def test_a_torn_last_line_is_left_out(folder):
    metrics = run_folder(folder) / "metrics.jsonl"
    before = load_race(folder).final_runs[0]
    metrics.write_text(metrics.read_text() + '{"kind":"eval","step":66')
    assert load_race(folder).final_runs[0] == before


def test_losses_that_are_not_finite_are_left_out(folder):
    metrics = run_folder(folder) / "metrics.jsonl"
    before = load_race(folder).final_runs[0]
    lost = '{"kind":"eval","step":660,"tokens":1,"val_loss":NaN,"seconds":1}\n'
    metrics.write_text(metrics.read_text() + lost)
    assert load_race(folder).final_runs[0] == before


def test_runs_without_a_result_are_unfinished(folder):
    started, unstarted = run_folder(folder), run_folder(folder, index=1)
    (started / "result.json").unlink()
    for path in sorted(unstarted.rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()
    unstarted.rmdir()
    race = load_race(folder)
    assert race.final_runs == []
    first, second = race.unfinished
    assert (first.hash, first.stage, first.lr, first.seed) == (started.name, "final", 3e-3, 7)
    assert first.tokens == 600 * 2048
    assert (second.hash, second.lr, second.seed, second.tokens) == (unstarted.name, None, None, 0)


def test_the_name_in_the_race_is_the_runs_name(folder):
    manifest = json.loads((folder / "race.json").read_text())
    for stage in ("tuning", "final"):
        manifest[stage]["adamw, clipped"] = manifest[stage].pop("adamw")
    (folder / "race.json").write_text(json.dumps(manifest))
    assert {run.optimizer for run in load_race(folder).final_runs} == {"adamw, clipped"}


def rewrite(path, **changes):
    content = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({k: v for k, v in content.items() if v != "removed"}))


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        (lambda f: (f / "race.json").unlink(), "it has no race.json"),
        (lambda f: (f / "race.json").write_text("{"), r"race\.json is damaged"),
        (lambda f: (f / "race.json").write_text("[]"), "should hold a JSON object"),
        (lambda f: rewrite(f / "race.json", schema=9), "has schema 9"),
        (lambda f: rewrite(f / "race.json", final="removed"), "'final' is missing"),
        (lambda f: rewrite(f / "race.json", final=["x"]), r"race\.json is damaged"),
        (lambda f: rewrite(run_folder(f) / "result.json", lr="removed"), "'lr' is missing"),
        (lambda f: rewrite(run_folder(f) / "result.json", schema=2), "has schema 2"),
        (lambda f: rewrite(run_folder(f) / "result.json", hash="beef"), "result of run beef"),
        (lambda f: (run_folder(f) / "result.json").write_text("{"), r"result\.json is damaged"),
        (lambda f: (run_folder(f) / "metrics.jsonl").write_text("?\n{}\n"), "Line 1 of .* damaged"),
        (lambda f: (run_folder(f) / "metrics.jsonl").write_text("{}\n"), r"metrics\.jsonl is dam"),
        (lambda f: (run_folder(f) / "environment.json").write_text("{"), "environment.json is dam"),
    ],
)
def test_missing_and_damaged_files_are_told_in_a_sentence(folder, damage, sentence):
    damage(folder)
    with pytest.raises(UserError, match=sentence):
        load_race(folder)


def test_a_run_under_two_names_is_refused(folder):
    manifest = json.loads((folder / "race.json").read_text())
    rewrite(folder / "race.json", final={**manifest["final"], "twin": manifest["final"]["adamw"]})
    with pytest.raises(UserError, match="under 'adamw' and 'twin'"):
        load_race(folder)
