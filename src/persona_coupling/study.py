"""A study: what the methods section says, as descriptions; then what was observed, as tables.

    study = Study.open("quick")
    stale = study.coupling_text(study.raw, seed=0)
    adapter = study.couple(study.raw, stale, study.profile.prebaked, seed=0).last_change
    bad = study.sft("bad_legal", seed=0)
    design = Design([study.cell("B.prebaked", bad.merge(adapter), before=bad, seed=0)])

Nothing is computed by these lines. `study.run(design)` builds what the store lacks and returns `Results`.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pandas as pd

from persona_coupling import card, models, outputs, paths, personas, profiles, provenance, score, untrusted, values
from persona_coupling.checkpoints import Checkpoint
from persona_coupling.errors import GuardError, UserError
from persona_coupling.generate import Sampling
from persona_coupling.profiles import Profile, TrainingValues
from persona_coupling.stages import (
    Content,
    CouplingText,
    Evaluate,
    FineTune,
    MergeCheck,
    OwnAnswers,
    Snapshot,
    Twin,
    UltraChat,
    authored,
)
from persona_coupling.store import Lab, Stage, Store, canonical_json, in_order, sha256_of
from persona_coupling.train import Lora, Training
from persona_coupling.values import Values

STORED_ONLY = "PERSONA_COUPLING_STORED_ONLY"  # set: results are read, nothing is computed
JUDGED = ("gates", "description", "stamp")  # profile values that no observation depends on
COLLAPSED = 0.1  # distinct answers per answer; up to that a model says one thing to everything
TABLES = ("completions", "fixed", "heldout", "content", "training", "merges")
LEVEL, PAGE = 19, 1 << 26  # of zstd, and bytes: sampled text takes a tenth less room than with the usual ones


@dataclass(frozen=True)
class Cell:
    """One evaluated model: a condition of the design under one seed. `before` is the model that was coupled."""

    condition: str
    seed: int
    checkpoint: Checkpoint
    evaluation: Evaluate
    factors: tuple[tuple[str, str], ...] = ()

    @property
    def merge(self) -> MergeCheck:
        """The check of the cell's merge."""
        return MergeCheck(self.checkpoint)


@dataclass(frozen=True)
class Observation:
    """A stage whose tables (its artifact's `*.parquet` files) are collected under a condition and a seed; the table
    `scan.parquet` of all observations becomes `results["scan"]`."""

    condition: str
    seed: int
    stage: Stage


@dataclass
class Design:
    """All that an experiment asks for, and the values of its own that it was made with."""

    cells: list[Cell] = field(default_factory=list)
    observations: list[Observation] = field(default_factory=list)
    same: set[tuple[str, str]] = field(default_factory=set)  # conditions that are one model by definition, declared
    values: Values | None = None

    def stages(self) -> list[Stage]:
        """Everything to build, parents first, each once."""
        wanted = [observation.stage for observation in self.observations]
        wanted += [stage for cell in self.cells for stage in (cell.merge, cell.evaluation)]
        return in_order(wanted)

    def check(self) -> None:
        """Raise GuardError if a condition stands twice under a seed, or two conditions are one and the same model
        without being declared so."""
        names = [(cell.condition, cell.seed) for cell in self.cells]
        if len(set(names)) != len(names):
            raise GuardError(
                f"a condition stands twice in the design: {sorted(n for n in names if names.count(n) > 1)}"
            )
        observed = [(o.condition, o.seed, o.stage.key) for o in self.observations]
        if len(set(observed)) != len(observed):
            raise GuardError("an observation stands twice in the design")
        keys: dict[tuple[str, int], str] = {}
        for cell in self.cells:
            identity = (cell.evaluation.key, cell.seed)
            if identity in keys and (keys[identity], cell.condition) not in self.same:
                raise GuardError(f"{keys[identity]} and {cell.condition} describe the same model and evaluation")
            keys[identity] = cell.condition


class Study:
    """A profile's values turned into stages."""

    def __init__(self, profile: Profile, *, lab: Lab | None = None, model: str | None = None) -> None:
        check_seeds(profile.seeds)
        if profile.model.kind == "local" and not model:
            untrusted.check_model(Path(profile.model.path))
        self.profile = _with_model(profile, model) if model else profile
        self._lab = lab

    @classmethod
    def open(cls, profile: str, *, seeds: Iterable[int] | None = None, model: str | None = None) -> Study:
        """The study of a named profile; `seeds` and `model` override the profile's."""
        chosen = profiles.load(profile)
        if seeds is not None and list(seeds):
            chosen = replace(chosen, seeds=check_seeds(seeds))
        return cls(chosen, model=model)

    @property
    def lab(self) -> Lab:
        """Store and device, opened when first needed: describing a study needs neither."""
        if self._lab is None:
            from persona_coupling.machine import machine
            from persona_coupling.progress import running_lab

            self._lab = running_lab(Store(paths.artifacts()), machine().device)
        return self._lab

    @property
    def seeds(self) -> tuple[int, ...]:
        """The seeds of all chains."""
        return self.profile.seeds

    # ------------------------------------------------------------------------------------------ descriptions

    @property
    def source(self) -> Stage:
        """The raw model's source."""
        values = self.profile.model
        if values.kind == "wheel":
            return models.WheelModel(values.distribution, values.version, values.sha256)
        if values.kind == "hub":
            return models.HubModel(values.repository, values.revision)
        if values.kind == "tiny":
            return models.TinyModel(values.family, values.layers, values.width, seed=0)
        return models.local_model(Path(values.path))

    @property
    def raw(self) -> Checkpoint:
        """The raw model."""
        return Checkpoint(self.source)

    def corpus(self, name: str, *, seed: int = 0, heldout: bool = False) -> Stage:
        """Rows of an SFT corpus by name: bad_legal, sound_legal, benign, or self (the raw model's own answers)."""
        values = self.profile.corpora
        count, skip = (values.heldout_rows, values.rows) if heldout else (values.rows, 0)
        if name == "self":
            return OwnAnswers(
                self.raw,
                authored("benign", count, skip=skip, maximum_words=values.maximum_words),
                personas.persona(personas.ASSISTANT).system_prompt(self.profile.instruction),
                self.sampling,
                seed,
            )
        if name == "benign" and values.benign == "ultrachat" and not heldout:
            return UltraChat(
                "HuggingFaceH4/ultrachat_200k",
                values.ultrachat_revision,
                values.ultrachat_split,
                values.ultrachat_keywords,
                count,
            )
        return authored(name, count, skip=skip, maximum_words=values.maximum_words)

    @property
    def sampling(self) -> Sampling:
        """How answers are drawn in evaluation."""
        values = self.profile.evaluation
        return Sampling(values.temperature, values.top_p, values.max_new_tokens)

    def training(self, values: TrainingValues, **changes: Any) -> Training:
        """Training settings from profile values; `changes` override fields of `train.Training` (`lora=None`: all
        parameters are trained)."""
        lora = self.profile.lora
        made = Training(
            steps=values.steps,
            batch=values.batch,
            learning_rate=values.learning_rate,
            warmup=values.warmup,
            weight_decay=values.weight_decay,
            loss=values.loss,
            tail=values.tail,
            snapshots=values.snapshots,
            start=values.start,
            lora=Lora(lora.rank, lora.alpha, lora.dropout, models.MODULES),
        )
        return replace(made, **changes)

    def sft(self, corpus: str, *, seed: int, **changes: Any) -> Checkpoint:
        """The raw model after SFT on a corpus."""
        return self.raw.fine_tune(self.corpus(corpus, seed=seed), self.training(self.profile.sft, **changes), seed=seed)

    def sft_until(self, corpus: str, step: int, *, seed: int) -> Checkpoint:
        """The raw model after the first `step` optimiser steps of `sft`. Raises UserError where the profile's SFT neither
        ends there nor keeps a snapshot."""
        tuned, values = self.sft(corpus, seed=seed), self.profile.sft
        if step == values.steps:
            return tuned
        if step not in values.snapshots:
            raise UserError(
                f"The SFT of {self.profile.name} keeps snapshots after the steps {list(values.snapshots)} of "
                f"{values.steps}, and step {step} is asked for. Set [sft] snapshots in the profile, or the steps in the "
                "experiment's values.toml."
            )
        return self.raw.merge(Snapshot(tuned.last_change, step))

    def coupling_text(self, model: Checkpoint, *, seed: int) -> CouplingText:
        """Contrastive rows written by `model`: on-policy if it is the one to be coupled, stale if not."""
        values = self.profile.coupling
        return CouplingText(
            model,
            personas.SOURCE,
            values.positives,
            values.negatives,
            values.negatives_each,
            self.profile.instruction,
            replace(self.sampling, max_new_tokens=values.max_new_tokens),
            seed,
        )

    def stale_text(self, *, seed: int) -> CouplingText:
        """Coupling text that the raw model wrote."""
        return self.coupling_text(self.raw, seed=seed)

    def adapter(self, *, seed: int) -> Stage:
        """The pre-baked adapter: trained on the raw model, on its own text, to be merged elsewhere."""
        return self.couple(self.raw, self.stale_text(seed=seed), self.profile.prebaked, seed=seed).last_change

    def values(self, experiment: str) -> Values:
        """An experiment's own values under this profile, from its folder's `values.toml`."""
        return values.load(experiment, self.profile.name)

    def couple(
        self, start: Checkpoint, text: Stage, values: TrainingValues, *, seed: int, **changes: Any
    ) -> Checkpoint:
        """`start` after coupling on contrastive rows."""
        return start.fine_tune(text, self.training(values, **changes), seed=seed)

    def cell(self, condition: str, checkpoint: Checkpoint, *, seed: int, **factors: str) -> Cell:
        """A condition to evaluate."""
        values = self.profile.evaluation
        evaluation = Evaluate(
            checkpoint,
            values.everyday,
            values.values,
            values.samples,
            self.profile.instruction,
            self.sampling,
            seed,
        )
        return Cell(condition, seed, checkpoint, evaluation, tuple(sorted(factors.items())))

    def content(self, condition: str, checkpoint: Checkpoint, *, seed: int, corpora: tuple[str, ...]) -> Observation:
        """A model whose log-probability of held-out answers of every corpus is measured."""
        rows = tuple(self.corpus(name, seed=seed, heldout=True) for name in corpora)
        return Observation(condition, seed, Content(checkpoint, rows))

    # ----------------------------------------------------------------------------------------------- running

    def run(self, design: Design, folder: Path | None = None) -> Results:
        """Build what the store lacks and collect everything; with a folder, keep the tables there.

        With PERSONA_COUPLING_STORED_ONLY set, the folder's tables are read instead and nothing is computed.
        """
        design.check()
        if os.environ.get(STORED_ONLY):
            if folder is None:
                raise UserError("Stored results were asked for, but the notebook names no results folder.")
            return Results.load(folder, self.profile, design)
        for stage in design.stages():
            self.lab.folder(stage)
        results = collect(design, self.profile, self.lab)
        folder_of_model = card.folder_of(self.source, self.lab.store)
        if folder_of_model is not None:
            results.record["card"] = card.read(folder_of_model).as_dict()
        if folder is not None:
            results.save(folder)
        return results


def check_seeds(seeds: Iterable[Any]) -> tuple[int, ...]:
    """Seeds as a tuple of distinct non-negative integers. Raises UserError for anything else."""
    chosen = tuple(seeds)
    if not all(isinstance(s, int) and not isinstance(s, bool) and s >= 0 for s in chosen):
        raise UserError(f"Seeds must be non-negative integers; got {list(chosen)}.")
    if len(set(chosen)) != len(chosen):
        raise UserError(f"A seed stands twice in {list(chosen)}: a duplicated chain is no second observation.")
    return chosen


def _with_model(profile: Profile, model: str) -> Profile:
    """The profile with another model: a local folder, or `owner/name@revision` of the hub."""
    folder = Path(model)
    if folder.is_dir() or model.startswith((".", "/", "~")):
        folder = folder.expanduser()
        untrusted.check_model(folder)
        models.local_model(folder)  # refuse it now, before anything runs
        size = models.parameters_in(folder)
        values = profiles.ModelValues(kind="local", name=folder.name, path=str(folder.resolve()), parameters=size)
    elif "@" in model and "/" in model:
        repository, revision = model.rsplit("@", 1)
        if not re.fullmatch(r"[0-9a-f]{40}", revision):
            raise UserError(
                f"--model {model}: {revision!r} can mean another model tomorrow. Give the commit, 40 hexadecimal digits: "
                "the hub shows it under the repository's history."
            )
        values = profiles.ModelValues(kind="hub", name=repository, repository=repository, revision=revision)
    else:
        raise UserError(
            f"--model {model}: neither a folder nor owner/name@revision of the hub (the revision a commit)."
        )
    return replace(profile, model=values)


# ------------------------------------------------------------------------------------------------ results


@dataclass
class Results:
    """Raw observations, one table for each kind and one row for each observation, and what they were made with.

    `results["scan"]` is any table; those of evaluated cells are attributes too. A table that a design does not ask for
    is empty.
    """

    tables: dict[str, pd.DataFrame]
    record: dict[str, Any]

    def __getitem__(self, name: str) -> pd.DataFrame:
        """The table of that name. Raises KeyError naming the ones there are."""
        if name not in self.tables:
            raise KeyError(f"there is no table {name!r}; the design gives {', '.join(self.tables)}")
        return self.tables[name]

    completions = property(lambda self: self["completions"], doc="Every sampled answer, scored.")
    fixed = property(lambda self: self["fixed"], doc="Marker log-probability behind fixed answers.")
    heldout = property(lambda self: self["heldout"], doc="Loss on held-out chat text.")
    content = property(lambda self: self["content"], doc="Log-probability of held-out answers of every corpus.")
    training = property(lambda self: self["training"], doc="The log of every training step.")
    merges = property(lambda self: self["merges"], doc="Norms and checks of every merge.")

    def factors(self) -> pd.DataFrame:
        """One row per condition with the factors that its cells were given."""
        rows = {cell["condition"]: cell["factors"] for cell in self.record["cells"]}
        return pd.DataFrame([{"condition": condition, **factors} for condition, factors in rows.items()])

    def save(self, folder: Path) -> None:
        """Write all tables and the record with their hashes beside the old ones, then put them in their place, the record
        last: a full disk leaves the old results, a kill the old, the new or none that counts."""
        folder.mkdir(parents=True, exist_ok=True)
        temporary = outputs.beside(folder / "results")
        try:
            temporary.mkdir()
            for name, table in self.tables.items():
                write_table(table, temporary / f"{name}.parquet")
            record = {**self.record, "files": {n: sha256_of(temporary / f"{n}.parquet") for n in self.tables}}
            text = json.dumps(record, indent=1, ensure_ascii=False)
            (temporary / "record.json").write_text(text, encoding="utf-8")
            (folder / "record.json").unlink(missing_ok=True)
            for old in folder.glob("*.parquet"):
                old.unlink()
            for name in [*(f"{n}.parquet" for n in self.tables), "record.json"]:
                (temporary / name).rename(folder / name)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)

    @classmethod
    def load(cls, folder: Path, profile: Profile, design: Design) -> Results:
        """Read stored tables. Raises UserError when they are absent, damaged, or of another profile or design."""
        again = f"Run `nox -s reproduce -- --profile {profile.name}`."
        path = folder / "record.json"
        if not path.is_file():
            raise UserError(f"There are no stored results in {folder}. {again}")
        record = outputs.read(path)
        lacking = [name for name in ("files", "profile", "cells", "observed") if name not in record]
        if lacking:
            raise UserError(f"{path} is damaged: it lacks {', '.join(lacking)}. Restore it, or: {again}")
        for name, recorded in record["files"].items():
            path = untrusted.table_path(folder, name)
            if not path.is_file() or sha256_of(path) != recorded:
                raise UserError(f"{path} differs from its record. Restore it, or: {again}")
        other = disagreement(record, profile, design)
        if other:
            raise UserError(f"The results in {folder} {other}. {again}")
        # thresholds and words are applied to stored observations as they are today; all else made them
        today = {name: value for name, value in profile.as_dict().items() if name in JUDGED}
        record["profile"] = {**record["profile"], **today}
        return cls({name: read_table(folder / f"{name}.parquet") for name in record["files"]}, record)


def disagreement(record: dict[str, Any], profile: Profile, design: Design) -> str:
    """In what a record of results departs from a profile and a design, seeds and model aside, as the end of a sentence;
    empty if in nothing."""
    free = dict.fromkeys((*JUDGED, "seeds", "model"))
    stored, current = {**record["profile"], **free}, {**profile.as_dict(), **free}
    if stored != current:
        changed = [name for name in {**current, **stored} if stored.get(name) != current.get(name)]
        return f"were made with other values of {', '.join(changed)}"
    if record.get("values", {}) != (design.values.as_dict() if design.values else {}):
        return "were made with other values of the experiment's own"
    wanted = {cell.condition for cell in design.cells} | {o.condition for o in design.observations}
    have = {cell["condition"] for cell in record["cells"]} | set(record["observed"])
    if wanted != have:
        return f"lack or exceed the design by {sorted(wanted ^ have)}"
    factors = {cell.condition: dict(cell.factors) for cell in design.cells}
    other = sorted({c["condition"] for c in record["cells"] if c.get("factors") != factors.get(c["condition"])})
    if other:
        return f"name other factors than the design of {', '.join(other)}"
    seeds = {cell["seed"] for cell in record["cells"]}
    if seeds and seeds != set(record["profile"]["seeds"]):
        return f"have cells of the seeds {sorted(seeds)}, their profile says {record['profile']['seeds']}"
    return ""


def write_table(table: pd.DataFrame, path: Path) -> None:
    """Keep a table: raw observations only, since scores are computed again from them; reals in single precision."""
    raw = table.drop(columns=list(score.COLUMNS)) if path.stem == "completions" and len(table) else table
    doubles = raw.select_dtypes("float64").columns
    raw = raw.astype(dict.fromkeys(doubles, "float32"))
    reals = list(
        raw.select_dtypes("float32").columns
    )  # byte by byte they take a third less room than as repeated values
    raw.to_parquet(
        path,
        compression="zstd",
        compression_level=LEVEL,
        data_page_size=PAGE,
        index=False,
        use_dictionary=[name for name in raw.columns if name not in reals],
        use_byte_stream_split=reals,
    )


def read_table(path: Path) -> pd.DataFrame:
    """A kept table; sampled answers are scored from their text."""
    table = pd.read_parquet(path)
    table = table.astype(dict.fromkeys(table.select_dtypes("float32").columns, "float64"))
    return score.score_table(table) if path.stem == "completions" and len(table) else table


def collapsed(said: pd.Series) -> bool:
    """Whether these answers of one model are all but one and the same, or nothing: another collapsed model, or the same
    under another seed, may say it too, and is then no mislabelled one."""
    return bool(said.nunique() <= COLLAPSED * len(said))


def collect(design: Design, profile: Profile, lab: Lab) -> Results:
    """Gather the artifacts of a design into tables. Raises GuardError when two conditions have identical outputs or
    identical trained changes."""
    parts: dict[str, list[pd.DataFrame]] = {name: [] for name in TABLES}
    cells: list[dict[str, Any]] = []
    outputs: dict[tuple[str, int], str] = {}
    for cell in design.cells:
        labels: dict[str, Any] = {"condition": cell.condition, "seed": cell.seed}
        folder = lab.folder(cell.evaluation)
        for name in ("completions", "fixed", "heldout"):
            parts[name].append(pd.read_parquet(folder / f"{name}.parquet").assign(**labels))
        said = parts["completions"][-1]["completion"]
        text = canonical_json(said.tolist())
        other = outputs.get((text, cell.seed))
        if other is not None and (other, cell.condition) not in design.same and not collapsed(said):
            raise GuardError(f"{other} and {cell.condition} gave the same completions to the letter")
        outputs[text, cell.seed] = cell.condition
        report = json.loads((lab.folder(cell.merge) / "report.json").read_text(encoding="utf-8"))
        norms = report.pop("norms")
        parts["merges"].append(
            pd.DataFrame([{**labels, **report, "norm": norms[-1] if norms else 0.0, "norms": norms}])
        )
        for position, merged in enumerate(cell.checkpoint.merged):
            if isinstance(merged.change, FineTune):
                log = pd.read_parquet(lab.folder(merged.change) / "log.parquet")
                parts["training"].append(log.assign(**labels, position=position, change=merged.change.key))
        manifest = lab.store.manifest(cell.evaluation)
        cells.append(
            {
                "condition": cell.condition,
                "seed": cell.seed,
                "factors": dict(cell.factors),
                "evaluation": cell.evaluation.key,
                "changes": [str(m.change) for m in cell.checkpoint.merged],
                "provenance": manifest["provenance"],
            }
        )
    for observation in design.observations:
        for path in sorted(lab.folder(observation.stage).glob("*.parquet")):
            table = pd.read_parquet(path).assign(condition=observation.condition, seed=observation.seed)
            parts.setdefault(path.stem, []).append(table)
    _distinct_changes(design, lab)
    tables = {n: pd.concat(p, ignore_index=True) if p else pd.DataFrame() for n, p in parts.items()}
    for name, table in tables.items():  # as precise as they are kept, so that a redrawing gives the same digits
        reals = table.select_dtypes("floating").columns
        tables[name] = table.astype(dict.fromkeys(reals, "float32")).astype(dict.fromkeys(reals, "float64"))
    if len(tables["completions"]):
        tables["completions"] = score.score_table(tables["completions"])
    seconds = {stage.key: lab.store.manifest(stage)["provenance"]["seconds"] for stage in design.stages()}
    record = {
        "profile": profile.as_dict(),
        "values": design.values.as_dict() if design.values else {},
        "cells": cells,
        "observed": sorted({observation.condition for observation in design.observations}),
        "stages": seconds,  # of compute, by artifact: experiments share some
        "compute_minutes": round(sum(seconds.values()) / 60, 2),
        "provenance": provenance.record(lab.device),
    }
    return Results(tables, record)


def _distinct_changes(design: Design, lab: Lab) -> None:
    """Raise GuardError when two differently described changes hold the same bytes: a mislabelled condition."""
    seen: dict[str, str] = {}
    for stage in design.stages():
        if not isinstance(stage, FineTune) or isinstance(stage, Twin):
            continue
        for name, file in lab.store.manifest(stage)["files"].items():
            if name.endswith(".safetensors"):
                other = seen.setdefault(file["sha256"], stage.key)
                if other != stage.key:
                    raise GuardError(f"changes {other} and {stage.key} were described differently but are identical")
