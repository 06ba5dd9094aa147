"""The base of every config model."""

import types
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, ConfigDict, model_validator
from pydantic.fields import FieldInfo
from pydantic_core import PydanticCustomError

LocalPath = Annotated[str, "path"]
"""A file or folder, or an fsspec address. See `located`."""
S = TypeVar("S", bound=BaseModel)


class Settings(BaseModel):
    """Strict and immutable: unknown keys and wrong types are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    @model_validator(mode="before")
    @classmethod
    def _no_lookalikes(cls, values: Any) -> Any:
        """pydantic takes true for 1, "32" for 32 and "yes" for true. A text for a float passes, for YAML reads 1e-4
        as one. (A validator of each field would say where by itself, but may not look at a union's `kind`.)"""
        for name, value in values.items() if isinstance(values, dict) else ():
            if (field := cls.model_fields.get(name)) is None or value is None:
                continue
            if expected := _lookalike(field.annotation, value):
                raise PydanticCustomError(
                    "lookalike", "{expected} is expected", {"field": name, "value": value, "expected": expected}
                )
        return values


def _is_path(field: FieldInfo) -> bool:
    parts = (getattr(part, "__metadata__", ()) for part in typing.get_args(field.annotation))
    return "path" in field.metadata or any("path" in metadata for metadata in parts)


def _lookalike(annotation: Any, value: Any) -> str | None:
    """What is expected, if `value` only looks like it."""
    union = typing.get_origin(annotation) in (typing.Union, types.UnionType)
    kinds = set(typing.get_args(annotation)) if union else {annotation}
    if bool in kinds and not isinstance(value, bool):
        return "true or false"
    if isinstance(value, bool) and kinds & {int, float} and bool not in kinds:
        return "a number"
    if isinstance(value, str) and int in kinds and not kinds & {str, float}:
        return "a whole number"
    return None


def located(settings: S, folders: Sequence[Path]) -> S:
    """The settings with each `LocalPath` absolute that is found in one of `folders`, for actors that run elsewhere."""
    changes: dict[str, Any] = {}
    for name, field in type(settings).model_fields.items():
        value = getattr(settings, name)
        if _is_path(field) and isinstance(value, str):
            found = (folder / Path(value).expanduser() for folder in folders)
            value = next((str(path) for path in found if path.exists()), value)
        elif isinstance(value, BaseModel):
            value = located(value, folders)
        elif isinstance(value, tuple):
            value = tuple(located(one, folders) if isinstance(one, BaseModel) else one for one in value)
        changes[name] = value
    return settings.model_copy(update=changes)
