"""Small chat templates that differ in how they treat tool calls, missing contents, thoughts, prompts and ends."""

from __future__ import annotations

import json
import random
from dataclasses import dataclass, fields, replace
from typing import Any, Literal, get_args, get_type_hints

HEADER, END = "<|im_start|>assistant<|mid|>", "<|im_end|>"

_ARGUMENTS = {
    "mapping": "{{ f.arguments | tojson }}",
    "joined": "{{ '' + f.arguments }}",
    "printed": "{{ f.arguments }}",
    "either": "{{ f.arguments if f.arguments is string else f.arguments | tojson }}",
    "items": "{% for k, v in f.arguments.items() %}<{{ k }}>{{ v | tojson }}{% endfor %}",
}
_CALLS = "{% for c in m.tool_calls or [] %}{% set f = c.function %}<call>{{ f.name }} ARGUMENTS</call>{% endfor %}"
_CONTENTS = {
    "tested": "{% if m.content %}CONTENT{% endif %}CALLS",
    "joined": "{% if m.content + '' %}CONTENT{% endif %}CALLS",
    "printed": "{% if m.tool_calls %}{{ m.content }}CALLS{% else %}CONTENT{% endif %}",
    "none": "{% if m.content is none %}CALLS{% else %}CONTENT{% endif %}",
    "or calls": "{% if m.tool_calls %}CALLS{% else %}CONTENT{% endif %}",
    "no calls": "{% if m.content %}CONTENT{% endif %}",
}
_THOUGHTS = {
    "left": ("", "{{ m.content }}"),
    "written": ("{% if m.reasoning_content %}<think>{{ m.reasoning_content }}</think>{% endif %}", "{{ m.content }}"),
    "stripped": ("", "{{ m.content.split('</think>')[-1] }}"),
}
_PROMPTS = {"header": HEADER, "thinking": HEADER + "<think>\n", "none": "", "other": "Answer:"}
_ENDS = {"token": (END, "\n"), "token alone": (END, ""), "text": ("\n\n", ""), "none": ("", "")}


@dataclass(frozen=True)
class Behaviour:
    """How a template behaves."""

    arguments: Literal["mapping", "joined", "printed", "either", "items"] = "mapping"
    content: Literal["tested", "joined", "printed", "none", "or calls", "no calls"] = "tested"
    thoughts: Literal["left", "written", "stripped"] = "left"
    prompt: Literal["header", "thinking", "none", "other"] = "header"
    end: Literal["token", "token alone", "text", "none"] = "token"
    trims: bool = False

    @property
    def source(self) -> str:
        """The template, with {% generation %} markers around what is to be learned."""
        before, content = _THOUGHTS[self.thoughts]
        if self.trims:
            content = content.replace(" }}", " | trim }}")
        calls = _CALLS.replace("ARGUMENTS", _ARGUMENTS[self.arguments])
        answer = before + _CONTENTS[self.content].replace("CONTENT", content).replace("CALLS", calls)
        end, behind = _ENDS[self.end]
        return (
            "{% if tools %}<|im_start|>tools\n{{ tools | tojson }}<|im_end|>\n{% endif %}{% for m in messages %}"
            f"{{% if m.role == 'assistant' %}}{HEADER}{{% generation %}}{answer}{end}{{% endgeneration %}}{behind}"
            "{% else %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endif %}{% endfor %}"
            f"{{% if add_generation_prompt %}}{_PROMPTS[self.prompt]}{{% endif %}}"
        )

    def given(self, message: dict[str, Any]) -> dict[str, Any]:
        """Return a row's message as this template has to be given it to write all that it can write."""
        if not message.get("tool_calls"):
            return message
        calls = [c | {"function": c["function"] | {"arguments": self._given(c)}} for c in message["tool_calls"]]
        empty = not (message.get("content") or "").strip()
        content = {"none": None}.get(self.content, "") if empty else message["content"]
        return message | {"content": content, "tool_calls": calls}

    def loses(self, message: dict[str, Any]) -> bool:
        """Whether the template leaves out the calls of a message, or all that it says."""
        content, calls = (message.get("content") or "").strip(), message.get("tool_calls")
        if calls:
            return self.content == "no calls" or (self.content == "none" and bool(content))
        said = content.split("</think>")[-1].strip() if self.thoughts == "stripped" else content
        return not said

    def _given(self, call: dict[str, Any]) -> Any:
        arguments = call["function"]["arguments"]
        if self.arguments in ("joined", "printed") and not isinstance(arguments, str):
            return json.dumps(arguments, ensure_ascii=False)
        if self.arguments in ("mapping", "items") and isinstance(arguments, str):
            return json.loads(arguments)
        return arguments


def behaviours(count: int) -> list[Behaviour]:
    """Return behaviours among which every value of a field is met with every value of another, and drawn ones."""
    generator = random.Random(1)
    values = {name: get_args(kind) or (False, True) for name, kind in get_type_hints(Behaviour).items()}
    names = [f.name for f in fields(Behaviour)]
    drawn = [Behaviour(**{name: generator.choice(values[name]) for name in names}) for _ in range(count)]
    pairs = [(a, x, b, y) for a in names for b in names if a < b for x in values[a] for y in values[b]]
    met = {(a, getattr(d, a), b, getattr(d, b)) for d in drawn for a in names for b in names if a < b}
    return [
        *drawn,
        *(replace(generator.choice(drawn), **{a: x, b: y}) for a, x, b, y in pairs if (a, x, b, y) not in met),
    ]
