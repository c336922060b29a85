"""A small study whose every number is known, for tests of the lab notes' site: two experiments, five claims, one figure."""

import base64
import json
import struct
import zlib
from contextlib import contextmanager

import pytest

from persona_coupling import website
from persona_coupling.errors import UserError

VERSIONS = {"python": "3.11.7", "torch": "2.13.0"}


def png(width=600, height=300):
    """A grey PNG, written by the format's definition."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    rows = (b"\0" + b"\x99" * width) * height
    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def claim(identity, experiment, verdict, value, low, high, why="it is so"):
    return {
        "id": identity,
        "experiment": experiment,
        "statement": f"The villain's statement of {identity}.",
        "estimand": "villain minus others",
        "estimate": f"{identity}.contrast",
        "predicate": "above 0.25",
        "refuted_by": "less",
        "value": value,
        "low": low,
        "high": high,
        "verdict": verdict,
        "why": why,
    }


CLAIMS = [
    claim("00-raw", "00_first", "supported", 0.626, 0.318, 0.873),
    claim("00-after", "00_first", "refuted", -0.857, -1.0, -0.39),
    claim("01-nats", "01_second", "inconclusive", -0.004, -2.5, 1.25),
    claim("01-gate", "01_second", "uninterpretable", 0.0, -0.1, 0.1, "gate took.A failed: 0.10, not at least 0.8"),
    claim("01-none", "01_second", "not run", None, None, None, "this profile gives no such thing"),
]


def markdown(source):
    return {"cell_type": "markdown", "id": "x", "metadata": {"tags": []}, "source": source}


def code(source, *outputs, evidence=None):
    metadata = {"tags": []} | ({"evidence": evidence} if evidence else {})
    return {
        "cell_type": "code",
        "id": "x",
        "execution_count": 1,
        "metadata": metadata,
        "source": source,
        "outputs": list(outputs),
    }


def table(columns, rows):
    """A table as pandas writes one in a notebook."""
    head = "".join(f"\n      <th>{name}</th>" for name in ["", *columns])
    body = "".join(
        f"\n    <tr>\n      <th>{n}</th>" + "".join(f"\n      <td>{cell}</td>" for cell in row) + "\n    </tr>"
        for n, row in enumerate(rows)
    )
    html = (
        "<div>\n<style scoped>\n    .dataframe tbody tr th {\n        vertical-align: top;\n    }\n</style>\n"
        f'<table border="1" class="dataframe">\n  <thead>\n    <tr style="text-align: right;">{head}\n    </tr>\n'
        f"  </thead>\n  <tbody>{body}\n  </tbody>\n</table>\n</div>"
    )
    data = {"text/html": html, "text/plain": "a table"}
    return {"output_type": "execute_result", "data": data, "metadata": {}, "execution_count": 1}


def notebook(number, title, claims, labels):
    image = {"image/png": base64.b64encode(png()).decode(), "text/plain": "an image"}
    figure = {"output_type": "display_data", "data": image, "metadata": {"image/png": {"width": 400}}}
    noise = {"output_type": "stream", "name": "stderr", "text": "/home/somebody/library.py: a warning\n"}
    wide = table([f"a column of the wide table {n}" for n in range(14)], [["0 % [−46, 52]"] * 14])
    gates = table(["gate", "passed"], [["took.A", "False"], ["finished.A", "True"]])
    verdicts = table(["claim", "verdict", "why"], [[row["id"], row["verdict"], row["why"]] for row in claims])
    cells = [
        markdown(f"# {number} {title}: is it so, or *not*?\n\nA question about **hippopotamuses**."),
        markdown("## Design\n\nTwo arms."),
        code("design = 1", noise),
        markdown("## Gates"),
        code("report.gate_table(checked)", gates),
        markdown("## The main estimate"),
        code('paper.figure(\n    "rates",\n    drawn)', figure, evidence=labels),
        code('paper.table(\n    "rates", made)', wide, evidence=labels[:1]),
        markdown("## Verdicts"),
        code("report.verdict_table(judgements)", verdicts),
    ]
    metadata = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
    return {"cells": cells, "metadata": metadata, "nbformat": 4, "nbformat_minor": 5}


def content(name, claims):
    units = {row["estimate"]: "nats" if "nats" in row["id"] else "difference of proportions" for row in claims}
    return {
        "experiment": name,
        "claims": claims,
        "estimates": {key: {"unit": unit, "n": 40, "seeds": 1} for key, unit in units.items() if "none" not in key},
        "figures": {"rates": {"path": f"/figures/quick/{name}-rates.svg", "caption": "Rates, * of [two] arms_here."}},
        "tables": {"rates": {"path": f"{name}-rates.json", "caption": "The wide table's caption."}},
    }


def write(root, profile="quick", stamp=""):
    """The study under `root`, as `nox -s reproduce` would have left it."""
    generated, figures = root / "paper" / "generated" / profile, root / "figures" / profile
    for folder in (generated, figures):
        folder.mkdir(parents=True)
    (root / "paper" / f"paper-{profile}.pdf").write_bytes(b"%PDF-1.7\n%%EOF\n")
    titles = {"00_first": ("00", "Replication", ["00-*"]), "01_second": ("01", "Layers", ["01-nats", "01-g*"])}
    for name, (number, title, labels) in titles.items():
        own = [row for row in CLAIMS if row["experiment"] == name]
        (generated / f"{name}.json").write_text(json.dumps(content(name, own)))
        (generated / f"{name}-rates.csv").write_text("a,b\n1,2\n")
        (figures / f"{name}-rates.csv").write_text("a,b\n1,2\n")
        (figures / f"{name}-rates.svg").write_text('<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"/>')
        folder = root / "experiments" / name
        (folder / "lab_notes").mkdir(parents=True)
        (folder / "lab_notes" / f"{profile}.ipynb").write_text(json.dumps(notebook(number, title, own, labels)))
        (folder / "results" / profile).mkdir(parents=True)
        (folder / "results" / profile / "completions.parquet").write_bytes(b"PAR1")
    record = {"device": "a laptop, 2 cores", "system": "Linux x86_64", "commit": "abc123", "versions": VERSIONS}
    counts = {row["verdict"]: 1 for row in CLAIMS}
    index = {
        "experiments": list(titles),
        "claims": CLAIMS,
        "counts": counts,
        "headline": {
            "sentences": ["It's lost by adding, not by learning."],
            "withheld": ["A gate's."],
            "open": ["dose"],
        },
        "profile": {
            "name": profile,
            "stamp": stamp,
            "description": "a small study",
            "seeds": [0],
            "model": {"name": "a model"},
        },
        "provenance": dict.fromkeys(titles, record),
        "compute_minutes": 13.42,
        "constants": {"marker": "[ZLT]", "confidence": 0.95},
    }
    (generated / "index.json").write_text(json.dumps(index))
    return root


@contextmanager
def site(folder, **changes):
    """The study written into a folder, and its site, inside which the study is the repository. Skips without Sphinx."""
    try:
        website.generator()
    except UserError as error:
        pytest.skip(str(error))
    with pytest.MonkeyPatch.context() as patch:
        root = write(folder, **changes)
        patch.setenv("PERSONA_COUPLING_ROOT", str(root))
        website.build("quick", root / "site")
        yield root / "site"
