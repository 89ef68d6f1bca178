"""What the inspection says of every layout."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from geochat.model.inspect import main


def test_a_canonical_folder(tiny_model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tiny_model)]) == 0
    said = capsys.readouterr().out
    assert "canonical layout" in said
    assert "84 px, 36 tokens, pad" in said
    assert "vicuna_v1" in said


def test_every_layout(assets: Path, capsys: pytest.CaptureFixture[str]) -> None:
    golden = assets / "golden"
    for folder, words in {
        "geochat_tiny": ("original layout", "504 px, 1296 tokens", "float16"),
        "vhm_tiny": ("hidden state [1, 2, 3]", "336 px"),
        "dora": ("DoRA, rank 4, alpha 8", "another program", "llava_tiny"),
        "clip-vit-tiny-patch14-336": ("vision tower alone",),
        "internlm2_tiny": ("language model alone", "17 tensors"),
        "llava_tiny_pretrain": ("projector alone", "4 tensors", "bfloat16"),
    }.items():
        assert main([str(golden / folder)]) == 0
        said = capsys.readouterr().out
        assert all(word in said for word in words), said


def test_what_is_missing_is_said(
    assets: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], refused
) -> None:
    copy = shutil.copytree(assets / "golden/llava_tiny", tmp_path / "llava")
    assert main([str(copy)]) == 1
    assert "give its CLIP folder with --vision-tower" in capsys.readouterr().out
    assert main([str(copy), "--vision-tower", str(assets / "golden/clip-vit-tiny-patch14-336")]) == 0
    assert "no checkpoint there" in refused(main, [str(tmp_path)])


def test_a_training_checkpoint_of_xtuner(assets: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(assets / "golden/xtuner/iter_10.pth")]) == 1
    said = capsys.readouterr().out
    assert "XTuner's training checkpoint" in said
    assert "language model  28 tensors" in said
    assert "vision tower  48 tensors" in said
    assert "--model-base" in said
