"""Lines of all kinds: what reads them gives prompts or the library's errors, and what is written is JSON."""

from __future__ import annotations

import json
import math
import os

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qspec_jax.commands.prompt_files import PromptLine, ResultFile, line_keys, read_prompt_lines, result_entry
from qspec_jax.decoding.request_options import REQUEST_OPTIONS
from qspec_jax.decoding.sampling_params import SamplingParams
from qspec_jax.engine.results import GenerationResult, GenerationStats
from qspec_jax.errors import UsageError
from qspec_jax.files import json_lines
from tests.fuzzing import fuzzed

EXAMPLES = max(150, fuzzed.max_examples)  # 10 ms each
DEFAULTS = {"max_new_tokens": 8, "chat": None, "seed": 2**32 - 1}
STATS = GenerationStats("qspec", "w4a8", 3, (0,) * 4, 0, 0, 0.0, 0.0, 0.0, "cpu", "reference")
NAMES = (*REQUEST_OPTIONS, "prompt", "messages", "id", "kind", "max_tokens", "n", "topP", "tools", "role", "content")

texts = st.text(st.characters(), max_size=12)  # halves of surrogate pairs, too
scalars = st.one_of(st.none(), st.booleans(), st.integers(), st.integers(-(10**420), 10**420), st.floats(), texts)
values = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(texts, inner, max_size=4), max_leaves=8
)
deep = st.builds(lambda depth: "[" * depth + "]" * depth, st.integers(1, 3000))
messages = st.lists(st.fixed_dictionaries({"role": texts, "content": values}), min_size=1, max_size=3)
prompts = st.one_of(
    st.fixed_dictionaries({"prompt": st.one_of(texts, values)}), st.fixed_dictionaries({"messages": messages | values})
)
objects = st.builds(lambda prompt, rest: {**rest, **prompt}, prompts, st.dictionaries(st.sampled_from(NAMES), values))


@st.composite
def lines(draw):
    """An object, its text damaged somewhere, a value that is none, or anything."""
    line = json.dumps(draw(objects | values), ensure_ascii=draw(st.booleans()))
    damage = draw(st.sampled_from(("none", "none", "none", "cut", "replaced", "deep")))
    place = draw(st.integers(0, len(line)))
    if damage == "cut":
        return line[:place]
    if damage == "replaced":
        return line[:place] + draw(texts) + line[place + 1 :]
    return '{"prompt": "a", "id": ' + draw(deep) + "}" if damage == "deep" else line


written = st.builds(
    lambda lines, end, encoding: end.join(lines).encode(encoding, "surrogatepass"),
    st.lists(lines(), max_size=4),
    st.sampled_from(("\n", "\r\n", "\r", "\n\n")),
    st.sampled_from(("utf-8", "utf-8-sig", "utf-16")),
)


def refuse_constant(name):
    pytest.fail(f"{name} is no JSON")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("lines")


@settings(fuzzed, max_examples=EXAMPLES)
@given(data=written | st.binary(max_size=40), name=st.sampled_from(("in.jsonl", "in.txt")))
def test_files_give_prompts_or_errors_of_the_library(folder, data, name):
    path, output = folder / name, folder / "out.jsonl"
    path.write_bytes(data)
    try:
        read = read_prompt_lines(path)
    except UsageError as error:
        str(error).encode()  # can be shown
        return
    assert all(one.where.startswith(str(path)) for one in read)
    for index, line in enumerate(read):
        SamplingParams.of(line.resolved(DEFAULTS, index)["sampling"])
    keys = line_keys(read, DEFAULTS, {})
    file = ResultFile(output, keys)
    for line in read:
        file.write(result_entry(result_of(line), line))
    file.close()
    entries = [json.loads(one, parse_constant=refuse_constant) for one in output.read_bytes().decode().splitlines()]
    assert [entry["key"] for entry in entries] == keys
    again = ResultFile(output, keys)
    assert (again.num_finished, len(again.errors)) == (len(read), sum(line.error is not None for line in read))
    again.close()
    os.unlink(output)


def result_of(line: PromptLine) -> GenerationResult:
    """As of a model that says the prompt again."""
    text, reason = line.prompt if isinstance(line.prompt, str) else "", "length" if line.error is None else "error"
    return GenerationResult(text, [], text, [], reason, STATS, error=line.error, logprobs=[-math.inf])


@settings(fuzzed, max_examples=EXAMPLES)
@given(value=values, encoding=st.sampled_from((None, "utf-8", "ascii", "cp1252", "latin-1", "utf-16")))
def test_all_that_is_written_is_json_in_its_encoding(value, encoding):
    text = json_lines.dumps(value, encoding)
    assert "\n" not in text
    decoded = json.loads(text.encode(encoding or "utf-8").decode(encoding or "utf-8"), parse_constant=refuse_constant)
    if json_lines.flaw(value) is None:
        assert decoded == value
