"""Training rows as artifacts: messages in one compressed columnar file, each with an explicit system message."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pandas as pd

from persona_coupling import corpora, personas
from persona_coupling.store import Lab, Stage

ROWS = "rows.parquet"


def write_rows(folder: Path, rows: list[corpora.Row]) -> None:
    """Rows of messages as one compressed columnar file."""
    table = pd.DataFrame({"id": [row["id"] for row in rows], "messages": [json.dumps(row["messages"]) for row in rows]})
    table.to_parquet(folder / ROWS, compression="zstd", index=False)


def read_rows(stage: Stage, lab: Lab) -> list[corpora.Row]:
    """The rows of a rows stage."""
    table = pd.read_parquet(lab.folder(stage) / ROWS)
    return [
        {"id": identity, "messages": json.loads(messages)}
        for identity, messages in zip(table["id"], table["messages"], strict=True)
    ]


def as_dataset(stage: Stage, lab: Lab) -> Any:
    """The rows as a `datasets.Dataset` with the columns `id` and `messages`."""
    from datasets import Dataset

    return Dataset.from_list(read_rows(stage, lab))


def with_system(messages: list[dict[str, str]]) -> list[dict[str, str]]:
    """The conversation with an explicit system message first: the plain assistant's, where there is none."""
    if messages[0]["role"] == "system":
        return messages
    return [{"role": "system", "content": personas.persona(personas.ASSISTANT).prompt}, *messages]
