"""The page holds what was answered, as text, with both runs' boxes, its figures and plots."""

from __future__ import annotations

import io
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

pytest.importorskip("matplotlib")

import numpy as np
from PIL import Image

from geochat.eval import examples
from geochat.eval.benchmark import Benchmark, known
from geochat.eval.charts import confusion_matrix, score_bars, strata_bars
from geochat.eval.compare import Run
from geochat.eval.examples import example, pick, worst
from geochat.eval.files import read_json, write_json, write_rows
from geochat.eval.measures import confusion, measure, strata
from geochat.eval.published import beside
from geochat.eval.report import main
from geochat.eval.score import judge, summarise, write_scores

BOX = [[10, 10], [50, 10], [50, 50], [10, 50]]
EVIL = '<script>alert("1")</script> & <img src=x onerror=alert(2)>'


def write_run(folder: Path, images: Path, boxes: str, words: str) -> Path:
    rows = []
    for i in range(5):
        common = {"image": f"{i}.png", "width": 100, "height": 80, "finished": True}
        rows.append({"question_id": f"s{i}", "task": "scene", "ground_truth": "harbour", "prompt": "Scene?",
                     "text": words, **common})  # fmt: skip
        rows.append({"question_id": f"r{i}", "task": "refer", "ground_truth": [BOX], "objects": "single",
                     "prompt": f"[refer] {EVIL}", "text": boxes, **common})  # fmt: skip
    benchmark = Benchmark.load("nano")
    judged = judge(rows, benchmark)
    scores = summarise(judged, benchmark, total=len(rows))
    scores |= {"source": "nano", "image_folder": str(images), "model_path": "m", "notes": ["not all of it"]}
    write_rows(folder / "answers.jsonl", rows)
    write_scores(folder, scores, judged)
    return folder


@pytest.fixture
def runs(tmp_path: Path) -> list[Path]:
    images = tmp_path / "images"
    images.mkdir()
    for i in range(5):
        Image.new("RGB", (100, 80), (60, 20 * i, 90)).save(images / f"{i}.png")
    base = write_run(tmp_path / "base", images, EVIL, EVIL)
    tuned = write_run(tmp_path / "tuned", images, "<p>ship</p> {<10><12><50><62>|<90>}", "harbour")
    return [base, tuned]


class Tags(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.open: list[str] = []
        self.sources: list[str] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list) -> None:
        self.tags.append(tag)
        assert not any(name.startswith("on") for name, _ in attrs)
        self.sources += [value for name, value in attrs if name in ("src", "href")]
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def test_page(runs: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(
        [
            *map(str, runs),
            "--names",
            "base",
            "fine-tuned",
            "--output",
            str(tmp_path / "page"),
            "--pictures",
            "6",
        ]
    )
    assert (
        "| refer: recall@0.5 | 5 | 0.00 | 100.00 | +100.00 | +100.0 to +100.0 | 5 | 0 |"
        in capsys.readouterr().out
    )
    names = {path.name for path in (tmp_path / "page").iterdir()}
    assert names == {"index.html", "contact_sheet.png", "scores.png", "report.md"}
    assert "## fine-tuned against base" in (tmp_path / "page" / "report.md").read_text()
    assert (tmp_path / "page" / "report.md").read_text().count("not all of it") == 2  # a note of each run
    tags = Tags()
    tags.feed((tmp_path / "page" / "index.html").read_text())
    assert tags.open == []
    assert "script" not in tags.tags  # what a model says is text
    assert EVIL in tags.text
    assert all(
        source.startswith("data:image/") for source in tags.sources
    )  # nothing beside the file is needed
    assert tags.tags.count("article") == 6 + 2
    # Bars; three panels per box question, one picture per other question, at random and of the worst.
    assert len(tags.sources) == 1 + (3 * 3 + 3) + (3 + 1)
    with Image.open(tmp_path / "page" / "contact_sheet.png") as sheet:
        assert sheet.width > 3 * 300


def test_one_run_of_words_alone(runs: list[Path], tmp_path: Path) -> None:
    rows = [row for row in _rows(runs[1] / "answers.jsonl") if row["task"] == "scene"]
    folder, benchmark = tmp_path / "words", Benchmark.load("nano")
    judged = judge(rows, benchmark)
    scores = summarise(judged, benchmark, total=5) | {
        "source": "nano",
        "image_folder": str(tmp_path / "images"),
    }
    write_rows(folder / "answers.jsonl", rows)
    write_scores(folder, scores, judged)
    main([str(folder), "--output", str(tmp_path / "page")])
    assert "against" not in (tmp_path / "page" / "report.md").read_text()
    assert (tmp_path / "page" / "contact_sheet.png").is_file()
    assert "the true boxes" not in (tmp_path / "page" / "index.html").read_text()


def test_a_sheet_of_words_shows_the_question(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Image.new("RGB", (40, 40)).save(tmp_path / "0.png")
    asked = "Classify: " + ", ".join(["dense residential"] * 30) + "\nAnswer in one word."
    row = {"image": "0.png", "ground_truth": "river", "text": "pond", "prompt": asked}
    runs, benchmark = scored(tmp_path, "vhm/scene_nwpu", row)
    captions: list[str] = []
    monkeypatch.setattr(examples, "contact_sheet", lambda said, columns: captions.extend(c for _, c in said))
    examples.sheet([example("1", runs, benchmark, tmp_path)])
    question, truth, answer = captions[0].split("\n")
    assert question.startswith("Classify: dense residential")
    assert len(question) <= 100
    assert (truth, answer) == ("truth: river", "mine: pond")


def test_examples_are_drawn_from_every_task_and_stay_the_same(runs: list[Path]) -> None:
    loaded = [Run.load(path, path.name) for path in runs]
    chosen = pick(loaded, 4)
    assert [re.sub(r"\d", "", key) for key in chosen] == ["s", "s", "r", "r"]
    assert pick(loaded, 4) == chosen
    assert len(pick(loaded, 1000)) == 10


def test_the_worst_are_wrong_and_the_right_ones_stay_out(runs: list[Path]) -> None:
    base, tuned = (Run.load(path, path.name) for path in runs)
    assert sorted(re.sub(r"\d", "", key) for key in worst([base], 4)) == ["r", "r", "s", "s"]
    assert worst([tuned], 4) == []


@pytest.fixture
def classes(tmp_path: Path) -> tuple[Run, Benchmark]:
    """Ten fields and five harbours; one field is taken for a harbour, one answer is no class, one names two."""
    table = {"name": "scenes", "metric": "exact_match", "strata": ["class"], "columns": {
        "class": {"from": "question_id", "pattern": "^([^/]+)/"}}}  # fmt: skip
    benchmark = Benchmark.parse(table, tmp_path, "here")
    said = ["field"] * 7 + ["Harbour", "dunno", "field or harbour"] + ["harbour."] * 5
    rows = []
    for i, text in enumerate(said):
        truth = "field" if i < 10 else "harbour"
        row = {"question_id": f"{truth}/{i}", "image": f"{i // 5}.png", "ground_truth": truth, "text": text}
        rows.append({**row, "prompt": "?"})
    judged = judge(rows, benchmark)
    write_rows(tmp_path / "run" / "answers.jsonl", rows)
    write_scores(tmp_path / "run", summarise(judged, benchmark, total=len(rows)), judged)
    return Run.load(tmp_path / "run", "mine"), benchmark


def test_what_is_taken_for_what(classes) -> None:
    labels, counts = confusion(*classes, "scenes")
    assert labels == ["field", "harbour"]
    assert counts.tolist() == [[7, 1, 2], [0, 5, 0]]


def test_figures_of_groups(classes) -> None:
    run, _ = classes
    whole = measure(run, "scenes")
    assert (whole.n, whole.value, whole.failed) == (15, 12 / 15, 1)
    assert 0 <= whole.interval[0] < 12 / 15 < whole.interval[1] <= 1
    [(task, column, groups)] = strata([run])
    assert (task, column) == ("scenes", "class")
    assert [(value, one.n, one.value) for value, [one] in groups] == [("field", 10, 0.7), ("harbour", 5, 1.0)]


def test_published_figures_stand_beside(classes) -> None:
    run, _ = classes
    table = {"A, paper": {"overall": 84.4, "harbour": 50}, "B": {"macro": 12.345, "nothing": 1}}
    assert beside([run], table) == [
        ["in %", "overall", "harbour", "macro", "nothing"],
        ["mine", "80.00", "100.00", "85.00", "–"],
        ["A, paper (published)", "84.40", "50.00", "–", "–"],
        ["B (published)", "–", "–", "12.35", "1.00"],
    ]


@pytest.mark.parametrize("name", known())
def test_published_figures_that_ship_are_shares_or_errors(name: str) -> None:
    heading, *rows = beside([], Benchmark.load(name).published)
    assert all(len(row) == len(heading) and set(row[1:]) != {"–"} for row in rows)
    assert all(0 <= float(cell) <= 100 for row in rows for cell in row[1:] if cell != "–")


def scored(folder: Path, name: str, row: dict) -> tuple[list[Run], Benchmark]:
    """A run of one question of a benchmark that ships."""
    benchmark = Benchmark.load(name)
    rows = [{"question_id": "1", "prompt": "?", **row}]
    judged = judge(rows, benchmark)
    write_rows(folder / "answers.jsonl", rows)
    write_scores(folder, summarise(judged, benchmark, total=1), judged)
    return [Run.load(folder, "mine")], benchmark


def test_boxes_in_thousandths_are_drawn(tmp_path: Path) -> None:
    Image.new("RGB", (400, 400), "green").save(tmp_path / "0.png")
    row = {"image": "0.png", "width": 400, "height": 400, "ground_truth": "[[40, 40, 200, 200]]"}
    runs, benchmark = scored(tmp_path, "vhm/grounding", {**row, "text": "[[100, 100, 500, 500]]"})
    shown = example("1", runs, benchmark, tmp_path)
    picture, said, right = shown.answers[0]
    assert (shown.truth[1], said.split("\n")[0], right) == (
        "truth: 1 box",
        "mine: 1 of 1 found, 1 predicted",
        True,
    )
    inside = picture.getpixel((120, 120))
    assert inside != shown.truth[0].getpixel((120, 120)) == (0, 128, 0)  # the predicted box is filled


def test_a_question_without_picture_and_without_truth(tmp_path: Path) -> None:
    runs, benchmark = scored(tmp_path, "vqav2", {"image": "", "text": "two"})
    shown = example("1", runs, benchmark, tmp_path)
    assert (shown.truth[1], shown.answers[0][1:]) == ("truth: not published", ("mine: two", None))


def test_plots_are_pictures(classes) -> None:
    run, benchmark = classes
    groups = next(groups for *_, groups in strata([run]))
    for png in (
        score_bars(["mine"], groups, "t"),
        strata_bars(["mine"], groups, "t"),
        confusion_matrix(*confusion(run, benchmark, "scenes"), "t"),
    ):
        with Image.open(io.BytesIO(png)) as image:
            assert image.width > 300
            assert np.asarray(image.convert("L")).std() > 5


def test_refusals(runs: list[Path], tmp_path: Path, refused) -> None:
    scores = tmp_path / "scores.json"
    write_json(scores, {"a": 1})
    wrong = read_json(runs[0] / "scores.json")
    wrong["tasks"]["scene"]["metric"] = "x"
    write_json(tmp_path / "wrong" / "scores.json", wrong)
    for arguments, message in (
        ([str(scores)], "holds no scores"),
        ([str(tmp_path / "wrong")], "unknown metric 'x'"),
        ([str(tmp_path / "nothing")], "cannot be read"),
        ([str(runs[0]), "--names", "a", "b"], "2 names for 1 runs"),
        (
            [str(runs[0]), "--output", str(tmp_path / "p"), "--image-folder", str(tmp_path)],
            "image file not found",
        ),
    ):
        assert message in refused(main, arguments)


def _rows(path: Path) -> list[dict]:
    from geochat.eval.files import read_rows

    return read_rows(path)
