"""The Jinja texts of the chat templates. They are written into checkpoints: changing one changes what models see.

Messages hold plain text, or a list of parts as transformers' processors and OpenAI clients send it. `bos_token` comes
from whoever renders.
"""

VICUNA_SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)

# Messages come as plain text (ours, with the marks already in front) or as a list of parts (what transformers'
# processors and OpenAI clients send); afterwards `text` is the same. No macro: a call costs as much as the rest.
EACH_TURN = """\
{%- for message in messages -%}
{%- if message['content'] is string -%}
{%- set text = message['content'] -%}
{%- else -%}
{%- set text -%}
{%- for part in message['content'] if part['type'] in ['image', 'image_url'] -%}
{{- '<image>\\n' -}}
{%- endfor -%}
{%- for part in message['content'] if part['type'] == 'text' -%}
{{- part['text'] -}}
{%- endfor -%}
{%- endset -%}
{%- endif -%}
"""


def _vicuna(system: str) -> str:
    return f"""\
{{{{- bos_token -}}}}
{{%- if messages[0]['role'] != 'system' -%}}
{{{{- "{system} " -}}}}
{{%- endif -%}}
{EACH_TURN}{{%- if message['role'] == 'user' -%}}
{{{{- 'USER: ' + text + ' ' -}}}}
{{%- elif message['role'] == 'assistant' -%}}
{{{{- 'ASSISTANT:' -}}}}
{{%- generation -%}}
{{{{- ' ' + text + '</s>' -}}}}
{{%- endgeneration -%}}
{{%- else -%}}
{{{{- text + ' ' -}}}}
{{%- endif -%}}
{{%- endfor -%}}
{{%- if add_generation_prompt -%}}
{{{{- 'ASSISTANT:' -}}}}
{{%- endif -%}}
"""


VICUNA_V1 = _vicuna(VICUNA_SYSTEM)
# What GeoChat's evaluation scripts and demo prompt with, though its training used vicuna_v1.
LLAVA_V1 = _vicuna(VICUNA_SYSTEM.replace("user", "human"))

# LLaVA's stage 1: the question is dropped, the caption follows the image directly.
PLAIN = (
    "{{- bos_token -}}\n"
    + EACH_TURN
    + """\
{%- if message['role'] == 'user' -%}
{{- '<image>' * text.count('<image>') -}}
{%- elif message['role'] == 'assistant' -%}
{%- generation -%}
{{- text + '\\n' -}}
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
{{{{- bos_token -}}}}
{default}{EACH_TURN}{{%- if message['role'] == 'assistant' -%}}
{{{{- '{start}assistant{after_role}' -}}}}
{{%- generation -%}}
{{{{- text + '{end}' -}}}}
{{%- endgeneration -%}}
{{{{- '{between}' -}}}}
{{%- else -%}}
{{{{- '{start}' + message['role'] + '{after_role}' + text + '{end}{between}' -}}}}
{{%- endif -%}}
{{%- endfor -%}}
{{%- if add_generation_prompt -%}}
{{{{- '{start}assistant{after_role}' -}}}}
{{%- endif -%}}
"""


LLAMA_3 = _marked("<|start_header_id|>", "<|end_header_id|>\\n\\n", "<|eot_id|>", "")
CHATML = _marked("<|im_start|>", "\\n", "<|im_end|>", "\\n", system="You are a helpful assistant.")
INTERNLM2_CHAT = _marked("<|im_start|>", "\\n", "<|im_end|>", "\\n")
