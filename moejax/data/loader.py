"""From the config to batches: tokenize once into memory-mapped shards, then read windows of them in seeded order.

Top of the data package.  `open_corpus` gives the tokens (documents one after another, each followed by the
tokenizer's end of text), `Samples` the windows of them, `train_batch` and `validation_batches` the batches.
A batch is a function of (seed, step) alone; nothing is shuffled in memory and nothing is kept between calls.
"""

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
from jaxtyping import Float32, Int64, Integer, UInt64

from moejax.config import ConfigError, Data
from moejax.data.batch import Batch
from moejax.data.sources import File, documents, find_files
from moejax.data.tokenizer import ByteTokenizer, FileTokenizer, open_tokenizer

FORMAT = 1  # of the cache; raise it when what is written for the same config changes
SHARD = 2**27  # tokens in one file
CHUNK = 2**20  # tokens counted at a time
LETTERS = 2**20  # of documents that are tokenized together
PARTS = ("train", "validation")
GOLDEN = np.uint64(0x9E3779B97F4A7C15)  # 2**64 over the golden ratio, the step of splitmix64


class Stream:
    """Shards as one 1-D array of tokens, read only.  A slice or an index may cross the borders of the shards."""

    def __init__(self, shards: Sequence[np.ndarray], dtype: Any):
        self.shards, self.dtype = list(shards), np.dtype(dtype)
        self.starts = np.cumsum([0] + [len(shard) for shard in self.shards])

    def __len__(self) -> int:
        return int(self.starts[-1])

    def __getitem__(self, key: slice | Integer[np.ndarray, "*shape"]) -> Integer[np.ndarray, "*shape"]:
        """The tokens at an array of positions, in its shape, or those of a slice without a step.

        Raises IndexError at a position that is negative or past the end.
        """
        if isinstance(key, slice):
            start, stop, step = key.indices(len(self))
            assert step == 1, "a stream is sliced without a step"
            pieces = [shard[max(start - first, 0) : max(stop - first, 0)]
                      for first, shard in zip(self.starts, self.shards, strict=False)]
            return np.concatenate([np.empty(0, self.dtype), *pieces])
        if key.size and not 0 <= key.min() <= key.max() < len(self):
            raise IndexError(f"positions lie in 0..{len(self) - 1}; got {key.min()}..{key.max()}")
        out, home = np.empty(key.shape, self.dtype), np.searchsorted(self.starts, key, "right") - 1
        for shard in np.unique(home):
            here = home == shard
            out[here] = self.shards[shard][key[here] - self.starts[shard]]
        return out


class Corpus(NamedTuple):
    train: Stream
    validation: Stream
    lengths: Int64[np.ndarray, " documents"]  # tokens of every document, its end of text included
    cached: bool  # the tokens were there from an earlier run


def open_corpus(config: Data, vocab: int | None = None, shard: int = SHARD) -> Corpus:
    """The tokens that `config` names, from its cache if it holds them, else tokenized into it.

    A document is in validation if a hash of the seed, its name and its text says so, whatever the other
    documents are.  Where that leaves validation empty, the document with the smallest hash goes there.

    Args:
        vocab: model.vocab, which must hold the tokenizer's ids.
        shard: tokens in a file of the cache.
    Raises:
        ConfigError: all that is wrong with the tokenizer, the sources or the cache folder, or train or validation empty
            or not longer than `config.sequence`.
    """
    files, problems = find_files(config.sources)
    tokenizer = training_tokenizer(config, vocab, problems)
    home = Path(os.path.expanduser(config.cache)) / cache_key(config, tokenizer.identity, files)
    corpus = None if problems else read_cache(home)
    if corpus is None:
        build_cache(config, tokenizer, files, problems, home, shard)
        corpus = read_cache(home)._replace(cached=False)
    problems = [problem for part in PARTS if part == "train" or config.validation
                for problem in too_short(part, getattr(corpus, part), config.sequence)]
    if problems:
        raise ConfigError(problems)
    return corpus


def training_tokenizer(config: Data, vocab: int | None, problems: Sequence[str]) -> ByteTokenizer | FileTokenizer:
    """The tokenizer of `config`, which can end a document.  Raises ConfigError with `problems` and its own."""
    try:
        tokenizer = open_tokenizer(config.tokenizer, vocab)
    except ConfigError as error:
        raise ConfigError([*error.problems, *problems]) from None
    if tokenizer.eot is None:
        raise ConfigError([f"training needs a token that ends a document; that of data.tokenizer={config.tokenizer} is "
                           "not named; write its eos_token into tokenizer_config.json beside it", *problems])
    return tokenizer


def cache_key(config: Data, tokenizer: str, files: Sequence[File]) -> str:
    """20 hexadecimal digits for all that decides the tokens; a file counts by its path, size and time of change.

    Args:
        tokenizer: its identity.
    """
    listed = [(f.name, os.path.abspath(f.path), f.size, f.mtime_ns, f.lenient) for f in files]
    facts = [FORMAT, tokenizer, config.validation, config.seed, listed]
    return hashlib.blake2b(json.dumps(facts).encode(), digest_size=10).hexdigest()


def read_cache(home: Path) -> Corpus | None:
    """What `build_cache` left in `home`, memory-mapped; None if nothing is there or a file is damaged or cut short."""
    try:
        meta = json.loads((home / "meta.json").read_text())
        dtype, streams = np.dtype(meta["dtype"]), []
        for part in PARTS:
            maps = [np.memmap(shard_path(home, part, number), dtype, "r", shape=(tokens,))
                    for number, tokens in enumerate(meta[part])]
            streams.append(Stream([np.asarray(m) for m in maps], dtype))  # plain arrays are quicker to index
        return Corpus(*streams, np.load(home / "documents.npy", mmap_mode="r"), cached=True)
    except (OSError, EOFError, ValueError, KeyError):
        return None


def shard_path(folder: Path, part: str, number: int) -> Path:
    return folder / f"{part}-{number:05d}.bin"


def build_cache(config: Data, tokenizer: ByteTokenizer | FileTokenizer, files: Sequence[File], problems: list[str],
                home: Path, shard: int) -> None:
    """Tokenizes into a temporary folder beside `home`, then renames it, so that `home` is whole or absent.

    A run that is killed leaves at most a folder named .building-… that nobody reads.
    """
    try:
        home.parent.mkdir(parents=True, exist_ok=True)
        scratch = tempfile.TemporaryDirectory(prefix=".building-", dir=home.parent)
    except OSError as error:
        problem = (f"data.cache must name a folder that can be written; {config.cache} is not ({error}); "
                   "set data.cache to another")
        raise ConfigError([*problems, problem]) from None
    with scratch as name:
        fresh = Path(name, "first")
        share = math.ceil(config.validation * 2**64)
        meta, lowest, highest = write_tokens(config, tokenizer, documents(files, problems), fresh, share, shard)
        if config.validation and not meta["validation"]:
            fresh = Path(name, "second")
            meta, *_ = write_tokens(config, tokenizer, documents(files), fresh, lowest + 1, shard)
        check_split(config, meta, lowest == highest)
        publish(fresh, home)


def write_tokens(config: Data, tokenizer: ByteTokenizer | FileTokenizer, texts: Iterator[tuple[str, str]], folder: Path,
                 threshold: int, shard: int) -> tuple[dict[str, Any], int, int]:
    """Fills `folder` and returns its meta.json and the smallest and the largest hash of a document.

    Args:
        texts: (name, text) of every document.
        threshold: a document is in validation if its hash, of 0..2**64-1, is below.
    """
    dtype = np.dtype("<u2" if tokenizer.size <= 2**16 else "<u4")
    folder.mkdir()
    train, validation = writers = [ShardWriter(folder, part, dtype, shard) for part in PARTS]
    lowest, highest, lengths = 2**64, -1, array("q")
    for group in together(texts):
        for (name, text), ids in zip(group, tokenizer.encode_batch([text for _, text in group]), strict=True):
            place = split_hash(config.seed, name, text)
            lowest, highest = min(lowest, place), max(highest, place)
            tokens = np.append(ids, dtype.type(tokenizer.eot))
            (validation if place < threshold else train).write(tokens)
            lengths.append(len(tokens))
    for writer in writers:
        writer.flush()
    np.save(folder / "documents.npy", np.array(lengths, np.int64))
    meta = {"format": FORMAT, "tokenizer": config.tokenizer, "dtype": dtype.str, "documents": len(lengths)}
    meta |= {writer.part: writer.lengths for writer in writers}
    (folder / "meta.json").write_text(json.dumps(meta, indent=1) + "\n")
    return meta, lowest, highest


def together(texts: Iterator[tuple[str, str]]) -> Iterator[list[tuple[str, str]]]:
    """(name, text) in groups of at least LETTERS letters, and the rest."""
    group, letters = [], 0
    for name, text in texts:
        group.append((name, text))
        letters += len(text)
        if letters >= LETTERS:
            yield group
            group, letters = [], 0
    yield group


class ShardWriter:
    """Appends tokens to `<part>-NNNNN.bin` in a folder; every file but the last holds `shard` tokens."""

    def __init__(self, folder: Path, part: str, dtype: np.dtype, shard: int):
        self.folder, self.part, self.dtype, self.shard = folder, part, dtype, shard
        self.lengths: list[int] = []  # tokens in every file
        self.waiting: list[np.ndarray] = []
        self.waiting_tokens = 0

    def write(self, tokens: Integer[np.ndarray, " T"]) -> None:
        self.waiting.append(tokens.astype(self.dtype, copy=False))
        self.waiting_tokens += len(tokens)
        if self.waiting_tokens >= CHUNK:
            self.flush()

    def flush(self) -> None:
        """Puts what waits into the files; to be called after the last `write`."""
        tokens = np.concatenate([np.empty(0, self.dtype), *self.waiting])
        self.waiting, self.waiting_tokens = [], 0
        while len(tokens):
            if not self.lengths or self.lengths[-1] == self.shard:
                self.lengths.append(0)
            piece = tokens[: self.shard - self.lengths[-1]]
            with open(shard_path(self.folder, self.part, len(self.lengths) - 1), "ab") as file:
                file.write(piece.tobytes())
            self.lengths[-1] += len(piece)
            tokens = tokens[len(piece) :]


def split_hash(seed: int, name: str, text: str) -> int:
    """A number of 0..2**64-1 that stands for the document under this seed."""
    # surrogatepass: names of files, and escapes in JSON, may hold what UTF-8 cannot
    digest = hashlib.blake2b(f"{seed}\0{name}\0{text}".encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "big")


def check_split(config: Data, meta: dict[str, Any], alike: bool) -> None:
    """Raises ConfigError if no document is left to train on, or all are `alike` in name and text and so in one part."""
    count = meta["documents"]
    if not count:
        raise ConfigError([(f"data.sources must hold text; every document of {', '.join(config.sources)} is empty; "
                            "write text there or name other sources")])
    if config.validation and alike:
        raise ConfigError([(
            "validation needs two different documents, as one is never split between train and validation; "
            f"got data.validation={config.validation} and {count} document{'s, all alike' if count > 1 else ''}; "
            "split the text into several files or .jsonl lines, or set data.validation=0")])
    if not meta["train"]:
        raise ConfigError([(f"data.validation must leave a document to train on; got {config.validation}, which "
                            f"takes all {count}; set data.validation={config.validation / 2:g} or lower")])


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


def too_short(part: str, tokens: Stream | np.ndarray, sequence: int) -> list[str]:
    """The problem of a text that does not hold one window of `sequence` tokens and the token after each."""
    if len(tokens) > sequence:
        return []
    shorter = f"set data.sequence={len(tokens) - 1} or lower, or " if len(tokens) > 1 else ""
    share = ", or raise data.validation" if part == "validation" else ""
    return [(f"data.sequence must be shorter than the text; got {sequence} and {len(tokens)} tokens ({part}); "
             f"{shorter}add text to data.sources{share}")]


class Samples:
    """Windows of `sequence` tokens at stride `sequence`, in a new seeded order every epoch.

    Sample i is window number `order[i % n]` of epoch i // n, of n windows.  Tokens past the last whole
    window are not used.  `tokens` is a Stream or a 1-D array.

    Raises:
        ConfigError: the text is not longer than `sequence`.
    """

    def __init__(self, tokens: Stream | Integer[np.ndarray, " N"], sequence: int, seed: int):
        if problems := too_short("the whole text", tokens, sequence):
            raise ConfigError(problems)
        self.tokens, self.sequence, self.seed = tokens, sequence, seed

    def __len__(self) -> int:
        return (len(self.tokens) - 1) // self.sequence

    def rows(self, indices: Integer[np.ndarray, " B"]) -> Batch:
        """The samples of any global indices; each depends on its own index alone."""
        indices = indices.astype(np.int64)
        epoch, index = np.divmod(indices, len(self))
        window = permute(index, len(self), self.seed, epoch)
        return self.windows(window, np.ones(len(window), np.float32), indices)

    def windows(self, window: Int64[np.ndarray, " B"], weights: Float32[np.ndarray, " B"],
                indices: Int64[np.ndarray, " B"]) -> Batch:
        """The windows of these numbers, in the order of the text, with a weight for each."""
        tokens = self.tokens[window[:, None] * self.sequence + np.arange(self.sequence + 1)]
        return Batch(tokens[:, :-1].astype(np.int32), tokens[:, 1:].astype(np.int32),
                     np.repeat(weights[:, None], self.sequence, axis=1), (indices % 2**31).astype(np.int32))


def permute(index: Int64[np.ndarray, " B"], size: int, seed: int,
            epoch: Int64[np.ndarray, " B"]) -> Int64[np.ndarray, " B"]:
    """Where each index of 0..size-1 goes in the order of its epoch: a bijection for every (seed, epoch).

    An alternating Feistel cipher on the smallest near-square grid that holds `size` cells; what lands outside
    is enciphered again until it lands inside, which keeps it a bijection (Black and Rogaway 2002, FE1 and the
    cycle-walking cipher).  The grid has fewer than sqrt(size) cells to spare, so that is rare.
    """
    height = math.isqrt(size - 1) + 1
    height, width = np.uint64(height), np.uint64(-(-size // height))
    key = mix(mix(np.full(1, seed % 2**64, np.uint64) + GOLDEN) + epoch.astype(np.uint64))

    def encipher(cell: np.ndarray, key: np.ndarray) -> np.ndarray:
        row, column = np.divmod(cell, width)
        for _ in range(6):  # with 3 or 4, orders of a handful of windows are visibly not equally likely
            # the upper 32 bits alone are added: a sum that wrapped at 2**64 could send two cells to one
            row = (row + (mix(column + (key := key + GOLDEN)) >> np.uint64(32))) % height
            column = (column + (mix(row + (key := key + GOLDEN)) >> np.uint64(32))) % width
        return row * width + column

    cell = encipher(index.astype(np.uint64), key)
    while (outside := cell >= size).any():
        cell[outside] = encipher(cell[outside], key[outside])
    return cell.astype(np.int64)


def mix(x: UInt64[np.ndarray, " B"]) -> UInt64[np.ndarray, " B"]:
    """A hash of x: the finaliser of splitmix64 (Steele, Lea and Flood 2014); arrays wrap modulo 2**64."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def train_batch(samples: Samples, batch_size: int, step: int) -> Batch:
    """The batch of a step, whatever was read before.  A host that needs part of it asks `samples.rows` for that."""
    return samples.rows(step * batch_size + np.arange(batch_size))


def validation_batches(samples: Samples, batch_size: int, count: int) -> Iterator[Batch]:
    """At most `count` batches of the first windows in the order of the text, each window once.

    The last batch is filled up to `batch_size` with rows of weight 0.
    """
    for first in range(0, min(count * batch_size, len(samples)), batch_size):
        index = first + np.arange(batch_size)
        real = index < len(samples)
        yield samples.windows(np.minimum(index, len(samples) - 1), real.astype(np.float32), index)


def document_note(corpus: Corpus, sequence: int) -> str | None:
    """One line that says so if most documents are shorter than a window, else None."""
    share = float(np.mean(corpus.lengths < sequence))
    if share <= 0.5:
        return None
    return (f"{share:.0%} of the {len(corpus.lengths)} documents are shorter than data.sequence={sequence} "
            f"(median {int(np.median(corpus.lengths))} tokens); a window holds several, one after another")


def unigram_loss(train: Stream | Integer[np.ndarray, " N"], validation: Stream | Integer[np.ndarray, " M"],
                 vocab: int) -> float:
    """Nats per validation token of the token frequencies of train (plus one each): what knowing no context costs."""
    seen, met = token_counts(train, vocab), token_counts(validation, vocab)
    return float(-(met @ np.log((seen + 1) / (seen.sum() + vocab))) / met.sum())


def token_counts(tokens: Stream | Integer[np.ndarray, " N"], vocab: int) -> Int64[np.ndarray, " vocab"]:
    counts = np.zeros(vocab, np.int64)
    for first in range(0, len(tokens), CHUNK):
        counts += np.bincount(tokens[first : first + CHUNK], minlength=vocab)
    return counts
