from __future__ import annotations

import json
from dataclasses import replace

import fake_race
import pytest

from steepest.report import answer, limits
from steepest.report.findings import Findings
from steepest.study.store import load_race

ADAMW, LION, MUON, SOAP, SCHEDULEFREE, SGD, MINE = fake_race.RACERS


@pytest.fixture
def findings(tmp_path):
    """Findings of a race between the given optimizers."""

    def make(*racers, seeds=(101, 102, 103), baseline="adamw"):
        return Findings(load_race(fake_race.build(tmp_path, racers, seeds, baseline)))

    return make


def test_one_winner(findings):
    found = findings(ADAMW, MUON)
    difference = found.rows[0].difference
    assert difference.mean + difference.half_width < 0
    text = f"{-difference.mean:.3f} ± {difference.half_width:.3f}"
    assert answer.headline(found) == f"muon is first, {text} nats below adamw."


def test_tied_winners(findings):
    text = answer.headline(findings(ADAMW, MUON, SOAP))
    assert text.startswith("soap and muon are tied for first, 0.0")
    assert text.endswith(" nats below adamw.")


def test_the_baseline_wins(findings):
    text = answer.headline(findings(ADAMW, LION, SGD))
    assert text.startswith("adamw, the baseline, is first, 0.0")
    assert text.endswith("nats below the next, lion.")


def test_a_tie_with_the_baseline_is_no_win(findings):
    assert answer.headline(findings(ADAMW, SCHEDULEFREE)) == (
        "No optimizer is shown to beat adamw: adamw and schedulefree are tied for first."
    )


def test_one_seed_is_no_proof(findings):
    found = findings(ADAMW, MUON, seeds=(5,))
    assert answer.headline(found).startswith("muon has the lowest loss, 0.0")
    assert answer.headline(found).endswith("but one seed cannot tell a difference from noise.")
    assert any("one seed" in warning for warning in limits.warnings(found))


def test_no_result_yet(findings):
    found = findings(ADAMW, seeds=())
    assert answer.headline(found) == "No final run has finished yet, so there is no ranking."
    assert limits.limits(found) == []


def test_no_baseline(findings):
    text = answer.headline(findings(MUON, LION))
    assert text == "muon is first, with no run of adamw to compare with."
    assert answer.headline(findings(MUON)).startswith("Only muon has a final loss")


def test_each_fault_of_the_race_is_a_warning(race):
    text = "\n".join(limits.warnings(Findings(race)))
    assert "highest learning rate tried" in text
    assert "lion (0.001)" in text
    assert "mine.py:<Mine> (1 of 3)" in text
    assert "muon" not in text


def test_a_race_without_faults_has_no_warnings(findings):
    assert limits.warnings(findings(ADAMW, MUON)) == []


def test_reused_seeds_other_hardware_and_noted_warnings(findings, tmp_path):
    run = findings(ADAMW, MUON, seeds=(0, 1)).race.final_runs[0]
    folder = tmp_path / "runs" / run.hash
    other = {**fake_race.ENVIRONMENT, "cpu": "another"}
    (folder / "environment.json").write_text(json.dumps(other))
    result = json.loads((folder / "result.json").read_text())
    (folder / "result.json").write_text(json.dumps({**result, "warnings": ["Resumed."]}))
    text = "\n".join(limits.warnings(Findings(load_race(tmp_path))))
    assert "Seed 0 chose the learning rates too" in text
    assert "2 kinds of hardware" in text
    assert f"1 run ({run.hash}) noted warnings" in text


def test_unequal_runs_do_not_compare(race):
    run = race.final_runs[0]
    runs = {**race.runs, run.hash: replace(run, tokens=run.tokens // 2)}
    text = "\n".join(limits.warnings(Findings(replace(race, runs=runs))))
    assert "differ in tokens or parameters" in text


def test_limits_state_the_facts_of_the_race(race):
    text = dict(limits.limits(Findings(race)))
    assert "means over 3 seeds" in text["Seeds"]
    assert "413 k parameters, 600 steps of 2.05 k tokens" in text["Scale"]
    assert "3.0 tokens per parameter" in text["Scale"]
    assert "3 to 4 values per optimizer" in text["Tuning"]
    assert "at the edge" in text["Tuning"]
    assert "Imaginary CPU" in text["Time and memory"]
