"""A Dockerfile taken apart into instructions. Knows what a line says, not what is to be done."""

from __future__ import annotations

import re
import string
from collections.abc import Mapping
from typing import NamedTuple


class Instruction(NamedTuple):
    """One instruction of a Dockerfile, its lines joined: ``RUN``, and what is to be run."""

    name: str
    value: str

    def assignments(self, variables: Mapping[str, str]) -> dict[str, str]:
        """Return the names and values of an ARG or ENV, with variables put in; an ARG may have no value."""
        pairs = re.findall(r'([\w.]+)(?:=("[^"]*"|\S*))?', self.value)
        return {name: expand(value.strip('"'), variables) for name, value in pairs}


def parse_dockerfile(text: str) -> list[Instruction]:
    """Return the instructions of a Dockerfile, without its comments."""
    lines = [line for line in text.splitlines() if not line.lstrip().startswith("#")]
    joined = re.sub(r"\\\n\s*", " ", "\n".join(lines))
    found = [line.split(maxsplit=1) for line in joined.splitlines() if line.strip()]
    return [Instruction(name, value) for name, value in found]


def expand(text: str, variables: Mapping[str, str]) -> str:
    """Put variables in for ``$NAME`` and ``${NAME}``.

    Raises:
        KeyError: There is none of that name.
    """
    return string.Template(text).substitute(variables)
