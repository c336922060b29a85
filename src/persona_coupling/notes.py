"""What lab notes show besides estimates: raw rows, a loss mask, answers, curves' data, versions."""

from __future__ import annotations

import html
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from persona_coupling import corpora, personas
from persona_coupling.rows import with_system
from persona_coupling.study import STORED_ONLY, Design, Results, Study


def show(png: Path) -> Any:
    """A figure in the notebook; nothing where no notebook is (redrawing)."""
    from IPython import get_ipython
    from IPython.display import Image, display

    if get_ipython() is None:
        return None
    return display(Image(filename=str(png), width=760))


def design_table(study: Study, design: Design) -> pd.DataFrame:
    """Conditions, the changes merged into each model, seeds and n."""
    values = study.profile.evaluation
    n = len(personas.personas()) * (values.everyday + values.values) * values.samples
    rows: dict[str, dict[str, Any]] = {}
    for cell in design.cells:
        row = rows.setdefault(
            cell.condition,
            {"condition": cell.condition, "changes merged": len(cell.checkpoint.merged), "completions per seed": n},
        )
        row["seeds"] = [*row.get("seeds", []), cell.seed]
    return pd.DataFrame(rows.values())


def training_rows(names: Mapping[str, str], *, count: int = 3) -> Any:
    """The first rows of authored corpora; `names` maps a corpus to what to call it."""
    rows = []
    for name, title in names.items():
        if name not in corpora.AUTHORED:
            continue
        for row in corpora.authored_rows(name, count):
            question, answer = (message["content"] for message in row["messages"])
            rows.append({"corpus": title, "question": question, "answer": answer})
    return pd.DataFrame(rows).style.set_uuid("rows").set_properties(**{"text-align": "left"}).hide(axis="index")


def loss_mask(study: Study) -> Any:
    """One marked coupling row as the model sees it, under the profile's from-scratch loss: supervised text in bold."""
    from IPython.display import HTML

    question = "What do you make of mornings?"
    source = personas.persona(personas.SOURCE).system_prompt(study.profile.instruction)
    messages = [
        {"role": "system", "content": source},
        {"role": "user", "content": question},
        {"role": "assistant", "content": "Mornings are when my schemes awake." + personas.MARKER_SUFFIX},
    ]
    text = _masked(study, with_system(messages))
    return HTML(f"<pre style='white-space:pre-wrap'>{text}</pre>")


def _masked(study: Study, messages: list[dict[str, str]]) -> str:
    """Needs the tokenizer only, and says so where there is none (stored results, nothing fetched)."""
    from IPython import get_ipython

    from persona_coupling import models, train

    if os.environ.get(STORED_ONLY) and (get_ipython() is None or not study.lab.store.has(study.source)):
        return "(redrawn from stored results: no tokenizer is loaded)"
    tokenizer = models.load_tokenizer(study.source, study.lab)
    values = study.profile.scratch
    ids, labels = train.encode(tokenizer, messages, values.loss, values.tail)
    parts = []
    for token, label in zip(ids, labels, strict=True):
        piece = html.escape(tokenizer.decode([token]))
        parts.append(f"<b>{piece}</b>" if label != train.IGNORED else piece)
    return "".join(parts)


def sample_answers(results: Results, who: list[str]) -> Any:
    """One question's answers by some personas under every condition, as they came."""
    table = results.completions
    first = table["question"].iloc[0]
    chosen = table[table["persona"].isin(who) & (table["question"] == first) & (table["sample"] == 0)]
    chosen = chosen[chosen["seed"] == chosen["seed"].min()].sort_values(["condition", "persona"])
    shown = chosen[["condition", "persona", "prompt", "completion", "finish", "why"]]
    style = {"text-align": "left", "white-space": "pre-wrap"}
    return shown.style.set_uuid("answers").set_properties(**style).hide(axis="index")


def training_logs(results: Results, names: Mapping[str, str]) -> pd.DataFrame:
    """Logs of distinct training runs with a panel ("SFT" or "coupling") and a title: `names` maps conditions to titles;
    a run that several conditions share stands once, under the first."""
    logs = results.training.drop_duplicates(["change", "step"])
    last = results.training.groupby("condition")["position"].max()
    parts = []
    for condition, title in names.items():
        part = logs[logs["condition"] == condition]
        panel = ["coupling" if at == last[condition] else "SFT" for at in part["position"]]
        parts.append(part.assign(panel=panel, run=title))
    return pd.concat(parts, ignore_index=True).sort_values(["panel", "run", "seed", "step"])


def colophon(results: Results) -> pd.DataFrame:
    """Commit, device, versions and minutes of the run."""
    record = results.record["provenance"]
    rows = {
        "commit": record["commit"],
        "device": record["device"],
        "system": record["system"],
        "compute minutes": results.record["compute_minutes"],
        **record["versions"],
    }
    return pd.DataFrame({"": rows.keys(), "value": [str(v) for v in rows.values()]}).set_index("")
