"""What the clients of a soak ask: random requests of each API, bad ones, and those with a known answer.

Knows the server's fields, not how a request is sent nor what came of it.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from serving_prompts import WORDS

Body = dict[str, Any]

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
RESPONSES, MESSAGES = "/v1/responses", "/v1/messages"
NUM_DOCUMENTS, DOCUMENT_WORDS = 3, 900
VOCABULARY = 4000  # token ids below are known to every model that is large enough to be asked
SCHEMA = {
    "type": "object",
    "properties": {"word": {"type": "string", "maxLength": 8}, "code": {"type": "integer"}},
    "required": ["word", "code"],
    "additionalProperties": False,
}


@dataclass(frozen=True)
class Visit:
    """One request and how its client behaves.

    Attributes:
        kind: How it is counted.
        path: Of the endpoint.
        body: As it goes over the wire; empty for a GET.
        is_bad: It must be refused.
        probe: The number of its known answer, if it has one.
        sent_share: Only so much of the body is sent.
        patience: The client leaves after so many seconds; None waits for the end.
    """

    kind: str
    path: str
    body: bytes = b""
    is_bad: bool = False
    probe: int | None = None
    sent_share: float = 1.0
    patience: float | None = None


class VisitMaker:
    """Make visits, the same ones for the same seed.

    Args:
        seed: Of everything.
        has_tools: Whether the model may be offered tools.
    """

    def __init__(self, seed: int, has_tools: bool) -> None:
        draw = random.Random(f"{seed} documents")
        self._documents = [" ".join(draw.choices(WORDS, k=DOCUMENT_WORDS)) for _ in range(NUM_DOCUMENTS)]
        self._has_tools = has_tools
        self._bad = bad_requests()
        self.probes = self._make_probes()

    def visit(self, draw: random.Random) -> Visit:
        """Return the next visit of a client, whose generator this is."""
        chance = draw.random()
        if chance < 0.2:
            return self.probe_visit(draw.randrange(len(self.probes)), draw)
        if chance < 0.3:
            path, body = draw.choice(self._bad)
            return Visit("bad", path, body, is_bad=True)
        if chance < 0.35:
            return _looking_visit(draw)
        makers: Mapping[str, Callable[[random.Random], Body]] = {
            CHAT: self._chat,
            COMPLETIONS: self._completion,
            RESPONSES: self._response,
            MESSAGES: self._message,
        }
        path = draw.choice([CHAT, CHAT, COMPLETIONS, COMPLETIONS, RESPONSES, MESSAGES])
        body = makers[path](draw)
        visit = Visit(path.removeprefix("/v1/"), path, json.dumps(body).encode())
        if draw.random() < 0.3:
            share = draw.choice([0.3, 0.99] + [1.0] * 8)
            visit = replace(visit, sent_share=share, patience=draw.choice([0.01, 0.3, 2.0]) * draw.random())
        return visit

    def probe_visit(self, number: int, draw: random.Random | None = None) -> Visit:
        """Return a visit with a known answer; with a generator it may be streamed, or find nothing cached."""
        path, body = self.probes[number]
        if draw is not None:
            body = {**body, "stream": draw.random() < 0.5}
            if path != MESSAGES and draw.random() < 0.5:
                body["cache_salt"] = f"{draw.random()}"
        return Visit("probe", path, json.dumps(body).encode(), probe=number)

    def _make_probes(self) -> list[tuple[str, Body]]:
        code = "The access code of {} is {}. What is the access code of {}?"
        far = f"The access code of Ada is 271828. {self._documents[0]}\n\nWhat is the access code of Ada?"
        probes: list[tuple[str, Body]] = [
            (CHAT, {"messages": _said(code.format("Emil", 604817, "Emil"))}),
            (CHAT, {"messages": _said(far)}),
            (CHAT, {"messages": _said("Tell me of it."), "temperature": 0.8, "seed": 5, "n": 2}),
            (CHAT, {"messages": _said("Where is it?"), "response_format": _schema_format()}),
            (COMPLETIONS, {"prompt": "The harbour", "logprobs": 2}),
            (COMPLETIONS, {"prompt": "def main(", "stop": ["\n\n", "return"]}),
            (COMPLETIONS, {"prompt": list(range(300, 420)), "temperature": 1, "seed": 7}),
            (RESPONSES, {"input": code.format("Kim", 550172, "Kim")}),
            (MESSAGES, {"messages": _said(code.format("Ola", 314159, "Ola"))}),
        ]
        if self._has_tools:
            probes.append((CHAT, tool_request()))
        return [
            (path, {"temperature": 0, "max_output_tokens" if path == RESPONSES else "max_tokens": 24, **body})
            for path, body in probes
        ]

    def _text(self, draw: random.Random) -> str:
        """Return a short text, or one that begins as others do and is of any length."""
        end = " ".join(draw.choices(WORDS, k=draw.choice([1, 5, 30])))
        if draw.random() < 0.5:
            return end
        return draw.choice(self._documents)[: draw.randrange(200, 4000)] + "\n" + end

    def _said(self, draw: random.Random) -> list[Body]:
        messages = _said(self._text(draw))
        for _ in range(draw.choice([0, 0, 0, 1, 3])):
            answer = " ".join(draw.choices(WORDS, k=5))
            messages += [{"role": "assistant", "content": answer}, *_said(draw.choice(WORDS))]
        return messages

    def _chat(self, draw: random.Random) -> Body:
        body = {"messages": self._said(draw), **_sampling(draw), **_told(draw)}
        if draw.random() < 0.3:
            body |= {"logprobs": True, "top_logprobs": draw.choice([0, 5, 20])}
        if self._has_tools and draw.random() < 0.3:
            body |= tool_request(draw.choice(["auto", "required", "none"]), messages=body["messages"])
            body.pop("ignore_eos", None)
        elif draw.random() < 0.2:
            body |= draw.choice(
                [{"response_format": _schema_format()}, {"guided_regex": "[a-z]{3,9} [0-9]+"}]
            )
        return body

    def _completion(self, draw: random.Random) -> Body:
        ids = [draw.randrange(300, VOCABULARY) for _ in range(draw.choice([1, 64, 700]))]
        texts = [self._text(draw) for _ in range(3)]
        body = {
            "prompt": draw.choice([texts[0], texts, ids, [ids, ids[:9]]]),
            **_sampling(draw),
            **_told(draw),
        }
        if draw.random() < 0.3:
            body |= {"logprobs": draw.choice([0, 5]), "echo": draw.random() < 0.5}
        elif draw.random() < 0.2:
            body |= draw.choice(
                [{"guided_choice": ["yes", "no"]}, {"response_format": {"type": "json_object"}}]
            )
        return body

    def _response(self, draw: random.Random) -> Body:
        body = {"input": draw.choice([self._text(draw), self._said(draw)]), **_sampling(draw)}
        body["max_output_tokens"] = body.pop("max_tokens")
        del body["n"]
        if draw.random() < 0.3:
            body["instructions"] = draw.choice(WORDS)
        if self._has_tools and draw.random() < 0.3:
            body |= {"tools": [{"type": "function", **_function("parameters")}], "tool_choice": "required"}
        elif draw.random() < 0.2:
            body["text"] = {"format": {"type": "json_schema", "name": "a", "schema": SCHEMA}}
        return body

    def _message(self, draw: random.Random) -> Body:
        body = {"messages": self._said(draw), "max_tokens": draw.choice([1, 30, 150])}
        body |= {"stream": draw.random() < 0.6, "temperature": draw.choice([0, 0.7]), "top_k": 50}
        if self._has_tools and draw.random() < 0.3:
            body |= {"tools": [_function("input_schema")], "tool_choice": {"type": "any"}}
        elif draw.random() < 0.2:
            body["output_config"] = {"format": {"type": "json_schema", "schema": SCHEMA}}
        else:
            body["stop_sequences"] = [draw.choice(WORDS)]
        return body


def tool_request(choice: str = "required", messages: list[Body] | None = None) -> Body:
    """Return what a chat has that offers the model a tool."""
    tools = [{"type": "function", "function": _function("parameters")}]
    return {"messages": messages or _said("Where is it?"), "tools": tools, "tool_choice": choice}


def bad_requests() -> list[tuple[str, bytes]]:
    """Return requests that must be refused, with their paths."""
    said = {"messages": _said("Where is it?")}
    ends = {"bias": {"logit_bias": {"99999999": 1}}, "stop": {"stop": ["a"] * 99}, "n": {"n": 0}}
    bodies: list[tuple[str, Body]] = [
        *((CHAT, {**said, **fields}) for fields in ends.values()),
        (CHAT, {**said, "model": "another"}),
        (CHAT, {**said, "max_tokens": "many"}),
        (CHAT, {**said, "response_format": _schema_format({"type": "nonsense"})}),
        (CHAT, {"messages": []}),
        (CHAT, {"messages": [{"role": "wizard", "content": "?"}]}),
        (CHAT, {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": "?"}]}]}),
        (COMPLETIONS, {"prompt": [1] * 50_000}),
        (COMPLETIONS, {"prompt": [10**7]}),
        (COMPLETIONS, {"prompt": "a", "temperature": 9, "stream": True}),
        (COMPLETIONS, {"prompt": "a", "guided_regex": "("}),
        (COMPLETIONS, {"prompt": "\ud800"}),
        (RESPONSES, {"input": "a", "previous_response_id": "resp_1"}),
        (RESPONSES, {"input": [{"type": "item_of_another_kind"}], "stream": True}),
        (MESSAGES, {"messages": _said("a")}),
        (MESSAGES, {"messages": _said("a"), "max_tokens": 0, "stream": True}),
        ("/v1/embeddings", {"input": "a"}),
        ("/tokenize", {"prompt": 5}),
    ]
    texts = [b"{", b"[]", b"\xff\xfe{}", b"null", b"[" * 100_000, b'{"prompt": NaN, "stream": true']
    return [(path, json.dumps(body).encode()) for path, body in bodies] + [
        (path, text) for path in (CHAT, COMPLETIONS, RESPONSES, MESSAGES) for text in texts
    ]


def _said(text: str) -> list[Body]:
    return [{"role": "user", "content": text}]


def _schema_format(schema: Body = SCHEMA) -> Body:
    return {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema}}


def _function(name_of_schema: str) -> Body:
    return {"name": "look_up", "description": "Look it up.", name_of_schema: SCHEMA}


def _looking_visit(draw: random.Random) -> Visit:
    paths = ["/health", "/metrics", "/v1/models", "/version", "/"]
    bodies = {"/tokenize": {"prompt": " ".join(WORDS)}, "/detokenize": {"tokens": [300, 301, 302]}}
    path = draw.choice([*paths, *bodies])
    return Visit("look", path, json.dumps(bodies[path]).encode() if path in bodies else b"")


def _sampling(draw: random.Random) -> Body:
    """Return how tokens are chosen, and when an answer ends; each field in some requests only."""
    sometimes: Body = {
        "top_p": draw.choice([0.1, 0.9]),
        "top_k": draw.choice([1, 40]),
        "min_p": 0.05,
        "seed": draw.randrange(2**40),
        "frequency_penalty": draw.uniform(-1, 1),
        "repetition_penalty": 1.2,
        "logit_bias": {str(draw.randrange(300, VOCABULARY)): draw.uniform(-50, 5)},
        "stop": draw.choices(WORDS, k=3),
        "stop_token_ids": [draw.randrange(300, VOCABULARY)],
        "include_stop_str_in_output": True,
        "ignore_eos": True,
        "cache_salt": draw.choice(WORDS),
    }
    return {
        "max_tokens": draw.choice([1, 10, 30, 60, 200]),
        "temperature": draw.choice([0, 0.7, 1.5]),
        "n": draw.choice([1] * 8 + [2, 4]),
        "stream": draw.random() < 0.6,
        **{name: value for name, value in sometimes.items() if draw.random() < 0.2},
    }


def _told(draw: random.Random) -> Body:
    """Return what is told beside the text."""
    return {
        "return_token_ids": draw.random() < 0.2,
        "timings_per_token": draw.random() < 0.2,
        "return_progress": draw.random() < 0.2,
    }
