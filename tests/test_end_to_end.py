"""Whole commands on the smoke profile, in a copy of the repository's inputs: what a user types and what comes out."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import tomllib
from datetime import UTC, datetime
from pathlib import Path

import nbformat
import pandas as pd
import pytest
import yaml

from persona_coupling import paths, stress

pytestmark = pytest.mark.end_to_end
REPOSITORY = Path(__file__).parents[1]


def run(root: Path, *arguments: str, check: bool = True, **environment: str) -> subprocess.CompletedProcess[str]:
    """A command as a user's shell would run it."""
    done = subprocess.run(
        [sys.executable, "-m", "persona_coupling", *arguments],
        env={**stress.environment(root), **environment},
        capture_output=True,
        text=True,
        check=False,
        timeout=400,
    )
    if check:
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of what git tracks of experiments and paper; all experiments, killed once on their way, then run to the end."""
    root = tmp_path_factory.mktemp("copy")
    stress.copy_inputs(root)
    process = subprocess.Popen(
        [sys.executable, "-m", "persona_coupling", "reproduce", "--profile", "smoke"],
        env=stress.environment(root),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    deadline = time.monotonic() + 200
    while time.monotonic() < deadline and len(list((root / "artifacts").glob("change/*/manifest.json"))) < 3:
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    root.joinpath("killed.json").write_text(json.dumps(manifests(root)))
    done = run(root, "reproduce", "--profile", "smoke")
    root.joinpath("log.txt").write_text(done.stdout)
    return root


def manifests(root: Path) -> dict[str, str]:
    """Every finished artifact and the hash of its manifest. A hidden folder is a writer's own until it is renamed: a
    kill between its manifest and the renaming leaves one behind, and it was never an artifact."""
    return {
        str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in (root / "artifacts").glob("*/[!.]*/manifest.json")
    }


def test_a_killed_run_goes_on_where_it_was(root: Path) -> None:
    before, after = json.loads((root / "killed.json").read_text()), manifests(root)
    assert len(before) >= 3
    assert before.items() <= after.items(), "a finished artifact was made again"
    assert not [p for p in (root / "artifacts").glob("*/.*") if p.is_dir()], "a half-written artifact is left"


def test_reproduce_says_where_everything_lies(root: Path) -> None:
    log = (root / "log.txt").read_text()
    assert "estimated:" in log
    assert "cached" in log
    names = [folder.name for folder in sorted((root / "experiments").iterdir())]
    assert len(names) >= 8
    for place in (
        *(f"experiments/{name}/lab_notes/smoke.ipynb" for name in names),
        *(f"experiments/{name}/results/smoke/" for name in names),
        "figures/smoke/",
        "paper/generated/smoke/",
        "paper/paper-smoke.pdf",
    ):
        assert place in log
        assert (root / place).exists()
    assert (root / "paper" / "paper-smoke.pdf").read_bytes().startswith(b"%PDF")


def test_every_lab_note_is_executed_and_names_no_path_of_this_machine(root: Path) -> None:
    for path in root.glob("experiments/*/lab_notes/smoke.ipynb"):
        note = nbformat.read(path, as_version=4)
        code = [cell for cell in note.cells if cell.cell_type == "code"]
        assert all(cell.execution_count for cell in code), path
        assert any("image/png" in out.get("data", {}) for cell in code for out in cell.outputs), path
        assert str(root) not in path.read_text(), path


def test_a_smoke_verdict_is_never_a_finding(root: Path) -> None:
    index = json.loads((root / "paper/generated/smoke/index.json").read_text())
    verdicts = {claim["id"]: claim["verdict"] for claim in index["claims"]}
    assert len({claim["experiment"] for claim in index["claims"]}) >= 8
    assert "supported" not in verdicts.values()
    assert verdicts["00-prebaked-bad"] == "uninterpretable"
    assert "uninterpretable" in run(root, "claims", "--profile", "smoke").stdout


def test_every_completion_is_kept_with_its_prompt_seed_and_finish(root: Path) -> None:
    table = pd.read_parquet(root / "experiments/00_replication/results/smoke/completions.parquet")
    assert len(table) == 11 * 2 * 11 * 3  # conditions, the twin among them, seeds, personas, questions
    assert table[["prompt", "system", "seed", "finish", "completion"]].notna().all().all()
    assert table.groupby("condition")["persona"].nunique().eq(11).all()


def test_paper_redraws_the_same_bytes_without_a_model(root: Path) -> None:
    drawn = [*sorted((root / "figures/smoke").iterdir()), *sorted((root / "paper/generated/smoke").iterdir())]
    before = {path: path.read_bytes() for path in drawn}
    assert len(before) >= 12
    hidden = root / "artifacts-away"
    (root / "artifacts").rename(hidden)
    try:
        started = time.monotonic()
        run(root, "paper", "--profile", "smoke")
        assert time.monotonic() - started < 60
    finally:
        shutil.rmtree(root / "artifacts", ignore_errors=True)
        hidden.rename(root / "artifacts")
    changed = [path.name for path in before if path.read_bytes() != before[path]]
    assert not changed


def test_the_kit_knows_every_figure_table_and_claim_of_the_real_paper(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from persona_coupling import kit

    whole = tmp_path / "whole"
    shutil.copytree(root, whole, ignore=shutil.ignore_patterns("artifacts"))
    for name in ("README.md", "REVIEWERS.md", "CITATION.cff", "constraints.txt", "pyproject.toml"):
        shutil.copy(REPOSITORY / name, whole / name)
    monkeypatch.setenv("PERSONA_COUPLING_ROOT", str(whole))
    kit.write("smoke")
    comments = {
        entry["file"]: entry["comment"] for entry in yaml.safe_load((whole / "codecheck.yml").read_text())["manifest"]
    }
    count = 0
    for section in sorted(whole.glob("experiments/*/section.typ")):
        source, experiment = section.read_text(encoding="utf-8"), section.parent.name
        for name in re.findall(r'^\s*#fig\(experiment, "(\w+)"', source, flags=re.MULTILINE):
            count += 1
            assert comments[f"figures/smoke/{experiment}-{name}.svg"].startswith(f"Figure {count}: ")
        for name in re.findall(r'^\s*#tab\(experiment, "(\w+)"', source, flags=re.MULTILINE):
            assert re.match(r"Table \d+: ", comments[f"paper/generated/smoke/{experiment}-{name}.json"])
    assert count >= 8
    rows = re.findall(
        r"^\| `(\d\d-[a-z-]+)` \|", (whole / "REVIEWERS.md").read_text(encoding="utf-8"), flags=re.MULTILINE
    )
    known = tomllib.loads((REPOSITORY / "paper/claims.toml").read_text(encoding="utf-8"))["claim"]
    assert sorted(rows) == sorted(claim["id"] for claim in known)
    assert kit.differences() == []


def test_results_of_other_profile_values_are_refused(root: Path) -> None:
    record = root / "experiments/00_replication/results/smoke/record.json"
    text = record.read_text()
    content = json.loads(text)
    content["profile"]["sft"]["steps"] = 99
    record.write_text(json.dumps(content))
    try:
        done = run(root, "paper", "--profile", "smoke", check=False)
    finally:
        record.write_text(text)
    assert done.returncode == 2
    assert "other values of sft" in done.stderr


def test_parts_of_another_design_are_refused_before_anything_is_replaced(root: Path, tmp_path: Path) -> None:
    """Whole, consistent and with the right hashes, but of values or factors that no design here has."""
    own = root / "experiments/00_replication/results/smoke"
    before = {path.name: path.read_bytes() for path in own.iterdir()}

    def combined(**changes: object) -> subprocess.CompletedProcess[str]:
        shutil.rmtree(tmp_path / "part", ignore_errors=True)
        shutil.copytree(own, tmp_path / "part" / "00_replication")
        record = tmp_path / "part" / "00_replication" / "record.json"
        record.write_text(json.dumps({**json.loads(before["record.json"]), **changes}))
        return run(root, "combine", "--profile", "smoke", str(tmp_path / "part"), check=False)

    record = json.loads(before["record.json"])
    record["cells"][0]["factors"]["sft"] = "another"
    for changes, said in (
        ({"profile": {**record["profile"], "instruction": "Be."}}, "other values of instruction"),
        ({"cells": record["cells"]}, "other factors than the design"),
    ):
        done = combined(**changes)
        assert (done.returncode, said in done.stderr) == (2, True), done.stderr
        assert {path.name: path.read_bytes() for path in own.iterdir()} == before
    assert "1 parts, seeds [0, 1]" in combined().stdout, "the control"
    for name, content in before.items():
        (own / name).write_bytes(content)


def test_some_seeds_of_a_run_are_kept_alone(root: Path, tmp_path: Path) -> None:
    """As for evidence that would be too large: the record names what was left out, and what is kept is as it was."""
    own = root / "experiments/00_replication/results/smoke"
    before = {path.name: path.read_bytes() for path in own.iterdir()}
    whole = pd.read_parquet(own / "completions.parquet")
    shutil.copytree(own, tmp_path / "part" / "00_replication")
    try:
        done = run(root, "combine", "--profile", "smoke", "--seeds", "1", str(tmp_path / "part"))
        assert "00_replication: 1 parts, seeds [1]" in done.stdout
        record = json.loads((own / "record.json").read_text())
        assert (record["profile"]["seeds"], record["left_out"]) == ([1], [0])
        kept = pd.read_parquet(own / "completions.parquet")
        pd.testing.assert_frame_equal(kept, whole[whole["seed"] == 1].reset_index(drop=True))
        lost = run(root, "combine", "--profile", "smoke", "--seeds", "7", str(tmp_path / "part"), check=False)
        assert (lost.returncode, "has the seeds [7]; they have [0, 1]" in lost.stderr) == (2, True), lost.stderr
    finally:
        shutil.rmtree(own)
        shutil.copytree(tmp_path / "part" / "00_replication", own)
    assert {path.name: path.read_bytes() for path in own.iterdir()} == before


def test_the_pace_of_a_run_is_measured_from_its_store(root: Path) -> None:
    """Of the killed run and the one that went on, taken as one."""
    times = [path.stat().st_mtime for path in (root / "artifacts").glob("*/[!.]*/manifest.json")]
    started, ended = (datetime.fromtimestamp(t, UTC).isoformat() for t in (min(times) - 60, max(times) + 2))
    (root / "docs" / "measured").mkdir(parents=True, exist_ok=True)

    def pace(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "persona_coupling.pace", "--profile", "smoke", *arguments]
        return subprocess.run(command, env=stress.environment(root), capture_output=True, text=True, check=False)

    done = pace("--seeds", "0,1", "--started", started, "--ended", ended)
    assert done.returncode == 0, done.stderr
    found = json.loads((root / "docs/measured/one-gpu.json").read_text())
    assert list(found["seeds"]) == ["0", "1"]
    assert found["stages"] >= len(times) - 1
    assert found["seeds"]["1"][-1] <= found["wall_seconds"]
    other = pace("--seeds", "0,1,2", "--started", started, "--ended", ended)
    assert (other.returncode, "is not in the store" in other.stderr) == (2, True), other.stderr


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--profile", "smokey"], "no profile 'smokey'"),
        (["--profile", "smoke", "--only", "99"], "no experiment '99'"),
        (["--profile", "smoke", "--seeds", "one"], "--seeds one"),
        (["--profile", "smoke", "--seeds", "1,1"], "twice"),
        (["--profile", "smoke", "--model", "./nowhere"], "no model folder"),
        (["--profile", "smoke", "--model", "nonsense"], "neither a folder nor"),
    ],
)
def test_bad_requests_are_one_sentence_and_exit_2(root: Path, arguments: list[str], said: str) -> None:
    done = run(root, "reproduce", *arguments, check=False)
    assert done.returncode == 2
    assert said in done.stderr
    assert "Traceback" not in done.stderr


def test_a_model_folder_without_a_tokenizer_is_named(root: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(b"")
    done = run(root, "reproduce", "--profile", "smoke", "--model", str(tmp_path), check=False)
    assert done.returncode == 2
    assert "tokenizer" in done.stderr


def test_a_corrupted_artifact_is_named_and_mended_by_deleting_it(root: Path) -> None:
    record = json.loads((root / "experiments/00_replication/results/smoke/record.json").read_text())
    victim = root / "artifacts/evaluation" / record["cells"][0]["evaluation"] / "completions.parquet"
    original = victim.read_bytes()
    victim.write_bytes(original[:-1] + bytes([original[-1] ^ 1]))
    try:
        done = run(root, "reproduce", "--profile", "smoke", "--only", "00", check=False)
        assert done.returncode == 2
        assert str(victim.parent) in done.stderr
        assert "Delete the folder" in done.stderr
        shutil.rmtree(victim.parent)
        run(root, "cells", "--profile", "smoke")
        assert victim.read_bytes() == original, "the same machine, the same completions"
    finally:
        if victim.parent.is_dir():
            victim.write_bytes(original)


def test_plan_says_why_a_cell_of_stored_results_is_stale(root: Path) -> None:
    """An evaluation as other code would have left it, with results made from it: stale, and the module is named."""
    place = root / "experiments/00_replication/results/smoke/record.json"
    text = place.read_text()
    record = json.loads(text)
    cell = record["cells"][0]
    folder = root / "artifacts/evaluation" / cell["evaluation"]
    manifest, old = json.loads((folder / "manifest.json").read_text()), folder.with_name("1" * 20)
    module = next(name for name in manifest["made_of"] if name.startswith("persona_coupling."))
    shutil.copytree(folder, old)
    other = {**manifest, "key": old.name, "made_of": {**manifest["made_of"], module: "0" * 20}}
    other["description"]["code"][1] = "0" * 20
    (old / "manifest.json").write_text(json.dumps(other))
    folder.rename(hidden := root / "artifacts" / "aside")
    place.write_text(json.dumps({**record, "stages": {**record["stages"], old.name: 1.0}}))
    try:
        said = run(root, "plan", "--profile", "smoke", "--only", "00", "--cells").stdout
    finally:
        hidden.rename(folder)
        shutil.rmtree(old)
        place.write_text(text)
    assert re.search(rf"00 {cell['condition']} +{cell['seed']}  stale .* 1 Evaluate  \(1\)", said), said
    assert f"(1) {module.removeprefix('persona_coupling.')} changed (rows: 1)" in said
    assert "31 cached, 1 stale, 0 new" in said, said


def test_one_flipped_bit_in_any_kind_of_artifact_is_found(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In every file of one artifact of every kind: a flip, a cut, an absence; each named, none used."""
    from persona_coupling import notebooks
    from persona_coupling.errors import CorruptArtifact
    from persona_coupling.store import MANIFEST, Store

    monkeypatch.setenv("PERSONA_COUPLING_ROOT", str(root))
    monkeypatch.setenv("PERSONA_COUPLING_CACHE", str(root / "artifacts"))
    parameters = {"profile": "smoke", "seeds": [], "model": ""}
    kinds = {}
    for experiment in notebooks.discover():
        if experiment.results("smoke").is_dir():
            kinds |= {stage.kind: stage for stage in notebooks.design_of(experiment, parameters).stages()}
    assert {"model", "rows", "change", "merge", "evaluation"} <= set(kinds)
    whole = Store(root / "artifacts")
    for stage in kinds.values():
        files = sorted(whole.manifest(stage)["files"])
        assert files, stage
        for name in (*files, MANIFEST):
            path = whole.folder(stage) / name
            original = path.read_bytes()
            middle = len(original) // 2
            flipped = original[:middle] + bytes([original[middle] ^ 1]) + original[middle + 1 :]
            if name == MANIFEST:  # a flip inside what a manifest says about its making is beyond any hash
                flipped = original.replace(stage.key.encode(), stage.key[::-1].encode())
            for damaged in (flipped, original[:-1] if name != MANIFEST else original[:-2], None):
                if name == MANIFEST and damaged is None:
                    continue  # a folder without one is no artifact: `test_a_folder_without_a_manifest_is_rebuilt`
                path.unlink()
                if damaged is not None:
                    path.write_bytes(damaged)
                with pytest.raises(CorruptArtifact) as caught:
                    Store(root / "artifacts").fetch(stage)
                assert str(path) in str(caught.value)
                assert "Delete the folder" in str(caught.value)
                path.write_bytes(original)
        assert Store(root / "artifacts").fetch(stage)


def test_no_disk_space_is_said_before_anything_runs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from collections import namedtuple

    from persona_coupling import cli

    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _path: usage(10**9, 10**9 - 10**6, 10**6))
    monkeypatch.setenv("PERSONA_COUPLING_CACHE", str(tmp_path))
    monkeypatch.setenv("PERSONA_COUPLING_ROOT", str(REPOSITORY))
    assert cli.main(["plan", "--profile", "smoke"]) == 2
    assert not list(tmp_path.rglob("manifest.json"))
    assert paths.artifacts() == tmp_path


def test_another_family_from_a_local_folder_runs_the_same_code(tmp_path: Path) -> None:
    """The 7B profile's path on a tiny random Qwen2: a local folder with its own tokenizer and template."""
    from persona_coupling import tiny

    folder = tmp_path / "tiny-qwen2"
    folder.mkdir()
    tiny.write(folder, family="qwen2", layers=4, width=32, seed=1)
    root = tmp_path / "root"
    for name in ("experiments", "paper"):
        ignored = shutil.ignore_patterns("results", "lab_notes", "generated", "*.pdf")
        shutil.copytree(REPOSITORY / name, root / name, ignore=ignored)
    experiments = ["--only", "00", "--only", "01", "--only", "05"]  # those that depend on the number of layers
    arguments = ["cells", "--profile", "smoke", "--seeds", "3", "--model", str(folder), *experiments]
    assert "tiny-qwen2" in run(root, *arguments).stdout
    record = json.loads((root / "experiments/00_replication/results/smoke/record.json").read_text())
    assert record["profile"]["seeds"] == [3]
    assert record["profile"]["model"]["name"] == "tiny-qwen2"
