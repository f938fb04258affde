"""Errors of the Hub become one sentence that says what to do."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import huggingface_hub.errors as hub_errors
import pytest
import torch

from turboquant_server.load_error import explain

RESPONSE: Any = SimpleNamespace(headers={}, request=None)  # the HTTP library differs between Hub versions


@pytest.mark.parametrize(
    ("cause", "sentence"),
    [
        (
            hub_errors.GatedRepoError("gated", response=RESPONSE),
            "org/model is gated; accept its terms on https://huggingface.co/org/model and run: hf auth login",
        ),
        (
            hub_errors.RepositoryNotFoundError("404", response=RESPONSE),
            "the Hugging Face Hub has no model org/model, or hides it; check --model, or run: hf auth login",
        ),
        (
            hub_errors.RevisionNotFoundError("404", response=RESPONSE),
            "org/model has no revision v2; give a branch, tag or commit of it for --revision",
        ),
        (
            hub_errors.LocalEntryNotFoundError("offline"),
            "org/model is neither a directory nor in the local cache, and the Hugging Face Hub cannot be "
            "reached; check --model and the network",
        ),
        (
            torch.OutOfMemoryError("CUDA out of memory"),
            "org/model does not fit into cuda:0; try --quantize int8 or int4, or a smaller model",
        ),
        (
            RuntimeError("something new\nand its details"),
            "org/model cannot be loaded (OSError: wrapped); check the checkpoint",
        ),
    ],
)
def test_the_cause_of_an_error_becomes_a_sentence(cause: Exception, sentence: str) -> None:
    try:
        raise OSError("wrapped\nsecond line") from cause
    except OSError as error:
        assert explain(error, "org/model", "v2", torch.device("cuda:0")) == sentence


def test_an_error_without_text_is_named_by_its_type() -> None:
    sentence = explain(AssertionError(), "org/model", None, torch.device("cpu"))
    assert sentence == "org/model cannot be loaded (AssertionError: no message); check the checkpoint"


def test_a_machine_without_memory_is_not_taken_for_a_broken_checkpoint() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**60)
    for error in (caught.value, MemoryError()):
        sentence = explain(error, "org/model", None, torch.device("cpu"))
        assert sentence == "org/model does not fit into this machine's memory; try a smaller model"
