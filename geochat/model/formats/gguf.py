"""llama.cpp's two files of one model: the language model, and `mmproj` with the tower and the projector.

Names, shapes and metadata keys follow llama.cpp (src/llama-arch.cpp, tools/mtmd/clip-impl.h). Its Llama turns
neighbouring pairs of a head's numbers where transformers turns number i with number i + half a head, so the rows of the
query and key matrices (and biases) stand in another order.
"""

from __future__ import annotations

import re

from torch import Tensor

from geochat.data.template_texts import EACH_TURN
from geochat.model.canonical import KeyTable, rename
from geochat.model.weights import Entry

POST_NORM = "vision_tower.vision_model.post_layernorm."
# (name in the file, canonical name), read forwards when reading and backwards when writing.
TENSORS: KeyTable = (
    ("token_embd.", "language_model.model.embed_tokens."),
    ("output_norm.", "language_model.model.norm."),
    ("output.", "language_model.lm_head."),
    ("blk.", "language_model.model.layers."),
    ("mm.0.", "multi_modal_projector.linear_1."),
    ("mm.2.", "multi_modal_projector.linear_2."),
    ("v.class_embd", "vision_tower.vision_model.embeddings.class_embedding"),
    ("v.patch_embd.", "vision_tower.vision_model.embeddings.patch_embedding."),
    ("v.position_embd.", "vision_tower.vision_model.embeddings.position_embedding."),
    ("v.pre_ln.", "vision_tower.vision_model.pre_layrnorm."),
    ("v.blk.", "vision_tower.vision_model.encoder.layers."),
    # LLaVA takes its features before this norm. Under llama.cpp's own name for it, v.post_ln, it would be applied.
    ("geochat.post_layernorm.", POST_NORM),
)
_TEXT_LAYER: KeyTable = (
    ("attn_norm.", "input_layernorm."),
    ("attn_q.", "self_attn.q_proj."),
    ("attn_k.", "self_attn.k_proj."),
    ("attn_v.", "self_attn.v_proj."),
    ("attn_output.", "self_attn.o_proj."),
    ("ffn_norm.", "post_attention_layernorm."),
    ("ffn_gate.", "mlp.gate_proj."),
    ("ffn_up.", "mlp.up_proj."),
    ("ffn_down.", "mlp.down_proj."),
)
_TOWER_LAYER: KeyTable = (
    ("ln1.", "layer_norm1."),
    ("attn_q.", "self_attn.q_proj."),
    ("attn_k.", "self_attn.k_proj."),
    ("attn_v.", "self_attn.v_proj."),
    ("attn_out.", "self_attn.out_proj."),
    ("ln2.", "layer_norm2."),
    # "down" widens and "up" narrows: the first converter had them the wrong way round, and clip.cpp swaps them back.
    ("ffn_down.", "mlp.fc1."),
    ("ffn_up.", "mlp.fc2."),
)
# (metadata key, field of config.json), both ways.
TEXT_FIELDS = (
    ("llama.vocab_size", "vocab_size"),
    ("llama.context_length", "max_position_embeddings"),
    ("llama.embedding_length", "hidden_size"),
    ("llama.block_count", "num_hidden_layers"),
    ("llama.feed_forward_length", "intermediate_size"),
    ("llama.attention.head_count", "num_attention_heads"),
    ("llama.attention.head_count_kv", "num_key_value_heads"),
    ("llama.attention.layer_norm_rms_epsilon", "rms_norm_eps"),
    ("llama.rope.dimension_count", "head_dim"),
)
TOWER_FIELDS = (
    ("clip.vision.image_size", "image_size"),
    ("clip.vision.patch_size", "patch_size"),
    ("clip.vision.embedding_length", "hidden_size"),
    ("clip.vision.feed_forward_length", "intermediate_size"),
    ("clip.vision.block_count", "num_hidden_layers"),
    ("clip.vision.attention.head_count", "num_attention_heads"),
    ("clip.vision.attention.layer_norm_epsilon", "layer_norm_eps"),
)
FEATURES = "clip.vision.feature_layer"
# llama.cpp's marks are <__media__>, or with random letters before the closing underscores.
_BREAK_AFTER_PICTURE = """\
{%- if '<__media_' in text and '__>\\n' not in text -%}
{%- set text = text | replace('__>', '__>\\n') -%}
{%- endif -%}
"""
_QUERY_OR_KEY = re.compile(r"language_model\..*\.self_attn\.([qk])_proj\.")
_IN_LAYER = re.compile(r"((?:.*\.)?(?:blk|layers)\.\d+\.)(.+)")


def canonical_name(name: str, swapped: bool = True) -> str | None:
    """The canonical name of a tensor in a file, None for an unknown one. swapped: `ffn_down` is the first matrix."""
    if not swapped and name.startswith("v.blk."):
        name = re.sub(r"\.ffn_(up|down)\.", lambda hit: f".ffn_{'down' if hit[1] == 'up' else 'up'}.", name)
    return _renamed(name, name.startswith("v."), False)


def gguf_name(key: str) -> str | None:
    """The name in a file of a canonical tensor, None for one that llama.cpp's Llama and CLIP do not have."""
    return _renamed(key, key.startswith("vision_tower."), True)


def _renamed(key: str, tower: bool, backwards: bool) -> str | None:
    name = rename(key, TENSORS, backwards)
    if name is None or not (match := _IN_LAYER.fullmatch(name)):
        return name
    inner = rename(match[2], _TOWER_LAYER if tower else _TEXT_LAYER, backwards)
    return None if inner is None else match[1] + inner


def pairs_together(key: str, entry: Entry, heads: int, kv_heads: int, backwards: bool = False) -> Entry:
    """Rows of a canonical query or key tensor in llama.cpp's order (backwards: from it); others as they are."""
    match = _QUERY_OR_KEY.match(key)
    if match is None:
        return entry
    count = heads if match[1] == "q" else kv_heads

    def reorder(tensor: Tensor) -> Tensor:
        half = tensor.shape[0] // count // 2
        # Of a head, transformers has [first half | second half], llama.cpp has pairs (one of each half).
        split = tensor.reshape(count, half, 2, -1) if backwards else tensor.reshape(count, 2, half, -1)
        return split.transpose(1, 2).reshape(tensor.shape).contiguous()

    if entry.shape[0] % (2 * count):
        raise ValueError(f"{key}: {entry.shape[0]} rows are not {count} heads of pairs")
    return entry.map(reorder)


def gguf_template(jinja: str) -> str:
    """A chat template for llama.cpp: in plain Jinja, and with the line break after a picture.

    `{% generation %}` is transformers' own, other programs stop at it. A picture comes as a mark in the text, before
    the words and without the line break that the family was trained with.
    """
    opened = re.sub(r"\{%([-+]?)\s*generation\s*([-+]?)%\}", r"{%\1 if true \2%}", jinja)
    plain = re.sub(r"\{%([-+]?)\s*endgeneration\s*([-+]?)%\}", r"{%\1 endif \2%}", opened)
    return plain.replace(EACH_TURN, EACH_TURN + _BREAK_AFTER_PICTURE)
