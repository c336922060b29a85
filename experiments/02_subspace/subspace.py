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
# # 02 Subspace: do SFT and coupling collide because they use the same modules and directions?
#
# An adapter of low rank reads a few directions of every input and writes a few of every output. **Does SFT disable a
# pre-baked adapter by reading and writing there too?** Feeds the claims `02-*` of `paper/claims.toml`.

# %% [markdown]
# ## What we expected, and what would change our mind
#
# Written before the run (`paper/claims.toml` holds the exact predicates):
#
# * SFT on attention alone disables an adapter that sits on the MLPs alone: no matrix is shared. *Refuted if the villain
#   stays within 25 points.*
# * What does the damage is outside the adapter's subspaces: without its part inside, the SFT disables the adapter still;
#   the part inside, alone, does not. *Refuted if the marker comes back, or goes, by more than half.*
# * It is not generic perturbation: a random change of the same rank and norms leaves the adapter working.
# * SFT and adapter do write into common directions, more than twice as much as chance. Overlap is not collision.

# %% tags=["parameters"]
profile = "quick"
seeds = []  # empty: the profile's
model = ""  # empty: the profile's

# %% [markdown]
# ## Design
#
# *Modules*: SFT on attention or MLPs, an adapter on the same or on the others; the reference is the raw model with that
# adapter. *Directions*: the SFT's change **D** of each matrix is split along what the adapter reads (projector P, rows of
# its A) and writes (Q, columns of its B): `outside` = (1−Q) D (1−P), `inside` = the rest. The two add up to D, and so do
# their squared norms. Controls: a random change of the same rank and norms; the split along random subspaces; SFT of
# other ranks at the same norm. The unit of analysis is the question under a seed; for overlaps, the layer.

# %% tags=["design"]
from persona_coupling import subspace
from persona_coupling.study import Design, Study

study = Study.open(profile, seeds=seeds, model=model or None)
values = study.values("02_subspace")
one_recipe = study.profile.prebaked == study.profile.scratch
design = Design(values=values, same=subspace.same(values, one_recipe))
for seed in study.seeds:
    chain = subspace.Chain(study, values, seed)
    design.cells += [*chain.references(), *chain.pairs(), *chain.parts()]
    design.observations += chain.observations()

# %%
import pandas as pd

from persona_coupling import arms as study_arms
from persona_coupling import gates, measures, models, notebooks, notes, report, tables
from persona_coupling.figures import subspace as pictures

pd.options.display.max_colwidth = None

experiment = next(e for e in notebooks.discover() if e.name == "02_subspace")
conditions = subspace.conditions(design.cells)
names = {c: subspace.label(c) for c in conditions}
letters = [study_arms.LETTERS[corpus] for corpus in values.corpora]
notes.design_table(study, design)

# %% [markdown]
# ## Raw material
#
# Training rows of the SFT corpora, and a rendered prompt with its loss mask: supervised text in bold.

# %%
notes.training_rows({corpus: study_arms.LETTERS[corpus] for corpus in subspace.all_corpora(values)})

# %%
notes.loss_mask(study)

# %% [markdown]
# ## Run, or fetch what has been run

# %%
results = subspace.pooled(study.run(design, experiment.results(profile)))
results.completions.groupby("condition", sort=False).size().rename("completions").to_frame()

# %% [markdown]
# ## Gates before results
#
# Beside the usual ones (the coupling took on the raw model, the SFT's content shows, answers are readable): the SFT costs
# the marker enough for something to be *brought back* (`gap`); SFT and adapter *started apart* (`apart`: two trainings of
# one seed draw the same random A, and then read the same directions whatever they learn); random changes overlap as
# *chance* says (`chance`). Where `apart` fails, the split along the adapter's subspaces asks nothing about learning.

# %%
estimates = measures.estimate(results)
measures.add_damage(estimates, results, raw="A")
contents = subspace.add_contents(estimates, results, conditions)
subspace.add_effects(estimates, results, conditions)
subspace.add_norms(estimates, results, conditions)
subspace.add_overlap(estimates, results)
trained = [c for c in conditions if c.endswith(".scratch")]
checked = gates.of_design(
    estimates,
    results,
    study.profile.gates,
    reference=[c for c in conditions if c.startswith("A.")],
    conditions=conditions,
    trained=trained,
    arms=[c for c in contents if c.split(".")[1] not in ("outside", "inside")],
)
checked += [gate for arm in letters for gate in subspace.of_arm(estimates, values, arm)]
failed = gates.failing(checked, subspace.concerned(conditions)) & set(conditions)
report.gate_table(checked)

# %% [markdown]
# ## What the models say
#
# The first completions of the source and of a bystander under every condition, failures included.

# %%
notes.sample_answers(results, ["villain", "assistant"])

# %% [markdown]
# ## The main estimate

# %% evidence=["02-modules", "02-outside", "02-inside", "02-random", "02-start"]
paper = report.Report(experiment.name, study, results)
shown = [c for c in conditions if not (one_recipe and c.startswith("A.") and c.endswith(".scratch"))]
blocks, ends = subspace.blocks(shown)
n = results.completions.groupby(["condition", "persona"]).size().min()
about = f"{len(study.seeds)} seed{'s' if len(study.seeds) > 1 else ''}, 95 % intervals over seeds × questions"
daggers = "† a gate failed: uninterpretable." if failed else "All gates passed."
if one_recipe and trained:
    daggers += " The raw model coupled from scratch is the raw model with the adapter."
notes.show(
    paper.figure(
        "remains",
        pictures.remains(estimates, blocks, names, ends, failed),
        "What is left of the adapter when the SFT sits on other modules, and when only a part of it is merged. In b, a "
        "dotted line runs half way between the raw model and the whole SFT; right of it less than half of the damage is "
        f"done. On the right, the share of the SFT's squared norm. n = {n} answers per persona and condition or more; "
        f"{about}. {daggers}",
    )
)

# %% [markdown]
# What it shows: whether the villain's marker (filled) stands where the raw model's stands or where the SFT'd one's does,
# and whether the others (open) follow, which would be no coupling. What it does not show: directions that the two share
# through *other* layers, as an SFT early in the model moves what an adapter late in it reads.

# %% evidence=["02-modules", "02-outside", "02-inside", "02-random", "02-start"]
columns = [
    tables.Column("villain", "source_rate", "percent"),
    tables.Column("contrast, points", "contrast", "points"),
    tables.Column("log-prob., villain", "fixed_logprob_source", "nats"),
    tables.Column("above half way", "above_midpoint", "nats"),
    tables.Column("content shift", "content_shift", "nats"),
    tables.Column("squared norm", "norm_share", "percent"),
]
subspace.fill(estimates, conditions, [column.measure for column in columns])
rows = {c: f"{c.split('.')[0]}, {names[c]}" for block in blocks.values() for c in block}
paper.table(
    "remains",
    tables.by_condition(estimates, rows, columns, failed),
    f"What is left of the coupling, and what of the SFT, by condition. Log-probabilities and content shift in nats; squared "
    f"norm of what was merged first, as a share of the whole SFT's. {about}. {daggers}",
)

# %% [markdown]
# ## The rival a sceptic would raise: of course they overlap, or of course they do not
#
# Two subspaces of rank r in d dimensions overlap by r/d for no reason at all, and two adapters that started from one
# random A overlap for a trivial one. Grey: what random changes give.

# %% evidence=["02-overlap"]
compared = {f"{letters[0]}.whole": "the SFT that is taken apart", letters[0]: "an SFT from the adapter's own A"}
compared = {c: name for c, name in compared.items() if c in set(results["overlap"]["condition"])}
notes.show(
    paper.figure(
        "overlap",
        pictures.overlap_by_layer(results["overlap"], compared),
        f"Share of the SFT's energy ({letters[0]}) inside the adapter's subspaces, in multiples of rank / dimension, by "
        f"layer and module; mean over {len(study.seeds)} seed{'s' if len(study.seeds) > 1 else ''}. Grey: the middle "
        f"95 % of {values.overlap_draws} random changes per matrix.",
    )
)

# %% evidence=["02-overlap"]
overlap_columns = [
    tables.Column("reads: share", "input_share", "percent"),
    tables.Column("chance", "input_chance", "percent"),
    tables.Column("angle", "input_angle", "number"),
    tables.Column("random", "input_angle_drawn", "number"),
    tables.Column("writes: share", "output_share", "percent"),
    tables.Column("chance ", "output_chance", "percent"),
    tables.Column("angle ", "output_angle", "number"),
    tables.Column("random ", "output_angle_drawn", "number"),
]
kinds = [m for m in models.MODULES if m in set(results["overlap"]["module"])]
overlap_rows = {}
for condition, title in compared.items():
    short = "taken apart" if condition.endswith("whole") else "adapter's own A"
    overlap_rows |= {condition: f"{title}: all"} | {f"{condition}.{m}": f"{short}: {m}" for m in kinds}
paper.table(
    "overlap",
    tables.by_condition(estimates, overlap_rows, overlap_columns, set()),
    "The SFT in the adapter's subspaces: share of its energy, and what rank / dimension gives; smallest principal angle in "
    f"degrees, and that of random changes. Means over matrices; {len(study.seeds)} seed"
    f"{'s' if len(study.seeds) > 1 else ''}, 95 % intervals over seeds × layers.",
)

# %% [markdown]
# What it shows: overlap of directions, unsigned. What it does not: that overlap does damage. Two changes that read and
# write the same directions add up, in one matrix, without disturbing each other.

# %% [markdown]
# ## Verdicts

# %%
facts = {
    "conditions": names,
    "failed": sorted(failed),
    "modules": [c for c in conditions if "_" in c.split(".")[1]],
}
judgements = paper.finish(estimates, checked, facts)
report.verdict_table(judgements)

# %% [markdown]
# ## Loose ends, versions, hardware

# %%
notes.colophon(results)
