"""What an answer consists of, in the order in which the model writes it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias


@dataclass(frozen=True)
class Content:
    """Text for the user."""

    text: str


@dataclass(frozen=True)
class Reasoning:
    """Text in which the model thinks."""

    text: str


@dataclass(frozen=True)
class ToolCall:
    """A call of a function, complete.

    Attributes:
        name: Of the function.
        arguments: A JSON object as text.
    """

    name: str
    arguments: str


Event: TypeAlias = Content | Reasoning | ToolCall
