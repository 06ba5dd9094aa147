"""From a YAML file and dotted overrides to a checked config, with one sentence for each thing that is wrong."""

import difflib
import re
import textwrap
import types
import typing
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, Tag, ValidationError
from pydantic_core import PydanticUndefined

from cluster.errors import ConfigError, RaylignError
from cluster.settings import Settings

Config = TypeVar("Config", bound=Settings)
CONFIGS = Path(__file__).parent / "configs"
HELP_WIDTH = 110

# What may differ when a run goes on: how far, on which machines, and how fast; never what is learned from what.
FREE_TO_CHANGE = (
    "run.", "cluster.", "loop.steps", "loop.eval_every", "loop.checkpoint_", "rollout.workers",
    "rollout.resources.", "rollout.max_sequences", "rollout.cpu_cache_gib", "rollout.gpu_memory_fraction",
    "reference.workers", "reference.resources.", "reference.tokens_per_batch", "learner.resources.", "weights.",
    "judge.budget", "judge.concurrency", "judge.requests_per_minute", "judge.tokens_per_minute", "judge.timeout_s",
    "judge.retries", "judge.cache", "judge.input_price", "judge.output_price", "judge.api_key_env",
    "judge.base_url", "judge.resources.", "judge.workers", "pairs.masked.", "pairs.second.masked.",
)  # fmt: skip


def load_config(model: type[Config], path: str | None, overrides: Sequence[str]) -> Config:
    """Read `path`, if there is one, apply `overrides` (`a.b.c=value`, the value in YAML) and check the result.

    Raises:
        ConfigError: the file is missing or not a YAML mapping, or any field is unknown, wrong or impossible;
            one sentence per fault, one per line.
    """
    values = _read(path) if path else {}
    _check_contradictions(overrides)
    # A choice of kind first, whatever the order: the other fields depend on it.
    for override in sorted(overrides, key=lambda one: not one.partition("=")[0].endswith(".kind")):
        _apply(model, values, override)
    try:
        return model.model_validate(values)
    except ValidationError as error:
        raise ConfigError("\n".join(_sentence(model, fault) for fault in error.errors())) from None


def dump_config(config: Settings) -> str:
    """The config as YAML, every field resolved."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def check_same_settings(stored: str, config: Settings, where: str) -> None:
    """Refuse to go on with a run that was made with other settings that matter: its prompts would be mixed up.

    `stored` is the text of its config.yaml.

    Raises:
        ConfigError: names the first field that differs.
    """
    before, now = (dict(flatten(yaml.safe_load(text))) for text in (stored, dump_config(config)))
    for name in sorted(before.keys() | now.keys()):
        of_member = re.sub(r"^judge\.members\.\d+\.judge\.", "judge.", name)
        if before.get(name) != now.get(name) and not of_member.startswith(FREE_TO_CHANGE):
            raise ConfigError(
                f"{name} is {now.get(name)!r}, but the run in {where} has {before.get(name)!r}; --resume goes on with "
                f"the same settings, others need a run.dir of their own"
            )


def flatten(values: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted name, value) of every field of a dumped config; parts of a list have their number in the name."""
    for name, value in values.items():
        if isinstance(value, list) and any(isinstance(one, dict) for one in value):
            value = dict(enumerate(value))
        if isinstance(value, dict):
            yield from flatten(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def describe_fields(model: type[BaseModel], prefix: str = "", defaults: BaseModel | None = None) -> Iterator[str]:
    """One entry per field: its dotted name, type, default, and what it means. `defaults` has those of a section."""
    for name, field in model.model_fields.items():
        nested = _models(field.annotation)
        text = " ".join((field.description or "").split())
        default = getattr(defaults, name) if defaults else field.get_default(call_default_factory=True)
        if nested:
            yield "\n" + textwrap.fill(f"{prefix}{name}: {text}", HELP_WIDTH)
            for choice in nested:
                if len(nested) > 1:
                    yield f"  with {prefix}{name}.kind={_kinds(choice)[0]}:"
                item = "[]" if typing.get_origin(field.annotation) is tuple else ""
                own = default if isinstance(default, choice) else None
                yield from describe_fields(choice, f"{prefix}{name}{item}.", own)
        else:
            shown = "required" if default is PydanticUndefined else f"default {_plain(default)}"
            yield f"  {prefix}{name}  ({_type_name(field.annotation)}, {shown})"
            yield textwrap.fill(text, HELP_WIDTH, initial_indent=" " * 6, subsequent_indent=" " * 6)


def _read(path: str) -> dict[str, Any]:
    file = Path(path)
    if not file.is_file():
        known = ", ".join(sorted(one.name for one in CONFIGS.glob("*.yaml")))
        raise ConfigError(f"config file {path} does not exist; jobs/configs has {known}")
    try:
        values = yaml.safe_load(file.read_text(encoding="utf-8"))
    except yaml.MarkedYAMLError as error:
        where = f"line {error.problem_mark.line + 1}: " if error.problem_mark else ""
        raise ConfigError(f"config file {path} is not YAML: {where}{error.problem}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"config file {path} is not YAML: {' '.join(str(error).split())}") from None
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise ConfigError(f"config file {path} must hold a mapping of fields, not a {type(values).__name__}")
    return values


def _check_contradictions(overrides: Sequence[str]) -> None:
    """Refuse an override of a whole section by one value beside overrides of its fields, which would be lost."""
    keys = [override.partition("=")[0] for override in overrides]
    for override in overrides:
        key, _, text = override.partition("=")
        inside = next((one for one in keys if one.startswith(f"{key}.")), None)
        if inside and not text.strip().startswith("{"):
            raise ConfigError(f"overrides {override} and {inside}=… contradict one another: leave one of them out")


def _apply(model: type[BaseModel], values: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise ConfigError(f"override {override!r} is not of the form key=value, for example loop.steps=30")
    *parents, last = key.split(".")
    sections: list[type[BaseModel]] = [model]
    for parent in parents:
        child = values.setdefault(parent, {})
        if child is None:
            child = values[parent] = {}
        if not isinstance(child, dict):
            raise ConfigError(f"override {override!r}: {parent} is not a section")
        values = child
        fields = (one.model_fields[parent] for one in sections if parent in one.model_fields)
        sections = [section for field in fields for section in _models(field.annotation)]
    try:
        values[last] = yaml.safe_load(text)
    except yaml.YAMLError:
        raise ConfigError(f"override {override!r}: the value is not YAML") from None
    if last == "kind" and (chosen := [one for one in sections if values[last] in _kinds(one)]):
        for name in values.keys() - chosen[0].model_fields.keys():
            del values[name]  # the file's, for another kind


def _sentence(model: type[BaseModel], fault: Any) -> str:
    cause = fault.get("ctx", {}).get("error")
    if isinstance(cause, RaylignError):
        return str(cause)
    location = [str(part) for part in fault["loc"]]
    if fault["type"] == "lookalike":
        location.append(fault["ctx"]["field"])
        fault = {**fault, "input": fault["ctx"]["value"]}
    key = ".".join(_without_choices(model, location))
    if fault["type"] == "extra_forbidden":
        known = list(_keys(model))
        if key in known:
            return f"{key} is a field of another kind than the one chosen: take it out, or choose that kind"
        near = difflib.get_close_matches(key, known, n=1, cutoff=0.0) or known[:1]
        return f"{key} is not a field of the config; did you mean {near[0]}?"
    if fault["type"] == "union_tag_invalid":
        tag, known = fault["ctx"]["tag"], [one.strip("' ") for one in fault["ctx"]["expected_tags"].split(",")]
        near = difflib.get_close_matches(tag, known, n=1, cutoff=0.0)[0]
        return f"{key}.kind is {tag!r}, but must be one of {', '.join(known)}; did you mean {near}?"
    if fault["type"] == "missing":
        return f"{key} is required"
    return f"{key} is {fault['input']!r}, but: {fault['msg'][:1].lower()}{fault['msg'][1:]}"


def _without_choices(model: type[BaseModel], location: Sequence[str]) -> list[str]:
    """pydantic puts the chosen `kind` or tag of a union into the location; a person does not write it."""
    kept: list[str] = []
    models = [model]
    tags: set[str] = set()
    for part in location:
        fields = {name: field for one in models for name, field in one.model_fields.items()}
        if part in tags:
            tags = set()
            models = [one for one in models if part in _kinds(one)] or models
            continue
        if part in fields:
            models, tags = _models(fields[part].annotation), _tags(fields[part].annotation)
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
    if typing.get_origin(annotation) in (typing.Union, types.UnionType, typing.Annotated, tuple):
        return [model for part in typing.get_args(annotation) for model in _models(part)]
    return []


def _tags(annotation: Any) -> set[str]:
    """The tags of a union's members."""
    return {mark.tag for part in typing.get_args(annotation) for mark in typing.get_args(part) if isinstance(mark, Tag)}


def _type_name(annotation: Any) -> str:
    origin, parts = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Literal:
        return " | ".join(map(str, parts))
    if origin is typing.Annotated:
        return _type_name(parts[0])
    if origin in (typing.Union, types.UnionType):
        return " | ".join(_type_name(part) for part in parts)
    if origin is tuple:
        return f"list of {_type_name(parts[0])}"
    if origin is not None:
        return f"{origin.__name__} of {' to '.join(_type_name(part) for part in parts)}"
    return "none" if annotation is type(None) else str(annotation.__name__)


def _plain(value: Any) -> str:
    if isinstance(value, tuple):
        return f"[{', '.join(map(str, value))}]"
    return "none" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
