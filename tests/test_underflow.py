"""Numbers too small to square: no bound of a proof may lose them, whatever they are multiplied with
afterwards.

Against exact rational arithmetic, with entries of every size between 1e-300 and 1e100.
"""

import functools
import itertools
from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.sparse
from conftest import exact_layers, operator_of, rational
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

import lipjax
from lipjax import activations, bounds, norms, rounding
from lipjax.activations import smooth
from lipjax.bounds import Region, ascent, relaxed
from lipjax.certificates import verdicts
from lipjax.check import kinds
from lipjax.check import layers as check_layers
from lipjax.check import norms as check_norms
from lipjax.check import walk as check_walk
from lipjax.graph import trace
from lipjax.graph.linear import LinearOperator

OUTWARD = rounding.OUTWARD
up = OUTWARD.up
SEEDS = st.integers(0, 10**6)


def sizes(rng, shape, low=-300, high=100, signed=True):
    """Numbers of any sign and of sizes between 10^low and 10^high; some are 0."""
    found = 10.0 ** rng.uniform(low, high, shape)
    found = np.where(rng.uniform(size=shape) < 0.1, 0.0, found)
    return found * rng.choice([-1, 1], shape) if signed else found


def square(values) -> Fraction:
    """Of the l2 norm, exactly."""
    return sum((v**2 for v in np.ravel(rational(values))), Fraction(0))


def exact(value) -> Fraction:
    return Fraction(float(value))


def chain(*layers) -> nnx.Sequential:
    """Dense layers of these kernels and biases, float64, a ReLU between each two."""
    found = []
    for kernel, bias in layers:
        kernel = np.atleast_2d(np.asarray(kernel, np.float64))
        layer = nnx.Linear(*kernel.shape, param_dtype=jnp.float64, rngs=nnx.Rngs(0))
        layer.kernel[...] = jnp.asarray(kernel)
        layer.bias[...] = jnp.asarray(
            np.broadcast_to(np.asarray(bias, np.float64), kernel.shape[1])
        )
        found += [layer, lipjax.ReLU()]
    return nnx.Sequential(*found[:-1])


# ------------------------------------------------------------------------------------- certificates


@pytest.mark.parametrize("mode", ["local", "bcp", "rows"])
@pytest.mark.parametrize("tier", lipjax.certificates.TIERS)
def test_a_weight_whose_square_underflows_still_moves_what_is_multiplied_behind_it(x64, mode, tier):
    net = chain((1e50, -0.5e50), (1e-160, 0), (1e99, 0), ([[1e13, 0]], [0, 1]))
    x = np.array([[0.5]])
    assert np.argmax(net(jnp.asarray(x[0]))) == 1
    assert np.argmax(net(jnp.asarray(x[0] + 0.05))) == 0  # 1e50 * 1e-160 * 1e99 * 1e13 * 0.05 is 5
    found = lipjax.certify(net, x, np.array([1]), 0.1, mode=mode, tier=tier)
    assert found.correct[0] and not found.certified[0]


def test_weights_that_underflow_is_not_counted_for_are_not_certified(x64):
    """Times a pixel below the normal range, which a machine may take for 0, they are any number."""
    for size, certified in ((1e99, True), (1e101, False)):
        net = chain((size, 0), ([[0, 0]], [0, 1]))
        assert lipjax.certify(net, np.zeros((1, 1)), np.array([1]), 0.0).certified[0] == certified


def norm_of(k, operator, like, mask_in, mask_out):
    return norms.closed.schur_bound(operator, like, mask_in, mask_out), None


@functools.partial(jax.jit, static_argnames="mode")
def verdict(net, x, epsilon, mode):
    """Of label 1, in float64 arithmetic, by norms that are proved; what the walk knows; the
    executed network's error."""
    graph = trace(net, x)
    arithmetics = rounding.arithmetics_of(graph, "float64")
    likes = [jnp.zeros(graph.nodes[node.inputs[0]].shape) for node in graph.linear_nodes]
    pairs = zip(graph.linear_nodes, likes, strict=True)
    whole = [norms.closed.schur_bound(node.operator, like) for node, like in pairs]
    facts = verdicts.verdict(
        graph, x, jnp.asarray(1), epsilon, mode, arithmetics, whole, norm_of, norm_of
    )
    walk = bounds.Walk(graph, bounds.mode_of(mode), norm_of, norm_of, arithmetic=OUTWARD)
    regions = walk(x, epsilon).regions
    boxes = [
        OUTWARD.widened(x - epsilon, x + epsilon, 0.0),
        *((r.lower, r.upper) for r in regions[1:]),
    ]
    return facts["ok"], regions[1:], rounding.forward_error(graph, boxes, arithmetics, whole)


@pytest.mark.parametrize("mode", bounds.MODES)
def test_walks_through_weights_of_any_size_contain_every_exact_activation(x64, mode):
    """Chains whose weights' sizes multiply to about 1, so that what is lost on the way would be
    seen at the end."""
    refused = 0
    for seed in range(40):
        rng = np.random.default_rng(seed)
        while True:
            low = rng.uniform(-280, 95, 3)
            whole = np.cumsum(low)
            # Activations stay below 1e100: above, nothing is claimed.
            if np.all(whole < 90) and np.all(whole > -290) and -95 < whole[-1] < 250:
                break
        widths = [2, 2, 1, 2]
        layers = []
        for rows, columns, power in zip(widths, [2, 1, 2, 2], [*low, -whole[-1]], strict=True):
            kernel = rng.uniform(0.5, 2, (rows, columns)) * 10.0**power
            bias = -(kernel.sum(axis=0)) * 0.5 if not layers else 0.0
            layers.append((kernel, bias))
        layers[-1] = (layers[-1][0] * [1.0, 0.0], [0.0, 10.0 ** rng.uniform(-2, 2)])
        net = chain(*layers)
        x, epsilon = np.full(2, 0.5), 0.1
        ok, known, error = verdict(net, jnp.asarray(x), epsilon, mode)
        refused += not ok
        claimed = all(np.all(np.abs(leaf) < rounding.LARGEST) for leaf in jax.tree.leaves(known))
        for step in itertools.product([-1, 0, 1], repeat=2):
            point = x + 0.07 * np.array(step)
            assert square(rational(point) - rational(x)) <= exact(epsilon) ** 2
            found = exact_layers(net, rational(point))
            assert not ok or found[-1][1] > found[-1][0]
            computed = rational(net(jnp.asarray(point)))
            assert np.all(
                np.abs(computed - found[-1]) <= rational(np.nan_to_num(error, posinf=1e300))
            )
            if claimed:
                for h, region in zip(found, known, strict=True):
                    assert np.all(rational(region.lower) <= h) and np.all(
                        h <= rational(region.upper)
                    )
                    assert square(h - rational(region.center)) <= exact(region.radius) ** 2
    assert 0 < refused < 40


# ---------------------------------------------------------------------------------------- its parts


@settings(max_examples=100)
@given(seed=SEEDS)
def test_norms_and_their_products_are_at_least_the_exact_ones(seed):
    rng = np.random.default_rng(seed)
    x, radius = sizes(rng, 4), sizes(rng, (), signed=False)
    with jax.enable_x64(True):
        length, norm = numpied(lengths(x))
        product = float(up(radius * length))
    assert exact(length) ** 2 >= square(x) and (length == 0) == (not np.any(x))
    assert exact(norm) ** 2 >= square(x)
    assert exact(product) ** 2 >= square(x) * exact(radius) ** 2


@jax.jit
def lengths(x):
    return OUTWARD.length(x), OUTWARD.norm(x)


def numpied(tree):
    return jax.tree.map(np.asarray, tree)


@settings(max_examples=100)
@given(seed=SEEDS)
def test_norms_of_rows_of_entries_of_any_size_are_at_least_the_exact_ones(seed):
    rng = np.random.default_rng(seed)
    matrix, mask, radius = (
        sizes(rng, (3, 3)),
        rng.uniform(size=3) < 0.7,
        10.0 ** rng.uniform(-300, 100),
    )
    with jax.enable_x64(True):
        found, reach, whole = numpied(rows_of(matrix, mask, radius))
    for row, norm, far in zip(matrix * mask, found, reach, strict=True):
        assert (norm == 0) == (not np.any(row))
        assert exact(up_exactly(norm)) ** 2 >= square(row)
        assert exact(far) ** 2 >= square(row) * exact(radius) ** 2
    assert exact(whole) ** 2 >= square(matrix)


@jax.jit
def rows_of(matrix, mask, radius):
    operator = LinearOperator.from_matrix(matrix, (3,), (3,))
    norms = operator.row_norms(mask)
    return (
        norms,
        up(radius * norms, 3),
        up(bounds.walk.safe_frobenius(operator, jnp.zeros(3)), 6),
    )


def up_exactly(x) -> float:
    """Nothing but relative rounding is added: what is multiplied afterwards must not need more."""
    return float(x) * (1 + 1e-14)


def test_the_papers_row_norms_of_a_convolution_do_not_underflow_either(x64):
    layer = nnx.Conv(1, 1, (2,), padding="VALID", param_dtype=jnp.float64, rngs=nnx.Rngs(0))
    layer.kernel[...] = jnp.full((2, 1, 1), 1e-200)
    assert np.all(operator_of(layer).kernel_row_norms >= 1e-200)


@settings(max_examples=100)
@given(seed=SEEDS)
def test_sums_of_products_of_any_size_are_rounded_up(seed):
    rng = np.random.default_rng(seed)
    a, b = sizes(rng, 4, signed=False), sizes(rng, 4, signed=False)
    relative, length = 10.0 ** rng.uniform(-310, 0), 10.0 ** rng.uniform(-310, 100)
    with jax.enable_x64(True):
        found, left = numpied(products_of(a, b, relative, length))
    assert exact(found) >= sum(rational(a) * rational(b))
    assert exact(left) ** 2 >= exact(relative) ** 2 * exact(length) ** 2 * square(a)


def test_a_radius_whose_square_underflows_is_not_lost_in_the_dual(x64):
    d, end, radius = np.array([1e100]), np.ones(1), 1e-160
    for scale in (1e-261, 1e-260, 1e-259):
        by_dual, *_ = gains(d, -end, end, radius, scale)
        assert by_dual >= 1e-60


def test_a_share_that_underflows_is_still_one_of_what_is_large(x64):
    huge = np.full(4, 1e100)
    assert products_of(huge, huge, 1e-310, 1e100)[1] >= 2e-110


def test_an_executed_network_beyond_what_underflow_is_counted_for_is_infinitely_wrong(x64):
    net = chain((1e60, 0), (1e60, 0), ([[1, 0]], [0, 1]))
    for epsilon, finite in ((1e-60, True), (0.1, False)):
        x = jnp.full(1, 0.5 * epsilon)
        error = verdict(net, x, epsilon, "local")[2]
        assert np.all(np.isfinite(error)) == finite


def test_what_is_exactly_zero_stays_so_where_nothing_is_rounded(x64):
    lower, upper = OUTWARD.widened(jnp.array([0.0, 0.0, 1e-320]), jnp.array([0.0, 1.0, 1.0]), 0.0)
    assert lower[0] == upper[0] == 0 and np.all(lower[1:] < 0) and np.all(upper[1:] > 1)


def at_point(z):
    """What the checker knows of an input that is this number, everywhere and as executed."""
    none = np.zeros(z.shape)
    return check_walk.Known(z, z, z, none > 0, 0.0, none, 0.0)


@pytest.mark.parametrize(("slope", "z"), [(2.0**-127, 2.0**119), (2.0**100, 2.0**-127)])
def test_a_subnormal_slope_or_input_may_count_as_zero_whatever_it_is_multiplied_by(x64, slope, z):
    """As XLA executes it on CPUs; both of these gave certificates that did not hold."""
    z, zero, lost = np.array([z]), np.zeros(1), slope * z
    single = (rounding.ARITHMETICS["float32"],)
    assert activations.Leaky(0.0, slope).executed(zero, z, z, single) >= lost
    checked = kinds.Leaky(zero, np.array([slope]), "float32").activated(at_point(z))[0]
    assert checked.error >= lost and checked.distance >= lost


@pytest.mark.parametrize("kind", kinds.GATED)
def test_a_smooth_function_loses_what_underflows_as_often_as_it_is_steep(x64, kind):
    zero = np.zeros(1)
    single = rounding.ARITHMETICS["float32"]
    curve = smooth.CURVES[kind]
    lost = 4 * single.smallest * (1 + curve.lipschitz)
    found = smooth.Smooth(kind).executed(zero, zero, zero, (single,))
    checked = kinds.Smooth(kind, "float32").activated(at_point(zero))[0]
    assert found >= lost and checked.error >= lost


@jax.jit
def products_of(a, b, relative, length):
    return up(jnp.sum(a * b), 4), OUTWARD.left_over(relative, a, length)


def feasible(d, low, high, radius, powers):
    """The point ``clip(d 2^p, low, high)`` of largest p that lies in the ball, exactly; and what it
    makes of <d, t>."""
    best = Fraction(0)
    d, low, high, radius = rational(d), rational(low), rational(high), exact(radius)
    for power in powers:
        t = np.minimum(np.maximum(d * Fraction(2) ** power, low), high)
        if np.sum(t**2) <= radius**2:
            best = max(best, np.sum(d * t))
    return best


@settings(max_examples=100)
@given(seed=SEEDS)
def test_products_over_a_ball_and_a_box_of_any_size_are_at_least_those_of_every_point(seed):
    rng, n = np.random.default_rng(seed), 3
    d, radius = sizes(rng, n), 10.0 ** rng.uniform(-300, 100)
    around = np.log10(radius)
    low, high = (
        -sizes(rng, n, around - 5, around + 5, signed=False),
        sizes(rng, n, around - 5, around + 5, signed=False),
    )
    scale = radius / max(np.max(np.abs(d)), 1e-300) * 10.0 ** rng.uniform(-10, 10)
    if not np.any(d) or not 1e-300 < scale < 1e300:
        return
    with jax.enable_x64(True):
        by_dual, by_search, by_one = numpied(gains(d, low, high, radius, scale))
    center = int(np.log2(radius) - np.log2(np.max(np.abs(d))))
    powers = range(center - 60, center + 60, 2)
    truth = feasible(d, low, high, radius, powers)
    # One coordinate alone.
    for i in range(n):
        end = min(exact(high[i] if d[i] > 0 else -low[i]), exact(radius))
        truth = max(truth, abs(exact(d[i])) * end)
    assert exact(by_dual) >= truth and exact(by_search) >= truth
    assert exact(by_one) >= feasible(d, -high, high, radius, powers)


@jax.jit
def gains(d, low, high, radius, scale):
    return (
        relaxed.dual(d, low, high, radius, scale, OUTWARD),
        ascent(d, Region(jnp.zeros(d.shape), radius, low, high), OUTWARD),
        relaxed.largest_product(d, high, radius, OUTWARD),
    )


def test_the_error_of_products_with_tiny_weights_is_counted(x64):
    """What is refused as too close to rounding is refused at every scale, by powers of two."""
    matrix = np.random.default_rng(0).normal(size=(8, 8))
    matrix = matrix / np.linalg.norm(matrix, 2)
    starts = norms.chebyshev.starts(jax.random.key(0), [8])

    @jax.jit
    def bound(matrix, scale):
        operator = LinearOperator.from_matrix(matrix, (8,), (8,))
        return norms.chebyshev.probabilistic_norm_bound(
            operator, *starts, scale, 400, 1e-35, jnp.zeros(8)
        )

    found = [float(bound(jnp.asarray(matrix * s), 1.001 * s)) / s for s in (1.0, 2.0**-560)]
    assert found[0] == found[1] == np.inf


# ------------------------------------------------------------------------- the checker's own bounds


@settings(max_examples=100)
@given(seed=SEEDS)
def test_the_checkers_products_over_a_ball_and_a_box_are_at_least_those_of_every_point(seed):
    rng, n = np.random.default_rng(seed), 3
    d, radius = sizes(rng, n), 10.0 ** rng.uniform(-300, 100)
    around = np.log10(radius)
    low, high = (
        -sizes(rng, n, around - 5, around + 5, signed=False),
        sizes(rng, n, around - 5, around + 5, signed=False),
    )
    with np.errstate(all="ignore"):  # as its derivation does
        found = check_walk.worst_gains(d[None], low, high, radius)[0]
    if not np.any(d):
        return
    center = int(np.log2(radius) - np.log2(np.max(np.abs(d))))
    truth = feasible(d, low, high, radius, range(center - 60, center + 60, 2))
    for i in range(n):
        end = min(exact(high[i] if d[i] > 0 else -low[i]), exact(radius))
        truth = max(truth, abs(exact(d[i])) * end)
    assert not np.isfinite(found) or exact(found) >= truth  # else nothing is claimed


@pytest.mark.parametrize("size", [5e-324, 1e-310, 1e-300, 1e-160, 1e100, 1e300])
def test_the_checkers_norms_of_matrices_of_any_size_are_at_least_the_exact_ones(size):
    bound = check_norms.Norms(1e-6, np.random.default_rng(0))
    matrix = scipy.sparse.csr_array(np.array([[size, 0.0], [size, size * 1e-8]]))
    lower, upper = bound(matrix)  # subnormal ones included
    # That of the first column alone.
    assert exact(upper) ** 2 >= 2 * exact(size) ** 2
    assert lower <= upper <= 1.5 * size + 1e-299
    assert bound(scipy.sparse.csr_array(np.full((2, 2), 1.7e308)))[1] == np.inf


@settings(max_examples=100)
@given(seed=SEEDS)
def test_the_checkers_rows_and_boxes_are_at_least_the_exact_ones(seed):
    rng = np.random.default_rng(seed)
    matrix, x = sizes(rng, (2, 3)), sizes(rng, 3, -300, 0)
    epsilon = 10.0 ** rng.uniform(-300, 0)
    layer = {"kind": "linear", "kernel": matrix.T, "bias": None, "dtype": None, "unusual": []}
    affine = check_layers.nodes_of([layer], (3,))[-1].step
    known = check_walk.Known(
        x, x - 2 * epsilon, x + 2 * epsilon, np.ones(3, bool), epsilon, np.zeros(3), 0.0
    )  # a box around the ball
    with np.errstate(all="ignore"):
        found, _ = check_walk.transform(affine, known, np.inf, "float64")
    for row, norm, lower, upper in zip(
        rational(matrix), affine.row_norms, found.lower, found.upper, strict=True
    ):
        assert exact(norm) ** 2 >= np.sum(row**2)
        at_x = np.sum(row * rational(x))
        for i in range(3):  # the ball's ends along each axis
            step = abs(row[i]) * exact(epsilon)
            assert exact(lower) <= at_x - step and at_x + step <= exact(upper)
