"""Conversations as models were trained on them: templates, names, ends of turns."""

import json

import pytest
import tokenizers

from models.files.templates import MORE
from models.files.vocabulary import from_folder, from_gguf
from models.text.chat import render
from models.text.tokenizer import train_bpe

HELLO = [{"role": "user", "content": "hi"}]


def written(template, **special):
    return render(template, HELLO, special=special)


@pytest.mark.parametrize(
    ("template", "text"),
    [
        # SmolLM3 marks what trainers learn from.
        ("a{% generation %}{{ messages[0].content }}{% endgeneration %}b", "ahib"),
        ("{%- for m in messages -%}{% generation %}{{ m.role }}{% break %}"
         "{% endgeneration %}{% endfor %}", "user"),
        ("{% if tools is not none %}preamble{% endif %}-", "-"),
        ("{% if documents is none %}none{% endif %}", "none"),
        ("{{ {'b': 'é', 'a': 1} | tojson }}", '{"b": "é", "a": 1}'),
        ("{{ {'b': 'é', 'a': 1} | tojson(sort_keys=True) }}", '{"a": 1, "b": "é"}'),
        ("{{ 'é' | tojson(ensure_ascii=True) }}", '"\\u00e9"'),
        ("{{ [1, 2] | tojson(separators=(',', ':')) }}", "[1,2]"),
        ("{{ [1] | tojson(indent=1) }}", "[\n 1\n]"),
        ("{% if bos_token is defined %}odd{% endif %}", ""),
    ],
)  # fmt: skip
def test_templates_say_what_transformers_has_them_say(template, text):
    assert written(template) == text


def test_every_failure_of_a_template_is_one_sentence():
    for template in (
        "{{ 'a'.index('b') }}",
        "{{ strftime_now(1) }}",
        "{% generation %}",
    ):
        with pytest.raises(ValueError, match="chat template does not render"):
            written(template)


# --- templates and ends of turns in files ---


@pytest.fixture
def folder(tmp_path):
    inner = train_bpe(b"def f(self): return self\n" * 50, vocab_size=256 + 12).inner
    inner.add_special_tokens(["<|im_start|>", "<|im_end|>", "<|endoftext|>"])
    inner.save(str(tmp_path / "tokenizer.json"))
    return tmp_path


def settings(folder, **fields):
    (folder / "tokenizer_config.json").write_text(json.dumps(fields))


def said(tokenizer, **names):
    return tokenizer.decode(tokenizer.encode_chat(HELLO, **names))


NAMED = [
    {"name": "default", "template": "one"},
    {"name": "tool_use", "template": "two"},
]


def test_templates_have_names(folder):
    settings(folder, chat_template=NAMED)
    tokenizer = from_folder(folder, vocab_size=300)
    assert said(tokenizer) == said(tokenizer, template="default") == b"one"
    assert said(tokenizer, template="tool_use") == b"two"
    with pytest.raises(ValueError, match="'rag': name one of default, tool_use"):
        said(tokenizer, template="rag")
    settings(folder, chat_template=NAMED[1:])
    with pytest.raises(ValueError, match="'default': name one of tool_use"):
        said(from_folder(folder, vocab_size=300))


def test_special_tokens_that_are_not_there_are_not_defined(folder):
    template = "{% if bos_token is defined %}odd{% endif %}{{ eos_token }}def"
    settings(folder, eos_token="<|im_end|>", bos_token=None, chat_template=template)
    tokenizer = from_folder(folder, vocab_size=300)
    (end, *text), (number,) = tokenizer.encode_chat(HELLO), tokenizer.stops
    assert (end, tokenizer.decode(text)) == (number, b"def")


def test_files_of_templates_come_before_the_config(folder):
    settings(folder, chat_template="none of this")
    (folder / MORE).mkdir()
    (folder / MORE / "rag.jinja").write_text("three")
    (folder / "chat_template.jinja").write_text("four")
    tokenizer = from_folder(folder, vocab_size=300)
    assert (said(tokenizer), said(tokenizer, template="rag")) == (b"four", b"three")


@pytest.mark.parametrize(
    "content", [3, {"default": "x"}, [{"name": "default"}], ["x"], [{"template": "x"}]]
)
def test_a_template_that_is_none_is_refused(folder, content):
    settings(folder, chat_template=content)
    with pytest.raises(ValueError, match="chat_template must be a text or a list of"):
        from_folder(folder, vocab_size=300)


def test_a_folder_ends_a_turn_where_its_template_does(folder):
    """Many a fine-tune says <|endoftext|> and was trained to write <|im_end|>."""
    settings(folder, eos_token="<|endoftext|>")
    plain = from_folder(folder, vocab_size=300)
    chatml = "<|im_start|>{{ messages[0].content }}<|im_end|>"
    settings(folder, eos_token="<|endoftext|>", chat_template=chatml)
    chat = from_folder(folder, vocab_size=300)
    number = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json")).token_to_id
    assert plain.stops == {number("<|endoftext|>")}
    assert chat.stops == {number("<|endoftext|>"), number("<|im_end|>")}


def gguf(*special, pieces=("a", "\u2581", "\n", "<", "|", ">", "u", "\u2581a"), **more):
    """Metadata of a SentencePiece vocabulary; special tokens have the kind control."""
    tokens = ["<unk>", "<s>", *special, *pieces, *(f"<0x{x:02X}>" for x in range(256))]
    types = [2, 3, *[3] * len(special), *[1] * len(pieces), *[6] * 256]
    named = {"model": "llama", "tokens": tokens, "token_type": types}
    named |= {"scores": [-float(i) for i in range(len(tokens))]}
    named |= {"bos_token_id": 1, "eos_token_id": 2} | more
    return {f"tokenizer.ggml.{name}": value for name, value in named.items()}


@pytest.mark.parametrize(
    "end", ["<|im_end|>", "<|end|>", "<|eot_id|>", "<|eom_id|>", "<end_of_turn>"]
)
def test_every_end_of_a_turn_in_a_gguf_file_is_a_stop(end):
    tokenizer = from_gguf(gguf("<|endoftext|>", "<|user|>", end), vocab_size=300)
    assert tokenizer.stops == {2, 4}
    data = gguf("<|endoftext|>", "<odd>", "<also odd>", eot_token_id=3, eom_token_id=4)
    assert from_gguf(data, vocab_size=300).stops == {2, 3, 4}
    data["tokenizer.ggml.token_type"][4] = 1  # a text that looks like one
    data["tokenizer.ggml.tokens"][4] = end
    del data["tokenizer.ggml.eom_token_id"]
    assert from_gguf(data, vocab_size=300).stops == {2, 3}


@pytest.mark.parametrize(
    ("about", "strips"),
    [
        ({"general.architecture": "phi3"}, True),
        ({"general.name": "Phi-3-mini"}, True),
        ({"general.architecture": "llama"}, False),
    ],
)
def test_special_tokens_of_phi3_take_in_the_white_space_behind_them(about, strips):
    data = gguf("<|endoftext|>", "<|user|>", "<|end|>") | about
    data["tokenizer.ggml.add_space_prefix"] = False
    tokenizer = from_gguf(data, vocab_size=300)
    tokens = tokenizer.encode(b"<|user|>\na<|end|>\n", is_start=False).tolist()
    letter, line = 5, 7
    plain = [3, line, letter, 4, line]
    assert tokens == ([3, letter, 4] if strips else plain)
    kept = tokenizer.encode(b"<|endoftext|>\n", is_start=False).tolist()
    assert kept == [2, line]


def test_templates_of_a_gguf_file_have_names():
    data = gguf("<|endoftext|>") | {
        "tokenizer.chat_template": "a",
        "tokenizer.chat_template.tool_use": "aa",
        "tokenizer.chat_templates": ["tool_use"],
    }
    tokenizer = from_gguf(data, vocab_size=300)
    assert (said(tokenizer), said(tokenizer, template="tool_use")) == (b" a", b" aa")
    with pytest.raises(ValueError, match="name one of default, tool_use"):
        tokenizer.encode_chat(HELLO, template="s")
