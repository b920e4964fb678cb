"""What the machine can do is measured, and measuring leaves no trace."""

import torch

from orchestrator.train import machine
from orchestrator.train.machine import _operators


def test_an_operator_takes_more_than_nothing_and_threads_are_as_before():
    before = torch.get_num_threads()
    operator_s, barrier_s = _operators(2)
    assert 1e-7 < operator_s < 1 and barrier_s < 1
    assert torch.get_num_threads() == before


def test_a_barrier_is_what_two_threads_take_beyond_half_of_the_work(monkeypatch):
    took = {(machine.SMALL, 1): 5.0, (machine.SHARED, 1): 25.0, (machine.SHARED, 2): 35.0}
    monkeypatch.setattr(machine, "_operator_s", lambda elements: took[elements, torch.get_num_threads()])
    assert _operators(2) == (5.0, 20.0) and _operators(1) == (5.0, 0.0)
    took[machine.SHARED, 2] = 12.0
    assert _operators(2) == (5.0, 0.0), "never less than none"
