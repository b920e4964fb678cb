"""Rotary positions."""

import pytest
import torch

from model.attention import rope_table, rotate
from model.config import ModelConfig


@pytest.mark.parametrize("interleaved", [True, False])
def test_rotation_of_bf16_is_that_of_fp32_rounded_once(interleaved):
    rope = rope_table(ModelConfig(qk_rope_head_dim=16), 512, torch.device("cpu"))
    x = torch.randn(2, 512, 3, 16, generator=torch.Generator().manual_seed(0)).bfloat16()
    assert torch.equal(rotate(x, rope, interleaved), rotate(x.float(), rope, interleaved).bfloat16())
