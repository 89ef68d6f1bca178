"""Chat templates: what they write, what they mark, and that transformers renders the same."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from geochat.data.sample import IMAGE_TOKEN, Sample, Turn
from geochat.data.template_texts import VICUNA_SYSTEM
from geochat.data.templates import TEMPLATES, Segment, Template, get_template

DIALOGUE = (
    Turn("user", "<image>\nWhat is this?"),
    Turn("assistant", "A ship."),
    Turn("user", "And where?"),
    Turn("assistant", "{<1><2><3><4>|<5>}"),
)

texts = st.text(max_size=30).filter(lambda text: not set(text) & {"\ufdd0", "\ufdd1"})
turns = st.lists(st.tuples(texts, texts), min_size=1, max_size=4).map(
    lambda pairs: [turn for q, a in pairs for turn in (Turn("user", q), Turn("assistant", a))]
)


def messages(turns: list[Turn]) -> list[dict]:
    return [{"role": turn.role, "content": turn.text} for turn in turns]


def test_vicuna_writes_llavas_prompt():
    assert get_template("vicuna_v1").render(DIALOGUE) == (
        f"{VICUNA_SYSTEM} USER: <image>\nWhat is this? ASSISTANT: A ship.</s>"
        "USER: And where? ASSISTANT: {<1><2><3><4>|<5>}</s>"
    )
    assert get_template("vicuna_v1").render(DIALOGUE[:1], add_generation_prompt=True).endswith("? ASSISTANT:")


def test_plain_keeps_the_image_and_the_caption_only():
    assert get_template("plain").segments(DIALOGUE[:2]) == [
        Segment(IMAGE_TOKEN, False),
        Segment("A ship.\n", True),
    ]


def test_internlm2_has_no_system_prompt():
    assert get_template("internlm2_chat").render(DIALOGUE[:2]) == (
        "<|im_start|>user\n<image>\nWhat is this?<|im_end|>\n<|im_start|>assistant\nA ship.<|im_end|>\n"
    )


def test_llama_3():
    header = "<|start_header_id|>{}<|end_header_id|>\n\n"
    assert get_template("llama_3").render(DIALOGUE[:2], add_generation_prompt=True) == (
        header.format("user")
        + "<image>\nWhat is this?<|eot_id|>"
        + header.format("assistant")
        + "A ship.<|eot_id|>"
        + header.format("assistant")
    )


def test_chatml_begins_with_its_system_prompt():
    assert (
        get_template("chatml")
        .render(DIALOGUE[:1])
        .startswith("<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n<image>\n")
    )


@pytest.mark.parametrize("name", sorted(TEMPLATES))
def test_answers_and_their_end_are_supervised(name: str):
    template = get_template(name)
    supervised = "".join(segment.text for segment in template.segments(DIALOGUE) if segment.supervised)
    end = "\n" if name == "plain" else template.stop[0]
    space = " " if name in ("vicuna_v1", "llava_v1") else ""
    assert supervised == f"{space}A ship.{end}{space}{{<1><2><3><4>|<5>}}{end}"


@pytest.mark.parametrize("name", sorted(TEMPLATES))
@given(turns=turns, prompt=st.booleans())
def test_segments_join_to_the_rendered_text(name: str, turns: list[Turn], prompt: bool):
    template = get_template(name)
    rendered = template.render(turns, prompt)
    assert "".join(segment.text for segment in template.segments(turns, prompt)) == rendered
    # Whatever a text holds, the quick way of a verbatim template and Jinja itself agree.
    slow = Template(name, template.jinja, template.stop)
    assert slow.render(turns, prompt) == rendered
    assert slow.segments(turns, prompt) == template.segments(turns, prompt)


@pytest.mark.parametrize("name", sorted(TEMPLATES))
@given(turns=turns, prompt=st.booleans())
def test_transformers_renders_the_same(name: str, turns: list[Turn], prompt: bool):
    chat = pytest.importorskip("transformers.utils.chat_template_utils")
    rendered, spans = chat.render_jinja_template(
        [messages(turns)],
        chat_template=get_template(name).jinja,
        add_generation_prompt=prompt,
        return_assistant_tokens_mask=True,
        bos_token="",
    )
    template = get_template(name)
    assert rendered[0] == template.render(turns, prompt)
    marked = "".join(rendered[0][start:end] for start, end in spans[0])
    ours = "".join(part.text for part in template.segments(turns, prompt) if part.supervised)
    assert marked.replace(IMAGE_TOKEN, "") == ours


@pytest.mark.parametrize("name", sorted(TEMPLATES))
def test_parts_are_rendered_as_text_is(name: str):
    chat = pytest.importorskip("transformers.utils.chat_template_utils")
    parts = [
        {"role": "user", "content": [{"type": "text", "text": "What is this?"}, {"type": "image"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "A ship."}]},
    ]
    rendered, _ = chat.render_jinja_template([parts], chat_template=get_template(name).jinja, bos_token="<s>")
    assert rendered[0] == "<s>" + get_template(name).render(DIALOGUE[:2])


@pytest.mark.parametrize("name", ["vicuna_v1", "internlm2_chat", "llama_3", "chatml"])
def test_a_system_message_replaces_the_default(name: str):
    chat = pytest.importorskip("transformers.utils.chat_template_utils")
    told = [{"role": "system", "content": "Be brief."}, *messages(list(DIALOGUE[:2]))]
    rendered, _ = chat.render_jinja_template([told], chat_template=get_template(name).jinja, bos_token="")
    assert "Be brief." in rendered[0]
    assert VICUNA_SYSTEM not in rendered[0]
    assert "helpful assistant" not in rendered[0]


def test_the_golden_prompts(assets: Path):
    template = get_template("vicuna_v1")
    for row in json.loads(
        (assets / "golden/expected/geochat/conversations.json").read_text(encoding="utf-8")
    ):
        assert template.render(Sample.from_record(row).turns) == row["prompt"]


def test_an_unknown_name_lists_the_known():
    with pytest.raises(
        ValueError, match=r"'vicuna'; known are chatml, internlm2_chat, llama_3, llava_v1, plain, vicuna_v1"
    ):
        get_template("vicuna")
    assert get_template("v1") is get_template("vicuna_v1")


def test_geochats_own_conversation_mode():
    """Its scripts prompt with "human" where its training says "user"; all else is the same."""
    trained, asked = (get_template(name).render(DIALOGUE) for name in ("vicuna_v1", "llava_v1"))
    assert asked != trained
    assert asked == trained.replace("curious user", "curious human").replace("the user's", "the human's")


def test_a_checkpoints_own_template():
    known = get_template("llama_3")
    assert Template.from_jinja(known.jinja + "\n") is known
    foreign = Template.from_jinja(
        "{% for m in messages %}[{{ m['content'] | trim }}]{{ eos_token }}{% endfor %}", stop=("</s>",)
    )
    assert foreign.render([Turn("user", " hi ")]) == "[hi]</s>"
    assert not foreign.supervises()
    assert known.supervises()
    assert foreign.name == "checkpoint"


LLAVA_HF = (
    "{% for message in messages %}{% if message['role'] != 'system' %}{{ message['role'].upper() + ': ' }}{% endif %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}{{ '<image>\n' }}{% endfor %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}{{ content['text'] + ' ' }}"
    "{% endfor %}{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
"""In the manner of the published llava-hf checkpoints: a turn is a list of parts."""


def test_a_template_that_wants_parts_gets_them():
    template = Template.from_jinja(LLAVA_HF)
    assert (
        template.render(DIALOGUE[:1], add_generation_prompt=True) == "USER: <image>\nWhat is this? ASSISTANT:"
    )
    assert template.segments(DIALOGUE[:1], True)[1] == Segment(IMAGE_TOKEN, False)


def test_a_broken_template_fails_when_it_is_read():
    with pytest.raises(ValueError, match="not valid Jinja"):
        Template.from_jinja("{% for %}")


@pytest.mark.parametrize(
    "jinja", ["{{ raise_exception('no system role') }}", "{{ messages[9]['role']['x'] }}"]
)
def test_a_template_that_fails_on_a_conversation(jinja: str):
    with pytest.raises(ValueError, match="chat template 'checkpoint'"):
        Template.from_jinja(jinja).render(DIALOGUE)


def test_a_template_cannot_reach_python():
    with pytest.raises(ValueError, match="chat template 'checkpoint'"):
        Template.from_jinja("{{ ''.__class__.__mro__[1].__subclasses__() }}").render(DIALOGUE)


def test_the_marks_are_refused_in_a_text():
    with pytest.raises(ValueError, match=r"turn 0 holds U\+FDD0"):
        get_template("vicuna_v1").render([Turn("user", "a\ufdd0b")])


def test_templates_can_be_pickled():
    template = Template.from_jinja("{{ messages[0]['content'] }}")
    assert pickle.loads(pickle.dumps(template)) == template
