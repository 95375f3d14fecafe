"""A server as its clients see it: the official one of OpenAI's API, and others that send whatever they like."""

from __future__ import annotations

import dataclasses
import http.client
import json
import random
import re
import shlex
import shutil
import signal
import socket
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor

import openai
import pytest

from qspec_jax.decoding.programs import Programs
from qspec_jax.errors import OutOfMemoryError
from tests.serving.clients import call, error_of, leave, opened, plain, requests_under_load
from tests.serving.conftest import LENGTH, LIMITS, ROWS, running, wait_until
from tests.test_documents import code, statements

BLOCKS = [block for block in code("docs/serving.md") if block.marker == "needs: server"]
LINES = [words for block in BLOCKS if block.language == "sh" for words in statements(block.text) if words[0] == "curl"]
CHAT = [{"role": "user", "content": "Why?"}]
GREEDY = {"model": "tiny", "temperature": 0}


@pytest.fixture(scope="module")
def client(served):
    made = openai.OpenAI(base_url=f"http://127.0.0.1:{served.port}/v1", api_key="none", max_retries=0)
    with made:
        yield made


def letters(text):
    """A text without characters of several bytes, whose tokens are pieces of them."""
    return "".join(letter for letter in text if letter.isascii())


# ---- the official client


def test_a_chat_is_answered(client, idle):
    answer = client.chat.completions.create(messages=CHAT, max_completion_tokens=12, **GREEDY)
    assert (answer.object, answer.model, answer.id[:9]) == ("chat.completion", "tiny", "chatcmpl-")
    choice = answer.choices[0]
    assert (choice.message.role, choice.finish_reason, choice.logprobs) == ("assistant", "length", None)
    assert choice.message.content
    assert answer.usage.completion_tokens == 12
    assert answer.usage.total_tokens == 12 + answer.usage.prompt_tokens == 12 + len("Why?") + 3


def test_a_stream_is_the_answer_in_pieces(client, idle, monkeypatch):
    """However slow the client is to read: after each 16 tokens the server waits for it here."""
    options = {"messages": CHAT, "max_tokens": 60, **GREEDY}
    whole = client.chat.completions.create(**options)
    scheduler, chunks = idle.service._scheduler, []
    advance = scheduler.advance

    def advance_once_it_was_read():
        made = max((len(one.token_ids) for one in scheduler._rows.sequences if one is not None), default=0)
        wait_until(lambda: sum(bool(one.choices and one.choices[0].delta.content) for one in chunks) >= made // 16)
        return advance(2)

    monkeypatch.setattr(scheduler, "advance", advance_once_it_was_read)
    for chunk in client.chat.completions.create(**options, stream=True, stream_options={"include_usage": True}):
        chunks.append(chunk)
    *others, last = chunks
    assert {chunk.object for chunk in chunks} == {"chat.completion.chunk"}
    assert len({chunk.id for chunk in chunks}) == 1
    assert (last.choices, last.usage) == ([], whole.usage)
    assert {chunk.usage for chunk in others} == {None}
    deltas = [chunk.choices[0].delta for chunk in others]
    assert len(deltas) > 4
    assert (deltas[0].role, deltas[0].content) == ("assistant", "")
    assert "".join(delta.content or "" for delta in deltas) == whole.choices[0].message.content
    reasons = [chunk.choices[0].finish_reason for chunk in others]
    assert reasons == [None] * (len(reasons) - 1) + ["length"]


@pytest.mark.parametrize("stream", [False, True])
def test_a_stop_string_is_never_shown(client, idle, stream):
    options = {"prompt": "abc", "max_tokens": 60, **GREEDY}
    text = client.completions.create(**options).choices[0].text
    for place in (1, 17, 40):
        stop = [text[place : place + 3], "never"]
        if stream:
            chunks = list(client.completions.create(**options, stop=stop, stream=True, logprobs=0))
            found, reason = "".join(chunk.choices[0].text for chunk in chunks), chunks[-1].choices[0].finish_reason
            scores = [chunk.choices[0].logprobs for chunk in chunks if chunk.choices[0].logprobs]
            tokens = [token for one in scores for token in one.tokens]
        else:
            choice = client.completions.create(**options, stop=stop, logprobs=0).choices[0]
            found, reason, tokens = choice.text, choice.finish_reason, choice.logprobs.tokens
        assert (found, reason) == (text[: text.index(stop[0])], "stop")
        assert letters("".join(tokens)) == letters(found)


def test_several_answers_differ_by_their_seeds(client, idle):
    options = {"model": "tiny", "prompt": ["abc", [5, 6, 7]], "n": 2, "max_tokens": 8, "temperature": 2.0}
    choices = client.completions.create(**options, seed=3).choices
    assert [choice.index for choice in choices] == [0, 1, 2, 3]
    assert len({choice.text for choice in choices}) == 4
    streamed = [""] * 4
    for chunk in client.completions.create(**options, seed=3, stream=True):
        streamed[chunk.choices[0].index] += chunk.choices[0].text
    assert streamed == [choice.text for choice in choices]
    second = client.completions.create(**{**options, "prompt": "abc", "n": 1}, seed=4).choices[0]
    assert second.text == choices[1].text
    assert client.completions.create(**options).choices[0].text != choices[0].text


def test_log_probabilities_are_those_of_the_tokens_shown(client, idle):
    options = {"messages": CHAT, "max_tokens": 12, "logprobs": True, "top_logprobs": 3, **GREEDY}
    choice = client.chat.completions.create(**options).choices[0]
    entries = choice.logprobs.content
    assert letters("".join(entry.token for entry in entries)) == letters(choice.message.content)
    for entry in entries:
        assert entry.bytes == (None if "\ufffd" in entry.token else list(entry.token.encode()))
        assert len(entry.top_logprobs) == 3
        assert max(entry.top_logprobs, key=lambda top: top.logprob).token == entry.token
    chunks = list(client.chat.completions.create(**options, stream=True))
    streamed = [one for chunk in chunks if chunk.choices[0].logprobs for one in chunk.choices[0].logprobs.content]
    assert [entry.token for entry in streamed] == [entry.token for entry in entries]


def test_biases_change_the_tokens(client, idle):
    options = {"prompt": "abc", "max_tokens": 3, **GREEDY}
    assert client.completions.create(**options, logit_bias={"4": 100}).choices[0].text == "!!!"


def test_models_are_listed(client):
    assert [model.id for model in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").owned_by == "qspec-jax"
    assert client.get("/models/", cast_to=object)["data"][0]["id"] == "tiny"
    with pytest.raises(openai.NotFoundError, match="there is no model 'gpt-9'"):
        client.models.retrieve("gpt-9")


def test_errors_reach_the_client_by_their_kinds(client, idle):
    with pytest.raises(openai.BadRequestError, match="tools=") as caught:
        client.chat.completions.create(messages=CHAT, model="tiny", tools=[{"type": "function"}])
    assert caught.value.param == "tools"
    told = (
        f"the prompt of 50 tokens and max_tokens={LENGTH} do not fit the {LENGTH} of this server; shorten it, or lower"
    )
    with pytest.raises(openai.BadRequestError, match=told) as caught:
        client.completions.create(prompt="a" * 50, model="tiny", max_tokens=LENGTH)
    assert (caught.value.code, caught.value.param) == ("context_length_exceeded", "max_tokens")
    with pytest.raises(openai.BadRequestError, match="lower max_completion_tokens") as caught:
        client.chat.completions.create(messages=CHAT, model="tiny", max_completion_tokens=LENGTH)
    assert caught.value.param == "max_completion_tokens"
    with pytest.raises(openai.BadRequestError, match=f"and an answer do not fit the {LENGTH} of this server") as caught:
        client.chat.completions.create(messages=[{"role": "user", "content": "a" * LENGTH}], model="tiny")
    assert (caught.value.code, caught.value.param) == ("context_length_exceeded", "messages")
    part = {"type": "image_url", "image_url": {"url": "http://a"}}
    with pytest.raises(openai.BadRequestError, match="image_url"):
        client.chat.completions.create(messages=[{"role": "user", "content": [part]}], model="tiny")
    with pytest.raises(openai.BadRequestError, match="logit_bias has token 4096"):
        client.completions.create(prompt="a", model="tiny", logit_bias={"4096": 1})
    with pytest.raises(openai.NotFoundError, match="gpt-9"):
        client.completions.create(prompt="a", model="gpt-9")


# ---- other clients


@pytest.mark.parametrize(
    ("arguments", "status", "code"),
    [
        (("GET", "/v1/embeddings"), 404, "unknown_url"),
        (("POST", "/v1/completions/", b'{"prompt": "a"}'), 404, "unknown_url"),
        (("GET", "/health/"), 404, "unknown_url"),
        (("GET", "/v1/completions"), 405, "method_not_allowed"),
        (("POST", "/v1/completions", b"{"), 400, None),
        (("POST", "/v1/completions", b"{}", {"content-type": "text/plain"}), 415, "unsupported_media_type"),
        (("POST", "/v1/completions", b"{}", {"content-encoding": "gzip"}), 415, "unsupported_media_type"),
        (("POST", "/v1/completions", b" " * (LIMITS.max_body + 1)), 413, "body_too_large"),
        (("POST", "/v1/completions", b" " * 10**6), 413, "body_too_large"),
        (("POST", "/v1/completions", b" " * (LIMITS.max_body + 1), {"expect": "100-continue"}), 413, "body_too_large"),
        (("POST", "/v1/completions", b"", {"content-length": str(10**12)}), 413, "body_too_large"),
        (("POST", "/v1/completions", b'{"prompt": "a", "n": 33}'), 400, None),
        (("POST", "/v1/chat/completions", b'{"messages": [{"role": "user"}]}'), 400, None),
    ],
)
def test_what_is_refused_has_the_right_status(idle, arguments, status, code):
    assert error_of(idle, *arguments)[:2] == (status, code)


def test_a_body_that_does_not_come_is_not_waited_for(idle, monkeypatch):
    monkeypatch.setattr(idle.api, "_limits", dataclasses.replace(LIMITS, body_s=0.2))
    with socket.create_connection(("127.0.0.1", idle.port)) as slow:
        slow.sendall(b"POST /v1/completions HTTP/1.1\r\nhost: a\r\ncontent-type: application/json\r\n")
        slow.sendall(b"content-length: 100\r\n\r\n{")
        assert slow.recv(1000).startswith(b"HTTP/1.1 408")


def test_a_full_queue_says_when_to_come_back(idle):
    room = ROWS + LIMITS.max_waiting
    idle.api._entering += room
    try:
        status, headers, body = call(idle, "POST", "/v1/completions", b'{"prompt": "a"}')
    finally:
        idle.api._entering -= room
    assert (status, json.loads(body)["error"]["code"]) == (429, "queue_full")
    assert 1 <= int(headers["retry-after"]) <= 60


def test_health_and_metrics(idle):
    assert call(idle, "GET", "/health")[0] == 200
    status, headers, body = call(idle, "GET", "/metrics")
    assert (status, headers["content-type"].partition(";")[0]) == (200, "text/plain")
    figures = dict(re.findall(r"^(.+) (\S+)$", body.decode(), re.MULTILINE))
    assert float(figures['qspec_requests_total{path="/v1/chat/completions",status="200"}']) > 2
    for name in ("generated_tokens_total", "prompt_tokens_total", "drafted_tokens_total", "rows"):
        assert float(figures[f"qspec_{name}"]) > 0
    assert float(figures["qspec_time_to_first_token_seconds_count"]) > 2
    assert float(figures["qspec_inter_token_latency_seconds_count"]) > 2
    assert float(figures['qspec_plan_cycles_total{plan="w4a8 x3"}']) > 0
    assert (figures["qspec_rows_in_use"], figures["qspec_requests_waiting"]) == ("0.0", "0.0")


def test_a_client_without_the_key_is_refused(model):
    with running(model, api_key="secret") as served:
        for path in ("/v1/models", "/metrics", "/nowhere"):
            for key in ({}, {"authorization": "Bearer wrong"}, {"authorization": "Basic secret"}):
                assert error_of(served, "GET", path, headers=key)[:2] == (401, "invalid_api_key")
        assert call(served, "GET", "/v1/models", headers={"authorization": "Bearer secret"})[0] == 200
        assert call(served, "GET", "/health")[0] == 200


@pytest.fixture
def slow(idle, monkeypatch):
    """The server, with steps that take a while."""
    advance = idle.service._scheduler.advance
    monkeypatch.setattr(idle.service._scheduler, "advance", lambda *given: (time.sleep(0.02), advance(1))[1])
    return idle


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_frees_its_rows(slow, stream):
    for abruptly in (False, True):
        before = slow.service.totals.tokens
        connection = opened(slow, prompt="abc", temperature=0, max_tokens=150, n=ROWS + 2, stream=stream)
        wait_until(lambda: slow.service.num_rows_in_use == ROWS and slow.service.num_waiting == 2)
        leave(connection, abruptly=abruptly)
        slow.wait_until_idle()
        assert slow.service.totals.tokens - before < 150 * (ROWS + 2)


def test_a_client_that_does_not_read_takes_no_room_from_others(idle):
    body = {"prompt": "abc", "max_tokens": 60, "n": 16, "logprobs": 20, "stream": True}
    connection = opened(idle, receive_bytes=2048, **body)
    wait_until(lambda: idle.service.num_rows_in_use > 0)
    idle.wait_until_idle()
    assert plain(idle, {"prompt": "abc", "max_tokens": 3})[0] == 200
    leave(connection, abruptly=True)


def test_an_answer_that_takes_too_long_ends_and_says_so(slow, monkeypatch):
    body = {"prompt": "abc", "temperature": 0, "max_tokens": 150}
    plain(slow, {**body, "max_tokens": 2})  # compiles
    monkeypatch.setattr(slow.api, "_limits", dataclasses.replace(LIMITS, request_s=0.2))
    status, headers, got = call(slow, "POST", "/v1/completions", json.dumps(body))
    assert (status, json.loads(got)["error"]["code"], headers["x-should-retry"]) == (504, "timeout", "false")
    for request_s in (0.2, 1.0, 5.0):  # a busy machine's first token comes late
        monkeypatch.setattr(slow.api, "_limits", dataclasses.replace(LIMITS, request_s=request_s))
        status, _, got = call(slow, "POST", "/v1/completions", json.dumps({**body, "stream": True}))
        *pieces, last = [json.loads(line[6:]) for line in got.decode().split("\n\n") if line]
        assert (status, last["error"]["code"]) == (200, "timeout")
        if pieces:
            break
    assert pieces[0]["choices"][0]["text"]


def test_an_answer_that_fails_says_so_and_the_server_goes_on(idle, monkeypatch):
    def fails(*given):
        raise OutOfMemoryError("the device is full")

    body = {"prompt": "abc", "max_tokens": 20}
    with monkeypatch.context() as patch:
        patch.setattr(idle.service._scheduler, "advance", fails)
        assert error_of(idle, "POST", "/v1/completions", json.dumps(body))[:2] == (500, "engine_error")
        got = call(idle, "POST", "/v1/completions", json.dumps({**body, "stream": True}))[2]
        assert json.loads(got[6:])["error"]["message"] == "the request failed: the device is full"
    assert plain(idle, body)[0] == 200
    assert call(idle, "GET", "/health")[0] == 200


def test_programs_that_cannot_be_compiled_fail_those_who_need_them_alone(idle, monkeypatch):
    original, body = Programs.compile, {"prompt": "abc", "max_tokens": 4, "presence_penalty": 0.5}

    def fails(self, plan, shape, *arguments, **options):
        if shape.features.penalises:
            raise OutOfMemoryError("the device is full")
        return original(self, plan, shape, *arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(Programs, "compile", fails)
        told = "the request failed: programs for penalties cannot be compiled: the device is full"
        status, code, message = error_of(idle, "POST", "/v1/completions", json.dumps(body))
        assert (status, code, message[: len(told)]) == (500, "engine_error", told)
        got = call(idle, "POST", "/v1/completions", json.dumps({**body, "stream": True}))[2]
        assert json.loads(got[6:])["error"]["message"] == message
        assert plain(idle, {"prompt": "abc", "max_tokens": 4})[0] == 200


# ---- the page


def here(text, served):
    assert "127.0.0.1:8000" in text
    return text.replace("127.0.0.1:8000", f"127.0.0.1:{served.port}")


@pytest.mark.skipif(shutil.which("curl") is None, reason="there is no curl")
@pytest.mark.parametrize("words", LINES, ids=lambda words: " ".join(words)[:60])
def test_a_line_of_curl_is_answered(words, idle):
    command = shlex.split(here(shlex.join(words), idle))
    got = subprocess.run([*command, "--silent", "--fail"], check=True, capture_output=True, text=True).stdout
    if "metrics" in words[-1]:
        assert "qspec_rows 4.0" in got
    elif '"stream": true' in words[-1]:
        assert got.endswith("data: [DONE]\n\n")
    else:
        assert json.loads(got)


@pytest.mark.parametrize("block", [block for block in BLOCKS if block.language == "python"], ids=str)
def test_a_block_of_python_is_answered(block, idle, capsys):
    exec(compile(here(block.text, idle), str(block), "exec"), {})
    assert capsys.readouterr().out.strip()


# ---- under load


def test_under_load_every_answer_that_arrives_is_that_of_the_request_alone(idle):
    bodies = requests_under_load(9)
    alone = [plain(idle, body) for body in bodies]
    assert {status for status, _ in alone} == {200}
    rng = random.Random(2)
    kinds = rng.choices(("plain", "leaves", "malformed", "oversized", "slow"), (6, 3, 1, 1, 1), k=60)

    def one(index):
        kind, body = kinds[index], bodies[index % len(bodies)]
        if kind == "plain":
            return kind, index, plain(idle, body)
        if kind == "malformed":
            return kind, index, error_of(idle, "POST", "/v1/completions", json.dumps(body).encode()[:-9])[0]
        if kind == "oversized":
            return kind, index, error_of(idle, "POST", "/v1/completions", b" " * 10**5)[0]
        connection = opened(idle, prompt="abc", max_tokens=150, stream=True)
        time.sleep(0.02 * (index % 5))
        if kind == "slow":
            while connection.recv(200):
                time.sleep(0.002)
        leave(connection, abruptly=index % 2 == 0)
        return kind, index, None

    with ThreadPoolExecutor(16) as pool:
        results = list(pool.map(one, range(60)))
    served = [(index, got) for kind, index, got in results if kind == "plain"]
    assert all(got in (alone[index % len(bodies)], (429, "queue_full")) for index, got in served)
    assert sum(got[0] == 200 for _, got in served) >= 12
    assert {got for kind, _, got in results if kind == "malformed"} == {400}
    assert {got for kind, _, got in results if kind == "oversized"} == {413}


# ---- at the end


def test_a_server_that_ends_finishes_what_runs_and_takes_no_more(model):
    with running(model) as served, ThreadPoolExecutor(2) as pool:
        body = {"prompt": "abc", "temperature": 0, "max_tokens": 150}
        alone = plain(served, body)
        advance = served.service._scheduler.advance
        served.service._scheduler.advance = lambda *given: (time.sleep(0.02), advance(1))[1]
        idle = http.client.HTTPConnection("127.0.0.1", served.port, timeout=60)
        running_ones = [pool.submit(plain, served, {**body, "stream": stream}) for stream in (False, True)]
        wait_until(lambda: served.service.num_rows_in_use == 2)
        idle.connect()
        served.server.should_exit = True
        assert [one.result(60) for one in running_ones] == [alone, alone]
        served.thread.join(60.0)
        assert not served.thread.is_alive()
        idle.close()
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(("127.0.0.1", served.port))


@pytest.mark.parametrize("signals", [1, 2])
def test_what_takes_longer_than_the_time_of_grace_fails_and_is_told(model, signals):
    """As does what runs when a second signal comes, however long that time is."""
    limits = dataclasses.replace(LIMITS, grace_s=0.1 if signals == 1 else 1000.0)
    with running(model, limits=limits) as served, ThreadPoolExecutor(2) as pool:
        said, advance = [], served.service._scheduler.advance
        served.server._say = said.append
        served.service._scheduler.advance = lambda *given: (time.sleep(0.1), advance(1))[1]
        body = {"prompt": "abc", "temperature": 0, "max_tokens": 150}
        whole = pool.submit(plain, served, body)
        stream = opened(served, **body, stream=True)
        wait_until(lambda: served.service.num_rows_in_use == 2)
        for _ in range(signals):
            served.server.handle_exit(signal.SIGTERM, None)
            wait_until(lambda: said)
        assert whole.result(60) == (503, "shutting_down")
        received = b""
        while more := stream.recv(10_000):
            received += more
        assert b'"code": "shutting_down"' in received
        stream.close()
        left = f"ending: answers that are not done (2) have {limits.grace_s:g} s; "
        assert said == [left + "Ctrl-C or SIGTERM once more ends them at once"]
