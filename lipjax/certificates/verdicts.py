"""The verdict of one example, and the programs that decide a batch of them."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp

from lipjax import bounds, rounding
from lipjax.graph import Activation
from lipjax.norms import best, chebyshev, closed, power
from lipjax.runtime import cpu

# Entries up to which a layer's matrix is written out (float64: 16 MB).
SMALL_MATRIX = 2**21
# Power iterations of each norm in the search for a radius.
RADIUS_ITERATIONS = 15
# Rivals of an image, the worst, whose slopes are improved by gradient steps.
STEPPED = 3


def verdict(
    graph,
    x,
    label,
    epsilon,
    mode,
    arithmetics,
    global_norms,
    local_norm,
    global_norm,
    joint_norm=None,
):
    """The verdict of one example, in float64, rounded outwards.

    A proof iff the norm functions bound from above.

    Args:
        graph: of the network, in float64.
        x, label, epsilon: one example, its class, and the radius.
        mode: name of the bound.
        arithmetics: how each equation of the graph rounds when the network is executed.
        global_norms: upper bounds of the linear nodes' whole norms, in order.
        local_norm, global_norm, joint_norm: as `bounds.Walk` takes them.

    Returns:
        What `facts_of` returns.
    """
    bound = outward_walk(graph, mode, local_norm, global_norm, joint_norm)(x, epsilon)
    worst = bounds.worst_logits(bound, label, rounding.OUTWARD, view)
    return judged(bound, label, worst, *allowances(bound, label, arithmetics, global_norms))


def outward_walk(graph, mode, local_norm, global_norm, joint_norm) -> bounds.Walk:
    """The walk of a proof: rounded outwards. Sound iff the norm functions bound from above."""
    norms = local_norm, global_norm
    return bounds.Walk(
        graph, bounds.mode_of(mode), *norms, view, rounding.OUTWARD, joint_norm=joint_norm
    )


def allowances(bound, label, arithmetics, global_norms):
    """What rounding can do to each logit: of the network's execution, and of the logits here.

    Args:
        bound: of one example, rounded outwards.
        label, arithmetics, global_norms: as in `verdict`.

    Returns:
        Two arrays ``(classes,)``: how far the difference of a logit as executed to the label's can
        be from the exact one, anywhere in the ball, and how far the logit that is computed here can
        be.
    """
    outward = rounding.OUTWARD
    x = bound.input.center
    epsilon = bound.input.radius
    boxes = [outward.widened(x - epsilon, x + epsilon, 0.0)]
    boxes += [(region.lower, region.upper) for region in bound.regions[1:]]
    executed = rounding.forward_error(bound.graph, boxes, arithmetics, global_norms, view, label)

    head = bound.graph.linear_nodes[-1]
    lower, upper = boxes[head.inputs[0]]
    return executed, outward.slack(view(head.operator, lower), lower, upper)


def judged(bound, label, worst, executed, own):
    """The verdict from worst-case logits and what `allowances` says."""
    # The two sums below round once more each.
    own = own + 8 * rounding.DOUBLE * (jnp.abs(worst) + own + executed)

    def taken_off(allowance):
        return jnp.where(jnp.arange(worst.shape[0]) == label, worst - allowance, worst + allowance)

    ideal = taken_off(own)
    real = taken_off(own + executed)
    return facts_of(bound, label, real, bounds.margin(ideal, label) - bounds.margin(real, label))


def facts_of(bound, label, worst, extra):
    """Verdict and figures of one example.

    Args:
        bound: of the example.
        label: its class.
        worst: worst-case logits, with everything taken off that is known of rounding.
        extra: how much the execution's rounding has taken off the margin.
    """
    margin = bounds.margin(worst, label)
    predicted = jnp.argmax(bound.logits)
    # An overflow or NaN anywhere, even one that a mask or a minimum hides later, is a reason not to
    # certify.
    largest = min(rounding.LARGEST, float(jnp.finfo(margin.dtype).max))
    numbers = jax.tree.leaves((bound.regions, bound.norms, bound.graph))
    numbers = [leaf for leaf in numbers if jnp.issubdtype(jnp.result_type(leaf), jnp.floating)]
    sound = jnp.array([jnp.all(jnp.abs(leaf) < largest) for leaf in numbers])
    constant = []
    stable = []
    for node, after in zip(bound.graph.nodes, bound.regions, strict=True):
        if isinstance(node, Activation):
            before = bound.regions[node.inputs[0]]
            constant.append(~after.varies)
            stable.append(node.rule.stable(before.lower, before.upper) & after.varies)
    return {
        "predicted": predicted,
        "correct": predicted == label,
        "ok": (predicted == label) & (margin > 0) & jnp.all(sound) & jnp.isfinite(margin),
        "margin": margin,
        "allowance": extra,
        "lipschitz": bound.lipschitz,
        "norms": jnp.stack(bound.norms) if bound.norms else jnp.zeros((0,), margin.dtype),
        "constant": _shares(constant, margin.dtype),
        "stable": _shares(stable, margin.dtype),
    }


def _shares(masks, dtype):
    """The share of each mask that is True."""
    if not masks:
        return jnp.zeros((0,), dtype)
    return jnp.stack([jnp.mean(mask.astype(dtype)) for mask in masks])


def view(operator, like):
    """The map as an explicit matrix, which compiles and runs quickly, where that is small."""
    outputs = jax.eval_shape(operator, like).size
    return operator.materialized(like) if like.size * outputs <= SMALL_MATRIX else operator


def norm_of_tier(
    tier, failure_probability, budget, whole_norms, k, start, operator, like, mask_in, mask_out
):
    """The norm of a masked linear map, bounded as the tier does.

    Args:
        tier, failure_probability, budget: as in `certify_batch`.
        whole_norms: a `norms.best.WholeNorm` of each of the first maps.
        k: which map it is.
        start: gives a fresh block of `chebyshev.starts`, in tier "probabilistic".
        operator, like, mask_in, mask_out: as in `norms.best.norm_bound`.
    """
    whole = whole_norms[k] if k < len(whole_norms) else None

    def bound(operator, *masks):
        if tier == "deterministic":
            known = math.inf if whole is None else whole.bound
            return best.norm_bound(operator, like, *masks, global_bound=known, budget=budget)
        drawn = chebyshev.inflated_norm_bound(operator, start(), failure_probability, like, *masks)
        return jnp.minimum(drawn, closed.schur_bound(operator, like, *masks))

    given = operator, mask_in, mask_out
    return bound(*given) if whole is None else whole.unless_masked(bound, *given)


def certify_batch(
    shared, columns, *, mode, tier, failure_probability, arithmetics, budget, keep=False
):
    """The verdicts of a batch, by the norms of the tier.

    Args:
        shared: graph, whole norms, and the key of all draws.
        columns: images, labels, radii, and places in the whole call.
        failure_probability: of each norm bound.
        keep: return also the bounds without their graphs, and the worst-case logits, as
            `tightened_batch` takes them.
    """
    graph, whole_norms, key = shared
    global_norms = [norm.bound for norm in whole_norms]
    # What all images share is drawn once, so its key must not depend on the example; indices make
    # the others independent of how the images are batched.
    global_key, local_key = jax.random.split(key)
    sizes = [math.prod(graph.nodes[node.inputs[0]].shape) for node in graph.linear_nodes[:-1]]
    first = len(sizes)  # of those of two maps as one
    sizes += bounds.joined_sizes(graph)

    def norm_function(salt):
        starts = chebyshev.starts(salt, sizes) if tier == "probabilistic" else ()
        of_tier = functools.partial(
            norm_of_tier, tier, failure_probability, budget, whole_norms[:first]
        )

        def norm(k, operator, *like_and_masks):
            return of_tier(k, lambda: starts[k], operator, *like_and_masks), None

        return norm

    def one(x, label, epsilon, index):
        local_norm = norm_function(jax.random.fold_in(local_key, index))
        global_norm = norm_function(global_key)

        def joint_norm(k, *arguments):
            return local_norm(first + k, *arguments)

        bound = outward_walk(graph, mode, local_norm, global_norm, joint_norm)(x, epsilon)
        worst = bounds.worst_logits(bound, label, rounding.OUTWARD, view)
        facts = judged(bound, label, worst, *allowances(bound, label, arithmetics, global_norms))
        if not keep:
            return facts, None
        # In one mode: what follows is the same program, whichever it was.
        kept = dataclasses.replace(bound, graph=None, vectors=None, mode="tight")
        return facts, (kept, worst)

    return jax.vmap(one)(*columns)


def tightened_batch(shared, columns, *, arithmetics, steps=0):
    """Verdicts of a batch from bounds that are known already, in mode "tight".

    Args:
        shared: graph and global norms.
        columns: labels, and what was kept: bounds of a walk in mode "local", "tight" (which have
            the same regions) or "tight_rows", and worst-case logits.
        arithmetics: as in `verdict`.
        steps: at most so many gradient steps on the slopes of the worst `STEPPED` rivals.

    Returns:
        Facts as of `certify_batch`, and "worst", the logits. With `steps` also "rivals"
        ``(n, STEPPED)``, the classes whose slopes were improved, -1 for none, and "slopes"
        ``(n, STEPPED, slopes)``, as `bounds.tight.improved` returns them.
    """
    graph, global_norms = shared

    def one(label, bound, worst):
        bound = dataclasses.replace(bound, graph=graph, mode="tight")
        executed, own = allowances(bound, label, arithmetics, global_norms)
        if not steps:
            worst = bounds.margins.tightened(bound, label, worst, rounding.OUTWARD, view)
            return {**judged(bound, label, worst, executed, own), "worst": worst}

        # Twice the allowances: what the sums of `judged` round is far less.
        classes = worst.shape[0]
        lead = bound.logits[label] - bound.logits - 2 * (executed + own)
        lead = lead - 2 * (executed + own)[label]
        gains = worst - bound.logits
        short = jnp.where(jnp.arange(classes) == label, -jnp.inf, gains - lead)
        least, chosen = jax.lax.top_k(short, min(STEPPED, classes - 1))
        open_ = least >= 0
        # Rounded to bytes the slopes may be worth a little less.
        goals = jnp.where(open_, 0.998 * lead[chosen], jnp.inf)
        rows = bounds.margins.directions(graph, bound.penultimate, label)[chosen]
        found, slopes = bounds.tight.improved(bound, rows, goals, steps, view)
        less = open_ & (found < gains[chosen])
        better = jnp.where(less, found, gains[chosen])
        worst = worst.at[chosen].set(bound.logits[chosen] + better)
        facts = judged(bound, label, worst, executed, own)
        rivals = jnp.where(less, chosen, -1)
        return {**facts, "worst": worst, "rivals": rivals, "slopes": slopes}

    return jax.vmap(one)(*columns)


def radius_batch(shared, columns, *, mode, arithmetics):
    """The largest radius, to about 1 %, at which the verdict is positive with estimated norms."""
    graph, global_norms, max_radius = shared

    def norm(k, operator, like, mask_in, mask_out):
        start = jax.random.normal(jax.random.fold_in(jax.random.key(0), k), like.shape, like.dtype)
        return power.power_iteration(operator, start, RADIUS_ITERATIONS, mask_in, mask_out)

    def one(x, label):
        def robust(epsilon):
            same = graph, x, label, epsilon, mode, arithmetics, global_norms
            facts = verdict(*same, norm, norm, norm)
            return facts["ok"]

        def halve(_, bracket):
            low, high = bracket
            # Halved in the logarithm once something is known to hold, so that small radii are as
            # precise as large ones.
            middle = jnp.where(low > 0, jnp.sqrt(jnp.maximum(low, 1e-12) * high), high / 4)
            good = robust(middle)
            return jnp.where(good, middle, low), jnp.where(good, high, middle)

        low, _ = jax.lax.fori_loop(0, 12, halve, (jnp.zeros_like(max_radius), max_radius))
        return {"radius": low}

    return jax.vmap(one)(*columns)


@cpu.for_cpu
def estimate_batch(shared, columns, *, mode, iterations):
    """As `certify_batch`, from power iterations: proves nothing."""
    graph, epsilon = shared

    def one(x, label):
        bound = bounds.bound(graph, x, epsilon, mode=mode, iterations=iterations)
        return facts_of(bound, label, bounds.worst_logits(bound, label), 0.0)

    return jax.vmap(one)(*columns)
