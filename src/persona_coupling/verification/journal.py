"""What a run of `mutate` has found so far, line by line on disk, so that a run that was cut off is gone on with."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path

from persona_coupling import outputs, paths
from persona_coupling.verification import seal


@dataclass(frozen=True)
class Mutant:
    """A forgery to try: its class, the experiment, the claim it is about (none: all of the experiment), its target."""

    kind: str
    experiment: str
    claim: str = ""
    target: str = ""

    def __str__(self) -> str:
        return f"{self.kind}: {self.claim or self.experiment}{', ' + self.target if self.target else ''}"


@dataclass(frozen=True)
class Outcome:
    """What became of a mutant: caught by which check and why; `moved`: the claim's own estimate changed. `caught` is
    None where there was nothing to forge."""

    mutant: Mutant
    caught: bool | None
    by: str = ""
    why: str = ""
    moved: bool | None = None


class Journal:
    """Outcomes by forgery, in a file that lives until the run is over.

    Its first line names the evidence and the code that were tried: under any other the file starts anew. A last line that
    a kill cut in half is dropped.
    """

    def __init__(self, profile: str) -> None:
        self.path = path(profile)
        self.found: dict[Mutant, Outcome] = {}
        digest = _digest(profile)
        lines = self.path.read_text(encoding="utf-8").splitlines() if self.path.is_file() else []
        if lines[:1] == [digest]:
            for line in lines[1:]:
                self._take(line)
        outputs.write(self.path, f"{digest}\n" + "".join(self._line(mutant) for mutant in self.found))

    def _take(self, line: str) -> None:
        try:
            entry = json.loads(line)
        except ValueError:
            return
        outcome = Outcome(**{**entry["outcome"], "mutant": Mutant(**entry["outcome"]["mutant"])})
        self.found[Mutant(**entry["tried"])] = outcome

    def _line(self, mutant: Mutant) -> str:
        content = {"tried": asdict(mutant), "outcome": asdict(self.found[mutant])}
        return json.dumps(content, ensure_ascii=False) + "\n"

    def add(self, mutant: Mutant, outcome: Outcome) -> None:
        """Keep an outcome, on disk at once."""
        self.found[mutant] = outcome
        with self.path.open("a", encoding="utf-8") as file:
            file.write(self._line(mutant))


def path(profile: str) -> Path:
    """Where a profile's journal lies; whoever has written its outcome elsewhere removes it."""
    return paths.artifacts() / "mutations" / f"{profile}.jsonl"


def _digest(profile: str) -> str:
    """Of all evidence but the outcome of `mutate` itself, and of all that makes or checks it."""
    root, digest = paths.repository(), hashlib.sha256()
    sources = [*paths.PACKAGE.rglob("*.py"), *(root / "paper").glob("*.t*")]
    sources += [file for file in paths.experiments().glob("*/*") if file.is_file()]
    own = paths.generated(profile) / "mutations.json"
    for file in (*seal.evidence(profile), *sorted(sources)):
        if file not in (own, paths.pdf(profile)):  # the PDF prints that outcome
            digest.update(f"{file.name}\0".encode() + hashlib.sha256(file.read_bytes()).digest())
    return digest.hexdigest()
