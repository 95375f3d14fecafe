"""A server in a thread, on a free port, of a tiny model with a token for every letter."""

from __future__ import annotations

import contextlib
import dataclasses
import threading
import time

import gguf
import pytest

import qspec_jax
from qspec_jax.decoding.sampling_params import SamplingFeatures
from qspec_jax.engine.service import Service
from qspec_jax.serving.api import Api
from qspec_jax.serving.limits import Limits
from qspec_jax.serving.listening import address_of, bind
from qspec_jax.serving.metrics import Metrics
from qspec_jax.serving.server import Server
from tests.test_documents import write_model

# Times are long enough for a machine that has other things to do.
LIMITS = Limits(max_waiting=28, max_body=20_000, request_s=120.0, grace_s=60.0)
ROWS, LENGTH = 4, 192


@dataclasses.dataclass
class Running:
    """A server that runs.

    Attributes:
        port: where.
    """

    service: Service
    api: Api
    server: Server
    port: int
    thread: threading.Thread

    def wait_until_idle(self, seconds=60.0):
        """Fails where a row, a request or a place stays taken."""
        service = self.service
        wait_until(
            lambda: not (self.api.num_open or service.num_rows_in_use or service.num_waiting or len(service)), seconds
        )


def wait_until(condition, seconds=60.0):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.005)


@contextlib.contextmanager
def running(model, *, api_key=None, limits=LIMITS, burst_s=0.01):
    metrics = Metrics()
    service = model.service(model.plan("qspec", draft="w4a8"), batch_size=ROWS, max_seq_len=LENGTH)
    service._on_end = metrics.count_answer
    service._scheduler._pace.burst_s = burst_s
    # All that tests need, compiled at once.
    service._scheduler.expect([32], SamplingFeatures(draws=True, truncates=True, biases=True, scores=True))
    metrics.watch(service)
    api = Api(service, metrics, model="tiny", limits=limits, api_key=api_key)
    with contextlib.closing(bind("127.0.0.1", 0)) as listening:
        port, server = int(address_of(listening).rpartition(":")[2]), Server(api, limits)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True)
        thread.start()
        wait_until(lambda: server.started)
        try:
            yield Running(service, api, server, port, thread)
        finally:
            server.should_exit = True
            thread.join(60.0)
            assert service.close(60.0)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    path = tmp_path_factory.mktemp("served") / "tiny.gguf"
    return qspec_jax.load(write_model(path, gguf.GGMLQuantizationType.Q4_1))


@pytest.fixture(scope="module")
def served(model):
    with running(model) as made:
        yield made


@pytest.fixture
def idle(served):
    """The server, in which nothing is left after the test."""
    yield served
    served.wait_until_idle()
