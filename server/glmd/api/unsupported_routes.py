"""Messages for paths that clients of model servers request and glmd does not serve."""

from __future__ import annotations

REASONS = {
    "/v1/embeddings": "the server runs a chat model, which computes no embeddings",
    "/v1/rerank": "the server runs a chat model, which ranks no documents",
    "/v1/moderations": "the server runs a chat model, which moderates no content",
    "/v1/images": "the model generates text only",
    "/v1/videos": "the model generates text only",
    "/v1/audio": "the model reads and generates text only",
    "/v1/realtime": "the model reads and generates text only",
    "/v1/files": "the server stores no files",
    "/v1/uploads": "the server stores no files",
    "/v1/vector_stores": "the server stores no files",
    "/v1/batches": "the server runs no batches; send requests in parallel",
    "/v1/messages/batches": "the server runs no batches; send requests in parallel",
    "/v1/fine_tuning": "the server trains no models",
    "/v1/assistants": "the Assistants API is not served; use the Responses API",
    "/v1/threads": "the Assistants API is not served; use the Responses API",
    "/v1/conversations": "the server stores no conversations; send previous_response_id to"
    " /v1/responses",
    "/api/v0/embeddings": "the server runs a chat model, which computes no embeddings",
    "/api/v1": "LM Studio's newer API is not served; use /api/v0, or OpenAI's API under /v1",
    **dict.fromkeys(
        (f"/api/{name}" for name in ("chat", "generate", "tags", "show", "ps", "version", "embed")),
        "Ollama's API is not served; use OpenAI's API under /v1",
    ),
    **{
        path: f"use /v1{path}"
        for path in ("/chat/completions", "/completions", "/responses", "/messages", "/models")
    },
    "/v1/v1": "only OpenAI clients take a base URL that ends in /v1, and it ends in /v1 once",
}
"""By path prefix."""


def explain_not_found(path: str) -> str:
    """Explain why `path` is not found."""
    prefix = path.rstrip("/") or path
    while prefix:
        if prefix in REASONS:
            return f"{path} is not available on this server: {REASONS[prefix]}."
        prefix = prefix.rpartition("/")[0]
    return f"Path {path} not found."
