"""Augmentation on the device."""

import jax
import jax.numpy as jnp


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
