"""The base of every config model."""

from pydantic import BaseModel, ConfigDict


class Settings(BaseModel):
    """Strict and immutable: unknown keys and wrong types are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)
