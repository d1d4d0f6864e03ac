"""The page of a certificate that `lipjax.certify` returned: the same page as certify.py's, of what
is known.

Nothing is attacked and nothing is proved here: what a certificate does not hold, robust accuracy
under attack and radii above all, the page says is not known.
"""

import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from lipjax.certificates import Certificate, CertifiedRadius
from lipjax.formats import certificate_files
from lipjax.formats.files import replaced
from lipjax.report import page, pictures

# Stands for the label of an image that was predicted wrong, where labels were not given.
NOT_GIVEN = -1


def write(
    path,
    certificate,
    network=None,
    images=None,
    labels=None,
    *,
    title: str | None = None,
    indices=None,
    data: Mapping[str, Any] | None = None,
    epsilon: float | None = None,
) -> None:
    """Writes the page of a certificate: one HTML file, which loads nothing.

    A kill leaves the old file or the new, never a part. Of each image the page shows what the
    certificate says; without `network`, `images` or `labels` the parts that need them are left out:
    kinds and shapes of the layers and the hashes; pictures; classes.

    Args:
        path: the file, by custom ``*.html``.
        certificate: what `lipjax.certify` or `lipjax.certified_radius` returned. Of radii Lipschitz
            constants and neurons are left out: each is of a ball of its own.
        network: what was certified, as it was given to `certify`; traced on an image.
        images, labels: ``(N, ...)`` and ``(N,)``, as they were given to `certify`. Images
            ``(H, W)`` and ``(H, W, C)`` are shown.
        title: of the page; by default the name of the data and epsilon.
        indices: ``(N,)`` positions of the images in their source split; 0 .. N - 1 if None.
        data: what the images are: "name" and "split", as strings; the split is "given" if it is
            not said.
        epsilon: of radii, which need one: what has a radius of at least that is certified there.

    Raises:
        TypeError: no certificate (of estimates there is no page); `network` has no bound.
        ValueError: images, labels, indices or network that are not those of the certificate; a
            network without images; radii without an epsilon > 0, or one for a certificate, which
            has its own.
        ImportError: images are to be shown, and Pillow is not installed.
        OSError: the file cannot be written.
    """
    if not isinstance(certificate, Certificate | CertifiedRadius):
        raise TypeError(
            f"a page is made of what lipjax.certify or certified_radius returns, got a "
            f"{type(certificate).__name__}."
        )
    at = _epsilon(certificate, epsilon)
    about = dict(data or {})
    known = {"data": about.pop("name", None), "split": about.pop("split", "given"), "title": title}
    if about:
        raise ValueError(f'data takes "name" and "split", got also {", ".join(map(repr, about))}.')
    if network is not None and images is None:
        raise ValueError("the network is traced on an image: give the images too, or neither.")

    # Opened before the work: a folder that cannot be written to is known at once.
    with replaced(Path(path)) as file:
        columns = _columns(certificate, labels, indices, at)
        known["epsilon"] = at
        summary = _summary(certificate, network, images, columns, known)
        text = page.page(summary, columns, _examples(certificate, images, columns))
        file.write(text.encode("utf-8", "replace"))


def _epsilon(certificate: Certificate | CertifiedRadius, given: float | None) -> float:
    """The epsilon that the page is about; errors as of `write`."""
    if isinstance(certificate, Certificate) and given is None:
        return certificate.epsilon
    if isinstance(certificate, CertifiedRadius) and given is not None and 0 < given < np.inf:
        return float(given)
    raise ValueError(
        "a page of radii needs epsilon > 0, at which to show them, and that of a certificate has "
        f"its own: got {given} for a {type(certificate).__name__}."
    )


def _columns(certificate, labels, indices, epsilon) -> dict[str, np.ndarray]:
    """What is known of each image, by the names of examples.npz."""
    count = len(certificate.predicted)
    if labels is None:
        labels = np.where(certificate.correct, certificate.predicted, NOT_GIVEN)
    labels = np.asarray(labels)
    indices = np.arange(count) if indices is None else np.asarray(indices)
    for name, array in (("labels", labels), ("indices", indices)):
        if array.shape != (count,):
            raise ValueError(f"the certificate is of {count} images, got {name} {array.shape}.")
    if not np.array_equal(certificate.correct, certificate.predicted == labels):
        raise ValueError(
            "certificate.correct is not predicted == label: pass the labels that certify was given."
        )
    mode = certificate.mode
    columns = {"index": indices, "label": labels, "predicted": certificate.predicted}
    if isinstance(certificate, CertifiedRadius):
        return columns | {
            f"certified_{mode}": certificate.radius >= epsilon,
            "certified_radius": certificate.radius,
        }
    return columns | {
        f"certified_{mode}": certificate.certified,
        f"margin_{mode}": certificate.margin,
        f"lipschitz_{mode}": certificate.lipschitz,
    }


def _summary(certificate, network, images, columns, known) -> dict[str, Any]:
    """What is known of the whole, by the names of summary.json."""
    import jax

    mode = certificate.mode
    layers, classes, hashes = _of_network(certificate, network, images, columns["label"])
    facts = ("tier", "failure_probability", "seed", "seed_from", "arithmetic", "backend")
    run = {name: getattr(certificate, name) for name in (*facts, "left_out", "precision")}
    return {
        "run": {
            **run,
            **known,
            "curve_mode": mode,
            "early": False,
            "note": "",
            "network": getattr(network, "__name__", type(network).__name__)
            if network is not None
            else "",
            "versions": certificate_files.versions(),
            "device": f"{jax.device_count()} × {jax.devices()[0].device_kind}",
        },
        "clean_accuracy": float(np.mean(certificate.correct)),
        "modes": {mode: _of_bound(certificate, columns[f"certified_{mode}"])},
        "pgd_curve": None,
        "classes": classes,
        "activations": layers,
        "config": {},
        "commands": None,
        "files": hashes,
    }


def _of_bound(certificate, certified: np.ndarray) -> dict[str, Any]:
    """What is known of the bound, by the names of summary.json."""
    if isinstance(certificate, CertifiedRadius):
        return {"certified_accuracy": float(np.mean(certified)), "examined": len(certified)}
    examined = np.isfinite(certificate.lipschitz)
    rows = examined if np.any(examined) else ~examined
    return {
        "certified_accuracy": float(np.mean(certified)),
        "examined": int(np.sum(examined)),
        "median_lipschitz": float(np.median(certificate.lipschitz[rows])),
        "constant_share": np.mean(certificate.constant[rows], axis=0).tolist(),
        "stable_share": np.mean(certificate.stable[rows], axis=0).tolist(),
        "stages": [run.counted() for run in certificate.stages],
    }


def _of_network(certificate, network, images, labels):
    """Its activations, how many classes it has (None: not known), and hashes of what is known."""
    count = None if isinstance(certificate, CertifiedRadius) else certificate.constant.shape[1]
    if network is None:
        return [{"kind": "activation", "shape": []}] * (count or 0), None, {}

    images = np.asarray(images)
    layers = page.activation_layers(network, images.shape[1:])
    if count is not None and len(layers) != count:
        raise ValueError(
            f"the network has {len(layers)} activations, and the certificate is of one with "
            f"{count}: give the network that was certified."
        )
    one = np.empty(images.shape[1:], images.dtype)
    try:
        nodes = certificate_files.describe(network, one, arithmetic=certificate.arithmetic)
    except TypeError:  # it has no plain description, as its certificate file would say
        return layers, None, {}
    hashes = {"network": certificate_files.network_hash(nodes)}
    if np.all(labels != NOT_GIVEN):
        hashes["data"] = certificate_files.data_hash(images, labels)
    return layers, int(nodes[-1]["shape"][-1]), {"what this page is about": hashes}


def _examples(certificate, images, columns) -> dict[str, np.ndarray]:
    """The images that are shown, by the names of gallery.npz; {} where there are none."""
    if images is None:
        return {}
    images = np.asarray(images)
    count = len(certificate.predicted)
    if len(images) != count:
        raise ValueError(f"the certificate is of {count} images, got {len(images)}.")
    if images.ndim == 3:
        images = images[..., np.newaxis]
    if images.ndim != 4:
        return {}
    if importlib.util.find_spec("PIL") is None:
        raise ImportError("the page's pictures need Pillow: pip install pillow, or give no images.")
    chosen = pictures.select(columns, certificate.mode, [certificate.mode])
    rows = np.array([row for _, row in chosen], np.int64)
    return {
        "group": np.array([group for group, _ in chosen]),
        "row": rows,
        "image": np.asarray(images[rows], np.float32),
    }
