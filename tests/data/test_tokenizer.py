"""Tokenizers: ids of bytes, or of a tokenizer.json with its special tokens and chats; what cannot be used is told.

The files are made here: byte-level BPE of a few sentences, where "hello" is one token.
"""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

import moejax
from moejax.cli import main
from moejax.config import Checkpoint, Config, ConfigError, Data, Mesh, Model, MoE, Optimizer, Train, check
from moejax.data import loader
from moejax.data.loader import open_corpus
from moejax.data.tokenizer import ByteTokenizer, FileTokenizer, open_tokenizer, tokenizer_files
from moejax.train.loop import train

tokenizer = ByteTokenizer()


def test_ids_are_the_bytes_of_utf8():
    ids = tokenizer.encode("hé\r\n")
    assert ids.dtype == np.uint16
    assert ids.tolist() == [104, 0xC3, 0xA9, 13, 10]  # é is two bytes in UTF-8
    assert tokenizer.encode("").shape == (0,)


@pytest.mark.parametrize("text", ["", "def f():\n\treturn 1\r\n", "naïve 日本 🙂 \0 \ufeff"])
def test_decode_undoes_encode(text):
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.decode(tokenizer.encode(text).tolist()) == text


def test_decode_skips_what_has_no_text_and_replaces_broken_bytes():
    assert tokenizer.decode([104, tokenizer.eot, 105, 263]) == "hi"  # 263: padding of the vocabulary
    assert tokenizer.decode([104, 0xC3]) == "h\ufffd"  # the first half of é
    assert tokenizer.decode([0xC3, tokenizer.eot, 0xA9]) == "é"


def test_half_a_surrogate_pair_is_replaced():
    assert tokenizer.decode(tokenizer.encode("a\ud83db")) == "a?b"


def test_sizes():
    assert (tokenizer.size, tokenizer.eot, tokenizer.ends) == (257, 256, (256,))
    assert isinstance(open_tokenizer("bytes"), ByteTokenizer)


SPECIAL = ["<s>", "</s>", "<|user|>", "<|assistant|>", "<|end|>"]  # ids 0 to 4
TEXTS = ["hello world, hello tokens", "the world of tokens says hello", "hello hello hello"] * 9
LLAMA = """{{ bos_token }}{% for message in messages %}
{% set head = '<|' + message['role'] + '|>' %}
    {{- head + '\\n' + message['content'] | trim + '<|end|>' }}
{%- endfor %}
{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% endif %}"""
MISTRAL = """{{ bos_token }}{%- for message in messages -%}
{%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) -%}
  {{- raise_exception('roles must alternate') -}}
{%- endif -%}
{%- if message['role'] == 'user' -%}
  {{- '[INST] ' + message.content + ' [/INST]' -}}
{%- else -%}
  {%- generation -%}{{- ' ' + message.content + eos_token -}}{%- endgeneration -%}
{%- endif -%}
{%- endfor -%}"""
QWEN = """{%- set ns = namespace(last=-1) %}
{%- for message in messages %}
    {%- if message.role == "user" %}{% set ns.last = loop.index0 %}{% endif %}
    {%- if message.role == "system" and not loop.first %}{% continue %}{% endif %}
    {{- '<|user|>' + message.role + '\\n' + message.content + '<|end|>' + '\\n' }}
{%- endfor %}
{%- if tools %}{{ tools | tojson }}{% endif %}
{{- messages[ns.last] | tojson }}
{%- if add_generation_prompt %}{{- '<|assistant|>' }}{%- endif %}"""
USER = [{"role": "user", "content": "hello <world> é"}]
TALK = [*USER, {"role": "assistant", "content": "hello"}, {"role": "user", "content": "the world"}]


def folder_of(folder: Path, template: str | None = None, settings: dict[str, Any] | None = None, size: int = 300,
              **files: Any) -> Path:
    """A tokenizer's folder: bos before every prompt, eos_token "</s>", and other JSON files by their names."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    made.train_from_iterator(TEXTS, trainers.BpeTrainer(
        vocab_size=size, special_tokens=SPECIAL, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False))
    made.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    made.enable_truncation(3)  # as it may be left in a file; nothing is to be cut
    folder.mkdir(exist_ok=True)
    made.save(str(folder / "tokenizer.json"))
    if settings is None:
        settings = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": {"content": "<s>"}, "eos_token": "</s>"}
    if template is not None:
        (folder / "chat_template.jinja").write_text(template)
    for name, content in ({"tokenizer_config": settings} | files).items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    return folder


def problems_of(function, *arguments) -> list[str]:
    with pytest.raises(ConfigError) as error:
        function(*arguments)
    return error.value.problems


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return folder_of(tmp_path_factory.mktemp("tokenizer"), LLAMA)


def test_a_file_or_its_folder(folder):
    by_folder, by_file = (open_tokenizer(str(path)) for path in (folder, folder / "tokenizer.json"))
    assert by_folder.identity == by_file.identity
    assert isinstance(by_file, FileTokenizer)
    assert (by_file.size, by_file.eot, by_file.ends) == (by_file.library.get_vocab_size(), 1, (1,))
    assert by_file.special == {"bos_token": "<s>", "eos_token": "</s>"}


def test_ids_of_a_text_alone_and_of_a_prompt(folder):
    tokenizer = open_tokenizer(str(folder))
    hello = tokenizer.library.token_to_id("hello")
    again = tokenizer.library.token_to_id("Ġhello")
    assert tokenizer.encode("hello hello").tolist() == [hello, again]
    assert tokenizer.prompt("hello hello").tolist() == [0, hello, again]
    assert tokenizer.encode("hello</s>").tolist() == [hello, 1]
    assert tokenizer.encode("").shape == (0,) and tokenizer.encode("hello").dtype == np.uint16
    texts = ["hello hello", "", "naïve 日本"]
    batch = tokenizer.encode_batch(texts)
    assert [ids.tolist() for ids in batch] == [tokenizer.encode(text).tolist() for text in texts]
    assert {ids.dtype.name for ids in batch} == {"uint16"}


@pytest.mark.parametrize("text", ["", "def f():\n\treturn 1\r\n", "naïve 日本 🙂 \0 \ufeff", "hello " * 50])
def test_a_file_decodes_what_it_encodes(folder, text):
    tokenizer = open_tokenizer(str(folder))
    assert tokenizer.decode(tokenizer.encode(text)) == tokenizer.decode(tokenizer.prompt(text)) == text


def test_a_file_decodes_no_specials_and_replaces_half_a_pair(folder):
    tokenizer = open_tokenizer(str(folder))
    hello = tokenizer.library.token_to_id("hello")
    assert tokenizer.decode([0, hello, 4, 1, tokenizer.size, 70_000]) == "hello"
    assert tokenizer.decode(tokenizer.encode("a\ud83db")) == "a?b"


def test_what_names_the_ends(tmp_path):
    """As published folders have them: a text, an object, a list of ids, or only one of the files."""
    named = {"bos_token": {"content": "<s>", "lstrip": False}, "eos_token": {"content": "<|end|>"}, "pad_token": None}
    for number, (settings, files, eot, ends) in enumerate([
            ({"eos_token": "</s>"}, {}, 1, (1,)),
            ({}, {"special_tokens_map": named}, 4, (4,)),
            ({"eos_token": "</s>"}, {"generation_config": {"eos_token_id": [4, 1, 3]}}, 1, (1, 4, 3)),
            ({}, {"generation_config": {"eos_token_id": [4, 1]}}, 4, (4, 1)),
            ({}, {"generation_config": {"eos_token_id": 1}}, 1, (1,)),
            ({}, {}, None, ())]):
        found = open_tokenizer(str(folder_of(tmp_path / str(number), settings=settings, **files)))
        assert (found.eot, found.ends) == (eot, ends)


def test_what_names_the_special_tokens(tmp_path):
    """Words of the vocabulary may be special too; others that are named are not added, as no embedding is theirs."""
    settings = {"eos_token": "</s>", "image_token": "hello", "pad_token": "<pad>", "add_bos_token": False}
    older = {"eos_token": "<|end|>", "additional_special_tokens": [{"content": "Ġworld"}]}
    tokenizer = open_tokenizer(str(folder_of(tmp_path, settings=settings, special_tokens_map=older)))
    assert tokenizer.special == {"eos_token": "<|end|>", "image_token": "hello", "pad_token": "<pad>"}
    assert tokenizer.decode(tokenizer.prompt("hello world<pad>")) == "<pad>"
    assert tokenizer.prompt("world")[0] == 0  # tokenizer.json says so
    settings |= {"added_tokens_decoder": {}}
    tokenizer = open_tokenizer(str(folder_of(tmp_path, settings=settings, special_tokens_map=older)))
    assert tokenizer.special["eos_token"] == "</s>"


@pytest.mark.parametrize("template, messages, expected", [
    (LLAMA, USER, "<s><|user|>\nhello <world> é<|end|><|assistant|>\n"),
    (LLAMA, TALK, "<s><|user|>\nhello <world> é<|end|><|assistant|>\nhello<|end|><|user|>\nthe world<|end|>"
                  "<|assistant|>\n"),
    (MISTRAL, TALK, "<s>[INST] hello <world> é [/INST] hello</s>[INST] the world [/INST]"),
    (QWEN, USER, '<|user|>user\nhello <world> é<|end|>\n{"role": "user", "content": "hello <world> é"}<|assistant|>'),
    ("{{ strftime_now('%Y') | length }} {{ unk_token }}{{ dict(a=1).a }}", USER, "4 1")])
def test_chats(tmp_path, template, messages, expected):
    tokenizer = open_tokenizer(str(folder_of(tmp_path, template)))
    ids = tokenizer.chat(messages).tolist()
    assert ids == tokenizer.encode(expected).tolist()  # and no second bos before it
    if template == LLAMA:
        assert ids[:2] == [0, 2] and ids[-2] == 3
        assert tokenizer.chat(messages, add_generation_prompt=False).tolist() == ids[:-2]


def test_where_a_template_stands(tmp_path):
    named = [{"name": "tool_use", "template": "tools"}, {"name": "default", "template": "several"}]
    for number, (template, found, expected) in enumerate([
            (None, "one", "one"), (None, named, "several"), ("hello", named, "hello"), ("hello", "one", "hello")]):
        tokenizer = open_tokenizer(str(folder_of(tmp_path / str(number), template, {"chat_template": found})))
        assert tokenizer.decode(tokenizer.chat(USER)) == expected


def test_no_template(tmp_path):
    folder = folder_of(tmp_path)
    rule, repair = "a chat needs a template, or one named default; ", (
        f"; put the model's own into {folder}/chat_template.jinja, or prompt without a chat")
    for found in (None, [{"name": "rag", "template": "x"}], 7):
        folder_of(folder, settings={"chat_template": found})
        assert problems_of(open_tokenizer(str(folder)).chat, USER) == [
            f"{rule}{folder} has no chat_template.jinja, and in tokenizer_config.json the chat_template {found!r}"
            + repair]
    assert problems_of(tokenizer.chat, USER) == [
        "a chat needs a template; data.tokenizer=bytes has none; prompt without a chat, or set data.tokenizer to a "
        "folder with tokenizer.json and chat_template.jinja"]


@pytest.mark.parametrize("template, said", [
    ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "SecurityError: access to attribute '__class__'"),
    ("{{ messages.append(1) }}", "SecurityError: access to attribute 'append'"),
    ("{{ raise_exception.__globals__.json }}", "SecurityError: access to attribute '__globals__'"),
    ("{{ range(10**9) | length }}", "OverflowError: Range too big."),
    ("{% include '/etc/passwd' %}", "TypeError: no loader for this environment specified"),
    ("{{ raise_exception('only one message') }}", "TemplateError: only one message"),
    ("{{ nothing.at.all }}", "UndefinedError: 'nothing' is undefined")])
def test_a_template_that_fails_or_leaves_the_sandbox(tmp_path, template, said):
    (problem,) = problems_of(open_tokenizer(str(folder_of(tmp_path, template))).chat, USER)
    assert problem.startswith(f"a chat template must be one of Jinja that takes the messages; that of "
                              f"{tmp_path}/chat_template.jinja fails ({said}")
    assert problem.endswith("); change the messages, or repair it")


@pytest.mark.parametrize("template", [
    "{% set ns = namespace() %}{% set ns.__html__ = raise_exception %}{{ ns.a }}{{ ns | e }}",
    "{{ namespace(__html__=raise_exception, a=1) | e }}"])
def test_python_calls_nothing_that_a_template_put_into_a_namespace(tmp_path, template):
    tokenizer = open_tokenizer(str(folder_of(tmp_path, template)))
    assert tokenizer.decode(tokenizer.chat(USER)).startswith("&lt;Namespace {&#39;__html__&#39;: ")


def test_a_template_that_is_none(tmp_path):
    tokenizer = open_tokenizer(str(folder_of(tmp_path, "{% for %}")))
    assert f"that of {tmp_path}/chat_template.jinja fails (TemplateSyntaxError: " in problems_of(
        tokenizer.chat, USER)[0]
    (tmp_path / "chat_template.jinja").write_bytes(b"\xff")
    assert "(UnicodeDecodeError: 'utf-8' codec can't decode byte 0xff" in problems_of(tokenizer.chat, USER)[0]


@pytest.mark.parametrize("settings, generation", [
    ({"eos_token": "<eos>"}, {}), ({"eos_token": "</s>"}, {"eos_token_id": "x"}), ({}, {"eos_token_id": [1, -1]})])
def test_an_end_that_is_no_token(tmp_path, settings, generation):
    (problem,) = problems_of(open_tokenizer, str(folder_of(tmp_path, settings=settings, generation_config=generation)))
    assert problem.startswith("the eos_token and every eos_token_id must be a token of ")


def test_names_that_are_no_tokenizer(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "tokenizer.json").write_text("{}")  # which no name at all does not stand for
    for name in ("byte", "empty", ""):
        assert problems_of(open_tokenizer, name) == [
            "text needs a tokenizer: data.tokenizer is bytes, or the path of a tokenizer.json or of its folder; "
            f"{name!r} is none; correct it (relative paths start at {tmp_path})"]


def test_all_that_is_wrong_with_the_files_comes_at_once(tmp_path):
    folder_of(tmp_path, special_tokens_map=[], settings={"eos_token": "<eos>"}, generation_config={"eos_token_id": "x"})
    special, eos = problems_of(open_tokenizer, str(tmp_path))
    assert special == f"{tmp_path}/special_tokens_map.json must be a JSON object; it is a list"
    assert eos.startswith("the eos_token and every eos_token_id must be a token of "
                          f"{tmp_path}/tokenizer.json; they are '<eos>' and 'x'; correct them in ")
    (tmp_path / "tokenizer_config.json").write_text("{")
    (tmp_path / "tokenizer.json").write_text('{"model": 7}')
    settings, _, broken = problems_of(open_tokenizer, str(tmp_path))
    assert settings.startswith(f"{tmp_path}/tokenizer_config.json must be a JSON object; it cannot be read (Expecting")
    assert broken.startswith("a tokenizer.json must be readable for the package tokenizers ")
    assert f"; {tmp_path}/tokenizer.json is not (" in broken


def test_a_missing_package_is_named_with_its_extra(folder, monkeypatch):
    tokenizer = open_tokenizer(str(folder))
    monkeypatch.setitem(sys.modules, "jinja2", None)
    assert problems_of(tokenizer.chat, USER) == [
        "a chat template needs the optional package jinja2, which is not installed; pip install 'moejax[hf]'"]
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    assert problems_of(open_tokenizer, str(folder)) == [
        "a tokenizer.json needs the optional package tokenizers, which is not installed; pip install 'moejax[hf]', "
        f"or set data.tokenizer=bytes (it is {folder}/tokenizer.json)"]
    assert isinstance(open_tokenizer("bytes"), ByteTokenizer)


def test_the_vocabulary_must_hold_its_ids(folder):
    size = open_tokenizer(str(folder)).size
    assert open_tokenizer(str(folder), size).size == size
    assert problems_of(open_tokenizer, str(folder), size - 1) == [
        f"model.vocab must hold the tokenizer's ids; got {size - 1} and {size} (data.tokenizer={folder}); "
        f"set model.vocab={size} or above"]
    small = Config(name="x", run_dir="x", model=Model(vocab=64), data=Data(tokenizer=str(folder)))
    assert not [problem for problem in check(small) if "vocab" in problem]  # which no config can know


def data_of(folder: Path, home: Path, **options) -> Data:
    if not (home / "text").exists():
        (home / "text").mkdir()
        for number, text in enumerate(["hello world", "hello", "the world of tokens says hello"]):
            (home / "text" / f"{number}.txt").write_text(text)
    return Data(**{"sources": (str(home / "text"),), "tokenizer": str(folder), "validation": 0.0, "sequence": 2,
                   "cache": str(home / "cache"), **options})


def test_documents_end_and_the_cache_knows_the_file(folder, tmp_path, monkeypatch):
    tokenizer = open_tokenizer(str(folder))
    texts = ["hello world", "hello", "the world of tokens says hello"]
    expected = [token for text in texts for token in [*tokenizer.encode(text).tolist(), 1]]
    corpus = open_corpus(data_of(folder, tmp_path))
    assert corpus.train[:].tolist() == expected and corpus.train.dtype == np.uint16
    assert open_corpus(data_of(folder / "tokenizer.json", tmp_path)).cached  # by its content, not its path
    other = folder_of(tmp_path / "other", size=280)
    assert not open_corpus(data_of(other, tmp_path)).cached
    assert not open_corpus(data_of(folder_of(other, settings={"eos_token": "<|end|>"}, size=280), tmp_path)).cached
    monkeypatch.setattr(loader, "LETTERS", 12)  # documents are tokenized in two groups
    assert open_corpus(data_of(folder, tmp_path, cache=str(tmp_path / "again"))).train[:].tolist() == expected


def test_caches_of_bytes_keep_their_names(tmp_path):
    # worked out when a part of the cache became one file
    assert loader.cache_key(Data(), "bytes", []) == "e00b3c080c618d5a3f2f"


def test_many_ids_take_four_bytes(tmp_path):
    made = Tokenizer(models.WordLevel({"hello": 0, "</s>": 1, "far": 2**16}, unk_token="hello"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "</s>"}')
    tokenizer = open_tokenizer(str(tmp_path))
    assert tokenizer.size == 2**16 + 1 and tokenizer.encode("far").dtype == np.uint32
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "a.txt").write_text("hello far hello")
    corpus = open_corpus(Data(sources=(str(tmp_path / "text"),), tokenizer=str(tmp_path), validation=0.0, sequence=2,
                              cache=str(tmp_path / "cache")))
    assert corpus.train[:].tolist() == [0, 2**16, 0, 1] and corpus.train.dtype == np.uint32


def test_what_cannot_be_trained_with(tmp_path):
    config = data_of(tmp_path / "none", tmp_path, tokenizer="", sources=("missing",))
    tokenizer, source = problems_of(open_corpus, config)
    assert tokenizer.startswith("text needs a tokenizer: ") and "'missing'" in source
    endless = folder_of(tmp_path / "endless", settings={})
    assert problems_of(open_corpus, data_of(endless, tmp_path)) == [
        f"training needs a token that ends a document; that of data.tokenizer={endless} is not named; "
        "write its eos_token into tokenizer_config.json beside it"]
    (problem,) = problems_of(open_corpus, data_of(folder_of(tmp_path / "large"), tmp_path), 64)
    assert problem.startswith("model.vocab must hold the tokenizer's ids; got 64 and ")


@pytest.fixture(scope="module")
def trained(folder, tmp_path_factory) -> Config:
    home = tmp_path_factory.mktemp("trained")
    data = data_of(folder_of(home / "tokenizer", LLAMA, generation_config={"eos_token_id": [1, 4]}), home, sequence=8,
                   batch=2)
    (home / "text" / "long.txt").write_text("hello world " * 40)
    config = Config(
        name="x", run_dir=str(home / "run"), data=data, mesh=Mesh(fake_devices=1), checkpoint=Checkpoint(every=2),
        model=Model(layers=1, d_model=8, heads=2, head_dim=4, vocab=304, moe=MoE(experts=2, active=1, hidden=8)),
        optimizer=Optimizer(warmup=0), train=Train(steps=2))
    assert train(config)["loss"] > 0
    return config


def test_a_run_keeps_its_tokenizer_and_may_be_moved(trained, tmp_path, capsys):
    run, folder = Path(trained.run_dir), Path(trained.data.tokenizer)
    kept = tokenizer_files(str(run))
    assert kept == tokenizer_files(str(folder)) and len(kept) == 4
    assert train(trained)["step"] == 2  # it is the same on going on
    folder.rename(tmp_path / "away")
    model = moejax.load(run)
    assert model.tokenizer.ends == (1, 4) and model.prompt("hello")[0] == 0
    assert model.prompt("hello", chat=True) == model.tokenizer.encode(
        "<s><|user|>\nhello<|end|><|assistant|>\n").tolist()
    (text,) = moejax.generate(model, ["hello"], max_new_tokens=3, chat=True)
    assert main(["generate", str(run), "hello", "--chat", "--max-new-tokens", "3", "--temperature", "0"]) == 0
    assert capsys.readouterr().out == f"{text}\n"
    (plain,) = moejax.generate(model, ["hello"], max_new_tokens=3)
    assert main(["generate", str(run), "hello", "--json", "--max-new-tokens", "3", "--temperature", "0"]) == 0
    assert json.loads(capsys.readouterr().out) == {"prompt": "hello", "text": plain}
    (tmp_path / "away").rename(folder)
    folder_of(folder, size=265)
    (problem,) = problems_of(train, trained)
    assert problem.startswith("a run keeps its tokenizer; ") and f"is no longer that of {run}/tokenizer.json" in problem


def test_a_model_without_a_tokenizer_takes_tokens(trained):
    model = moejax.load(trained.run_dir, ["data.tokenizer="])
    model.folder = None  # of a checkpoint that came without one
    assert model(np.array([[1, 2, 3]])).logits.shape == (1, 3, 304)
    (problem,) = problems_of(moejax.generate, model, ["hello"])
    assert problem.startswith("text needs a tokenizer: data.tokenizer is bytes, or ") and "; '' is none" in problem
