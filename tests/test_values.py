"""An experiment's own values: read, checked, part of what stored results must match."""

import pytest

from persona_coupling import paths, profiles, values
from persona_coupling.errors import UserError


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("PERSONA_COUPLING_ROOT", str(tmp_path))
    made = tmp_path / "experiments" / "08_example"
    made.mkdir(parents=True)
    return made


def test_values_are_read_as_attributes(folder):
    (folder / "values.toml").write_text("[a]\nsteps = [1, 2]\nrate = 0.5\n[b]\nsteps = []\nrate = 1.5\n")
    found = values.load("08_example", "a")
    assert (found.steps, found.rate) == ((1, 2), 0.5)
    assert found.as_dict() == {"steps": [1, 2], "rate": 0.5}
    with pytest.raises(AttributeError, match="no value 'stops'; known: steps, rate"):
        _ = found.stops


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[b]\nx = 1\n", r"no table \[a\]"),
        ("[a]\nx = 1\n[b]\nx = 1.0\n", "types of x"),
        ("[a]\nx = 1\n[b]\nx = 1\ny = 2\n", "types of y"),
    ],
)
def test_profiles_differ_in_values_only(folder, text, said):
    (folder / "values.toml").write_text(text)
    with pytest.raises(UserError, match=said):
        values.load("08_example", "a")


def test_a_missing_file_is_named(folder):
    with pytest.raises(UserError, match=r"08_example.values.toml"):
        values.load("08_example", "a")


def test_every_experiment_with_values_has_them_for_every_profile():
    for path in paths.experiments().glob("*/values.toml"):
        for profile in profiles.names():
            assert values.load(path.parent.name, profile).named
