"""Models of other shapes than `tiny_model`, questions of every kind, and what transformers' own `generate` answers."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")

from transformers import GenerationConfig, LlavaForConditionalGeneration  # noqa: E402

from geochat.chat.engine import Chat, Request  # noqa: E402
from geochat.chat.sampling import Settings  # noqa: E402
from geochat.data.images import open_image  # noqa: E402

QUESTIONS = [
    "Is there a ship in the image?",
    "How many ships are there?",
    "[refer] where is <p>the red ship</p> ?",
    "Classify the given image in one of the following classes. Classes: harbour, desert",
    "Describe the image in detail. " * 6,
]


@pytest.fixture(scope="session")
def chat(tiny_model: Path) -> Chat:
    return Chat.load(tiny_model, device="cpu")


@pytest.fixture(scope="session")
def grouped(chat: Chat) -> Chat:
    """Two key-value heads for four heads, features of two layers, InternLM2's template, stretched rotations."""
    config = copy.deepcopy(chat.model.config)
    config.text_config.num_key_value_heads = 2
    config.text_config.rope_parameters = {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e6}
    config.vision_feature_layer = [1, 3]
    torch.manual_seed(5)
    model = LlavaForConditionalGeneration(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, 0.1)
    return Chat(model, chat.processor.with_template("internlm2_chat"))


@pytest.fixture(scope="session")
def requests(tiny_records) -> list[Request]:
    """Many questions a picture, none without one, two pictures, one picture twice, a second turn."""
    images = sorted(tiny_records.image_folder.iterdir())
    asked = [Request.ask(question, image) for image in images for question in QUESTIONS]
    asked.append(Request.ask("What does an infrared band show?"))
    asked.append(Request.ask("What differs between the two?", images[0], images[1]))
    asked.append(Request.ask("What differs?", images[0], images[1]))
    asked.append(Request.ask("What differs?", images[2], images[2]))
    asked.append(Request.ask(QUESTIONS[0], images[0]).follow("yes", "How many?"))
    return asked


@pytest.fixture(scope="session")
def generated() -> Callable[[Chat, Request, int], tuple[int, ...]]:
    """New tokens of one request by transformers' `generate` over pixels: greedy, one at a time, without the stop."""

    def run(chat: Chat, request: Request, max_new_tokens: int) -> tuple[int, ...]:
        row = chat.row(request, Settings(max_new_tokens))
        ids = torch.from_numpy(row.prompt.ids.astype("int64"))[None]
        pixels = [chat.processor.pixels(open_image(picture)) for picture in request.images]
        with torch.inference_mode():
            output = chat.model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                **({"pixel_values": torch.stack(pixels)} if pixels else {}),
                generation_config=GenerationConfig(
                    do_sample=False,
                    max_new_tokens=row.budget,
                    pad_token_id=chat.processor.pad_token_id,
                    eos_token_id=list(chat._stops),
                    suppress_tokens=chat._silent,
                ),
            )
        new = output[0, ids.shape[1] :].tolist()
        end = next((i for i, token in enumerate(new) if token in chat._stops), len(new))
        return tuple(new[:end])

    return run
