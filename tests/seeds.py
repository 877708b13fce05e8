"""Random draws of tests that are to meet another case each time, and that can be repeated."""

import os
import random

VARIABLE = "LLADA_TEST_SEED"


def drawn() -> random.Random:
    """A generator with a new seed, or that of the environment; printed, which pytest shows where the test fails."""
    seed = os.environ.get(VARIABLE) or str(random.SystemRandom().randrange(2**32))
    print(f"drawn with seed {seed}; repeat with {VARIABLE}={seed}")
    return random.Random(int(seed))
