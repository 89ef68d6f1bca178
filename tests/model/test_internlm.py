"""InternLM and InternLM2 as Llama: logits of a forward pass written out here, ids of their own tokenizer."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from geochat.model.build import build_model
from geochat.model.checkpoint import load, save_model

WIDTH, LAYERS, QUERIES, WIDE, ROWS, EPS = 32, 2, 4, 48, 300, 1e-6
RESERVED = ["[UNUSED_TOKEN_0]", "[UNUSED_TOKEN_1]"]
ROLES = {"<|im_start|>": 0, "<|im_end|>": 1}


@pytest.fixture(scope="module")
def pieces(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """As InternLM2's: BPE with byte fallback, no dummy prefix, reserved pieces that the chat model puts others in place of."""
    sentencepiece = pytest.importorskip("sentencepiece")
    written = io.BytesIO()
    words = [
        "harbour",
        "airport",
        "farmland",
        "ship",
        "plane",
        "storage",
        "tank",
        "what",
        "is",
        "in",
        "this",
        "image",
        "describe",
        "it",
    ]
    draw = np.random.default_rng(0)
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([" ".join(draw.choice(words, 8)) for _ in range(200)]),
        model_writer=written, model_type="bpe", vocab_size=ROWS, byte_fallback=True, hard_vocab_limit=False,
        normalization_rule_name="identity", remove_extra_whitespaces=False, add_dummy_prefix=False,
        user_defined_symbols=RESERVED, unk_id=0, bos_id=1, eos_id=2, pad_id=-1, num_threads=1, minloglevel=2,
    )  # fmt: skip
    return written.getvalue()


def write_llm(folder: Path, pieces: bytes, kind: str) -> dict[str, np.ndarray]:
    """A random model in the layout of `kind`; returns its weights under Llama's names, float64."""
    folder.mkdir()
    keys = QUERIES if kind == "internlm" else QUERIES // 2
    head = WIDTH // QUERIES
    draw = np.random.default_rng(1)

    def random(*shape: int, about: float = 0) -> np.ndarray:
        return draw.normal(about, 0.2, shape).astype(np.float16).astype(np.float64)

    llama = {"model.embed_tokens.weight": random(ROWS, WIDTH), "model.norm.weight": random(WIDTH, about=1),
             "lm_head.weight": random(ROWS, WIDTH)}  # fmt: skip
    for i in range(LAYERS):
        layer = f"model.layers.{i}."
        for name, rows in (("q", QUERIES), ("k", keys), ("v", keys)):
            llama[f"{layer}self_attn.{name}_proj.weight"] = random(rows * head, WIDTH)
        llama[f"{layer}self_attn.o_proj.weight"] = random(WIDTH, WIDTH)
        for name, shape in (("gate", (WIDE, WIDTH)), ("up", (WIDE, WIDTH)), ("down", (WIDTH, WIDE))):
            llama[f"{layer}mlp.{name}_proj.weight"] = random(*shape)
        for name in ("input_layernorm", "post_attention_layernorm"):
            llama[f"{layer}{name}.weight"] = random(WIDTH, about=1)
        if kind == "internlm":
            for name, rows in (("q", WIDTH), ("k", keys * head), ("v", keys * head), ("o", WIDTH)):
                llama[f"{layer}self_attn.{name}_proj.bias"] = random(rows)
    stored = dict(llama) if kind == "internlm" else fused(llama, keys, head)
    torch.save(
        {key: torch.tensor(value).half() for key, value in stored.items()}, folder / "pytorch_model.bin"
    )
    config = {
        "model_type": kind, "hidden_size": WIDTH, "intermediate_size": WIDE, "num_hidden_layers": LAYERS,
        "num_attention_heads": QUERIES, "num_key_value_heads": keys, "rms_norm_eps": EPS, "hidden_act": "silu",
        "vocab_size": ROWS, "max_position_embeddings": 512, "bias": kind == "internlm", "torch_dtype": "float16",
        "tie_word_embeddings": False, "rope_theta": 1e4 if kind == "internlm" else 1e6,
    }  # fmt: skip
    if kind == "internlm":
        del config["num_key_value_heads"], config["rope_theta"]
    else:
        config["rope_scaling"] = {"type": "dynamic", "factor": 2.0}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer.model").write_bytes(pieces)
    roles = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    if kind == "internlm2":
        spm = processor_of(pieces)
        added = {spm.piece_to_id(RESERVED[i]): text for text, i in ROLES.items()}
        roles["added_tokens_decoder"] = {str(i): {"content": text} for i, text in added.items()}
    (folder / "tokenizer_config.json").write_text(json.dumps(roles))
    return llama


def fused(llama: dict[str, np.ndarray], keys: int, head: int) -> dict[str, np.ndarray]:
    """Under InternLM2's names, wqkv put together row by row."""
    group = QUERIES // keys
    names = {"embed_tokens": "tok_embeddings", "lm_head": "output", "o_proj": "wo", "gate_proj": "w1", "up_proj": "w3",
             "down_proj": "w2", "self_attn": "attention", "mlp": "feed_forward", "input_layernorm": "attention_norm",
             "post_attention_layernorm": "ffn_norm"}  # fmt: skip
    found = {}
    for key, value in llama.items():
        if not any(name in key for name in ("q_proj", "k_proj", "v_proj")):
            found[".".join(names.get(word, word) for word in key.split("."))] = value
    for i in range(LAYERS):
        q, k, v = (llama[f"model.layers.{i}.self_attn.{name}_proj.weight"] for name in "qkv")
        rows = []
        for key in range(keys):
            rows += [q[(key * group + n) * head :][:head] for n in range(group)]
            rows += [k[key * head :][:head], v[key * head :][:head]]
        found[f"model.layers.{i}.attention.wqkv.weight"] = np.concatenate(rows)
    return found


def forward(weights: dict[str, np.ndarray], ids: list[int], keys: int, theta: float) -> np.ndarray:
    """Llama with optional biases, written out in float64: one sequence, no cache."""
    head, length = WIDTH // QUERIES, len(ids)

    def norm(x: np.ndarray, name: str) -> np.ndarray:
        return weights[name] * x / np.sqrt((x**2).mean(-1, keepdims=True) + EPS)

    def linear(x: np.ndarray, name: str) -> np.ndarray:
        return x @ weights[f"{name}.weight"].T + weights.get(f"{name}.bias", 0.0)

    def rotate(x: np.ndarray) -> np.ndarray:  # [length, heads, head]
        angle = np.outer(np.arange(length), theta ** (-np.arange(0, head, 2) / head))[:, None]
        a, b = x[..., : head // 2], x[..., head // 2 :]
        return np.concatenate(
            [a * np.cos(angle) - b * np.sin(angle), b * np.cos(angle) + a * np.sin(angle)], -1
        )

    x = weights["model.embed_tokens.weight"][ids]
    hidden = np.triu(np.full((length, length), -np.inf), 1)
    for i in range(LAYERS):
        layer = f"model.layers.{i}."
        y = norm(x, f"{layer}input_layernorm.weight")
        q, k, v = (
            linear(y, f"{layer}self_attn.{name}_proj").reshape(length, heads, head)
            for name, heads in (("q", QUERIES), ("k", keys), ("v", keys))
        )
        q, k = rotate(q), rotate(k)
        k, v = (np.repeat(t, QUERIES // keys, 1) for t in (k, v))
        scores = np.einsum("ihd,jhd->hij", q, k) / np.sqrt(head) + hidden
        shares = np.exp(scores - scores.max(-1, keepdims=True))
        shares /= shares.sum(-1, keepdims=True)
        x = x + linear(
            np.einsum("hij,jhd->ihd", shares, v).reshape(length, WIDTH), f"{layer}self_attn.o_proj"
        )
        y = norm(x, f"{layer}post_attention_layernorm.weight")
        gate = linear(y, f"{layer}mlp.gate_proj")
        x = x + linear(gate / (1 + np.exp(-gate)) * linear(y, f"{layer}mlp.up_proj"), f"{layer}mlp.down_proj")
    return linear(norm(x, "model.norm.weight"), "lm_head")


def processor_of(pieces: bytes):
    import sentencepiece

    return sentencepiece.SentencePieceProcessor(model_proto=pieces)


@pytest.mark.parametrize(
    ("kind", "keys", "theta"), [("internlm", QUERIES, 1e4), ("internlm2", QUERIES // 2, 1e6)]
)
def test_logits(tmp_path: Path, pieces: bytes, tiny_clip: Path, kind: str, keys: int, theta: float) -> None:
    """Biases (InternLM), the fused projection, grouped heads and rope_theta (InternLM2), through a save and a load."""
    weights = write_llm(tmp_path / "llm", pieces, kind)
    model, processor = build_model(tmp_path / "llm", tiny_clip, image_size=84, dtype=torch.float32)
    save_model(model, processor, tmp_path / "saved")
    ids = [1, 7, 200, 41, 299, 3, 77, 120]
    wanted = forward(weights, ids, keys, theta)
    assert np.abs(wanted).max() > 1
    for candidate in (model, load(tmp_path / "saved")[0]):
        with torch.no_grad():
            logits = candidate(input_ids=torch.tensor([ids])).logits[0, :, :ROWS].double().numpy()
        np.testing.assert_allclose(logits, wanted, atol=1e-5, rtol=0)


def test_ids_of_internlm2(tmp_path: Path, pieces: bytes, tiny_clip: Path) -> None:
    """The chat tokens stand in place of reserved pieces; text between them is sentencepiece's, without a dummy space."""
    write_llm(tmp_path / "llm", pieces, "internlm2")
    model, processor = build_model(tmp_path / "llm", tiny_clip, image_size=84, dtype=torch.float32)
    assert processor.template.name == "internlm2_chat"
    spm = processor_of(pieces)
    start, end = (spm.piece_to_id(name) for name in RESERVED)
    text = "<|im_start|>user\nwhat is it<|im_end|>\n<|im_start|>assistant\n a ship  "
    assert processor.tokenizer(text, add_special_tokens=False).input_ids == [
        start, *spm.encode("user\nwhat is it"), end, *spm.encode("\n"), start, *spm.encode("assistant\n a ship  "),
    ]  # fmt: skip
    assert end in model.generation_config.eos_token_id
    save_model(model, processor, tmp_path / "saved")
    again = load(tmp_path / "saved")[1]
    assert again.tokenizer(text).input_ids == processor.tokenizer(text).input_ids
    assert again.template.name == "internlm2_chat"


def test_the_first_tokenizer_has_no_roles(tmp_path: Path, pieces: bytes, tiny_clip: Path) -> None:
    write_llm(tmp_path / "llm", pieces, "internlm")
    _, processor = build_model(tmp_path / "llm", tiny_clip, image_size=84, dtype=torch.float32)
    assert processor.template.name == "vicuna_v1"
    assert processor.tokenizer("harbour ship").input_ids == [1, *processor_of(pieces).encode("harbour ship")]
