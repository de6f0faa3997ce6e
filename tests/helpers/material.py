"""What the data tests share: the tiny model's folder, chat templates like well-known ones, conversations."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

TINY = Path(__file__).parents[2] / "recipes" / "tiny"

CHATML = """
{%- for m in messages %}
<|im_start|>{{ m.role }}
{% if m.role == 'assistant' %}
{% generation %}
{{ m.content }}<|im_end|>{% endgeneration %}
{% else %}
{{ m.content }}<|im_end|>{% endif %}

{% endfor %}
{% if add_generation_prompt %}
<|im_start|>assistant
{% endif %}"""

# In the manner of SmolLM2 and Qwen 2.5: a system prompt of its own where the conversation has none.
DEFAULT_SYSTEM = (
    """
{%- if messages[0].role != 'system' %}
<|im_start|>system
You help.<|im_end|>

{% endif %}
"""
    + CHATML
)

# In the manner of Llama 3: a beginning of text, headers of three tokens, contents trimmed.
LLAMA = """{{ bos_token }}
{%- for m in messages %}
<|header|>{{ m.role }}<|/header|>

{% if m.role == 'assistant' %}
{% generation %}
{{ m.content | trim }}<|eot|>{% endgeneration %}
{% else %}
{{ m.content | trim }}<|eot|>{% endif %}
{% endfor %}
{% if add_generation_prompt %}
<|header|>assistant<|/header|>

{% endif %}"""

# In the manner of Mistral: nothing before an answer but a space, and the system's text in the first turn.
MISTRAL = """{{ bos_token }}
{%- set system, turns = '', messages %}
{% if messages[0].role == 'system' %}
{% set system, turns = messages[0].content + ' ', messages[1:] %}
{% endif %}
{% for m in turns %}
{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate') }}{% endif %}
{% if m.role == 'user' %}
{{ '[INST] ' + (system if loop.first else '') + m.content + ' [/INST]' }}
{%- else %}
{% generation %}{{ ' ' + m.content }}</s>{% endgeneration %}
{% endif %}
{% endfor %}"""

# In the manner of Qwen 3: the thoughts of earlier turns are left out.
THINKING = """
{%- for m in messages %}
<|im_start|>{{ m.role }}
{% if m.role == 'assistant' and not loop.last %}
{{ m.content.split('</think>')[-1] }}{% else %}
{{ m.content }}{% endif %}
<|im_end|>
{% endfor %}
{% if add_generation_prompt %}
<|im_start|>assistant
{% endif %}"""


def unmarked(template: str) -> str:
    return re.sub(r"{%-? (end)?generation %}\n?", "", template)


def chat_of(*contents: str, system: str | None = None) -> list[dict[str, Any]]:
    turns = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(contents)]
    return ([] if system is None else [{"role": "system", "content": system}]) + turns
