"""Every number in the PDF's text, traced to a generated file or to a short list of other reasons.

From the strongest trace to the weakest: words of a generated file that hold the number (a table's cell, a caption, a
version); an estimate with its interval, all three numbers as `paper/lib.typ` prints them; a single value of a file under
one of these formats; a number that the text computes, by `computed`; numbering, and what `references.bib` holds.
"""

from __future__ import annotations

import json
import math
import re
import unicodedata
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from persona_coupling import earlier, paths
from persona_coupling.verification.findings import Finding, verdict

TOKEN = re.compile(r"[−-]?\d+(?:\.\d+)?")
TRIPLE = re.compile(r"([−-]?[\d.]+)\s*(%|points|nats)?\s*\[\s*([−-]?[\d.]+)\s*,\s*([−-]?[\d.]+)\s*\]")
NUMBERED = re.compile(r"(?:Sections?|Appendix|Appendices|Tables?|Figures?)\s+(?:[A-Z]\.)?(\d+(?:\.\d+)?)")
HEADING = re.compile(r"^(?:[A-Z]\.)?(\d+(?:\.\d+)?)\s+\S", re.MULTILINE)
APPENDIX = re.compile(r"^A\s+Claims in detail", re.MULTILINE)
SHORT = 4  # characters below which words of a file are too common to trace a number by
FORMS = {"percent": (100, 0), "points": (100, 0), "nats": (1, 2), "number": (1, 0)}


@dataclass
class Sources:
    """All that numbers may come from."""

    words: set[str] = field(default_factory=set)  # strings with digits, squeezed
    numbers: set[str] = field(default_factory=set)  # single values as printed
    triples: set[tuple[str, str, str]] = field(default_factory=set)  # value, low, high as printed


def fixed(x: int | float, digits: int) -> str:
    """A number as `fixed` of `paper/lib.typ` prints it: ties to even, a true minus, never "−0"."""
    scaled = abs(x) * 10**digits
    floor = math.floor(scaled)
    rest = scaled - floor
    n = floor + 1 if rest > 0.5 or (rest == 0.5 and floor % 2) else floor
    sign = "−" if x < 0 and n else ""
    whole, decimals = divmod(n, 10**digits)
    return f"{sign}{whole}" + (f".{decimals:0{digits}d}" if digits else "")


def squeezed(text: str) -> tuple[str, list[int]]:
    """A text without white space and hyphens, which typesetting moves, and where each character stood."""
    kept, at = [], []
    for position, character in enumerate(text):
        for plain in unicodedata.normalize("NFKC", character):
            if not plain.isspace() and plain not in "-‐\u00ad":
                kept.append({"’": "'", "−": "-", "…": "..."}.get(plain, plain))
                at.append(position)
    return "".join(kept), at


def sources(profile: str) -> Sources:
    """Read a profile's generated files, the references and the values that the text computes."""
    made = Sources()
    for path in sorted(paths.generated(profile).glob("*.json")):
        content = json.loads(path.read_text(encoding="utf-8"))
        for leaf in _leaves(content):
            _take(made, leaf)
        if isinstance(content, dict):
            made.numbers |= {part for leaf in _leaves(content.get("facts", {})) for part in _as_power(leaf)}
            for found in content.get("estimates", {}).values():
                _take_estimate(made, found)
    index = json.loads((paths.generated(profile) / "index.json").read_text(encoding="utf-8"))
    for kind in earlier.KINDS:
        for row in (index.get(kind) or {}).get("claims", []):
            _take_estimate(made, row)
    made.numbers |= {part for leaf in _leaves(index) for part in _as_power(leaf)}
    for number in computed(index):
        made.numbers |= {fixed(number, 0), fixed(number, 1)}
    noise = paths.generated(profile) / "noise_floor.json"
    if noise.is_file():  # rates, which the reproducibility statement prints as points
        measured = json.loads(noise.read_text(encoding="utf-8"))
        made.numbers |= {fixed(100 * value, 1) for value in measured.values() if isinstance(value, float)}
    return made


def _as_power(x: Any) -> set[str]:
    """What the text prints of a small number such as a learning rate: mantissa, ten, and its power."""
    if not (isinstance(x, float) and 0 < x < 0.01):
        return set()
    power = math.floor(math.log10(x) + 1e-9)
    return {f"{x / 10**power:.3g}", "10", fixed(power, 0)}


def computed(index: dict[str, Any]) -> Iterator[int | float]:
    """Numbers that `main.typ` computes from the index, each with its formula."""
    profile = index["profile"]
    if profile:
        yield profile["lora"]["alpha"] / math.sqrt(profile["lora"]["rank"])  # the scale of rank-stabilised LoRA
        yield profile["evaluation"]["everyday"] + profile["evaluation"]["values"]  # evaluation questions
        yield len(profile["coupling"]["negatives"])
        yield len(profile["arms"])
        yield len(profile["seeds"])
    yield len(index["claims"])
    yield len(index["gates"])
    yield sum(not gate["passed"] for gate in index["gates"])
    yield index["constants"]["confidence"] * 100
    for experiment in index["experiments"]:  # "17 gates failed", "of 26"
        yield sum(gate["experiment"] == experiment for gate in index["gates"])
        yield sum(gate["experiment"] == experiment and not gate["passed"] for gate in index["gates"])
    yield from index["counts"].values()


def _leaves(tree: Any) -> Iterator[Any]:
    """All values and all names of a JSON tree, but estimates, which are taken with their intervals."""
    if isinstance(tree, dict):
        for name, item in tree.items():
            yield name
            if name != "estimates":
                yield from _leaves(item)
            else:
                yield from item
    elif isinstance(tree, list):
        for item in tree:
            yield from _leaves(item)
    else:
        yield tree


def _take(made: Sources, leaf: Any) -> None:
    if isinstance(leaf, str):
        if not any(character.isdigit() for character in leaf):
            return
        text = squeezed(leaf)[0]
        if len(text) >= SHORT and not TOKEN.fullmatch(text):
            made.words.add(text)
        else:
            made.numbers |= {token.replace("-", "−") for token in TOKEN.findall(leaf)}
        for value, _, low, high in TRIPLE.findall(leaf):
            made.triples.add(tuple(part.replace("-", "−") for part in (value, low, high)))
    elif isinstance(leaf, int | float) and not isinstance(leaf, bool):
        made.numbers |= {f"{leaf:g}".replace("-", "−"), str(leaf).replace("-", "−")}
        made.numbers |= {fixed(leaf, digits) for digits in range(4)} if isinstance(leaf, float) else set()


def _take_estimate(made: Sources, found: dict[str, Any]) -> None:
    value, low, high = found["value"], found["low"], found["high"]
    if value is None:
        return
    for scale, digits in {*FORMS.values(), (1, 1)}:
        printed = fixed(value * scale, digits)
        made.numbers |= {printed, fixed(abs(value) * scale, digits)}
        if low is not None and high is not None:
            made.triples.add((printed, fixed(low * scale, digits), fixed(high * scale, digits)))


def pages(pdf: Path) -> list[str]:
    """The text of every page. Raises ValueError when the file is no PDF."""
    import pypdf
    from pypdf.errors import PyPdfError

    try:
        return [page.extract_text() for page in pypdf.PdfReader(pdf).pages]
    except PyPdfError as error:
        raise ValueError(str(error)) from error


def untraced(texts: list[str], made: Sources) -> tuple[list[str], Counter[str]]:
    """Numbers of the text that nothing explains, each with its surroundings and page, and how many each trace found."""
    counts: Counter[str] = Counter()
    left: list[str] = []
    years, cited = _references()
    words = sorted(made.words, key=len, reverse=True)
    everything = "\n".join(words)
    in_references = False
    for number, text in enumerate(texts, start=1):
        how: dict[int, str] = {}  # by position
        flat, at = squeezed(text)
        for word in words:
            start = flat.find(word)
            while start >= 0:
                for position in at[start : start + len(word)]:
                    how.setdefault(position, "words of a file")
                start = flat.find(word, start + 1)
        for match in TRIPLE.finditer(text):
            parts = tuple(match.group(i).replace("-", "−") for i in (1, 3, 4))
            for i in (1, 3, 4):
                for position in range(*match.span(i)):
                    if parts in made.triples:
                        how.setdefault(position, "value and interval")
                    else:
                        how.setdefault(position, "")  # an interval that no estimate has is not explained by its parts
        for position in _numbering(text):
            how.setdefault(position, "numbering")
        begins, ends = re.search(r"^References$", text, re.MULTILINE), APPENDIX.search(text)
        listed = range(begins.end() if begins else 0, ends.start() if ends else len(text))
        listed = listed if in_references or begins else range(0)
        in_references = (in_references or begins is not None) and ends is None
        for match in TOKEN.finditer(text):
            token = match.group().replace("-", "−")
            known = how.get(match.start(), how.get(match.end() - 1))
            bare = token.lstrip("−")  # a hyphen before a number is no sign
            if known is None and (token in made.numbers or bare in made.numbers):
                known = "single value"
            if known is None and (bare in years or (bare in cited and match.start() in listed)):
                known = "reference"
            if known is None and _window(text, match) in everything:  # words that a table's column broke
                known = "words of a file"
            if known:
                counts[known] += 1
            else:
                around = " ".join(text[max(0, match.start() - 25) : match.end() + 15].split())
                left.append(f"{match.group()} on page {number} (“{around}”)")
    return left, counts


def _window(text: str, match: re.Match[str]) -> str:
    """A number with its neighbours on the line; a line break that nothing holds if there are too few of them."""
    start, end = text.rfind("\n", 0, match.start()) + 1, text.find("\n", match.end())
    line = text[max(start, match.start() - 10) : min(end if end >= 0 else len(text), match.end() + 10)]
    window = squeezed(line)[0]
    return window if len(window) >= len(match.group()) + 6 else "\n\n"


def _numbering(text: str) -> Iterator[int]:
    """Positions of the numbers of sections, tables, figures and the page."""
    for pattern in (NUMBERED, HEADING):
        for match in pattern.finditer(text):
            yield from range(*match.span(1))
    last = text.rstrip().rfind("\n") + 1
    if text.rstrip()[last:].strip().isdigit():
        yield from range(last, len(text))


def _references() -> tuple[set[str], set[str]]:
    """Years that the text cites, and all numbers of the list of references; ends of page ranges are printed short."""
    text = (paths.repository() / "paper" / "references.bib").read_text(encoding="utf-8")
    years = set(re.findall(r"year\s*=\s*\{(\d{4})\}", text))
    listed = {token.lstrip("-") for token in TOKEN.findall(text)}
    for _, last in re.findall(r"(\d+)[-–]+(\d+)", text):
        listed |= {last[-1:], last[-2:]}
    return years, listed


def check(profile: str) -> Finding:
    """Whether every number in the committed PDF's text is traced."""
    pdf = paths.pdf(profile)
    try:
        texts = pages(pdf)
        left, counts = untraced(texts, sources(profile))
    except (OSError, ValueError, KeyError) as error:
        return verdict("trace", pdf.name, [f"cannot be read ({error})"])
    said = ", ".join(f"{n} by {how}" for how, n in counts.most_common())
    return verdict("trace", pdf.name, [f"untraced: {item}" for item in left], said)
