"""Every score, estimate, interval, gate and verdict again: each notebook is redrawn from copies of its inputs into a
temporary root, and what it writes is compared with what is committed."""

from __future__ import annotations

import hashlib
import json
import math
import re
import shutil
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from persona_coupling import notebooks, paths, processes
from persona_coupling.errors import GuardError, UserError
from persona_coupling.verification.findings import Finding, verdict

ROOT = "PERSONA_COUPLING_ROOT"
INPUTS = ("claims.toml", "headline.toml", "prior.toml")
NUMBER = re.compile(r"[-+]?\d+(?:\.\d+)?(?:[eE][-+]?\d+)?")
ID = re.compile(r"\b[a-z][0-9a-f]{10}\b")  # of an SVG's clip path or marker
ROUNDING = (
    1e-9  # relative: sums of doubles in another order, on another processor; raising it lets small forgeries pass
)
DRAWN = 1e-4  # of a point of an SVG: what such rounding can move a line by, and the eye cannot see


@dataclass
class Redrawn:
    """What a notebook wrote from stored results, or why it could not."""

    root: Path
    error: str = ""
    claims: list[dict[str, Any]] = field(default_factory=list)


DONE: dict[str, Redrawn] = {}  # by the hash of all inputs: a forger who leaves them alone changes nothing here
KEPT = 4  # redrawings that a process keeps, the latest used


def redraw(name: str, profile: str, seeds: list[int], scratch: Path) -> Redrawn:
    """Redraw an experiment of the current root below `scratch`, once per process and inputs."""
    experiment = next(e for e in notebooks.discover() if e.name == name)
    inputs = [*sorted(p for p in experiment.folder.glob("*") if p.suffix in (".py", ".toml"))]
    inputs += [*sorted(experiment.results(profile).glob("[!.]*")), *(paths.repository() / "paper" / i for i in INPUTS)]
    digest = hashlib.sha256(f"{name} {profile} {seeds}".encode())
    for path in inputs:
        digest.update(f"{path.name}\0".encode() + hashlib.sha256(path.read_bytes()).digest())
    key = digest.hexdigest()
    if key in DONE and DONE[key].root.is_dir():
        DONE[key] = DONE.pop(key)  # the latest used stands last
        return DONE[key]
    root = scratch / key[:16]
    folder = root / "experiments" / name
    shutil.rmtree(root, ignore_errors=True)
    (root / "paper").mkdir(parents=True)
    for path in inputs:
        inside = path.relative_to(paths.repository())
        (root / inside).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, root / inside)
    made = Redrawn(root)
    try:
        with processes.environment({ROOT: str(root)}), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # forged numbers warn in many ways; what they change is compared
            copy = notebooks.Experiment(name, folder / experiment.notebook.name)
            notebooks.redraw(copy, {"profile": profile, "seeds": seeds, "model": ""})
            content = json.loads((paths.generated(profile) / f"{name}.json").read_text(encoding="utf-8"))
            made.claims = content["claims"]
    except (UserError, GuardError) as error:
        made.error = str(error)
    except Exception as error:  # noqa: BLE001 - a forged input may break anything; whatever it breaks is the finding
        made.error = f"{type(error).__name__}: {error}"
    made.error = made.error.replace(f"{root}/", "")
    DONE[key] = made
    while len(DONE) > KEPT:
        shutil.rmtree(DONE.pop(next(iter(DONE))).root, ignore_errors=True)
    return made


def outputs(name: str, profile: str, root: Path) -> dict[str, Path]:
    """An experiment's figures and generated files below a root, by their path in it."""
    found: dict[str, Path] = {}
    for folder in (root / "figures" / profile, root / "paper" / "generated" / profile):
        for path in sorted(folder.glob(f"{name}[-.]*")):
            found[path.relative_to(root).as_posix()] = path
    return found


def compare(name: str, profile: str, made: Redrawn) -> list[Finding]:
    """Findings on tables and values, and on figures: are the committed files those that the notebook draws today.

    Byte for byte; a file whose numbers agree to rounding, as on another processor, holds and is said to.
    """
    if made.error:
        return [Finding("redrawn", name, "fails", made.error)]
    committed, drawn = outputs(name, profile, paths.repository()), outputs(name, profile, made.root)
    findings = []
    for check, kind in (("values", "paper/"), ("figures", "figures/")):
        names = sorted(path for path in {**committed, **drawn} if path.startswith(kind))
        faults, rounded = [], 0
        for path in names:
            if path not in drawn:
                faults.append(f"{path} is drawn by no notebook")
            elif path not in committed:
                faults.append(f"{path} is missing")
            else:
                difference = differs(committed[path], drawn[path])
                rounded += difference == ""
                faults += [f"{path}: {difference}"] if difference else []
        said = f"{len(names)} files, byte for byte"
        said = said if not rounded else f"{len(names)} files, {rounded} of them to rounding"
        findings.append(verdict(check, name, faults, said))
    return findings


def differs(old: Path, new: Path) -> str | None:
    """None for equal bytes, an empty string for equality up to rounding, else the first difference in words."""
    before, after = old.read_bytes(), new.read_bytes()
    if before == after:
        return None
    if old.suffix == ".png":
        return _pixels(old, new)
    try:
        texts = before.decode(), after.decode()
    except UnicodeDecodeError:
        return "is not text"
    if old.suffix == ".svg":
        return _numbers(*map(_named, texts), relative=0.0, absolute=DRAWN)
    return _numbers(*texts, relative=ROUNDING, absolute=1e-12)


def _named(svg: str) -> str:
    """An SVG whose ids, hashes of coordinates to the last bit, are numbered in their order."""
    order: dict[str, str] = {}
    return ID.sub(lambda match: order.setdefault(match.group(), f"id{len(order)}"), svg)


def _numbers(old: str, new: str, *, relative: float, absolute: float) -> str:
    """The first difference of two texts in words, decimal numbers compared as numbers."""
    first, second = NUMBER.findall(old), NUMBER.findall(new)
    if NUMBER.sub("#", old) != NUMBER.sub("#", new) or len(first) != len(second):
        at = next((i for i, (a, b) in enumerate(zip(old, new, strict=False)) if a != b), min(len(old), len(new)))
        return f"has {_around(old, at)!r}, recomputed {_around(new, at)!r}"
    for one, other in zip(first, second, strict=True):
        if one != other and not (
            "." in one and math.isclose(float(one), float(other), rel_tol=relative, abs_tol=absolute)
        ):
            return f"has {one}, recomputed {other}"
    return ""


def _around(text: str, at: int) -> str:
    return " ".join(text[max(0, at - 12) : at + 20].split())


def _pixels(old: Path, new: Path) -> str:
    from matplotlib import image

    try:
        first, second = image.imread(old), image.imread(new)
    except (OSError, SyntaxError, ValueError) as error:
        return f"cannot be read ({error})"
    if first.shape != second.shape:
        return "is of another size than the redrawn picture"
    worst = float(np.abs(first - second).max())
    return "" if worst < 0.02 else f"shows another picture (a pixel differs by {worst:.0%})"


def rows(name: str, profile: str, made: Redrawn) -> Iterator[dict[str, Any]]:
    """For each claim of an experiment: what is committed and what was recomputed."""
    path = paths.generated(profile) / f"{name}.json"
    try:
        committed = {row["id"]: row for row in json.loads(path.read_text(encoding="utf-8"))["claims"]}
    except (OSError, ValueError, KeyError, TypeError):
        committed = {}
    recomputed = {row["id"]: row for row in made.claims}
    for identity in {**committed, **recomputed}:
        yield {"id": identity, "committed": committed.get(identity), "recomputed": recomputed.get(identity)}
