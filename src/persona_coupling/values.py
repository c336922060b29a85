"""An experiment's own values per profile: `experiments/NN_name/values.toml`, one table for each profile.

Values that several experiments share stand in the profile; what one experiment alone asks for stands in its folder, so
that an experiment is one folder.
"""

from __future__ import annotations

import tomllib
from dataclasses import dataclass
from typing import Any

from persona_coupling import paths
from persona_coupling.errors import UserError


@dataclass(frozen=True)
class Values:
    """One profile's values of an experiment, read as attributes: `values.corpora`. Lists are tuples."""

    experiment: str
    named: tuple[tuple[str, Any], ...]

    def __getattr__(self, name: str) -> Any:
        """The value of that name. Raises AttributeError naming the known ones."""
        for known, value in self.named:
            if known == name:
                return value
        raise AttributeError(f"{self.experiment} has no value {name!r}; known: {', '.join(n for n, _ in self.named)}")

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {name: _listed(value) for name, value in self.named}


def load(experiment: str, profile: str) -> Values:
    """Read an experiment's values. Raises UserError when the file or the profile's table is missing, or when two
    profiles differ in anything but values: every table has the same fields of the same types."""
    path = paths.experiments() / experiment / "values.toml"
    if not path.is_file():
        raise UserError(f"There is no {path}. Write one table of values for each profile.")
    tables = tomllib.loads(path.read_text(encoding="utf-8"))
    if profile not in tables:
        raise UserError(f"{path} has no table [{profile}]. Known: {', '.join(tables)}.")
    shapes = {name: {field: _kind(value) for field, value in table.items()} for name, table in tables.items()}
    for name, shape in shapes.items():
        if shape != shapes[profile]:
            differing = sorted({field for field, _ in shape.items() ^ shapes[profile].items()})
            raise UserError(
                f"{path}: [{name}] and [{profile}] differ in the fields or types of {', '.join(differing)}."
            )
    return Values(experiment, tuple((field, _frozen(value)) for field, value in tables[profile].items()))


def _kind(value: Any) -> str:
    return type(value).__name__


def _frozen(value: Any) -> Any:
    return tuple(_frozen(item) for item in value) if isinstance(value, list) else value


def _listed(value: Any) -> Any:
    return [_listed(item) for item in value] if isinstance(value, tuple) else value
