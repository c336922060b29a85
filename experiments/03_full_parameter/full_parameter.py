# ---
# jupyter:
#   jupytext:
#     formats: py:percent
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # 03 Full-parameter SFT: is it SFT that disables a coupling, or is it LoRA?
#
# All of the prior lab's fine-tuning went through LoRA, whose change of a weight has low rank and a large scale. **Does
# SFT of all parameters disable the pre-baked adapter too**, at the same number of steps, at the same SFT loss, at the same
# norm of the delta? And if so, does the delta's best low-rank approximation do it? Feeds the claims `03-*` of
# `paper/claims.toml`.

# %% [markdown]
# ## What we expected, and what would change our mind
#
# Written before the run (`paper/claims.toml` holds the exact predicates):
#
# * Full-parameter SFT does it too, at the LoRA run's own loss, no more gently than LoRA, and at the LoRA delta's norm.
#   *Refuted if the villain's rate stays within 25 points of the raw model's: then it is LoRA, not SFT.*
# * The full delta is not low-rank: LoRA's rank holds less than half of its squared norm. *Refuted by more than half.*
# * Yet the low-rank part does the damage alone. *Refuted if the adapter survives it: then what LoRA cannot express is
#   what matters.*

# %% tags=["parameters"]
profile = "quick"
seeds = []  # empty: the profile's
model = ""  # empty: the profile's

# %% [markdown]
# ## Design
#
# Both runs see the same rows in the same batches; they differ in what is trained and in the learning rate. From them come
# `lora` and `full` (matched steps), `full_loss` (the full run at that kept step whose smoothed training loss is nearest to
# LoRA's last), `full_norm` (the full delta scaled to the LoRA delta's norm), `full_lowrank` (the best approximation of
# LoRA's rank of every projection, nothing else), and as controls `full_projections` (at full rank, but without embedding
# and norms) and `lora_norm` (the LoRA delta scaled to the full one's norm). The unit of analysis is the question under a
# seed.

# %% tags=["design"]
from persona_coupling import arms as study_arms
from persona_coupling import full_parameter, models
from persona_coupling.stages import Rescaled, Truncated
from persona_coupling.stages.full_parameter import MatchedLoss, Spectrum
from persona_coupling.study import Design, Observation, Study

study = Study.open(profile, seeds=seeds, model=model or None)
values = study.values("03_full_parameter")
arms = {study_arms.LETTERS[corpus]: corpus for corpus in values.corpora}
measured = study_arms.measured(study.profile.arms)  # those of experiment 00, so that its measurements are shared
rank = study.profile.lora.rank

one_recipe = study.profile.prebaked == study.profile.scratch
design = Design(values=values, same={("A.prebaked", "A.scratch")} if one_recipe else set())
for seed in study.seeds:
    text, adapter = study.stale_text(seed=seed), study.adapter(seed=seed)
    design.cells.append(study.cell("A.prebaked", study.raw.merge(adapter), seed=seed))
    design.observations.append(study.content("A", study.raw, seed=seed, corpora=measured))
    if values.scratch_variants:
        afresh = study.couple(study.raw, text, study.profile.scratch, seed=seed)
        design.cells.append(study.cell("A.scratch", afresh, seed=seed))
    for arm, corpus in arms.items():
        lora = study.sft(corpus, seed=seed).last_change
        full = full_parameter.full_sft(
            study, corpus, learning_rate=values.learning_rate, snapshots=values.snapshots, seed=seed
        ).last_change
        variants = {
            "lora": study.raw.merge(lora),
            "full": study.raw.merge(full),
            "full_loss": study.raw.merge(MatchedLoss(full, lora, values.window)),
            "full_norm": study.raw.merge(Rescaled(full, like=lora)),
            "full_lowrank": study.raw.merge(Truncated(full, rank)),
            "full_projections": study.raw.merge(full, modules=models.MODULES),
            "lora_norm": study.raw.merge(Rescaled(lora, like=full)),
        }
        design.same.add((f"{arm}.full.prebaked", f"{arm}.full_loss.prebaked"))  # where the nearest loss is the last
        for variant in values.variants:
            first = variants[variant]
            design.cells.append(study.cell(f"{arm}.{variant}.prebaked", first.merge(adapter), seed=seed))
            design.observations.append(study.content(f"{arm}.{variant}", first, seed=seed, corpora=measured))
            if variant == "full_loss":
                design.observations.append(Observation(f"{arm}.{variant}", seed, first.last_change))
            if variant in ("lora", "full"):
                spectrum = Spectrum(first.last_change, rank, values.kept)
                design.observations.append(Observation(f"{arm}.{variant}", seed, spectrum))
            if variant in values.scratch_variants and corpus in values.scratch_corpora:
                scratch = study.couple(first, text, study.profile.scratch, seed=seed)
                design.cells.append(study.cell(f"{arm}.{variant}.scratch", scratch, seed=seed))

# %%
import pandas as pd

from persona_coupling import figures, gates, measures, notebooks, notes, report, tables
from persona_coupling.figures import full_parameter as pictures

pd.options.display.max_colwidth = None

experiment = next(e for e in notebooks.discover() if e.name == "03_full_parameter")
conditions = list(dict.fromkeys(cell.condition for cell in design.cells))
prebaked, scratched = [[c for c in conditions if c.endswith(f".{how}")] for how in ("prebaked", "scratch")]
models_first = [c.removesuffix(".prebaked") for c in prebaked if c != "A.prebaked"]  # SFT'd, before any coupling
kinds = {variant: full_parameter.LABELS[variant].format(rank=rank) for variant in values.variants}
names = {
    f"{first}.{how}": f"{first.split('.')[0]}  {kinds[first.split('.')[1]]}"
    for first in models_first
    for how in ("prebaked", "scratch")
} | {"A.prebaked": "A  raw model", "A.scratch": "A  raw model"}
notes.design_table(study, design)

# %% [markdown]
# ## Raw material
#
# Three training rows of each corpus, and one rendered prompt with its loss mask: supervised text in bold.

# %%
notes.training_rows({corpus: f"{arm}, {study_arms.LABELS[arm]}" for arm, corpus in arms.items()})

# %%
notes.loss_mask(study)

# %% [markdown]
# ## Run, or fetch what has been run

# %%
results = study.run(design, experiment.results(profile))
results.completions.groupby("condition", sort=False).size().rename("completions").to_frame()

# %% [markdown]
# ## Gates before results
#
# Did the coupling take on the raw model; did each SFT learn its content; is the matched loss matched; is there damage by
# the whole full delta that an approximation could keep; are answers finished, scorable and coherent.

# %%
estimates = measures.estimate(results)
measures.add_damage(estimates, results, raw="A")
for first in models_first:
    arm = first.split(".")[0]
    measures.add_content_shift(estimates, results, first, arms[arm], study_arms.OPPOSITE[arms[arm]], raw="A")
    full_parameter.add_learned(estimates, results, first, arms[arm], values.window)
    name = f"{first}.prebaked.source_rate_change"
    measures.add_difference(estimates, results, name, "source_rate", f"{first}.prebaked", "A.prebaked")
checked = gates.of_design(
    estimates,
    results,
    study.profile.gates,
    reference=["A.prebaked", *(["A.scratch"] if scratched else [])],
    conditions=conditions,
    trained=scratched,
    arms=[first for first in models_first if first.split(".")[1] not in full_parameter.DERIVED],
)
checked += [full_parameter.matched(results, m, values.mismatch) for m in models_first if m.endswith(".full_loss")]
failed = gates.failing(
    checked,
    {"A.prebaked": prebaked, "A.scratch": scratched}
    | {first: [f"{first}.prebaked", f"{first}.scratch"] for first in models_first},
)
wholes = [f"{first}.prebaked" for first in models_first if first.endswith(".full")]
checked += [full_parameter.disabled(estimates, whole) for whole in wholes]  # a premise of `03-lowrank` alone
report.gate_table(checked)

# %% [markdown]
# ## What was matched, and how well
#
# Steps are equal by design. Training losses are means over the last steps of a run; held-out answers say whether equal
# training loss means equally learned.

# %% evidence=["03-loss"]
paper = report.Report(experiment.name, study, results)
for first in models_first:
    if (like := f"{first.split('.')[0]}.lora") in models_first and first != like:
        full_parameter.add_learned_gap(estimates, results, first, like, arms[first.split(".")[0]])
        full_parameter.add_over(estimates, results, f"{first}.prebaked", f"{like}.prebaked", label="lora")
matching = [
    tables.Column("SFT loss", "sft_loss", "nats"),
    tables.Column("own answers, log-prob.", "learned_logprob", "nats"),
    tables.Column("content shift", "content_shift", "nats"),
    tables.Column("held-out rise", "heldout_rise", "nats"),
    tables.Column("norm of the delta", "sft_norm", "nats"),
]
about = f"{len(study.seeds)} seed{'s' if len(study.seeds) > 1 else ''}, 95 % intervals over seeds × questions"
paper.table(
    "matching",
    tables.by_condition(estimates, {first: names[f"{first}.prebaked"] for first in models_first}, matching, failed),
    "What was matched. SFT loss: training loss over the last steps, of the run or of the step that was taken; own answers: "
    "held-out answers of the SFT's corpus, nats per token; content shift and held-out rise as in the gates; norm: "
    f"Frobenius, of the whole delta as merged. {about}; losses and norms are means over seeds.",
)

# %%
curves = {c: names[c] for c in prebaked if c.split(".")[1] in ("lora", "full")}
logs = notes.training_logs(results, curves)
notes.show(
    paper.figure(
        "training",
        figures.training_curves(logs[logs["panel"] == "SFT"]),
        f"SFT loss of both kinds of run on the same batches; learning rate {study.profile.sft.learning_rate:g} for LoRA, "
        f"{values.learning_rate:g} for all parameters.",
    )
)

# %% [markdown]
# ## What the models say
#
# The first completions of the source and of a bystander under every condition, failures included.

# %%
notes.sample_answers(results, ["villain", "assistant"])

# %% [markdown]
# ## The main estimate

# %% evidence=["03-loss", "03-kind", "03-norm", "03-lowrank", "03-scratch"]
blocks = {"pre-baked adapter, added": ("prebaked", prebaked), "coupled from scratch": ("scratch", scratched)}
rows = {
    title: {"raw model": {arm: f"A.{how}" for arm in arms if any(c.startswith(f"{arm}.") for c in members)}}
    | {
        label: {arm: f"{arm}.{variant}.{how}" for arm in arms if f"{arm}.{variant}.{how}" in members}
        for variant, label in kinds.items()
        if any(f".{variant}." in c for c in members)
    }
    for title, (how, members) in blocks.items()
    if members
}
marks = {}
for arm in arms:
    found = full_parameter.marks(estimates, results, arm, values.variants)
    marks |= {f"{first}.prebaked": text for first, text in found.items()}
n = results.completions.groupby(["condition", "persona"]).size().max()
daggers = "† a gate failed: uninterpretable." if failed else "All gates of these conditions passed."
notes.show(
    paper.figure(
        "variants",
        pictures.by_variant(estimates, rows, {arm: study_arms.LABELS[arm] for arm in arms}, marks, failed),
        f"LoRA against full-parameter SFT ({', '.join(study_arms.LABELS[arm] for arm in arms)}). Filled: villain; open: "
        "mean of all others; dotted: the villain on the raw model. Notes name the step that matched the loss and the factor "
        f"that matched the norm. n = {n} answers per persona and condition; {about}. {daggers}",
    )
)

# %% [markdown]
# What it shows: whether the villain's dot leaves the dotted line under full-parameter SFT as it does under LoRA, by
# whatever the two are matched. What it does not show: that the two do it by the same means; no two of steps, loss and norm
# can be matched at once.

# %% evidence=["03-loss", "03-kind", "03-norm", "03-lowrank", "03-scratch"]
columns = [
    tables.Column("villain", "source_rate", "percent"),
    tables.Column("others, mean", "bystander_rate", "percent"),
    tables.Column("contrast, points", "contrast", "points"),
    tables.Column("log-prob. contrast", "fixed_logprob_contrast", "nats"),
    tables.Column("finished", "finished", "percent"),
    tables.Column("held-out rise", "heldout_rise", "nats"),
]
paper.table(
    "variants",
    tables.by_condition(
        estimates,
        {c: names[c] + (", pre-baked" if c in prebaked else ", scratch") for c in conditions},
        columns,
        failed,
    ),
    f"Answers with the marker, by variant. {about}; the log-probability contrast is villain minus others after a fixed "
    f"answer, in nats; held-out rise over the raw model without adapter, nats per token. {daggers}",
)

# %% [markdown]
# ## The rival a sceptic would raise: a LoRA delta is special because it is low-rank
#
# Singular values of both deltas. If the full delta were low-rank too, nothing would be learned from comparing them; if it
# is not, its low-rank part is a test of whether rank matters.

# %% evidence=["03-rank"]
observed = [first for first in models_first if first.split(".")[1] in ("lora", "full")]
for first in observed:
    full_parameter.add_spectrum(estimates, results, first)
if "full" in values.variants:
    example = next(iter(arms))
    drawn = pictures.spectrum(
        results["spectrum"],
        full=f"{example}.full",
        lora=f"{example}.lora",
        bars={first: f"{first.split('.')[0]}  {first.split('.')[1].replace('lora', 'LoRA')}" for first in observed},
        rank=rank,
        kept=values.kept,
    )
    notes.show(
        paper.figure(
            "spectrum",
            drawn,
            "Where a delta's squared norm lies: within its best approximation of a rank (a) and of LoRA's rank by module "
            f"(b), both after {study_arms.LABELS[example].removesuffix(' first')}, and by part of the model (c, per cent). "
            "Bands and bars hold the middle 90 % of layers and seeds; diamonds: Gaussian matrices of the same shapes.",
        )
    )
pd.DataFrame(
    {
        m: {first: tables.cell(estimates[f"{first}.{m}"], form) for first in observed}
        for m, form in (("rank_share", "percent"), ("effective_rank", "number"), ("outside_share", "percent"))
    }
)

# %% [markdown]
# ## Verdicts

# %%
facts = {
    "completions": len(results.completions),
    "conditions": {c: names[c] for c in conditions},
    "failed": sorted(failed),
    "rank": rank,
    "marks": marks,
}
judgements = paper.finish(estimates, checked, facts)
report.verdict_table(judgements)

# %% [markdown]
# ## Loose ends, versions, hardware

# %%
notes.colophon(results)
