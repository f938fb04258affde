"""What an answer may consist of, for a grammar that keeps a model to it. Knows no grammar."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, NamedTuple

from turboquant_server.parsing.parameter import Parameter, read_parameters
from turboquant_server.parsing.reasoning import Marks


class CallForm(NamedTuple):
    """How a model writes calls, around names and arguments.

    Attributes:
        start: Before the arguments of a call; ``{name}`` stands for the function.
        end: After them.
        before: Before all calls.
        between: Between two.
        after: After all.
        parameter: Before and after each argument, ``{key}`` stands for its name; None if JSON holds all.
        is_single: A call ends the answer.
    """

    start: str
    end: str
    before: str = ""
    between: str = ""
    after: str = ""
    parameter: tuple[str, str] | None = None
    is_single: bool = False


class Function(NamedTuple):
    """A function that an answer may call.

    Attributes:
        name: Of the function.
        arguments: The JSON schema of the object that holds them, or each by itself; None allows any.
    """

    name: str
    arguments: str | tuple[Parameter, ...] | None


class Calls(NamedTuple):
    """One or more calls.

    Attributes:
        form: How they are written.
        functions: Which may be called.
        is_single: There is one call.
    """

    form: CallForm
    functions: tuple[Function, ...]
    is_single: bool

    @property
    def openings(self) -> tuple[str, ...]:
        """The texts that they may begin with."""
        form = self.form
        return tuple(form.before + form.start.replace("{name}", one.name) for one in self.functions)


class Layout(NamedTuple):
    """The parts of an answer: reasoning, and then calls or content.

    Attributes:
        reasoning: What stands around it; None if there is none.
        calls: None if there are none.
        content: What stands before content.
    """

    reasoning: Marks | None = None
    calls: Calls | None = None
    content: str = ""


def describe_function(form: CallForm, name: str, parameters: Mapping[str, Any] | None) -> Function:
    """Return a function as an answer may call it.

    Args:
        form: How calls are written.
        name: Of the function.
        parameters: The JSON schema of its arguments; None allows any.

    Raises:
        ValueError: The schema is not of an object, or asks for what the form has no place for.
    """
    if parameters is None:
        return Function(name, '{"type": "object"}' if form.parameter is None else None)
    types = parameters.get("type", "object")
    if "object" not in (types if isinstance(types, list) else [types]):
        raise ValueError("arguments are an object")
    if form.parameter is not None:
        return Function(name, read_parameters(parameters))
    return Function(name, json.dumps({**parameters, "type": "object"}))
