"""Augmentation on the device."""

import functools
import math

import jax
import jax.numpy as jnp
from jax.scipy.ndimage import map_coordinates


def random_crop_and_flip(
    images: jax.Array, key: jax.Array, *, padding: int = 4, first=0
) -> jax.Array:
    """Each image zero-padded by `padding`, cropped at random to its size and mirrored with
    probability 1/2.

    Args:
        images: ``(batch, height, width, channels)``.
        key: randomness of the whole batch; the same key gives the same result.
        first: place in the batch of the first of these images: what becomes of an image depends on
            its place, not on which others are here. May be traced.
    """
    height, width, channels = images.shape[1:]
    padded = jnp.pad(images, [(0, 0), (padding, padding), (padding, padding), (0, 0)])

    def one(image, place):
        offset_key, flip_key = jax.random.split(jax.random.fold_in(key, place))
        offset = jax.random.randint(offset_key, (2,), 0, 2 * padding + 1)
        crop = jax.lax.dynamic_slice(image, (offset[0], offset[1], 0), (height, width, channels))
        return jnp.where(jax.random.bernoulli(flip_key), crop[:, ::-1], crop)

    return jax.vmap(one)(padded, first + jnp.arange(len(images)))


def random_rotation(images: jax.Array, key: jax.Array, degrees: float, *, first=0) -> jax.Array:
    """Each image turned about its middle by a random angle of at most `degrees`, either way.

    Pixels are interpolated linearly, with 0 around the image, so that they stay in [0, 1].

    Args:
        images: ``(batch, height, width, channels)``.
        key, first: as of `random_crop_and_flip`.
        degrees: >= 0; angles are uniform.
    """
    height, width = images.shape[1:3]
    middle = (height - 1) / 2, (width - 1) / 2
    rows, columns = jnp.meshgrid(
        jnp.arange(height) - middle[0], jnp.arange(width) - middle[1], indexing="ij"
    )

    def one(image, place):
        share = jax.random.uniform(jax.random.fold_in(key, place), minval=-1.0, maxval=1.0)
        angle = share * math.radians(degrees)
        cosine, sine = jnp.cos(angle), jnp.sin(angle)
        sources = [
            cosine * rows + sine * columns + middle[0],
            cosine * columns - sine * rows + middle[1],
        ]
        turned = functools.partial(map_coordinates, coordinates=sources, order=1)
        return jax.vmap(turned, in_axes=-1, out_axes=-1)(image)

    return jax.vmap(one)(images, first + jnp.arange(len(images)))
