"""From a YAML file and dotted overrides to a checked config, with one sentence for each thing that is wrong."""

import difflib
import types
import typing
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError
from pydantic_core import PydanticUndefined

from cluster.errors import ConfigError, RaylignError
from cluster.settings import Settings

Config = TypeVar("Config", bound=Settings)
CONFIGS = Path(__file__).parent / "configs"


def load_config(model: type[Config], path: str, overrides: Sequence[str]) -> Config:
    """Read `path`, apply `overrides` (`a.b.c=value`, the value in YAML) and check the result.

    Raises:
        ConfigError: the file is missing or not a YAML mapping, or any field is unknown, wrong or impossible;
            one sentence per fault, one per line.
    """
    values = _read(path)
    for override in overrides:
        _apply(values, override)
    try:
        return model.model_validate(values)
    except ValidationError as error:
        raise ConfigError("\n".join(_sentence(model, fault) for fault in error.errors())) from None


def dump_config(config: Settings) -> str:
    """The config as YAML, every field resolved."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def describe_fields(model: type[BaseModel], prefix: str = "") -> Iterator[str]:
    """One entry per field: its dotted name, type, default, and what it means."""
    for name, field in model.model_fields.items():
        nested = _models(field.annotation)
        text = " ".join((field.description or "").split())
        if nested:
            yield f"\n{prefix}{name}: {text}"
            for choice in nested:
                if len(nested) > 1:
                    yield f"  with {prefix}{name}.kind={typing.get_args(choice.model_fields['kind'].annotation)[0]}:"
                yield from describe_fields(choice, f"{prefix}{name}.")
        else:
            default = "required" if field.default is PydanticUndefined else f"default {_plain(field.default)}"
            yield f"  {prefix}{name}  ({_type_name(field.annotation)}, {default})\n      {text}"


def _read(path: str) -> dict[str, Any]:
    file = Path(path)
    if not file.is_file():
        known = ", ".join(sorted(one.name for one in CONFIGS.glob("*.yaml")))
        raise ConfigError(f"config file {path} does not exist; jobs/configs has {known}")
    try:
        values = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"config file {path} is not YAML: {' '.join(str(error).split())}") from None
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise ConfigError(f"config file {path} must hold a mapping of fields, not a {type(values).__name__}")
    return values


def _apply(values: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise ConfigError(f"override {override!r} is not of the form key=value, for example loop.steps=30")
    *parents, last = key.split(".")
    for parent in parents:
        child = values.setdefault(parent, {})
        if not isinstance(child, dict):
            raise ConfigError(f"override {override!r}: {parent} is not a section")
        values = child
    try:
        values[last] = yaml.safe_load(text)
    except yaml.YAMLError:
        raise ConfigError(f"override {override!r}: the value is not YAML") from None


def _sentence(model: type[BaseModel], fault: Any) -> str:
    cause = fault.get("ctx", {}).get("error")
    if isinstance(cause, RaylignError):
        return str(cause)
    location = [str(part) for part in fault["loc"]]
    key = ".".join(location)
    if fault["type"] == "extra_forbidden":
        known = list(_keys(model))
        real = ".".join(_without_choices(model, location))
        near = difflib.get_close_matches(real, known, n=1, cutoff=0.0) or known[:1]
        return f"{real} is not a field of the config; did you mean {near[0]}?"
    key = ".".join(_without_choices(model, location))
    if fault["type"] == "missing":
        return f"{key} is required"
    return f"{key} is {fault['input']!r}, but: {fault['msg'][:1].lower()}{fault['msg'][1:]}"


def _without_choices(model: type[BaseModel], location: Sequence[str]) -> list[str]:
    """pydantic puts the chosen `kind` of a union into the location; a person does not write it."""
    kept: list[str] = []
    models = [model]
    for part in location:
        fields = {name: field for one in models for name, field in one.model_fields.items()}
        if part in fields:
            models = _models(fields[part].annotation)
        elif len(models) > 1 and any(part in _kinds(one) for one in models):
            models = [one for one in models if part in _kinds(one)]
            continue
        kept.append(part)
    return kept


def _kinds(model: type[BaseModel]) -> tuple[str, ...]:
    field = model.model_fields.get("kind")
    return typing.get_args(field.annotation) if field else ()


def _keys(model: type[BaseModel], prefix: str = "") -> Iterator[str]:
    for name, field in model.model_fields.items():
        yield f"{prefix}{name}"
        for nested in _models(field.annotation):
            yield from _keys(nested, f"{prefix}{name}.")


def _models(annotation: Any) -> list[type[BaseModel]]:
    """The config sections an annotation allows."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    if typing.get_origin(annotation) in (typing.Union, types.UnionType, typing.Annotated):
        return [model for part in typing.get_args(annotation) for model in _models(part)]
    return []


def _type_name(annotation: Any) -> str:
    if typing.get_origin(annotation) is typing.Literal:
        return " | ".join(map(str, typing.get_args(annotation)))
    return annotation.__name__ if isinstance(annotation, type) else str(annotation).replace("typing.", "")


def _plain(value: Any) -> str:
    return (
        "[" + ", ".join(map(str, value)) + "]" if isinstance(value, tuple) else "none" if value is None else str(value)
    )
