"""scripts/soak.py: a short soak holds, and answers are read and judged as they are."""

from __future__ import annotations

import json
from typing import Any

import pytest
import soak
from soak_client import Answer, Outcome, judge
from soak_requests import CHAT, MESSAGES, Visit, VisitMaker
from soak_run import Soak

SECONDS, SEED = 15, 19  # this one stops the server early


def test_a_short_soak_holds(capsys: pytest.CaptureFixture[str]) -> None:
    status = soak.main(["--minutes", str(SECONDS / 60), "--clients", "10", "--seed", str(SEED)])
    *_, last = capsys.readouterr().out.splitlines()
    result = json.loads(last)
    verdicts = {claim["claim"]: claim["holds"] for claim in result["claims"]}
    [memory] = [claim for claim in verdicts if claim.startswith("memory")]
    assert verdicts.pop(memory) is None  # takes minutes to tell
    assert status == 0 and set(verdicts.values()) == {True}, result
    assert len(verdicts) == 7 and result["num_pauses"] == 1
    requests = result["requests"]
    assert (
        requests["probe"]["answered"] and requests["bad"]["refused"] and requests["chat/completions"]["left"]
    )


CALL = {"function": {"name": "look", "arguments": '{"a": 1}'}}
# Each API's answer at once, and in pieces.
ANSWERS: dict[str, tuple[dict[str, Any], list[dict[str, Any]]]] = {
    "chat": (
        {
            "choices": [
                {"index": 0, "message": {"content": "ab"}},
                {"index": 1, "message": {"tool_calls": [CALL]}},
            ]
        },
        [
            {"choices": [{"index": 1, "delta": {"tool_calls": [{"function": {"name": "look"}}]}}]},
            {"choices": [{"index": 0, "delta": {"role": "assistant", "content": "a"}}]},
            {"choices": [{"index": 1, "delta": {"tool_calls": [{"function": {"arguments": '{"a": 1}'}}]}}]},
            {"choices": [{"index": 0, "delta": {"content": "b"}}]},
            {"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}], "usage": None},
        ],
    ),
    "completions": (
        {"choices": [{"index": 0, "text": "ab"}]},
        [{"choices": [{"index": 0, "text": letter}]} for letter in "ab"],
    ),
    "responses": (
        {
            "object": "response",
            "error": None,
            "output": [{"content": [{"type": "output_text", "text": "ab"}]}],
        },
        [
            {"type": "response.created", "response": {"object": "response", "output": []}},
            {"type": "response.output_text.delta", "delta": "ab"},
            {"type": "response.completed", "response": {"output": [{"content": [{"text": "ab"}]}]}},
        ],
    ),
    "messages": (
        {"type": "message", "content": [{"type": "text", "text": "ab"}]},
        [
            {"type": "message_start", "message": {"type": "message", "content": []}},
            {"type": "content_block_start", "content_block": {"type": "text", "text": ""}},
            *({"type": "content_block_delta", "delta": {"text": letter}} for letter in "ab"),
            {"type": "message_delta", "delta": {"stop_reason": "end_turn"}},
            {"type": "message_stop"},
        ],
    ),
}


@pytest.mark.parametrize("api", ANSWERS)
def test_an_answer_reads_the_same_at_once_and_in_pieces(api: str) -> None:
    whole, pieces = ANSWERS[api]
    at_once, streamed = Answer(), Answer()
    at_once.add(whole)
    for piece in pieces:
        streamed.add(piece)
    assert at_once.texts == streamed.texts and at_once.texts[0] == "ab"
    assert at_once.texts.get(1) in (None, 'look{"a": 1}')
    assert streamed.has_ended == (api in ("responses", "messages"))  # others end with [DONE]


@pytest.mark.parametrize(
    ("answer", "is_bad", "kind"),
    [
        (Answer(200, {0: "a"}, has_ended=True), False, "answered"),
        (Answer(200, {0: "a"}), False, "wrong"),  # the stream broke off
        (Answer(200, {0: "a"}, True, '{"code": "server_error"}'), False, "wrong"),
        (Answer(200, {0: "a"}, True, '{"code": "request_timeout"}'), False, "limited"),
        (Answer(429, {}, True, "busy"), False, "limited"),
        (Answer(400, {}, True, "no"), False, "wrong"),
        (Answer(500, {}, True, "no"), False, "wrong"),
        (Answer(400, {}, True, "no"), True, "refused"),
        (Answer(200, {0: "a"}, has_ended=True), True, "wrong"),
        (Answer(500, {}, True, "no"), True, "wrong"),
    ],
)
def test_what_is_wrong_is_called_so(answer: Answer, is_bad: bool, kind: str) -> None:
    outcome = judge(Visit("chat", CHAT, b"{}", is_bad=is_bad), answer)
    assert outcome.kind == kind
    assert bool(outcome.problem) == (kind == "wrong")


def test_another_answer_than_the_known_one_is_wrong() -> None:
    run = Soak(VisitMaker(0, has_tools=True), server=None, known=[("a",)])
    probe = Visit("probe", MESSAGES, b"{}", probe=0)
    for text in "ab":
        run.note(probe, Outcome("answered", texts=(text,)))
    assert run.outcomes == {("probe", "answered"): 1, ("probe", "wrong"): 1}
    assert len(run.problems) == 1


@pytest.mark.parametrize(("growth", "holds"), [(0.04, True), (0.06, False)])
def test_memory_that_grows_after_the_warm_up_is_noticed(growth: float, holds: bool) -> None:
    seconds = range(1800)
    memory = [int(2**29 * (1 + growth * max(0, second - 300) / 1400)) for second in seconds]
    assert soak.judge_memory(memory).holds is holds
    assert soak.judge_memory([2**20 * second for second in range(1, 301)]).holds is None
