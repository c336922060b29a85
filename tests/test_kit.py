"""The artifact-evaluation kit: numbers are typst's own, every file is described and none else, the same bytes again."""

from __future__ import annotations

import hashlib
import json
import re
import tomllib
from pathlib import Path

import pytest
import typst
import yaml

from persona_coupling import cli, kit, outline
from persona_coupling.errors import GuardError, UserError

ROOT = Path(__file__).resolve().parents[1]
ONE, TWO = "00_one", "01_two"

PAPER = """
#set heading(numbering: "1.1")
#show heading.where(level: 3): set heading(numbering: none)
#let shown(kind, name) = [#figure(rect(), kind: kind, caption: [x]) #label(name)]
= Introduction
= Experiments
== One <sec-00>
=== Question
#shown(image, "fig-00_one-rates")
#shown(table, "prior-00")
#shown(table, "tab-00_one-rates")
== Two <sec-01>
=== Question
#shown(image, "fig-01_two-scan")
= Verdicts
#shown(table, "claims")
#heading(numbering: none)[References]
#counter(heading).update(0)
#set heading(numbering: "A.1")
= Claims in detail <detail>
#shown(table, "claims-detail")
"""


def claim(identity: str, experiment: str, verdict: str = "supported") -> dict[str, str]:
    why = "0.90 [0.80, 0.95] lies above 0.25"
    return {
        "id": identity,
        "experiment": experiment,
        "statement": f"It is so | {identity}.",
        "verdict": verdict,
        "why": why,
    }


def cell(seed: int, made: str, seconds: float, *, device: str = "a card", commit: str = "abc") -> dict[str, object]:
    versions = {"python": "3.11.7", "torch": "2.13.0+cpu"}
    provenance = {"made": made, "commit": commit, "device": device, "system": "Linux", "versions": versions}
    own = {"evaluation": f"e{seed}", "changes": [f"change/c{seed}", "change/first"]}
    return {"condition": "A", "seed": seed, **own, "provenance": {**provenance, "seconds": seconds}}


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A repository of two experiments under `quick`, each with a figure; the first with a table; nothing computed."""
    monkeypatch.setenv("PERSONA_COUPLING_ROOT", str(tmp_path))
    files = {"paper/main.typ": PAPER, "paper/paper-quick.pdf": "%PDF", "README.md": "text"}
    for name in ("CITATION.cff", "constraints.txt", "pyproject.toml", "REVIEWERS.md"):
        files[name] = (ROOT / name).read_text(encoding="utf-8")
    index = {
        "experiments": [ONE, TWO],
        "claims": [
            claim("00-a", ONE),
            claim("00-b", ONE, "refuted"),
            claim("01-a", TWO),
            claim("02-a", "02_three", "not run"),
        ],
        "counts": {"supported": 2, "refuted": 1, "inconclusive": 0, "uninterpretable": 0, "not run": 1},
        "profile": {"seeds": [0, 1], "model": {"name": "a model"}},
        "compute_minutes": 12.4,
        "provenance": {ONE: {"device": "a card", "commit": "abc"}, TWO: {"device": "a card", "commit": "def"}},
    }
    files["paper/generated/quick/index.json"] = json.dumps(index)
    for name, figure, tables in ((ONE, "rates", ["rates"]), (TWO, "scan", [])):
        content = {
            "figures": {
                figure: {"path": f"/figures/quick/{name}-{figure}.svg", "caption": f"{figure} of {name}. More."}
            },
            "tables": {table: {"path": f"{name}-{table}.json", "caption": f"{table}, a table."} for table in tables},
        }
        files[f"paper/generated/quick/{name}.json"] = json.dumps(content)
        files |= {f"figures/quick/{name}-{figure}{end}": f"{name}{end}" for end in (".svg", ".png", ".csv")}
        files |= {
            f"paper/generated/quick/{name}-{table}{end}": f"{name}{end}"
            for table in tables
            for end in (".json", ".csv")
        }
        record = {
            "cells": [
                cell(0, "2026-11-02T10:00:00+00:00", 60.0),
                cell(1, "2026-11-02T11:00:00+00:00", 30.0, device="another card"),
            ],
            "stages": {"e0": 60.0, "e1": 30.0, "c0": 120.0, "c1": 150.0, "first": 300.0, "rows": 90.0},
            "compute_minutes": 12.5,
            "provenance": {**cell(1, "2026-11-03T12:00:00+00:00", 0.0)["provenance"]},  # type: ignore[dict-item]
        }
        files[f"experiments/{name}/results/quick/record.json"] = json.dumps(record)
        files[f"experiments/{name}/results/quick/completions.parquet"] = f"{name} completions"
        files[f"experiments/{name}/{name[3:]}.py"] = "# %%\n"
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text, encoding="utf-8")
    return tmp_path


def graph(root: Path) -> dict[str, dict[str, object]]:
    return {entity["@id"]: entity for entity in json.loads((root / "ro-crate-metadata.json").read_text())["@graph"]}


# ------------------------------------------------------------------------------------------------ numbers of the paper


def typsts_own(main: Path, root: Path, profile: str, labels: list[str]) -> dict[str, str]:
    """What typst itself prints when it refers to labels: its counters, asked at each of them."""
    probe = main.with_name("probe.typ")
    asked = "\n".join(
        f'#context {{ let it = query(label("{label}")).first()\n'
        "let number = if it.func() == heading { numbering(it.numbering, ..counter(heading).at(it.location())) } else "
        "{ numbering(it.numbering, ..counter(figure.where(kind: it.kind)).at(it.location())) }\n"
        f'[#metadata(("{label}", number)) <probed>] }}'
        for label in labels
    )
    probe.write_text(main.read_text(encoding="utf-8") + "\n" + asked, encoding="utf-8")
    answer = json.loads(
        typst.query(str(probe), "<probed>", field="value", root=str(root), sys_inputs={"profile": profile})
    )
    probe.unlink()
    return dict(answer)


def test_numbers_are_those_that_typst_gives(root: Path) -> None:
    found = outline.read("quick")
    own = typsts_own(root / "paper/main.typ", root, "quick", [e.label for e in found.exhibits] + ["sec-00", "sec-01"])
    assert {exhibit.label: exhibit.number.split()[1] for exhibit in found.exhibits} == {
        label: number for label, number in own.items() if not label.startswith("sec")
    }
    assert found.sections == {"00": own["sec-00"], "01": own["sec-01"]} == {"00": "2.1", "01": "2.2"}
    assert found.named("prior-00") == "Table 1"
    assert found.of("00") == "Section 2.1, Figure 1, Tables 1–2"


def test_an_appendix_begins_again_with_a_letter() -> None:
    heading = {"func": "heading", "level": 1}
    found = outline.number(
        [
            {**heading, "numbering": "1.1"},
            {**heading, "numbering": "A.1"},
            {**heading, "numbering": "A.1", "level": 2, "label": "<sec-09>"},
        ]
    )
    assert found.sections == {"09": "A.1"}


# -------------------------------------------------------------------------------------------------------- codecheck.yml


def test_every_file_is_listed_with_its_figure_or_table_and_its_hash(root: Path) -> None:
    kit.write("quick")
    text = (root / "codecheck.yml").read_text(encoding="utf-8")
    content = yaml.safe_load(text)
    listed = {entry["file"]: entry for entry in content["manifest"]}
    there = [*root.glob("figures/quick/*"), *root.glob("paper/generated/quick/*"), root / "paper/paper-quick.pdf"]
    assert set(listed) == {str(path.relative_to(root)) for path in there}
    for path in there:
        entry = listed[str(path.relative_to(root))]
        assert entry["size"] == len(path.read_bytes())
        assert entry["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
    assert listed["figures/quick/01_two-scan.svg"]["comment"] == "Figure 2: scan of 01_two"
    assert listed["paper/generated/quick/00_one-rates.json"]["comment"] == "Table 2: rates, a table"
    assert "Table 1 (prior-00)" in listed["paper/generated/quick/00_one.json"]["comment"]
    assert "Table 3 (claims); Table 4 (claims-detail)" in listed["paper/generated/quick/index.json"]["comment"]
    # rules CC-CFG-002, -006, -007, -014, -015, -018, -019 and -023 of the community's register
    assert text.startswith("---\n")
    assert content["version"] == "https://codecheck.org.uk/spec/config/1.0/"
    assert content["paper"]["title"]
    assert [author["name"] for author in content["paper"]["authors"]] == ["The persona-coupling authors"]
    assert all(entry["comment"] and not entry["file"].startswith(("/", "..")) for entry in listed.values())
    assert not re.search("FIXME|TODO|XXXX", text)


def test_what_other_commands_leave_beside_is_listed_where_it_is(root: Path) -> None:
    (root / "paper/generated/quick/mutations.json").write_text("{}")
    kit.write("quick")
    assert "mutations.json\n  comment: What the verifier caught" in (root / "codecheck.yml").read_text(encoding="utf-8")
    assert "noise_floor" not in (root / "codecheck.yml").read_text(encoding="utf-8")


def test_written_again_they_are_the_same_bytes(root: Path) -> None:
    first = {path: path.read_bytes() for path in kit.write("quick")}
    assert len(first) == 3
    assert {path: path.read_bytes() for path in kit.write("quick")} == first


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda root: (root / "figures/quick/01_two-scan.svg").unlink(), "has no file: figures/quick/01_two-scan.svg"),
        (lambda root: (root / "figures/quick/old.svg").write_text("x"), "made of figures/quick/old.svg"),
        (lambda root: (root / "paper/generated/quick/09_old.json").write_text("{}"), "09_old.json"),
        (lambda root: (root / "REVIEWERS.md").write_text("nothing"), "lacks the comments"),
    ],
)
def test_what_does_not_fit_is_refused_and_nothing_is_written(root: Path, damage, said: str) -> None:
    damage(root)
    with pytest.raises(GuardError, match=re.escape(said)):
        kit.write("quick")
    assert not (root / "codecheck.yml").exists()


def test_differences_from_the_manifest_are_named(root: Path) -> None:
    kit.write("quick")
    assert kit.differences() == []
    figure = root / "figures/quick/00_one-rates.svg"
    figure.write_text("00_one.svh")  # as long as before
    (root / "figures/quick/01_two-scan.png").unlink()
    (root / "figures/quick/new.png").write_text("x")
    assert kit.differences() == [
        "figures/quick/00_one-rates.svg is not the file that codecheck.yml describes",
        "figures/quick/01_two-scan.png is missing",
        "figures/quick/new.png is not listed in codecheck.yml",
    ]


# --------------------------------------------------------------------------------------------------------- REVIEWERS.md


def test_every_claim_has_a_row_with_what_one_should_see(root: Path) -> None:
    before = (root / "REVIEWERS.md").read_text(encoding="utf-8")
    kit.write("quick")
    text = (root / "REVIEWERS.md").read_text(encoding="utf-8")
    assert text.partition(kit.REVIEWERS_BEGINS)[0] == before.partition(kit.REVIEWERS_BEGINS)[0]
    rows = {row.split("`")[1]: row for row in text.splitlines() if row.startswith("| `0")}
    assert list(rows) == ["00-a", "00-b", "01-a", "02-a"]
    for identity, row in rows.items():
        assert len(re.findall(r"(?<!\\)\|", row)) == 5, "four cells, and a bar in a statement is none"
        assert f"It is so \\| {identity}." in row
    assert "**refuted**: 0.90 [0.80, 0.95] lies above 0.25" in rows["00-b"]
    assert "`nox -s spotcheck -- --claim 00-b --cells 2 --seed 1`" in rows["00-b"]
    assert "spotcheck" not in rows["02-a"]
    assert "Stands in Section 2.1, Figure 1, Tables 1–2. Lab note: not executed" in text
    assert "Table 3, with estimands and predicates in Table 4" in text
    assert "4 claims: 2 supported, 1 refuted, 1 not run" in text
    assert "about 12 min of compute, summed over processes, on a card at commit abc, def" in text
    assert "`nox -s reproduce -- --profile quick --only 02` runs it" in text


def test_minutes_of_a_spot_check_count_what_cells_have_in_common_once(root: Path) -> None:
    record = json.loads((root / f"experiments/{ONE}/results/quick/record.json").read_text())
    # by hand: rows 90 s, the first change of both cells 300 s once, then 60 + 120 and 30 + 150 s
    assert kit.spotcheck_minutes(record) == pytest.approx((90 + 300 + 180 + 180) / 60)
    assert kit.spotcheck_minutes(record, cells=1) == pytest.approx((90 + 300 + 180) / 60)
    assert kit.spotcheck_minutes(record, cells=5) <= sum(record["stages"].values()) / 60


def test_the_repositorys_page_has_the_comments_and_types_no_claim() -> None:
    text = (ROOT / "REVIEWERS.md").read_text(encoding="utf-8")
    before, begins, rest = text.partition(kit.REVIEWERS_BEGINS)
    assert begins
    assert kit.REVIEWERS_ENDS in rest
    assert not re.search(r"\b0\d-[a-z]", before), "a claim stands in the table, which is written"


def test_the_repositorys_kit_describes_its_evidence(monkeypatch: pytest.MonkeyPatch) -> None:
    """Either there is a kit and it fits the tree, or no evidence has been described yet and no page claims any."""
    monkeypatch.setenv("PERSONA_COUPLING_ROOT", str(ROOT))
    if (ROOT / "codecheck.yml").is_file():
        assert kit.differences() == []
    else:
        assert not (ROOT / "ro-crate-metadata.json").exists()
        assert "| claim | says |" not in (ROOT / "REVIEWERS.md").read_text(encoding="utf-8")


# ------------------------------------------------------------------------------------------------------------- RO-Crate


def test_the_crate_names_every_piece_of_evidence_with_its_hash(root: Path) -> None:
    kit.write("quick")
    found = graph(root)
    evidence = [p for top in ("figures/quick", "paper/generated/quick") for p in (root / top).iterdir()]
    evidence += [*root.glob("experiments/*/results/quick/*"), root / "paper/paper-quick.pdf"]
    assert len(evidence) > 10
    for path in evidence:
        entity = found[str(path.relative_to(root))]
        assert entity["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
        assert entity["contentSize"] == str(path.stat().st_size)
    parts = {part["@id"] for part in found["./"]["hasPart"]}  # type: ignore[attr-defined]
    files = {key for key, entity in found.items() if entity["@type"] == "File"}
    assert files <= parts, "RO-Crate 1.1: every data entity hangs on the root"
    assert {"README.md", "codecheck.yml", "REVIEWERS.md", "constraints.txt"} <= files


def test_every_reference_of_the_crate_leads_somewhere(root: Path) -> None:
    kit.write("quick")
    found = graph(root)

    def references(value: object) -> list[str]:
        if isinstance(value, list):
            return [one for item in value for one in references(item)]
        return [value["@id"]] if isinstance(value, dict) else []

    for entity in found.values():
        named = [one for key, value in entity.items() for one in references(value)]
        assert [one for one in named if one not in found and "w3id.org/ro/crate" not in one] == []
    assert found["ro-crate-metadata.json"]["about"] == {"@id": "./"}
    assert found["./"]["datePublished"] == "2026-11-03"


def test_runs_are_told_apart_by_machine_and_timed_by_their_cells(root: Path) -> None:
    kit.write("quick")
    found = graph(root)
    runs = {key: entity for key, entity in found.items() if entity["@type"] == "CreateAction"}
    assert list(runs) == ["#run-00-0", "#run-00-1", "#run-01-0", "#run-01-1", "#drawing"]
    first, second = runs["#run-00-0"], runs["#run-00-1"]
    assert (first["startTime"], first["endTime"]) == ("2026-11-02T09:59:00+00:00", "2026-11-02T10:00:00+00:00")
    assert (second["startTime"], second["endTime"]) == ("2026-11-02T10:59:30+00:00", "2026-11-02T11:00:00+00:00")
    said = [found[part["@id"]] for part in second["additionalProperty"]]  # type: ignore[attr-defined]
    assert [(one["name"], one["value"]) for one in said] == [
        ("device", "another card"),
        ("system", "Linux"),
        ("commit", "abc"),
    ]
    instrument = found[first["instrument"]["@id"]]  # type: ignore[index]
    versions = {found[part["@id"]].get("softwareVersion") for part in instrument["softwareRequirements"]}  # type: ignore[attr-defined]
    assert versions == {None, "3.11.7", "2.13.0+cpu"}  # None: the file constraints.txt
    assert "startTime" not in runs["#drawing"], "when it was drawn is not kept, so that its bytes are the same again"


# ------------------------------------------------------------------------------------------------------------ commands


def test_the_kit_is_written_with_the_paper_of_the_evidence_only(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written = []
    monkeypatch.setattr("persona_coupling.prose.write_index", lambda folder: {})
    monkeypatch.setattr("persona_coupling.prose.write_readme", lambda index: None)
    monkeypatch.setattr("persona_coupling.kit.write", written.append)
    cli.build_paper("smoke")
    assert written == []
    cli.build_paper("quick")
    assert written == ["quick"]


def test_the_evidence_is_the_profile_with_the_most_experiments(monkeypatch: pytest.MonkeyPatch) -> None:
    ran: dict[str, int] = {}
    monkeypatch.setattr("persona_coupling.notebooks.stored", lambda profile: ("x",) * ran.get(profile, 0))
    for ran_now, evidence in (({}, None), ({"quick": 8}, "quick"), ({"full": 3, "quick": 8}, "quick")):
        ran.clear()
        ran.update(ran_now)
        assert cli._evidence() == evidence
    for ran_now in ({"full": 8, "quick": 8}, {"full": 1}):
        ran.clear()
        ran.update(ran_now)
        assert cli._evidence() == "full"


def test_a_kit_of_plumbing_is_refused(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["kit", "--profile", "smoke"]) == 2
    assert "which is of the profile quick, not smoke" in capsys.readouterr().err
    assert cli.main(["kit"]) == 0
    assert capsys.readouterr().out.split() == ["REVIEWERS.md", "codecheck.yml", "ro-crate-metadata.json"]


def test_a_paper_that_does_not_compile_is_said(root: Path) -> None:
    (root / "paper/main.typ").write_text("#nonsense")
    with pytest.raises(UserError, match="does not compile"):
        kit.write("quick")


# ------------------------------------------------------------------------------------------------------------- CITATION


def test_the_citation_agrees_with_package_changelog_and_paper() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    required = {"cff-version", "message", "title", "authors"}  # https://citation-file-format.github.io, 1.2.0
    assert required <= set(citation)
    assert citation["cff-version"] == "1.2.0"
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert (citation["version"], citation["license"]) == (project["version"], project["license"])
    newest = re.findall(r"^## (.+)$", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), flags=re.MULTILINE)[0]
    released = re.fullmatch(r"(\S+) \((\d{4}-\d\d-\d\d)\)", newest)
    if released:
        assert (citation["version"], str(citation["date-released"])) == released.groups()
    else:
        assert newest == "Unreleased"
        assert "date-released" not in citation
    title = re.search(r'#let title = "(.+)"', (ROOT / "paper/main.typ").read_text(encoding="utf-8"))
    assert title
    assert citation["preferred-citation"]["title"] == title[1]


# ----------------------------------------------------------------------------------------------------------- checklists


def test_the_checklists_answers_are_plain_and_point_at_what_exists() -> None:
    text = (ROOT / "docs/CHECKLIST.md").read_text(encoding="utf-8")
    rows = [
        line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| ") and "asked" not in line
    ]
    rows = [row for row in rows if row[0] != "badge"]
    assert len(rows) > 20
    assert {row[1] for row in rows} <= {"yes", "partly", "no", "does not apply", "not ours to say"}
    assert all(len(row) == 3 and row[2] for row in rows)
    written = {"codecheck.yml", "ro-crate-metadata.json", "record.json"}  # with evidence, by commands that tests run
    pointers = set(re.findall(r"`([\w./-]+)`", text)) - written
    paths_named = {name for name in pointers if "/" in name or name.rsplit(".", 1)[-1] in ("md", "cff", "txt", "toml")}
    assert len(paths_named) > 10
    assert [name for name in sorted(paths_named) if not (ROOT / name).exists()] == []
    sources = "".join(
        path.read_text(encoding="utf-8") for path in (ROOT / "paper/main.typ", *ROOT.glob("experiments/*/section.typ"))
    )
    for section in set(re.findall(r"(?<!\*)\*([A-Z][^*]+)\*(?!\*)", text)):
        assert section in sources.replace("_", ""), section
