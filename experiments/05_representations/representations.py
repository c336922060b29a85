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
# # 05 Representations: did SFT move the villain off what the adapter reads?
#
# A pre-baked adapter stops working after SFT. One explanation is geometric: the SFT moved the villain's representation, and
# the adapter now looks where nobody is. **Is the villain still there, does the adapter still read it, and does the
# marker return when the villain's centroid is put back by force?** Feeds the claims `05-*` of `paper/claims.toml`.

# %% [markdown]
# ## What we expected, and what would change our mind
#
# Written before the run (`paper/claims.toml` holds the exact predicates):
#
# * SFT moves everybody alike; the personas stay where they were among themselves. *Refuted if a third or more of the
#   villain's shift is its own, or if the raw model's probe, centred, names less than half of the SFT'd states.*
# * The adapter still receives most of what tells the villain from the others. *Refuted if less than half of that signal
#   is kept.* So the geometric explanation fails.
# * And the causal test agrees: putting the centroid back at one layer brings back less than half of the loss. *Refuted if
#   some layer brings back more.*

# %% tags=["parameters"]
profile = "quick"
seeds = []  # empty: the profile's
model = ""  # empty: the profile's

# %% [markdown]
# ## Design
#
# *States.* The residual stream after every layer, for eleven personas and all evaluation questions, at the last prompt token
# and averaged over the tokens of the question's fixed answer. The text is teacher-forced and the same for every model.
# *Causal test.* With the pre-baked adapter added, the villain's centroid, raw minus SFT'd, is added after one layer from
# the last prompt token on. Controls: the same vectors under random rotations; on the raw model the reverse push; and, as
# the method's own positive control, villain minus assistant added to the assistant. No question meets its own states.

# %% tags=["design"]
from persona_coupling import arms as study_arms
from persona_coupling import representation_measures as whereabouts
from persona_coupling.stages.representations import Hidden, Shift
from persona_coupling.stages.steering import Steer, persona_swap, pushing, restoring
from persona_coupling.study import Design, Observation, Study

study = Study.open(profile, seeds=seeds, model=model or None)
values = study.values("05_representations")
arms = {study_arms.LETTERS[corpus]: corpus for corpus in values.corpora}
asked = study.profile.evaluation
bank = (asked.everyday, asked.values, study.profile.instruction)
design = Design(values=values)
for seed in study.seeds:
    adapter, raw = study.adapter(seed=seed), Hidden(study.raw, *bank)
    sfts = {arm: study.sft(corpus, seed=seed) for arm, corpus in arms.items()}
    hidden = {arm: Hidden(sft, *bank) for arm, sft in sfts.items()}
    control = (
        persona_swap(whereabouts.SWAP, raw),
        *(pushing(whereabouts.push(arm), raw, tuned) for arm, tuned in hidden.items()),
    )
    plans = {"A": (study.raw, control)}
    plans |= {arm: (sft, restoring(raw, hidden[arm], values.restore_parts)) for arm, sft in sfts.items()}
    for arm, (first, additions) in plans.items():
        coupled, sampled = first.merge(adapter), () if arm == "A" else (whereabouts.RESTORE,)
        steer = Steer(
            coupled, additions, values.evaluated, values.restore_layers, values.restore_draws, values.folds, sampled,
            values.sampled_layers, values.samples, study.sampling, *bank, seed,
        )  # fmt: skip
        design.cells.append(study.cell(f"{arm}.prebaked", coupled, seed=seed, arm=arm, adapter="prebaked"))
        design.observations.append(Observation(f"{arm}.prebaked", seed, steer))
        design.observations.append(study.content(arm, first, seed=seed, corpora=study_arms.measured(values.corpora)))
    for arm, tuned in hidden.items():
        shift = Shift(raw, tuned, adapter, values.folds, values.ridge, values.chance_draws, values.plane_layers, seed)
        design.observations.append(Observation(arm, seed, shift))

# %%
import pandas as pd

from persona_coupling import gates, measures, notebooks, notes, personas, questions, report, tables
from persona_coupling.figures import representations as pictures

pd.options.display.max_colwidth = None

experiment = next(e for e in notebooks.discover() if e.name == "05_representations")
names = {arm: f"{arm}  {study_arms.LABELS[arm]}" for arm in ("A", *arms)}
short = {arm: f"{arm}  {study_arms.LABELS[arm].removesuffix(' first').removesuffix(' text')}" for arm in arms}
prebaked = [f"{arm}.prebaked" for arm in ("A", *arms)]
notes.design_table(study, design)

# %% [markdown]
# ## Raw material
#
# Three of the questions with the fixed answers behind which every state is read, and three training rows of each SFT.

# %%
fixed = questions.eval_questions(asked.everyday, asked.values)
pd.DataFrame([{"question": q.text, "fixed answer": q.answer} for q in fixed[:3]])

# %%
notes.training_rows({corpus: names[arm] for arm, corpus in arms.items()})

# %% [markdown]
# The marker is measured behind those answers. It was trained with this loss mask: supervised text in bold.

# %%
notes.loss_mask(study)

# %% [markdown]
# ## Run, or fetch what has been run

# %%
results = study.run(design, experiment.results(profile))
pd.Series({name: len(table) for name, table in results.tables.items()}, name="rows").to_frame()

# %% [markdown]
# ## Gates before results
#
# Beside the usual ones: did the SFT cost the marker anything that could be brought back (`lost`); can a vector at one layer
# carry a persona at all (`carries`); does the probe name personas where they are known to be (`probed`); does the adapter
# answer the villain's direction more than random ones (`reads`). A null without them would mean nothing.

# %%
estimates = measures.estimate(results)
measures.add_damage(estimates, results, raw="A")
for arm, corpus in arms.items():
    measures.add_content_shift(estimates, results, arm, corpus, study_arms.OPPOSITE[corpus], raw="A")
    whereabouts.add_states(estimates, results, arm)
steered = {
    arm: whereabouts.add_steering(estimates, results, arm, values.evaluated, values.restore_parts) for arm in arms
}
pushed = {arm: whereabouts.add_pushing(estimates, results, arm) for arm in arms}
swapped = whereabouts.add_swap(estimates, results)
checked = gates.of_design(
    estimates, results, study.profile.gates, reference=["A.prebaked"], conditions=prebaked, trained=[], arms=list(arms)
)
checked += whereabouts.gates(estimates, results, list(arms), values)
failed = gates.failing(
    checked,
    {
        "A.prebaked": [*prebaked, *(f"{arm}.restored" for arm in arms)],
        "steering": [f"{arm}.restored" for arm in arms],
        "raw": [f"{arm}.answer" for arm in arms],
        **{arm: [f"{arm}.prebaked"] for arm in arms},
    },
)
report.gate_table(checked)

# %% [markdown]
# ## What the models say
#
# The first completions of the source and of a bystander with the adapter added, failures included; nothing is steered here.

# %%
notes.sample_answers(results, ["villain", "assistant"])

# %% [markdown]
# ## The main estimate: where everybody went
#
# States at the mean answer token. One spread is the root mean squared distance of the raw model's persona centroids from
# their mean.

# %% evidence=["05-decodable", "05-common", "05-kept"]
paper = report.Report(experiment.name, study, results)
n = len(study.seeds) * len(fixed)
about = f"{len(study.seeds)} seed{'s' if len(study.seeds) > 1 else ''}, 95 % intervals over seeds × questions (n = {n})"
daggers = "† a gate failed: uninterpretable." if failed else "All gates passed."
curves = whereabouts.state_curves(results, list(arms), "answer")
notes.show(
    paper.figure(
        "shift",
        pictures.shift_by_layer(curves, short),
        "States behind the same fixed answers, mean answer token. a: distance between a persona's centroids before and "
        "after SFT, in units of the raw model's spread between personas. b: share of states that a linear probe assigns "
        "to their persona, at questions it was not trained on; the mean over personas is removed, except as it is. c: of "
        "what tells the villain from the others, the part that the SFT'd model still calls forth, in the raw model's "
        f"directions. {about}. {daggers}",
    )
)

# %% [markdown]
# What it shows: whether the villain left alone or with everybody, whether the personas can still be told apart and by the
# old directions, and what of the villain still reaches the adapter. What it does not show: that any of it matters.

# %%
drawn_arms = {study_arms.LETTERS[corpus]: short[study_arms.LETTERS[corpus]] for corpus in values.plane_corpora}
views = results["plane"].rename(columns={"condition": "arm"})
views = views[(views["seed"] == study.seeds[0]) & (views["position"] == "answer") & views["arm"].isin(drawn_arms)]
labelled = {p.id: p.name for p in personas.personas() if p.id in (personas.SOURCE, personas.ASSISTANT)}
notes.show(
    paper.figure(
        "planes",
        pictures.planes(views, drawn_arms, labelled),
        f"Centroids of the {personas.NUMBER} personas before (open) and after SFT (filled), mean answer token after layer "
        f"{int(views['layer'].iloc[0])}, seed {study.seeds[0]}, {len(fixed)} questions. a: both models in the plane of "
        "their first two principal components. b: each model's mean over personas removed, in the raw personas' plane.",
    )
)

# %% evidence=["05-decodable", "05-common", "05-kept", "05-off"]
columns = [
    tables.Column("villain's shift, spreads", "answer.shift", "nats"),
    tables.Column("others' shift, spreads", "answer.shift_others", "nats"),
    tables.Column("villain's own shift, spreads", "answer.own_shift", "nats"),
    tables.Column("villain's shift along the others'", "answer.common_share", "percent"),
    tables.Column("probe, within SFT'd", "answer.probe_tuned", "percent"),
    tables.Column("probe, raw to SFT'd", "answer.probe_transfer_centred", "percent"),
    tables.Column("signal of the villain kept", "answer.kept", "percent"),
    tables.Column("the same in all directions alike", "answer.kept_any", "percent"),
    tables.Column("adapter's response to the villain", "answer.response_persona", "percent"),
    tables.Column("adapter's response to the shift", "answer.response_shift", "percent"),
]
chance = whereabouts.chance_bounds(results, next(iter(arms)), "answer", "response")
doubtful = {arm for arm in arms if f"{arm}.answer" in failed or arm in failed}
paper.table(
    "states",
    whereabouts.upright(tables.by_condition(estimates, {arm: names[arm] for arm in arms}, columns, doubtful)),
    "The villain's states before and after SFT, mean answer token: means over layers. Own: after the mean over personas is "
    "removed; along: as squared length. Probes name one of "
    f"{personas.NUMBER} personas, the mean over personas removed. Responses are per unit length, 100 % being a random "
    f"direction (95 % of random ones: {100 * chance[0]:.0f} to {100 * chance[1]:.0f} %). {about}. {daggers}",
)

# %% [markdown]
# ## The causal test: is the villain's shift what silences the marker?

# %% evidence=["05-restore-*"]
curves, levels = whereabouts.steering_curves(results, list(arms))
draws = f"{values.restore_draws} random rotation{'s' if values.restore_draws > 1 else ''}"
notes.show(
    paper.figure(
        "recovery",
        pictures.recovery(curves, levels, short),
        "Log-probability of the marker behind fixed answers, pre-baked adapter added, with a vector added after one "
        "layer. a: the villain of SFT'd models with the villain's shift undone; right, the control of the method: the raw "
        "model's assistant with villain minus assistant added. b: the raw model's villain with the same shift added. "
        f"Dotted: no vector. Grey: the same vectors under {draws}. {about}. {daggers}",
    )
)

# %% [markdown]
# What it shows: how much of the distance between the dotted lines one vector covers. What it does not show: that nothing
# else of the state matters; a centroid is a mean, and the last answer token is not the mean one.

# %% evidence=["05-restore-*"]
columns = [
    tables.Column("villain, raw", "raw.logprob", "nats"),
    tables.Column("villain, SFT'd", "none.logprob", "nats"),
    tables.Column("villain, SFT'd, shift undone", "restored.logprob", "nats"),
    tables.Column("villain, SFT'd, random vector", "random.logprob", "nats"),
    tables.Column("loss recovered", "restored.share", "percent"),
    tables.Column("others, SFT'd", "none.others", "nats"),
    tables.Column("others, SFT'd, shift undone", "restored.others", "nats"),
    tables.Column("villain, raw, shift added", "pushed.logprob", "nats"),
]
doubtful = {arm for arm in arms if f"{arm}.restored" in failed or arm in failed}
where = ", ".join(f"{arm} {steered[arm]} and {pushed[arm]}" for arm in arms)
paper.table(
    "steering",
    whereabouts.upright(tables.by_condition(estimates, {arm: names[arm] for arm in arms}, columns, doubtful)),
    "The marker's log-probability in nats, pre-baked adapter added, with a vector after the layer where it does most "
    f"(undone and added: {where}). Loss recovered: share of raw minus SFT'd; a dash where there is no loss to share out. "
    f"{about}. {daggers}",
)

# %% [markdown]
# ## The rival a sceptic would raise: only the blank line is at stake
#
# The marker stands in a paragraph of its own. A vector that merely restored blank lines would pass for a villain's return,
# and an SFT that merely removed them for a villain's loss. Once the blank line stands:

# %%
rival = [
    tables.Column("raw", "raw.after_break", "nats"),
    tables.Column("SFT'd", "none.after_break", "nats"),
    tables.Column("shift undone", "restored.after_break", "nats"),
    tables.Column("random", "random.after_break", "nats"),
    tables.Column("loss recovered", "restored.share_after_break", "percent"),
]
tables.by_condition(estimates, {arm: names[arm] for arm in arms}, rival, doubtful)

# %% [markdown]
# ## Verdicts

# %%
facts = {
    "arms": list(arms),
    "depth": int(results["shift"]["layer"].max()),
    "failed": sorted(failed),
    "best_layer": steered,
    "pushed_layer": pushed,
    "swapped_layer": swapped,
    "chance": [100 * bound for bound in chance],
    "bystanders": len(values.evaluated) - 1,
}
judgements = paper.finish(estimates, checked, facts)
report.verdict_table(judgements)

# %% [markdown]
# ## Loose ends, versions, hardware
#
# Centroids were added at one layer at a time; a shift that acts in many layers at once is not undone by that. Single
# pseudo-values of bounded measures may leave their bounds, their means rarely do.

# %%
notes.colophon(results)
