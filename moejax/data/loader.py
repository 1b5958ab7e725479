"""From the config to tokens: tokenize once into memory-mapped files, each document with an end of text after it."""

import contextlib
import hashlib
import json
import math
import os
import tempfile
from array import array
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int64, Integer

from moejax.config import ConfigError, Data, refuse
from moejax.data.images import Ref
from moejax.data.sources import Document, File, documents, find_files
from moejax.data.tokenizer import IMAGE, Tokenizer, open_tokenizer

FORMAT = 3  # of the cache; raise it when what is written for the same config changes
CHUNK = 2**20  # tokens counted at a time
LETTERS = 2**20  # of documents that are tokenized and written together
PARTS = ("train", "validation")


class References:
    """The images of a part.  A row of `table` is where an id stands, and start and end of its line of JSON."""

    def __init__(self, path: Path, size: int):
        self.table: Int64[np.ndarray, "images 3"] = np.empty((0, 3), np.int64)
        if size:
            self.table = np.load(f"{path}.npy", mmap_mode="r")
            self.lines = np.memmap(f"{path}.jsonl", np.uint8, "r", shape=(size,))

    def __getitem__(self, number: int) -> Ref:
        _, start, end = self.table[number]
        return Ref(*json.loads(self.lines[start:end].tobytes()))


class Corpus(NamedTuple):
    train: Integer[np.ndarray, " N"]
    validation: Integer[np.ndarray, " M"]
    lengths: Int64[np.ndarray, " documents"]  # tokens of every document, its end of text included
    held_out: Int64[np.ndarray, " documents"]  # 1 where it is in validation
    images: dict[str, References]  # of every part
    image: int | None  # the id that stands where an image is
    cached: bool  # the tokens were there from an earlier run


def open_corpus(config: Data, vocab: int | None = None) -> Corpus:
    """The tokens that `config` names, from its cache if it holds them, else tokenized into it.

    A document is in validation if a hash of the seed, its name and its text says so, whatever the others are.  Where
    that leaves validation empty, the one with the smallest hash goes there.  `vocab`, model.vocab, must hold all ids.

    Raises ConfigError: all that is wrong with the tokenizer, the sources or the cache folder, or train or validation
    empty or (of text alone) not longer than `config.sequence`, or images and no id for them.
    """
    files, problems = find_files(config.sources)
    try:
        tokenizer = open_tokenizer(config.tokenizer, vocab)
        if tokenizer.eot is None:
            raise ConfigError([f"training needs a token that ends a document; that of data.tokenizer={config.tokenizer}"
                               " is not named; write its eos_token into tokenizer_config.json beside it"])
    except ConfigError as error:
        raise ConfigError([*error.problems, *problems]) from None
    home = Path(os.path.expanduser(config.cache)) / cache_key(config, tokenizer.identity, files)
    corpus = None if problems else read_cache(home)
    if corpus is None:
        build_cache(config, tokenizer, files, problems, home)
        corpus = read_cache(home)._replace(cached=False)
    problems = [f"data.sequence must be shorter than the text; got {config.sequence} and {len(tokens)} tokens "
                f"({part}); set data.sequence={len(tokens) - 1} or lower, or add text to data.sources"
                for part, tokens in zip(PARTS, corpus[:2], strict=True)
                if not config.images and (part == "train" or config.validation) and len(tokens) <= config.sequence]
    if vocab is not None and any(len(refs.table) for refs in corpus.images.values()) and corpus.image >= vocab:
        problems.append(f"model.vocab must hold the id of images, which the text has; got {vocab} and {corpus.image} "
                        f"(data.tokenizer={config.tokenizer}); set model.vocab={corpus.image + 1} or above")
    refuse(problems)
    return corpus


def cache_key(config: Data, tokenizer: str, files: Sequence[File]) -> str:
    """20 hexadecimal digits for all that decides the tokens; a file counts by its path, size and time of change."""
    facts = [FORMAT, tokenizer, config.validation, config.seed,
             [(f.name, os.path.abspath(f.path), f.size, f.mtime_ns) for f in files]]
    return hashlib.blake2b(json.dumps(facts).encode(), digest_size=10).hexdigest()


def read_cache(home: Path) -> Corpus | None:
    """What `build_cache` left in `home`, memory-mapped; None if nothing is there or a file is damaged or cut short."""
    try:
        meta = json.loads((home / "meta.json").read_text())
        # plain arrays are quicker to index than memory maps, of which none is empty
        tokens = [np.asarray(np.memmap(home / f"{part}.bin", meta["dtype"], "r", shape=(meta[part],)))
                  if meta[part] else np.empty(0, meta["dtype"]) for part in PARTS]
        images = {part: References(home / f"{part}-images", size) for part, size in meta["images"].items()}
        return Corpus(*tokens, *np.load(home / "documents.npy", mmap_mode="r").T, images, meta["image"], cached=True)
    except (OSError, EOFError, ValueError, KeyError):
        return None


def build_cache(config: Data, tokenizer: Tokenizer, files: Sequence[File], problems: list[str], home: Path) -> None:
    """Tokenizes into a folder .building-… beside `home`, then renames it, so that `home` is whole or absent."""
    try:
        home.parent.mkdir(parents=True, exist_ok=True)
        scratch = tempfile.TemporaryDirectory(prefix=".building-", dir=home.parent)
    except OSError as error:
        raise ConfigError([*problems, f"data.cache must name a folder that can be written; {config.cache} is not "
                           f"({error}); set data.cache to another"]) from None
    with scratch as name:
        fresh = Path(name, "first")
        share = math.ceil(config.validation * 2**64)
        meta, lowest = write_tokens(config, tokenizer, documents(files, problems), fresh, share)
        if config.validation and not meta["validation"]:
            fresh = Path(name, "second")
            meta, _ = write_tokens(config, tokenizer, documents(files), fresh, lowest + 1)
        if not meta["documents"]:
            raise ConfigError([f"data.sources must hold text; every document of {', '.join(config.sources)} is empty; "
                               "write text there or name other sources"])
        if not meta["train"]:
            raise ConfigError([f"data.validation must leave a document to train on; got {config.validation}, which "
                               f"takes all {meta['documents']} (one is never split, nor are several that are alike); "
                               "lower it, set it to 0, or split the text into several files or .jsonl lines"])
        publish(fresh, home)


def write_tokens(config: Data, tokenizer: Tokenizer, texts: Iterator[Document], folder: Path,
                 threshold: int) -> tuple[dict[str, Any], int]:
    """Fills `folder`; returns its meta.json and the smallest hash.  Documents of a hash below `threshold` validate."""
    folder.mkdir()
    writers = [Writer(folder, part, tokenizer) for part in PARTS]
    lowest, lengths = 2**64, array("q")
    for group in together(texts):
        encoded = iter(tokenizer.encode_batch([part for one in group for part in one.parts if isinstance(part, str)]))
        for document in group:
            place = split_hash(config.seed, document.name, document.text)
            lowest, held_out = min(lowest, place), place < threshold
            lengths.extend((writers[held_out].write(document, encoded), held_out))
        for writer in writers:
            writer.flush()
    for writer in writers:
        if writer.table:
            np.save(folder / f"{writer.part}-images.npy", np.array(writer.table, np.int64).reshape(-1, 3))
    np.save(folder / "documents.npy", np.array(lengths, np.int64).reshape(-1, 2))
    meta = {"format": FORMAT, "tokenizer": config.tokenizer, "dtype": writer.dtype.str, "documents": len(lengths) // 2,
            "image": tokenizer.image, "images": {writer.part: writer.bytes for writer in writers}}
    meta |= {writer.part: writer.tokens for writer in writers}
    (folder / "meta.json").write_text(json.dumps(meta, indent=1) + "\n")
    return meta, lowest


def together(texts: Iterator[Document]) -> Iterator[list[Document]]:
    """Documents in groups of at least LETTERS letters, and the rest."""
    group, letters = [], 0
    for document in texts:
        group.append(document)
        letters += sum(map(len, document.parts))
        if letters >= LETTERS:
            yield group
            group, letters = [], 0
    yield group


class Writer:
    """Appends documents to `<part>.bin` in a folder, and the lines of their images to `<part>-images.jsonl`."""

    def __init__(self, folder: Path, part: str, tokenizer: Tokenizer):
        self.folder, self.part, self.tokenizer = folder, part, tokenizer
        self.dtype = np.dtype("<u2" if tokenizer.size <= 2**16 else "<u4")
        self.tokens = self.bytes = 0  # of all, and of the lines of images
        self.table = array("q")  # as in References
        self.waiting, self.lines = bytearray(), bytearray()  # not in the files yet

    def write(self, document: Document, encoded: Iterator[np.ndarray]) -> int:
        """Appends a document, whose texts are the next of `encoded`; returns how many tokens it has."""
        before = self.tokens
        for part in (*document.parts, None):
            if part is None:
                tokens = [self.tokenizer.eot]
            elif isinstance(part, str):
                tokens = next(encoded)
            elif self.tokenizer.image is None:
                raise ConfigError([f"images need a token that stands where they are; that of data.tokenizer has no "
                                   f"{IMAGE}, and {document.name} has the image {part.name}; add it to the tokenizer"])
            else:
                tokens, line = [self.tokenizer.image], json.dumps(part).encode() + b"\n"
                self.table.extend((self.tokens, self.bytes, self.bytes + len(line)))
                self.lines += line
                self.bytes += len(line)
            self.waiting += np.asarray(tokens, self.dtype).tobytes()
            self.tokens += len(tokens)
        return self.tokens - before

    def flush(self) -> None:
        """Puts what waits into the files."""
        for name, waiting in ((f"{self.part}.bin", self.waiting), (f"{self.part}-images.jsonl", self.lines)):
            if waiting:
                with open(self.folder / name, "ab") as file:
                    file.write(waiting)
                waiting.clear()


def split_hash(seed: int, name: str, text: str) -> int:
    """A number of 0..2**64-1 that stands for the document under this seed."""
    # surrogatepass: names of files, and escapes in JSON, may hold what UTF-8 cannot
    digest = hashlib.blake2b(f"{seed}\0{name}\0{text}".encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "big")


def publish(fresh: Path, home: Path) -> None:
    """Renames `fresh` to `home`, in place of a damaged one.  If another process was first, its files stand."""
    if home.exists() and read_cache(home) is None:
        with contextlib.suppress(FileNotFoundError):  # another process took it away
            home.rename(fresh.with_name("damaged"))
    try:
        fresh.rename(home)
    except OSError:
        if read_cache(home) is None:
            raise


def document_note(corpus: Corpus, sequence: int) -> str | None:
    """One line that says so if most documents are shorter than a window, else None."""
    if (share := np.mean(corpus.lengths < sequence)) <= 0.5:
        return None
    return (f"{share:.0%} of the {len(corpus.lengths)} documents are shorter than data.sequence={sequence} "
            f"(median {int(np.median(corpus.lengths))} tokens); a window holds several, one after another")


def unigram_loss(train: np.ndarray, validation: np.ndarray, vocab: int) -> float:
    """Nats per validation token of the token frequencies of train (plus one each): what knowing no context costs."""
    seen, met = (sum(np.bincount(tokens[first : first + CHUNK], minlength=vocab)
                     for first in range(0, max(len(tokens), 1), CHUNK)) for tokens in (train, validation))
    return float(-(met @ np.log((seen + 1) / (seen.sum() + vocab))) / met.sum())
