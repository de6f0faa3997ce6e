"""The role `developer`, OpenAI's newer name of `system`, for chat templates that do not know it."""

from __future__ import annotations

import re

from bft_megatron.reading.messages import Messages

DEVELOPER = "developer"


def known_to(template: str, messages: Messages) -> Messages:
    """Return messages whose `developer` is `system`, unless the template's source compares with it.

    Args:
        template: the source of the chat template.
    """
    knows = re.search(rf"""['"]{DEVELOPER}['"]""", template)
    if knows or all(message["role"] != DEVELOPER for message in messages):
        return messages
    return [message | {"role": "system"} if message["role"] == DEVELOPER else message for message in messages]
