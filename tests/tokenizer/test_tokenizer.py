"""Tokenizers: the demo model's out of its GGUF file, SentencePiece ones, and decoding piece by piece."""

import json
import random

import gguf
import numpy as np
import pytest
from tokenizers import Tokenizer as Words
from tokenizers import models

from qspec_jax.errors import CheckpointError, CheckpointWarning, UnsupportedModelError, UsageError
from qspec_jax.tokenizer.tokenizer import Tokenizer
from qspec_jax.weights.tokenizers import load_tokenizer

TEXTS = [
    "Hello, world!",
    "  two spaces, a\ttab\r\nand\n\n\nlines  ",
    "naïve façade — “quotes” … 東京は日本の首都です。 Привет, мир",
    "emoji 😀👩‍👩‍👧‍👦🇩🇪 and a\u0301 combining",
    "def f(x: int) -> str:\n    return f'{x:>10}' if x != 3.14 else \"\\\\\"\n",
    "1234567890 + 0x1F = 1e-5",
    "I'll say they've, it's DON'T",
    "",
]
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, BYTE = 1, 2, 3, 4, 6
CHAT_TEMPLATE = (
    "{% for message in messages %}{% if message['role'] == 'system' %}{{ raise_exception('no system role') }}"
    "{% endif %}[{{ message['role'] }}]{{ message['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)


@pytest.fixture(scope="module")
def demo(demo_gguf) -> Tokenizer:
    return load_tokenizer(demo_gguf)


def write_vocabulary(path, tokens, types, **metadata):
    """A GGUF file with nothing but a vocabulary; ``metadata`` are keys of ``tokenizer.ggml``."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    if template := metadata.pop("chat_template", None):
        writer.add_chat_template(template)
    adders = {bool: writer.add_bool, int: writer.add_uint32, str: writer.add_string, list: writer.add_array}
    adders[int] = lambda key, value: (writer.add_int32 if value < 0 else writer.add_uint32)(key, value)
    for key, value in metadata.items():
        adders[type(value)](f"tokenizer.ggml.{key}", value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return path


@pytest.fixture
def sentencepiece_path(tmp_path):
    """A little Llama 2 vocabulary: bytes, letters, and pieces with scores."""

    def write(name="model.gguf", **changes):
        tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
        types = [UNKNOWN, CONTROL, CONTROL, *[BYTE] * 256]
        scores = [0.0] * 259
        pieces = ["▁t", "he", "▁the", "▁c", "at", "▁cat", "s", "ca", "▁", "t", "h", "e", "c", "a", "<think>"]
        tokens, scores = tokens + pieces, scores + [-float(rank) for rank in range(len(pieces))]
        types += [NORMAL] * (len(pieces) - 1) + [USER_DEFINED]
        options = {"model": "llama", "pre": "default", "scores": scores, "chat_template": CHAT_TEMPLATE}
        options |= {"bos_token_id": 1, "eos_token_id": 2, "unknown_token_id": 0}
        return write_vocabulary(tmp_path / name, tokens, types, **options | changes)

    return write


@pytest.mark.parametrize("text", TEXTS)
def test_text_comes_back_unchanged(demo, text):
    assert demo.decode(demo.encode(text)) == text


def test_digits_are_single_tokens(demo):
    assert [demo.decode([token_id]) for token_id in demo.encode("1234")] == ["1", "2", "3", "4"]


def test_known_ids_of_the_demo_model(demo):
    """Another rule for words, or another order of merges, would give others."""
    assert demo.encode("Hello, world!") == [19556, 28, 905, 17]
    assert demo.encode("The capital of France is") == [504, 3575, 282, 4649, 314]


def test_special_tokens_stay_whole_and_are_left_out_of_text(demo):
    ids = demo.encode("a<|im_end|>b")
    assert ids[1:-1] == [2]
    assert demo.decode(ids) == "ab"


def test_chat_prompt_is_the_chatml_of_the_demo_model(demo):
    ids = demo.apply_chat([{"role": "user", "content": "Hi"}])
    expected = (
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    )
    assert demo.has_chat_template
    assert ids == demo.encode(expected)
    assert (ids[0], ids.count(1), ids.count(2)) == (1, 3, 2)


def test_a_system_message_replaces_the_default(demo):
    ids = demo.apply_chat([{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}])
    assert demo.decode(ids).startswith("system\nBe brief.\nuser\nHi\n")


def conversation(system, *contents):
    roles = ("user", "assistant") * len(contents)
    messages = [{"role": role, "content": content} for role, content in zip(roles, contents, strict=False)]
    return [{"role": "system", "content": system}, *messages]


def system_part(tokenizer, messages):
    token_ids = tokenizer.apply_chat(messages)
    return token_ids[: tokenizer.system_length(messages, token_ids)]


@pytest.mark.parametrize("contents", [["Hi"], ["I", "Yes?", "Again"], ["Again, then"]])
def test_the_system_part_of_a_conversation_is_what_its_system_message_decides(demo, contents):
    for system in ("Be brief.", "You know everything about birds.", "Be brief."):
        expected = demo.encode(f"<|im_start|>system\n{system}<|im_end|>\n<|im_start|>user\n")
        assert system_part(demo, conversation(system, *contents)) == expected
    assert system_part(demo, conversation("Be brief.", *contents)[1:]) == []


def test_a_template_without_an_empty_message_has_no_system_part(demo, monkeypatch):
    template = "{% for m in messages %}{{ m['content'] or raise_exception('empty') }}{% endfor %}"
    monkeypatch.setattr(demo._backend, "chat_template", template)
    assert system_part(demo, conversation("Be quick.", "Hi")) == []


def test_sizes_and_end_tokens_of_the_demo_model(demo):
    assert demo.vocab_size == 49152
    assert demo.eos_token_ids == (2, 0, 4)  # <|im_end|>, <|endoftext|>, <reponame>


def pieces_of(tokenizer, ids, generator):
    decoder, start = tokenizer.stream_decoder(), 0
    while start < len(ids):
        length = generator.randint(1, 5)
        yield decoder.push(ids[start : start + length])
        start += length
    yield decoder.finish()


@pytest.mark.parametrize("seed", range(20))
def test_streamed_text_equals_decoded_text_for_any_tokens(demo, seed):
    """Random tokens split and break UTF-8 sequences in every way."""
    generator = random.Random(seed)
    ids = [generator.randrange(demo.vocab_size) for _ in range(200)]
    assert "".join(pieces_of(demo, ids, generator)) == demo.decode(ids)


@pytest.mark.parametrize("text", TEXTS)
def test_no_piece_holds_half_a_character(demo, text):
    pieces = list(pieces_of(demo, demo.encode(text), random.Random(0)))
    assert "".join(pieces) == text
    assert not any("\ufffd" in piece for piece in pieces)


def test_text_is_streamed_as_soon_as_it_is_certain(demo):
    decoder = demo.stream_decoder()
    pieces = [decoder.push([token_id]) for token_id in demo.encode("Hello 😀!")]
    assert pieces == ["Hello", " ", "😀", "!"]  # the second token is a space and half of the emoji
    assert decoder.finish() == ""


def test_a_finished_decoder_starts_afresh(demo):
    decoder = demo.stream_decoder()
    half = demo.encode("😀")[:1]
    assert decoder.push(half) == ""
    assert decoder.finish() == "\ufffd"
    assert decoder.push(demo.encode("Hello")) == "Hello"


def test_what_is_no_text_and_what_are_no_tokens_is_refused_by_name(sentencepiece_path):
    tokenizer = load_tokenizer(sentencepiece_path())
    for given, message in ((b"cat", "text is of type bytes; use a str"), (["a"], "of type list"), ("\ud800", "half a")):
        with pytest.raises(UsageError, match=message):
            tokenizer.encode(given)
    for given, message in (
        ("cat", "ids is of type str; use a flat list"),
        ([[1]], "a flat list"),
        ([-1], "has token -1"),
    ):
        with pytest.raises(UsageError, match=message):
            tokenizer.decode(given)
    ids = tokenizer.encode("the cat")
    assert tokenizer.decode(np.asarray(ids)) == tokenizer.decode(iter(ids)) == tokenizer.decode(ids)


def test_sentencepiece_follows_the_scores(sentencepiece_path):
    tokenizer = load_tokenizer(sentencepiece_path())
    tokens = [tokenizer._token(token_id) for token_id in tokenizer.encode("the cats")]
    assert tokens == ["<s>", "▁the", "▁cat", "s"]


@pytest.mark.parametrize("text", ["the cats", " the", "é😀 the\n\n", "tea  x", "<think>the"])
@pytest.mark.parametrize("add_space_prefix", [True, False])
def test_sentencepiece_text_comes_back_unchanged(sentencepiece_path, text, add_space_prefix):
    tokenizer = load_tokenizer(sentencepiece_path(add_space_prefix=add_space_prefix))
    # What follows a token that is kept whole is a text of its own, with its own leading space.
    expected = text.replace("<think>", "<think> ") if add_space_prefix else text
    assert tokenizer.decode(tokenizer.encode(text)) == expected


def test_sentencepiece_adds_bos_unless_told_otherwise(sentencepiece_path):
    assert load_tokenizer(sentencepiece_path()).encode("the")[0] == 1
    assert 1 not in load_tokenizer(sentencepiece_path("plain.gguf", add_bos_token=False)).encode("the")


@pytest.mark.parametrize("asked", [True, 1, False, "yes"])
def test_a_prompt_of_a_gguf_file_never_ends_with_eos(sentencepiece_path, asked):
    """There is nothing to add to a text that has ended."""
    plain = load_tokenizer(sentencepiece_path("plain.gguf"))
    asks = load_tokenizer(sentencepiece_path(add_eos_token=asked))
    assert asks.encode("the cats") == plain.encode("the cats")
    assert asks.eos_token_ids == plain.eos_token_ids


def test_sentencepiece_keeps_user_defined_tokens_whole_and_visible(sentencepiece_path):
    tokenizer = load_tokenizer(sentencepiece_path())
    ids = tokenizer.encode("the<think>")
    assert tokenizer.vocab_size == ids[-1] + 1
    assert tokenizer.decode(ids) == "the<think>"


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("add_space_prefix", [True, False])
def test_streamed_sentencepiece_equals_decoded_text_for_any_tokens(sentencepiece_path, seed, add_space_prefix):
    """Runs of byte tokens decode as a whole, valid or not, and the first space may be dropped."""
    tokenizer = load_tokenizer(sentencepiece_path(add_space_prefix=add_space_prefix))
    generator = random.Random(seed)
    emoji = [3 + byte for byte in "😀é".encode()]
    choices = [[1], [2], emoji, emoji[:2], emoji[-2:], *([token_id] for token_id in range(259, 274)), [3 + 255]]
    ids = [token_id for _ in range(100) for token_id in generator.choice(choices)]
    assert "".join(pieces_of(tokenizer, ids, generator)) == tokenizer.decode(ids)


def test_end_of_turn_tokens_end_a_text(tmp_path):
    tokens, types = ["a", "<eos>", "<|eot_id|>", "<|eom|>"], [NORMAL, CONTROL, CONTROL, CONTROL]
    options = {"model": "gpt2", "pre": "gpt-2", "merges": ["a b"], "eos_token_id": 1, "eot_token_id": 3}
    path = write_vocabulary(
        tmp_path / "m.gguf",
        [*tokens, "b", "ab"],
        [*types, NORMAL, NORMAL],
        chat_template="{{ '<|eot_id|>' }}",
        **options,
    )
    assert load_tokenizer(path).eos_token_ids == (1, 3, 2)
    named = write_vocabulary(tmp_path / "n.gguf", [*tokens, "b", "ab"], [NORMAL] * 6, **options)
    assert load_tokenizer(named).eos_token_ids == (1, 3, 2)  # by its text alone


def byte_level_words(tmp_path, pre, text):
    """The words that a byte-level tokenizer without any merges would merge within."""
    alphabet = [chr(code) for code in (*range(33, 127), *range(161, 173), *range(174, 324))]
    options = {"model": "gpt2", "merges": ["1 2"]} | ({} if pre is None else {"pre": pre})
    path = write_vocabulary(tmp_path / "m.gguf", [*alphabet, "12"], [NORMAL] * (len(alphabet) + 1), **options)
    backend = load_tokenizer(path)._backend.backend_tokenizer
    return [word.replace("Ġ", " ") for word, _ in backend.pre_tokenizer.pre_tokenize_str(text)]


@pytest.mark.parametrize(
    ("pre", "words"),
    [
        ("gpt-2", ["I", "'ll", " add", " 12345"]),
        ("smollm", ["I", "'ll", " add", " ", "1", "2", "3", "4", "5"]),
        ("llama-bpe", ["I", "'ll", " add", " ", "123", "45"]),
        ("qwen2", ["I", "'ll", " add", " ", "1", "2", "3", "4", "5"]),
        ("tekken", ["I", "'ll", " add", " ", "1", "2", "3", "4", "5"]),
    ],
)
def test_each_vocabulary_cuts_words_by_its_own_rules(tmp_path, pre, words):
    assert byte_level_words(tmp_path, pre, "I'll add 12345") == words


def test_unknown_word_rules_name_the_known(tmp_path):
    with pytest.raises(UnsupportedModelError, match=r"pre='command-r' is not supported; supported: .*smollm.*qwen2"):
        byte_level_words(tmp_path, "command-r", "")


def test_unknown_tokenizer_model(tmp_path):
    with pytest.raises(UnsupportedModelError, match="model 'bert' is not supported; supported: gpt2, llama"):
        load_tokenizer(write_vocabulary(tmp_path / "m.gguf", ["a"], [NORMAL], model="bert"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"scores": []}, "scores"),
        ({"bos_token_id": 999}, "bos_token_id=999 is outside the 274 tokens"),
        ({"merges": ["a b c"]}, "not two tokens"),
        ({"merges": ["a zz"]}, "vocabulary and its merges do not fit"),
        ({"merges": [1, 2]}, "tokenizer.ggml.merges has entries of other types"),
        ({"merges": "a b"}, "tokenizer.ggml.merges has entries of other types"),
        ({"scores": [0.5]}, "274 tokens have 1 scores and 274 types"),
        ({"scores": ["a"]}, "tokenizer.ggml.scores has entries of other types"),
        ({"bos_token_id": [1]}, r"bos_token_id=\[1\] is outside"),
        ({"eos_token_id": 274}, "eos_token_id=274 is outside the 274 tokens"),
        ({"unknown_token_id": "<unk>"}, "unknown_token_id='<unk>' is outside"),
        ({"add_bos_token": "yes"}, "add_bos_token='yes' is neither true nor false"),
    ],
)
def test_damaged_vocabularies(sentencepiece_path, changes, message):
    with pytest.raises(CheckpointError, match=message):
        load_tokenizer(sentencepiece_path(**changes))


@pytest.mark.parametrize(
    "changes",
    [
        {"padding_token_id": 274},
        {"padding_token_id": [1, 2]},
        {"seperator_token_id": "none"},
        {"bos_token_id": 999, "add_bos_token": False},
        {"eos_token_id": 0xFFFFFFFF},
        {"token_type_count": [1.5]},
    ],
)
def test_ids_of_a_vocabulary_that_are_not_used_never_matter(sentencepiece_path, changes):
    assert 2 in load_tokenizer(sentencepiece_path(**changes)).eos_token_ids


def test_a_sentencepiece_vocabulary_without_ids_has_those_of_llama_cpp(tmp_path, sentencepiece_path):
    named, none = sentencepiece_path(), sentencepiece_path("n.gguf", bos_token_id=-1)
    reader = gguf.GGUFReader(named)
    content = {key: reader.fields[f"tokenizer.ggml.{key}"].contents() for key in ("tokens", "token_type", "scores")}
    bare = write_vocabulary(
        tmp_path / "b.gguf", content["tokens"], content["token_type"], model="llama", scores=content["scores"]
    )
    for text in ["the cats", "é", ""]:
        assert load_tokenizer(bare).encode(text) == load_tokenizer(named).encode(text)
    assert load_tokenizer(none).encode("the")[0] != 1


def test_a_vocabulary_that_does_not_say_how_words_are_cut_warns(tmp_path):
    with pytest.warns(CheckpointWarning, match=r"GPT-2's rule is taken.*put the model's tokenizer\.json"):
        byte_level_words(tmp_path, None, "I'll add 12345")


def test_a_template_that_refuses_is_a_usage_error(sentencepiece_path):
    tokenizer = load_tokenizer(sentencepiece_path())
    assert tokenizer.decode(tokenizer.apply_chat([{"role": "user", "content": "the"}])).endswith("[assistant]")
    with pytest.raises(UsageError, match="no system role"):
        tokenizer.apply_chat([{"role": "system", "content": "the"}])


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ messages[0].content + 1 }}", "the chat template fails: TypeError"),
        ("{{ 1 // 0 }}", "the chat template fails: ZeroDivisionError"),
        ("{{ '{:d}'.format('a') }}", "the chat template fails: ValueError"),
        ("{% for m in messages %}", "the chat template fails: TemplateSyntaxError: "),
        ("{{ messages[0].tool.name }}", "the chat template fails: UndefinedError: "),
        ("{{ ''.__class__.__mro__ }}", "the chat template fails: SecurityError: "),
        ("{{ raise_exception('no tools') }}", "the chat template refuses the messages: no tools"),
        ("{% macro again() %}{{ again() }}{% endmacro %}{{ again() }}", "the chat template fails: RecursionError"),
    ],
)
def test_a_template_that_fails_is_a_usage_error(sentencepiece_path, template, message):
    tokenizer = load_tokenizer(sentencepiece_path(chat_template=template))
    for chat in (tokenizer.apply_chat, tokenizer.chat_text):
        with pytest.raises(UsageError, match=message):
            chat([{"role": "user", "content": "the"}])


UNREADABLE = {
    "no token for unknown words": (models.WordLevel({"the": 0}, unk_token="<unk>"), None),
    "no id of unknown pieces": (models.Unigram([("t", -1.0)], None), None),
    "a token of the template that is not described": (  # tokenizers panics
        models.WordLevel({"the": 0, "dog": 1, "<unk>": 2}, unk_token="<unk>"),
        {"type": "TemplateProcessing", "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}], "pair": []},
    ),
}


@pytest.mark.parametrize("case", UNREADABLE)
def test_a_text_that_the_vocabulary_cannot_write_is_a_usage_error(tmp_path, case):
    model, processor = UNREADABLE[case]
    described = json.loads(Words(model).to_str())
    if processor is not None:
        described["post_processor"] = {**processor, "special_tokens": {}}
    (tmp_path / "tokenizer.json").write_text(json.dumps(described))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": "{{ messages[0].content }}"}))
    tokenizer = load_tokenizer(tmp_path)
    message = r"^the text cannot be tokenised: .+; give other text, or mend the model's tokenizer\.json$"
    with pytest.raises(UsageError, match=message):
        tokenizer.encode("dog")
    if processor is None:
        with pytest.raises(UsageError, match=message):
            tokenizer.apply_chat([{"role": "user", "content": "dog"}])


def test_a_tokenizer_file_at_which_the_library_panics_is_damaged(hf_directory, monkeypatch):
    class PanicException(BaseException):
        """Has the name by which that of Rust is known."""

    def panic(_):
        raise PanicException("no entry found for key")

    monkeypatch.setattr(Words, "from_buffer", panic)
    with pytest.raises(CheckpointError, match=r"cannot load a tokenizer from .*: no entry found for key"):
        load_tokenizer(hf_directory)


def test_without_a_template_there_is_no_chat(sentencepiece_path):
    tokenizer = load_tokenizer(sentencepiece_path(chat_template=""))
    assert not tokenizer.has_chat_template
    with pytest.raises(UsageError, match="no chat template; give the prompt as plain text"):
        tokenizer.apply_chat([{"role": "user", "content": "the"}])


@pytest.fixture
def hf_directory(demo, tmp_path):
    """A Hugging Face directory with the demo model's tokenizer."""
    path = tmp_path / "hf"
    demo._backend.save_pretrained(path)
    (path / "config.json").write_text(json.dumps({"model_type": "llama", "architectures": ["LlamaForCausalLM"]}))
    return path


def test_a_hugging_face_directory_gives_the_same_tokens(demo, hf_directory):
    tokenizer = load_tokenizer(hf_directory)
    for text in TEXTS:
        assert tokenizer.encode(text) == demo.encode(text)
    messages = [{"role": "user", "content": "Hi"}]
    assert tokenizer.apply_chat(messages) == demo.apply_chat(messages)
    assert tokenizer.eos_token_ids == (2,)


def test_a_tokenizer_beside_a_gguf_file_is_preferred(hf_directory, sentencepiece_path):
    path = sentencepiece_path("hf/model.gguf")
    tokenizer = load_tokenizer(path)
    assert tokenizer.vocab_size == 49152
    assert tokenizer.eos_token_ids == (2,)


def test_a_tokenizer_json_alone_does_not_lose_the_template_of_its_gguf_file(hf_directory, sentencepiece_path):
    for file in hf_directory.iterdir():
        if file.name != "tokenizer.json":
            file.unlink()
    path = sentencepiece_path("hf/model.gguf", chat_template="{{ unk_token }}{{ messages[0].content }}")
    tokenizer = load_tokenizer(path)
    assert tokenizer.vocab_size == 49152
    assert tokenizer.chat_text([{"role": "user", "content": "Hi"}]) == "Hi"  # of special tokens, those that both know


def test_a_directory_without_a_tokenizer(hf_directory):
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (hf_directory / name).unlink()
    with pytest.raises(CheckpointError, match=r"cannot load a tokenizer from .*: it holds none; .*tokenizer\.json"):
        load_tokenizer(hf_directory)


def test_a_damaged_tokenizer_file(hf_directory):
    (hf_directory / "tokenizer.json").write_text("{")
    with pytest.raises(CheckpointError, match="cannot load a tokenizer from"):
        load_tokenizer(hf_directory)


def test_the_text_of_a_token_is_that_within_a_text(demo_gguf):
    tokenizer = load_tokenizer(demo_gguf)
    text = "The sky, 12 times: Wörter"
    assert "".join(map(tokenizer.token_text, tokenizer.encode(text))) == text
    end = tokenizer.eos_token_ids[0]
    assert tokenizer.token_text(end) == tokenizer.special_tokens[end]
    assert tokenizer.token_text(tokenizer.encode("🐟")[0]) == "\ufffd"
