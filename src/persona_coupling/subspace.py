"""Experiment 02's models and measures: SFT and coupling on chosen modules, an SFT taken apart along the adapter's
subspaces, and what of the adapter is left.

Conditions are `arm.variant.prebaked` (or `.scratch`). Variants: `whole` (the SFT that is taken apart), `outside`, `inside`,
`random1`... (a change of the same norms and rank), `control1`... (outside of random subspaces), `rank2`..., and
`attention_mlp` (modules of the SFT, then of the coupling).
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd

from persona_coupling import arms, measures, models
from persona_coupling.checkpoints import Checkpoint
from persona_coupling.claims import Gate
from persona_coupling.measures import Estimates
from persona_coupling.overlap import SIDES
from persona_coupling.personas import SOURCE
from persona_coupling.profiles import LoraValues
from persona_coupling.stages import Part, RandomLike, Rescaled
from persona_coupling.stages.subspace import Overlap
from persona_coupling.stats import Estimate
from persona_coupling.store import Stage
from persona_coupling.study import Cell, Observation, Results, Study
from persona_coupling.train import Lora, Training
from persona_coupling.values import Values

MODULE_SETS = {"all": models.MODULES, "attention": models.ATTENTION, "mlp": models.MLP}
NAMES = {"all": "all modules", "attention": "attention", "mlp": "MLP"}
FIRST_DRAW = 70_000  # seeds of random changes: far from those of trainings, whose first numbers would be the same


def lora(values: LoraValues, modules: str = "all", rank: int | None = None) -> Lora:
    """The profile's adapter settings on some modules; at another rank with the alpha that keeps alpha / sqrt(rank), the
    scale of the update, as near as a whole number can."""
    rank = rank or values.rank
    alpha = values.alpha if rank == values.rank else round(values.alpha * (rank / values.rank) ** 0.5)
    return Lora(rank, alpha, values.dropout, MODULE_SETS[modules])


def split(pair: str) -> tuple[str, str]:
    """`attention/mlp` as (modules of the SFT, modules of the coupling). Raises ValueError for unknown ones."""
    first, second = pair.split("/")
    if not {first, second} <= set(MODULE_SETS):
        raise ValueError(f"{pair}: known modules are {', '.join(MODULE_SETS)}")
    return first, second


@dataclass(frozen=True)
class Chain:
    """All models of experiment 02 under one seed, as descriptions."""

    study: Study
    values: Values
    seed: int

    def _training(self, of: str, modules: str, rank: int | None = None) -> Training:
        profile = self.study.profile
        values = {"sft": profile.sft, "prebaked": profile.prebaked, "scratch": profile.scratch}[of]
        return replace(self.study.training(values), lora=lora(profile.lora, modules, rank))

    def sft(self, corpus: str, modules: str = "all", rank: int | None = None) -> Checkpoint:
        """The raw model after SFT; on all modules at the profile's rank, experiment 00's."""
        rows = self.study.corpus(corpus, seed=self.seed)
        return self.study.raw.fine_tune(rows, self._training("sft", modules, rank), seed=self.seed)

    def together(self, corpus: str) -> Checkpoint:
        """The raw model after the same SFT from the adapter's own random A."""
        training = replace(self._training("sft", "all"), start=self.study.profile.prebaked.start)
        return self.study.raw.fine_tune(self.study.corpus(corpus, seed=self.seed), training, seed=self.seed)

    def adapter(self, modules: str = "all") -> Stage:
        """The pre-baked adapter on some modules."""
        return self.coupled(self.study.raw, modules, "prebaked").last_change

    def coupled(self, start: Checkpoint, modules: str, recipe: str = "scratch") -> Checkpoint:
        """`start` after coupling, on some modules, on text that the raw model wrote."""
        text = self.study.stale_text(seed=self.seed)
        return start.fine_tune(text, self._training(recipe, modules), seed=self.seed)

    def cell(self, condition: str, checkpoint: Checkpoint) -> Cell:
        """A condition to evaluate, with its arm and variant as factors."""
        arm, variant, _ = parts_of(condition)
        return self.study.cell(condition, checkpoint, seed=self.seed, arm=arm, variant=variant)

    def references(self) -> list[Cell]:
        """The raw model with every adapter that is used, and coupled from scratch on its modules."""
        cells = [self.cell("A.prebaked", self.study.raw.merge(self.adapter()))]
        for modules in coupled_modules(self.values.pairs):
            cells.append(self.cell(f"A.{modules}.prebaked", self.study.raw.merge(self.adapter(modules))))
        for modules in coupled_modules(self.values.scratch_pairs):
            cells.append(self.cell(f"A.{modules}.scratch", self.coupled(self.study.raw, modules)))
        if self.values.random_scratch:
            cells.append(self.cell("A.scratch", self.coupled(self.study.raw, "all")))
        return cells

    def pairs(self) -> list[Cell]:
        """SFT on some modules, coupling on the same or on others."""
        values, cells = self.values, []
        for corpus in values.pair_corpora:
            for pair in values.pairs:
                first, second = split(pair)
                model = self.sft(corpus, first).merge(self.adapter(second))
                cells.append(self.cell(f"{arms.LETTERS[corpus]}.{first}_{second}.prebaked", model))
        for corpus in values.scratch_corpora:
            for pair in values.scratch_pairs:
                first, second = split(pair)
                model = self.coupled(self.sft(corpus, first), second)
                cells.append(self.cell(f"{arms.LETTERS[corpus]}.{first}_{second}.scratch", model))
        return cells

    def changes(self, corpus: str) -> dict[str, Stage]:
        """The SFT and its parts, likenesses and ranks, by variant."""
        values, whole, adapter = self.values, self.sft(corpus).last_change, self.adapter()
        made: dict[str, Stage] = {
            "whole": whole,
            "outside": Part(whole, adapter, "outside"),
            "inside": Part(whole, adapter, "inside"),
        }
        for number in range(1, values.random_draws + 1):
            made[f"random{number}"] = RandomLike(whole, self._draw(number))
        for number in range(1, values.control_draws + 1 if corpus in values.control_corpora else 1):
            made[f"control{number}"] = Part(whole, RandomLike(adapter, self._draw(number)), "outside")
        for rank in values.ranks if corpus in values.rank_corpora else ():
            made[f"rank{rank}"] = Rescaled(self.sft(corpus, rank=rank).last_change, whole)
        return made

    def _twice(self, corpus: str) -> bool:
        """Whether an SFT that started from the adapter's own random A stands beside."""
        return bool(self.values.together) and corpus in self.values.control_corpora

    def _draw(self, number: int) -> int:
        return FIRST_DRAW + 100 * self.seed + number

    def parts(self) -> list[Cell]:
        """The adapter on the raw model with an SFT, its parts or its likenesses merged first."""
        cells, raw = [], self.study.raw
        for corpus in self.values.corpora:
            arm = arms.LETTERS[corpus]
            if self._twice(corpus):
                cells.append(self.cell(f"{arm}.prebaked", self.together(corpus).merge(self.adapter())))
            for variant, change in self.changes(corpus).items():
                cells.append(self.cell(f"{arm}.{variant}.prebaked", raw.merge(change).merge(self.adapter())))
        for corpus in self.values.random_scratch:
            start = raw.merge(RandomLike(self.sft(corpus).last_change, self._draw(1)))
            cells.append(self.cell(f"{arms.LETTERS[corpus]}.random.scratch", self.coupled(start, "all")))
        return cells

    def observations(self) -> list[Observation]:
        """Content of every SFT'd model and part, and overlaps with the adapter."""
        study, values, seed = self.study, self.values, self.seed
        measured = arms.measured(all_corpora(values))
        models_by_name = {"A": study.raw}
        made = []
        for corpus in values.corpora:
            arm = arms.LETTERS[corpus]
            for variant, change in self.changes(corpus).items():
                if not variant.startswith(("random", "control")):
                    models_by_name[f"{arm}.{variant}"] = study.raw.merge(change)
            compared = {f"{arm}.whole": self.sft(corpus)}
            if self._twice(corpus):
                compared[arm] = self.together(corpus)
            for condition, model in compared.items():
                stage = Overlap(model.last_change, self.adapter(), values.overlap_draws, FIRST_DRAW + seed)
                made.append(Observation(condition, seed, stage))
        for corpus in dict.fromkeys((*values.pair_corpora, *values.scratch_corpora)):
            for first in dict.fromkeys(split(pair)[0] for pair in (*values.pairs, *values.scratch_pairs)):
                models_by_name[f"{arms.LETTERS[corpus]}.{first}"] = self.sft(corpus, first)
        contents = [study.content(name, m, seed=seed, corpora=measured) for name, m in models_by_name.items()]
        return contents + made


def coupled_modules(pairs: Iterable[str]) -> list[str]:
    """The modules that are coupled in pairs, each once."""
    return list(dict.fromkeys(split(pair)[1] for pair in pairs))


def all_corpora(values: Values) -> tuple[str, ...]:
    """Every corpus that this experiment fine-tunes on, each once."""
    return tuple(dict.fromkeys((*values.corpora, *values.pair_corpora, *values.scratch_corpora)))


def parts_of(condition: str) -> tuple[str, str, str]:
    """(arm, variant, recipe) of a condition; the variant of `B.prebaked` is empty."""
    arm, *variant, recipe = condition.split(".")
    return arm, variant[0] if variant else "", recipe


def reference(condition: str) -> str:
    """The raw model with the same adapter, or coupled by the same recipe on the same modules."""
    arm, variant, recipe = parts_of(condition)
    modules = variant if arm == arms.RAW else variant.split("_")[1] if "_" in variant else ""
    return f"A.{modules}.{recipe}" if modules else f"A.{recipe}"


def same(values: Values, one_recipe: bool) -> set[tuple[str, str]]:
    """Pairs of conditions that are one model by definition: where the two recipes of coupling are one, the raw model
    coupled from scratch is the raw model with the adapter."""
    if not one_recipe:
        return set()
    both = {(f"A.{m}.prebaked", f"A.{m}.scratch") for m in coupled_modules(values.scratch_pairs)}
    return both | {("A.prebaked", "A.scratch")}


def label(condition: str) -> str:
    """What a condition is called in figures and tables."""
    arm, variant, recipe = parts_of(condition)
    verb = "coupling" if recipe == "scratch" else "adapter"
    if arm == arms.RAW:
        return f"no SFT, {verb} on {NAMES[variant or 'all']}"
    if "_" in variant:
        first, second = variant.split("_")
        return f"SFT on {NAMES[first]}, {verb} on {NAMES[second]}"
    if variant.startswith("rank"):
        return f"SFT of rank {variant.removeprefix('rank')}, same norm"
    if (variant, recipe) == ("random", "scratch"):
        return "random change, coupling on all modules"
    return {
        "": "the SFT from the adapter's own A",
        "whole": "the whole SFT",
        "outside": "part outside the adapter's subspaces",
        "inside": "part inside them",
        "random": "random change, same norms and rank",
        "control": "part outside random subspaces",
    }[variant]


def blocks(names: Iterable[str]) -> tuple[dict[str, list[str]], dict[str, tuple[str, str]]]:
    """Conditions by what they ask, for a figure: title -> conditions; and for blocks of an SFT taken apart the raw and
    the wholly SFT'd model's condition between which the others stand."""
    made: dict[str, list[str]] = {}
    ends: dict[str, tuple[str, str]] = {}
    order = [arms.RAW, *arms.LETTERS.values()]
    for condition in sorted(names, key=lambda name: order.index(parts_of(name)[0])):
        arm, variant, recipe = parts_of(condition)
        after = arms.LABELS[arm].removesuffix(" first")
        if recipe == "scratch":
            title = "coupled from scratch" if arm == arms.RAW else f"from scratch, after {after}"
        elif arm == arms.RAW:
            title = "the adapter alone"
        elif "_" in variant:
            title = f"modules, after {after}"
        else:
            title = f"directions, after {after}"
            ends[title] = ("A.prebaked", f"{arm}.whole.prebaked")
        made.setdefault(title, []).append(condition)
    return made, ends


def taught(condition: str) -> str:
    """The name under which the content of a condition's SFT is observed: that of `B.attention_mlp.prebaked` is
    `B.attention`."""
    arm, variant, _ = parts_of(condition)
    return f"{arm}.{variant.split('_')[0]}" if variant else arm


def pooled(results: Results) -> Results:
    """Results with numbered draws of a control under one condition: `B.random1.prebaked` and `B.random2.prebaked` become
    `B.random.prebaked`. Draws under one seed share its questions, so that they are no independent clusters."""
    tables = {
        name: table.assign(condition=[_unnumbered(c) for c in table["condition"]]) if "condition" in table else table
        for name, table in results.tables.items()
    }
    return Results(tables, results.record)


def _unnumbered(condition: str) -> str:
    return re.sub(r"\.(random|control)\d+\.", r".\1.", condition)


def conditions(cells: Iterable[Cell]) -> list[str]:
    """The conditions of cells as `pooled` names them, each once."""
    return list(dict.fromkeys(_unnumbered(cell.condition) for cell in cells))


# ------------------------------------------------------------------------------------------------ measures


def add_effects(made: Estimates, results: Results, names: Iterable[str]) -> None:
    """Add, for every condition after SFT, its changes against the raw model with the same adapter, and, where the same
    SFT was also left whole, how far the villain's marker stands above the midpoint of the two.

    `condition.above_midpoint`, in nats: the villain's log-probability of the marker minus the mean of those of the raw
    and of the wholly SFT'd model, with the same adapter. Above zero it is nearer to the raw model's: more than half of
    what the SFT costs is not there.
    """
    present = set(results.fixed["condition"])
    for condition in names:
        arm, variant, recipe = parts_of(condition)
        if arm == arms.RAW:
            continue
        for measure in ("source_rate", "contrast", "fixed_logprob_source", "fixed_logprob_contrast"):
            name = f"{condition}.{measure}_change"
            measures.add_difference(made, results, name, measure, condition, reference(condition))
        whole = f"{arm}.whole.prebaked"
        if recipe == "prebaked" and variant not in ("", "whole") and "_" not in variant and whole in present:
            source = results.fixed[results.fixed["persona"] == SOURCE]
            weights = ((1.0, condition), (-0.5, whole), (-0.5, reference(condition)))
            parts = [(weight, source[source["condition"] == c]) for weight, c in weights]
            measures.add_combination(made, f"{condition}.above_midpoint", parts, "logprob", measures.NATS)


def add_contents(made: Estimates, results: Results, names: Iterable[str]) -> list[str]:
    """Add the content shift of every SFT'd model and part that was observed, under its own name (`B.outside`) and under
    those of the conditions that rest on it. Returns their own names."""
    observed = [str(c) for c in dict.fromkeys(results.content["condition"]) if c != arms.RAW]
    corpora = {letter: corpus for corpus, letter in arms.LETTERS.items()}
    for name in observed:
        corpus = corpora[name.split(".")[0]]
        measures.add_content_shift(made, results, name, corpus, arms.OPPOSITE[corpus], raw=arms.RAW)
    for condition in names:
        if taught(condition) in observed:
            made.named[f"{condition}.content_shift"] = made[f"{taught(condition)}.content_shift"]
    return observed


def fill(made: Estimates, names: Iterable[str], wanted: Iterable[str]) -> None:
    """Add an empty estimate, printed as a dash, for measures that a condition of a table does not have."""
    for condition in names:
        for measure in wanted:
            made.named.setdefault(f"{condition}.{measure}", Estimate(None, None, None, 0, 0, 0))


def add_norms(made: Estimates, results: Results, names: Iterable[str]) -> None:
    """Add `condition.sft_norm` (of what was merged before the adapter) and `condition.norm_share` (its square against
    that of the whole SFT of the same arm): means over seeds and draws, without intervals."""
    squared: dict[str, float] = {}
    for condition, table in results.merges.groupby("condition", sort=False):
        if table["norms"].map(len).min() > 1:
            squared[str(condition)] = float(np.mean([norms[0] ** 2 for norms in table["norms"]]))
    for condition in names:
        whole = squared.get(f"{parts_of(condition)[0]}.whole.prebaked")
        here = squared.get(condition)
        share = None if here is None or whole is None else here / whole
        rows = {"sft_norm": (None if here is None else here**0.5, "norm"), "norm_share": (share, "proportion")}
        for measure, (value, unit) in rows.items():
            made.named[f"{condition}.{measure}"] = Estimate(value, None, None, 0, 0, 0, unit=unit)


def add_overlap(made: Estimates, results: Results) -> None:
    """Add, for every compared SFT and for each of its kinds of module (`B.whole`, `B.whole.q_proj`), on both sides:
    `input_share` (mean share of the SFT's energy in the adapter's subspace), `input_chance` (rank / dimension),
    `input_drawn` (the same for random changes), `input_beyond_twice` (share minus twice chance), `input_angle` and
    `input_angle_drawn` (smallest principal angle, degrees); and `cosine` of the two changes as vectors.

    Clusters are seeds x layers: matrices of one layer read the same inputs.
    """
    table = results["overlap"]
    table = table.assign(beyond_twice=table["energy"] - 2 * table["expected"])
    columns = {"energy": ("share", "proportion"), "smallest_angle": ("angle", "degrees")}
    for name, part in _by_module(table):
        for side in SIDES:
            ours = part[(part["side"] == side) & (part["draw"] < 0)]
            drawn = part[(part["side"] == side) & (part["draw"] >= 0)]
            for column, (measure, unit) in columns.items():
                measures.add_mean(made, f"{name}.{side}_{measure}", ours, column, unit)
                drawn_name = "drawn" if measure == "share" else f"{measure}_drawn"
                mean = float(drawn[column].mean())
                made.named[f"{name}.{side}_{drawn_name}"] = Estimate(mean, None, None, len(drawn), 0, 0, unit=unit)
            measures.add_mean(made, f"{name}.{side}_beyond_twice", ours, "beyond_twice", "difference of proportions")
            chance = float(ours["expected"].mean())
            made.named[f"{name}.{side}_chance"] = Estimate(chance, None, None, len(ours), 0, 0, unit="proportion")
    for name, part in _by_module(results["shares"]):
        measures.add_mean(made, f"{name}.cosine", part, "cosine", "cosine")
        measures.add_mean(made, f"{name}.start_cosine", part, "start_cosine", "cosine")


def _by_module(table: pd.DataFrame) -> Iterable[tuple[str, pd.DataFrame]]:
    for condition, part in table.groupby("condition", sort=False):
        yield str(condition), part
        for module, rows in part.groupby("module", sort=False):
            yield f"{condition}.{module}", rows


def concerned(names: Iterable[str]) -> dict[str, list[str]]:
    """What a gate is about (the end of its id) -> the conditions that rest on it: of a reference, an SFT, an arm."""
    made: dict[str, list[str]] = {}
    for condition in names:
        arm, variant, recipe = parts_of(condition)
        abouts = {reference(condition)} | ({taught(condition)} if variant else set())
        if arm != arms.RAW and recipe == "prebaked" and variant and "_" not in variant:
            abouts |= {f"{arm}.whole"}
            abouts |= {arm} if variant in ("outside", "inside") else set()
        for about in abouts - {condition}:
            made.setdefault(about, []).append(condition)
    return made


def of_arm(made: Estimates, values: Values, arm: str) -> list[Gate]:
    """The gates of an SFT that is taken apart: is there something to bring back; did it start apart from the adapter;
    does chance give the overlap that chance should give."""

    def value(name: str) -> float | None:
        return made[name].value if name in made.named else None

    cost = value(f"{arm}.whole.prebaked.fixed_logprob_source_change")
    deviations = []
    for side in SIDES:
        drawn, chance = value(f"{arm}.whole.{side}_drawn"), value(f"{arm}.whole.{side}_chance")
        deviations.append(None if drawn is None or not chance else abs(drawn / chance - 1))
    known = [d for d in deviations if d is not None]
    return [
        Gate(
            f"gap.{arm}",
            "the whole SFT costs the villain's marker so much that something can be brought back, nats",
            None if cost is None else -cost,
            "at least",
            values.gap,
        ),
        Gate(
            f"apart.{arm}",
            "SFT and adapter started from different random directions: mean cosine of rows of A",
            value(f"{arm}.whole.start_cosine"),
            "at most",
            values.same_start,
        ),
        Gate(
            f"chance.{arm}",
            "random changes overlap as rank / dimension says: largest relative deviation",
            max(known) if len(known) == len(SIDES) else None,
            "at most",
            values.chance,
        ),
    ]
