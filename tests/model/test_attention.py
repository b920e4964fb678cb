"""Rotary positions."""

import pytest
import torch

from model.attention import rope_table, rotate
from model.config import ModelConfig, RopeScaling


@pytest.mark.parametrize("interleaved", [True, False])
def test_rotation_of_bf16_is_that_of_fp32_rounded_once(interleaved):
    rope = rope_table(ModelConfig(qk_rope_head_dim=16), 512, torch.device("cpu"))
    x = torch.randn(2, 512, 3, 16, generator=torch.Generator().manual_seed(0)).bfloat16()
    assert torch.equal(rotate(x, rope, interleaved), rotate(x.float(), rope, interleaved).bfloat16())


def test_llama3_scaling_wants_two_bounds():
    with pytest.raises(ValueError, match="model.beta_fast=1.0: must be above beta_slow=1.0 with rope_scaling=llama3"):
        ModelConfig(rope_scaling=RopeScaling.llama3, beta_fast=1.0).check()
    ModelConfig(rope_factor=32.0, beta_fast=1.0).check()  # Kimi K2's
