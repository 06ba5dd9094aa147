"""Errors in the shape that OpenAI clients understand."""

import json
from collections.abc import Mapping
from typing import Any


class ApiError(Exception):
    """A request that is not answered: status, and a sentence that says what is wrong and how to mend it."""

    def __init__(
        self, status: int, message: str, code: str, param: str | None = None, headers: Mapping[str, str] | None = None
    ):
        super().__init__(message)
        self.status = status
        self.message = message
        self.code = code
        self.param = param
        self.headers = dict(headers or {})

    @property
    def body(self) -> dict[str, Any]:
        """{"error": …} as OpenAI's API gives it."""
        kind = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}
        told = kind.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")
        return {"error": {"message": self.message, "type": told, "param": self.param, "code": self.code}}


def malformed(field: str | None, fault: str) -> ApiError:
    """400 for a request that a schema refuses."""
    told = fault.removeprefix("Value error, ")
    return ApiError(400, f"{field}: {told}" if field else f"the body: {told}", "invalid_request", field)


def from_engine(status: int, body: bytes) -> ApiError:
    """What an engine refused, whose own errors have the status once more as their code."""
    try:
        told = dict(json.loads(body)["error"])
    except (ValueError, TypeError, KeyError):
        told = {}
    if isinstance(told.get("code"), str):
        return ApiError(status, told["message"], told["code"], told["param"])
    if status >= 500 or "message" not in told:
        return ApiError(status, "the engine failed; its log says why", "engine_error")
    return ApiError(status, told["message"], "invalid_request", told.get("param"))


def too_many(message: str, seconds: int, code: str) -> ApiError:
    """429, with the seconds after which to come back."""
    return ApiError(429, message, code, headers={"Retry-After": str(max(1, seconds))})
