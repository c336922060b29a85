"""Derived changes against linear algebra done by hand."""

import json
import math
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch

from persona_coupling import adapters
from persona_coupling.adapters import LowRank
from persona_coupling.errors import GuardError
from persona_coupling.stages import Part, RandomLike, Rescaled, Snapshot, Truncated, changes
from persona_coupling.store import Stage


@dataclass(frozen=True)
class Given(Stage):
    """A change of two matrices with random entries, dense or of a rank; `dense_rank` makes dense ones of that rank."""

    seed: int
    rank: int = 2
    dense: bool = False
    kind: ClassVar[str] = "change"

    @property
    def low_rank(self):
        return not self.dense

    def build(self, folder, lab):
        generator = torch.Generator().manual_seed(self.seed)
        made = {}
        for name, (rows, columns) in SHAPES.items():
            part = LowRank(
                torch.randn(self.rank, columns, generator=generator), torch.randn(rows, self.rank, generator=generator)
            )
            made[name] = part.dense() if self.dense else part
        if self.dense:
            made["model.norm.weight"] = torch.ones(7)
        changes.write(folder, made)


SHAPES = {"model.layers.0.mlp.up_proj": (13, 7), "model.layers.1.self_attn.q_proj": (7, 7)}


def read(stage, lab):
    return adapters.read_change(lab.folder(stage))


def dense(part):
    return part.dense() if isinstance(part, LowRank) else part


@pytest.mark.parametrize("given", [Given(1), Given(1, dense=True)], ids=["low-rank", "dense"])
def test_a_random_change_has_the_same_norms_and_ranks_and_no_direction_in_common(lab, given):
    drawn, original = read(RandomLike(given, 5), lab), read(given, lab)
    assert drawn.keys() == original.keys()
    for name, part in drawn.items():
        assert float(dense(part).norm()) == pytest.approx(float(dense(original[name]).norm()), rel=1e-5)
        if not given.dense:
            assert torch.linalg.matrix_rank(dense(part)) == given.rank
    name = next(iter(SHAPES))
    cosine = torch.nn.functional.cosine_similarity(dense(drawn[name]).flatten(), dense(original[name]).flatten(), 0)
    assert abs(float(cosine)) < 0.6
    other = read(RandomLike(given, 6), lab)
    assert not torch.equal(dense(other[name]), dense(drawn[name]))


def test_the_parts_along_an_adapter_add_up_and_the_outside_meets_it_nowhere(lab):
    change, adapter = Given(1), Given(2)
    inside, outside = (read(Part(change, adapter, side), lab) for side in ("inside", "outside"))
    against = read(adapter, lab)
    for name, part in read(change, lab).items():
        torch.testing.assert_close(inside[name].dense() + outside[name].dense(), part.dense(), atol=1e-5, rtol=1e-5)
        a, b = against[name].a, against[name].b
        assert float((outside[name].dense() @ a.T).abs().max()) < 1e-4, "the outside reads what the adapter reads"
        assert float((b.T @ outside[name].dense()).abs().max()) < 1e-4, "the outside writes what the adapter writes"
        assert float((part.dense() @ a.T).abs().max()) > 0.1, "the whole change does read it"


def test_along_itself_nothing_is_outside(lab):
    part = read(Part(Given(1), Given(1), "outside"), lab)
    assert max(float(p.dense().abs().max()) for p in part.values()) < 1e-5


def test_a_dense_change_has_no_low_rank_parts(lab):
    with pytest.raises(GuardError, match="only a low-rank change"):
        lab.folder(Part(Given(1, dense=True), Given(2), "inside"))


def test_a_rescaled_change_has_the_other_norm_and_the_same_direction(lab):
    change, like = Given(1), Given(3, rank=4)
    scaled, original = read(Rescaled(change, like), lab), read(change, lab)

    def total(change):
        return math.sqrt(sum(float(dense(p).double().norm()) ** 2 for p in change.values()))

    assert total(scaled) == pytest.approx(total(read(like, lab)), rel=1e-5)
    factor = json.loads((lab.folder(Rescaled(change, like)) / "scale.json").read_text())["factor"]
    for name, part in scaled.items():
        torch.testing.assert_close(part.dense(), original[name].dense() * factor)


def test_truncation_is_the_best_approximation_and_leaves_other_parameters_out(lab):
    change = Given(1, rank=4, dense=True)
    original, kept = read(change, lab), read(Truncated(change, 2), lab)
    assert set(kept) == set(SHAPES)
    for name, part in kept.items():
        values = torch.linalg.svdvals(original[name].double())
        assert float((part.dense() - original[name]).norm()) == pytest.approx(float(values[2:].norm()), rel=1e-4)
    whole = read(Truncated(change, 4), lab)
    torch.testing.assert_close(whole[next(iter(SHAPES))].dense(), original[next(iter(SHAPES))], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("given", [Given(1), Given(1, dense=True)], ids=["low-rank", "dense"])
def test_what_a_description_says_of_rank_is_what_is_made(lab, given):
    """A stack carries low-rank changes beside its base and knows them by their descriptions."""
    made = [RandomLike(given, 5), Rescaled(given, Given(3)), Truncated(given, 2)]
    made += [] if given.dense else [Part(given, Given(2), "inside"), Part(given, Given(2), "outside")]
    for stage in made:
        assert stage.low_rank == all(isinstance(part, LowRank) for part in read(stage, lab).values()), stage
    assert Snapshot(given, 3).low_rank == (not given.dense)


def test_a_snapshot_that_was_not_kept_is_refused(lab):
    with pytest.raises(GuardError, match="no snapshot after step 3"):
        lab.folder(Snapshot(Given(1), 3))


@pytest.mark.parametrize(("depth", "sizes"), [(30, (10, 10, 10)), (28, (10, 9, 9)), (3, (1, 1, 1))])
def test_thirds_split_any_depth(depth, sizes):
    parts = [adapters.layer_numbers([name], depth) for name in adapters.THIRDS]
    assert tuple(map(len, parts)) == sizes
    assert sorted(set().union(*parts)) == list(range(depth))
    assert max(parts[0]) < min(parts[1]) <= max(parts[1]) < min(parts[2])
    assert adapters.layer_numbers(["mid", 0], depth) == parts[1] | {0}


@pytest.mark.parametrize("layer", ["middle", 3, -1])
def test_a_layer_that_is_not_there_is_refused(layer):
    with pytest.raises(GuardError, match=r"no part 'middle'|none is number"):
        adapters.layer_numbers([layer], 3)
