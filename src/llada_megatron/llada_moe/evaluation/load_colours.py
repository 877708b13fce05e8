"""Colours of loads in images and pages."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

_STOPS = np.array([[255, 255, 255], [122, 160, 205], [190, 40, 30]], dtype=float)


def colours(relative: NDArray[np.float64]) -> NDArray[np.uint8]:
    """RGB `[..., 3]` of loads relative to the mean: white at 0, blue at 1, red at 2 and above."""
    place = np.clip(relative, 0.0, 2.0)
    low = np.minimum(place.astype(int), 1)
    share = (place - low)[..., None]
    return np.rint(_STOPS[low] * (1 - share) + _STOPS[low + 1] * share).astype(np.uint8)
