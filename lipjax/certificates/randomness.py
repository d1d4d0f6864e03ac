"""The draws of tier "probabilistic": seeds, and the split of the failure probability."""

import math
import operator
import secrets

# Of a seed: what JAX takes as one integer, where it has 64 bits.
SEED_BITS = 63


def split_failure_probability(
    failure_probability: float,
    images: int,
    layers: int,
    attempts: int = 1,
) -> float:
    """The failure probability of each norm bound, so that all together fail with at most the whole.

    In one attempt a call bounds, for every layer, the norm of each image and one that all images
    share (the global norm, in the modes that have one): ``layers * (images + 1)`` bounds, of which
    fewer are used where images are not examined. Each has draws of its own
    (`verdicts.certify_batch`: the key is that of the seed, the attempt, the image's place in the
    call, the layer), and fails with probability at most the share given everything that was drawn
    before: an attempt's radius may depend on how the one before ended, and whether there is one
    on anything at all, the time that is left too. The probability that any of
    them fails is at most the sum of theirs.

    Args:
        failure_probability: of the whole call.
        images: of the whole call, examined or not.
        layers: whose norms are bounded.
        attempts: at most so many times the norms of an image are drawn: radii that are tried, or
            stages that walk anew.
    """
    count = max(1, layers) * (images + 1) * attempts
    # The next number below, so that no rounding brings the sum above the whole.
    return math.nextafter(failure_probability / count, 0)


def drawn_seed() -> int:
    """A seed of `SEED_BITS` bits from the operating system, which nobody can have known before."""
    return secrets.randbits(SEED_BITS)


def checked_seed(seed) -> int:
    """The seed as an integer.

    Raises:
        TypeError: it is none. ValueError: it is outside 0 .. 2^63 - 1.
    """
    try:
        found = operator.index(seed)
    except TypeError:
        raise TypeError(
            f"seed must be an integer, or None to have one drawn, got {seed!r}."
        ) from None
    if not 0 <= found < 2**SEED_BITS:
        raise ValueError(f"seed must lie in 0 .. 2^{SEED_BITS} - 1, got {seed}.")
    return found
