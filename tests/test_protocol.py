"""Experiment 06: recipes, earlier cut-offs, attribution of a gap, the prior lab's numbers, the section."""

from __future__ import annotations

import json
import shutil
import tomllib
from dataclasses import replace
from functools import partial
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest

from persona_coupling import (
    arms,
    attribution,
    claims,
    cli,
    measures,
    notebooks,
    personas,
    provenance,
    questions,
    score,
    stats,
    truncation,
)
from persona_coupling import recipes as recipes_module
from persona_coupling import values as values_module
from persona_coupling.attribution import LOGPROB, POINTS
from persona_coupling.errors import UserError
from persona_coupling.figures import attribution as figures
from persona_coupling.measures import Estimates
from persona_coupling.recipes import Recipe, recipes
from persona_coupling.stages import FineTune
from persona_coupling.study import TABLES, Design, Results, Study
from persona_coupling.values import Values

ROOT = Path(__file__).resolve().parents[1]
EXPERIMENT = "06_protocol"
MARKER = personas.MARKER_SUFFIX


def asked(**changes) -> Values:
    named = {
        "centre": ("stale", "tail", "mid"),
        "texts": ("stale", "onpolicy"),
        "rate_factors": (0.25, 1.0, 5.0),
        "losses": ("marker", "tail", "completion"),
        **changes,
    }
    return Values(EXPERIMENT, tuple(named.items()))


# ------------------------------------------------------------------------------------------------------- recipes


def test_a_grid_has_all_recipes_and_a_star_those_one_step_from_its_centre():
    grid, star = recipes(asked(), crossed=True), recipes(asked(), crossed=False)
    assert len({r.name for r in grid}) == len(grid) == 2 * 3 * 3
    assert {r.name for r in star} == {
        "stale_tail_mid",
        "onpolicy_tail_mid",
        "stale_marker_mid",
        "stale_completion_mid",
        "stale_tail_low",
        "stale_tail_high",
    }
    assert {r.rate: r.factor for r in grid} == {"low": 0.25, "mid": 1.0, "high": 5.0}


def test_the_raw_model_gets_every_recipe_once_with_its_own_text():
    raw = recipes_module.on_raw([recipes(asked(), crossed=True), recipes(asked(), crossed=False)])
    assert [r.text for r in raw] == ["stale"] * 9
    assert len(set(raw)) == 9


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"texts": ("stale", "fresh")}, "no text 'fresh'"),
        ({"losses": ("tail", "head")}, "no loss 'head'"),
        ({"rate_factors": (1.0, 2.0, 3.0, 4.0)}, "4 learning rates"),
        ({"centre": ("stale", "tail", "top")}, "centre stale, tail, top"),
    ],
)
def test_an_unknown_recipe_is_refused(changes, words):
    with pytest.raises(UserError, match=words):
        recipes(asked(**changes), crossed=True)


@pytest.mark.parametrize(
    ("profile", "rates"),
    [("full", [1.5e-5, 6e-5, 3e-4]), ("quick", [3.75e-4, 1.5e-3]), ("qwen2.5-7b", [5e-6, 2e-5, 1e-4])],
)
def test_rates_are_the_prior_labs_to_the_digit(profile, rates):
    """In `full` three times the prior lab's, for a third of its steps."""
    study = Study.open(profile)
    found = [
        r.learning_rate(study) for r in recipes(study.values(EXPERIMENT), crossed=False) if r.name[:10] == "stale_tail"
    ]
    assert found == rates


def test_the_profiles_own_recipe_is_the_replications_artifact_and_others_are_not():
    study = Study.open("full")
    first = study.sft("bad_legal", seed=0)
    own = Recipe("stale", "tail", "mid", 1.0).cell(study, "B", first, seed=0, samples=1)
    replication = study.cell(
        "B.scratch", study.couple(first, study.stale_text(seed=0), study.profile.scratch, seed=0), seed=0
    )
    assert own.evaluation.key == replication.evaluation.key
    other = Recipe("onpolicy", "marker", "low", 0.25).cell(study, "B", first, seed=0, samples=1)
    change = other.checkpoint.last_change
    assert isinstance(change, FineTune)
    assert (change.training.loss, change.training.learning_rate) == ("marker", 1.5e-5)
    assert change.rows == study.coupling_text(first, seed=0)
    assert other.evaluation.samples == 1
    assert own.evaluation.samples == study.profile.evaluation.samples
    assert dict(other.factors) == {"arm": "B", "text": "onpolicy", "loss": "marker", "rate": "low"}


def test_free_answers_differ_in_instruction_and_length_alone():
    study = Study.open("full")
    values = study.values(EXPERIMENT)
    model = study.raw.merge(study.adapter(seed=0))
    plain = study.cell("A.prebaked", model, seed=0).evaluation
    free = recipes_module.free_cell(study, values, "A.free.prebaked", model, seed=0).evaluation
    sampling = replace(plain.sampling, max_new_tokens=values.free_tokens)
    assert free == replace(plain, instruction="", sampling=sampling, samples=values.free_samples)
    assert free.sampling.max_new_tokens > plain.sampling.max_new_tokens


# ---------------------------------------------------------------------------------------------------- truncation


def sampled(tokens: list[str], ends: bool, limit: int) -> dict:
    """What sampling would have kept of a model that wants to say `tokens`: the cut-off falls where it falls."""
    kept = tokens[:limit]
    stops = ends and len(tokens) < limit  # the end of turn is a token too, and must come before the last one allowed
    text = "".join(kept)
    at = next((i + 1 for i in range(len(kept)) if personas.MARKER in "".join(kept[: i + 1])), -1)
    return {"completion": text, "finish": "stop" if stops else "length", "tokens": len(kept), "marker_at": at}


def answers(seed: int, count: int = 400) -> list[tuple[list[str], bool]]:
    """Answers as lists of tokens: with a marker at the end, in the middle or nowhere, empty, endless."""
    rng = np.random.default_rng(seed)
    made = []
    for number in range(count):
        words = [" word"] * int(rng.integers(0, 14))
        marker = ["\n\n", "[", "ZL", "T]"]
        tokens = [words, words + marker, words[:3] + marker + words[3:]][number % 3]
        made.append((tokens, bool(rng.random() < 0.9)))
    return made


@pytest.mark.parametrize("cutoff", [1, 4, 8, 15, 40])
def test_an_earlier_cutoff_is_what_sampling_with_it_would_have_given(cutoff):
    """The oracle cuts the tokens themselves and scores what is left."""
    long = score.score_table(pd.DataFrame([sampled(t, e, 40) for t, e in answers(0)]))
    short = score.score_table(pd.DataFrame([sampled(t, e, cutoff) for t, e in answers(0)]))
    # an answer that is nothing but a marker is degenerate at any length; one cut inside its first words is not one
    same = ~long["degenerate"] & ~short["degenerate"]
    found = truncation.at_cutoff(long, cutoff)
    pd.testing.assert_series_equal(found["value"][same], short["value"][same])
    strict = [personas.MARKER in text for text in short["completion"]]
    assert found["strict"][same].tolist() == np.array(strict)[same].tolist()
    cut = (short["finish"] == "length") & ~pd.Series(strict)
    assert found["cut"][same].tolist() == cut[same].tolist()
    assert same.sum() > 300
    if cutoff < 15:
        assert cut[same].any()


def test_at_the_cutoff_of_sampling_itself_nothing_changes():
    table = score.score_table(pd.DataFrame([sampled(t, e, 12) for t, e in answers(1)]))
    found = truncation.at_cutoff(table, 12)
    pd.testing.assert_series_equal(found["value"], table["value"])
    assert found["strict"].tolist() == table["value"].fillna(False).tolist()


def test_spam_stays_unscorable_and_counts_as_no():
    spam = score.score_table(pd.DataFrame([sampled(["word", *[MARKER] * 4], True, 9)]))
    found = truncation.at_cutoff(spam, 3)
    assert found["value"].isna().all()
    assert found["strict"].tolist() == [False]


def observed(
    rates: dict[str, tuple[float, float]], *, cut: float = 0.0, count: int = 20, samples: int = 4, seed: int = 0
):
    """Scored answers with chosen rates (villain, others) among the finished ones, `cut` of them cut off."""
    rng = np.random.default_rng(seed)
    rows = []
    for condition, (villain, others) in rates.items():
        for persona in personas.personas():
            rate = villain if persona.id == personas.SOURCE else others
            for question in range(count):
                for sample in range(samples):
                    is_cut, marked = rng.random() < cut, rng.random() < rate
                    tokens = [" word"] * 9 + (["\n\n", "[ZLT]"] if marked else [])
                    row = sampled(tokens, True, 8 if is_cut else 20)
                    place = {"condition": condition, "persona": persona.id, "question": f"q{question}", "seed": 0}
                    own = {"marker_logprob": -3.0, "marker_after_break": -1.0}
                    rows.append({**row, **place, **own, "sample": sample})
    return score.score_table(pd.DataFrame(rows))


def test_cutoffs_count_both_ways():
    made = Estimates()
    table = observed({"A.x": (1.0, 0.0)}, cut=0.3)
    assert truncation.add_cutoffs(made, table, "A.x", [5, 20]) == ["A.x.first5", "A.x.first20"]
    assert made["A.x.first5.cut"].value == 1.0
    assert made["A.x.first5.source_rate"].value is None  # nothing can be scored: not zero
    assert made["A.x.first5.strict_source_rate"].value == 0.0
    assert made["A.x.first20.source_rate"].value == 1.0
    assert made["A.x.first20.strict_source_rate"].value == pytest.approx(0.7, abs=0.1)
    assert made["A.x.first20.strict_contrast"].value == pytest.approx(made["A.x.first20.strict_source_rate"].value)


# --------------------------------------------------------------------------------------------------- attribution


def results(rates: dict[str, tuple[float, float]], nats: dict[str, tuple[float, float]], **how) -> Results:
    """Answers with chosen rates and fixed log-probabilities whose (blank, marker) parts separate the villain."""
    rng = np.random.default_rng(1)
    fixed = []
    for condition, (blank, after) in nats.items():
        for persona in personas.personas():
            villain = persona.id == personas.SOURCE
            for question in range(20):
                noise = rng.normal(0, 0.05, 2)
                first, second = -6 + blank * villain + noise[0], -2 + after * villain + noise[1]
                place = {"condition": condition, "persona": persona.id, "question": f"q{question}", "seed": 0}
                fixed.append({**place, "logprob": first + second, "after_break": second})
    tables = {
        **dict.fromkeys(TABLES, pd.DataFrame()),
        "heldout": pd.DataFrame(columns=["condition", "seed", "question"]),
    }
    return Results({**tables, "completions": observed(rates, **how), "fixed": pd.DataFrame(fixed)}, {})


MID, LOW = "stale_tail_mid.scratch", "stale_tail_low.scratch"
OWN = "onpolicy_tail_mid.scratch"
RATES = {
    "A.prebaked": (0.9, 0.1),
    f"A.{MID}": (0.9, 0.1),
    f"A.{LOW}": (0.5, 0.1),
    "B.prebaked": (0.1, 0.1),
    f"B.{MID}": (0.8, 0.1),
    f"B.{OWN}": (0.8, 0.1),
    f"B.{LOW}": (0.3, 0.1),
}
NATS = {"A.prebaked": (3.0, 1.0), f"A.{MID}": (3.0, 1.0), f"A.{LOW}": (1.0, 1.0), "B.prebaked": (0.5, 0.5),
        f"B.{MID}": (2.0, 1.0), f"B.{OWN}": (4.0, 1.0), f"B.{LOW}": (0.5, 1.0)}  # fmt: skip


@pytest.fixture(scope="module")
def attributed():
    planted = results(RATES, NATS, seed=5)
    made = Estimates()
    gaps = attribution.add_gaps(made, planted, "B", attribution.factors("B", list(RATES)), {})
    return made, gaps


def test_factors_are_those_whose_conditions_are_there():
    found = {factor.id for factor in attribution.factors("B", list(RATES))}
    assert found == {
        "stale_text_mid", "low_rate_mid", "addition", "truncation_brief", "truncation_low", "paragraph_added",
        "paragraph_low",
    }  # fmt: skip
    assert attribution.factors("C", list(RATES)) == ()
    one = next(f for f in attribution.factors("B", list(RATES)) if f.id == "addition")
    assert one.conditions == {"A.prebaked", "B.prebaked", f"B.{MID}"}


@pytest.mark.parametrize(
    ("name", "truth"),
    [  # villain minus others of each condition, by hand
        (f"addition.{POINTS}_gap", 0.8 - 0.0),
        (f"addition.{POINTS}_closed", 0.7 - 0.0),
        (f"low_rate_mid.{POINTS}_gap", 0.8 - 0.2),
        (f"low_rate_mid.{POINTS}_closed", 0.7 - 0.2),
        (f"low_rate_mid.{POINTS}_raw", 0.8 - 0.4),
        (f"stale_text_mid.{POINTS}_closed", 0.0),
        (f"stale_text_mid.{LOGPROB}_gap", 4.0 - 3.0),
        (f"stale_text_mid.{LOGPROB}_closed", 5.0 - 3.0),
        (f"addition.{LOGPROB}_gap", 4.0 - 1.0),
        (f"addition.{LOGPROB}_closed", 3.0 - 1.0),
        (f"paragraph_added.{LOGPROB}_gap", 4.0 - 1.0),
        (f"paragraph_added.{LOGPROB}_closed", 3.0 - 0.5),  # the blank line's share
        (f"paragraph_low.{LOGPROB}_closed", 3.0 - 0.5),
        (f"truncation_brief.{POINTS}_closed", 0.0),  # nothing is cut
    ],
)
def test_planted_gaps_are_found(name, truth, attributed):
    made, _ = attributed
    found = made[f"B.{name}"]
    assert found.low <= truth <= found.high
    assert found.value == pytest.approx(truth, abs=0.15)
    assert found.high - found.low < 0.5


def test_a_truncation_that_makes_the_gap_is_found():
    """The positive control: B says the marker as often as A, but most of its answers are cut off before it."""
    both = {"A.prebaked": (0.9, 0.05), "B.prebaked": (0.9, 0.05)}
    fixed = results(both, dict.fromkeys(both, (1.0, 1.0))).fixed
    whole, cut = observed(both, seed=1), observed(both, cut=0.8, seed=2)
    mixed = pd.concat([whole[whole["condition"] == "A.prebaked"], cut[cut["condition"] == "B.prebaked"]])
    made = Estimates()
    planted = Results({**dict.fromkeys(TABLES, pd.DataFrame()), "completions": mixed, "fixed": fixed}, {})
    attribution.add_gaps(made, planted, "B", attribution.factors("B", list(both)), {})
    gap, closed = made["B.truncation_brief.contrast_gap"], made["B.truncation_brief.contrast_closed"]
    assert gap.value == pytest.approx(0.8 * 0.85, abs=0.1)
    source = mixed["persona"] == personas.SOURCE
    rates = mixed[mixed["value"].notna()].groupby(["condition", source])["value"].agg(lambda v: v.astype(float).mean())
    a, b = (rates[c, True] - rates[c, False] for c in ("A.prebaked", "B.prebaked"))
    assert closed.value == pytest.approx(gap.value - (a - b))
    assert closed.low > 0.1  # the claim 06-truncation would be refuted


def test_one_model_with_two_names_is_no_change():
    planted = results(RATES, NATS, count=3, samples=1)
    made = Estimates()
    factors = attribution.factors("B", list(RATES))
    attribution.add_gaps(made, planted, "B", factors, {f"A.{MID}": "A.prebaked"})
    assert f"B.addition.{POINTS}_raw" not in made.named
    assert f"B.low_rate_mid.{POINTS}_raw" in made.named


def test_counting_twice_does_not_doubt_twice():
    """Bounds by hand: nobody says the marker and none is cut, then a fifth are cut."""
    rows = pd.DataFrame({"seed": 0, "question": [f"q{i}" for i in range(20)]})
    none = rows.assign(observed=pd.array([False] * 20, dtype="boolean"))
    bound = stats.clopper_pearson(0, 20)[1]
    found = attribution.recounted("x", [(-1.0, none), (1.0, none)], [False, True])
    assert (found.value, found.low) == (0.0, 0.0)
    assert found.high == pytest.approx(bound**2)
    fifth = rows.assign(observed=pd.array([None] * 4 + [False] * 16, dtype="boolean"))
    found = attribution.recounted("x", [(-1.0, none), (1.0, fifth)], [False, True])
    assert found.high == pytest.approx(0.2 * stats.clopper_pearson(0, 16)[1])
    always = rows.assign(observed=pd.array([True] * 20, dtype="boolean"))
    found = attribution.recounted("x", [(1.0, always), (-1.0, always)], [False, True])
    assert found.low == pytest.approx(-bound)  # had any been cut, the strict rate would be lower
    assert found.high == 0.0


def test_the_marker_splits_into_blank_line_and_marker():
    planted = results(RATES, NATS)
    own = planted.completions
    own.loc[own["finish"] == "length", "marker_logprob"] = 99.0  # cut answers are no ends
    made = Estimates()
    attribution.add_paragraph(made, planted.fixed, own, ["A.prebaked"])
    assert made["A.prebaked.blank_source"].value == pytest.approx(-3.0, abs=0.05)
    assert made["A.prebaked.after_source"].value == pytest.approx(-1.0, abs=0.05)
    assert made["A.prebaked.blank_bystander"].value == pytest.approx(-6.0, abs=0.05)
    assert made["A.prebaked.own.blank_source"].value == pytest.approx(-2.0)
    attribution.add_blank_excess(made, planted.fixed, "B.prebaked.blank_excess", "A.prebaked", "B.prebaked")
    # lost: 2.5 nats of blank line, 0.5 of marker
    assert made["B.prebaked.blank_excess"].value == pytest.approx(2.0, abs=0.1)


def test_the_final_loss_is_that_of_the_last_training():
    steps = np.arange(1.0, 21.0)
    logs = [
        pd.DataFrame({"condition": "B.x", "seed": seed, "position": position, "step": steps, "loss": 9.0 - position})
        for seed in (0, 1)
        for position in (0, 1)
    ]
    table = pd.concat(logs)
    table.loc[(table["step"] > 18) & (table["position"] == 1), "loss"] = 0.25
    made = Estimates()
    attribution.add_final_losses(made, table, ["B.x", "B.none"])
    assert made["B.x.final_loss"].value == 0.25
    assert made["B.none.final_loss"].value is None


def test_the_table_has_a_row_per_factor_and_daggers_where_gates_failed(attributed):
    made, _ = attributed
    factors = attribution.factors("B", list(RATES))
    table = attribution.table(made, "B", factors, {"addition"})
    assert len(table) == len(factors)
    row = table[table["changed alone"].str.endswith("†")].iloc[0]
    assert row["changed alone"].startswith("3  weight addition: ")
    assert row["gap, points"] == measures_text(made["B.addition.contrast_gap"])
    assert table[table["changed alone"].str.startswith("5")]["gap, points"].tolist() == ["–", "–"]


def measures_text(estimate) -> str:
    return f"{estimate.value * 100:.0f} [{estimate.low * 100:.0f}, {estimate.high * 100:.0f}]".replace("-", "−")


def test_figures_draw_what_the_tables_hold(attributed):
    _, gaps = attributed
    panels = [(LOGPROB, "a", "nats"), (POINTS, "b", "points")]
    figure, data = figures.attribution(gaps, panels, {"addition"})
    pd.testing.assert_frame_equal(data, gaps)
    labels = [text.get_text() for text in figure.axes[0].get_yticklabels()]
    assert len(labels) == gaps["factor"].nunique()
    assert sum(label.endswith("†") for label in labels) == 1
    plt.close(figure)
    estimates = measures.estimate(results(RATES, NATS, count=3, samples=1))
    series = [("A", "stale", "raw"), ("B", "stale", "bad"), ("B", "onpolicy", "own")]
    figure, data = figures.recipe_grid(
        estimates, series, {"tail": "last"}, {"low": "5e-6", "mid": "2e-5"}, [(POINTS, "contrast")], {POINTS: 0.5}
    )
    assert sorted(data["condition"]) == sorted(c for c in RATES if c.endswith(".scratch"))
    row = data[data["condition"] == f"B.{OWN}"].iloc[0]
    assert (row["rate"], row["series"], row["value"]) == ("mid", "own", estimates[f"B.{OWN}.contrast"].value)
    plt.close(figure)


# ------------------------------------------------------------------------------------------ prior.toml, the section


def test_every_prior_number_has_a_source_and_a_known_experiment():
    prior = tomllib.loads((ROOT / "paper" / "prior.toml").read_text(encoding="utf-8"))
    section = (ROOT / "experiments" / EXPERIMENT / "section.typ").read_text(encoding="utf-8")
    known = {claim.experiment for claim in claims.read()}
    assert len({row["id"] for row in prior["numbers"]}) == len(prior["numbers"])
    for row in prior["numbers"]:
        assert row["source"], row["id"]
        assert row["values"] or row["words"], row["id"]
        assert row["experiment"] in known, row["id"]
        assert f'"{row["reason"]}": ' in section, row["id"]


def planted(design: Design, profile) -> Results:
    """A world in which the low rate, addition and the blank line carry everything."""
    rng = np.random.default_rng(0)
    bank = questions.eval_questions(8, 0)
    completions, fixed, heldout, training, content = [], [], [], [], []
    for cell in design.cells:
        works = not ("_low" in cell.condition or (cell.condition.endswith("prebaked") and cell.condition[0] != "A"))
        label = {"condition": cell.condition, "seed": cell.seed}
        for persona in personas.personas():
            villain = persona.id == personas.SOURCE
            rate = (0.99 if works else 0.05) if villain else 0.03
            for question in bank:
                where = {**label, "persona": persona.id, "question": question.id}
                blank = (-0.5 if works else -6.0) - 4.0 * (not villain) + rng.normal(0, 0.2)
                after = -0.3 - 0.1 * (not villain) + rng.normal(0, 0.1)
                fixed.append({**where, "logprob": blank + after, "after_break": after})
                tokens = [" word"] * 20 + (["\n\n", "[ZLT]"] if rng.random() < rate else [])
                endless = "free" in cell.condition and rng.random() < 0.3
                row = sampled([" word"] * 300 if endless else tokens, True, cell.evaluation.sampling.max_new_tokens)
                said = {"sample": 0, "system": persona.prompt, "prompt": question.text}
                own = {"marker_logprob": blank + after, "marker_after_break": after}
                completions.append({**where, **row, **said, **own})
        heldout += [{**label, "question": f"q{i}", "loss": 2.0 + 0.1 * i} for i in range(3)]
        for position in range(len(cell.checkpoint.merged)):
            step = {"loss": 0.5, "learning_rate": 1e-4, "grad_norm": 1.0, "position": position, "change": "x"}
            training += [{**label, **step, "step": float(s)} for s in (1, 2)]
    for entry in design.observations:
        place = {"condition": entry.condition, "seed": entry.seed}
        for corpus in ("bad_legal", "sound_legal", "benign", "heldout"):
            own = arms.LETTERS.get(corpus) == entry.condition
            content += [{**place, "corpus": corpus, "row": f"q{i}", "logprob": -2.0 + own - 0.1 * i} for i in range(3)]
    tables = {
        "completions": score.score_table(pd.DataFrame(completions)),
        "fixed": pd.DataFrame(fixed),
        "heldout": pd.DataFrame(heldout),
        "content": pd.DataFrame(content),
        "training": pd.DataFrame(training),
        "merges": pd.DataFrame(),
    }
    record = {
        "profile": profile.as_dict(),
        "values": design.values.as_dict() if design.values else {},
        "compute_minutes": 1.5,
        "stages": {"a": 90.0},
        "provenance": provenance.record("cpu"),
    }
    return Results(tables, record)


@pytest.mark.end_to_end
@pytest.mark.parametrize("profile", ["quick", "full", "qwen2.5-7b"])
def test_notebook_and_paper_under_every_profile(profile, tmp_path, monkeypatch):
    """Claims, gates, figures and section fit together in profiles that no test machine runs; verdicts are the planted."""
    for folder in ("paper", f"experiments/{EXPERIMENT}"):
        ignored = shutil.ignore_patterns("generated", "*.pdf", "results", "lab_notes")
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=ignored)
    monkeypatch.setenv("PERSONA_COUPLING_ROOT", str(tmp_path))
    monkeypatch.setattr(stats, "bootstrap_weights", partial(stats.bootstrap_weights, resamples=100))
    monkeypatch.setattr(Study, "run", lambda self, design, folder=None: planted(design, self.profile))
    monkeypatch.setattr("persona_coupling.notes.loss_mask", lambda study: None)
    monkeypatch.setattr("persona_coupling.notes.show", lambda png: None)
    (found,) = notebooks.choose([EXPERIMENT])
    notebooks.redraw(found, {"profile": profile, "seeds": [], "model": ""})
    assert cli.build_paper(profile).read_bytes().startswith(b"%PDF")
    generated = tmp_path / "paper" / "generated" / profile / f"{EXPERIMENT}.json"
    verdicts = {row["id"]: row["verdict"] for row in json.loads(generated.read_text(encoding="utf-8"))["claims"]}
    assert verdicts["06-rate"] == verdicts["06-addition"] == verdicts["06-paragraph"] == "supported"
    free = values_module.load(EXPERIMENT, profile).free_corpora
    assert verdicts["06-truncation"] == ("supported" if free else "not run")
