"""The rerun ledger and the spot check: outcomes by hand, coverage by simulation, one real cell on the smoke profile."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from scipy import stats as scipy_stats

from persona_coupling import claims, notebooks
from persona_coupling.errors import UserError
from persona_coupling.study import Design
from persona_coupling.verification import ledger, prediction, spotcheck

REPOSITORY = Path(__file__).resolve().parents[1]
MADE = {
    "made": "then",
    "commit": "aaa",
    "device": "a card",
    "system": "Linux",
    "versions": {"torch": "1", "python": "3"},
}


def row(value, low=None, high=None, verdict="supported"):
    return {"value": value, "low": low, "high": high, "verdict": verdict, "why": "", "provenance": MADE}


@pytest.mark.parametrize(
    ("old", "new", "outcome"),
    [
        (row(0.5, 0.4, 0.6), row(0.5, 0.4, 0.6), "within"),
        (row(0.5, 0.4, 0.6), row(0.64, 0.54, 0.7), "within"),  # arms .1 and .1: .1414
        (row(0.5, 0.4, 0.6), row(0.65, 0.55, 0.7), "drifted"),
        (row(0.5, 0.1, 0.6), row(0.65, 0.64, 0.9), "drifted"),  # the arms that point at each other, .1 and .01
        (row(0.5, 0.2, 0.6), row(0.3, 0.2, 0.31), "within"),  # downwards: .3 and .01
        (row(0.5, 0.4, 0.6), row(0.5, 0.4, 0.6, "refuted"), "flipped"),
        (row(None), row(None), "within"),
        (row(None), row(0.1, 0.0, 0.2), "drifted"),
        (row(0.5), row(0.5), "within"),
        (row(0.5), row(0.6), "drifted"),
        (row(None, verdict="not run"), row(0.5, 0.4, 0.6), "new"),
        (row(0.5, 0.4, 0.6), row(None, verdict="not run"), "flipped"),
        (None, row(0.5, 0.4, 0.6), "new"),
    ],
)
def test_outcomes_of_a_rerun(old, new, outcome):
    assert ledger.judge(old, new) == outcome


def test_the_ledger_is_kept_and_names_machines_of_both_runs(tmp_path, monkeypatch):
    monkeypatch.setenv("PERSONA_COUPLING_ROOT", str(tmp_path))
    folder = tmp_path / "paper" / "generated" / "quick"
    folder.mkdir(parents=True)
    assert ledger.read("quick") == {}
    claim = {"id": "00-raw", "value": 0.5, "low": 0.4, "high": 0.6, "verdict": "supported", "why": "so"}
    (folder / "00_a.json").write_text(json.dumps({"claims": [claim], "provenance": MADE}))
    before = ledger.read("quick")
    there = {**MADE, "device": "another card"}
    (folder / "00_a.json").write_text(json.dumps({"claims": [{**claim, "verdict": "refuted"}], "provenance": there}))
    entries = ledger.compare(before, ledger.read("quick"))
    assert json.loads(ledger.write("quick", entries).read_text()) == entries
    text = ledger.text(entries)
    for said in ("1 flipped", "00-raw  flipped", "supported 0.50 [0.40, 0.60]", "a card", "another card", "torch 1"):
        assert said in text


def test_the_interval_of_a_mean_is_the_textbooks():
    question = pd.Series(["a", "a", "b", "b", "c", "c"])
    values = pd.Series([1.0, 3.0, 4.0, 4.0, 6.0, 6.0])  # question means 2, 4, 6: s = 2, m = 3
    value, low, high = prediction.predicted(values, question, rate=False, level=0.95)
    half = 4.302653 * 2 * (2 / 3) ** 0.5  # t of two degrees of freedom, from a table
    assert (value, low, high) == pytest.approx((4.0, 4.0 - half, 4.0 + half))
    wider = prediction.predicted(values, question, rate=False, level=0.95, floor=1.0)
    assert wider[2] - 4.0 == pytest.approx(4.302653 * (2 * (4 / 3 + 1)) ** 0.5)


@pytest.mark.parametrize("rate", [0.0, 0.05, 0.5, 1.0])
def test_a_fresh_draw_of_the_same_cell_falls_inside_as_often_as_promised(rate):
    rng = np.random.default_rng(1)
    m, samples, inside, trials = 12, 3, 0, 400
    question = pd.Series(np.repeat(np.arange(m), samples))
    for _ in range(trials):
        each = np.clip(rng.normal(rate, 0.1 if 0 < rate < 1 else 0.0, m), 0, 1).repeat(samples)
        old, new = (pd.Series((rng.random(m * samples) < each).astype(float)) for _ in range(2))
        _, low, high = prediction.predicted(old, question, rate=True, level=0.95)
        inside += low <= new.mean() <= high
    assert inside / trials >= 0.95 - 2 * (0.95 * 0.05 / trials) ** 0.5


def test_a_changed_cell_falls_outside():
    question = pd.Series(np.repeat(np.arange(12), 3))
    _, low, high = prediction.predicted(pd.Series(np.zeros(36)), question, rate=True, level=0.95)
    assert low == 0.0
    assert high < 0.4
    law = scipy_stats.betabinom(12, 0.5, 12.5)  # twelve questions of which none said it
    assert high * 12 == law.ppf(0.975)


def test_nothing_scored_has_no_interval():
    nothing = pd.Series([], dtype=float)
    assert prediction.predicted(nothing, nothing, rate=True, level=0.95) == (None, None, None)
    made = prediction.Comparison("A", "villain rate", None, None, None, 0.5)
    assert made.inside is None
    assert spotcheck.verdict([made]) == 2


def smoke_root(tmp_path, monkeypatch):
    root = tmp_path / "root"
    shutil.copytree(REPOSITORY / "paper", root / "paper", ignore=shutil.ignore_patterns("generated", "*.pdf"))
    for folder in (REPOSITORY / "experiments").glob("0[02]_*"):
        shutil.copytree(
            folder, root / "experiments" / folder.name, ignore=shutil.ignore_patterns("results", "lab_notes")
        )
    monkeypatch.setenv("PERSONA_COUPLING_ROOT", str(root))
    return root


def test_cells_of_a_claim_and_the_reviewers_pick(tmp_path, monkeypatch):
    smoke_root(tmp_path, monkeypatch)
    by_id = {claim.id: claim for claim in claims.read()}
    designs = {
        e.name: notebooks.design_of(e, {"profile": "smoke", "seeds": [0], "model": ""}) for e in notebooks.discover()
    }
    found = {c.condition for c in spotcheck.cells_of(by_id["00-prebaked-bad"], designs["00_replication"])}
    assert found == {"B.prebaked"} | {"A.prebaked"}
    mean_of_draws = {c.condition for c in spotcheck.cells_of(by_id["02-random"], designs["02_subspace"])}
    assert any(condition.startswith("B.random") for condition in mean_of_draws)
    cells = designs["00_replication"].cells
    assert spotcheck.pick(cells, 3, 7) == spotcheck.pick(cells[::-1], 3, 7)[::-1]
    assert len({tuple(c.condition for c in spotcheck.pick(cells, 3, seed)) for seed in range(20)}) > 5
    assert len(spotcheck.pick(cells, 99, 7)) == len(cells)
    assert not spotcheck.pick(Design().cells, 2, 7)


def test_unknown_claims_and_absent_results_are_named(tmp_path, monkeypatch):
    smoke_root(tmp_path, monkeypatch)
    with pytest.raises(UserError, match="no claim '00-nothing'"):
        spotcheck.run("smoke", "00-nothing", count=1, seed=0)
    with pytest.raises(UserError, match="nothing to check against"):
        spotcheck.run("smoke", "00-raw", count=1, seed=0)


@pytest.mark.end_to_end
def test_a_cell_made_from_nothing_agrees_with_its_own_run_and_finds_out_an_invented_one(tmp_path, monkeypatch, capsys):
    from persona_coupling.store import Lab, Store
    from persona_coupling.study import Results

    root = smoke_root(tmp_path, monkeypatch)
    experiment = notebooks.choose(["00"])[0]
    design = notebooks.design_of(experiment, {"profile": "smoke", "seeds": [0, 1], "model": ""})
    cell = next(c for c in design.cells if (c.condition, c.seed) == ("A.prebaked", 0))
    lab = Lab(Store(tmp_path / "first"))
    folder = lab.folder(cell.evaluation)
    tables = {
        name: pd.read_parquet(folder / f"{name}.parquet").assign(condition=cell.condition, seed=cell.seed)
        for name in ("completions", "fixed")
    }
    monkeypatch.setattr(spotcheck, "pick", lambda *_args: [cell])
    record = {"profile": {"seeds": [0, 1]}, "provenance": {"device": "here"}}
    Results({"fixed": tables["fixed"]}, record).save(experiment.results("smoke"))
    tables["completions"].to_parquet(experiment.results("smoke") / "completions.parquet")
    fresh = tmp_path / "fresh"
    assert spotcheck.run("smoke", "00-raw", count=1, seed=5, folder=fresh) == 0
    printed = capsys.readouterr().out
    assert "the same to the letter" in printed
    assert "noise floor of training was not measured" in printed
    assert list(fresh.glob("change/*/manifest.json")), "it was trained again"
    with pytest.raises(UserError, match="starts from nothing"):
        spotcheck.run("smoke", "00-raw", count=1, seed=5, folder=fresh)
    invented = tables["fixed"].assign(logprob=tables["fixed"]["logprob"] + 2.0)
    invented.to_parquet(experiment.results("smoke") / "fixed.parquet")
    assert spotcheck.run("smoke", "00-raw", count=1, seed=5) == 1
    assert "OUTSIDE" in capsys.readouterr().out
    assert root.is_dir()
