"""Pages of the lab notes' site: an executed notebook becomes a page whose claims and evidence link to each other.

A cell says which claims it is evidence for in its metadata, `# %% evidence=["00-prebaked-*"]` in the notebook's source; the
cell that shows the verdicts and the one that shows the gates are evidence for all of the experiment's claims.
"""

from __future__ import annotations

import copy
import json
import re
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from persona_coupling import provenance
from persona_coupling.errors import GuardError

MARKS = {"supported": "✓", "refuted": "×", "inconclusive": "~", "uninterpretable": "†", "not run": "–"}
FORMS = {"points": (100, 0, " points"), "nats": (1, 2, " nats"), "number": (1, 2, "")}
MINUS, NO_BREAK = "−", "\u2011"
EXHIBIT = re.compile(r"\.(figure|table)\(\s*\"([a-z_0-9]+)\"")


@dataclass(frozen=True)
class Cell:
    """A code cell as its page knows it."""

    anchor: str
    kind: str  # "figure", "table", "gates", "verdicts" or "output": how a link to it is called
    exhibits: tuple[tuple[str, str], ...]  # ("figure" or "table", name) of what the cell hands to the paper
    evidence: tuple[str, ...]  # ids of claims


@dataclass(frozen=True)
class Page:
    """An experiment's page before it is written."""

    name: str
    title: str  # "Replication"
    question: str  # "does a learned marker survive ...?"
    notebook: dict[str, Any]
    content: dict[str, Any]  # paper/generated/<profile>/<name>.json
    cells: tuple[Cell, ...]

    @property
    def number(self) -> str:
        """The experiment's two digits."""
        return self.name.split("_")[0]


def page(name: str, notebook: dict[str, Any], content: dict[str, Any]) -> Page:
    """A page from an executed notebook and the experiment's generated file.

    Raises GuardError for a notebook without a title, for a label that fits no claim, and for a claim without evidence.
    """
    first = "".join(notebook["cells"][0]["source"]) if notebook["cells"] else ""
    heading = re.match(r"# (?:\d\d )?([^:\n]+)(?:: *([^\n]+))?", first)
    if heading is None:
        raise GuardError(f"the lab note of {name} does not begin with a title")
    claims = [row["id"] for row in content["claims"]]
    cells = tuple(
        _cell(n, cell, content["claims"], name)
        for n, cell in enumerate(notebook["cells"])
        if cell["cell_type"] == "code"
    )
    bare = [claim for claim in claims if not any(claim in cell.evidence for cell in cells)]
    if bare:
        raise GuardError(f"no cell of {name}'s lab note shows {', '.join(bare)}: does it show its verdicts?")
    question = (heading[2] or "").replace("'", "’")
    return Page(name, heading[1].strip(), question[:1].upper() + question[1:], notebook, content, cells)


def _cell(number: int, cell: dict[str, Any], rows: list[dict[str, Any]], name: str) -> Cell:
    """A claim that this profile did not run has no evidence but the cell that says so."""
    claims = [row["id"] for row in rows]
    run = [row["id"] for row in rows if row["verdict"] != "not run"]
    source = "".join(cell["source"])
    exhibits = tuple((found[1], found[2]) for found in EXHIBIT.finditer(source))
    labels = cell["metadata"].get("evidence", [])
    unknown = [label for label in labels if not any(fnmatchcase(claim, label) for claim in claims)]
    if unknown:
        raise GuardError(f"cell {number} of {name} is labelled as evidence for unknown claims: {', '.join(unknown)}")
    evidence = [claim for claim in run if any(fnmatchcase(claim, label) for label in labels)]
    kind = exhibits[0][0] if exhibits else "output"
    if "verdict_table(" in source:
        shown = json.dumps(cell.get("outputs", []))
        kind, evidence = "verdicts", [claim for claim in claims if claim in shown]
    elif "gate_table(" in source:
        kind, evidence = "gates", run
    return Cell(f"cell-{number:02d}", kind, exhibits, tuple(evidence))


def _form(unit: str) -> tuple[int, int, str]:
    return FORMS["points" if "proportion" in unit else "nats" if "nats" in unit else "number"]


def bound_text(predicate: str, unit: str) -> str:
    """What would support a claim, in the unit of its value: "below −0.25" of a proportion is "below −25 points"."""
    direction, number = predicate.split()
    scale, _, word = _form(unit)
    value = float(number.replace(MINUS, "-")) * scale
    number = f"{value:.4g}".replace("-", MINUS)
    return f"{direction} {number}{word.removesuffix('s') if number == '1' else word}"


def value_text(row: dict[str, Any], unit: str) -> tuple[str, str]:
    """A claim's value and its interval as the paper prints them: ("−86 points", "[−100, −39]"). A missing one is a dash."""
    scale, digits, word = _form(unit)

    def text(number: float) -> str:
        return f"{round(number * scale, digits) + 0.0:.{digits}f}".replace("-", MINUS)  # + 0.0: no negative zero

    if row["value"] is None:
        return "–", ""
    interval = "" if row["low"] is None or row["high"] is None else f"[{text(row['low'])}, {text(row['high'])}]"
    return text(row["value"]) + word, interval


def claim_rows(rows: list[dict[str, Any]], pages: list[Page]) -> list[dict[str, Any]]:
    """Claims as templates show them: with a mark, a printed value, and links to their evidence, nearest first."""
    by_name = {found.name: found for found in pages}
    shown = []
    for row in rows:
        of = by_name.get(row["experiment"])
        estimate = of.content["estimates"].get(row["estimate"], {}) if of else {}
        value, interval = value_text(row, estimate.get("unit", ""))
        links = [
            {"anchor": cell.anchor, "kind": cell.kind}
            for cell in (of.cells if of else ())
            if row["id"] in cell.evidence
        ]
        links.sort(key=lambda link: link["kind"] in ("gates", "verdicts"))  # what shows the number comes first
        seeds, unit = estimate.get("seeds"), estimate.get("unit", "")
        shown.append({**row, "mark": MARKS[row["verdict"]], "shown": value, "interval": interval, "links": links})
        shown[-1]["predicate"] = bound_text(row["predicate"], unit)
        shown[-1]["sample"] = f"n = {estimate['n']}, {seeds} seed{'s' if seeds != 1 else ''}" if seeds else ""
    return shown


def write(source: Path, title: str, index: dict[str, Any], pages: list[Page], files: Path) -> None:
    """Write the generator's input into `source`: `site.json` for the theme, one document per page, index and data."""
    fragments = Fragments(source / "fragments")
    claims = claim_rows(index["claims"], pages)
    profile = index["profile"]
    site = {
        "title": title,
        "profile": profile["name"],
        "stamp": profile.get("stamp", ""),
        "experiments": [
            {
                "name": found.name,
                "number": found.number,
                "title": found.title,
                "question": found.question,
                "claims": [claim for claim in claims if claim["experiment"] == found.name],
            }
            for found in pages
        ],
    }
    (source / "site.json").write_text(json.dumps(site, ensure_ascii=False, sort_keys=True), encoding="utf-8")
    everything = {**site, "claims": claims, "index": index, "marks": MARKS, "profile": profile}
    everything["pdf"] = f"paper-{profile['name']}.pdf" if (files / f"paper-{profile['name']}.pdf").is_file() else ""
    everything["provenance"] = _provenance(index)
    names = "\n".join([found.name for found in pages] + ["data"])
    landing = [f"# {title.replace('-', NO_BREAK)}", _raw(fragments.render("landing.html", **everything))]
    landing.append(f"```{{toctree}}\n:hidden:\n\n{names}\n```")
    (source / "index.md").write_text("\n\n".join(landing) + "\n", encoding="utf-8")
    data = ["# Raw results and data", _raw(fragments.render("data.html", **everything, files=_listed(files)))]
    (source / "data.md").write_text("\n\n".join(data) + "\n", encoding="utf-8")
    for found in pages:
        notebook = _notebook(found, claims, fragments, files)
        text = json.dumps(notebook, ensure_ascii=False)
        (source / f"{found.name}.ipynb").write_text(text, encoding="utf-8")


class Fragments:
    """Jinja templates, everything escaped."""

    def __init__(self, folder: Path) -> None:
        import jinja2  # Sphinx brings it

        loader = jinja2.FileSystemLoader(str(folder))
        self.environment = jinja2.Environment(
            loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
        )

    def render(self, template: str, **values: Any) -> str:
        return str(self.environment.get_template(template).render(**values))


def _raw(html: str) -> str:
    """HTML in a MyST document; the fence may contain blank lines."""
    return f"`````{{raw}} html\n{html.strip()}\n`````"


def _provenance(index: dict[str, Any]) -> dict[str, list[str]]:
    """What all experiments' records say, each distinct value once."""
    records = list(index["provenance"].values())
    found = {field: provenance.distinct(records, field) for field in ("device", "system", "commit")}
    versions = dict.fromkeys(f"{name} {number}" for record in records for name, number in record["versions"].items())
    return {**found, "versions": list(versions)}


def _listed(files: Path) -> dict[str, list[dict[str, str]]]:
    """Files by folder, with sizes in words."""
    listed: dict[str, list[dict[str, str]]] = {}
    for path in sorted(p for p in files.rglob("*") if p.is_file()):
        size = path.stat().st_size
        words = f"{size / 1e6:.1f} MB" if size >= 1e6 else f"{max(size / 1e3, 0.1):.1f} kB"
        relative = path.relative_to(files)
        listed.setdefault(str(relative.parent), []).append({"path": str(relative), "name": path.name, "size": words})
    return listed


def _notebook(found: Page, claims: list[dict[str, Any]], fragments: Fragments, files: Path) -> dict[str, Any]:
    """The notebook as the generator gets it: verdicts on top, code folded, anchors before and notes behind its cells."""
    own = [claim for claim in claims if claim["experiment"] == found.name]
    about = {cell.anchor: cell for cell in found.cells}
    first, *rest = found.notebook["cells"]
    heading, _, lead = "".join(first["source"]).partition("\n")
    heading = re.sub(r"^# \d\d ", "# ", heading)
    cells = [_markdown("title", f"{heading}\n{lead}\n\n## Verdicts at a glance")]
    cells.append(_markdown("panel", _raw(fragments.render("panel.html", claims=own, page=found))))
    for number, original in enumerate(rest, start=1):
        cell = copy.deepcopy(original)
        cell["id"] = f"cell-{number:02d}"
        if cell["cell_type"] != "code":
            cells.append(cell)
            continue
        known = about[cell["id"]]
        cells.append(_markdown(f"before-{number:02d}", _raw(f'<div class="cell-anchor" id="{known.anchor}"></div>')))
        cells.append(_presented(cell, known, found))
        note = fragments.render("cell_note.html", **_noted(known, found, files))
        if note.strip():
            cells.append(_markdown(f"after-{number:02d}", _raw(note)))
    return {**found.notebook, "cells": cells, "nbformat": 4, "nbformat_minor": 5}


def _markdown(identity: str, source: str) -> dict[str, Any]:
    return {"cell_type": "markdown", "id": identity, "metadata": {}, "source": source}


def _presented(cell: dict[str, Any], known: Cell, found: Page) -> dict[str, Any]:
    """A code cell with its code folded, its figure captioned and its tables made readable."""
    cell["metadata"]["tags"] = [*cell["metadata"].get("tags", []), "hide-input"]
    figures = [name for kind, name in known.exhibits if kind == "figure" and name in found.content["figures"]]
    if len(figures) == 1:
        caption = found.content["figures"][figures[0]]["caption"].replace("'", "’")
        escaped = re.sub(r"([\\`*_{}\[\]<>#$~|])", r"\\\1", caption)
        cell["metadata"]["mystnb"] = {"image": {"alt": caption}, "figure": {"caption": escaped}}
    for output in cell["outputs"]:
        html = output.get("data", {}).get("text/html")
        if html is not None:
            output["data"]["text/html"] = readable("".join(html), gates=known.kind == "gates")
    return cell


def readable(html: str, *, gates: bool = False) -> str:
    """A pandas table without its own style and without row numbers that say nothing; intervals are kept on one line,
    verdicts become badges, and in a table of `gates` True and False say what they mean."""
    html = re.sub(r"<style scoped>.*?</style>", "", html, flags=re.DOTALL)
    html = html.replace('<table border="1" class="dataframe">', '<table class="dataframe">')
    html = html.replace('<tr style="text-align: right;">', "<tr>")
    rows = re.findall(r"<tr>\s*<th>(.*?)</th>", html.partition("<tbody>")[2])
    if rows and rows == [str(n) for n in range(len(rows))]:
        head, body, rest = html.partition("<tbody>")
        head = re.sub(r"(<tr>\s*)<th></th>", r"\1", head)
        html = head + body + re.sub(r"(<tr>\s*)<th>\d+</th>", r"\1", rest)
    html = re.sub(r"<td>([^<>\[]*\[[−\d., ]+\]|[-−+.,%\d ]+)</td>", r'<td class="whole">\1</td>', html)
    if gates:
        html = html.replace("<td>True</td>", '<td class="gate-passed">✓ passed</td>')
        html = html.replace("<td>False</td>", '<td class="gate-failed">† failed</td>')
    for verdict, mark in MARKS.items():
        badge = f'<td><span class="badge {verdict.replace(" ", "-")}"><i>{mark}</i> {verdict}</span></td>'
        html = html.replace(f"<td>{verdict}</td>", badge)
    return html


def _noted(known: Cell, found: Page, files: Path) -> dict[str, Any]:
    """What stands behind a cell: tables' captions, files to download, the claims that it is evidence for."""
    captions, downloads = [], []
    for kind, name in known.exhibits:
        listed = found.content["figures" if kind == "figure" else "tables"]
        if name not in listed:
            continue
        if kind == "table":
            captions.append(listed[name]["caption"].replace("'", "’"))
        for suffix in ("svg", "csv") if kind == "figure" else ("csv",):
            path = files / f"{kind}s" / f"{found.name}-{name}.{suffix}"
            if path.is_file():
                downloads.append({"path": str(path.relative_to(files)), "name": suffix.upper()})
    return {"captions": captions, "downloads": downloads, "evidence": known.evidence, "kind": known.kind}
