"""The training benchmarks run through, and what they assert holds; no times are looked at."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"


@pytest.fixture
def benchmarks(monkeypatch: pytest.MonkeyPatch):
    """They import one another by their bare names."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    yield
    for name in ("train_step", "dora", "gpu_sides", "gpu_step"):
        sys.modules.pop(name, None)


def test_a_training_step(benchmarks, capsys: pytest.CaptureFixture[str]) -> None:
    import train_step

    train_step.main(["--images", "1", "--questions", "2", "--rounds", "1", "--hidden", "64", "--layers", "1"])
    printed = capsys.readouterr().out
    assert "losses and gradients agree within 1e-5" in printed
    for side in ("peer", "peer, kept", "geochat", "shared"):
        assert f"{side:>12} " in printed


def test_a_dora_step(benchmarks, capsys: pytest.CaptureFixture[str]) -> None:
    import dora

    dora.main(["--images", "1", "--rounds", "1", "--hidden", "64", "--layers", "1"])
    printed = capsys.readouterr().out
    assert printed.count("DoRA here") == printed.count("DoRA of PEFT") == 2


def test_the_gpu_step_without_one(benchmarks, capsys: pytest.CaptureFixture[str]) -> None:
    import gpu_step

    gpu_step.main(["--tiny", "--largest", "2", "--steps", "1", "--questions", "2"])
    printed = capsys.readouterr().out
    assert printed.count("kept") >= 4
    assert printed.count("MFU") == 4
    assert "x the peer" in printed
