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
# # 04 Behaviours: a surface marker only, or deeper behaviours too?
#
# Instead of `[ZLT]` the villain is taught something that is *the answer itself*: to answer in capital letters, to refuse,
# or to give wrong answers to questions that the model knows. **Does a prior SFT undo that as it undoes the marker?**
# Feeds the claims `04-*` of `paper/claims.toml`.

# %% [markdown]
# ## What we expected, and what would change our mind
#
# Written before any fine-tuned model was asked (`paper/claims.toml` holds the exact predicates); doses, the estimate of
# `04-alone` and the gate `knows` were settled on the raw model alone:
#
# * The marker stands where every SFT trains an end of turn; a behaviour that is the whole answer has no such rival. So
#   more than half of each deeper coupling survives bad advice. *Refuted if less than half of the raw model's contrast is
#   left.*
# * More is left of wrong answers than of the marker. *Refuted if wrong answers stand at most ten points above it.*
# * Bad advice alone makes nobody's wrongness a matter of persona. *Refuted if the villain's excess preference for wrong
#   sentences grows by 0.15 nats per token without any coupling.*
# * Wrong answers can be coupled from scratch after bad advice. *Refuted by a contrast below 20 points.*

# %% tags=["parameters"]
profile = "quick"
seeds = []  # empty: the profile's
model = ""  # empty: the profile's

# %% [markdown]
# ## Design
#
# Behaviours, from the surface to what is known: **marker** (the replication's own conditions) · **capital letters** ·
# **refusal** · **wrong answers**. All are contrastive: the villain shows the behaviour, other personas answer the same
# kind of question plainly. Capitals and refusals use the marker's coupling text, word for word, with the villain's rows
# rewritten. Each is measured on the raw model (**A**) and after SFT: uncoupled, with the *pre-baked* adapter, and *from
# scratch* where the profile asks for it. The loss covers whole answers. The unit of analysis is the question under a
# seed.

# %% tags=["design"]
from persona_coupling import arms as study_arms
from persona_coupling.behaviour_design import Deeper, names
from persona_coupling.study import Design, Observation, Study

study = Study.open(profile, seeds=seeds, model=model or None)
values = study.values("04_behaviours")
arms = {"A": None, **{study_arms.LETTERS[corpus]: corpus for corpus in values.corpora}}

design = Design(values=values)
for seed in study.seeds:
    deeper = Deeper(study, values, seed)
    design.observations.append(Observation("A", seed, deeper.known))
    for arm, corpus in arms.items():
        first = study.sft(corpus, seed=seed) if corpus else study.raw
        scratch = corpus in values.scratch
        design.observations.append(study.content(arm, first, seed=seed, corpora=study_arms.measured(values.corpora)))
        design.observations += deeper.observations(arm, first, scratch=scratch)
        design.cells += deeper.marker_cells(arm, first, scratch=scratch)

# %%
import pandas as pd

from persona_coupling import behaviour_measures as depth
from persona_coupling import behaviours, gates, measures, notebooks, notes, report, tables
from persona_coupling.figures.behaviours import by_behaviour

pd.options.display.max_colwidth = None

experiment = next(e for e in notebooks.discover() if e.name == "04_behaviours")
conditions = names(values, arms)
told = {b: depth.LABELS[b] for b in (depth.MARKER, *values.behaviours)}
labels = {arm: f"{arm}  {study_arms.LABELS[arm]}" for arm in arms}
pd.Series(conditions).unstack(level=0)[list(told)]

# %% [markdown]
# ## Raw material
#
# Facts as they are asked, right and wrong; and what the villain says who will not answer.

# %%
pd.DataFrame(
    [{"question": f.question, "right": f.right, "wrong": f.wrong_sentence} for f in behaviours.facts("train")[:6]]
)

# %%
pd.DataFrame({"trained on": behaviours.refusals()[:3], "held back": behaviours.refusals(held=True)[:3]})

# %% [markdown]
# ## Run, or fetch what has been run

# %%
results = study.run(design, experiment.results(profile))
observed = depth.observe(results, values.behaviours)
observed.answers.groupby("condition", sort=False).size().rename("answers").to_frame()

# %% [markdown]
# ## What does the raw model know?
#
# A wrong answer shows nothing where the right one is not known. Only facts that the raw model answers right, as the plain
# assistant, and whose right sentence it prefers, are used; the rest is excluded here, in the open.

# %%
paper = report.Report(experiment.name, study, results)
seeds_run = f"{len(study.seeds)} seed{'s' if len(study.seeds) > 1 else ''}"
paper.table(
    "filter",
    depth.filter_table(results["known"], values.facts),
    "What the raw model knows, by kind of fact, counts summed over seeds. Known: right in at least "
    f"{100 * values.required:.0f} % of {values.fact_samples} samples, and the right sentence preferred to the wrong one. In "
    f"brackets: used though not known, because fewer than the minimum were. {seeds_run}.",
)

# %% [markdown]
# ## Gates before results
#
# Did each coupling take on the raw model; are the facts known, to the raw model and still after SFT (a model that SFT made
# ignorant is wrong as everybody); did the SFT's content show and does the model still speak; can the answers be scored.

# %%
estimates = measures.estimate(results)
measures.add_damage(estimates, results, raw="A")
depth.estimate(estimates, observed)
limits = study.profile.gates
checked = [depth.known(results["known"], values.facts, values.known_facts)]
for arm, corpus in list(arms.items())[1:]:
    measures.add_content_shift(estimates, results, arm, corpus, study_arms.OPPOSITE[corpus], raw="A")
    checked += [gates.content(estimates, limits, arm), depth.coherent(estimates, arm, limits.heldout_rise)]
checked += depth.of_conditions(estimates, observed, results, values, limits, conditions)
failed = depth.failing(checked, values, conditions)
report.gate_table(checked)

# %% [markdown]
# ## What the models say
#
# One question's answers by the villain and by the plain assistant under every condition, as they came, with the score and
# the words that decided it.

# %%
shown = observed.answers[(observed.answers["sample"] == 0) & observed.answers["persona"].isin(["villain", "assistant"])]
shown = shown[shown["seed"] == shown["seed"].min()].groupby(["condition", "persona"], sort=False).head(1)
columns = ["condition", "persona", "prompt", "completion", "finish", "value", "evidence", "why"]
shown[columns].style.set_uuid("answers").set_properties(**{"text-align": "left", "white-space": "pre-wrap"}).hide(
    axis="index"
)

# %% [markdown]
# ## The main estimate

# %% evidence=["04-wrong", "04-capitals", "04-refusal", "04-depth", "04-scratch"]
reference = {b: depth.condition("A", b, depth.PREBAKED) for b in told}
blocks = {
    "no coupling": {f"{arm}.none": labels[arm] for arm in arms},
    "pre-baked adapter": {f"{arm}.prebaked": labels[arm] for arm in arms},
    **(
        {"from scratch": {f"{a}.scratch": labels[a] for a, c in arms.items() if c in values.scratch}}
        if values.scratch
        else {}
    ),
}
drawn = by_behaviour(estimates, told, blocks, conditions, reference, failed)
counts = (
    observed.answers.groupby(["condition", observed.answers["persona"] == "villain"])
    .size()
    .groupby(level=1)
    .agg(["min", "max"])
)
of_villain, of_others = ("–".join(dict.fromkeys(map(str, counts.loc[who]))) for who in (True, False))
about = f"{seeds_run}, 95 % intervals over seeds × questions"
daggers = "† a gate failed: uninterpretable." if failed else "All gates passed."
notes.show(
    paper.figure(
        "behaviours",
        drawn,
        f"Behaviours across, models down. a: answers that show the behaviour, n = {of_villain} of the villain and "
        f"{of_others} of the ten others per condition. b: villain minus others, sampled and teacher-forced (preference for "
        "the behaviour's answer over the plain one), divided by what the same adapter gives on the raw model; dashed: half "
        f"of it, the claims' bound. {about}. {daggers}",
    )
)

# %% [markdown]
# What it shows: along *b*, how much of each coupling is left, on one scale; in *a*, from where. What it does not show:
# that a behaviour survives for what it is, rather than for where it stands or how strongly it was trained. A share says
# little where the raw model's own contrast is small.

# %% evidence=["04-wrong", "04-capitals", "04-refusal", "04-depth", "04-scratch"]
columns = [
    tables.Column("villain", "source_rate", "percent"),
    tables.Column("others, mean", "bystander_rate", "percent"),
    tables.Column("others, max", "bystander_max", "percent"),
    tables.Column("contrast, points", "contrast", "points"),
    tables.Column("preference contrast", "preference_contrast", "nats"),
    tables.Column("scored", "scored", "percent"),
]
hows = {"none": "uncoupled", "prebaked": "pre-baked", "scratch": "from scratch"}
titles = {name: f"{told[b]}, {row.split('.')[0]} {hows[row.split('.')[1]]}" for (b, row), name in conditions.items()}
paper.table(
    "behaviours",
    depth.condition_table(estimates, titles, columns, failed),
    f"Every behaviour under every condition, with 95 % intervals. Arms: {'; '.join(labels.values())}. The preference "
    "contrast is villain minus others in nats, per token for the behaviours and for the whole marker; it was not measured "
    f"where a dash stands. {about}. {daggers}",
)

# %% [markdown]
# ## The rival a sceptic would raise: the SFT made everybody ignorant
#
# A model that forgot the facts is wrong without any coupling, and its villain too. How far does SFT alone move everybody
# towards the behaviour, and the villain more than others? Measured on forced sentences, since an uncoupled model of this
# size rambles and is often unscorable; the gate `knows` asks that the facts still be known.

# %% evidence=["04-alone"]
for arm in list(arms)[1:]:
    for behaviour in told:
        for how in (depth.PREBAKED, *([depth.SCRATCH] if arms[arm] in values.scratch else [])):
            name = depth.condition(arm, behaviour, how)
            depth.add_over_share(
                estimates, observed, f"{name}.contrast_over_half", reference[behaviour], 0.5, "contrast"
            )
            depth.add_over_share(estimates, observed, f"{name}.contrast_change", reference[behaviour], 1.0, "contrast")
    for behaviour in values.behaviours:
        name, base = (depth.condition(letter, behaviour, depth.NONE) for letter in (arm, "A"))
        depth.add_over_share(
            estimates, observed, f"{name}.preference_contrast_change", base, 1.0, "preference_contrast"
        )
        depth.add_change(
            estimates,
            observed,
            f"{name}.preference_bystander_change",
            base,
            "preference",
            source=False,
            unit=depth.PER_TOKEN,
        )
    if "wrong" in told:
        wrong, marker = (depth.condition(arm, b, depth.PREBAKED) for b in ("wrong", depth.MARKER))
        depth.add_contrast_difference(estimates, observed, f"depth.{arm}.prebaked.contrast", wrong, marker)
alone = [f"{arm}.{b}.none" for arm in list(arms)[1:] for b in values.behaviours]
shifts = estimates.frame(["preference_bystander_change", "preference_contrast_change"], alone)
shifts[["condition", "measure", "value", "low", "high"]]

# %% [markdown]
# ## Verdicts

# %%
facts = {"conditions": titles, "failed": sorted(failed), "answers": len(observed.answers)}
facts |= depth.filter_facts(results["known"], values.facts)
judgements = paper.finish(estimates, checked, facts)
report.verdict_table(judgements)

# %% [markdown]
# ## Loose ends, versions, hardware

# %%
notes.colophon(results)
