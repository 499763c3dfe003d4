"""What clients ask a model server for that this one does not have, and a sentence on each."""

from __future__ import annotations

REASONS = {
    "/v1/embeddings": "it serves a chat model, which makes no embeddings",
    "/v1/rerank": "it serves a chat model, which ranks nothing",
    "/v1/moderations": "it serves a chat model, which moderates nothing",
    "/v1/images": "the model writes text only",
    "/v1/videos": "the model writes text only",
    "/v1/audio": "the model reads and writes text only",
    "/v1/realtime": "the model reads and writes text only",
    "/v1/files": "it keeps no files",
    "/v1/uploads": "it keeps no files",
    "/v1/vector_stores": "it keeps no files",
    "/v1/batches": "it runs no batches; send requests side by side",
    "/v1/messages/batches": "it runs no batches; send requests side by side",
    "/v1/fine_tuning": "it trains no models",
    "/v1/assistants": "the Assistants API is not served; the Responses API is",
    "/v1/threads": "the Assistants API is not served; the Responses API is",
    "/v1/conversations": "it keeps no conversations; send previous_response_id to /v1/responses",
    "/api/v0/embeddings": "it serves a chat model, which makes no embeddings",
    "/api/v1": "LM Studio's newer API is not served; /api/v0 is, and OpenAI's under /v1",
    **dict.fromkeys(
        (f"/api/{name}" for name in ("chat", "generate", "tags", "show", "ps", "version", "embed")),
        "Ollama's API is not served; OpenAI's is, under /v1",
    ),
    **{
        path: f"it is at /v1{path}"
        for path in ("/chat/completions", "/completions", "/responses", "/messages", "/models")
    },
    "/v1/v1": "a base URL that ends in /v1 is one for OpenAI's clients only, and ends in it once",
}
"""By path, and for all paths below it."""


def explain(path: str) -> str:
    """Why a path is not found."""
    here = path.rstrip("/") or path
    while here:
        if here in REASONS:
            return f"There is no {path} on this server: {REASONS[here]}."
        here = here.rpartition("/")[0]
    return f"There is no {path} here."
