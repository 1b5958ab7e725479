"""Windows of a corpus as batches, in seeded order: of tokens alone, or of whole documents with their images.

A batch is a function of (seed, step) alone; nothing is shuffled in memory, and images alone are read ahead.
"""

import math
from collections.abc import Callable, Iterator
from concurrent.futures import Future

import numpy as np
from jaxtyping import Float32, Int64, Integer, UInt64

from moejax.config import Config
from moejax.data.batch import Batch, Images
from moejax.data.images import Decoders, Pixels, Ref
from moejax.data.loader import PARTS, Corpus

AHEAD = 3  # batches whose images may be waiting
Rows = Int64[np.ndarray, " B"]
GOLDEN = np.uint64(0x9E3779B97F4A7C15)  # 2**64 over the golden ratio, the step of splitmix64


class Samples:
    """Windows of `sequence` tokens at stride `sequence`, in a new seeded order every epoch.

    Sample i is window `order[i % n]` of epoch i // n, of n.  Tokens past the last whole window are not used.
    """

    missing = 0  # images of the last batch that could not be used

    def __init__(self, tokens: Integer[np.ndarray, " N"], sequence: int, seed: int):
        self.tokens, self.sequence, self.seed = tokens, sequence, seed

    def __len__(self) -> int:
        return (len(self.tokens) - 1) // self.sequence

    def rows(self, indices: Rows) -> Batch:
        """The samples of any global indices; each depends on its own index alone."""
        return self.windows(self.order(indices), np.ones(len(indices), np.float32), indices)

    def order(self, indices: Rows) -> Rows:
        """The windows of these samples."""
        epoch, index = np.divmod(indices, len(self))
        return permute(index, len(self), self.seed, epoch)

    def windows(self, window: Rows, weights: Float32[np.ndarray, " B"], indices: Rows) -> Batch:
        """The windows of these numbers, in the order of the text, with a weight for each."""
        tokens = self.tokens[window[:, None] * self.sequence + np.arange(self.sequence + 1)]
        return Batch(tokens[:, :-1].astype(np.int32), tokens[:, 1:].astype(np.int32),
                     np.repeat(weights[:, None], self.sequence, axis=1), (indices % 2**31).astype(np.int32))

    def ahead(self, indices: Rows) -> None:
        """Begins with what takes long of samples that are wanted soon."""

    def close(self) -> None:
        """Ends what `ahead` has begun."""


class ImageSamples(Samples):
    """Windows of whole documents with their images, in a new seeded order every epoch.

    Documents in the order of the text share a window while their tokens and images fit; the rest of it is padding.  A
    document that is longer than a window is cut into pieces that count as documents; of one with more images than a
    window holds, the first are there.  A token whose images are not all there, or whose next is an image or of another
    document, has weight 0.  `say` is told of every file that cannot be used, once.
    """

    def __init__(self, config: Config, corpus: Corpus, part: str, say: Callable[[str], None]):
        encoder, looks = config.model.encoder(), config.model.looks()
        self.tokens, self.sequence, self.seed = getattr(corpus, part), config.data.sequence, config.data.seed
        self.image, self.most, self.last, self.say = corpus.image, config.data.images, looks.kind == "last", say
        self.how = encoder.size, encoder.fit, looks.frames, config.data.rate
        self.refs = corpus.images[part]
        self.places = np.asarray(self.refs.table[:, 0])
        self.starts = cut(corpus.lengths[corpus.held_out == PARTS.index(part)], self.sequence)
        self.homes = np.searchsorted(self.starts, self.places, "right") - 1  # the piece that each image is in
        self.before = np.searchsorted(self.places, self.starts)  # images before each piece
        self.kept = np.arange(len(self.places)) - self.before[self.homes] < self.most  # which images a window holds
        self.firsts = pack(np.diff(self.starts), np.minimum(np.diff(self.before), self.most), self.sequence, self.most)
        self.decoders, self.told = Decoders(), set()
        self.waiting: dict[Ref, Future] = {}

    def __len__(self) -> int:
        return len(self.firsts) - 1

    def windows(self, window: Rows, weights: Float32[np.ndarray, " B"], indices: Rows) -> Batch:
        """As those of text, with images; `missing` counts those that these windows hold and that cannot be used."""
        start, end = (self.starts[self.firsts[window + more]][:, None] for more in (0, 1))
        at = start + np.arange(self.sequence + 1)
        piece = np.where(at < end, np.searchsorted(self.starts, at, "right") - 1, -1)
        tokens = np.where(at < end, self.tokens[np.minimum(at, len(self.tokens) - 1)].astype(np.int32), 0)
        counts = (piece[:, :-1] == piece[:, 1:]) & (piece[:, 1:] >= 0) & (tokens[:, 1:] != self.image)
        found, self.missing = self.decoded(window), 0
        size, _, frames, _ = self.how
        shape = len(window), self.most
        images = Images(np.zeros((*shape, frames, size, size, 3), np.uint8), np.zeros(shape, np.int32),
                        np.zeros((len(window), self.sequence, self.most), bool))
        for row, numbers in enumerate(map(self.inside, window.tolist())):
            there = np.zeros(len(numbers), bool)
            looks = (piece[row, :-1, None] == self.homes[numbers]) & (at[row, :-1, None] >= self.places[numbers])
            if self.last:
                looks[:, :-1] &= ~looks[:, 1:]  # those before the last
            for slot, column in enumerate(np.flatnonzero(self.kept[numbers])):
                pixels = found[int(numbers[column])]
                if isinstance(pixels, str):
                    self.missing += int(weights[row] > 0)
                    continue
                there[column], images.frames[row, slot] = True, len(pixels)
                images.pixels[row, slot, : len(pixels)], images.looks[row, :, slot] = pixels, looks[:, column]
            counts[row] &= ~looks[:, ~there].any(axis=1)
        return Batch(tokens[:, :-1], tokens[:, 1:], counts * weights[:, None], (indices % 2**31).astype(np.int32),
                     images)

    def inside(self, window: int) -> Int64[np.ndarray, " K"]:
        """The numbers of all images of a window."""
        return np.arange(*self.before[self.firsts[window : window + 2]])

    def decoded(self, window: Rows) -> dict[int, Pixels | str]:
        """Of the images of windows by number; the reason where there is none, which is said once."""
        refs = self.begin(window)
        found = {ref: self.waiting[ref].result() for ref in refs.values()}
        for ref, pixels in found.items():
            del self.waiting[ref]
            if isinstance(pixels, str) and (ref.path, ref.offset) not in self.told:
                self.told.add((ref.path, ref.offset))
                where = ref.path if ref.size < 0 else f"{ref.name} in {ref.path}"
                self.say(f"an image is left out wherever it comes: {where} cannot be used: {pixels}")
        return {number: found[ref] for number, ref in refs.items()}

    def begin(self, window: Rows) -> dict[int, Ref]:
        """Has the images of windows decoded; returns them by number."""
        refs = {number: self.refs[number] for numbers in map(self.inside, window.tolist())
                for number in numbers[self.kept[numbers]].tolist()}
        for ref in refs.values():
            if ref not in self.waiting:
                self.waiting[ref] = self.decoders.submit(ref, *self.how)
        return refs

    def ahead(self, indices: Rows) -> None:
        """Begins to decode the images of samples; those of the oldest calls are given up if nobody takes them."""
        self.begin(self.order(indices))
        while len(self.waiting) > AHEAD * len(indices) * self.most:
            self.waiting.pop(next(iter(self.waiting))).cancel()

    def close(self) -> None:
        self.decoders.close()
        self.waiting.clear()


def cut(lengths: Int64[np.ndarray, " documents"], sequence: int) -> Int64[np.ndarray, " pieces_and_1"]:
    """Where the pieces of documents start, of `sequence` tokens but for the last of each; and the end of all."""
    counts = -(-lengths // sequence)
    nth = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
    return np.append(np.repeat(np.cumsum(lengths) - lengths, counts) + nth * sequence, lengths.sum())


def pack(tokens: Int64[np.ndarray, " pieces"], images: Int64[np.ndarray, " pieces"], most_tokens: int,
         most_images: int) -> Int64[np.ndarray, " windows_and_1"]:
    """The first piece of each window, and the number of pieces: each takes pieces while they fit."""
    after = [np.searchsorted(total := np.append(0, np.cumsum(held)), total[:-1] + most, "right") - 1
             for held, most in ((tokens, most_tokens), (images, most_images))]
    after, firsts = np.minimum(*after).tolist(), [0]
    while firsts[-1] < len(after):
        firsts.append(after[firsts[-1]])
    return np.array(firsts)


def make_samples(config: Config, corpus: Corpus, part: str, say: Callable[[str], None] = print) -> Samples:
    """Those of "train" or "validation", to be closed at the end; `say` is told of what cannot be used."""
    if config.data.images:
        return ImageSamples(config, corpus, part, say)
    return Samples(getattr(corpus, part), config.data.sequence, config.data.seed)


def permute(index: Rows, size: int, seed: int, epoch: Rows) -> Rows:
    """Where each index of 0..size-1 goes in the order of its epoch: a bijection for every (seed, epoch).

    An alternating Feistel cipher on the smallest near-square grid that holds `size` cells; what lands outside, which is
    rare, is enciphered again until it lands inside (Black and Rogaway 2002, FE1 and the cycle-walking cipher).
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
    """At most `count` batches of the first windows of the text, each once; rows of weight 0 fill up the last batch."""
    for first in range(0, min(count * batch_size, len(samples)), batch_size):
        index = first + np.arange(batch_size)
        yield samples.windows(np.minimum(index, len(samples) - 1), (index < len(samples)).astype(np.float32), index)
