"""What a run of `mutate` has found so far, line by line on disk, so that a run that was cut off is gone on with."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Hashable
from typing import Any

from persona_coupling import paths
from persona_coupling.verification import seal


class Journal:
    """Outcomes by what was tried, in a file that lives until the run is over.

    Its first line names the evidence and the code that were tried: under any other the file starts anew. A last line that
    a kill cut in half is dropped. `kind` and `outcome` are the dataclasses of a trial and of what became of it.
    """

    def __init__(self, profile: str, kind: type[Hashable], outcome: type[Any]) -> None:
        self.path = paths.artifacts() / "mutations" / f"{profile}.jsonl"
        self.kind, self.outcome = kind, outcome
        self.found: dict[Any, Any] = {}
        digest = _digest(profile)
        lines = self.path.read_text(encoding="utf-8").splitlines() if self.path.is_file() else []
        if lines[:1] == [digest]:
            for line in lines[1:]:
                self._take(line)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("w", encoding="utf-8") as file:
            file.write(f"{digest}\n" + "".join(self._line(tried) for tried in self.found))

    def _take(self, line: str) -> None:
        try:
            entry = json.loads(line)
        except ValueError:
            return
        outcome = self.outcome(**{**entry["outcome"], "mutant": self.kind(**entry["outcome"]["mutant"])})
        self.found[self.kind(**entry["tried"])] = outcome

    def _line(self, tried: Any) -> str:
        content = {"tried": dataclasses.asdict(tried), "outcome": dataclasses.asdict(self.found[tried])}
        return json.dumps(content, ensure_ascii=False) + "\n"

    def add(self, tried: Any, outcome: Any) -> None:
        """Keep an outcome, on disk at once."""
        self.found[tried] = outcome
        with self.path.open("a", encoding="utf-8") as file:
            file.write(self._line(tried))

    def finish(self) -> None:
        """The run is over: its outcome is written elsewhere."""
        self.path.unlink(missing_ok=True)


def _digest(profile: str) -> str:
    """Of all evidence but the outcome of `mutate` itself, and of all code that makes or checks it."""
    root, digest = paths.repository(), hashlib.sha256()
    code = [*paths.PACKAGE.rglob("*.py"), *paths.experiments().glob("*/*.py"), *(root / "paper").glob("*.t*")]
    own = paths.generated(profile) / "mutations.json"
    for path in (*seal.evidence(profile), *sorted(code)):
        if path not in (own, paths.pdf(profile)):  # the PDF prints that outcome
            digest.update(f"{path.name}\0".encode() + hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()
