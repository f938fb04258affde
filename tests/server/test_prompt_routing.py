"""prompt_routing.py: what begins alike goes to one replica, until that one has more than its share."""

from __future__ import annotations

import json
from collections import Counter
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from turboquant_server.prompt_routing import (
    BEGINNING_LENGTH,
    FEW_REQUESTS,
    MAX_READ_BYTES,
    order_replicas,
    prompt_beginning,
)


def beginning(**fields: Any) -> bytes:
    found = prompt_beginning(json.dumps(fields).encode())
    assert found is not None
    return found


def message(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def test_a_conversation_stays_where_it_began() -> None:
    start = [message("system", "Be brief."), message("user", "Hello")]
    longer = [*start, message("assistant", "Hi"), message("user", "And now?")]
    assert beginning(messages=start) == beginning(messages=longer, temperature=0, stream=True)
    assert beginning(input=start) == beginning(input=longer)


def test_marks_that_move_from_message_to_message_change_nothing() -> None:
    def ask(billing: str, **marks: Any) -> bytes:
        system = [
            {"type": "text", "text": f"x-anthropic-billing-header: {billing}"},
            {"type": "text", "text": "s"},
        ]
        content = [{"type": "text", "text": "Hello", **marks}]
        return beginning(system=system, messages=[{"role": "user", "content": content}])

    assert ask("1", cache_control={"type": "ephemeral"}) == ask("2")


def test_conversations_with_one_system_message_are_told_apart() -> None:
    system = message("system", "You are a helpful assistant. " * 200)
    assert beginning(messages=[system, message("user", "a")]) != beginning(
        messages=[system, message("user", "b")]
    )
    assert beginning(system="s", messages=[message("user", "a")]) != beginning(
        messages=[message("user", "a")]
    )


@pytest.mark.parametrize(
    "of", [lambda text: {"prompt": text}, lambda text: {"messages": [message("user", text)]}]
)
def test_questions_about_one_document_go_together(of: Any) -> None:
    document = "x" * BEGINNING_LENGTH
    assert beginning(**of(document + "Who?")) == beginning(**of(document + "Where?"))
    assert beginning(**of("Who?" + document)) != beginning(**of("Where?" + document))


def test_tokens_and_several_prompts_have_a_beginning() -> None:
    assert beginning(prompt=[1, 2, 3]) != beginning(prompt=[1, 2, 4])
    assert beginning(prompt=["a", "b"]) == beginning(prompt="a")
    assert beginning(prompt=[[1, 2], [3]]) == beginning(prompt=[1, 2])


def test_salts_part_what_else_is_equal() -> None:
    assert beginning(prompt="a", cache_salt="x") != beginning(prompt="a", cache_salt="y")


HUGE = b'{"prompt": "%s"}' % (b"a" * MAX_READ_BYTES)
NO_PROMPTS = [b"", b"{", b"\xff", b"[1]", b"7", b"{}", b'{"messages": []}', b"[" * 100_000, HUGE]


@pytest.mark.parametrize("body", NO_PROMPTS, ids=range(len(NO_PROMPTS)))
def test_what_has_no_prompt_has_no_beginning(body: bytes) -> None:
    assert prompt_beginning(body) is None


JSON = st.recursive(
    st.none() | st.integers() | st.text(), lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner)
)


@given(st.dictionaries(st.sampled_from(["messages", "input", "prompt", "system", "cache_salt", "a"]), JSON))
def test_any_body_is_understood_or_passed_over(fields: dict[str, Any]) -> None:
    prompt_beginning(json.dumps(fields).encode())


NAMES = [f"replica{i}" for i in range(8)]


def test_prompts_spread_evenly_and_stay_when_others_come_or_go() -> None:
    prompts = [str(i).encode() for i in range(4000)]
    idle = dict.fromkeys(NAMES, 0)
    first = {prompt: order_replicas(prompt, idle)[0] for prompt in prompts}
    assert all(400 < count < 600 for count in Counter(first.values()).values())
    fewer = dict.fromkeys(NAMES[1:], 0)
    assert all(order_replicas(prompt, fewer)[0] == name for prompt, name in first.items() if name != NAMES[0])


def test_a_beginning_that_all_share_spreads_as_requests_need() -> None:
    loads = dict.fromkeys(NAMES, 0)
    for _ in range(FEW_REQUESTS):
        loads[order_replicas(b"same", loads)[0]] += 1
    assert sorted(loads.values())[-2:] == [0, FEW_REQUESTS]
    for _ in range(800 - FEW_REQUESTS):
        loads[order_replicas(b"same", loads)[0]] += 1
    assert max(loads.values()) == 125
    assert len([load for load in loads.values() if load]) >= 7


@given(st.dictionaries(st.text(), st.integers(0, 1000), min_size=1), st.binary())
def test_all_replicas_are_tried_and_no_overloaded_one_first(loads: dict[str, int], prompt: bytes) -> None:
    order = order_replicas(prompt, loads)
    assert sorted(order) == sorted(loads)
    assert loads[order[0]] <= max(FEW_REQUESTS, 1.25 * (sum(loads.values()) + 1) / len(loads))
