"""What the paper's text needs beyond each experiment's file: an index of what was run, and the headline in words."""

from __future__ import annotations

import json
import tomllib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from persona_coupling import claims, earlier, models, notebooks, outputs, paths, personas, profiles, score, stats
from persona_coupling.errors import GuardError, UserError

README_BEGINS = "<!-- headline: written by `nox -s paper` from the verdicts; do not edit by hand -->"
README_ENDS = "<!-- end of headline -->"
UNREADABLE = {"uninterpretable", "not run"}
ORDER = ("supported", "refuted", "inconclusive", "uninterpretable", "not run")


def headline(rows: Sequence[Mapping[str, Any]], path: Path | None = None) -> dict[str, list[str]]:
    """The answer in plain words, chosen by verdicts from `paper/headline.toml`: `sentences`, those `withheld` because a
    gate failed, as the intervals alone would have them, and the topics left `open`. What is unsettled stands last.

    A sentence is left open unless each of its `claims` can be read; those of `also` count where they can. All supported,
    all refuted, `mixed` where some are supported and others refuted, `unsettled` otherwise. `rows` are judged claims with
    id and verdict. Raises GuardError for a sentence about a claim that does not exist.
    """
    verdicts = {row["id"]: row["verdict"] for row in rows}
    alone = {row["id"]: row.get("otherwise") or row["verdict"] for row in rows}
    table = tomllib.loads((path or paths.repository() / "paper" / "headline.toml").read_text(encoding="utf-8"))
    made: dict[str, list[str]] = {"sentences": [], "withheld": [], "open": []}
    unsettled: list[str] = []
    for sentence in table["sentence"]:
        unknown = [claim for claim in (*sentence["claims"], *sentence.get("also", [])) if claim not in verdicts]
        if unknown:
            raise GuardError(f"headline.toml speaks of claims that do not exist: {', '.join(unknown)}")
        outcome = _outcome(sentence, verdicts)
        if outcome is not None:
            (unsettled if outcome == "unsettled" else made["sentences"]).append(sentence[outcome])
            continue
        made["open"].append(sentence["topic"])
        aside = _outcome(sentence, alone)
        if aside is not None:
            made["withheld"].append(sentence[aside])
    made["sentences"] += unsettled
    return made


def _outcome(sentence: Mapping[str, Any], verdicts: Mapping[str, str]) -> str | None:
    """Which of a sentence's words verdicts choose; None where one that is needed cannot be read."""
    needed = {verdicts[claim] for claim in sentence["claims"]}
    if needed & UNREADABLE:
        return None
    read = (needed | {verdicts[claim] for claim in sentence.get("also", [])}) - UNREADABLE
    if read == {"supported"} or read == {"refuted"}:
        return read.pop()
    return "mixed" if read >= {"supported", "refuted"} else "unsettled"


def write_readme(index: Mapping[str, Any]) -> None:
    """Put the headline of this copy's verdicts between the README's two comments. Raises GuardError without them."""
    path = paths.repository() / "README.md"
    outputs.write(path, with_headline(path.read_text(encoding="utf-8"), index))


def with_headline(text: str, index: Mapping[str, Any]) -> str:
    """A README with the headline of an index between its two comments. Raises GuardError without them."""
    words = index["headline"]
    profile = index["profile"]
    lines = [f"- {sentence}" for sentence in words["sentences"]]
    if words["withheld"]:
        lines.append(f"- Withheld by a gate, as intervals alone would have it: {' '.join(words['withheld'])}")
    if words["open"]:
        lines.append(f"- Left open by this run: {', '.join(words['open'])}.")
    source = (
        f"From the profile `{profile['name']}` ({profile['model']['name']}, {_seeds(profile)}{_fewer(index)}); "
        f"[the paper](paper/paper-{profile['name']}.pdf) has the numbers, intervals and verdicts behind each sentence."
    )
    block = "\n".join(["", *lines, "", source, *_before(index), *_beside(profile["name"]), ""])
    return outputs.between(text, README_BEGINS, README_ENDS, block, "README.md")


def _before(index: Mapping[str, Any]) -> list[str]:
    """Sentences on runs of the same claims that came before, if there were any."""
    said, found, fresh = [], index["earlier"], index["fresh"]
    for again in (index["repeat"], index["older"]):
        if again is not None:
            how = "once more by this code" if again["same_code"] else "by older code too"
            said.append(f"The same seeds were run {how}: {_agreement(again)}.")
    if fresh is not None:
        seeds = ", ".join(map(str, fresh["seeds"]))
        said.append(f"Under further seeds alone ({seeds}), {_agreement(fresh)}.")
    if found is None:
        return said
    unread, now = sum(r["verdict"] == "uninterpretable" for r in found["claims"]), index["counts"]["uninterpretable"]
    return [
        *said,
        f"The same claims had been tested before, at {found['steps']} steps of fine-tuning and with other seeds: there "
        f"gates left {unread} of {len(found['claims'])} unreadable, here {now}. The dose, now "
        f"{index['profile']['sft']['steps']} steps, was chosen by the gate that most of them failed; claims and gates "
        "stayed as they were, and the paper's appendix sets these runs side by side.",
    ]


def _agreement(run: Mapping[str, Any]) -> str:
    """How many verdicts of a run are this copy's, and which are not."""
    but = f", all but {', '.join(f'`{name}`' for name in run['differ'])}" if run["differ"] else ""
    return f"{run['agree']} of {len(run['claims'])} verdicts are the same{but}"


def _fewer(index: Mapping[str, Any]) -> str:
    """Where some experiments have fewer seeds than others."""
    fewer: dict[str, list[str]] = {}
    for name, seeds in index["fewer_seeds"].items():
        fewer.setdefault(_seeds({"seeds": seeds}), []).append(name.split("_")[0])
    return "".join(f", {count} in {' and '.join(names)}" for count, names in fewer.items())


def _seeds(profile: Mapping[str, Any]) -> str:
    count = len(profile["seeds"])
    return f"{count} seed{'s' if count != 1 else ''}"


def quotes(text: str, profile: str) -> bool:
    """Whether a README speaks of that profile's paper, and does not only name it beside another's headline."""
    return f"paper/paper-{profile}.pdf" in text and _named(profile) not in text


def _named(profile: str) -> str:
    return f"Of the profile `{profile}` ("


def _beside(profile: str) -> list[str]:
    """A sentence for every other profile with a paper of its own: what of it has been run."""
    sentences = []
    for name in profiles.names():
        ran = notebooks.stored(name)
        if name == profile or not ran or not paths.pdf(name).is_file() or profiles.load(name).stamp:
            continue
        seeds = _seeds(outputs.read(ran[0].record(name))["profile"])
        numbers = ", ".join(experiment.name.split("_")[0] for experiment in ran)
        sentences.append(
            f"{_named(name)}{seeds}) the experiments {numbers} of "
            f"{len(notebooks.discover())} have been run: [its paper](paper/paper-{name}.pdf)."
        )
    return sentences


def compile_paper(profile: str) -> bytes:
    """The PDF that a profile's generated files and the paper's sources give. Raises UserError with typst's message."""
    import typst

    root = paths.repository()
    try:
        made = typst.compile(
            str(root / "paper" / "main.typ"), root=str(root), sys_inputs={"profile": profile}, timestamp=0
        )
    except typst.TypstError as error:
        raise UserError(f"The paper does not compile: {error}") from error
    return bytes(made)


def carried(card: Mapping[str, Any]) -> str:
    """How a persona's text reaches the model, in sentences for the method section. Results older than cards were made
    with templates that have a system role."""
    chat = card.get("chat", {})
    how = {
        "role": "Every prompt carries an explicit system message, so that no chat template can slip in its own.",
        "turn": "Every prompt carries an explicit system message, so that no chat template can slip in its own; this "
        "model's template writes it into the first user turn.",
        "folded": "The model's chat template has no system role: the persona's text stands at the start of the first user "
        "turn, a blank line before the question, in training as in evaluation.",
    }[chat.get("carried", "role")]
    off = " Its template can let the model think before it answers; that is switched off." if chat.get("thinks") else ""
    date = " Its template tells the model a date, which is held fixed." if chat.get("dated") else ""
    return how + off + date


def _minutes(contents: Iterable[dict[str, Any]]) -> float:
    """Minutes of compute behind all experiments; an artifact that several share counts once."""
    stages: dict[str, float] = {}
    for content in contents:
        stages |= content["stages"]
    return round(sum(stages.values()) / 60, 2)


def _mutations(path: Path) -> dict[str, Any] | None:
    """The test of the verifier, if it was run on this profile: how many forgeries of each class were caught."""
    if not path.is_file():
        return None
    content = json.loads(path.read_text(encoding="utf-8"))
    return {name: content[name] for name in ("classes", "mutants", "caught", "survivors")}


def write_index(folder: Path) -> dict[str, Any]:
    """Write `index.json`: experiments, all verdicts, their counts, the prior lab's numbers. Claims of experiments that
    this profile has not run stand as "not run"."""
    experiments = {}
    for path in sorted(folder.glob("[0-9][0-9]_*.json")):
        content = outputs.read(path)
        if "estimates" in content:
            experiments[content["experiment"]] = content
    seeds = {name: list(content["profile"].get("seeds", [])) for name, content in experiments.items()}
    everyone = sorted({seed for own in seeds.values() for seed in own})
    run = [content["profile"] | ({"seeds": everyone} if everyone else {}) for content in experiments.values()]
    if len({json.dumps(profile, sort_keys=True) for profile in run}) > 1:
        raise GuardError(f"the experiments in {folder} were run with different profile values; run them together")
    judged = {row["id"]: row for content in experiments.values() for row in content["claims"]}
    rows = [
        judged.get(claim.id) or claims.Judgement(claim, "not run", "this experiment was not run").as_dict()
        for claim in claims.read()
    ]
    counts = Counter(row["verdict"] for row in rows)
    prior = tomllib.loads((paths.repository() / "paper" / "prior.toml").read_text(encoding="utf-8"))
    copy = earlier.Copy(rows, run[0] if run else {}, earlier.keys_of(experiments.values()))
    index = {
        "experiments": list(experiments),
        "sections": [
            f"/experiments/{name}/section.typ"
            for name in experiments
            if (paths.experiments() / name / "section.typ").is_file()
        ],
        "claims": rows,
        "headline": headline(rows),
        "counts": {verdict: counts.get(verdict, 0) for verdict in ORDER},
        "gates": [{**g, "experiment": n} for n, content in experiments.items() for g in content["gates"]],
        "profile": run[0] if run else {},
        "fewer_seeds": {name: own for name, own in seeds.items() if own != everyone},
        **{kind: earlier.read(kind, folder.name, copy) for kind in earlier.KINDS},
        "values": {name: content["values"] for name, content in experiments.items() if content.get("values")},
        "provenance": {name: content["provenance"] for name, content in experiments.items()},
        "compute_minutes": _minutes(experiments.values()),
        "prior": prior,
        "mutations": _mutations(folder / "mutations.json"),
        "carried": carried(next((content["card"] for content in experiments.values() if "card" in content), {})),
        "constants": {
            "confidence": stats.CONFIDENCE,
            "resamples": stats.RESAMPLES,
            "personas": [persona.name for persona in personas.personas()],
            "marker": personas.MARKER,
            "modules": list(models.MODULES),
            "maximum_repeats": score.MAXIMUM_REPEATS,
        },
    }
    outputs.write_json(folder / "index.json", index, sort_keys=True)
    return index
