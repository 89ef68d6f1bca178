"""Every script parses, every JSON file is valid, and the launchers name what is missing before they start."""

from __future__ import annotations

import json
import os
import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SHELLS = sorted([*ROOT.glob("scripts/**/*.sh"), ROOT / ".ci" / "run"])
PYTHONS = sorted([*ROOT.glob("scripts/**/*.py"), *ROOT.glob("benchmarks/**/*.py")])
JSONS = sorted([*ROOT.glob("scripts/**/*.json"), *ROOT.glob("playground/*/*.json")])


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


@pytest.mark.parametrize("script", SHELLS, ids=name_of)
def test_shell_script_parses(script: Path) -> None:
    result = subprocess.run(["bash", "-n", str(script)], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    text = script.read_text(encoding="utf-8")
    assert "/home/" not in text
    assert "/work/" not in text


def test_continuous_integration_runs_the_test_script() -> None:
    assert os.access(ROOT / ".ci" / "run", os.X_OK)
    assert "scripts/test.sh" in (ROOT / ".ci" / "run").read_text()


@pytest.mark.parametrize("script", PYTHONS, ids=name_of)
def test_python_script_compiles(script: Path) -> None:
    compile(script.read_text(encoding="utf-8"), str(script), "exec")


@pytest.mark.parametrize("file", JSONS, ids=name_of)
def test_json_parses(file: Path) -> None:
    json.loads(file.read_text(encoding="utf-8"))


@pytest.mark.parametrize("file", sorted(ROOT.glob("scripts/zero*.json")), ids=name_of)
def test_zero_file_is_the_stage_it_says(file: Path) -> None:
    config = json.loads(file.read_text())
    assert config["zero_optimization"]["stage"] == int(re.findall(r"\d", file.name)[0])
    for key in ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps"):
        assert config[key] == "auto", f"{file.name}: {key} belongs to the command line"


RECIPES = {
    "finetune_lora.sh": "geochat_lora",
    "finetune_lora_script.sh": "geochat_lora_script",
    "finetune.sh": "geochat_full",
    "pretrain.sh": "llava_pretrain",
    "finetune_dora.sh": "dora",
    "finetune_qlora.sh": "geochat_bench_qlora",
    "vhm_pretrain.sh": "vhm_pretrain",
    "vhm_finetune.sh": "vhm_finetune",
}
"""Script → preset."""
PUBLISHED = {
    "geochat_lora": (144, 2e-4, (64, 16)),
    "geochat_lora_script": (96, 2e-4, (64, 16)),
    "geochat_full": (144, 2e-5, None),
    "llava_pretrain": (256, 1e-3, None),
    "dora": (128, 2e-4, (128, 256)),
    "geochat_bench_qlora": (128, 2e-4, (512, 256)),
    "vhm_pretrain": (256, 2e-5, None),
    "vhm_finetune": (128, 2e-5, None),
}
"""Preset → global batch, learning rate, rank and alpha of LoRA, as the sources have them."""
LORA = ROOT / "scripts" / "finetune_lora.sh"


def test_every_preset_has_its_script() -> None:
    pytest.importorskip("torch")
    from geochat.train.presets import PRESETS

    assert list(PRESETS) == list(RECIPES.values())


@pytest.fixture
def launch(tmp_path: Path):
    """Run a recipe with a `torchrun` that only prints what it was given; nothing trains."""
    (tmp_path / "bin").mkdir()
    for name in ("torchrun", "deepspeed"):
        launcher = tmp_path / "bin" / name
        launcher.write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
        launcher.chmod(0o755)
    for name in ("model", "tower", "images"):
        (tmp_path / name).mkdir()
    (tmp_path / "data.json").write_text("[]")
    paths = {
        "MODEL": str(tmp_path / "model"),
        "VISION_TOWER": str(tmp_path / "tower"),
        "DATA": str(tmp_path / "data.json"),
        "IMAGES": str(tmp_path / "images"),
        "OUTPUT": str(tmp_path / "run"),
    }

    def run(script: Path, *flags: str, **environment: str | None) -> subprocess.CompletedProcess:
        variables = paths | {"PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}"} | environment
        clean = {name: value for name, value in variables.items() if value is not None}
        return subprocess.run(["bash", str(script), *flags], capture_output=True, text=True, env=clean)

    return run


@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize("gpus", [1, 2, 3, 8])
def test_recipe_keeps_its_global_batch_on_any_number_of_gpus(name: str, gpus: int, launch) -> None:
    pytest.importorskip("torch")
    from geochat.train.batch_size import accumulation_for
    from geochat.train.command_line import parse_arguments
    from geochat.train.presets import PRESETS

    preset = PRESETS[RECIPES[name]]
    batch, rate, published_lora = PUBLISHED[RECIPES[name]]
    result = launch(ROOT / "scripts" / name, GPUS=str(gpus))
    if batch % gpus:
        assert f"{batch} cannot be split over {gpus} GPUs" in result.stderr
        return
    assert result.returncode == 0, result.stderr
    words = result.stdout.splitlines()
    flags = words[words.index("geochat.train.train") + 1 :]
    zero = flags.index("--deepspeed")
    assert Path(flags[zero + 1]).name == f"zero{preset.zero}.json"
    assert Path(flags[zero + 1]).is_file()
    del flags[zero : zero + 2]  # reading it would start the process group
    _, _, training = parse_arguments([*flags, "--use_cpu", "True"])
    per_device = training.per_device_train_batch_size
    assert training.global_batch_size == batch
    assert accumulation_for(batch, per_device, 1, gpus) * per_device * gpus == batch
    lora = (training.lora_r, training.lora_alpha) if training.lora_enable else None
    assert (training.learning_rate, lora) == (rate, published_lora)


def test_recipe_names_what_is_missing(launch) -> None:
    result = launch(LORA, MODEL=None)
    assert result.returncode == 2
    assert result.stderr.startswith("error: MODEL is not set")
    result = launch(LORA, IMAGES="/nowhere/at/all")
    assert result.returncode == 2
    assert "/nowhere/at/all: no such folder" in result.stderr


def test_recipe_refuses_a_batch_that_cannot_be_split(launch) -> None:
    result = launch(LORA, GPUS="5")
    assert result.returncode == 2
    assert "140 and 145" in result.stderr


def test_flags_given_to_a_recipe_come_last_and_win(launch) -> None:
    words = launch(LORA, "--lora_r", "128", GPUS="2").stdout.splitlines()
    assert words[-2:] == ["--lora_r", "128"]
