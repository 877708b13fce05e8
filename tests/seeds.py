"""Random draws of tests that are to meet another case each time, and that can be repeated."""

import os
import random

VARIABLE = "LLADA_TEST_SEED"


def drawn() -> random.Random:
    """A generator with a new seed, which is printed (pytest shows it where the test fails), or that of the environment."""
    seed = os.environ.get(VARIABLE) or str(random.SystemRandom().randrange(2**32))
    print(f"drawn with seed {seed}; repeat with {VARIABLE}={seed}")
    return random.Random(int(seed))
