"""Folders of image files: a class is a folder.

    train/<class>/...  and  test/<class>/...  (or val/, validation/, valid/)

Images lie at any depth below their class. Hidden files and folders (a name that begins with a dot)
are no data: editors and file managers leave ``.ipynb_checkpoints`` and ``._cat.png`` behind. Links
are followed. In TinyImageNet's layout the test images lie together in ``val/images``, and
``val/val_annotations.txt`` names their classes.
"""

import dataclasses
import os
from pathlib import Path

import numpy as np

from lipjax.data.dataset import Dataset, in_memory, pair
from lipjax.data.errors import DataError
from lipjax.data.images import Undecodable, Unsuitable, decode, pixels

# Endings of image files, whatever their case.
ENDINGS = (
    *(".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff"),
    *(".ppm", ".pgm", ".pbm", ".jp2", ".avif", ".jfif"),
)
# Images that are not read; to leave them out silently would be another data set.
UNREAD = (".heic", ".heif", ".jxl", ".tga", ".dcm", ".npy", ".dng", ".exr", ".svg")
# Where test images may be; the first that is there is taken.
TEST_FOLDERS = ("test", "val", "validation", "valid")
ANNOTATIONS = Path("val", "val_annotations.txt")

LAYOUT = "train/<class>/*.png and test/<class>/*.png (or val/<class>/*.png)"

# So many classes at most are named in a message.
NAMED = 5


@dataclasses.dataclass(frozen=True)
class ImageFiles:
    """The files of a folder.

    Attributes:
        classes: their names, in the order of their numbers.
        splits: for "train" and "test", ``(path, label)`` of each image, in `sets.load`'s order.
        note: a disclosure as of `dataset.Dataset`: classes without images, images left aside.
    """

    classes: list[str]
    splits: dict[str, list[tuple[Path, int]]]
    note: str


def load(name: str, image_size: int | None) -> tuple[Dataset, Dataset]:
    """The set of "folder:<path>", in memory.

    Raises:
        DataError: as `image_files`; an image that is damaged, of more than 8 bits, or of another
            size than the others without an image_size.
    """
    found = image_files(Path(name.removeprefix("folder:")))
    parts = []
    for split, files in found.splits.items():
        images: list[np.ndarray] = []
        for path, _ in files:
            images.append(_pixels(path, image_size))
            if images[-1].shape != images[0].shape:
                raise DataError(
                    f"{path} is {images[-1].shape}, {files[0][0]} is {images[0].shape}: resize "
                    "them to one size, or give an image_size (--config.data.image_size=64)."
                )
        labels = [label for _, label in files]
        part = in_memory(name, split, np.stack(images), labels, classes=len(found.classes))
        parts.append(dataclasses.replace(part, note=found.note))
    return pair(name, *parts)


def _pixels(path: Path, image_size: int | None) -> np.ndarray:
    try:
        return pixels(decode(path.read_bytes(), as_seen=True), image_size)
    except (OSError, Undecodable) as error:
        raise unreadable(path, error) from error


def unreadable(path: Path, error: Exception) -> DataError:
    """The error about a file that gives no 8-bit image."""
    state = "cannot be read right" if isinstance(error, Unsuitable) else "is damaged"
    return DataError(f"{path} {state}: {error}. Replace or remove it.")


# ----------------------------------------------------------------------------------- what is there


def image_files(root: Path) -> ImageFiles:
    """What a folder of images holds; nothing is opened.

    Raises:
        DataError: another layout; images that belong to no class; a class of which there is no
            training image, unless ``wnids.txt`` lists it; a class in the test split alone; a split
            without images.
    """
    root = root.expanduser()
    if not (root / "train").is_dir():
        raise DataError(_no_layout(root))
    listed = root / "wnids.txt"
    if listed.is_file():
        names = sorted(_text(listed).split())
    else:
        names = [path.name for path in _folders(root / "train")]
    number = {name: i for i, name in enumerate(names)}

    # A class that is listed may be absent: subsets of TinyImageNet keep the list.
    train = _by_class(root / "train", number)
    present = {names[label] for _, label in train}
    absent = [name for name in names if name not in present]
    if not train or (absent and not listed.is_file()):
        where = _named([str(root / "train" / name) for name in absent]) or str(root / "train")
        raise DataError(
            f"{where}: no images found ({', '.join(ENDINGS)}, at any depth). A class is a folder "
            "in train/: remove one that is none, or put its images there."
        )

    if (root / ANNOTATIONS).is_file():
        folder = root / "val" / "images"
        test = _annotated(root, number)
    else:
        folder = _test_folder(root, number)
        test = _by_class(folder, number)
    if not test:
        raise DataError(f"{root}: no test images found in {folder}; expected {LAYOUT}.")
    tested = {names[label] for _, label in test}
    untested = [name for name in names if name not in tested]
    return ImageFiles(names, {"train": train, "test": test}, _note(root, folder, absent, untested))


def _note(root: Path, folder: Path, absent: list[str], untested: list[str]) -> str:
    """What has to be said of a folder beside figures; mostly nothing."""
    facts = []
    for split, missing in (("training", absent), ("test", untested)):
        if missing:
            facts.append(f"no {split} image of {len(missing)} classes: {_named(missing)}")
    unused = [name for name in TEST_FOLDERS if (root / name).is_dir() and name != folder.name]
    if unused and not (root / ANNOTATIONS).is_file():
        facts.append(f"the test images are those of {folder.name}/, {_named(unused)}/ is not read")
    return "; ".join(facts)


def _named(names: list[str]) -> str:
    """Some names, and how many there are if these are not all."""
    more = f", ... ({len(names)} in all)" if len(names) > NAMED else ""
    return ", ".join(names[:NAMED]) + more


def _no_layout(root: Path) -> str:
    """What to say of a folder without train/."""
    if not root.is_dir():
        return f"{root.absolute()} is no folder; expected one with {LAYOUT}."
    inner = [path for path in _folders(root) if (path / "train").is_dir()]
    if inner:
        return f"{root.absolute()} has no train/, but {inner[0]} has: give folder:{inner[0]}."
    return (
        f"{root.absolute()} has no train/: expected {LAYOUT}, or TinyImageNet's layout "
        f"(train/<class>/images/*, val/images/*, {ANNOTATIONS}). It holds "
        f"{_named(sorted(path.name for path in root.iterdir())) or 'nothing'}."
    )


def _test_folder(root: Path, number: dict[str, int]) -> Path:
    """The folder of the test images, which lie in folders of their classes."""
    for name in TEST_FOLDERS:
        if (root / name).is_dir() and any(p.name in number for p in _folders(root / name)):
            return root / name
    raise DataError(
        f"{root.absolute()} has no test images: expected {LAYOUT}, with the classes of train/. "
        "Training never selects by them; if there are none, move some of each class there."
    )


def _by_class(folder: Path, number: dict[str, int]) -> list[tuple[Path, int]]:
    """Images in folders of their classes, class by class, in the order of their paths."""
    loose = [path for path in _entries(folder) if path.is_file() and _is_image(path)]
    if loose:
        raise DataError(
            f"{loose[0]} belongs to no class: expected {folder.name}/<class>/{loose[0].name}."
        )
    strange = [path.name for path in _folders(folder) if path.name not in number]
    if strange:
        raise DataError(
            f"{folder}: {_named(strange)} is no class of the training set, which has "
            f"{_named(list(number))}."
        )
    return [(path, label) for name, label in number.items() for path in images_below(folder / name)]


def images_below(folder: Path) -> list[Path]:
    """The image files at any depth, sorted; links are followed, hidden names left out.

    Raises:
        DataError: a folder that is there twice, as by a link to one above it; a link to nothing; a
            folder that cannot be read; images of a kind that is not read.
    """

    def refuse(error: OSError):
        if folder.is_dir():
            raise DataError(f"{error.filename} cannot be read: {error.strerror}.")

    found: list[Path] = []
    seen: dict[str, str] = {}
    for place, folders, files in os.walk(folder, followlinks=True, onerror=refuse):
        before = seen.setdefault(os.path.realpath(place), place)
        if before != place:
            raise DataError(f"{place} is {before} once more, by a link: remove one of them.")
        folders[:] = [name for name in folders if not name.startswith(".")]
        found += [Path(place, name) for name in files if not name.startswith(".")]
    for path in found:
        if not path.exists():
            raise DataError(f"{path} is a link to nothing: remove it, or bring the image back.")
        if path.suffix.lower() in UNREAD:
            raise DataError(
                f"{path} is not read, only {', '.join(ENDINGS)}: convert it, or remove it."
            )
        if _is_image(path) and not path.is_file():  # to open a pipe would wait for ever
            raise DataError(f"{path} is called as an image is, and is no file: remove it.")
    return sorted(path for path in found if _is_image(path))


def _is_image(path: Path) -> bool:
    return path.suffix.lower() in ENDINGS and not path.name.startswith(".")


def _entries(folder: Path) -> list[Path]:
    found = sorted(path for path in folder.iterdir() if not path.name.startswith("."))
    for path in found:
        if not path.exists():
            raise DataError(f"{path} is a link to nothing: remove it, or bring the folder back.")
    return found


def _folders(folder: Path) -> list[Path]:
    return [path for path in _entries(folder) if path.is_dir()]


# ------------------------------------------------------------------------------------ TinyImageNet


def _annotated(root: Path, number: dict[str, int]) -> list[tuple[Path, int]]:
    """The images of val/images, with the classes that val_annotations.txt says."""
    labels: dict[str, int] = {}
    for position, line in enumerate(_text(root / ANNOTATIONS).splitlines(), 1):
        if line.strip():
            file, label = _annotation(root, position, line, number)
            labels[file] = label

    # The list may have more: a subset of the images keeps the full one.
    folder = root / "val" / "images"
    files = {path.relative_to(folder).as_posix(): path for path in images_below(folder)}
    unnamed = sorted(files.keys() - labels.keys())
    if unnamed:
        raise DataError(
            f"{root}: {ANNOTATIONS} does not say of which class {_named(unnamed)} is: add a line, "
            "or remove the image."
        )
    return [(files[file], label) for file, label in labels.items() if file in files]


def _annotation(root: Path, position: int, line: str, number: dict[str, int]) -> tuple[str, int]:
    """File and label in a line of val_annotations.txt."""
    if "\t" not in line:
        raise DataError(
            f"{root}: line {position} of val_annotations.txt is not <file>, tab, <class>: {line!r}."
        )
    file, wnid = line.split("\t")[:2]
    if wnid not in number:
        raise DataError(
            f"{root}: val_annotations.txt names the class {wnid}, which is not in train/ or "
            "wnids.txt."
        )
    return file, number[wnid]


def _text(path: Path) -> str:
    """The text of a UTF-8 file, with or without a byte-order mark."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path} is no UTF-8 text (byte {error.start}): convert it, for example with iconv -f "
            "latin1 -t utf-8."
        ) from error
