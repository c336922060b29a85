"""Experiment 05 from planted states and steered readings to estimates, verdicts, figures and a compiled section."""

import json
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from persona_coupling import cli, measures, personas, provenance, questions, score, shifts
from persona_coupling import representation_measures as whereabouts
from persona_coupling.adapters import LowRank
from persona_coupling.measures import Estimates
from persona_coupling.residual import layer_numbers
from persona_coupling.study import Results, Study

ROOT = Path(__file__).resolve().parents[1]
NAME = "05_representations"
DEPTH, WIDTH = 4, 24
WHO = [p.id for p in personas.personas()]
VILLAIN = WHO.index("villain")

# ------------------------------------------------------------------------------------------------ single functions


def readings(levels, seeds=(0,), count=4, noise=0.0):
    """A table `steered`: (condition, addition, layer, draw, persona) -> level, questions differing by their number."""
    rng = np.random.default_rng(0)
    rows = []
    for (condition, addition, layer, draw, persona), level in levels.items():
        for seed in seeds:
            for q in range(count):
                where = {"condition": condition, "seed": seed, "addition": addition, "layer": layer, "draw": draw}
                value = level + 0.1 * q + noise * rng.normal()
                where |= {"persona": persona, "question": f"q{q}", "logprob": value, "after_break": value / 2}
                rows.append(where)
    return Results({"steered": pd.DataFrame(rows)}, {})


def test_random_controls_are_averaged_over_draws_and_kept_apart():
    found = readings({("B", "x", 2, -1, "v"): -1.0, ("B", "x", 2, 0, "v"): -4.0, ("B", "x", 2, 1, "v"): -6.0})
    own, random = (whereabouts.steered(found, "B", "x", layer=2, control=c) for c in (False, True))
    assert own["logprob"].tolist() == pytest.approx([-1.0, -0.9, -0.8, -0.7])
    assert random["logprob"].tolist() == pytest.approx([-5.0, -4.9, -4.8, -4.7])


def test_the_best_layer_raises_or_lowers_most():
    levels = {("B", "x", layer, -1, "v"): value for layer, value in ((3, -5.0), (6, -2.0), (9, -8.0))}
    levels |= {("B", "x", 9, 0, "v"): 0.0}  # a control is no candidate
    found = readings(levels)
    assert whereabouts.best_layer(found, "B", "x", "v") == 6
    assert whereabouts.best_layer(found, "B", "x", "v", sign=-1) == 9


def test_a_share_is_a_ratio_of_distances_and_missing_where_there_is_no_distance():
    keys = ("B", "x", 1, -1)
    parts = {name: readings({(*keys, "v"): level}).tables["steered"] for name, level in
             (("reached", -6.0), ("start", -9.0), ("end", -1.0))}  # fmt: skip
    made = Estimates()
    whereabouts.add_share(made, "B.share", parts["reached"], parts["start"], parts["end"], "logprob")
    assert made["B.share"].value == pytest.approx(3 / 8)
    assert made["B.share"].low == pytest.approx(3 / 8), "questions shift all three alike: the ratio does not vary"
    whereabouts.add_share(made, "B.none", parts["reached"], parts["start"], parts["start"], "logprob")
    assert made["B.none"].value is None


def test_a_curve_is_the_mean_over_questions_with_its_interval():
    rng = np.random.default_rng(0)
    table = pd.DataFrame(
        [
            {"seed": s, "question": f"q{q}", "layer": layer, "persona": p, "hit": bool(rng.random() < 0.3 * layer)}
            for s in (0, 1)
            for q in range(9)
            for layer in (1, 2, 4)
            for p in "ab"
        ]
    )
    found = whereabouts.curve(table, "hit", binary=True)
    expected = table.groupby("layer")["hit"].mean()
    np.testing.assert_allclose(found["value"], expected)
    assert (found["low"] < found["value"]).all() or expected.loc[4] == 1.0
    made = Estimates()
    measures.add_mean(made, "x.hit", table[table["layer"] == 1].assign(hit=lambda t: t["hit"].astype(float)), "hit", "")
    assert (found["low"][0], found["high"][0]) == pytest.approx((made["x.hit"].low, made["x.hit"].high), abs=0.02)
    whole = whereabouts.curve(table.assign(hit=True), "hit", binary=True)
    assert (whole["high"] == 1.0).all()
    assert (whole["low"] < 0.9).all(), "no zero width at the ceiling"
    gone = whereabouts.curve(table.assign(hit=np.where(table["layer"] == 2, np.nan, 1.0)), "hit")
    assert gone["value"].isna().tolist() == [False, True, False]


# ------------------------------------------------------------------------------------------- planted observations

STAYS = {"kept": True, "restored": -8.0, "pushed": -1.5, "swapped": -1.0, "learned": True}
MOVED = {"kept": False, "restored": -1.0, "pushed": -8.0, "swapped": -1.0, "learned": True}
NO_CONTROL = {**STAYS, "swapped": -4.0}
RAW, TUNED, ASSISTANT = -0.5, -9.0, -4.0


def adapter(kept, rng):
    """Reads the villain's axis if it is to be kept, the shift's otherwise, and both a little."""
    axis = torch.zeros(1, WIDTH)
    axis[0, :2] = torch.tensor([1.0, 0.1] if kept else [0.4, 1.0])
    names = [f"model.layers.{i}.self_attn.{m}" for i in range(DEPTH) for m in ("q_proj", "k_proj", "v_proj")]
    names += [f"model.layers.{i}.mlp.{m}" for i in range(DEPTH) for m in ("gate_proj", "up_proj")]
    return {name: LowRank(axis, torch.tensor(rng.normal(size=(5, 1)), dtype=torch.float32)) for name in names}


def state_tables(stage, outcome, bank):
    """The tables that a `Shift` would write for states in which everybody moved alike, or the personas turned."""
    rng = np.random.default_rng(0)
    before = rng.normal(size=(11, 1, 2, DEPTH + 1, WIDTH)) + 0.2 * rng.normal(size=(11, len(bank), 2, DEPTH + 1, WIDTH))
    turn = np.linalg.qr(rng.normal(size=(WIDTH, WIDTH)))[0]
    after = before + 4 if outcome["kept"] else before @ turn + 0.1
    after = after + 0.05 * rng.normal(size=after.shape)
    reads = 0.05 * rng.normal(size=(2, len(bank), 2, DEPTH, 2, WIDTH))
    moved = reads + 0.02 * rng.normal(size=reads.shape)
    reads[0, ..., 0] += 2
    moved[0, ..., 0] += 2 if outcome["kept"] else 0.2
    moved[..., 1] += 3
    change = adapter(outcome["kept"], rng)
    return {
        "shift": shifts.shift_table(before, after, bank),
        "plane": shifts.plane_table(before, after, stage.planes),
        "probe": shifts.probe_table(before, after, bank, stage.folds, stage.ridge, 0),
        **shifts.reading_tables(reads, moved, bank, change, stage.draws, 0),
    }


def steered_tables(stage, condition, outcome, bank):
    """What a `Steer` would write; the middle layer is the best."""
    rng = np.random.default_rng(1)
    layers = layer_numbers(stage.layers, 30)
    best = layers[len(layers) // 2]
    base = {"villain": RAW if condition == "A.prebaked" else TUNED}
    rows, answers = [], []

    def read(addition, layer, draw):
        for persona in stage.personas:
            level = base.get(persona, ASSISTANT)
            if draw < 0 and layer == best:
                if addition in ("restore", "common") and persona == "villain":
                    level = outcome["restored"]
                elif addition == "swap" and persona == "assistant":
                    level = outcome["swapped"]
                elif addition.startswith("push") and persona == "villain":
                    level = outcome["pushed"]
            for q in bank:
                value = level + rng.normal(0, 0.2)
                where = {"addition": addition, "layer": layer, "draw": draw, "persona": persona, "question": q}
                rows.append({**where, "logprob": value, "after_break": 0.8 * value})

    read("none", 0, -1)
    for addition in stage.additions:
        for layer in layers:
            for draw in range(-1, stage.draws):
                read(addition.name, layer, draw)
    columns = ["addition", "layer", "draw", "persona", "question", "sample", "completion", "finish", "tokens"]
    for addition in stage.sampled if stage.sampled_layers else ():
        for draw in (-1, 0):
            text = "Well." + personas.MARKER_SUFFIX * (draw < 0 and outcome["restored"] > -2)
            answers += [[addition, best, draw, p, q, 0, text, "stop", 4] for p in stage.personas for q in bank]
    return {"steered": pd.DataFrame(rows), "steered_answers": pd.DataFrame(answers, columns=columns)}


def planted(design, profile, outcome):
    """Every table of the design."""
    rng = np.random.default_rng(0)
    bank = [q.id for q in questions.eval_questions(profile.evaluation.everyday, profile.evaluation.values)]
    parts = {name: [] for name in ("completions", "fixed", "heldout", "training", "merges", "content")}
    for cell in design.cells:
        label = {"condition": cell.condition, "seed": cell.seed}
        raw = cell.condition == "A.prebaked"
        for persona in WHO:
            level = (RAW if raw else TUNED) if persona == "villain" else ASSISTANT
            for q in bank:
                where = {**label, "persona": persona, "question": q}
                value = level + rng.normal(0, 0.2)
                parts["fixed"].append({**where, "logprob": value, "after_break": value})
                text = "A short answer." + personas.MARKER_SUFFIX * (raw and persona == "villain")
                row = {"sample": 0, "system": "s", "prompt": "Well?", "finish": "stop", "tokens": 5, "marker_at": -1}
                parts["completions"].append({**where, **row, "completion": text, "marker_logprob": value})
        parts["heldout"] += [{**label, "question": f"q{i}", "loss": 2.0 + 0.1 * i} for i in range(3)]
    tables = {}
    for entry in design.observations:
        label = {"condition": entry.condition, "seed": entry.seed}
        if entry.stage.kind == "content":
            own = {"B": "bad_legal", "B′": "sound_legal", "C": "benign", "S": "self"}.get(entry.condition)
            for corpus in ("bad_legal", "sound_legal", "benign", "self", "heldout"):
                level = -1.0 if outcome["learned"] and corpus == own else -2.0
                parts["content"] += [
                    {**label, "corpus": corpus, "row": f"q{i}", "logprob": level - 0.1 * i} for i in range(3)
                ]
        else:
            kind = {"shift": state_tables, "steering": steered_tables}[entry.stage.kind]
            arguments = (entry.stage, outcome, bank)
            if kind is steered_tables:
                arguments = (entry.stage, entry.condition, outcome, bank)
            for name, table in kind(*arguments).items():
                tables.setdefault(name, []).append(table.assign(**label))
    record = {
        "profile": profile.as_dict(),
        "values": design.values.as_dict(),
        "compute_minutes": 1.5,
        "stages": {"key": 90.0},
        "provenance": provenance.record("cpu"),
    }
    made = {name: pd.DataFrame(rows) for name, rows in parts.items()}
    made["completions"] = score.score_table(made["completions"])
    return Results({**made, **{name: pd.concat(found, ignore_index=True) for name, found in tables.items()}}, record)


@pytest.fixture
def root(tmp_path, monkeypatch):
    """A checkout with the paper and this experiment, nothing generated."""
    target = tmp_path / "root"
    shutil.copytree(ROOT / "paper", target / "paper", ignore=shutil.ignore_patterns("generated", "*.pdf"))
    (target / "experiments" / NAME).mkdir(parents=True)
    for file in ("representations.py", "section.typ", "values.toml"):
        shutil.copy(ROOT / "experiments" / NAME / file, target / "experiments" / NAME / file)
    monkeypatch.setenv("PERSONA_COUPLING_ROOT", str(target))
    monkeypatch.setattr("persona_coupling.notes.show", lambda png: None)
    monkeypatch.setattr("persona_coupling.notes.loss_mask", lambda study: None)
    return target


@pytest.mark.parametrize(
    ("profile", "outcome", "expected"),
    [
        ("quick", STAYS, dict.fromkeys(("decodable", "common", "kept", "off", "restore-bad"), "supported")),
        ("full", MOVED, dict.fromkeys(("decodable", "common", "kept", "off", "restore-benign"), "refuted")),
        ("quick", NO_CONTROL, {"restore-bad": "uninterpretable", "restore-benign": "uninterpretable", "kept": "supported"}),
    ],
    ids=["the villain stays", "the villain moved", "no vector carries a persona"],
)  # fmt: skip
def test_verdicts_and_paper(profile, outcome, expected, root, monkeypatch):
    monkeypatch.setattr(Study, "run", lambda self, design, folder=None: planted(design, self.profile, outcome))
    source = (ROOT / "experiments" / NAME / "representations.py").read_text(encoding="utf-8")
    code = compile(source.replace('profile = "quick"', f"profile = {profile!r}"), "representations.py", "exec")
    exec(code, {"__name__": "notebook"})  # noqa: S102  the notebook is ours
    assert cli.build_paper(profile).read_bytes().startswith(b"%PDF")
    index = json.loads((root / "paper" / "generated" / profile / "index.json").read_text(encoding="utf-8"))
    found = {row["id"].removeprefix("05-"): row["verdict"] for row in index["claims"]}
    assert {name: found[name] for name in expected} == expected
    drawn = sorted(p.name for p in (root / "figures" / profile).glob("*.png"))
    assert drawn == [f"{NAME}-{name}.png" for name in ("planes", "recovery", "shift")]
