"""What geochat answers in float32: pictures, prompts, ids, image features and greedy tokens for llama.cpp to match.

    python scripts/gguf/expected.py --model playground/nano --out DIR [--scenes 3]

Writes DIR/f32, DIR/f16, DIR/bf16 (the model as GGUF), DIR/odd (another model, random, of every feature that the format
has), DIR/*.png, DIR/*.npy and DIR/expected.json. See scripts/check_gguf.sh.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from geochat.chat.engine import Chat
from geochat.chat.request import Request
from geochat.data.sample import IMAGE_TOKEN
from geochat.data.synthetic import draw_scene
from geochat.model.canonical import expected_shapes, instantiate
from geochat.model.checkpoint import read_checkpoint
from geochat.model.convert import Source, convert
from geochat.model.export_gguf import write_gguf
from geochat.model.processor import PAD_COLOUR
from geochat.model.weights import of_tensor

FIRST_SEED = 7_000_000
QUESTIONS = (
    "[grounding] Describe the image in detail.",
    "Is there a ship in the image?\nAnswer the question using a single word or phrase.",
)
FOLLOWED = ("Describe the image.", "A harbour.", "How many ships are there in the image?")
TEXT_ONLY = (
    "Is there a ship in the image?",
    "[grounding] Describe the image in detail.",
    "What is a runway?",
)
NEW_TOKENS = 120


def shapes(seed: int, size: int) -> dict[str, tuple[Image.Image, Image.Image]]:
    """One scene in several shapes: what geochat is shown, and what llama.cpp is shown.

    exact: of the model's own size; square: to be made smaller; wide, tall: not square; padded: "wide", which llama.cpp
    gets on a square of the padding colour.
    """
    large = draw_scene(seed, side=2 * size).image
    wide, tall = large.crop((0, 11, 2 * size, size + 44)), large.crop((13, 0, size + 24, 2 * size))
    padded = Image.new("RGB", (wide.width, wide.width), PAD_COLOUR)
    padded.paste(wide, (0, (wide.width - wide.height) // 2))
    exact = draw_scene(seed, side=size).image
    alike = {"exact": exact, "square": large, "wide": wide, "tall": tall}
    return {**{shape: (image, image) for shape, image in alike.items()}, "padded": (wide, padded)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, default=Path("playground/nano"))
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--scenes", type=int, default=3)
    arguments = parser.parse_args()
    out: Path = arguments.out
    for name, dtype in (("f32", torch.float32), ("f16", torch.float16), ("bf16", torch.bfloat16)):
        convert(Source(arguments.model), out / name, "gguf", dtype=dtype, progress=False)
    chat = Chat.load(arguments.model, device="cpu", dtype=torch.float32)
    size = chat.processor.image_size
    requests: list[tuple[str, str | None, Request]] = []
    for number in range(arguments.scenes):
        for shape, (image, shown) in shapes(FIRST_SEED + number, size).items():
            file = f"{shape}-{number}.png"
            shown.save(out / file)
            requests += [(shape, file, Request.ask(question, image)) for question in QUESTIONS]
            first = Request.ask(FOLLOWED[0], image)
            requests.append((shape, file, first.follow(*FOLLOWED[1:])))
            features(chat, image, out / f"{shape}-{number}.npy")
    requests += [("text", None, Request.ask(question)) for question in TEXT_ONLY]
    answers = chat.answer([request for *_, request in requests], max_new_tokens=NEW_TOKENS)
    rows = [
        {
            "shape": shape,
            "image": file,
            "question": request.turns[-1].text.removeprefix(f"{IMAGE_TOKEN}\n")
            if len(request.turns) == 1
            else None,
            "prompt": chat.processor.template.render(request.turns, add_generation_prompt=True),
            "ids": prompt_ids(chat, request),
            "answer": list(answer.token_ids),
            "finished": answer.finished,
            "text": answer.text,
        }
        for (shape, file, request), answer in zip(requests, answers, strict=True)
    ]
    facts = {"image_token": IMAGE_TOKEN, "new_tokens": NEW_TOKENS, "rows": rows}
    facts["odd"] = odd(arguments.model, out)
    (out / "expected.json").write_text(json.dumps(facts, indent=1))
    print(f"{out}: {len(rows)} questions")


def odd(model: Path, out: Path) -> dict[str, list]:
    """A random model with grouped heads of another width, biases, stretched rotations and features of three layers.

    Returns a text's ids and logits; its features of exact-0.png go to DIR/odd.npy.
    """
    config, _, processor = read_checkpoint(model)
    text, layers = config.text_config, config.vision_config.num_hidden_layers
    text.num_attention_heads, text.num_key_value_heads, text.head_dim = 6, 2, 48
    text.attention_bias = text.mlp_bias = True
    text.rms_norm_eps = 1e-6
    text.rope_parameters = {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e6}
    config.vision_feature_layer = [layers // 3, layers // 2, layers]
    draw = torch.Generator().manual_seed(0)
    state = {}
    for key, shape in expected_shapes(config).items():
        values = torch.randn(shape, generator=draw) * (0.08 if len(shape) > 1 else 0.3)
        state[key] = of_tensor(1 + values if key.endswith("norm.weight") else values)
    write_gguf(out / "odd", config, state, processor, dtype=torch.float32)
    running = instantiate(config, state, "odd", dtype=torch.float32)
    features(Chat(running, processor), Image.open(out / "exact-0.png"), out / "odd.npy")
    ids = processor.encoder().encode_prompt(Request.ask(TEXT_ONLY[0]).turns).tolist()
    with torch.inference_mode():
        logits = running(input_ids=torch.tensor([ids])).logits[0, -1, : processor.own_tokens]
    return {"ids": ids, "logits": logits.tolist()}


def prompt_ids(chat: Chat, request: Request) -> list[int]:
    """Ids of the prompt without those of the picture."""
    ids = chat.processor.encoder().encode_prompt(request.turns)
    return ids[ids != chat.processor.image_token_id].tolist()


def features(chat: Chat, image: Image.Image, file: Path) -> None:
    """Save what the language model sees of a picture, float32 [token, hidden]."""
    pixels = chat.processor.pixels(image)[None]
    with torch.inference_mode():
        seen = chat.model.get_image_features(pixel_values=pixels, return_dict=True).pooler_output[0]
    np.save(file, seen.numpy())


if __name__ == "__main__":
    main()
