"""Gemini as a judge, through either of Google's SDKs (arXiv 2402.10884 grades with Gemini)."""

import asyncio
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal

from pydantic import SecretStr

from cluster.errors import ConfigError, JudgeError
from rl.images import CanonicalImage
from rl.judges.base import JudgeContext
from rl.judges.instructions import Part
from rl.judges.remote import (
    PASSING_CODES,
    RemoteJudge,
    RemoteSettings,
    Reply,
    Request,
    Unavailable,
    retry_after_seconds,
)

BLOCKING = {"SAFETY", "RECITATION", "LANGUAGE", "BLOCKLIST", "PROHIBITED_CONTENT", "SPII", "IMAGE_SAFETY"}


class GeminiSettings(RemoteSettings):
    """Google's Gemini; sees the pictures and grades all answers of a prompt in one call."""

    kind: Literal["gemini"]
    """Which judge."""
    model: str = "gemini-3.5-flash"
    """Name of the Gemini model."""
    sdk: Literal["google-genai", "google-generativeai"] = "google-genai"
    """`google-genai` is the current SDK; `google-generativeai` has had no support since November 2025."""
    base_url: str | None = None
    """Another address than Google's, for a proxy."""
    api_key_env: str = "GEMINI_API_KEY"
    """Environment variable that holds the API key."""

    @property
    def key_names(self) -> set[str]:
        return {self.api_key_env}

    def build(self, context: JudgeContext) -> RemoteJudge:
        """The judge.

        Raises:
            ConfigError: the SDK is not installed.
        """
        endpoint = GenaiEndpoint if self.sdk == "google-genai" else GenerativeAiEndpoint
        try:
            return RemoteJudge("gemini", self, endpoint(self, context.keys[self.api_key_env]), self.base_url or "")
        except ImportError as error:
            raise ConfigError(
                f"judge.sdk: {self.sdk} is not installed ({error}); pip install 'raylign[gemini]'"
            ) from error


class GenaiEndpoint:
    """google-genai. Its own retries are off, for they overlook how long the server asks to wait."""

    def __init__(self, settings: GeminiSettings, key: SecretStr):
        from google import genai
        from google.genai import types

        self.key = key
        self._settings = settings
        self._types = types
        options = types.HttpOptions(
            base_url=settings.base_url,
            timeout=int(settings.timeout_s * 1000),
            retry_options=types.HttpRetryOptions(
                attempts=1
            ),  # left out, a refused connection waits up to 10 s for another
        )
        self._client = genai.Client(api_key=key.get_secret_value(), vertexai=False, http_options=options)

    async def ask(self, request: Request) -> Reply:
        """See `Endpoint.ask`."""
        from google.genai import errors

        types, settings = self._types, self._settings
        config = types.GenerateContentConfig(
            system_instruction=request.instructions,
            temperature=settings.temperature,
            max_output_tokens=settings.max_output_tokens,
            response_mime_type="application/json",
            response_json_schema=request.schema,
            automatic_function_calling=types.AutomaticFunctionCallingConfig(disable=True),
        )
        contents: Any = [types.Content(role="user", parts=[self._part(part) for part in request.parts])]
        try:
            response = await self._client.aio.models.generate_content(
                model=settings.model, contents=contents, config=config
            )
        except errors.APIError as error:
            raise _failure(settings, error.code, error.message, error.details, _headers(error.response)) from None
        except OSError as error:
            raise Unavailable(f"{type(error).__name__}: {error}") from None
        except ValueError as error:  # a body that is no JSON, such as a proxy's page
            raise Unavailable(f"the reply cannot be read ({type(error).__name__})") from None
        except Exception as error:  # the SDK's HTTP library is its own choice, and so are that library's errors
            if type(error).__module__.split(".")[0] in ("httpx", "httpx2", "aiohttp"):
                raise Unavailable(f"{type(error).__name__}: {error}") from None
            raise
        return _read_response(response)

    def _part(self, part: Part) -> Any:
        if isinstance(part, CanonicalImage):
            return self._types.Part.from_bytes(data=part.png, mime_type="image/png")
        return self._types.Part.from_text(text=part)


class GenerativeAiEndpoint:
    """google-generativeai, the SDK before. Over REST and in threads: its own asyncio does not survive a second loop."""

    def __init__(self, settings: GeminiSettings, key: SecretStr):
        import google.generativeai as sdk
        from google.protobuf.json_format import ParseError

        self.key = key
        self._settings = settings
        options = {"api_endpoint": settings.base_url} if settings.base_url else None
        sdk.configure(api_key=key.get_secret_value(), transport="rest", client_options=options)
        self._sdk = sdk
        self._parse_error = ParseError
        self._threads = ThreadPoolExecutor(settings.concurrency, thread_name_prefix="judge")

    async def ask(self, request: Request) -> Reply:
        """See `Endpoint.ask`."""
        return await asyncio.get_running_loop().run_in_executor(self._threads, self._ask, request)

    def _ask(self, request: Request) -> Reply:
        from google.api_core import exceptions

        settings = self._settings
        model = self._sdk.GenerativeModel(settings.model, system_instruction=request.instructions)
        config = self._sdk.GenerationConfig(
            temperature=settings.temperature,
            max_output_tokens=settings.max_output_tokens,
            response_mime_type="application/json",
            response_schema=_old_schema(request.schema),
        )
        parts = [
            {"mime_type": "image/png", "data": part.png} if isinstance(part, CanonicalImage) else part
            for part in request.parts
        ]
        once: Any = {"timeout": settings.timeout_s, "retry": None}
        try:
            response = model.generate_content(parts, generation_config=config, request_options=once)
        except exceptions.GoogleAPICallError as error:
            headers = _headers(getattr(error, "response", None))
            raise _failure(settings, int(error.code or 500), error.message, error.details, headers) from None
        except OSError as error:
            raise Unavailable(f"{type(error).__name__}: {error}") from None
        except (ValueError, self._parse_error) as error:  # a body that is no JSON, such as a proxy's page
            raise Unavailable(f"the reply cannot be read ({type(error).__name__})") from None
        return _read_response(response)


def _read_response(response: Any) -> Reply:
    """What both SDKs call a GenerateContentResponse."""
    usage = response.usage_metadata
    read = getattr(usage, "prompt_token_count", None) or 0
    names = ("candidates_token_count", "thoughts_token_count")
    written = sum(getattr(usage, name, None) or 0 for name in names)
    block = getattr(response.prompt_feedback, "block_reason", None)
    if block:
        return Reply("", read, written, blocked=f"prompt {_name(block)}")
    if not response.candidates:
        return Reply("", read, written)
    candidate = response.candidates[0]
    finish = _name(candidate.finish_reason)
    if finish in BLOCKING:
        return Reply("", read, written, blocked=finish)
    parts = (candidate.content.parts if candidate.content else None) or []
    text = "".join(part.text or "" for part in parts if not getattr(part, "thought", False))
    return Reply(text, read, written, cut=finish == "MAX_TOKENS")


def _failure(
    settings: GeminiSettings, code: int, message: str | None, details: Any, headers: dict[str, str]
) -> Unavailable | JudgeError:
    """What an HTTP error means for a judge."""
    first = (message or "").strip().splitlines()[:1]
    text = f"HTTP {code}: {first[0][:200] if first else 'no message'}"
    if code in PASSING_CODES:
        return Unavailable(text, retry_after_seconds(headers) or _retry_delay(details))
    return JudgeError(
        f"judge: {settings.sdk} refuses the call ({text}); check judge.model {settings.model!r} and the key in "
        f"{settings.api_key_env}"
    )


def _retry_delay(details: Any) -> float | None:
    """The server's RetryInfo, such as {"retryDelay": "13s"}, wherever it is nested."""
    if isinstance(details, dict):
        delay = details.get("retryDelay")
        if isinstance(delay, str) and delay.removesuffix("s").replace(".", "", 1).isdigit():
            return float(delay.removesuffix("s"))
        details = list(details.values())
    if isinstance(details, list | tuple):
        return next((found for found in map(_retry_delay, details) if found is not None), None)
    return None


def _headers(response: Any) -> dict[str, str]:
    headers = getattr(response, "headers", None) or {}
    return {str(name).lower(): str(value) for name, value in headers.items()}


def _name(value: Any) -> str:
    return str(getattr(value, "name", value))


def _old_schema(schema: dict[str, Any]) -> dict[str, Any]:
    """A JSON schema as google-generativeai wants it: the subset of OpenAPI that its protocol knows."""
    old: dict[str, Any] = {"type": schema["type"].upper()}
    if "required" in schema:
        old["required"] = schema["required"]
    if "enum" in schema:
        old |= {"enum": schema["enum"], "format": "enum"}
    if "items" in schema:
        old |= {"items": _old_schema(schema["items"]), "min_items": schema["minItems"], "max_items": schema["maxItems"]}
    if "properties" in schema:
        old["properties"] = {name: _old_schema(value) for name, value in schema["properties"].items()}
    return old
