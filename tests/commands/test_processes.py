"""A command in several processes on the CPU, whose messages gloo carries: results, a death, and the way on.

Each process is bounded in time, and killed at the end: SIGTERM means something to JAX.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from argparse import Namespace
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace

import pytest

import qspec_jax
from qspec_jax import QuantConfig, chat, evaluate, generate, harness, info, quantize, serve, texts
from qspec_jax.bench import __main__ as bench
from qspec_jax.commands import processes
from qspec_jax.device.meeting import Membership
from qspec_jax.device.processes import Group
from qspec_jax.evaluation.scores import score_text
from tests import tiny
from tests.device.test_processes import Client

ROOT = Path(__file__).parents[2]
MOST_S = 300  # nothing is waited for as long, but on a machine that is very busy


@contextlib.contextmanager
def started(count, command, *, typed=""):
    """So many processes of a command, told who they are by three arguments; ``typed`` is the first one's input."""
    with socket.create_server(("localhost", 0)) as free:
        coordinator = f"localhost:{free.getsockname()[1]}"
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "1", "QSPEC_JAX_CACHE": "off"}
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE) | {"text": True}
    members = [(coordinator, str(count), str(process)) for process in range(count)]
    running = [subprocess.Popen(command(*one), cwd=ROOT, env=environment, **pipes) for one in members]
    running[0].stdin.write(typed)
    for one in running:
        one.stdin.close()
        one.stdin = None
    try:
        yield running
    finally:
        for one in running:
            one.kill()
            one.communicate()


def ended(running):
    """Exit code, standard output and last line of the standard error stream of each."""
    end = time.monotonic() + MOST_S
    said = [one.communicate(timeout=end - time.monotonic()) for one in running]
    return [(one.returncode, out, err.splitlines()[-1]) for one, (out, err) in zip(running, said, strict=True)]


@pytest.fixture(scope="module")
def files(tmp_path_factory, tiny_path):
    folder = tmp_path_factory.mktemp("processes")
    prompts = [{"prompt": " ".join(f"w{1 + (7 * line + k) % 46}" for k in range(4))} for line in range(24)]
    (folder / "prompts.jsonl").write_text("".join(f"{json.dumps(one)}\n" for one in prompts))
    return folder, tiny_path


def arguments(files, output):
    folder, model = files
    names = {"model": model, "prompt-file": folder / "prompts.jsonl", "output": folder / output, "batch-size": 2}
    names |= {"max-new-tokens": 128, "mode": "w4a16", "kernels": "reference", "kv": "int8"}
    return [f"--{name}={value}" for name, value in names.items()]


def results(files, output):
    path = files[0] / output
    return [json.loads(line)["token_ids"] for line in path.read_text().splitlines()] if path.exists() else []


def test_a_process_that_is_killed_ends_the_job_and_the_next_one_goes_on(files, capfd):
    """Over a cache of int8, whose first block ends within each text."""

    def command(coordinator, count, process):
        who = ["--coordinator", coordinator, "--num-processes", count, "--process-id", process, "--mesh", "data=2"]
        return [sys.executable, "-m", "qspec_jax.generate", *arguments(files, "several.jsonl"), *who]

    with started(2, command) as (leader, other):
        end = time.monotonic() + MOST_S
        while not results(files, "several.jsonl") and leader.poll() is None and time.monotonic() < end:
            time.sleep(0.05)
        other.send_signal(signal.SIGKILL)
        began = time.monotonic()
        (code, _, said), _ = ended([leader, other])
    assert (code, time.monotonic() - began < 60) == (1, True)
    assert said.startswith("error: another process has ended, or the network between them failed")
    kept = results(files, "several.jsonl")
    assert 0 < len(kept) < 24
    with started(2, command) as running:
        (code, out, said), (other_code, other_out, other_said) = ended(running)
    assert (code, other_code, out, other_out) == (0, 0, "", ""), (said, other_said)
    assert "tokens/s" in said
    assert generate.main(arguments(files, "one.jsonl")) == 0
    assert results(files, "several.jsonl") == results(files, "one.jsonl")
    assert results(files, "several.jsonl")[: len(kept)] == kept
    capfd.readouterr()


def test_commands_score_measure_and_talk_in_several_processes(tmp_path, tiny_path):
    """All in one pair of processes, which end with the code of process 0."""
    with_template = tmp_path / "model"
    shutil.copytree(tiny_path, with_template)
    template = "{% for message in messages %}{{ message['content'] }} w3 {% endfor %}w4"
    (with_template / "chat_template.jinja").write_text(template)
    words = " ".join(f"w{1 + 7 * k % 46}" for k in range(40))
    (tmp_path / "text.txt").write_text(words)
    (tmp_path / "prompts.txt").write_text("w1 w2 w3 w4\nw5 w6 w7\n")

    def command(*who):
        return [sys.executable, "-m", "tests.commands.several_commands", *who, str(with_template), str(tmp_path)]

    with started(2, command, typed="w1 w2\n/exit\n") as running:
        (code, out, said), (other_code, other_out, other_said) = ended(running)
    assert (code, other_code, out, other_out) == (3, 3, "", ""), (said, other_said)
    found = json.loads((tmp_path / "found.json").read_text())
    assert [one[0] for one in found.values()] == [0, 0, 0, 0, 0, 0]
    assert found["programs"][1] == ["loop", "pieces"]
    assert len(found["chat"][1].split()) == 6
    scores = json.loads(found["evaluate"][1])
    baseline, w4a16 = scores["text"]
    assert baseline["perplexity"] != w4a16["perplexity"]
    assert [(one["num_prompts"], one["identical"]) for one in scores["drafts"]] == [(2, 2)]
    assert found["likelihood"][1] / -39 == pytest.approx(math.log(w4a16["perplexity"]), rel=1e-4)
    model = qspec_jax.load(tiny_path, kernels="reference")
    (alone,) = score_text(model, model.tokenizer.encode(words), precisions=[])
    assert w4a16["perplexity"] == pytest.approx(alone.perplexity, rel=1e-3)
    (step,) = json.loads((tmp_path / "bench.json").read_text())["measurements"]
    assert (step["part"], step["status"], step["repetitions"]) == ("step", "ok", 4)
    assert "w4a16" in found["throughput"][1].splitlines()[-1]


def test_a_model_that_one_process_lacks_ends_all_before_anything_is_written(tmp_path, tiny_path):
    (tmp_path / "text.txt").write_text("w1 w2 w3")

    def command(coordinator, count, process):
        who = ["--coordinator", coordinator, "--num-processes", count, "--process-id", process, "--mesh", "data=2"]
        model = ["--model", str(tmp_path / "none" if process == "1" else tiny_path)]
        return [sys.executable, "-m", "qspec_jax.evaluate", *model, "--text", str(tmp_path / "text.txt"), *who]

    with started(2, command) as running:
        (code, out, said), (other_code, _, other_said) = ended(running)
    assert (code, other_code, out) == (1, 1, "")
    assert said.startswith(f"error: process 1: model '{tmp_path}/none': no such file")
    assert other_said == said.replace("process 1: ", "")


THREE = """
import sys, time
from qspec_jax.device import meeting
from qspec_jax.engine.together import together

def differing(add):
    def both():
        y = jax.random.normal(jax.random.key(lax.axis_index(MODEL)), (16, 1, 1024))
        apart = jnp.concatenate([add(y[row : row + 1]) for row in range(16)])
        return (add(y) != apart).sum()
    mapped = jax.shard_map(both, mesh=make_mesh("model=3"), in_specs=(), out_specs=P(), check_vma=False)
    return int(np.asarray(jax.jit(mapped)()))

with together(meeting.join(meeting.Membership.of(sys.argv[1], int(sys.argv[2]), int(sys.argv[3])))) as group:
    import jax, jax.numpy as jnp, numpy as np
    from jax import lax
    from jax.sharding import PartitionSpec as P
    from pallas_kernels import value_of
    from qspec_jax.device.mesh import MODEL, make_mesh
    from qspec_jax.model.collectives import add_up

    print(differing(lambda y: value_of(add_up(y, MODEL))), differing(lambda y: lax.psum(y, MODEL)), flush=True)
    if group.leads:
        group.tell("begin")
        time.sleep(600)
    heard = group.hear()
    print(next(heard), flush=True)
    next(heard)
"""


@pytest.fixture(scope="module")
def three():
    """What three processes add up, and then what two of them say when process 0 is killed, and their exit codes."""
    with started(3, lambda *who: [sys.executable, "-c", THREE, *who]) as (leader, *others):
        sums = [[*map(int, next_line(one).split())] for one in (leader, *others)]
        heard = [next_line(one) for one in others]
        leader.send_signal(signal.SIGKILL)
        said = [one.communicate(timeout=MOST_S)[1] for one in others]
    return SimpleNamespace(sums=sums, heard=heard, said=said, codes=[one.returncode for one in others])


def next_line(process):
    """Of its standard output, to which the library that carries messages writes as well."""
    return next(line for line in process.stdout if "[Gloo]" not in line)


def test_others_say_in_a_line_that_process_0_was_killed(three):
    """JAX would end them with a signal and a page of addresses."""
    assert three.heard == ["begin\n"] * 2
    lines = [[line for line in err.splitlines() if "[Gloo]" not in line] for err in three.said]
    assert lines == [["error: process 0 has ended, or cannot be reached any more"]] * 2
    assert three.codes == [1, 1]


def test_rows_have_the_same_bits_alone_and_beside_others_on_three_devices(three):
    """With two nothing can differ, and devices of one process add in order. A library's own sum shows what can."""
    for ordered, of_the_library in three.sums:
        assert ordered == 0
        assert of_the_library > 0


def test_a_model_is_loaded_by_several_only_where_somebody_says_what_all_run(monkeypatch, tiny_path):
    monkeypatch.setattr("jax.process_count", lambda: 3)
    with pytest.raises(qspec_jax.UsageError, match=r"one of 3 processes, which share a mesh; give mesh="):
        qspec_jax.load(tiny_path)
    with pytest.raises(qspec_jax.UsageError, match="nobody says what all of them run: load it within `with"):
        qspec_jax.load(tiny_path, mesh="data=3")
    with pytest.raises(qspec_jax.UsageError, match="a model is saved by one process"):
        qspec_jax.save(tiny.language_model(quantization=QuantConfig()), tiny_path / "saved")


@pytest.mark.parametrize(
    ("options", "error"),
    [
        (["--coordinator", "a:1", "--num-processes", "2", "--process-id", "0"], "several processes share a mesh"),
        (["--process-id", "0"], "--coordinator is missing"),
    ],
)
def test_options_are_refused_before_anything_is_started(capfd, files, options, error, told):
    assert generate.main([*arguments(files, "refused.jsonl"), *options]) == 2
    assert error in capfd.readouterr().err
    assert not results(files, "refused.jsonl")
    expected = [("a:1", 2, 0, 2)] if "--coordinator" in options else []
    assert [(*one[:3], one[4]) for one in told] == expected


@pytest.fixture
def told(monkeypatch):
    """Of what the other processes hear that wait for this one."""
    heard = []
    monkeypatch.setattr("qspec_jax.device.processes.has_met", False)
    monkeypatch.setattr("qspec_jax.device.meeting.tell_of_failure", lambda *given, waits: heard.append(given))
    return heard


@pytest.mark.parametrize(
    ("who", "wrong", "expected"),
    [
        ("--coordinator a:1 --num-processes 2 --process-id 1", "--no-such", ("a:1", 2, 1)),
        ("--coordinator=a:1 --num-processes=2 --process-id=0", "--batch-size x", ("a:1", 2, 0)),
        ("--coordinator a:1 --num-processes 2 --process-id 2", "--mesh data=2", ("a:1", 2, None)),
        ("--coordinator a:1 --num-processes two", "--mesh data=2", ("a:1", None, None)),
        ("--coordinator auto", "--no-such", None),
        ("--coordinator a --num-processes 2 --process-id 1", "--no-such", ("a", 2, 1)),
        ("", "--no-such", None),
        ("--coordinator a:1 --num-processes 2 --process-id 1", "--help", None),
    ],
)
def test_others_hear_of_options_that_one_process_cannot_take(capfd, told, who, wrong, expected):
    code = 2
    try:
        code = generate.main([*who.split(), *wrong.split()])
    except SystemExit as end:
        code = end.code
    said = capfd.readouterr().err
    assert code == (0 if wrong == "--help" else 2)
    assert [one[:3] for one in told] == ([] if expected is None else [expected])
    assert all(said.endswith(f"error: {one[3]}\n") and one[4] == 2 for one in told)


def test_one_that_has_met_the_others_tells_them_otherwise(capfd, told, monkeypatch):
    monkeypatch.setattr("qspec_jax.device.processes.has_met", True)
    assert generate.main(["--coordinator", "a:1", "--num-processes", "2", "--process-id", "1"]) == 2
    assert told == []
    capfd.readouterr()


def test_a_scheduler_s_processes_join_where_a_mesh_is_asked_for(monkeypatch, capfd, files):
    asked = []

    def join(membership):
        asked.append(membership)
        raise qspec_jax.UsageError("no cluster after all")

    monkeypatch.setattr("qspec_jax.device.meeting.join", join)
    monkeypatch.setattr("qspec_jax.commands.processes._keep_standard_output", lambda: None)
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "2")
    monkeypatch.setenv("TF_CPP_MIN_LOG_LEVEL", "1")
    assert generate.main([*arguments(files, "refused.jsonl"), "--mesh", "data=2"]) == 2
    assert asked == [Membership("auto")]
    capfd.readouterr()


@pytest.mark.parametrize(
    ("command", "options"),
    [
        (generate, ["--prompt-file", "no/such.txt", "--model"]),
        (serve, ["--api-key-file", "no/such.key"]),
        (chat, ["--model"]),
        (evaluate, ["--text", "no/such.txt", "--model"]),
        *((bench, [kind, "--json", "no/such/x.json", "--model"]) for kind in ("decode", "speedup", "throughput")),
    ],
)
def test_those_that_follow_read_no_request_and_write_no_file(monkeypatch, capfd, files, command, options):
    """They listen nowhere, and end with the code of process 0."""
    group = SimpleNamespace(leads=False, process=1, count=2, follower=SimpleNamespace(follow=lambda: 7))
    monkeypatch.setattr(processes, "joined", lambda name, arguments: contextlib.nullcontext(group))
    monkeypatch.setattr("qspec_jax.bench.__main__._keep_no_programs", lambda: None)
    assert command.main([*options, str(files[1])]) == 7
    assert capfd.readouterr().err == "process 1 of 2 follows process 0\n"


@pytest.mark.parametrize(
    ("command", "options"),
    [
        (quantize, ["model", "out", "--recipe", "rtn"]),
        (texts, ["folder"]),
        (info, []),
        (bench, ["kernels"]),
        (bench, ["tune"]),
        (bench, ["tpu"]),
        (bench, ["scaling"]),
    ],
)
def test_what_one_process_does_names_the_options_of_several(capfd, monkeypatch, command, options):
    monkeypatch.setattr("qspec_jax.device.processes.has_met", False)
    monkeypatch.setattr("qspec_jax.device.meeting.tell_of_failure", None)  # nobody waits for it
    with pytest.raises(SystemExit) as end:
        command.main([*options, "--coordinator=a:1", "--num-processes", "2", "--process-id", "0"])
    assert end.value.code == 2
    said = "this command runs in one process, without --coordinator, --num-processes, --process-id: start it once"
    assert said in capfd.readouterr().err


def test_the_harness_takes_its_own_options_off_those_of_lm_eval(monkeypatch, capfd):
    asked = []
    monkeypatch.setattr(harness, "run_together", lambda name, run, own: asked.append((name, vars(own))) or 0)
    others = ["run", "--model_args", "model=x,mesh=data=2;model=4", "--tasks", "piqa"]
    monkeypatch.setattr(
        sys, "argv", ["harness", *others, "--coordinator", "a:1", "--num-processes=2", "--process-id=1"]
    )
    assert harness.main() == 0
    given = {"coordinator": "a:1", "num_processes": 2, "process_id": 1, "mesh": "data=2;model=4"}
    assert (asked, sys.argv[1:]) == ([(f"harness {' '.join(others)}", given)], others)
    monkeypatch.setattr(sys, "argv", ["harness", "run", "--model_args", "model=x", "--coordinator=auto"])
    assert harness.main() == 2
    assert "--model_args needs one, such as mesh=data=2;model=4" in capfd.readouterr().err


def agreed(leaders, followers, *, command="generate"):
    """What a process that follows finds the leader's models under."""
    client = Client()
    leader, other = Group(client, 0, 2), Group(client, 1, 2)
    processes._agree(leader, "generate", Namespace(**leaders))
    processes._agree(other, command, Namespace(**followers))
    return other.follower._renamed


def test_a_clone_that_is_not_installed_joins_its_like_alone(monkeypatch):
    given = {"mesh": "data=2", "model": ["a"]}
    real = metadata.version
    missing = lambda name: real("no-such-package" if name == "qspec-jax" else name)  # noqa: E731
    monkeypatch.setattr(metadata, "version", missing)
    assert agreed(given, given) == {"a": "a"}
    found = iter([missing, real])  # in process 0, and in the one that follows
    monkeypatch.setattr(metadata, "version", lambda name: (next(found) if name == "qspec-jax" else real)(name))
    with pytest.raises(qspec_jax.UsageError, match=r"qspec_jax is .* here and None in process 0"):
        agreed(given, given)


def test_what_differs_is_named_by_who_follows_and_a_model_may_lie_elsewhere():
    given = {"mesh": "data=2,model=1", "mode": "qspec", "dtype": None, "group_size": None, "kernels": "auto"}
    given |= {"verify": "auto", "kv": "model", "model": ["a", "b"], "baseline": None, "draft_model": "c"}
    assert agreed(given, {**given, "model": ["a", "d"]}) == {"a": "a", "b": "d", None: None, "c": "c"}
    for changed, error in (
        ({"mesh": "data=1,model=2"}, "--mesh is data=1,model=2 here and data=2,model=1 in process 0"),
        ({"kv": "int8"}, "--kv is int8 here and model in process 0"),
        ({"model": ["a"]}, "--model is not given as often here as in process 0"),
    ):
        with pytest.raises(qspec_jax.UsageError, match=error):
            agreed(given, {**given, **changed})
    with pytest.raises(qspec_jax.UsageError, match="the command is chat here and generate in process 0"):
        agreed(given, given, command="chat")
