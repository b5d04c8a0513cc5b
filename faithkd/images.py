"""The image sets: how many images each has, of which shape, and how its files are found and read."""

import os
import zipfile
from functools import lru_cache
from pathlib import Path

import numpy as np

from faithkd.errors import FaithkdError
from faithkd.paths import ROOT

IMAGES = {  # name: (training images, test images, shape); digits is one set that is divided by seed
    "digits": (1397, 400, (1, 8, 8)),
    "mnist": (60_000, 10_000, (1, 28, 28)),
    "fashion_mnist": (60_000, 10_000, (1, 28, 28)),
    "cifar10": (50_000, 10_000, (3, 32, 32)),
}
TORCHVISION = {"mnist": "MNIST", "fashion_mnist": "FashionMNIST", "cifar10": "CIFAR10"}  # its classes


@lru_cache(maxsize=4)
def raw(name: str, train: bool) -> tuple[np.ndarray, np.ndarray]:
    """Raw pixels (N, channels, height, width) as uint8 and labels (N,), in the original order."""
    if name == "digits":
        return _digits(train)
    source = _source(name)
    count, (channels, *size) = IMAGES[name][0 if train else 1], IMAGES[name][2]
    try:
        pixels, labels = _arrays(name, train, source)
        _check("images", pixels, (count, *size) if channels == 1 else (count, *size, channels), 255)
        _check("labels", labels, (count,), 9)
    except Exception as error:  # networks, disks, archives: torchvision and numpy let a dozen kinds of error through
        files = source if name == "cifar10" else source / "raw" / f"{'train' if train else 't10k'}-*-ubyte"
        what = str(error) or f"it has not the format of {TORCHVISION[name]}"
        raise FaithkdError(
            f"{files} cannot be used: {what}; set FAITHKD_DATA to a folder that holds a sound copy (torchvision's "
            "layout, or cifar10.npz), or delete this one, unset FAITHKD_DATA and connect to the internet to download "
            "it. The profiles digits and smoke need no download"
        ) from None
    pixels = pixels[:, None] if channels == 1 else np.ascontiguousarray(pixels.transpose(0, 3, 1, 2))
    return pixels.astype(np.uint8, copy=False), labels.astype(np.int64)


def _digits(train: bool) -> tuple[np.ndarray, np.ndarray]:
    """scikit-learn's digits, which need no download; they have no test set of their own, so one is drawn, once."""
    import torch
    from sklearn.datasets import load_digits

    digits, held = load_digits(), IMAGES["digits"][1]
    rows = torch.randperm(len(digits.target), generator=torch.Generator().manual_seed(0)).numpy()
    rows = np.sort(rows[held:] if train else rows[:held])
    return digits.images.astype(np.uint8)[rows, None], digits.target.astype(np.int64)[rows]


def _source(name: str) -> Path:
    """Where a data set is: in $FAITHKD_DATA, as soon as it begins to be there, else in the repository's own `data/`."""
    folders, given = [ROOT / "data"], os.environ.get("FAITHKD_DATA")
    if given:
        folders.insert(0, Path(given).expanduser())
        if not (folders[0].is_dir() and os.access(folders[0], os.R_OK | os.X_OK)):
            raise FaithkdError(
                f"FAITHKD_DATA is {given!r}, which is not a folder that can be read; correct it or unset it to download"
            )
    parts = ["cifar10.npz", "cifar-10-batches-py"] if name == "cifar10" else [TORCHVISION[name]]
    places = [folder / part for folder in folders for part in parts]
    return next(filter(os.path.lexists, places), places[-1])


def _arrays(name: str, train: bool, source: Path) -> tuple[np.ndarray, np.ndarray]:
    """Images and labels, whatever the files hold; torchvision downloads what the repository's own folder lacks."""
    if source.suffix == ".npz":
        if not zipfile.is_zipfile(source):
            raise ValueError("it is no .npz archive, or only its beginning")
        part = "train" if train else "test"
        with np.load(source, allow_pickle=False) as arrays:
            return arrays[f"x_{part}"], arrays[f"y_{part}"]
    from torchvision import datasets

    found = getattr(datasets, TORCHVISION[name])(source.parent, train, download=source.parent == ROOT / "data")
    return np.asarray(found.data), np.asarray(found.targets)


def _check(what: str, array: np.ndarray, shape: tuple[int, ...], top: int) -> None:
    """Refuse what is of another shape, or no whole numbers from 0 to `top`."""
    if array.shape != shape or array.dtype.kind not in "iu":
        raise ValueError(f"its {what} are {array.dtype} of shape {array.shape}, not whole numbers of shape {shape}")
    if array.min() < 0 or array.max() > top:
        raise ValueError(f"its {what} are {array.min()} to {array.max()}, not 0 to {top}")
