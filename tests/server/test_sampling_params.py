"""Sampling parameters that nothing can be drawn with are refused by name."""

from __future__ import annotations

import pytest

from turboquant_server.engine.sampling_params import SamplingParams


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("max_tokens", 0),
        ("temperature", -0.1),
        ("temperature", float("nan")),
        ("temperature", float("inf")),
        ("top_p", 0.0),
        ("top_p", 1.1),
        ("top_k", -1),
        ("min_p", 1.5),
        ("frequency_penalty", float("nan")),
        ("presence_penalty", float("inf")),
        ("repetition_penalty", 0.0),
        ("min_tokens", 6),
        ("logprobs", 21),
        ("stop", ("",)),
    ],
)
def test_sampling_params_name_the_field_that_is_out_of_range(field: str, value: object) -> None:
    with pytest.raises(ValueError, match="stop string" if field == "stop" else field):
        SamplingParams(**{"max_tokens": 5, field: value})
