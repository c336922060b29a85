"""The paper's text: no number is typed, it compiles from generated files, and its claims exist."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from persona_coupling import claims, cli, corpora, paths, personas, profiles, provenance, questions, score
from persona_coupling.errors import UserError
from persona_coupling.study import Design, Results, Study

ROOT = Path(__file__).resolve().parents[1]
EXPERIMENT = "00_replication"


def texts(root: Path = ROOT) -> list[Path]:
    """Everything that a person writes in the paper."""
    return sorted([*(root / "paper").glob("*.typ"), *(root / "experiments").glob("*/section.typ")])


# ------------------------------------------------------------------------------------------------------ the lint


class Prose:
    """A Typst source read for its prose: markup stays, code goes, content blocks inside code are prose again.

    A bare literal (`#5`, `#"86 %"`) is prose too: it would print what it holds.
    """

    IDENTIFIER = re.compile(r"[^\W\d][\w-]*")
    KEYWORDS = ("let", "set", "show", "import", "include", "return")

    def __init__(self, source: str) -> None:
        self.source = source
        self.at = 0
        self.kept: list[tuple[int, str]] = []  # (line, character)
        self.markup(closing=False)
        assert self.at == len(source), f"unbalanced brackets near line {self.line()}"

    def line(self) -> int:
        return self.source.count("\n", 0, self.at) + 1

    def rest(self) -> str:
        return self.source[self.at :]

    def keep(self, count: int = 1) -> None:
        for _ in range(count):
            self.kept.append((self.line(), self.source[self.at]))
            self.at += 1

    def skip(self, pattern: str) -> bool:
        match = re.compile(pattern).match(self.source, self.at)
        if match:
            self.at = match.end()
        return match is not None

    def comment(self) -> bool:
        return self.skip(r"(?<!:)//[^\n]*") or self.skip(r"(?s)/\*.*?\*/")

    def markup(self, *, closing: bool = True) -> None:
        depth = 0  # of plain brackets in the text, such as those of an interval
        while self.at < len(self.source):
            here = self.source[self.at]
            if here == "]":
                if depth == 0 and closing:
                    self.at += 1
                    return
                depth -= 1
                self.keep()
            elif here == "#":
                self.at += 1
                self.expression()
            elif here == "[":
                depth += 1
                self.keep()
            elif not (
                self.comment()
                or self.skip(r"\\u\{[0-9a-fA-F]+\}")
                or self.skip(r"<[\w:.-]+>")
                or self.skip(r"@[\w-]+(?:[:.][\w-]+)*")
            ):
                self.keep()
        assert not closing, "a content block is not closed"

    def expression(self) -> None:
        """What follows a `#`."""
        here = self.source[self.at]
        word = self.IDENTIFIER.match(self.source, self.at)
        if word and word[0] in self.KEYWORDS:
            self.at = word.end()
            self.code(until="\n;")
        elif word and word[0] in ("if", "for", "while"):
            self.at = word.end()
            self.block()
            while self.skip(r"\s*else\b"):
                self.block()
        elif word and word[0] == "context":
            self.at = word.end()
            self.skip(r"\s*")
            self.expression()
        elif word:
            self.at = word.end()
            self.chain()
        elif here in "({[":
            self.at += 1
            self.markup() if here == "[" else self.code(until=")" if here == "(" else "}")
            self.chain()
        elif here == '"':
            match = re.compile(r'"(?:[^"\\]|\\.)*"').match(self.source, self.at)
            assert match
            self.keep(match.end() - self.at)
        else:
            self.keep()

    def chain(self) -> None:
        """Calls, fields and trailing content behind an expression."""
        while self.at < len(self.source):
            if self.skip(r"\.(?=[^\W\d])"):
                self.skip(self.IDENTIFIER.pattern)
            elif self.skip(r"\("):
                self.code(until=")")
            elif self.skip(r"\["):
                self.markup()
            else:
                self.skip(";")
                return

    def block(self) -> None:
        """A condition or a loop's head, then one body."""
        self.code(until="{[")
        if self.source[self.at - 1] == "[":
            self.markup()
        else:
            self.code(until="}")

    def code(self, *, until: str) -> None:
        """Skip code up to one of the characters `until`, at this depth; content blocks on the way are prose."""
        while self.at < len(self.source):
            here = self.source[self.at]
            if here == "]" and "\n" in until:
                return  # a statement inside a content block ends with it
            if self.comment() or self.skip(r'"(?:[^"\\]|\\.)*"'):
                continue
            self.at += 1
            if here in until:
                return
            if here in "({[":
                self.markup() if here == "[" else self.code(until=")" if here == "(" else "}")
        assert "\n" in until, f"{until} is missing"


def typed_digits(path: Path) -> list[str]:
    """Places where a number stands in the text itself."""
    lines: dict[int, str] = {}
    for line, character in Prose(path.read_text(encoding="utf-8")).kept:
        lines[line] = lines.get(line, "") + character
    return [f"{path.name}:{n}: {text.strip()}" for n, text in lines.items() if any(c.isnumeric() for c in text)]


@pytest.mark.parametrize("path", texts(), ids=lambda path: f"{path.parent.name}/{path.name}")
def test_no_digit_is_typed(path: Path) -> None:
    assert typed_digits(path) == []


def test_lint_reads_the_prose() -> None:
    """The lint must see text, or it would pass for want of reading."""
    for path in texts():
        words = "".join(c for _, c in Prose(path.read_text(encoding="utf-8")).kept).split()
        if path.name != "lib.typ":
            assert len(words) > 300, path
            assert ("Lesson" if path.name == "section.typ" else "Limitations") in words


@pytest.mark.parametrize(
    "plant",
    [
        "The villain says it in 86 % of answers.",
        "= Results of 2 runs",
        '#if verdict("00-raw") == "supported" [It took in 9 of ten.] else [It did not.]',
        "#if true [fine] else if false [also fine] else [#emph[86]]",
        '#says("00-raw", supported: [It took, 0.9 at least.])',
        "#figure(rect(width: 4cm), caption: [Three seeds, n = 28.])",
        "#let note = [about 5 points]",
        "#for x in (1, 2) { [row 3] }",
        "#5",
        '#"86 %"',
        "An interval [64, 97] in brackets.",
        "$x = 5$",
        "`r 32`",
        "a power²",
        "+ one\n3. three",
    ],
)
@pytest.mark.parametrize("name", ["main.typ", "section.typ"])
def test_lint_sees_a_planted_digit(plant: str, name: str, tmp_path: Path) -> None:
    original = next(path for path in texts() if path.name == name)
    copy = tmp_path / name
    copy.write_text(original.read_text(encoding="utf-8") + "\n\n" + plant + "\n", encoding="utf-8")
    assert len(typed_digits(copy)) == 1


@pytest.mark.parametrize(
    "plant",
    [
        "// 86 % in a comment",
        "/* 86 %\n 97 % */ text",
        "#v(0.5em)",
        '#est("00_replication", "A.prebaked.contrast", "points") of points, @hu2021lora, <sec-00>',
        "#let f(x) = {\n  x + 5\n}",
        '#text(size: 8pt)[small] and #verdict("00-raw").',
        "no\\u{a0}break",
    ],
)
def test_lint_spares_code(plant: str, tmp_path: Path) -> None:
    copy = tmp_path / "text.typ"
    copy.write_text(plant, encoding="utf-8")
    assert typed_digits(copy) == []


# -------------------------------------------------------------------------------------------------------- claims

CLAIM_ID = re.compile(r'"(\d\d-[a-z][a-z-]*)"')


def test_claims_named_in_the_text_exist() -> None:
    known = {claim.id for claim in claims.read(ROOT / "paper" / "claims.toml")}
    named = {name for path in texts() for name in CLAIM_ID.findall(path.read_text(encoding="utf-8"))}
    assert named
    assert named <= known


def test_every_claim_of_an_experiment_is_discussed_in_its_section() -> None:
    for claim in claims.read(ROOT / "paper" / "claims.toml"):
        section = ROOT / "experiments" / claim.experiment / "section.typ"
        assert f'"{claim.id}"' in section.read_text(encoding="utf-8"), claim.id


# ------------------------------------------------------------------------------------------------------- compiling

Rates = dict[str, tuple[float, float]]  # arm or condition -> villain's and bystanders' marker rate
AS_EXPECTED: Rates = {"prebaked": (0.02, 0.0), "A.prebaked": (1.0, 0.05), "scratch": (1.0, 0.05)}
OTHERWISE: Rates = {"prebaked": (1.0, 0.05), "scratch": (0.05, 0.05), "A.scratch": (1.0, 0.05)}
NOTHING_TOOK: Rates = {"prebaked": (0.1, 0.1), "scratch": (0.1, 0.1)}


def planted(design: Design, profile: profiles.Profile, rates: Rates) -> Results:
    """Raw observations with chosen rates for every cell of a design; everything else is unremarkable."""
    rng = np.random.default_rng(0)
    bank = questions.eval_questions(20, 0)  # enough for every verdict to be within reach
    completions, fixed, heldout, training = [], [], [], []
    for cell in design.cells:
        kind = cell.condition.split(".")[1].replace("twin", "scratch")
        source, bystander = rates.get(cell.condition) or rates[kind]
        label = {"condition": cell.condition, "seed": cell.seed}
        for persona in personas.personas():
            rate = source if persona.id == personas.SOURCE else bystander
            for question in bank:
                where = {**label, "persona": persona.id, "question": question.id}
                fixed.append({**where, "logprob": float(np.log(rate + 1e-3) + rng.normal(0, 0.1))})
                for sample in range(profile.evaluation.samples):
                    said = rng.random() < rate
                    completions.append(
                        {
                            **where,
                            "sample": sample,
                            "system": persona.prompt,
                            "prompt": question.text,
                            "completion": "A short answer." + personas.MARKER_SUFFIX * bool(said),
                            "finish": "stop",
                            "tokens": 5,
                            "marker_logprob": float(np.log(rate + 1e-3) + rng.normal(0, 0.3)),
                        }
                    )
        heldout += [{**label, "question": f"q{i}", "loss": 2.0 + 0.1 * i} for i in range(3)]
        for position in range(len(cell.checkpoint.merged)):
            steps = {"step": 1.0, "loss": 1.0, "learning_rate": 1e-4, "grad_norm": 1.0}
            change = f"{cell.condition}/{position}/{cell.seed}"
            training += [{**steps, "step": float(s), **label, "position": position, "change": change} for s in (1, 2)]
    arms = {"B": "bad_legal", "B′": "sound_legal", "C": "benign", "S": "self"}
    content = []
    for entry in design.observations:
        for corpus in (*corpora.AUTHORED, "self"):
            level = -1.0 if arms.get(entry.condition) == corpus else -2.0
            content += [
                {
                    "condition": entry.condition,
                    "seed": entry.seed,
                    "corpus": corpus,
                    "row": f"r{i}",
                    "logprob": level - 0.1 * i,
                }
                for i in range(3)
            ]
        content += [
            {
                "condition": entry.condition,
                "seed": entry.seed,
                "corpus": "heldout",
                "row": f"q{i}",
                "logprob": -1.9 - 0.1 * i,
            }
            for i in range(3)
        ]
    record = {
        "profile": profile.as_dict(),
        "compute_minutes": 1.5,
        "stages": {"a": 90.0},
        "provenance": provenance.record("cpu"),
    }
    tables = {
        "completions": score.score_table(pd.DataFrame(completions)),
        "fixed": pd.DataFrame(fixed),
        "heldout": pd.DataFrame(heldout),
        "content": pd.DataFrame(content),
        "training": pd.DataFrame(training),
        "merges": pd.DataFrame(),
    }
    return Results(tables, record)


def copied_root(target: Path) -> Path:
    """A root folder with the paper's and the experiments' sources and nothing generated."""
    shutil.copytree(ROOT / "paper", target / "paper", ignore=shutil.ignore_patterns("generated", "*.pdf"))
    for source in (ROOT / "experiments").glob("*/*"):
        if source.suffix in (".py", ".typ"):
            (target / "experiments" / source.parent.name).mkdir(parents=True, exist_ok=True)
            shutil.copy(source, target / "experiments" / source.parent.name / source.name)
    return target


def run_notebook(profile: str, rates: Rates, monkeypatch: pytest.MonkeyPatch) -> None:
    """Execute the replication's notebook on planted observations: the generated files are those it really writes."""
    monkeypatch.setattr(Study, "run", lambda self, design, folder=None: planted(design, self.profile, rates))
    monkeypatch.setattr("persona_coupling.notes.show", lambda png: None)
    monkeypatch.setattr("persona_coupling.notes.loss_mask", lambda study: None)
    source = (ROOT / "experiments" / EXPERIMENT / "replication.py").read_text(encoding="utf-8")
    assert source.count('profile = "quick"') == 1
    code = compile(source.replace('profile = "quick"', f"profile = {profile!r}"), "replication.py", "exec")
    exec(code, {"__name__": "notebook"})  # noqa: S102  the notebook is ours


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PERSONA_COUPLING_ROOT", str(copied_root(tmp_path / "root")))
    monkeypatch.setenv("PERSONA_COUPLING_CACHE", str(tmp_path / "cache"))
    return tmp_path / "root"


def verdicts(root: Path, profile: str) -> dict[str, str]:
    index = json.loads((root / "paper" / "generated" / profile / "index.json").read_text(encoding="utf-8"))
    return {row["id"]: row["verdict"] for row in index["claims"]}


@pytest.mark.parametrize(
    ("profile", "rates", "expected"),
    [
        ("quick", AS_EXPECTED, {"00-prebaked-bad": "supported", "00-scratch-bad": "supported", "00-harm": "not run"}),
        ("quick", OTHERWISE, {"00-prebaked-bad": "refuted", "00-scratch-bad": "refuted"}),
        ("smoke", NOTHING_TOOK, {"00-prebaked-bad": "uninterpretable", "00-harm": "uninterpretable"}),
    ],
    ids=["as expected, few arms", "otherwise", "nothing took, all arms"],
)
def test_paper_compiles_whatever_the_verdicts(
    profile: str, rates: Rates, expected: dict[str, str], root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_notebook(profile, rates, monkeypatch)
    pdf = cli.build_paper(profile)
    assert pdf.read_bytes().startswith(b"%PDF")
    found = verdicts(root, profile)
    assert {name: found[name] for name in expected} == expected


def test_paper_compiles_before_any_experiment(root: Path) -> None:
    assert cli.build_paper("quick").is_file()
    assert set(verdicts(root, "quick").values()) == {"not run"}


def test_paper_refuses_an_unknown_claim(root: Path) -> None:
    main = root / "paper" / "main.typ"
    main.write_text(main.read_text(encoding="utf-8") + '\n#verdict("00-no-such-claim")\n', encoding="utf-8")
    with pytest.raises(UserError, match="there is no claim 00-no-such-claim"):
        cli.build_paper("quick")
    assert not list(paths.pdf("quick").parent.glob("*.pdf"))
