"""The real-image example on a tiny AID-like and KIT-like folder; needs no assets and no teacher package."""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("torch")

SCRIPTS = Path(__file__).resolve().parents[1] / "scripts" / "real_images"


@pytest.fixture
def scripts(monkeypatch: pytest.MonkeyPatch):
    """Import a script of the example by its name."""
    monkeypatch.syspath_prepend(str(SCRIPTS))

    def load(name: str) -> ModuleType:
        return __import__(name)

    return load


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Twelve scenes of two classes and six frames of three streets."""
    folder = tmp_path / "data"
    rng = np.random.default_rng(0)
    for name in ("aid150", "kit_cars"):
        (folder / name).mkdir(parents=True)
    rows = []
    for number in range(12):
        label, path = [("Pond", "Pond"), ("BareLand", "Bare Land")][number % 2]
        file = f"{label.lower()}_{number}.jpg"
        noise = rng.integers(0, 60, (150, 150, 3), dtype=np.uint8) + np.uint8(120 * (number % 2))
        Image.fromarray(noise).save(folder / "aid150" / file)
        rows.append(
            {
                "image": file,
                "path": f"AID/{label}/{file}",
                "label": label,
                "label_text": path,
                "captions": ["a pond is here .", "a pond is here ."],
                "rsicd_split": "test" if number >= 8 else "train_or_val",
                "geochat_bench_aid_test": number in (6, 7, 8, 9),
            }
        )
    (folder / "aid150.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    items = []
    for street, frames in (("MOS", 170), ("MOS", 74), ("MunichStreet02-MOS", 74)):
        for frame in range(frames, frames + 8):
            for left in (0, 320) if frames == 170 or street != "MOS" else (0,):
                file = f"{street}{frame}_{left}_0.jpg"
                Image.fromarray(rng.integers(0, 255, (320, 320, 3), dtype=np.uint8)).save(
                    folder / "kit_cars" / file
                )
                items.append(
                    {"image": file, "size": [320, 320], "boxes": [[0, 20, 40, 50, 60], [0, 200, 40, 230, 58]]}
                )
    (folder / "kit_cars.json").write_text(json.dumps({"classes": ["car"], "items": items}))
    return folder


def test_aid_training_and_test_are_apart_and_the_rest_is_in_neither(scripts, data: Path) -> None:
    train, test = scripts("aid").read_scenes(data)
    assert [len(train), len(test)] == [6, 4]
    assert not {scene.file for scene in train} & {scene.file for scene in test}
    assert train[0].captions == ("A pond is here.",)


def test_aid_records_and_questions(scripts, data: Path, tmp_path: Path) -> None:
    from geochat.eval.benchmark import Benchmark
    from geochat.eval.score import judge, summarise

    output = tmp_path / "aid"
    scripts("prepare").main(
        ["aid", "--data", str(data), "--output", str(output), "--variants", "2", "--caption-share", "0"]
    )
    records = json.loads((output / "train.json").read_text())
    assert len(records) == 12
    classes = {record["conversations"][1]["value"] for record in records}
    assert "A pond is here." not in classes  # this run wants no descriptions
    scripts("prepare").main(
        ["aid", "--data", str(data), "--output", str(tmp_path / "said"), "--caption-share", "1"]
    )
    described = json.loads((tmp_path / "said/train.json").read_text())
    for record in described:
        answer = record["conversations"][1]["value"]
        assert (answer == "A pond is here.") == record["image"].startswith("crops/")
    assert all((output / "images" / record["image"]).is_file() for record in records)
    benchmark = Benchmark.load("aid")
    questions = benchmark.read_questions(output / "questions.jsonl")
    assert len(questions) == 4
    images = [benchmark.image_of(benchmark.prepare(row, "question") or {}, "question") for row in questions]
    assert all((output / "images" / image).is_symlink() for image in images)
    assert not set(images) & {record["image"] for record in records}
    assert questions[0]["text"].startswith(
        "Classify the given image in one of the following classes. Classes: "
    )
    answers = [{**row, "prompt": row["text"], "text": row["ground_truth"]} for row in questions]
    assert (
        summarise(judge(answers, benchmark), benchmark, total=4)["tasks"]["aid"]["overall"]["accuracy"] == 1
    )


def test_a_picture_in_training_and_test_is_refused(scripts, data: Path) -> None:
    rows = [json.loads(line) for line in (data / "aid150.jsonl").read_text().splitlines()]
    rows.append({**rows[0], "geochat_bench_aid_test": True})
    (data / "aid150.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(ValueError, match="in training and test"):
        scripts("aid").read_scenes(data)


def test_kit_frames_are_apart_and_boxes_follow_the_picture(scripts, data: Path, tmp_path: Path) -> None:
    from geochat.data.boxes import parse_boxes

    kit, output = scripts("kit"), tmp_path / "kit"
    train, tests = kit.split_tiles(kit.read_tiles(data))
    frames = {tile.frame for tile in train}
    assert frames
    assert {tile.frame for tile in tests["unseen"]} == {"MOS74", "MOS78"}
    assert {tile.frame for tile in tests["seen"]} == {"MOS177", "MunichStreet02-MOS81"}
    scripts("prepare").main(["kit", "--data", str(data), "--output", str(output), "--windows", "5"])
    records = json.loads((output / "train.json").read_text())
    assert len(records) == 5
    assert all(parse_boxes(record["conversations"][1]["value"]) for record in records)
    questions = [json.loads(line) for line in (output / "questions.jsonl").read_text().splitlines()]
    corners = {tuple(map(tuple, question["ground_truth"][0])) for question in questions}
    assert ((50.0, 40.0), (50.0, 60.0), (20.0, 60.0), (20.0, 40.0)) in corners


@pytest.mark.parametrize("way", range(8))
def test_a_box_turns_with_its_picture(scripts, way: int) -> None:
    picture = Image.new("RGB", (60, 60))
    picture.paste((255, 0, 0), (5, 10, 25, 20))
    turned = scripts("prepare").turned(picture, way)
    assert turned.getbbox() == scripts("kit").turn_corners((5, 10, 25, 20), 60, way)


def test_local_features_follow_the_augmentation(scripts, monkeypatch: pytest.MonkeyPatch) -> None:
    """A map that repeats the picture's red must still repeat it after crop, turn and mixing."""
    import torch

    adapt = scripts("adapt_tower")
    red = torch.nn.functional.interpolate(torch.rand(4, 1, 3, 3), size=(14, 14), mode="bilinear") * 200 + 20
    pixels = torch.nn.functional.interpolate(red, size=(adapt.STORED, adapt.STORED), mode="bilinear")
    pixels = pixels.expand(-1, 3, -1, -1).to(torch.uint8)
    scenes = adapt.Scenes(pixels, torch.arange(4), torch.eye(4), red.half())
    monkeypatch.setattr(adapt, "recolour", lambda pixels: pixels)
    for seed in range(12):
        rng = np.random.default_rng(seed)
        view, beliefs, local = adapt.augment(scenes, torch.arange(4), 84, rng)
        shown = torch.nn.functional.avg_pool2d(view[:, :1] * 255, 14).flatten()
        assert np.corrcoef(shown, local.flatten())[0, 1] > 0.95, seed
        assert torch.allclose(beliefs.sum(1), torch.ones(4))


def test_tower_is_taught_and_a_stopped_run_goes_on(
    scripts, data: Path, tmp_path: Path, nano_like: Path
) -> None:
    import torch

    from geochat.model.checkpoint import load

    adapt = scripts("adapt_tower")

    def teach(name: str, steps: int, *more: str) -> Path:
        flags = ["--base", str(nano_like), "--data", str(data), "--output", str(tmp_path / name)]
        adapt.main([*flags, "--steps", str(steps), "--batch-size", "4", "--save-steps", "2", *more])
        return tmp_path / name

    taught = teach("whole", 4)
    before, after = load(nano_like)[0], load(taught)[0]
    changed = [
        name
        for (name, old), (_, new) in zip(before.named_parameters(), after.named_parameters(), strict=True)
        if not torch.equal(old, new)
    ]
    assert changed
    assert {name.split(".")[1] for name in changed} == {"vision_tower", "multi_modal_projector"}
    assert json.loads((tmp_path / "whole-training" / "result.json").read_text())["scenes"] == 6
    (taught / "config.json").unlink()
    assert load(teach("whole", 4))[0] is not None  # nothing is left to do but writing


@pytest.fixture
def nano_like(tmp_path: Path, tiny_llm: Path) -> Path:
    """A model of the nano shape, smaller still: 84 px, patches of 14."""
    import torch
    from transformers import CLIPVisionConfig, CLIPVisionModel

    from geochat.model.build import build_model
    from geochat.model.checkpoint import save_model

    torch.manual_seed(0)
    config = CLIPVisionConfig(
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=84,
        patch_size=14,
    )
    CLIPVisionModel(config).save_pretrained(tmp_path / "tower")
    model, processor = build_model(tiny_llm, tmp_path / "tower", image_size=84, dtype=torch.float32)
    save_model(model, processor, tmp_path / "nano")
    return tmp_path / "nano"


def test_a_teacher_of_other_scenes_is_refused(scripts, data: Path, tmp_path: Path) -> None:
    train, _ = scripts("aid").read_scenes(data)
    np.savez(
        tmp_path / "teacher.npz",
        files=np.array(["other.jpg"]),
        logits=np.zeros((1, 30)),
        local=np.zeros((1, 14, 14, 64)),
    )
    with pytest.raises(ValueError, match="says nothing about"):
        scripts("adapt_tower").read(data, train, tmp_path / "teacher.npz", 0.5)


def test_a_head_is_never_asked_about_what_it_was_fitted_on(scripts) -> None:
    """Labels without any relation to the features: cross-fitted answers are at chance, not at certainty."""
    import torch

    teacher = scripts("teacher")
    x, y = torch.randn(300, 20), torch.randint(0, 30, (300,))
    logits = teacher.cross_fit(x, y)
    assert float((logits.argmax(1) == y).float().mean()) < 0.15


def test_figures_leave_out_what_was_not_measured(scripts, tmp_path: Path, capsys) -> None:
    (tmp_path / "probe.json").write_text('{"accuracy": 0.28}')
    scripts("figures").main(["--output", str(tmp_path)])
    assert "| linear probe on raw pixels (32 px) | 28.0 % |" in capsys.readouterr().out
    assert (tmp_path / "figures.md").is_file()


def test_recall_is_counted_by_the_size_of_the_box(scripts, tmp_path: Path) -> None:
    square = [[0, 0], [10, 0], [10, 10], [0, 10]]
    questions = [{"question_id": "a", "ground_truth": [square, [[3 * x, 3 * y] for x, y in square]]}]
    verdicts = [{"question_id": "a", "place": "seen", "kind": "all", "ious": [0.0, 0.6]}]
    for name, rows in (("questions", questions), ("samples", verdicts)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    rows = scripts("figures").kit_rows(tmp_path, tmp_path / "questions.jsonl")
    found = {row["what"]: row["recall@0.5"] for row in rows}
    assert found["· below 20 px, seen street"] == 0.0
    assert found["· 26 px and more, seen street"] == 1.0
    assert found["all vehicles of a window, seen street"] == 0.5
