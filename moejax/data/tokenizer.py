"""Text to token ids and back: `open_tokenizer` gives the bytes of UTF-8, or the `tokenizer.json` of a file.  Both have

- `size` (ids of text are below it), `eot` (the id that ends a document), `ends` (those that end what a model says),
  `image` (the id that stands where an image is) and `identity`, a text that differs where ids may differ;
- `encode` of a text as it is, for training; `encode_batch` of many; `prompt`, with the special tokens that a model
  expects around it; `chat`, of messages by the chat template; `decode`.
"""

import hashlib
import json
import os
from collections.abc import Iterable, Sequence
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt, UInt16

from moejax.config import ConfigError, refuse

TOKENIZER_FILE = "tokenizer.json"
IMAGE = "<image>"  # the token of files
SETTINGS, SPECIAL, GENERATION = "tokenizer_config.json", "special_tokens_map.json", "generation_config.json"
TEMPLATE = "chat_template.jinja"


class ByteTokenizer:
    """Ids 0..255 are the bytes of UTF-8, 256 ends a document: any text fits and nothing is learned or fetched."""

    size = 257
    eot = 256
    ends = (256,)
    image = 257  # beyond the size, as text alone does not need it
    identity = "bytes"

    def encode(self, text: str) -> UInt16[np.ndarray, " T"]:
        """The bytes of `text`, without an end of text.  What UTF-8 cannot hold (half a surrogate pair) becomes `?`."""
        return np.frombuffer(text.encode("utf-8", "replace"), np.uint8).astype(np.uint16)

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        return [self.encode(text) for text in texts]

    prompt = encode

    def chat(self, messages: Sequence[dict[str, Any]], add_generation_prompt: bool = True) -> UInt16[np.ndarray, " T"]:
        raise ConfigError(["a chat needs a template; data.tokenizer=bytes has none; prompt without a chat, or set "
                           f"data.tokenizer to a folder with {TOKENIZER_FILE} and {TEMPLATE}"])

    def decode(self, ids: Iterable) -> str:
        """The text of a sequence of ids.  Ids from 256 up have no text; bytes that are not UTF-8 become U+FFFD."""
        ids = np.asarray(ids, np.int64)
        return ids[ids < 256].astype(np.uint8).tobytes().decode("utf-8", "replace")


class FileTokenizer:
    """A tokenizer.json, with what its folder says of special tokens, ends and chats.

    Special tokens that are spelt out in a text become their ids; `special` has them by name, "bos_token" and so on.
    `eot` is the eos_token, else the first eos_token_id of generation_config.json, else None; `image` may be None too.
    Raises ConfigError: the package tokenizers is not installed, or all that is wrong with the files.
    """

    def __init__(self, path: Path):
        try:
            import tokenizers  # an optional extra
        except ImportError:
            raise ConfigError([f"a {TOKENIZER_FILE} needs the optional package tokenizers, which is not installed; "
                               f"pip install 'moejax[hf]', or set data.tokenizer=bytes (it is {path})"]) from None
        problems, read = [], []
        self.folder = path.parent
        for file in (self.folder / name for name in (SETTINGS, SPECIAL, GENERATION)):
            try:
                read.append(read_json(file) if file.is_file() else {})
            except ConfigError as error:
                problems += error.problems
                read.append({})
        self.settings, older, generation = read
        # as transformers 5: where tokenizer_config.json lists the added tokens, it alone counts
        said = self.settings if "added_tokens_decoder" in self.settings else self.settings | older
        self.special = {name: text for name, token in said.items()
                        if name.endswith("_token") and (text := token_text(token))}
        try:
            data = path.read_bytes()
            self.library = tokenizers.Tokenizer.from_str(data.decode())
        except Exception as error:  # the library raises no narrower one
            problems.append(f"a {TOKENIZER_FILE} must be readable for the package tokenizers {tokenizers.__version__}; "
                            f"{path} is not ({error}); write it again, or name another in data.tokenizer")
            raise ConfigError(problems) from None
        self.library.no_truncation()
        self.library.no_padding()
        more = said.get("extra_special_tokens") or said.get("additional_special_tokens")
        named = [*self.special.values(), *(filter(None, map(token_text, more)) if isinstance(more, list) else ())]
        # none beyond the vocabulary, for which the model has no embedding
        self.library.add_special_tokens([text for text in named if self.library.token_to_id(text) is not None])
        self.size = 1 + max(self.library.get_vocab(with_added_tokens=True).values(), default=-1)
        self.image: int | None = self.library.token_to_id(IMAGE)
        self.dtype = np.dtype(np.uint16 if self.size <= 2**16 else np.uint32)

        ends, eos = generation.get("eos_token_id"), self.special.get("eos_token")
        ends = ends if isinstance(ends, list) else [] if ends is None else [ends]
        ends = [self.library.token_to_id(eos), *ends] if eos else ends
        if not all(type(each) is int and each >= 0 for each in ends):
            problems.append(f"the eos_token and every eos_token_id must be a token of {path}; they are {eos!r} and "
                            f"{generation.get('eos_token_id')!r}; correct them in {SETTINGS}, {SPECIAL} or "
                            f"{GENERATION}")
        refuse(problems)
        self.ends = tuple(dict.fromkeys(ends))
        self.eot: int | None = next(iter(ends), None)
        digest = hashlib.blake2b(data, digest_size=16).hexdigest()
        self.identity = f"{TOKENIZER_FILE} {digest} {sorted(set(named))} {self.eot}"

    def encode(self, text: str) -> UInt[np.ndarray, " T"]:
        """The ids of `text` alone.  What UTF-8 cannot hold (half a surrogate pair) becomes `?`."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """`encode` of each, on all cores."""
        texts = [text.encode("utf-8", "replace").decode() for text in texts]
        return [np.array(one.ids, self.dtype)
                for one in self.library.encode_batch_fast(texts, add_special_tokens=False)]

    def prompt(self, text: str) -> UInt[np.ndarray, " T"]:
        """The ids of `text` with the special tokens that its model expects around it, such as a bos token."""
        return np.array(self.library.encode(text.encode("utf-8", "replace").decode()).ids, self.dtype)

    def chat(self, messages: Sequence[dict[str, Any]], add_generation_prompt: bool = True) -> UInt[np.ndarray, " T"]:
        """The ids of messages such as `{"role": "user", "content": "…"}`, up to where the model is to answer.

        The template is chat_template.jinja, else that of tokenizer_config.json, or of several there the one named
        default.  Raises ConfigError: there is none, or no jinja2, or it is wrong, refuses them or leaves its sandbox.
        """
        path, found = self.folder / TEMPLATE, self.settings.get("chat_template")
        if isinstance(found, list):
            found = next((one.get("template") for one in found
                          if isinstance(one, dict) and one.get("name") == "default"), found)
        if not path.is_file() and not isinstance(found, str):
            raise ConfigError([f"a chat needs a template, or one named default; {self.folder} has no {TEMPLATE}, and "
                               f"in {SETTINGS} the chat_template {found!r:.80}; put the model's own into {path}, or "
                               "prompt without a chat"])
        try:
            made = sandbox()
        except ImportError:
            raise ConfigError(["a chat template needs the optional package jinja2, which is not installed; "
                               "pip install 'moejax[hf]'"]) from None
        try:
            template = made.from_string(path.read_text("utf-8") if path.is_file() else found)
            plain = json.loads(json.dumps(messages))  # nothing with methods of its own
            text = template.render(messages=plain, tools=None, documents=None,
                                   add_generation_prompt=add_generation_prompt, **self.special)
        except Exception as error:  # whatever a stranger's program may raise
            where = path if path.is_file() else self.folder / SETTINGS
            raise ConfigError([f"a chat template must be one of Jinja that takes the messages; that of {where} fails "
                               f"({type(error).__name__}: {error}); change the messages, or repair it"]) from None
        return self.encode(text)

    def decode(self, ids: Iterable) -> str:
        """The text of a sequence of ids.  Special tokens, ends and ids from `size` up have no text."""
        kept = [each for each in np.asarray(ids, np.int64).tolist() if each < self.size and each not in self.ends]
        return self.library.decode(kept, skip_special_tokens=True)


Tokenizer = ByteTokenizer | FileTokenizer


def open_tokenizer(name: str, vocab: int | None = None) -> Tokenizer:
    """That of data.tokenizer.  Raises ConfigError: none, one that cannot be used, or more ids than `vocab`."""
    tokenizer = ByteTokenizer() if name == "bytes" else FileTokenizer(tokenizer_path(name))
    if vocab is not None and tokenizer.size > vocab:
        raise ConfigError([f"model.vocab must hold the tokenizer's ids; got {vocab} and {tokenizer.size} "
                           f"(data.tokenizer={name}); set model.vocab={tokenizer.size} or above"])
    return tokenizer


def tokenizer_path(name: str) -> Path:
    """The tokenizer.json that a name other than "bytes" stands for.  Raises ConfigError where there is none."""
    path = Path(os.path.expanduser(name))
    file = path / TOKENIZER_FILE if path.is_dir() else path
    if not name or not file.is_file():
        raise ConfigError([f"text needs a tokenizer: data.tokenizer is bytes, or the path of a {TOKENIZER_FILE} or of "
                           f"its folder; {name!r} is none; correct it (relative paths start at {os.getcwd()})"])
    return file


def tokenizer_files(name: str) -> dict[str, str]:
    """The texts of the files that make the tokenizer `name`, by the names that a folder of its own gives them."""
    if name in ("", "bytes"):
        return {}
    path = tokenizer_path(name)
    files = {TOKENIZER_FILE: path} | {file: path.parent / file for file in (SETTINGS, SPECIAL, GENERATION, TEMPLATE)}
    return {file: found.read_text("utf-8") for file, found in files.items() if found.is_file()}


def read_json(path: Path) -> dict[str, Any]:
    """Raises ConfigError."""
    try:
        found = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError([f"{path} must be a JSON object; it cannot be read ({error})"]) from None
    if not isinstance(found, dict):
        raise ConfigError([f"{path} must be a JSON object; it is a {type(found).__name__}"])
    return found


def token_text(token: Any) -> str | None:
    """A special token is written as its text, or as an object that holds it."""
    token = token.get("content") if isinstance(token, dict) else token
    return token if isinstance(token, str) else None


def sandbox() -> Any:
    """A jinja2.Environment for templates, which are strangers' programs, with what published ones expect."""
    import jinja2  # an optional extra
    from jinja2.ext import Extension, loopcontrols
    from jinja2.nodes import Scope
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """{% generation %} … {% endgeneration %}: what the assistant said, which is for training on it; it stays."""

        tags = frozenset({"generation"})

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            return Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True)).set_lineno(line)

    class Namespace(jinja2.utils.Namespace):
        """What a template puts into it is nothing that Python itself looks up, such as __html__."""

        def __getattribute__(self, name: str) -> Any:
            if name.startswith("__"):
                return object.__getattribute__(self, name)
            return super().__getattribute__(name)

    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    made = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols])
    made.filters["tojson"] = partial(json.dumps, ensure_ascii=False)  # jinja2's own escapes HTML
    made.globals |= {"raise_exception": raise_exception, "namespace": Namespace,
                     "strftime_now": lambda form: datetime.now().strftime(form),
                     "dict": lambda *args, **kwargs: dict(*args, **kwargs)}
    return made
