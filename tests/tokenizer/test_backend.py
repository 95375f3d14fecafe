"""What does without transformers against transformers: the same tokens, texts, chats and files."""

import json
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import gguf
import pytest
import tokenizers
from jinja2.exceptions import SecurityError
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from qspec_jax.errors import CheckpointError, UsageError
from qspec_jax.tokenizer.backend import PlainBackend
from qspec_jax.tokenizer.chat_template import is_plain, render
from qspec_jax.tokenizer.tokenizer import Tokenizer
from qspec_jax.weights.tokenizers import load_tokenizer
from tests.test_documents import write_model
from tests.tokenizer.test_tokenizer import (
    CHAT_TEMPLATE,
    TEXTS,
    conversation,
    pieces_of,
    sentencepiece_path,  # noqa: F401  (a fixture)
)

ROOT = Path(__file__).parents[2]
SPECIAL_TEXTS = [
    "<|im_start|>user\nHi<|im_end|>\n",
    "a <|endoftext|> b<|im_end|>  <|im_end|>",
    "<|im_start|",
    "<s>the</s> <unk>",
    " <think> the cat </think>\n",
    "a <|pad|> b <|extra|> c <old> <new> <a> <b>",
]
CONVERSATIONS = [
    [{"role": "user", "content": "What is a cache?"}],
    [{"role": "user", "content": " <|im_end|> in a text\n"}],
    [{"role": "user", "content": ""}],
    [{"role": "assistant", "content": "I begin."}],
    [{"role": "user"}],
    conversation("Be brief.", "Hi"),
    conversation("Du bist höflich. 😀", "Hi", "Yes?", "Again", "No.", "the cat"),
    [*conversation("One.", "Hi"), {"role": "system", "content": "Two."}],
]
# What templates of well-known models do, in small.
TEMPLATES = {
    "chatml": None,  # the demo model's own
    "refusing": CHAT_TEMPLATE,
    "llama": (
        "{{- bos_token }}\n{%- if messages[0]['role'] == 'system' %}\n    "
        "{%- set text = messages[0]['content']|trim %}\n"
        "    {%- set messages = messages[1:] %}\n{%- else %}\n    {%- set text = '' %}\n{%- endif %}\n"
        "{%- if not date_string is defined %}{%- set date_string = '26 Jul 2024' %}{%- endif %}\n"
        "{{- '<|im_start|>system\\n' + date_string + text + eos_token }}\n    {% for message in messages %}\n"
        "    {{- '<|im_start|>' + message.role + '\\n' + message.content | trim + '<|im_end|>' }}\n    {% endfor %}\n"
        "{%- if tools is none and documents is none and add_generation_prompt %}{{ '<|im_start|>a' }}{% endif %}"
    ),
    "namespace": (
        "{% set ns = namespace(last=-1, self=2) %}{% for m in messages %}{% if m.role == 'user' %}"
        "{% set ns.last = loop.index0 %}{% endif %}{% endfor %}{{ ns.last }}{{ ns.self }}{{ dict(a=1).a }}"
        "{{ dict.fromkeys('ab', 3) }}{% for m in messages %}{% if loop.index > 3 %}{% break %}{% endif %}"
        "{% if m.role == 'system' %}{% continue %}{% endif %}{{ m | tojson }}{{ m | tojson(indent=2) }}"
        "{% generation %}{% set seen = 1 %}{{ m.content }}{% endgeneration %}{{ seen is defined }}{% endfor %}"
        "{{ pad_token }}{{ unk_token }}{{ mask_token is defined }}{{ strftime_now('%Y') }}"
    ),
    "lines": (
        "{% for m in messages %}\n  {% if m.role == 'user' %}\n\t{{ m.content }}\n  {# no words #}\n  {% endif %}\n"
        "  {{ eos_token }}\n{% endfor %}\n\nend\n"
    ),
    "not Jinja": "{% for m in messages %}{{ m.content }}",
    "undefined": "{{ messages[0].content.missing.again }}",
    "escape": "{{ messages.__class__.__base__.__subclasses__() }}",
    "change": "{{ messages.append(1) }}",
    "empty": "",
}


def in_transformers(backend: PlainBackend) -> Tokenizer:
    """The same as a tokenizer of transformers."""
    return Tokenizer(
        PreTrainedTokenizerFast(
            tokenizer_object=backend.backend_tokenizer, chat_template=backend.chat_template, **backend._options
        )
    )


def saved(tokenizer: Tokenizer, path: Path) -> Path:
    tokenizer.save(path)
    return path


def answers(tokenizer: Tokenizer, messages) -> object:
    """All that a tokenizer says to a conversation, its refusal if it refuses."""
    try:
        token_ids = tokenizer.apply_chat(messages)
    except UsageError as error:
        return str(error)
    return token_ids, tokenizer.system_length(messages, token_ids), tokenizer.chat_text(messages)


@pytest.fixture(scope="module")
def demo(demo_gguf) -> Tokenizer:
    return load_tokenizer(demo_gguf)


@pytest.fixture(scope="module")
def reference(demo) -> Tokenizer:
    return in_transformers(demo._backend)


@pytest.fixture(scope="module")
def checkpoint_tokenizer(demo, tmp_path_factory) -> Path:
    return saved(demo, tmp_path_factory.mktemp("tokenizer"))


def assert_equal(tokenizer: Tokenizer, expected: Tokenizer) -> None:
    assert isinstance(tokenizer._backend, PlainBackend)
    assert not isinstance(expected._backend, PlainBackend)
    assert set(tokenizer.eos_token_ids) >= set(expected.eos_token_ids)
    for name in ("vocab_size", "has_chat_template", "special_tokens"):
        assert getattr(tokenizer, name) == getattr(expected, name), name
    for text in [*TEXTS, *SPECIAL_TEXTS]:
        for add_special_tokens in (True, False):
            ids = expected.encode(text, add_special_tokens=add_special_tokens)
            assert tokenizer.encode(text, add_special_tokens=add_special_tokens) == ids
            assert tokenizer.decode(ids) == expected.decode(ids)
            assert "".join(pieces_of(tokenizer, ids, random.Random(0))) == expected.decode(ids)
    assert [tokenizer._token(token_id) for token_id in range(tokenizer.vocab_size + 2)] == [
        expected._token(token_id) for token_id in range(tokenizer.vocab_size + 2)
    ]


def test_the_demo_model_is_tokenised_as_by_transformers(demo, reference):
    assert_equal(demo, reference)


def test_a_saved_tokenizer_is_read_as_by_transformers(checkpoint_tokenizer):
    expected = Tokenizer(AutoTokenizer.from_pretrained(checkpoint_tokenizer, local_files_only=True))
    tokenizer = load_tokenizer(checkpoint_tokenizer)
    assert_equal(tokenizer, expected)
    for messages in CONVERSATIONS:
        assert answers(tokenizer, messages) == answers(expected, messages)


@pytest.mark.parametrize("options", [{}, {"add_bos_token": False}, {"chat_template": ""}, {"unknown_token_id": 2}])
def test_a_sentencepiece_vocabulary_is_tokenised_as_by_transformers(sentencepiece_path, tmp_path, options):  # noqa: F811
    tokenizer = load_tokenizer(sentencepiece_path(**options))
    assert_equal(tokenizer, in_transformers(tokenizer._backend))
    assert_equal(load_tokenizer(saved(tokenizer, tmp_path / "saved")), in_transformers(tokenizer._backend))


def test_special_tokens_are_kept_whole_as_by_transformers():
    """Those that are tokens like any other in the vocabulary, and those that are not in it."""

    def bare() -> tokenizers.Tokenizer:
        vocabulary = {"a": 0, "b": 1, "ab": 2, "<end>": 3, "<pad>": 4}
        tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocabulary, merges=[("a", "b")]))
        tokenizer.add_tokens(["<pad>"])
        return tokenizer

    options = {"eos_token": "<end>", "pad_token": "<pad>", "unk_token": "<unk>", "bos_token": None, "cls_token": "<c>"}
    tokenizer = Tokenizer(PlainBackend(bare(), **options))
    reference = Tokenizer(PreTrainedTokenizerFast(tokenizer_object=bare(), **options))
    assert tokenizer.encode("ab<end>a<c><unk>") == [2, 3, 0, tokenizer.vocab_size - 1, 5]
    assert tokenizer.decode(tokenizer.encode("a<end><pad>b")) == reference.decode(reference.encode("a<end><pad>b"))
    assert_equal(tokenizer, reference)


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("messages", CONVERSATIONS)
def test_chats_are_those_of_transformers(demo, reference, monkeypatch, name, messages):
    for tokenizer in (demo, reference):
        if TEMPLATES[name] is not None:
            monkeypatch.setattr(tokenizer._backend, "chat_template", TEMPLATES[name])
        monkeypatch.setattr(tokenizer, "_beginning", ([], []))
    assert answers(demo, messages) == answers(reference, messages)


@pytest.mark.parametrize(
    "template", ["{% set ns = namespace(_hidden=1) %}", "{% set ns = namespace() %}{% set ns.__class__ = 1 %}"]
)
def test_a_namespace_has_no_private_names(template):
    with pytest.raises(SecurityError, match="use a name without leading underscore"):
        render(template, CONVERSATIONS[0], {})


@pytest.mark.parametrize(
    "messages",
    [
        [{"role": "user", "content": "Hi", "name": None}],
        [{"role": "user", "content": [{"type": "text", "text": "Hi"}]}],
        [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes?", "reasoning": "Hm."}],
        [{"role": "tool", "content": {"result": 1}}],
    ],
)
def test_other_messages_are_left_to_transformers(demo, reference, monkeypatch, messages):
    assert not is_plain(messages)
    template = "{% for m in messages %}{{ m | tojson }}{% endfor %}"
    for tokenizer in (demo, reference):
        monkeypatch.setattr(tokenizer._backend, "chat_template", template)
    monkeypatch.delitem(demo._backend.__dict__, "_in_transformers", raising=False)
    assert answers(demo, messages) == answers(reference, messages)
    del demo._backend.__dict__["_in_transformers"]  # which has this template


def test_a_last_message_is_continued_as_by_transformers(demo, reference):
    messages = conversation("Be brief.", "Count.", "1, 2,")
    text = demo.chat_text(messages, add_generation_prompt=False)
    assert text.endswith("assistant\n1, 2,")
    assert text == reference.chat_text(messages, add_generation_prompt=False)


def test_saved_files_are_those_of_transformers(demo, reference, checkpoint_tokenizer, tmp_path):
    """Of the demo model, and of what has been saved and opened before."""
    expected = saved(reference, tmp_path / "expected")
    loaded = Tokenizer(AutoTokenizer.from_pretrained(checkpoint_tokenizer, local_files_only=True))
    again = saved(loaded, tmp_path / "again")
    for path, other in [(checkpoint_tokenizer, expected), (saved(load_tokenizer(expected), tmp_path / "b"), again)]:
        names = {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja"}
        assert {file.name for file in path.iterdir()} == {file.name for file in other.iterdir()} == names
        for name in names - {"tokenizer_config.json"}:
            assert (path / name).read_text() == (other / name).read_text(), name
        options, others = (json.loads((folder / "tokenizer_config.json").read_text()) for folder in (path, other))
        # How transformers has opened it, which says nothing of the tokenizer.
        assert options == {
            name: value for name, value in others.items() if name not in ("is_local", "local_files_only")
        }


def test_a_loaded_tokenizer_is_saved_without_the_files_it_came_from(checkpoint_tokenizer, tmp_path):
    origin = Path(shutil.copytree(checkpoint_tokenizer, tmp_path / "origin"))
    tokenizer = load_tokenizer(origin)
    shutil.rmtree(origin)
    again = load_tokenizer(saved(tokenizer, tmp_path / "saved"))
    assert [again.encode(text) for text in TEXTS] == [tokenizer.encode(text) for text in TEXTS]


def change_json(path: Path, **changes) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def unspecial(path: Path) -> None:
    content = json.loads(path.read_text())
    for token in content["added_tokens"]:
        token["special"] = False
    path.write_text(json.dumps(content))


@pytest.fixture(scope="module")
def small_tokenizer(tmp_path_factory) -> Path:
    """A byte-level tokenizer as a checkpoint has it; a large vocabulary takes long to read."""
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    alphabet = [*special, *sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet()), "th", "the"]
    model = tokenizers.models.BPE(
        vocab={token: number for number, token in enumerate(alphabet)}, merges=[("t", "h"), ("th", "e")]
    )
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    tokenizer.post_processor = tokenizers.processors.ByteLevel(trim_offsets=False)
    tokenizer.add_special_tokens(special)
    options = {"bos_token": special[1], "eos_token": special[2], "unk_token": special[0], "pad_token": special[2]}
    template = "{% for m in messages %}<|im_start|>{{ m.content }}<|im_end|>{% endfor %}"
    path = tmp_path_factory.mktemp("small")
    return saved(Tokenizer(PlainBackend(tokenizer, chat_template=template, **options)), path)


def with_special(**tokens):
    return lambda path: change_json(path / "tokenizer_config.json", **tokens)


def moved_tokens(path: Path) -> None:
    """As older files have them: in a file of their own, and as objects."""
    tokens = {"bos_token": {"content": "<|im_start|>", "lstrip": False}, "eos_token": "<|im_end|>"}
    (path / "special_tokens_map.json").write_text(json.dumps(tokens))
    content = json.loads((path / "tokenizer_config.json").read_text())
    for name in tokens:
        del content[name]
    (path / "tokenizer_config.json").write_text(json.dumps(content))


ADDED = {"261": {"content": "<new>", "special": False, "normalized": False, "lstrip": False, "rstrip": False}}
ADDED |= {"262": {"content": "<end>", "special": True, "normalized": False, "lstrip": False, "rstrip": False}}
AGAIN = {
    "0": {"content": "<|endoftext|>", "special": False, "single_word": True},
    "1": {"content": "<|im_start|>", "special": False, "lstrip": True},  # named, and so special
    "2": {"content": "<|im_end|>", "special": True, "lstrip": True, "rstrip": True, "normalized": False},
    "261": {"content": "the", "special": False, "normalized": False},
}
LISTED = {"<|im_end|>": 2, "<new>": 262, "<old>": 261}
STRIPPED = {"content": "<|pad|>", "__type": "AddedToken", "special": True, "lstrip": True, "rstrip": True}


def older_files(special: dict, **options):
    """Tokens in the files of old, which count only where tokenizer_config.json lists none."""

    def write(path: Path) -> None:
        (path / "added_tokens.json").write_text(json.dumps(LISTED))
        (path / "special_tokens_map.json").write_text(json.dumps(special))
        with_special(**options)(path)

    return write


DIRECTORIES = {
    "as it is": lambda path: None,
    "model": lambda path: (path / "config.json").write_text('{"model_type": "llama"}'),
    "no added tokens": lambda path: (path / "added_tokens.json").write_text("{}"),
    "no BOS": with_special(add_bos_token=False),
    "BOS": with_special(add_bos_token=True),
    "BOS and EOS": with_special(add_bos_token=True, add_eos_token=True),
    "extra": with_special(extra_special_tokens=["<|extra|>"]),
    "additional": with_special(additional_special_tokens=["<|extra|>"]),
    "new padding": with_special(pad_token="<|pad|>"),
    "objects": with_special(eos_token={"content": "<|endoftext|>", "__type": "AddedToken", "special": True}),
    "added": with_special(added_tokens_decoder=ADDED),
    "added out of order": with_special(added_tokens_decoder=dict(reversed(ADDED.items()))),
    "said again": with_special(added_tokens_decoder=AGAIN, unk_token=None),
    "strips": with_special(pad_token=STRIPPED, additional_special_tokens=[STRIPPED | {"content": "<|extra|>"}]),
    "elsewhere": moved_tokens,
    "older": older_files({"eos_token": "<|endoftext|>", "pad_token": "<new>"}),
    "older, left out": older_files({"eos_token": "<|endoftext|>"}, added_tokens_decoder=ADDED),
    "older lists": older_files({"additional_special_tokens": ["<a>"]}),
    "two lists": older_files({"additional_special_tokens": ["<a>"]}, additional_special_tokens=["<b>"]),
    "not special": lambda path: unspecial(path / "tokenizer.json"),
    "truncating": lambda path: change_json(path / "tokenizer.json", truncation=TRUNCATION, padding=None),
    "byte order mark": lambda path: (path / "config.json").write_bytes(b'\xef\xbb\xbf{"model_type": "llama"}'),
}
TRUNCATION = {"direction": "Right", "max_length": 3, "strategy": "LongestFirst", "stride": 0}


@pytest.mark.parametrize("name", DIRECTORIES)
def test_a_directory_is_tokenised_as_by_transformers(small_tokenizer, tmp_path, name):
    path = Path(shutil.copytree(small_tokenizer, tmp_path / "other"))
    DIRECTORIES[name](path)
    tokenizer = load_tokenizer(path)
    if name == "byte order mark":
        assert tokenizer.encode("ab")  # transformers refuses it
        return
    expected = AutoTokenizer.from_pretrained(path, local_files_only=True)
    assert_equal(tokenizer, Tokenizer(expected))
    assert answers(tokenizer, CONVERSATIONS[0]) == answers(Tokenizer(expected), CONVERSATIONS[0])


@pytest.mark.parametrize("tokenizer_class", ["LlamaTokenizerFast", "LlamaTokenizer", "GPT2Tokenizer", None])
@pytest.mark.parametrize("model_type", ["llama", "qwen2", None])
@pytest.mark.parametrize("source", ["bytes", "sentencepiece"])
def test_a_directory_is_tokenised_as_its_tokenizer_json_whatever_its_class(
    small_tokenizer,
    sentencepiece_path,  # noqa: F811
    tmp_path,
    tokenizer_class,
    model_type,
    source,
):
    path = Path(shutil.copytree(small_tokenizer, tmp_path / "bytes"))
    if source == "sentencepiece":
        path = saved(load_tokenizer(sentencepiece_path()), tmp_path / "saved")
    change_json(path / "tokenizer_config.json", tokenizer_class=tokenizer_class, legacy=True, add_prefix_space=True)
    if model_type is not None:
        (path / "config.json").write_text(json.dumps({"model_type": model_type}))
    tokenizer, library = load_tokenizer(path), tokenizers.Tokenizer.from_file(str(path / "tokenizer.json"))
    for text in [*TEXTS, *SPECIAL_TEXTS, "a</s> b</s>c", "</s>the cat"]:
        assert tokenizer.encode(text) == library.encode(text).ids
    if source == "sentencepiece":
        in_gguf = load_tokenizer(sentencepiece_path())
        assert tokenizer.encode("the</s> cat</s>") == in_gguf.encode("the</s> cat</s>")


@pytest.mark.parametrize(
    ("template", "others", "expected"),
    [
        ("", {}, None),
        ([], {}, None),
        ([{"name": "default", "template": "D"}, {"name": "tool_use", "template": "T"}], {}, "D"),
        (
            [{"name": "tool_use", "template": "T"}, {"name": "rag", "template": "R"}],
            {},
            "named tool_use, rag and no def",
        ),
        ({"default": "D", "rag": "R"}, {}, "D"),
        ("{{ 1 }}", {"chat_template.jinja": "J"}, "J"),
        ("C", {"chat_template.json": '{"chat_template": "N"}'}, "C"),
        (None, {"chat_template.json": '{"chat_template": "N"}'}, "N"),
        (None, {"chat_template.jinja": ""}, None),
    ],
)
def test_a_chat_template_is_found_wherever_it_stands(small_tokenizer, tmp_path, template, others, expected):
    path = Path(shutil.copytree(small_tokenizer, tmp_path / "other"))
    (path / "chat_template.jinja").unlink()
    change_json(path / "tokenizer_config.json", chat_template=template)
    for name, text in others.items():
        (path / name).write_text(text)
    tokenizer = load_tokenizer(path)
    assert tokenizer.has_chat_template == (expected is not None)
    if expected is None or len(expected) > 1:
        with pytest.raises(UsageError, match=expected or "no chat template; give the prompt as plain text"):
            tokenizer.chat_text(CONVERSATIONS[0])
    else:
        assert tokenizer.chat_text(CONVERSATIONS[0]) == expected


def test_a_vocabulary_is_not_made_up(tmp_path):
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "LlamaTokenizer"}')
    with pytest.raises(CheckpointError, match=r"it has no vocabulary; the directory needs the model's tokenizer\.json"):
        load_tokenizer(tmp_path)


def test_a_git_lfs_pointer_is_named(tmp_path):
    (tmp_path / "tokenizer.json").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
    with pytest.raises(CheckpointError, match=r"tokenizer\.json is a Git LFS pointer; run `git lfs pull`"):
        load_tokenizer(tmp_path)


def test_a_sentencepiece_file_alone_is_named_with_the_remedy(tmp_path):
    (tmp_path / "tokenizer.model").write_bytes(b"\n\x0e\n\x05<unk>")
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(CheckpointError, match=r"a tokenizer\.model only .*put the model's tokenizer\.json beside it"):
        load_tokenizer(tmp_path)


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere names of files are texts")
def test_a_directory_may_have_a_name_that_is_no_text(checkpoint_tokenizer, tmp_path):
    path = Path(shutil.copytree(checkpoint_tokenizer, tmp_path / os.fsdecode(b"m\xff")))
    assert load_tokenizer(path).encode("a text") == load_tokenizer(checkpoint_tokenizer).encode("a text")


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
@pytest.mark.parametrize("content", ["{", "[]", "", "\0", "3"])
def test_damaged_files_of_a_checkpoint(checkpoint_tokenizer, tmp_path, name, content):
    path = Path(shutil.copytree(checkpoint_tokenizer, tmp_path / "damaged"))
    (path / name).write_text(content)
    with pytest.raises(CheckpointError, match=r"cannot load a tokenizer from .*damaged: .*tokenizer_config\.json"):
        load_tokenizer(path)


@pytest.mark.parametrize("config", [None, {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}])
def test_python_that_comes_with_a_tokenizer_is_refused_without_a_question(
    checkpoint_tokenizer, tmp_path, monkeypatch, config
):
    path, ran = Path(shutil.copytree(checkpoint_tokenizer, tmp_path / "own")), tmp_path / "ran"
    own = {"auto_map": {"AutoTokenizer": ["tokenization_own.OwnTokenizer", None]}, "tokenizer_class": "OwnTokenizer"}
    change_json(path / "tokenizer_config.json", **own)
    (path / "tokenization_own.py").write_text(f"open({str(ran)!r}, 'w')\nclass OwnTokenizer: ...\n")
    if config is not None:
        (path / "config.json").write_text(json.dumps(config))
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked"))
    with pytest.raises(CheckpointError, match=r"Python that comes with a model is not run; .*PreTrainedTokenizerFast"):
        load_tokenizer(path)
    assert not ran.exists()
    change_json(path / "tokenizer_config.json", tokenizer_class="PreTrainedTokenizerFast")
    assert load_tokenizer(path).encode("ab") == load_tokenizer(checkpoint_tokenizer).encode("ab")
    assert not ran.exists()


def test_generating_does_not_import_transformers(demo_gguf, checkpoint_tokenizer, tmp_path):
    """Its thousands of files are most of a start on a slow disk. Nor do tokenizers of a GGUF file and a checkpoint."""
    model = write_model(tmp_path / "model.gguf", gguf.GGMLQuantizationType.Q4_1)
    code = (
        "import sys\n"
        "from qspec_jax.generate import main\n"
        "from qspec_jax.weights.tokenizers import load_tokenizer\n"
        "for path in sys.argv[2:]:\n"
        "    load_tokenizer(path).apply_chat([{'role': 'user', 'content': 'Hi'}])\n"
        "options = ['--model', sys.argv[1], '--max-new-tokens', '2', '--mode', 'w4a16']\n"
        "assert main(['--prompt', 'What is a cache?', *options]) == 0\n"
        "assert not {'transformers', 'torch', 'orbax', 'huggingface_hub'} & set(sys.modules)\n"
    )
    paths = map(str, (model, demo_gguf, checkpoint_tokenizer))
    subprocess.run([sys.executable, "-c", code, *paths], check=True, cwd=ROOT)
