"""Question files in the layouts that the originals publish → rows with `question_id`, `image`, `text`, `ground_truth`.

A reader takes the question file and further files by role (`[files]` of the benchmark). Whatever belongs together is
joined by id, never by position. ValueError names the file and the row.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from geochat.data.sample import IMAGE_TOKEN, read_turns
from geochat.eval.files import Row, index_by_id, read_json, read_rows
from geochat.eval.tsv import read_options

Beside = Mapping[str, Sequence[Path]]
Reader = Callable[[Path, Beside], list[Row]]


def read_plain(path: Path, beside: Beside) -> list[Row]:
    """JSON Lines or a JSON array whose rows are questions already."""
    return read_rows(path)


def read_rsvqa(path: Path, beside: Beside) -> list[Row]:
    """RSVQA as published: `…_questions.json`, with `…_answers.json` beside it; inactive entries are left out."""
    answers = _rsvqa_answers(path.with_name(path.name.replace("questions", "answers")))
    return [
        {
            "question_id": row["id"],
            "image": f"{row['img_id']}.tif",
            "text": row["question"],
            "category": row["type"],
            "ground_truth": _of(answers, row["id"], path),
        }
        for row in _entries(path, "questions", ("id", "img_id", "question", "type"))
    ]


def read_geochat_vqa(path: Path, beside: Beside) -> list[Row]:
    """GeoChat-Bench's RSVQA questions, which hold no answers: these come from RSVQA's own file, by id."""
    rows = read_rows(path)
    index_by_id(rows, str(path))
    if all("ground_truth" in row for row in rows):
        return rows
    answers = _rsvqa_answers(_only(beside, "answers", path))
    return [{**row, "ground_truth": _of(answers, row["question_id"], path)} for row in rows]


def read_rsevalkit(path: Path, beside: Beside) -> list[Row]:
    """VHM's data files: conversations of one question and its answer; `size` is (height, width)."""
    rows = []
    for number, item in enumerate(read_rows(path), 1):
        where = f"{path}: row {number}"
        turns = read_turns(item, where)
        if len(turns) != 2 or not item.get("image"):
            raise ValueError(f"{where}: expected an image, one question and its answer")
        question = turns[0].text.removeprefix(IMAGE_TOKEN).strip()
        row = {"image": str(Path(item.get("image_path") or "") / item["image"]), "text": question}
        rows.append({**row, "ground_truth": turns[1].text, **size_columns(item.get("size"), where)})
    return number_questions(rows)


def read_scienceqa(path: Path, beside: Beside) -> list[Row]:
    """LLaVA's ScienceQA file; the right choice and the options come from `problems.json`, by id."""
    problems = read_json(_only(beside, "problems", path))
    rows = []
    for item in read_rows(path):
        where = f"{path}: question {item.get('id')}"
        if (problem := problems.get(str(item.get("id")))) is None:
            raise ValueError(f"{where}: not in {_only(beside, 'problems', path)}")
        options = dict(zip("ABCDE", problem["choices"]))
        rows.append(
            {
                "question_id": item["id"],
                "image": item.get("image", ""),
                "text": read_turns(item, where)[0].text.removeprefix(IMAGE_TOKEN).strip(),
                "options": options,
                "ground_truth": list(options)[problem["answer"]],
                "picture_given": "picture" if item.get("image") else "no picture",
            }
        )
    return rows


def read_pope(path: Path, beside: Beside) -> list[Row]:
    """LLaVA's POPE questions, with the labels of POPE's own files: by category, picture and first line."""
    labels: dict[tuple[str, str, str], str] = {}
    for file in beside.get("labels", ()):
        category = file.stem.rpartition("_")[2]
        labels |= {(category, row["image"], row["text"]): row["label"] for row in read_rows(file)}
    return [
        {
            **row,
            "ground_truth": _of(labels, (row["category"], row["image"], row["text"].split("\n")[0]), path),
        }
        for row in read_rows(path)
    ]


def read_textvqa(path: Path, beside: Beside) -> list[Row]:
    """LLaVA's TextVQA questions, whose id is the picture's, with the ten answers of TextVQA's own file."""
    people = {
        textvqa_key(row["image_id"], row["question"]): row["answers"]
        for row in _table(_only(beside, "annotations", path), "data")
    }
    rows = [{**row, "question_id": textvqa_key(row["question_id"], row["text"])} for row in read_rows(path)]
    return [{**row, "ground_truth": _of(people, row["question_id"], path)} for row in rows]


def textvqa_key(picture: object, prompt: str) -> str:
    """What tells TextVQA's questions apart: the picture and the first line of the prompt."""
    return f"{picture}: {prompt.split(chr(10))[0].lower()}"


def read_gqa(path: Path, beside: Beside) -> list[Row]:
    """LLaVA's GQA questions, with the answers of GQA's own file, an object by question id."""
    answers = read_json(_only(beside, "annotations", path))
    return [
        {**row, "ground_truth": _of(answers, str(row["question_id"]), path)["answer"]}
        for row in read_rows(path)
    ]


def read_mmbench(path: Path, beside: Beside) -> list[Row]:
    """MMBench's and CCBench's table; see geochat.eval.tsv."""
    return read_options(path)


def number_questions(rows: Iterable[Row]) -> list[Row]:
    """`question_id` from picture and question, for files whose rows have none and may come in any order."""
    seen: Counter[str] = Counter()
    numbered = []
    for row in rows:
        key = f"{Path(row['image']).name}: {row['text']}"
        seen[key] += 1
        numbered.append({"question_id": key if seen[key] == 1 else f"{key} ({seen[key]})", **row})
    return numbered


def size_columns(size: Any, where: str) -> Row:
    """`width` and `height` from RSEvalKit's (height, width); none where it was not written down."""
    if size is None:
        return {}
    if not isinstance(size, list) or len(size) != 2:
        raise ValueError(f"{where}: size must be [height, width], not {size!r:.40}")
    return {"height": int(size[0]), "width": int(size[1])}


def _rsvqa_answers(path: Path) -> dict[Any, str]:
    entries = _entries(path, "answers", ("question_id", "answer"))
    return {row["question_id"]: row["answer"] for row in entries}


def _entries(path: Path, key: str, columns: Sequence[str]) -> list[Row]:
    """The active entries of one of RSVQA's files."""
    rows = [row for row in _table(path, key) if row.get("active")]
    for row in rows:
        if missing := [column for column in columns if column not in row]:
            raise ValueError(f"{path}: entry {row.get('id')} has no {missing[0]!r}")
    return rows


def _table(path: Path, key: str) -> list[Row]:
    content = read_json(path)
    if not isinstance(content, dict) or not isinstance(content.get(key), list):
        raise ValueError(f'{path}: expected an object with a list "{key}"')
    return content[key]


def _only(beside: Beside, role: str, path: Path) -> Path:
    if not beside.get(role):
        raise ValueError(f"{path}: the truth is in another file; name it in the benchmark, files.{role}")
    return beside[role][0]


def _of(truths: Mapping[Any, Any], key: Any, path: Path) -> Any:
    if key not in truths:
        raise ValueError(f"{path}: question {key!r} has no answer in the file of answers")
    return truths[key]


FORMATS: dict[str, Reader] = {
    "rows": read_plain,
    "rsvqa": read_rsvqa,
    "geochat_vqa": read_geochat_vqa,
    "rsevalkit": read_rsevalkit,
    "scienceqa": read_scienceqa,
    "pope": read_pope,
    "textvqa": read_textvqa,
    "gqa": read_gqa,
    "mmbench": read_mmbench,
}
