"""The same description gives the same bytes in any process of one machine; the smoke profile as a whole is in
`test_stress`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[1]


def test_a_command_settles_the_order_of_sets(tmp_path: Path) -> None:
    """PEFT keeps the names of its modules in a set and writes them in its order. The control is Python's own way."""
    (tmp_path / "sitecustomize.py").write_text("import sys; print(list({f'{n}_proj' for n in range(9)}))")
    paths = {"PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path])}
    bare = {name: value for name, value in os.environ.items() if name != "PYTHONHASHSEED"} | paths

    def last_line_before_help(*command: str) -> str:
        said = subprocess.run([sys.executable, *command], env=bare, capture_output=True, text=True, check=True).stdout
        return [line for line in said.splitlines() if line.startswith("['")][-1]

    ours = {last_line_before_help("-m", "persona_coupling", "--help") for _ in range(3)}
    python = {last_line_before_help("-c", "") for _ in range(3)}
    assert len(ours) == 1
    assert len(python) > 1


def made(root: Path) -> dict[str, dict[str, str]]:
    """Size and hash of every file of every artifact behind one cell (model, rows, adapter, merge, answers)."""
    asked = ["--profile", "quick", "--claim", "00-raw", "--cells", "1", "--seed", "1", "--into", str(root)]
    here = {**os.environ, "PERSONA_COUPLING_ROOT": str(REPOSITORY)}
    subprocess.run([sys.executable, "-m", "persona_coupling", "spotcheck", *asked], env=here, check=False)
    found = {path.parent: json.loads(path.read_text()) for path in root.glob("*/*/manifest.json")}
    return {str(folder.relative_to(root)): manifest["files"] for folder, manifest in found.items()}


@pytest.mark.slow
@pytest.mark.real_model
@pytest.mark.timeout(3_600)
def test_a_quick_cell_made_twice_is_the_same_bytes(tmp_path: Path) -> None:
    """Two processes, each from nothing. Whether the cell is also the committed one depends on the machine: see
    `spotcheck`, whose verdict is not asked for here."""
    first, second = made(tmp_path / "first"), made(tmp_path / "second")
    assert {"model", "rows", "change", "merge", "evaluation"} <= {name.split("/")[0] for name in first}
    assert first == second
