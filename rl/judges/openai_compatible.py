"""Any OpenAI-compatible endpoint as a judge: a model served by vLLM, by `raylign serve`, or a paid one."""

from typing import Any, Literal

from pydantic import SecretStr

from cluster.errors import JudgeError
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


class OpenAISettings(RemoteSettings):
    """A chat model behind an OpenAI-compatible endpoint."""

    kind: Literal["openai"]
    """Which judge."""
    base_url: str
    """Address of the API, such as http://127.0.0.1:8000/v1."""
    api_key_env: str | None = None
    """Environment variable that holds the API key; left out if the endpoint asks for none."""

    @property
    def key_names(self) -> set[str]:
        return {self.api_key_env} if self.api_key_env else set()

    def build(self, context: JudgeContext) -> RemoteJudge:
        """The judge."""
        key = context.keys[self.api_key_env] if self.api_key_env else SecretStr("none")
        return RemoteJudge("openai", self, OpenAIEndpoint(self, key), self.base_url)


class OpenAIEndpoint:
    """The `openai` client, its own retries off. The schema constrains the reply where the endpoint can do that."""

    def __init__(self, settings: OpenAISettings, key: SecretStr):
        from openai import AsyncOpenAI

        self.key = key
        self._settings = settings
        self._constrained = True
        self._client = AsyncOpenAI(
            base_url=settings.base_url, api_key=key.get_secret_value(), timeout=settings.timeout_s, max_retries=0
        )

    async def ask(self, request: Request) -> Reply:
        """See `Endpoint.ask`."""
        import openai

        settings = self._settings
        content: Any = [_part(part) for part in request.parts]
        constraint: dict[str, Any] = {}
        if self._constrained:
            schema = {"name": "verdict", "schema": request.schema, "strict": True}
            constraint = {"response_format": {"type": "json_schema", "json_schema": schema}}
        try:
            response = await self._client.chat.completions.create(
                model=settings.model,
                messages=[{"role": "system", "content": request.instructions}, {"role": "user", "content": content}],
                temperature=settings.temperature,
                max_tokens=settings.max_output_tokens,
                **constraint,
            )
        except openai.APIStatusError as error:
            if error.status_code in (400, 422) and constraint and "response_format" in error.message:
                self._constrained = False  # it knows no schemas; the instructions ask for JSON as well
                return await self.ask(request)
            raise _failure(settings, error.status_code, error.message, dict(error.response.headers)) from None
        except openai.APIConnectionError as error:
            cause = error.__cause__ or error
            raise Unavailable(f"{settings.base_url}: {type(cause).__name__}: {cause}") from None
        except (ValueError, openai.APIResponseValidationError) as error:
            raise Unavailable(f"the reply cannot be read ({type(error).__name__})") from None
        if not hasattr(response, "choices"):  # the client hands on a page that is no JSON as it is
            raise Unavailable("the reply is no chat completion; is judge.base_url right?")
        return _read_response(response)


def _part(part: Part) -> dict[str, Any]:
    if isinstance(part, CanonicalImage):
        return {"type": "image_url", "image_url": {"url": part.url}}
    return {"type": "text", "text": part}


def _read_response(response: Any) -> Reply:
    read, written = (response.usage.prompt_tokens, response.usage.completion_tokens) if response.usage else (0, 0)
    if not response.choices:
        return Reply("", read, written)
    choice = response.choices[0]
    if choice.finish_reason == "content_filter":
        return Reply("", read, written, blocked="content_filter")
    if getattr(choice.message, "refusal", None):
        return Reply("", read, written, blocked=f"refusal: {choice.message.refusal[:200]}")
    return Reply(choice.message.content or "", read, written, cut=choice.finish_reason == "length")


def _failure(settings: OpenAISettings, code: int, message: str, headers: dict[str, str]) -> Unavailable | JudgeError:
    text = f"HTTP {code}: {message.strip().splitlines()[0][:200] if message.strip() else 'no message'}"
    if code in PASSING_CODES:
        return Unavailable(text, retry_after_seconds(headers))
    key = f" and the key in {settings.api_key_env}" if settings.api_key_env else ""
    return JudgeError(
        f"judge: {settings.base_url} refuses the call ({text}); check judge.base_url, judge.model "
        f"{settings.model!r}{key}"
    )
