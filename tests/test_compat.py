"""The compatibility check on the release that is installed: it passes on our folders and fails on damaged ones."""

from __future__ import annotations

import importlib.util
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
from safetensors.torch import load_file, save_file

ROOT = Path(__file__).resolve().parents[1]


def script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"compat_{name}", ROOT / f"scripts/compat/{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("compat") / "reference"
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("GEOCHAT_ASSETS", raising=False)
        assert script("make").main(["--output", str(folder), "--nano", str(ROOT / "playground/nano")]) == 0
    return folder


def test_our_folders_pass(reference: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = tmp_path / "report.json"
    assert script("check").main(["--reference", str(reference), "--report", str(report)]) == 0
    rows = json.loads(report.read_text())["folders"]
    assert [row["folder"] for row in rows] == ["fine-tuned", "internlm2", "nano"]
    assert all(row["images"] == 5 and row["texts"] > 10 and row["prompt_equal"] for row in rows)
    assert (reference / "fine-tuned/model/model.safetensors.index.json").exists()
    capsys.readouterr()
    assert script("table").main([str(report)]) == 0
    printed = capsys.readouterr().out
    assert "| 0 / 0 |" in printed
    assert printed.strip().endswith("PASSED")


def edit(file: Path, change: Callable[[dict], None]) -> None:
    value = json.loads(file.read_text(encoding="utf-8"))
    change(value)
    file.write_text(json.dumps(value), encoding="utf-8")


def drop_a_tensor(model: Path) -> None:
    tensors = load_file(model / "model.safetensors")
    tensors.pop("vision_tower.vision_model.encoder.layers.1.mlp.fc1.bias")
    save_file(tensors, model / "model.safetensors", {"format": "pt"})


def rename_a_tensor(model: Path) -> None:
    tensors = load_file(model / "model.safetensors")
    tensors["language_model.model.layers.0.extra"] = tensors["language_model.model.norm.weight"].clone()
    save_file(tensors, model / "model.safetensors", {"format": "pt"})


def nudge_a_weight(model: Path) -> None:
    tensors = load_file(model / "model.safetensors")
    tensors["language_model.model.layers.2.mlp.down_proj.weight"][5, 7] += 0.01
    save_file(tensors, model / "model.safetensors", {"format": "pt"})


def forget_the_rotary_base(model: Path) -> None:
    def change(config: dict) -> None:
        config["text_config"]["rope_theta"] = 10000.0
        config["text_config"]["rope_parameters"]["rope_theta"] = 10000.0

    edit(model / "config.json", change)


def swap_two_ids(model: Path) -> None:
    def change(tokenizer: dict) -> None:
        vocabulary = tokenizer["model"]["vocab"]
        vocabulary["▁in"], vocabulary["▁is"] = vocabulary["▁is"], vocabulary["▁in"]

    edit(model / "tokenizer.json", change)


def stop_padding(model: Path) -> None:
    edit(model / "preprocessor_config.json", lambda value: value.update(do_pad=False))


def change_the_template(model: Path) -> None:
    file = model / "chat_template.jinja"
    file.write_text(file.read_text().replace("ASSISTANT:", "ASSISTANT: "))


@pytest.mark.parametrize(
    ("folder", "damage", "said"),
    [
        ("nano", drop_a_tensor, "1 missing_keys"),
        ("nano", rename_a_tensor, "1 unexpected_keys"),
        ("nano", nudge_a_weight, "a logit differs by"),
        ("internlm2", forget_the_rotary_base, "a logit differs by"),
        ("nano", swap_two_ids, "texts have other ids"),
        ("nano", stop_padding, "pixels.wide.png differs"),
        ("nano", change_the_template, "the chat prompt differs"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_damaged_folder_fails(
    reference: Path, tmp_path: Path, folder: str, damage: Callable[[Path], None], said: str,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    for name in (folder, "images"):
        shutil.copytree(reference / name, tmp_path / name)
    damage(tmp_path / folder / "model")
    report = tmp_path / "report.json"
    assert script("check").main(["--reference", str(tmp_path), "--report", str(report)]) == 1
    assert said in "; ".join(json.loads(report.read_text())["folders"][0]["failures"])
    assert script("table").main([str(report)]) == 1
    assert f"{folder}: " in capsys.readouterr().out


def test_a_release_that_cannot_read_a_folder_fails(reference: Path, tmp_path: Path, capsys) -> None:
    shutil.copytree(reference / "nano", tmp_path / "nano")
    shutil.copytree(reference / "images", tmp_path / "images")
    (tmp_path / "nano/model/model.safetensors").write_bytes(b"")
    report = tmp_path / "report.json"
    assert script("check").main(["--reference", str(tmp_path), "--report", str(report)]) == 1
    assert script("table").main([str(report)]) == 1
    assert "| failed |" in capsys.readouterr().out
