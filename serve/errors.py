"""Errors in the shape that OpenAI clients understand."""

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


def too_many(message: str, seconds: int, code: str) -> ApiError:
    """429, with the seconds after which to come back."""
    return ApiError(429, message, code, headers={"Retry-After": str(max(1, seconds))})
