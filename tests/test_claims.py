"""Claims, gates and the verdicts they give, on numbers written by hand."""

import math

import numpy as np
import pandas as pd
import pytest

from persona_coupling import claims, gates, paths, profiles
from persona_coupling.claims import Bound, Claim, Gate
from persona_coupling.errors import UserError
from persona_coupling.measures import Estimates
from persona_coupling.stats import Estimate
from persona_coupling.study import TABLES, Results

ENTRY = """
[[claim]]
id = "00-x"
experiment = "00_replication"
statement = "The adapter works."
estimand = "villain minus bystanders"
estimate = "A.contrast"
supported = { above = 0.25 }
refuted = { below = 0.25 }
refuted_by = "a contrast below 25 points"
gates = ["took.A"]
"""


def written(tmp_path, text):
    path = tmp_path / "claims.toml"
    path.write_text(text, encoding="utf-8")
    return path


def claim(supported=Bound("above", 0.25), refuted=Bound("below", 0.25), names=("took.A",)):
    return Claim("00-x", "00_replication", "s", "e", "A.contrast", supported, refuted, "r", tuple(names))


def gate(value, identity="took.A", direction="at least", threshold=0.8):
    return Gate(identity, "the villain says it", value, direction, threshold)


def numbers(value, low, high):
    return {"A.contrast": {"value": value, "low": low, "high": high}}


# ------------------------------------------------------------------------------------------------- verdicts


@pytest.mark.parametrize(
    ("low", "high", "verdict"),
    [
        (0.30, 0.60, "supported"),
        (0.251, 0.9, "supported"),
        (0.25, 0.60, "inconclusive"),  # touches the bound
        (0.10, 0.60, "inconclusive"),
        (0.10, 0.25, "inconclusive"),
        (0.00, 0.249, "refuted"),
        (-0.5, -0.1, "refuted"),
    ],
)
def test_the_whole_interval_decides(low, high, verdict):
    value = (low + high) / 2
    assert claims.judge(claim(), numbers(value, low, high), [gate(0.9)]).verdict == verdict
    mirrored = claim(Bound("below", -0.25), Bound("above", -0.25))
    assert claims.judge(mirrored, numbers(-value, -high, -low), [gate(0.9)]).verdict == verdict


@pytest.mark.parametrize(("low", "high"), [(0.5, 0.6), (0.0, 0.1), (-0.3, 0.3)])
@pytest.mark.parametrize("value", [0.79, None, math.nan])
def test_a_failed_gate_makes_any_number_uninterpretable(value, low, high):
    made = claims.judge(claim(), numbers((low + high) / 2, low, high), [gate(value)])
    assert made.verdict == "uninterpretable"
    assert "took.A" in made.why
    alone = claims.judge(claim(), numbers((low + high) / 2, low, high), [gate(0.9)])
    assert made.as_dict()["otherwise"] == alone.verdict
    assert f"its interval alone would be {alone.verdict}" in made.why
    assert alone.otherwise is None


def test_15_nothing_scored_is_uninterpretable_and_not_refuted():
    """Failure 15."""
    made = claims.judge(claim(), numbers(None, None, None), [gate(0.9)])
    assert made.verdict == "uninterpretable"
    assert made.as_dict()["value"] is None


def test_a_gate_that_nobody_evaluated_is_an_error():
    with pytest.raises(UserError, match=r"took\.B"):
        claims.judge(claim(names=("took.A", "took.B")), numbers(0.5, 0.4, 0.6), [gate(0.9)])


def test_an_estimate_that_the_arms_do_not_give_is_not_run():
    assert claims.judge(claim(), {}, []).verdict == "not run"


def test_one_failed_gate_of_several_is_named_alone():
    made = claims.judge(
        claim(names=("took.A", "finished.A")), numbers(0.5, 0.4, 0.6), [gate(0.9), gate(0.1, "finished.A")]
    )
    assert made.verdict == "uninterpretable"
    assert "finished.A" in made.why
    assert "took.A" not in made.why


def test_a_failed_gate_that_the_claim_does_not_name_changes_nothing():
    made = claims.judge(claim(), numbers(0.5, 0.4, 0.6), [gate(0.9), gate(0.1, "took.B")])
    assert made.verdict == "supported"


def test_the_record_and_the_table_carry_the_numbers():
    made = claims.judge(claim(), numbers(0.5, 0.4, 0.6), [gate(0.9)])
    record = made.as_dict()
    assert (record["value"], record["low"], record["high"], record["verdict"]) == (0.5, 0.4, 0.6, "supported")
    assert record["predicate"] == "above 0.25"
    text = claims.table([made])
    assert "00-x" in text
    assert "supported" in text
    assert claims.table([]) == "no claims"


# ---------------------------------------------------------------------------------------------------- gates


@pytest.mark.parametrize(
    ("value", "direction", "passed"),
    [
        (0.8, "at least", True),
        (0.81, "at least", True),
        (0.79, "at least", False),
        (0.8, "at most", True),
        (0.79, "at most", True),
        (0.81, "at most", False),
        (None, "at least", False),
        (None, "at most", False),
        (math.nan, "at least", False),
        (math.nan, "at most", False),
    ],
)
def test_gate(value, direction, passed):
    made = gate(value, direction=direction)
    assert made.passed is passed
    assert made.as_dict()["passed"] is passed


def estimate(value):
    return Estimate(value, None, None, 10, 10, 1)


VALUES = profiles.load("smoke").gates


def test_a_coupling_that_did_not_take_fails_its_gate_and_one_that_did_passes():
    named = {"A.source_rate": estimate(0.95), "A.contrast": estimate(0.7)}
    named |= {"B.source_rate": estimate(0.95), "B.contrast": estimate(0.05)}  # everybody says it
    named |= {"C.source_rate": estimate(None), "C.contrast": estimate(None)}
    made = Estimates(named)
    assert [g.passed for g in gates.took(made, VALUES, "A")] == [True, True]
    assert [g.passed for g in gates.took(made, VALUES, "B")] == [True, False]
    assert [g.passed for g in gates.took(made, VALUES, "C")] == [False, False]


def test_15_measures_that_are_absent_pass_no_gate():
    """Failure 15: also where the threshold is an upper one, under which a zero would pass."""
    none = Estimates()
    made = [*gates.took(none, VALUES, "A"), gates.content(none, VALUES, "A"), *gates.readable(none, VALUES, "A")]
    assert len(made) == 6
    assert not any(g.passed for g in made)


def test_readable_asks_for_finished_scored_and_coherent_answers():
    for broken in ("finished", "scored", "heldout_rise"):
        good = {"finished": 0.9, "scored": 0.9, "heldout_rise": 0.2}
        named = {f"A.{n}": estimate(v) for n, v in {**good, broken: 3.0 if broken == "heldout_rise" else 0.1}.items()}
        assert [g.passed for g in gates.readable(Estimates(named), VALUES, "A")].count(False) == 1


def log(losses_by_seed, condition="A", position=0):
    rows = [
        {"condition": condition, "position": position, "seed": seed, "loss": loss}
        for seed, losses in losses_by_seed.items()
        for loss in losses
    ]
    return pd.DataFrame(rows)


def converged(*logs):
    empty = pd.DataFrame()
    results = Results({**dict.fromkeys(TABLES, empty), "training": pd.concat(logs, ignore_index=True)}, {})
    return gates.converged(results, VALUES, "A")


def test_converged_reads_the_last_tenth_of_the_worst_seed():
    made = converged(log({0: [9.0] * 18 + [0.1, 0.3], 1: [9.0] * 18 + [0.5, 0.7]}), log({0: [8.0] * 20}, "B"))
    assert made.value == pytest.approx(0.6)
    assert made.passed
    assert not converged(log({0: [9.0] * 18 + [0.1, 0.3], 1: [9.0] * 20})).passed


def test_converged_reads_the_last_training_of_the_chain():
    made = converged(log({0: [9.0] * 20}), log({0: [0.1] * 20}, position=1))
    assert made.value == pytest.approx(0.1)


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_15_a_seed_whose_loss_is_missing_does_not_hide_behind_another(order):
    """Failure 15: a diverged seed (NaN at its end) beside a good one; in either order the gate must fail."""
    curves = [[1.0] * 18 + [0.1, 0.1], [1.0] * 18 + [np.nan, np.nan]]
    assert not converged(log({seed: curves[which] for seed, which in enumerate(order)})).passed


def test_15_a_loss_that_is_missing_in_the_last_tenth_is_not_averaged_away():
    """Failure 15."""
    assert not converged(log({0: [1.0] * 18 + [0.1, np.nan]})).passed


def test_a_condition_without_a_log_did_not_converge():
    made = converged(log({0: [0.1] * 10}, "B"))
    assert made.value is None
    assert not made.passed


def test_failing_names_every_condition_that_a_gate_concerns():
    made = [
        gate(0.1, "took.A.prebaked"),
        gate(0.1, "content.B"),
        gate(0.9, "content.C"),
        gate(None, "finished.C.scratch"),
    ]
    affects = {"A.prebaked": ["A.prebaked", "S.prebaked"], "B": ["B.prebaked"], "C": ["C.prebaked"]}
    assert gates.failing(made, affects) == {"A.prebaked", "S.prebaked", "B", "B.prebaked", "C.scratch"}


# ----------------------------------------------------------------------------------------------- claims.toml


def test_a_claim_is_read(tmp_path):
    (made,) = claims.read(written(tmp_path, ENTRY))
    assert made.id == "00-x"
    assert made.gates == ("took.A",)
    assert (made.supported, made.refuted) == (Bound("above", 0.25), Bound("below", 0.25))


@pytest.mark.parametrize(
    ("old", "new", "fault"),
    [
        ('gates = ["took.A"]', "", "gates"),
        ('statement = "The', 'statment = "The', "statment"),
        ("above = 0.25", "over = 0.25", "above"),
        ("{ above = 0.25 }", "{ above = 0.25, below = 0.9 }", "above"),
        ("{ above = 0.25 }", "{}", "above"),
        ("{ above = 0.25 }", "0.25", "above"),
        ("{ above = 0.25 }", '{ above = "much" }', "above"),
        ("{ above = 0.25 }", "{ below = 0.1 }", "overlap"),
        ("{ above = 0.25 }", "{ above = 0.2 }", "overlap"),
        ("{ above = 0.25 }", "{ above = nan }", "overlap"),
        ('gates = ["took.A"]', 'gates = "took.A"', "gates"),
    ],
)
def test_a_faulty_claim_is_refused_by_name(tmp_path, old, new, fault):
    assert old in ENTRY
    with pytest.raises(UserError, match=fault) as caught:
        claims.read(written(tmp_path, ENTRY.replace(old, new)))
    assert "00-x" in str(caught.value)


def test_a_claim_that_stands_twice_is_refused(tmp_path):
    with pytest.raises(UserError, match="twice"):
        claims.read(written(tmp_path, ENTRY * 2))


def test_claims_with_a_gap_between_the_ranges_are_taken(tmp_path):
    (made,) = claims.read(written(tmp_path, ENTRY.replace("{ below = 0.25 }", "{ below = 0.1 }")))
    assert claims.judge(made, numbers(0.2, 0.15, 0.22), [gate(0.9)]).verdict == "inconclusive"


def test_the_papers_claims_are_complete():
    made = claims.read()
    assert made
    for entry in made:
        assert entry.gates, entry.id
        assert entry.id.startswith(entry.experiment[:2]), entry.id
        assert (paths.experiments() / entry.experiment).is_dir(), entry.id
        assert entry.refuted_by.strip()
        assert entry.supported.direction != entry.refuted.direction
