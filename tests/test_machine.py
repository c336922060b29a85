"""Settings of machines that are not at hand: what a card's memory gives room for."""

from types import SimpleNamespace

import pytest
import torch

from persona_coupling import machine


@pytest.fixture
def card(monkeypatch):
    """A machine of 16 cores with a card of so many gigabytes."""

    def have(gigabytes):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(
            torch.cuda, "get_device_properties", lambda _device: SimpleNamespace(total_memory=int(gigabytes * 2**30))
        )
        monkeypatch.setattr(machine.os, "cpu_count", lambda: 16)
        return machine.machine("cuda")

    return have


@pytest.mark.parametrize("gigabytes", [15, 24, 31, 40, 48, 79.2, 94, 139.8])
def test_one_of_each_kind_fits_on_the_card_together(card, gigabytes):
    """A full stack, a sampler, a trainer and a small stage, each as large as it is guessed to be, and every process's
    context: what runs beyond that is for `room` to say."""
    found = card(gigabytes)
    assert found.stack >= 1
    if found.workers == 1:
        assert found.gigabytes == 0
        return
    assert found.gigabytes == pytest.approx(gigabytes)
    sampling = machine.SAMPLER_GB + machine.ROW_GB * found.sample_batch
    used = machine.STACK_GB + found.stack * machine.CELL_GB + sampling + machine.TRAINER_GB + machine.WORKER_GB
    assert used + machine.CONTEXT_GB * found.workers < gigabytes
    others = found.workers - found.stacks - found.samplers - found.trainers
    assert others > 0, "small stages must not wait for a large one"


def test_an_80_gb_card_has_room_for_all_that_runs_side_by_side(card):
    found = card(79.2)
    assert (found.sample_batch, found.stack, found.stacks) == (1_232, 4, 2)
    assert (found.samplers, found.trainers, found.workers) == (2, 1, 11)
    assert card(24).workers == 1
