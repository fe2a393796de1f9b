"""Seeds of independent random streams."""

from __future__ import annotations

import numpy as np


def stream_seed(*parts: int) -> int:
    """Mix integers into one well-spread 63-bit seed; zeros at the end make no difference."""
    return int(np.random.SeedSequence(parts).generate_state(1, np.uint64)[0] >> 1)
