"""Route `/glmd/clients`: settings of editors and agents for this server."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Header, Query
from pydantic import BaseModel, Field

from glmd.api.client_settings import CLIENTS, MODEL, Endpoint, describe_parts
from glmd.api.state import StateDep
from glmd.errors import EngineUnavailable

router = APIRouter(prefix="/glmd", tags=["Models"])


class SettingsPart(BaseModel):
    heading: str = Field(description="File of the text, as a comment; empty: none.")
    text: str
    language: str = Field(description="Such as json or sh; empty: Markdown.")


class ClientSettings(BaseModel):
    name: str = Field(description="Name for `glmd connect`.")
    title: str
    parts: list[SettingsPart]


class ClientList(BaseModel):
    openai_url: str = Field(description="Base URL for clients of OpenAI's API.")
    anthropic_url: str = Field(description="Base URL for clients of Anthropic's API.")
    model: str = Field(description="Name that stands for the served model.")
    clients: list[ClientSettings]


@router.get("/clients")
async def clients(
    state: StateDep,
    url: Annotated[str, Query(pattern=r"^https?://\S+$", description="URL of this server.")],
    authorization: Annotated[str, Header(include_in_schema=False)] = "",
) -> ClientList:
    """Settings of editors and agents for this server, with the request's API key."""
    info = state.engine.info
    if info is None:
        raise EngineUnavailable("The model is still loading, so its context length is not known.")
    key = authorization.removeprefix("Bearer ").strip() or None
    server = Endpoint(url.rstrip("/"), key, info.max_context)
    return ClientList(
        openai_url=server.openai,
        anthropic_url=server.url,
        model=MODEL,
        clients=[
            ClientSettings(
                name=client.name,
                title=client.title,
                parts=[
                    SettingsPart(heading=heading, text=text, language=language)
                    for heading, text, language in describe_parts(client.setup(server))
                ],
            )
            for client in CLIENTS
        ],
    )
