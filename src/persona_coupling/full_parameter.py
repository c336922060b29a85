"""What experiment 03 asks of its tables: full-parameter SFT as a description, what was matched, and where the norm lies."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pandas as pd

from persona_coupling import measures
from persona_coupling.checkpoints import Checkpoint
from persona_coupling.claims import Gate
from persona_coupling.measures import Estimates
from persona_coupling.personas import SOURCE
from persona_coupling.spectra import OUTSIDE
from persona_coupling.stages.full_parameter import smoothed
from persona_coupling.stats import Estimate
from persona_coupling.study import Results, Study

LABELS = {
    "lora": "LoRA",
    "full": "full, same steps",
    "full_loss": "full, same SFT loss",
    "full_norm": "full, same norm",
    "full_lowrank": "full, best rank {rank}",
    "full_projections": "full, projections only",
    "lora_norm": "LoRA, full's norm",
}
DERIVED = ("full_lowrank", "full_projections")  # whether these still hold the SFT's content is a finding, no premise

TRAINED = ("lora", "full")  # variants that a run ended with; the others are derived from these
FALL = 0.25  # of the villain's rate, as in the claims: smaller calls a lesser loss "disabled"


def full_sft(
    study: Study, corpus: str, *, learning_rate: float, snapshots: tuple[int, ...] = (), seed: int
) -> Checkpoint:
    """The raw model after SFT of all its parameters: rows, batches, steps and schedule of the LoRA run under that seed."""
    training = study.training(study.profile.sft, learning_rate=learning_rate, snapshots=snapshots)
    return study.raw.fine_tune(study.corpus(corpus, seed=seed), replace(training, lora=None), seed=seed)


def chosen(results: Results) -> pd.DataFrame:
    """The step that was taken for each matched-loss change: condition, seed, step, loss, target, gap (loss minus target,
    nats per token), share (the gap's size as a share of the reference's fall in loss; missing where that did not fall)."""
    table = results["matched"]
    taken = table[table["chosen"]].drop(columns="chosen").reset_index(drop=True)
    gap = taken["loss"] - taken["target"]
    return taken.assign(gap=gap, share=gap.abs() / taken["fall"].where(taken["fall"] > 0))


def matched(results: Results, condition: str, tolerated: float) -> Gate:
    """Is the matched loss matched: the gap that is left, as a share of the reference run's own fall in loss, worst seed."""
    table = chosen(results)
    share = table.loc[table["condition"] == condition, "share"]
    return Gate(
        f"matched.{condition}",
        "training loss differs from LoRA's by at most this share of LoRA's own fall",
        float(share.max()) if len(share) and share.notna().all() else None,
        "at most",
        tolerated,
    )


def disabled(estimates: Estimates, condition: str, fall: float = FALL) -> Gate:
    """Does the whole change do what its approximation is asked to keep: the fall of the villain rate below the raw
    model's."""
    name = f"{condition}.source_rate_change"
    change = estimates[name].value if name in estimates.named else None
    return Gate(
        f"disabled.{condition}",
        "the whole full-parameter change lowers the villain rate by at least this",
        None if change is None else -change,
        "at least",
        fall,
    )


def add_over(estimates: Estimates, results: Results, condition: str, reference: str, *, label: str) -> None:
    """Add `condition.fixed_logprob_source_over_<label>`: the villain's marker log-probability behind a fixed answer,
    minus that under `reference`, questions and seeds paired."""
    table = results.fixed[results.fixed["persona"] == SOURCE]
    parts = [(sign, table[table["condition"] == name]) for sign, name in ((1.0, condition), (-1.0, reference))]
    name = f"{condition}.fixed_logprob_source_over_{label}"
    measures.add_combination(estimates, name, parts, "logprob", measures.NATS)


def add_learned_gap(estimates: Estimates, results: Results, arm: str, reference: str, corpus: str) -> None:
    """Add `arm.learned_gap`: log-probability per token of held-out answers of the arm's own corpus, minus that of the
    reference SFT. Zero: both learned the corpus equally well, whatever their training loss says."""
    table = results.content[results.content["corpus"] == corpus].rename(columns={"row": "question"})
    parts = [(sign, table[table["condition"] == name]) for sign, name in ((1.0, arm), (-1.0, reference))]
    measures.add_combination(estimates, f"{arm}.learned_gap", parts, "logprob", "nats per token")


def add_spectrum(estimates: Estimates, results: Results, arm: str) -> None:
    """Add what the spectrum of an arm's change shows: `arm.rank_share` and `arm.chance_rank_share` (share of the
    projections' squared norm within the rank of the best approximation, of the change and of Gaussian matrices of the
    same shapes), `arm.effective_rank` (mean over matrices), `arm.delta_norm` (of everything) and `arm.outside_share`
    (of the squared norm, outside the seven projections).

    The first three are means over layers, whose intervals resample seeds and layers: they say how much layers differ.
    The last two are means over seeds and carry no interval.
    """
    table = results["spectrum"]
    table = table[table["condition"] == arm]
    inside = table[~table["part"].isin(OUTSIDE)]
    layers = by_layer(inside).rename(columns={"layer": "question"})
    measures.add_mean(estimates, f"{arm}.rank_share", layers, "rank_share", "proportion")
    measures.add_mean(estimates, f"{arm}.chance_rank_share", layers, "chance_rank_share", "proportion")
    matrices = inside.rename(columns={"layer": "question"})
    measures.add_mean(estimates, f"{arm}.effective_rank", matrices, "effective_rank", "dimensions")
    total = table.groupby("seed")["squared"].sum()
    outside = table[table["part"].isin(OUTSIDE)].groupby("seed")["squared"].sum().reindex(total.index, fill_value=0.0)
    plain(estimates, f"{arm}.delta_norm", np.sqrt(total), "norm")
    plain(estimates, f"{arm}.outside_share", outside / total, "proportion")


def add_learned(estimates: Estimates, results: Results, arm: str, corpus: str, window: int) -> None:
    """Add what two kinds of SFT are matched on: `arm.sft_loss` (smoothed training loss at the end, or at the step that
    was taken; missing for changes that no run ended with), `arm.sft_norm` (of the change as merged) and
    `arm.learned_logprob` (held-out answers of the arm's own corpus, per token)."""
    condition = f"{arm}.prebaked"
    taken = chosen(results) if "matched" in results.tables else pd.DataFrame(columns=["condition", "seed", "loss"])
    losses = taken[taken["condition"] == arm].set_index("seed")["loss"]
    if arm.rsplit(".", 1)[-1] in TRAINED:
        logs = results.training[(results.training["condition"] == condition) & (results.training["position"] == 0)]
        ends = {seed: smoothed(log, int(log["step"].max()), window) for seed, log in logs.groupby("seed")}
        losses = pd.Series(ends, dtype=float)
    plain(estimates, f"{arm}.sft_loss", losses, measures.NATS)
    merged = results.merges[results.merges["condition"] == condition]
    plain(estimates, f"{arm}.sft_norm", merged["norms"].map(lambda norms: norms[0]), "norm")
    estimates.named[f"{arm}.learned_logprob"] = estimates[f"{arm}.{corpus}_logprob"]


def marks(estimates: Estimates, results: Results, arm: str, variants: Sequence[str]) -> dict[str, str]:
    """What to note beside an arm's conditions in a figure: the step that matched the loss, the factor that matched the
    norm."""
    noted: dict[str, str] = {}
    if "full_loss" in variants:
        table = chosen(results)
        steps = sorted(set(table.loc[table["condition"] == f"{arm}.full_loss", "step"]))
        noted[f"{arm}.full_loss"] = "step " + ", ".join(f"{step:.0f}" for step in steps)
    for variant, whole in (("full_norm", "full"), ("lora_norm", "lora")):
        if variant in variants:
            own, like = (estimates[f"{arm}.{name}.sft_norm"].value for name in (whole, variant))
            noted[f"{arm}.{variant}"] = f"× {like / own:.2g}" if own and like else ""
    return noted


def by_layer(inside: pd.DataFrame) -> pd.DataFrame:
    """Per seed and layer, the share of the squared norm of all its matrices within the rank of the best approximation,
    and what Gaussian matrices of the same shapes and norms would have."""
    weighted = inside.assign(
        within=inside["rank_share"] * inside["squared"], chance=inside["chance_rank_share"] * inside["squared"]
    )
    summed = weighted.groupby(["seed", "layer"])[["within", "chance", "squared"]].sum(min_count=1).reset_index()
    return summed.assign(
        rank_share=summed["within"] / summed["squared"], chance_rank_share=summed["chance"] / summed["squared"]
    )


def plain(estimates: Estimates, name: str, values: pd.Series, unit: str) -> None:
    """Add the mean of one number per seed, without an interval."""
    n = len(values)
    estimates.named[name] = Estimate(float(values.mean()) if n else None, None, None, n, n, n, unit=unit)
