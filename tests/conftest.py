"""Fixtures every test may use: golden vectors, tiny model folders, tiny training records.

The tiny folders are written with numpy alone, in the published layouts, so that a test of the data floor needs
no torch and a test of the model floor reads them as it would read a download.
"""

from __future__ import annotations

import io
import json
import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from hypothesis import HealthCheck, settings
from PIL import Image, ImageDraw

# A busy machine must not fail a test: examples count here, not the time they take.
settings.register_profile("geochat", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("geochat")

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test may reach a network

REPOSITORY = Path(__file__).resolve().parents[1]

HIDDEN = 64
HEADS = 4
LLM_LAYERS = 2
CLIP_LAYERS = 4
MLP = 128
VOCABULARY = 512
IMAGE_SIZE = 84
PATCH = 14

VICUNA_SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)


class TinyRecords(NamedTuple):
    """A small instruction file and the folder of its images."""

    file: Path
    image_folder: Path
    records: list[dict]


@pytest.fixture(scope="session")
def assets() -> Path:
    """Folder with `golden/` and `data/`; it does not travel with the repository."""
    folder = Path(os.environ.get("GEOCHAT_ASSETS", REPOSITORY.parent / "shared"))
    if not (folder / "golden").is_dir():
        pytest.skip(f"no golden vectors in {folder}: set GEOCHAT_ASSETS to a folder that holds golden/")
    return folder


@pytest.fixture(scope="session")
def tiny_tokenizer_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A `tokenizer.model` of the Llama kind: BPE, byte fallback, dummy prefix, 512 pieces."""
    sentencepiece = pytest.importorskip("sentencepiece")
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(_corpus()),
        model_writer=model,
        model_type="bpe",
        vocab_size=VOCABULARY,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        split_digits=True,
        add_dummy_prefix=True,
        unk_id=0,
        bos_id=1,
        eos_id=2,
        pad_id=-1,
        num_threads=1,
        minloglevel=2,
    )
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"
    path.write_bytes(model.getvalue())
    return path


@pytest.fixture(scope="session")
def tiny_llm(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer_model: Path) -> Path:
    """A Llama folder as on the hub: hidden 64, 2 layers, 4 heads, 512 words, float32 safetensors."""
    folder = tmp_path_factory.mktemp("tiny-llama")
    normal = _normal(seed=1)
    tensors = {"model.embed_tokens.weight": normal(VOCABULARY, HIDDEN)}
    for i in range(LLM_LAYERS):
        layer = f"model.layers.{i}."
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            tensors[f"{layer}self_attn.{name}.weight"] = normal(HIDDEN, HIDDEN)
        tensors[f"{layer}mlp.gate_proj.weight"] = normal(MLP, HIDDEN)
        tensors[f"{layer}mlp.up_proj.weight"] = normal(MLP, HIDDEN)
        tensors[f"{layer}mlp.down_proj.weight"] = normal(HIDDEN, MLP)
        tensors[f"{layer}input_layernorm.weight"] = 1 + normal(HIDDEN)
        tensors[f"{layer}post_attention_layernorm.weight"] = 1 + normal(HIDDEN)
    tensors["model.norm.weight"] = 1 + normal(HIDDEN)
    tensors["lm_head.weight"] = normal(VOCABULARY, HIDDEN)
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": HIDDEN,
        "intermediate_size": MLP,
        "num_hidden_layers": LLM_LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": HEADS,
        "vocab_size": VOCABULARY,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
        "torch_dtype": "float32",
    }
    tokenizer_config = {
        "tokenizer_class": "LlamaTokenizer",
        "add_bos_token": True,
        "add_eos_token": False,
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "pad_token": None,
        "legacy": True,
        "model_max_length": 2048,
    }
    _write_folder(folder, tensors, config)
    (folder / "generation_config.json").write_text(json.dumps({"bos_token_id": 1, "eos_token_id": 2}))
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer_config, indent=1))
    (folder / "tokenizer.model").write_bytes(tiny_tokenizer_model.read_bytes())
    return folder


@pytest.fixture(scope="session")
def tiny_clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A CLIPVisionModel folder as on the hub: hidden 64, 4 layers, 84 px, patch 14, so 6 x 6 + 1 positions."""
    folder = tmp_path_factory.mktemp("tiny-clip-vit-patch14-84")
    normal = _normal(seed=2)
    embeddings = "vision_model.embeddings."
    tensors = {
        f"{embeddings}class_embedding": normal(HIDDEN),
        f"{embeddings}patch_embedding.weight": normal(HIDDEN, 3, PATCH, PATCH),
        f"{embeddings}position_embedding.weight": normal((IMAGE_SIZE // PATCH) ** 2 + 1, HIDDEN),
    }
    for norm in ("pre_layrnorm", "post_layernorm"):  # the first name is misspelt in the published files
        tensors[f"vision_model.{norm}.weight"] = 1 + normal(HIDDEN)
        tensors[f"vision_model.{norm}.bias"] = normal(HIDDEN)
    for i in range(CLIP_LAYERS):
        layer = f"vision_model.encoder.layers.{i}."
        shapes = {
            "self_attn.q_proj": (HIDDEN, HIDDEN),
            "self_attn.k_proj": (HIDDEN, HIDDEN),
            "self_attn.v_proj": (HIDDEN, HIDDEN),
            "self_attn.out_proj": (HIDDEN, HIDDEN),
            "mlp.fc1": (MLP, HIDDEN),
            "mlp.fc2": (HIDDEN, MLP),
        }
        for name, shape in shapes.items():
            tensors[f"{layer}{name}.weight"] = normal(*shape)
            tensors[f"{layer}{name}.bias"] = normal(shape[0])
        for name in ("layer_norm1", "layer_norm2"):
            tensors[f"{layer}{name}.weight"] = 1 + normal(HIDDEN)
            tensors[f"{layer}{name}.bias"] = normal(HIDDEN)
    config = {
        "architectures": ["CLIPVisionModel"],
        "model_type": "clip_vision_model",
        "hidden_size": HIDDEN,
        "intermediate_size": MLP,
        "num_hidden_layers": CLIP_LAYERS,
        "num_attention_heads": HEADS,
        "num_channels": 3,
        "image_size": IMAGE_SIZE,
        "patch_size": PATCH,
        "projection_dim": HIDDEN,
        "hidden_act": "quick_gelu",
        "layer_norm_eps": 1e-5,
        "torch_dtype": "float32",
    }
    preprocessor = {
        "image_processor_type": "CLIPImageProcessor",
        "do_resize": True,
        "do_center_crop": True,
        "do_normalize": True,
        "do_convert_rgb": True,
        "size": {"shortest_edge": IMAGE_SIZE},
        "crop_size": {"height": IMAGE_SIZE, "width": IMAGE_SIZE},
        "resample": 3,
        "image_mean": [0.48145466, 0.4578275, 0.40821073],
        "image_std": [0.26862954, 0.26130258, 0.27577711],
    }
    _write_folder(folder, tensors, config)
    (folder / "preprocessor_config.json").write_text(json.dumps(preprocessor, indent=1))
    return folder


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory, tiny_llm: Path, tiny_clip: Path) -> Path:
    """A canonical folder of `tiny_llm` and `tiny_clip`, float32. Its weights are doubled, so that greedy choices are
    far from ties and differ between questions."""
    torch = pytest.importorskip("torch")
    from geochat.model.build import build_model
    from geochat.model.checkpoint import save_model

    model, processor = build_model(tiny_llm, tiny_clip, None, image_size=IMAGE_SIZE, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(2.0)
    folder = tmp_path_factory.mktemp("tiny-model") / "model"
    save_model(model, processor, folder)
    return folder


@pytest.fixture(scope="session")
def tiny_records(tmp_path_factory: pytest.TempPathFactory) -> TinyRecords:
    """Eight records of every task (one without an image, one of several turns) and their images of odd shapes."""
    root = tmp_path_factory.mktemp("tiny-records")
    image_folder = root / "images"
    image_folder.mkdir()
    for name, size in _IMAGES.items():
        _draw_scene(size, seed=len(name) + size[0]).save(image_folder / name)
    records = [_record(i, *row) for i, row in enumerate(_DIALOGUES)]
    file = root / "tiny.json"
    file.write_text(json.dumps(records, indent=1), encoding="utf-8")
    return TinyRecords(file, image_folder, records)


_IMAGES = {"square.png": (96, 96), "wide.jpg": (120, 70), "tall.png": (60, 110), "small.png": (40, 40)}

_DIALOGUES: list[tuple[str | None, list[str]]] = [
    ("square.png", ["<image>\nClassify the given image in one of the following classes. Classes: harbour, desert",
                    "harbour"]),
    ("square.png", ["<image>\nIs there a ship in the image?", "yes", "How many ships are there?", "2"]),
    ("wide.jpg", ["<image>\n[refer] where is <p>the red ship</p> ?", "{<12><20><40><60>|<30>}"]),
    ("wide.jpg", ["Describe the image.\n<image>", "Two ships lie in a harbour beside a grey pier."]),
    ("tall.png", ["<image>\n[identify] the object in {<10><50><60><80>|<90>} is", "<p>1 white plane</p>"]),
    ("tall.png", ["<image>\n[grounding] describe the image in detail",
                  "<p>two planes</p> {<10><50><60><80>|<90>}<delim>{<20><5><40><30>|<45>} on <p>a runway</p> "
                  "{<0><0><100><100>|<90>}"]),
    ("small.png", ["<image>\nIs the number of planes larger than the number of ships?", "no",
                   "What is the colour of the ship?", "red", "Where is it?", "{<1><2><30><40>|<5>}"]),
    (None, ["What does an infrared band show?", "Healthy plants are bright in the near infrared."]),
]  # fmt: skip


def _record(index: int, image: str | None, texts: list[str]) -> dict:
    turns = [{"from": "gpt" if i % 2 else "human", "value": text} for i, text in enumerate(texts)]
    record: dict = {"id": f"tiny-{index}", "conversations": turns}
    if image is not None:
        record["image"] = image
    return record


def _draw_scene(size: tuple[int, int], seed: int) -> Image.Image:
    random = np.random.default_rng(seed)
    ground = random.integers(60, 200, size=3)
    pixels = ground + random.normal(0, 12, size=(size[1], size[0], 3))
    image = Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
    pen = ImageDraw.Draw(image)
    for _ in range(3):
        x, y = random.integers(0, size[0] - 16), random.integers(0, size[1] - 10)
        pen.rectangle([x, y, x + 14, y + 8], fill=tuple(random.integers(0, 255, size=3).tolist()))
    return image


def _corpus() -> list[str]:
    """Text in which every word of the records and of the prompt occurs, often enough for 512 pieces."""
    sentences = [VICUNA_SYSTEM, "USER: ASSISTANT:", "Answer the question using a single word or phrase."]
    sentences += [text.replace("<image>", "") for _, texts in _DIALOGUES for text in texts]
    return [line for text in sentences for line in text.splitlines() if line] * 4


def _normal(seed: int):
    random = np.random.default_rng(seed)

    def draw(*shape: int) -> np.ndarray:
        return random.normal(0, 0.05, size=shape).astype(np.float32)

    return draw


def _write_folder(folder: Path, tensors: dict[str, np.ndarray], config: dict) -> None:
    from safetensors.numpy import save_file

    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config, indent=1))


@pytest.fixture(scope="module")
def transformers_serve() -> Iterator[Callable[[Path], str]]:
    """Puts a model folder behind `transformers serve`, in float32 on the CPU; returns the address of its API."""
    if not os.environ.get("GEOCHAT_ALL_TESTS"):
        pytest.skip("starts a server: set GEOCHAT_ALL_TESTS=1")
    pytest.importorskip("fastapi")
    pytest.importorskip("uvicorn")
    processes: list[subprocess.Popen[bytes]] = []

    def start(model: Path) -> str:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        command = [sys.executable, "-m", "transformers.cli.transformers", "serve", str(model)]
        command += ["--host", "127.0.0.1", "--port", str(port), "--device", "cpu", "--dtype", "float32"]
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        processes.append(process)
        for _ in range(240):
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5).close()
                return f"http://127.0.0.1:{port}/v1"
            except OSError:
                assert process.poll() is None, "the server has ended"
                time.sleep(0.5)
        raise AssertionError("the server did not answer in two minutes")

    yield start
    for process in processes:
        process.terminate()
        process.wait(20)


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Runs a command that must end with exit code 2 and one line on stderr; returns that line."""

    def run(main: Callable[[list[str]], object], arguments: list[str]) -> str:
        capsys.readouterr()
        with pytest.raises(SystemExit) as caught:
            main(arguments)
        assert caught.value.code == 2
        lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
        assert len(lines) == 1
        return lines[0]

    return run
