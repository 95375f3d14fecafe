"""The paths of the server: what of OpenAI's API it answers, its health, and its metrics."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import hashlib
import hmac
import math
import time
from collections.abc import Generator
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from qspec_jax.engine.answer import Answer
from qspec_jax.engine.service import Service
from qspec_jax.errors import QSpecError, UsageError
from qspec_jax.serving.asked import Asked, Kind, read_body, requests_of
from qspec_jax.serving.limits import Limits
from qspec_jax.serving.metrics import CONTENT_TYPE, Metrics
from qspec_jax.serving.refusals import NOT_AGAIN, ApiError, failure_of
from qspec_jax.serving.shapes import Shapes
from qspec_jax.serving.streams import GONE, Changes, ClientGoneError, EventStream, all_done, events, while_there

HEALTH = "/health"
_MOST_READING = 256  # bodies that are read at a time
_DISCARDED = 2**24  # bytes beyond the limit that are read and thrown away, so that their sender hears why
_USUAL_S, _LONGEST_WAIT_S = 1.0, 60  # of an answer, while nobody knows; and what a client is told to wait at most


class Api:
    """Answers requests with a service.

    Attributes:
        app: for a server of ASGI.
    """

    def __init__(
        self, service: Service, metrics: Metrics, *, model: str, limits: Limits, api_key: str | None = None
    ) -> None:
        """For a model of some name. With an ``api_key``, all but the health is for those who have it.

        Raises:
            UsageError: the model has no tokenizer.
        """
        if service.intake.tokenizer is None:
            raise UsageError(f"{model} has no tokenizer, and clients send text; give a model that has one")
        self._service, self._metrics, self._limits, self._model = service, metrics, limits, model
        self._tokenizer = service.intake.tokenizer
        self._created = int(time.time())
        self._key = None if api_key is None else _digest(api_key)
        self._entering = self._reading = 0
        self._is_ending = self._is_over = False
        self._answer_s = _USUAL_S  # about how long one takes
        routes = [
            Route("/v1/completions", functools.partial(self._answer, kind=Kind.TEXT), methods=["POST"]),
            Route("/v1/chat/completions", functools.partial(self._answer, kind=Kind.CHAT), methods=["POST"]),
            Route("/v1/models", self._models),
            Route("/v1/models/", self._models),  # which would be a model without a name
            Route("/v1/models/{name:path}", self._one_model),
            Route(HEALTH, self._health),
            Route("/metrics", self._show_metrics),
        ]
        self._paths = {route.path for route in routes}
        handlers: Any = {ApiError: _refused, HTTPException: _not_found, Exception: _broken}
        app = Starlette(routes=routes, exception_handlers=handlers)
        # To another path it would send clients by the host and scheme that it sees, which a proxy may have changed.
        app.router.redirect_slashes = False
        self.app: ASGIApp = self._guarded(app)

    @property
    def num_open(self) -> int:
        """Answers that are made, wait or are about to. One that is done but not read yet takes no room from others."""
        return self._entering + len(self._service)

    def end(self) -> None:
        """Takes no more requests; those that run after the time of grace fail."""
        self._is_ending = True
        asyncio.get_running_loop().call_later(self._limits.grace_s, self.end_at_once)

    def end_at_once(self) -> None:
        """Fails what runs, and what is about to."""
        self._is_over = True
        self._service.cancel_all(_shutting_down())

    # ---- every request

    def _guarded(self, app: ASGIApp) -> ASGIApp:
        """Asks for the key, and counts."""

        async def guarded(scope: Scope, receive: Receive, send: Send) -> None:
            if scope["type"] != "http":
                return
            path = scope["path"] if scope["path"] in self._paths else "other"

            async def counted(message: Message) -> None:
                if message["type"] == "http.response.start" and not _is_stream(message):
                    self._metrics.count_request(path, message["status"])
                await send(message)

            try:
                self._check_key(scope)
            except ApiError as error:
                await error.response()(scope, receive, counted)
            else:
                await app(scope, receive, counted)

        return guarded

    def _check_key(self, scope: Scope) -> None:
        """Refuses who does not have the key, in a time that does not depend on what was given."""
        if self._key is None or scope["path"] == HEALTH:
            return
        given = dict(scope["headers"]).get(b"authorization", b"")
        scheme, _, key = given.partition(b" ")
        if not hmac.compare_digest(hashlib.sha256(key.strip()).digest(), self._key) or scheme.lower() != b"bearer":
            message = "the API key is missing or wrong; send the header Authorization: Bearer KEY"
            headers = {"www-authenticate": "Bearer"}
            raise ApiError(401, message, code="invalid_api_key", headers=headers)

    # ---- paths

    async def _models(self, request: Request) -> Response:
        return JSONResponse({"object": "list", "data": [self._described()]})

    async def _one_model(self, request: Request) -> Response:
        if request.path_params["name"] != self._model:
            message = f"there is no model {request.path_params['name']!r}; this server has {self._model!r} alone"
            raise ApiError(404, message, param="model", code="model_not_found")
        return JSONResponse(self._described())

    def _described(self) -> dict[str, Any]:
        length = self._service.max_seq_len
        return {
            "id": self._model,
            "object": "model",
            "created": self._created,
            "owned_by": "qspec-jax",
            "max_model_len": length,
        }

    async def _health(self, request: Request) -> Response:
        status = "shutting down" if self._is_ending else "ok" if self._service.healthy else "the engine has stopped"
        return JSONResponse({"status": status}, 200 if status == "ok" else 503)

    async def _show_metrics(self, request: Request) -> Response:
        return Response(self._metrics.text(), headers={"content-type": CONTENT_TYPE})

    async def _answer(self, request: Request, *, kind: Kind) -> Any:
        until_s = asyncio.get_running_loop().time() + self._limits.request_s
        if self._is_ending:
            raise _shutting_down()
        _check_content_type(request)
        asked = read_body(await self._body(request), kind, model=self._model)
        changes, answers = Changes(), []
        with contextlib.ExitStack() as held:
            with self._places(asked.num_answers):
                tokenise = functools.partial(requests_of, limits=self._limits, max_seq_len=self._service.max_seq_len)
                for one in await asyncio.to_thread(tokenise, asked, self._service.intake):
                    answers.append(answer := self._service.add(one, on_change=changes))
                    held.callback(answer.cancel)
            if self._is_over:  # since it came
                raise _shutting_down()
            held.callback(self._note_time, answers)
            return await self._reply(request, asked, answers, changes, held, until_s)

    async def _reply(
        self,
        request: Request,
        asked: Asked,
        answers: list[Answer],
        changes: Changes,
        held: contextlib.ExitStack,
        until_s: float,
    ) -> Any:
        """What is sent to a client; what is ``held`` for it ends with that."""
        shapes = Shapes(asked, model=self._model, tokenizer=self._tokenizer)
        if asked.stream:
            after = held.pop_all()

            def at_end(status: int) -> None:
                after.close()
                self._metrics.count_request(request.url.path, status)

            return EventStream(events(answers, shapes, changes), until_s=until_s, at_end=at_end)
        try:
            await while_there(request.receive, all_done(answers, changes), until_s=until_s)
            return JSONResponse(shapes.whole(answers))
        except ClientGoneError:
            return Response(status_code=GONE)
        except QSpecError as error:
            raise failure_of(error) from error

    def _note_time(self, answers: list[Answer]) -> None:
        """Learns how long answers take."""
        for answer in answers:
            if answer.done and answer.sequence.arrivals:
                took_s = answer.sequence.arrivals[-1][0] - answer.submitted_s
                self._answer_s += 0.1 * (took_s - self._answer_s)

    # ---- limits

    async def _body(self, request: Request) -> bytes:
        """The body of a request.

        Raises:
            ApiError: it is too large, or does not come, or there are too many others.
        """
        if self._reading >= _MOST_READING:
            raise self._full()
        self._reading += 1
        try:
            async with asyncio.timeout(self._limits.body_s):
                return await self._read(request)
        except TimeoutError as error:
            message = f"the body did not come within {self._limits.body_s:g} s"
            raise ApiError(408, message, code="body_timeout", headers={**NOT_AGAIN, "connection": "close"}) from error
        except ClientDisconnect as error:
            raise ApiError(GONE, "the client has left") from error
        finally:
            self._reading -= 1

    async def _read(self, request: Request) -> bytes:
        most, pieces, size = self._limits.max_body, [], 0
        length = request.headers.get("content-length", "")
        declared = int(length[:18]) if length.isdecimal() else 0
        # Who asks before sending, or would send for long, is not heard out.
        patience = most if "expect" in request.headers else most + _DISCARDED
        if declared <= patience:
            async for piece in request.stream():
                size += len(piece)
                pieces.append(piece if size <= most else b"")
                if size > most + _DISCARDED:
                    break
            if size <= most:
                return b"".join(pieces)
        message = f"the body is larger than {most} bytes; send less, or raise --max-body"
        raise ApiError(413, message, code="body_too_large", headers={"connection": "close"})

    @contextlib.contextmanager
    def _places(self, count: int) -> Generator[None]:
        """Room for some answers, until they are asked of the service.

        Raises:
            ApiError: there is none.
        """
        room = self._service.batch_size + self._limits.max_waiting
        if count > room:
            raise ApiError(400, f"{count} answers at once: this server has room for {room}; lower n", param="n")
        if self.num_open + count > room:
            raise self._full()
        self._entering += count
        try:
            yield
        finally:
            self._entering -= count

    def _full(self) -> ApiError:
        wait = min(_LONGEST_WAIT_S, max(1, math.ceil(self._answer_s)))
        message = f"{self.num_open} answers are made or wait, and there is no room for more; try again in {wait} s"
        return ApiError(429, message, code="queue_full", headers={"retry-after": str(wait)})


def _shutting_down() -> ApiError:
    return ApiError(503, "the server is shutting down", code="shutting_down")


def _is_stream(message: Message) -> bool:
    """Whether an answer is sent in pieces, and is counted when it ends."""
    return any(value.startswith(b"text/event-stream") for name, value in message["headers"] if name == b"content-type")


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode()).digest()


def _check_content_type(request: Request) -> None:
    """Refuses what a page of another site could send without being asked: JSON makes its browser ask."""
    given = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if given != "application/json" and not given.endswith("+json"):
        message = f"content-type {given[:60]!r}: send JSON, with the header Content-Type: application/json"
        raise ApiError(415, message, code="unsupported_media_type")
    coding = request.headers.get("content-encoding", "identity").strip().lower()
    if coding not in ("", "identity"):
        message = f"content-encoding {coding[:60]!r}: send the body as it is, without that header"
        raise ApiError(415, message, code="unsupported_media_type", headers={"accept-encoding": "identity"})


async def _refused(request: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return error.response()


async def _not_found(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    message = f"{request.method} {request.url.path[:100]}: {error.detail}; see GET /v1/models and docs/serving.md"
    code = {404: "unknown_url", 405: "method_not_allowed"}.get(error.status_code)
    return ApiError(error.status_code, message, code=code, headers=error.headers).response()


async def _broken(request: Request, error: Exception) -> Response:
    return ApiError(500, "the server has failed; its log says how", code="internal_error").response()
