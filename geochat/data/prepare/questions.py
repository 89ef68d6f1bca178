"""Questions and answers about labelled objects: GeoChat's tasks out of classes and outlines.

Prompts are those of GeoChat-Bench and of GeoChat's training file. What the labels cannot answer is not asked: how many
there are of a class of which more is in the picture than is labelled, or where an object is whose box, rounded to whole
percent, hardly covers it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from geochat.data.boxes import DELIMITER, Box, polygon_iou
from geochat.data.phrases import DESCRIBE, SHORT, count_phrase, enumeration, place_name, plural, with_article
from geochat.data.prepare.objects import LabelledObject, Picture

REFER = (
    "[refer] Give me the location of <p> {} </p>",
    "[refer] give me the location of <p>{}</p>",
    "[refer] where is <p>{}</p> ?",
    "[refer] where can I locate the <p>{}</p> ?",
)
IDENTIFY = ("[identify] What is the object present at {}", "[identify] the object in {} is")
DESCRIPTIONS = (DESCRIBE, "[grounding] describe the image in detail")
CLEARLY = 1.5
"""An object is the largest, or the smallest, when its area and the next one's differ by this factor."""


@dataclass(frozen=True)
class Question:
    """A question with its answer, and what they give away to other questions on the same picture."""

    text: str
    answer: str
    label: str = ""
    """The class that it is about; "" for a description, which is about all."""
    boxes: frozenset[str] = frozenset()
    """Boxes that are told."""
    in_general: bool = False
    """Whether it is about the class as a whole: other questions about the class tell its answer, or it theirs."""

    def spoils(self, other: Question) -> bool:
        """Whether one of the two could be answered from the other, without the picture."""
        if not self.label or not other.label:
            return True
        same = self.label == other.label and (self.in_general or other.in_general)
        return same or bool(self.boxes & other.boxes)


class Item:
    """An object with its box as it is written."""

    def __init__(self, item: LabelledObject, picture: Picture) -> None:
        self.label, self.area = item.label, item.area
        exact = Box.from_polygon(item.outline, picture.width, picture.height)
        self.text = exact.format()
        corners = exact.polygon(picture.width, picture.height)
        written = Box.parse(self.text).polygon(picture.width, picture.height)
        self.fit = polygon_iou(corners, written)
        """IoU of the written box with the exact one: what rounding to whole percent and degrees leaves."""
        x, y = corners.mean(axis=0)
        self.x, self.y = float(x) / picture.width, float(y) / picture.height

    @property
    def place(self) -> str:
        return place_name(self.x, self.y)


class Asker:
    """Asks about one picture. `rng` chooses what and how."""

    def __init__(
        self,
        picture: Picture,
        classes: Sequence[str],
        rng: np.random.Generator,
        max_objects: int,
        min_fit: float,
    ) -> None:
        """
        Args:
            classes: every class of the data set, for questions about what is not there.
            max_objects: above this number nobody is asked to count or to point at all of them.
            min_fit: least `Item.fit` of a box that is told.
        """
        self.picture, self.rng = picture, rng
        self.max_objects, self.min_fit = max_objects, min_fit
        self.items = sorted((Item(o, picture) for o in picture.asked), key=lambda i: (round(i.y, 1), i.x))
        self.groups: dict[str, list[Item]] = {}
        for item in self.items:
            self.groups.setdefault(item.label, []).append(item)
        self.known = [label for label in self.groups if label not in picture.unclear]
        self.absent = [
            label for label in classes if label not in self.groups and label not in picture.unclear
        ]
        self.found = [label for label in self.known if all(i.fit >= min_fit for i in self.groups[label])]
        """Classes of which every object can be pointed at."""

    def _pick(self, options: Sequence[Any]) -> Any:
        return options[int(self.rng.integers(len(options)))]

    def _shuffled(self, options: Sequence[Any]) -> list[Any]:
        return [options[i] for i in self.rng.permutation(len(options))]

    def refer_all(self) -> Iterator[Question]:
        """All objects of a class, in reading order."""
        for label in self._shuffled(self.found):
            items = self.groups[label]
            if 2 <= len(items) <= self.max_objects:
                yield self._located(
                    self._pick([count_phrase(len(items), label), f"all {plural(label)}"]), items
                )

    def refer_one(self) -> Iterator[Question]:
        """One object, named by a phrase that fits no other of its class."""
        clear = [(phrase, item) for label in self.known for phrase, item in self._names(self.groups[label])]
        for phrase, item in self._shuffled(clear):
            if item.fit >= self.min_fit:
                yield self._located(phrase, [item])

    def _names(self, items: list[Item]) -> Iterator[tuple[str, Item]]:
        label = items[0].label
        if len(items) == 1:
            yield label, items[0]
            return
        places = [item.place for item in items]
        yield from ((f"{label} at the {item.place}", item) for item in items if places.count(item.place) == 1)
        by_area = sorted(items, key=lambda item: item.area)
        if by_area[-1].area >= CLEARLY * by_area[-2].area:
            yield f"largest {label}", by_area[-1]
        if by_area[1].area >= CLEARLY * by_area[0].area:
            yield f"smallest {label}", by_area[0]

    def _located(self, phrase: str, items: list[Item]) -> Question:
        boxes = [item.text for item in items]
        return Question(self._pick(REFER).format(phrase), "".join(boxes), items[0].label, frozenset(boxes))

    def identify(self) -> Iterator[Question]:
        """The class of what a box holds."""
        for item in self._shuffled([item for item in self.items if item.fit >= self.min_fit]):
            answer = f"<p>{count_phrase(1, item.label)}</p>"
            question = self._pick(IDENTIFY).format(item.text)
            yield Question(question, answer, item.label, frozenset([item.text]))

    def grounding(self) -> Iterator[Question]:
        """A description that names all objects with their boxes; none where one would have to be left out."""
        complete = not self.picture.unclear and len(self.found) == len(self.groups)
        if complete and 1 <= len(self.items) <= self.max_objects:
            parts = [
                f"<p>{count_phrase(len(items), label)}</p> {DELIMITER.join(item.text for item in items)}"
                for label, items in self.groups.items()
            ]
            yield Question(self._pick(DESCRIPTIONS), f"The image shows {enumeration(parts)}.")

    def presence(self) -> Iterator[Question]:
        """By turns something that is there and something that is not: as many "yes" as "no"."""
        here, absent = self._shuffled(list(self.groups)), self._shuffled(self.absent)
        for pair in zip(here, absent, strict=False):
            for yes in self._shuffled([True, False]):
                label = pair[0 if yes else 1]
                ask = f"Is there {with_article(label)} in the image?\n{SHORT}"
                yield Question(ask, "yes" if yes else "no", label, in_general=True)

    def count(self) -> Iterator[Question]:
        """How many of a class; one time in eight of one that is not there."""
        for label in self._shuffled(self.known):
            if self.absent and self.rng.random() < 1 / 8:
                yield self._counted(self._pick(self.absent), 0)
            if len(self.groups[label]) <= self.max_objects:
                yield self._counted(label, len(self.groups[label]))

    def _counted(self, label: str, number: int) -> Question:
        text = f"How many {plural(label)} are there in the image?\n{SHORT}"
        return Question(text, str(number), label, in_general=True)


TASKS: dict[str, Callable[[Asker], Iterator[Question]]] = {
    "refer-all": Asker.refer_all,
    "refer-one": Asker.refer_one,
    "identify": Asker.identify,
    "grounding": Asker.grounding,
    "presence": Asker.presence,
    "count": Asker.count,
}


def ask(asker: Asker, tasks: Sequence[str], most: int) -> list[Question]:
    """Up to `most` different questions of every task, in random order."""
    questions: dict[str, Question] = {}
    for task in tasks:
        before = len(questions)
        for question in TASKS[task](asker):
            questions.setdefault(question.text, question)
            if len(questions) - before == most:
                break
    return [list(questions.values())[i] for i in asker.rng.permutation(len(questions))]


def conversations(questions: Sequence[Question], turns: int) -> list[list[Question]]:
    """Questions in conversations of up to `turns`, in which every answer has to come from the picture."""
    made: list[list[Question]] = []
    for question in questions:
        for talk in made:
            if len(talk) < turns and not any(question.spoils(other) for other in talk):
                talk.append(question)
                break
        else:
            made.append([question])
    return made
