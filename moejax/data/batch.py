"""What training is given: windows of text, and their images (S rows and columns; other letters as in the model)."""

from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float32, Int32, UInt8


class Images(NamedTuple):
    """Of the sequences of a batch; what is not there is black."""

    pixels: UInt8[np.ndarray, "B I frames S S 3"]
    frames: Int32[np.ndarray, "B I"]  # that are there: 0 of no image, 1 of a picture
    looks: Bool[np.ndarray, "B T I"]  # which images a token attends to


class Batch(NamedTuple):
    """One array per part, all with the batch first, so that any slice of the rows is a batch too."""

    tokens: Int32[np.ndarray, "B T"]
    targets: Int32[np.ndarray, "B T"]  # the token after each token
    weights: Float32[np.ndarray, "B T"]  # 1 where the target counts, else 0
    rows: Int32[np.ndarray, " B"]  # sample index modulo 2**31: names the sample for per-sample randomness
    images: Images | None = None
