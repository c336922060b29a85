"""What a run needs before it starts: a model that fits the design, memory, disk, and the hub where something comes from it.

Nothing is computed here and no weight is read. `check` returns what was found, in lines to print, and what stands in the
way, each as one sentence with its remedy.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from persona_coupling import card, hub, memory, models, personas, progress, train
from persona_coupling.card import Card
from persona_coupling.errors import UserError
from persona_coupling.machine import Machine

if TYPE_CHECKING:
    from persona_coupling.profiles import ModelValues, Profile
    from persona_coupling.store import Stage, Store

GIGABYTE = 1e9
WORDS = 1.6  # tokens of a word, generously
AROUND = 120  # tokens of a system prompt, a question, and what the template writes around them


@dataclass
class Found:
    """Lines to print, and what stands in the way of a run."""

    lines: list[str] = field(default_factory=list)
    obstacles: list[str] = field(default_factory=list)
    card: Card | None = None


def check(profile: Profile, source: Stage, missing: Sequence[Stage], store: Store, machine: Machine | None) -> Found:
    """Look at everything that a run of the `missing` stages needs; without a machine, at all but its memory. Raises
    UserError for a model that does not fit the study: then nothing else matters."""
    found = Found()
    _check_hub(found, profile, source, missing, store)
    folder = card.folder_of(source, store)
    if folder is not None:
        found.card = card.read(folder)
        found.lines.append(found.card.text())
        if profile.corpora.benign == "ultrachat" and not found.card.chat.turns:
            found.obstacles.append(
                f"{profile.model.name}'s chat template rewrites earlier turns, and UltraChat's conversations have several: "
                "choose a profile with authored corpora, or another model."
            )
    else:
        found.lines.append("  (the model's card is printed once its files are here)")
    if machine is None:
        found.lines.append("  memory        of the nodes that compute is not looked at from here")
    else:
        _check_memory(found, profile, missing, machine)
    return found


# ------------------------------------------------------------------------------------------------ hub and disk


def _check_hub(found: Found, profile: Profile, source: Stage, missing: Sequence[Stage], store: Store) -> None:
    megabytes, unreached = 0.0, False
    if isinstance(source, models.HubModel) and missing:
        if hub.cached(source.repository, source.revision):
            found.lines.append(f"  hub           {source.repository} is in the cache of this machine")
        else:
            try:
                snapshot = hub.look(source.repository, source.revision, models.SAFE_FILES)
                megabytes = snapshot.megabytes
                hub.describe(source)
                found.lines.append(f"  hub           {source.repository}: {megabytes / 1000:.1f} GB to fetch")
            except UserError as error:
                unreached = True
                megabytes = 2.0 * profile.model.parameters / 2**20
                found.obstacles.append(str(error))
    rows = next((stage for stage in missing if type(stage).__name__ == "UltraChat"), None)
    if rows is not None and not unreached:
        try:
            hub.look(rows.repository, rows.revision, ("*",), "dataset")  # type: ignore[attr-defined]
        except UserError as error:
            found.obstacles.append(str(error))
    if megabytes:
        _check_disk(found, megabytes, missing, store, progress.parameters_ratio(profile.model))


def _check_disk(found: Found, megabytes: float, missing: Sequence[Stage], store: Store, ratio: float) -> None:
    """The hub's cache must hold the download; on one disk with the store, the artifacts too."""
    place, own = (_existing(path) for path in (hub.cache_root(), store.root))
    shared = place.stat().st_dev == own.stat().st_dev
    needed = megabytes + (sum(progress.megabytes_of(stage, ratio) for stage in missing) if shared else 0.0)
    free = shutil.disk_usage(place).free / 2**20
    found.lines.append(
        f"  disk          {needed / 1000:.1f} GB on the disk of {place}"
        f"{', artifacts included' if shared else ''}; {free / 1000:.1f} GB are free"
    )
    if free < 1.1 * needed:
        found.obstacles.append(
            f"The download needs about {needed / 1000:.1f} GB{' with the artifacts' if shared else ''}, and the disk of "
            f"{place} has {free / 1000:.1f} GB free: free some space, or set HF_HOME to a folder on a larger disk."
        )


def _existing(path: Path) -> Path:
    return next(parent for parent in (path, *path.parents) if parent.exists())


# ------------------------------------------------------------------------------------------------ memory


def _check_memory(found: Found, profile: Profile, missing: Sequence[Stage], machine: Machine) -> None:
    shape, whence = _shape(found.card, profile.model)
    if shape is None:
        found.lines.append("  memory        cannot be estimated before the model's configuration is here")
        return
    load = load_of(profile, missing, machine)
    plain = found.card is None or not found.card.architecture.departs
    needs = memory.needs(shape, load, machine, memory.capacity(machine.device), plain=plain)
    free = memory.free(machine.device)
    where = "GPU" if machine.device.startswith("cuda") else "RAM"
    has = f"{free / GIGABYTE:.0f} GB of {where} are free" if free < float("inf") else f"free {where} unknown"
    found.lines.append(f"  memory        estimated {whence}; {has}")
    found.lines += [f"    {need.bytes / GIGABYTE:6.1f} GB    {need.what} ({need.how})" for need in needs]
    if not missing:
        return
    together = machine.workers * max((need.bytes for need in needs), default=0.0)
    if machine.workers > 1 and where == "RAM" and together > free:
        found.lines.append(
            f"                {machine.workers} processes may need {together / GIGABYTE:.0f} GB together, and {has}: "
            "`--workers 1` takes one"
        )
    for need in needs:
        if need.bytes > free:
            found.obstacles.append(
                f"{need.what[0].upper()}{need.what[1:]} needs about {need.bytes / GIGABYTE:.0f} GB, and {has}: run on a "
                "larger device, choose a smaller model with `--model`, or leave out with `--only` the experiments that "
                "ask for it."
            )


def _shape(known: Card | None, declared: ModelValues) -> tuple[memory.Shape | None, str]:
    if known is not None:
        return known.architecture.shape, "from the model's configuration"
    if declared.parameters and declared.layers:
        shape = memory.Shape(
            layers=declared.layers,
            width=declared.width,
            inner=declared.inner,
            vocabulary=declared.vocabulary,
            key_width=declared.key_width,
            parameters=declared.parameters,
        )
        size = card.count(declared.parameters)
        return shape, f"from the {size} parameters and the shape that the profile declares, not from the model's own"
    return None, ""


def load_of(profile: Profile, missing: Sequence[Stage], machine: Machine) -> memory.Load:
    """What a run asks of the model at once. Where a corpus's lengths are not known, a batch is taken to be full."""
    asked = profile.evaluation
    prompts = len(personas.personas()) * (asked.everyday + asked.values)
    words = round(WORDS * profile.corpora.maximum_words)
    longest = AROUND + max(words, profile.coupling.max_new_tokens)
    batch = max(values.batch for values in (profile.sft, profile.prebaked, profile.scratch))
    trained = train.micro_batch(batch, longest, machine.train_tokens) * longest
    if profile.corpora.benign == "ultrachat":
        trained = max(trained, machine.train_tokens)
    tuned = [stage.training.lora for stage in missing if stage.kind == "change" and hasattr(stage, "training")]
    return memory.Load(
        rows=min(machine.sample_batch, prompts * asked.samples),
        prompts=min(machine.sample_batch, prompts),
        prompt_tokens=AROUND,
        answer_tokens=max(asked.max_new_tokens, profile.coupling.max_new_tokens),
        trained_tokens=trained,
        rank=max([profile.lora.rank, *(lora.rank for lora in tuned if lora is not None)]),
        lora=any(lora is not None for lora in tuned) or not missing,
        full=any(lora is None for lora in tuned),
    )
