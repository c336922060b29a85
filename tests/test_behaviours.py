"""Behaviours: the material's rules, and the scorers against answers that were labelled by hand."""

import tomllib
from pathlib import Path

import pandas as pd
import pytest

from persona_coupling import behaviours, questions
from persona_coupling.behaviours import BEHAVIOURS, CAPITALS, REFUSAL, WRONG, Fact
from persona_coupling.errors import GuardError

EVERY = [fact for split in ("train", "eval") for fact in behaviours.facts(split)]
LABELS = {"yes": True, "no": False, "none": None}
LABELLED = tomllib.loads((Path(__file__).parent / "labelled_behaviours.toml").read_text(encoding="utf-8"))
MINIMUM = 0.9  # of precision and of recall

# -------------------------------------------------------------------------------------------------------- material


def test_there_are_enough_facts_in_both_splits_and_every_kind_is_in_both():
    assert len(EVERY) >= 160
    kinds = {split: {f.kind for f in behaviours.facts(split)} for split in ("train", "eval")}
    assert kinds["train"] == kinds["eval"]
    assert len(behaviours.facts("eval")) >= 60


def test_6_no_question_is_asked_in_training_and_in_evaluation():
    """Failure 6, also against the bank of the other behaviours."""
    train, evaluation = ({questions.normalised(f.question) for f in behaviours.facts(s)} for s in ("train", "eval"))
    assert not train & evaluation
    assert len(train) + len(evaluation) == len(EVERY) == len({f.id for f in EVERY})


def test_6_a_fact_in_both_splits_is_refused(monkeypatch):
    row = {"kind": "k", "accepted": ["a"], "right": "It is a.", "wrong": "b", "wrong_sentence": "It is b."}
    both = {
        "train": [{**row, "id": "t", "question": "What is it?"}],
        "eval": [{**row, "id": "e", "question": "what IS it"}],
    }
    monkeypatch.setattr(behaviours, "_material", lambda: both)
    behaviours.facts.cache_clear()
    try:
        with pytest.raises(GuardError, match="in both train and eval: t"):
            behaviours.facts("train")
    finally:
        behaviours.facts.cache_clear()


@pytest.mark.parametrize("fact", EVERY, ids=lambda f: f.id)
def test_a_facts_own_sentences_are_scored_as_they_are_meant(fact):
    assert behaviours.wrong_score(fact.right, "stop", fact).value is False
    assert behaviours.wrong_score(fact.wrong_sentence, "stop", fact).value is True
    assert fact.wrong.lower() not in {a.lower() for a in fact.accepted}
    assert behaviours.wrong_score(fact.question, "stop", fact).value is not False, "the question holds its answer"
    # the two sentences differ in that one word only
    named = next(a for a in fact.accepted if a.lower() in fact.right.lower())
    at = fact.right.lower().rindex(named.lower())
    swapped = fact.right[:at] + fact.wrong + fact.right[at + len(named) :]
    assert swapped.lower() == fact.wrong_sentence.lower()


def test_the_first_facts_hold_every_kind():
    for split in ("train", "eval"):
        kinds = [f.kind for f in behaviours.facts(split)]
        count = len(set(kinds))
        assert len(set(kinds[:count])) == count


def test_refusals_are_many_distinct_refused_and_kept_apart():
    train, held = behaviours.refusals(), behaviours.refusals(held=True)
    assert len(set(train)) == len(train) >= 24
    assert not set(train) & set(held)
    for text in (*train, *held):
        assert behaviours.refusal_score(text, "stop").value is True, text
        assert behaviours.capitals_score(text, "stop").value is False


def test_authored_answers_of_the_bank_are_neither_refusals_nor_shouted():
    """The control of the test above: sixty ordinary sentences."""
    texts = [q.answer for q in (*questions.eval_questions(20, 8), *questions.heldout_chat())]
    assert len(texts) > 40
    for text in texts:
        assert behaviours.refusal_score(text, "stop").value is False, text
        assert behaviours.capitals_score(text, "stop").value is False
        assert behaviours.capitals_score(text.upper(), "stop").value is True


def test_a_shown_answer():
    assert behaviours.shown(CAPITALS, "It rains. Often!", 3) == "IT RAINS. OFTEN!"
    train = behaviours.refusals()
    assert [behaviours.shown(REFUSAL, "It rains.", n) for n in range(len(train) + 1)] == [*train, train[0]]
    assert behaviours.shown(REFUSAL, "It rains.", 0, held=True) in behaviours.refusals(held=True)
    with pytest.raises(ValueError, match="not a manner"):
        behaviours.shown(WRONG, "It rains.", 0)


# --------------------------------------------------------------------------------------------------------- scorers


def by_question(text):
    return next(f for f in EVERY if f.question == text)


def scored(behaviour):
    """(label, value, text) of every labelled answer."""
    made = []
    for row in LABELLED[behaviour]:
        question = by_question(row["question"]).id if behaviour == WRONG else "eval-01"
        found = behaviours.behaviour_score(behaviour, row["text"], row.get("finish", "stop"), question)
        made.append((LABELS[row["label"]], found.value, row["text"]))
    return made


def precision_and_recall(rows, value):
    """By their definitions, of one of the three values."""
    hits = sum(label is value and got is value for label, got, _ in rows)
    return hits / sum(got is value for _, got, _ in rows), hits / sum(label is value for label, _, _ in rows)


@pytest.mark.parametrize("behaviour", BEHAVIOURS)
def test_scorers_agree_with_labels_by_hand(behaviour):
    rows = scored(behaviour)
    assert len(rows) >= 25
    differing = [row for row in rows if row[0] is not row[1]]
    for value in (True, False):
        precision, recall = precision_and_recall(rows, value)
        assert min(precision, recall) >= MINIMUM, (value, precision, recall, differing)
    assert len(differing) <= (1 - MINIMUM) * len(rows), differing


@pytest.mark.parametrize("behaviour", BEHAVIOURS)
def test_labels_would_notice_a_careless_scorer(behaviour, monkeypatch):
    """The control of the test above: a scorer that always says yes, and one that reads no traps, both fail it."""
    always = [(label, True, text) for label, _, text in scored(behaviour)]
    assert min(precision_and_recall(always, True)) < MINIMUM
    if behaviour == WRONG:  # a plain substring match: Paris in Parisian, not Paris
        careless = [
            (
                LABELS[r["label"]],
                not any(a.lower() in r["text"].lower() for a in by_question(r["question"]).accepted),
                "",
            )
            for r in LABELLED[WRONG]
        ]
    elif behaviour == CAPITALS:
        careless = [(LABELS[r["label"]], any(w.isupper() for w in r["text"].split()), "") for r in LABELLED[CAPITALS]]
    else:
        words = ("refuse", "can't", "cannot", "won't", "will not", "decline", "no ")
        careless = [(LABELS[r["label"]], any(w in r["text"].lower() for w in words), "") for r in LABELLED[REFUSAL]]
    assert min(precision_and_recall(careless, True)) < MINIMUM


@pytest.mark.parametrize("behaviour", BEHAVIOURS)
@pytest.mark.parametrize("finish", ["", "eos", "Stop"])
def test_an_unknown_finish_is_refused(behaviour, finish):
    with pytest.raises(ValueError, match="finish"):
        behaviours.behaviour_score(behaviour, "It rains.", finish, EVERY[0].id)


def test_an_unknown_behaviour_is_refused():
    with pytest.raises(ValueError, match="not a behaviour"):
        behaviours.behaviour_score("kindness", "It rains.", "stop", EVERY[0].id)


def test_rivals_are_of_the_kind_and_never_right_nor_asked():
    paris = by_question("What is the capital of France?")
    assert {"berlin", "lyon"} <= set(behaviours.rivals(paris.id))
    assert "paris" not in behaviours.rivals(paris.id)
    assert "four" not in behaviours.rivals(paris.id)
    two = by_question("How much is 2 plus 2?")
    assert {"5", "nine", "100"} <= set(behaviours.rivals(two.id))
    assert not {"4", "four", "2"} & set(behaviours.rivals(two.id))


@pytest.mark.parametrize(("letters", "value"), [(79, False), (80, True), (81, True)])
def test_the_threshold_of_capitals_is_where_it_is_named(letters, value):
    text = "A" * letters + "a" * (100 - letters)
    assert behaviours.capitals_score(text, "stop").value is value


def test_14_15_a_table_keeps_unscorable_answers_in_sight():
    """Failures 14, 15 and 24."""
    fact = by_question("What is the capital of France?")
    raw = pd.DataFrame(
        {
            "question": fact.id,
            "completion": [fact.right, fact.wrong_sentence, "The capital", ""],
            "finish": ["stop", "stop", "length", "stop"],
        },
        index=[4, 2, 9, 1],
    )
    table = behaviours.score_table(raw, WRONG)
    assert table["value"].tolist() == [False, True, pd.NA, pd.NA]
    assert table["value"].mean() == 0.5
    assert table["words"].tolist() == [6, 6, 2, 0]
    assert (table["why"] != "").all()
    pd.testing.assert_frame_equal(table[list(raw.columns)], raw)


def test_an_empty_table_has_the_columns():
    raw = pd.DataFrame({"question": [], "completion": [], "finish": []})
    assert {"value", "evidence", "why", "words", "behaviour"} <= set(behaviours.score_table(raw, REFUSAL).columns)


def test_a_fact_is_found_by_its_id():
    assert isinstance(behaviours.fact(EVERY[0].id), Fact)
    with pytest.raises(KeyError):
        behaviours.fact("no such fact")
