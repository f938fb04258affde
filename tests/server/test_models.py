"""Clients learn under which names the model is served and how long a prompt may be."""

from __future__ import annotations

import httpx
import openai
import pytest
from openai import OpenAI
from openai.types import Model


def test_every_served_name_is_listed(client: OpenAI, http: httpx.Client) -> None:
    page = client.models.list()
    assert page.object == "list"
    assert [model.id for model in page.data] == ["tiny", "alias"]
    for card in http.get("/v1/models").json()["data"]:
        assert Model.model_validate(card, strict=True).object == "model"
        assert card["max_model_len"] == 2048
        assert card["owned_by"] == "turboquant-server"


@pytest.mark.parametrize("name", ["tiny", "alias"])
def test_one_model_is_described_by_any_of_its_names(client: OpenAI, name: str) -> None:
    model = client.models.retrieve(name)
    assert model.id == name
    assert model in client.models.list().data


@pytest.mark.parametrize("name", ["gpt-4", "owner/model", "tiny/more", "tiny "])
def test_an_unknown_name_is_not_found(client: OpenAI, name: str) -> None:
    with pytest.raises(openai.NotFoundError, match="does not exist") as caught:
        client.models.retrieve(name)
    assert caught.value.code == "model_not_found"
    assert "'tiny', 'alias'" in caught.value.message


def test_a_ready_server_is_healthy(http: httpx.Client) -> None:
    response = http.get("/health")
    assert (response.status_code, response.json()) == (200, {"status": "ok"})
