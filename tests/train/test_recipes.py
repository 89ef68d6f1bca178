"""Every published recipe: what it trains, by name, and that its script trains tiny parts for twenty steps.

The scripts of two recipes run always, in one process; with GEOCHAT_ALL_TESTS=1 all of them run as they are, in two
processes with the recipe's own ZeRO stage.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from itertools import product
from pathlib import Path
from statistics import mean
from typing import NamedTuple

import pytest
import torch
from safetensors.torch import load_file

from geochat.model.build import build_model
from geochat.model.checkpoint import load, save_model
from geochat.serve import cli
from geochat.train.assemble import load_base, make_trainable
from geochat.train.command_line import parse_arguments

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"
EVERYTHING = bool(os.environ.get("GEOCHAT_ALL_TESTS"))

IN_PEFT = "base_model.model."
ATTENTION, MLP = ("q_proj", "k_proj", "v_proj", "o_proj"), ("gate_proj", "up_proj", "down_proj")
LINEAR = [
    f"model.language_model.layers.{layer}.{part}"
    for layer in (0, 1)
    for part in (*(f"self_attn.{name}" for name in ATTENTION), *(f"mlp.{name}" for name in MLP))
]
NORMS = [
    f"model.language_model.layers.{layer}.{name}_layernorm"
    for layer, name in product((0, 1), ("input", "post_attention"))
]
OUTSIDE = ["model.language_model.embed_tokens", "model.language_model.norm", "lm_head"]
LLM = {f"{name}.weight" for name in (*LINEAR, *NORMS, *OUTSIDE)}
PROJECTOR = {
    f"model.multi_modal_projector.linear_{layer}.{kind}"
    for layer, kind in product((1, 2), ("weight", "bias"))
}
IN_BLOCK = (
    *(f"self_attn.{name}" for name in ("q_proj", "k_proj", "v_proj", "out_proj")),
    "mlp.fc1",
    "mlp.fc2",
)


def block(number: int, *names: str) -> list[str]:
    return [f"model.vision_tower.encoder.layers.{number}.{name}" for name in names]


def lora(layers: list[str]) -> set[str]:
    return {f"{IN_PEFT}{layer}.lora_{matrix}.default.weight" for layer, matrix in product(layers, "AB")}


LORA = lora(LINEAR)
MAGNITUDES = {f"{IN_PEFT}{layer}.lora_magnitude_vector.default.weight" for layer in LINEAR}
TOWER_LORA = lora(
    [layer for number in (0, 1, 2) for layer in block(number, *IN_BLOCK)]
)  # read up to state -2
COPIED_PROJECTOR = {
    f"{IN_PEFT}{name.replace('linear_', 'modules_to_save.default.linear_')}" for name in PROJECTOR
}
UPPER_TOWER = {
    f"{name}.{kind}"
    for number, kind in product((2, 3), ("weight", "bias"))
    for name in block(number, *IN_BLOCK, "layer_norm1", "layer_norm2")
}
STATES = ["--mm_vision_select_layer", "1", "2", "4"]  # for VHM's 8, 16 and 24 of a tower of 24 blocks


class Recipe(NamedTuple):
    """A script at the size of the tiny parts."""

    script: str
    start: str
    """ "base" (a model folder), "parts" (language model and tower) or "vhm" (a model that reads three states)."""
    trains: set[str]
    """The names of all parameters that train."""
    flags: list[str]
    weights: str


ADAPTER, FULL, PROJECTOR_FILE = "adapter_model.safetensors", "model.safetensors", "mm_projector.safetensors"
RECIPES = {
    "geochat_lora": Recipe("finetune_lora", "base", LORA, [], ADAPTER),
    "geochat_lora_script": Recipe("finetune_lora_script", "base", LORA, [], ADAPTER),
    "geochat_full": Recipe("finetune", "base", LLM | PROJECTOR, [], FULL),
    "llava_pretrain": Recipe("pretrain", "parts", PROJECTOR, [], PROJECTOR_FILE),
    "dora": Recipe("finetune_dora", "parts", LORA | MAGNITUDES | COPIED_PROJECTOR, [], ADAPTER),
    "geochat_bench_qlora": Recipe(
        "finetune_qlora", "parts", LORA | TOWER_LORA | COPIED_PROJECTOR, [], ADAPTER
    ),
    "vhm_pretrain": Recipe(
        "vhm_pretrain", "parts", LLM | PROJECTOR | UPPER_TOWER, [*STATES, "--tune_vit_from_layer", "2"], FULL
    ),
    "vhm_finetune": Recipe("vhm_finetune", "vhm", LLM | PROJECTOR, STATES, FULL),
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
    names = {name for name, parameter in trained.named_parameters() if parameter.requires_grad}
    assert names == recipe.trains


def everything(preset: str) -> object:
    marks = pytest.mark.skipif(not EVERYTHING, reason="GEOCHAT_ALL_TESTS=1 runs it")
    return preset if preset in CHEAP else pytest.param(preset, marks=marks)


@pytest.mark.slow
@pytest.mark.parametrize("preset", [everything(preset) for preset in RECIPES])
def test_the_script_trains(preset: str, started, tiny_records, free_port: int, tmp_path: Path) -> None:
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
        "GLOBAL_BATCH": 4,
        "CUDA_VISIBLE_DEVICES": "",
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    }
    variables |= {"VISION_TOWER": tower} if tower else {}
    if EVERYTHING:
        launcher = (
            "deepspeed" if preset == "geochat_lora_script" else "torchrun"
        )  # as GeoChat's script has it
        variables |= {"GPUS": 2, "MASTER_PORT": free_port, "LAUNCHER": launcher, "OMP_NUM_THREADS": 1}
    else:
        variables |= {"GPUS": 1, "LAUNCHER": "python", "ZERO": "none"}
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
    split = "2 per device × 1 accumulation × 2" if EVERYTHING else "4 per device × 1 accumulation × 1"
    assert f"4 = {split} processes" in result.stdout
    losses = [json.loads(line)["loss"] for line in (run / "loss.jsonl").read_text().splitlines()]
    assert len(losses) == 20
    assert mean(losses[-4:]) < mean(losses[:4])
    assert load_file(run / "checkpoint-20" / recipe.weights)
    if recipe.weights == PROJECTOR_FILE:
        assert tower is not None
        built = build_model(model, tower, run / PROJECTOR_FILE, image_size=84, dtype=torch.float32)
        run = tmp_path / "built"
        save_model(*built, run)
    else:
        load(run / "checkpoint-20")
    if preset == "vhm_pretrain":
        check_tuned_tower(run, tiny_clip=tower)
    asked = ["--image-file", str(tiny_records.image_folder / "square.png"), "--query", "What is it?"]
    assert cli.main(["--model-path", str(run), *asked, "--device", "cpu", "--max-new-tokens", "4"]) == 0


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
