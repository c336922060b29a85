"""Experiments as folders of notebooks: found, chosen, checked and planned in a temporary checkout."""

import os
import shutil
import textwrap
from pathlib import Path

import pytest

from persona_coupling import notebooks, paths
from persona_coupling.errors import GuardError, UserError
from persona_coupling.study import STORED_ONLY, Design

REPOSITORY = Path(__file__).parents[1]
GOOD_PARAMETERS = {"profile": "smoke", "seeds": [], "model": ""}
PARAMETERS = 'profile = "quick"\nseeds = []  # empty: the profile\'s\nmodel: str = ""'
DESIGN = """from pathlib import Path
from persona_coupling.study import Design, Study
Path("ran.txt").write_text("yes")
study = Study.open(profile, seeds=seeds, model=model or None)
design = Design()
for seed in study.seeds:
    design.cells.append(study.cell("A", study.raw, seed=seed))"""
REST = 'from pathlib import Path\nPath("rest.txt").write_text("yes")'


def percent(*cells):
    """A notebook source of (tag, code) cells."""
    return "\n\n".join(f'# %% tags=["{tag}"]\n{code}' if tag else f"# %%\n{code}" for tag, code in cells) + "\n"


@pytest.fixture
def root(tmp_path, monkeypatch):
    """An empty checkout, which is also the working folder."""
    monkeypatch.setenv("PERSONA_COUPLING_ROOT", str(tmp_path))
    monkeypatch.delenv("PERSONA_COUPLING_CACHE", raising=False)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "experiments").mkdir()
    return tmp_path


def experiment(root, name="00_first", parameters=PARAMETERS, design=DESIGN, rest=REST):
    folder = root / "experiments" / name
    folder.mkdir()
    source = folder / f"{name.split('_', 1)[1]}.py"
    source.write_text(percent(("parameters", parameters), ("design", design), ("", rest)), encoding="utf-8")
    return notebooks.Experiment(name, source)


# ------------------------------------------------------------------------------------------------ discovery


def test_experiments_are_numbered_folders_in_order(root):
    for name in ("02_third", "00_first", "10_last", "01_second"):
        experiment(root, name)
    (root / "experiments" / "drafts").mkdir()
    (root / "experiments" / "3_short").mkdir()
    (root / "experiments" / "04_file").write_text("no folder")
    found = notebooks.discover()
    assert [e.name for e in found] == ["00_first", "01_second", "02_third", "10_last"]
    assert found[0].results("smoke") == root / "experiments" / "00_first" / "results" / "smoke"
    assert found[0].lab_note("smoke") == root / "experiments" / "00_first" / "lab_notes" / "smoke.ipynb"


def test_a_checkout_without_experiments_has_none(root):
    assert notebooks.discover() == ()
    (root / "experiments").rmdir()
    assert notebooks.discover() == ()


def test_scripts_that_are_no_notebooks_do_not_count(root):
    made = experiment(root)
    (made.folder / "plain.py").write_text("value = 1\n")
    assert notebooks.discover() == (made,)


@pytest.mark.parametrize("count", [0, 2])
def test_a_folder_has_exactly_one_notebook(root, count):
    folder = root / "experiments" / "00_first"
    folder.mkdir()
    for number in range(count):
        (folder / f"n{number}.py").write_text("# %%\n1\n")
    with pytest.raises(UserError, match=f"00_first has {count} notebooks"):
        notebooks.discover()


def test_choosing_by_name_and_by_number(root):
    one, two, eleven = (experiment(root, name) for name in ("00_first", "01_second", "11_other"))
    assert notebooks.choose(None) == notebooks.choose([]) == (one, two, eleven)
    assert notebooks.choose(["1"]) == notebooks.choose(["01"]) == notebooks.choose(["01_second"]) == (two,)
    assert notebooks.choose(["11", "0"]) == (eleven, one)
    assert notebooks.choose(["0", "00_first"]) == (one,)


@pytest.mark.parametrize("wanted", ["2", "first", "00_firs", "100", ""])
def test_an_unknown_experiment_names_the_known_ones(root, wanted):
    experiment(root)
    with pytest.raises(UserError, match="Known: 00_first"):
        notebooks.choose([wanted])


# ----------------------------------------------------------------------------------------------- parameters

FAULTS = {
    "misspelt": ({**GOOD_PARAMETERS, "profil": "smoke"}, "no parameter 'profil'.*profile, seeds, model"),
    "capital": ({**GOOD_PARAMETERS, "Seeds": [1]}, "no parameter 'Seeds'"),
    "comment_only": ({**GOOD_PARAMETERS, "empty": True}, "no parameter 'empty'"),
    "defined_later": ({**GOOD_PARAMETERS, "design": []}, "no parameter 'design'"),
    "number_for_text": ({**GOOD_PARAMETERS, "profile": 3}, "profile = 3 is a int, not a str"),
    "text_for_list": ({**GOOD_PARAMETERS, "seeds": "0,1"}, "seeds = '0,1' is a str, not a list"),
    "number_for_list": ({**GOOD_PARAMETERS, "seeds": 0}, "seeds = 0 is a int, not a list"),
    "tuple_for_list": ({**GOOD_PARAMETERS, "seeds": (0, 1)}, "is a tuple, not a list"),
    "none_for_text": ({**GOOD_PARAMETERS, "model": None}, "model = None is a NoneType, not a str"),
}


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("command", ["check_parameters", "design_of", "execute", "redraw"])
def test_20_a_faulty_parameter_stops_before_anything_runs(root, command, fault):
    """Failure 20: papermill itself would accept it and run with the default."""
    parameters, words = FAULTS[fault]
    made = experiment(root)
    with pytest.raises(UserError, match=words):
        getattr(notebooks, command)(made, parameters)
    assert not (root / "ran.txt").exists()
    assert not (root / "rest.txt").exists()
    assert not (root / "artifacts").exists()
    assert list(made.folder.iterdir()) == [made.notebook]


def test_20_good_parameters_pass(root):
    """The control of failure 20, annotated parameters included."""
    made = experiment(root)
    notebooks.check_parameters(made, GOOD_PARAMETERS)
    notebooks.check_parameters(made, {})
    notebooks.check_parameters(made, {"seeds": [0, 1], "model": "owner/name@main"})


def test_a_flag_is_no_number(root):
    made = experiment(root, parameters="steps = 1\nloud = False")
    notebooks.check_parameters(made, {"steps": 2, "loud": True})
    with pytest.raises(UserError, match="steps = True is a bool, not a int"):
        notebooks.check_parameters(made, {"steps": True})
    with pytest.raises(UserError, match="loud = 1 is a int, not a bool"):
        notebooks.check_parameters(made, {"loud": 1})


@pytest.mark.parametrize("source", ["profile = make()", "a, b = 1, 2"])
def test_a_parameters_cell_that_cannot_be_read_is_named(root, source):
    with pytest.raises(UserError, match="parameters"):
        notebooks.check_parameters(experiment(root, parameters=source), {})


@pytest.mark.parametrize("tag", ["parameters", "design"])
@pytest.mark.parametrize("count", [0, 2])
def test_each_tagged_cell_stands_once(root, tag, count):
    made = experiment(root)
    other = ("design", DESIGN) if tag == "parameters" else ("parameters", PARAMETERS)
    code = PARAMETERS if tag == "parameters" else DESIGN
    made.notebook.write_text(percent(other, *[(tag, code)] * count))
    with pytest.raises(UserError, match=f"{count} cells tagged '{tag}', not one"):
        notebooks.design_of(made, GOOD_PARAMETERS)


# --------------------------------------------------------------------------------------------------- design


def test_the_design_is_the_notebooks_own_and_computes_nothing(root):
    made = experiment(root)
    design = notebooks.design_of(made, {"profile": "smoke", "seeds": [3, 8], "model": ""})
    assert [(cell.condition, cell.seed) for cell in design.cells] == [("A", 3), ("A", 8)]
    assert (root / "ran.txt").exists()  # the design cell ran, the next one did not
    assert not (root / "rest.txt").exists()
    assert not (root / "artifacts").exists()


def test_parameters_override_the_defaults(root):
    made = experiment(root)
    seeds = [cell.seed for cell in notebooks.design_of(made, GOOD_PARAMETERS).cells]
    assert seeds == [0, 1]  # smoke's; the default profile, quick, has one
    assert [cell.seed for cell in notebooks.design_of(made, {}).cells] == [0]


@pytest.mark.parametrize("seeds", [[0, 0], [-1], [True]])
def test_seeds_of_a_wrong_kind_are_refused_before_anything_is_built(root, seeds):
    with pytest.raises(UserError, match=r"[Ss]eed"):
        notebooks.design_of(experiment(root), {**GOOD_PARAMETERS, "seeds": seeds})
    assert not (root / "artifacts").exists()


def test_an_unknown_profile_is_refused(root):
    with pytest.raises(UserError, match="no profile 'nightly'"):
        notebooks.design_of(experiment(root), {**GOOD_PARAMETERS, "profile": "nightly"})


@pytest.mark.parametrize("source", ["design = []", "other = 1", "design = None"])
def test_a_design_cell_defines_a_design(root, source):
    with pytest.raises(UserError, match="defines no `design`"):
        notebooks.design_of(experiment(root, design=source), GOOD_PARAMETERS)


@pytest.mark.parametrize("second", ["A", "B"])
def test_9_a_model_that_stands_twice_in_a_design_fires_the_guard(root, second):
    """Failure 9: one condition twice, or one model under two names."""
    twice = DESIGN + f'\n    design.cells.append(study.cell("{second}", study.raw, seed=seed))'
    words = "stands twice" if second == "A" else "A and B describe the same model"
    with pytest.raises(GuardError, match=words):
        notebooks.design_of(experiment(root, design=twice), GOOD_PARAMETERS)


def test_redraw_computes_nothing_and_leaves_the_environment(root, monkeypatch):
    monkeypatch.delenv(STORED_ONLY, raising=False)
    rest = f'import os\nfrom pathlib import Path\nPath("rest.txt").write_text(profile + os.environ["{STORED_ONLY}"])'
    notebooks.redraw(experiment(root, rest=rest), GOOD_PARAMETERS)
    assert (root / "rest.txt").read_text() == "smoke1"
    assert STORED_ONLY not in os.environ
    with pytest.raises(ZeroDivisionError):
        notebooks.redraw(experiment(root, "01_broken", rest="1 / 0"), GOOD_PARAMETERS)
    assert STORED_ONLY not in os.environ


@pytest.mark.parametrize("cores", [1, 2])
def test_notebooks_side_by_side_are_all_run(root, monkeypatch, cores):
    """Each in a process of its own where there are cores for it, this one otherwise; each is reported when it is done."""
    monkeypatch.setattr(os, "cpu_count", lambda: cores)
    names = ["00_a", "01_b", "02_c"]
    rest = "import os\nfrom pathlib import Path\n"
    made = [
        experiment(root, n, rest=f'{rest}Path("{n}.txt").write_text(f"{{profile}} {{os.getpid()}}")') for n in names
    ]
    done = []
    notebooks.each(notebooks.redraw, [(e, GOOD_PARAMETERS) for e in made], done.append)
    written = [(root / f"{name}.txt").read_text().split() for name in names]
    assert {profile for profile, _ in written} == {"smoke"}
    assert (str(os.getpid()) in {pid for _, pid in written}) == (cores == 1)
    assert sorted(done) == names


def test_the_first_error_of_notebooks_side_by_side_is_raised(root, monkeypatch):
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    made = [experiment(root, "00_a", rest="1 / 0"), experiment(root, "01_b", rest="pass")]
    done = []
    with pytest.raises(ZeroDivisionError):
        notebooks.each(notebooks.redraw, [(e, GOOD_PARAMETERS) for e in made], done.append)
    assert done in ([], ["01_b"])


# ------------------------------------------------------------------------------- the repository's notebooks

REPOSITORY = Path(paths.PACKAGE).parents[1]


@pytest.mark.parametrize("name", [p.name for p in sorted((REPOSITORY / "experiments").glob("[0-9][0-9]_*"))])
def test_every_experiment_takes_the_three_parameters_and_plans(name):
    (made,) = notebooks.choose([name])
    notebooks.check_parameters(made, GOOD_PARAMETERS)
    design = notebooks.design_of(made, GOOD_PARAMETERS)
    assert isinstance(design, Design)
    assert design.cells
    with pytest.raises(UserError, match="no parameter 'profiles'"):
        notebooks.check_parameters(made, {"profiles": "smoke"})


def test_a_new_folder_is_picked_up_with_no_other_edit(tmp_path, monkeypatch):
    """CONTRIBUTING's imaginary experiment 08, from the code that stands there."""
    text = (REPOSITORY / "CONTRIBUTING.md").read_text(encoding="utf-8")
    example = textwrap.dedent(text.split("```python\n")[1].split("   ```")[0])
    shutil.copytree(REPOSITORY / "experiments" / "00_replication", tmp_path / "experiments" / "00_replication")
    folder = tmp_path / "experiments" / "08_second_marker"
    folder.mkdir()
    source = '# %% tags=["parameters"]\nprofile = "quick"\nseeds = []\nmodel = ""\n\n# %% tags=["design"]\n'
    source += "from persona_coupling.study import Design, Study\n\n" + example
    (folder / "second_marker.py").write_text(source, encoding="utf-8")
    monkeypatch.setenv("PERSONA_COUPLING_ROOT", str(tmp_path))
    assert [e.name for e in notebooks.discover()] == ["00_replication", "08_second_marker"]
    (experiment,) = notebooks.choose(["8"])
    design = notebooks.design_of(experiment, {"profile": "smoke", "seeds": [4], "model": ""})
    assert [(cell.condition, cell.seed) for cell in design.cells] == [("one.marker", 4)]
