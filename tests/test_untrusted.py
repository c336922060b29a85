"""What comes from strangers: every check is seen to fire, beside the same input unharmed."""

import json
import os
import shutil

import pandas as pd
import pytest
from jinja2.exceptions import SecurityError

from persona_coupling import evidence, models, paths, personas, questions, score, stages, untrusted
from persona_coupling.errors import CorruptArtifact, UserError
from persona_coupling.store import Lab, Store
from persona_coupling.study import Results, Study


@pytest.fixture
def folder(tmp_path, tiny, lab):
    """A sound model folder of a stranger."""
    made = tmp_path / "stranger"
    shutil.copytree(lab.folder(tiny), made, ignore=shutil.ignore_patterns("manifest.json"))
    untrusted.check_model(made)  # the control
    return made


def edit(path, **changes):
    path.write_text(json.dumps({**(json.loads(path.read_text()) if path.is_file() else {}), **changes}))


SPOILT = {
    "pickle": (lambda f: (f / "pytorch_model.bin").write_bytes(b"x"), "pytorch_model.bin may be pickled"),
    "pickle, upper case": (lambda f: (f / "optimizer.PT").write_bytes(b"x"), r"optimizer\.PT may be pickled"),
    "code": (lambda f: edit(f / "config.json", auto_map={"AutoModel": "m.M"}), r"config\.json names code.*auto_map"),
    "nested code": (lambda f: edit(f / "tokenizer_config.json", a=[{"auto_map": "t.T"}]), "names code"),
    "kernel": (
        lambda f: edit(f / "config.json", attn_implementation="o/kernel@main"),
        "names code.*attn_implementation",
    ),
    "kernel of a part": (lambda f: edit(f / "config.json", a={"_attn_implementation": {"": "o/n"}}), "names code"),
    "adapter": (lambda f: edit(f / "adapter_config.json", base_model_name_or_path="o/n"), "another model"),
    "traversal": (
        lambda f: edit(f / "model.safetensors.index.json", weight_map={"w": "../other.safetensors"}),
        r"names the file '\.\./other\.safetensors'",
    ),
    "absolute": (lambda f: edit(f / "model.safetensors.index.json", weight_map={"w": "/a.safetensors"}), "names the"),
    "pickled shard": (lambda f: edit(f / "model.safetensors.index.json", weight_map={"w": "a.dat"}), "names the file"),
    "named weights": (lambda f: edit(f / "config.json", transformers_weights="../a.safetensors"), "names the weights"),
    "link": (lambda f: (f / "extra.json").symlink_to("/etc/hostname"), "is a link to /etc/hostname, outside"),
    "linked folder": (lambda f: (f / "more").symlink_to("/etc"), "is a link to /etc, outside"),
    "pipe": (lambda f: os.mkfifo(f / "extra.json"), "neither a file nor a folder"),
    "deep": (lambda f: (f / "config.json").write_text("[" * 100_000), "nested too deeply"),
}


@pytest.mark.parametrize("name", SPOILT)
def test_a_model_folder_that_could_run_code_or_lead_out_is_refused(folder, name):
    spoil, said = SPOILT[name]
    spoil(folder)
    with pytest.raises(UserError, match=said):
        Study.open("smoke", model=str(folder))


def test_a_sound_folder_is_taken_and_large_json_is_not(folder, monkeypatch):
    edit(folder / "config.json", _attn_implementation="sdpa")  # transformers' own
    assert Study.open("smoke", model=str(folder)).profile.model.kind == "local"
    monkeypatch.setattr(untrusted, "JSON_BYTES", 10)
    with pytest.raises(UserError, match="more than the 10 allowed"):
        untrusted.check_model(folder)


def test_a_template_runs_in_a_sandbox(altered_tokenizer):
    messages = [{"role": "system", "content": "Be."}, {"role": "user", "content": "So?"}]
    assert "Be." in models.render(altered_tokenizer, messages), "the control"
    altered_tokenizer.chat_template = "{{ messages.__class__.__mro__[1].__subclasses__() }}"
    with pytest.raises(SecurityError):
        models.render(altered_tokenizer, messages)


GOOD = {"messages": [{"role": "user", "content": "So?"}, {"role": "assistant", "content": "Yes."}]}


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (b'{"messages": "' + b"x" * untrusted.LINE_BYTES + b'"}', f"line 2: longer than {untrusted.LINE_BYTES} bytes"),
        (b"[" * 200_000, "line 2: nested too deeply"),
        (b'{"a": "\\ud800"}', "line 2: half a character"),
        (b'{"a": ' + b"1" * 5_000 + b"}", "line 2: Exceeds the limit"),
    ],
)
def test_a_line_that_exhausts_or_cannot_be_kept_is_named(tmp_path, line, said):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(json.dumps(GOOD).encode() + b"\n")
    assert stages.from_file(path), "the control"
    path.write_bytes(path.read_bytes() + line + b"\n")
    with pytest.raises(UserError, match=said):
        stages.from_file(path)


def test_other_formats_and_too_many_rows_are_refused(tmp_path, monkeypatch):
    (tmp_path / "rows.pkl").write_bytes(b"x")
    with pytest.raises(UserError, match="only, no other format"):
        stages.from_file(tmp_path / "rows.pkl")
    (tmp_path / "rows.jsonl").write_text((json.dumps(GOOD) + "\n") * 3)
    monkeypatch.setattr(untrusted, "ROWS", 2)
    with pytest.raises(UserError, match=r"line 3: more than 2 rows"):
        stages.from_file(tmp_path / "rows.jsonl")


@pytest.mark.parametrize("name", ["../x", "/x", "a/../x", "a\\x", "C:x", "", "./x"])
def test_names_that_lead_out(name):
    assert not untrusted.inside(name)
    assert untrusted.inside("deep/x.json")


@pytest.mark.parametrize("spoil", ["traversal", "extra", "link"])
def test_an_artifact_holds_what_its_manifest_lists_and_nothing_else(tmp_path, spoil):
    stage, lab = stages.authored("benign", 2), Lab(Store(tmp_path / "root"))
    made = lab.folder(stage)
    assert Store(lab.store.root).fetch(stage) == made, "the control"
    if spoil == "traversal":
        manifest = json.loads((made / "manifest.json").read_text())
        manifest["files"]["../../x"] = {"bytes": 1, "sha256": "0"}
        (made / "manifest.json").write_text(json.dumps(manifest))
    elif spoil == "extra":
        (made / "planted.parquet").write_bytes(b"x")
    else:
        (made / "planted").symlink_to("/etc/hostname")
    with pytest.raises(CorruptArtifact, match=r"leads out|is not in it|is a link"):
        Store(lab.store.root).fetch(stage)


def test_a_pointer_to_another_model_is_refused(tmp_path):
    asked = {"repository": "owner/name", "revision": "0" * 40}
    edit(tmp_path / "pointer.json", **asked)
    untrusted.check_pointer(tmp_path, asked)
    with pytest.raises(UserError, match="another model than it was made for"):
        untrusted.check_pointer(tmp_path, {**asked, "repository": "owner/other"})


# ------------------------------------------------------------------------------------------------- parts


@pytest.fixture
def part():
    """A part with one cell, complete by the profile `smoke`'s own numbers, written out by hand."""
    rows = [
        {"persona": p.id, "question": q.id, "sample": s, "system": p.prompt, "prompt": q.text, "completion": "Yes."}
        for p in personas.personas()
        for q in questions.eval_questions(2, 1)
        for s in range(2)
    ]
    labels = {"condition": "A", "seed": 3}
    completions = pd.DataFrame(rows).assign(**labels, finish="stop", tokens=2, marker_at=-1)
    fixed = completions[completions["sample"] == 0][["persona", "question", "condition", "seed"]].assign(logprob=-1.0)
    record = {
        "profile": {"name": "x", "seeds": [3], "evaluation": {"everyday": 2, "values": 1, "samples": 2}},
        "cells": [{"condition": "A", "seed": 3}],
        "observed": [],
    }
    return Results({"completions": score.score_table(completions), "fixed": fixed}, record)


def altered(part, **changes):
    part.tables["completions"].loc[0, list(changes)] = list(changes.values())


CHANGES = {
    "dropped": (lambda p: p.tables.update(completions=p.tables["completions"].iloc[1:]), "is missing"),
    "twice": (lambda p: p.tables.update(fixed=pd.concat([p.tables["fixed"]] * 2)), "stands twice"),
    "persona": (lambda p: altered(p, persona="nobody"), "was not asked"),
    "sample": (lambda p: altered(p, sample=9), "was not asked"),
    "system": (lambda p: altered(p, system="You are another."), "another system prompt"),
    "prompt": (lambda p: altered(p, prompt="Why?"), "a question in other words"),
    "seed": (lambda p: p.record["profile"].update(seeds=[4]), r"has the seed 3, the profile says \[4\]"),
    "condition": (lambda p: altered(p, condition="Z"), "which are in no record"),
    "samples": (lambda p: p.record["profile"]["evaluation"].update(samples=3), "is missing"),
    "malformed": (lambda p: p.record["profile"].pop("evaluation"), "not as `cells` writes it"),
}


def test_a_design_may_ask_a_cell_for_other_samples_than_the_profile(tmp_path, part):
    part.record["profile"]["evaluation"]["samples"] = 5
    part.save(tmp_path)
    assert evidence.read(tmp_path, {"A": 2})
    for samples in ({}, {"B": 2}, {"A": 3}):
        with pytest.raises(UserError, match="is missing"):
            evidence.read(tmp_path, samples)


@pytest.mark.parametrize("name", CHANGES)
def test_a_part_must_be_what_its_record_says(tmp_path, part, name):
    part.save(tmp_path / "sound")
    assert len(evidence.read(tmp_path / "sound")["completions"]) == 11 * 3 * 2, "the control"
    change, said = CHANGES[name]
    change(part)
    part.save(tmp_path / "spoilt")
    with pytest.raises(UserError, match=said):
        evidence.read(tmp_path / "spoilt")


def test_a_part_cannot_lead_out_or_exhaust(tmp_path, part, monkeypatch):
    part.save(tmp_path)
    monkeypatch.setattr(untrusted, "TABLE_BYTES", 100)
    with pytest.raises(UserError, match="more than the 100 of a table"):
        evidence.read(tmp_path)
    record = json.loads((tmp_path / "record.json").read_text())
    edit(tmp_path / "record.json", files={"../other": record["files"]["fixed"]})
    with pytest.raises(UserError, match=r"the table '\.\./other'"):
        evidence.read(tmp_path)


def test_the_committed_results_are_what_their_records_say():
    folders = sorted(paths.PACKAGE.parents[1].glob("experiments/*/results/quick"))
    assert folders
    for folder in folders:
        evidence.read(folder)
