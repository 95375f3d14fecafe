"""``python -m tests.serving.load``: many clients on a server's process for a while, some of which misbehave.

Prints what became of the requests, how many answers were compared with those of the same requests alone, the memory of
the server, and the rows that are in use at the end.
"""

from __future__ import annotations

import argparse
import collections
import json
import random
import re
import subprocess
import sys
import tempfile
import threading
import time
import types
from pathlib import Path

import gguf

from tests.serving.clients import call, error_of, leave, opened, plain, requests_under_load
from tests.test_documents import write_model

KINDS = {"plain": 10, "leaves": 4, "malformed": 1, "oversized": 1, "slow": 2}
MOST_BODY = 20_000


def memory(process: subprocess.Popen) -> float:
    """Resident megabytes."""
    status = Path(f"/proc/{process.pid}/status").read_text()
    return int(re.findall(r"VmRSS:\s+(\d+)", status)[0]) / 1e3


def one_request(served, rng: random.Random, bodies, alone) -> str:
    """What became of a request."""
    kind = rng.choices(list(KINDS), list(KINDS.values()))[0]
    index = rng.randrange(len(bodies))
    if kind == "plain":
        status, got = plain(served, bodies[index])
        if status != 200:
            return f"plain: {status} {got}"
        return "plain: the same as alone" if (status, got) == alone[index] else "plain: ANOTHER ANSWER"
    if kind == "malformed":
        bad = rng.choice((json.dumps(bodies[index]).encode()[:-9], b"\xff", b"[" * 9999, b'{"prompt": "a", "n": 0}'))
        return f"malformed: {error_of(served, 'POST', '/v1/completions', bad)[0]}"
    if kind == "oversized":
        large = b" " * rng.choice((MOST_BODY + 1, 10**5, 10**6))
        return f"oversized: {error_of(served, 'POST', '/v1/completions', large)[0]}"
    connection = opened(served, prompt="abc", max_tokens=150, n=rng.choice((1, 3)), stream=rng.random() < 0.7)
    if kind == "slow":
        pieces = []
        while piece := connection.recv(500):
            pieces.append(piece)
            time.sleep(0.01)
        status = b"".join(pieces)[9:12].decode()
        leave(connection, abruptly=False)
        return f"slow: {status}"
    time.sleep(rng.random())
    leave(connection, abruptly=rng.random() < 0.5)
    return "left"


def rows(served) -> tuple[float, float]:
    """In use, and requests that wait."""
    text = call(served, "GET", "/metrics")[2].decode()
    figures = dict(re.findall(r"^(\S+) (\S+)$", text, re.MULTILINE))
    return float(figures["qspec_rows_in_use"]), float(figures["qspec_requests_waiting"])


def run(served, process: subprocess.Popen, clients: int, seconds: float) -> None:
    """Loads a server, and prints what came of it."""
    bodies = requests_under_load(60)
    alone = [plain(served, body) for body in bodies]
    assert {status for status, _ in alone} == {200}, alone
    counts, lock = collections.Counter(), threading.Lock()
    began, resident = time.monotonic(), [memory(process)]

    def client(index: int) -> None:
        rng = random.Random(index)
        while time.monotonic() < began + seconds:
            try:
                outcome = one_request(served, rng, bodies, alone)
            except Exception as error:
                outcome = f"EXCEPTION {type(error).__name__}: {error}"
            with lock:
                counts[outcome] += 1

    threads = [threading.Thread(target=client, args=[index]) for index in range(clients)]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        time.sleep(seconds / 12)
        resident.append(memory(process))
    took = time.monotonic() - began
    end = time.monotonic() + 10
    while rows(served) != (0, 0) and time.monotonic() < end:
        time.sleep(0.1)
    print(f"{counts.total()} requests of {clients} clients in {took:.0f} s")
    for outcome, count in sorted(counts.items()):
        print(f"{count:7}  {outcome}")
    print("resident MB:", ", ".join(f"{one:.0f}" for one in resident))
    print("rows in use, requests waiting at the end:", *rows(served))
    again = [plain(served, body) for body in bodies]
    print("answers afterwards the same:", again == alone)


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--port", type=int, default=8123)
    parser.add_argument("--mode", default="auto")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        path = write_model(Path(folder) / "tiny.gguf", gguf.GGMLQuantizationType.Q4_1)
        options = (
            f"--port {arguments.port} --mode {arguments.mode} --max-seq-len 192 --max-body {MOST_BODY} --name tiny"
        )
        command = [sys.executable, "-m", "qspec_jax.serve", str(path), *options.split(), "--body-timeout", "5"]
        process = subprocess.Popen(command)
        served = types.SimpleNamespace(port=arguments.port)
        try:
            while True:
                try:
                    call(served, "GET", "/health")
                    break
                except OSError:
                    assert process.poll() is None
                    time.sleep(0.2)
            run(served, process, arguments.clients, arguments.seconds)
        finally:
            process.terminate()
            print("exit code:", process.wait(60))


if __name__ == "__main__":
    main()
