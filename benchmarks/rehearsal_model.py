"""A random model of Vicuna-7B's shapes in GeoChat's original layout, and a LoRA for it, written tensor by tensor.

Names, shapes, types and files are those of a release; the numbers are drawn. See `rehearsal.py`.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from geochat.model.formats.sentencepiece import NORMAL, SentencePieceModel
from geochat.model.weights import write_json

Shapes = dict[str, tuple[int, ...]]

_CHUNK = 1 << 24  # numbers drawn at once
_LINEARS = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
            "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")  # fmt: skip
_TOWER = "model.vision_tower.vision_tower.vision_model."


@dataclass(frozen=True)
class Shape:
    """Sizes of the model; the defaults are Vicuna-7B's with CLIP ViT-L/14 at 336 px and GeoChat's LoRA."""

    layers: int = 32
    hidden: int = 4096
    mlp: int = 11008
    vocabulary: int = 32000
    clip_layers: int = 24
    clip_hidden: int = 1024
    clip_mlp: int = 4096
    rank: int = 64

    @classmethod
    def scaled(cls, layers: int, scale: int) -> Shape:
        """All widths divided by `scale`, no narrower than one head."""
        full = cls()
        return cls(
            layers=layers,
            hidden=max(128, full.hidden // scale),
            mlp=max(128, full.mlp // scale),
            vocabulary=max(2000, full.vocabulary // scale),
            clip_layers=max(3, full.clip_layers // scale),
            clip_hidden=max(64, full.clip_hidden // scale),
            clip_mlp=max(64, full.clip_mlp // scale),
            rank=max(4, full.rank // scale),
        )

    def linear(self, name: str) -> tuple[int, int]:
        """[out, in] of one linear of a layer."""
        if "attn" in name:
            return self.hidden, self.hidden
        return (self.hidden, self.mlp) if "down" in name else (self.mlp, self.hidden)

    def tensors(self) -> Shapes:
        """Every tensor of the original layout under its own name, in the order of the file."""
        wide = (self.hidden,)
        found: Shapes = {"model.embed_tokens.weight": (self.vocabulary, self.hidden)}
        for i in range(self.layers):
            layer = f"model.layers.{i}."
            found |= {f"{layer}{name}.weight": self.linear(name) for name in _LINEARS}
            found |= {
                f"{layer}{norm}.weight": wide for norm in ("input_layernorm", "post_attention_layernorm")
            }
            found[f"{layer}self_attn.rotary_emb.inv_freq"] = (64,)
        found["model.norm.weight"] = wide
        for row, columns in ((0, self.clip_hidden), (2, self.hidden)):
            found[f"model.mm_projector.{row}.weight"] = (self.hidden, columns)
            found[f"model.mm_projector.{row}.bias"] = wide
        return found | self._tower() | {"lm_head.weight": (self.vocabulary, self.hidden)}

    def _tower(self) -> Shapes:
        wide = self.clip_hidden
        found: Shapes = {
            "embeddings.class_embedding": (wide,),
            "embeddings.patch_embedding.weight": (wide, 3, 14, 14),
            "embeddings.position_embedding.weight": ((336 // 14) ** 2 + 1, wide),
        }
        norms = ["pre_layrnorm", "post_layernorm"]  # the first name is misspelt in the published files
        for i in range(self.clip_layers):
            layer = f"encoder.layers.{i}."
            shapes = {f"self_attn.{x}_proj": (wide, wide) for x in ("q", "k", "v", "out")}
            shapes |= {"mlp.fc1": (self.clip_mlp, wide), "mlp.fc2": (wide, self.clip_mlp)}
            for name, shape in shapes.items():
                found |= {f"{layer}{name}.weight": shape, f"{layer}{name}.bias": shape[:1]}
            norms += [f"{layer}layer_norm1", f"{layer}layer_norm2"]
        found |= {f"{norm}.{part}": (wide,) for norm in norms for part in ("weight", "bias")}
        return {_TOWER + name: shape for name, shape in found.items()}

    def lora(self) -> Shapes:
        """The adapter's tensors under the names of LLaVA's and PEFT's files."""
        found: Shapes = {}
        for i in range(self.layers):
            for name in _LINEARS:
                out, columns = self.linear(name)
                stem = f"base_model.model.model.layers.{i}.{name}."
                found |= {
                    f"{stem}lora_A.weight": (self.rank, columns),
                    f"{stem}lora_B.weight": (out, self.rank),
                }
        return found


def write_source(folder: Path, shape: Shape, shard_bytes: int, tokenizer: Path) -> None:
    """The merged model as GeoChat saves it: float16, pickles of at most `shard_bytes` each, their index, a tokenizer."""
    folder.mkdir(parents=True)
    shards: list[Shapes] = [{}]
    filled = 0
    for name, size in shape.tensors().items():
        if shards[-1] and filled + 2 * math.prod(size) > shard_bytes:
            shards.append({})
            filled = 0
        shards[-1][name] = size
        filled += 2 * math.prod(size)
    names = [f"pytorch_model-{i + 1:05d}-of-{len(shards):05d}.bin" for i in range(len(shards))]
    for name, shard in zip(names, shards, strict=True):
        write_pickle(folder / name, shard)
    total = sum(2 * math.prod(size) for size in shape.tensors().values())
    places = {key: name for name, shard in zip(names, shards, strict=True) for key in shard}
    write_json(
        folder / "pytorch_model.bin.index.json", {"metadata": {"total_size": total}, "weight_map": places}
    )
    write_json(folder / "config.json", _config(shape))
    (folder / "tokenizer.model").write_bytes(_longer(tokenizer, shape.vocabulary))
    roles = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<unk>"}
    write_json(
        folder / "tokenizer_config.json", {"tokenizer_class": "LlamaTokenizer", "legacy": False, **roles}
    )


def write_adapter(folder: Path, shape: Shape, base: Path) -> None:
    """A LoRA on every linear of the language model, as LLaVA's and GeoChat's training scripts save it."""
    folder.mkdir(parents=True)
    write_pickle(folder / "adapter_model.bin", shape.lora())
    # GeoChat's program makes its table of 504 px after freezing the tower, so its adapters carry it.
    table = f"base_model.model.{_TOWER}embeddings.position_embedding.weight"
    write_pickle(folder / "non_lora_trainables.bin", {table: (36 * 36 + 1, shape.clip_hidden)})
    shutil.copy(base / "config.json", folder)
    config = {
        "base_model_name_or_path": str(base.absolute()), "bias": "none", "fan_in_fan_out": False,
        "inference_mode": True, "init_lora_weights": True, "lora_alpha": 16, "lora_dropout": 0.05,
        "modules_to_save": None, "peft_type": "LORA", "r": shape.rank, "revision": None,
        "target_modules": [name.rpartition(".")[2] for name in _LINEARS], "task_type": "CAUSAL_LM",
    }  # fmt: skip
    write_json(folder / "adapter_config.json", config)


def write_pickle(file: Path, shapes: Shapes) -> None:
    """A `torch.save` file of random float16 tensors, few of them in memory.

    torch writes the archive with gaps where the numbers go, tells where the gaps are, and they are filled afterwards.
    """
    with FakeTensorMode():
        empty = {name: torch.empty(shape, dtype=torch.float16) for name, shape in shapes.items()}
    with torch.serialization.skip_data(materialize_fake_tensors=True):
        torch.save(empty, file)
    draw = torch.Generator().manual_seed(torch.seed() % 2**63)
    pool = torch.randn(2 * _CHUNK, generator=draw)
    with file.open("r+b") as stream:
        for name, tensor in torch.load(file, map_location="meta", weights_only=True).items():
            stream.seek(tensor.untyped_storage()._checkpoint_offset)
            for numbers in _drawn(name, tensor.numel(), pool, draw):
                stream.write(numbers.numpy().data)


def _drawn(name: str, count: int, pool: torch.Tensor, draw: torch.Generator) -> Iterator[torch.Tensor]:
    """`count` numbers of a trained weight's size, in pieces: from a random place of the pool, at a random scale, which
    takes a twentieth of the time of drawing each. Norms are near one."""
    mean = 1.0 if "norm" in name and name.endswith("weight") else 0.0
    for first in range(0, count, _CHUNK):
        place = int(torch.randint(_CHUNK, (), generator=draw))
        scale = 0.01 + 0.02 * float(torch.rand((), generator=draw))
        yield (pool[place : place + min(_CHUNK, count - first)] * scale).add_(mean).half()


def _longer(tokenizer: Path, pieces: int) -> bytes:
    """A sentencepiece model brought to `pieces` pieces: joined pairs of its own pieces, as further merges."""
    model = SentencePieceModel.read(tokenizer)
    own = model.pieces
    texts = {text for text, _, _ in own}
    parts = [text for text, _, kind in own if kind == NORMAL]
    lowest = min(score for _, score, _ in own)
    added = []
    for k in range(len(parts) ** 2):
        if len(texts) == pieces:
            break
        text = parts[k % len(parts)] + parts[(k // len(parts) + 7 * k) % len(parts)]
        if text not in texts:
            texts.add(text)
            added.append((text, lowest - len(texts), NORMAL))
    if len(texts) != pieces:
        raise ValueError(f"{tokenizer}: {len(own)} pieces cannot be brought to {pieces}")
    return replace(model, pieces=[*own, *added]).serialise()


def _config(shape: Shape) -> dict[str, object]:
    """config.json with the fields of GeoChat's release."""
    return {
        "architectures": ["GeoChatLlamaForCausalLM"], "model_type": "geochat", "torch_dtype": "float16",
        "hidden_size": shape.hidden, "intermediate_size": shape.mlp, "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.hidden // 128, "num_key_value_heads": shape.hidden // 128,
        "vocab_size": shape.vocabulary, "max_position_embeddings": 4096, "rms_norm_eps": 1e-5, "hidden_act": "silu",
        "initializer_range": 0.02, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "use_cache": True,
        "tie_word_embeddings": False, "transformers_version": "4.31.0",
        "mm_vision_tower": "openai/clip-vit-large-patch14-336", "mm_hidden_size": shape.clip_hidden,
        "mm_projector_type": "mlp2x_gelu", "use_mm_proj": True, "mm_vision_select_layer": -2,
        "mm_vision_select_feature": "patch", "mm_use_im_start_end": False, "mm_use_im_patch_token": False,
        "image_aspect_ratio": "pad", "image_grid_pinpoints": None,
    }  # fmt: skip
