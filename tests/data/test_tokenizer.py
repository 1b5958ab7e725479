"""The byte tokenizer: ids are bytes, the end of text has no text, nothing that is fed to it fails."""

import numpy as np
import pytest

from moejax.data.tokenizer import TOKENIZERS, ByteTokenizer

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
    assert (tokenizer.size, tokenizer.eot) == (257, 256)
    assert TOKENIZERS["bytes"] is ByteTokenizer
