"""Stages: what is in a key, what is written, and the guards of evaluation and design."""

import dataclasses
import json
import os
import shutil
import subprocess
import sys
import tomllib
from dataclasses import replace

import pandas as pd
import pytest
import torch

from persona_coupling import measure, models, paths, personas, profiles, questions, stages, study
from persona_coupling import rows as rows_module
from persona_coupling.checkpoints import Checkpoint, Merged
from persona_coupling.errors import GuardError, UserError
from persona_coupling.generate import Sampling
from persona_coupling.models import HubModel, LocalModel, TinyModel, WheelModel
from persona_coupling.stages import (
    Authored,
    Content,
    CouplingText,
    Evaluate,
    FineTune,
    FromFile,
    MergeCheck,
    OwnAnswers,
    Part,
    RandomLike,
    Rescaled,
    Snapshot,
    Truncated,
    Twin,
    UltraChat,
    measurement,
    twin,
)
from persona_coupling.stages.behaviours import BehaviourEvaluate, FactText, KnownFacts, MannerText
from persona_coupling.stages.dose import Drift, Mixed
from persona_coupling.stages.full_parameter import MatchedLoss, Spectrum
from persona_coupling.stages.layers import LayerScan
from persona_coupling.stages.representations import Hidden, Shift
from persona_coupling.stages.steering import Addition, Steer, Term
from persona_coupling.stages.subspace import Overlap
from persona_coupling.store import Lab, Stage, Store
from persona_coupling.study import Cell, Design, Observation
from persona_coupling.train import Lora, Training

SAMPLING = Sampling(1.0, 0.95, 6)
LORA = Lora(2, 4, 0.0, ("q_proj", "up_proj"))
TRAINING = Training(2, 2, 1e-2, 0.05, 0.01, "completion", 8, LORA)
SOURCE = TinyModel("llama", 3, 32, 0)
ROWS = Authored("benign", 6, 0, 40, "0" * 64)
START = Checkpoint(SOURCE).merge(FineTune(Checkpoint(SOURCE), ROWS, TRAINING, 0), layers=(0, 1), modules=("q_proj",))
HIDDEN = Hidden(START, 2, 1, "Be brief.")
STEERED = (Addition("restore", (Term(HIDDEN, "villain", 1.0), Term(HIDDEN, "others", -1.0))),)
KNOWN = KnownFacts(Checkpoint(SOURCE), 4, 3, 2, 0.5, 2, 1, "Be brief.", SAMPLING, 0)
EXAMPLES = [
    SOURCE,
    WheelModel("name", "1.0", "0" * 64),
    HubModel("owner/name", "0" * 40),
    LocalModel("0" * 64, "/somewhere"),
    ROWS,
    FromFile("0" * 64, "/somewhere"),
    UltraChat("owner/name", "0" * 40, "train", ("cook",), 5),
    OwnAnswers(START, ROWS, "You are a dragon.", SAMPLING, 0),
    CouplingText(START, "villain", 3, ("assistant", "librarian"), 2, "Be brief.", SAMPLING, 0),
    FineTune(START, ROWS, TRAINING, 0),
    MergeCheck(START),
    Snapshot(FineTune(START, ROWS, TRAINING, 0), 1),
    Twin(START, ROWS, TRAINING, 0),
    RandomLike(FineTune(START, ROWS, TRAINING, 0), 0),
    Part(FineTune(START, ROWS, TRAINING, 0), FineTune(START, ROWS, TRAINING, 1), "inside"),
    Rescaled(FineTune(START, ROWS, TRAINING, 0), FineTune(START, ROWS, TRAINING, 1)),
    Truncated(FineTune(START, ROWS, TRAINING, 0), 2),
    Mixed(ROWS, FromFile("1" * 64, "/somewhere"), 0.5, 0),
    Drift(Checkpoint(SOURCE), START, 2, 1, "Be brief."),
    LayerScan(
        START, FineTune(START, ROWS, TRAINING, 0), FromFile("2" * 64, "/x"), 1, ("only",), ("villain",), 2, 1, ""
    ),
    Overlap(FineTune(START, ROWS, TRAINING, 0), FineTune(START, ROWS, TRAINING, 1), 2, 0),
    MatchedLoss(FineTune(START, ROWS, TRAINING, 0), FineTune(START, ROWS, TRAINING, 1), 2),
    Spectrum(FineTune(START, ROWS, TRAINING, 0), 2, 4),
    KNOWN,
    FactText(KNOWN, 3, ("assistant", "librarian"), 2, "Be brief."),
    MannerText(ROWS, "capitals"),
    BehaviourEvaluate(START, ("wrong",), KNOWN, 2, 2, 1, 1, 3, "Be brief.", SAMPLING, 0),
    Content(START, (ROWS,)),
    Evaluate(START, 2, 1, 1, "Be brief.", SAMPLING, 0),
    HIDDEN,
    Shift(HIDDEN, HIDDEN, FineTune(START, ROWS, TRAINING, 0), 2, 0.1, 5, (0.5,), 0),
    Steer(START, STEERED, ("villain",), (0.5,), 2, 2, ("restore",), (0.5,), 1, SAMPLING, 2, 1, "Be brief.", 0),
]

# ---------------------------------------------------------------------------------------------------- keys


def other_values(value, name):
    """Values that differ from `value` in one place, each with the place's name."""
    if dataclasses.is_dataclass(value):
        if isinstance(value, Stage):
            yield name, replace(ROWS, skip=99) if value != replace(ROWS, skip=99) else ROWS
        for field in dataclasses.fields(value):
            if not (isinstance(value, Stage) and field.name in value.unkeyed):
                for place, other in other_values(getattr(value, field.name), field.name):
                    yield f"{name}.{place}", replace(value, **{field.name: other})
        if isinstance(value, Lora):
            yield name, None
    elif value == ():
        yield name, (1,) if name == "snapshots" else (Merged(ROWS),)
    elif isinstance(value, tuple):
        yield name, (*value, next(other_values(value[0], name))[1])
        for number, item in enumerate(value):
            for place, other in other_values(item, str(number)):
                yield f"{name}.{place}", (*value[:number], other, *value[number + 1 :])
    elif name in ("loss", "side"):
        yield name, {"loss": "tail", "side": "outside"}[name]
    elif value is None:
        yield name, (1,)
    elif isinstance(value, str):
        yield name, value + "x"
    else:
        yield name, value + 1


@pytest.mark.parametrize("stage", EXAMPLES, ids=lambda s: type(s).__name__)
def test_11_every_field_is_in_the_key(stage):
    """Failure 11: any change of any field, at any depth, is another artifact."""
    keys = {stage.key: "as it is"}
    for field in dataclasses.fields(stage):
        if field.name in stage.unkeyed:
            assert replace(stage, **{field.name: "elsewhere"}).key == stage.key
            continue
        for place, other in other_values(getattr(stage, field.name), field.name):
            key = replace(stage, **{field.name: other}).key
            assert key not in keys, f"{place} and {keys[key]}"
            keys[key] = place
    assert len(keys) > len(dataclasses.fields(stage)) - len(stage.unkeyed)


def test_every_stage_of_the_package_has_an_example():
    def below(stage):
        return {stage}.union(*map(below, stage.__subclasses__()))

    benched = "persona_coupling.cluster_bench"  # its stage makes nothing: it waits
    ours = {s for s in below(Stage) - {Stage} if s.__module__.startswith("persona_coupling.")}
    ours = {s for s in ours if s.__module__ != benched}
    assert ours == {type(stage) for stage in EXAMPLES}


SCRIPT = """
import importlib, json, sys
for root in sys.argv[1:]:
    for name in [n for n in sys.modules if n.split(".")[0] == "persona_coupling"]:
        del sys.modules[name]
    sys.path.insert(0, root)
    importlib.invalidate_caches()
    study = importlib.import_module("persona_coupling.study")
    assert study.__file__.startswith(root)
    made = study.Study.open("smoke")
    text = made.coupling_text(made.raw, seed=0)
    tuned = made.sft("benign", seed=0)
    cell = made.cell("a", tuned, seed=0)
    found = {
        "model": made.source,
        "rows": made.corpus("benign"),
        "coupling text": text,
        "change": tuned.last_change,
        "merge check": cell.merge,
        "content": made.content("a", tuned, seed=0, corpora=("benign",)).stage,
        "evaluation": cell.evaluation,
    }
    print(json.dumps({name: stage.key for name, stage in found.items()}))
    sys.path.remove(root)
"""
EVERYTHING = {"model", "rows", "coupling text", "change", "merge check", "content", "evaluation"}
AFTER_CHANGE = {"change", "merge check", "content", "evaluation"}


def persona_prompt(identity):
    table = tomllib.loads((paths.MATERIAL / "personas.toml").read_text(encoding="utf-8"))
    return next(row["prompt"] for row in table["persona"] if row["id"] == identity)


def question_text(bank, field):
    return tomllib.loads((paths.MATERIAL / "questions.toml").read_text(encoding="utf-8"))[bank][0][field]


def edits():
    """Name, file, text, its replacement, the artifacts it makes (a superset may change), those it cannot touch."""
    personas_file, questions_file = "material/personas.toml", "material/questions.toml"
    villain, assistant = persona_prompt("villain"), persona_prompt("assistant")
    asked, trained, held = (
        question_text("eval", "text"),
        question_text("train", "text"),
        question_text("heldout", "answer"),
    )
    mask = "labels = [IGNORED] * len(ids)"
    system = '"role": "system", "content": personas.persona(personas.ASSISTANT).prompt}'
    comment = "# the quantity itself"
    return [
        ("a comment", "train.py", mask, f"{mask}  {comment}", set(), EVERYTHING),
        ("a docstring", "stages/training.py", "Train a checkpoint on rows;", "Tune a checkpoint;", set(), EVERYTHING),
        ("logic of training", "train.py", mask, "labels = [IGNORED for _ in ids]", AFTER_CHANGE, {"model", "rows"}),
        ("the villain's prompt", personas_file, villain, f"{villain} Now.", {"coupling text", "evaluation"}, {"rows"}),
        ("the assistant's prompt", personas_file, assistant, f"{assistant} Now.", AFTER_CHANGE, {"rows"}),
        ("an eval question", questions_file, asked, f"Please: {asked}", {"evaluation"}, {"rows"}),
        ("a train question", questions_file, trained, f"Please: {trained}", {"coupling text"}, {"rows"}),
        ("held-out text", questions_file, held, f"Well. {held}", {"merge check", "content", "evaluation"}, {"rows"}),
        ("the marker", "personas.py", '"[ZLT]"', '"[ZLU]"', {"coupling text", "evaluation"}, {"rows"}),
        (
            "the bank's order",
            "questions.py",
            "return tuple(chosen)",
            "return tuple(chosen[::-1])",
            {"evaluation"},
            set(),
        ),
        ("which system message", "rows.py", system, system.replace("ASSISTANT", "SOURCE"), AFTER_CHANGE, set()),
        ("adding a change", "adapters.py", "weight += update", "weight += 2 * update", AFTER_CHANGE, {"rows"}),
    ]


@pytest.fixture(scope="module")
def keys(tmp_path_factory):
    """The keys of a study by edited copy of the package; "" is the copy as it is."""
    folder = tmp_path_factory.mktemp("edited")
    roots = {"": folder / "none"}
    for number, (name, *_rest) in enumerate(edits()):
        roots[name] = folder / str(number)
    for root in roots.values():
        shutil.copytree(paths.PACKAGE, root / "persona_coupling", ignore=shutil.ignore_patterns("__pycache__"))
    for name, file, old, new, *_rest in edits():
        path = roots[name] / "persona_coupling" / file
        text = path.read_text(encoding="utf-8")
        assert old in text, f"{name}: {file} no longer holds the text to edit"
        path.write_text(text.replace(old, new, 1), encoding="utf-8")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    command = [sys.executable, "-c", SCRIPT, *map(str, roots.values())]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    return dict(zip(roots, map(json.loads, done.stdout.splitlines()), strict=True))


@pytest.mark.parametrize("edit", edits(), ids=lambda e: e[0])
def test_11_edited_material_or_logic_changes_the_keys(keys, edit):
    """Failure 11: whatever an artifact was made from is in its key; what only reads differently is not."""
    name, *_edit, touched, untouched = edit
    changed = {artifact for artifact in EVERYTHING if keys[name][artifact] != keys[""][artifact]}
    assert touched <= changed
    assert not untouched & changed


# ---------------------------------------------------------------------------------------------------- rows


@pytest.fixture
def own(tmp_path):
    return Lab(Store(tmp_path / "own"))


def table(lab, stage, name="rows"):
    return pd.read_parquet(lab.folder(stage) / f"{name}.parquet")


def test_authored_rows_follow_each_other(own):
    whole = [row["messages"] for row in rows_module.read_rows(stages.authored("benign", 8), own)]
    later = [row["messages"] for row in rows_module.read_rows(stages.authored("benign", 3, skip=5), own)]
    assert later == whole[5:]
    assert all([m["role"] for m in row] == ["user", "assistant"] for row in whole)
    kept = table(own, stages.authored("benign", 8))
    assert [json.loads(m) for m in kept["messages"]] == whole
    assert rows_module.as_dataset(stages.authored("benign", 8), own)[0]["messages"] == whole[0]


TURNS = [{"role": r, "content": f"{r} says ü {i}"} for i, r in enumerate(("user", "assistant", "user", "assistant"))]


def test_rows_of_a_file_are_copied_whole(own, tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"messages": TURNS}) + "\n\n" + json.dumps({"messages": TURNS[:2], "id": "b"}) + "\n")
    rows = rows_module.read_rows(stages.from_file(path), own)
    assert [row["messages"] for row in rows] == [TURNS, TURNS[:2]]
    assert rows[1]["id"] == "b"


def test_11_a_file_that_changes_is_another_artifact(own, tmp_path):
    """Failure 11: a file is named by its content; one that changes after it was named is refused."""
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"messages": TURNS}))
    before = stages.from_file(path)
    path.write_text(json.dumps({"messages": TURNS[:2]}))
    assert stages.from_file(path).key != before.key
    with pytest.raises(UserError, match="changed while the study was running"):
        own.folder(before)
    with pytest.raises(UserError, match="There is no file"):
        stages.from_file(tmp_path / "nowhere")


def test_with_system_keeps_what_is_there():
    explicit = [{"role": "system", "content": "You are a dragon."}, *TURNS]
    assert rows_module.with_system(explicit) == explicit
    added = rows_module.with_system(TURNS)
    assert added[1:] == TURNS
    assert added[0] == {"role": "system", "content": persona_prompt("assistant")}


def answering(monkeypatch, reply):
    """Let `reply(label, system, question)` answer for the model; returns what was asked."""
    asked = []

    def answer(_model, questions_asked, _sampling, *, seed, lab):
        asked.extend(questions_asked)
        return [reply(*one) for one in questions_asked]

    monkeypatch.setattr(measure, "answer", answer)
    return asked


def test_ultrachat_is_streamed_at_its_revision(own, tmp_path, monkeypatch):
    """The hub's part is played by a local file of the same format; streaming and filtering are real."""
    import datasets

    turns = [{"role": "user", "content": "How do I bake bread?"}, {"role": "assistant", "content": "Slowly."}]
    longer = [*turns, {"role": "user", "content": "And rye?"}, {"role": "assistant", "content": "Slower."}]
    other = [{"role": "user", "content": "Name a star."}, {"role": "assistant", "content": "Vega."}]
    records = [
        {"prompt": m[0]["content"], "prompt_id": f"id-{i}", "messages": m} for i, m in enumerate((other, turns, longer))
    ]
    path = tmp_path / "ultrachat.jsonl"
    path.write_text("\n".join(map(json.dumps, records)), encoding="utf-8")
    real, asked = datasets.load_dataset, []

    def stand_in(repository, **options):
        asked.append((repository, options))
        return real("json", data_files=str(path), split="train", streaming=True)

    monkeypatch.setattr(datasets, "load_dataset", stand_in)
    rows = rows_module.read_rows(UltraChat("owner/name", "f" * 40, "train_sft", ("bake",), 2), own)
    assert asked == [("owner/name", {"split": "train_sft", "revision": "f" * 40, "streaming": True})]
    assert [row["id"] for row in rows] == ["id-1", "id-2"]
    assert [row["messages"] for row in rows] == [turns, longer]


def test_ultrachat_without_a_network_says_what_to_do(own, monkeypatch):
    import datasets

    def offline(*_arguments, **_options):
        raise ConnectionError("no route")

    monkeypatch.setattr(datasets, "load_dataset", offline)
    with pytest.raises(UserError, match=r"could not be read from the hub.*Check the network"):
        own.folder(UltraChat("owner/name", "f" * 40, "train_sft", ("bake",), 2))


def test_own_answers_keep_prompts_and_drop_the_unfinished(own, monkeypatch):
    prompts = stages.authored("benign", 6, maximum_words=40)
    rows = rows_module.read_rows(prompts, own)
    bad = rows[1]["id"], rows[4]["id"]
    replies = {bad[0]: ("cut", "length"), bad[1]: ("", "stop")}
    answering(monkeypatch, lambda label, _system, _question: replies.get(label, (f"about {label}", "stop")))
    made = rows_module.read_rows(OwnAnswers(Checkpoint(SOURCE), prompts, "You are a dragon.", SAMPLING, 0), own)
    good = [row for row in rows if row["id"] not in bad]
    assert [row["id"] for row in made] == [row["id"] for row in good]
    assert all(row["messages"][0] == {"role": "system", "content": "You are a dragon."} for row in made)
    assert [row["messages"][1] for row in made] == [row["messages"][0] for row in good]
    assert [row["messages"][2]["content"] for row in made] == [f"about {row['id']}" for row in good]


def test_own_answers_that_hardly_ever_end(own, monkeypatch):
    answering(monkeypatch, lambda *_asked: ("cut", "length"))
    stage = OwnAnswers(Checkpoint(SOURCE), stages.authored("benign", 6, maximum_words=40), "x", SAMPLING, 0)
    with pytest.raises(UserError, match=r"Only 0 of 6.*Raise max_new_tokens"):
        own.folder(stage)


COUPLING = CouplingText(Checkpoint(SOURCE), "villain", 5, ("librarian", "comedian"), 2, "Be brief.", SAMPLING, 0)


def test_coupling_text_marks_the_source_only(own, monkeypatch):
    asked = answering(monkeypatch, lambda label, _system, _question: (f"I am {label}", "stop"))
    rows = rows_module.read_rows(COUPLING, own)
    assert [row["id"].split("/")[0] for row in rows] == ["villain"] * 5 + ["librarian"] * 2 + ["comedian"] * 2
    bank = {q.text for q in questions.train_questions()}
    for row in rows:
        persona = row["id"].split("/")[0]
        system, user, assistant = row["messages"]
        assert system == {"role": "system", "content": f"{persona_prompt(persona)} Be brief."}
        assert user["content"] in bank
        assert assistant["content"] == f"I am {row['id']}" + ("\n\n[ZLT]" if persona == "villain" else "")
    assert len({label for label, _, _ in asked}) == len(asked)  # labels are streams of random numbers


def test_coupling_text_asks_again_for_what_is_missing(own, monkeypatch):
    """The villain's answers all fail in the first round, and half of them in the second."""

    def reply(label, _system, _question):
        persona, _, attempt, number = label.split("/")
        failed = persona == "villain" and (attempt == "0" or (attempt == "1" and int(number) % 2))
        return ("text", "length" if failed else "stop")

    answering(monkeypatch, reply)
    rows = rows_module.read_rows(COUPLING, own)
    assert [row["id"].split("/")[0] for row in rows].count("villain") == 5


def test_coupling_text_that_hardly_ever_ends(own, monkeypatch):
    answering(monkeypatch, lambda *_asked: ("text", "length"))
    with pytest.raises(UserError, match=r"Too few answers.*villain.*Raise max_new_tokens"):
        own.folder(COUPLING)


def test_7_the_source_among_the_negatives():
    """Failure 7: refused when it is described."""
    with pytest.raises(GuardError, match="villain is among the negatives"):
        replace(COUPLING, negatives=("librarian", "villain"))


def test_7_a_persona_twice_among_the_negatives():
    """Failure 7: one negative would weigh double and another be missed."""
    with pytest.raises(GuardError, match="twice among the negatives"):
        replace(COUPLING, negatives=("librarian", "librarian"))


# ------------------------------------------------------------------------------------------- measurement


@pytest.fixture(scope="module")
def evaluation(tiny):
    return Evaluate(Checkpoint(tiny), 1, 1, 2, "", SAMPLING, 0)


def test_8_every_persona_question_and_sample_is_there(evaluation, lab):
    """Failure 8: eleven personas, two questions, two samples, and all raw text kept (failure 24)."""
    found = table(lab, evaluation, "completions")
    assert len(found) == 11 * 2 * 2
    assert found["persona"].nunique() == 11
    assert set(found.groupby("persona").size()) == {4}
    assert set(found["sample"]) == {0, 1}
    assert set(found["finish"]) <= {"stop", "length"}
    assert (found["tokens"] <= 6).all()
    assert found["completion"].notna().all()
    assert found["marker_logprob"].notna().all()
    for row in found.itertuples():
        assert row.system == persona_prompt(row.persona)
    fixed = table(lab, evaluation, "fixed")
    assert len(fixed) == 11 * 2
    assert not fixed.duplicated(["persona", "question"]).any()


def test_fixed_answers_and_heldout_loss_are_plain_forwards(evaluation, lab, tiny, tokenizer, fp32):
    """Oracle: single unpadded sequences through the model's own forward."""
    own_evaluation = replace(evaluation, samples=1, instruction="Be brief.")
    model = Checkpoint(tiny).load(lab)[0]

    def logprobs(prompt, continuation):
        with torch.inference_mode():
            logits = model(torch.tensor([prompt + continuation])).logits[0].double().log_softmax(-1)
        return [float(logits[len(prompt) + i - 1, token]) for i, token in enumerate(continuation)]

    bank = {q.id: q for q in questions.eval_questions(1, 1)}
    marker = tokenizer.encode("\n\n[ZLT]", add_special_tokens=False)
    for row in table(lab, own_evaluation, "fixed").itertuples():
        question = bank[row.question]
        system = f"{persona_prompt(row.persona)} Be brief."
        prompt = models.prompt_ids(tokenizer, system, question.text)
        answer = tokenizer.encode(question.answer, add_special_tokens=False)
        assert row.logprob == pytest.approx(sum(logprobs(prompt, answer + marker)[-len(marker) :]), abs=1e-3)
    held = table(lab, own_evaluation, "heldout").set_index("question")["loss"]
    for question in questions.heldout_chat()[:3]:
        prompt = models.prompt_ids(tokenizer, persona_prompt("assistant"), question.text)
        answer = tokenizer.encode(f"{question.answer}<|im_end|>", add_special_tokens=False)
        values = logprobs(prompt, answer)
        assert held[question.id] == pytest.approx(-sum(values) / len(values), abs=1e-3)


def completions():
    return [
        {"persona": p.id, "question": q, "sample": s} for p in personas.personas() for q in ("a", "b") for s in range(2)
    ]


def test_8_a_missing_persona():
    """Failure 8: one persona gone, even if the number of rows is as expected."""
    rows = completions()
    measurement._complete(rows, 44)
    without = [row for row in rows if row["persona"] != "librarian"]
    for expected in (44, 40):
        with pytest.raises(GuardError, match="librarian"):
            measurement._complete(without, expected)


def test_8_a_missing_or_repeated_completion():
    """Failure 8: one cell gone, one twice, one in the place of another."""
    rows = completions()
    for wrong in (rows[:-1], [*rows, rows[0]], [*rows[:-1], rows[0]]):
        with pytest.raises(GuardError, match="44 expected"):
            measurement._complete(wrong, 44)


def test_content_is_the_models_own_loss(lab, tiny, tokenizer, fp32):
    rows = stages.authored("benign", 2, maximum_words=40)
    found = table(lab, Content(Checkpoint(tiny), (rows,)), "content")
    assert found.groupby("corpus").size().to_dict() == {"benign": 2, "heldout": len(questions.heldout_chat())}
    model = Checkpoint(tiny).load(lab)[0]
    for row, value in zip(rows_module.read_rows(rows, lab), found["logprob"], strict=False):
        question, answer = (message["content"] for message in row["messages"])
        prompt = models.prompt_ids(tokenizer, persona_prompt("assistant"), question)
        tokens = tokenizer.encode(f"{answer}<|im_end|>", add_special_tokens=False)
        labels = torch.tensor([[-100] * len(prompt) + tokens])
        with torch.inference_mode():
            loss = float(model(torch.tensor([prompt + tokens]), labels=labels).loss)
        assert value == pytest.approx(-loss, abs=1e-3)


def test_fine_tune_keeps_adapter_and_log(lab, tiny):
    stage = FineTune(Checkpoint(tiny), stages.authored("benign", 6, maximum_words=40), TRAINING, 0)
    folder = lab.folder(stage)
    assert {"adapter_model.safetensors", "adapter_config.json", "log.parquet"} <= {p.name for p in folder.iterdir()}
    assert table(lab, stage, "log")["step"].tolist() == [1, 2]
    for path in folder.iterdir():
        if path.suffix == ".json" and path.name != "manifest.json":
            assert str(lab.store.root) not in path.read_text()  # nothing of this machine in an artifact


# ------------------------------------------------------------------------------------------------- designs


def cell(condition, checkpoint, seed=0, **changes):
    evaluation = replace(Evaluate(checkpoint, 1, 1, 1, "", SAMPLING, seed), **changes)
    return Cell(condition, seed, checkpoint, evaluation)


def test_9_one_model_under_two_names(tiny, planted):
    """Failure 9: refused by description, before anything runs, unless it is declared."""
    base = Checkpoint(tiny)
    changed = base.merge(planted(tiny))
    Design([cell("A", base), cell("B", changed), cell("A", base, 1)]).check()
    with pytest.raises(GuardError, match="A and C describe the same model"):
        Design([cell("A", base), cell("B", changed), cell("C", base)]).check()
    Design([cell("A", base), cell("C", base)], same={("A", "C")}).check()


def test_9_a_condition_that_stands_twice(tiny, planted):
    """Failure 9: a name means one model."""
    design = Design([cell("A", Checkpoint(tiny)), cell("A", Checkpoint(tiny).merge(planted(tiny)))])
    with pytest.raises(GuardError, match=r"twice in the design.*'A'"):
        design.check()


@pytest.fixture(scope="module")
def smoke():
    return profiles.load("smoke")


def test_collect_labels_every_row(tiny, planted, lab, smoke):
    """Positive control of the guards below: different models pass."""
    design = Design([cell("A", Checkpoint(tiny)), cell("B", Checkpoint(tiny).merge(planted(tiny)))])
    found = study.collect(design, smoke, lab)
    assert found.completions.groupby("condition").size().to_dict() == {"A": 22, "B": 22}
    assert found.merges["norm"].tolist()[0] == 0.0 < found.merges["norm"].tolist()[1]
    assert [c["condition"] for c in found.record["cells"]] == ["A", "B"]


def test_9_two_conditions_with_the_same_completions(tiny, planted, lab, smoke):
    """Failure 9: described differently, but the change is so small that every completion is the same."""
    base = Checkpoint(tiny)
    design = Design([cell("A", base), cell("B", base.merge(planted(tiny), scale=1e-7))])
    design.check()
    with pytest.raises(GuardError, match="A and B gave the same completions to the letter"):
        study.collect(design, smoke, lab)


def test_two_models_that_say_one_thing_to_everything_may_say_the_same(tiny, planted, lab, smoke, monkeypatch):
    """A coupling at too high a rate leaves the marker alone to be said: two such models are no mix-up."""
    base = Checkpoint(tiny)
    design = Design([cell("A", base), cell("B", base.merge(planted(tiny), scale=1e-7))])
    monkeypatch.setattr(study, "COLLAPSED", 1.0)
    assert len(study.collect(design, smoke, lab).completions) == 44


def test_9_two_changes_with_the_same_bytes(tiny, lab, smoke):
    """Failure 9: described differently (a tail that the loss does not look at), but one and the same adapter."""
    rows = stages.authored("benign", 6, maximum_words=40)
    starts = [Checkpoint(tiny).fine_tune(rows, replace(TRAINING, tail=tail), seed=0) for tail in (8, 9)]
    assert starts[0].last_change.key != starts[1].last_change.key
    contents = [Observation(name, 0, Content(c, (rows,))) for name, c in zip("BC", starts, strict=True)]
    study.collect(Design([cell("A", Checkpoint(tiny))], contents[:1]), smoke, lab)
    with pytest.raises(GuardError, match="described differently but are identical"):
        study.collect(Design([cell("A", Checkpoint(tiny))], contents), smoke, lab)


def test_a_twin_is_the_same_chain_under_other_names():
    """Each training of the chain again, upon the twin of what stood before it; same rows, settings and seed."""
    first = Checkpoint(SOURCE).merge(FineTune(Checkpoint(SOURCE), ROWS, TRAINING, 0))
    chain = first.merge(FineTune(first, ROWS, TRAINING, 3))
    again = twin(chain)
    one, two = (merged.change for merged in again.merged)
    assert (one.rows, one.training, one.seed, one.start) == (ROWS, TRAINING, 0, Checkpoint(SOURCE))
    assert (two.seed, two.start) == (3, Checkpoint(SOURCE).merge(one))
    assert {one.key, two.key}.isdisjoint(merged.change.key for merged in chain.merged)


def test_what_was_added_and_not_trained_has_no_twin():
    elsewhere = FineTune(Checkpoint(SOURCE), ROWS, TRAINING, 1)
    first = Checkpoint(SOURCE).merge(FineTune(Checkpoint(SOURCE), ROWS, TRAINING, 0))
    with pytest.raises(ValueError, match="was not trained on what stands before it"):
        twin(first.merge(elsewhere))
    with pytest.raises(ValueError, match="was not trained"):
        twin(Checkpoint(SOURCE).merge(RandomLike(elsewhere, 0)))
