"""`/openapi.json` is complete, and generated requests never fail with 500."""

from __future__ import annotations

import json
import re
from typing import Any

import jsonschema
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from live import LiveServer

schemathesis = pytest.importorskip("schemathesis")
requests = pytest.importorskip("requests")

EXAMPLES = 10
"""Per route and kind (valid and invalid by the schema): about 10 seconds in total."""

ROUTES = [
    "GET /livez",
    "GET /health",
    "GET /v1/models",
    "GET /v1/models/{id}",
    "GET /api/v0/models",
    "GET /api/v0/models/{id}",
    "GET /api/v1/models",
    "GET /props",
    "POST /v1/chat/completions",
    "POST /v1/completions",
    "POST /v1/responses",
    "POST /v1/responses/input_tokens",
    "GET /v1/responses/{id}",
    "DELETE /v1/responses/{id}",
    "POST /v1/responses/{id}/cancel",
    "GET /v1/responses/{id}/input_items",
    "POST /v1/messages",
    "POST /v1/messages/count_tokens",
    "POST /tokenize",
    "POST /detokenize",
    "POST /apply-template",
    "GET /glmd/clients",
    "GET /glmd/status",
    "POST /glmd/requests/{id}/cancel",
]

STREAMED = ("/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/messages")


@pytest.fixture(scope="module")
def document(scripted: LiveServer) -> dict[str, Any]:
    with scripted.client() as http:
        made: dict[str, Any] = http.get("/openapi.json").json()
    return made


@pytest.fixture(scope="module")
def session(scripted: LiveServer) -> Any:
    with requests.Session() as session:
        yield session


def test_every_route_documents_its_responses(document: dict[str, Any]) -> None:
    for path, item in document["paths"].items():
        for method, operation in item.items():
            answers = operation["responses"]
            where = f"{method} {path}"
            assert answers["200"]["content"]["application/json"]["schema"], where
            assert answers["default"]["content"]["application/json"]["schema"], where
            assert operation.get("summary"), where
            assert operation.get("description"), where
            assert "422" not in answers, where
    for path in STREAMED:
        content = document["paths"][path]["post"]["responses"]["200"]["content"]
        assert "$ref" in content["text/event-stream"]["schema"]


def test_every_reference_resolves_to_a_plain_name(document: dict[str, Any]) -> None:
    schemas = document["components"]["schemas"]
    used = set(re.findall(r"#/components/schemas/(\w+)", json.dumps(document)))
    assert used <= set(schemas)
    assert not [name for name in schemas if "__" in name]
    for schema in schemas.values():
        jsonschema.Draft202012Validator.check_schema(schema)


def test_every_route_is_fuzzed(document: dict[str, Any]) -> None:
    there = {
        f"{method.upper()} {path}" for path, item in document["paths"].items() for method in item
    }
    assert there == set(ROUTES)


def validate(document: dict[str, Any], schema: dict[str, Any], instance: Any) -> None:
    jsonschema.validate(instance, {**schema, "components": document["components"]})


# Of a route without a body there is nothing that its schema would not allow.
CASES = [(route, "POSITIVE") for route in ROUTES]
CASES += [(route, "NEGATIVE") for route in ROUTES if route.startswith("POST") and "{" not in route]


@pytest.mark.parametrize(("route", "mode"), CASES)
def test_no_generated_request_is_a_500(
    scripted: LiveServer, session: Any, document: dict[str, Any], route: str, mode: str
) -> None:
    """Valid requests may be refused, in the documented format."""
    method, path = route.split()
    operation = schemathesis.openapi.from_dict(document)[path][method]
    kind = schemathesis.GenerationMode[mode]
    answers = document["paths"][path][method.lower()]["responses"]

    @settings(
        max_examples=EXAMPLES,
        derandomize=True,
        database=None,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(case=operation.as_strategy(generation_mode=kind))
    def run(case: Any) -> None:
        if isinstance(case.body, dict) and "model" in case.body and mode == "POSITIVE":
            case.body["model"] = "default"  # Any other is a 404, which says little.
        response = case.call(base_url=scripted.url, session=session, timeout=30)
        assert response.status_code < 500, response.text
        content_type = response.headers["content-type"][0].partition(";")[0]
        answer = answers["200" if response.status_code == 200 else "default"]["content"]
        assert content_type in answer
        if content_type == "application/json":
            validate(document, answer[content_type]["schema"], response.json())

    run()
