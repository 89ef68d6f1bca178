"""Converting DOTA, COCO and class folders: golden records, windows, what is refused, what rounding costs."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from geochat.data.boxes import Box, parse_boxes, parse_regions, polygon_iou
from geochat.data.geometry import convex_hull
from geochat.data.phrases import place_name, plural
from geochat.data.prepare import main
from geochat.data.prepare.objects import LabelledObject, Picture
from geochat.data.prepare.questions import TASKS, Asker, ask, conversations
from geochat.data.prepare.windows import cut, starts, windows
from geochat.data.sample import Sample
from geochat.data.verify import verify

LABELS = """imagesource:GoogleEarth
gsd:0.146343590398
20.0 20.0 180.0 20.0 180.0 60.0 20.0 60.0 ship 0
100.0 150.0 140.0 110.0 160.0 130.0 120.0 170.0 small-vehicle 0
10.0 100.0 40.0 100.0 40.0 190.0 10.0 190.0 harbor 1
"""


def save(path: Path, width: int, height: int, seed: int = 0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    slopes = np.add.outer(np.arange(height) * 3, np.arange(width) * 2)
    pixels = np.stack([slopes + seed, slopes // 7, slopes // 50], axis=2) % 256
    Image.fromarray(pixels.astype(np.uint8)).save(path)
    return path


@pytest.fixture
def dota(tmp_path: Path) -> Path:
    save(tmp_path / "images/P0001.png", 200, 200)
    (tmp_path / "labelTxt").mkdir()
    (tmp_path / "labelTxt/P0001.txt").write_text(LABELS)
    return tmp_path


def from_dota(folder: Path, *more: str) -> list[str]:
    words = ["from-dota", "--images", str(folder / "images"), "--labels", str(folder / "labelTxt")]
    return [*words, "--output", str(folder / "out"), "--quiet", "--workers", "0", *more]


def told(file: Path) -> list[tuple[str, str]]:
    """Every question with its answer."""
    turns = [Sample.from_record(record).turns for record in json.loads(file.read_text())]
    return [(a.text, b.text) for talk in turns for a, b in zip(talk[::2], talk[1::2], strict=True)]


# ---------------------------------------------------------------- DOTA


def test_golden_records_of_dota(dota: Path, capsys):
    """The ship fills 10 … 90 % by 10 … 30 %: an upright box has angle 90 and its sides exchanged. The vehicle is 56.6 px
    by 28.3 px about (130, 140); the side along 45 degrees clockwise is the short one, so it is the width."""
    main(from_dota(dota, "--window", "0", "--tasks", "grounding", "identify", "--keep-difficult"))
    ship, vehicle, harbor = "{<40><-20><60><60>|<90>}", "{<58><56><72><84>|<45>}", "{<-10><65><35><80>|<90>}"
    pairs = told(dota / "out/train.json")
    (description,) = [answer for question, answer in pairs if "[grounding] " in question]
    assert description == (
        f"The image shows <p>1 ship</p> {ship}, <p>1 harbor</p> {harbor} and <p>1 small vehicle</p> {vehicle}."
    )
    names = {ship: "ship", vehicle: "small vehicle", harbor: "harbor"}
    asked = [
        (parse_boxes(question)[0].format(), answer) for question, answer in pairs if "[identify]" in question
    ]
    assert len(asked) == 2
    assert all(answer == f"<p>1 {names[box]}</p>" for box, answer in asked)
    assert "--image_folder" in capsys.readouterr().out


def test_difficult_objects_make_their_class_unclear(dota: Path):
    main(from_dota(dota, "--window", "0", "--per-task", "9"))
    pairs = told(dota / "out/train.json")
    assert any("ship" in question for question, _ in pairs)
    assert not any("harbor" in question for question, _ in pairs)
    assert not any("[grounding]" in question for question, _ in pairs)


@pytest.fixture
def large(tmp_path: Path) -> Path:
    """Three pictures of 700 x 500 with 25 oriented objects each."""
    rng = np.random.default_rng(5)
    (tmp_path / "labelTxt/deep").mkdir(parents=True)
    for number in range(3):
        name = f"deep/P{number}" if number == 2 else f"P{number}"
        save(tmp_path / f"images/{name}.png", 700, 500, number)
        rows = []
        for i in range(25):
            x, y, w, h = rng.uniform(0, 700), rng.uniform(0, 500), rng.uniform(20, 150), rng.uniform(20, 60)
            corners = Box(x - w / 2, y - h / 2, x + w / 2, y + h / 2, rng.uniform(0, 90)).polygon(100, 100)
            rows.append(
                " ".join(f"{v:.1f}" for v in corners.ravel())
                + f" {('ship', 'plane', 'bus')[i % 3]} {int(i == 7)}"
            )
        (tmp_path / f"labelTxt/{name}.txt").write_text("\n".join(rows))
    return tmp_path


def test_what_is_converted_passes_the_check(large: Path):
    main(from_dota(large, "--window", "256", "--overlap", "64", "--val-share", "0.3", "--per-task", "3"))
    for file in ("train.json", "val.json"):
        rows, problems = verify(large / "out" / file, large / "out/images")
        assert rows > 20
        assert not problems
    train, val = ({r["image"].split("__")[0] for r in json.loads((large / "out" / f).read_text())}
                  for f in ("train.json", "val.json"))  # fmt: skip
    assert len(train) == 2
    assert len(val) == 1
    assert not train & val
    image = next(iter(json.loads((large / "out/train.json").read_text())))["image"]
    left, top, right, bottom = map(int, image.removesuffix(".png").split("__")[1].split("_"))
    whole = Image.open(large / "images" / f"{image.split('__')[0]}.png")
    assert np.array_equal(Image.open(large / "out/images" / image), whole.crop((left, top, right, bottom)))


def test_the_same_seed_gives_the_same_files(large: Path):
    made = []
    for seed, workers in (("1", "0"), ("1", "2"), ("2", "0")):
        main(from_dota(large, "--window", "256", "--seed", seed, "--workers", workers, "--val-share", "0.4"))
        made.append((large / "out/train.json").read_bytes())
    assert made[0] == made[1] != made[2]
    main(from_dota(large, "--window", "256", "--seed", "1"))
    assert not (large / "out/val.json").exists()  # of the run before; its pictures are in train.json now


def alive(pid: int) -> bool:
    try:
        return ") Z " not in Path(f"/proc/{pid}/stat").read_text()  # a zombie only waits to be counted
    except (FileNotFoundError, ProcessLookupError):
        return False


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks for processes in /proc")
def test_a_killed_run_is_repeated_at_once(large: Path):
    """With its worker processes, which must neither live on nor keep the folder locked."""
    whole = large / "whole"
    words = from_dota(large, "--window", "128", "--overlap", "0", "--workers", "2")
    main([*words, "--output", str(whole)])
    slow = "import sys, time\nfrom geochat.data.prepare import detections, main\nreal = detections.staged\n"
    slow += "detections.staged = lambda *a, **k: (time.sleep(0.05), real(*a, **k))[1]\nmain(sys.argv[1:])"
    run = subprocess.Popen([sys.executable, "-c", slow, *words])
    try:
        deadline = time.monotonic() + 60
        while len(list((large / "out").glob("images/*.png"))) < 3:
            assert run.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.001)
        workers = [int(pid) for pid in Path(f"/proc/{run.pid}/task/{run.pid}/children").read_text().split()]
    finally:
        run.send_signal(signal.SIGKILL)
        run.wait()
    assert len(workers) == 2
    assert not (large / "out/train.json").exists()
    main(words)
    for file in whole.rglob("*.*"):
        assert file.read_bytes() == (large / "out" / file.relative_to(whole)).read_bytes()
    while any(map(alive, workers)):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_windows_of_an_earlier_run_stay_until_the_picture_changes(large: Path):
    main(from_dota(large, "--window", "256"))
    target = next((large / "out/images").glob("P0__*.png"))
    before = target.stat().st_mtime_ns
    main(from_dota(large, "--window", "256"))
    assert target.stat().st_mtime_ns == before
    save(large / "images/P0.png", 700, 500, 9)
    main(from_dota(large, "--window", "256"))
    assert target.stat().st_mtime_ns > before


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("1 2 3 4 5 6 7 8", "P0001.txt:2: expected x1 y1 x2 y2 x3 y3 x4 y4 class difficult, found 8 words"),
        (
            "1 2 3 4 5 six 7 8 ship 0",
            "P0001.txt:2: expected x1 y1 x2 y2 x3 y3 x4 y4 class difficult; could not",
        ),
        (
            "1 2 3 4 5 nan 7 8 ship 0",
            "P0001.txt:2: expected x1 y1 x2 y2 x3 y3 x4 y4 class difficult; a coordinate",
        ),
        (
            "1 2 3 4 5 6 7 8 ship hard",
            "P0001.txt:2: expected x1 y1 x2 y2 x3 y3 x4 y4 class difficult; the last",
        ),
        ("1,2,3,4,5,6,7,8,ship,0", "P0001.txt:2: expected"),
    ],
)
def test_bad_lines_are_named(dota: Path, refused, line: str, message: str):
    (dota / "labelTxt/P0001.txt").write_text(f"gsd:null\n{line}\n")
    assert message in refused(main, from_dota(dota))
    assert not (dota / "out/train.json").exists()


def test_flat_labels_are_counted(dota: Path, capsys):
    with (dota / "labelTxt/P0001.txt").open("a") as file:
        file.write("5 5 5 5 5 5 5 5 ship 0\n")
    main(from_dota(dota))
    assert "labels without area, left out: 1, first" in (out := capsys.readouterr().out)
    assert "P0001.txt:6" in out


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda d: (d / "images/P0001.png").unlink(), "P0001.txt: no picture"),
        (lambda d: save(d / "images/P0001.jpg", 9, 9), "would both have the labels of"),
        (lambda d: (d / "images/P0001.png").write_bytes(b"x"), "P0001.png: not an image file"),
        (lambda d: (d / "labelTxt/P0001.txt").unlink(), "no .txt file below it"),
        (lambda d: (d / "labelTxt/P0001.txt").write_text("gsd:1\n"), "no labelled object in 1 pictures"),
        (lambda d: (d / "labelTxt/P0001.txt").write_bytes(b"\xff\xfe"), "not UTF-8 text"),
    ],
)
def test_labels_and_pictures_that_do_not_fit(dota: Path, refused, spoil: Callable, message: str):
    spoil(dota)
    assert message in refused(main, from_dota(dota))


def test_a_picture_cut_off_is_named_when_its_windows_are_cut(dota: Path, refused):
    whole = (dota / "images/P0001.png").read_bytes()
    (dota / "images/P0001.png").write_bytes(whole[: len(whole) // 2])
    assert "P0001.png: cannot be read as an image" in refused(main, from_dota(dota))
    assert not (dota / "out/train.json").exists()


def test_windows_of_two_pictures_may_not_share_a_name(large: Path, refused):
    save(large / "images/P0.jpg", 700, 500)
    assert "P0.jpg and" in (line := refused(main, from_dota(large)))
    assert "remove one" in line


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--overlap", "504"], "--overlap 504: must be at least 0 and less than the window of 504"),
        (["--visible", "1.5"], "--visible 1.5: must lie between 0 and 1"),
        (["--turns", "0"], "--turns 0: must be at least 1"),
        (["--val-share", "1"], "--val-share 1.0: must be at least 0 and less than 1"),
        (["--val-share", "0.5"], "1 picture cannot be split"),
        (["--seed", "-1"], "--seed -1: must not be negative"),
        (["--tasks", "refer-all"], "nothing to ask with --tasks refer-all"),
        (["--images", "gone"], "--images gone: no such folder"),
        (["--labels", "gone"], "--labels gone: no such folder"),
    ],
)
def test_flags_that_cannot_be_used(dota: Path, refused, more: list[str], message: str):
    assert message in refused(main, from_dota(dota, *more))


# ---------------------------------------------------------------- COCO


def coco_file(folder: Path) -> dict:
    save(folder / "images/a.jpg", 200, 100)
    return {
        "images": [{"id": 7, "file_name": "a.jpg", "width": 200, "height": 100}],
        "categories": [{"id": 1, "name": "ship"}, {"id": 2, "name": "storage-tank"}],
        "annotations": [
            {"image_id": 7, "category_id": 1, "bbox": [20, 10, 60, 40]},
            {"image_id": 7, "category_id": 2, "segmentation": [[100, 50, 150, 25, 170, 65, 120, 90]]},
        ],
    }


def from_coco(folder: Path, content: object, *more: str) -> list[str]:
    (folder / "instances.json").write_text(content if isinstance(content, str) else json.dumps(content))
    words = ["from-coco", "--annotations", str(folder / "instances.json"), "--images", str(folder / "images")]
    return [*words, "--output", str(folder / "out"), "--quiet", "--workers", "0", "--window", "0", *more]


@pytest.mark.parametrize("oriented", [False, True])
def test_golden_records_of_coco(tmp_path: Path, oriented: bool):
    more = ["--tasks", "grounding", *(["--oriented"] if oriented else [])]
    main(from_coco(tmp_path, coco_file(tmp_path), *more))
    ((_, answer),) = told(tmp_path / "out/train.json")
    regions = parse_regions(answer)
    assert [region.phrase for region in regions] == ["1 ship", "1 storage tank"]
    ship, tank = (region.boxes[0] for region in regions)
    assert ship.envelope(200, 100) == pytest.approx((20, 10, 80, 50), abs=1)
    exact = [(100, 50), (150, 25), (170, 65), (120, 90)]
    assert polygon_iou(tank.polygon(200, 100), exact, "rotated" if oriented else "hbb") > 0.93
    assert (tank.angle == 90) != oriented


def spoiled(**changes: object) -> Callable[[dict], None]:
    def spoil(content: dict) -> None:
        content["annotations"][0].update(changes)

    return spoil


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (spoiled(image_id=8), 'annotations[0]: "image_id" 8 is in no row of "images"'),
        (spoiled(category_id=9), 'annotations[0]: "category_id" 9 is in no row of "categories"'),
        (spoiled(bbox=[1, 2, 3]), 'annotations[0]: "bbox" must be [x, y, width, height], found [1, 2, 3]'),
        (spoiled(bbox=[1, 2, -3, 4]), 'annotations[0]: "bbox" has a negative side'),
        (spoiled(bbox=[1, 2, "3", 4]), 'annotations[0]: "bbox" holds something that is no finite number'),
        (
            spoiled(bbox=None, segmentation=[[1, 2, 3]]),
            'annotations[0]: "segmentation" must be lists of x, y',
        ),
        (
            lambda c: c["images"][0].update(width=100),
            "a.jpg is 200 x 100 pixels, its labels are for 100 x 100",
        ),
        (lambda c: c["images"][0].update(file_name="b.jpg"), "images[0]:"),
        (
            lambda c: c["images"][0].update(file_name="../a.jpg"),
            "images[0]: '../a.jpg' is a path that leaves",
        ),
        (lambda c: c["images"].append(c["images"][0]), 'images[1]: "id" 7 is that of a.jpg, too'),
        (
            lambda c: c["images"].append({**c["images"][0], "id": 70}),
            'images[1]: "file_name" a.jpg stands there twice; merge the two rows',
        ),
        (lambda c: c["categories"][1].pop("name"), 'categories[1]: "id" or "name" is missing'),
        (lambda c: c.pop("annotations"), 'no list "annotations" of objects'),
    ],
)
def test_bad_rows_of_coco_are_named(tmp_path: Path, refused, spoil: Callable, message: str):
    content = coco_file(tmp_path)
    spoil(content)
    assert message in refused(main, from_coco(tmp_path, content))
    assert not (tmp_path / "out/train.json").exists()


def test_what_is_no_coco_file(tmp_path: Path, refused):
    coco_file(tmp_path)
    assert "instances.json: not valid JSON: Expecting" in refused(main, from_coco(tmp_path, '{"images": ['))
    assert 'no list "images" of objects' in refused(main, from_coco(tmp_path, "[]"))


def test_a_crowd_makes_its_class_unclear(tmp_path: Path):
    content = coco_file(tmp_path)
    content["annotations"].append({"image_id": 7, "category_id": 1, "bbox": [100, 10, 60, 40], "iscrowd": 1})
    main(from_coco(tmp_path, content, "--per-task", "9", "--tasks", "count", "grounding", "refer-one"))
    pairs = told(tmp_path / "out/train.json")
    assert pairs
    assert not any("ship" in question for question, _ in pairs)


# ---------------------------------------------------------------- class folders


@pytest.fixture
def scenes(tmp_path: Path) -> Path:
    for name in ("denseresidential", "river", "storage_tanks"):
        for number in range(4):
            save(tmp_path / f"scenes/{name}/{name}{number:02d}.jpg", 8, 8, number)
    return tmp_path


def from_classes(folder: Path, *more: str) -> list[str]:
    return [
        "from-classes",
        "--images",
        str(folder / "scenes"),
        "--output",
        str(folder / "out"),
        "--quiet",
        *more,
    ]


def test_golden_records_of_class_folders(scenes: Path):
    main(from_classes(scenes, "--classes", "river, Dense Residential, storage tanks", "--val-share", "0.25"))
    train, val = (json.loads((scenes / "out" / name).read_text()) for name in ("train.json", "val.json"))
    record = next(row for row in train if row["image"].startswith("dense"))
    assert [turn["value"] for turn in record["conversations"]] == [
        "<image>\nClassify the given image in one of the following classes. "
        "Classes: river, Dense Residential, storage tanks. \nAnswer in one word or a short phrase.",
        "Dense Residential",
    ]
    for rows, each in ((train, 3), (val, 1)):
        assert Counter(row["image"].split("/")[0] for row in rows) == dict.fromkeys(
            ("denseresidential", "river", "storage_tanks"), each
        )
    assert not verify(scenes / "out/train.json", scenes / "scenes")[1]


def test_the_wording_of_the_training_file(scenes: Path):
    main(from_classes(scenes, "--prompt", "training"))
    question, answer = told(scenes / "out/train.json")[-1]
    assert question == (
        "<image>\nClassify the given image in one of the following classes: denseresidential, river, storage tanks. "
        "Answer in one word or a short phrase."
    )
    assert answer == "storage tanks"


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ("river, storage tanks", "'denseresidential' is a folder below"),
        ("river, storage tanks, dense residential, forest", "no folder for 'forest' below"),
        ("river, river, storage tanks, denseresidential", "'river' stands there twice"),
    ],
)
def test_classes_that_do_not_fit_the_folders(scenes: Path, refused, names: str, message: str):
    assert message in refused(main, from_classes(scenes, "--classes", names))


def test_classes_too_small_to_split_are_named(scenes: Path, refused):
    for number in range(3):
        (scenes / f"scenes/river/river{number:02d}.jpg").unlink()
    assert "river: --val-share 0.5: 1 picture cannot be split" in refused(
        main, from_classes(scenes, "--val-share", "0.5")
    )


def test_an_empty_class_is_named(scenes: Path, refused):
    (scenes / "scenes/forest").mkdir()
    assert "forest: no pictures" in refused(main, from_classes(scenes))


# ---------------------------------------------------------------- windows


@given(st.integers(1, 400), st.integers(1, 120), st.data())
def test_windows_cover_a_side(length: int, window: int, data):
    overlap = data.draw(st.integers(0, window - 1))
    found = starts(length, window, overlap)
    assert found[0] == 0
    assert found[-1] + window >= length
    assert all(0 < b - a <= window - overlap for a, b in pairwise(found))
    assert all(start + window <= length for start in found) or found == [0]


triangles = st.lists(
    st.tuples(st.integers(-40, 240), st.integers(-40, 240)), min_size=3, max_size=5, unique=True
).map(convex_hull)


@settings(max_examples=60)
@given(st.lists(triangles.filter(lambda hull: len(hull) >= 3), min_size=1, max_size=4), st.floats(0.05, 0.95))
def test_windows_keep_what_they_show(hulls: list, visible: float):
    shapely = pytest.importorskip("shapely")
    objects = tuple(LabelledObject(f"kind {k}", tuple(hull)) for k, hull in enumerate(hulls))
    picture = Picture("x.png", 200, 200, objects)
    for left, top, right, bottom in windows(200, 200, 90, 20):
        part = cut(picture, (left, top, right, bottom), "w", visible)
        kept = {item.label: item for item in part.objects}
        for item in objects:
            shape = shapely.Polygon(item.outline)
            seen = shape.intersection(shapely.box(left, top, right, bottom))
            share = seen.area / shape.area
            if abs(share - visible) < 1e-6 or share < 1e-9:
                continue
            assert (item.label in kept) == (share > visible)
            assert (item.label in part.unclear) == (share < visible)
            if share > visible:
                found = shapely.Polygon(kept[item.label].outline)
                assert found.area == pytest.approx(seen.area, abs=1e-6)
                assert shapely.box(-1e-6, -1e-6, 90 + 1e-6, 90 + 1e-6).covers(found)


# ---------------------------------------------------------------- questions


def asker(objects: list[tuple[str, Box]], seed: int = 0, **changes: float) -> Asker:
    found = tuple(LabelledObject(label, tuple(convex_hull(box.polygon(100, 100)))) for label, box in objects)
    picture = Picture("x.png", 100, 100, found)
    limits = {"max_objects": 20, "min_fit": 0.5, **changes}
    return Asker(picture, ["bus", "plane", "ship"], np.random.default_rng(seed), **limits)


def square(x: float, y: float, side: float = 10) -> Box:
    return Box(x - side / 2, y - side / 2, x + side / 2, y + side / 2)


def test_one_object_is_named_only_where_no_other_fits():
    ships = [("ship", square(20, 20)), ("ship", square(25, 80, 20)), ("ship", square(20, 5, 10))]
    phrases = {parse_regions(q.text)[0].phrase: q.answer for q in asker(ships).refer_one()}
    assert set(phrases) == {"ship at the bottom left", "largest ship"}
    assert phrases["largest ship"] == phrases["ship at the bottom left"]
    alone = list(asker(ships[:1]).refer_one())
    assert [parse_regions(q.text)[0].phrase for q in alone] == ["ship"]


def test_all_objects_of_a_class_are_told_in_reading_order():
    ships = [("ship", square(80, 50)), ("ship", square(20, 50)), ("ship", square(50, 10))]
    (question,) = asker(ships).refer_all()
    assert [(box.x1 + box.x2) / 2 for box in parse_boxes(question.answer)] == [50, 20, 80]
    assert not list(asker(ships, max_objects=2).refer_all())


def test_boxes_that_rounding_spoils_are_not_told():
    objects = [("ship", square(20.5, 20.5, 1.2)), ("ship", square(70, 70, 20)), ("plane", square(40, 40, 20))]
    found = asker(objects, min_fit=0.8)
    assert found.found == ["plane"]
    assert not list(found.refer_all())
    assert not list(found.grounding())
    assert {q.answer for q in found.count()} <= {"2", "1", "0"}
    assert len(list(found.identify())) == 2


def test_presence_is_asked_both_ways():
    for seed in range(20):
        first, second = list(asker([("ship", square(50, 50))], seed).presence())[:2]
        assert {first.answer, second.answer} == {"yes", "no"}
    everything = [("ship", square(20, 20)), ("plane", square(70, 70)), ("bus", square(20, 70))]
    assert not list(asker(everything).presence())  # every answer would be yes


def test_no_answer_stands_in_an_earlier_turn():
    objects = [("ship", square(20, 20)), ("ship", square(70, 70)), ("plane", square(20, 70, 20))]
    for seed in range(30):
        questions = ask(asker(objects, seed), list(TASKS), 4)
        talks = conversations(questions, 5)
        assert sum(map(len, talks)) == len(questions)
        for talk in talks:
            assert len(talk) <= 5
            boxes = [box.format() for q in talk for box in parse_boxes(q.text + q.answer)]
            assert len(boxes) == len(set(boxes))
            assert all(not a.spoils(b) for i, a in enumerate(talk) for b in talk[:i])
            for question in talk:
                if question.text.startswith(("How many", "Is there")):
                    assert sum(other.label == question.label for other in talk) == 1
                if question.text.startswith("[grounding]"):
                    assert len(talk) == 1


def test_words():
    nouns = ("ship", "bus", "bridge", "factory", "bay", "church", "cars")
    assert list(map(plural, nouns)) == ["ships", "buses", "bridges", "factories", "bays", "churches", "cars"]
    assert [place_name(x, y) for x, y in ((0.1, 0.1), (0.5, 0.5), (1.2, -0.1), (0.5, 0.9))] == [
        "top left",
        "center",
        "top right",
        "bottom",
    ]


# ---------------------------------------------------------------- what whole percent cost


@pytest.mark.parametrize(("side", "mean", "least"), [(60, 0.98, 0.95), (30, 0.96, 0.92), (10, 0.88, 0.75)])
def test_a_written_box_covers_its_outline(side: int, mean: float, least: float):
    """Squares to rectangles of 4 : 1 of `side` percent (root of the area), any heading; docs/prepare.md has the table."""
    rng, fits = np.random.default_rng(0), []
    for _ in range(300):
        ratio = rng.uniform(1, 4) ** 0.5
        w, h, (x, y) = side * ratio, side / ratio, rng.uniform(20, 80, 2)
        outline = Box(x - w / 2, y - h / 2, x + w / 2, y + h / 2, rng.uniform(0, 90)).polygon(504, 504)
        written = Box.parse(Box.from_polygon(outline, 504, 504).format())
        fits.append(polygon_iou(outline, written.polygon(504, 504)))
    assert np.mean(fits) >= mean
    assert min(fits) >= least
