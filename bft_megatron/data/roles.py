"""The role `developer`, OpenAI's newer name of `system`, for chat templates that do not know it."""

from __future__ import annotations

from bft_megatron.data.messages import Messages

DEVELOPER = "developer"


def known_to(template: str, messages: Messages) -> Messages:
    """Return messages whose `developer` is `system`, unless the template's source has a place for `developer`.

    Args:
        template: the source of the chat template.
    """
    if DEVELOPER in template or all(message["role"] != DEVELOPER for message in messages):
        return messages
    return [message | {"role": "system"} if message["role"] == DEVELOPER else message for message in messages]
