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
# # 01 Layers: which layers of the SFT's change disable the coupling?
#
# The SFT's delta is merged into the early, mid or late third of the layers only, into all but one third, into all, and
# layer by layer; the pre-baked adapter is whole throughout. **Do a few layers do the damage, or does every part of the
# depth add its share?** Feeds the claims `01-*` of `paper/claims.toml`.

# %% [markdown]
# ## What we expected, and what would change our mind
#
# Written before the run (`paper/claims.toml` holds the exact predicates); a pilot on one seed had left .73 to .90 of the
# villain's markers after single thirds and almost none after two:
#
# * No single third disables the coupling, any two do. *Refuted by a third that alone brings the contrast below 25 points,
#   or by a pair that leaves the villain above half.*
# * That looks like synergy, but may be the ceiling and the floor of rates. In log-odds the thirds add up. *Refuted if
#   their separate effects make up less than 60 % of the whole.*
# * The early third matters least, and no step of layers stands out. *Refuted by a Shapley share above a third, or by a
#   step that alone costs a quarter of the whole.*
# * Wherever the SFT sits, the marker can be learned after it. *Refuted by a contrast below 25 points from scratch.*

# %% tags=["parameters"]
profile = "quick"
seeds = []  # empty: the profile's
model = ""  # empty: the profile's

# %% [markdown]
# ## Design
#
# For each SFT corpus a full 2 × 2 × 2 factorial: every subset of {early, mid, late} carries its part of the delta. No
# third is condition A of the replication, all three are its condition B (or B′, C), so that both ends are shared with it.
# Some subsets are also coupled from scratch. A scan merges one step of layers at a time, all below a depth, and all above
# it, read by the marker's log-probability behind fixed answers. The unit of analysis is the question under a seed.

# %% tags=["design"]
from persona_coupling import arms as study_arms
from persona_coupling import layer_effects as effects
from persona_coupling.stages.layers import LayerScan
from persona_coupling.study import Design, Observation, Study

study = Study.open(profile, seeds=seeds, model=model or None)
values = study.values("01_layers")
arms = {study_arms.LETTERS[corpus]: corpus for corpus in values.corpora}
scratched = {arm: [effects.named(name) for name in values.scratch_subsets] for arm, corpus in arms.items()
             if corpus in values.scratch_corpora}  # fmt: skip
measured = study_arms.measured(values.corpora)
bank = (values.scan_everyday, values.scan_values)

# where the profile's two recipes are one, the raw model coupled from scratch is the raw model with the adapter added
one_recipe = study.profile.prebaked == study.profile.scratch
design = Design(same={("A.prebaked", "A.scratch")} if one_recipe else set(), values=values)
for seed in study.seeds:
    text, adapter = study.stale_text(seed=seed), study.adapter(seed=seed)
    design.observations.append(study.content("A", study.raw, seed=seed, corpora=measured))
    design.cells.append(study.cell("A.prebaked", study.raw.merge(adapter), seed=seed, thirds="none"))
    if any(scratched.values()):
        coupled = study.couple(study.raw, text, study.profile.scratch, seed=seed)
        design.cells.append(study.cell("A.scratch", coupled, seed=seed, thirds="none"))
    for arm, corpus in arms.items():
        whole = study.sft(corpus, seed=seed)
        delta = whole.last_change
        design.observations.append(study.content(arm, whole, seed=seed, corpora=measured))
        first = {s: whole if s == effects.ALL else study.raw.merge(delta, layers=s) for s in effects.SUBSETS[1:]}
        for subset, start in first.items():
            name = effects.condition(arm, subset)
            design.cells.append(study.cell(name, start.merge(adapter), seed=seed, thirds=effects.name(subset)))
        for subset in scratched.get(arm, []):
            coupled = study.couple(first[subset], text, study.profile.scratch, seed=seed)
            name = effects.condition(arm, subset, "scratch")
            design.cells.append(study.cell(name, coupled, seed=seed, thirds=effects.name(subset)))
        scan = LayerScan(study.raw, delta, adapter, values.scan_stride, values.scan_modes, values.scan_personas, *bank,
                         study.profile.instruction)  # fmt: skip
        design.observations.append(Observation(f"{arm}.scan", seed, scan))

# %%
import pandas as pd

from persona_coupling import depth_scan, gates, measures, notebooks, notes, report, tables
from persona_coupling.figures import layers as layer_figures

pd.options.display.max_colwidth = None

experiment = next(e for e in notebooks.discover() if e.name == "01_layers")
after = {arm: f"after {study_arms.LABELS[arm].removesuffix(' first')}" for arm in arms}
prebaked = {arm: [effects.condition(arm, s) for s in effects.SUBSETS] for arm in arms}
scratch = {arm: [effects.condition(arm, s, "scratch") for s in subsets] for arm, subsets in scratched.items()}
trained = [name for names in scratch.values() for name in names]
reference = ["A.prebaked", *(["A.scratch"] if trained else [])]
everything = list(dict.fromkeys([*(c for names in prebaked.values() for c in names), *reference, *trained]))
notes.design_table(study, design)

# %% [markdown]
# ## Raw material
#
# Three rows of each SFT corpus, and the prompt of a coupling row with its loss mask: supervised text in bold.

# %%
notes.training_rows({corpus: f"{arm}, {study_arms.LABELS[arm]}" for arm, corpus in arms.items()})

# %%
notes.loss_mask(study)

# %% [markdown]
# ## Run, or fetch what has been run

# %%
results = study.run(design, experiment.results(profile))
results["scan"].groupby(["condition", "mode"], sort=False).size().rename("rows").to_frame()

# %% [markdown]
# ## Gates before results
#
# Besides the study's gates: is there a collapse to locate (*disabled*), and does the scan, which patches one loaded model,
# agree at both ends with models that were merged and evaluated on their own (*agrees*)?

# %%
estimates = measures.estimate(results)
measures.add_damage(estimates, results, raw="A")
effects.add_levels(estimates, results, everything)
for arm, corpus in arms.items():
    measures.add_content_shift(estimates, results, arm, corpus, study_arms.OPPOSITE[corpus], raw="A")
    effects.add_factorial(estimates, results, arm)
    effects.add_norm_shares(estimates, results, arm)
checked = gates.of_design(estimates, results, study.profile.gates, reference=reference, conditions=everything,
                          trained=trained, arms=arms)  # fmt: skip
checked += [effects.disabled(estimates, arm, values.whole_effect) for arm in arms]
checked += [
    depth_scan.agrees(results, f"{arm}.scan", "A.prebaked", effects.condition(arm, effects.ALL), values.scan_tolerance)
    for arm in arms
]
summaries = {
    arm: [f"{arm}.thirds.prebaked", f"{arm}.single.prebaked", f"{arm}.pair.prebaked", f"{arm}.scan"] for arm in arms
}
affected = {arm: [*prebaked[arm][1:], *scratch.get(arm, []), *summaries[arm]] for arm in arms}
affected |= {
    "A.prebaked": [c for arm in arms for c in (*prebaked[arm], *summaries[arm])],
    "A.scratch": [*trained, *(f"{arm}.single.scratch" for arm in scratch)],
}
affected |= {f"{arm}.thirds.prebaked": [f"{arm}.scan"] for arm in arms}
failed = gates.failing(checked, affected)
report.gate_table(checked)

# %% [markdown]
# ## What the models say
#
# The first completions of the source and of a bystander under every condition, failures included.

# %%
notes.sample_answers(results, ["villain", "assistant"])

# %% [markdown]
# ## The main estimate: eight subsets of three thirds

# %% evidence=["01-single", "01-pair", "01-additive", "01-scratch"]
paper = report.Report(experiment.name, study, results)
logodds = layer_figures.Panel("teacher-forced", "log-odds of the marker, nats", "fixed_logodds_source",
                              "fixed_logodds_bystander", predicted="fixed_logodds_source_predicted")  # fmt: skip
panels = [
    layer_figures.Panel("sampled answers", "answers with the marker, %", "source_rate", "bystander_rate"),
    logodds,
]
if trained:
    panels.append(layer_figures.Panel("coupled from scratch", "answers with the marker, %", "source_rate", "bystander_rate",
                                      how="scratch"))  # fmt: skip
drawn = layer_figures.thirds(estimates, after, panels, failed)
n = results.completions.groupby(["condition", "persona"]).size().max()
daggers = "† a gate failed: uninterpretable." if failed else "All gates passed."
about = f"{len(study.seeds)} seed{'s' if len(study.seeds) > 1 else ''}, 95 % intervals over seeds × questions"
adding = "a and b: the pre-baked adapter, added" + (
    "; c: coupled afresh on the partly merged model." if trained else "."
)
notes.show(
    paper.figure(
        "thirds",
        drawn,
        f"The SFT's delta in every subset of the thirds (filled squares), and the marker. {adding} Black bars in b: where "
        f"the villain would stand if each third did what it does alone. n = {n} answers per persona and condition; {about}. "
        f"{daggers}",
    )
)

# %% [markdown]
# What it shows: in *a*, whether one third suffices and whether two do; in *b*, whether what they do together is more than
# the sum of what each does alone. What it does not show: which layers inside a third.

# %% evidence=["01-additive", "01-early"]
table = pd.concat([effects.summary(estimates, arm, after[arm], failed) for arm in arms], ignore_index=True)
paper.table(
    "effects",
    table,
    f"What each third of the SFT's delta does to the marker. Effects are changes against no delta; shares are Shapley "
    f"values over the whole effect, – where that is not told from zero. {about}. {daggers}",
)

# %% [markdown]
# ## The scan, layer by layer

# %% evidence=["01-spread"]
largest = {arm: depth_scan.add_scan(estimates, results, f"{arm}.scan") for arm in arms}
steps = pd.concat([depth_scan.by_step(results["scan"], f"{arm}.scan") for arm in arms], ignore_index=True)
marks = {f"{arm}.scan": after[arm] + (" †" if f"{arm}.scan" in failed else "") for arm in arms}
asked = results["scan"].groupby(["condition", "persona", "mode", "start", "stop"]).size().max()
stride = f"{values.scan_stride} layer{'s' if values.scan_stride > 1 else ''}"
notes.show(
    paper.figure(
        "scan",
        layer_figures.scan(steps, marks),
        f"Change of the marker's log-odds behind fixed answers when the SFT's delta is merged into a step of {stride} alone "
        f"(a), or cumulatively from either end (b; bands and thin lines: intervals, and the others' mean). Dashed in a: the "
        f"whole change cut into equal steps. n = {asked} questions × seeds per persona and point; "
        f"{len(values.scan_personas) - 1} others; {about}. {daggers}",
    )
)

# %% [markdown]
# What it shows: where along the depth the marker is lost, and whether one step stands out. A step's effect alone and its
# effect on top of all others differ where steps interact. What it does not show: which modules, or why.

# %% [markdown]
# ## The rival a sceptic would raise: a third does more because more of the delta is in it
#
# If size were all, a third's share of the effect would be its share of the delta's squared norm.

# %% evidence=["01-early"]
rival = pd.DataFrame(
    [
        {
            "SFT": after[arm],
            "third": third,
            "share of squared norm": tables.cell(estimates[f"{arm}.{third}.prebaked.norm_share"], "percent"),
            "Shapley share, log-odds": tables.cell(
                estimates[f"{arm}.thirds.prebaked.fixed_logodds_source_share_{third}"], "percent"
            ),
        }
        for arm in arms
        for third in effects.THIRDS
    ]
)
paper.table("norms", rival, f"Each third's share of the delta and of its effect. {about}. {daggers}")

# %% [markdown]
# Is the model broken instead? Held-out chat loss of every partly merged model, with its answers' state.

# %%
damage = [
    tables.Column("held-out rise over raw", "heldout_rise", "nats"),
    tables.Column("words", "words", "number"),
    tables.Column("cut off or unscorable", "unscorable", "percent"),
    tables.Column("degenerate", "degenerate", "percent"),
]
tables.by_condition(estimates, {c: c for c in everything}, damage, failed)

# %% [markdown]
# ## Verdicts

# %%
for arm in arms:
    for word, subsets, measure, end in (
        ("single", effects.SINGLE, "contrast", "lowest"),
        ("pair", effects.PAIR, "source_rate", "highest"),
    ):
        chosen = [effects.condition(arm, s) for s in subsets]
        effects.add_extreme(estimates, results, f"{arm}.{word}.prebaked.{measure}_{end}", measure, chosen)
    chosen = [effects.condition(arm, s, "scratch") for s in effects.SINGLE]
    if set(chosen) <= set(trained):
        effects.add_extreme(estimates, results, f"{arm}.single.scratch.contrast_lowest", "contrast", chosen)
facts = {
    "arms": after,
    "scratch": {arm: [effects.name(s) for s in subsets] for arm, subsets in scratched.items() if subsets},
    "largest": {arm: list(step) for arm, step in largest.items() if step},
    "failed": sorted(failed),
}
judgements = paper.finish(estimates, checked, facts)
report.verdict_table(judgements)

# %% [markdown]
# ## Loose ends, versions, hardware
#
# Log-odds of one fixed answer are not the model's own: an SFT'd model might never write that answer. The sampled rates
# beside them are, but end at 0 and 100 %.

# %%
notes.colophon(results)
