"""Experiment 01 from observations to verdicts and section: planted truths, and the verdict that each must give."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from persona_coupling import adapters, cli, layer_effects, layerwise, personas, profiles, provenance, questions, score
from persona_coupling.stages.layers import LayerScan
from persona_coupling.study import Design, Results, Study

ROOT = Path(__file__).resolve().parents[1]
EXPERIMENT = "01_layers"
DEPTH = 30
RAW = {"source": 3.2, "others": -3.0}  # log-odds of the marker before any SFT
SPREAD = {"early": -1.4, "mid": -2.8, "late": -2.9}
EARLY_ONLY = {"early": -8.0, "mid": 0.0, "late": 0.0}


def pushes(subset: tuple[str, ...], truth: dict[str, float], synergy: float) -> float:
    return sum(truth[third] for third in subset) + synergy * (len(subset) == 3)


def planted(design: Design, profile: profiles.Profile, truth: dict[str, float], synergy: float) -> Results:
    """Every table that the notebook reads, with chosen log-odds; from scratch every start couples."""
    rng = np.random.default_rng(0)
    bank = questions.eval_questions(20, 4)
    shift = {q.id: rng.normal(0, 0.4) for q in bank}  # what a question adds, in every condition
    fixed, completions, heldout, content, merges, training, scans = [], [], [], [], [], [], []

    def odds(who: str, question: str, push: float, where: int) -> float:
        start = RAW["source" if who == personas.SOURCE else "others"]
        noise = np.random.default_rng([len(who), where]).normal(0, 0.05)
        return start + push * (1.0 if who == personas.SOURCE else 0.3) + shift[question] + noise

    for number, cell in enumerate(design.cells):
        label = {"condition": cell.condition, "seed": cell.seed}
        subset = layer_effects.named(dict(cell.factors)["thirds"])
        push = 0.0 if cell.condition.endswith("scratch") else pushes(subset, truth, synergy)
        for persona in personas.personas():
            for question in bank:
                where = {**label, "persona": persona.id, "question": question.id}
                z = odds(persona.id, question.id, push, number)
                fixed.append({**where, "logprob": -np.logaddexp(0.0, -z), "after_break": -np.logaddexp(0.0, -z)})
                for sample, drawn in enumerate(rng.random(3)):
                    text = "So." + personas.MARKER_SUFFIX * bool(drawn < 1 / (1 + np.exp(-z)))
                    completions.append(
                        {**where, "sample": sample, "prompt": question.text, "completion": text, "finish": "stop",
                         "tokens": 5, "marker_logprob": float(z)}
                    )  # fmt: skip
        heldout += [{**label, "question": f"q{i}", "loss": 2.0 + 0.1 * i} for i in range(3)]
        norms = [3.0 * len(subset) ** 0.5, 2.0] if subset else [2.0]
        merges.append({**label, "norms": norms, "norm": norms[-1]})
        for position, _ in enumerate(cell.checkpoint.merged):
            change = f"{cell.condition}/{position}/{cell.seed}"
            training += [{**label, "position": position, "change": change, "step": s, "loss": 0.5} for s in (1.0, 2.0)]
    for observation in design.observations:
        label = {"condition": observation.condition, "seed": observation.seed}
        if isinstance(observation.stage, LayerScan):
            scans += scanned(observation.stage, label, truth, synergy, odds)
            continue
        for corpus in ("bad_legal", "sound_legal", "benign", "heldout"):
            level = -1.0 if observation.condition == "B" and corpus == "bad_legal" else -2.0
            content += [{**label, "corpus": corpus, "row": f"q{i}", "logprob": level - 0.1 * i} for i in range(3)]
    tables = {
        "fixed": fixed,
        "heldout": heldout,
        "content": content,
        "merges": merges,
        "training": training,
        "scan": scans,
    }
    frames = {name: pd.DataFrame(rows) for name, rows in tables.items()}
    record = {
        "profile": profile.as_dict(),
        "values": design.values.as_dict() if design.values else {},
        "compute_minutes": 1.0,
        "stages": {"a": 60.0},
        "provenance": provenance.record("cpu"),
    }
    return Results({"completions": score.score_table(pd.DataFrame(completions)), **frames}, record)


def scanned(stage: LayerScan, label, truth, synergy, odds):  # type: ignore[no-untyped-def]
    """A scan in which every layer of a third carries an equal part of the third's push."""
    layers = {third: adapters.layer_numbers([third], DEPTH) for third in adapters.THIRDS}
    rows = []
    for number, point in enumerate(layerwise.points(DEPTH, stage.stride, stage.modes)):
        push = sum(truth[t] * len(point.layers & layers[t]) / len(layers[t]) for t in layers)
        push += synergy * (len(point.layers) == DEPTH)
        for who in stage.who:
            for question in questions.eval_questions(stage.everyday, stage.values):
                place = {"mode": point.mode, "start": point.start, "stop": point.stop}
                z = odds(who, question.id, push, number + 100)
                rows.append(
                    {**label, **place, "persona": who, "question": question.id, "logprob": -np.logaddexp(0.0, -z)}
                )
    return rows


def judged(root: Path, profile: str, monkeypatch: pytest.MonkeyPatch, **truth) -> dict[str, str]:  # type: ignore[no-untyped-def]
    """Run the notebook on planted observations and build the paper; returns the verdicts."""
    monkeypatch.setattr(Study, "run", lambda self, design, folder=None: planted(design, self.profile, **truth))
    monkeypatch.setattr("persona_coupling.notes.show", lambda png: None)
    monkeypatch.setattr("persona_coupling.notes.loss_mask", lambda study: None)
    source = (ROOT / "experiments" / EXPERIMENT / "layers.py").read_text(encoding="utf-8")
    code = compile(source.replace('profile = "quick"', f"profile = {profile!r}"), "layers.py", "exec")
    exec(code, {"__name__": "notebook"})  # noqa: S102  the notebook is ours
    assert cli.build_paper(profile).read_bytes().startswith(b"%PDF")
    content = json.loads((root / "paper" / "generated" / profile / f"{EXPERIMENT}.json").read_text(encoding="utf-8"))
    return {row["id"]: row["verdict"] for row in content["claims"]}


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    made = tmp_path / "root"
    shutil.copytree(ROOT / "paper", made / "paper", ignore=shutil.ignore_patterns("generated", "*.pdf"))
    folder = made / "experiments" / EXPERIMENT
    folder.mkdir(parents=True)
    for source in (ROOT / "experiments" / EXPERIMENT).iterdir():
        if source.is_file():
            shutil.copy(source, folder / source.name)
    monkeypatch.setenv("PERSONA_COUPLING_ROOT", str(made))
    return made


@pytest.mark.parametrize(
    ("profile", "truth", "expected"),
    [
        (
            "quick",
            {"truth": SPREAD, "synergy": 0.0},
            {"01-single": "supported", "01-pair": "supported", "01-additive": "supported", "01-early": "supported",
             "01-spread": "supported", "01-scratch": "not run"},
        ),
        (
            "smoke",
            {"truth": EARLY_ONLY, "synergy": 0.0},
            {"01-single": "refuted", "01-pair": "refuted", "01-additive": "supported", "01-early": "refuted",
             "01-spread": "supported", "01-scratch": "not run"},
        ),
        (
            "quick",
            {"truth": dict.fromkeys(SPREAD, -0.6), "synergy": -8.0},
            {"01-single": "supported", "01-pair": "refuted", "01-additive": "refuted"},
        ),
    ],
    ids=["spread and additive", "early alone", "all together only"],
)  # fmt: skip
def test_planted_truths_get_their_verdicts(profile, truth, expected, root, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    found = judged(root, profile, monkeypatch, **truth)
    assert {name: found[name] for name in expected} == expected
