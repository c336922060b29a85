"""How a cluster scales on this machine, with raylets of one core each: `python -m persona_coupling.cluster_bench`.

Twice the same graph, experiment 00 of the smoke study: as it is, and with every stage replaced by one that only waits. The
first shows what these cores give, the second what the engine takes: a machine has two cores, but any number of waits.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

from persona_coupling import cluster, cluster_simulation, notebooks, outputs, paths, progress, provenance
from persona_coupling.machine import machine
from persona_coupling.profiles import ClusterValues
from persona_coupling.store import Lab, Stage, Store, Work

WORKERS = (1, 2, 4)
REPEATS = 3  # of the study, of which the fastest counts: other work on the machine only adds
SECONDS = 1.0  # of a stage that only waits
MEASURED = "cluster_scaling.json"
BEGINS, ENDS = (
    "<!-- scaling: written by `python -m persona_coupling.cluster_bench`; do not edit by hand -->\n",
    ("<!-- end of scaling -->"),
)


@dataclass(frozen=True)
class Wait(Stage):
    """Stands for a stage: rests on what that rests on, and only waits."""

    name: str
    seconds: float
    rests_on: tuple[Stage, ...]
    kind: ClassVar[str] = "wait"

    def build(self, folder: Path, lab: Lab) -> None:
        """Wait."""
        time.sleep(self.seconds)
        (folder / "done").write_text(self.name, encoding="utf-8")

    def work(self) -> Work:
        """As long as it waits."""
        return Work(seconds=self.seconds)


def waiting(stages: Sequence[Stage], seconds: float) -> list[Stage]:
    """The same graph of stages that wait; `stages` parents first."""
    made: dict[str, Stage] = {}
    for stage in stages:
        parents = {p.key: made[p.key] for p in stage.parents()}
        made[stage.key] = Wait(stage.key, seconds, tuple(parents.values()))
    return list(made.values())


def run(stages: Sequence[Stage], workers: int) -> float:
    """Seconds from handing out `stages` to the last one's end on so many raylets of one core, connection and the workers'
    start included; 0 workers: in this process, without Ray."""
    with tempfile.TemporaryDirectory(prefix="scaling-") as folder:
        store = Store(Path(folder) / "store")
        speeds = progress.Speeds(store.root, "cpu")
        planned = progress.plan(list(stages), store, speeds)
        if not workers:
            started = time.monotonic()
            progress.build(planned, store, replace(machine("cpu"), workers=1), speeds)
            return time.monotonic() - started
        from ray.cluster_utils import Cluster

        # no second copy of a library's threads: one core each is what is claimed
        variables = {"PERSONA_COUPLING_CACHE": folder, "OMP_NUM_THREADS": "1"}
        made = Cluster(
            initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False, "env_vars": variables}
        )
        try:
            for _ in range(workers):
                made.add_node(num_cpus=1, env_vars=variables)
            started = time.monotonic()
            cluster.build(planned, store, speeds, ClusterValues(cpus=1.0, gpus=0.0, stack=1), address=made.address)
            return time.monotonic() - started
        finally:
            made.shutdown()


def text(measured: dict[str, Any]) -> str:
    """The table, as Markdown: seconds, efficiency against one worker, and against what the graph allows."""
    lines = [
        f"Measured on {measured['device']} ({measured['made'][:10]}), {measured['stages']} stages, the fastest of "
        f"{measured['repeats']} runs of the study; in one process without Ray it takes {measured['study'][0]:.0f} s. "
        f"Waiting stages take {measured['seconds']:g} s each.",
        "",
        "| workers | study, s | speed-up | efficiency | waiting, s | best possible, s | efficiency |",
        "|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for number, workers in enumerate(WORKERS, start=1):
        study, waits, best = (measured[name][number] for name in ("study", "waiting", "possible"))
        gain = measured["study"][1] / study
        lines.append(
            f"| {workers} | {study:.0f} | {gain:.2f} | {100 * gain / workers:.0f} % | {waits:.0f} | {best:.0f} | "
            f"{100 * best / waits:.0f} % |"
        )
    return "\n".join([*lines, ""])


def main() -> None:
    """Measure, keep the numbers in docs/cluster_scaling.json and the table in docs/CLUSTER.md."""
    os.environ["OMP_NUM_THREADS"] = "1"
    experiment = notebooks.choose(["00"])[0]
    stages = notebooks.design_of(experiment, {"profile": "smoke", "seeds": [], "model": ""}).stages()
    waits = waiting(stages, SECONDS)
    cost = dict.fromkeys((stage.key for stage in waits), SECONDS)
    measured: dict[str, Any] = {
        **provenance.record("cpu"),
        "stages": len(stages),
        "seconds": SECONDS,
        "repeats": REPEATS,
    }
    measured["workers"] = [0, *WORKERS]
    runs = [[run(stages, workers) for workers in (0, *WORKERS)] for _ in range(REPEATS)]
    measured["study"] = [round(min(times), 1) for times in zip(*runs, strict=True)]
    measured["waiting"] = [0.0, *(round(run(waits, workers), 1) for workers in WORKERS)]
    measured["possible"] = [0.0, *(cluster_simulation.simulate(waits, cost, w).makespan for w in WORKERS)]
    outputs.write_json(paths.repository() / "docs" / MEASURED, measured)
    print(text(measured))
    cluster_simulation.write(cluster_simulation.PAGE, BEGINS, ENDS, text(measured))


if __name__ == "__main__":
    from persona_coupling.cluster_bench import (
        main as importable,
    )  # the workers import `Wait` from the module by its name

    importable()
