"""Does a killed run lose anything? `reproduce` is killed with SIGKILL at random moments, again and again, and what comes out
is compared with a run that was left alone.

All of it happens in temporary copies of the repository's inputs, each with its own cache. A cycle ends when a run gets to
its end between two kills; the next one starts from nothing, until there have been as many kills as asked for.
"""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from persona_coupling import outputs, paths, processes, prose
from persona_coupling.errors import UserError
from persona_coupling.store import MANIFEST, sha256_of

# What names a clock time or a duration differs between any two runs, and is left out of the comparison.
CLOCKS = {"made", "seconds", "stages", "compute_minutes", "evaluation_seconds"}
MINUTES = re.compile(r"\d+(\.\d+)?( |\\u00a0)?min(utes)?\b|compute minutes\D{1,60}\d+(\.\d+)?")  # as notes print them
OUTPUTS = (
    "experiments/*/results/**/*", "experiments/*/lab_notes/*", "figures/**/*", "paper/generated/**/*",
    f"artifacts/*/*/{MANIFEST}",
)  # fmt: skip
POLL = 0.05  # seconds between looks at a run that is to be killed
DRAWING = "typesetting or writing the PDF"
AIMED = 0.2  # share of the kills that wait for the PDF: it takes a second or two, which moments alone seldom hit


def main(kills: int, only: Sequence[str], seed: int, profile: str = "smoke") -> int:
    """Kill `kills` times; print a report and keep it as `stress.json` in the cache. Returns 0 if nothing was lost, no
    finished artifact was made again and all outputs are those of the run that was left alone; else 1."""
    generator = random.Random(seed)
    command = [sys.executable, "-m", "persona_coupling", "reproduce", "--profile", profile]
    command += [part for name in only for part in ("--only", name)]
    with tempfile.TemporaryDirectory(prefix="stress-") as scratch:
        calm, rough = Path(scratch) / "calm", Path(scratch) / "rough"
        copy_inputs(calm)
        print("a run that is left alone ...", flush=True)
        started = time.monotonic()
        _finish(command, calm)
        whole = time.monotonic() - started
        print(f"{whole:.0f} s. Now {kills} kills, seed {seed}:", flush=True)
        struck: Counter[str] = Counter()
        faults: list[str] = []
        cycles = 0
        while struck.total() < kills or not cycles:  # without any kill: the same run twice
            shutil.rmtree(rough, ignore_errors=True)
            copy_inputs(rough)
            finished: dict[str, str] = {}
            while struck.total() < kills:
                moment = generator.uniform(0.0, 0.8 * whole)
                aimed = DRAWING if generator.random() < AIMED else ""
                where = _strike(command, rough, delay=moment, aimed=aimed, after=generator.uniform(0.0, 1.0))
                faults += _made_again(finished, rough)
                finished = manifests(rough)
                if where is None:
                    break
                struck[where] += 1
                print(f"  {struck.total():>3}  {where}, {len(finished)} artifacts finished", flush=True)
            _finish(command, rough)
            faults += _made_again(finished, rough)
            faults += [f"left behind: {path}" for path in leftovers(rough)]
            faults += [f"differs: {name}" for name in (*differences(calm, rough), *papers(calm, rough, profile))]
            cycles += 1
        report: dict[str, Any] = {
            "profile": profile, "only": list(only), "seed": seed, "kills": struck.total(), "cycles": cycles,
            "struck while": dict(sorted(struck.items())), "faults": faults,
        }  # fmt: skip
    target = paths.artifacts() / "stress.json"
    outputs.write_json(target, report)
    print(f"{struck.total()} kills in {cycles} cycles: {', '.join(f'{n} while {w}' for w, n in struck.most_common())}")
    print("\n".join(faults) or "Nothing was lost, nothing finished was made again, all outputs are the same bytes.")
    return 1 if faults else 0


def copy_inputs(root: Path) -> None:
    """Copy what a run starts from, experiments and paper without anything that a run made, into an empty folder."""
    ignored = shutil.ignore_patterns("results", "lab_notes", "generated", "*.pdf", "__pycache__", "*.sha256")
    for folder in ("experiments", "paper"):
        shutil.copytree(paths.repository() / folder, root / folder, ignore=ignored)


def environment(root: Path) -> dict[str, str]:
    """Variables of a process that runs on such a copy, with a cache inside it."""
    return {**os.environ, "PERSONA_COUPLING_ROOT": str(root), "PERSONA_COUPLING_CACHE": str(root / "artifacts")}


def _finish(command: Sequence[str], root: Path) -> None:
    """Run to the end. Raises UserError with the last lines of what it printed when it fails."""
    done = subprocess.run(command, env=environment(root), capture_output=True, text=True, check=False)
    if done.returncode:
        raise UserError(f"A run that nobody killed failed: {done.stdout[-300:]} {done.stderr[-700:]}")


def _strike(command: Sequence[str], root: Path, *, delay: float, aimed: str = "", after: float = 0.0) -> str | None:
    """Start a run and kill its whole process group after `delay` seconds, or `after` seconds from when it is at what is
    `aimed` for. Returns what it was doing, or None if it had come to its end. A notebook's kernel is in a group of its own
    and lives up to a second longer, until it misses its parent."""
    began = time.time()
    process = subprocess.Popen(
        command, env=environment(root), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
    )
    end = time.monotonic() + delay
    while process.poll() is None and (_doing(root, process.pid, began) != aimed if aimed else time.monotonic() < end):
        time.sleep(POLL)
    if aimed:
        time.sleep(after)
    if process.poll() is not None:
        return None
    where = _doing(root, process.pid, began)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    return where


def _doing(root: Path, pid: int, began: float) -> str:
    """What a run that `began` then (seconds of the clock) is at, from the files that it holds and has written."""
    half = [path.parent.name for path in (root / "artifacts").glob(f"*/.*.{pid}") if path.is_dir()]
    if half:
        return f"making {half[0]}"
    indices = list((root / "paper" / "generated").glob("*/index.json"))  # written anew before the PDF
    drawn = list((root / "paper").glob("paper-*.pdf"))
    if any(p.stat().st_mtime >= began for p in indices) and not any(p.stat().st_mtime >= began for p in drawn):
        return DRAWING
    if list((root / "artifacts" / "notebooks").glob(f"*-{pid}.ipynb")):
        return "executing a notebook"
    return "starting, planning or between two steps"


def manifests(root: Path) -> dict[str, str]:
    """Every finished artifact and the hash of its manifest; not what a killed writer had not yet renamed to its key."""
    found = (root / "artifacts").glob(f"*/*/{MANIFEST}")
    return {str(p.parent.relative_to(root)): sha256_of(p) for p in found if not p.parent.name.startswith(".")}


def _made_again(before: dict[str, str], root: Path) -> Iterator[str]:
    after = manifests(root)
    return (f"made again or lost: {name}" for name, digest in before.items() if after.get(name) != digest)


def leftovers(root: Path) -> list[str]:
    """Temporary files and folders that a finished run leaves: there should be none."""
    hidden = [path for path in root.rglob(".*") if path.name != ".outputs.lock" and "jupyter" not in path.parts]
    failed = list(root.glob("experiments/*/lab_notes/*.failed.ipynb")) + list(root.glob("artifacts/notebooks/*.ipynb"))
    return sorted(str(path.relative_to(root)) for path in (*hidden, *failed))


def differences(one: Path, other: Path) -> list[str]:
    """Output files that are not the same in two copies, clock times and durations aside: results, notes, figures, tables,
    and manifests, which name the hash of every file of an artifact. The PDF prints minutes of compute: see `papers`."""
    found = []
    names = [
        {str(p.relative_to(root)) for pattern in OUTPUTS for p in root.glob(pattern) if p.is_file()}
        for root in (one, other)
    ]
    for name in sorted(names[0] | names[1]):
        if name not in names[0] & names[1] or _timeless(one / name) != _timeless(other / name):
            found.append(name)
    return found


def papers(calm: Path, rough: Path, profile: str) -> list[str]:
    """What is wrong with a copy's PDF. It prints minutes of compute, so two things are asked: that the PDF is what the
    copy's own files give, and that with the calm copy's generated values (which `differences` has found to be the same but
    for clocks) and the copy's own figures it is the calm copy's, byte by byte. Changes the copy's generated values."""
    found, name = [], f"paper/paper-{profile}.pdf"
    with processes.environment({"PERSONA_COUPLING_ROOT": str(rough)}):
        if (rough / name).read_bytes() != prose.compile_paper(profile):
            found.append(f"{name} is not what its generated files give")
        shutil.copytree(calm / "paper/generated", rough / "paper/generated", dirs_exist_ok=True)
        if (calm / name).read_bytes() != prose.compile_paper(profile):
            found.append(f"{name} differs by more than clock times")
    return found


def _timeless(path: Path) -> Any:
    if path.suffix == ".json":
        return _without_clocks(json.loads(path.read_text(encoding="utf-8")))
    if path.suffix == ".ipynb":
        return MINUTES.sub("", path.read_text(encoding="utf-8"))
    return path.read_bytes()


def _without_clocks(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _without_clocks(part) for name, part in value.items() if name not in CLOCKS}
    return [_without_clocks(part) for part in value] if isinstance(value, list) else value
