"""Other layouts and back, through the command."""

from __future__ import annotations

import importlib.util
import json
import shutil
from pathlib import Path

import pytest
import torch

from geochat.model.checkpoint import load
from geochat.model.convert import differences
from geochat.model.open import open_model
from geochat.model.weights import State, open_weights


@pytest.fixture(scope="module")
def convert():
    script = Path(__file__).resolve().parents[2] / "scripts/convert_checkpoint.py"
    spec = importlib.util.spec_from_file_location("convert_script", script)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.main


def same(one: State, other: State, dtype: torch.dtype = torch.float16) -> bool:
    return one.keys() == other.keys() and not differences(one, other, dtype)


@pytest.mark.parametrize("folder", ["geochat_tiny", "llava_tiny", "vhm_tiny", "lora", "dora"])
def test_every_layout_to_canonical_and_back(
    assets: Path, tmp_path: Path, convert, folder: str, capsys: pytest.CaptureFixture[str]
) -> None:
    source = assets / "golden" / folder
    for layout in ("hf", "llava"):
        target = tmp_path / layout
        assert (
            convert(["--source", str(source), "--target", str(target), "--format", layout, "--verify"]) == 0
        )
        assert "tensors equal to the source" in capsys.readouterr().out
    assert convert(["--source", str(tmp_path / "llava"), "--target", str(tmp_path / "again")]) == 0
    assert same(open_weights(tmp_path / "again"), open_weights(tmp_path / "hf"))


def test_the_original_layout_has_the_original_names(assets: Path, tmp_path: Path, convert) -> None:
    source = assets / "golden/geochat_tiny"
    convert(["--source", str(source), "--target", str(tmp_path / "out"), "--format", "llava"])
    ours, theirs = open_weights(tmp_path / "out"), open_weights(source)
    derived = ("rotary_emb.inv_freq", "position_ids")
    assert set(ours) == {key for key in theirs if not key.endswith(derived)}
    for key, entry in ours.items():
        if not key.endswith("position_embedding.weight"):
            assert torch.equal(entry.read(), theirs[key].read()), key
    config = json.loads((tmp_path / "out/config.json").read_text())
    original = json.loads((source / "config.json").read_text())
    told = set(original) - {
        "pretraining_tp",
        "_name_or_path",
        "transformers_version",
        "freeze_mm_mlp_adapter",
        "tune_mm_mlp_adapter",
    }
    assert told <= set(config)
    assert {key: config[key] for key in ("architectures", "model_type", "vocab_size", "torch_dtype")} == {
        key: original[key] for key in ("architectures", "model_type", "vocab_size", "torch_dtype")
    }
    tower = Path(config["mm_vision_tower"])
    assert tower == tmp_path / "out/clip-vit-patch14-504"
    assert open_weights(tower)["vision_model.embeddings.position_embedding.weight"].shape == (1297, 64)


def test_the_original_layout_may_be_moved(assets: Path, tmp_path: Path, convert) -> None:
    """config.json names the tower's place at the time of writing; the folder itself is found all the same."""
    convert(
        ["--source", str(assets / "golden/llava_tiny"), "--target", str(tmp_path / "a"), "--format", "llava"]
    )
    shutil.move(tmp_path / "a", tmp_path / "b")
    assert same(open_model(tmp_path / "b")[1], open_model(assets / "golden/llava_tiny")[1])


def test_dtype_and_size(assets: Path, tmp_path: Path, convert) -> None:
    arguments = ["--source", str(assets / "golden/llava_tiny"), "--target", str(tmp_path / "x"), "--verify"]
    convert([*arguments, "--image-size", "504", "--dtype", "bfloat16"])
    model, processor = load(tmp_path / "x")
    assert (model.dtype, processor.image_size) == (torch.bfloat16, 504)


def test_refusals(assets: Path, tmp_path: Path, convert, refused) -> None:
    here = str(assets / "golden/llava_tiny")
    assert "is the source itself" in refused(convert, ["--source", here, "--target", here])
    assert "no checkpoint there" in refused(
        convert, ["--source", str(tmp_path), "--target", str(tmp_path / "x")]
    )
    copy = shutil.copytree(assets / "golden/geochat_tiny", tmp_path / "copy")
    (copy / "pytorch_model.bin").chmod(0o644)
    whole = (copy / "pytorch_model.bin").read_bytes()
    (copy / "pytorch_model.bin").write_bytes(whole[: len(whole) // 2])
    message = refused(convert, ["--source", str(copy), "--target", str(tmp_path / "x")])
    assert "pytorch_model.bin: cannot be read as plain tensors" in message
    assert not (tmp_path / "x").exists()


class Code:
    """Makes a folder when it is unpickled."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self):
        return (Path.mkdir, (self.folder,))


def test_a_pickle_with_code_is_refused(assets: Path, tmp_path: Path, convert, refused) -> None:
    copy = shutil.copytree(assets / "golden/geochat_tiny", tmp_path / "copy")
    (copy / "pytorch_model.bin").chmod(0o644)
    torch.save({"model.norm.weight": Code(tmp_path / "ran")}, copy / "pytorch_model.bin")
    message = refused(convert, ["--source", str(copy), "--target", str(tmp_path / "x")])
    assert "cannot be read as plain tensors" in message
    assert not (tmp_path / "ran").exists()
    assert not (tmp_path / "x").exists()
