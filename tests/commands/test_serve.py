"""The command that serves: what it refuses before a model is loaded, what it says, and how signals end it."""

from __future__ import annotations

import json
import os
import signal
import socket
import threading
import time
import urllib.request

import pytest

from qspec_jax import serve
from qspec_jax.engine.service import Service


@pytest.fixture
def quick(loaded, monkeypatch):
    """The model is there, and nothing is compiled before somebody asks."""
    monkeypatch.setattr(Service, "compile", lambda self, **_: None)
    monkeypatch.delenv(serve.KEY_VARIABLE, raising=False)


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        return taken.getsockname()[1]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_a_server_that_has_been_asked_for_its_models(quick, capsys, number):
    port, got = free_port(), {}

    def ask():
        for _ in range(6000):
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{port}/v1/models", timeout=20) as response:
                    got.update(json.load(response))
                break
            except OSError:
                time.sleep(0.01)
        os.kill(os.getpid(), number)

    client = threading.Thread(target=ask)
    client.start()
    assert serve.main(["--port", str(port), "--name", "mine", "--mode", "w4a16"]) == 0
    client.join(60)
    assert [model["id"] for model in got["data"]] == ["mine"]
    said = capsys.readouterr().err.splitlines()
    assert said[-2:] == [f"serving mine at http://127.0.0.1:{port}/v1; Ctrl-C ends it", "ended"]
    assert not [line for line in said if "warning" in line]


def test_an_address_that_somebody_has_is_refused_before_a_model_is_loaded(capsys):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert serve.main(["--port", str(port)]) == 1
    assert f"cannot listen on 127.0.0.1 port {port}: " in capsys.readouterr().err


def test_a_package_that_is_missing_is_named_with_the_remedy(monkeypatch, capsys):
    monkeypatch.setattr(serve, "_PACKAGES", ("starlette", "no_such_package"))
    assert serve.main([]) == 1
    assert "a server needs no_such_package: pip install 'qspec-jax[serve]'" in capsys.readouterr().err


@pytest.mark.parametrize("content", ["", " \n", "two words", "schlüssel", "a\x00b"])
def test_a_file_without_a_key_is_refused(tmp_path, capsys, content):
    path = tmp_path / "key"
    path.write_text(content, encoding="utf-8")
    assert serve.main(["--api-key-file", str(path)]) == 2
    assert "has no key" in capsys.readouterr().err


def test_the_key_is_that_of_the_file_or_else_of_the_variable(tmp_path, monkeypatch):
    path = tmp_path / "key"
    path.write_text("of-the-file\n")
    monkeypatch.setenv(serve.KEY_VARIABLE, "of-the-variable")
    assert serve._api_key(path) == "of-the-file"
    assert serve._api_key(None) == "of-the-variable"
    monkeypatch.delenv(serve.KEY_VARIABLE)
    assert serve._api_key(None) is None


def test_a_cpu_reads_a_small_cache_unless_asked_for_another(model, monkeypatch):
    parse = serve.build_parser().parse_args
    assert serve._size(parse([]), model) == {"batch_size": 4, "max_seq_len": model.config.max_position_embeddings}
    asked = parse(["--batch-size", "9", "--max-seq-len", "2000"])
    assert serve._size(asked, model) == {"batch_size": 9, "max_seq_len": 2000}
    monkeypatch.setattr("jax.default_backend", lambda: "gpu")
    assert serve._size(parse([]), model) == {"batch_size": 8, "max_seq_len": None}
