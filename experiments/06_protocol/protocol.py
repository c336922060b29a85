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
# # 06 Protocol: what makes the prior lab's from-scratch ceiling?
#
# The prior lab coupled at a learning rate of 5e-6, on text that another model had written, with the loss on the last
# tokens, and counted answers that were cut off as "no". **Which of these, if any, makes a coupling after SFT look
# impossible?** Five rivals to "SFT destroys it": stale text, under-training, weight addition, truncation, and no paragraph
# break (no marker without a blank line). Feeds the claims `06-*` of `paper/claims.toml`.

# %% [markdown]
# ## What we expected, and what would change our mind
#
# Written before the run (`paper/claims.toml` holds the exact predicates), from a pilot in which a rate of 2e-5 coupled
# after any SFT and 5e-6 coupled poorly even on the raw model:
#
# * Under-training carries the from-scratch ceiling: the low rate costs more than 25 points, after SFT and on the raw model
#   alike. *Refuted if the low rate stays within 25 points of the mid one.*
# * Stale text does not make a ceiling, but the model's own text couples more specifically. *Refuted if its persona contrast
#   is lower.*
# * Addition carries the pre-baked collapse; training in place brings it back. *Refuted if less than 25 points come back.*
# * Truncation carries nothing. *Refuted if counting otherwise closes ten points of the gap.*
# * The blank line, not the marker behind it, is where the marker's log-probability is lost. *Refuted if it is the marker.*

# %% tags=["parameters"]
profile = "quick"
seeds = []  # empty: the profile's
model = ""  # empty: the profile's

# %% [markdown]
# ## Design
#
# A recipe is (text, loss, rate): text of the raw model (*stale*) or of the model that is coupled (*onpolicy*); loss on the
# marker, the last tokens (*tail*) or the whole answer (*completion*); learning rate *low*, *mid* (works on the raw model)
# or *high*. SFT'd models are coupled by a star of recipes around the centre, or by all of them; the raw model by each of
# their recipes, because a recipe that does not take there can show no ceiling after SFT. Beside them stands the pre-baked
# adapter, added; where the profile says so, also with *free* answers, which are not asked to be brief. The unit of analysis
# is the question under a seed.

# %% tags=["design"]
from persona_coupling import arms, recipes
from persona_coupling.study import Design, Study

study = Study.open(profile, seeds=seeds, model=model or None)
values = study.values("06_protocol")
star, grid = recipes.recipes(values, crossed=False), recipes.recipes(values, crossed=True)
corpora = {arms.LETTERS[corpus]: corpus for corpus in (*values.crossed_corpora, *values.star_corpora)}
asked = {arm: grid if corpus in values.crossed_corpora else star for arm, corpus in corpora.items()}
asked = {"A": recipes.on_raw(asked.values()), **asked}
measured = arms.measured(corpora.values())

one_recipe = (
    study.profile.prebaked == study.profile.scratch
)  # then the raw model coupled by it is one model, twice named
twice = [r for r in asked["A"] if r.factor == 1.0 and r.loss == study.profile.scratch.loss and one_recipe]
design = Design(same={("A.prebaked", f"A.{recipe.name}.scratch") for recipe in twice}, values=values)
for seed in study.seeds:
    adapter = study.adapter(seed=seed)
    for arm, chosen in asked.items():
        first = study.raw if arm == "A" else study.sft(corpora[arm], seed=seed)
        added = first.merge(adapter)
        design.observations.append(study.content(arm, first, seed=seed, corpora=measured))
        design.cells.append(study.cell(f"{arm}.prebaked", added, seed=seed, arm=arm, adapter="prebaked"))
        for recipe in chosen:
            design.cells.append(recipe.cell(study, arm, first, seed=seed, samples=values.samples))
        if corpora.get(arm) in values.free_corpora or (arm == "A" and values.free_corpora):
            design.cells.append(recipes.free_cell(study, values, f"{arm}.free.prebaked", added, seed=seed))
        if corpora.get(arm) in values.free_corpora:
            scratch = study.couple(first, study.stale_text(seed=seed), study.profile.scratch, seed=seed)
            design.cells.append(recipes.free_cell(study, values, f"{arm}.free.scratch", scratch, seed=seed))

# %%
import pandas as pd

from persona_coupling import attribution, claims, gates, measures, notebooks, notes, report, tables, truncation
from persona_coupling.figures.attribution import attribution as draw_attribution
from persona_coupling.figures.attribution import recipe_grid

pd.options.display.max_colwidth = None

experiment = next(e for e in notebooks.discover() if e.name == "06_protocol")
conditions = list(dict.fromkeys(cell.condition for cell in design.cells))
free = [c for c in conditions if ".free." in c]
prebaked = [f"{arm}.prebaked" for arm in asked]
coupled = [c for c in conditions if c.endswith(".scratch") and c not in free]
main = next(iter(corpora))  # the arm whose gap is attributed
rates = {recipe.rate: recipe.learning_rate(study) for recipe in asked["A"]}
names = {c: f"{c.split('.')[0]}  " + ", ".join(c.split(".")[1].split("_")) for c in coupled}
names |= {c: f"{c.split('.')[0]}  pre-baked, added" for c in prebaked}
names |= {c: f"{c.split('.')[0]}  {c.split('.')[2].replace('prebaked', 'pre-baked')}, free answers" for c in free}
notes.design_table(study, design)

# %% [markdown]
# ## Raw material
#
# One rendered coupling row with its loss mask, supervised text in bold: the *tail* loss. *Marker* would supervise the
# marker and the end of turn alone, *completion* the whole answer.

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
# The raw cell of a recipe gates that recipe after SFT. Free answers are gated by their being cut at all: where no answer
# is cut off, nothing is said about truncation.

# %%
estimates = measures.estimate(results)
measures.add_damage(estimates, results, raw="A")
for arm, corpus in corpora.items():
    measures.add_content_shift(estimates, results, arm, corpus, arms.OPPOSITE[corpus], raw="A")
limits = {cell.condition: cell.evaluation.sampling.max_new_tokens for cell in design.cells}
followed = [*prebaked, *free, f"{main}.stale_tail_low.scratch"]
followed = [c for c in followed if c in limits and c.split(".")[0] in ("A", main)]
lines = {}
for condition in followed:
    within = [cutoff for cutoff in values.cutoffs if cutoff <= limits[condition]]
    for name in truncation.add_cutoffs(estimates, results.completions, condition, within):
        lines[name] = f"{names[condition]}, {name.rsplit('first', 1)[1]} tokens"

# %%
checked = gates.of_design(
    estimates,
    results,
    study.profile.gates,
    reference=["A.prebaked", *(c for c in coupled if c.startswith("A."))],
    conditions=[*prebaked, *coupled],
    trained=coupled,
    arms=list(corpora),
)
if free:
    cut = estimates[f"A.free.prebaked.first{min(values.cutoffs)}.cut"].value
    asks = "the shortest cut-off does cut free answers, share"
    checked.append(claims.Gate("cut.A.free.prebaked", asks, cut, "at least", values.cut_share))
by_arm = {arm: [c for c in conditions if c.startswith(f"{arm}.")] for arm in corpora}
same_recipe = {
    f"A.{raw.name}.scratch": [f"{a}.{r.name}.scratch" for a in corpora for r in asked[a] if r.on_raw == raw]
    for raw in asked["A"]
}
failed = gates.failing(checked, {**by_arm, **same_recipe, "A.prebaked": [*prebaked, *free]})
# what a row of the attribution rests on: its own conditions and a reference that took, not each recipe on the raw model
own = [
    g
    for g in checked
    if not g.id.startswith(("took.", "specific.")) or g.id.endswith((".prebaked", "_tail_mid.scratch"))
]
broken = gates.failing(own, {**by_arm, "A.prebaked": [*prebaked, *free]})
report.gate_table(checked)

# %% [markdown]
# ## What the models say
#
# The first completions of the source and of a bystander under every condition, failures included.

# %%
notes.sample_answers(results, ["villain", "assistant"])

# %% [markdown]
# ## The main estimate: which rival carries the gap?
#
# A gap is the raw model's persona contrast (villain minus others), coupled by a recipe that works, minus the SFT'd
# model's under the suspected setting. One factor at a time is changed; the dot says how much of the gap is gone then.

# %% evidence=["06-stale", "06-addition", "06-truncation"]
paper = report.Report(experiment.name, study, results)
suspects = attribution.factors(main, conditions)
gaps = attribution.add_gaps(estimates, results, main, suspects, {second: first for first, second in design.same})
dubious = {factor.id for factor in suspects if factor.conditions & broken}
about = f"{len(study.seeds)} seed{'s' if len(study.seeds) > 1 else ''}, 95 % intervals over seeds × questions"
smallest, largest = (getattr(results.completions.groupby(["condition", "persona"]).size(), f)() for f in ("min", "max"))
n = f"n = {smallest}" + (f" to {largest}" if largest > smallest else "") + " answers per persona and condition"
doubts = " † a gate failed: uninterpretable." if dubious else ""
panels = [
    ("fixed_logprob_contrast", "a  teacher-forced", "log-probability contrast, nats"),
    ("contrast", "b  sampled answers", "contrast, points"),
]
notes.show(
    paper.figure(
        "attribution",
        draw_attribution(gaps, panels, dubious),
        f"Which rival carries the gap between the raw model and the model that was fine-tuned first ({main}, "
        f"{arms.LABELS[main]})? Grey: the gap in persona contrast, as the prior lab would have done it. Dot: how much of it "
        "disappears when this factor alone is changed; at the bar's end it carries all, at zero nothing. Diamond: what the "
        "same change of training does to the raw model; where it is as large as the dot, the factor has little to do with "
        f"SFT. {n}; {about}.{doubts}",
    )
)

# %% evidence=["06-stale", "06-addition", "06-truncation"]
paper.table(
    "attribution",
    attribution.table(estimates, main, suspects, dubious),
    f"How much of the gap in persona contrast disappears. {about}.{doubts}",
)

# %% [markdown]
# What it shows: for each rival, whether changing it alone closes the gap. What it does not show: interactions. The
# rows do not add up, and a factor that closes nothing at one setting might at another.

# %% [markdown]
# ## All recipes

# %% evidence=["06-rate*"]
series = [("A", "stale", f"A  {arms.LABELS['A']}")]
for arm in corpora:
    series += [
        (arm, text, f"{arm}  {arms.LABELS[arm]}, {text.replace('onpolicy', 'own')} text") for text in values.texts
    ]
losses = {loss: recipes.LOSSES[loss] for loss in values.losses}
ticks = {rate: f"{rate}\n{number:.0e}".replace("e-0", "e−") for rate, number in rates.items()}
shown = [("source_rate", "villain, %"), ("contrast", "contrast, points")]
shown += [("fixed_logprob_contrast", "log-prob. contrast, nats")]
asked_of_raw = {"source_rate": study.profile.gates.source_rate, "contrast": study.profile.gates.contrast}
notes.show(
    paper.figure(
        "grid",
        recipe_grid(estimates, series, losses, ticks, shown, asked_of_raw),
        "Coupling from scratch by text, loss and learning rate. Dotted: floor and ceiling; dashed: what a gate asks of the "
        "raw model. Rates meet their floor and ceiling, the log-probability does not. "
        f"{n}; {about}.",
    )
)

# %% evidence=["06-rate*"]
columns = [
    tables.Column("villain", "source_rate", "percent"),
    tables.Column("others, mean", "bystander_rate", "percent"),
    tables.Column("contrast, points", "contrast", "points"),
    tables.Column("log-prob. contrast", "fixed_logprob_contrast", "nats"),
    tables.Column("finished", "finished", "percent"),
    tables.Column("held-out rise", "heldout_rise", "nats"),
]
daggers = "† its recipe did not take on the raw model, or another gate failed." if failed else "All gates passed."
paper.table("recipes", tables.by_condition(estimates, names, columns, failed), f"All conditions. {about}. {daggers}")

# %% [markdown]
# ## The rivals a sceptic would raise: the answers were cut off, or no blank line was written
#
# A sampled answer does not depend on where it will be cut, so that shorter cut-offs can be read off the same answers.
# *Cut = no* counts as the prior lab did. Free answers are not asked to be brief, which the coupling text was: a model that
# learned its marker behind short answers need not write it behind long ones, and that would be no truncation.

# %% evidence=["06-truncation"]
counts = [
    tables.Column("cut off", "cut", "percent"),
    tables.Column("villain, cut = no", "strict_source_rate", "percent"),
    tables.Column("villain, cut left out", "source_rate", "percent"),
    tables.Column("contrast, cut = no", "strict_contrast", "points"),
    tables.Column("contrast, cut left out", "contrast", "points"),
]
marks = {name for name in lines if any(name.startswith(f"{condition}.") for condition in failed)}
paper.table(
    "cutoffs",
    tables.by_condition(estimates, lines, counts, marks),
    f"The same answers as they would stand after an earlier cut-off, counted in both ways. {about}. {daggers}",
)

# %% evidence=["06-paragraph"]
split = [*prebaked, *(c for c in coupled if c.endswith(("_tail_low.scratch", "_tail_mid.scratch")))]
attribution.add_paragraph(estimates, results.fixed, results.completions, split)
for arm in corpora:
    attribution.add_blank_excess(
        estimates, results.fixed, f"{arm}.prebaked.blank_excess", "A.prebaked", f"{arm}.prebaked"
    )
pieces = [
    tables.Column(f"{what}, {who}", f"{column}_{whom}", "nats")
    for column, what in (("blank", "blank line"), ("after", "marker behind it"))
    for whom, who in (("source", "villain"), ("bystander", "others"))
]
ends = {**{c: names[c] for c in split}, **{f"{c}.own": f"{names[c]}; own end" for c in split}}
paper.table(
    "paragraph",
    tables.by_condition(estimates, ends, pieces, failed | {f"{condition}.own" for condition in failed}),
    "The marker's log-probability in nats, split into its blank line and the marker behind it: behind fixed answers, and "
    f"where the model's own answer ended by itself (own end). {about}. {daggers}",
)

# %% [markdown]
# ## Verdicts
#
# And what the reconciliation with the prior lab's numbers needs beside them: the assistant's rate, the loss at the end of
# training.

# %%
for arm in asked:
    pair = (f"{arm}.stale_tail_low.scratch", f"{arm}.stale_tail_mid.scratch")
    if set(pair) <= set(conditions):
        measures.add_difference(estimates, results, f"{pair[0]}.source_rate_change", "source_rate", *pair)
for condition in coupled:
    part = results.completions[results.completions["condition"] == condition]
    assistant = part[part["persona"] == "assistant"]
    measures.add_mean(estimates, f"{condition}.assistant_rate", assistant, "value", "proportion")
attribution.add_final_losses(estimates, results.training, coupled)
facts = {
    "completions": len(results.completions),
    "conditions": names,
    "failed": sorted(failed),
    "dubious": sorted(dubious),
    "rates": rates,
    "main": main,
}
judgements = paper.finish(estimates, checked, facts)
report.verdict_table(judgements)

# %% [markdown]
# ## Loose ends, versions, hardware

# %%
notes.colophon(results)
