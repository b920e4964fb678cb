"""What the machine can do is measured, and measuring leaves no trace."""

import torch

from orchestrator.train.machine import _operators


def test_an_operator_takes_more_than_nothing_and_threads_are_as_before():
    before = torch.get_num_threads()
    operator_s, barrier_s = _operators(2)
    assert 1e-7 < operator_s < 1e-2 and 0 <= barrier_s < 1e-1
    assert torch.get_num_threads() == before
    assert _operators(1)[1] == 0
