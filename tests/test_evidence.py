"""Results made in parts, joined: nothing repeated, nothing mixed, every part's machine remembered."""

import copy
import json

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest

from persona_coupling import evidence
from persona_coupling.errors import UserError
from persona_coupling.study import Results, read_table, write_table


def part(seed, *, commit="aaa"):
    table = pd.DataFrame({"condition": ["A", "B"], "seed": seed, "value": [seed + 0.1, seed + 0.2]})
    record = {
        "profile": {"name": "x", "seeds": [seed], "steps": 3, "model": {"name": "m", "path": "/here"}},
        "values": {"corpora": ["b"]},
        "cells": [{"condition": "A", "seed": seed}, {"condition": "B", "seed": seed}],
        "observed": ["A"],
        "stages": {"shared": 60.0, f"own-{seed}": 30.0},
        "compute_minutes": 1.5,
        "provenance": {"commit": commit, "device": "D", "versions": {"torch": "1", "numpy": f"{seed}"}},
    }
    return Results({"scan": table}, record)


def test_parts_with_other_seeds_are_joined_in_order():
    joined = evidence.combine([part(2, commit="bbb"), part(0)])
    assert joined.record["profile"]["seeds"] == [0, 2]
    assert joined["scan"]["value"].tolist() == [0.1, 0.2, 2.1, 2.2]
    assert joined.record["compute_minutes"] == 2.0, "a shared stage counts once"
    assert joined.record["provenance"] == {
        "commit": "aaa / bbb",
        "device": "D",
        "versions": {"torch": "1", "numpy": "0 / 2"},
    }
    assert [p["provenance"]["commit"] for p in joined.record["parts"]] == ["aaa", "bbb"]


def test_a_seed_that_stands_twice_is_refused():
    with pytest.raises(UserError, match="repeat a seed"):
        evidence.combine([part(1), part(1)])


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda r: r.record["profile"].update(steps=4), "profile values"),
        (lambda r: r.record["values"].update(corpora=["c"]), "the experiment's own"),
        (lambda r: r.record["cells"].pop(), "conditions"),
        (lambda r: r.tables.update(drift=pd.DataFrame()), "tables"),
    ],
)
def test_parts_of_different_studies_are_refused(change, said):
    other = part(1)
    change(other)
    with pytest.raises(UserError, match=said):
        evidence.combine([part(0), other])
    assert evidence.combine([part(0), part(1)]), "the control: unchanged, they join"


def run_of_three():
    """One run of the seeds 0 to 2, as `Study.run` keeps it."""
    joined = evidence.combine([part(seed) for seed in range(3)])
    joined.record.pop("parts")
    joined.record["files"] = {"scan": "0"}
    joined.tables["empty"] = pd.DataFrame()
    return joined


def test_some_seeds_of_a_run_are_kept_alone():
    kept = evidence.choose(run_of_three(), [0, 2], ["shared", "own-0", "own-2"])
    assert kept["scan"]["value"].tolist() == [0.1, 0.2, 2.1, 2.2]
    assert kept["scan"].index.tolist() == [0, 1, 2, 3]
    assert kept["empty"].empty
    record = kept.record
    assert (record["profile"]["seeds"], record["left_out"], record["compute_minutes"]) == ([0, 2], [1], 2.0)
    assert [cell["seed"] for cell in record["cells"]] == [0, 0, 2, 2]
    assert set(record["stages"]) == {"shared", "own-0", "own-2"}
    assert "files" not in record, "their hashes are those of other tables"
    again = evidence.choose(kept, [2], ["shared", "own-2"])
    assert again.record["left_out"] == [0, 1], "what was left out before stays named"
    assert evidence.choose(kept, [2, 0], []) is kept


def test_what_was_left_out_is_known_of_joined_parts_too():
    first = evidence.choose(run_of_three(), [0, 2], ["shared", "own-0", "own-2"])
    first.tables.pop("empty")
    assert evidence.combine([first, part(7)]).record["left_out"] == [1]
    joined = evidence.combine([part(1), first])
    assert "left_out" not in joined.record, "it is there now"
    alone = evidence.combine([first])
    assert evidence.choose(alone, [0], ["shared", "own-0"]).record["left_out"] == [1, 2]
    assert "parts" not in evidence.choose(alone, [0], ["shared", "own-0"]).record


def test_seeds_that_cannot_be_chosen_are_refused():
    run = run_of_three()
    with pytest.raises(UserError, match=r"\[7\] were not run: the results are of \[0, 1, 2\]"):
        evidence.choose(run, [0, 7], ["shared"])
    with pytest.raises(UserError, match="other code or another model: 1 of the 3 stages"):
        evidence.choose(run, [0], ["shared", "own-0", "own-of-today"])
    with pytest.raises(UserError, match="joined from parts"):
        evidence.choose(evidence.combine([part(0), part(1)]), [0], ["shared"])


def test_reals_are_kept_to_single_precision_and_all_else_to_the_letter(tmp_path):
    """Reals take less room split into bytes."""
    rows = 20_000
    drawn = np.random.default_rng(0).normal(size=rows)
    table = pd.DataFrame(
        {"real": drawn, "word": ["ab", "ba"] * (rows // 2), "count": range(rows), "list": [[1.5, 2.5]] * rows}
    )
    table.loc[3, "real"] = np.nan
    write_table(table, tmp_path / "x.parquet")
    read = read_table(tmp_path / "x.parquet")
    assert (read["real"].to_numpy(dtype="float32") == table["real"].to_numpy(dtype="float32"))[4:].all()
    assert np.isnan(read["real"][3])
    assert (read["word"] == table["word"]).all()
    assert (read["count"] == table["count"]).all()
    assert read["list"].iloc[-1].tolist() == [1.5, 2.5]
    chunk = pq.ParquetFile(tmp_path / "x.parquet").metadata.row_group(0).column(0)
    assert chunk.path_in_schema == "real"
    assert "BYTE_STREAM_SPLIT" in chunk.encodings
    assert chunk.total_compressed_size < 4 * rows


def test_where_a_local_model_lies_does_not_matter():
    other = part(1)
    other.record["profile"]["model"]["path"] = "/there"
    assert evidence.combine([part(0), other])


def test_what_is_written_is_read_and_damage_is_named(tmp_path):
    made = part(0)
    made.record["cells"], made.record["observed"] = [], ["A", "B"]  # observations alone; cells: test_untrusted
    made.save(tmp_path)
    again = evidence.read(tmp_path)
    pd.testing.assert_frame_equal(again["scan"], made["scan"], rtol=1e-6)
    record = json.loads((tmp_path / "record.json").read_text())
    damaged = copy.deepcopy(record)
    damaged["files"]["scan"] = "0" * 64
    (tmp_path / "record.json").write_text(json.dumps(damaged))
    with pytest.raises(UserError, match=r"scan\.parquet differs"):
        evidence.read(tmp_path)
    (tmp_path / "record.json").unlink()
    with pytest.raises(UserError, match="no results"):
        evidence.read(tmp_path)


def test_what_joined_records_name_stands_once():
    from persona_coupling import provenance

    records = [{"device": "H100"}, {"device": "H100 / H200"}, {"device": "H200"}]
    assert provenance.distinct(records, "device") == ["H100", "H200"]
