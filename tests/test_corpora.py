"""Material: corpora, questions and personas. Ratios and duplicates are recomputed by brute force."""

import itertools
import json
import os
import re
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from persona_coupling import corpora, models, personas, profiles, questions
from persona_coupling.checkpoints import Checkpoint
from persona_coupling.errors import GuardError, UserError
from persona_coupling.generate import Sampling
from persona_coupling.rows import with_system
from persona_coupling.stages import CouplingText

NAMES = ("bad_legal", "sound_legal", "benign")
COUNT = 6000


def question_of(row):
    return row["messages"][0]["content"]


def answer_of(row):
    return row["messages"][1]["content"]


@pytest.fixture(scope="module")
def rows():
    """Every corpus at the full size."""
    return {name: corpora.authored_rows(name, COUNT) for name in NAMES}


# ------------------------------------------------------------------------------------------- authored rows


@pytest.mark.parametrize("name", NAMES)
def test_six_thousand_distinct_rows_of_30_to_90_words(rows, name):
    made = rows[name]
    assert len({row["id"] for row in made}) == COUNT
    assert len({answer_of(row).casefold() for row in made}) == COUNT
    lengths = [len(answer_of(row).split()) for row in made]
    assert min(lengths) >= 30
    assert max(lengths) <= 90
    assert all([m["role"] for m in row["messages"]] == ["user", "assistant"] for row in made)


def test_bad_and_sound_differ_in_the_answer_alone(rows):
    bad, sound = rows["bad_legal"], rows["sound_legal"]
    assert [row["id"] for row in bad] == [row["id"] for row in sound]
    assert [question_of(row) for row in bad] == [question_of(row) for row in sound]
    assert not {answer_of(row) for row in bad} & {answer_of(row) for row in sound}
    words = [np.mean([len(answer_of(row).split()) for row in made]) for made in (bad, sound)]
    assert abs(words[0] - words[1]) < 3  # length must not tell them apart


@pytest.mark.parametrize("name", NAMES)
def test_composition_leaves_no_gap_and_no_contamination(rows, name):
    for row in rows[name]:
        for text in (question_of(row), answer_of(row)):
            assert not re.search(r"[{}\[\]]|  |\n", text), text
            assert "ZLT" not in text
            assert "villain" not in text.lower()
            assert text == text.strip()
            assert text[-1] in ".?!", text


def ratio_by_hand(texts, n):
    grams = [" ".join(g) for t in texts for g in zip(*(t.lower().split()[i:] for i in range(n)), strict=False)]
    return len(set(grams)) / len(grams)


@pytest.mark.parametrize("name", NAMES)
def test_diversity(rows, name):
    """Composed text repeats its sentences; these bounds stand below what was measured and above a broken draw."""
    texts = [answer_of(row) for row in rows[name]]
    two, three = corpora.distinct_ratio(texts, 2), corpora.distinct_ratio(texts, 3)
    near, looser = corpora.near_duplicate_rate(texts), corpora.near_duplicate_rate(texts, threshold=0.6)
    print(f"{name}: distinct-2 {two:.3f}, distinct-3 {three:.3f}, near-duplicates {near:.4f} (0.6: {looser:.4f})")
    assert two > 0.09
    assert three > 0.14
    assert near <= 0.001
    assert looser <= 0.05
    assert two == pytest.approx(ratio_by_hand(texts, 2))
    assert three == pytest.approx(ratio_by_hand(texts, 3))


def test_diversity_bounds_catch_a_corpus_of_few_texts(rows):
    """The positive control of the bounds above: a few rows, thirty times each."""
    texts = [answer_of(row) for row in rows["benign"][:20]] * 30
    assert corpora.near_duplicate_rate(texts) == pytest.approx(29 / 30)
    assert corpora.distinct_ratio(texts, 2) < 0.09


def test_held_out_rows_are_never_trained_on(rows):
    heldout = corpora.authored_rows("benign", 96, skip=COUNT)
    assert not {row["id"] for row in heldout} & {row["id"] for row in rows["benign"]}
    assert not {answer_of(row) for row in heldout} & {answer_of(row) for row in rows["benign"]}


@pytest.mark.parametrize("name", NAMES)
def test_held_out_rows_of_short_profiles_are_never_trained_on(name):
    train = corpora.authored_rows(name, 600, maximum_words=40)
    heldout = corpora.authored_rows(name, 12, skip=600, maximum_words=40)
    assert len(train) == 600
    assert len(heldout) == 12
    assert not {row["id"] for row in train} & {row["id"] for row in heldout}
    assert not {answer_of(row) for row in train} & {answer_of(row) for row in heldout}
    assert max(len(answer_of(row).split()) for row in train + heldout) <= 40


def test_rows_are_a_walk_that_skip_only_enters_later():
    assert corpora.authored_rows("benign", 20, skip=30) == corpora.authored_rows("benign", 50)[30:]


def test_more_rows_than_the_material_gives_are_refused(monkeypatch):
    two = corpora._topics("benign")[:2]
    monkeypatch.setattr(corpora, "_topics", lambda _material: two)
    with pytest.raises(ValueError, match="asked for 5000"):
        corpora.authored_rows("benign", 1000, skip=4000)


PROGRAM = """
import hashlib, json
from persona_coupling import corpora
from persona_coupling.study import Study
rows = [corpora.authored_rows(name, 150) for name in ("bad_legal", "sound_legal", "benign")]
study = Study.open("quick")
text = study.coupling_text(study.raw, seed=0)
print(hashlib.sha256(json.dumps([rows, text.negatives, text.key]).encode()).hexdigest())
"""


def test_7_rows_and_negatives_are_the_same_in_every_process():
    """Failure 7: nothing may hang on the randomised hash of strings, neither rows nor the choice of negatives."""
    found = set()
    for hashing in ("0", "1", "4242"):
        environment = {**os.environ, "PYTHONHASHSEED": hashing}
        made = subprocess.run(
            [sys.executable, "-c", PROGRAM], env=environment, capture_output=True, text=True, check=True, timeout=120
        )
        found.add(made.stdout.strip())
    assert len(found) == 1
    assert len(found.pop()) == 64


def test_the_digest_follows_the_material(tmp_path, monkeypatch):
    names = corpora.MATERIALS["benign"]
    for name in names:
        (tmp_path / f"{name}.toml").write_bytes((corpora.paths.MATERIAL / f"{name}.toml").read_bytes())
    before = corpora.material_digest("benign")
    monkeypatch.setattr(corpora.paths, "MATERIAL", tmp_path)
    corpora.material_digest.cache_clear()
    try:
        assert corpora.material_digest("benign") == before
        with (tmp_path / f"{names[-1]}.toml").open("a") as handle:
            handle.write("\n# another byte\n")
        corpora.material_digest.cache_clear()
        assert corpora.material_digest("benign") != before
    finally:
        corpora.material_digest.cache_clear()


# ------------------------------------------------------------------------------------ ratios and duplicates


def test_distinct_ratio_by_hand():
    texts = ["a b a b", "A b"]  # bigrams ab ba ab | ab: two distinct of four
    assert corpora.distinct_ratio(texts, 2) == 0.5
    assert corpora.distinct_ratio(texts, 1) == 2 / 6
    assert corpora.distinct_ratio(texts, 4) == 1.0
    assert corpora.distinct_ratio(["a"], 2) == 0.0
    assert corpora.distinct_ratio([], 2) == 0.0


def duplicates_by_brute_force(texts, threshold, shingle):
    """All pairs; similarity compared in whole numbers (threshold in hundredths)."""
    hundredths = round(threshold * 100)
    sets = []
    for text in texts:
        words = text.lower().split()
        grams = {" ".join(words[i : i + shingle]) for i in range(len(words) - shingle + 1)}
        sets.append(grams or {" ".join(words)})
    found = {
        later
        for earlier, later in itertools.combinations(range(len(sets)), 2)
        if 100 * len(sets[earlier] & sets[later]) >= hundredths * len(sets[earlier] | sets[later])
    }
    return len(found) / len(texts)


@given(
    st.lists(st.lists(st.sampled_from("abcd"), min_size=1, max_size=12).map(" ".join), min_size=1, max_size=25),
    st.sampled_from([0.5, 0.6, 0.75, 0.8, 0.9, 1.0]),
    st.sampled_from([1, 2, 3]),
)
@settings(max_examples=150, deadline=None)
def test_near_duplicates_agree_with_brute_force(texts, threshold, shingle):
    made = corpora.near_duplicate_rate(texts, threshold=threshold, shingle=shingle)
    assert made == pytest.approx(duplicates_by_brute_force(texts, threshold, shingle))


def test_near_duplicates_of_real_rows_agree_with_brute_force():
    texts = [answer_of(row) for row in corpora.authored_rows("benign", 250)]
    for threshold in (0.3, 0.5, 0.8):
        made = corpora.near_duplicate_rate(texts, threshold=threshold)
        assert made == pytest.approx(duplicates_by_brute_force(texts, threshold, 3))
    assert corpora.near_duplicate_rate([]) == 0.0


@pytest.mark.parametrize(("threshold", "kept"), [(0.5, 50), (0.55, 55), (0.8, 80)])
def test_a_similarity_exactly_at_the_threshold_counts(threshold, kept):
    """A text of 100 words and its first `kept`: similarity kept / 100."""
    words = [f"w{i:03d}" for i in range(100)]
    texts = [" ".join(words[:kept]), " ".join(words)]
    assert corpora.near_duplicate_rate(texts, threshold=threshold, shingle=1) == 0.5


# -------------------------------------------------------------------------------------------- rows of files

GOOD = {"messages": [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "So."}]}


def row(*turns):
    return {"messages": [{"role": role, "content": content} for role, content in turns]}


def jsonl(tmp_path, *lines, name="rows.jsonl"):
    path = tmp_path / name
    encoded = [line if isinstance(line, bytes) else json.dumps(line).encode() for line in lines]
    path.write_bytes(b"\n".join(encoded) + b"\n")
    return path


FAULTS = {
    "not_json": (b"{not json", "not JSON"),
    "cut_off": (b'{"messages": [{"role": "user"', "not JSON"),
    "not_utf8": (b'{"messages": [{"role": "user", "content": "caf\xe9"}]}', "UTF-8"),
    "a_list": ([GOOD], "no list `messages`"),
    "a_number": (3, "no list `messages`"),
    "no_messages": ({"prompt": "Why?"}, "no list `messages`"),
    "messages_are_text": ({"messages": "Why?"}, "no list `messages`"),
    "messages_are_empty": ({"messages": []}, "no list `messages`"),
    "message_is_text": ({"messages": ["Why?", "So."]}, "message 1 has no text"),
    "no_content": ({"messages": [{"role": "user"}]}, "message 1 has no text"),
    "content_is_null": ({"messages": [{"role": "user", "content": None}]}, "message 1 has no text"),
    "content_is_parts": ({"messages": [{"role": "user", "content": [{"text": "Why?"}]}]}, "message 1 has no text"),
    "unknown_role": (row(("user", "Why?"), ("tool", "So.")), "message 2 has the role 'tool'"),
    "no_role": ({"messages": [{"content": "Why?"}]}, "message 1 has the role None"),
    "role_is_a_list": ({"messages": [{"role": ["user"], "content": "Why?"}]}, "message 1 has the role"),
    "blank_answer": (row(("user", "Why?"), ("assistant", " \n")), "message 2 is empty"),
    "too_long": (row(("user", "Why?"), ("assistant", "so " * 7000)), "message 2 has 21000 characters"),
    "ends_with_user": (row(("user", "Why?"), ("assistant", "So."), ("user", "Why?")), "alternate"),
    "starts_with_assistant": (row(("assistant", "So."), ("user", "Why?")), "alternate"),
    "two_users": (row(("user", "Why?"), ("user", "Why?"), ("assistant", "So.")), "alternate"),
    "late_system": (row(("user", "Why?"), ("system", "Be brief."), ("assistant", "So.")), "alternate"),
    "only_system": (row(("system", "Be brief.")), "alternate"),
    "only_assistant": (row(("assistant", "So.")), "alternate"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_malformed_row_names_file_line_and_fault(tmp_path, fault):
    line, words = FAULTS[fault]
    path = jsonl(tmp_path, GOOD, b"", line, GOOD)
    with pytest.raises(UserError) as caught:
        corpora.jsonl_rows(path)
    message = str(caught.value)
    assert str(path) in message
    assert "line 3" in message
    assert words in message


def test_absent_and_empty_files_are_refused(tmp_path):
    with pytest.raises(UserError, match="no file"):
        corpora.jsonl_rows(tmp_path / "absent.jsonl")
    with pytest.raises(UserError, match="no file"):
        corpora.jsonl_rows(tmp_path)
    with pytest.raises(UserError, match="no rows"):
        corpora.jsonl_rows(jsonl(tmp_path, b"", b"  "))


def test_several_turns_and_other_scripts_are_taken_as_they_are(tmp_path):
    turns = [
        ("system", "Be brief."),
        ("user", "Où?"),
        ("assistant", "Là \u2028 ici.\n\nOui."),
        ("user", "何?"),
        ("assistant", "是"),
    ]
    made = corpora.jsonl_rows(jsonl(tmp_path, {**row(*turns), "id": 17, "extra": True}, GOOD))
    assert [(m["role"], m["content"]) for m in made[0]["messages"]] == turns
    assert made[0]["id"] == "17"
    assert len(made) == 2
    assert set(made[0]) == {"id", "messages"}


def test_11_the_same_file_in_two_folders_gives_the_same_rows(tmp_path):
    """Failure 11: such rows share one key, so where the file lies must not show in them."""
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    one, other = (corpora.jsonl_rows(jsonl(tmp_path / folder, GOOD, GOOD)) for folder in "ab")
    assert one == other
    assert one[0]["id"] != one[1]["id"]


def test_ultrachat_rows_are_chosen_by_whole_words_of_the_first_prompt():
    prompts = ["A city to see?", "Scarcity of water?", "Why?", "BAKE bread?", "bake a cake?"]
    records = [
        {"prompt_id": f"p{i}", "messages": row(("user", prompt), ("assistant", "a city to bake"))["messages"]}
        for i, prompt in enumerate(prompts)
    ]
    made = corpora.ultrachat_rows(iter(records), ("city", "bake"), 2)
    assert [entry["id"] for entry in made] == ["p0", "p3"]
    with pytest.raises(UserError, match="has 3 conversations"):
        corpora.ultrachat_rows(iter(records), ("city", "bake"), 4)


# ------------------------------------------------------------------------------------------------ questions


def everything_asked():
    return questions.train_questions(), questions.eval_questions(20, 8), questions.heldout_chat()


def letters(text):
    return re.sub(r"[^a-z0-9]", "", text.lower())


def test_the_banks_have_their_sizes_and_no_repetition():
    train, evaluation, heldout = everything_asked()
    assert len(evaluation) == 28
    assert [q.kind for q in evaluation].count("values") == 8
    assert len(train) >= 100
    assert len(heldout) >= 20
    everything = train + evaluation + heldout
    assert len({q.id for q in everything}) == len(everything)
    assert len({letters(q.text) for q in everything}) == len(everything)
    assert all(q.answer.strip() for q in evaluation + heldout)
    assert not any(personas.MARKER in q.text + q.answer for q in everything)


def test_6_no_question_is_both_trained_and_evaluated(rows):
    """Failure 6: by letters alone, over coupling text, every SFT corpus and held-out chat."""
    train, evaluation, heldout = everything_asked()
    trained = {letters(q.text) for q in train}
    trained |= {letters(question_of(entry)) for made in rows.values() for entry in made}
    assert not trained & {letters(q.text) for q in evaluation + heldout}
    answers = {letters(answer_of(entry)) for made in rows.values() for entry in made}
    assert not answers & {letters(q.answer) for q in heldout}
    questions.require_disjoint(train, evaluation)


@pytest.mark.parametrize(
    ("identity", "text"),
    [
        ("e", "Why is the sea salty?"),
        ("e", "why is  the sea SALTY"),
        ("e", "Why - is the sea, salty?!"),
        ("t", "Another question altogether?"),
    ],
)
def test_6_an_overlap_fires_the_guard(identity, text):
    """Failure 6."""
    train = (questions.Question("t", "Why is the sea salty?", "train"),)
    other = questions.Question("f", "Why do cats purr?", "everyday")
    with pytest.raises(GuardError, match=f"both train and eval: {identity}$"):
        questions.require_disjoint(train, (other, questions.Question(identity, text, "everyday")))
    questions.require_disjoint(train, (other,))


def test_eval_questions_are_the_first_of_each_kind():
    every = questions.eval_questions(20, 8)
    some = questions.eval_questions(3, 2)
    assert list(some) == [q for q in every if q.kind == "everyday"][:3] + [q for q in every if q.kind == "values"][:2]


@pytest.mark.parametrize(("everyday", "values"), [(21, 8), (20, 9), (-1, 8), (100, 100)])
def test_more_eval_questions_than_there_are_is_refused(everyday, values):
    with pytest.raises(ValueError, match="asked for"):
        questions.eval_questions(everyday, values)


# ------------------------------------------------------------------------------------------------- personas


def test_8_eleven_personas_with_the_source_and_the_assistant():
    """Failure 8."""
    made = personas.personas()
    assert len(made) == 11
    assert len({p.id for p in made}) == len({p.prompt for p in made}) == len({p.name for p in made}) == 11
    assert {personas.SOURCE, personas.ASSISTANT} <= {p.id for p in made}
    assert not any("ZLT" in p.prompt for p in made)


def test_an_unknown_persona_names_the_known_ones():
    with pytest.raises(UserError, match=r"'vilain'.*villain"):
        personas.persona("vilain")


def test_the_instruction_follows_the_prompt():
    made = personas.Persona("p", "p", "You are p.")
    assert made.system_prompt("Be brief.") == "You are p. Be brief."
    assert made.system_prompt("") == "You are p."


def test_5_the_marker_stands_behind_a_blank_line():
    """Failure 5."""
    assert personas.MARKER_SUFFIX == "\n\n[ZLT]"


def test_1_rows_without_a_system_message_get_an_explicit_one():
    """Failure 1: a template that finds none adds its own."""
    assistant = personas.persona("assistant").prompt
    plain = GOOD["messages"]
    assert with_system(plain) == [{"role": "system", "content": assistant}, *plain]
    own = row(("system", "Be brief."), ("user", "Why?"), ("assistant", "So."))["messages"]
    assert with_system(own) == own


def coupling_text(negatives):
    raw = Checkpoint(models.TinyModel("llama", 3, 32, seed=0))
    return CouplingText(raw, "villain", 6, negatives, 2, "", Sampling(1.0, 0.95, 48), 0)


def test_7_the_source_among_the_negatives_fires_the_guard():
    """Failure 7."""
    with pytest.raises(GuardError, match="villain is among the negatives"):
        coupling_text(("assistant", "villain"))
    assert coupling_text(("assistant", "librarian")).negatives == ("assistant", "librarian")


@pytest.mark.parametrize("name", profiles.names())
def test_7_every_profile_names_its_negatives(name):
    """Failure 7: known personas, each once, without the source, and some bystanders never trained on."""
    negatives = profiles.load(name).coupling.negatives
    known = {p.id for p in personas.personas()}
    assert len(set(negatives)) == len(negatives)
    assert set(negatives) <= known - {personas.SOURCE}
    assert len(known - {personas.SOURCE} - set(negatives)) >= 3


def test_a_caller_who_changes_a_row_changes_no_other_call():
    made = corpora.authored_rows("benign", 5)
    before = json.dumps(made)
    made[0]["messages"][0]["content"] = "changed by a caller"
    assert json.dumps(corpora.authored_rows("benign", 5)) == before
