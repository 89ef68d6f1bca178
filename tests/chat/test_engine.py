"""Asking, streaming and refusals on a tiny random model in float32."""

from __future__ import annotations

from pathlib import Path

import pytest

torch = pytest.importorskip("torch")

from PIL import Image  # noqa: E402

from geochat.chat.engine import Chat, Request  # noqa: E402
from geochat.chat.sampling import Settings  # noqa: E402
from geochat.data.sample import Turn  # noqa: E402
from tests.chat.conftest import QUESTIONS  # noqa: E402


def test_an_image_is_encoded_once_for_all_its_questions(
    chat: Chat, tiny_records, monkeypatch: pytest.MonkeyPatch
) -> None:
    image = Image.open(tiny_records.image_folder / "wide.jpg").convert("RGB")
    again = image.copy()
    seen: list[int] = []
    original = chat.model.get_image_features

    def counted(pixel_values, **options):
        seen.append(len(pixel_values))
        return original(pixel_values=pixel_values, **options)

    monkeypatch.setattr(chat.model, "get_image_features", counted)
    fresh = Chat(chat.model, chat.processor)
    fresh.answer([Request.ask(question, image) for question in QUESTIONS], max_new_tokens=2)
    assert seen == [1]
    fresh.answer([Request.ask(QUESTIONS[0], again)], max_new_tokens=2)  # equal pixels, another object
    assert seen == [1]


def test_the_feature_cache_is_bounded(chat: Chat, tiny_records) -> None:
    requests = [Request.ask("What?", image) for image in sorted(tiny_records.image_folder.iterdir())]
    one_image = 36 * 64 * 4  # tokens, hidden size, bytes of a float32
    small = Chat(chat.model, chat.processor, cache_bytes=2 * one_image + 1, prefix_bytes=0)
    assert small.answer(requests, max_new_tokens=2) == chat.answer(requests, max_new_tokens=2)
    assert len(small._pictures._features) == 2


def test_stream_is_the_answer_in_pieces(chat: Chat, requests: list[Request]) -> None:
    for request in requests[:6]:
        pieces = list(chat.stream(request, max_new_tokens=16))
        assert "".join(pieces) == chat.answer([request], max_new_tokens=16)[0].text
        assert all(pieces)


def test_a_closed_stream_stops_the_model(chat: Chat, requests: list[Request]) -> None:
    stream = chat.stream(requests[0], max_new_tokens=2000)
    next(stream)
    stream.close()
    assert chat.answer([requests[0]], max_new_tokens=2)[0].token_ids


def test_the_checkpoints_generation_config_changes_nothing(chat: Chat, requests: list[Request]) -> None:
    before = chat.answer(requests[:3], max_new_tokens=8)
    kept = chat.model.generation_config
    try:
        chat.model.generation_config = type(kept)(
            do_sample=True,
            temperature=5.0,
            top_k=3,
            repetition_penalty=9.0,
            num_beams=1,
            max_length=20,
            min_length=9,
        )
        assert chat.answer(requests[:3], max_new_tokens=8) == before
    finally:
        chat.model.generation_config = kept


def test_sampling_is_reproducible_under_a_seed(chat: Chat, requests: list[Request]) -> None:
    texts = []
    for _ in range(2):
        torch.manual_seed(3)
        texts.append(chat.answer(requests[:2], max_new_tokens=8, temperature=1.5, top_p=0.9))
    assert texts[0] == texts[1]


def test_the_context_bounds_the_answer(chat: Chat, requests: list[Request], monkeypatch) -> None:
    length = len(chat.row(requests[0], Settings()).prompt.ids)
    monkeypatch.setattr(chat, "context", length + 3)
    mixed = [requests[0], Request.ask("What?")]
    answers = chat.answer(mixed, max_new_tokens=10)
    assert len(answers[0].token_ids) <= 3
    assert answers[1] == chat.answer([mixed[1]], max_new_tokens=10)[0]
    monkeypatch.setattr(chat, "context", length)
    with pytest.raises(ValueError, match=r"request 1: .* tokens leave no room"):
        chat.answer([mixed[1], requests[0]])


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (Request((), (Turn("user", "a"), Turn("assistant", "b"))), "last turn must be the user's"),
        (Request((), ()), "last turn must be the user's"),
        (Request(("x.png",), (Turn("user", "a"),)), "0 <image> in the text for 1 images"),
        (Request.ask("a", "nowhere/x.png"), "nowhere/x.png: cannot be read"),
    ],
)
def test_refusals_name_the_request(chat: Chat, request_: Request, message: str) -> None:
    with pytest.raises(ValueError, match="request 0: .*" + message):
        chat.answer([request_])


def test_unreadable_image(chat: Chat, tmp_path: Path) -> None:
    (tmp_path / "bad.png").write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"bad\.png: not an image file"):
        chat.answer([Request.ask("What?", tmp_path / "bad.png")])


def test_one_bad_request_does_not_stop_the_others(chat: Chat, requests: list[Request]) -> None:
    mixed = [requests[0], Request.ask("a", "nowhere/x.png"), requests[1]]
    first, bad, last = chat.answer_each(mixed, max_new_tokens=4)
    assert [first, last] == chat.answer(requests[:2], max_new_tokens=4)
    assert isinstance(bad, ValueError)
    assert str(bad) == "nowhere/x.png: cannot be read (No such file or directory)"


def test_settings_out_of_range(chat: Chat, requests: list[Request]) -> None:
    for options in ({"max_new_tokens": 0}, {"temperature": -1.0}, {"temperature": 1.0, "top_p": 0.0}):
        with pytest.raises(ValueError, match=r"must|lies"):
            chat.answer(requests[:1], **options)


def test_no_token_without_text_is_said(chat: Chat) -> None:
    rows = chat.model.get_input_embeddings().weight.shape[0]
    assert {chat.processor.image_token_id, chat.processor.pad_token_id, rows - 1} <= set(chat._silent)
    assert not set(chat._silent) & set(chat._stops)


def test_nan_is_an_error_not_an_answer(chat: Chat, requests: list[Request]) -> None:
    head = chat.model.lm_head.weight
    kept = head.detach().clone()
    try:
        head.data.fill_(float("nan"))
        with pytest.raises(RuntimeError, match="not numbers"):
            chat.answer(requests[:1])
    finally:
        head.data.copy_(kept)


def test_load_refuses(tiny_model: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="choose one"):
        Chat.load(tiny_model, load_4bit=True, load_8bit=True)
    with pytest.raises(ValueError, match="not available"):
        Chat.load(tiny_model, device="tpu")
    with pytest.raises(ValueError, match="no checkpoint there"):
        Chat.load(tmp_path, device="cpu")


def test_adapters_stay_active(tiny_model: Path, requests: list[Request]) -> None:
    from geochat.model.adapter import AdapterSpec, attach
    from geochat.model.checkpoint import load

    model, processor = load(tiny_model)
    peft = attach(model, AdapterSpec(r=4, alpha=8, dropout=0.0, use_dora=False, train_projector=True))
    untrained = Chat(peft, processor).answer(requests[:5], max_new_tokens=8)
    with torch.no_grad():
        for name, parameter in peft.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.5, generator=torch.Generator().manual_seed(1))
    adapted = Chat(peft, processor).answer(requests[:5], max_new_tokens=8)
    assert adapted != untrained
    merged = Chat(peft.merge_and_unload(), processor).answer(requests[:5], max_new_tokens=8)
    assert merged == adapted
