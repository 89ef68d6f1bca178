"""Chat templates: one Jinja text per format, which renders the prompt and marks what is supervised in the same walk.

The text travels with the checkpoint (`chat_template.jinja`) and renders alike in transformers, whose
`{% generation %}` blocks say which characters are the assistant's. Here the same blocks put two marks around them, so
that prompt and supervision cannot disagree. `bos_token` is left empty when we render: the encoder writes that id.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import Any, NamedTuple

from jinja2 import Template as JinjaTemplate
from jinja2 import TemplateError, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from geochat.data import template_texts as texts
from geochat.data.sample import IMAGE_TOKEN, Turn

# Two of Unicode's "noncharacters", which no text exchanged between programs may hold.
_OPEN, _CLOSE = "\ufdd0", "\ufdd1"


class Segment(NamedTuple):
    """A stretch of the rendered conversation; one image is a segment whose text is `IMAGE_TOKEN`."""

    text: str
    supervised: bool


@dataclass(frozen=True)
class Template:
    """A chat format: how turns become text, and the strings that end an answer."""

    name: str
    jinja: str
    stop: tuple[str, ...]
    """Special tokens after which generation ends."""
    verbatim: bool = False
    """Whether the text of a turn is put in as it is and decides nothing else, so that one rendering serves all
    conversations with as many turns."""

    def __post_init__(self) -> None:
        _compiled(self.jinja, self.name)  # a broken template fails here, not at the first conversation

    @classmethod
    def from_jinja(cls, text: str, name: str = "checkpoint", stop: Sequence[str] = ()) -> Template:
        """The template a checkpoint brings along; one of ours keeps its name and its stop strings.

        Raises:
            ValueError: the text is not valid Jinja.
        """
        for known in TEMPLATES.values():
            if known.jinja.strip() == text.strip():
                return known
        return cls(name, text, tuple(stop))

    def render(self, turns: Sequence[Turn], add_generation_prompt: bool = False) -> str:
        """The whole conversation as text, without the beginning-of-sequence token."""
        return self._marked_text(turns, add_generation_prompt).replace(_OPEN, "").replace(_CLOSE, "")

    def segments(self, turns: Sequence[Turn], add_generation_prompt: bool = False) -> list[Segment]:
        """The rendered text cut at images and where supervision begins and ends; joined, it is `render`.

        Raises:
            ValueError: the template fails on these turns, or a turn holds one of the two marks.
        """
        segments: list[Segment] = []
        for k, stretch in enumerate(self._marked_text(turns, add_generation_prompt).split(_OPEN)):
            inside, closed, outside = stretch.partition(_CLOSE) if k else ("", "", stretch)
            if k and not closed:  # a {% break %} left the block
                inside, outside = "", inside
            for text, supervised in ((inside, True), (outside, False)):
                for number, part in enumerate(text.split(IMAGE_TOKEN)):
                    if number:
                        segments.append(Segment(IMAGE_TOKEN, False))
                    if part:
                        segments.append(Segment(part, supervised))
        return segments

    def supervises(self) -> bool:
        """Whether the template says which characters are the assistant's; without that it can only prompt."""
        return "generation" in _tags(self.jinja)

    def _marked_text(self, turns: Sequence[Turn], add_generation_prompt: bool) -> str:
        for number, turn in enumerate(turns):
            if _OPEN in turn.text or _CLOSE in turn.text:
                raise ValueError(
                    f"turn {number} holds U+FDD0 or U+FDD1, which are no characters: remove them"
                )
        if not self.verbatim:
            return self._run([(turn.role, turn.text) for turn in turns], add_generation_prompt)
        parts = _skeleton(self, tuple([turn.role for turn in turns]), add_generation_prompt)
        return "".join([part if isinstance(part, str) else turns[part].text for part in parts])

    def _run(self, turns: Sequence[tuple[str, str]], add_generation_prompt: bool) -> str:
        contents = [_parts(text) if _wants_parts(self) else text for _, text in turns]
        messages = [{"role": role, "content": own} for (role, _), own in zip(turns, contents, strict=True)]
        return self._fill(messages, add_generation_prompt)

    def _fill(self, messages: list[dict[str, Any]], add_generation_prompt: bool) -> str:
        try:
            return _compiled(self.jinja, self.name).render(
                messages=messages,
                add_generation_prompt=add_generation_prompt,
                bos_token="",
                eos_token=self.stop[0] if self.stop else "",
            )
        except (TemplateError, TypeError) as error:
            raise ValueError(f"chat template {self.name!r}: {error}") from None


@lru_cache(maxsize=64)
def _wants_parts(template: Template) -> bool:
    """Whether the template reads a turn as a list of parts, as llava-hf's does: a plain text would be lost in it."""
    probe = "what is said"
    try:
        return probe not in template._fill([{"role": "user", "content": probe}], True) and (
            probe in template._fill([{"role": "user", "content": _parts(probe)}], True)
        )
    except ValueError:
        return False


def _parts(text: str) -> list[dict[str, str]]:
    """A turn's text as images and one text; a template of this kind writes the images itself."""
    images = [{"type": "image"}] * text.count(IMAGE_TOKEN)
    said = text.replace(f"{IMAGE_TOKEN}\n", "").replace(IMAGE_TOKEN, "")
    return [*images, {"type": "text", "text": said}]


@lru_cache(maxsize=256)
def _skeleton(template: Template, roles: tuple[str, ...], add_generation_prompt: bool) -> list[str | int]:
    """What a verbatim template writes between the turns' texts; a number is the place of that turn's text."""
    marked = template._run(
        [(role, f"{_OPEN}{i}{_CLOSE}") for i, role in enumerate(roles)], add_generation_prompt
    )
    parts = re.split(f"{_OPEN}([0-9]+){_CLOSE}", marked)
    return [int(part) if k % 2 else part for k, part in enumerate(parts) if part]


class _Generation(Extension):
    """`{% generation %} … {% endgeneration %}`: the body between two marks."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> nodes.Node | list[nodes.Node]:
        """Read the block, as the Jinja extension interface asks."""
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        opened, closed = (nodes.Output([nodes.TemplateData(mark)]) for mark in (_OPEN, _CLOSE))
        return [opened.set_lineno(line), *body, closed]


def get_template(name: str) -> Template:
    """One of `TEMPLATES`; ValueError names those that exist. LLaVA's `v1` is `vicuna_v1`."""
    template = TEMPLATES.get({"v1": "vicuna_v1"}.get(name, name))
    if template is None:
        raise ValueError(f"unknown chat template {name!r}; known are {', '.join(sorted(TEMPLATES))}")
    return template


def _raise(message: str) -> None:
    raise TemplateError(message)


@lru_cache(maxsize=1)
def _environment() -> ImmutableSandboxedEnvironment:
    # The settings of transformers, or whitespace would differ; sandboxed, since a checkpoint brings its template.
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
    )
    environment.globals["raise_exception"] = _raise
    return environment


@lru_cache(maxsize=64)
def _compiled(jinja: str, name: str) -> JinjaTemplate:
    try:
        return _environment().from_string(jinja)
    except TemplateError as error:
        raise ValueError(f"chat template {name!r} is not valid Jinja: {error}") from None


@lru_cache(maxsize=64)
def _tags(jinja: str) -> frozenset[str]:
    """Names that open a `{% … %}` block."""
    tokens = [(kind, value) for _, kind, value in _environment().lex(jinja) if kind != "whitespace"]
    return frozenset(
        value for (before, _), (kind, value) in pairwise(tokens) if before == "block_begin" and kind == "name"
    )


TEMPLATES: dict[str, Template] = {
    template.name: template
    for template in (
        Template("vicuna_v1", texts.VICUNA_V1, ("</s>",), verbatim=True),
        Template("llava_v1", texts.LLAVA_V1, ("</s>",), verbatim=True),
        Template("plain", texts.PLAIN, ("</s>",)),
        Template("internlm2_chat", texts.INTERNLM2_CHAT, ("<|im_end|>",), verbatim=True),
        Template("llama_3", texts.LLAMA_3, ("<|eot_id|>",), verbatim=True),
        Template("chatml", texts.CHATML, ("<|im_end|>",), verbatim=True),
    )
}
