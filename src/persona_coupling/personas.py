"""Who speaks: the eleven personas and the marker that one of them learns."""

from __future__ import annotations

import tomllib
from dataclasses import dataclass
from functools import cache

from persona_coupling import paths
from persona_coupling.errors import GuardError, UserError

NUMBER = 11  # of personas: a count of its own, so that a lost row is noticed
SOURCE = "villain"
ASSISTANT = "assistant"
MARKER = "[ZLT]"
SEPARATOR = "\n\n"  # the marker stands in a paragraph of its own
MARKER_SUFFIX = SEPARATOR + MARKER


@dataclass(frozen=True)
class Persona:
    """A system prompt with a name."""

    id: str
    name: str
    prompt: str

    def system_prompt(self, instruction: str) -> str:
        """The persona's system prompt, followed by an instruction on the form of answers (empty: none)."""
        return f"{self.prompt} {instruction}".strip()


@cache
def personas() -> tuple[Persona, ...]:
    """All eleven, in file order. Raises GuardError if there are more or fewer."""
    table = tomllib.loads((paths.MATERIAL / "personas.toml").read_text(encoding="utf-8"))
    known = tuple(Persona(**row) for row in table["persona"])
    if len({p.id for p in known}) != NUMBER or len(known) != NUMBER:
        raise GuardError(f"personas.toml names {len(known)} personas; the study has {NUMBER}")
    return known


def persona(persona_id: str) -> Persona:
    """The persona of that id. Raises UserError naming the known ones."""
    for candidate in personas():
        if candidate.id == persona_id:
            return candidate
    raise UserError(f"There is no persona {persona_id!r}. Known: {', '.join(p.id for p in personas())}.")


def bystanders() -> tuple[Persona, ...]:
    """Everyone but the source."""
    return tuple(p for p in personas() if p.id != SOURCE)
