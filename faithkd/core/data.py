"""MNIST, Fashion-MNIST, CIFAR-10 and scikit-learn's digits as tensors in the networks' own input space."""

import os
import zipfile
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from faithkd.errors import FaithkdError
from faithkd.images import IMAGES
from faithkd.paths import ROOT

if TYPE_CHECKING:
    from faithkd.reproduce.params import Params

CLASSES = {
    "digits": [str(digit) for digit in range(10)],
    "mnist": [str(digit) for digit in range(10)],
    "fashion_mnist": ["T-shirt", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Boot"],
    "cifar10": ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"],
}
SHAPES = {name: shape for name, (_, _, shape) in IMAGES.items()}
TORCHVISION = {"mnist": "MNIST", "fashion_mnist": "FashionMNIST", "cifar10": "CIFAR10"}  # its classes
PLACES = {  # where their files are in a folder of data; an .npz holds x_train, y_train, x_test, y_test
    "mnist": ["MNIST"],
    "fashion_mnist": ["FashionMNIST"],
    "cifar10": ["cifar10.npz", "cifar-10-batches-py"],
}

# Test images of CIFAR-10 that are only approximate in the array file `cifar10.npz` (see its README). They are left
# out whichever source is used, so that one seed draws one and the same subset everywhere.
CIFAR10_APPROXIMATE = (
    1259, 1369, 1422, 2245, 2737, 2935, 3695, 3718, 4085, 4496,
    5791, 5896, 6286, 7580, 7707, 7724, 7832, 8117, 8551, 9254,
)  # fmt: skip
DIGITS_TEST = 400  # scikit-learn's digits have no test set of their own: these many images, drawn once, are it


@dataclass(frozen=True)
class Split:
    """Images `x` (N, channels, height, width) in input space, labels `y` (N,), places `index` (N,) in the raw set."""

    x: torch.Tensor
    y: torch.Tensor
    index: torch.Tensor

    def __len__(self) -> int:
        return len(self.y)

    def __getitem__(self, rows) -> "Split":
        return Split(self.x[rows], self.y[rows], self.index[rows])


def training(p: "Params") -> Split:
    """The training images without the held-out ones (§6 trains on all of them and stops early on the test set)."""
    rows = _drawn(p, IMAGES[p.data.name][0])[p.data.validation :]
    return _split(p, True, rows.sort().values)


def validation(p: "Params") -> Split:
    """The `data.validation` training images held out for early stopping, drawn by seed."""
    rows = _drawn(p, IMAGES[p.data.name][0])[: p.data.validation]
    return _split(p, True, rows.sort().values)


def test(p: "Params") -> Split:
    """The whole test set; CIFAR-10 without the 20 images that its array file holds only approximately."""
    rows = torch.arange(IMAGES[p.data.name][1])
    if p.data.name == "cifar10":
        rows = rows[~torch.isin(rows, torch.tensor(CIFAR10_APPROXIMATE))]
    return _split(p, False, rows)


def test_subset(p: "Params") -> Split:
    """The paper's randomly sampled `data.test_images` test images (§6), drawn by seed; called the test set there.

    In the order in which they are drawn: the first few of them, as slow methods take, are a random sample too. (In
    MNIST's own order they are not: its first 2,000 test images are harder than the rest.)
    """
    everything = test(p)
    if p.data.test_images > len(everything):
        raise FaithkdError(
            f"data.test_images is {p.data.test_images}, but {p.data.name} has only {len(everything)} test images; "
            f"choose at most {len(everything)}"
        )
    return everything[_drawn(p, len(everything))[: p.data.test_images]]


def clip_range(p: "Params") -> tuple[torch.Tensor, torch.Tensor] | None:
    """The valid pixels [0, 1] where the parameters clip the ball to them, else None: the unclipped ball of Def. 2."""
    return (torch.tensor(0.0), torch.tensor(1.0)) if p.data.clip else None


def to_pixels(p: "Params", x: torch.Tensor) -> np.ndarray:
    """Images `x` (N, channels, height, width) as pixels in [0, 1] for matplotlib: (N, height, width[, 3])."""
    mean, std = _standardisation(p)
    pixels = (x.detach().cpu() * std + mean).clamp(0, 1)
    return pixels.squeeze(1).numpy() if pixels.shape[1] == 1 else pixels.permute(0, 2, 3, 1).numpy()


def pixels_range(name: str) -> int:
    """The largest raw pixel value: 16 for scikit-learn's digits, 255 elsewhere."""
    return 16 if name == "digits" else 255


def _drawn(p: "Params", count: int) -> torch.Tensor:
    """The numbers below `count` in a random order that follows from the seed."""
    return torch.randperm(count, generator=torch.Generator().manual_seed(p.seed))


def _standardisation(p: "Params") -> tuple[torch.Tensor, torch.Tensor]:
    if p.data.space == "pixel":
        return torch.tensor(0.0), torch.tensor(1.0)
    return torch.tensor(p.data.mean).view(-1, 1, 1), torch.tensor(p.data.std).view(-1, 1, 1)


def _split(p: "Params", train: bool, rows: torch.Tensor) -> Split:
    pixels, labels = _raw(p.data.name, train)
    mean, std = _standardisation(p)
    x = pixels[rows].float().div_(pixels_range(p.data.name)).sub_(mean).div_(std)  # in place: a whole set is large
    return Split(x, labels[rows], rows)


@lru_cache(maxsize=4)
def _raw(name: str, train: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Raw pixels (N, channels, height, width) as uint8 and labels (N,), in the original order."""
    if name == "digits":
        return _digits(train)
    source = _source(name)
    count, (channels, *size) = IMAGES[name][0 if train else 1], SHAPES[name]
    try:
        pixels, labels = _arrays(name, train, source)
        _check("images", pixels, (count, *size) if channels == 1 else (count, *size, channels), 255)
        _check("labels", labels, (count,), 9)
    except Exception as error:  # networks, disks, archives: torchvision and numpy let a dozen kinds of error through
        file = source if name == "cifar10" else source / "raw" / f"{'train' if train else 't10k'}-*-ubyte"
        remedy = "put a sound copy there, or unset FAITHKD_DATA to download it"
        if source.parent == ROOT / "data":
            remedy = (
                "connect to the internet to download it, after deleting what is damaged, or set FAITHKD_DATA to a "
                f"folder that holds it (torchvision's layout{', or cifar10.npz' if name == 'cifar10' else ''}). "
                "The profiles digits and smoke need no download"
            )
        what = str(error) or f"it has not the format of {TORCHVISION[name]}"
        raise FaithkdError(f"{file} cannot be used: {what}; {remedy}") from None
    pixels, labels = torch.from_numpy(pixels), torch.from_numpy(labels)
    pixels = pixels.unsqueeze(1) if channels == 1 else pixels.permute(0, 3, 1, 2).contiguous()
    return pixels.to(torch.uint8), labels.long()


def _digits(train: bool) -> tuple[torch.Tensor, torch.Tensor]:
    from sklearn.datasets import load_digits  # ships with scikit-learn: no download

    digits = load_digits()
    rows = torch.randperm(len(digits.target), generator=torch.Generator().manual_seed(0))
    rows = (rows[DIGITS_TEST:] if train else rows[:DIGITS_TEST]).sort().values
    pixels = torch.from_numpy(digits.images.astype(np.uint8)).unsqueeze(1)
    return pixels[rows], torch.from_numpy(digits.target).long()[rows]


def _source(name: str) -> Path:
    """Where a data set is: in $FAITHKD_DATA, as soon as it begins to be there, else in the repository's own `data/`."""
    folders, given = [ROOT / "data"], os.environ.get("FAITHKD_DATA")
    if given:
        folders.insert(0, Path(given).expanduser())
        if not (folders[0].is_dir() and os.access(folders[0], os.R_OK | os.X_OK)):
            raise FaithkdError(
                f"FAITHKD_DATA is {given!r}, which is not a folder that can be read; correct it or unset it to download"
            )
    places = [folder / place for folder in folders for place in PLACES[name]]
    return next(filter(os.path.lexists, places), places[-1])


def _arrays(name: str, train: bool, source: Path) -> tuple[np.ndarray, np.ndarray]:
    """Images and labels with whatever the files hold; into the repository's own folder torchvision downloads them."""
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
    if array.shape != shape:
        raise ValueError(f"its {what} have the shape {array.shape}, not {shape}")
    if array.dtype.kind not in "iu" or array.min() < 0 or array.max() > top:
        raise ValueError(f"its {what} are {array.dtype}, {array.min()} to {array.max()}, not whole numbers 0 to {top}")
