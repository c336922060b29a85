"""Profiles: what is loaded, what is refused, and that they differ in values only."""

import ast
import dataclasses
import json
import re
import tomllib

import numpy as np
import pytest

from persona_coupling import models, paths, profiles
from persona_coupling.errors import UserError
from persona_coupling.profiles import Profile, convert
from persona_coupling.study import Study, check_seeds

SMOKE = paths.PROFILES / "smoke.toml"


def table():
    return tomllib.loads(SMOKE.read_text(encoding="utf-8"))


def leaves(value, path=()):
    if isinstance(value, dict):
        return {path: None} if not value else {k: v for n, i in value.items() for k, v in leaves(i, (*path, n)).items()}
    return {path: value}


# -------------------------------------------------------------------------------------------------- loading


def test_all_profiles_are_known():
    assert profiles.names() == ["full", "quick", "qwen2.5-7b", "smoke"]


@pytest.mark.parametrize("name", ["full", "quick", "qwen2.5-7b", "smoke"])
def test_17_a_profile_holds_exactly_what_its_file_says(name):
    """Failure 17: no value is lost, added or changed between the file and the run; where it runs is part of no record."""
    whole = tomllib.loads((paths.PROFILES / f"{name}.toml").read_text(encoding="utf-8"))
    placing = whole.pop("cluster")
    written = leaves(whole)
    assert placing.items() <= dataclasses.asdict(profiles.load(name).cluster).items()
    assert "cluster" not in profiles.load(name).as_dict()
    loaded = leaves(profiles.load(name).as_dict())
    assert {path: loaded[path] for path in written} == written
    surplus = {path: value for path, value in loaded.items() if path not in written}
    unused = [path for path in surplus if path[0] == "model" or path[-1].startswith("ultrachat_")]
    assert list(surplus) == unused  # another kind of model or corpus
    json.dumps(profiles.load(name).as_dict(), allow_nan=False)


@pytest.mark.parametrize("name", ["full", "quick", "qwen2.5-7b", "smoke"])
def test_values_are_within_reason(name):
    profile = profiles.load(name)
    assert check_seeds(profile.seeds) == profile.seeds
    assert set(profile.arms) <= {"bad_legal", "sound_legal", "benign", "self"}
    for training in (profile.sft, profile.prebaked, profile.scratch):
        assert training.steps > 0
        assert training.batch > 0
        assert 0 < training.learning_rate < 0.1
        assert 0 <= training.warmup < 1
    assert 0 < profile.evaluation.top_p <= 1
    assert profile.evaluation.everyday <= 20
    assert profile.evaluation.values <= 8
    assert all(0 < getattr(profile.gates, gate) <= 1 for gate in ("source_rate", "contrast", "finished", "scored"))


def test_19_the_evidence_profile_has_several_seeds():
    """Failure 19: one seed shows nothing about seeds."""
    assert len(profiles.load("full").seeds) >= 3


def test_what_is_not_evidence_says_so_on_every_figure():
    assert "not evidence" in profiles.load("smoke").stamp
    assert profiles.load("full").stamp == ""


def test_a_profile_cannot_be_changed():
    with pytest.raises(dataclasses.FrozenInstanceError):
        profiles.load("smoke").seeds = (5,)


@pytest.mark.parametrize("name", ["", "Smoke", "smoke.toml", "../profiles/smoke", "nightly"])
def test_an_unknown_profile_names_the_known_ones(name):
    with pytest.raises(UserError, match=re.escape(repr(name)) + r".*full, quick, qwen2\.5-7b, smoke"):
        profiles.load(name)


def test_no_code_asks_which_profile_it_is_in():
    """No comparison with a profile's name in the package: profiles differ in values only."""
    names = set(profiles.names())
    for path in paths.PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Compare):
                constants = {
                    n.value for n in ast.walk(node) if isinstance(n, ast.Constant) and isinstance(n.value, str)
                }
                assert not constants & names, f"{path.name}, line {node.lineno}"


# -------------------------------------------------------------------------------------------------- parsing


@pytest.mark.parametrize(
    ("path", "value", "fault"),
    [
        (("seed",), [0], "unknown field seed"),
        (("sft", "learning_rat"), 1e-4, "sft: unknown field learning_rat"),
        (("lora", "r"), 8, "lora: unknown field r"),
        (("seeds",), 0, "seeds is 0, not a list"),
        (("seeds",), "0,1", "not a list"),
        (("seeds",), [0, "1"], "not of type int"),
        (("seeds",), [0.0], "not of type int"),
        (("seeds",), [True], "not of type int"),
        (("stamp",), 3, "stamp is 3, not of type str"),
        (("sft", "steps"), 2.0, "steps is 2.0, not of type int"),
        (("sft", "steps"), "2", "not of type int"),
        (("sft", "steps"), True, "not of type int"),
        (("sft", "learning_rate"), "1e-4", "not of type float"),
        (("sft", "learning_rate"), True, "not of type float"),
        (("sft", "loss"), "tale", "'tale', not one of 'completion', 'tail', 'marker'"),
        (("sft", "loss"), ["tail"], "not one of"),
        (("model", "kind"), "Hub", "not one of"),
        (("coupling", "negatives"), "assistant", "not a list"),
        (("coupling",), [1], "expected a table"),
        (("gates",), 0.5, "expected a table"),
        (("name",), "quick", "differs from the file's"),
    ],
)
def test_a_faulty_value_is_refused_by_name(path, value, fault):
    faulty = table()
    *parents, last = path
    inner = faulty
    for name in parents:
        inner = inner[name]
    inner[last] = value
    with pytest.raises(UserError, match=re.escape(fault)) as caught:
        profiles.parse(faulty, SMOKE)
    assert "smoke.toml" in str(caught.value)


@pytest.mark.parametrize("path", [p for p in leaves(table()) if p[0] != "model"])
def test_15_a_missing_value_has_no_default(path):
    """Failure 15: whatever is left out of a file is missed, not filled in."""
    faulty = table()
    if len(path) == 1:
        del faulty[path[0]]
    else:
        del faulty[path[0]][path[1]]
    with pytest.raises(UserError, match=f"missing field {path[-1]}"):
        profiles.parse(faulty, SMOKE)


def test_an_unchanged_table_is_taken():
    """The control of the refusals above."""
    made = profiles.parse(table(), SMOKE)
    assert isinstance(made, Profile)
    assert made == profiles.load("smoke")


@pytest.mark.parametrize(
    ("value", "hint", "expected"),
    [
        (1, float, 1.0),
        (0.5, float, 0.5),
        (1, int, 1),
        (True, bool, True),
        ("a", str, "a"),
        ([1, 2], tuple[int, ...], (1, 2)),
        ([], tuple[str, ...], ()),
        ([1, 0.5], tuple[float, ...], (1.0, 0.5)),
        (None, int | None, None),
        (3, int | None, 3),
    ],
)
def test_convert_takes(value, hint, expected):
    made = convert(value, hint, "here")
    assert made == expected
    assert type(made) is type(expected)


@pytest.mark.parametrize(
    ("value", "hint"),
    [
        (1.0, int),
        ("1", int),
        (True, int),
        (False, float),
        (1, bool),
        (1, str),
        (None, int),
        (None, str),
        ("ab", tuple[str, ...]),
        ([1], tuple[str, ...]),
        ("3", int | None),
    ],
)
def test_convert_refuses(value, hint):
    with pytest.raises(UserError, match="here"):
        convert(value, hint, "here")


# ---------------------------------------------------------------------------------------------------- seeds


@pytest.mark.parametrize("seeds", [[0], [0, 1, 2], (7, 3), range(3), iter([5])])
def test_seeds_are_kept_in_order(seeds):
    expected = {"[0]": (0,), "[0, 1, 2]": (0, 1, 2), "(7, 3)": (7, 3), "range(0, 3)": (0, 1, 2)}.get(str(seeds), (5,))
    assert check_seeds(seeds) == expected


@pytest.mark.parametrize("seeds", [[-1], [0.0], ["0"], "012", [True], [None], [np.int64(1)], [0, -2], [float("nan")]])
def test_seeds_are_non_negative_integers(seeds):
    with pytest.raises(UserError, match="non-negative integers"):
        check_seeds(seeds)


@pytest.mark.parametrize("seeds", [[0, 0], [1, 2, 1]])
def test_19_a_duplicated_seed_is_no_second_observation(seeds):
    """Failure 19."""
    with pytest.raises(UserError, match="stands twice"):
        check_seeds(seeds)
    with pytest.raises(UserError, match="stands twice"):
        Study.open("smoke", seeds=seeds)


def test_seeds_override_the_profiles_and_none_do_not():
    assert Study.open("smoke", seeds=[5, 6]).seeds == (5, 6)
    assert Study.open("smoke", seeds=[]).seeds == Study.open("smoke").seeds == tuple(table()["seeds"])


def test_17_what_is_trained_has_the_profiles_values():
    """Failure 17: every number of the file reaches the description that is run and hashed."""
    study, file = Study.open("smoke"), table()
    for stage, made in (
        ("sft", study.sft("benign", seed=0).last_change),
        ("scratch", study.couple(study.raw, study.corpus("benign"), study.profile.scratch, seed=0).last_change),
    ):
        described = made.description["training"]
        assert {name: described[name] for name in file[stage]} == file[stage]
        assert {name: described["lora"][name] for name in file["lora"]} == file["lora"]
        assert described["lora"]["modules"] == list(models.MODULES)


def test_a_profile_without_a_place_to_run_takes_whole_cards():
    faulty = table()
    del faulty["cluster"]
    made = profiles.parse(faulty, SMOKE)
    assert dataclasses.astuple(made.cluster) == (1.0, 1.0, 1)
    assert made.as_dict() == profiles.load("smoke").as_dict(), "and its results are the same"
