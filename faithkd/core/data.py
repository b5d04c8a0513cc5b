"""MNIST, Fashion-MNIST, CIFAR-10 and scikit-learn's digits as tensors in the networks' own input space."""

import gzip
import math
import os
import zipfile
from contextlib import contextmanager
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
    rows = _shuffled(p, len(_raw(p.data.name, True)[1]))[p.data.validation :]
    return _split(p, True, rows.sort().values)


def validation(p: "Params") -> Split:
    """The `data.validation` training images held out for early stopping, drawn by seed."""
    rows = _shuffled(p, len(_raw(p.data.name, True)[1]))[: p.data.validation]
    return _split(p, True, rows.sort().values)


def test(p: "Params") -> Split:
    """The whole test set; CIFAR-10 without the 20 images that its array file holds only approximately."""
    rows = torch.arange(len(_raw(p.data.name, False)[1]))
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
    rows = torch.randperm(len(everything), generator=torch.Generator().manual_seed(p.seed))
    return everything[rows[: p.data.test_images]]


def clip_range(p: "Params") -> tuple[torch.Tensor, torch.Tensor] | None:
    """The valid pixels [0, 1] where the parameters clip the ball to them, else None: the unclipped ball of Def. 2."""
    return (torch.tensor(0.0), torch.tensor(1.0)) if p.data.clip else None


def to_pixels(p: "Params", x: torch.Tensor) -> np.ndarray:
    """Images `x` (N, channels, height, width) as pixels in [0, 1] for matplotlib: (N, height, width[, 3])."""
    mean, std = _standardisation(p)
    pixels = (x.detach().cpu() * std + mean).clamp(0, 1)
    return pixels.squeeze(1).numpy() if pixels.shape[1] == 1 else pixels.permute(0, 2, 3, 1).numpy()


def _standardisation(p: "Params") -> tuple[torch.Tensor, torch.Tensor]:
    if p.data.space == "pixel":
        return torch.tensor(0.0), torch.tensor(1.0)
    return torch.tensor(p.data.mean).view(-1, 1, 1), torch.tensor(p.data.std).view(-1, 1, 1)


def _shuffled(p: "Params", count: int) -> torch.Tensor:
    return torch.randperm(count, generator=torch.Generator().manual_seed(p.seed))


def _split(p: "Params", train: bool, rows: torch.Tensor) -> Split:
    pixels, labels = _raw(p.data.name, train)
    mean, std = _standardisation(p)
    x = pixels[rows].float().div_(pixels_range(p.data.name)).sub_(mean).div_(std)  # in place: a whole set is large
    return Split(x, labels[rows], rows)


def pixels_range(name: str) -> int:
    """The largest raw pixel value: 16 for scikit-learn's digits, 255 elsewhere."""
    return 16 if name == "digits" else 255


@lru_cache(maxsize=4)
def _raw(name: str, train: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Raw pixels (N, channels, height, width) as uint8 and labels (N,), in the original order."""
    if name == "digits":
        return _digits(train)
    files = _find(name, train) or _download(name, train)
    count, (channels, *size) = IMAGES[name][0 if train else 1], SHAPES[name]
    forms = [((count, *size) if channels == 1 else (count, *size, channels), 255), ((count,), 9)]
    pixels, labels = (_whole_numbers(*what, *form) for what, form in zip(_arrays(files, train), forms, strict=True))
    pixels = pixels.unsqueeze(1) if channels == 1 else pixels.permute(0, 3, 1, 2).contiguous()
    return pixels, labels.long()


def _digits(train: bool) -> tuple[torch.Tensor, torch.Tensor]:
    from sklearn.datasets import load_digits  # ships with scikit-learn: no download

    digits = load_digits()
    rows = torch.randperm(len(digits.target), generator=torch.Generator().manual_seed(0))
    rows = (rows[DIGITS_TEST:] if train else rows[:DIGITS_TEST]).sort().values
    pixels = torch.from_numpy(digits.images.astype(np.uint8)).unsqueeze(1)
    return pixels[rows], torch.from_numpy(digits.target).long()[rows]


def _folders() -> list[Path]:
    """Where data sets are looked for: $FAITHKD_DATA first, then the repository's own `data/`."""
    given = os.environ.get("FAITHKD_DATA")
    folder = Path(given).expanduser() if given else None
    if folder and not (os.path.isdir(folder) and os.access(folder, os.R_OK | os.X_OK)):
        raise FaithkdError(
            f"FAITHKD_DATA is {given!r}, which is not a folder that can be read; correct it or unset it to download"
        )
    return [*([folder] if folder else []), ROOT / "data"]


def _find(name: str, train: bool) -> list[Path] | None:
    """The files of a data set in the first folder that has it.

    What only begins to be there is returned too where the user named the folder, so that what is missing is told;
    in the repository's own it is a download that was stopped, and None, as where there is nothing.
    """
    if name == "cifar10":
        sources = [["cifar10.npz"], ["cifar-10-batches-py"]]
    else:
        part = "train" if train else "t10k"
        sources = [[f"{TORCHVISION[name]}/raw/{part}-{what}-ubyte" for what in ("images-idx3", "labels-idx1")]]
    for folder in _folders():
        for source in sources:
            files = [folder / file for file in source]
            begun = folder != ROOT / "data" and os.path.lexists(folder / Path(source[0]).parts[0])
            if begun or all(os.path.lexists(file) for file in files):
                return files
    return None


def _download(name: str, train: bool) -> list[Path]:
    """The files of a data set after torchvision has downloaded it into the repository's `data/`."""
    from torchvision import datasets

    kind = TORCHVISION[name]
    try:
        getattr(datasets, kind)(root=ROOT / "data", train=train, download=True)
        return _find(name, train)
    except Exception as error:  # networks, disks, archives: torchvision lets a dozen kinds of error through
        looked = " and ".join(str(folder) for folder in _folders())
        raise FaithkdError(
            f"the data set {kind} is not in {looked}, and downloading it failed "
            f"({str(error) or type(error).__name__}). "
            "Connect to the internet and try again, or set FAITHKD_DATA to a folder that holds it "
            f"(torchvision's layout{', or cifar10.npz' if name == 'cifar10' else ''}). "
            "The profiles digits and smoke need no download."
        ) from None


@contextmanager
def _reading(file: Path):
    """Tell which file cannot be used, why, and what to do."""
    try:
        yield
    except Exception as error:  # numpy, zipfile, lzma, torchvision: each has its own kinds of error
        what = getattr(error, "strerror", None) or str(error) or type(error).__name__
        if file.is_symlink() and not file.exists():
            what = f"it is a link to {os.readlink(file)}, where nothing is"
        own = file.is_relative_to(ROOT / "data")
        remedy = (
            "delete it to download it again" if own else "put a sound copy there, or unset FAITHKD_DATA to download"
        )
        raise FaithkdError(f"{file} cannot be used: {what}; {remedy}") from None


def _arrays(files: list[Path], train: bool):
    """Yield (file, name of the array in it, array) of the images, then of the labels, with whatever they hold."""
    if len(files) == 2:
        for file in files:
            with _reading(file):
                yield file, "", _idx(file)
    elif files[0].suffix == ".npz":
        part = "train" if train else "test"
        for name in (f"x_{part}: ", f"y_{part}: "):
            with _reading(files[0]), open(files[0], "rb") as stream:
                if not zipfile.is_zipfile(stream):
                    raise ValueError("it is no .npz archive, or only its beginning")
                with np.load(stream, allow_pickle=False) as arrays:
                    array = np.asarray(arrays[name.removesuffix(": ")])
            yield files[0], name, array
    else:
        from torchvision import datasets

        with _reading(files[0]):
            found = datasets.CIFAR10(root=files[0].parent, train=train, download=False)
        yield files[0], "", found.data
        yield files[0], "", np.asarray(found.targets)


def _idx(file: Path) -> np.ndarray:
    """The array in a file of MNIST's format, gzipped or not: 0, 0, 8 (bytes), number of dimensions, sizes, bytes."""
    compressed = file.with_name(f"{file.name}.gz")
    data = (compressed if compressed.exists() and not os.path.lexists(file) else file).read_bytes()
    data = gzip.decompress(data) if data[:2] == b"\x1f\x8b" else data
    if data[:4] not in (b"\0\0\x08\x01", b"\0\0\x08\x03"):
        raise ValueError(f"it begins with {data[:8]!r}, not as a file of MNIST's format" if data else "it is empty")
    start = 4 + 4 * data[3]
    shape = np.frombuffer(data[4:start], ">u4").tolist()
    values = np.frombuffer(bytearray(data[start:]), np.uint8)
    if values.size != math.prod(shape):
        raise ValueError(f"it says that it holds {' x '.join(map(str, shape))} bytes, but has {values.size}")
    return values.reshape(shape)


def _whole_numbers(file: Path, name: str, array: np.ndarray, shape: tuple, top: int) -> torch.Tensor:
    """The array as uint8 if it has that shape and holds whole numbers from 0 to `top`."""
    with _reading(file):
        if array.shape != shape:
            raise ValueError(f"{name}the array in it has the shape {array.shape}, not {shape}")
        if array.dtype.kind not in "iu":
            raise ValueError(f"{name}the array in it holds {array.dtype}, not whole numbers")
        if array.min() < 0 or array.max() > top:
            raise ValueError(f"{name}the array in it holds {array.min()} to {array.max()}, not 0 to {top}")
        return torch.from_numpy(array.astype(np.uint8, copy=False))
