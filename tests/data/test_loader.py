"""Tokens, cache and batches: hand-computed cases first, then what must hold for any seed, size and order of calls."""

import hashlib
import math
import os
import shutil
import signal
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from moejax.config import ConfigError, Data
from moejax.data import loader
from moejax.data.loader import document_note, open_corpus, unigram_loss
from moejax.data.samples import Samples, permute, train_batch, validation_batches


def write(folder: Path, texts: dict[str, str]) -> Path:
    folder.mkdir(exist_ok=True)
    for name, text in texts.items():
        (folder / name).write_text(text)
    return folder


@pytest.fixture
def config(tmp_path) -> Data:
    """40 documents of 10 to 49 letters; with this seed and share, some of them are in validation."""
    texts = {f"{n:02d}.txt": chr(97 + n % 26) * (10 + n) for n in range(40)}
    return data(tmp_path, write(tmp_path / "text", texts), validation=0.2)


def data(tmp_path: Path, *sources: Path, validation: float = 0.0, sequence: int = 2, seed: int = 0) -> Data:
    return Data(sources=tuple(map(str, sources)), cache=str(tmp_path / "cache"), validation=validation,
                sequence=sequence, seed=seed)


def problems_of(config: Data) -> list[str]:
    with pytest.raises(ConfigError) as error:
        open_corpus(config)
    return error.value.problems


def texts_of(stream: np.ndarray) -> list[str]:
    """The documents of ASCII text in a stream."""
    return "".join("\n" if token == 256 else chr(token) for token in stream[:].tolist()).split("\n")[:-1]


def same(one, other) -> bool:
    """But for the images of batches, of which text has none."""
    return all(np.array_equal(a, b) and a.dtype == b.dtype for a, b in zip(one[:4], other[:4], strict=True))


def test_tokens_windows_and_batches_by_hand(tmp_path):
    corpus = open_corpus(data(tmp_path, write(tmp_path / "text", {"a.txt": "ab", "b.txt": "cde"})))
    # "ab" <end> "cde" <end>
    assert corpus.train[:].tolist() == [97, 98, 256, 99, 100, 101, 256] and corpus.train[:].dtype == np.uint16
    assert len(corpus.validation) == 0 and corpus.lengths.tolist() == [3, 4] and not corpus.cached
    samples = Samples(corpus.train, 2, seed=0)
    assert len(samples) == 3  # windows start at 0, 2 and 4; the last target is token 6
    first, second = validation_batches(samples, 2, 5)
    assert first.tokens.tolist() == [[97, 98], [256, 99]] and first.targets.tolist() == [[98, 256], [99, 100]]
    assert first.rows.tolist() == [0, 1] and first.weights.tolist() == [[1, 1], [1, 1]]
    assert second.tokens[0].tolist() == [100, 101] and second.targets[0].tolist() == [101, 256]
    assert second.weights.tolist() == [[1, 1], [0, 0]]  # there is no fourth window
    for batch in (first, second, train_batch(samples, 2, 0)):
        assert [(part.dtype.name, part.shape) for part in batch[:4]] == [
            ("int32", (2, 2)), ("int32", (2, 2)), ("float32", (2, 2)), ("int32", (2,))]


def slow_permute(cell: int, size: int, seed: int, epoch: int) -> int:
    """The cipher on Python's unbounded integers, one cell at a time."""
    mask, golden = 2**64 - 1, 0x9E3779B97F4A7C15

    def mix(x: int) -> int:
        x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 & mask
        x = (x ^ x >> 27) * 0x94D049BB133111EB & mask
        return x ^ x >> 31

    height = next(h for h in range(1, size + 1) if h * h >= size)
    width = next(w for w in range(1, size + 1) if height * w >= size)
    while True:
        key = mix((mix((seed + golden) & mask) + epoch) & mask)
        row, column = divmod(cell, width)
        for _ in range(6):
            row = (row + (mix((column + (key := key + golden)) & mask) >> 32)) % height
            column = (column + (mix((row + (key := key + golden)) & mask) >> 32)) % width
        cell = row * width + column
        if cell < size:
            return cell


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 13, 97, 1000])
def test_permute_is_a_bijection_and_equals_its_slow_twin(size):
    index = np.arange(size)
    for seed, epoch in [(0, 0), (0, 1), (7, 0), (2**63 + 5, 10**12)]:
        order = permute(index, size, seed, np.full(size, epoch))
        assert sorted(order.tolist()) == index.tolist()
        assert order.tolist() == [slow_permute(cell, size, seed, epoch) for cell in range(size)]


def test_orders_are_equally_likely():
    epochs = np.arange(24_000)
    orders = np.stack([permute(np.full(24_000, i), 4, 3, epochs) for i in range(4)], axis=1)
    counts = np.unique(orders, axis=0, return_counts=True)[1]
    assert len(counts) == 24  # 4!
    assert abs(counts - 1000).max() < 160  # 5 standard deviations of a count of 1000 in 24,000


def test_no_order_of_a_large_epoch_is_left_from_the_text():
    order = permute(np.arange(10_000), 10_000, 0, np.zeros(10_000, np.int64))
    assert abs(np.corrcoef(order, np.arange(10_000))[0, 1]) < 0.05  # 5 standard deviations
    assert abs(np.corrcoef(order[1:], order[:-1])[0, 1]) < 0.05
    assert (np.diff(order) == 1).sum() < 10  # 1 is expected


@pytest.mark.parametrize("windows", [1, 2, 7, 30])
def test_every_epoch_visits_every_window_once_in_an_order_of_its_own(windows):
    samples = Samples(np.arange(3 * windows + 1), 3, seed=5)
    starts = samples.rows(np.arange(4 * windows)).tokens[:, 0].reshape(4, windows)
    assert (np.sort(starts) == 3 * np.arange(windows)).all()
    assert windows < 7 or len(np.unique(starts, axis=0)) == 4
    other = Samples(np.arange(3 * windows + 1), 3, seed=6).rows(np.arange(windows)).tokens[:, 0]
    assert windows < 7 or other.tolist() != starts[0].tolist()


def test_a_batch_depends_on_seed_and_step_alone():
    tokens = np.arange(100)
    samples = Samples(tokens, 4, seed=1)  # 24 windows: batches of 7 cross the epochs
    forward = [train_batch(samples, 7, step) for step in range(20)]
    backward = [train_batch(Samples(tokens, 4, seed=1), 7, step) for step in reversed(range(20))]
    assert all(same(one, other) for one, other in zip(forward, reversed(backward), strict=True))
    everything = samples.rows(np.arange(140))
    for step, batch in enumerate(forward):
        assert same(batch, [part[7 * step : 7 * step + 7] for part in everything[:4]])
        assert (batch.targets == batch.tokens + 1).all() and (batch.weights == 1).all()
        parts = [samples.rows(7 * step + np.arange(low, high)) for low, high in [(0, 3), (3, 7)]]  # two hosts
        assert same(batch, [np.concatenate(pair) for pair in zip(*(part[:4] for part in parts), strict=True)])


def test_rows_name_the_sample():
    samples = Samples(np.arange(100), 4, seed=1)
    assert train_batch(samples, 3, 5).rows.tolist() == [15, 16, 17]
    assert samples.rows(np.array([2**31 - 1, 2**31 + 5])).rows.tolist() == [2**31 - 1, 5]


@pytest.mark.parametrize(("size", "count", "batches", "counted"), [(4, 2, 2, 8), (4, 3, 3, 10), (4, 9, 3, 10),
                                                                  (5, 9, 2, 10), (16, 1, 1, 10), (1, 3, 3, 3)])
def test_validation_counts_every_window_at_most_once(size, count, batches, counted):
    samples = Samples(np.arange(31), 3, seed=0)  # 10 windows
    given = list(validation_batches(samples, size, count))
    assert [batch.tokens.shape for batch in given] == [(size, 3)] * batches
    tokens, weights = (np.concatenate([getattr(batch, part) for batch in given]) for part in ("tokens", "weights"))
    assert tokens[weights > 0].tolist() == list(range(3 * counted)) and weights.sum() == 3 * counted
    assert np.concatenate([batch.rows for batch in given]).tolist() == list(range(size * batches))


def test_the_cache_is_memory_mapped_reused_and_byte_equal(config, tmp_path):
    fresh = open_corpus(config)
    (home,) = (tmp_path / "cache").iterdir()
    files = {path.name: path.read_bytes() for path in home.iterdir()}
    again = open_corpus(config)
    assert (fresh.cached, again.cached) == (False, True)
    assert {path.name: path.read_bytes() for path in home.iterdir()} == files
    assert sorted(files) == ["documents.npy", "meta.json", "train.bin", "validation.bin"]
    for one, other in zip(fresh[:3], again[:3], strict=True):
        assert np.array_equal(one[:], other[:])
    assert all(isinstance(part.base, np.memmap) and not part.flags.writeable for part in again[:2])
    assert fresh.lengths.tolist() == [11 + n for n in range(40)]
    assert sorted(texts_of(fresh.train) + texts_of(fresh.validation)) == sorted(
        chr(97 + n % 26) * (10 + n) for n in range(40))


def test_what_decides_the_tokens_decides_the_cache(config, tmp_path):
    open_corpus(config)
    path = tmp_path / "text" / "00.txt"
    for change, cached in [({}, True), ({"sequence": 3, "batch": 1}, True), ({"seed": 1}, False),
                           ({"validation": 0.3}, False), ({"sources": (str(tmp_path / "text" / "*.txt"),)}, True)]:
        assert open_corpus(Data(**{**vars(config), **change})).cached == cached
    before = path.stat()
    path.write_text("A" * 10)  # as long as before
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns + 1))
    changed = open_corpus(config)
    assert not changed.cached and "A" * 10 in texts_of(changed.train) + texts_of(changed.validation)
    write(tmp_path / "text", {"new.txt": "new"})
    assert not open_corpus(config).cached and open_corpus(config).cached


def in_validation(seed: int, name: str, text: str, share: float) -> bool:
    digest = hashlib.blake2b(f"{seed}\0{name}\0{text}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") / 2**64 < share


def test_the_split_of_a_document_does_not_depend_on_the_others(config, tmp_path):
    corpus = open_corpus(config)
    letters = {f"{n:02d}.txt": chr(97 + n % 26) * (10 + n) for n in range(40)}
    chosen = [text for name, text in letters.items() if in_validation(0, name, text, 0.2)]
    assert texts_of(corpus.validation) == chosen and 2 <= len(chosen) <= 14  # 8 expected, 2.5 standard deviations
    write(tmp_path / "text", {f"0{n:02d}.txt": str(n) * 20 for n in range(40)})
    more = open_corpus(config)
    assert [text for text in texts_of(more.validation) if text.isalpha()] == chosen
    other = open_corpus(Data(**{**vars(config), "seed": 1}))
    assert [text for text in texts_of(other.validation) if text.isalpha()] != chosen


def test_a_moved_folder_and_inserted_lines_keep_the_split(tmp_path):
    rows = [f'{{"text": "document {n}"}}' for n in range(50)]
    write(tmp_path / "one", {"a.jsonl": "\n".join(rows)})
    write(tmp_path / "two", {"a.jsonl": "\n".join(['{"text": "inserted"}', *rows])})
    one, two = (open_corpus(data(tmp_path, tmp_path / folder, validation=0.3)) for folder in ("one", "two"))
    assert texts_of(one.validation) == [text for text in texts_of(two.validation) if text != "inserted"] != []


def test_validation_gets_the_document_with_the_smallest_hash_if_it_would_be_empty(tmp_path):
    texts = {f"{n}.txt": f"document {n}" for n in range(3)}
    hashes = {name: loader.split_hash(0, name, text) for name, text in texts.items()}
    corpus = open_corpus(data(tmp_path, write(tmp_path / "text", texts), validation=1e-9))
    assert texts_of(corpus.validation) == [texts[min(hashes, key=hashes.get)]]
    assert sorted(texts_of(corpus.train) + texts_of(corpus.validation)) == sorted(texts.values())
    assert corpus.lengths.sum() == len(corpus.train) + len(corpus.validation)


def test_too_few_documents_for_the_split(tmp_path):
    one = write(tmp_path / "one", {"a.txt": "some text"})
    rule = "data.validation must leave a document to train on; got "
    repair = (" (one is never split, nor are several that are alike); lower it, set it to 0, or split the text into "
              "several files or .jsonl lines")
    assert problems_of(data(tmp_path, one, validation=0.02)) == [f"{rule}0.02, which takes all 1{repair}"]
    assert len(open_corpus(data(tmp_path, one)).validation) == 0
    alike = write(tmp_path / "alike", {"a.jsonl": '{"text": "same"}\n' * 3})
    assert problems_of(data(tmp_path, alike, validation=0.02)) == [
        f"{rule}0.02, which takes all 3{repair}"]
    two = write(tmp_path / "two", {"a.txt": "some text", "b.txt": "other text"})
    assert problems_of(data(tmp_path, two, validation=1.0)) == [f"{rule}1.0, which takes all 2{repair}"]
    void = write(tmp_path / "void", {"a.jsonl": '{"text": ""}\n'})
    (problem,) = problems_of(data(tmp_path, void))
    assert problem == (f"data.sources must hold text; every document of {void} is empty; "
                       "write text there or name other sources")
    assert not [path for path in (tmp_path / "cache").iterdir() if path.name.startswith(".")]


def test_a_sequence_as_long_as_the_text_is_refused_for_both_parts_at_once(tmp_path):
    text = write(tmp_path / "text", {"a.txt": "abc", "b.txt": "defgh"})  # 4 and 6 tokens
    longer = "data.sequence must be shorter than the text; got 6 and "
    parts = {len(part) for part in open_corpus(data(tmp_path, text, validation=1e-9, sequence=3))[:2]}
    assert parts == {4, 6}
    train, validation = problems_of(data(tmp_path, text, validation=1e-9, sequence=6))
    sizes = (4, 6) if train.startswith(longer + "4") else (6, 4)
    for size, part, problem in zip(sizes, loader.PARTS, (train, validation), strict=True):
        assert problem == (f"{longer}{size} tokens ({part}); set data.sequence={size - 1} or lower, or add text to "
                           "data.sources")
    assert len(Samples(np.arange(5), 4, seed=0)) == 1


def test_bad_sources_and_a_bad_cache_are_told_at_once_and_leave_nothing(tmp_path):
    text = write(tmp_path / "text", {"a.txt": "abc", "b.jsonl": "{}"})
    missing, line = problems_of(data(tmp_path, tmp_path / "missing", text))
    assert "missing' matches no file" in missing and "b.jsonl:1" in line
    assert list((tmp_path / "cache").iterdir()) == []
    write(tmp_path, {"file": ""})
    missing, cache = problems_of(Data(sources=(str(tmp_path / "missing"),), cache=str(tmp_path / "file")))
    assert "missing' matches no file" in missing
    assert cache.startswith(f"data.cache must name a folder that can be written; {tmp_path}/file is not (")
    assert cache.endswith("; set data.cache to another")


@pytest.mark.parametrize("name", ["meta.json", "documents.npy", "train.bin", "validation.bin"])
@pytest.mark.parametrize("left", [0, 8, None])
def test_a_damaged_cache_is_written_again(config, tmp_path, name, left):
    fresh = [part[:].copy() for part in open_corpus(config)[:3]]
    (home,) = (tmp_path / "cache").iterdir()
    if left is None:
        (home / name).unlink()
    else:
        os.truncate(home / name, left)
    again = open_corpus(config)
    assert not again.cached and open_corpus(config).cached
    assert all(np.array_equal(one, other[:]) for one, other in zip(fresh, again[:3], strict=True))
    assert list((tmp_path / "cache").iterdir()) == [home]


def test_a_run_killed_while_it_tokenizes_leaves_nothing_that_is_read(config, tmp_path):
    kill = f"""
import os, signal
from moejax.config import Data
from moejax.data import loader, tokenizer
class Killer(tokenizer.ByteTokenizer):
    def encode(self, text):
        if len(text) == 30:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().encode(text)
loader.open_tokenizer, loader.LETTERS = lambda *_: Killer(), 1
loader.open_corpus({config!r})
"""
    assert subprocess.run([sys.executable, "-c", kill], check=False).returncode == -signal.SIGKILL
    (left,) = (tmp_path / "cache").iterdir()
    assert left.name.startswith(".building-") and (left / "first" / "train.bin").stat().st_size > 0
    corpus = open_corpus(config)
    assert not corpus.cached and corpus.lengths.tolist() == [11 + n for n in range(40)]
    shutil.rmtree(left)
    assert open_corpus(config).cached


def test_processes_that_race_all_end_well(config, tmp_path, monkeypatch):
    publish, barrier = loader.publish, threading.Barrier(4)

    def together(fresh: Path, home: Path) -> None:
        barrier.wait(timeout=30)
        publish(fresh, home)

    monkeypatch.setattr(loader, "publish", together)
    with ThreadPoolExecutor(4) as pool:
        corpora = list(pool.map(open_corpus, [config] * 4))
    assert [corpus.cached for corpus in corpora] == [False] * 4
    assert len({corpus.train[:].tobytes() for corpus in corpora}) == 1
    assert len(list((tmp_path / "cache").iterdir())) == 1 and open_corpus(config).cached


def test_document_note(tmp_path):
    texts = {"a": "x" * 9, "b": "x" * 19, "c": "x" * 29, "d": "x" * 99}  # 10, 20, 30 and 100 tokens
    corpus = open_corpus(data(tmp_path, write(tmp_path / "text", texts)))
    assert document_note(corpus, 30) is None  # two of four are shorter: not more than half
    assert document_note(corpus, 31) == ("75% of the 4 documents are shorter than data.sequence=31 "
                                         "(median 25 tokens); a window holds several, one after another")


def test_unigram_loss(monkeypatch):
    train, validation = np.array([0, 0, 1], np.uint16), np.array([0, 1], np.uint16)
    # with one added to each of three: 3/6, 2/6, 1/6
    expected = -(math.log(3 / 6) + math.log(2 / 6)) / 2
    assert unigram_loss(train, validation, 3) == pytest.approx(expected, rel=1e-12)
    monkeypatch.setattr(loader, "CHUNK", 2)
    assert unigram_loss(train, validation, 3) == pytest.approx(expected, rel=1e-12)
    assert unigram_loss(train[:0], np.array([2]), 5) == pytest.approx(math.log(5), rel=1e-12)
