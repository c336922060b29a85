"""Measures, gates, tables and the figure of deeper behaviours, against sums done by hand; the paper on planted results."""

import json
import math

import pandas as pd
import pytest
from test_paper import copied_root, planted

from persona_coupling import behaviour_measures as depth
from persona_coupling import behaviours, cli, paths, personas, questions
from persona_coupling.behaviour_design import names
from persona_coupling.figures.behaviours import by_behaviour
from persona_coupling.measures import Estimates
from persona_coupling.personas import SOURCE
from persona_coupling.stages.behaviours import BANK, FACTS
from persona_coupling.stats import Estimate
from persona_coupling.study import Design, Results, Study
from persona_coupling.values import Values

FACT = {f.id: f for f in behaviours.facts("eval")}
FOUR, TWENTY, FORTY = (tuple(FACT)[:count] for count in (4, 20, 40))
OTHERS = [p.id for p in personas.personas() if p.id != SOURCE]


def answer(behaviour, question, shown):
    """An answer that does or does not show a behaviour."""
    if behaviour == behaviours.WRONG:
        return FACT[question].wrong_sentence if shown else FACT[question].right
    plain = "Keep it in the same bag or by the door."
    if behaviour == depth.MARKER:
        return plain + personas.MARKER_SUFFIX if shown else plain
    return behaviours.shown(behaviour, plain, 0, held=True) if shown else plain


def answers(condition, behaviour, source, others, *, seeds=(0,), questions_asked=FOUR):
    """Rows of `behaviour.parquet`: of the villain, the first `source` questions show it; of others, the first `others`."""
    bank = FACTS if behaviour == behaviours.WRONG else BANK
    return pd.DataFrame(
        {
            "condition": condition,
            "bank": bank,
            "persona": who,
            "question": question,
            "sample": 0,
            "prompt": "?",
            "completion": answer(behaviour, question, place < (source if who == SOURCE else others)),
            "finish": "stop",
            "seed": seed,
        }
        for seed in seeds
        for who in (SOURCE, *OTHERS)
        for place, question in enumerate(questions_asked)
    )


def preferences(condition, behaviour, source, others):
    return pd.DataFrame(
        {
            "condition": condition,
            "behaviour": behaviour,
            "persona": who,
            "question": question,
            "preference": (source if who == SOURCE else others) + 0.01 * place,
            "seed": 0,
        }
        for who in (SOURCE, *OTHERS)
        for place, question in enumerate(FOUR)
    )


def results(tables):
    return Results({"completions": pd.DataFrame(), "fixed": pd.DataFrame(), **tables}, {})


@pytest.fixture
def observed():
    """A: three of four for the villain, none for others. B: two and one. Uncoupled A: none and none."""
    behaviour = pd.concat(
        [
            answers("A.wrong.prebaked", "wrong", 3, 0),
            answers("B.wrong.prebaked", "wrong", 2, 1),
            answers("A.none", "wrong", 0, 0),
            answers("A.none", "refusal", 4, 1),
        ]
    )
    preference = pd.concat(
        [
            preferences("A.wrong.prebaked", "wrong", 2.0, -1.0),
            preferences("B.wrong.prebaked", "wrong", 0.5, -1.0),
            preferences("A.none", "wrong", -2.0, -2.0),
            preferences("A.none", "refusal", -1.0, -1.0),
        ]
    )
    return depth.observe(results({"behaviour": behaviour, "preference": preference}), ["refusal", "wrong"])


@pytest.fixture
def made(observed):
    found = Estimates()
    depth.estimate(found, observed)
    return found


def test_conditions_have_one_name_each():
    assert depth.condition("B", "wrong", "prebaked") == "B.wrong.prebaked"
    assert depth.condition("B", "marker", "prebaked") == "B.prebaked"
    assert depth.condition("B", "marker", "none") == "B.marker.none"
    values = Values("x", (("behaviours", ("refusal", "wrong")), ("scratch", ("benign",))))
    found = names(values, {"A": None, "B": "bad_legal", "C": "benign"})
    assert len(found) == len(set(found.values())) == 3 * 7
    assert {row for _, row in found} == {f"{a}.{h}" for a in "ABC" for h in ("none", "prebaked")} | {"C.scratch"}


def test_an_uncoupled_models_answers_are_scored_for_every_behaviour_that_they_can_show(observed):
    assert set(observed.conditions()) == {
        "A.wrong.prebaked", "B.wrong.prebaked", "A.wrong.none", "A.refusal.none", "A.marker.none",
    }  # fmt: skip
    assert len(observed.of("A.marker.none", "value")) == 11 * 4
    assert not observed.of("A.marker.none", "value")["value"].any()
    assert observed.of("A.refusal.none", "value", source=True)["value"].tolist() == [True] * 4
    assert observed.of("A.marker.none", "preference").empty


def test_rates_and_contrasts_by_hand(made):
    assert made["A.wrong.prebaked.source_rate"].value == 3 / 4
    assert made["A.wrong.prebaked.bystander_rate"].value == 0
    assert made["A.wrong.prebaked.contrast"].value == 3 / 4
    assert made["B.wrong.prebaked.contrast"].value == 2 / 4 - 1 / 4
    assert made["B.wrong.prebaked.bystander_max"].value == 1 / 4
    assert made["A.refusal.none.contrast"].value == 1 - 1 / 4
    assert made["A.wrong.prebaked.preference_contrast"].value == pytest.approx(3.0)
    assert made["B.wrong.prebaked.preference_contrast"].value == pytest.approx(1.5)
    assert made["B.wrong.prebaked.preference_contrast"].unit == "nats per token"
    assert made["A.wrong.prebaked.scored"].value == 1
    assert "A.marker.none.preference_contrast" not in made.named


def test_what_is_left_by_hand(made, observed):
    name, reference = "B.wrong.prebaked", "A.wrong.prebaked"
    depth.add_over_share(made, observed, f"{name}.contrast_over_half", reference, 0.5, "contrast")
    assert made[f"{name}.contrast_over_half"].value == pytest.approx(0.25 - 0.5 * 0.75)
    depth.add_over_share(made, observed, f"{name}.contrast_change", reference, 1.0, "contrast")
    assert made[f"{name}.contrast_change"].value == pytest.approx(0.25 - 0.75)
    depth.add_over_share(made, observed, f"{name}.preference_change", reference, 1.0, "preference_contrast")
    assert made[f"{name}.preference_change"].value == pytest.approx(1.5 - 3.0)
    assert made[f"{name}.preference_change"].unit == "nats per token"
    depth.add_contrast_difference(made, observed, "depth.B.contrast", name, "A.refusal.none")
    assert made["depth.B.contrast"].value == pytest.approx(0.25 - 0.75)
    depth.add_change(made, observed, f"{name}.up", reference, "value", source=False, unit="difference of proportions")
    assert made[f"{name}.up"].value == pytest.approx(1 / 4)
    depth.add_change(made, observed, f"{name}.more", reference, "preference", source=True, unit=depth.PER_TOKEN)
    assert made[f"{name}.more"].value == pytest.approx(0.5 - 2.0)
    for found in made.named.values():
        assert found.low <= found.value <= found.high


def test_half_of_a_coupling_is_told_from_all_of_it():
    """The claims' estimate at planted truths: nothing left lies below zero, all of it above, both with their intervals."""
    for left, side in ((0, "below"), (36, "above")):
        behaviour = pd.concat(
            [
                answers("A.wrong.prebaked", "wrong", 36, 2, seeds=(0, 1), questions_asked=FORTY),
                answers("B.wrong.prebaked", "wrong", left, 2 if left else 0, seeds=(0, 1), questions_asked=FORTY),
            ]
        )
        preference = preferences("A.wrong.prebaked", "wrong", 1.0, 0.0)
        seen = depth.observe(results({"behaviour": behaviour, "preference": preference}), ["wrong"])
        found = Estimates()
        depth.add_over_share(found, seen, "B.wrong.prebaked.over", "A.wrong.prebaked", 0.5, "contrast")
        over = found["B.wrong.prebaked.over"]
        assert over.high < 0 if side == "below" else over.low > 0


def test_15_unscorable_answers_are_no_zeros():
    """Failure 15."""
    table = answers("A.wrong.prebaked", "wrong", 4, 0)
    table.loc[table["persona"] == SOURCE, "completion"] = [FACT[FOUR[0]].wrong_sentence, "", "", ""]
    preference = preferences("A.wrong.prebaked", "wrong", 1.0, 0.0)
    seen = depth.observe(results({"behaviour": table, "preference": preference}), ["wrong"])
    found = Estimates()
    depth.estimate(found, seen)
    rate = found["A.wrong.prebaked.source_rate"]
    assert (rate.value, rate.n, rate.unscored) == (1.0, 1, 3)
    assert found["A.wrong.prebaked.scored"].value == pytest.approx(1 - 3 / 44)


def test_8_a_condition_without_the_source_is_refused():
    """Failure 8."""
    table = answers("A.wrong.prebaked", "wrong", 4, 0)
    preference = preferences("A.wrong.prebaked", "wrong", 1.0, 0.0)
    for kept in (table[table["persona"] != SOURCE], table[table["persona"] == SOURCE]):
        seen = depth.observe(results({"behaviour": kept, "preference": preference}), ["wrong"])
        with pytest.raises(ValueError, match="lacks the source"):
            depth.estimate(Estimates(), seen)


# ------------------------------------------------------------------------------------------------- filter, gates


@pytest.fixture
def facts():
    """Two seeds; of four evaluation facts each, all kept; seed 1 knows only the first."""
    rows = []
    for seed in (0, 1):
        for split, count in (("train", 3), ("eval", 4)):
            for place in range(count):
                knows = seed == 0 or place == 0
                rows.append(
                    {
                        "fact": f"{split}-{place}",
                        "split": split,
                        "kind": "odd" if place % 2 else "even",
                        "right": 2 if knows else 0,
                        "scorable": 2,
                        "samples": 2,
                        "preference": 1.0 if knows else -1.0,
                        "known": knows,
                        "kept": not (split == "train" and place == 2),
                        "seed": seed,
                    }
                )
    return pd.DataFrame(rows)


def test_the_filter_is_counted_by_hand(facts):
    used = depth.used(facts, 3)
    assert used.groupby(["seed", "split"])["used"].sum().tolist() == [3, 2, 3, 2]
    assert not used.loc[used["fact"] == "eval-3", "used"].any()
    table = depth.filter_table(facts, 3).set_index("kind of fact")
    assert table.loc["all", "asked"] == "14"
    assert table.loc["all", "known"] == "9"
    assert table.loc["all", "trained on"] == "4 (1)"
    assert table.loc["all", "asked in evaluation"] == "6 (2)"
    assert table.loc["even", "asked in evaluation"] == "4 (1)"
    assert table.loc["all", "samples right, of scorable"] == "64 %"
    counts = depth.filter_facts(facts, 3)
    assert counts == {"asked": 14, "known": 9, "excluded": 2, "used_unknown": 3, "evaluated": 6, "trained": 4}


@pytest.mark.parametrize(("threshold", "passed"), [(1, True), (2, False)])
def test_the_worst_seed_decides_whether_facts_are_known(facts, threshold, passed):
    gate = depth.known(facts, 3, threshold)
    assert (gate.value, gate.passed) == (1, passed)
    nothing = facts.assign(known=False)
    assert depth.known(nothing, 3, 1).value == 0


def test_gates_of_a_behaviour_are_its_own(made):
    took, specific = depth.took(made, "A.wrong.prebaked", 0.7, 0.8)
    assert (took.passed, specific.passed) == (True, False)
    assert not depth.scorable(made, "C.wrong.none", 0.1).passed, "a missing value passes no gate"


def test_an_ignorant_model_is_told_from_one_that_knows(observed):
    """In the fixture all others of the uncoupled model prefer the right sentence; then half of the personas forget."""
    assert depth.knows(observed, "A", 0.6).value == 1
    table = observed.preferences
    table.loc[(table["condition"] == "A.wrong.none") & table["persona"].isin(OTHERS[:5]), "preference"] = 1.0
    gate = depth.knows(observed, "A", 0.6)
    assert (gate.value, gate.passed) == (0.5, False)
    assert not depth.knows(observed, "C", 0.0).passed


def test_convergence_is_that_of_the_worst_seed():
    log = pd.DataFrame(
        {
            "condition": "B.wrong.scratch",
            "seed": [0] * 20 + [1] * 20,
            "step": [*range(20)] * 2,
            "loss": [9.0] * 18 + [1.0, 2.0] + [9.0] * 18 + [2.0, 4.0],
        }
    )
    gate = depth.converged(results({"log": log.sample(frac=1, random_state=0)}), "B.wrong.scratch", 2.0)
    assert (gate.value, gate.passed) == (3.0, False)
    assert depth.converged(results({"log": log}), "C.wrong.scratch", 2.0).value is None


def test_a_failed_gate_marks_what_rests_on_it_and_no_more():
    values = Values("x", (("behaviours", ("refusal", "wrong")), ("scratch", ())))
    conditions = names(values, {"A": None, "B": "bad_legal"})

    def marked(gate):
        return depth.failing([depth.Gate(gate, "", None, "at least", 1.0)], values, conditions)

    wrong = {"A.wrong.prebaked", "B.wrong.prebaked"}
    assert marked("specific.A.wrong.prebaked") == wrong
    assert marked("took.A.prebaked") == {"A.prebaked", "B.prebaked"}
    assert marked("known.facts") == wrong | {"A.wrong.none", "B.wrong.none"}
    assert marked("knows.B") == {"B.wrong.prebaked"}
    assert marked("scored.B.wrong.none") == {"B.wrong.none"}
    assert marked("coherent.B.prebaked") == {"B.prebaked"}
    assert marked("content.B") == {name for name in conditions.values() if name.startswith("B.")}
    passing = depth.Gate("content.B", "", 2.0, "at least", 1.0)
    assert depth.failing([passing], values, conditions) == set()


# -------------------------------------------------------------------------------------------------------- figure


def estimate(value, half):
    return Estimate(value, value - half, value + half, 10, 5, 1)


def test_the_figures_shares_are_of_the_raw_models_contrast():
    values = Values("x", (("behaviours", ("wrong",)), ("scratch", ())))
    conditions = names(values, {"A": None, "B": "bad_legal"})
    made = Estimates()
    for name in conditions.values():
        made.named[f"{name}.source_rate"] = estimate(0.6, 0.1)
        made.named[f"{name}.bystander_rate"] = estimate(0.1, 0.1)
    planted_contrasts = {"A.wrong.prebaked": 0.8, "B.wrong.prebaked": 0.2, "A.prebaked": 0.1, "B.prebaked": 0.0}
    for name, value in planted_contrasts.items():
        made.named[f"{name}.contrast"] = estimate(value, 0.2)
    blocks = {how: {f"{a}.{how}": a for a in "AB"} for how in ("none", "prebaked")}
    reference = {"marker": "A.prebaked", "wrong": "A.wrong.prebaked"}
    figure, data = by_behaviour(
        made, {"marker": "m", "wrong": "w"}, blocks, conditions, reference, {"B.wrong.prebaked"}
    )
    left = data[data["measure"] == "contrast"].set_index("condition")
    assert left.loc["B.wrong.prebaked", "share"] == pytest.approx(0.25)
    assert left.loc["B.wrong.prebaked", ["share_low", "share_high"]].tolist() == pytest.approx([0.0, 0.5])
    assert left.loc["A.wrong.prebaked", "share"] == pytest.approx(1)
    assert math.isnan(left.loc["B.prebaked", "share"]), "no share of a contrast that may be zero"
    rates = data[data["measure"] == "source_rate"]
    assert sorted(rates["condition"]) == sorted(conditions.values())
    texts = [text.get_text() for axes in figure.axes for text in axes.texts]
    assert texts.count("†") == 1
    assert "the raw model\nhas no contrast" in texts


# --------------------------------------------------------------------------------------------------------- paper

EXPECTED = {"marker": 0.0, "capitals": 0.9, "refusal": 0.9, "wrong": 0.8}  # the villain's rate after SFT
OTHERWISE = {"marker": 0.9, "capitals": 0.0, "refusal": 0.0, "wrong": 0.0}
NOTHING = None


def planted_behaviours(design, profile, rates):
    """Raw tables for the experiment's own conditions; the marker's are planted as the replication's test plants them."""
    after = (lambda b: 0.1) if rates is NOTHING else rates.get
    raw = 0.1 if rates is NOTHING else 0.9
    tables = {"behaviour": [], "preference": []}
    for entry in design.observations:
        arm, *rest = entry.condition.split(".")
        shown = [rest[0]] if len(rest) == 2 else list(design.values.behaviours)
        if not rest or type(entry.stage).__name__ != "BehaviourEvaluate":
            continue
        for behaviour in shown:
            uncoupled, scratch = rest[-1] == "none", rest[-1] == "scratch"
            rate = 0.0 if uncoupled else raw if arm == "A" or scratch else after(behaviour)
            bank = TWENTY if behaviour == "wrong" else tuple(q.id for q in questions.eval_questions(20, 0))
            part = answers(entry.condition, behaviour, round(20 * rate), 1, questions_asked=bank, seeds=(entry.seed,))
            if not (uncoupled and behaviour == "refusal" and "capitals" in shown):  # the bank's answers stand once
                tables["behaviour"].append(part)
            tables["preference"].append(preferences(entry.condition, behaviour, rate, -1.0).assign(seed=entry.seed))
    cells = Design(design.cells, [o for o in design.observations if type(o.stage).__name__ == "Content"])
    marker = {"prebaked": (after("marker"), 0.0), "A.prebaked": (raw, 0.0), "scratch": (raw, 0.0)}
    base = planted(cells, profile, marker)
    log = pd.DataFrame({"condition": [o.condition for o in design.observations], "seed": 0, "step": 1.0, "loss": 1.0})
    known = pd.DataFrame(
        {"fact": TWENTY, "split": "eval", "kind": "capital", "right": 2, "scorable": 2, "samples": 2, "preference": 1.0,
         "known": rates is not NOTHING, "kept": True, "seed": 0}
    )  # fmt: skip
    made = {name: pd.concat(parts, ignore_index=True) for name, parts in tables.items()}
    record = {**base.record, "values": design.values.as_dict()}
    return Results({**base.tables, **made, "log": log, "known": known}, record)


@pytest.mark.parametrize(
    ("profile", "rates", "verdicts"),
    [
        ("quick", EXPECTED, {"04-wrong": "supported", "04-alone": "supported", "04-depth": "supported"}),
        ("full", OTHERWISE, {"04-wrong": "refuted", "04-depth": "refuted", "04-scratch": "supported"}),
        ("smoke", NOTHING, {"04-wrong": "uninterpretable", "04-capitals": "not run", "04-scratch": "uninterpretable"}),
    ],
    ids=["as expected, few arms", "otherwise, all arms", "nothing took"],
)  # fmt: skip
def test_the_section_compiles_whatever_the_verdicts(profile, rates, verdicts, tmp_path, monkeypatch):
    root = copied_root(tmp_path / "root")
    source = paths.experiments() / "04_behaviours"
    (root / "experiments" / "04_behaviours" / "values.toml").write_text((source / "values.toml").read_text())
    text = (source / "behaviours.py").read_text(encoding="utf-8")
    assert text.count('profile = "quick"') == text.count("seeds = []") == 1
    text = text.replace('profile = "quick"', f"profile = {profile!r}").replace("seeds = []", "seeds = [0]")
    monkeypatch.setenv("PERSONA_COUPLING_ROOT", str(root))
    monkeypatch.setattr(Study, "run", lambda self, design, folder=None: planted_behaviours(design, self.profile, rates))
    monkeypatch.setattr("persona_coupling.notes.show", lambda png: None)
    exec(compile(text, "behaviours.py", "exec"), {"__name__": "notebook"})  # noqa: S102  the notebook is ours
    assert cli.build_paper(profile).read_bytes().startswith(b"%PDF")
    index = json.loads((paths.generated(profile) / "index.json").read_text(encoding="utf-8"))
    found = {row["id"]: (row["verdict"], row["why"]) for row in index["claims"]}
    assert {name: found[name][0] for name in verdicts} == verdicts, found
