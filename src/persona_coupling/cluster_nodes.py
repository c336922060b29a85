"""The machines of a Ray cluster: which may take part in a run, and how busy each was.

A node takes part if it has the driver's libraries and code, byte by byte, and the driver's store: either its very folder,
whose locks hold there, or the exchange. Others are refused by name with the reason, and the run goes on without them; a
run with none left is given up.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from persona_coupling import paths, provenance
from persona_coupling.cluster_store import Exchange, TravellingStore
from persona_coupling.errors import UserError
from persona_coupling.profiles import ClusterValues
from persona_coupling.store import Store, sha256_of

RETRIES = 3  # times that Ray repeats a task whose worker or node died; more hides a stage that kills its worker
PATIENCE = 300.0  # seconds for a node to import the package and answer


@dataclass(frozen=True)
class Order:
    """What every task is told: the driver's libraries and code, and where artifacts lie."""

    identity: dict[str, str]
    commit: str
    root: str  # of the folder that all share; where there is an exchange each node uses its own
    exchange: str
    probe: str  # a lock in that folder which the driver holds
    threads: int
    measured: bool = False  # whether the batches that measured best for the large model are to be used (`costs`)

    def store(self) -> Store:
        """The store of the process that asks."""
        return TravellingStore(paths.artifacts(), Exchange(self.exchange)) if self.exchange else Store(Path(self.root))


@dataclass
class Outcome:
    """What a task returns: where and how long it ran, the errors of its stages by key, the keys of those that are to be
    handed out again and of those that were there before, and why its node is unfit."""

    node: str
    name: str
    seconds: float = 0.0
    errors: dict[str, Exception] = field(default_factory=dict)
    undone: list[str] = field(default_factory=list)
    found: list[str] = field(default_factory=list)
    unfit: str = ""


@cache
def identity() -> dict[str, str]:
    """What must be the same everywhere: versions of libraries, without the build for a device (`+cpu`), and the bytes of
    all code, values and material of the package."""
    own = {name: version.partition("+")[0] for name, version in provenance.versions().items()}
    files = [*paths.PACKAGE.rglob("*.py"), *paths.PACKAGE.rglob("*.toml"), *paths.MATERIAL.rglob("*")]
    for path in sorted({file for file in files if file.is_file()}):
        own[path.relative_to(paths.PACKAGE.parent).as_posix()] = sha256_of(path)[:12]
    return own


def difference(order: Order) -> str:
    """In what this process differs from the driver, as the end of a sentence; empty if in nothing."""
    here = identity()
    other = [name for name in {**order.identity, **here} if here.get(name) != order.identity.get(name)]
    if not other:
        return ""
    listed = [f"{n} {here.get(n, 'absent')}, the driver {order.identity.get(n, 'absent')}" for n in other[:3]]
    more = f", and {len(other) - 3} more" if len(other) > 3 else ""
    code = f" (commit {provenance.commit()}, the driver's {order.commit})" if any("/" in n for n in other) else ""
    return f"has {'; '.join(listed)}{more}{code}. Install there what the driver has"


def here() -> Outcome:
    """An outcome that names the node of this process."""
    import ray

    node = ray.get_runtime_context().get_node_id()
    return Outcome(node, f"{ray.util.get_node_ip_address()} ({node[:6]})")


_UNFIT: dict[str, str] = {}  # in a worker: what was found for a run, by its probe


def unfit(order: Order) -> str:
    """Why this process may not take part, as the end of a sentence; empty if it may. Looked at once for each run: a node
    may join at any time."""
    if order.probe not in _UNFIT:
        _UNFIT[order.probe] = difference(order) or _reaches(order)
    return _UNFIT[order.probe]


def _admit(order: Order) -> Outcome:
    """The task that a node answers before anything is built."""
    outcome = here()
    outcome.unfit = unfit(order)
    return outcome


def _reaches(order: Order) -> str:
    """Why this process cannot share artifacts with the driver; empty if it can."""
    if not order.exchange:
        return _shares(Path(order.probe))
    try:
        Exchange(order.exchange).check()
    except UserError as error:
        return f"cannot use the exchange: {error}"
    return ""


def _shares(probe: Path) -> str:
    """Whether the folder of `probe`, a lock that the driver holds, is the driver's and locks hold across machines."""
    if not probe.is_file():
        return (
            f"does not see the store {probe.parents[1]}. Set PERSONA_COUPLING_CACHE to a folder that all nodes mount "
            "under the same path, or give an fsspec URL with --exchange"
        )
    try:
        FileLock(probe).acquire(timeout=0)
    except Timeout:
        return ""
    except (OSError, NotImplementedError) as error:
        return f"cannot lock files in {probe.parent} ({error}). Mount it with locks, or give --exchange URL"
    return f"is not held by locks in {probe.parent}. Mount it with locks across nodes, or give --exchange URL"


class Nodes:
    """The machines of a cluster, as far as they can take a task: who is refused and why, and how busy each has been."""

    def __init__(self, ray: Any, values: ClusterValues, say: Callable[[str], None] = print) -> None:
        self.ray, self.say = ray, say
        if values.cpus < 0 or values.gpus < 0 or values.stack < 1 or (values.gpus > 1 and values.gpus % 1):
            raise UserError(f"the profile's [cluster] asks for {values}: cpus and gpus above 0, gpus above 1 whole.")
        cards = any(node["Resources"].get("GPU") for node in ray.nodes() if node["Alive"])
        self.asked = {"CPU": values.cpus, "GPU": values.gpus if cards else 0.0}
        self.unit = "GPU" if self.asked["GPU"] else "CPU"
        self.stack = values.stack if self.asked["GPU"] else 1
        self.refused: dict[str, str] = {}  # reasons by node
        self.made: dict[str, int] = defaultdict(int)
        self.busy: dict[str, float] = defaultdict(float)  # seconds times the share of the unit
        self.names: dict[str, str] = {}
        self.capacity: dict[str, float] = {}
        self.started = time.monotonic()

    def fit(self) -> dict[str, float]:
        """Nodes that are alive, not refused and large enough for a task, each with how many it takes at a time."""
        found = {}
        for node in self.ray.nodes():
            places = [node["Resources"].get(name, 0.0) / n for name, n in self.asked.items() if n]
            if node["Alive"] and node["NodeID"] not in self.refused and min(places) >= 1:
                found[node["NodeID"]] = float(int(min(places)))
                self.capacity[node["NodeID"]] = node["Resources"].get(self.unit, 0.0)
                self.names[node["NodeID"]] = f"{node['NodeManagerAddress']} ({node['NodeID'][:6]})"
        return found

    def refuse(self, node: str, reason: str) -> None:
        """Ask a node no more, and say so."""
        if node not in self.refused:
            self.refused[node] = reason
            self.say(f"node {self.names.get(node, node[:6])} is refused: {reason.rstrip('.')}.")

    def options(self) -> dict[str, Any]:
        """What Ray is told of every task."""
        chosen: dict[str, Any] = {
            "num_cpus": self.asked["CPU"],
            "max_retries": RETRIES,
            "scheduling_strategy": "DEFAULT",
        }
        if self.asked["GPU"]:
            chosen["num_gpus"] = self.asked["GPU"]
        if self.refused:
            chosen["label_selector"] = {"ray.io/node-id": f"!in({','.join(sorted(self.refused))})"}
        return chosen

    def admit(self, order: Order) -> None:
        """Ask every node whether it is fit. Raises UserError, naming all reasons, if none is."""
        ask = self.ray.remote(_admit)
        asked = {}
        for node in self.fit():
            place = ask.options(num_cpus=0, max_retries=1, label_selector={"ray.io/node-id": node})
            asked[node] = place.remote(order)
        deadline = time.monotonic() + PATIENCE
        for node, ref in asked.items():
            try:
                reason = self.ray.get(ref, timeout=max(1.0, deadline - time.monotonic())).unfit
            except Exception as error:  # noqa: BLE001 - whatever keeps a node from answering
                first = [line for line in str(error).strip().splitlines() if line.strip()] or [repr(error)]
                reason = f"did not answer ({first[-1].strip()}). Install the same checkout there"
            if reason:
                self.refuse(node, reason)
        self.check()

    def check(self) -> None:
        """Raise UserError if no node is left."""
        if not self.fit():
            wanted = " and ".join(f"{n:g} {name}" for name, n in self.asked.items() if n)
            reasons = "".join(f"\n- {self.names.get(n, n)}: {why.rstrip('.')}." for n, why in self.refused.items())
            raise UserError(
                f"The cluster has no node that can take a task ({wanted}).{reasons} Finished cells are kept."
            )

    def finished(self, outcome: Outcome, count: int) -> None:
        """Count what a node did."""
        self.names[outcome.node] = outcome.name
        self.made[outcome.node] += count
        self.busy[outcome.node] += outcome.seconds * self.asked[self.unit]

    def text(self) -> str:
        """A line per node: what it made, and the share of the time since the start in which its cores or cards were busy
        with tasks that have ended."""
        elapsed = max(1e-9, time.monotonic() - self.started)
        lines = []
        for node, name in sorted(self.names.items(), key=lambda item: item[1]):
            share = self.busy[node] / (elapsed * (self.capacity.get(node) or 1.0))
            gone = " (refused)" if node in self.refused else ""
            lines.append(
                f"  {name}  {self.made[node]:>4} stages, {100 * min(1.0, share):3.0f} % of its {self.unit}s{gone}"
            )
        return "\n".join(lines)
