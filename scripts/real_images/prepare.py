"""Write instruction records, questions and picture links for the real-image runs.

    python scripts/real_images/prepare.py aid --data DATA --output OUT/aid
    python scripts/real_images/prepare.py kit --data DATA --output OUT/kit

AID: every training scene once as it is and some times as a random crop, turned and mirrored at random. A record asks for
the class; some of the crops are asked for a description (RSICD's captions). GeoChat-Bench's 3 000 test scenes become the
questions.

KIT: windows of the tiles become `[refer]` records. Frames of a sequence repeat the same street, so the questions come
from two places apart: the last frames of the training streets (`place = "seen"`: parked cars may be known from
training) and a street that training never shows (`place = "unseen"`).
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
from aid import PROMPT, AidScene, read_scenes
from kit import Window, augmented_windows, read_tiles, split_tiles, test_windows
from PIL import Image
from tqdm import tqdm

from geochat.data.images import open_image
from geochat.data.sample import Sample

SHORT_PROMPTS = (
    "What kind of scene is this? \nAnswer in one word or a short phrase.",
    "Name the scene class of the image. \nAnswer in one word or a short phrase.",
)
"""A third of the length of GeoChat's list of classes: more pictures for the same time of training."""

CAPTION_PROMPTS = ("Describe the image.", "Describe the image in one sentence.", "What does the image show?")

REFER_PROMPTS = ("Give me the location of", "Give me the location of", "Where is", "Locate")

KIT_TOML = """name = "kit_cars"
description = "KIT AIS vehicles: windows of 160 px, every vehicle of the window or one named by its place"
questions = "questions.jsonl"
image_folder = "images"
metric = "boxes"
strata = ["place", "kind"]
max_new_tokens = 160
"""


def aid_records(
    scenes: list[AidScene], variants: int, long_share: float, caption_share: float, seed: int
) -> list[dict[str, Any]]:
    """Instruction records; variant 0 names the picture itself, the others the crops of `write_crops`.

    A record asks for the class, as the test does; `caption_share` of the crops are asked for a description instead.
    GeoChat's own prompt for the class in `long_share` of the records.
    """
    rng = np.random.default_rng(seed)
    records = []
    for variant in range(variants):
        for number in rng.permutation(len(scenes)):
            scene = scenes[number]
            short = rng.random() >= long_share
            ask = SHORT_PROMPTS[rng.integers(len(SHORT_PROMPTS))] if short else PROMPT
            answer = scene.label
            if variant and scene.captions and rng.random() < caption_share:
                ask = str(rng.choice(CAPTION_PROMPTS))
                answer = scene.captions[rng.integers(len(scene.captions))]
            turns = [("human", f"<image>\n{ask}"), ("gpt", answer)]
            image = scene.path if variant == 0 else crop_name(scene, variant)
            conversations = [{"from": role, "value": text} for role, text in turns]
            records.append({"id": f"{scene.path}#{variant}", "image": image, "conversations": conversations})
    return records


def crop_name(scene: AidScene, variant: int) -> str:
    return f"crops/{Path(scene.file).stem}_{variant}.jpg"


def write_crops(data: Path, images: Path, scenes: list[AidScene], variants: int, seed: int) -> None:
    """One JPEG per scene and variant above 0: 55 to 100 % of the area, one of the eight symmetries."""
    (images / "crops").mkdir(parents=True, exist_ok=True)
    for number, scene in enumerate(tqdm(scenes, desc="crops", unit="scene", disable=None)):
        image = open_image(data / "aid150" / scene.file)
        for variant in range(1, variants):
            rng = np.random.default_rng([seed, number, variant])
            side = round(min(image.size) * rng.uniform(0.55, 1.0) ** 0.5)
            left, top = (int(rng.integers(edge - side + 1)) for edge in image.size)
            crop = image.crop((left, top, left + side, top + side))
            crop = turned(crop, int(rng.integers(8)))
            crop.save(images / crop_name(scene, variant), quality=95)


def turned(image: Image.Image, way: int) -> Image.Image:
    """One of the eight symmetries of the square."""
    if way >= 4:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    return image.rotate(-90 * (way % 4)) if image.width == image.height else image


def aid_questions(scenes: list[AidScene]) -> list[dict[str, Any]]:
    """GeoChat-Bench's questions. Its ids keep their `.png`; the image and the truth are stated without its defects
    (`.png` for pictures that are `.jpg`, a stray "gt" behind every label)."""
    return [
        {
            "question_id": str(Path(scene.path).with_suffix(".png")),
            "image": scene.path,
            "text": PROMPT,
            "ground_truth": scene.label,
        }
        for scene in scenes
    ]


def prepare_aid(
    data: Path, output: Path, variants: int, long_share: float, caption_share: float, seed: int
) -> dict[str, int]:
    train, test = read_scenes(data)
    for scene in [*train, *test]:
        link(data / "aid150" / scene.file, output / "images" / scene.path)
    write_crops(data, output / "images", train, variants, seed)
    records = aid_records(train, variants, long_share, caption_share, seed)
    questions = aid_questions(test)
    assert_apart({record["id"].split("#")[0] for record in records}, {row["image"] for row in questions})
    write_records(output, records, questions)
    return {"train_scenes": len(train), "records": len(records), "questions": len(questions)}


def kit_record(name: str, window: Window, rng: np.random.Generator) -> dict[str, Any]:
    """All vehicles of the window in reading order, or one by its place."""
    phrase, boxes = window.phrase(), list(window.boxes)
    if (clear := window.clear_places()) and rng.random() < 0.35:
        place, box = clear[rng.integers(len(clear))]
        phrase, boxes = f"vehicle at the {place}", [box]
    ask = f"<image>\n[refer] {rng.choice(REFER_PROMPTS)} <p> {phrase} </p>"
    answer = "".join(window.to_box(box).format() for box in boxes)
    conversations = [{"from": "human", "value": ask}, {"from": "gpt", "value": answer}]
    return {"id": name, "image": name, "conversations": conversations}


def kit_questions(name: str, window: Window, place: str) -> list[dict[str, Any]]:
    """Where are all vehicles, and where is each one that its place names."""
    asked = [("all", window.phrase(), window.boxes)]
    asked += [("one", f"vehicle at the {where}", [box]) for where, box in window.clear_places()]
    return [
        {
            "question_id": f"{name}#{number}",
            "image": name,
            "text": f"[refer] Give me the location of <p> {phrase} </p>",
            "ground_truth": [window.to_box(box).polygon(*window.size).round(2).tolist() for box in boxes],
            "place": place,
            "kind": kind,
        }
        for number, (kind, phrase, boxes) in enumerate(asked)
    ]


def prepare_kit(data: Path, output: Path, windows: int, seed: int) -> dict[str, int]:
    """Raises: ValueError when a frame would be both for training and for testing."""
    train, tests = split_tiles(read_tiles(data))
    for place, tiles in tests.items():
        assert_apart({tile.frame for tile in train}, {tile.frame for tile in tiles}, f"{place} frames")
    images = output / "images"
    images.mkdir(parents=True, exist_ok=True)
    records, questions = [], []
    rng = np.random.default_rng(seed)
    for number, window in enumerate(augmented_windows(train, windows, rng)):
        name = f"train_{number:05d}.jpg"
        save_window(data, window, images / name)
        records.append(kit_record(name, window, rng))
    for place, tiles in tests.items():
        for window in test_windows(tiles):
            name = f"{window.tile.file.removesuffix('.jpg')}_{window.left}_{window.top}.jpg"
            save_window(data, window, images / name)
            questions += kit_questions(name, window, place)
    write_records(output, records, questions)
    (output / "kit_cars.toml").write_text(KIT_TOML)
    counts = {f"{place}_questions": sum(q["place"] == place for q in questions) for place in tests}
    return {"train_tiles": len(train), "records": len(records), **counts}


def save_window(data: Path, window: Window, file: Path) -> None:
    image = Image.open(data / "kit_cars" / window.tile.file).convert("RGB")
    crop = image.crop((window.left, window.top, window.left + window.side, window.top + window.side))
    turned(crop, window.way).save(file, quality=95)


def link(source: Path, target: Path) -> None:
    """A symbolic link, so that no picture is copied."""
    target.parent.mkdir(parents=True, exist_ok=True)
    if not target.is_symlink():
        target.symlink_to(source.resolve())


def assert_apart(train: set[str], test: set[str], what: str = "pictures") -> None:
    if shared := sorted(train & test):
        raise ValueError(f"{len(shared)} {what} are in training and test: {shared[0]} …")


def write_records(output: Path, records: list[dict[str, Any]], questions: list[dict[str, Any]]) -> None:
    for record in records:
        Sample.from_record(record)  # what we write, the reader must take
    write(output / "questions.jsonl", "".join(json.dumps(row) + "\n" for row in questions))
    write(output / "train.json", json.dumps(records))


def write(file: Path, text: str) -> None:
    staging = file.with_name(file.name + ".partial")
    staging.write_text(text, encoding="utf-8")
    staging.replace(file)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("dataset", choices=["aid", "kit"])
    parser.add_argument("--data", type=Path, required=True, help="folder that holds aid150/ or kit_cars/")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--variants", type=int, default=2, help="AID: pictures per scene, the first as it is")
    parser.add_argument(
        "--long-share", type=float, default=0.35, help="AID: records with GeoChat's own prompt"
    )
    parser.add_argument("--caption-share", type=float, default=0.3, help="AID: crops asked for a description")
    parser.add_argument("--windows", type=int, default=6000, help="KIT: training windows")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    try:
        if args.dataset == "aid":
            counts = prepare_aid(
                args.data, args.output, args.variants, args.long_share, args.caption_share, args.seed
            )
        else:
            counts = prepare_kit(args.data, args.output, args.windows, args.seed)
    except (ValueError, OSError) as error:
        raise SystemExit(f"error: {error}") from None
    print(json.dumps(counts))


if __name__ == "__main__":
    main()
