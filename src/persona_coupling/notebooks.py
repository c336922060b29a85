"""Experiments as folders of notebooks: found, checked, planned, executed.

A notebook is a jupytext percent script. Two of its cells carry tags that the rest of the repository relies on:
`parameters` (papermill's: profile, seeds, model) and `design` (defines `design`, a `study.Design`, and computes
nothing). The plan is read by running these two cells, so that what is planned is what the notebook asks for.
"""

from __future__ import annotations

import ast
import contextlib
import json
import os
import re
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import as_completed
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from persona_coupling import outputs, paths, processes
from persona_coupling.errors import UserError
from persona_coupling.processes import environment
from persona_coupling.store import Stage, in_order
from persona_coupling.study import STORED_ONLY, Design

FOLDER = re.compile(r"\d\d_[a-z0-9_]+")
ADDRESS = re.compile(r" at 0x[0-9a-f]{6,}")  # of an object that is shown as HTML beside its plain name


@dataclass(frozen=True)
class Experiment:
    """A numbered folder with one notebook source."""

    name: str
    notebook: Path

    @property
    def folder(self) -> Path:
        """The experiment's folder."""
        return self.notebook.parent

    def results(self, profile: str) -> Path:
        """Where a profile's tables are kept."""
        return self.folder / "results" / profile

    def record(self, profile: str) -> Path:
        """What says how a profile's tables were made; it is written last, so without it there are no results."""
        return self.results(profile) / "record.json"

    def lab_note(self, profile: str) -> Path:
        """The executed copy of the notebook."""
        return self.folder / "lab_notes" / f"{profile}.ipynb"


def discover() -> tuple[Experiment, ...]:
    """All experiments, in order. Raises UserError for a numbered folder without exactly one notebook."""
    found = []
    for folder in sorted(paths.experiments().iterdir()) if paths.experiments().is_dir() else []:
        if not folder.is_dir() or not FOLDER.fullmatch(folder.name):
            continue
        sources = [p for p in sorted(folder.glob("*.py")) if "# %%" in p.read_text(encoding="utf-8")]
        if len(sources) != 1:
            raise UserError(f"{folder} has {len(sources)} notebooks (*.py in percent format), not one.")
        found.append(Experiment(folder.name, sources[0]))
    return tuple(found)


def stored(profile: str) -> tuple[Experiment, ...]:
    """The experiments that have results of a profile, in order."""
    return tuple(experiment for experiment in discover() if experiment.record(profile).is_file())


def stages_of(profile: str) -> list[Stage]:
    """All stages that a profile's experiments ask for, parents first, each once."""
    parameters = {"profile": profile, "seeds": [], "model": ""}
    return in_order([stage for experiment in discover() for stage in design_of(experiment, parameters).stages()])


def choose(only: list[str] | None) -> tuple[Experiment, ...]:
    """The experiments whose names or numbers are asked for (all by default). Raises UserError for an unknown one."""
    known = discover()
    if not only:
        return known
    chosen = []
    for wanted in only:
        matches = [e for e in known if e.name == wanted or (wanted and e.name.split("_")[0] == wanted.zfill(2))]
        if len(matches) != 1:
            raise UserError(f"There is no experiment {wanted!r}. Known: {', '.join(e.name for e in known)}.")
        chosen += matches
    return tuple(dict.fromkeys(chosen))


def _read(experiment: Experiment) -> Any:
    import jupytext

    return jupytext.read(experiment.notebook)


def _tagged(notebook: Any, tag: str, experiment: Experiment) -> Any:
    cells = [c for c in notebook.cells if c.cell_type == "code" and tag in c.metadata.get("tags", [])]
    if len(cells) != 1:
        raise UserError(f"{experiment.notebook} has {len(cells)} cells tagged {tag!r}, not one.")
    return cells[0]


def check_parameters(experiment: Experiment, parameters: dict[str, Any]) -> None:
    """Raise UserError for a parameter that the notebook does not declare, or of another type than its default."""
    cell = _tagged(_read(experiment), "parameters", experiment)
    defaults: dict[str, Any] = {}
    for node in ast.parse(cell.source).body:
        if isinstance(node, ast.Assign | ast.AnnAssign) and node.value is not None:
            target = node.targets[0] if isinstance(node, ast.Assign) else node.target
            try:
                assert isinstance(target, ast.Name)
                defaults[target.id] = ast.literal_eval(node.value)
            except (AssertionError, ValueError) as error:
                raise UserError(
                    f"{experiment.notebook}: the parameters cell takes plain `name = literal` lines only."
                ) from error
    for name, value in parameters.items():
        if name not in defaults:
            raise UserError(f"{experiment.name} has no parameter {name!r}. Known: {', '.join(defaults)}.")
        if type(value) is not type(defaults[name]):
            expected = type(defaults[name]).__name__
            raise UserError(f"{experiment.name}: {name} = {value!r} is a {type(value).__name__}, not a {expected}.")


def design_of(experiment: Experiment, parameters: dict[str, Any]) -> Design:
    """The design that the notebook asks for, from its own `parameters` and `design` cells; computes nothing."""
    check_parameters(experiment, parameters)
    notebook = _read(experiment)
    namespace: dict[str, Any] = {"__name__": f"plan_{experiment.name}"}
    _run(_tagged(notebook, "parameters", experiment).source, experiment, namespace)
    namespace.update(parameters)
    _run(_tagged(notebook, "design", experiment).source, experiment, namespace)
    design = namespace.get("design")
    if not isinstance(design, Design):
        raise UserError(f"{experiment.notebook}: the cell tagged 'design' defines no `design`.")
    design.check()
    return design


def _run(source: str, experiment: Experiment, namespace: dict[str, Any]) -> None:
    exec(compile(source, str(experiment.notebook), "exec"), namespace)  # noqa: S102 - the repository's own notebook


Job = tuple[Experiment, dict[str, Any]]
SIDE_BY_SIDE = 8  # notebooks at a time, on as many cores; each takes half a gigabyte


def each(
    do: Callable[[Experiment, dict[str, Any]], object], jobs: Sequence[Job], done: Callable[[str], object]
) -> None:
    """`redraw` or `execute` experiments with their parameters in processes side by side; `done` is told the name of each
    that is finished. Raises the first error, once those that were under way have ended; no other is begun."""
    count = min(len(jobs), os.cpu_count() or 1, SIDE_BY_SIDE)
    if count < 2:
        for experiment, parameters in jobs:
            do(experiment, parameters)
            done(experiment.name)
        return
    with processes.pool(count) as pool:
        under_way = {pool.submit(do, experiment, parameters): experiment.name for experiment, parameters in jobs}
        for future in as_completed(under_way):
            future.result()
            done(under_way[future])


def redraw(experiment: Experiment, parameters: dict[str, Any]) -> None:
    """Run all code cells in this process on stored results: figures and tables again, no model, no kernel."""
    check_parameters(experiment, parameters)
    namespace: dict[str, Any] = {"__name__": f"redraw_{experiment.name}", "display": lambda *_args: None}
    with environment({STORED_ONLY: "1"}):
        for cell in _read(experiment).cells:
            if cell.cell_type != "code":
                continue
            _run(cell.source, experiment, namespace)
            if "parameters" in cell.metadata.get("tags", []):
                namespace.update(parameters)


def execute(experiment: Experiment, parameters: dict[str, Any]) -> Path:
    """Execute the notebook with papermill; the executed copy appears whole or not at all.

    Raises UserError with the failing cell's last line; the partial copy is kept beside as `.failed.ipynb`.
    """
    import jupytext
    import papermill
    from papermill.exceptions import PapermillExecutionError

    check_parameters(experiment, parameters)
    note = experiment.lab_note(str(parameters["profile"]))
    note.parent.mkdir(parents=True, exist_ok=True)
    partial = note.with_suffix(".failed.ipynb")
    notebook = jupytext.read(experiment.notebook)
    notebook.metadata["kernelspec"] = {"name": "python3", "display_name": "Python 3", "language": "python"}
    with _workplace() as work:
        source = work / f"{experiment.name}-{os.getpid()}.ipynb"
        try:
            jupytext.write(notebook, source)
            with _kernel_of_this_interpreter(work) as kernel:
                papermill.execute_notebook(
                    str(source),
                    str(partial),
                    parameters=parameters,
                    kernel_name=kernel,
                    cwd=str(paths.repository()),
                    progress_bar=False,
                    log_output=False,
                )
        except PapermillExecutionError as error:
            raise UserError(f"{experiment.name} failed: {error.ename}: {error.evalue}. See {partial}.") from error
        finally:
            source.unlink(missing_ok=True)
    outputs.write(note, _timeless(partial))
    partial.unlink()
    return note


def _timeless(path: Path) -> str:
    """The executed notebook without clock times, addresses in memory and machine paths: its bytes change only when its
    content does."""
    notebook = json.loads(path.read_text(encoding="utf-8"))
    notebook["metadata"].pop("papermill", None)
    for number, cell in enumerate(notebook["cells"]):
        cell["id"] = f"cell-{number:02d}"
        cell["metadata"].pop("papermill", None)
        cell["metadata"].pop("execution", None)
        if "outputs" in cell:  # libraries' warnings name this machine's folders
            cell["outputs"] = [output for output in cell["outputs"] if output.get("name") != "stderr"]
    text = json.dumps(notebook, indent=1, ensure_ascii=False) + "\n"
    text = ADDRESS.sub("", text)
    return text.replace(str(paths.repository()) + "/", "").replace(str(paths.repository()), ".")


@contextmanager
def _workplace() -> Iterator[Path]:
    """A folder for what is executed: in the cache, or a temporary one where the cache can only be read."""
    work = paths.artifacts() / "notebooks"
    with contextlib.suppress(OSError):
        work.mkdir(parents=True, exist_ok=True)
    if os.access(work, os.W_OK):
        yield work
    else:
        with tempfile.TemporaryDirectory(prefix="notebooks-") as folder:
            yield Path(folder)


@contextmanager
def _kernel_of_this_interpreter(work: Path) -> Iterator[str]:
    """A kernel that runs this very interpreter, without installing anything in the user's home."""
    name = "persona-coupling"
    folder = work / "jupyter" / "kernels" / name
    folder.mkdir(parents=True, exist_ok=True)
    quiet = "--log-level=50"  # an idle kernel is interrupted before it is ended, and calls that an error
    arguments = [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}", quiet]
    spec = {"argv": arguments, "display_name": "Python 3", "language": "python"}
    outputs.write(folder / "kernel.json", json.dumps(spec))  # whole or not at all: others may be reading it
    joined = os.pathsep.join([str(work / "jupyter"), os.environ.get("JUPYTER_PATH", "")]).strip(os.pathsep)
    with environment({"JUPYTER_PATH": joined, "PYDEVD_DISABLE_FILE_VALIDATION": "1"}):
        yield name
