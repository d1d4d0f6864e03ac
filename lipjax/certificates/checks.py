"""What can be certified: networks, images and labels, and errors that say what is wrong."""

import jax
import jax.numpy as jnp
import numpy as np

from lipjax import bounds
from lipjax.graph import Graph

TIERS = ("probabilistic", "deterministic")


def certifiable(
    network, images, tier, failure_probability, arithmetic, name: str = "images"
) -> Graph:
    """The graph of a network, traced in the types in which it will be executed.

    Args:
        images: ``(N, ...)``, what it will be executed on; `name` is what the caller calls them.

    Raises:
        ValueError, TypeError: arguments that prove nothing; what has no bound; parameters that are
            no numbers; images that the device would round first.
    """
    if tier not in TIERS:
        raise ValueError(
            f"tier must be one of {', '.join(TIERS)}, got {tier!r}. (An estimate is no "
            "certificate: see lipjax.estimate.)"
        )
    if not 0 < failure_probability < 1:
        raise ValueError(f"failure_probability must lie in (0, 1), got {failure_probability}.")
    _check_exact(images, example_of(images, arithmetic).dtype, name)
    _check_finite(network)
    with as_executed(arithmetic):
        graph = bounds.graph_of(network, example_of(images, arithmetic))
        again = bounds.graph_of(network, example_of(images, arithmetic))
    for node in graph.nodes:
        for leaf in jax.tree.leaves(node):
            if not np.all(np.isfinite(np.asarray(leaf, np.float64))):
                raise ValueError(f"{node.where}: a parameter holds NaN or infinity.")
    if not _same(graph, again):
        raise ValueError(
            "the network computes something else each time it is traced (a parameter that changes "
            "when it is read, random numbers of Python): what will be executed is not known."
        )
    return graph


def as_executed(arithmetic: str | None):
    """With JAX's 64 bits where float64 is declared, else as this process has them."""
    wide = jax.config.jax_enable_x64  # type: ignore[attr-defined]
    return jax.enable_x64(arithmetic == "float64" or wide)


def checked_images(images) -> np.ndarray:
    """Images ``(N, ...)``, float32 or float64 in [0, 1].

    Raises:
        TypeError: another type.
        ValueError: no batch, an empty one, or pixels outside [0, 1].
    """
    images = np.asarray(images)
    if images.ndim < 2 or len(images) == 0:
        raise ValueError(f"images must be a non-empty batch (N, ...), got shape {images.shape}.")
    if not jnp.issubdtype(images.dtype, jnp.floating):
        raise TypeError(
            f"images must be floats in [0, 1], got {images.dtype}: divide 0..255 integers by 255."
        )
    if images.dtype not in (np.float32, np.float64):
        raise TypeError(
            f"images must be float32 or float64, got {images.dtype}: layers would compute in "
            "that type, and what is certified is the network on float32 images. Give it, and "
            "execute it on, images.astype(np.float32)."
        )
    low = images.min()
    high = images.max()
    if not (low >= 0 and high <= 1):  # a NaN fails too
        raise ValueError(
            f"images must lie in [0, 1], got {low} to {high}: epsilon is an l2 radius on pixels in "
            "[0, 1]. Divide 0..255 images by 255; do not normalise before the network."
        )
    return images


def checked_labels(graph: Graph, images, labels) -> np.ndarray:
    """Labels ``(N,)`` as int32, those predicted for None.

    Raises:
        ValueError: they do not fit the images or the classes; a network of one class.
    """
    if labels is None:
        labels = np.asarray(predict(graph, jnp.asarray(images)))
    labels = np.asarray(labels)
    if labels.shape != (len(images),) or not np.issubdtype(labels.dtype, np.integer):
        raise ValueError(
            f"labels must be {len(images)} integers, got {labels.dtype} of shape {labels.shape}."
        )
    (classes,) = graph.shape
    if classes < 2:
        raise ValueError(
            f"a network of {classes} class has no rival class to exclude: nothing to certify."
        )
    if labels.min() < 0 or labels.max() >= classes:
        raise ValueError(
            f"labels must lie in 0..{classes - 1}, got {labels.min()} to {labels.max()}."
        )
    return labels.astype(np.int32)


@jax.jit
def predict(graph: Graph, images):
    """Classes of a batch."""
    return jax.vmap(lambda x: jnp.argmax(graph(x)))(images)


def examined_rows(examine, count: int) -> np.ndarray:
    """Positions of the images to decide.

    Raises:
        ValueError: `examine` is not `count` booleans.
    """
    examine = np.ones(count, bool) if examine is None else np.asarray(examine)
    if examine.shape != (count,) or examine.dtype != bool:
        raise ValueError(
            f"examine must be {count} booleans, got {examine.dtype} of shape {examine.shape}."
        )
    return np.flatnonzero(examine)


def example_of(images: np.ndarray, arithmetic: str | None) -> jax.ShapeDtypeStruct:
    """One image as the network gets it: by this process, or in the arithmetic that is declared."""
    if arithmetic == "float64":
        dtype = np.dtype(arithmetic)
    else:
        dtype = jax.dtypes.canonicalize_dtype(images.dtype)
    return jax.ShapeDtypeStruct(images.shape[1:], dtype)


def normal(radii: np.ndarray) -> np.ndarray:
    """Radii of which none is so small that a device takes it for 0: those are raised."""
    return np.where(radii > 0, np.maximum(radii, np.finfo(np.float64).tiny), radii)


def _check_exact(images: np.ndarray, dtype: np.dtype, name: str) -> None:
    """Raises a ValueError if images change when they become the type in which they are executed."""
    with np.errstate(over="ignore", under="ignore"):
        executed = images.astype(dtype)
    if not np.array_equal(executed, images):
        raise ValueError(
            f"{name} are {images.dtype} and would be rounded to {dtype} before the network sees "
            f"them, as JAX has 64 bits off: what is executed are other {name}. Give "
            f"{name}.astype(np.{dtype}), here and to the network, or turn on jax_enable_x64."
        )


def _check_finite(network) -> None:
    """Raises a ValueError that names the parameter of a module that holds NaN or infinity."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(network):
        if not isinstance(leaf, jax.Array | np.ndarray):
            continue
        real = jnp.issubdtype(leaf.dtype, jnp.floating)
        if real and not np.all(np.isfinite(np.asarray(leaf, np.float64))):
            name = jax.tree_util.keystr(path, simple=True, separator=".")
            raise ValueError(f"parameter {name} of the network holds NaN or infinity.")


def _same(first: Graph, second: Graph) -> bool:
    """Do two graphs compute the same, bit for bit?"""
    ours, form = jax.tree.flatten(first)
    theirs, other = jax.tree.flatten(second)
    if form is None or form != other:
        return False
    return all(map(np.array_equal, ours, theirs))
