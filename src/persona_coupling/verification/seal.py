"""The seal: SHA-256 of every piece of committed evidence, in the format of `sha256sum -c`, run in the repository's root.

It says that files are those that were sealed, not that they are true: whoever changes evidence can seal it again. The
other checks are for that.
"""

from __future__ import annotations

from pathlib import Path

from persona_coupling import notebooks, outputs, paths
from persona_coupling.store import sha256_of
from persona_coupling.verification.findings import Finding, verdict


def path(profile: str) -> Path:
    """Where a profile's seal lies."""
    return paths.repository() / "paper" / f"evidence-{profile}.sha256"


def evidence(profile: str) -> list[Path]:
    """All files that a profile's claims rest on: raw results, lab notes, figures, generated files, the PDF."""
    found = [paths.pdf(profile), *(experiment.lab_note(profile) for experiment in notebooks.discover())]
    folders = [experiment.results(profile) for experiment in notebooks.discover()]
    folders += [paths.figures(profile), paths.generated(profile)]
    for folder in folders:
        found += sorted(folder.glob("[!.]*")) if folder.is_dir() else []
    return sorted(file for file in found if file.is_file())


def write(profile: str) -> Path:
    """Seal a profile's evidence; the seal appears whole or not at all."""
    root, target = paths.repository(), path(profile)
    lines = [f"{sha256_of(file)}  {file.relative_to(root).as_posix()}\n" for file in evidence(profile)]
    outputs.write(target, "".join(lines))
    return target


def check(profile: str) -> Finding:
    """Whether the evidence is what was sealed: nothing changed, missing or added. Without a seal: unknown."""
    root, target = paths.repository(), path(profile)
    if not target.is_file():
        return Finding("seal", target.name, "unknown", "there is no seal; `nox -s paper` writes it")
    sealed: dict[str, str] = {}
    for line in target.read_text(encoding="utf-8").splitlines():
        digest, _, name = line.partition("  ")
        sealed[name] = digest
    faults = []
    for name, digest in sealed.items():
        file = root / name
        if not file.is_file():
            faults.append(f"{name} is missing")
        elif sha256_of(file) != digest:
            faults.append(f"{name} differs from its seal")
    present = {file.relative_to(root).as_posix() for file in evidence(profile)}
    faults += [f"{name} is not sealed" for name in sorted(present - set(sealed))]
    return verdict("seal", target.name, faults, f"{len(sealed)} files")
