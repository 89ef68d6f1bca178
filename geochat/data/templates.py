"""Chat templates: one Jinja text per format, which renders the prompt and marks what is supervised in the same walk.

The text travels with the checkpoint (`chat_template.jinja`) and renders alike in transformers, whose
`{% generation %}` blocks say which characters are the assistant's. Here the same blocks put two marks around them, so
that prompt and supervision cannot disagree. `bos_token` is left empty when we render: the encoder writes that id.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import pairwise

from jinja2 import TemplateError, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from geochat.data.sample import IMAGE_TOKEN, Turn

# Two of Unicode's "noncharacters", which no text exchanged between programs may hold.
_OPEN, _CLOSE = "\ufdd0", "\ufdd1"

VICUNA_SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)

# Messages come as plain text (ours, with the marks already in front) or as a list of parts (what transformers'
# processors and OpenAI clients send); the macro makes the two the same.
_TEXT = """\
{%- macro text_of(message) -%}
{%- if message['content'] is string -%}
{{- message['content'] -}}
{%- else -%}
{%- for part in message['content'] if part['type'] in ['image', 'image_url'] -%}
{{- '<image>\\n' -}}
{%- endfor -%}
{%- for part in message['content'] if part['type'] == 'text' -%}
{{- part['text'] -}}
{%- endfor -%}
{%- endif -%}
{%- endmacro -%}
"""

_VICUNA = (
    _TEXT
    + """\
{{- bos_token -}}
{%- if messages[0]['role'] == 'system' -%}
{{- text_of(messages[0]) + ' ' -}}
{%- else -%}
{{- \""""
    + VICUNA_SYSTEM
    + """ " -}}
{%- endif -%}
{%- for message in messages -%}
{%- if message['role'] == 'user' -%}
{{- 'USER: ' + text_of(message) + ' ' -}}
{%- elif message['role'] == 'assistant' -%}
{{- 'ASSISTANT:' -}}
{%- generation -%}
{{- ' ' + text_of(message) + '</s>' -}}
{%- endgeneration -%}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{- 'ASSISTANT:' -}}
{%- endif -%}
"""
)

# LLaVA's stage 1: the question is dropped, the caption follows the image directly.
_PLAIN = (
    _TEXT
    + """\
{{- bos_token -}}
{%- for message in messages -%}
{%- if message['role'] == 'user' -%}
{{- '<image>' * text_of(message).count('<image>') -}}
{%- elif message['role'] == 'assistant' -%}
{%- generation -%}
{{- text_of(message) + '\\n' -}}
{%- endgeneration -%}
{%- endif -%}
{%- endfor -%}
"""
)


def _marked(start: str, after_role: str, end: str, between: str, system: str = "") -> str:
    """The family that opens and closes every turn with special tokens."""
    default = ""
    if system:
        default = f"""\
{{%- if messages[0]['role'] != 'system' -%}}
{{{{- '{start}system{after_role}{system}{end}{between}' -}}}}
{{%- endif -%}}
"""
    return f"""\
{_TEXT}{{{{- bos_token -}}}}
{default}{{%- for message in messages -%}}
{{%- if message['role'] == 'assistant' -%}}
{{{{- '{start}assistant{after_role}' -}}}}
{{%- generation -%}}
{{{{- text_of(message) + '{end}' -}}}}
{{%- endgeneration -%}}
{{{{- '{between}' -}}}}
{{%- else -%}}
{{{{- '{start}' + message['role'] + '{after_role}' + text_of(message) + '{end}{between}' -}}}}
{{%- endif -%}}
{{%- endfor -%}}
{{%- if add_generation_prompt -%}}
{{{{- '{start}assistant{after_role}' -}}}}
{{%- endif -%}}
"""


@dataclass(frozen=True, slots=True)
class Segment:
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
    _render: Callable[..., str] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_render", _compiled(self.jinja, self.name))

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

    def __reduce__(self) -> tuple[type[Template], tuple[str, str, tuple[str, ...]]]:
        return type(self), (self.name, self.jinja, self.stop)

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
            if k and not closed:
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
        messages = [{"role": turn.role, "content": turn.text} for turn in turns]
        try:
            return self._render(
                messages=messages,
                add_generation_prompt=add_generation_prompt,
                bos_token="",
                eos_token=self.stop[0] if self.stop else "",
            )
        except (TemplateError, TypeError) as error:
            raise ValueError(f"chat template {self.name!r}: {error}") from None


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
def _compiled(jinja: str, name: str) -> Callable[..., str]:
    try:
        return _environment().from_string(jinja).render
    except TemplateError as error:
        raise ValueError(f"chat template {name!r} is not valid Jinja: {error}") from None


@lru_cache(maxsize=64)
def _tags(jinja: str) -> frozenset[str]:
    """Names that open a `{% … %}` block."""
    tokens = [(kind, value) for _, kind, value in _environment().lex(jinja) if kind != "whitespace"]
    return frozenset(
        value for (before, _), (kind, value) in pairwise(tokens) if before == "block_begin" and kind == "name"
    )


_LLAMA_3 = _marked("<|start_header_id|>", "<|end_header_id|>\\n\\n", "<|eot_id|>", "")
_CHATML = _marked("<|im_start|>", "\\n", "<|im_end|>", "\\n", system="You are a helpful assistant.")
_INTERNLM2 = _marked("<|im_start|>", "\\n", "<|im_end|>", "\\n")

TEMPLATES: dict[str, Template] = {
    template.name: template
    for template in (
        Template("vicuna_v1", _VICUNA, ("</s>",)),
        Template("plain", _PLAIN, ("</s>",)),
        Template("internlm2_chat", _INTERNLM2, ("<|im_end|>",)),
        Template("llama_3", _LLAMA_3, ("<|eot_id|>",)),
        Template("chatml", _CHATML, ("<|im_end|>",)),
    )
}
