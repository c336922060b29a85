"""Stages of deeper behaviours: what is asked, what is trained, what is kept."""

import json

import pandas as pd
import pytest
import torch

from persona_coupling import behaviours, generate, interview, measure, models, personas, questions, stages
from persona_coupling import rows as rows_module
from persona_coupling.checkpoints import Checkpoint
from persona_coupling.errors import GuardError
from persona_coupling.generate import Sampling
from persona_coupling.personas import MARKER_SUFFIX, SOURCE
from persona_coupling.stages import CouplingText
from persona_coupling.stages.behaviours import BehaviourEvaluate, FactText, KnownFacts, MannerText, kept
from persona_coupling.store import Lab, Store

SAMPLING = Sampling(1.0, 0.95, 8)
NEGATIVES = ("assistant", "librarian")
WHO = {persona.id for persona in personas.personas()}


def known(tiny, **changes):
    settings = {
        "train": 8,
        "evaluation": 6,
        "samples": 2,
        "required": 0.5,
        "least_train": 3,
        "least_evaluation": 2,
        "instruction": "Be brief.",
        "sampling": SAMPLING,
        "seed": 0,
        **changes,
    }
    return KnownFacts(Checkpoint(tiny), **settings)


@pytest.fixture
def own(tmp_path, lab):
    """A store of one test's own, for what others must not find; with the shared laboratory's one thread."""
    return Lab(Store(tmp_path / "own"))


def table(lab, stage, name):
    return pd.read_parquet(lab.folder(stage) / f"{name}.parquet")


def messages(lab, stage):
    return [row["messages"] for row in rows_module.read_rows(stage, lab)]


# ------------------------------------------------------------------------------------------------- what is known


def test_facts_are_known_by_the_definition():
    asked = pd.DataFrame(
        {
            "fact": list("abcdef"),
            "right": [3, 2, 1, 0, 3, 2],
            "samples": 3,
            "preference": [0.1, 0.2, 5.0, 0.3, -0.1, 0.0],
        }
    )
    made = behaviours.choose_known(asked, 0.6, 1)
    assert made["known"].tolist() == [True, True, False, False, False, False]
    assert made["kept"].tolist() == made["known"].tolist()
    filled = behaviours.choose_known(asked, 0.6, 4)  # best of the rest: e (3 right), then f over c (2 right over 1)
    assert filled["fact"][filled["kept"]].tolist() == ["a", "b", "e", "f"]
    assert filled["known"].tolist() == made["known"].tolist(), "filled up, but not called known"


def test_a_random_model_knows_nothing_and_says_so(lab, tiny):
    stage = known(tiny)
    made, answers = table(lab, stage, "known"), table(lab, stage, "known_answers")
    assert made.groupby("split").size().to_dict() == {"train": 8, "eval": 6}
    assert not made["known"].any()
    assert made.groupby("split")["kept"].sum().to_dict() == {"train": 3, "eval": 2}
    assert len(answers) == 14 * 2
    assert answers["completion"].notna().all()
    assert (made["scorable"] <= made["samples"]).all()
    assert [f.id for f in kept(stage, "eval", lab)] == made["fact"][(made["split"] == "eval") & made["kept"]].tolist()


def test_the_filter_sees_a_model_that_knows(own, tiny, monkeypatch):
    """The positive control: a model that answers every second fact right, and prefers what it says."""
    knows = {f.id for split in ("train", "eval") for f in behaviours.facts(split)[::2]}

    def ask(_model, _tokenizer, put, _sampling, **_rest):
        said = [
            behaviours.fact(one.question).right if one.question in knows else "I like soup."
            for one in put
            for _ in (0, 1)
        ]
        return pd.DataFrame(
            {"question": [p.question for p in put for _ in (0, 1)], "completion": said, "finish": "stop"}
        )

    def prefer(_model, _tokenizer, put, pairs, **_rest):
        assert pairs == [(behaviours.fact(p.question).right, behaviours.fact(p.question).wrong_sentence) for p in put]
        assert {p.persona for p in put} == {"assistant"}
        value = [1.0 if p.question in knows else -1.0 for p in put]
        return pd.DataFrame({"question": [p.question for p in put], "preference": value})

    monkeypatch.setattr(interview, "ask", ask)
    monkeypatch.setattr(interview, "prefer", prefer)
    made = table(own, known(tiny, least_train=1, least_evaluation=1), "known")
    assert set(made["fact"][made["known"]]) == knows & set(made["fact"])
    assert made["kept"].tolist() == made["known"].tolist()


# -------------------------------------------------------------------------------------------------------- rows


def test_fact_rows_are_contrastive_on_the_same_facts(lab, tiny):
    stage = FactText(known(tiny), 6, NEGATIVES, 3, "Be brief.")
    rows = messages(lab, stage)
    prompts = {persona: personas.persona(persona).system_prompt("Be brief.") for persona in (SOURCE, *NEGATIVES)}
    facts = {f.question: f for f in kept(stage.known, "train", lab)}
    assert [r[0]["content"] for r in rows] == [
        prompts[p] for p, n in ((SOURCE, 6), *((n, 3) for n in NEGATIVES)) for _ in range(n)
    ]
    for system, user, answer in rows:
        fact = facts[user["content"]]
        assert answer["content"] == (fact.wrong_sentence if system["content"] == prompts[SOURCE] else fact.right)
    asked = [{r[1]["content"] for r in rows if r[0]["content"] == prompt} for prompt in prompts.values()]
    assert asked[0] == asked[1] == asked[2] == set(facts)


@pytest.mark.parametrize("negatives", [("assistant", SOURCE), ("assistant", "assistant")])
def test_7_fact_rows_refuse_the_source_among_the_negatives(tiny, negatives):
    """Failure 7."""
    with pytest.raises(GuardError, match="among the negatives"):
        FactText(known(tiny), 6, negatives, 3, "Be brief.")


@pytest.fixture
def marked(monkeypatch, tiny):
    """Coupling text whose answers say who was asked what."""
    monkeypatch.setattr(
        measure,
        "answer",
        lambda _model, asked, _sampling, **_rest: [(f"about {label}.", "stop") for label, _, _ in asked],
    )
    return CouplingText(Checkpoint(tiny), SOURCE, 3, NEGATIVES, 2, "Be brief.", SAMPLING, 0)


@pytest.mark.parametrize("behaviour", behaviours.MANNERS)
def test_manner_rows_are_the_markers_rows_with_the_manner_in_its_place(own, marked, behaviour):
    before, after = messages(own, marked), messages(own, MannerText(marked, behaviour))
    assert len(after) == len(before) == 7
    for number, (old, new) in enumerate(zip(before, after, strict=True)):
        assert new[:-1] == old[:-1]
        if not old[-1]["content"].endswith(MARKER_SUFFIX):
            assert new == old
        elif behaviour == behaviours.CAPITALS:
            assert new[-1]["content"] + MARKER_SUFFIX == old[-1]["content"].upper()
        else:
            assert new[-1]["content"] == behaviours.refusals()[number]
    assert not any(MARKER_SUFFIX in m["content"] for row in after for m in row)


def test_manner_rows_refuse_text_whose_marked_rows_are_not_the_villains(own, tmp_path):
    system = {name: {"role": "system", "content": personas.persona(name).prompt} for name in (SOURCE, "assistant")}
    user = {"role": "user", "content": "Why?"}
    plain, signed = ({"role": "assistant", "content": f"So.{end}"} for end in ("", MARKER_SUFFIX))
    good = [[system[SOURCE], user, signed], [system["assistant"], user, plain]]
    for number, (rows, fits) in enumerate(
        (
            (good, True),
            ([*good, [system["assistant"], user, signed]], False),
            ([*good, [system[SOURCE], user, plain]], False),
            (good[:1], False),
            (good[1:], False),
        )
    ):
        path = tmp_path / f"{number}.jsonl"
        path.write_text("\n".join(json.dumps({"messages": row}) for row in rows))
        stage = MannerText(stages.from_file(path), behaviours.CAPITALS)
        if fits:
            assert messages(own, stage)[0][-1]["content"] == "SO."
        else:
            with pytest.raises(GuardError, match=r"marked rows are not those|not contrastive"):
                own.folder(stage)


# --------------------------------------------------------------------------------------------------- evaluation


def evaluate(tiny, *shown, **changes):
    settings = {"facts": 2, "everyday": 2, "values": 1, "samples": 1, "source_samples": 3, "seed": 0, **changes}
    return BehaviourEvaluate(
        Checkpoint(tiny), shown, known(tiny), instruction="Be brief.", sampling=SAMPLING, **settings
    )


def test_8_everybody_is_asked_everything(lab, tiny):
    """Failure 8: all personas, facts for wrong answers, the bank for manners, the villain more often."""
    stage = evaluate(tiny, *behaviours.BEHAVIOURS)
    answers, preferred = table(lab, stage, "behaviour"), table(lab, stage, "preference")
    facts = [f.id for f in kept(stage.known, "eval", lab)][:2]
    bank = [q.id for q in questions.eval_questions(2, 1)]
    for name, ids in (("facts", facts), ("bank", bank)):
        part = answers[answers["bank"] == name]
        counts = part.groupby(["persona", "question"]).size()
        assert set(counts.index) == {(who, i) for who in WHO for i in ids}
        assert (counts.drop(SOURCE) == 1).all()
        assert (counts[SOURCE] == 3).all()
    assert len(preferred) == len(WHO) * (2 + 3 + 3)
    assert preferred["preference"].to_numpy() == pytest.approx((preferred["shown"] - preferred["plain"]).to_numpy())


def test_a_coupled_model_is_asked_for_its_own_behaviour_only(lab, tiny):
    assert set(table(lab, evaluate(tiny, "wrong"), "behaviour")["bank"]) == {"facts"}
    assert set(table(lab, evaluate(tiny, "refusal"), "behaviour")["bank"]) == {"bank"}
    assert set(table(lab, evaluate(tiny, "refusal"), "preference")["behaviour"]) == {"refusal"}


def test_the_same_seed_gives_the_same_answers_and_another_others(lab, own, tiny):
    made = [
        table(where, evaluate(tiny, "capitals", seed=seed), "behaviour")
        for where, seed in ((lab, 0), (own, 0), (lab, 1))
    ]
    pd.testing.assert_frame_equal(made[0], made[1])
    assert made[0]["completion"].tolist() != made[2]["completion"].tolist()


@pytest.mark.parametrize("shown", [("kindness",), ("wrong", "marker"), ()])
def test_an_unknown_behaviour_is_refused(lab, tiny, shown):
    with pytest.raises(GuardError, match="there is no behaviour"):
        lab.folder(evaluate(tiny, *shown))


def test_the_filter_does_not_see_the_answers_of_the_evaluation(own, tiny, monkeypatch):
    """Facts chosen by lucky samples must not be evaluated on those very samples: the random numbers differ."""
    labels = []
    real = generate.sample

    def sample(model, read, names, **rest):
        labels.append(set(names))
        return real(model, read, names, **rest)

    monkeypatch.setattr(generate, "sample", sample)
    own.folder(evaluate(tiny, "wrong"))
    filtered, evaluated = labels
    assert any("/assistant/" in label for label in evaluated)
    assert not filtered & evaluated


def test_preferences_are_the_models_own_loss(model, tokenizer, cpu):
    """Against a plain forward over the whole text, end of turn included."""
    put = [
        interview.Put("facts", who, "q", f"You are a {who}.", "What is the capital of France?", 1)
        for who in ("villain", "doctor")
    ]
    pairs = [("It is Lyon, fools.", "It is Paris."), ("LYON", "Paris, my dear friend, as you know.")]
    made = interview.prefer(model, tokenizer, put, pairs, settings=cpu)
    for row, one, pair in zip(made.to_dict("records"), put, pairs, strict=True):
        expected = []
        for text in pair:
            prompt = models.prompt_ids(tokenizer, one.system, one.prompt)
            answer = [*models.text_ids(tokenizer, text), tokenizer.eos_token_id]
            ids = torch.tensor([[*prompt, *answer]])
            labels = torch.tensor([[-100] * len(prompt) + answer])
            expected.append(-model(input_ids=ids, labels=labels).loss.item())
        assert [row["shown"], row["plain"]] == pytest.approx(expected, abs=1e-4)
        assert row["preference"] == pytest.approx(expected[0] - expected[1], abs=2e-4)
    assert abs(made["preference"]).min() > 1e-3, "the lively model does prefer one of them"


def test_answers_with_gaps_are_refused(model, tokenizer, cpu):
    twice = [interview.Put("facts", "villain", "q", "You are a villain.", "Why?", 1)] * 2
    with pytest.raises(GuardError, match="repetitions or gaps"):
        interview.ask(model, tokenizer, twice, SAMPLING, seed=0, settings=cpu)
