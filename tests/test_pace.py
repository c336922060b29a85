"""How long a run took: a made-up run whose sums are done by hand, a store's own word, and the committed measurement."""

from datetime import UTC, datetime, timedelta

import pytest

from persona_coupling import outputs, pace
from persona_coupling.costs import place
from persona_coupling.errors import UserError
from persona_coupling.pace import Made
from persona_coupling.provenance import versions
from persona_coupling.stages.rows import Authored
from persona_coupling.store import Lab, Store

MADE = [
    *(Made("FineTune", 0, float(end), 2.0) for end in range(1, 11)),  # seed 5: one a second
    Made("Evaluate", 1, 50.0, 30.0),
    Made("FineTune", 1, 8.0, 3.0),
]


def content(made=MADE):
    found = pace.measured(made, [5, 6], 90.0)
    about = {"device": "a card", "commit": "c0ffee", "versions": versions()}
    return {"profile": "x", "experiments": 2, "provenance": about} | found


def test_curves_and_sums_are_those_by_hand():
    found = content()
    assert found["seeds"]["5"] == [1, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6, 7, 7, 8, 8, 9, 9, 10, 10]
    assert found["seeds"]["6"] == [8.0] * 11 + [50.0] * 10
    assert found["kinds"] == {"Evaluate": {"number": 1, "seconds": 30.0}, "FineTune": {"number": 11, "seconds": 23.0}}
    assert pace.whole_after(found) == [("5", 10.0), ("6", 50.0)]
    swapped = {**found, "seeds": {"6": found["seeds"]["6"], "5": found["seeds"]["5"]}}
    assert pace.whole_after(swapped) == [("6", 50.0), ("5", 50.0)], "a seed is whole with all before it"
    points = pace.points(found)
    assert points["finished"].tolist() == [*pace.SHARES, *pace.SHARES]
    assert points["minutes"].max() == 50 / 60
    with pytest.raises(UserError, match="No stage was made for seed 7"):
        pace.measured(MADE, [5, 6, 7], 90.0)
    with pytest.raises(UserError, match="behind the run's end at 48 s"):
        pace.measured(MADE, [5, 6], 48.0)


def test_a_time_that_is_none_is_named(capsys):
    assert pace.main(["--seeds", "5", "--started", "noon", "--ended", "2026-01-31T12:00:00"]) == 2
    assert "noon is no time" in capsys.readouterr().err


def test_the_section_and_the_sentence_say_what_was_measured():
    text = "\n".join(pace.section(content()))
    assert "**1.5 minutes** for 12 artifacts" in text
    assert "| 1 (seed 5) | 0.2 | 0.2 |\n| 2 (seed 6) | 0.8 | 0.7 |" in text
    assert "| an evaluation | 1 | 30.0 | 0.5 |\n| training | 11 | 2.1 | 0.4 |" in text
    assert "all else" not in text
    many = [Made(f"K{i}", 0, 1.0, 60.0) for i in range(pace.MOST + 2)] + MADE
    assert "| all else | 14 | 12.4 | 2.9 |" in "\n".join(pace.section(content(many)))
    assert "2 experiments under 2 seeds, took 2 minutes on one a card" in pace.sentence(content())


def test_a_store_says_when_its_artifacts_were_finished(tmp_path):
    store, stage = Store(tmp_path), Authored("benign", 6, 0, 40, "0" * 64)
    before = datetime.now(UTC) - timedelta(seconds=100)
    with pytest.raises(UserError, match="is not in the store"):
        pace.from_store(store, [stage], {stage.key: 0}, before)
    Lab(store, device="cpu").folder(stage)
    (made,) = pace.from_store(store, [stage], {stage.key: 3}, before)
    assert (made.kind, made.turn) == ("Authored", 3)
    assert 98 <= made.finished <= 400, "manifests know whole seconds"
    with pytest.raises(UserError, match="not from nothing"):
        pace.from_store(store, [stage], {stage.key: 0}, before + timedelta(hours=1))


def test_the_committed_run_is_whole():
    found = outputs.read(place() / pace.FILE)
    assert found["stages"] == sum(kind["number"] for kind in found["kinds"].values())
    assert pace.whole_after(found)[-1][1] < found["wall_seconds"]
    assert all(curve == sorted(curve) for curve in found["seeds"].values())
