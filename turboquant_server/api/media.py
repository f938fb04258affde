"""Images and other parts of messages that nothing here can read: refused, but where a tool has returned them.

What a tool has returned stays in an agent's conversation, which a refusal would end for good. So the model is
told that something was left out.
"""

from __future__ import annotations

from pydantic import BeforeValidator
from pydantic_core import PydanticCustomError

# What to call them, by the names that OpenAI and Anthropic have for their types.
MEDIA = {
    "document": "PDF document",
    "file": "file",
    "image": "image",
    "image_url": "image",
    "input_audio": "audio",
    "input_file": "file",
    "input_image": "image",
    "video_url": "video",
}


def _refuse_media(kind: object) -> object:
    if isinstance(kind, str) and kind in MEDIA:
        # These words tell Claude Code to send the conversation again without it.
        message = "Could not process {kind}: this server reads text only"
        raise PydanticCustomError("unsupported_parameter", message, {"kind": MEDIA[kind]})
    return kind


# For the type of a part.
ReadableOnly = BeforeValidator(_refuse_media)


def media_note(kind: str) -> str:
    """Return what the model is told in place of a part of this type."""
    return f"[{MEDIA[kind]} left out: you can read text only]"
