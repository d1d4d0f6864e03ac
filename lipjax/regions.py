"""What is known of every activation while the input moves in a ball: regions, and their walk through a network."""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from lipjax import activations, operators, rounding, slopes, spectral
from lipjax.operators import larger, smaller

FORK, JOIN = operators.FORK, operators.JOIN
MODES = ("global", "bcp", "paper", "local", "linear", "rows")
# Types that products of power iterations can be in.
PRODUCTS = ("float32", "bfloat16")
# Power iterations of `bound` by default: from random starts, and from vectors that were kept. How
# far below the norm random starts end is measured by `python -m benchmarks.starts`.
FRESH_ITERATIONS = 50
WARM_ITERATIONS = 10
# What a caller's key is folded with first; the starts of a call without a key are folded with 0 and
# 1. So nothing that one can train with, initial vectors included, starts where one evaluates.
SALTS = {"local": 2, "global": 3}


@functools.partial(jax.tree_util.register_dataclass, data_fields=["center", "radius", "lower", "upper"], meta_fields=[])
@dataclasses.dataclass(frozen=True)
class Region:
    """Where an activation h(x') can be for every x' within epsilon of x: in a ball and in a box.

    Attributes:
        center: h(x), of the activation's shape.
        radius: scalar, ``||h(x') - h(x)||_2 <= radius``.
        lower, upper: ``lower <= h(x') <= upper``, of the activation's shape.
    """

    center: jax.Array
    radius: jax.Array
    lower: jax.Array
    upper: jax.Array

    @property
    def varies(self) -> jax.Array:
        """Boolean mask of the coordinates that can change: their two ends differ (a NaN counts as varying)."""
        return activations.varies(self.lower, self.upper)


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["logits", "lipschitz", "norms", "input", "regions", "penultimate", "vectors"],
    meta_fields=["mode", "rivals"],
)
@dataclasses.dataclass(frozen=True)
class Bound:
    """What `bound` knows of one example. A pytree: it goes through `jit`, `vmap` and `grad`.

    Attributes:
        logits: ``(classes,)``, the network's output at x.
        lipschitz: scalar, the product of `norms` (for a Residual 1 + that of its layers): Lipschitz estimate on the ball
            around x, from the input to the penultimate activation.
        norms: one scalar per affine layer but the last.
        input: the ball around x.
        regions: ``regions[i]`` is what is known after layer i of the network (nested nnx.Sequential spliced in).
        penultimate: what is known of the input of the last affine layer.
        vectors: last vectors of the power iterations, to start the next from. A dict with "local" (per example) in
            modes from "paper" on, and "global" (shared by all examples) in modes "global", "bcp" and
            "paper"; each a tuple of arrays of the inputs' shapes, one per affine layer but the last.
        mode, rivals: as given to `bound`.
    """

    logits: jax.Array
    lipschitz: jax.Array
    norms: tuple[jax.Array, ...]
    input: Region
    regions: tuple[Region, ...]
    penultimate: Region
    vectors: Any
    mode: str
    rivals: int | None = None


def layers_of(network: nnx.Module) -> tuple:
    """The layers of a sequential network in order, nested sequences spliced in, those of a Residual between FORK and JOIN.

    Raises:
        TypeError: if the network is not an nnx.Sequential, has a layer of a type that nobody registered, or does not
            end in an affine layer (a Flatten may follow).
    """
    layers = tuple(_spliced(network))
    for i, layer in enumerate(layers):
        if layer is FORK or layer is JOIN:
            continue
        if not (type(layer) is operators.Flatten or activations.is_activation(layer) or operators.is_affine(layer)):
            name = getattr(layer, "__qualname__", None) if callable(layer) else None
            name = name or f"{type(layer).__module__}.{type(layer).__qualname__}"
            raise TypeError(
                f"layer {i}, {name}, is not known to lipjax, so nothing can be said of its Lipschitz constant. Known "
                "are nnx.Conv, nnx.Linear, lipjax.AveragePool, Normalize, CayleyLinear, AOLConv, Flatten, Residual, ReLU, "
                "ClippedReLU, MaxMin and ClippedMaxMin (modules, not functions such as nnx.relu). Register your own exact type "
                "with lipjax.linear_operator.register or lipjax.activations.box_image.register; dropout and BatchNorm are "
                "no affine layers (lipjax.bridges.fold folds a BatchNorm that has stopped learning)."
            )
    affine = [i for i, layer in enumerate(layers) if operators.is_affine(layer)]
    if not affine or any(activations.is_activation(layer) or layer is JOIN for layer in layers[affine[-1] :]):
        raise TypeError("the network must end in an affine layer, whose outputs are the logits.")
    return layers


def _spliced(network):
    if type(network) is not nnx.Sequential:
        raise TypeError(
            f"expected a flax.nnx.Sequential, got {type(network).__module__}.{type(network).__qualname__}: lipjax walks "
            "the layers in order, and of another module's __call__ it knows nothing."
        )
    for layer in network.layers:
        if isinstance(layer, nnx.Sequential):
            yield from _spliced(layer)
        elif type(layer) is operators.Residual:
            yield FORK
            yield from _spliced(layer.branch)
            yield JOIN
        else:
            yield layer


def apply(network: nnx.Module, x: jax.Array) -> jax.Array:
    """The logits ``(classes,)`` of one example, through the same linear views that the bounds use.

    Raises:
        ValueError: x of a shape that a layer refuses, naming the layer.
    """
    return through(layers_of(network), x)


def through(layers: Sequence, x: jax.Array) -> jax.Array:
    """What these layers, as `layers_of` returns them, make of one example."""
    forks = []
    for i, layer in enumerate(layers):
        if layer is FORK:
            forks.append(x)
        elif layer is JOIN:
            x = operators.joined(forks.pop(), x)
        else:
            function = operators.linear_operator(layer).affine if operators.is_affine(layer) else layer
            x = _checked(function, i, layer, x)
    return x


def check_epsilon(epsilon) -> None:
    """Raises a ValueError for a radius that is known here and negative, NaN or infinite."""
    if not isinstance(epsilon, jax.core.Tracer) and not (float(epsilon) >= 0 and math.isfinite(float(epsilon))):
        raise ValueError(f"epsilon must be finite and >= 0 (an l2 radius on pixels in [0, 1]), got {epsilon}.")


# norm(k, operator, like, mask_in, mask_out) -> (sigma, vector); k counts the affine layers. It is given masks of None
# for a global norm. The walk is the same for estimates and certificates; only this function differs.
NormFunction = Callable[..., tuple[jax.Array, Any]]


def walk(
    layers: Sequence,
    x: jax.Array,
    epsilon: jax.Array,
    mode: str,
    local_norm: NormFunction,
    global_norm: NormFunction,
    view: Callable = lambda layer, like: operators.linear_operator(layer),
    arithmetic: rounding.Rounding = rounding.EXACT,
) -> Bound:
    """Carries the ball ``||x' - x||_2 <= epsilon`` through the layers; sound iff the norm functions bound from above.

    With `rounding.OUTWARD`, in float64, this includes the rounding of the walk itself: every exact h(x') lies in its box,
    and within its radius of the center *as computed*. A constant coordinate stays exactly constant: its two ends, the
    computed center and the exact value are the same threshold.

    A region's radius after an affine layer is that of its box: the norm with rows removed holds only behind the
    activation that makes those rows harmless, and there the region's radius uses it.

    Modes, each at most the one before ("rows": at most "local"):
        global: no masks, radii grow by the norms of the layers (as GloRo and LMT do); boxes are those of the ball.
        bcp: the same radii, and boxes by interval arithmetic cut with them (Lee et al. 2020).
        paper: the boxes of "bcp"; local norms in the final product (Huang et al. 2021).
        local: boxes, masks and norms all from the local radius; no global norm is needed.
        linear: the walk of "local"; the margins are taken through the slopes (`margins.linear_gains`).
        rows: the same, and every box is cut with what each neuron's own row says (`slopes.reaches`).
    """
    if mode not in MODES:
        raise ValueError(f"mode must be one of {', '.join(MODES)}, got {mode!r}.")
    asked, mode = mode, "local" if mode in ("linear", "rows") else mode
    epsilon = jnp.asarray(epsilon, x.dtype)
    region = start = _ball(x, epsilon, arithmetic)
    lipschitz = jnp.ones((), x.dtype)
    global_radius = epsilon  # of the boxes in modes "bcp" and "paper"
    last = max(i for i, layer in enumerate(layers) if operators.is_affine(layer))
    regions: list[Region] = []
    norms: list[jax.Array] = []
    forks: list[tuple] = []  # what is known in front of the Residuals that the walk is in
    vectors: dict[str, list] = {"global": [], "local": []}
    penultimate = region
    pending = None  # radius that becomes true once the next activation is passed
    for i, layer in enumerate(layers):
        if layer is FORK:
            forks.append((region, lipschitz, global_radius))
            lipschitz = jnp.ones((), x.dtype)
        elif layer is JOIN:
            before, outside, outside_radius = forks.pop()
            center = operators.joined(before.center, region.center)
            moved = arithmetic.norm(4 * rounding.DOUBLE * jnp.abs(center))
            radius = arithmetic.up(before.radius + region.radius + moved, 2)
            global_radius = arithmetic.up(outside_radius + global_radius + moved, 2)
            lipschitz = arithmetic.up(outside * arithmetic.up(1 + lipschitz))
            if mode == "global":
                region = _ball(center, radius, arithmetic)
            else:
                ends = arithmetic.widened(before.lower + region.lower, before.upper + region.upper, 0.0)
                region = Region(center, radius, *ends)
                if mode == "local":
                    region = dataclasses.replace(region, radius=jnp.minimum(radius, _half_diagonal(region, arithmetic)))
        elif type(layer) is operators.Flatten:
            region = Region(layer(region.center), region.radius, layer(region.lower), layer(region.upper))
        elif activations.is_activation(layer):
            center = layer(region.center)
            radius = region.radius if pending is None else pending
            pending = None
            if mode == "global":
                region = _ball(center, radius, arithmetic)
            else:
                region = Region(center, radius, *activations.box_image(layer, region.lower, region.upper))
                if mode == "local":
                    region = dataclasses.replace(region, radius=jnp.minimum(radius, _half_diagonal(region, arithmetic)))
        else:
            k = len(norms)
            operator = _checked(lambda z, layer=layer: view(layer, z), i, layer, region.center)
            before = region
            if i == last:
                penultimate = region
            center = _checked(operator.affine, i, layer, before.center)
            slack = arithmetic.slack(operator, before.lower, before.upper)
            moved = arithmetic.norm(slack)  # how far the computed center can be from the image of the one before
            if mode == "global":
                if i == last:
                    terms = before.center.size + center.size
                    sigma = arithmetic.up(safe_frobenius(operator, before.center), terms)
                else:
                    sigma, vector = global_norm(k, operator, before.center, None, None)
                    vectors["global"].append(vector)
                    norms.append(sigma)
                    lipschitz = arithmetic.up(lipschitz * sigma)
                region = _ball(center, arithmetic.up(sigma * before.radius + moved), arithmetic)
                regions.append(region)
                continue
            ball = before.radius if mode == "local" else global_radius
            own = None
            if asked == "rows" and norms and i < last:
                own = slopes.reaches(layers[:i], (start, *regions), norms, operator, arithmetic, view)
            region = _affine_box(operator, before, center, ball, mode, slack, arithmetic, before is start, own)
            if i < last:
                mask_out, behind_activation = _live_rows(layers, i, region, mode)
                if mode != "local":
                    sigma, vector = global_norm(k, operator, before.center, None, None)
                    vectors["global"].append(vector)
                    global_radius = arithmetic.up(sigma * global_radius + moved)
                if mode != "bcp":
                    sigma, vector = local_norm(k, operator, before.center, before.varies, mask_out)
                    vectors["local"].append(vector)
                norms.append(sigma)
                lipschitz = arithmetic.up(lipschitz * sigma)
                radius = arithmetic.up(sigma * before.radius + moved)
                if behind_activation:
                    pending = radius
                else:
                    least = jnp.minimum(radius, region.radius) if mode == "local" else radius
                    region = dataclasses.replace(region, radius=least)
        regions.append(region)
    if center.ndim != 1 and region.center.ndim != 1:
        raise ValueError(
            f"the logits must have one axis, got shape {region.center.shape}: a lipjax.Flatten is missing."
        )
    kept = {name: tuple(vectors_) for name, vectors_ in vectors.items() if name in VECTORS_OF[mode]}
    return Bound(region.center, lipschitz, tuple(norms), start, tuple(regions), penultimate, kept, asked)


# Which power iterations a mode runs: per example ("local"), shared by all examples ("global").
VECTORS_OF = {
    **{"global": ("global",), "bcp": ("global",), "paper": ("global", "local")},
    **{"local": ("local",), "linear": ("local",), "rows": ("local",)},
}


def _ball(center, radius, arithmetic):
    # Nothing varies in a ball of radius 0: there the two ends must stay equal.
    lower, upper = arithmetic.widened(center - radius, center + radius, 0.0)
    return Region(center, radius, jnp.where(radius == 0, center, lower), jnp.where(radius == 0, center, upper))


def safe_frobenius(operator: operators.LinearOperator, like: jax.Array) -> jax.Array:
    """``||W||_F``: a sound norm without any iteration, for the logits' region, where nothing tighter is needed."""
    return operators.safe_norm(operator.row_norms(jnp.ones(like.shape, bool)))


def _checked(function, i, layer, x):
    try:
        return function(x)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"layer {i}, {type(layer).__name__}, cannot take an input of shape {x.shape} (one example, channels last; "
            f"for a batch use jax.vmap): {error}"
        ) from error


def _affine_box(operator, before: Region, center, ball_radius, mode, slack, arithmetic, first, own=None) -> Region:
    """Interval arithmetic, cut with the ball of the inputs that vary, and with `own`, how far each output can move, if given;
    always contains the center itself. `first`: in front is the ball of the inputs, the same around every center."""
    if first:
        half_width_in, varies = (
            jnp.full(before.center.shape, before.radius),
            jnp.full(before.center.shape, ~(before.radius == 0)),
        )
        middle, half_width = center, operator.absolute(half_width_in)
    else:
        middle_in, half_width_in = arithmetic.around(before.lower, before.upper)
        middle, half_width, varies = operator.affine(middle_in), operator.absolute(half_width_in), before.varies
    if mode in ("bcp", "paper") and operator.kernel_row_norms is not None:
        row_norms = operator.kernel_row_norms
    else:
        mask = varies if mode == "local" else jnp.ones(before.center.shape, bool)
        row_norms = operator.row_norms(mask)
    terms = before.center.size + operator.kernel.size
    reach = arithmetic.up(ball_radius * jnp.broadcast_to(row_norms, center.shape), terms)
    if own is not None:
        reach = jnp.minimum(reach, own)
    lower = larger(middle - half_width, center - reach)
    upper = smaller(middle + half_width, center + reach)
    lower, upper = arithmetic.widened(lower, upper, slack)
    # Without the outer minimum and maximum, rounding could leave the two intervals without a common point.
    lower, upper = smaller(lower, center), larger(upper, center)
    region = Region(center, ball_radius, lower, upper)
    return dataclasses.replace(region, radius=_half_diagonal(region, arithmetic))


def _half_diagonal(region: Region, arithmetic) -> jax.Array:
    """The distance from the center to the farthest corner of the box."""
    reach = larger(region.upper - region.center, region.center - region.lower)
    return arithmetic.length(reach)


def _live_rows(layers, i, region: Region, mode) -> tuple[jax.Array | None, bool]:
    """Rows of layer i that can move the output of the activation behind it, and whether there is one."""
    following = i + 1
    while type(layers[following]) is operators.Flatten:
        following += 1
    layer = layers[following]
    if not activations.is_activation(layer):
        return None, False
    lower, upper = region.lower, region.upper
    for flatten in layers[i + 1 : following]:
        lower, upper = flatten(lower), flatten(upper)
    mask = _checked(lambda z: activations.live_rows(layer, z, upper, mode), following, layer, lower)
    return mask.reshape(region.center.shape), True


def vector_shapes(network: nnx.Module, input_shape: Sequence[int]) -> tuple[tuple[int, ...], ...]:
    """Input shapes of the affine layers but the last: the shapes of the vectors of their power iterations."""
    layers = layers_of(network)
    x = jnp.zeros(tuple(input_shape), jnp.float32)
    shapes = []
    for layer in layers:
        if operators.is_affine(layer):
            shapes.append(x.shape)
            x = jax.eval_shape(operators.linear_operator(layer).affine, x)
        elif layer is not FORK and layer is not JOIN:
            x = jax.eval_shape(layer, x)
    return tuple(shapes[:-1])


def initial_vectors(network: nnx.Module, input_shape: Sequence[int], mode: str = "local", key: jax.Array | None = None):
    """Standard normal start vectors of one example, as `bound` takes them: as `Bound.vectors`.

    With a key they are those of ``bound(..., key=key)``, without one always the same: good to
    begin with where vectors are kept, easily hidden from if used in every step (see `bound`).
    """
    if mode not in MODES:
        raise ValueError(f"mode must be one of {', '.join(MODES)}, got {mode!r}.")
    key = jax.random.key(0) if key is None else key
    shapes = vector_shapes(network, input_shape)

    def starts(name):
        return (jax.random.normal(_start_key(key, name, k), s) for k, s in enumerate(shapes))

    return {name: tuple(starts(name)) for name in VECTORS_OF[mode]}


def _start_key(key, name, k):
    return jax.random.fold_in(jax.random.fold_in(key, SALTS[name]), k)


@jax.custom_jvp
def _not_trained_with(sigma: jax.Array) -> jax.Array:
    """`sigma`; to differentiate it is an error."""
    return sigma


@_not_trained_with.defjvp
def _refuse(primals, tangents):
    raise ValueError(
        "lipjax.bound was differentiated with neither key= nor vectors=: its power iterations "
        "would begin with the same vectors in every step, and a network trained so hides its "
        "norms from them. Pass key=, a fresh one in each step, or vectors=, the last step's "
        "Bound.vectors, best both: see the page 'Local Lipschitz as a regulariser', "
        "docs/regulariser.md. What is only watched takes jax.lax.stop_gradient(network)."
    )


def bound(
    network: nnx.Module,
    x: jax.Array,
    epsilon,
    *,
    mode: str = "local",
    iterations: int | None = None,
    vectors=None,
    key: jax.Array | None = None,
    rivals: int | None = None,
    products: str = "float32",
) -> Bound:
    """Local Lipschitz bound of one example, **an estimate**: its norms come from power iteration, from below.

    For certificates see `lipjax.certify`. Everything else in the bound is an upper bound: with exact norms,
    ``||h(x') - h(x)||_2`` stays within each region's radius and h(x') within its box for all ``||x' - x||_2 <= epsilon``.
    Differentiable in the network's parameters and in x (nothing is differentiated through the power iteration).

    **To train with it, pass `key`, fresh in each step, or `vectors`, kept from step to step, best
    both.** From a start that is always the same a network learns to hide its norms, so without
    either a gradient in the parameters of a norm is an error (one in x or epsilon alone is none).
    That key and vectors really change from step to step is up to you.
    Source: METHOD 1 and 2, after Huang et al., NeurIPS 2021; `mode="paper"` equals their code at convergence.

    Args:
        network: an nnx.Sequential of registered layers that ends in an affine layer.
        x: one example, ``(height, width, channels)`` or what the first layer takes; floats. `vmap` makes the batch.
        epsilon: l2 radius >= 0, in the units of x. At 0 every coordinate is constant and the norms are 0 (mode
            "global" knows no masks and is the same for all epsilon).
        mode: "global", "bcp", "paper", "local", "linear" or "rows", each at most the one before at convergence ("bcp" and
            "linear" in what `margins.worst_logits` makes of it; their `lipschitz` is that of "global", of "local"). "rows" is
            at most "local", and below "linear" wherever measured, but its slopes are others. "linear" costs a reverse pass
            for each rival class, "rows" one more for each neuron.
        iterations: power iterations per norm. 0 is allowed (the norm of the image of the start vector).
            None: `WARM_ITERATIONS`, 10, with `vectors`, else `FRESH_ITERATIONS`, 50.
        vectors: start vectors, a dict as in `Bound.vectors`; None: random ones. Under `vmap` the
            "global" ones are shared: ``in_axes={"global": None, "local": 0}``.
        key: a key of `jax.random`. Alone: the random start vectors are drawn from it. With
            `vectors`: they get a fresh part from it, or they may stay where the norm is not
            (`spectral.refresh`). Under `vmap` one key serves all examples, ``in_axes=None``: it has
            to be new in each step, not in each example, and with one for each the "global" norms
            are computed for each. None: random start vectors are the same in every call.
        rivals: of influence in modes "linear" and "rows": how many rival classes, those with the largest worst-case logits in
            mode "local", get the reverse pass that makes them tighter; None: all. To train at less cost.
        products: of the power iterations, as `spectral.power_iteration` takes it.

    Returns:
        A `Bound`.

    Raises:
        TypeError: unregistered layer or non-sequential network, by name; x not floating.
        ValueError: epsilon negative, infinite or NaN; unknown mode or products; iterations < 0; rivals < 1; x of a shape that a
            layer refuses; differentiated in a norm's parameters with neither `key` nor `vectors`.
    """
    check_epsilon(epsilon)
    if iterations is None:
        iterations = FRESH_ITERATIONS if vectors is None else WARM_ITERATIONS
    if iterations < 0:
        raise ValueError(f"iterations must be >= 0, got {iterations}.")
    layers = layers_of(network)
    x = jnp.asarray(x)
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise TypeError(f"x must be floating, with pixels in [0, 1], got {x.dtype}.")

    trainable = key is not None or vectors is not None

    def start_of(name, k, like):
        if vectors is not None:
            start = vectors[name][k].astype(like.dtype)
            return start if key is None else spectral.refresh(start, _start_key(key, name, k))
        if key is not None:
            return jax.random.normal(_start_key(key, name, k), like.shape, like.dtype)
        fixed = jax.random.fold_in(jax.random.key(0), ("local", "global").index(name))
        return jax.random.normal(jax.random.fold_in(fixed, k), like.shape, like.dtype)

    def power(name):
        def norm(k, operator, like, *masks):
            start = start_of(name, k, like)
            sigma, vector = spectral.power_iteration(operator, start, iterations, *masks, products)
            return sigma if trainable else _not_trained_with(sigma), vector

        return norm

    if mode not in MODES:
        raise ValueError(f"mode must be one of {', '.join(MODES)}, got {mode!r}.")
    if products not in PRODUCTS:
        raise ValueError(f"products must be one of {', '.join(PRODUCTS)}, got {products!r}.")
    if rivals is not None and rivals < 1:
        raise ValueError(f"rivals must be at least 1, or None for all, got {rivals}.")
    found = walk(layers, x, epsilon, mode, power("local"), power("global"))
    return dataclasses.replace(found, rivals=rivals)
