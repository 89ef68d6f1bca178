"""LoRA on the tower too, and on a quantised language model: what trains, and what becomes of the adapter."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from geochat.chat.engine import Chat
from geochat.chat.request import Request
from geochat.model.checkpoint import load
from geochat.model.merge import merge_adapter
from geochat.train.train import main

TOWER = ["--vision_lora_r", "2", "--vision_lora_alpha", "6", "--tune_mm_mlp_adapter", "True"]
BLOCKS_READ = 3  # state -2 of a tower of four blocks


def losses(run: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (run / "loss.jsonl").read_text().splitlines()]


def check_adapter(run: Path, tiny_base: Path, records, tolerance: float) -> None:
    """The folder's names and ranks are as expected; it loads, merges into the whole base, and answers."""
    tensors = load_file(run / "adapter_model.safetensors")
    tower = {key: tensor for key, tensor in tensors.items() if ".vision_tower." in key}
    language = {key: tensor for key, tensor in tensors.items() if ".language_model." in key}
    assert (len(language), len(tower)) == (2 * 7 * 2, BLOCKS_READ * 6 * 2)
    assert len(tensors) - len(language) - len(tower) == 4  # the projector
    prefix = "base_model.model.model.vision_tower.encoder.layers."
    assert all(key.startswith(prefix) for key in tower)
    assert {tensor.shape[0] for key, tensor in tower.items() if "lora_A" in key} == {2}
    assert {tensor.shape[0] for key, tensor in language.items() if "lora_A" in key} == {4}
    moved = [key for key, tensor in tower.items() if "lora_B" in key and tensor.abs().max() > 0]
    assert len(moved) == BLOCKS_READ * 6

    merged = run.parent / f"{run.name}-merged"
    assert merge_adapter(run, None, merged) < tolerance
    before, after = load_file(tiny_base / "model.safetensors"), load_file(merged / "model.safetensors")
    layer = "vision_tower.vision_model.encoder.layers.0.mlp.fc1"
    adapted = f"{prefix}0.mlp.fc1"
    update = tower[f"{adapted}.lora_B.weight"] @ tower[f"{adapted}.lora_A.weight"] * (6 / 2)
    torch.testing.assert_close(after[f"{layer}.weight"], before[f"{layer}.weight"] + update)
    last = f"vision_tower.vision_model.encoder.layers.{BLOCKS_READ}.mlp.fc1.weight"
    assert after[last].equal(before[last])
    request = Request.ask("What is it?", records.image_folder / "square.png")
    (answer,) = Chat.load(run, device="cpu").answer([request], max_new_tokens=2)
    assert answer.token_ids


def test_lora_on_the_tower_without_quantisation(flags, tiny_base: Path, tiny_records, tmp_path: Path) -> None:
    run = tmp_path / "run"
    main([*flags, *TOWER, "--output_dir", str(run), "--save_strategy", "no"])
    assert losses(run)[-1] < losses(run)[0]
    check_adapter(run, tiny_base, tiny_records, 1e-4)


@pytest.mark.parametrize("bits", ["4", "8"])
def test_quantised(bits: str, flags, tiny_base: Path, tiny_records, tmp_path: Path, capsys) -> None:
    pytest.importorskip("bitsandbytes")
    run, whole = tmp_path / "run", tmp_path / "whole"
    argv = [*flags, *TOWER, "--bits", bits, "--save_steps", "6", "--lora_dropout", "0"]
    main(
        [
            *argv,
            "--double_quant",
            "True",
            "--quant_type",
            "nf4",
            "--output_dir",
            str(run),
            "--save_total_limit",
            "9",
        ]
    )
    said = capsys.readouterr().out
    assert f"language model, {bits} bits" in said
    assert "trains vision_lora" in said
    assert losses(run)[-1] < losses(run)[0]
    check_adapter(run, tiny_base, tiny_records, 1e-4)
    model, _ = load(run, quantization=f"{bits}bit")
    kinds = {type(module).__name__ for name, module in model.named_modules() if name.endswith("base_layer")}
    assert len(kinds) == 2  # quantised in the language model, whole in the tower

    main([*argv, "--output_dir", str(run), "--resume_from_checkpoint", str(run / "checkpoint-6")])
    main([*argv, "--output_dir", str(whole), "--save_strategy", "no"])
    expected = load_file(whole / "adapter_model.safetensors")
    for key, tensor in load_file(run / "adapter_model.safetensors").items():
        torch.testing.assert_close(tensor, expected[key], msg=key)
