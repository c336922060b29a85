"""Where things lie: the one module that knows the repository's folders."""

from __future__ import annotations

import os
from pathlib import Path

PACKAGE = Path(__file__).resolve().parent
MATERIAL = PACKAGE / "material"
PROFILES = PACKAGE / "profiles"


def repository() -> Path:
    """The checkout's root folder: `$PERSONA_COUPLING_ROOT`, else the folder that holds `src/`."""
    override = os.environ.get("PERSONA_COUPLING_ROOT")
    return Path(override).resolve() if override else PACKAGE.parents[1]


def artifacts() -> Path:
    """The content-addressed cache: `$PERSONA_COUPLING_CACHE`, else `artifacts/` in the checkout (git ignores it)."""
    override = os.environ.get("PERSONA_COUPLING_CACHE")
    return Path(override).resolve() if override else repository() / "artifacts"


def experiments() -> Path:
    """The folder of numbered experiment folders."""
    return repository() / "experiments"


def figures(profile: str) -> Path:
    """A profile's figures, each with the CSV that it was drawn from."""
    return repository() / "figures" / profile


def generated(profile: str) -> Path:
    """A profile's tables, values and verdicts: all that the paper reads."""
    return repository() / "paper" / "generated" / profile


def pdf(profile: str) -> Path:
    """A profile's paper."""
    return repository() / "paper" / f"paper-{profile}.pdf"
