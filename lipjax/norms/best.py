"""The smallest bound that a budget allows: which of the algorithms bounds a norm."""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from lipjax.graph.linear import Convolution, LinearOperator, Product
from lipjax.norms.banded import masked_convolution_cost, masked_convolution_norm_bound
from lipjax.norms.closed import closed_form
from lipjax.norms.fourier import convolution_norm_bound
from lipjax.norms.gram import dense_cost, dense_norm_bound
from lipjax.norms.lanczos import norm_estimate
from lipjax.norms.scaled import problem_of

# Largest side of an explicit Gram matrix in `norm_bound`: 4096^2 float64 numbers are 134 MB.
DENSE_LIMIT = 4096
# Flops for one example and layer that `norm_bound` spends by default: about a second on a laptop's
# two cores.
BUDGET = 2e10
# A whole norm's bound within this factor of an estimate from below is not bounded once more for an
# example whose masks keep everything: the probabilistic tier would inflate it as much.
CLOSE = 1.012


def norm_bound(
    operator: LinearOperator,
    like: jax.Array | jax.ShapeDtypeStruct,
    mask_in: jax.Array | None = None,
    mask_out: jax.Array | None = None,
    *,
    guess: jax.Array | None = None,
    global_bound: jax.Array | float = math.inf,
    budget: float = BUDGET,
) -> jax.Array:
    """The smallest bound of ``||D_out W D_in||_2`` that the budget allows: the deterministic tier's
    norm.

    Candidates: `schur_bound`; the global bound given; the explicit Gram matrix where the smaller
    side is at most `DENSE_LIMIT` and `dense_cost` within the budget; or
    `masked_convolution_norm_bound` with blocks as large as the budget allows, where that holds a
    whole slab or the explicit one is not available.

    Args:
        operator, like, mask_in, mask_out: as in `schur_bound`.
        guess: of the norm, e.g. from a power iteration. Only the tightness depends on it.
        global_bound: an upper bound of the norm of W without masks, e.g. of `global_norm_bound`,
            once per network.
        budget: flops for this example and layer, with one attempt.

    Returns:
        A scalar that satisfies the guarantee of `lipjax.norms` if the global bound is one.

    Raises:
        ValueError: as `schur_bound`.
    """
    problem = problem_of(operator, like, mask_in, mask_out)
    known = problem.bound(closed_form(problem), known=global_bound)
    dense = dense_cost(operator, like)
    banded = masked_convolution_cost(operator, like)
    fits = dense <= budget and min(like.size, problem.out.size) <= DENSE_LIMIT
    if fits and (dense <= banded or banded > budget):
        return jnp.minimum(known, dense_norm_bound(operator, like, mask_in, mask_out, guess))
    return masked_convolution_norm_bound(operator, like, mask_in, mask_out, guess, known, budget)


def global_norm_bound(
    operator: LinearOperator, like: jax.Array | jax.ShapeDtypeStruct, *, budget: float = BUDGET
) -> jax.Array:
    """An upper bound of the unmasked ``||W||_2``, once per network: `norm_bound` and the circular
    convolution's."""
    known: jax.Array | float = math.inf
    if isinstance(operator.apply, Convolution):
        known = convolution_norm_bound(operator, like)
    elif isinstance(operator.apply, Product):
        # The same matrix at every position of the axes that it does not sum over.
        like = jax.ShapeDtypeStruct(operator.apply.one_position(like.shape), like.dtype)
    return norm_bound(operator, like, global_bound=known, budget=budget)


class WholeNorm(NamedTuple):
    """What is known of the unmasked ``||W||_2``, once per network.

    Attributes:
        bound: from above, as `global_norm_bound` gives it.
        close: is it within `CLOSE` of an estimate from below?
    """

    bound: jax.Array
    close: jax.Array

    def unless_masked(
        self,
        bound: Callable[..., jax.Array],
        operator: LinearOperator,
        mask_in: jax.Array | None,
        mask_out: jax.Array | None,
    ) -> jax.Array:
        """The smaller of ``bound(operator, mask_in, mask_out)`` and the whole norm's bound; the
        latter alone, at no cost, where that is close and the masks keep everything.

        Under `vmap` the other is computed for all examples if one of them needs it.
        """
        needed = ~self.close
        for mask in (mask_in, mask_out):
            if mask is not None:
                needed |= ~jnp.all(mask)

        def narrowed(state):
            # Else it would be computed in front of the loop, as nothing in it changes.
            state, masked_map = lax.optimization_barrier((state, (operator, mask_in, mask_out)))
            return jnp.zeros((), bool), jnp.minimum(state[1], bound(*masked_map))

        # A loop that ends after one round, or before it: a condition under `vmap` computes both.
        return lax.while_loop(lambda state: state[0], narrowed, (needed, self.bound))[1]


def whole_norm(operator: LinearOperator, like: jax.Array | jax.ShapeDtypeStruct) -> WholeNorm:
    """`global_norm_bound`, and whether it is close."""
    bound = global_norm_bound(operator, like)
    return WholeNorm(bound, bound <= CLOSE * norm_estimate(operator, like))
