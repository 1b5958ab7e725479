"""What the data package hands to training: a `Batch` of windows of the token stream.

Letters as in the model's legend: B sequences, T tokens.
"""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float32, Int32


class Batch(NamedTuple):
    """One array per part, all with the batch first, so that any slice of the rows is a batch too."""

    tokens: Int32[np.ndarray, "B T"]
    targets: Int32[np.ndarray, "B T"]  # the token after each token
    weights: Float32[np.ndarray, "B T"]  # 1 where the target counts, else 0
    rows: Int32[np.ndarray, " B"]  # sample index modulo 2**31: names the sample for per-sample randomness
