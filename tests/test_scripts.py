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
