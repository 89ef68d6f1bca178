"""Every published recipe: what it trains, by name, and that its script trains tiny parts for twenty steps.

The scripts of two recipes run always, the others with GEOCHAT_ALL_TESTS=1.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
from pathlib import Path
from statistics import mean
from typing import NamedTuple

import pytest
import torch
from safetensors.torch import load_file

from geochat.model.build import build_model
from geochat.model.checkpoint import load, save_model
from geochat.train.arguments import parse_arguments
from geochat.train.train import load_base, make_trainable

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"
everything = pytest.mark.skipif(not os.environ.get("GEOCHAT_ALL_TESTS"), reason="GEOCHAT_ALL_TESTS=1 runs it")

LLM = r"(base_model\.model\.)?model\.language_model\."
LORA = LLM + r"layers\.\d\.(self_attn|mlp)\.[a-z]+_proj\.lora_[AB]\.default\.weight"
MAGNITUDE = LLM + r"layers\.\d\.(self_attn|mlp)\.[a-z]+_proj\.lora_magnitude_vector\.default\.weight"
TOWER_LORA = (
    r"base_model\.model\.model\.vision_tower\.encoder\.layers\.[012]\."
    r"(self_attn\.(q|k|v|out)_proj|mlp\.fc[12])\.lora_[AB]\.default\.weight"
)
PROJECTOR = r"model\.multi_modal_projector\.linear_[12]\.(weight|bias)"
COPIED_PROJECTOR = r"base_model\.model\.model\.multi_modal_projector\.modules_to_save\.default\..*"
WHOLE_LLM = {r"model\.language_model\..*": 2 * 9 + 2, r"lm_head\.weight": 1}
STATES = ["--mm_vision_select_layer", "1", "2", "4"]  # for VHM's 8, 16 and 24 of a tower of 24 blocks


class Recipe(NamedTuple):
    """A script at the size of the tiny parts."""

    script: str
    start: str
    """ "base" (a model folder), "parts" (language model and tower) or "vhm" (a model that reads three states)."""
    trains: dict[str, int]
    """Pattern of a parameter's whole name → how many such parameters train; no other does."""
    flags: list[str]
    weights: str


ADAPTER, FULL = "adapter_model.safetensors", "model.safetensors"
RECIPES = {
    "geochat_lora": Recipe("finetune_lora", "base", {LORA: 28}, [], ADAPTER),
    "geochat_lora_script": Recipe("finetune_lora_script", "base", {LORA: 28}, [], ADAPTER),
    "geochat_full": Recipe("finetune", "base", {**WHOLE_LLM, PROJECTOR: 4}, [], FULL),
    "llava_pretrain": Recipe("pretrain", "parts", {PROJECTOR: 4}, [], "mm_projector.safetensors"),
    "dora": Recipe("finetune_dora", "parts", {LORA: 28, MAGNITUDE: 14, COPIED_PROJECTOR: 4}, [], ADAPTER),
    "geochat_bench_qlora": Recipe(
        "finetune_qlora", "parts", {LORA: 28, TOWER_LORA: 3 * 6 * 2, COPIED_PROJECTOR: 4}, [], ADAPTER
    ),
    "vhm_pretrain": Recipe(
        "vhm_pretrain",
        "parts",
        {**WHOLE_LLM, PROJECTOR: 4, r"model\.vision_tower\.encoder\.layers\.[23]\..*": 2 * 16},
        [*STATES, "--tune_vit_from_layer", "2"],
        FULL,
    ),
    "vhm_finetune": Recipe("vhm_finetune", "vhm", {**WHOLE_LLM, PROJECTOR: 4}, STATES, FULL),
}
CHEAP = ("llava_pretrain", "vhm_pretrain")


@pytest.fixture(scope="module")
def vhm_base(tiny_llm: Path, tiny_clip: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("vhm") / "stage-1"
    options = {"image_size": 84, "feature_layer": [1, 2, 4], "dtype": torch.float32}
    save_model(*build_model(tiny_llm, tiny_clip, None, **options), folder)
    return folder


@pytest.fixture
def started(tiny_base: Path, tiny_llm: Path, tiny_clip: Path, vhm_base: Path):
    """Start of a recipe → folder of the model, and of its tower where that lies apart."""
    return {"base": (tiny_base, None), "parts": (tiny_llm, tiny_clip), "vhm": (vhm_base, None)}


@pytest.mark.parametrize("preset", RECIPES)
def test_what_trains(preset: str, started, tiny_records, tmp_path: Path) -> None:
    if preset == "geochat_bench_qlora":
        pytest.importorskip("bitsandbytes")
    recipe = RECIPES[preset]
    model, tower = started[recipe.start]
    argv = ["--preset", preset, "--model_name_or_path", model, "--data_path", tiny_records.file]
    argv += ["--image_size", "84", "--output_dir", tmp_path, "--use_cpu", "True", *recipe.flags]
    argv += ["--vision_tower", tower] if tower else []
    arguments = parse_arguments([str(word) for word in argv])
    _, trained = make_trainable(load_base(arguments)[0], arguments[0], arguments[2])
    names = [name for name, parameter in trained.named_parameters() if parameter.requires_grad]
    found = {pattern: sum(bool(re.fullmatch(pattern, name)) for name in names) for pattern in recipe.trains}
    assert found == recipe.trains
    assert len(names) == sum(recipe.trains.values())


@pytest.mark.slow
@pytest.mark.parametrize(
    "preset", [name if name in CHEAP else pytest.param(name, marks=everything) for name in RECIPES]
)
def test_the_script_trains(preset: str, started, tiny_records, tmp_path: Path) -> None:
    if preset == "geochat_bench_qlora":
        pytest.importorskip("bitsandbytes")
    recipe = RECIPES[preset]
    model, tower = started[recipe.start]
    run = tmp_path / "run"
    variables = {
        "MODEL": model,
        "DATA": tiny_records.file,
        "IMAGES": tiny_records.image_folder,
        "OUTPUT": run,
    }
    variables |= {
        "GPUS": "1",
        "GLOBAL_BATCH": "4",
        "LAUNCHER": "python",
        "ZERO": "none",
        "CUDA_VISIBLE_DEVICES": "",
    }
    variables |= {"VISION_TOWER": tower} if tower else {}
    flags = ["--max_steps", "20", "--image_size", "84", "--logging_steps", "1", "--learning_rate", "3e-3"]
    flags += ["--dataloader_num_workers", "0", "--on_bad_sample", "skip", "--save_steps", "10", *recipe.flags]
    result = subprocess.run(
        ["bash", str(SCRIPTS / f"{recipe.script}.sh"), *flags],
        env=os.environ | {name: str(value) for name, value in variables.items()},
        capture_output=True,
        text=True,
        timeout=400,
    )
    assert result.returncode == 0, result.stderr
    assert f"preset  {preset}: " in result.stdout
    assert "4 = 4 per device × 1 accumulation × 1 processes" in result.stdout
    losses = [json.loads(line)["loss"] for line in (run / "loss.jsonl").read_text().splitlines()]
    assert len(losses) == 20
    assert mean(losses[-4:]) < mean(losses[:4])
    for folder in (run, run / "checkpoint-20"):
        assert load_file(folder / recipe.weights)
        if recipe.weights != "mm_projector.safetensors":
            load(folder)
    if preset == "vhm_pretrain":
        check_tuned_tower(run, tiny_clip=tower)


def check_tuned_tower(run: Path, tiny_clip: Path) -> None:
    """The tower in the run folder is the tuned one: blocks 2 and 3 moved, the others are CLIP's."""
    before, after = load_file(tiny_clip / "model.safetensors"), load_file(run / FULL)
    moved = {
        int(key.split("layers.")[1].split(".")[0]) if "layers." in key else -1
        for key, tensor in before.items()
        if not torch.equal(after[f"vision_tower.{key}"], tensor)
    }
    assert moved == {2, 3}
    assert load(run)[0].config.vision_feature_layer == [1, 2, 4]
