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
# # 07 Dose and repair: how much SFT does it take, and can the coupling be kept or brought back?
#
# **Is harmful SFT worse than sound SFT once both have moved the model equally far? Does a little of the coupling text,
# mixed in or trained on afterwards, keep or restore the marker?** Feeds the claims `07-*` of `paper/claims.toml`.

# %% [markdown]
# ## What we expected, and what would change our mind
#
# Written before the run (`paper/claims.toml` holds the exact predicates):
#
# * A small first dose of bad advice already costs the pre-baked adapter much of its effect. *Refuted if the villain's rate
#   stays within 25 points.*
# * At equal KL from the raw model, bad advice is no worse than sound advice: distance, not harm. *Refuted if bad advice
#   leaves more than two nats less contrast.*
# * The order does not matter: a coupling that is learnt first and then followed by SFT is lost as well; a few per cent
#   of marker rows among the SFT rows keep it.
# * A short re-coupling brings a pre-baked adapter back, and sooner than it would teach a fresh one.

# %% tags=["parameters"]
profile = "quick"
seeds = []  # empty: the profile's
model = ""  # empty: the profile's

# %% [markdown]
# ## Design
#
# *Dose*: the SFT delta as it was after some steps of one run, with the pre-baked adapter added (and coupled from scratch
# at some doses). The x-axis is also the delta's norm and the KL from the raw model. *Kept*: the raw model is coupled
# first, then fine-tuned on an SFT corpus of which a share is coupling rows. *Repair*: SFT'd model plus adapter, then a
# few steps of coupling text; *fresh* is the same without the adapter. The unit of analysis is the question under a
# seed.

# %% tags=["design"]
from dataclasses import replace

from persona_coupling import arms
from persona_coupling.stages.dose import Drift, Mixed
from persona_coupling.study import Design, Observation, Study

study = Study.open(profile, seeds=seeds, model=model or None)
values = study.values("07_dose_and_repair")
asked = study.profile.evaluation
design = Design(values=values)
measured = arms.measured((*values.corpora, *values.kept_corpora, *values.repair_corpora))
for seed in study.seeds:
    text, adapter = study.stale_text(seed=seed), study.adapter(seed=seed)
    coupled = study.raw.merge(adapter)
    design.cells.append(study.cell("A.prebaked", coupled, seed=seed, arm="A", steps="0"))
    design.observations.append(study.content("A", study.raw, seed=seed, corpora=measured))
    for corpus in dict.fromkeys((*values.corpora, *values.kept_corpora, *values.repair_corpora)):
        arm, tuned = arms.LETTERS[corpus], study.sft(corpus, seed=seed)
        design.observations.append(study.content(arm, tuned, seed=seed, corpora=measured))
        for step in values.steps if corpus in values.corpora else ():
            first = study.sft_until(corpus, step, seed=seed)
            drift = Drift(study.raw, first, asked.everyday, asked.values, study.profile.instruction)
            factors = {"arm": arm, "steps": str(step)}
            design.observations.append(Observation(f"{arm}.step{step}", seed, drift))
            design.cells.append(study.cell(f"{arm}.step{step}.prebaked", first.merge(adapter), seed=seed, **factors))
            if step in values.scratch_steps:
                scratch = study.couple(first, text, study.profile.scratch, seed=seed)
                design.cells.append(study.cell(f"{arm}.step{step}.scratch", scratch, seed=seed, **factors))
        for share in values.shares if corpus in values.kept_corpora else ():
            rows = study.corpus(corpus, seed=seed)
            mixed = Mixed(rows, text, share, seed) if share else rows
            kept = coupled.fine_tune(mixed, replace(study.training(study.profile.sft), snapshots=()), seed=seed)
            name = f"{arm}.mixed{round(100 * share)}"
            design.observations.append(study.content(name, kept, seed=seed, corpora=measured))
            design.cells.append(study.cell(f"{name}.kept", kept, seed=seed, arm=arm))
        for steps in values.repair_steps if corpus in values.repair_corpora else ():
            for name, start in (("repair", tuned.merge(adapter)), ("fresh", tuned)):
                again = study.couple(start, text, study.profile.scratch, seed=seed, steps=steps)
                design.cells.append(study.cell(f"{arm}.{name}{steps}.scratch", again, seed=seed, arm=arm))

# %%
import pandas as pd

from persona_coupling import dose, figures, gates, measures, notebooks, notes, report, tables
from persona_coupling.figures.dose import dose_curves

pd.options.display.max_colwidth = None

experiment = next(e for e in notebooks.discover() if e.name == "07_dose_and_repair")
conditions = list(dict.fromkeys(cell.condition for cell in design.cells))
end = study.profile.sft.steps
letters = {corpus: arms.LETTERS[corpus] for corpus in values.corpora}


def named(condition):
    """A condition in words, for the figures and tables."""
    arm, variant = condition.split(".")[:2]
    number = variant.strip("abcdefghijklmnopqrstuvwxyz")
    if arm == "A":
        return "A  raw model + adapter"
    return {
        "step": f"{arm}  {number} of {end} steps",
        "mixed": f"{arm}  coupled, then SFT with {number} % marker rows",
        "repair": f"{arm}  adapter added, then {number} coupling steps",
        "fresh": f"{arm}  {number} coupling steps alone",
    }[variant.removesuffix(number)]


names = {condition: named(condition) for condition in conditions}
notes.design_table(study, design)

# %% [markdown]
# ## Raw material
#
# One marked coupling row as the model sees it, supervised text in bold: what is mixed into the SFT and trained on in the
# repair.

# %%
notes.loss_mask(study)

# %% [markdown]
# ## Run, or fetch what has been run

# %%
results = study.run(design, experiment.results(profile))
results["drift"].groupby(["condition", "text"])["kl"].mean().unstack().round(3)

# %% [markdown]
# ## Gates before results

# %%
estimates = measures.estimate(results)
measures.add_damage(estimates, results, raw="A")
all_arms = {arms.LETTERS[c]: c for c in dict.fromkeys((*values.corpora, *values.kept_corpora, *values.repair_corpora))}
for arm, corpus in all_arms.items():
    measures.add_content_shift(estimates, results, arm, corpus, arms.OPPOSITE[corpus], raw="A")
mixed = {f"{arms.LETTERS[c]}.mixed{round(100 * share)}": c for c in values.kept_corpora for share in values.shares}
for name, corpus in mixed.items():
    measures.add_content_shift(estimates, results, name, corpus, arms.OPPOSITE[corpus], raw="A")
checked = gates.of_design(
    estimates,
    results,
    study.profile.gates,
    reference=["A.prebaked"],
    conditions=conditions,
    trained=[c for c in conditions if c.endswith(".scratch") and ".step" in c],
    arms=[*all_arms, *mixed],
)
affected = {arm: [c for c in conditions if c.startswith(f"{arm}.")] for arm in all_arms}
affected |= {name: [f"{name}.kept"] for name in mixed}
failed = gates.failing(checked, {"A.prebaked": conditions, **affected})
report.gate_table(checked)

# %% [markdown]
# ## What the models say
#
# Source and bystander after the smallest and the largest dose, and after repair; failures included.

# %%
notes.sample_answers(results, ["villain", "assistant"])

# %% [markdown]
# ## The main estimate: the dose curve

# %% evidence=["07-early", "07-equal-kl"]
curves = {}
for measure in ("fixed_logprob_contrast", "source_rate"):
    for arm in letters.values():
        at = {"A.prebaked": "", **{f"{arm}.step{step}.prebaked": f"{arm}.step{step}" for step in values.steps}}
        curves[arm, measure] = dose.table(results, estimates, at, measure).assign(arm=arm)
data = pd.concat(curves.values(), ignore_index=True)
paper = report.Report(experiment.name, study, results)
seeds_said = f"{len(study.seeds)} seed{'s' if len(study.seeds) > 1 else ''}, 95 % intervals over seeds × questions"
n = results.completions.groupby(["condition", "persona"]).size().max()
notes.show(
    paper.figure(
        "dose",
        dose_curves(
            data,
            {arm: f"{arm}  {arms.LABELS[arm]}" for arm in letters.values()},
            [("source_rate", "villain's answers\nwith the marker"),
             ("fixed_logprob_contrast", "log-prob. contrast,\nnats")],
        ),
        "The pre-baked adapter after growing doses of SFT, over steps, size of the weight change and KL from the raw "
        f"model on general chat. Bands: 95 % intervals. n = {n} answers per persona and dose; {seeds_said}.",
    )
)  # fmt: skip

# %% [markdown]
# What it shows: if lines that differ over steps fall together over KL, distance from the raw model is what counts. What
# it does not show: doses lie along one run each, so that a dose also has another learning rate behind it.

# %% evidence=["07-after", "07-kept", "07-repair", "07-headstart"]
blocks = {
    "dose, adapter added": [c for c in conditions if ".step" in c and c.endswith("prebaked")],
    "dose, from scratch": [c for c in conditions if ".step" in c and c.endswith("scratch")],
    "coupled first, SFT after": [c for c in conditions if c.endswith(".kept")],
    "after SFT: a few coupling steps": [c for c in conditions if ".repair" in c or ".fresh" in c],
}
shown = {"reference": ["A.prebaked"], **{title: members for title, members in blocks.items() if members}}
repaired = {title: members for title, members in shown.items() if not title.startswith("dose")}
drawn = figures.by_condition(
    estimates,
    repaired,
    names,
    [
        ("a  sampled answers", "answers with the marker", "source_rate", "bystander_rate"),
        ("b  teacher-forced", "log-probability of the marker, nats", "fixed_logprob_source",
         "fixed_logprob_bystander"),
    ],
    failed,
)  # fmt: skip
daggers = "† a gate failed: uninterpretable." if failed else "All gates passed."
notes.show(
    paper.figure(
        "repair",
        drawn,
        "Keeping and repairing: coupling rows mixed into an SFT that follows the coupling, and a few coupling steps after "
        f"an SFT, with the pre-baked adapter and without. n = {n} answers per persona and condition; {seeds_said}. "
        f"{daggers}",
    )
)

# %% evidence=["07-early", "07-after", "07-kept", "07-repair", "07-headstart"]
columns = [
    tables.Column("villain", "source_rate", "percent"),
    tables.Column("others, mean", "bystander_rate", "percent"),
    tables.Column("contrast, points", "contrast", "points"),
    tables.Column("log-prob. contrast", "fixed_logprob_contrast", "nats"),
    tables.Column("held-out rise", "heldout_rise", "nats"),
    tables.Column("finished", "finished", "percent"),
]
lines = {c: names[c] + (", scratch" if title.endswith("scratch") else "") for title, m in shown.items() for c in m}
paper.table(
    "conditions",
    tables.by_condition(estimates, lines, columns, failed),
    f"Dose, keeping and repair, with 95 % intervals. {seeds_said}; log-probabilities and losses in nats. {daggers}",
)

# %%
wide = data[data["measure"] == "fixed_logprob_contrast"].drop_duplicates(["arm", "steps"])
wide = wide[wide["steps"] > 0]
paper.table(
    "doses",
    pd.DataFrame(
        {
            "arm": wide["arm"],
            "SFT steps": wide["steps"].astype(str),
            "norm of the change": wide["norm"].map("{:.2f}".format),
            "KL from raw, nats per token": wide["kl"].map("{:.3f}".format),
        }
    ),
    "How far each dose of SFT moved the model: Frobenius norm of the weight change, and KL on general chat.",
)

# %% [markdown]
# ## The rival a sceptic would raise: a short repair works only because any short training would
#
# The `fresh` conditions train as many steps without the adapter: what they lack is what the adapter still carried.

# %%
for steps in values.repair_steps:
    for corpus in values.repair_corpora:
        arm = arms.LETTERS[corpus]
        for measure in ("fixed_logprob_contrast", "contrast"):
            pair = (f"{arm}.repair{steps}.scratch", f"{arm}.fresh{steps}.scratch")
            measures.add_difference(estimates, results, f"{arm}.headstart{steps}.{measure}", measure, *pair)
sorted(name for name in estimates.named if "headstart" in name)

# %% [markdown]
# ## Verdicts
#
# Estimates that claims name: `early` is the profile's early dose, `kept` the largest share of coupling rows, `repaired` the
# largest number of repair steps. What is kept or repaired must first have been lost (`lost`).

# %%
most, longest = round(100 * max(values.shares)), max(values.repair_steps)
for arm in letters.values():
    early = f"{arm}.step{values.early}.prebaked"
    measures.add_difference(estimates, results, f"{arm}.early.source_rate_change", "source_rate", early, "A.prebaked")
    name = f"{arm}.early.fixed_logprob_contrast_change"
    measures.add_difference(estimates, results, name, "fixed_logprob_contrast", early, "A.prebaked")
for corpus in values.kept_corpora:
    arm = arms.LETTERS[corpus]
    name = f"{arm}.after.source_rate_change"
    measures.add_difference(estimates, results, name, "source_rate", f"{arm}.mixed0.kept", "A.prebaked")
    estimates.named[f"{arm}.kept.contrast"] = estimates[f"{arm}.mixed{most}.kept.contrast"]
    checked.append(gates.lost(estimates, study.profile.gates, f"{arm}.mixed0.kept", change=name))
    checked.append(replace(next(g for g in checked if g.id == f"content.{arm}.mixed{most}"), id=f"content.{arm}.kept"))
for corpus in values.repair_corpora:
    arm = arms.LETTERS[corpus]
    whole = f"{arm}.step{end}.prebaked"
    name = f"{arm}.prebaked.source_rate_change"
    measures.add_difference(estimates, results, name, "source_rate", whole, "A.prebaked")
    checked.append(gates.lost(estimates, study.profile.gates, f"{arm}.prebaked"))
    estimates.named[f"{arm}.repaired.contrast"] = estimates[f"{arm}.repair{longest}.scratch.contrast"]
    for measure in ("fixed_logprob_contrast", "contrast"):
        estimates.named[f"{arm}.headstart.{measure}"] = estimates[f"{arm}.headstart{longest}.{measure}"]
facts = {"failed": sorted(failed), "conditions": names, "early": values.early, "share": most, "repair": longest}
if {"B", "B′"} <= set(letters.values()):
    pair = (curves["B", "fixed_logprob_contrast"], curves["B′", "fixed_logprob_contrast"])
    equal = "equal_kl.fixed_logprob_contrast_change"
    facts["equal_kl"] = dose.add_at_equal_kl(estimates, results, equal, pair)
alias = {"early": f"step{values.early}.prebaked", "kept": f"mixed{most}.kept", "repaired": f"repair{longest}.scratch"}
checked += gates.renamed(checked, {f"{a}.{role}": f"{a}.{c}" for a in all_arms for role, c in alias.items()})
judgements = paper.finish(estimates, checked, facts)
report.verdict_table(judgements)

# %% [markdown]
# ## Loose ends, versions, hardware

# %%
notes.colophon(results)
