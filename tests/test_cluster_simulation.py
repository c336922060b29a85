"""The simulation against schedules worked out by hand, and the page that shows it."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml
from cluster_stages import Step

from persona_coupling import cli, cluster_bench, cluster_simulation, costs, notebooks
from persona_coupling.cluster_simulation import simulate
from persona_coupling.errors import UserError
from persona_coupling.store import in_order

REPOSITORY = Path(__file__).parents[1]
PAGE = (REPOSITORY / "docs" / "CLUSTER.md").read_text(encoding="utf-8")


def graph():
    """a (3) before c (2) and d (4); b (1) before d; e (5) alone: 15 seconds in all, the longest chain a, d: 7."""
    a, b, e = (Step(name, "") for name in "abe")
    stages = in_order([a, b, e, Step("c", "", (a,)), Step("d", "", (a, b))])
    seconds = {"a": 3.0, "b": 1.0, "c": 2.0, "d": 4.0, "e": 5.0}
    return stages, {stage.key: seconds[stage.name] for stage in stages}


@pytest.mark.parametrize(
    ("cards", "makespan", "idle"),
    [
        (1, 15.0, 0.0),
        (2, 9.0, 1 / 6),  # a 0-3, b 0-1, e 1-6, c 3-5, d 5-9: 15 of 18
        (3, 7.0, 2 / 7),  # a 0-3, b 0-1, e 0-5, c 1 place at 3-5, d 3-7: 15 of 21
        (64, 7.0, 1 - 15 / (64 * 7)),
    ],
)
def test_schedules_by_hand(cards, makespan, idle):
    run = simulate(*graph(), cards)
    assert run.makespan == makespan
    assert run.idle == pytest.approx(idle)
    assert [stage.name for stage, _ in run.chain] == ["a", "d"]
    assert run.longest == 7.0


def test_shares_of_a_card_are_places():
    stages, seconds = graph()
    assert simulate(stages, seconds, 1, 0.25).places == 4
    assert simulate(stages, seconds, 8, 2.0).places == 4
    assert simulate(stages, seconds, 1, 0.25).makespan == simulate(stages, seconds, 4).makespan == 7.0


def test_what_bounds_a_run_is_said():
    stages, seconds = graph()
    assert simulate(stages, seconds, 1).bottleneck().startswith("the cards")
    assert simulate(stages, seconds, 64).bottleneck() == "the longest chain (100 % Step): more cards change nothing"
    wide = [*stages, *(Step(str(n), "") for n in range(2))]
    more = {**seconds, **{stage.key: 4.0 for stage in wide[-2:]}}
    # on three: a 0-3, b 0-1, e 0-5, 4 1-5, 4 3-7, c 5-7, d 5-9; 23 of 27 are used, the chain is 7 of 9
    assert simulate(wide, more, 3).makespan == 9.0
    assert simulate(wide, more, 4).makespan == 8.0


def test_corrections_need_results_that_follow_the_design(tmp_path):
    measured = cluster_simulation.corrections("quick")
    assert {"FineTune", "Evaluate", "MergeCheck"} <= set(measured)
    assert all(0 < value < 10 for value in measured.values())
    with pytest.raises(UserError, match="no stored results of smoke"):
        cluster_simulation.corrections("smoke", tmp_path)
    experiment = notebooks.discover()[0]
    record = json.loads(experiment.record("quick").read_text(encoding="utf-8"))
    place = tmp_path / experiment.name / "record.json"
    place.parent.mkdir()

    def corrected(**changes):
        place.write_text(json.dumps({**record, **changes}))
        return cluster_simulation.corrections("quick", tmp_path)["FineTune"]

    doubled = {key: 2 * seconds for key, seconds in record["stages"].items()}
    assert corrected(stages=doubled) == pytest.approx(2 * corrected())
    with pytest.raises(UserError, match="does not follow the design"):
        corrected(stages=dict(reversed(record["stages"].items())))


def test_a_profile_without_results_takes_what_was_measured_for_its_model():
    measured, stages = costs.read(), notebooks.stages_of("qwen2.5-7b")
    hours = sum(cost.seconds for stage in stages if (cost := measured.cost(stage)) is not None) / 3600
    said = re.search(r"`qwen2.5-7b`: .* of a card each; ([\d.]+) hours of cards; \d+ stages as measured", PAGE)
    assert hours <= float(said[1]) < 1.02 * hours


def between(begins, ends):
    return PAGE.partition(begins)[2].partition(ends)[0]


def test_the_page_shows_what_the_code_gives():
    assert between(cluster_simulation.BEGINS, cluster_simulation.ENDS) == cluster_simulation.text("quick")
    measured = json.loads((REPOSITORY / "docs" / cluster_bench.MEASURED).read_text(encoding="utf-8"))
    assert between(cluster_bench.BEGINS, cluster_bench.ENDS) == cluster_bench.text(measured)


def test_the_page_follows_results_that_it_rests_on(tmp_path, monkeypatch, capsys):
    """`paper` writes it again: the README's second command compares it with the results that its first one makes."""
    monkeypatch.setenv("PERSONA_COUPLING_ROOT", str(tmp_path))
    monkeypatch.setattr(cluster_simulation, "text", lambda source: f"as {source} says\n")
    cluster_simulation.follow("quick")
    page = tmp_path / "docs" / "CLUSTER.md"
    page.parent.mkdir()
    before = f"before\n{cluster_simulation.BEGINS}old\n{cluster_simulation.ENDS}\nafter\n"
    page.write_text(before)
    cluster_simulation.follow("smoke")
    assert page.read_text() == before
    cluster_simulation.follow("full")
    now = before.replace("old", "as quick says")
    assert page.read_text() == now

    def refused(_source):
        raise UserError("Run it again.")

    monkeypatch.setattr(cluster_simulation, "text", refused)
    cluster_simulation.follow("full")
    assert page.read_text() == now
    assert "keeps its simulation: Run it again." in capsys.readouterr().out


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", PAGE, flags=re.DOTALL)


def test_what_the_page_says_to_copy_fits_this_repository(monkeypatch):
    """Commands that the command line takes, the pinned version of Ray, a script that bash can read, manifests that agree."""
    said: list[list[str]] = []
    for name in ("reproduce", "cells", "plan", "combine", "paper"):
        monkeypatch.setitem(cli.COMMANDS, name, lambda chosen: said.append(chosen))
    job = next(iter(yaml.safe_load_all(blocks("yaml")[0])))["spec"]
    commands = re.findall(r"nox -s (\S+) -- ([^`#\n]*)", PAGE)
    commands += [tuple(job["entrypoint"].partition("persona_coupling ")[2].split(" ", 1))]
    assert len(commands) >= 9
    for name, arguments in commands:
        if name != "tests":
            assert cli.main([name, *shlex.split(arguments)]) == 0, (name, arguments)
    pins = (REPOSITORY / "constraints.txt").read_text().splitlines()
    assert f"ray=={job['rayClusterSpec']['rayVersion']}" in pins
    fsspec = next(pin.partition("==")[2] for pin in pins if pin.startswith("fsspec=="))
    assert f"s3fs=={fsspec}" in PAGE, "s3fs asks for its own version of fsspec"
    groups = [job["rayClusterSpec"]["headGroupSpec"], *job["rayClusterSpec"]["workerGroupSpecs"]]
    pods = [group["template"]["spec"]["containers"][0] for group in groups]
    assert len({pod["image"] for pod in pods}) == 1
    assert all({"name": "PERSONA_COUPLING_CACHE", "value": "/shared/artifacts"} in pod["env"] for pod in pods)
    if shutil.which("bash"):
        assert subprocess.run(["bash", "-n"], input=blocks("bash")[0], text=True, check=False).returncode == 0
