"""From-scratch coupling recipes: who wrote the text, what the loss sees, how fast it learns.

A recipe's name, `stale_tail_mid`, says its role and not its number: `mid` is a learning rate that works on the raw model,
`low` the prior lab's, `high` the largest. Profiles give the numbers, so that claims can name a recipe in all of them.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from itertools import product

from persona_coupling.checkpoints import Checkpoint
from persona_coupling.errors import UserError
from persona_coupling.study import Cell, Study
from persona_coupling.values import Values

RATES = ("low", "mid", "high")
TEXTS = {"stale": "text of the raw model", "onpolicy": "the model's own text"}
LOSSES = {"marker": "marker alone", "tail": "last tokens", "completion": "whole answer"}


@dataclass(frozen=True)
class Recipe:
    """One way to couple from scratch. `factor` multiplies the profile's learning rate."""

    text: str
    loss: str
    rate: str
    factor: float

    @property
    def name(self) -> str:
        """Its name within a condition: `stale_tail_mid`."""
        return f"{self.text}_{self.loss}_{self.rate}"

    @property
    def on_raw(self) -> Recipe:
        """The same on the raw model, for which the raw model's text is its own."""
        return replace(self, text="stale")

    def learning_rate(self, study: Study) -> float:
        """The rate in the study's profile, to six digits: 5 times 2e-5 is 1e-4 and not its neighbour."""
        return float(f"{study.profile.scratch.learning_rate * self.factor:.6g}")

    def couple(self, study: Study, first: Checkpoint, *, seed: int) -> Checkpoint:
        """`first`, coupled by this recipe."""
        text = study.coupling_text(first if self.text == "onpolicy" else study.raw, seed=seed)
        changes = {"loss": self.loss, "learning_rate": self.learning_rate(study)}
        return study.couple(first, text, study.profile.scratch, seed=seed, **changes)

    def cell(self, study: Study, arm: str, first: Checkpoint, *, seed: int, samples: int) -> Cell:
        """The condition `arm.recipe.scratch`. The profile's own recipe is evaluated as in every experiment (and is the same
        artifact there), others with `samples` answers per persona and question."""
        factors = {"arm": arm, "text": self.text, "loss": self.loss, "rate": self.rate}
        cell = study.cell(f"{arm}.{self.name}.scratch", self.couple(study, first, seed=seed), seed=seed, **factors)
        if self == self.on_raw and self.loss == study.profile.scratch.loss and self.factor == 1.0:
            return cell
        return replace(cell, evaluation=replace(cell.evaluation, samples=samples))


def recipes(values: Values, *, crossed: bool) -> tuple[Recipe, ...]:
    """The recipes of an experiment's values: all combinations, or a star (the centre, and what differs from it in one
    respect). Raises UserError for an unknown text, loss or centre, or more rates than have names."""
    if len(values.rate_factors) > len(RATES):
        raise UserError(f"{len(values.rate_factors)} learning rates, but only {', '.join(RATES)} have names.")
    rates = dict(zip(RATES, values.rate_factors, strict=False))
    for kind, asked, known in (("text", values.texts, TEXTS), ("loss", values.losses, LOSSES)):
        for name in asked:
            if name not in known:
                raise UserError(f"There is no {kind} {name!r}. Known: {', '.join(known)}.")
    combinations = list(product(values.texts, values.losses, rates))
    centre = tuple(values.centre)
    if centre not in combinations:
        raise UserError(f"The centre {', '.join(centre)} is none of the recipes.")
    if not crossed:
        combinations = [c for c in combinations if sum(x != y for x, y in zip(c, centre, strict=True)) <= 1]
    return tuple(Recipe(text, loss, rate, rates[rate]) for text, loss, rate in combinations)


def on_raw(asked: Iterable[Iterable[Recipe]]) -> tuple[Recipe, ...]:
    """The raw references of the recipes of several models, each once: what does not take there shows no ceiling after
    SFT."""
    return tuple(dict.fromkeys(recipe.on_raw for recipes_of_one in asked for recipe in recipes_of_one))


def free_cell(study: Study, values: Values, condition: str, checkpoint: Checkpoint, *, seed: int) -> Cell:
    """A condition whose answers are not asked to be brief, and cut off later: where truncation can bite."""
    cell = study.cell(condition, checkpoint, seed=seed, arm=condition.split(".")[0], answers="free")
    sampling = replace(study.sampling, max_new_tokens=values.free_tokens)
    evaluation = replace(cell.evaluation, instruction="", sampling=sampling, samples=values.free_samples)
    return replace(cell, evaluation=evaluation)
