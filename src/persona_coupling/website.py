"""The lab notes as a static site: executed notebooks and generated verdicts in, Sphinx's HTML with our theme out.

Nothing is computed here and no model code is imported: `python -m persona_coupling.website` runs where only the extra
`notes` is installed. The same notebooks give the same bytes; the site needs neither a network nor a server.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from persona_coupling import paths, website_pages
from persona_coupling.errors import UserError
from persona_coupling.website_pages import Page

THEME = paths.PACKAGE / "theme"
NEEDED = {"claims", "compute_minutes", "constants", "counts", "experiments", "headline", "profile", "provenance"}
MARK = "lab-notes.json"  # in every site: what may be replaced by the next one
TITLE = "Does any LoRA fine-tuning destroy a persona’s learned marker, and why?"


def stored_profile(asked: str) -> str:
    """The profile asked for, or of full and quick the one with the most lab notes. Raises UserError where it has no
    verdicts."""
    judged = [n for n in ([asked] if asked else ["full", "quick"]) if (paths.generated(n) / "index.json").is_file()]
    if judged:
        return max(judged, key=lambda name: len(list(paths.experiments().glob(f"*/lab_notes/{name}.ipynb"))))
    wanted = asked or "quick"
    raise UserError(f"There are no verdicts of {wanted}. Run `nox -s reproduce -- --profile {wanted}`.")


def read(profile: str) -> tuple[dict[str, Any], list[Page]]:
    """The index of a profile's verdicts and its experiments' pages.

    Raises UserError for a lab note that is missing or an index of another version, GuardError (from the pages) for a
    cell that names an unknown claim.
    """
    folder = paths.generated(profile)
    index = json.loads((folder / "index.json").read_text(encoding="utf-8"))
    if missing := NEEDED - set(index):
        raise UserError(
            f"{folder / 'index.json'} lacks {', '.join(sorted(missing))}: another version wrote it. "
            f"Run `nox -s paper -- --profile {profile}`."
        )
    pages = []
    for name in index["experiments"]:
        note = paths.experiments() / name / "lab_notes" / f"{profile}.ipynb"
        if not note.is_file():
            raise UserError(f"There is no {note}. Run `nox -s paper -- --profile {profile} --notes`.")
        content = json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))
        pages.append(website_pages.page(name, json.loads(note.read_text(encoding="utf-8")), content))
    return index, pages


def generator() -> Path:
    """A Python that has Sphinx and MyST-NB: this one, else that of the session `notes`. Raises UserError without."""
    if all(importlib.util.find_spec(name) for name in ("sphinx", "myst_nb")):
        return Path(sys.executable)
    own = paths.PACKAGE.parents[1] / ".nox" / "notes" / ("Scripts" if os.name == "nt" else "bin") / "python"
    if own.exists():
        return own
    raise UserError("Sphinx and MyST-NB are not installed. Run `nox -s notes`, or `pip install -e .[notes]`.")


def build(profile: str, into: Path) -> Path:
    """Write a profile's site to the folder `into`, whole or not at all. Returns its index page.

    Raises UserError if `into` holds anything but a site of ours, if nothing is stored, or with the generator's message.
    """
    if into.exists() and not (into.is_dir() and ((into / MARK).is_file() or not any(into.iterdir()))):
        raise UserError(f"{into} holds something else than lab notes; give another folder, or empty it.")
    python = generator()
    index, pages = read(profile)
    with tempfile.TemporaryDirectory(prefix="lab-notes-") as work:
        source, target = Path(work) / "source", Path(work) / "site"
        shutil.copytree(THEME, source, ignore=shutil.ignore_patterns("__pycache__"))
        website_pages.write(source, TITLE, index, pages, _files(profile, index, source / "files"))
        _generate(python, source, target)
        for leftover in (".buildinfo", "objects.inv"):  # machine paths' hash; an inventory that nobody reads
            (target / leftover).unlink(missing_ok=True)
        (target / MARK).write_text(json.dumps({"profile": profile}) + "\n", encoding="utf-8")
        into.parent.mkdir(parents=True, exist_ok=True)
        beside = into.with_name(f".{into.name}.{os.getpid()}")
        shutil.copytree(target, beside)
        shutil.rmtree(into, ignore_errors=True)
        beside.rename(into)
    return into / "index.html"


def _files(profile: str, index: dict[str, Any], folder: Path) -> Path:
    """Copy what pages link to: the PDF, figures with their data, tables, raw results."""
    folder.mkdir(parents=True)
    if paths.pdf(profile).is_file():
        shutil.copy(paths.pdf(profile), folder)
    for kind, origin in (("figures", paths.figures(profile)), ("tables", paths.generated(profile))):
        for path in sorted(origin.glob("*")) if origin.is_dir() else []:
            if path.suffix in (".svg", ".csv"):
                (folder / kind).mkdir(exist_ok=True)
                shutil.copy(path, folder / kind)
    for name in index["experiments"]:
        results = paths.experiments() / name / "results" / profile
        for path in sorted(results.glob("*")) if results.is_dir() else []:
            (folder / "results" / name).mkdir(parents=True, exist_ok=True)
            shutil.copy(path, folder / "results" / name)
    return folder


def _generate(python: Path, source: Path, target: Path) -> None:
    """Run Sphinx, warnings being errors. A fixed hash seed and date keep the bytes the same."""
    command = [str(python), "-m", "sphinx", "-b", "html", "-q", "-W", "--keep-going"]
    command += ["-d", str(source.parent / "doctrees"), str(source), str(target)]
    settings = {**os.environ, "PYTHONHASHSEED": "0", "SOURCE_DATE_EPOCH": "0", "PYTHONWARNINGS": "ignore"}
    completed = subprocess.run(command, env=settings, capture_output=True, text=True, check=False)
    if completed.returncode:
        raise UserError(f"The generator failed: {completed.stderr.strip()[-2000:]}")


def command(arguments: argparse.Namespace) -> None:
    """Build the site of the profile asked for, or of the best stored one, and say where it lies."""
    profile = stored_profile(arguments.profile)
    into = Path(arguments.into).resolve() if arguments.into else paths.repository() / "site" / profile
    print(f"lab notes: {build(profile, into)}")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of this command."""
    parser.add_argument("--profile", default="", help="smoke, quick, full or qwen2.5-7b (default: the best stored one)")
    parser.add_argument("--into", default="", help="the folder of the site (default: site/<profile>)")


def main() -> int:
    """Run without the rest of the package's commands. Returns the exit code: 0 done, 2 the user can mend it."""
    parser = argparse.ArgumentParser(prog="persona_coupling.website", description=__doc__)
    add_arguments(parser)
    try:
        command(parser.parse_args())
    except UserError as error:
        print(f"\n{error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
