"""Where things stand in the compiled paper: the numbers of its sections, figures and tables, asked of the paper itself."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from persona_coupling import paths
from persona_coupling.errors import UserError

KINDS = {"image": "Figure", "table": "Table"}
SECTION = "sec-"  # an experiment's section carries the label `sec-NN`


@dataclass(frozen=True)
class Exhibit:
    """A numbered figure or table."""

    number: str  # "Figure 3"
    label: str  # its label in the paper's source
    experiment: str  # the number of the experiment in whose section it stands ("00"), or ""


@dataclass(frozen=True)
class Outline:
    """The paper's figures and tables in their order, and each experiment's section: `{"00": "4.1"}`."""

    exhibits: tuple[Exhibit, ...]
    sections: Mapping[str, str]

    def named(self, label: str) -> str:
        """The number of the figure or table with a label. Raises KeyError when the paper has none."""
        return {exhibit.label: exhibit.number for exhibit in self.exhibits}[label]

    def of(self, experiment: str) -> str:
        """An experiment's section with its figures and tables: "Section 4.1, Figures 1-3, Table 1" (with an en dash)."""
        places = [f"Section {self.sections[experiment]}"]
        for kind in KINDS.values():
            numbers = [e.number.split()[1] for e in self.exhibits if e.experiment == experiment and kind in e.number]
            if numbers:
                places.append(f"{kind}s {numbers[0]}–{numbers[-1]}" if len(numbers) > 1 else f"{kind} {numbers[0]}")
        return ", ".join(places)


def read(profile: str) -> Outline:
    """The outline of a profile's paper, from its generated files. Raises UserError with typst's message."""
    import typst

    try:
        answer = typst.query(
            str(paths.repository() / "paper" / "main.typ"),
            "selector(heading).or(figure)",
            root=str(paths.repository()),
            sys_inputs={"profile": profile},
        )
    except RuntimeError as error:  # what `query` raises, and what TypstError is
        raise UserError(f"The paper does not compile: {error}") from error
    return number(json.loads(answer))


def number(elements: Iterable[Mapping[str, Any]]) -> Outline:
    """Number headings and figures as typst does: one counter for each kind of figure, one counter for each level of
    headings, which begins again where their pattern changes (`1.1` in the body, `A.1` in the appendix)."""
    counters: list[int] = []
    pattern, experiment = "", ""
    figures = dict.fromkeys(KINDS, 0)
    exhibits, sections = [], {}
    for element in elements:
        label = str(element.get("label", "")).strip("<>")
        if element.get("numbering") is None:
            continue
        if element["func"] == "heading":
            if element["numbering"] != pattern:
                pattern, counters = element["numbering"], []
            level = element["level"]
            counters = [*counters[:level], *[0] * (level - len(counters))]
            counters[-1] += 1
            experiment = label.removeprefix(SECTION) if label.startswith(SECTION) else ""
            if experiment:
                first = chr(ord("A") + counters[0] - 1) if pattern.startswith("A") else str(counters[0])
                sections[experiment] = ".".join([first, *map(str, counters[1:])])
        elif element["kind"] in KINDS:
            figures[element["kind"]] += 1
            exhibits.append(Exhibit(f"{KINDS[element['kind']]} {figures[element['kind']]}", label, experiment))
    return Outline(tuple(exhibits), sections)
