"""The tower at another resolution, and the frozen tower outside the autograd graph."""

from pathlib import Path

import pytest
import torch

from geochat.model.build import build_model
from geochat.model.vision import (
    freeze_tower,
    grid_side,
    require_image_size,
    resample_positions,
    resize_tower,
)


@pytest.fixture
def model(tiny_llm: Path, tiny_clip: Path):
    return build_model(tiny_llm, tiny_clip, image_size=84, dtype=torch.float32)[0]


def test_golden_position_table(assets: Path) -> None:
    from safetensors.torch import load_file

    from geochat.model.weights import open_weights

    state = open_weights(assets / "golden/clip-vit-tiny-patch14-336")
    table = state["vision_model.embeddings.position_embedding.weight"].read().float()
    golden = load_file(assets / "golden/expected/geochat/position_embedding.safetensors")
    torch.testing.assert_close(resample_positions(table, 36), golden["position_embedding"], atol=1e-6, rtol=0)


def test_corners_stay_and_the_other_convention_differs() -> None:
    table = torch.randn(1 + 24 * 24, 16, generator=torch.Generator().manual_seed(0)) * 0.02
    aligned = resample_positions(table, 36)
    assert torch.equal(aligned[0], table[0])
    for old, new in ((1, 1), (24, 36), (1 + 23 * 24, 1 + 35 * 36), (576, 1296)):
        torch.testing.assert_close(aligned[new], table[old], atol=1e-6, rtol=0)
    # transformers' own interpolation: a clearly different table, so a silent swap would be seen
    gap = (aligned - resample_positions(table, 36, align_corners=False)).abs().max()
    assert 0.01 < gap < 0.04


@pytest.mark.parametrize(("grid", "side"), [(6, 9), (24, 16), (3, 3), (1, 4)])
def test_any_square_grid(grid: int, side: int) -> None:
    table = torch.randn(1 + grid * grid, 8, generator=torch.Generator().manual_seed(1)).to(torch.bfloat16)
    resampled = resample_positions(table, side)
    assert resampled.shape == (1 + side * side, 8)
    assert resampled.dtype == torch.bfloat16
    if grid == side:
        assert torch.equal(resampled, table)


def test_no_grid_is_refused() -> None:
    with pytest.raises(ValueError, match="not one class row and a square grid"):
        resample_positions(torch.zeros(12, 4), 3)
    with pytest.raises(ValueError, match="try 490 or 504"):
        grid_side(500, 14)


def test_resizing_equals_interpolating_in_the_forward_pass(model) -> None:
    """With transformers' convention the permanent table gives what `interpolate_pos_encoding` gives: 0.0."""
    tower = model.model.vision_tower
    pixels = torch.randn(1, 3, 126, 126, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        moving = tower(pixels, interpolate_pos_encoding=True, output_hidden_states=True).hidden_states
        table = resample_positions(tower.embeddings.position_embedding.weight, 9, align_corners=False)
        resize_tower(model, 126)
        tower.embeddings.position_embedding.weight.copy_(table)
        fixed = tower(pixels, output_hidden_states=True).hidden_states
    assert all(torch.equal(a, b) for a, b in zip(moving, fixed, strict=True))


def test_resizing_updates_everything(model) -> None:
    resize_tower(model, 126)
    embeddings = model.model.vision_tower.embeddings
    assert (embeddings.image_size, embeddings.num_patches, embeddings.num_positions) == (126, 81, 82)
    assert embeddings.position_ids.shape == (1, 82)
    assert embeddings.position_embedding.weight.shape[0] == embeddings.position_embedding.num_embeddings == 82
    assert (model.config.vision_config.image_size, model.config.image_seq_length) == (126, 81)
    assert model.model.vision_tower.config.image_size == 126
    with torch.no_grad():
        features = model.get_image_features(torch.zeros(1, 3, 126, 126)).pooler_output
    assert features[0].shape == (81, 64)


def test_a_tower_of_another_size_is_refused(model) -> None:
    require_image_size(model.config, 84)
    with pytest.raises(ValueError, match="works at 84 px, not 504 px; load it with image_size=504"):
        require_image_size(model.config, 504)


def test_frozen_tower_stays_out_of_autograd(model) -> None:
    """Activation checkpointing and PEFT make the patch embedding require gradients; the tower must not record them."""
    pixels = torch.randn(2, 3, 84, 84)
    tower = model.model.vision_tower
    model.requires_grad_(False)
    model.enable_input_require_grads()
    assert tower(pixels).last_hidden_state.requires_grad  # the trap
    freeze_tower(model)
    freeze_tower(model)  # twice is once
    output = tower(pixels, output_hidden_states=True)
    assert not any(state.requires_grad for state in output.hidden_states)
    assert torch.is_grad_enabled()
    with pytest.raises(ValueError, match="doesn't match"):
        tower(torch.zeros(1, 3, 70, 70))
    assert torch.is_grad_enabled()  # an error inside does not leave gradients off
    tower.requires_grad_(True)  # thawed: trains again
    tower(pixels).last_hidden_state.square().mean().backward()
    assert tower.embeddings.class_embedding.grad is not None
