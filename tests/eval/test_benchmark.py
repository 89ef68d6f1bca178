"""Every shipped benchmark parses; every mistake in a TOML file is named."""

from __future__ import annotations

from pathlib import Path

import pytest

from geochat.eval.benchmark import Benchmark, Choice, index_by_id, known
from geochat.eval.files import read_json, read_rows, write_json, write_rows
from geochat.eval.submit import LAYOUTS

MINIMAL = 'name = "x"\nmetric = "exact_match"\n'


@pytest.mark.parametrize("name", known())
def test_shipped_benchmarks(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GEOCHAT_BENCHMARKS", "/data/bench")
    benchmark = Benchmark.load(name)
    assert benchmark.name == name
    assert benchmark.description
    assert benchmark.root == Path("/data/bench") / benchmark.folder
    assert benchmark.submission in {"", *LAYOUTS}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("name = ", "not TOML"),
        ('name = "x"', "key metric is missing"),
        (MINIMAL + "metrics = 1", "unknown key metrics; known: .*metric"),
        ('name = "x"\nmetric = "bleu"', "unknown metric 'bleu'; known: exact_match"),
        ('name = "x"\n[metric]\nscene = "exact_match"', 'needs `column = "…"`'),
        (MINIMAL + "questions = 3", "questions must be a string"),
        (MINIMAL + 'format = "csv"', "unknown format 'csv'; known: rows, rsvqa"),
        (MINIMAL + 'scorers.other = "bleu"', "unknown metric 'bleu'"),
        (MINIMAL + "variants.a = 1", "variants must be tables"),
        (MINIMAL + "[variants.a]", "there is no variant ''; its variants: x/a"),
        (MINIMAL + '[columns]\nc = "x"', "columns.c must be"),
        (MINIMAL + '[columns]\nc = { from = "a", pattern = "(" }', "columns.c: "),
        (MINIMAL + '[columns]\nc = { from = "a", pattern = "a" }', "exactly one"),
    ],
)
def test_mistakes_are_named(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "b.toml"
    file.write_text(text)
    with pytest.raises(ValueError, match=message) as caught:
        Benchmark.load(file)
    assert str(file) in str(caught.value)


def test_unknown_and_missing() -> None:
    with pytest.raises(ValueError, match="no benchmark 'aids'; known: aid, "):
        Benchmark.load("aids")
    with pytest.raises(ValueError, match="cannot be read"):
        Benchmark.load("nowhere.toml")


def test_variants_of_a_users_file(tmp_path: Path) -> None:
    file = tmp_path / "ships.toml"
    file.write_text(
        MINIMAL + 'folder = "f"\n[variants.a]\nquestions = "a.jsonl"\nmetric = "yes_no"\n[variants.b]\n'
    )
    first, second = Benchmark.load(f"{file}/a"), Benchmark.load(f"{file}/b")
    assert (first.name, first.questions, first.metric.default) == ("x/a", "a.jsonl", "yes_no")
    assert (second.name, second.questions, second.metric.default) == ("x/b", "questions.jsonl", "exact_match")
    assert first.root == tmp_path / "f"
    with pytest.raises(ValueError, match="no variant 'c'; its variants: x/a, x/b"):
        Benchmark.load(f"{file}/c")
    with pytest.raises(ValueError, match="no variant 'a'; its variants: none"):
        Benchmark.load("aid/a")


def test_a_row_is_completed() -> None:
    benchmark = Benchmark.load("aid")
    row = {"question_id": "BareLand/bareland_1.png", "image": "BareLand/bareland_1.png", "text": "Classify"}
    completed = benchmark.prepare(row, "aid")
    assert completed["class"] == "BareLand"
    assert benchmark.image_of(completed, "aid") == "BareLand/bareland_1.jpg"
    assert benchmark.prompt_of(completed, "aid") == "Classify"
    with pytest.raises(ValueError, match="not like"):
        benchmark.prepare({"question_id": "bareland_1"}, "aid")


def test_prompts_by_column() -> None:
    benchmark = Benchmark.load("referring")
    row = {"question_id": "a", "image_id": "7", "question": "2 black vehicles", "type": "ref"}
    assert benchmark.prompt_of(row, "q") == "[refer] Give me the location of <p> 2 black vehicles </p>"
    assert benchmark.prompt_of(row | {"type": "grounding"}, "q") == "[grounding]2 black vehicles"
    assert benchmark.image_of(row, "q") == "7.png"
    with pytest.raises(ValueError, match="type is 'reg'; known: grounding, ref"):
        benchmark.prompt_of(row | {"type": "reg"}, "q")
    with pytest.raises(ValueError, match="no column 'question'"):
        benchmark.prompt_of({"type": "ref"}, "q")
    with pytest.raises(ValueError, match="no column 'type'"):
        benchmark.prompt_of({}, "q")


def test_braces_in_a_question_are_left_alone() -> None:
    benchmark = Benchmark.load("region_captioning")
    row = {"question": "{<87><34><91><35>|<90>}"}
    assert benchmark.prompt_of(row, "q").endswith("at {<87><34><91><35>|<90>}")


def test_rows_left_out() -> None:
    benchmark = Benchmark.load("lrben")
    assert benchmark.prepare({"category": "count"}, "q") is None
    assert benchmark.prepare({"category": "comp"}, "q")
    with pytest.raises(ValueError, match="no column 'category'"):
        benchmark.prepare({}, "q")


def test_choice_default() -> None:
    choice = Choice.parse({"column": "task", "default": "a", "x": "b"}, "t")
    assert [choice.of({"task": task}, "t") for task in ("x", "y")] == ["b", "a"]
    assert choice.values() == ["a", "b"]


def test_rows_are_read_with_line_numbers(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    write_rows(file, [{"a": "é\u2028"}, {"a": 2}])  # U+2028 is no end of line in JSON Lines
    assert read_rows(file) == [{"a": "é\u2028"}, {"a": 2}]
    file.write_text('{"a": 1}\n\n{"a": ')
    with pytest.raises(ValueError, match=r"rows\.jsonl:3: not JSON"):
        read_rows(file)
    assert read_rows(file, torn_end=True) == [{"a": 1}]
    file.write_text('[{"a": 1}]')
    assert read_rows(file) == [{"a": 1}]
    file.write_text("1\n")
    with pytest.raises(ValueError, match="a row must be an object, not int"):
        read_rows(file)
    file.write_bytes(b"\xff\xfe{")
    with pytest.raises(ValueError, match="not UTF-8"):
        read_rows(file)
    with pytest.raises(ValueError, match="cannot be read"):
        read_rows(tmp_path)


def test_json_is_written_whole_or_not(tmp_path: Path) -> None:
    file = tmp_path / "deep" / "scores.json"
    write_json(file, {"a": 1})
    with pytest.raises(TypeError):
        write_json(file, {"a": object()})
    assert read_json(file) == {"a": 1}
    assert [path.name for path in file.parent.iterdir()] == ["scores.json"]


def test_question_ids_are_there_and_differ() -> None:
    with pytest.raises(ValueError, match="row 2 has no question_id"):
        index_by_id([{"question_id": 0}, {}], "f")
    with pytest.raises(ValueError, match="row 2: question_id '1' occurs twice"):
        index_by_id([{"question_id": 1}, {"question_id": "1"}], "f")


def test_land_cover_files_are_not_exchanged() -> None:
    assert Benchmark.load("vhm/multilabel_gid").questions == "mlc_gid_test.json"
    assert Benchmark.load("vhm/multilabel_fbp").questions == "mlc_fbp_test.json"


def test_every_question_of_vhm_has_its_prefix() -> None:
    prefixes = {
        "scene": "CLS",
        "vqa": "VQA",
        "grounding": "VG",
        "color": "IDK",
        "presence": "IDK",
        "position": "IDK",
    }
    prefixes |= {"relative": "IDK"}
    for name in (name for name in known() if name.startswith("vhm/")):
        start = name.removeprefix("vhm/").split("_")[0]
        prompt = Benchmark.load(name).prompt_of({"text": "Q"}, name)
        assert prompt == f"{{{prefixes.get(start, 'IT')}}} Q"
