"""Stub."""

from pydantic import BaseModel, ConfigDict


class RedteamOptions(BaseModel):
    model_config = ConfigDict(frozen=True, extra="allow")
