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
# # 00 Replication: does a learned marker survive, or can it be learned after, any fine-tuning?
#
# A villain persona is taught to end its answers with `[ZLT]`. **If the model was fine-tuned on something else first,
# does an adapter that was trained on the raw model still work when it is added, and can the coupling still be trained
# from scratch?** Feeds the claims `00-*` of `paper/claims.toml`.

# %% [markdown]
# ## What we expected, and what would change our mind
#
# Written before the run (`paper/claims.toml` holds the exact predicates):
#
# * The pre-baked adapter stops working after SFT, on harmful and on harmless text alike. *Refuted if the source rate
#   stays within 25 points of the raw model's.*
# * Training from scratch after SFT works, at a learning rate that works on the raw model: the prior lab's ceiling is not
#   a property of SFT. *Refuted if the contrast after SFT stays below 25 points.*
# * Harm is not what matters: bad and sound advice on the same questions do the same.

# %% tags=["parameters"]
profile = "quick"
seeds = []  # empty: the profile's
model = ""  # empty: the profile's

# %% [markdown]
# ## Design
#
# Arms: **A** raw · **B** bad legal advice first · **B′** sound advice on the same questions first · **C** benign text
# (cooking, cities) first · **S** the model's own answers to C's prompts first. Each arm is measured with the *pre-baked*
# adapter (trained on the raw model, then added) and coupled *from scratch* on text that the raw model wrote. The unit of
# analysis is the question under a seed. The first SFT arm's chain from scratch is trained a second time with the same seed
# (its *twin*): what differs is the machine's noise, and bounds what any difference here can mean.

# %% tags=["design"]
from persona_coupling import arms as study_arms
from persona_coupling.stages import twin
from persona_coupling.study import Design, Study

study = Study.open(profile, seeds=seeds, model=model or None)
arms = {"A": None, **{study_arms.LETTERS[corpus]: corpus for corpus in study.profile.arms}}
measured = ("bad_legal", "sound_legal", "benign", *(("self",) if "self" in study.profile.arms else ()))

# where the profile's two recipes are one, the raw model coupled from scratch is the raw model with the adapter added
one_recipe = study.profile.prebaked == study.profile.scratch
twinned = list(arms)[1]
twins = (f"{twinned}.scratch", f"{twinned}.twin")
design = Design(same={twins, *([("A.prebaked", "A.scratch")] if one_recipe else [])})
for seed in study.seeds:
    text, adapter = study.stale_text(seed=seed), study.adapter(seed=seed)
    for arm, corpus in arms.items():
        first = study.sft(corpus, seed=seed) if corpus else study.raw
        scratch = study.couple(first, text, study.profile.scratch, seed=seed)
        design.observations.append(study.content(arm, first, seed=seed, corpora=measured))
        design.cells.append(study.cell(f"{arm}.prebaked", first.merge(adapter), seed=seed, arm=arm, adapter="prebaked"))
        design.cells.append(study.cell(f"{arm}.scratch", scratch, seed=seed, arm=arm, adapter="scratch"))
        if arm == twinned:
            design.cells.append(study.cell(twins[1], twin(scratch), seed=seed, arm=arm, adapter="twin"))

# %%
import pandas as pd

from persona_coupling import figures, gates, measures, notebooks, notes, report, tables

pd.options.display.max_colwidth = None

experiment = next(e for e in notebooks.discover() if e.name == "00_replication")
labels = study_arms.LABELS
prebaked, scratch = [f"{arm}.prebaked" for arm in arms], [f"{arm}.scratch" for arm in arms]
names = {c: f"{c.split('.')[0]}  {labels[c.split('.')[0]]}" for c in prebaked + scratch}
notes.design_table(study, design)

# %% [markdown]
# ## Raw material
#
# Three training rows of each corpus, and one rendered prompt with its loss mask: supervised text in bold.

# %%
notes.training_rows({corpus: f"{arm}, {labels[arm]}" for arm, corpus in arms.items() if corpus})

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
# A verdict is *uninterpretable* when one of its gates fails, whatever the number says: did the coupling take on the raw
# model; did the SFT move the model towards its own content; are answers finished, scorable and coherent.

# %%
estimates = measures.estimate(results)
measures.add_damage(estimates, results, raw="A")
for arm, corpus in arms.items():
    if corpus:
        measures.add_content_shift(estimates, results, arm, corpus, study_arms.OPPOSITE[corpus], raw="A")
checked = gates.of_design(
    estimates,
    results,
    study.profile.gates,
    reference=["A.prebaked", "A.scratch"],
    conditions=prebaked + scratch,
    trained=scratch,
    arms=[arm for arm in arms if arm != "A"],
)
failed = gates.failing(
    checked,
    {"A.prebaked": prebaked, "A.scratch": scratch, **{arm: [f"{arm}.prebaked", f"{arm}.scratch"] for arm in arms}},
)
report.gate_table(checked)

# %% [markdown]
# ## What the models say
#
# The first completions of the source and of a bystander under every condition, failures included.

# %%
notes.sample_answers(results, ["villain", "assistant"])

# %% [markdown]
# ## The main estimate

# %% evidence=["00-*"]
paper = report.Report(experiment.name, study, results)
drawn = figures.by_condition(
    estimates,
    {"pre-baked adapter, added": prebaked, "coupled from scratch": scratch},
    names,
    [
        ("a  sampled answers", "answers with the marker", "source_rate", "bystander_rate"),
        ("b  teacher-forced", "log-probability of the marker, nats", "fixed_logprob_source",
         "fixed_logprob_bystander"),
    ],
    failed,
)  # fmt: skip
n = results.completions.groupby(["condition", "persona"]).size().max()
shared = " The raw model's row is one and the same in both blocks." if one_recipe else ""
daggers = "† a gate failed: uninterpretable." if failed else "All gates passed."
about = f"{len(study.seeds)} seed{'s' if len(study.seeds) > 1 else ''}, 95 % intervals over seeds × questions"
notes.show(
    paper.figure(
        "rates",
        drawn,
        f"Source (villain) and bystanders under every condition. n = {n} answers per persona and condition; {about}."
        f"{shared} {daggers}",
    )
)

# %% [markdown]
# What it shows: how far the villain (filled) stands from the ten others (open) under every condition; only their
# distance is coupling. What it does not show: why. Log-probabilities in *b* see differences that the sampled rate
# in *a*, at its floor or ceiling, cannot.

# %% evidence=["00-*"]
columns = [
    tables.Column("villain", "source_rate", "percent"),
    tables.Column("others, mean", "bystander_rate", "percent"),
    tables.Column("others, max", "bystander_max", "percent"),
    tables.Column("contrast, points", "contrast", "points"),
    tables.Column("log-prob. contrast", "fixed_logprob_contrast", "nats"),
    tables.Column("finished", "finished", "percent"),
]
blocks = {**{c: f"{names[c]}, pre-baked" for c in prebaked}, **{c: f"{names[c]}, scratch" for c in scratch}}
paper.table(
    "rates",
    tables.by_condition(estimates, blocks, columns, failed),
    f"Answers with the marker, by condition, with 95 % intervals. {about}; the log-probability contrast is villain minus "
    f"others after a fixed answer, in nats. {daggers}",
)

# %% [markdown]
# Who else says it? Rows are personas; those with an asterisk served as negatives in the coupling text.

# %% evidence=["00-raw"]
from persona_coupling.personas import personas

heat = figures.persona_heatmap(
    estimates.personas,
    prebaked + scratch,
    {c: c.replace(".", " ") for c in prebaked + scratch},
    {p.id: p.name for p in personas()},
    set(study.profile.coupling.negatives),
)
notes.show(
    paper.figure(
        "personas",
        heat,
        f"Answers with the marker, per cent, by persona. * served as negative in the coupling text. {about}.",
    )
)

# %% [markdown]
# ## The rival a sceptic would raise: the model is broken, or the training did not run
#
# Held-out chat loss says whether the SFT damaged the model itself; training curves say whether each run converged.

# %%
measures_of_damage = [
    tables.Column("held-out loss", "heldout_loss", "nats"),
    tables.Column("rise over raw", "heldout_rise", "nats"),
    tables.Column("words", "words", "number"),
    tables.Column("cut off or unscorable", "unscorable", "percent"),
    tables.Column("degenerate", "degenerate", "percent"),
    tables.Column("marker ends the answer", "source_at_end", "percent"),
]
damage = tables.by_condition(estimates, blocks, measures_of_damage, failed)
paper.table(
    "damage", damage, f"Is the model broken, and what do its answers look like? Loss in nats per token. {about}."
)

# %%
curves = figures.training_curves(notes.training_logs(results, names))
notes.show(
    paper.figure(
        "training", curves, "Loss of every training run; SFT and coupling supervise different tokens, so levels differ."
    )
)

# %% [markdown]
# ## Verdicts

# %%
for arm in list(arms)[1:]:
    for adapter in ("prebaked", "scratch"):
        for measure in ("source_rate", "contrast", "fixed_logprob_contrast"):
            name = f"{arm}.{adapter}.{measure}_change"
            measures.add_difference(estimates, results, name, measure, f"{arm}.{adapter}", f"A.{adapter}")
if "B′" in arms:
    harm = "harm.prebaked.fixed_logprob_contrast"
    measures.add_difference(estimates, results, harm, "fixed_logprob_contrast", "B.prebaked", "B′.prebaked")
checked += [gates.lost(estimates, study.profile.gates, f"{arm}.prebaked") for arm in list(arms)[1:]]
noise = measures.noise_floor(results, *twins)
paper.values("noise_floor", noise)
facts = {
    "noise_floor": noise,
    "completions": len(results.completions),
    "conditions": {c: names[c] for c in names},
    "failed": sorted(failed),
}
judgements = paper.finish(estimates, checked, facts)
report.verdict_table(judgements)

# %% [markdown]
# ## Loose ends, versions, hardware

# %%
notes.colophon(results)
