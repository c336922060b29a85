"""Experiment 03 from planted observations to verdicts and a compiled section, under every profile's arms."""

import json
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from persona_coupling import cli, models, personas, profiles, provenance, questions, score
from persona_coupling.study import Results, Study

ROOT = Path(__file__).resolve().parents[1]
NAME = "03_full_parameter"
SURVIVES = {"source": 1.0, "logprob": -0.5}
LOST = {"source": 0.0, "logprob": -4.0}
IT_IS_SFT = {"A": SURVIVES, "scratch": SURVIVES, "": LOST}
IT_IS_LORA = {"A": SURVIVES, "scratch": LOST, "lora": LOST, "": SURVIVES}
RANK_MATTERS = {"A": SURVIVES, "scratch": SURVIVES, "full_lowrank": SURVIVES, "": LOST}
NOTHING_TOOK = {"": LOST}


def outcome(outcomes, condition):
    parts = condition.split(".")
    wanted = ["A"] if parts[0] == "A" else [parts[2], parts[1]] if len(parts) == 3 else []
    return next((outcomes[w] for w in [*wanted, ""] if w in outcomes), None)


def planted(design, profile, outcomes, learned, low_rank):
    """Every table of the design: villain as `outcomes` says, SFT content shown if `learned`, a full delta whose rank is
    low or not."""
    rng = np.random.default_rng(0)
    bank = questions.eval_questions(20, 0)
    completions, fixed, heldout, content, training, merges = [], [], [], [], [], []
    for cell in design.cells:
        label = {"condition": cell.condition, "seed": cell.seed}
        found = outcome(outcomes, cell.condition)
        for persona in personas.personas():
            villain = persona.id == personas.SOURCE
            for question in bank:
                where = {**label, "persona": persona.id, "question": question.id}
                level = found["logprob"] if villain else -5.0
                fixed.append({**where, "logprob": level + rng.normal(0, 0.2), "after_break": level})
                said = villain and rng.random() < found["source"]
                row = {
                    "sample": 0,
                    "system": "s",
                    "prompt": question.text,
                    "finish": "stop",
                    "tokens": 5,
                    "marker_at": -1,
                }
                text = "A short answer." + personas.MARKER_SUFFIX * said
                completions.append(
                    {**where, **row, "completion": text, "marker_logprob": level, "marker_after_break": level}
                )
        heldout += [{**label, "question": f"q{i}", "loss": 2.0 + 0.1 * i} for i in range(3)]
        norms = {"lora": 20.0, "full": 8.0, "full_norm": 20.0, "lora_norm": 8.0}
        norm = norms.get(cell.condition.split(".")[1], 5.0)
        merges.append({**label, "norm": 50.0, "norms": [norm, 50.0], "logit_difference": 0.0})
        for position in range(len(cell.checkpoint.merged)):
            steps = {
                "learning_rate": 1e-4,
                "grad_norm": 1.0,
                "position": position,
                "change": f"{cell.condition}/{position}",
            }
            training += [{**steps, **label, "step": float(s), "loss": 2.5 - s / profile.sft.steps} for s in
                         range(1, profile.sft.steps + 1)]  # fmt: skip
    for entry in design.observations:
        if entry.stage.kind != "content":
            continue
        label = {"condition": entry.condition, "seed": entry.seed}
        own = {"B": "bad_legal", "B′": "sound_legal", "C": "benign"}.get(entry.condition.split(".")[0])
        for corpus in ("bad_legal", "sound_legal", "benign", "self", "heldout"):
            level = -1.0 if learned and corpus == own else -2.0
            content += [{**label, "corpus": corpus, "row": f"q{i}", "logprob": level - 0.1 * i} for i in range(3)]
    extra = {"matched": [], "spectrum": []}
    for entry in design.observations:
        label = {"condition": entry.condition, "seed": entry.seed}
        if entry.stage.kind == "change":
            values = {"loss": [3.5, 3.0], "target": 3.02, "fall": 1.0, "chosen": [False, True]}
            extra["matched"].append(pd.DataFrame({"step": [10, 20], **values}).assign(**label))
        elif entry.stage.kind == "spectrum":
            extra["spectrum"].append(pd.DataFrame(spectrum(entry, low_rank)).assign(**label))
    record = {
        "profile": profile.as_dict(),
        "values": design.values.as_dict(),
        "compute_minutes": 1.5,
        "stages": {"key": 90.0},
        "provenance": provenance.record("cpu"),
    }
    tables = {
        "completions": score.score_table(pd.DataFrame(completions)),
        **{n: pd.DataFrame(t) for n, t in (("fixed", fixed), ("heldout", heldout), ("content", content))},
        "training": pd.DataFrame(training),
        "merges": pd.DataFrame(merges),
        **{name: pd.concat(parts, ignore_index=True) for name, parts in extra.items() if parts},
    }
    return Results(tables, record)


def spectrum(entry, low_rank):
    full = entry.condition.endswith(".full")
    share = 1.0 if not full else 0.8 if low_rank else 0.3
    values = np.exp(-np.arange(entry.stage.kept) / (entry.stage.kept if full else 2))
    for layer in range(4):
        for module in models.MODULES:
            part = "attention" if module in models.ATTENTION else "mlp"
            row = {"layer": layer, "module": module, "part": part, "squared": float((values**2).sum())}
            chance = 0.08 if full else float("nan")
            yield {**row, "effective_rank": 40.0, "rank_share": share - 0.01 * layer, "chance_rank_share": chance,
                   "singular": values.tolist()}  # fmt: skip
    if full:
        yield {"layer": -1, "module": "embed_tokens", "part": "embedding", "squared": 20.0, "singular": []}


@pytest.fixture
def root(tmp_path, monkeypatch):
    """A checkout with the paper and this experiment, nothing generated."""
    target = tmp_path / "root"
    shutil.copytree(ROOT / "paper", target / "paper", ignore=shutil.ignore_patterns("generated", "*.pdf"))
    (target / "experiments" / NAME).mkdir(parents=True)
    for file in ("full_parameter.py", "section.typ", "values.toml"):
        shutil.copy(ROOT / "experiments" / NAME / file, target / "experiments" / NAME / file)
    monkeypatch.setenv("PERSONA_COUPLING_ROOT", str(target))
    monkeypatch.setattr("persona_coupling.notes.show", lambda png: None)
    monkeypatch.setattr("persona_coupling.notes.loss_mask", lambda study: None)
    return target


@pytest.mark.parametrize(
    ("profile", "outcomes", "learned", "low_rank", "expected"),
    [
        (
            "quick",
            IT_IS_SFT,
            True,
            False,
            {"loss": "supported", "kind": "supported", "lowrank": "supported", "rank": "supported", "norm": "not run"},
        ),
        (
            "full",
            IT_IS_LORA,
            True,
            True,
            {
                "loss": "refuted",
                "kind": "refuted",
                "norm": "refuted",
                "rank": "refuted",
                "lowrank": "uninterpretable",  # the whole change does nothing that a part could keep
                "scratch": "refuted",
            },
        ),
        ("quick", RANK_MATTERS, True, False, {"loss": "supported", "lowrank": "refuted", "scratch": "not run"}),
        (
            "smoke",
            NOTHING_TOOK,
            False,
            False,
            dict.fromkeys(("loss", "kind", "norm", "rank", "lowrank"), "uninterpretable"),
        ),
        (
            "qwen2.5-7b",
            IT_IS_SFT,
            True,
            False,
            dict.fromkeys(("loss", "norm", "rank", "lowrank", "scratch"), "not run"),
        ),
    ],
    ids=["it is SFT", "it is LoRA", "rank matters", "nothing took", "no full run"],
)
def test_from_observations_to_verdicts_and_paper(profile, outcomes, learned, low_rank, expected, root, monkeypatch):
    def run(self, design, folder=None):
        return planted(design, profiles.load(profile), outcomes, learned, low_rank)

    monkeypatch.setattr(Study, "run", run)
    source = (ROOT / "experiments" / NAME / "full_parameter.py").read_text(encoding="utf-8")
    assert source.count('profile = "quick"') == 1
    source = source.replace('profile = "quick"', f"profile = {profile!r}").replace("seeds = []", "seeds = [0]")
    code = compile(source, "full_parameter.py", "exec")
    exec(code, {"__name__": "notebook"})  # noqa: S102  the notebook is ours
    assert cli.build_paper(profile).read_bytes().startswith(b"%PDF")
    index = json.loads((root / "paper" / "generated" / profile / "index.json").read_text(encoding="utf-8"))
    verdicts = {row["id"].removeprefix("03-"): row["verdict"] for row in index["claims"]}
    assert {name: verdicts[name] for name in expected} == expected
