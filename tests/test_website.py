"""The lab notes' site without a browser: labels, values, guards; then a built site's links, headings, bytes."""

import json
import re
import tomllib
from fnmatch import fnmatchcase
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote

import pytest
import website_sample as sample

from persona_coupling import website, website_pages
from persona_coupling.errors import GuardError, UserError

REPOSITORY = Path(__file__).parents[1]


def first_page(labels=("00-*",), **changed):
    own = [row for row in sample.CLAIMS if row["experiment"] == "00_first"]
    notebook = sample.notebook("00", "Replication", own, list(labels))
    notebook["cells"] = [cell for cell in notebook["cells"] if cell["source"] not in changed.get("without", ())]
    return website_pages.page("00_first", notebook, sample.content("00_first", own))


def test_a_label_names_claims_and_cells_are_called_by_what_they_show():
    page = first_page()
    assert (page.title, page.question) == ("Replication", "Is it so, or *not*?")
    assert [(cell.kind, cell.evidence) for cell in page.cells] == [
        ("output", ()),
        ("gates", ("00-raw", "00-after")),
        ("figure", ("00-raw", "00-after")),
        ("table", ("00-raw", "00-after")),
        ("verdicts", ("00-raw", "00-after")),
    ]
    rows = website_pages.claim_rows(sample.CLAIMS, [page])
    assert [link["kind"] for link in rows[0]["links"]] == ["figure", "table", "gates", "verdicts"]
    assert rows[2]["links"] == []  # its experiment has no page


def test_a_label_that_fits_no_claim_is_refused():
    with pytest.raises(GuardError, match="unknown claims: 00-rew"):
        first_page(labels=["00-rew"])


def test_a_claim_that_no_cell_shows_is_refused():
    shown = ("report.verdict_table(judgements)", "report.gate_table(checked)")
    assert first_page(labels=["00-raw"], without=shown[:1])  # the gates still speak of both
    with pytest.raises(GuardError, match="shows 00-after"):
        first_page(labels=["00-raw"], without=shown)


@pytest.mark.parametrize("name", sorted(p.parent.name for p in (REPOSITORY / "experiments").glob("*/section.typ")))
def test_every_claim_has_a_labelled_cell_in_its_notebook(name):
    claims = tomllib.loads((REPOSITORY / "paper" / "claims.toml").read_text(encoding="utf-8"))["claim"]
    own = {claim["id"] for claim in claims if claim["experiment"] == name}
    (source,) = (p for p in (REPOSITORY / "experiments" / name).glob("*.py") if "# %%" in p.read_text(encoding="utf-8"))
    found = re.findall(r"^# %%.* ?evidence=(\[.*?\])$", source.read_text(encoding="utf-8"), flags=re.MULTILINE)
    labels = [label for labels in found for label in json.loads(labels)]
    assert own
    assert {claim for claim in own if not any(fnmatchcase(claim, label) for label in labels)} == set()
    assert [label for label in labels if not any(fnmatchcase(claim, label) for claim in own)] == []


@pytest.mark.parametrize(
    ("value", "low", "high", "unit", "expected"),
    [
        (-0.8571, -1.0, -0.3901, "difference of proportions", ("−86 points", "[−100, −39]")),
        (0.626, 0.318, 0.873, "proportion", ("63 points", "[32, 87]")),
        (-0.004, -2.5, 1.25, "nats per token", ("0.00 nats", "[−2.50, 1.25]")),
        (0.31, None, None, "share", ("0.31", "")),
        (None, None, None, "nats", ("–", "")),
    ],
)
def test_values_are_printed_as_in_the_paper(value, low, high, unit, expected):
    assert website_pages.value_text({"value": value, "low": low, "high": high}, unit) == expected


@pytest.mark.parametrize(
    ("predicate", "unit", "expected"),
    [
        ("below −0.25", "difference of proportions", "below −25 points"),
        ("above −2", "nats", "above −2 nats"),
        ("below 1", "nats", "below 1 nat"),
        ("above 0.333", "share", "above 0.333"),
    ],
)
def test_a_claim_s_bound_has_the_unit_of_its_value(predicate, unit, expected):
    assert website_pages.bound_text(predicate, unit) == expected


def test_a_claim_that_was_not_run_has_no_evidence_but_the_cell_that_says_so():
    own = [row for row in sample.CLAIMS if row["experiment"] == "01_second"]
    notebook = sample.notebook("01", "Layers", own, ["01-*"])
    page = website_pages.page("01_second", notebook, sample.content("01_second", own))
    assert [cell.kind for cell in page.cells if "01-none" in cell.evidence] == ["verdicts"]
    assert [cell.kind for cell in page.cells if "01-nats" in cell.evidence] == ["gates", "figure", "table", "verdicts"]


def test_row_numbers_go_and_row_names_stay():
    numbered = sample.table(["a"], [["x"], ["supported"]])["data"]["text/html"]
    read = website_pages.readable(numbered)
    assert "<th>0</th>" not in read
    assert read.count("<th>") == 1  # the heading of the one column
    assert 'class="badge supported"' in read
    assert "style" not in read
    named = numbered.replace("<th>1</th>", "<th>B</th>")
    assert "<th>0</th>" in website_pages.readable(named)


def test_gates_say_passed_or_failed_in_words_and_other_tables_keep_their_values():
    html = sample.table(["passed"], [["False"], ["True"]])["data"]["text/html"]
    assert "† failed" in website_pages.readable(html, gates=True)
    assert "failed" not in website_pages.readable(html)


def test_a_folder_of_something_else_is_not_replaced(tmp_path, monkeypatch):
    monkeypatch.setenv("PERSONA_COUPLING_ROOT", str(sample.write(tmp_path / "root")))
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "thesis.txt").write_text("mine")
    with pytest.raises(UserError, match="something else"):
        website.build("quick", tmp_path / "precious")
    assert (tmp_path / "precious" / "thesis.txt").read_text() == "mine"


def test_without_verdicts_or_notes_the_remedy_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv("PERSONA_COUPLING_ROOT", str(tmp_path))
    with pytest.raises(UserError, match="nox -s reproduce -- --profile quick"):
        website.stored_profile("")
    sample.write(tmp_path)
    assert website.stored_profile("") == "quick"
    (tmp_path / "experiments" / "01_second" / "lab_notes" / "quick.ipynb").unlink()
    with pytest.raises(UserError, match=r"01_second.*nox -s paper -- --profile quick --notes"):
        website.read("quick")


def test_an_index_of_another_version_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv("PERSONA_COUPLING_ROOT", str(sample.write(tmp_path)))
    path = tmp_path / "paper" / "generated" / "quick" / "index.json"
    index = json.loads(path.read_text())
    path.write_text(json.dumps({key: value for key, value in index.items() if key != "headline"}))
    with pytest.raises(UserError, match=r"lacks headline.*nox -s paper"):
        website.read("quick")


def contrast(one, other):
    """The ratio of WCAG 2, success criterion 1.4.3."""

    def luminance(colour):
        parts = [int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)]
        linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    bright, dim = sorted((luminance(one), luminance(other)), reverse=True)
    return (bright + 0.05) / (dim + 0.05)


def test_text_stands_out_from_its_ground_in_light_and_dark():
    assert contrast("#000000", "#ffffff") == pytest.approx(21)
    assert contrast("#777777", "#ffffff") == pytest.approx(4.48, abs=0.01)  # the usual example of just too little
    style = (website.THEME / "lab_notes" / "static" / "notes.css").read_text(encoding="utf-8")
    colours = {n: (a, b) for n, a, b in re.findall(r"--([a-z-]+): light-dark\((#\w{6}), (#\w{6})\)", style)}
    for text in ("ink", "soft", "accent", "good", "bad", "unsure", "warn"):
        for ground in ("paper", "sheet", "tint"):
            for scheme in (0, 1):
                assert contrast(colours[text][scheme], colours[ground][scheme]) >= 4.5, (text, ground, scheme)


class Read(HTMLParser):
    """What tests ask of a page: its anchors, links, headings and images."""

    def __init__(self, text):
        super().__init__()
        self.anchors, self.links, self.headings, self.alts = [], [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        attributes = dict(attrs)
        self.anchors += [attributes["id"]] if "id" in attributes else []
        self.links += [attributes[name] for name in ("href", "src", "action") if attributes.get(name)]
        self.headings += [int(tag[1])] if re.fullmatch("h[1-6]", tag) else []
        self.alts += [attributes.get("alt")] if tag == "img" else []


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    with sample.site(tmp_path_factory.mktemp("study"), stamp="smoke: not evidence") as built:
        yield built


def pages(site):
    return {path.name: Read(path.read_text(encoding="utf-8")) for path in sorted(site.glob("*.html"))}


def dead(site):
    """Links that lead nowhere, and links that need a network."""
    read = pages(site)
    found = []
    for name, page in read.items():
        for link in page.links:
            target, _, anchor = unquote(link).partition("#")
            target = target.split("?")[0]
            if re.match(r"(\w+:)?//|https?:", link):
                found.append((name, link))
            elif not link.startswith("data:"):
                path = target or name
                exists = (site / path).is_file()
                if not exists or (anchor and anchor not in read[path].anchors):
                    found.append((name, link))
    return found


def test_every_link_and_anchor_leads_somewhere_in_the_site(site):
    assert dead(site) == []
    linked = {link.split("#")[0] for page in pages(site).values() for link in page.links}
    assert {"paper-quick.pdf", "figures/00_first-rates.csv", "results/00_first/completions.parquet"} <= linked


def test_a_dead_link_would_be_seen(site, tmp_path):
    copy = tmp_path / "copy"
    copy.mkdir()
    (copy / "a.html").write_text('<a href="#here" id="there">x</a><a href="b.html">y</a><img src="https://x.y/z.png">')
    assert [link for _, link in dead(copy)] == ["#here", "b.html", "https://x.y/z.png"]


def test_headings_in_order_anchors_once_figures_described(site):
    for name, page in pages(site).items():
        assert page.headings[0] == 1, name
        assert page.headings.count(1) == 1, name
        assert all(b - a <= 1 for a, b in zip(page.headings, page.headings[1:], strict=False)), (name, page.headings)
        assert len(set(page.anchors)) == len(page.anchors), name
    figures = [alt for alt in pages(site)["00_first.html"].alts if alt]
    assert figures == ["Rates, * of [two] arms_here."]


def test_claims_lead_to_their_evidence_and_back(site):
    index, first = (site / "index.html").read_text(), (site / "00_first.html").read_text()
    for anchor in ("cell-06", "cell-07", "cell-04", "cell-09"):  # figure, table, gates, verdicts
        assert f'href="00_first.html#{anchor}"' in index
        assert f'id="{anchor}"' in first
    notes = re.findall(r'<div class="cell-note">.*?</div>', first, flags=re.DOTALL)
    assert len([note for note in notes if 'href="#claim-00-raw"' in note]) == 4
    assert 'id="claim-00-raw"' in first


def test_the_landing_page_says_question_answer_values_and_machine(site):
    text = re.sub(r"<[^>]+>", "", (site / "index.html").read_text(encoding="utf-8"))
    words = [
        "and why?",
        "It’s lost by adding, not by learning.",
        "intervals alone would have it: A gate’s.",
        "dose",
        "−86 points",
        "[−100, −39]",
        "a laptop, 2 cores",
    ]
    words += ["abc123", "13 minutes", "torch 2.13.0", "0.00 nats", "not evidence"]
    assert [word for word in words if word not in text] == []


def test_the_machine_s_folders_and_clock_stay_out(site):
    for path in site.rglob("*"):
        if path.suffix in (".html", ".js", ".css", ".json"):
            text = path.read_text(encoding="utf-8")
            assert "/home/somebody" not in text, path
            assert str(site.parent) not in text, path


def test_the_same_notebooks_give_the_same_bytes(site, tmp_path):
    again = tmp_path / "elsewhere"
    website.build("quick", again)
    first, second = ({p.relative_to(f): p.read_bytes() for p in f.rglob("*") if p.is_file()} for f in (site, again))
    assert first.keys() == second.keys()
    assert [str(name) for name in first if first[name] != second[name]] == []
    website.build("quick", again)  # a site of ours may be replaced
