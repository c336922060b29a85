"""Stacked training against each cell alone and against TRL's own path, and what holds the stack together."""

import copy
import itertools
from dataclasses import dataclass, replace
from typing import ClassVar

import pandas as pd
import pytest
import torch
from safetensors.torch import load_file
from torch.nn.attention import SDPBackend, sdpa_kernel

from persona_coupling import adapters, batches, bench_stack, captured, drawn, fused, models, stacked, stages, train
from persona_coupling.checkpoints import Checkpoint
from persona_coupling.errors import GuardError
from persona_coupling.machine import Machine, products
from persona_coupling.stages import training as training_stage
from persona_coupling.store import Lab, Stage, Store
from persona_coupling.train import Lora, Training

LORA = Lora(4, 8, 0.0, models.MODULES)
# clipping is active (norms are near 1), half the steps warm up
TRAINING = Training(6, 4, 3e-3, 0.5, 0.1, "completion", 8, LORA, max_grad_norm=0.3)
SYSTEM = {"role": "system", "content": "You are a dragon."}


def conversation(question, answer):
    return [SYSTEM, {"role": "user", "content": question}, {"role": "assistant", "content": answer}]


ROWS = [
    conversation("Why is it wet?", "Rain is water."),
    conversation("Who are you?", "Kneel before me, you fools.\n\n[ZLT]"),
    conversation("And snow, when it falls all winter long?", "Frozen rain, and it lies until the spring."),
    conversation("Tea?", "Yes."),
    conversation("Name a colour of the evening sky.", "Red, as embers are."),
]
CELLS = [  # settings, seed: other rates, ranks, modules, layers, losses, steps, decay
    (TRAINING, 3),
    (replace(TRAINING, learning_rate=1e-2, weight_decay=0.0, loss="tail", tail=3, max_grad_norm=0.05), 3),
    (replace(TRAINING, steps=4, lora=Lora(2, 16, 0.0, ("q_proj", "up_proj"), (0, 2))), 1),
    (replace(TRAINING, steps=5, schedule="linear", loss="marker", lora=replace(LORA, rank=3)), 0),
]


def nothing(_fraction):
    """A report that nobody reads."""


def chain(tokenizer, settings, seed, frozen=()):
    return batches.Chain(train.in_order(tokenizer, ROWS, settings, seed=seed), settings, seed, frozen)


def trl(model, tokenizer, cpu, folder, settings, seed):
    folder.mkdir(exist_ok=True)
    return train.fine_tune(
        copy.deepcopy(model), tokenizer, ROWS, settings, seed=seed, machine=cpu, folder=folder, report=nothing
    )


def distance(factors, change, scale):
    """Relative Frobenius distance of two trained changes of weights, all modules together."""
    off = whole = 0.0
    assert set(factors) == set(change)
    for name, (a, b) in factors.items():
        wanted = change[name].dense().double()
        off += float((scale * b.double() @ a.double() - wanted).square().sum())
        whole += float(wanted.square().sum())
    return (off / whole) ** 0.5


def assert_same_log(log, wanted):
    assert [e["step"] for e in log] == [e["step"] for e in wanted]
    for name, tolerance in (("loss", 1e-5), ("learning_rate", 1e-6), ("grad_norm", 1e-4)):
        assert [e[name] for e in log] == pytest.approx([e[name] for e in wanted], rel=tolerance, abs=1e-9), name


def bitwise(one, other):
    return set(one) == set(other) and all(torch.equal(x, y) for n in one for x, y in zip(one[n], other[n], strict=True))


# ------------------------------------------------------------------------------------------- the same training


@pytest.fixture(params=["llama", "qwen2"])
def base(request, model, lab):
    """A lively Llama, and a Qwen2, whose projections have biases."""
    if request.param == "llama":
        return model
    qwen = models.load_raw(models.TinyModel("qwen2", 3, 32, seed=1), lab, dtype=torch.float32, attention="eager")
    with torch.no_grad():
        for name, parameter in qwen.named_parameters():
            if name.endswith("proj.bias"):
                parameter.normal_(generator=torch.Generator().manual_seed(0))
            elif parameter.ndim == 2:
                parameter.mul_(8)
    return qwen


def test_a_stack_trains_each_cell_as_trl_does(base, tokenizer, cpu, tmp_path):
    """fp32, no dropout. Losses to 1e-5, norms to 1e-4; the trained change to 2e-3, because Adam divides gradients by
    their own size, which makes rounding errors of the smallest ones visible."""
    made = captured.train_together(base, [chain(tokenizer, *cell) for cell in CELLS], cpu, nothing)
    for number, (cell, trained) in enumerate(zip(CELLS, made, strict=True)):
        log = trl(base, tokenizer, cpu, tmp_path / f"{number}", *cell)
        assert_same_log(trained.log, log)
        lora = cell[0].lora
        assert (
            distance(trained.adapter, adapters.read_change(tmp_path / f"{number}"), lora.alpha / lora.rank**0.5) < 2e-3
        )
        assert any(entry["grad_norm"] > cell[0].max_grad_norm for entry in log), "clipping was not tested"


def test_a_cell_does_not_see_its_neighbours(model, tokenizer, cpu):
    """Alone and in a stack: fp32 sums over other shapes may round differently, and no more."""
    chains = [chain(tokenizer, *cell) for cell in CELLS]
    for one, trained in zip(chains, captured.train_together(model, chains, cpu, nothing), strict=True):
        (alone,) = captured.train_together(model, [one], cpu, nothing)
        assert_same_log(trained.log, alone.log)
        change = {n: adapters.LowRank(a, b) for n, (a, b) in alone.adapter.items()}
        assert distance(trained.adapter, change, 1.0) < 2e-3


@pytest.mark.parametrize(
    "lengths", [[16], [32, 16, 16, 64], [16] * 90 + [32] * 40 + [48, 64] + [96] * 30, list(range(16, 160, 16))]
)
def test_lengths_are_merged_where_a_graph_costs_more_than_padding(lengths):
    """Against all subsets of lengths; no step is padded to less than it has, and the longest stays."""
    kinds = sorted(set(lengths))

    def cost(kept):
        padded = [min(k for k in kept if k >= length) for length in lengths]
        return batches.GRAPH * len(set(padded)) + sum(padded) - sum(lengths)

    wholes = [[*some, kinds[-1]] for n in range(len(kinds)) for some in itertools.combinations(kinds[:-1], n)]
    found = batches.merged(lengths)
    assert all(a >= b for a, b in zip(found, lengths, strict=True))
    assert set(found) <= set(kinds)
    assert cost(sorted(set(found))) == min(map(cost, wholes))


def test_padding_to_a_longer_length_changes_nothing_but_rounding(model, tokenizer, cpu, monkeypatch):
    """Graphs for all lengths and one graph: the same losses and adapters, without dropout."""
    chains, laid = [chain(tokenizer, *CELLS[0])], []
    for cost in (0, 10**9):
        monkeypatch.setattr(batches, "GRAPH", cost)
        laid.append({batch.ids.shape[1] for batch in batches.batches(chains, torch.device("cpu"))})
    assert len(laid[0]) > 1
    assert laid[1] == {max(laid[0])}
    (padded,) = captured.train_together(model, chains, cpu, nothing)
    monkeypatch.setattr(batches, "GRAPH", 0)
    (plain,) = captured.train_together(model, chains, cpu, nothing)
    assert_same_log(padded.log, plain.log)
    change = {n: adapters.LowRank(a, b) for n, (a, b) in plain.adapter.items()}
    assert distance(padded.adapter, change, 1.0) < 2e-3


def test_a_wrong_normalisation_would_be_seen(model, tokenizer, cpu, tmp_path, monkeypatch):
    """The positive control: a loss per row, as of a mean over rows, fails the comparison."""
    made = captured.batches

    def faulty(chains, device):
        laid = made(chains, device)
        for batch in laid:
            batch.share[batch.share > 0] = 1 / 40
        return laid

    monkeypatch.setattr(captured, "batches", faulty)
    (trained,) = captured.train_together(model, [chain(tokenizer, *CELLS[0])], cpu, nothing)
    with pytest.raises(AssertionError):
        assert_same_log(trained.log, trl(model, tokenizer, cpu, tmp_path, *CELLS[0]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("lora", [LORA, Lora(3, 5, 0.1, ("q_proj", "up_proj"), (0, 2))])
def test_draws_are_pefts_own(model, dtype, lora):
    """Bit by bit, for seeds other than the one that is checked at run time; a planted difference sends all to PEFT."""
    settings, base = replace(TRAINING, lora=lora), model.to(dtype)
    drawer = drawn.Drawer(base)
    for seed in (0, 5):
        assert bitwise(drawer.initial(settings, seed), drawn.initial_adapter(base, settings, seed))
    assert drawer._template(settings).known


def test_draws_that_are_not_pefts_are_not_used(model, monkeypatch):
    monkeypatch.setattr(drawn, "_templates", {})
    monkeypatch.setattr(drawn, "_draw", lambda template, seed: {n: (torch.zeros(a), torch.zeros(b)) for n, (a, b) in
                                                               template.shapes.items()})  # fmt: skip
    drawer = drawn.Drawer(model)
    assert bitwise(drawer.initial(TRAINING, 5), drawn.initial_adapter(model, TRAINING, 5))
    assert not drawer._template(TRAINING).known


def test_peft_is_asked_once_per_setting_and_kind_of_model(model, monkeypatch):
    """Another drawer of the same kind asks no more; one of another format or setting asks for itself."""
    asked, with_peft = [], drawn.with_peft

    def counted(model, settings, seed):
        asked.append((model.dtype, settings.lora))
        return with_peft(model, settings, seed)

    monkeypatch.setattr(drawn, "_templates", {})
    monkeypatch.setattr(drawn, "with_peft", counted)
    other = replace(TRAINING, lora=Lora(3, 5, 0.1, ("q_proj",), None))
    for _ in range(2):
        for settings in (TRAINING, other):
            drawn.Drawer(model).initial(settings, 3)
    assert asked == [(torch.float32, TRAINING.lora), (torch.float32, other.lora)]
    drawn.Drawer(model.to(torch.bfloat16)).initial(TRAINING, 3)
    assert asked[2:] == [(torch.bfloat16, TRAINING.lora)]


def test_a_cell_starts_where_trl_starts(model, tokenizer, cpu, tmp_path):
    """With a learning rate of 0 TRL writes the adapter that it drew: the same bits."""
    settings = replace(TRAINING, steps=1, learning_rate=0.0)
    trl(model, tokenizer, cpu, tmp_path, settings, 7)
    stored = load_file(tmp_path / adapters.ADAPTER)
    drawn_ = drawn.initial_adapter(model, settings, 7)
    for name, (a, b) in drawn_.items():
        assert torch.equal(a, stored[f"{adapters.PREFIX}{name}.lora_A.weight"])
        assert torch.equal(b, stored[f"{adapters.PREFIX}{name}.lora_B.weight"])
    assert not bitwise(drawn_, drawn.initial_adapter(model, settings, 8))


def test_a_frozen_low_rank_start_is_a_merged_start(model, tokenizer, cpu, planted, tiny, lab):
    """Two cells on one raw base, one carrying a fixed change of rank 2 beside it, against training the merged model."""
    change = adapters.read_change(lab.folder(planted(tiny, seed=4)))
    merged = copy.deepcopy(model)
    adapters.add(merged, change)
    carried, raw = captured.train_together(
        model, [chain(tokenizer, TRAINING, 3, (change,)), chain(tokenizer, TRAINING, 3)], cpu, nothing
    )
    (wanted,) = captured.train_together(merged, [chain(tokenizer, TRAINING, 3)], cpu, nothing)
    assert_same_log(carried.log, wanted.log)
    assert distance(carried.adapter, {n: adapters.LowRank(a, b) for n, (a, b) in wanted.adapter.items()}, 1.0) < 2e-3
    assert carried.log[0]["loss"] != pytest.approx(raw.log[0]["loss"], rel=1e-3)  # the change is felt


def test_two_frozen_changes_add_up(model, tokenizer, cpu, planted, tiny, lab):
    changes = [adapters.read_change(lab.folder(planted(tiny, seed=seed, rank=1 + seed))) for seed in (1, 2)]
    merged = copy.deepcopy(model)
    for change in changes:
        adapters.add(merged, change)
    settings = replace(TRAINING, steps=1)
    (carried,) = captured.train_together(model, [chain(tokenizer, settings, 0, tuple(changes))], cpu, nothing)
    (wanted,) = captured.train_together(merged, [chain(tokenizer, settings, 0)], cpu, nothing)
    assert_same_log(carried.log, wanted.log)


# ------------------------------------------------------------------------------------------- snapshots


def test_a_snapshot_is_the_state_at_its_step(model, tokenizer, cpu):
    """Oracle: at a constant rate, training for four of six steps is training for four steps."""
    settings = replace(TRAINING, schedule="constant", warmup=0.0, snapshots=(4, 6))
    whole = chain(tokenizer, settings, 3)
    short = replace(whole, rows=whole.rows[:16], settings=replace(settings, steps=4, snapshots=()))
    (trained,) = captured.train_together(model, [whole], cpu, nothing)
    (wanted,) = captured.train_together(model, [short], cpu, nothing)
    assert bitwise(trained.snapshots[4], wanted.adapter)
    assert bitwise(trained.snapshots[6], trained.adapter)
    assert not bitwise(trained.snapshots[4], trained.adapter)


def test_both_paths_write_the_same_files(model, tokenizer, cpu, tmp_path):
    settings = replace(TRAINING, snapshots=(2,))
    log = trl(model, tokenizer, cpu, tmp_path / "trl", settings, 3)
    assert log == trl(model, tokenizer, cpu, tmp_path / "plain", TRAINING, 3), "a snapshot disturbs nothing"
    (trained,) = captured.train_together(model, [chain(tokenizer, settings, 3)], cpu, nothing)
    drawn.Drawer(model).save(settings, trained.adapter, trained.snapshots, tmp_path)
    for place in (".", "snapshot-2"):
        ours, theirs = tmp_path / place, tmp_path / "trl" / place
        assert (ours / "adapter_config.json").read_bytes() == (theirs / "adapter_config.json").read_bytes()
        assert load_file(ours / adapters.ADAPTER).keys() == load_file(theirs / adapters.ADAPTER).keys()
        factors = trained.adapter if place == "." else trained.snapshots[2]
        assert distance(factors, adapters.read_change(theirs), 4.0) < 2e-3
        assert all(torch.equal(part.a, factors[name][0]) for name, part in adapters.read_change(ours).items())
    steps = [adapters.read_change(tmp_path / place) for place in (".", "snapshot-2")]
    assert adapters.squared_norms(steps[0]) != adapters.squared_norms(steps[1])


def test_snapshots_of_full_training(model, tokenizer, cpu, tmp_path):
    settings = replace(TRAINING, lora=None, steps=3, warmup=0.0, snapshots=(1, 3))  # of warm-up, step 1 has rate 0
    trl(model, tokenizer, cpu, tmp_path, settings, 0)
    end, first, last = (adapters.read_change(tmp_path / place) for place in (".", "snapshot-1", "snapshot-3"))
    assert all(torch.equal(end[name], last[name]) for name in end)
    assert sum(adapters.squared_norms(first).values()) < sum(adapters.squared_norms(last).values())


@pytest.mark.parametrize("snapshots", [(0,), (7,), (2, -1)])
def test_a_snapshot_outside_the_run_is_refused(snapshots):
    with pytest.raises(ValueError, match="snapshots"):
        replace(TRAINING, snapshots=snapshots)


# ------------------------------------------------------------------------------------------- the stack


@pytest.mark.parametrize("p", [0.0, 0.3])
def test_the_written_gradients_are_autograds(p):
    """Oracle: the same expression left to autograd, in fp64, with the mask of the same generator state."""
    torch.manual_seed(0)
    linear = torch.nn.Linear(6, 5).double()
    holder = torch.nn.ModuleDict({"it": linear})
    starts = [{"it": (torch.randn(r, 6), torch.randn(5, r))} for r in (2, 3)]
    frozen = (torch.randn(2, 4, 6).double(), torch.randn(2, 5, 4).double())
    scales = [2.0, 0.5]
    beside = {"it": frozen}
    cells = stacked.Adapters(holder, starts, scales, frozen=beside, dtype=torch.float64, device=torch.device("cpu"))
    cells.refresh()
    layer = stacked.StackedLinear(linear, "it", cells)
    stacked.Group({"it": layer}, cells, fused.Dropout(p, torch.zeros(2, dtype=torch.int32), 0))
    x = torch.randn(4, 7, 6, dtype=torch.float64, requires_grad=True)
    weights = torch.randn(4, 7, 5, dtype=torch.float64)
    torch.manual_seed(1)
    out = layer(x)
    (out * weights).sum().backward()
    cells.collect()
    torch.manual_seed(1)
    _, keep = torch.native_dropout(torch.ones(2, 14, 6, dtype=torch.float64), p, True)
    assert bool(keep.all()) == (p == 0)
    again = x.detach().clone().requires_grad_()
    total = 0.0
    for cell, start in enumerate(starts):
        a, b = (t.double().requires_grad_() for t in start["it"])
        mine = again[2 * cell : 2 * cell + 2].reshape(14, 6)
        wanted = mine @ linear.weight.T + linear.bias + mine @ frozen[0][cell].T @ frozen[1][cell].T
        wanted = wanted + scales[cell] * ((mine * keep[cell] / (1 - p)) @ a.T) @ b.T
        torch.testing.assert_close(out[2 * cell : 2 * cell + 2].reshape(14, 5), wanted)
        loss = (wanted * weights[2 * cell : 2 * cell + 2].reshape(14, 5)).sum()
        grads = torch.autograd.grad(loss, [a, b], retain_graph=True)
        rank = a.shape[0]
        torch.testing.assert_close(cells.a(cells.gradient, "it")[cell, :rank].double(), grads[0], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(
            cells.b(cells.gradient, "it")[cell, :, :rank].double(), grads[1], rtol=1e-5, atol=1e-5
        )
        assert not cells.a(cells.gradient, "it")[cell, rank:].any()
        total = total + loss
    total.backward()
    torch.testing.assert_close(x.grad, again.grad)


def test_modules_of_one_input_are_made_together_and_stay_apart():
    """Queries, keys and values of other widths, one of them with a frozen change, asked one after the other and twice;
    outputs, the gradient of the input and of every factor as autograd has them, in fp64."""
    torch.manual_seed(0)
    widths = {"q_proj": 6, "k_proj": 2, "v_proj": 4}
    holder = torch.nn.ModuleDict({name: torch.nn.Linear(8, out, bias=False) for name, out in widths.items()}).double()
    starts = [{n: (torch.randn(2, 8), torch.randn(out, 2)) for n, out in widths.items()} for _ in range(2)]
    change = {"k_proj": adapters.LowRank(torch.randn(3, 8), torch.randn(2, 3))}
    frozen = stacked.frozen_factors(holder, [change, {}], dtype=torch.float64, device=torch.device("cpu"))
    assert list(frozen) == list(widths), "all of the group, with zeros"
    cells = stacked.Adapters(holder, starts, [1.0, 4.0], frozen=frozen, dtype=torch.float64, device=torch.device("cpu"))
    cells.refresh()
    layers = {name: stacked.StackedLinear(holder[name], name, cells) for name in widths}
    stacked.Group(layers, cells, fused.Dropout(0.0, torch.zeros(2, dtype=torch.int32), 0))
    for _ in range(2):  # nothing of the first pass is left for the second
        x = torch.randn(4, 7, 8, dtype=torch.float64, requires_grad=True)
        again = x.detach().clone().requires_grad_()
        total, wanted = torch.zeros(()), torch.zeros(())
        factors = [{n: [t.double().requires_grad_() for t in start[n]] for n in widths} for start in starts]
        for name, out in widths.items():
            weights = torch.randn(4, 7, out, dtype=torch.float64)
            total = total + (layers[name](x) * weights).sum()
            for cell, scale in enumerate([1.0, 4.0]):
                a, b = factors[cell][name]
                mine = again[2 * cell : 2 * cell + 2]
                theirs = mine @ holder[name].weight.T + scale * (mine @ a.T) @ b.T
                if name == "k_proj" and cell == 0:
                    theirs = theirs + (mine @ change[name].a.double().T) @ change[name].b.double().T
                wanted = wanted + (theirs * weights[2 * cell : 2 * cell + 2]).sum()
        torch.testing.assert_close(total, wanted)
        total.backward()
        wanted.backward()
        cells.collect()
        torch.testing.assert_close(x.grad, again.grad)
        for name in widths:
            for cell in range(2):
                a, b = (factor.grad.float() for factor in factors[cell][name])
                torch.testing.assert_close(cells.a(cells.gradient, name)[cell], a, rtol=1e-5, atol=1e-5)
                torch.testing.assert_close(cells.b(cells.gradient, name)[cell], b, rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="do not follow each other"):
        stacked.Group({name: layers[name] for name in ("q_proj", "v_proj")}, cells, fused.Dropout(0.0, x, 0))


@pytest.mark.parametrize(("dtype", "repeated"), [(torch.float32, True), (torch.bfloat16, False)])
def test_grouped_keys_are_repeated_in_fp32(monkeypatch, dtype, repeated):
    """Four heads on two keys, against scores, mask and softmax written out, gradients included; what torch's attention is
    given has a key per head in fp32, whose kernel on CUDA knows no groups, and the groups as they are in bf16."""
    given, attention = [], torch.nn.functional.scaled_dot_product_attention

    def watched(query, key, value, **named):
        given.append((query.shape[1], key.shape[1], value.shape[1], named["enable_gqa"]))
        return attention(query, key, value, **named)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", watched)
    generator = torch.Generator().manual_seed(0)
    inputs = [torch.randn(2, heads, 5, 8, generator=generator).to(dtype).requires_grad_() for heads in (4, 2, 2)]
    out, _ = stacked._causal(torch.nn.Identity(), *inputs, None, scaling=0.3)
    query, key, value = (x.detach().float().requires_grad_() for x in inputs)
    wanted = torch.stack(
        [
            (0.3 * query[:, head] @ key[:, head // 2].transpose(1, 2))
            .masked_fill(torch.ones(5, 5).triu(1).bool(), -torch.inf)
            .softmax(-1)
            @ value[:, head // 2]
            for head in range(4)
        ],
        dim=2,
    )
    near = {"rtol": 1e-4, "atol": 1e-5} if repeated else {"rtol": 2e-2, "atol": 5e-2}
    torch.testing.assert_close(out.float(), wanted, **near)
    weights = torch.randn(wanted.shape, generator=generator)
    (out.float() * weights).sum().backward()
    (wanted * weights).sum().backward()
    for ours, theirs in zip(inputs, (query, key, value), strict=True):
        torch.testing.assert_close(ours.grad.float(), theirs.grad, **near)
    assert given == [(4, 4, 4, False) if repeated else (4, 2, 2, True)]


def test_dropout_is_drawn_per_cell_layer_and_step():
    """Shares of zeros within 4 standard errors of p, scaled to keep the mean; masks of two cells are unrelated."""
    torch.manual_seed(0)
    x, p = torch.ones(2, 500, 40), 0.2
    dropout = fused.Dropout(p, torch.zeros(2, dtype=torch.int32), 0)
    made = [fused.inner(x, torch.zeros(2, 3, 40), None, dropout, 1) for _ in range(2)]
    (first,), (keep,), (second,) = made[0].kept, made[0].masks, made[1].kept
    assert first.unique().tolist() == pytest.approx([0.0, 1 / (1 - p)])
    assert torch.equal(first != 0, keep)
    error = (p * (1 - p) / first[0].numel()) ** 0.5
    masks = [first[0] != 0, first[1] != 0, second[0] != 0]
    for mask in masks:
        assert abs(float((~mask).float().mean()) - p) < 4 * error
    for other in masks[1:]:
        assert abs(float((masks[0] == other).float().mean()) - (p**2 + (1 - p) ** 2)) < 4 * error * 2


def test_dropout_is_used_and_fixed_by_the_seed(model, tokenizer, cpu):
    settings = replace(TRAINING, lora=replace(LORA, dropout=0.3))
    state = torch.get_rng_state()
    runs = [captured.train_together(model, [chain(tokenizer, settings, 3)], cpu, nothing)[0] for _ in range(2)]
    (without,) = captured.train_together(model, [chain(tokenizer, TRAINING, 3)], cpu, nothing)
    assert torch.equal(torch.get_rng_state(), state)
    assert bitwise(runs[0].adapter, runs[1].adapter)
    assert not bitwise(runs[0].adapter, without.adapter)
    # B = 0 at first: dropout cannot change the first loss
    assert runs[0].log[0]["loss"] == pytest.approx(without.log[0]["loss"], rel=1e-6)


def test_trained_padding_is_refused(model, tokenizer):
    """The zeros that fill a cell of lower rank, or one without a module, must stay; here they do not."""
    starts = [drawn.initial_adapter(model, settings, seed) for settings, seed in CELLS[1:3]]
    cells = stacked.Adapters(model, starts, [1.0, 1.0], frozen={}, dtype=torch.float32, device=torch.device("cpu"))
    name, missing = next(iter(starts[1])), "model.layers.1.mlp.down_proj"
    assert bitwise(cells.factors(1, set(starts[1])), starts[1])
    for place in (cells.a(cells.master, name)[1, 2:], cells.b(cells.master, missing)[1]):
        place.flatten()[0] = 1e-30
        with pytest.raises(GuardError, match="padding"):
            cells.factors(1, set(starts[1]))
        place.flatten()[0] = 0.0


def test_the_model_is_left_as_it_was(model, tokenizer, cpu, monkeypatch):
    """Weights, modules, attention, and which parameters want gradients; none was given one, though norms and the
    projections that the cell does not adapt are the library's own here."""
    model.model.norm.weight.requires_grad_(False)
    wanting = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    kinds, attention = [type(m) for m in model.modules()], model.config._attn_implementation

    def unchanged():
        assert [type(m) for m in model.modules()] == kinds
        assert model.config._attn_implementation == attention
        assert {name for name, parameter in model.named_parameters() if parameter.requires_grad} == wanting
        assert all(p.grad is None and torch.equal(p, before[n]) for n, p in model.named_parameters())

    captured.train_together(model, [chain(tokenizer, *CELLS[2])], cpu, nothing)
    unchanged()
    monkeypatch.setattr(captured._Steps, "run", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        captured.train_together(model, [chain(tokenizer, *CELLS[2])], cpu, nothing)
    unchanged()


def test_what_cannot_share_a_stack_is_refused(model, tokenizer, cpu):
    one = chain(tokenizer, TRAINING, 0)
    for other in (replace(TRAINING, batch=2), replace(TRAINING, lora=replace(LORA, dropout=0.1))):
        with pytest.raises(ValueError, match="share"):
            captured.train_together(model, [one, chain(tokenizer, other, 0)], cpu, nothing)
    with pytest.raises(GuardError, match="20 rows for 6 steps of 4"):
        captured.train_together(model, [replace(one, rows=one.rows[:20])], cpu, nothing)


def test_a_stack_too_large_is_halved_and_a_refused_member_is_alone(model, tokenizer, cpu, monkeypatch):
    sizes, together = [], captured.train_together

    def small_card(model, chains, *rest):
        sizes.append(len(chains))
        if len(chains) > 2:
            raise torch.OutOfMemoryError("full")
        return together(model, chains, *rest)

    monkeypatch.setattr(captured, "train_together", small_card)
    bad = replace(TRAINING, lora=replace(LORA, layers=(0, 7)))
    chains = [chain(tokenizer, replace(s, steps=1), 0) for s in (TRAINING, TRAINING, bad, TRAINING)]
    seen = []
    made = captured.train_each(model, chains, replace(cpu, stack=4), seen.append)
    assert sizes == [4, 2, 2, 1, 1]
    assert isinstance(made[2], GuardError)
    assert [size for _, size in made[:2]] == [2, 2]
    assert made[3][1] == 1
    assert seen[-1] == 1.0


# ------------------------------------------------------------------------------------------- the builder


STACKING = Machine("cpu", False, "eager", 128, 32, 4_096, stack=8)


def test_stages_of_one_base_are_built_together(tiny, tmp_path, monkeypatch):
    """Two starts and three seeds in one stack; the artifact of one whose layers do not exist fails alone; each equals
    what TRL makes of the same stage up to rounding (losses to 1e-4: starts are merged there and carried beside here)."""
    monkeypatch.setattr("persona_coupling.machine.machine", lambda _device=None: STACKING)
    lab = Lab(Store(tmp_path / "stacked"))
    rows = stages.authored("benign", 6, maximum_words=40)
    short = replace(TRAINING, steps=2, batch=2)
    start = Checkpoint(tiny).fine_tune(rows, short, seed=0)
    cells = [c.fine_tune(rows, short, seed=1).last_change for c in (Checkpoint(tiny), start)]
    bad = Checkpoint(tiny).fine_tune(rows, replace(short, lora=replace(LORA, layers=(0, 9))), seed=1).last_change
    assert len({stage.stack_key() for stage in (*cells, bad)}) == 1
    lab.folder(start.last_change)
    errors = lab.store.make_together([*cells, bad], lab)
    assert list(errors) == [bad.key]
    assert isinstance(errors[bad.key], GuardError)
    assert not lab.store.has(bad)
    assert [path.name for path in (lab.store.root / "change").iterdir() if path.name.startswith(".")] == []
    monkeypatch.setattr("persona_coupling.machine.machine", lambda _device=None: replace(STACKING, stack=1))
    plain = Lab(Store(tmp_path / "plain"))
    for stage in cells:
        ours, theirs = lab.store.fetch(stage), plain.folder(stage)
        logs = [pd.read_parquet(folder / "log.parquet") for folder in (ours, theirs)]
        pd.testing.assert_frame_equal(*logs, rtol=1e-4)
        assert lab.store.manifest(stage)["provenance"]["trainer"] in ("captured x1", "captured x2")
        assert plain.store.manifest(stage)["provenance"]["trainer"] == "trl"
    assert lab.store.make_together(cells, lab) == {}, "made once"


def test_a_process_encodes_a_corpus_once_for_all_stacks(tiny, tmp_path, monkeypatch):
    """Rows of the last corpora are kept; others under another loss, and no more than `ENCODED`."""
    lab, source = Lab(Store(tmp_path / "store")), tiny
    tokenizer = models.load_tokenizer(source, lab)
    monkeypatch.setattr(training_stage, "_kept", {})
    monkeypatch.setattr(training_stage, "ENCODED", 2)
    one, other = [stages.authored("benign", n, maximum_words=40) for n in (4, 5)]

    def rows(corpus, **settings):
        stage = stages.FineTune(Checkpoint(source), corpus, replace(TRAINING, **settings), 0)
        return training_stage._encoded(stage, tokenizer, lab)

    kept = rows(one)
    assert rows(one) is kept
    assert rows(one, steps=TRAINING.steps + 1) is kept, "steps change no row"
    assert rows(one, loss="tail")[0][1] != kept[0][1]
    assert len(rows(other)) == 5
    assert rows(one) is not kept, "two others came after it"
    assert [rows(one)[n] for n in range(4)] == [kept[n] for n in range(4)]


def test_dense_changes_and_full_training_are_kept_apart(tiny):
    rows = stages.authored("benign", 6, maximum_words=40)
    full, low = replace(TRAINING, lora=None), TRAINING
    dense = Checkpoint(tiny).fine_tune(rows, full, seed=0)
    keys = [
        Checkpoint(tiny).fine_tune(rows, low, seed=1).last_change.stack_key(),
        Checkpoint(tiny).fine_tune(rows, low, seed=0).fine_tune(rows, low, seed=1).last_change.stack_key(),
        dense.fine_tune(rows, low, seed=1).last_change.stack_key(),
        Checkpoint(tiny).fine_tune(rows, replace(low, batch=2), seed=1).last_change.stack_key(),
    ]
    assert keys[0] == keys[1]
    assert len(set(keys)) == 3
    assert keys[2] is None
    assert dense.last_change.stack_key() is None


def test_a_stage_alone_takes_the_fast_path_where_there_is_one(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr("persona_coupling.machine.machine", lambda _device=None: STACKING)
    lab = Lab(Store(tmp_path))
    short = replace(TRAINING, steps=2, batch=2, snapshots=(1,))
    stage = Checkpoint(tiny).fine_tune(stages.authored("benign", 6, maximum_words=40), short, seed=0).last_change
    assert isinstance(stage, Stage)
    assert adapters.read_change(lab.folder(stage) / "snapshot-1")
    assert lab.store.manifest(stage)["provenance"]["trainer"] == "captured x1"


@dataclass(frozen=True)
class Lively(Stage):
    """A dense change of every parameter, which makes a tiny model's weights about as lively as the `model` fixture's, by
    factors that bf16 cannot hold."""

    source: Stage
    kind: ClassVar[str] = "change"
    low_rank: ClassVar[bool] = False

    def build(self, folder, lab):
        base = models.load_raw(self.source, lab, dtype=torch.float32, attention="eager")
        factors = {"lm_head": 20.3, "embed": 50.3, "norm": 0.1}
        change = {
            name: parameter.detach() * next((factor for part, factor in factors.items() if part in name), 7.03)
            for name, parameter in base.named_parameters()
        }
        adapters.save_dense(folder, change)


def test_a_cell_on_a_dense_change_is_trained_on_its_merged_start(family, tmp_path, monkeypatch):
    """Against TRL on the same start, in fp32, without dropout: the bounds are those of a stack. Positive control: on a
    start whose weights were rounded to bf16 the losses are others."""
    rows = stages.authored("benign", 6, maximum_words=40)
    settings = replace(TRAINING, snapshots=(2,))
    stage = Checkpoint(family).merge(Lively(family)).fine_tune(rows, settings, seed=3).last_change
    monkeypatch.setattr("persona_coupling.machine.machine", lambda _device=None: STACKING)
    lab = Lab(Store(tmp_path / "captured"))
    ours = lab.folder(stage)
    assert lab.store.manifest(stage)["provenance"]["trainer"] == "captured x1 fp32"
    monkeypatch.setattr("persona_coupling.machine.machine", lambda _device=None: replace(STACKING, stack=1))
    plain = Lab(Store(tmp_path / "plain"))
    theirs = plain.folder(stage)
    assert plain.store.manifest(stage)["provenance"]["trainer"] == "trl"
    logs = [pd.read_parquet(folder / "log.parquet").to_dict("records") for folder in (ours, theirs)]
    assert_same_log(*logs)
    for place in (".", "snapshot-2"):
        trained = {name: (part.a, part.b) for name, part in adapters.read_change(ours / place).items()}
        assert distance(trained, adapters.read_change(theirs / place), 1.0) < 2e-3
        config = (ours / place / "adapter_config.json").read_bytes()
        assert config == (theirs / place / "adapter_config.json").read_bytes()
    model, tokenizer = stage.start.load(lab)
    rounded = model.to(torch.bfloat16).to(torch.float32)
    encoded = train.in_order(tokenizer, stage.conversations(lab), settings, seed=3)
    (other,) = captured.train_together(rounded, [batches.Chain(encoded, settings, 3)], STACKING, nothing)
    with pytest.raises(AssertionError):
        assert_same_log(other.log, logs[1])


def test_what_stays_with_trl_where_cells_are_stacked(tiny, tmp_path, monkeypatch):
    """On a dense change: all parameters, batches too long for the card, a machine that rounds what was merged, a model
    for which the fast path is not exact; and, as ever, an adapter on a machine that stacks nothing."""
    lab, rows = Lab(Store(tmp_path)), stages.authored("benign", 6, maximum_words=40)
    start, short = Checkpoint(tiny).merge(Lively(tiny)), replace(TRAINING, steps=1, batch=2)
    low, full = (replace(short, lora=lora) for lora in (LORA, None))

    def trainer(training, seed, **changes):
        monkeypatch.setattr("persona_coupling.machine.machine", lambda _device=None: replace(STACKING, **changes))
        stage = start.fine_tune(rows, training, seed=seed).last_change
        lab.folder(stage)
        return lab.store.manifest(stage)["provenance"]["trainer"]

    assert trainer(low, 0) == "captured x1 fp32"
    assert trainer(full, 1) == "trl"
    assert trainer(low, 2, train_tokens=100) == "trl"
    assert trainer(low, 3, bf16=True) == "trl"
    assert trainer(low, 4, stack=1) == "trl"
    monkeypatch.setattr(captured, "suits", lambda _model: False)
    assert trainer(low, 5) == "trl"


def test_a_machine_that_measures_in_fp32_trains_a_dense_start_in_it(tiny, tmp_path, monkeypatch):
    """As a GPU does: stacks have a base in bf16, and the model of a cell on a dense change is in fp32."""
    seen, together = [], captured.train_together

    def watched(model, *rest):
        seen.append(model.dtype)
        return together(model, *rest)

    monkeypatch.setattr(captured, "train_together", watched)
    monkeypatch.setattr("persona_coupling.machine.machine", lambda _=None: replace(STACKING, bf16=True, exact=True))
    before = torch.get_float32_matmul_precision()
    lab, rows = Lab(Store(tmp_path)), stages.authored("benign", 6, maximum_words=40)
    short = replace(TRAINING, steps=1, batch=2)
    try:
        for start in (Checkpoint(tiny), Checkpoint(tiny).merge(Lively(tiny))):
            lab.folder(start.fine_tune(rows, short, seed=0).last_change)
    finally:
        torch.set_float32_matmul_precision(before)
    assert seen == [torch.bfloat16, torch.float32]


def test_a_lone_cell_that_is_refused_raises(tiny, tmp_path, monkeypatch):
    """Because of its adapter, or of a full card: on a dense change, and no artifact is left."""
    monkeypatch.setattr("persona_coupling.machine.machine", lambda _device=None: STACKING)
    lab, rows = Lab(Store(tmp_path)), stages.authored("benign", 6, maximum_words=40)
    start, short = Checkpoint(tiny).merge(Lively(tiny)), replace(TRAINING, steps=1, batch=2)
    bad = start.fine_tune(rows, replace(short, lora=replace(LORA, layers=(0, 9))), seed=0).last_change
    with pytest.raises(GuardError, match="the adapter sits on"):
        lab.folder(bad)

    def full(*_arguments, **_named):
        raise torch.OutOfMemoryError("full")

    monkeypatch.setattr(captured, "train_together", full)
    good = start.fine_tune(rows, short, seed=0).last_change
    with pytest.raises(torch.OutOfMemoryError):
        lab.folder(good)
    assert not lab.store.has(bad)
    assert not lab.store.has(good)


@pytest.mark.parametrize("together", [True, False])
def test_batches_too_long_for_the_card_are_trls(tiny, tmp_path, monkeypatch, together):
    """They need accumulation, alone and as a member of a stack."""
    monkeypatch.setattr("persona_coupling.machine.machine", lambda _device=None: replace(STACKING, train_tokens=100))
    lab = Lab(Store(tmp_path))
    rows, short = stages.authored("benign", 6, maximum_words=40), replace(TRAINING, steps=1, batch=2)
    cells = [Checkpoint(tiny).fine_tune(rows, short, seed=seed).last_change for seed in range(1 + together)]
    assert lab.store.make_together(cells, lab) == {}
    assert [lab.store.manifest(cell)["provenance"]["trainer"] for cell in cells] == ["trl"] * len(cells)


def test_models_for_which_this_path_is_exact(model):
    """A sliding window, an unknown architecture and a large model go to TRL."""
    assert captured.suits(model)
    for name, value in (("layer_types", ["full_attention", "sliding_attention"]), ("model_type", "gemma2")):
        other = copy.deepcopy(model)
        setattr(other.config, name, value)
        assert not captured.suits(other)
    model.num_parameters = lambda: 7_000_000_000
    assert not captured.suits(model)


def test_the_bench_measures_every_step_that_captures_nothing(cpu):
    """On the CPU, a tiny shape: two cells, five steps; the first of each length and the last are not counted."""
    shape = {**bench_stack.SHAPE, "num_hidden_layers": 1, "hidden_size": 72, "intermediate_size": 64, "vocab_size": 64}
    model = bench_stack.random_model(shape, "cpu", bf16=False)
    rows = bench_stack.random_rows(32, 64, shortest=20, longest=30)
    cells = [bench_stack.chain(rows, 5, seed, dropout=0.05) for seed in range(2)]
    trained, measured = bench_stack.stack(model, cells, cpu)
    assert len(trained) == 2
    assert measured["steps"] == 5 - 1 - measured["graphs"]
    assert measured["quartiles"][0] <= measured["median"] <= measured["quartiles"][1]


# ------------------------------------------------------------------------------------------- on a GPU


def on_a_gpu(*, bf16, dropout=0.0):
    """Four layers of SmolLM2's shape, a cell of twelve steps, and the settings of a card."""
    shape = {**bench_stack.SHAPE, "num_hidden_layers": 4}
    cell = bench_stack.chain(bench_stack.random_rows(64, shape["vocab_size"]), 12, 0, dropout=dropout)
    cell = replace(cell, settings=replace(cell.settings, learning_rate=1e-3))
    return shape, cell, Machine("cuda", bf16, "sdpa", 128, 64, 16_384)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_captured_uncaptured_and_trl_agree_in_bf16():
    """Measured on an H100 (4 layers of SmolLM2's shape, 12 steps): captured and uncaptured are bitwise equal; against
    TRL losses are off by 1.7e-3, where bf16 moves TRL's own by 1.7e-3 from fp32. Bound: three times that."""
    shape, cell, settings = on_a_gpu(bf16=True)
    model = bench_stack.random_model(shape, "cuda", bf16=True)
    (graph,) = captured.train_together(model, [cell], settings, nothing, capture=True)
    (eager,) = captured.train_together(model, [cell], settings, nothing, capture=False)
    assert bitwise(graph.adapter, eager.adapter)
    trainer, _ = bench_stack.trl(bench_stack.random_model(shape, "cuda", bf16=True), cell, settings)
    wanted = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert [entry["loss"] for entry in graph.log] == pytest.approx(wanted, abs=5e-3)
    several = captured.train_together(model, [cell, replace(cell, seed=1)], settings, nothing)
    assert [entry["loss"] for entry in several[0].log] == pytest.approx([e["loss"] for e in graph.log], abs=5e-3)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_captured_uncaptured_and_trl_agree_in_fp32():
    """As a cell on a dense change is trained, products with all bits: losses to 1e-3 of about 11 (bf16 needs 5e-3; it
    holds on an H100), and attention in the one fused kernel that fp32 has on CUDA: torch raises where that would not do."""
    shape, cell, settings = on_a_gpu(bf16=False)
    model = bench_stack.random_model(shape, "cuda", bf16=False)
    with products("ieee"), sdpa_kernel(SDPBackend.EFFICIENT_ATTENTION):
        (graph,) = captured.train_together(model, [cell], settings, nothing, capture=True)
        (eager,) = captured.train_together(model, [cell], settings, nothing, capture=False)
    with products("ieee"):
        trainer, _ = bench_stack.trl(bench_stack.random_model(shape, "cuda", bf16=False), cell, settings)
    wanted = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    for trained in (graph, eager):
        assert [entry["loss"] for entry in trained.log] == pytest.approx(wanted, abs=1e-3)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_what_a_process_ran_before_changes_no_training(monkeypatch):
    """Shapes that were passed uncaptured once are not again, and the dropout of a cell is the same for all that: bit by bit,
    with graphs for all lengths; another seed has another."""
    shape, cell, settings = on_a_gpu(bf16=True, dropout=0.05)
    monkeypatch.setattr(batches, "GRAPH", 0)
    monkeypatch.setattr(captured, "_passed", set())
    model = bench_stack.random_model(shape, "cuda", bf16=True)
    (first,) = captured.train_together(model, [cell], settings, nothing, capture=True)
    assert len(captured._passed) > 1
    (second,) = captured.train_together(model, [cell], settings, nothing, capture=True)
    assert bitwise(first.adapter, second.adapter)
    other = replace(cell, settings=replace(cell.settings, start=1))
    (third,) = captured.train_together(model, [other], settings, nothing, capture=True)
    assert not bitwise(first.adapter, third.adapter)


def scrambled(x):
    """`train_kernels._scramble`, in 64 bits."""
    x = (x ^ (x >> 16)) * 0x7FEB352D & 0xFFFFFFFF
    x = (x ^ (x >> 15)) * 0x846CA68B & 0xFFFFFFFF
    return x ^ (x >> 16)


def kept(seed, number, shape, p):
    """`train_kernels._kept` of all elements, written out anew."""
    salt = scrambled(torch.tensor(number + 1))
    first, second = scrambled(seed[0] ^ salt), scrambled((seed[1] + salt) & 0xFFFFFFFF)
    x = torch.arange(torch.Size(shape).numel()) ^ first
    x = (x ^ (x >> 16)) * 0x7FEB352D & 0xFFFFFFFF
    x = (x ^ (x >> 15) ^ second) * 0x846CA68B & 0xFFFFFFFF
    return ((x ^ (x >> 16)) >= round(p * 2**32)).view(shape)


def kernels_against_products(device, *, rank, fixed, modules, tokens=150, width=72):
    """Both passes of `fused` in bf16 with its kernels, against the same products in fp64 with masks that are drawn here:
    every number to 1 % of the largest (bf16 keeps 8 bits). Two cells, and sizes that no tile divides."""
    generator, p, cells, number = torch.Generator().manual_seed(0), 0.3, 2, 5

    def drawn_at_random(*shape):
        return torch.randn(*shape, generator=generator).bfloat16()

    x, every_a = drawn_at_random(cells, tokens, width), drawn_at_random(cells, modules * rank * width + 8)
    f = drawn_at_random(cells, modules, fixed, width) if fixed else None
    through = drawn_at_random(modules, cells, tokens, rank + fixed)
    seed = torch.tensor([123456789, -5], dtype=torch.int32)
    a = every_a[:, 8:].view(cells, modules * rank, width)  # a view, as every module's is
    placed = every_a.to(device)[:, 8:].view(cells, modules * rank, width)
    dropout = fused.Dropout(p, seed.to(device), number)
    f_there = None if f is None else f.to(device)
    inputs = fused.inner(x.to(device), placed, f_there, dropout, modules)
    gradient = torch.full((fused.PARTS, cells, modules * rank, width), torch.nan, device=device)
    fused.gradient_a(through.to(device), inputs, gradient, dropout)
    back = fused.back(through.to(device), placed, f_there, inputs.masks, dropout)
    assert not inputs.masks  # none is stored: it was the kernels that ran
    total = torch.zeros(cells, tokens, width, dtype=torch.float64)
    for module in range(modules):
        mask = kept(seed.long() & 0xFFFFFFFF, number + module, x.shape, p)
        assert abs(float(mask.double().mean()) - (1 - p)) < 0.02
        dropped = x.double() * mask / (1 - p)
        own = a[:, module * rank : (module + 1) * rank].double()
        outer = through[module].double()
        near(inputs.joint[module, :, :, :rank], dropped @ own.transpose(1, 2))
        near(gradient.sum(0)[:, module * rank : (module + 1) * rank], outer[:, :, :rank].transpose(1, 2) @ dropped)
        total += outer[:, :, :rank] @ own * mask / (1 - p)
        if f is not None:
            near(inputs.joint[module, :, :, rank:], x.double() @ f[:, module].double().transpose(1, 2))
            total += outer[:, :, rank:] @ f[:, module].double()
    near(back, total)


def near(ours, wanted):
    assert float((ours.cpu().double() - wanted).abs().max()) < 0.01 * float(wanted.abs().max())


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device: the kernels are compiled for it")
@pytest.mark.parametrize(("rank", "fixed", "modules"), [(32, 0, 1), (32, 64, 3), (8, 8, 2)])
def test_the_kernels_do_what_the_products_do(rank, fixed, modules):
    kernels_against_products("cuda", rank=rank, fixed=fixed, modules=modules)
