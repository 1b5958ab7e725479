"""Text to token ids and back.

Bottom of the data package.  A tokenizer has `size` (ids are below it), `eot` (the id that ends a document),
`encode` and `decode`; a new one is a class here and an entry in `TOKENIZERS`.
"""

from collections.abc import Iterable

import numpy as np
from jaxtyping import UInt16


class ByteTokenizer:
    """Ids 0..255 are the bytes of UTF-8, 256 ends a document: any text fits and nothing is learned or fetched."""

    size = 257
    eot = 256

    def encode(self, text: str) -> UInt16[np.ndarray, " T"]:
        """The bytes of `text`, without an end of text.  What UTF-8 cannot hold (half a surrogate pair) becomes `?`."""
        return np.frombuffer(text.encode("utf-8", "replace"), np.uint8).astype(np.uint16)

    def decode(self, ids: Iterable) -> str:
        """The text of a sequence of ids.  Ids from 256 up have no text; bytes that are not UTF-8 become U+FFFD."""
        ids = np.asarray(ids, np.int64)
        return ids[ids < 256].astype(np.uint8).tobytes().decode("utf-8", "replace")


TOKENIZERS = {"bytes": ByteTokenizer}
