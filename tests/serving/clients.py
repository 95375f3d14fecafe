"""Clients of a server: those that want an answer, and those that leave, or send what is none of its business."""

from __future__ import annotations

import http.client
import json
import random
import socket
import struct


def call(served, method, path, body=None, headers=None):
    """Status, headers and body of a request of any kind."""
    connection = http.client.HTTPConnection("127.0.0.1", served.port, timeout=60)
    try:
        connection.request(method, path, body, {"content-type": "application/json", **(headers or {})})
        response = connection.getresponse()
        return response.status, response.headers, response.read()
    finally:
        connection.close()


def error_of(served, *arguments, **options):
    status, _, body = call(served, *arguments, **options)
    error = json.loads(body)["error"]
    assert set(error) == {"message", "type", "param", "code"}
    return status, error["code"], error["message"]


def opened(served, path="/v1/completions", *, receive_bytes=None, **body):
    """A connection that has asked for something and not read the answer yet, of which it can hold so many bytes."""
    connection = socket.socket()
    connection.settimeout(60)
    if receive_bytes is not None:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_bytes)
    connection.connect(("127.0.0.1", served.port))
    data = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nhost: a\r\ncontent-type: application/json\r\ncontent-length: {len(data)}\r\n\r\n"
    connection.sendall(head.encode() + data)
    return connection


def leave(connection, *, abruptly):
    if abruptly:  # a reset, as of a client that was killed
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    connection.close()


def plain(served, body):
    """An answer's text, whole or in pieces."""
    path = "/v1/chat/completions" if "messages" in body else "/v1/completions"
    status, _, got = call(served, "POST", path, json.dumps(body).encode())
    if status != 200:
        return status, json.loads(got)["error"]["code"]
    if not body.get("stream"):
        choice = json.loads(got)["choices"][0]
        return status, choice["message"]["content"] if "messages" in body else choice["text"]
    events = got.decode().removesuffix("\n\n").split("\n\n")
    assert events.pop() == "data: [DONE]"
    choices = [json.loads(event.removeprefix("data: "))["choices"][0] for event in events]
    return status, "".join(one["text"] if "text" in one else one["delta"].get("content", "") for one in choices)


def requests_under_load(count):
    rng, made = random.Random(1), []
    for index in range(count):
        prompt = "".join(rng.choice("abcdefgh") for _ in range(rng.choice((1, 9, 25))))
        kind = {"messages": [{"role": "user", "content": prompt}]} if index % 3 == 0 else {"prompt": prompt}
        drawn = {"temperature": rng.choice((0, 0.7, 1.5)), "seed": index, "stop": [["q"], []][index % 2]}
        made.append({**kind, **drawn, "max_tokens": rng.choice((1, 20, 60)), "stream": index % 4 < 2})
    return made
