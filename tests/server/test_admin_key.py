"""Loading and unloading need a key of those who run the server."""

from __future__ import annotations

from typing import Any

import pytest
from life_server import ADMIN, error_of, life_server, text_of

pytestmark = pytest.mark.usefixtures("no_variables")


def test_an_admin_key_is_asked_for(two_models: list[dict[str, Any]]) -> None:
    user = {"Authorization": "Bearer user"}
    with life_server(models=two_models[:1], api_key="user", admin_key=("boss", "chef")) as server:
        for verb in ("load", "unload"):
            error_of(server.change(verb, "a", {}), 401)
            error_of(server.change(verb, "a", {"Authorization": "Bearer bos"}), 401)
            assert "admin key" in error_of(server.change(verb, "a", user), 403)["message"]
            assert server.http.get("/v1/models", headers=user).json()["data"][0]["state"] == "loaded"
            assert server.http.get("/v1/models", headers=ADMIN).status_code == 200
            assert server.change(verb, "a", {"x-api-key": "chef"}).status_code == 200
            assert error_of(server.change(verb, "z"), 404)["code"] == "model_not_found"
            response = server.http.post(f"/v1/models/{verb}", json={}, headers=ADMIN)
            assert error_of(response, 400)["param"] == "model"


def test_without_an_admin_key_nobody_unloads(two_models: list[dict[str, Any]]) -> None:
    with life_server(models=two_models[:1], admin_key=()) as server:
        for headers in ({}, ADMIN):
            assert "--admin-key" in error_of(server.change("unload", "a", headers), 403)["message"]
        text_of(server.ask("a"))


def test_an_open_server_asks_only_for_the_admin_key(two_models: list[dict[str, Any]]) -> None:
    with life_server(models=two_models[:1]) as server:
        error_of(server.change("unload", "a", {}), 401)
        error_of(server.change("unload", "a", {"Authorization": "Bearer none"}), 403)
        text_of(server.ask("a"))
