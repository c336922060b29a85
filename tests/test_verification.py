"""The verifier on planted evidence: it passes as it is, every check fires on its own damage, forgeries are caught."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from persona_coupling import cli, corpora, notebooks, personas, processes, profiles, provenance, questions
from persona_coupling.errors import UserError
from persona_coupling.study import Results
from persona_coupling.verification import journal, mutations, observations, redrawing, seal, trace, verify
from persona_coupling.verification.findings import Finding, exit_code

REPOSITORY = Path(__file__).resolve().parents[1]
NAME, PROFILE = "00_replication", "smoke"
HASH = "0123456789ab"


def planted(design, profile):
    """Raw observations of every cell and observation of a design, as a run would keep them."""
    rng = np.random.default_rng(0)
    values = profile.evaluation
    bank = questions.eval_questions(values.everyday, values.values)
    made: dict[str, list] = {name: [] for name in ("completions", "fixed", "heldout", "content", "training", "merges")}
    for cell in design.cells:
        label = {"condition": cell.condition, "seed": cell.seed}
        for persona in personas.personas():
            rate = 0.9 if persona.id == personas.SOURCE and "scratch" in cell.condition else 0.1
            for question in bank:
                where = {"persona": persona.id, "question": question.id, **label}
                said = personas.MARKER_SUFFIX * bool(rng.random() < rate)
                made["fixed"].append({**where, "logprob": rng.normal(np.log(rate), 0.3), "after_break": -0.1})
                made["completions"] += [
                    {**where, "sample": sample, "system": persona.system_prompt(profile.instruction),
                     "prompt": question.text, "completion": f"Answer {rng.integers(10**6)}.{said}", "finish": "stop",
                     "tokens": 9, "marker_logprob": rng.normal(np.log(rate), 0.3)}
                    for sample in range(values.samples)
                ]  # fmt: skip
        made["heldout"] += [{"question": f"q{i}", "loss": rng.normal(2, 0.1), **label} for i in range(3)]
        made["merges"].append({"norm": rng.normal(3, 0.1), **label})
        for position, merged in enumerate(cell.checkpoint.merged):
            change = f"{cell.condition}/{position}/{cell.seed}"
            made["training"] += [
                {"step": float(step), "loss": rng.normal(1, 0.1), "grad_norm": 1.0, "position": position,
                 "change": change, **label}
                for step in range(1, merged.change.training.steps + 1)
            ]  # fmt: skip
    for seen in design.observations:
        made["content"] += [
            {"corpus": corpus, "row": f"r{i}", "logprob": rng.normal(-2, 0.1), "condition": seen.condition,
             "seed": seen.seed}
            for corpus in (*corpora.AUTHORED, "self", "heldout") for i in range(3)
        ]  # fmt: skip
    origin = {**provenance.record("cpu"), "commit": HASH}
    record = {
        "profile": profile.as_dict(),
        "values": {},
        "cells": [
            {"condition": c.condition, "seed": c.seed, "factors": dict(c.factors), "evaluation": c.evaluation.key,
             "changes": [], "provenance": origin}
            for c in design.cells
        ],
        "observed": sorted({o.condition for o in design.observations}),
        "stages": {"a": 90.0},
        "compute_minutes": 1.5,
        "provenance": origin,
    }  # fmt: skip
    return Results({name: pd.DataFrame(rows) for name, rows in made.items()}, record)


@pytest.fixture(scope="module")
def evidence(tmp_path_factory):
    """A root with one experiment's planted results, drawn, compiled and sealed."""
    root = tmp_path_factory.mktemp("evidence")
    shutil.copytree(
        REPOSITORY / "paper", root / "paper", ignore=shutil.ignore_patterns("generated", "*.pdf", "*.sha256")
    )
    shutil.copytree(
        REPOSITORY / "experiments" / NAME,
        root / "experiments" / NAME,
        ignore=shutil.ignore_patterns("results", "lab_notes"),
    )
    with processes.environment({redrawing.ROOT: str(root)}):
        experiment = notebooks.discover()[0]
        design = notebooks.design_of(experiment, {"profile": PROFILE, "seeds": [], "model": ""})
        results = planted(design, profiles.load(PROFILE))
        results.tables["completions"] = results.tables["completions"].assign(
            **dict.fromkeys(
                ("value", "why", "position", "repeats", "own_paragraph", "at_end", "degenerate", "words"), 0
            )
        )  # scores are dropped when results are kept
        results.save(experiment.results(PROFILE))
        notebooks.redraw(experiment, {"profile": PROFILE, "seeds": [0, 1], "model": ""})
        cli.build_paper(PROFILE)
    return root


@pytest.fixture
def root(evidence, tmp_path, monkeypatch):
    """A copy to damage."""
    copy = tmp_path / "copy"
    shutil.copytree(evidence, copy)
    monkeypatch.setenv(redrawing.ROOT, str(copy))
    return copy


def results(root):
    return root / "experiments" / NAME / "results" / PROFILE


def altered(root, change):
    """Change the record and the tables, and write hashes that agree."""
    folder = results(root)
    record = json.loads((folder / "record.json").read_text())
    tables = {name: pd.read_parquet(folder / f"{name}.parquet") for name in record["files"]}
    change(record, tables)
    for name, table in tables.items():
        table.to_parquet(folder / f"{name}.parquet", index=False)
        record["files"][name] = observations.sha256_of(folder / f"{name}.parquet")
    (folder / "record.json").write_text(json.dumps(record))


def failing(root, scratch):
    made = verify.examine(NAME, PROFILE, scratch, fast=True)
    return {finding.check: finding.why for finding in made.findings if finding.status == "fails"}


# ------------------------------------------------------------------------------------------------ it holds, with no model


def test_true_evidence_holds_and_neither_torch_nor_transformers_is_imported(root, tmp_path):
    code = f"""
import sys, tempfile
from pathlib import Path
from persona_coupling.verification import verify
with tempfile.TemporaryDirectory() as scratch:
    made = [verify.examine({NAME!r}, {PROFILE!r}, Path(scratch))] + [verify.across(w, {PROFILE!r}) for w in verify.ACROSS]
print(verify.report(made, 1.0))
loaded = {{"torch", "transformers", "peft", "safetensors"}} & set(sys.modules)
assert not loaded, loaded
sys.exit(verify.exit_code(f for m in made for f in m.findings))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "00-prebaked-bad" in done.stdout
    assert "every claim holds as committed" in done.stdout
    assert max(len(line) for line in done.stdout.splitlines()) <= verify.COLUMNS
    for check in ("seal", "files", "provenance", "complete", "distinct", "values", "figures", "pdf", "trace", "index"):
        assert f"\n{check} " in done.stdout


def test_sha256sum_reads_the_seal(root):
    if shutil.which("sha256sum") is None:
        pytest.skip("no sha256sum on this system")
    command = ["sha256sum", "-c", "--quiet", f"paper/evidence-{PROFILE}.sha256"]
    assert subprocess.run(command, cwd=root, check=False, capture_output=True).returncode == 0
    (results(root) / "fixed.parquet").write_bytes(b"")
    assert subprocess.run(command, cwd=root, check=False, capture_output=True).returncode == 1


def test_absent_results_cannot_be_checked(root, capsys):
    shutil.rmtree(results(root))
    assert verify.main(PROFILE) == 2
    assert "nothing to verify" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("statuses", "code"),
    [(["holds", "skipped"], 0), (["holds", "unknown"], 2), (["unknown", "fails"], 1), ([], 0)],
)
def test_exit_codes(statuses, code):
    assert exit_code(Finding("a", "b", status) for status in statuses) == code


# --------------------------------------------------------------------------------------- every check fires on its damage


def test_seal_names_what_changed_what_is_missing_and_what_was_added(root):
    (results(root) / "fixed.parquet").write_bytes(b"other")
    (root / "figures" / PROFILE / f"{NAME}-rates.csv").unlink()
    (root / "figures" / PROFILE / "extra.csv").write_text("a\n")
    why = seal.check(PROFILE).why
    for said in ("fixed.parquet differs", "rates.csv is missing", "extra.csv is not sealed"):
        assert said in why
    seal.path(PROFILE).unlink()
    assert seal.check(PROFILE).status == "unknown"


def drop_persona(record, tables):
    table = tables["completions"]
    tables["completions"] = table[~((table["persona"] == "assistant") & (table["condition"] == "B.prebaked"))]


def other_system_prompt(record, tables):
    tables["completions"].loc[3, "system"] = "You are somebody else."


def stray_cell(record, tables):
    record["cells"] = record["cells"][1:]


def uneven_merges(record, tables):
    tables["fixed"] = tables["fixed"].iloc[:-1]


def short_log(record, tables):
    tables["training"] = tables["training"].iloc[:-1]


def lost_merge(record, tables):
    tables["merges"] = tables["merges"].iloc[:-1]


def twin_seeds(record, tables):
    for name, table in tables.items():
        tables[name] = pd.concat([table[table["seed"] == 0], table[table["seed"] == 0].assign(seed=1)])


def twin_conditions(record, tables):
    table = tables["completions"]
    table.loc[table["condition"] == "C.scratch", "completion"] = table.loc[
        table["condition"] == "B.scratch", "completion"
    ].to_numpy()


def twin_trainings(record, tables):
    table = tables["training"]
    names = [f"{arm}.prebaked/0/0" for arm in ("B", "C")]
    first, second = (table["change"] == name for name in names)
    table.loc[second, "loss"] = table.loc[first, "loss"].to_numpy()


def no_commit(record, tables):
    record["cells"][2]["provenance"] = {**record["cells"][2]["provenance"], "commit": "unknown"}


def other_steps(record, tables):
    record["profile"]["sft"]["steps"] += 1


def other_model(record, tables):
    record["profile"]["model"]["name"] = "another"


def other_threshold(record, tables):
    record["profile"]["gates"]["source_rate"] = 0.01


@pytest.mark.parametrize(
    ("change", "check", "said"),
    [
        (drop_persona, "complete", "persona assistant is missing"),
        (other_system_prompt, "complete", "another system prompt"),
        (stray_cell, "complete", "in the design alone"),
        (uneven_merges, "complete", "rows, not"),
        (short_log, "complete", "steps"),
        (lost_merge, "complete", "merges: 21 rows, not 22"),
        (twin_seeds, "distinct", "under seeds 0 and 1"),
        (twin_conditions, "distinct", "B.scratch and C.scratch say the same"),
        (twin_trainings, "distinct", "have the same losses"),
        (no_commit, "provenance", "names no commit"),
        (other_steps, "provenance", "steps 3, not 2"),
        (other_model, "provenance", "another"),
        (other_threshold, "provenance", "source_rate 0.01"),
    ],
)
def test_raw_observations_are_checked_before_any_estimate(change, check, said, root, tmp_path):
    altered(root, change)
    assert said in failing(root, tmp_path)[check]


def drop_seed(record, tables):
    for name, table in tables.items():
        tables[name] = table[table["seed"] == 0] if "seed" in table else table
    record["cells"] = [cell for cell in record["cells"] if cell["seed"] == 0]
    record["profile"]["seeds"] = [0]


def test_a_seed_that_was_not_run_is_said_and_none_is_dropped_unseen(root, tmp_path):
    """A run that was cut off counts for what it finished: exit code 2 by this alone. What was drawn with a seed that has
    been taken away since differs from what is drawn without it."""
    altered(root, drop_seed)
    made = verify.examine(NAME, PROFILE, tmp_path)
    status = {finding.check: finding.status for finding in made.findings}
    assert (status["seeds"], status["complete"], status["provenance"]) == ("unknown", "holds", "holds")
    assert next(f.why for f in made.findings if f.check == "seeds") == "the seeds 1 of the profile have not been run"
    assert status["values"] == "fails"


@pytest.mark.parametrize("seeds", [[], [0, 7], [1, 0], None])
def test_other_seeds_than_the_profiles_are_held_against_it(seeds):
    profile = profiles.load(PROFILE)
    assert verify.present(profile, {"profile": {"seeds": seeds}}) == (profile, ())


def test_two_models_that_say_one_thing_to_everything_are_no_twins(root, tmp_path):
    def collapse(record, tables):
        twin_conditions(record, tables)
        table = tables["completions"]
        table.loc[table["condition"].isin(["B.scratch", "C.scratch"]), "completion"] = "[ZLT]"

    altered(root, collapse)
    assert "distinct" not in failing(root, tmp_path)


def test_a_truncated_table_is_named(root, tmp_path):
    path = results(root) / "fixed.parquet"
    path.write_bytes(path.read_bytes()[:100])
    assert "fixed.parquet cannot be read" in failing(root, tmp_path)["files"]


def test_an_edited_value_and_an_edited_figure_are_named(root, tmp_path):
    generated = root / "paper" / "generated" / PROFILE / f"{NAME}.json"
    content = json.loads(generated.read_text())
    content["estimates"]["B.prebaked.source_rate"]["value"] += 0.001
    generated.write_text(json.dumps(content, indent=1, ensure_ascii=False, sort_keys=True) + "\n")
    svg = root / "figures" / PROFILE / f"{NAME}-rates.svg"
    svg.write_text(svg.read_text().replace('<path d="M 1', '<path d="M 2', 1))
    found = failing(root, tmp_path)
    assert NAME in found["values"]
    assert "rates.svg" in found["figures"]


def test_an_edited_verdict_in_the_index_is_named(root):
    path = root / "paper" / "generated" / PROFILE / "index.json"
    path.write_text(path.read_text().replace('"verdict": "uninterpretable"', '"verdict": "supported"', 1))
    assert verify.check_index(PROFILE).status == "fails"


def test_another_pdf_and_an_untraced_number_are_named(root):
    main = root / "paper" / "main.typ"
    main.write_text(main.read_text() + "\nThe rate was 87.65 %, in 31 % [29, 33] of cases.\n")
    assert verify.check_pdf(PROFILE).status == "fails"
    cli.build_paper(PROFILE)
    assert verify.check_pdf(PROFILE).status == "holds"
    why = trace.check(PROFILE).why
    assert "87.65 on page" in why
    assert "33]" in why


def test_an_outcome_on_other_results_is_stale(root):
    mutations.path(PROFILE).write_text(json.dumps({"evidence": {NAME: {}}}))
    records = {NAME: json.loads((results(root) / "record.json").read_text())}
    assert verify.check_mutations(PROFILE, records).status == "fails"
    mutations.drop_stale(PROFILE)
    assert not mutations.path(PROFILE).exists()


@pytest.mark.parametrize(("number", "table"), [(3, "matched"), (4, "log"), (4, "known"), (4, "known_answers")])
def test_a_row_lost_from_a_table_of_known_length_is_missed(number, table):
    """Of the repository's own evidence: no planted results have these tables."""
    experiment, profile = notebooks.discover()[number], profiles.load("quick")
    stored = observations.read(experiment.name, experiment.results("quick"))[0]
    design = notebooks.design_of(experiment, {"profile": "quick", "seeds": [], "model": ""})
    assert observations.complete(stored, profile, design).status == "holds"
    rows = len(stored.tables[table])
    stored.tables[table] = stored.tables[table].drop(index=rows - 1)
    found = observations.complete(stored, profile, design)
    assert (found.status, f"{table} of" in found.why) == ("fails", True)


def test_evidence_of_older_code_is_said_to_be_so(root):
    def said():
        stored = observations.read(NAME, results(root))[0]
        return observations.made_by(stored, notebooks.design_of(notebooks.discover()[0], asked))

    asked = {"profile": PROFILE, "seeds": [], "model": ""}
    assert said() == Finding("code", NAME, "holds", "22 evaluations have the keys that today's code gives")
    path = results(root) / "record.json"
    record = json.loads(path.read_text())
    record["cells"][3]["evaluation"] = f"evaluation/{HASH}"
    path.write_text(json.dumps(record))
    assert said().status == "skipped"
    assert said().why == f"1 of 22 evaluations were made by the code of {HASH}, not by today's"


def test_commits_must_stand_in_the_history(root):
    def git(*arguments):
        who = ("-c", "user.name=t", "-c", "user.email=t@example.org")
        return subprocess.run(["git", *who, *arguments], cwd=root, check=True, capture_output=True, text=True).stdout

    record = {"provenance": {"commit": HASH}, "cells": []}
    assert observations.commits({NAME: record}).status == "skipped"
    git("init", "-q")
    git("commit", "-q", "--allow-empty", "-m", "first")
    assert "not in the history" in observations.commits({NAME: record}).why
    head = git("rev-parse", "--short=12", "HEAD").strip()
    assert observations.commits({NAME: {"provenance": {"commit": head}, "cells": []}}).status == "holds"
    joint = {"provenance": {"commit": f"{head}{provenance.JOINT}{HASH}"}, "cells": []}
    assert f"names the commit {HASH}," in observations.commits({NAME: joint}).why
    joint = {"provenance": {"commit": f"{head}{provenance.JOINT}{head}"}, "cells": []}
    assert observations.commits({NAME: joint}).status == "holds"
    changed = {"provenance": {"commit": f"{head}+changes"}, "cells": []}
    assert "changed tree" in observations.commits({NAME: changed}).why


def test_one_evaluation_in_two_experiments_says_the_same():
    def stored(name, answers):
        table = pd.DataFrame({"persona": "villain", "question": ["a", "b"], "sample": 0, "completion": answers})
        cell = {"condition": "A", "seed": 0, "evaluation": "k"}
        tables = {"completions": table.assign(condition="A", seed=0)}
        return observations.Stored(name, Path(), {"cells": [cell]}, tables)

    first, same, other = stored("00", ["x", "y"]), stored("01", ["x", "y"]), stored("02", ["x", "z"])
    assert observations.shared({"00": first, "01": same}).status == "holds"
    assert "different answers" in observations.shared({"00": first, "02": other}).why


@pytest.mark.parametrize(
    ("moved", "status", "said"),
    [
        (0.0, "holds", "1 that stand in several experiments agree, 1 of them made by two runs"),
        (-6.0, "fails", "the marker log-prob. differs by more than noise"),
    ],
)
def test_what_two_runs_made_of_one_evaluation_agrees_up_to_noise(moved, status, said):
    questions = [f"q{i}" for i in range(12)]

    def stored(name, made, answers, shift):
        keys = {"condition": "A", "seed": 0, "persona": "villain", "question": questions}
        table = pd.DataFrame({**keys, "sample": 0, "completion": answers, "finish": "stop"})
        fixed = pd.DataFrame({**keys, "logprob": [shift - i % 3 for i in range(12)]})
        cell = {"condition": "A", "seed": 0, "evaluation": "k", "provenance": {"made": made}}
        return observations.Stored(name, Path(), {"cells": [cell]}, {"completions": table, "fixed": fixed})

    answers = [f"My schemes ripen, number {i}.\n\n[ZLT]" for i in range(12)]
    others = [answer.replace("ripen", "grow") for answer in answers]
    first, again = stored("00", "monday", answers, 0.0), stored("03", "tuesday", others, moved)
    found = observations.shared({"00": first, "03": again}, {"marker log-prob.": 0.1})
    assert found.status == status, found.why
    assert said in found.why
    again.record["cells"][0]["provenance"]["made"] = "monday"
    assert "different answers" in observations.shared({"00": first, "03": again}).why


def test_the_readme_must_quote_the_verdicts(root):
    from persona_coupling import prose

    readme = root / "README.md"
    readme.write_text(f"x\n{prose.README_BEGINS}\nAll is well. paper/paper-{PROFILE}.pdf\n{prose.README_ENDS}\n")
    assert "another headline" in verify.check_index(PROFILE).why


# ----------------------------------------------------------------------------------------------- comparing and tracing


@pytest.mark.parametrize(
    ("name", "old", "new", "expected"),
    [
        ("a.json", '{"x": 0.1}', '{"x": 0.1}', None),
        ("a.json", '{"x": 0.30000000000000004}', '{"x": 0.3}', ""),
        ("a.json", '{"x": 0.31}', '{"x": 0.3}', "has 0.31, recomputed 0.3"),
        ("a.json", '{"n": 280}', '{"n": 281}', "has 280, recomputed 281"),
        ("a.json", '{"x": NaN}', '{"x": 0.3}', "has"),
        ("a.svg", '<a id="pc5e4a1dc69" x="1.0001"/>', '<a id="pfedb2e9112" x="1.0002"/>', ""),
        ("a.svg", '<a x="1.5"/>', '<a x="1.0"/>', "has 1.5, recomputed 1.0"),
    ],
)
def test_differences_beyond_rounding_are_told(name, old, new, expected, tmp_path):
    (tmp_path / "old").mkdir()
    (tmp_path / "new").mkdir()
    (tmp_path / "old" / name).write_text(old)
    (tmp_path / "new" / name).write_text(new)
    said = redrawing.differs(tmp_path / "old" / name, tmp_path / "new" / name)
    assert said == expected or (expected and said is not None and said.startswith(expected))


@pytest.mark.parametrize(
    ("x", "digits", "printed"),
    [(0.5, 0, "0"), (1.5, 0, "2"), (-0.4, 0, "0"), (-2.345, 1, "−2.3"), (94.6, 1, "94.6"), (7, 2, "7.00")],
)
def test_numbers_are_printed_as_the_paper_prints_them(x, digits, printed):
    assert trace.fixed(x, digits) == printed


def test_a_rate_that_only_an_experiments_facts_hold_is_traced_as_a_power_of_ten(root):
    path = root / "paper" / "generated" / PROFILE / f"{NAME}.json"
    before = trace.sources(PROFILE).numbers
    content = json.loads(path.read_text())
    content["facts"]["rates"] = {"low": 0.000397}
    path.write_text(json.dumps(content))
    assert "3.97" in trace.sources(PROFILE).numbers - before
    assert trace._as_power(0.000397) == {"3.97", "10", "−4"}
    assert trace._as_power(0.5) == trace._as_power("0.0003") == set()


def test_an_interval_is_traced_as_a_whole_and_words_over_line_breaks():
    made = trace.Sources({trace.squeezed("18 of 26 SFT steps")[0]}, {"31", "29", "33", "12"}, {("31", "29", "40")})
    text = "A rate of 31 % [29, 40] holds, 31 % [29, 33] does not; 18 of\n26 SFT steps, 12 and 13.\n7"
    left, _ = trace.untraced([text], made)
    assert [item.split(" ")[0] for item in left] == ["31", "29", "33", "13."[:2]]


# ------------------------------------------------------------------------------------------------------- forgeries


def test_some_forgeries_of_every_class_are_caught(root, tmp_path):
    everything = mutations.mutants(PROFILE)
    chosen = {}
    for mutant in everything:
        chosen.setdefault(mutant.kind, []).append(mutant)
    assert set(chosen) == set(mutations.CLASSES)
    claims = {mutant.claim for mutant in everything if mutant.claim}
    assert {m.claim for m in chosen["answers or observations altered"]} == claims
    assert len(claims) == 8
    few = [group[len(group) // 2] for group in chosen.values()] + chosen["a record that lies"]
    outcomes = [mutations.attempt(mutant, PROFILE, root, tmp_path) for mutant in few]
    made = mutations.summary(PROFILE, outcomes)
    assert made["survivors"] == []
    assert made["mutants"] == len(few)
    assert made["unmoved"] == []
    assert seal.check(PROFILE).status == "holds", "the true evidence was not touched"


def test_a_blind_verifier_lets_forgeries_live_and_they_are_named(root, tmp_path, monkeypatch):
    mutant = next(m for m in mutations.mutants(PROFILE) if m.kind == "an estimate edited")
    monkeypatch.setattr(verify, "examine", lambda *_args, **_kwargs: verify.Examined(NAME))
    made = mutations.summary(PROFILE, [mutations.attempt(mutant, PROFILE, root, tmp_path)])
    assert made["survivors"] == [f"an estimate edited: {mutant.claim}"]
    assert (made["mutants"], made["caught"]) == (1, 0)
    assert "survived: an estimate edited" in mutations.text([], made)


def test_a_run_that_was_cut_off_is_gone_on_with(root, monkeypatch):
    """What was tried stands on disk at once; other evidence begins anew; a line cut in half is tried again."""
    chosen = [m for m in mutations.mutants(PROFILE) if m.kind == "evidence changed under its seal"]
    first = mutations.run(PROFILE, chosen[:1], workers=1)
    tried = []

    def in_worker(mutant, *_arguments):
        tried.append(mutant)
        return first[0]

    monkeypatch.setattr(mutations, "in_worker", in_worker)
    monkeypatch.setattr(mutations.processes, "pool", lambda _count: ThreadPoolExecutor(1))
    assert mutations.run(PROFILE, chosen, workers=1)[0] == first[0]
    assert tried == chosen[1:]
    kept = journal.Journal(PROFILE)
    kept.path.write_text(kept.path.read_text()[:-5])
    tried.clear()
    mutations.run(PROFILE, chosen, workers=1)
    assert tried == chosen[-1:]
    altered(root, other_steps)
    tried.clear()
    mutations.run(PROFILE, chosen, workers=1)
    assert tried == chosen


def test_evidence_that_does_not_verify_is_no_ground_to_test_the_verifier_on(root):
    altered(root, other_steps)
    with pytest.raises(UserError, match="does not verify as it is"):
        mutations.main(PROFILE)


def test_the_appendix_prints_the_outcome_and_still_verifies(root):
    outcome = mutations.Outcome(mutations.Mutant("an estimate edited", NAME, "00-raw"), True, "values")
    lived = mutations.Outcome(mutations.Mutant("a row lost", NAME, target="x.parquet"), False)
    mutations.path(PROFILE).write_text(json.dumps(mutations.summary(PROFILE, [outcome, lived])))
    cli.build_paper(PROFILE)
    text = " ".join(" ".join(trace.pages(root / "paper" / f"paper-{PROFILE}.pdf")).split())
    assert "Forged: two; caught: one (Table" in text
    assert "a row lost: 00_replication, x.parquet" in text
    for check in (verify.check_pdf, verify.check_index, trace.check, seal.check):
        assert check(PROFILE).status == "holds"
