"""DoRA in training: PEFT's outputs and gradients without dropout, an unbiased one with it, norms held or not."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from geochat.model.adapter import LLM_LINEARS, AdapterSpec, attach
from geochat.model.build import build_model
from geochat.model.dora import dora_layers, use_held_norms
from geochat.model.lora import use_fewer_passes
from geochat.train.norms import StepNorms
from tests.model.block import Block, results

IDS = torch.tensor([[1, *[513] * 36, *range(5, 25)]])


def shaken(model: nn.Module) -> nn.Module:
    draw = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if ".lora_" in name:
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=draw)
    return model.train()


def pair(dropout: float, dtype: torch.dtype = torch.float32) -> tuple[nn.Module, nn.Module]:
    """PEFT's layers and ours with the same weights."""
    torch.manual_seed(0)
    config = LoraConfig(
        r=3, lora_alpha=6, lora_dropout=dropout, use_dora=True, target_modules=["inner", "outer"]
    )
    theirs = shaken(get_peft_model(Block().to(dtype), config, autocast_adapter_dtype=False))  # type: ignore[arg-type]
    ours = deepcopy(theirs)
    use_fewer_passes(ours)
    use_held_norms(ours)
    return theirs, ours


@pytest.mark.parametrize("held", [False, True])
def test_the_same_as_peft(held: bool) -> None:
    theirs, ours = pair(dropout=0.0)
    if held:
        StepNorms().on_step_begin(model=ours)
    x = torch.randn(7, 24)
    expected, found = results(theirs, x), results(ours, x)
    assert found.keys() == expected.keys()
    assert sum("magnitude" in name for name in found) == 2
    for name, value in found.items():
        torch.testing.assert_close(value, expected[name], atol=1e-6, rtol=0, msg=name)


def test_the_same_state_and_the_same_evaluation() -> None:
    theirs, ours = pair(dropout=0.5)
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    x = torch.randn(5, 24)
    assert torch.equal(ours.eval()(x), theirs.eval()(x))
    merged = ours.merge_and_unload()
    torch.testing.assert_close(merged(x), theirs(x), atol=1e-6, rtol=0)


def test_dropout_acts_on_the_update_alone() -> None:
    """The layer's mean over many masks is its output without dropout, and W x itself is never dropped."""
    _, ours = pair(dropout=0.5)
    layer = ours.base_model.model.inner
    x = torch.randn(1, 24).expand(20_000, 24)
    expected = layer.eval()(x[:1])
    drawn = layer.train()(x)
    spread = drawn.std(0) / len(x) ** 0.5
    assert (((drawn.mean(0) - expected[0]) / spread).abs() < 5).all()
    for name in layer.lora_B:
        layer.lora_B[name].weight.data.zero_()
    assert torch.equal(*layer(x[:2]))


def test_norms_follow_the_weights_from_step_to_step() -> None:
    theirs, ours = pair(dropout=0.0)
    norms, x = StepNorms(), torch.randn(7, 24)
    optimizers = [torch.optim.SGD(model.parameters(), lr=0.5) for model in (theirs, ours)]
    before = theirs(x).detach()
    for _ in range(3):
        norms.on_step_begin(model=ours)
        for model, optimizer in zip((theirs, ours), optimizers, strict=True):
            for part in (x[:3], x[3:]):
                model(part).pow(2).mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        norms.on_step_end(model=ours)
        torch.testing.assert_close(ours(x), theirs(x), atol=2e-6, rtol=0)
    assert not torch.allclose(theirs(x), before, atol=1e-2)


def test_held_norms_keep_their_precision_in_bfloat16() -> None:
    """PEFT forms them in bfloat16; here they are float32, so the outputs are nearer to those of float32 weights."""
    theirs, ours = pair(dropout=0.0, dtype=torch.bfloat16)
    exact = deepcopy(theirs).float()
    x = torch.randn(64, 24)
    with torch.no_grad():
        far, near = ((model(x.bfloat16()).float() - exact(x)).norm() for model in (theirs, ours))
        assert ours(x.bfloat16()).dtype == torch.bfloat16
    assert near < far


def test_every_linear_layer_of_an_attached_model_has_one(tiny_llm: Path, tiny_clip: Path) -> None:
    base, _ = build_model(tiny_llm, tiny_clip, image_size=84, dtype=torch.float32)
    plain = deepcopy(base)
    model = attach(base, AdapterSpec(r=4, dropout=0.0, use_dora=True))
    assert len(list(dora_layers(model))) == 2 * 7
    config = LoraConfig(r=4, lora_alpha=16, use_dora=True, target_modules=LLM_LINEARS)
    theirs = get_peft_model(plain, config)  # type: ignore[arg-type]
    theirs.load_state_dict(model.state_dict())
    call = {"input_ids": IDS, "pixel_values": torch.randn(1, 3, 84, 84)}
    for each in (model, theirs):
        shaken(each)
    torch.testing.assert_close(model(**call).logits, theirs(**call).logits, atol=1e-6, rtol=0)
