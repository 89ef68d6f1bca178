"""The scene generator: same seed, same scene; labels that agree with geometry and with each other."""

from __future__ import annotations

import json
from collections import Counter

import numpy as np
import pytest

from geochat.data.boxes import Box, parse_boxes, parse_regions, polygon_iou
from geochat.data.sample import Sample
from geochat.data.synthetic import KINDS, SCENES, SceneObject, draw_scene
from geochat.data.synthetic_tasks import (
    TEST_SEEDS,
    Asker,
    conversation,
    fits,
    phrases,
    training_record,
    write_dataset,
)


@pytest.fixture(scope="module")
def scenes():
    return [draw_scene(seed, side=96) for seed in range(60)]


def test_a_seed_is_a_scene():
    first, again, other = draw_scene(7), draw_scene(7), draw_scene(8)
    assert first.objects == again.objects
    assert first.name == again.name
    assert np.array_equal(np.asarray(first.image), np.asarray(again.image))
    assert not np.array_equal(np.asarray(first.image), np.asarray(other.image))
    assert first.image.size == (168, 168)


def test_every_class_of_scene_can_be_drawn_and_holds_what_it_may():
    for index, (name, allowed) in enumerate(SCENES.items()):
        scene = draw_scene(1000 + index, side=96, name=name)
        found = Counter(item.kind for item in scene.objects)
        assert set(found) <= set(allowed)
        assert all(found[kind] <= allowed[kind][1] for kind in found)


def test_boxes_cover_their_objects_and_objects_do_not_overlap(scenes):
    for scene in scenes:
        polygons = [item.polygon() * 100 for item in scene.objects]
        for item, polygon in zip(scene.objects, polygons, strict=True):
            outline = item.box().polygon(100, 100)
            if item.length != item.width:  # a circle's box is axis-aligned whatever its heading
                assert polygon_iou(polygon.tolist(), outline.tolist()) > 0.999
            assert 0 < item.box().angle <= 90
            assert outline.min() > -2
            assert outline.max() < 102
        for i, first in enumerate(polygons):
            assert all(polygon_iou(first.tolist(), second.tolist()) == 0 for second in polygons[:i])


@pytest.mark.parametrize(
    ("heading", "angle", "wide"), [(0, 90, False), (90, 90, True), (30, 30, True), (120, 30, False)]
)
def test_box_follows_the_rectangle_convention(heading, angle, wide):
    """Range (0, 90]; an axis-aligned object is written as 90 with width and height swapped."""
    box = SceneObject("ship", "white", 0.5, 0.5, 0.4, 0.1, heading).box()
    assert box.angle == pytest.approx(angle)
    assert (box.x2 - box.x1 > box.y2 - box.y1) == wide


def test_object_pixels_have_the_object_colour():
    """Boxes and pixels agree: a red vehicle's box is redder than the ground around it."""
    for seed in range(400):
        scene = draw_scene(seed)
        for item in scene.objects:
            if item.kind == "vehicle" and item.colour == "red":
                pixels = np.asarray(scene.image, float)
                x, y = int(item.x * 168), int(item.y * 168)
                inside = pixels[y - 2 : y + 3, x - 2 : x + 3].mean((0, 1))
                assert inside[0] - inside[2] > pixels.mean((0, 1))[0] - pixels.mean((0, 1))[2] + 20
                return
    raise AssertionError("no red vehicle in 400 scenes")


def test_referring_phrases_mean_exactly_one_object(scenes):
    asked = 0
    for index, scene in enumerate(scenes):
        asker = Asker(scene, np.random.default_rng(index))
        question = asker.refer()
        if question is None:
            continue
        asked += 1
        phrase = question.columns["phrase"]
        named = [
            o for o in scene.objects if any(text == phrase and fits(o, said) for text, said in phrases(o))
        ]
        assert len(named) == 1
        assert parse_boxes(question.answer)[0].iou(named[0].box(), 100, 100) > 0.6  # rounded to whole percent
    assert asked > 40


def test_answers_agree_with_the_scene(scenes):
    for index, scene in enumerate(scenes):
        asker = Asker(scene, np.random.default_rng(index))
        counts = Counter(item.kind for item in scene.objects)
        presence, count = asker.presence(), asker.count()
        assert (presence.answer == "yes") == (counts[presence.columns["class"]] > 0)
        assert int(count.answer) == counts[count.columns["class"]]
        regions = parse_regions(asker.grounding().answer)
        assert sum(len(region.boxes) for region in regions) == len(scene.objects)
        several = asker.refer_several()
        if several:
            assert len(parse_boxes(several.answer)) == len(several.truth) >= 2


def test_presence_is_balanced():
    scenes = [draw_scene(seed, side=48) for seed in range(300)]
    answers = [Asker(scene, np.random.default_rng(i)).presence().answer for i, scene in enumerate(scenes)]
    assert 0.38 < answers.count("yes") / len(answers) < 0.58


def test_no_box_is_told_twice_before_the_description(scenes):
    for index, scene in enumerate(scenes):
        told: list[Box] = []
        for question in conversation(scene, np.random.default_rng(index), 8):
            if question.task != "grounding":
                boxes = parse_boxes(question.text + question.answer)
                assert not set(boxes) & set(told)
                told += boxes


def test_records_are_readable_samples(scenes):
    record = training_record(scenes[0], "train_0", "a.jpg", np.random.default_rng(0), 5)
    sample = Sample.from_record(json.loads(json.dumps(record)))
    assert sample.images == ("a.jpg",)
    assert len(sample.turns) >= 8
    assert sample.turns[0].text.startswith("<image>\n")


def test_dataset_files(tmp_path):
    write_dataset(tmp_path, train=3, test=2, side=64, turns=4, workers=1)
    records = json.loads((tmp_path / "train.json").read_text())
    rows = [json.loads(line) for line in (tmp_path / "questions.jsonl").read_text().splitlines()]
    assert len(records) == 3
    assert {row["task"] for row in rows} >= {"scene", "presence", "identify", "grounding"}
    for name in [record["image"] for record in records] + [row["image"] for row in rows]:
        assert (tmp_path / "images" / name).exists()
    assert not list(tmp_path.glob("*.partial"))


def test_training_cannot_reach_test_seeds(tmp_path):
    with pytest.raises(ValueError, match="seed"):
        write_dataset(tmp_path, train=1, test=1, seed=TEST_SEEDS)


def test_lengths_lie_in_the_range_of_their_class(scenes):
    for scene in scenes:
        for item in scene.objects:
            low, high = KINDS[item.kind].length
            assert low - 1e-9 <= item.length <= high + 1e-9
