"""LoRA in training: PEFT's outputs and gradients with fewer passes; in evaluation, merged and saved it is PEFT's."""

from __future__ import annotations

from copy import deepcopy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from geochat.model.lora import use_fewer_passes
from tests.model.block import Block, results


def pair(dropout: float, dtype: torch.dtype = torch.float32) -> tuple[nn.Module, nn.Module]:
    """PEFT's layers and ours with the same weights; the adapters are float32."""
    torch.manual_seed(0)
    config = LoraConfig(r=3, lora_alpha=7, lora_dropout=dropout, target_modules=["inner", "outer"])
    theirs = get_peft_model(Block().to(dtype), config).train()  # type: ignore[arg-type]
    for name, parameter in theirs.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.3)
    ours = deepcopy(theirs)
    use_fewer_passes(ours)
    return theirs, ours


@pytest.mark.parametrize("shape", [(2, 7, 24), (7, 24)], ids=["rows", "no rows"])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_the_same_as_peft(dropout: float, shape: tuple[int, ...]) -> None:
    theirs, ours = pair(dropout)
    x = torch.randn(shape)
    expected, found = results(theirs, x), results(ours, x)
    assert found.keys() == expected.keys()
    assert len(found) == 6
    for name, value in found.items():
        torch.testing.assert_close(value, expected[name], atol=1e-6, rtol=0, msg=name)


@pytest.mark.parametrize("autocast", [False, True])
def test_float32_adapters_beside_a_bfloat16_base(autocast: bool) -> None:
    """No further from the outputs of float32 weights than PEFT's."""
    theirs, ours = pair(0.0, torch.bfloat16)
    exact = deepcopy(theirs).float()
    x = torch.randn(2, 50, 24).bfloat16()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        far, near = (model(x) for model in (theirs, ours))
    assert near.dtype == torch.bfloat16
    expected = exact(x.float()).detach()
    assert (near - expected).norm() < 1.1 * (far - expected).norm()


def test_evaluation_state_and_merging_are_pefts() -> None:
    theirs, ours = pair(0.3)
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    x = torch.randn(2, 5, 24)
    assert torch.equal(ours.eval()(x), theirs.eval()(x))
    with ours.disable_adapter(), theirs.disable_adapter():
        assert torch.equal(ours.train()(x), theirs.train()(x))
    assert torch.equal(ours.merge_and_unload()(x), theirs.merge_and_unload()(x))
