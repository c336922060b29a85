"""RO-Crate metadata: the repository as a research object, with the runs that made its results.

RO-Crate 1.1 with the Process Run Crate profile 0.5 (https://w3id.org/ro/wfrun/process/0.5): each run is a CreateAction with
what it was given, what it gave, with which software, on which device and when. Times and machines are those that the
results' records kept; where a record has none, none is written.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any
from urllib.parse import quote

import yaml
from rocrate.model import ContextEntity, Entity
from rocrate.rocrate import ROCrate

from persona_coupling import notebooks, outputs, paths
from persona_coupling.store import sha256_of

CODE = "src/persona_coupling/"
VERSION = "1.1"
PROFILE = "https://w3id.org/ro/wfrun/process/0.5"
HOMES = {"python": "https://www.python.org/downloads/release"}  # every other library is named by its page on PyPI
LICENCE = "https://spdx.org/licenses/MIT"
SHA256 = "http://schema.org/sha256"  # RO-Crate 1.1's context is older than this term
FORMATS = {
    ".bib": "text/x-bibtex",
    ".cff": "application/yaml",
    ".csv": "text/csv",
    ".ipynb": "application/x-ipynb+json",
    ".json": "application/json",
    ".md": "text/markdown",
    ".parquet": "application/vnd.apache.parquet",
    ".pdf": "application/pdf",
    ".png": "image/png",
    ".py": "text/x-python",
    ".svg": "image/svg+xml",
    ".toml": "application/toml",
    ".typ": "text/x-typst",
    ".yml": "application/yaml",
}
DOCUMENTS = (  # what a person wrote, and what is written from it; described without a hash, since prose changes
    *("README.md", "REVIEWERS.md", "CONTRIBUTING.md", "CHANGELOG.md", "CITATION.cff", "LICENSE", "codecheck.yml"),
    *("constraints.txt", "environment.yml", "pyproject.toml", "noxfile.py"),
    *("docs/*.md", "paper/*.typ", "paper/*.toml", "paper/*.bib"),
    *("experiments/*/*.py", "experiments/*/*.typ", "experiments/*/*.toml"),
)


def describe(profile: str) -> dict[str, Any]:
    """The crate of a profile's stored evidence, as JSON-LD."""
    return _Description(profile).content()


class _Description:
    """A crate as it grows; entities stand in the order in which they are first needed."""

    def __init__(self, profile: str) -> None:
        self.profile = profile
        self.root = paths.repository()
        self.crate = ROCrate(version=VERSION)
        self.crate.metadata.extra_terms["sha256"] = SHA256
        self.records = _records(profile)

    def content(self) -> dict[str, Any]:
        """The whole graph."""
        self.about()
        for pattern in DOCUMENTS:
            for path in sorted(self.root.glob(pattern)):
                self.file(path)
        code = self.crate.add_directory(None, CODE, properties={"name": "The code that the notebooks call"})
        tables = []
        for name, record in self.records.items():
            folder = paths.experiments() / name
            made = [self.file(path, hashed=True) for path in sorted(folder.glob(f"results/{self.profile}/*"))]
            inputs = [code, *(self.file(path) for end in ("py", "toml") for path in sorted(folder.glob(f"*.{end}")))]
            for number, run in enumerate(_runs(record)):
                self.run(f"#run-{name.split('_')[0]}-{number}", name, run, inputs, made)
            tables += made
        drawn = [self.file(path, hashed=True) for path in _drawn(self.profile)]
        if tables and drawn:
            self.drawing([code, *tables], drawn)
        return dict(self.crate.metadata.generate())

    def entity(self, key: str, **properties: Any) -> Entity:
        """A thing that is no file; described once."""
        return self.crate.get(key) or self.crate.add(ContextEntity(self.crate, key, properties))

    def file(self, path: Path, *, hashed: bool = False) -> Entity:
        """A file of the repository; described once."""
        name = path.relative_to(self.root).as_posix()
        known = self.crate.get(name)
        if known is not None:
            return known
        properties = {"name": path.name, "encodingFormat": FORMATS.get(path.suffix, "text/plain")}
        if hashed:
            properties |= {"contentSize": str(path.stat().st_size), "sha256": sha256_of(path)}
        return self.crate.add_file(path, name, properties=properties)

    def about(self) -> None:
        """The repository: name, authors, licence, version, the day on which the youngest evidence was made."""
        citation = yaml.safe_load((self.root / "CITATION.cff").read_text(encoding="utf-8"))
        self.authors = [
            self.entity(f"#author-{i}", **{"@type": "Organization", "name": author["name"]})
            for i, author in enumerate(citation["authors"])
        ]
        standard = {"@type": "CreativeWork", "name": "Process Run Crate", "version": PROFILE.rsplit("/", 1)[1]}
        licence = {"@type": "CreativeWork", "name": "MIT License", "description": "Its text stands in LICENSE."}
        made = [day for record in self.records.values() for day in record["provenance"]["made"].split(" / ")]
        home = self.crate.root_dataset
        home["name"] = citation["title"]
        home["description"] = citation["abstract"]
        home["keywords"] = ", ".join(citation["keywords"])
        home["version"] = self.version = citation["version"]
        home["author"] = self.authors if len(self.authors) > 1 else self.authors[0]
        home["publisher"] = self.authors[0]
        home["license"] = self.entity(LICENCE, **licence)
        home["conformsTo"] = self.entity(PROFILE, **standard)
        home["datePublished"] = max(made, default="1970-01-01")[:10]

    def software(self, provenance: Mapping[str, Any]) -> Entity:
        """The package at a commit, with the library versions that it ran with."""
        libraries = [
            self.entity(
                f"{HOMES.get(name, f'https://pypi.org/project/{name}')}/{quote(version)}/",
                **{"@type": "SoftwareApplication", "name": name, "softwareVersion": version},
                url=HOMES.get(name, f"https://pypi.org/project/{name}") + "/",
            )
            for name, versions in sorted(provenance["versions"].items())
            for version in versions.split(" / ")
        ]
        requirements = [self.file(self.root / "constraints.txt"), *libraries]
        named = hashlib.sha256(json.dumps(provenance["versions"], sort_keys=True).encode()).hexdigest()[:8]
        package = self.entity(
            "-".join(["#persona-coupling", *re.findall("[A-Za-z0-9]+", provenance["commit"]), named]),
            **{"@type": "SoftwareApplication", "name": "persona-coupling"},
            softwareVersion=f"{self.version} at commit {provenance['commit']}",
            url={"@id": CODE},
        )
        package["softwareRequirements"] = requirements
        return package

    def run(self, key: str, name: str, run: Run, inputs: list[Entity], made: list[Entity]) -> None:
        """The action that trained, sampled and scored an experiment's cells on one machine."""
        seeds = ", ".join(str(seed) for seed in sorted({cell["seed"] for cell in run.cells}))
        ends = [datetime.fromisoformat(cell["provenance"]["made"]) for cell in run.cells]
        took = [timedelta(seconds=cell["provenance"].get("seconds", 0.0)) for cell in run.cells]
        started = min(end - duration for end, duration in zip(ends, took, strict=True))
        action = self.action(
            key,
            f"{name} under {self.profile}",
            f"Trained, sampled and scored: {len(run.cells)} cells, seeds {seeds}. startTime is that of the first "
            "evaluation; training that cells share may have begun before.",
            startTime=started.isoformat(timespec="seconds"),
            endTime=max(ends).isoformat(timespec="seconds"),
        )
        action["instrument"] = self.software(run.provenance)
        action["additionalProperty"] = [
            self.entity(
                f"#{what}-" + "-".join(re.findall(r"[A-Za-z0-9]+", run.provenance[what])),
                **{"@type": "PropertyValue", "name": what, "value": run.provenance[what]},
            )
            for what in ("device", "system", "commit")
        ]
        action["object"] = inputs
        action["result"] = made

    def drawing(self, given: list[Entity], drawn: list[Entity]) -> None:
        """The action that drew figures, tables, lab notes and paper. Its time is not kept: drawing again gives the same
        bytes."""
        action = self.action(
            "#drawing", f"Paper of {self.profile}", "Drew figures, tables, lab notes and the paper from stored results."
        )
        provenance = [record["provenance"] for record in self.records.values()]
        action["instrument"] = self.software(max(provenance, key=lambda one: str(one["made"])))
        action["object"] = given
        action["result"] = drawn

    def action(self, key: str, name: str, description: str, **times: str) -> Entity:
        """A completed action of the authors."""
        action = self.entity(key, **{"@type": "CreateAction", "name": name, "description": description}, **times)
        action["actionStatus"] = "http://schema.org/CompletedActionStatus"
        action["agent"] = self.authors[0]
        self.crate.root_dataset.append_to("mentions", action)
        return action


@dataclass(frozen=True)
class Run:
    """Cells that the same code made on the same machine."""

    provenance: Mapping[str, Any]
    cells: tuple[Mapping[str, Any], ...]


def _runs(record: Mapping[str, Any]) -> list[Run]:
    """An experiment's cells, grouped by machine, commit and versions, in their order."""
    groups: dict[str, list[Mapping[str, Any]]] = {}
    for cell in record["cells"]:
        made = {key: cell["provenance"][key] for key in ("commit", "device", "system", "versions")}
        groups.setdefault(json.dumps(made, sort_keys=True), []).append(cell)
    return [Run(json.loads(made), tuple(cells)) for made, cells in groups.items()]


def _records(profile: str) -> dict[str, dict[str, Any]]:
    """What each experiment recorded beside its results, by name."""
    return {experiment.name: outputs.read(experiment.record(profile)) for experiment in notebooks.stored(profile)}


def _drawn(profile: str) -> list[Path]:
    """What is made from results: figures, tables, lab notes, the paper."""
    notes = [experiment.lab_note(profile) for experiment in notebooks.discover()]
    folders = [*sorted(paths.figures(profile).glob("*")), *sorted(paths.generated(profile).glob("*"))]
    return [path for path in [*folders, *notes, paths.pdf(profile)] if path.is_file()]
