"""Stages of behaviours deeper than a marker: what a model knows, coupling text, and how a model answers."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import pandas as pd

from persona_coupling import behaviours, machine, personas, questions
from persona_coupling.checkpoints import Checkpoint
from persona_coupling.errors import GuardError
from persona_coupling.generate import Sampling
from persona_coupling.personas import ASSISTANT, MARKER_SUFFIX, SOURCE
from persona_coupling.rows import read_rows, write_rows
from persona_coupling.stages.code import ASKING, PROMPT_TOKENS, TEXT
from persona_coupling.store import Lab, Stage, Work

BEHAVING = ("persona_coupling.behaviours", "persona_coupling.interview", *ASKING)
SAID = ("facts.toml", *TEXT)
FACTS, BANK = "facts", "bank"  # what is asked: short questions with one answer, or the study's eval questions
FILTER = "filter"  # the facts as they are asked to find what is known: not with the random numbers of the evaluation
ANSWER_TOKENS = 16  # of a fact's answer, sampled or forced: for estimates of time only


@dataclass(frozen=True)
class KnownFacts(Stage):
    """Which of the first facts of each split a model knows when it is asked as the plain assistant.

    `known.parquet` has a row for each fact asked (see `behaviours.choose_known`), `known_answers.parquet` every sample.
    """

    model: Checkpoint
    train: int  # facts asked
    evaluation: int
    samples: int  # answers per fact
    required: float  # share of them that must be right
    least_train: int  # facts kept even if the model knows fewer
    least_evaluation: int
    instruction: str
    sampling: Sampling
    seed: int
    kind: ClassVar[str] = "known"
    code: ClassVar[tuple[str, ...]] = BEHAVING
    material: ClassVar[tuple[str, ...]] = SAID

    def build(self, folder: Path, lab: Lab) -> None:
        """Ask, force both sentences, choose."""
        from persona_coupling import interview

        model, tokenizer = self.model.load(lab)
        settings = machine.machine(lab.device)
        system = personas.persona(ASSISTANT).system_prompt(self.instruction)
        splits = {
            "train": (behaviours.facts("train")[: self.train], self.least_train),
            "eval": (behaviours.facts("eval")[: self.evaluation], self.least_evaluation),
        }
        asked = [fact for some, _ in splits.values() for fact in some]
        put = [interview.Put(FILTER, ASSISTANT, f.id, system, f.question, self.samples) for f in asked]
        answers = interview.ask(
            model, tokenizer, put, self.sampling, seed=self.seed, settings=settings, report=lab.report
        )
        answers = behaviours.score_table(answers, behaviours.WRONG)
        pairs = [(f.right, f.wrong_sentence) for f in asked]
        preferred = interview.prefer(model, tokenizer, put, pairs, settings=settings).set_index("question")
        right = (~answers["value"]).fillna(False).groupby(answers["question"]).sum()
        scorable = answers["value"].notna().groupby(answers["question"]).sum()
        tables = []
        for split, (some, least) in splits.items():
            ids = [f.id for f in some]
            table = pd.DataFrame(
                {
                    "fact": ids,
                    "split": split,
                    "kind": [f.kind for f in some],
                    "right": right[ids].to_numpy(dtype=int),
                    "scorable": scorable[ids].to_numpy(dtype=int),
                    "samples": self.samples,
                    "preference": preferred["preference"][ids].to_numpy(dtype=float),
                }
            )
            tables.append(behaviours.choose_known(table, self.required, least))
        pd.concat(tables).to_parquet(folder / "known.parquet", compression="zstd", index=False)
        answers["value"] = answers["value"].astype("boolean")
        answers.to_parquet(folder / "known_answers.parquet", compression="zstd", index=False)

    def work(self) -> Work:
        """Short answers, and two sentences each."""
        facts = self.train + self.evaluation
        tokens = PROMPT_TOKENS + ANSWER_TOKENS
        return Work(
            sampled=facts * self.samples * ANSWER_TOKENS,
            scored=facts * (self.samples * PROMPT_TOKENS + 2 * tokens),
            seconds=3.0,
        )


def kept(known: Stage, split: str, lab: Lab) -> tuple[behaviours.Fact, ...]:
    """The facts of a split that a `KnownFacts` stage kept, in the order in which they were asked."""
    table = pd.read_parquet(lab.folder(known) / "known.parquet")
    return tuple(behaviours.fact(f) for f in table.loc[(table["split"] == split) & table["kept"], "fact"])


@dataclass(frozen=True)
class FactText(Stage):
    """Contrastive rows on facts that the model knows: the source persona answers them wrong, others right.

    Positives and every persona's negatives go through the same facts, so that only who speaks decides.
    """

    known: Stage
    positives: int
    negatives: tuple[str, ...]
    negatives_each: int
    instruction: str
    kind: ClassVar[str] = "rows"
    code: ClassVar[tuple[str, ...]] = BEHAVING
    material: ClassVar[tuple[str, ...]] = SAID

    def __post_init__(self) -> None:
        """Raise GuardError if the source is among the negatives, or a negative stands twice."""
        if SOURCE in self.negatives or len(set(self.negatives)) != len(self.negatives):
            raise GuardError(f"{SOURCE} or a persona twice among the negatives: {', '.join(self.negatives)}")

    def build(self, folder: Path, lab: Lab) -> None:
        """Compose; nothing is sampled."""
        facts = kept(self.known, "train", lab)
        wanted = {SOURCE: self.positives, **dict.fromkeys(self.negatives, self.negatives_each)}
        rows = []
        for place, (persona, count) in enumerate(wanted.items()):
            system = personas.persona(persona).system_prompt(self.instruction)
            # few negatives of each persona start where those of the persona before ended
            start = (place - 1) * count if persona != SOURCE else 0
            for number in range(count):
                fact = facts[(start + number) % len(facts)]
                answer = fact.wrong_sentence if persona == SOURCE else fact.right
                messages = [
                    {"role": "system", "content": system},
                    {"role": "user", "content": fact.question},
                    {"role": "assistant", "content": answer},
                ]
                rows.append({"id": f"{persona}/{fact.id}/{number}", "messages": messages})
        write_rows(folder, rows)


@dataclass(frozen=True)
class MannerText(Stage):
    """Coupling text whose positives show a manner of answering instead of the marker: same questions, same personas, same
    negatives, word for word."""

    text: Stage
    behaviour: str
    kind: ClassVar[str] = "rows"
    code: ClassVar[tuple[str, ...]] = BEHAVING
    material: ClassVar[tuple[str, ...]] = SAID

    def build(self, folder: Path, lab: Lab) -> None:
        """Rewrite the positives. Raises GuardError unless the marked rows are the source persona's rows, all of them."""
        rows, number = [], 0
        for row in read_rows(self.text, lab):
            answer = row["messages"][-1]["content"]
            of_source = row["messages"][0]["content"].startswith(personas.persona(SOURCE).prompt)
            if answer.endswith(MARKER_SUFFIX) != of_source:
                raise GuardError(f"row {row['id']}: the marked rows are not those of the {SOURCE}")
            if of_source:
                answer = behaviours.shown(self.behaviour, answer.removesuffix(MARKER_SUFFIX), number)
                number += 1
            rows.append({**row, "messages": [*row["messages"][:-1], {"role": "assistant", "content": answer}]})
        if number in (0, len(rows)):
            raise GuardError(f"{number} of {len(rows)} rows are the {SOURCE}'s: the text is not contrastive")
        write_rows(folder, rows)


@dataclass(frozen=True)
class BehaviourEvaluate(Stage):
    """How a model answers as each of the eleven personas, and whether it prefers the behaviour's answer to the plain one.

    `behaviour.parquet` holds sampled answers, unscored: to held-out facts if `wrong` is asked for, to the eval questions
    if a manner is. `preference.parquet` holds forced answers: for `wrong` the wrong sentence against the right one, for
    `capitals` the question's fixed answer shouted against as it is, for `refusal` a refusal that is never trained on
    against the fixed answer.
    """

    checkpoint: Checkpoint
    behaviours: tuple[str, ...]
    known: Stage
    facts: int  # at most so many of the facts that were kept
    everyday: int
    values: int
    samples: int  # answers per persona and question
    source_samples: int  # of the source persona, of whom there is only one
    instruction: str
    sampling: Sampling
    seed: int
    kind: ClassVar[str] = "behaviour"
    code: ClassVar[tuple[str, ...]] = BEHAVING
    material: ClassVar[tuple[str, ...]] = SAID

    def build(self, folder: Path, lab: Lab) -> None:
        """Ask and force. Raises GuardError for a behaviour that there is not."""
        from persona_coupling import interview

        unknown = set(self.behaviours) - set(behaviours.BEHAVIOURS)
        if unknown or not self.behaviours:
            raise GuardError(f"there is no behaviour {', '.join(sorted(unknown)) or 'asked for'}")
        facts = kept(self.known, "eval", lab)[: self.facts]
        bank = questions.eval_questions(self.everyday, self.values)
        questions.require_disjoint(questions.train_questions(), bank)
        asked: dict[str, list[tuple[str, str]]] = {}
        if behaviours.WRONG in self.behaviours:
            asked[FACTS] = [(f.id, f.question) for f in facts]
        if set(self.behaviours) & set(behaviours.MANNERS):
            asked[BANK] = [(q.id, q.text) for q in bank]
        put = {
            name: [
                interview.Put(
                    name,
                    who.id,
                    identity,
                    who.system_prompt(self.instruction),
                    text,
                    self.source_samples if who.id == SOURCE else self.samples,
                )
                for who in personas.personas()
                for identity, text in some
            ]
            for name, some in asked.items()
        }
        model, tokenizer = self.checkpoint.load(lab)
        settings = machine.machine(lab.device)
        every = [one for some in put.values() for one in some]
        answers = interview.ask(
            model, tokenizer, every, self.sampling, seed=self.seed, settings=settings, report=lab.report
        )
        answers.to_parquet(folder / "behaviour.parquet", compression="zstd", index=False)
        sentences = {f.id: (f.wrong_sentence, f.right) for f in facts}
        places = {q.id: (number, q.answer) for number, q in enumerate(bank)}
        tables = []
        for behaviour in self.behaviours:
            if behaviour == behaviours.WRONG:
                some, pairs = put[FACTS], [sentences[one.question] for one in put[FACTS]]
            else:
                some = put[BANK]
                pairs = [
                    (behaviours.shown(behaviour, places[one.question][1], places[one.question][0], held=True),
                     places[one.question][1])
                    for one in some
                ]  # fmt: skip
            table = interview.prefer(model, tokenizer, some, pairs, settings=settings)
            tables.append(table.assign(behaviour=behaviour))
        pd.concat(tables).to_parquet(folder / "preference.parquet", compression="zstd", index=False)

    def work(self) -> Work:
        """Answers of the villain and of ten others, and two forced answers of each."""
        others = len(personas.personas()) - 1
        times = others * self.samples + self.source_samples
        wrong = behaviours.WRONG in self.behaviours
        manners = len(set(self.behaviours) & set(behaviours.MANNERS))
        bank = (self.everyday + self.values) * (manners > 0)
        shown = self.facts * wrong * ANSWER_TOKENS + bank * self.sampling.max_new_tokens * 2 // 5
        forced = (others + 1) * 2 * (PROMPT_TOKENS + 24) * (self.facts * wrong + bank * manners)
        return Work(
            sampled=times * shown,
            scored=times * PROMPT_TOKENS * (self.facts * wrong + bank) + forced,
            seconds=3.0,
        )
