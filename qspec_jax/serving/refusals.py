"""Errors as clients of OpenAI's API expect them: a status, and an object that says what is wrong."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from starlette.responses import JSONResponse

from qspec_jax.decoding.request_options import our_name
from qspec_jax.errors import QSpecError, TooLongError, UsageError

_KINDS = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error"}
# The official client tries again after these, unless it is told not to.
NOT_AGAIN = {"x-should-retry": "false"}


class ApiError(QSpecError):
    """A request that is answered with an error.

    Attributes:
        status: of HTTP.
        param: the parameter of the request that is wrong; None if it is no single one.
        code: for programs.
        headers: of the answer.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        """See the class; ``message`` is for people."""
        super().__init__(message)
        self.status, self.param, self.code, self.headers = status, param, code, dict(headers or {})

    def to_dict(self) -> dict[str, Any]:
        """What the body of the answer is, or an event of a stream."""
        kind = _KINDS.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}

    def response(self) -> JSONResponse:
        """The answer."""
        return JSONResponse(self.to_dict(), self.status, self.headers)


def refusal_of(error: UsageError, names: Iterable[str] = (), *, otherwise: str | None = None) -> ApiError:
    """What a client is told of an argument that makes no sense.

    Args:
        error: of this library.
        names: of the request's parameters; the first that the message has is the one that is wrong.
        otherwise: the one that is wrong where the message has none.
    """
    message = str(error)
    found = {name: re.search(rf"\b({re.escape(name)}|{re.escape(our_name(name))})s?\b", message) for name in names}
    places = {name: match.start() for name, match in found.items() if match is not None}
    code = "context_length_exceeded" if isinstance(error, TooLongError) else None
    return ApiError(400, message, param=min(places, key=places.__getitem__, default=otherwise), code=code)


def failure_of(error: QSpecError) -> ApiError:
    """What a client is told of an answer that has failed."""
    for one in (error, error.__cause__):
        if isinstance(one, ApiError):
            return one
    return ApiError(500, str(error), code="engine_error")
