"""The checker's norms: upper bounds of ``||A||_2`` of explicit sparse matrices, proved or
randomised, all rounding included.

Part of `lipjax.check`; shares nothing with the bounds that it checks. Rounding after Higham,
*Accuracy and Stability of Numerical Algorithms*, 2nd ed. 2002, section 3.1: a sum of n rounded
terms errs by at most ``gamma(n)`` times the sum of their sizes, in whatever order they are summed.
"""

import math

import numpy as np

# Sides up to which a norm is taken from the Gram matrix, and up to which it can be for who wants no
# chance, a few seconds each; larger matrices get the randomised bound.
SMALL = 1500
AFFORDABLE = 4096
# Gaussian starts of the randomised bound, and the inflation of the norm that its number of steps
# aims at.
STARTS = 4
INFLATION = 0.001
LANCZOS_STEPS = 40

U = 2.0**-53  # unit roundoff of the checker's own arithmetic
TINY = 2.0**-1000  # above all that underflow can take from one of its sums


def gamma(terms: float, unit: float = U) -> float:
    """``n u / (1 - n u)``: relative error of a sum of n rounded terms; infinity where the model
    says nothing."""
    return terms * unit / (1 - terms * unit) if terms * unit < 1 else math.inf


def up(x, terms: float = 16):
    """At least the exact value of x, which was computed as a sum of so many terms, all >= 0, and a
    few operations more."""
    return x * (1 + 2 * gamma(terms + 4)) + TINY


def up_norm(x: np.ndarray) -> float:
    """At least ``||x||_2``; infinity if an entry is infinite, NaN if one is NaN."""
    largest = np.max(np.abs(x), initial=0.0)
    if not 0 < largest < math.inf:
        return float(largest)
    return float(up(np.sqrt(np.sum(np.square(x / largest))) * largest, x.size)) + x.size * TINY


class Norms:
    """Bounds of ``||A||_2`` from both sides, and the account of their failure probability.

    Args:
        delta: failure probability of each randomised upper bound.
        rng: of its draws.
        patient: prove also norms that take seconds without chance, up to `AFFORDABLE`.
    """

    def __init__(self, delta: float, rng: np.random.Generator, patient: bool = False):
        self.delta, self.rng, self.patient = delta, rng, patient
        self.random = 0  # how many upper bounds rest on a draw

    def __call__(self, matrix) -> tuple[float, float]:
        """``(lower, upper)``; the upper one is proved, the lower one is right up to 1e-10 of
        rounding."""
        if matrix.nnz == 0:
            return 0.0, 0.0
        exponent = math.frexp(float(np.max(np.abs(matrix.data))))[1]
        # Exact, and nothing underflows or overflows when squared; ldexp, as 2^-exponent may
        # overflow.
        scaled = matrix.copy()
        scaled.data = np.ldexp(matrix.data, -exponent)
        if min(matrix.shape) <= (AFFORDABLE if self.patient else SMALL):
            lower, upper = norm_by_cholesky(scaled, self.rng)
        else:
            lower, upper, used = norm_by_chebyshev(scaled, self.delta, self.rng)
            self.random += used
        with np.errstate(over="ignore", under="ignore"):  # to infinity
            return float(np.ldexp(lower, exponent)), float(up(np.ldexp(upper, exponent)))


def norm_by_cholesky(matrix, rng: np.random.Generator) -> tuple[float, float]:
    """The norm of a sparse matrix of which one side is small, never below the truth and above it by
    about 1e-9 at most, or by about 1e-4 where the side is above `SMALL`: there the norm is guessed
    by Lanczos (from `rng`), and proved all the same.

    G is the smaller Gram matrix, computed with an error of norm at most ``gamma_n ||A||_F^2`` (n
    terms in a row). If ``tau I - G = R R^T + E`` for any R, then ``lambda_max(G) <= tau + ||E||``:
    R is a Cholesky factor, of which nothing else is assumed, and E is what is left over when it is
    multiplied out, with an error of at most ``gamma_p ||R||_F^2``.

    Args:
        matrix: entries at most 1 in size, not all zero.

    Returns:
        An estimate from eigenvalues, and the proved upper bound.
    """
    matrix = (matrix.T if matrix.shape[0] > matrix.shape[1] else matrix).tocsr()
    side, terms = matrix.shape[0], int(np.max(np.diff(matrix.indptr)))
    if matrix.nnz > 0.2 * matrix.shape[0] * matrix.shape[1]:
        entries = matrix.toarray()
        gram = entries @ entries.T
    else:
        gram = (matrix @ matrix.T).toarray()
    inflations: tuple[float, ...] = (0.0, 1e-10, 1e-8, 1e-6, 1e-3)
    if side <= SMALL:
        top = float(np.linalg.eigvalsh(gram)[-1])
    else:
        top = _lanczos(matrix, matrix.T.tocsr(), rng, 200) ** 2
        inflations = (1e-8, 1e-4, 1e-2, 1.0)
    rounding = 2 * gamma(terms + 4) * float(np.trace(gram))
    for inflation in inflations:
        tau = top * (1 + inflation + 4 * side * gamma(side + 2))
        shifted = tau * np.eye(side) - gram
        try:
            factor = np.linalg.cholesky(shifted)
        except np.linalg.LinAlgError:
            continue
        left_over = up_norm(shifted - factor @ factor.T) + up(
            gamma(side + 4) * np.sum(np.square(factor)), side**2
        )
        return math.sqrt(top), float(up(math.sqrt(up(tau * (1 + 4 * U) + left_over + rounding))))
    return math.sqrt(top), up_norm(matrix.data)  # never seen; the Frobenius norm is always right


def norm_by_chebyshev(matrix, delta: float, rng: np.random.Generator) -> tuple[float, float, int]:
    """An upper bound of the norm of a large sparse matrix that fails with probability <= delta over
    the draws.

    For ``A = M^T M`` with largest eigenvalue ``lambda = (1 + s) tau``, s > 0, and its unit
    eigenvector q, standard normal starts ``G = (g_1 .. g_m)`` and the Chebyshev polynomial T_k:
    ``||T_k(2 A / tau - I) G||_F >= T_k(1 + 2 s) ||q^T G||``, and ``||q^T G||^2`` is chi-squared
    with m degrees of freedom: below t^2 with probability at most
    ``t^m / (2^{m/2} Gamma(m/2 + 1))``, which is delta for the t of `least_component`. So the norm R
    that is observed proves ``T_k(1 + 2 s) <= R / t``, for every tau, also one that depends on G.

    Rounding: the recurrence in fact gives ``V_k = T_k(B) G + sum_j U_{k-1-j}(B) F_j``, ``B = 2 A /
    tau - I``, with the error F_j of its step j, whose norm is bounded here as it runs. As
    ``U_{n-1}(y) <= n T_k(y)`` for y >= 1 and n <= k, it is enough to put ``t - sum_j (k - j)
    ||F_j||`` in the place of t.

    Args:
        matrix: entries at most 1 in size, not all zero.

    Returns:
        A lower bound (a Rayleigh quotient), the upper bound, and 1 if it rests on the draws (0: a
        closed form was smaller).
    """
    if matrix.shape[1] > matrix.shape[0]:
        matrix = matrix.T
    matrix = matrix.tocsr()
    transposed = matrix.T.tocsr()
    absolute = abs(matrix)
    # ||A||^2 <= ||A||_1 ||A||_inf, also of |A|: never wrong, mostly loose.
    schur = up(
        up(np.max(absolute.sum(axis=0)), matrix.shape[0])
        * up(np.max(absolute.sum(axis=1)), matrix.shape[1])
    )
    lower = _lanczos(matrix, transposed, rng, LANCZOS_STEPS)
    size, terms = matrix.shape[1], sum(int(np.max(np.diff(m.indptr))) for m in (matrix, transposed))
    floor = least_component(delta)
    excess = 1.4 * INFLATION
    steps = math.ceil(math.acosh(2 * math.sqrt(STARTS * size) / floor) / math.acosh(1 + 2 * excess))
    start = rng.standard_normal((size, STARTS))
    upper, used = float(up(math.sqrt(schur))), 0
    for _ in range(3):
        guess = lower * (1 + 0.2 * INFLATION)
        length, error, last = _recurrence(matrix, transposed, start, guess**2, steps, terms, schur)
        if error < floor:
            ratio = max(length / (floor - up(error, steps)) * (1 + 1e-12), 1.0)
            found = guess * math.sqrt((1 + math.cosh(math.acosh(ratio) / steps)) / 2) * (1 + 1e-12)
            if found < upper:
                upper, used = found, 1
        # The last block leans towards the top, so it may show a larger norm than Lanczos found.
        lower = max(
            lower,
            float(np.max(np.linalg.norm(matrix @ last, axis=0) / np.linalg.norm(last, axis=0))),
        )
        if upper <= lower * (1 + 1.5 * INFLATION):
            break
    return lower, upper, used


def least_component(delta: float) -> float:
    """A number t that the norm of `STARTS` standard normals is below with probability at most
    delta."""
    return (delta * 2 ** (STARTS / 2) * math.gamma(STARTS / 2 + 1)) ** (1 / STARTS)


def _recurrence(matrix, transposed, start, tau: float, steps: int, terms: int, schur: float):
    """``V = T_steps(2 A / tau - I) start``: a bound of ||V||_F, of the rounding that counts against
    it, and V's direction.

    The rounding is infinite where the recurrence grew so much that tau must have been far too
    small.
    """
    loss = 4 * schur / tau * (gamma(terms + 8) + 8 * U) * 1.01 + 16 * U
    previous, current, error = start, start, 0.0
    before, now = 0.0, up_norm(start)
    for j in range(steps):
        error += (steps - j) * (loss * now + 8 * U * before)
        half = 2 / tau * (transposed @ (matrix @ current)) - current
        previous, current = current, half if j == 0 else 2 * half - previous
        before, now = now, up_norm(current)
        if not now < 1e100:
            return now, math.inf, current
    return now, error, current


def _lanczos(matrix, transposed, rng, steps: int) -> float:
    """The norm from below: the largest Ritz value of ``A^T A`` on a Krylov space, checked as a
    Rayleigh quotient."""
    v = rng.standard_normal(matrix.shape[1])
    basis = [v / np.linalg.norm(v)]
    for _ in range(min(steps, matrix.shape[1]) - 1):
        w = transposed @ (matrix @ basis[-1])
        for _ in range(2):  # twice is enough (Kahan, Parlett)
            q = np.stack(basis)
            w = w - q.T @ (q @ w)
        length = np.linalg.norm(w)
        if length <= 1e-12:
            break
        basis.append(w / length)
    q = np.stack(basis)
    images = matrix @ q.T
    _, vectors = np.linalg.eigh(images.T @ images)
    best = q.T @ vectors[:, -1]
    return float(np.linalg.norm(matrix @ best) / np.linalg.norm(best))
