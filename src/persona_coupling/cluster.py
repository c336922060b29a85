"""A run handed to Ray: each missing stage is a task that depends on its parents' tasks.

Placement, fractions of a GPU, back-pressure and repeating what a dead worker or node was doing are Ray's; we say how much
of a card a task takes and how often it is tried again. What Ray cannot know is ours: which nodes may take part at all
(`cluster_nodes`), and that one whose disk is full is asked no more. Nothing here is part of a result; without `--cluster`
nothing of Ray is imported.
"""

from __future__ import annotations

import os
import secrets
import socket
import time
import uuid
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from filelock import FileLock

from persona_coupling import provenance, storage
from persona_coupling.cluster_nodes import Nodes, Order, Outcome, here, identity, unfit
from persona_coupling.cluster_store import Exchange, ExchangeError, TravellingStore
from persona_coupling.errors import UserError
from persona_coupling.profiles import ClusterValues
from persona_coupling.progress import Plan, Speeds, seconds_bar
from persona_coupling.side_by_side import cut
from persona_coupling.store import Lab, Stage, Store

ORPHAN = "a parent failed"
CONNECTING = 10.0  # seconds for a cluster's head to answer
TICK = 1.0  # seconds between looks at what has finished
GRACE = 120.0  # seconds without any node that can take a task before the run is given up
SAYING = 60.0  # seconds between lines on the nodes' utilisation


# ------------------------------------------------------------------------------------------- on the nodes


def _make(stages: list[Stage], order: Order, *before: Outcome) -> Outcome:
    """The task: build one stage, or several together, whose parents are made."""
    import torch

    from persona_coupling import costs
    from persona_coupling.machine import machine, tuned

    outcome = here()
    bad = {key for parent in before for key in parent.errors}
    undone = {key for parent in before for key in parent.undone}
    outcome.unfit = unfit(order)
    if outcome.unfit or any(parent.key in undone for stage in stages for parent in stage.parents()):
        outcome.undone = [stage.key for stage in stages]
        return outcome
    outcome.errors = {s.key: UserError(ORPHAN) for s in stages if any(p.key in bad for p in s.parents())}
    stages = [stage for stage in stages if stage.key not in outcome.errors]
    torch.set_num_threads(order.threads)
    started = time.monotonic()
    store = order.store()
    settings, known = machine(), costs.read() if order.measured else None
    settings = known.best(settings) if known is not None else settings
    lab = Lab(store, device=settings.device)
    outcome.found = [stage.key for stage in stages if store.has(stage)]
    with tuned(train_tokens=settings.train_tokens, sample_batch=settings.sample_batch):
        failed = store.make_together(stages, lab) if len(stages) > 1 else {}
        for stage in stages:
            error = failed.get(stage.key)
            if error is None:
                try:
                    lab.folder(stage)
                    continue
                except Exception as raised:  # noqa: BLE001 - it is the driver's to raise
                    error = raised
            cause = None if isinstance(error, ExchangeError) else storage.cause(error)
            if cause is not None and cause.errno in (*storage.FULL, *storage.READ_ONLY):
                outcome.unfit = str(error)
                outcome.undone.append(stage.key)
            else:
                outcome.errors[stage.key] = _portable(error)
    outcome.seconds = time.monotonic() - started
    return outcome


def _portable(error: Exception) -> Exception:
    """An error that can travel: libraries' own may not come back from a pickle."""
    return error if type(error).__module__.startswith("persona_coupling") else RuntimeError(f"{error!r}")


# ------------------------------------------------------------------------------------------ on the driver


def build(
    planned: Plan,
    store: Store,
    speeds: Speeds,
    values: ClusterValues,
    *,
    address: str,
    exchange: str = "",
    measured: bool = False,
) -> str:
    """Build what is missing on a cluster, under one bar with an ETA. Returns how busy the nodes were, for people.

    Raises UserError when there is no cluster or no node of it is fit, and the first error of a stage after all that does
    not rest on it is built, as `progress.build` does.
    """
    if not planned.missing:
        return ""
    local = TravellingStore(store.root, Exchange(exchange)) if exchange else store
    with connected(address) as ray, _probe(store) as probe:
        nodes = Nodes(ray, values)
        threads = max(1, int(values.cpus))
        order = Order(identity(), provenance.commit(), str(store.root), exchange, str(probe), threads, measured)
        nodes.admit(order)
        missing = planned.missing
        if isinstance(local, TravellingStore):
            missing = [stage for stage in missing if not local.exchange.has(stage)]
            wanted = {stage.key for stage in missing}
            for parent in {p.key: p for s in missing for p in s.parents() if p.key not in wanted}.values():
                if local.has(parent):
                    local.share(parent)
        _Run(ray, nodes, order, missing, speeds).finish()
        summary = nodes.text()
    if isinstance(local, TravellingStore):
        lab = Lab(local)
        for stage in planned.missing:
            if local.exchange.has(stage):
                lab.folder(stage)  # what the notebooks read, they read here
    print(f"{len(missing)} stages made on Ray:\n{summary}")
    return summary


@contextmanager
def _probe(store: Store) -> Iterator[Any]:
    """A lock that this process holds in the store, for nodes to look at."""
    path = store.root / "locks" / f"cluster-{uuid.uuid4().hex}.lock"
    with storage.explained(store.root):
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(path)
        lock.acquire(timeout=0)
    try:
        yield path
    finally:
        lock.release()
        path.unlink(missing_ok=True)


class _Run:
    """Tasks that are handed out, and what has come back."""

    def __init__(self, ray: Any, nodes: Nodes, order: Order, missing: Sequence[Stage], speeds: Speeds) -> None:
        self.ray, self.nodes, self.speeds = ray, nodes, speeds
        self.order = ray.put(order)
        self.task = ray.remote(_make)
        self.costs = {stage.key: speeds.seconds(stage) for stage in missing}
        self.groups = grouped(missing, nodes.stack, int(sum(nodes.fit().values())))
        self.refs: dict[str, Any] = {}  # of the task that makes a stage
        self.pending: dict[Any, list[Stage]] = {}
        self.failed: dict[str, BaseException] = {}
        self.made = 0

    def hand_out(self, group: list[Stage]) -> None:
        """Give a group to Ray, behind the tasks of its parents."""
        own = {stage.key for stage in group}
        parents = {p.key for s in group for p in s.parents() if p.key in self.refs and p.key not in own}
        before = list({self.refs[key] for key in sorted(parents)})
        name = f"{type(group[0]).__name__} {group[0].key}" + (f" and {len(group) - 1} more" if group[1:] else "")
        ref = self.task.options(name=name, **self.nodes.options()).remote(group, self.order, *before)
        self.refs |= dict.fromkeys(own, ref)
        self.pending[ref] = group

    def finish(self) -> None:
        """Hand out everything, wait for it, and raise the first error."""
        planned = sum(self.costs.values()) / max(1.0, sum(self.nodes.fit().values()))
        with seconds_bar(self.costs, seconds=planned, described=34) as bar:
            self.nodes.say = bar.write
            for group in self.groups:
                self.hand_out(group)
            alive = said = time.monotonic()
            while self.pending:
                ready, _ = self.ray.wait(list(self.pending), num_returns=len(self.pending), timeout=TICK)
                again = [stage for ref in ready for stage in self._take(ref, bar)]
                self._repeat(again)
                now, places = time.monotonic(), sum(self.nodes.fit().values())
                alive = now if places else alive
                if now - alive > (0 if self.nodes.refused else GRACE):
                    self.nodes.check()
                if now - said > SAYING:
                    said = now
                    bar.write(self.nodes.text())
                free = self.ray.available_resources().get(self.nodes.unit, 0.0) / self.nodes.asked[self.nodes.unit]
                bar.set_description_str(
                    f"{self.made}/{len(self.costs)}, {max(0.0, places - free):.0f} of {places:.0f} busy", refresh=False
                )
        if self.failed:
            raise min(self.failed.values(), key=lambda error: str(error) == ORPHAN)

    def _take(self, ref: Any, bar: Any) -> list[Stage]:
        """Count what came back. Returns the stages that are to be handed out again."""
        group = self.pending.pop(ref, [])
        try:
            outcome: Outcome = self.ray.get(ref)
        except Exception as error:  # noqa: BLE001 - Ray's own: it gave up repeating, or what came back cannot be read
            outcome = Outcome("", "", errors={stage.key: _dead(stage, error) for stage in group})
        if outcome.unfit:
            self.nodes.refuse(outcome.node, outcome.unfit)
        again = [stage for stage in group if stage.key in outcome.undone]
        done = [stage for stage in group if stage not in again]
        for stage in done:
            if stage.key in outcome.errors:
                self.failed[stage.key] = outcome.errors[stage.key]
                bar.write(f"{stage} failed on {outcome.name or 'the cluster'}: {outcome.errors[stage.key]}")
            elif stage.key not in outcome.found:
                self.speeds.observe(stage, outcome.seconds / len(group))
        made = [stage for stage in done if stage.key not in outcome.errors]
        self.made += len(made)
        if outcome.node:
            self.nodes.finished(outcome, len(made))
        bar.update(sum(self.costs[stage.key] for stage in done))
        return again

    def _repeat(self, again: Sequence[Stage]) -> None:
        """Hand out what an unfit node gave back, and with it all that waits for it, parents first."""
        if not again:
            return
        self.nodes.check()
        keys = {stage.key for stage in again}
        for group in self.groups:
            if any(p.key in keys for s in group for p in s.parents()):
                keys |= {stage.key for stage in group}
        for ref in [ref for ref, group in self.pending.items() if any(stage.key in keys for stage in group)]:
            del self.pending[ref]
        for group in self.groups:
            left = [stage for stage in group if stage.key in keys and stage.key not in self.failed]
            if left:
                self.hand_out(left)


def _dead(stage: Stage, error: Exception) -> Exception:
    line = str(error).strip().splitlines()[0]
    return UserError(
        f"{stage} was not made: {type(error).__name__}: {line} Finished cells are kept; run again to go on, and see Ray's "
        "logs (`ray logs`) if it comes back."
    )


def look(address: str) -> Any:
    """Ray, once it is installed here and something listens at an address that is given. Raises UserError with the remedy:
    Ray itself would try for minutes."""
    try:
        import ray
    except ImportError as error:
        raise UserError(
            "--cluster needs Ray: `nox -s reproduce -- --cluster ...` installs it, or `pip install -c constraints.txt "
            "-e .[cluster]`."
        ) from error
    if address.startswith("ray://"):
        raise UserError("--cluster ray://: start the run on a node of the cluster (docs/CLUSTER.md), with `auto`.")
    if address not in ("auto", "local"):
        host, _, port = address.rpartition(":")
        try:
            socket.create_connection((host, int(port)), CONNECTING).close()
        except (OSError, ValueError) as error:
            raise UserError(
                f"--cluster {address}: nothing answers there ({error}). Give host:port of the cluster's head, `auto` on one "
                "of its nodes, or `local` for this machine alone (docs/CLUSTER.md)."
            ) from error
    return ray


@contextmanager
def connected(address: str) -> Iterator[Any]:
    """Ray, connected to a cluster (`auto`, `host:port`) or to one that is started on this machine (`local`); left at the
    end, which ends whatever of ours still runs there. Raises UserError when there is none."""
    ray = look(address)
    from persona_coupling.cli import SETTLED

    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    if (
        address == "local"
    ):  # Ray asks for a token by itself, and would leave one in the user's home for all later clusters
        os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
    # a task that asks for no GPU sees none, as if `num_gpus=0` were meant
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "1")
    try:
        ray.init(
            address=address,
            # an image without git knows its commit from us: its code is compared with ours, byte by byte
            runtime_env={"env_vars": {**SETTLED, "PERSONA_COUPLING_COMMIT": provenance.commit()}},
            log_to_driver=False,
            logging_level="ERROR",
            **({"include_dashboard": False} if address == "local" else {}),
        )
    except (ConnectionError, RuntimeError, ValueError, ray.exceptions.RayError) as error:
        raise UserError(
            f"--cluster {address}: {str(error).strip().splitlines()[0]} Start Ray on this node (docs/CLUSTER.md), give "
            "the head's host:port, or `local` for this machine alone."
        ) from error
    try:
        yield ray
    finally:
        ray.shutdown()


def grouped(missing: Sequence[Stage], stack: int, places: int) -> list[list[Stage]]:
    """The tasks, parents first: stages that can be trained together in groups of up to `stack`, others alone.

    A group holds stages with as many such stages above them, so that none waits for its own group; and no more than
    spreads all of its kind over the `places` that the cluster has.
    """
    wanted = {stage.key for stage in missing}
    level: dict[str, int] = {}
    mates: dict[Any, list[Stage]] = defaultdict(list)
    for stage in missing:
        joined = stack > 1 and stage.stack_key() is not None
        level[stage.key] = max([level[p.key] for p in stage.parents() if p.key in wanted], default=0) + joined
        mates[(level[stage.key], stage.stack_key()) if joined else stage.key].append(stage)
    groups = []
    for together in mates.values():
        size = max(1, min(stack, -(-len(together) // places)))
        groups += cut(together, size)
    return _parents_first(groups)


def _parents_first(groups: list[list[Stage]]) -> list[list[Stage]]:
    home = {stage.key: number for number, group in enumerate(groups) for stage in group}
    ordered: dict[int, list[Stage]] = {}

    def visit(number: int) -> None:
        if number not in ordered:
            for parent in {home[p.key] for s in groups[number] for p in s.parents() if p.key in home}:
                visit(parent)
            ordered[number] = groups[number]

    for number in range(len(groups)):
        visit(number)
    return list(ordered.values())
