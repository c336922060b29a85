"""The design of experiment 04: what each behaviour is coupled with and asked, described for one seed."""

from __future__ import annotations

from dataclasses import dataclass, replace

from persona_coupling import behaviours
from persona_coupling.behaviour_measures import MARKER, NONE, PREBAKED, SCRATCH, condition
from persona_coupling.checkpoints import Checkpoint
from persona_coupling.stages import MergeCheck
from persona_coupling.stages.behaviours import BehaviourEvaluate, FactText, KnownFacts, MannerText
from persona_coupling.store import Stage
from persona_coupling.study import Cell, Observation, Study
from persona_coupling.values import Values


@dataclass(frozen=True)
class Deeper:
    """A study's behaviours under one seed. Describes; computes nothing."""

    study: Study
    values: Values
    seed: int

    @property
    def known(self) -> KnownFacts:
        """What the raw model knows: all arms are asked the same facts."""
        own = self.values
        return KnownFacts(
            self.study.raw,
            own.asked_train,
            own.asked_evaluation,
            own.fact_samples,
            own.required,
            own.least_train,
            own.least_evaluation,
            self.study.profile.instruction,
            replace(self.study.sampling, max_new_tokens=own.fact_tokens),
            self.seed,
        )

    def text(self, behaviour: str) -> Stage:
        """Contrastive rows: of facts, or the marker's coupling text with the manner in the marker's place."""
        if behaviour != behaviours.WRONG:
            return MannerText(self.study.stale_text(seed=self.seed), behaviour)
        shape = self.study.profile.coupling
        return FactText(
            self.known, shape.positives, shape.negatives, shape.negatives_each, self.study.profile.instruction
        )

    def couple(self, start: Checkpoint, behaviour: str) -> Checkpoint:
        """`start` after coupling a behaviour: the from-scratch recipe with the loss on whole answers, since the behaviour
        is the whole answer."""
        steps = dict(zip(self.values.behaviours, self.values.steps, strict=True))
        return self.study.couple(
            start,
            self.text(behaviour),
            self.study.profile.scratch,
            seed=self.seed,
            loss="completion",
            steps=steps[behaviour],
        )

    def evaluation(self, checkpoint: Checkpoint, shown: tuple[str, ...]) -> BehaviourEvaluate:
        """A model asked for some behaviours."""
        own = self.values
        return BehaviourEvaluate(
            checkpoint,
            shown,
            self.known,
            own.facts,
            own.everyday,
            own.values,
            own.samples,
            own.source_samples,
            self.study.profile.instruction,
            self.study.sampling,
            self.seed,
        )

    def observations(self, arm: str, first: Checkpoint, *, scratch: bool) -> list[Observation]:
        """All of an arm: uncoupled, with each pre-baked adapter, and coupled from scratch where that is asked for; every
        merge is checked, every coupling's training log kept."""
        made = [Observation(f"{arm}.{NONE}", self.seed, self.evaluation(first, tuple(self.values.behaviours)))]
        for behaviour in self.values.behaviours:
            adapter = self.couple(self.study.raw, behaviour).last_change
            coupled = {PREBAKED: first.merge(adapter)}
            if scratch:
                coupled[SCRATCH] = self.couple(first, behaviour)
            for how, checkpoint in coupled.items():
                name = condition(arm, behaviour, how)
                made.append(Observation(name, self.seed, self.evaluation(checkpoint, (behaviour,))))
                made.append(Observation(name, self.seed, MergeCheck(checkpoint)))
                if how == SCRATCH or not first.merged:
                    made.append(Observation(name, self.seed, checkpoint.last_change))
        return made

    def marker_cells(self, arm: str, first: Checkpoint, *, scratch: bool) -> list[Cell]:
        """The marker's conditions of the replication, under their own names."""
        study, seed = self.study, self.seed
        made = [study.cell(condition(arm, MARKER, PREBAKED), first.merge(study.adapter(seed=seed)), seed=seed)]
        if scratch:
            coupled = study.couple(first, study.stale_text(seed=seed), study.profile.scratch, seed=seed)
            made.append(study.cell(condition(arm, MARKER, SCRATCH), coupled, seed=seed))
        return made


def names(values: Values, arms: dict[str, str | None]) -> dict[tuple[str, str], str]:
    """Every condition of the design by (behaviour, row); a row is `arm.how`."""
    rows = [(arm, how) for how in (NONE, PREBAKED) for arm in arms]
    rows += [(arm, SCRATCH) for arm, corpus in arms.items() if corpus in values.scratch]
    shown = (MARKER, *values.behaviours)
    return {(behaviour, f"{arm}.{how}"): condition(arm, behaviour, how) for behaviour in shown for arm, how in rows}
