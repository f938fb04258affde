"""Clients learn under which names the model is served and how long a prompt may be."""

from __future__ import annotations

import anthropic.types
import httpx
import openai
import pytest
from anthropic import Anthropic
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


def test_models_are_also_those_of_anthropics_sdk(anthropic_client: Anthropic, http: httpx.Client) -> None:
    models = list(anthropic_client.models.list())
    assert [(model.id, model.display_name, model.type) for model in models] == [
        ("tiny", "tiny", "model"),
        ("alias", "alias", "model"),
    ]
    assert anthropic_client.models.retrieve("alias") == models[1]
    text = http.get("/v1/models/tiny").text
    model = anthropic.types.ModelInfo.model_validate_json(text, strict=True)
    assert model.created_at.timestamp() == http.get("/v1/models/tiny").json()["created"]


@pytest.mark.parametrize("name", ["gpt-4", "owner/model", "tiny/more", "tiny "])
def test_an_unknown_name_is_not_found(client: OpenAI, name: str) -> None:
    with pytest.raises(openai.NotFoundError, match="does not exist") as caught:
        client.models.retrieve(name)
    assert caught.value.code == "model_not_found"
    assert "'tiny', 'alias'" in caught.value.message


def test_a_ready_server_is_healthy(http: httpx.Client) -> None:
    response = http.get("/health")
    assert (response.status_code, response.json()) == (200, {"status": "ok"})
