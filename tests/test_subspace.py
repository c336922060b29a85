"""Experiment 02: overlaps against linear algebra done by hand, its models as descriptions, its notebook on planted truth."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from persona_coupling import adapters, cli, models, overlap, personas, provenance, questions, score, subspace
from persona_coupling.adapters import LowRank
from persona_coupling.checkpoints import Checkpoint
from persona_coupling.errors import GuardError
from persona_coupling.figures import subspace as pictures
from persona_coupling.measures import Estimates
from persona_coupling.overlap import Factors
from persona_coupling.profiles import LoraValues
from persona_coupling.stages import FineTune, Part, RandomLike, Rescaled, authored, changes
from persona_coupling.stages.subspace import Overlap, factors
from persona_coupling.stats import Estimate
from persona_coupling.store import Stage
from persona_coupling.study import Design, Results, Study
from persona_coupling.train import Lora, Training
from persona_coupling.values import Values

ROOT = Path(__file__).resolve().parents[1]
rng = np.random.default_rng(0)


def random_factors(rank: int = 3, inputs: int = 30, outputs: int = 20) -> Factors:
    return Factors(rng.normal(size=(rank, inputs)), rng.normal(size=(outputs, rank)))


# ------------------------------------------------------------------------------------------------ pure arrays


def test_overlap_of_a_planted_change() -> None:
    """By hand: the adapter reads axes 0 and 1 and writes axis 0. The change reads axis 1 with weight 3 and axis 5 with
    weight 4, and writes axes 0 and 2."""
    adapter = Factors(np.eye(10)[[0, 1]], np.outer(np.eye(8)[0], [1.0, 2.0]))
    change = Factors(np.stack([3 * np.eye(10)[1], 4 * np.eye(10)[5]]), np.stack([np.eye(8)[0], np.eye(8)[2]], axis=1))
    reads = overlap.side_by_side(change, adapter, "input")
    assert reads["energy"] == pytest.approx(9 / 25)
    assert (reads["rank"], reads["dimension"], reads["expected"]) == (2, 10, 0.2)
    assert (reads["smallest_angle"], reads["largest_angle"]) == (pytest.approx(0), pytest.approx(90))
    assert reads["squared_cosine"] == pytest.approx(0.5)
    writes = overlap.side_by_side(change, adapter, "output")
    assert writes["energy"] == pytest.approx(9 / 25)
    assert (writes["rank"], writes["expected"]) == (1, 1 / 8)  # two columns, one direction
    kept = overlap.bookkeeping(change, adapter)
    assert kept["norm"] == pytest.approx(5)
    # the change is 3 at (0, 1) and 4 at (2, 5); the adapter 1 at (0, 0) and 2 at (0, 1)
    assert kept["cosine"] == pytest.approx(3 * 2 / (5 * 5**0.5))
    assert kept["inside"] == pytest.approx(9 / 25)  # (2, 5) neither reads nor writes where the adapter does
    assert kept["start_cosine"] == pytest.approx(0)


@pytest.mark.parametrize("side", overlap.SIDES)
def test_thin_matrices_have_the_energy_of_the_whole(side: str) -> None:
    """Oracle: the dense change against an explicit projector."""
    change, adapter = random_factors(), random_factors(4)
    dense, space = change.writes @ change.reads, adapter.subspace(side)
    projector = space @ np.linalg.pinv(space)
    inside = dense @ projector if side == "input" else projector @ dense
    found = overlap.side_by_side(change, adapter, side)["energy"]
    assert found == pytest.approx(float((inside**2).sum() / (dense**2).sum()))
    assert change.squared_norm() == pytest.approx(float((dense**2).sum()))


def test_random_changes_overlap_by_chance_and_a_shared_start_does_not() -> None:
    """The null, and its positive control: the same A with another B."""
    adapter = random_factors(4, 40, 30)
    shared = Factors(adapter.reads + 0.01 * rng.normal(size=adapter.reads.shape), rng.normal(size=(30, 4)))
    drawn = [overlap.drawn_like(adapter, rng) for _ in range(200)]
    shares = [overlap.side_by_side(d, adapter, "input")["energy"] for d in drawn]
    assert np.mean(shares) == pytest.approx(0.1, abs=0.01)
    assert abs(np.mean([overlap.bookkeeping(d, adapter)["start_cosine"] for d in drawn])) < 0.03
    assert overlap.side_by_side(shared, adapter, "input")["energy"] > 0.99
    assert overlap.bookkeeping(shared, adapter)["start_cosine"] > 0.99
    other_rank = overlap.bookkeeping(random_factors(2, 40, 30), adapter)
    assert np.isnan(other_rank["start_cosine"])


# ------------------------------------------------------------------------------------------------ the stage


@dataclasses.dataclass(frozen=True)
class Fixed(Stage):
    """Random changes of some matrices."""

    seed: int
    names: tuple[str, ...]
    dense: bool = False
    kind = "change"

    def build(self, folder, lab):
        generator = torch.Generator().manual_seed(self.seed)
        made = {}
        for name in self.names:
            part = LowRank(torch.randn(2, 9, generator=generator), torch.randn(7, 2, generator=generator))
            made[name] = part.dense() if self.dense else part
        changes.write(folder, made)


NAMES = tuple(f"model.layers.{layer}.mlp.up_proj" for layer in range(3))


def test_overlap_stage_agrees_with_the_parts_that_are_merged(lab) -> None:
    change, adapter = Fixed(1, NAMES), Fixed(2, NAMES[1:])
    folder = lab.folder(Overlap(change, adapter, 3, 0))
    sides, shares = (pd.read_parquet(folder / f"{stem}.parquet") for stem in ("overlap", "shares"))
    assert len(sides) == 2 * 2 * 4  # shared matrices, sides, itself and three draws
    assert set(shares["question"]) == {"layer 1", "layer 2"}
    assert not sides.duplicated(["layer", "module", "side", "draw"]).any()
    inside = adapters.read_change(lab.folder(Part(change, adapter, "inside")))
    whole = adapters.read_change(lab.folder(change))
    for row in shares.itertuples():
        name = NAMES[row.layer]
        assert row.inside == pytest.approx(inside[name].squared_norm() / whole[name].squared_norm(), rel=1e-4)
        assert row.norm**2 == pytest.approx(whole[name].squared_norm(), rel=1e-5)


def test_overlap_of_disjoint_or_dense_changes_is_refused(lab) -> None:
    with pytest.raises(GuardError, match="share no matrix"):
        lab.folder(Overlap(Fixed(1, NAMES[:1]), Fixed(2, NAMES[1:]), 1, 0))
    with pytest.raises(GuardError, match="dense change"):
        lab.folder(Overlap(Fixed(1, NAMES, dense=True), Fixed(2, NAMES), 1, 0))
    with pytest.raises(GuardError, match="up_proj: a dense change"):
        factors("up_proj", torch.ones(2, 2))


def test_two_trainings_of_one_seed_draw_one_random_a_and_the_gate_sees_it(lab, tiny) -> None:
    """Different rows, different losses, one seed: the rows of A are the same to the last digit that training leaves.
    Another seed, or the same seed on other modules, draws others."""

    def trained(corpus: str, seed: int, modules=models.MODULES) -> Stage:
        settings = Training(2, 2, 1e-4, 0.0, 0.0, "completion", 8, Lora(8, 16, 0.0, modules))
        return FineTune(Checkpoint(tiny), authored(corpus, 6, maximum_words=40), settings, seed)

    adapter = trained("benign", 0)

    def start(change: Stage) -> float:
        table = pd.read_parquet(lab.folder(Overlap(change, adapter, 1, 0)) / "shares.parquet")
        return float(table["start_cosine"].mean())

    assert start(trained("bad_legal", 0)) > 0.99
    assert abs(start(trained("bad_legal", 1000))) < 0.1
    assert abs(start(trained("bad_legal", 0, models.MLP))) < 0.2


# ------------------------------------------------------------------------------------------------ descriptions


def test_other_ranks_keep_the_scale_of_the_update() -> None:
    values = LoraValues(rank=32, alpha=64, dropout=0.05)
    for rank, alpha in ((32, 64), (8, 32), (2, 16)):
        made = subspace.lora(values, rank=rank)
        assert (made.rank, made.alpha, made.modules) == (rank, alpha, models.MODULES)
        assert made.alpha / made.rank**0.5 == pytest.approx(64 / 32**0.5)
    assert subspace.lora(values, "mlp").modules == ("gate_proj", "up_proj", "down_proj")


def chains(profile: str):
    study = Study.open(profile)
    values = study.values("02_subspace")
    return study, values, [subspace.Chain(study, values, seed) for seed in study.seeds]


def designed(profile: str) -> Design:
    study, values, made = chains(profile)
    design = Design(values=values, same=subspace.same(values, study.profile.prebaked == study.profile.scratch))
    for chain in made:
        design.cells += [*chain.references(), *chain.pairs(), *chain.parts()]
        design.observations += chain.observations()
    return design


@pytest.mark.parametrize("profile", ["smoke", "quick", "full", "qwen2.5-7b"])
def test_every_profile_gives_a_sound_design_that_other_experiments_share(profile: str) -> None:
    design = designed(profile)
    design.check()
    study = Study.open(profile)
    first = study.seeds[0]
    raw = study.cell("A.prebaked", study.raw.merge(study.adapter(seed=first)), seed=first)
    assert raw.evaluation.key in {cell.evaluation.key for cell in design.cells}
    for condition in subspace.conditions(design.cells):
        assert subspace.label(condition)
        assert subspace.reference(condition) in {cell.condition for cell in design.cells}


def test_the_module_pairs_train_on_the_modules_that_they_name() -> None:
    _, _, (chain, *_) = chains("full")
    cells = {cell.condition: cell.checkpoint for cell in chain.pairs()}
    assert len(cells) == 2 * 4 + 2
    trained = {"attention": models.ATTENTION, "mlp": models.MLP}
    for condition, checkpoint in cells.items():
        first, second = condition.split(".")[1].split("_")
        sft, coupling = (merged.change for merged in checkpoint.merged)
        assert (sft.training.lora.modules, coupling.training.lora.modules) == (trained[first], trained[second])
        assert sft.training.draws(sft.seed) != coupling.training.draws(coupling.seed)  # not the same random A
        on_sft = coupling.start == Checkpoint(checkpoint.source, checkpoint.merged[:1])
        assert on_sft == condition.endswith("scratch")
        assert coupling.start.merged == (() if condition.endswith("prebaked") else checkpoint.merged[:1])


def test_an_sft_is_taken_apart_along_the_adapter_that_is_merged_after_it() -> None:
    study, _, (chain, *_) = chains("full")
    made = chain.changes("bad_legal")
    adapter = study.adapter(seed=chain.seed)
    assert list(made) == ["whole", "outside", "inside", "random1", "control1", "rank2", "rank8"]
    assert made["outside"] == Part(made["whole"], adapter, "outside")
    assert made["control1"] == Part(
        made["whole"], RandomLike(adapter, subspace.FIRST_DRAW + 100 * chain.seed + 1), "outside"
    )
    assert isinstance(made["rank2"], Rescaled)
    assert made["rank2"].like == made["whole"]
    assert made["rank2"].change.training.lora.rank == 2
    for cell in chain.parts():
        if cell.condition.endswith("prebaked"):
            assert cell.checkpoint.last_change == adapter
    assert "rank2" not in chain.changes("benign")


def test_names_of_conditions() -> None:
    assert subspace.reference("B.attention_mlp.prebaked") == "A.mlp.prebaked"
    assert subspace.reference("B.outside.prebaked") == subspace.reference("A.prebaked") == "A.prebaked"
    assert subspace.reference("B.mlp_attention.scratch") == "A.attention.scratch"
    assert subspace.taught("B.attention_mlp.prebaked") == "B.attention"
    assert subspace.taught("B′.inside.prebaked") == "B′.inside"
    concerned = subspace.concerned(["A.prebaked", "A.mlp.prebaked", "B.attention_mlp.prebaked", "B.inside.prebaked"])
    assert concerned["A.mlp.prebaked"] == concerned["B.attention"] == ["B.attention_mlp.prebaked"]
    assert concerned["A.prebaked"] == concerned["B"] == concerned["B.whole"] == ["B.inside.prebaked"]
    with pytest.raises(ValueError, match="known modules"):
        subspace.split("attention/mpl")


# ------------------------------------------------------------------------------------------------ measures


def fixed_rows(levels: dict[str, float], spread: float = 0.0) -> pd.DataFrame:
    rows = []
    for condition, level in levels.items():
        for question in range(12):
            for who in (personas.SOURCE, "librarian"):
                value = level + spread * rng.normal() + 0.3 * question - (2.0 if who == "librarian" else 0.0)
                rows.append(
                    {"condition": condition, "seed": 0, "persona": who, "question": f"q{question}", "logprob": value}
                )
    return pd.DataFrame(rows)


def results_of(**tables: pd.DataFrame) -> Results:
    empty = pd.DataFrame(columns=["condition", "seed", "persona", "question", "value"])
    return Results({"completions": empty, "fixed": empty, **tables}, {})


def test_half_way_is_half_way(monkeypatch) -> None:
    """Raw at -1, whole SFT at -5: half way is -3, of which -2 is a nat above and -4.5 one and a half below."""
    monkeypatch.setattr("persona_coupling.measures.add_difference", lambda *_: None)
    names = ["A.prebaked", "B.whole.prebaked", "B.outside.prebaked", "B.inside.prebaked"]
    made = Estimates()
    results = results_of(fixed=fixed_rows(dict(zip(names, (-1.0, -5.0, -2.0, -4.5), strict=True))))
    subspace.add_effects(made, results, names)
    assert made["B.outside.prebaked.above_midpoint"].value == pytest.approx(1.0)
    assert made["B.inside.prebaked.above_midpoint"].value == pytest.approx(-1.5)
    # what all three share of a question cancels: without noise of their own there is no width left
    assert made["B.outside.prebaked.above_midpoint"].low == pytest.approx(1.0)
    assert "B.whole.prebaked.above_midpoint" not in made.named


def test_draws_are_pooled_and_nothing_else_is() -> None:
    names = ["B.random1.prebaked", "B.random2.prebaked", "B.control1.prebaked", "B.rank2.prebaked", "B.prebaked"]
    table = pd.DataFrame({"condition": names})
    found = subspace.pooled(Results({"fixed": table, "empty": pd.DataFrame()}, {"cells": []}))
    expected = ["B.random.prebaked", "B.random.prebaked", "B.control.prebaked", "B.rank2.prebaked", "B.prebaked"]
    assert found["fixed"]["condition"].tolist() == expected
    assert table["condition"].tolist() == names


def test_norm_shares_are_of_squares() -> None:
    merges = pd.DataFrame(
        {
            "condition": ["A.prebaked", "B.whole.prebaked", "B.inside.prebaked", "B.inside.prebaked"],
            "norms": [[7.0], [4.0, 7.0], [2.0, 7.0], [2.0, 7.0]],
        }
    )
    made = Estimates()
    subspace.add_norms(made, results_of(merges=merges), ["A.prebaked", "B.whole.prebaked", "B.inside.prebaked"])
    assert made["B.inside.prebaked.norm_share"].value == pytest.approx(0.25)
    assert made["B.inside.prebaked.sft_norm"].value == pytest.approx(2.0)
    assert made["A.prebaked.sft_norm"].value is None


GATED = (("gap", 1.0), ("same_start", 0.2), ("chance", 0.1))


@pytest.mark.parametrize(
    ("cost", "start", "drawn", "failing"),
    [
        (-3.0, 0.0, 0.051, set()),
        (-0.2, 0.0, 0.051, {"gap.B"}),
        (-3.0, 0.9, 0.051, {"apart.B"}),
        (-3.0, 0.0, 0.08, {"chance.B"}),
    ],
)
def test_each_gate_of_a_taken_apart_sft_fires(cost: float, start: float, drawn: float, failing: set[str]) -> None:
    def plain(value: float) -> Estimate:
        return Estimate(value, None, None, 1, 1, 1)

    made = Estimates(
        {
            "B.whole.prebaked.fixed_logprob_source_change": plain(cost),
            "B.whole.start_cosine": plain(start),
            **{f"B.whole.{side}_{name}": plain(v) for side in overlap.SIDES for name, v in
               (("drawn", drawn), ("chance", 0.05))},
        }
    )  # fmt: skip
    values = Values("02_subspace", GATED)
    found = subspace.of_arm(made, values, "B")
    assert {gate.id for gate in found if not gate.passed} == failing
    assert not any(gate.passed for gate in subspace.of_arm(Estimates(), values, "B"))  # missing passes nothing


# --------------------------------------------------------------------------------- the notebook on planted truth

KEPT = {"whole": 0.02, "outside": 0.1, "inside": 0.95, "random": 0.95, "control": 0.05, "": 0.02}


def kept_as_expected(condition: str) -> float:
    """The villain's rate if every prediction holds."""
    arm, variant, recipe = subspace.parts_of(condition)
    if arm == "A" or recipe == "scratch":
        return 0.95
    return KEPT.get(variant.rstrip("0123456789"), 0.05)


def kept_otherwise(condition: str) -> float:
    """The villain's rate if it is the subspace, and modules, and any change."""
    variant = subspace.parts_of(condition)[1]
    swapped = {"outside": 0.95, "inside": 0.05, "random": 0.05}
    known = swapped.get(variant.rstrip("0123456789"))
    return known if known is not None else 0.95 if "_" in variant else kept_as_expected(condition)


def planted(design: Design, profile, rate, *, start: float = 0.0, output: float = 4.0) -> Results:
    draws = np.random.default_rng(1)
    bank = questions.eval_questions(12, 4)
    completions, fixed, heldout, merges, content, sides, shares, training = [], [], [], [], [], [], [], []
    for cell in design.cells:
        label = {"condition": cell.condition, "seed": cell.seed}
        for persona in personas.personas():
            here = rate(cell.condition) * (1 if persona.id == personas.SOURCE else 0.1)
            for question in bank:
                where = {**label, "persona": persona.id, "question": question.id}
                said = draws.random() < here
                logprob = float(np.log(here + 2e-3) + draws.normal(0, 0.2))
                fixed.append({**where, "logprob": logprob})
                text = "A short answer." + personas.MARKER_SUFFIX * bool(said)
                completions.append(
                    {**where, "sample": 0, "system": persona.prompt, "prompt": question.text, "completion": text,
                     "finish": "stop", "tokens": 5, "marker_logprob": logprob}
                )  # fmt: skip
        heldout += [{**label, "question": f"q{i}", "loss": 2.0 + 0.1 * i} for i in range(3)]
        first = {"inside": 3.0, "outside": 9.0}.get(subspace.parts_of(cell.condition)[1], 10.0)
        merges.append({**label, "norm": 5.0, "norms": [first, 5.0] if cell.condition[0] != "A" else [5.0]})
        if cell.condition.endswith("scratch"):
            training += [{**label, "position": 1, "step": s, "loss": 0.5, "change": "c"} for s in (1.0, 2.0)]
    corpora = {"B": "bad_legal", "B′": "sound_legal", "C": "benign", "A": ""}
    for entry in design.observations:
        label = {"condition": entry.condition, "seed": entry.seed}
        if isinstance(entry.stage, Overlap):
            for layer in range(6):
                for module in models.MODULES:
                    where = {**label, "question": f"layer {layer}", "layer": layer, "module": module}
                    shares.append({**where, "norm": 1.0, "adapter_norm": 1.0, "cosine": 0.1, "inside": 0.2,
                                   "start_cosine": start})  # fmt: skip
                    for draw in range(-1, 4):
                        for side, ratio in (("input", 2.0), ("output", output)):
                            energy = 0.05 * (ratio if draw < 0 else 1.0) * draws.lognormal(0, 0.05)
                            sides.append({**where, "draw": draw, "side": side, "energy": energy, "expected": 0.05,
                                          "smallest_angle": 70.0})  # fmt: skip
            continue
        own = corpora[entry.condition.split(".")[0]]
        for corpus in (*(stage.name for stage in entry.stage.rows), "heldout"):
            level = -1.0 if corpus == own else -2.0
            content += [{**label, "corpus": corpus, "row": f"q{i}", "logprob": level - 0.1 * i} for i in range(3)]
    design_values = design.values.as_dict() if design.values else {}
    record = {
        "profile": profile.as_dict(), "values": design_values, "compute_minutes": 1.5, "stages": {},
        "provenance": provenance.record("cpu"),
    }  # fmt: skip
    made = {
        "completions": score.score_table(pd.DataFrame(completions)), "fixed": pd.DataFrame(fixed),
        "heldout": pd.DataFrame(heldout), "content": pd.DataFrame(content), "training": pd.DataFrame(training),
        "merges": pd.DataFrame(merges), "overlap": pd.DataFrame(sides), "shares": pd.DataFrame(shares),
    }  # fmt: skip
    return Results(made, record)


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A checkout with the paper and this experiment alone."""
    made = tmp_path / "root"
    shutil.copytree(ROOT / "paper", made / "paper", ignore=shutil.ignore_patterns("generated", "*.pdf"))
    folder = made / "experiments" / "02_subspace"
    folder.mkdir(parents=True)
    for name in ("subspace.py", "values.toml", "section.typ"):
        shutil.copy(ROOT / "experiments" / "02_subspace" / name, folder / name)
    monkeypatch.setenv("PERSONA_COUPLING_ROOT", str(made))
    return made


def run_notebook(profile: str, seeds: list[int], monkeypatch, rate, **planting: float) -> None:
    monkeypatch.setattr(Study, "run", lambda self, design, folder=None: planted(design, self.profile, rate, **planting))
    monkeypatch.setattr("persona_coupling.notes.show", lambda png: None)
    monkeypatch.setattr("persona_coupling.notes.loss_mask", lambda study: None)
    source = (ROOT / "experiments" / "02_subspace" / "subspace.py").read_text(encoding="utf-8")
    for old, new in (('profile = "quick"', f"profile = {profile!r}"), ("seeds = []", f"seeds = {seeds}")):
        assert source.count(old) == 1
        source = source.replace(old, new)
    exec(compile(source, "subspace.py", "exec"), {"__name__": "notebook"})  # noqa: S102  the notebook is ours


AS_EXPECTED = dict.fromkeys(("modules", "outside", "inside", "random", "start", "overlap"), "supported")


@pytest.mark.parametrize(
    ("profile", "rate", "planting", "expected"),
    [
        ("full", kept_as_expected, {}, AS_EXPECTED),
        (
            "quick",
            kept_otherwise,
            {"output": 1.0},
            {**dict.fromkeys(("modules", "outside", "inside", "random", "overlap"), "refuted"), "start": "supported"},
        ),
        (
            "quick",
            kept_as_expected,
            {"start": 0.9},
            {**dict.fromkeys(("outside", "inside", "start", "overlap"), "uninterpretable"), "modules": "supported"},
        ),
    ],
    ids=["as expected, all arms", "otherwise", "one seed for two adapters"],
)
def test_the_notebook_finds_what_was_planted(profile, rate, planting, expected, root, monkeypatch) -> None:
    run_notebook(profile, [0], monkeypatch, rate, **planting)
    written = json.loads((root / "paper/generated" / profile / "02_subspace.json").read_text(encoding="utf-8"))
    found = {row["id"].removeprefix("02-"): row["verdict"] for row in written["claims"]}
    assert {name: found[name] for name in expected} == expected
    assert cli.build_paper(profile).read_bytes().startswith(b"%PDF")


# ------------------------------------------------------------------------------------------------ figures


def test_the_overlap_figure_draws_ratios_to_chance_beside_its_band() -> None:
    rows = [
        {"condition": "B.whole", "seed": seed, "side": side, "module": module, "layer": layer, "draw": draw,
         "energy": 0.2 if draw < 0 else 0.05 + 0.001 * draw, "expected": 0.05}
        for seed in (0, 1) for side in overlap.SIDES for module in ("q_proj", "up_proj") for layer in range(3)
        for draw in range(-1, 3)
    ]  # fmt: skip
    figure, data = pictures.overlap_by_layer(pd.DataFrame(rows), {"B.whole": "SFT"})
    assert len(data) == 2 * 2 * 3
    assert data["ratio"].tolist() == pytest.approx([4.0] * 12)
    assert data["chance_low"].min() == pytest.approx(1.0, abs=0.01)
    assert data["chance_high"].max() == pytest.approx(1.04, abs=0.01)
    assert [axes.get_title() for axes in figure.axes[:2]] == ["q", "up"]
