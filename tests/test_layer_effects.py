"""The factorial over thirds and the layer scan, against effects that were planted and definitions worked out by hand."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from persona_coupling import adapters, depth_scan, layer_effects, layerwise, measures, outputs, personas
from persona_coupling.errors import GuardError, UserError
from persona_coupling.figures import layers as drawings
from persona_coupling.layer_effects import ALL, NONE, PAIR, SINGLE, SUBSETS, condition
from persona_coupling.measures import Estimates
from persona_coupling.study import Results

PUSH = {"early": -1.0, "mid": -2.5, "late": -1.5}  # of the log-odds
WHO = {"villain": 3.0, "assistant": -3.0, "librarian": -4.0}


def level(who: str, subset: tuple[str, ...], synergy: float = 0.0) -> float:
    """The planted log-odds: pushes add up, but for a synergy of all three."""
    return WHO[who] + sum(PUSH[t] for t in subset) * (1.0 if who == "villain" else 0.5) + synergy * (subset == ALL)


def log_probability(odds: float) -> float:
    return float(-np.logaddexp(0.0, -odds))


def planted(
    arms: tuple[str, ...] = ("B",),
    *,
    synergy: float = 0.0,
    noise: float = 0.3,
    questions: int = 8,
    seeds: int = 2,
    samples: int = 2,
    how: tuple[str, ...] = ("prebaked",),
) -> Results:
    """Results with chosen log-odds for every subset: what a question or a seed adds is the same in all conditions."""
    rng = np.random.default_rng(7)
    shift = rng.normal(0, noise, (seeds, questions)) if noise else np.zeros((seeds, questions))
    fixed, completions, merges, seen = [], [], [], set()
    for arm in arms:
        for subset in SUBSETS:
            for way in how:
                name = condition(arm, subset, way)
                if name in seen:
                    continue
                seen.add(name)
                for seed in range(seeds):
                    norms = [2.0 * len(subset) ** 0.5, 1.0] if subset else [1.0]
                    merges.append({"condition": name, "seed": seed, "norms": norms})
                    for question in range(questions):
                        for who in WHO:
                            odds = level(who, subset if way == "prebaked" else NONE, synergy) + shift[seed, question]
                            where = {"condition": name, "seed": seed, "persona": who, "question": f"q{question}"}
                            fixed.append({**where, "logprob": log_probability(odds)})
                            said = rng.random(samples) < 1 / (1 + np.exp(-odds))
                            completions += [{**where, "sample": i, "value": bool(s)} for i, s in enumerate(said)]
    table = pd.DataFrame(completions).astype({"value": "boolean"})
    return Results({"fixed": pd.DataFrame(fixed), "completions": table, "merges": pd.DataFrame(merges)}, {})


def cells(results: Results) -> Estimates:
    """What `measures.estimate` gives for every cell, of the measures that are needed here."""
    made = Estimates()
    for name, table in results.completions.groupby("condition"):
        source = table["persona"] == personas.SOURCE
        for measure, parts in {
            "source_rate": [(1.0, table[source])],
            "bystander_rate": [(1.0, table[~source])],
            "contrast": [(1.0, table[source]), (-1.0, table[~source])],
        }.items():
            measures.add_combination(made, f"{name}.{measure}", parts, "value", "difference of proportions")
    return made


# ------------------------------------------------------------------------------------------------ coefficients


def test_subsets_are_all_eight_and_named() -> None:
    assert len(set(SUBSETS)) == 8
    assert [layer_effects.name(s) for s in SUBSETS] == [
        "none", "early", "mid", "late", "early_mid", "early_late", "mid_late", "all",
    ]  # fmt: skip
    assert [layer_effects.named(layer_effects.name(s)) for s in SUBSETS] == list(SUBSETS)
    assert condition("C", NONE) == condition("B", NONE) == "A.prebaked"
    assert condition("B", ("early", "late"), "scratch") == "B.early_late.scratch"
    with pytest.raises(ValueError, match="'middle' is no set of thirds"):
        layer_effects.named("middle")


def value_of(coefficients: dict, game: dict) -> float:
    return sum(c * game[s] for s, c in coefficients.items())


def test_shapley_values_of_a_textbook_game() -> None:
    """The glove game: early and mid hold left gloves, late a right one; a pair is worth 1. Values: 1/6, 1/6, 2/3."""
    game = {s: float("late" in s and len(s) > 1) for s in SUBSETS}
    values = [value_of(layer_effects.shapley(t), game) for t in adapters.THIRDS]
    assert values == pytest.approx([1 / 6, 1 / 6, 2 / 3])
    assert value_of(layer_effects.parts(), game) == 0.0
    assert value_of(layer_effects.interaction(), game) == 1.0


def test_shapley_values_share_out_the_whole_of_any_game() -> None:
    rng = np.random.default_rng(0)
    for _ in range(5):
        game = {s: float(rng.normal()) for s in SUBSETS}
        shared = sum(value_of(layer_effects.shapley(t), game) for t in adapters.THIRDS)
        assert shared == pytest.approx(game[ALL] - game[NONE])
        by_hand = game["early",] + game["mid",] + game["late",] - 2 * game[NONE]
        assert value_of(layer_effects.predicted(ALL), game) == pytest.approx(by_hand)
        pair = game["early",] + game["late",] - game[NONE]
        assert value_of(layer_effects.predicted(("early", "late")), game) == pytest.approx(pair)


def test_log_odds_invert_the_logistic_and_are_cut_at_certainty() -> None:
    odds = np.array([-30.0, -2.0, 0.0, 5.0])
    probability = 1 / (1 + np.exp(-odds))
    assert layer_effects.log_odds(np.log(probability)) == pytest.approx(odds, abs=1e-6)
    sure = layer_effects.log_odds(np.array([0.0, -1e-12]))
    assert np.isfinite(sure).all()
    assert sure == pytest.approx(np.log(1e6), abs=1e-3)


# ------------------------------------------------------------------------------------------------- the factorial


def test_planted_pushes_come_back_as_additive_in_log_odds_only() -> None:
    """Null result: no interaction where none was planted; and the log-probability, near its ceiling, shows one."""
    made, results = Estimates(), planted()
    layer_effects.add_factorial(made, results, "B")
    for third, push in PUSH.items():
        effect = made[f"B.{third}.prebaked.fixed_logodds_source_effect"]
        assert effect.value == pytest.approx(push, abs=1e-6)
        share = made[f"B.thirds.prebaked.fixed_logodds_source_share_{third}"]
        assert share.value == pytest.approx(push / -5.0, abs=1e-6)
    assert made["B.thirds.prebaked.fixed_logodds_source_additive"].value == pytest.approx(1.0, abs=1e-6)
    assert made["B.thirds.prebaked.fixed_logodds_source_interaction"].value == pytest.approx(0.0, abs=1e-6)
    ceiling = made["B.thirds.prebaked.fixed_logprob_source_interaction"]
    assert ceiling.high is not None
    assert ceiling.high < -0.3
    whole = log_probability(3.0 - 5.0) - log_probability(3.0)
    observed = made["B.all.prebaked.fixed_logprob_source_effect"].value
    assert observed == pytest.approx(whole, abs=0.2)  # questions shift it a little


def test_a_planted_synergy_is_found() -> None:
    """Positive control of the test above."""
    made = Estimates()
    layer_effects.add_factorial(made, planted(synergy=-4.0), "B")
    found = made["B.thirds.prebaked.fixed_logodds_source_interaction"]
    assert found.value == pytest.approx(-4.0, abs=1e-6)
    assert made["B.thirds.prebaked.fixed_logodds_source_additive"].value == pytest.approx(5.0 / 9.0, abs=1e-6)
    shares = [made[f"B.thirds.prebaked.fixed_logodds_source_share_{t}"].value for t in adapters.THIRDS]
    assert shares == pytest.approx([(-PUSH[t] + 4 / 3) / 9 for t in adapters.THIRDS], abs=1e-6)
    predicted = made["B.all.prebaked.fixed_logodds_source_predicted"].value
    assert predicted == pytest.approx(3.0 - 5.0, abs=0.3)


def test_effects_on_the_contrast_are_of_the_source_beyond_the_others() -> None:
    made, results = Estimates(), planted(noise=0.0)
    layer_effects.add_factorial(made, results, "B")
    fixed = results.fixed.set_index(["condition", "persona"])["logprob"].groupby(level=[0, 1]).first()

    def contrast(name: str) -> float:
        return float(fixed[name, "villain"] - (fixed[name, "assistant"] + fixed[name, "librarian"]) / 2)

    found = made["B.mid.prebaked.fixed_logprob_contrast_effect"].value
    assert found == pytest.approx(contrast("B.mid.prebaked") - contrast("A.prebaked"), abs=1e-9)


def test_shares_of_an_effect_that_is_not_there_are_missing() -> None:
    made, results = Estimates(), planted()
    rng = np.random.default_rng(1)
    fixed = results.fixed.assign(logprob=rng.normal(-3.0, 0.5, len(results.fixed)))
    layer_effects.add_factorial(made, Results({**results.tables, "fixed": fixed}, {}), "B")
    assert made["B.thirds.prebaked.fixed_logodds_source_additive"].value is None
    assert made["B.thirds.prebaked.fixed_logodds_source_share_mid"].value is None
    assert made["B.thirds.prebaked.fixed_logodds_source_sum"].value is not None


def test_a_condition_without_scorable_answers_gives_no_effects() -> None:
    """Failure 15: unscorable is missing, not zero."""
    results = planted()
    gone = results.completions["condition"] == "B.mid.prebaked"
    completions = results.completions.assign(value=results.completions["value"].mask(gone))
    made = Estimates()
    layer_effects.add_factorial(made, Results({**results.tables, "completions": completions}, {}), "B")
    assert made["B.thirds.prebaked.source_rate_sum"].value is None
    assert made["B.thirds.prebaked.source_rate_share_late"].value is None
    assert made["B.late.prebaked.source_rate_effect"].value is not None
    made.named.update(cells(Results({**results.tables, "completions": completions}, {})).named)
    singles = [condition("B", s) for s in SINGLE]
    layer_effects.add_extreme(made, results, "B.single.prebaked.contrast_lowest", "contrast", singles)
    assert made["B.single.prebaked.contrast_lowest"].value is None


def test_the_joint_bootstrap_is_that_of_the_statistics_module() -> None:
    """Interval of a share's top alone, a plain combination, against `stats.combination`."""
    results, scale = planted(), layer_effects.LOGODDS
    table = layer_effects.observations(results, scale)
    groups = [condition("B", s) for s in SUBSETS]
    means = layer_effects.JointMeans(table, groups, scale, "x.fixed_logprob_contrast_effect")
    row = np.array([{NONE: -1.0, ("mid",): 1.0}.get(s, 0.0) for s in SUBSETS])
    found = means.estimate(float(means.means @ row), means.draws @ row, "nats")
    made = Estimates()
    villain = table[table["persona"] == "villain"]
    parts = [
        (1.0, villain[villain["condition"] == "B.mid.prebaked"]),
        (-1.0, villain[villain["condition"] == groups[0]]),
    ]
    measures.add_combination(made, "x.fixed_logprob_contrast_effect", parts, "logodds", "nats")
    other = made["x.fixed_logprob_contrast_effect"]
    assert found.value == pytest.approx(other.value)
    assert (found.low, found.high) == pytest.approx((other.low, other.high), abs=0.02)


@pytest.mark.parametrize(
    ("ending", "subsets", "measure"), [("lowest", SINGLE, "contrast"), ("highest", PAIR, "source_rate")]
)
def test_extremes_are_of_the_right_condition_and_no_narrower_than_its_own(ending, subsets, measure) -> None:  # type: ignore[no-untyped-def]
    results = planted(questions=20)
    made, names = cells(results), [condition("B", s) for s in subsets]
    name = f"B.some.prebaked.{measure}_{ending}"
    layer_effects.add_extreme(made, results, name, measure, names)
    found = made[name]
    own = [made[f"{c}.{measure}"] for c in names]
    expected = (min if ending == "lowest" else max)(e.value for e in own)
    assert found.value == expected
    extreme = next(e for e in own if e.value == expected)
    assert found.low <= extreme.low
    assert found.high >= extreme.high


def test_norm_shares_are_of_squares() -> None:
    results, made = planted(), Estimates()
    merges = results.merges
    for third, norm in {"early": 1.0, "mid": 2.0, "late": 2.0}.items():
        chosen = merges["condition"] == f"B.{third}.prebaked"
        merges = merges.assign(norms=[[norm, 5.0] if c else n for c, n in zip(chosen, merges["norms"], strict=True)])
    layer_effects.add_norm_shares(made, Results({**results.tables, "merges": merges}, {}), "B")
    assert [made[f"B.{t}.prebaked.norm_share"].value for t in adapters.THIRDS] == pytest.approx([1 / 9, 4 / 9, 4 / 9])


@pytest.mark.parametrize(("size", "passed"), [(0.5, True), (5.0, False)])
def test_the_gate_asks_for_an_effect_to_locate(size: float, passed: bool) -> None:
    made = Estimates()
    layer_effects.add_factorial(made, planted(), "B")
    gate = layer_effects.disabled(made, "B", size)
    assert gate.id == "disabled.B.thirds.prebaked"
    assert gate.passed is passed


# -------------------------------------------------------------------------------------------------- the scan

WEIGHTS = np.array([0.0, 0.5, 0.5, 4.0, 0.5, 0.5])  # one layer carries two thirds of the effect of six


def scanned(stride: int = 1, weights: np.ndarray = WEIGHTS, noise: float = 0.2, seeds: int = 2) -> pd.DataFrame:
    """A scan in which every layer lowers the villain's log-odds by its own weight, the others' by half of it."""
    rng = np.random.default_rng(3)
    shift = rng.normal(0, noise, (seeds, 4))
    rows = []
    for point in layerwise.points(len(weights), stride, layerwise.MODES):
        push = float(sum(weights[layer] for layer in point.layers))
        for seed in range(seeds):
            for question in range(4):
                for who, start in WHO.items():
                    odds = start - push * (1.0 if who == "villain" else 0.5) + shift[seed, question]
                    rows.append(
                        {"condition": "B.scan", "seed": seed, "mode": point.mode, "start": point.start,
                         "stop": point.stop, "persona": who, "question": f"q{question}",
                         "logprob": log_probability(odds)}
                    )  # fmt: skip
    return pd.DataFrame(rows)


def test_points_of_a_scan_by_hand() -> None:
    found = layerwise.points(5, 2, ("only", "without", "from_bottom", "from_top"))
    table = {mode: [(p.start, p.stop, sorted(p.layers)) for p in found if p.mode == mode] for mode in layerwise.MODES}
    assert table["only"] == [(0, 2, [0, 1]), (2, 4, [2, 3]), (4, 5, [4])]
    assert table["without"] == [(0, 2, [2, 3, 4]), (2, 4, [0, 1, 4]), (4, 5, [0, 1, 2, 3])]
    assert table["from_bottom"] == [(0, 0, []), (0, 2, [0, 1]), (0, 4, [0, 1, 2, 3]), (0, 5, [0, 1, 2, 3, 4])]
    assert table["from_top"] == [(0, 5, [0, 1, 2, 3, 4]), (2, 5, [2, 3, 4]), (4, 5, [4]), (5, 5, [])]


@pytest.mark.parametrize(("stride", "modes"), [(1, ("onyl",)), (0, ("only",)), (6, ("only",))])
def test_a_scan_that_makes_no_sense_is_refused(stride: int, modes: tuple[str, ...]) -> None:
    with pytest.raises(UserError, match="A scan of 5 layers"):
        layerwise.points(5, stride, modes)


def test_effects_by_step_are_those_planted() -> None:
    found = depth_scan.by_step(scanned(), "B.scan").set_index(["mode", "who", "start", "stop"])["value"]
    for layer, weight in enumerate(WEIGHTS):
        for mode in ("only", "without"):
            assert found[mode, "source", layer, layer + 1] == pytest.approx(-weight, abs=1e-5)
        assert found["only", "bystander", layer, layer + 1] == pytest.approx(-weight / 2, abs=1e-5)
        assert found["from_bottom", "source", 0, layer + 1] == pytest.approx(-WEIGHTS[: layer + 1].sum(), abs=1e-5)
        assert found["from_top", "source", layer, 6] == pytest.approx(-WEIGHTS[layer:].sum(), abs=1e-5)
    assert found["from_bottom", "source", 0, 0] == 0.0


def test_concentration_is_found_and_so_is_its_absence() -> None:
    made = Estimates()
    assert depth_scan.add_scan(made, Results({"scan": scanned()}, {}), "B.scan") == (3, 4)
    assert made["B.scan.logodds_largest_share"].value == pytest.approx(4 / 6, abs=1e-5)
    assert made["B.scan.logodds_additive"].value == pytest.approx(1.0, abs=1e-5)
    assert made["B.scan.from_bottom_half"].value == pytest.approx(3.5 / 6, abs=1e-5)  # half of 6 falls inside layer 3
    assert made["B.scan.from_top_half"].value == pytest.approx((2 + 0.5) / 6, abs=1e-5)
    even = Estimates()
    depth_scan.add_scan(even, Results({"scan": scanned(weights=np.ones(6))}, {}), "B.scan")
    assert even["B.scan.logodds_largest_share"].value == pytest.approx(1 / 6, abs=1e-5)
    assert even["B.scan.from_bottom_half"].value == pytest.approx(0.5, abs=1e-5)


def test_a_scan_of_nothing_has_no_shares() -> None:
    made = Estimates()
    table = scanned(weights=np.zeros(6))
    table["logprob"] += np.random.default_rng(5).normal(0, 0.05, len(table)) - 0.2
    assert depth_scan.add_scan(made, Results({"scan": table}, {}), "B.scan") is None
    for measure in ("logodds_largest_share", "logodds_additive", "from_bottom_half", "from_top_half"):
        assert made[f"B.scan.{measure}"].value is None


def test_a_scan_without_ends_is_refused() -> None:
    table = scanned()
    with pytest.raises(ValueError, match="needs a cumulative mode"):
        depth_scan.by_step(table[table["mode"] == "only"], "B.scan")


def test_a_scan_that_disagrees_with_the_evaluated_models_fails_its_gate() -> None:
    table = scanned()
    ends = {(0, 0): "A.prebaked", (0, 6): "B.all.prebaked"}
    bottom = table[table["mode"] == "from_bottom"]
    fixed = pd.concat(
        bottom[(bottom["start"] == a) & (bottom["stop"] == b)][["seed", "persona", "question", "logprob"]].assign(
            condition=name
        )
        for (a, b), name in ends.items()
    )

    def gate(evaluated: pd.DataFrame):  # type: ignore[no-untyped-def]
        results = Results({"scan": table, "fixed": evaluated}, {})
        return depth_scan.agrees(results, "B.scan", "A.prebaked", "B.all.prebaked", 0.15)

    assert gate(fixed).passed
    assert gate(fixed).value == 0.0
    shifted = fixed.assign(logprob=fixed["logprob"] + 0.3 * (fixed["condition"] == "B.all.prebaked"))
    assert not gate(shifted).passed
    assert gate(shifted).value == pytest.approx(0.3)
    assert not gate(fixed[fixed["condition"] == "A.prebaked"]).passed  # an end that cannot be compared


# ----------------------------------------------------------------------------------------------------- figures


@pytest.mark.parametrize("arms", [("B",), ("B", "C")])
def test_figures_draw_what_they_return(arms: tuple[str, ...], tmp_path) -> None:  # type: ignore[no-untyped-def]
    results = planted(arms)
    made = cells(results)
    for arm in arms:
        layer_effects.add_factorial(made, results, arm)
    layer_effects.add_levels(made, results, [condition(arm, s) for arm in arms for s in SUBSETS])
    panel = drawings.Panel("b", "log-odds", "fixed_logodds_source", "fixed_logodds_bystander",
                           predicted="fixed_logodds_source_predicted")  # fmt: skip
    figure, data = drawings.thirds(made, dict.fromkeys(arms, "title"), [panel], {"B.mid.prebaked"})
    assert len(data) == len(arms) * (8 + 8 + 4)
    assert sum(text.get_text() == "†" for axes in figure.axes for text in axes.texts) == 1
    steps = depth_scan.by_step(scanned(), "B.scan")
    figure, data = drawings.scan(steps, {"B.scan": "bad advice"})
    bars = [bar.get_height() for bar in figure.axes[0].containers[0]]
    shown = data[(data["mode"] == "only") & (data["who"] == "source")]["value"]
    assert bars == pytest.approx(list(shown))


def rates(said):
    """A table of sampled rates of the source: one answer to each of eight questions, `said` of them with the marker."""
    rows = [
        {"group": group, "persona": personas.SOURCE, "seed": 0, "question": f"q{i}", "value": float(i < count)}
        for group, count in said.items()
        for i in range(8)
    ]
    return pd.DataFrame(rows)


def test_a_resample_without_an_effect_has_no_share_and_leaves_the_interval_finite():
    scale = layer_effects.SCALES[0]
    means = layer_effects.JointMeans(rates({"none": 4, "all": 0}), ["none", "all"], scale, "x")
    effect = np.array([1.0, -1.0])
    assert (means.draws @ effect == 0).any()
    whole = means.share(effect, effect)
    assert (whole.value, whole.low, whole.high) == (1.0, 1.0, 1.0)
    means = layer_effects.JointMeans(rates({"none": 1, "all": 0}), ["none", "all"], scale, "x")
    assert means.share(effect, effect).value is None


def test_a_number_that_is_none_is_written_nowhere(tmp_path):
    with pytest.raises(GuardError, match=r"index\.json would hold a number that is none"):
        outputs.write_json(tmp_path / "index.json", {"low": float("nan")})
    assert not (tmp_path / "index.json").exists()
