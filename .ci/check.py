"""``.ci/check``: ruff and pyrefly on the whole tree, then the tests that concern the changed files.

A quick answer, not a proof: it says which tests it left out. Exit codes: 0 nothing failed, 1 something failed, 2 usage.
All tests are ``python -m pytest -n 2``; all of continuous integration is ``.ci/run``.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

from select_tests import ROOT, select

GRACE_S = 20  # for test files that run when time is up
TEST_FILES_AT_ONCE = 2
LINT = {
    "ruff check": ["ruff", "check", "."],
    "ruff format": ["ruff", "format", "--check", "."],
    "pyrefly": ["pyrefly", "check", "--python-interpreter-path", sys.executable],
}


def main() -> int:
    """Runs it."""
    parser = argparse.ArgumentParser(prog=".ci/check", description="Lint, types and the tests that concern a change.")
    base = "changed is what differs from this commit (default: where HEAD left origin/main, else HEAD)"
    parser.add_argument("--base", metavar="REV", help=base)
    parser.add_argument("--list", action="store_true", help="only print which tests would run, and which would not")
    parser.add_argument("--no-tests", action="store_true", help="ruff and pyrefly only")
    parser.add_argument(
        "--seconds", type=int, default=150, metavar="N", help="start no test file later than this (default: 150)"
    )
    arguments = parser.parse_args()

    start = time.monotonic()
    deadline = start + arguments.seconds
    changed, since = changed_files(parser, arguments.base)
    selected, left_out = select(changed)
    if arguments.list:
        print(*(f"{test}  ({reason})" for test, reason in selected.items()), sep="\n")
        print(f"not selected, though they depend on the change ({len(left_out)}):")
        print(*(f"  {test}" for test in left_out), sep="\n")
        return 0

    failed = [name for name, command in LINT.items() if not check(name, command)]
    if not arguments.no_tests:
        print(f"{len(changed)} files differ from {since}; they select {len(selected)} test files (see --list)")
        with ThreadPoolExecutor(TEST_FILES_AT_ONCE) as tests:
            outcomes = list(tests.map(lambda test: run_tests(test, deadline), selected))
        failed += [test for test, passed in zip(selected, outcomes, strict=True) if passed is False]
        unknown = [test for test, passed in zip(selected, outcomes, strict=True) if passed is None]
        if unknown:
            print(f"out of time, so not started or not finished: {', '.join(unknown)}")
        if left_out:
            print(f"not run: {len(left_out)} more test files that depend on the change")
    outcome = f"FAILED: {', '.join(failed)}" if failed else "nothing failed"
    print(f"{outcome}; {time.monotonic() - start:.0f} s")
    return 1 if failed else 0


def changed_files(parser: argparse.ArgumentParser, base: str | None) -> tuple[list[str], str]:
    """Files that differ from a commit, committed, staged or neither, and what that commit is called."""
    revision = base or git("merge-base", "origin/main", "HEAD") or "HEAD"
    since = git("log", "-1", "--format=%h (%s)", revision, "--")
    if not since:
        parser.error(f"--base {revision} is no commit of this repository")
    changed = git("diff", "--name-only", "--no-renames", revision, "--").splitlines()
    untracked = git("ls-files", "--others", "--exclude-standard").splitlines()
    return sorted({*changed, *untracked}), since


def git(*arguments: str) -> str:
    """The output of a git command, empty if it fails."""
    command = ["git", "-c", "core.quotepath=off", *arguments]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    return result.stdout.strip() if result.returncode == 0 else ""


def check(name: str, command: list[str]) -> bool:
    """Runs a module of Python and prints a line, or all that it says if it fails."""
    start = time.monotonic()
    command = [sys.executable, "-m", *command]
    result = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    return report(name, start, result.returncode, result.stdout)


def run_tests(test: str, deadline: float) -> bool | None:
    """Runs a test file; None if it is too late to start, or if it was cut off."""
    start = time.monotonic()
    if start >= deadline:
        return None
    process = subprocess.Popen(
        [sys.executable, "-m", "pytest", "-q", test],
        cwd=ROOT,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    timed_out = False
    try:
        output, _ = process.communicate(timeout=deadline + GRACE_S - start)
    except subprocess.TimeoutExpired:
        timed_out = True
        process.send_signal(signal.SIGINT)  # pytest ends what its tests started, and sums up
        try:
            output, _ = process.communicate(timeout=10)
        except subprocess.TimeoutExpired:
            process.kill()
            output, _ = process.communicate()
    last_line = output.strip().rpartition("\n")[2]
    if timed_out and " failed" not in last_line and " error" not in last_line:
        print(f"cut    {time.monotonic() - start:5.0f} s  {test}: {last_line}", flush=True)
        return None
    return report(f"{test}: {last_line}", start, process.returncode, output)


def report(name: str, start: float, status: int, output: str) -> bool:
    """Prints how something ended; whether it passed."""
    line = f"{'FAILED' if status else 'ok':6} {time.monotonic() - start:5.0f} s  {name}"
    print(f"{line}\n{output}" if status else line, flush=True)
    return status == 0


if __name__ == "__main__":
    sys.exit(main())
