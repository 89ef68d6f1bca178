"""torch.compile and Liger by flag: the same losses when compiled, one graph for all lengths, one line when impossible."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
import torch

from geochat.train.train import main

everything = pytest.mark.skipif(not os.environ.get("GEOCHAT_ALL_TESTS"), reason="GEOCHAT_ALL_TESTS=1 runs it")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_liger_without_a_gpu_is_refused(flags, tmp_path: Path, refused) -> None:
    said = refused(main, [*flags, "--use_liger_kernel", "True", "--output_dir", str(tmp_path)])
    assert "--use_liger_kernel needs a GPU" in said


def test_compiling_what_is_spread_is_refused(flags, tmp_path: Path, refused, monkeypatch) -> None:
    monkeypatch.setenv("RANK", "0")
    said = refused(main, [*flags, "--torch_compile", "True", "--fsdp", "True", "--output_dir", str(tmp_path)])
    assert "--torch_compile goes neither with --deepspeed nor with --fsdp" in said


def losses(folder: Path) -> list[float]:
    history = json.loads((folder / "checkpoint-12" / "trainer_state.json").read_text())["log_history"]
    return [entry["loss"] for entry in history if "loss" in entry]


@everything
@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler")
@pytest.mark.parametrize("checkpointing", ["False", "True"])
@pytest.mark.parametrize(
    "extra", [[], ["--packing", "True", "--share_image_prefix", "True"]], ids=["plain", "packed"]
)
def test_compiled_layers_take_the_same_steps(
    extra: list[str], checkpointing: str, flags, tmp_path: Path
) -> None:
    """Batches of different lengths, twelve steps; every kind of layer input compiles once."""
    counters = torch._dynamo.utils.counters
    run = [*flags, *extra, "--lora_dropout", "0", "--save_steps", "12"]
    run += ["--gradient_checkpointing", checkpointing]
    torch._dynamo.reset()
    main([*run, "--output_dir", str(tmp_path / "plain")])
    counters.clear()
    main([*run, "--output_dir", str(tmp_path / "compiled"), "--torch_compile", "True"])
    assert losses(tmp_path / "compiled") == pytest.approx(losses(tmp_path / "plain"), abs=1e-5)
    assert len(losses(tmp_path / "plain")) == 12
    assert 1 <= counters["stats"]["unique_graphs"] <= 4
