"""MNIST, Fashion-MNIST, CIFAR-10 and scikit-learn's digits as tensors in the networks' own input space."""

import os
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from faithkd.errors import FaithkdError
from faithkd.paths import ROOT

if TYPE_CHECKING:
    from faithkd.reproduce.params import Params

CLASSES = {
    "digits": [str(digit) for digit in range(10)],
    "mnist": [str(digit) for digit in range(10)],
    "fashion_mnist": ["T-shirt", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Boot"],
    "cifar10": ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"],
}
SHAPES = {"digits": (1, 8, 8), "mnist": (1, 28, 28), "fashion_mnist": (1, 28, 28), "cifar10": (3, 32, 32)}

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
    if name == "cifar10" and (file := _cifar_array_file()):
        part = "train" if train else "test"
        with np.load(file, allow_pickle=False) as arrays:
            pixels, labels = arrays[f"x_{part}"], arrays[f"y_{part}"]
        return torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous(), torch.from_numpy(labels).long()
    dataset = _torchvision(name, train)
    pixels = torch.as_tensor(dataset.data)
    pixels = pixels.unsqueeze(1) if pixels.dim() == 3 else pixels.permute(0, 3, 1, 2).contiguous()
    return pixels, torch.as_tensor(dataset.targets).long()


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
    if given and not Path(given).is_dir():
        raise FaithkdError(f"FAITHKD_DATA is {given!r}, which is not a folder; correct it or unset it to download")
    return [*([Path(given)] if given else []), ROOT / "data"]


def _cifar_array_file() -> Path | None:
    return next((folder / "cifar10.npz" for folder in _folders() if (folder / "cifar10.npz").is_file()), None)


def _torchvision(name: str, train: bool):
    """torchvision's data set from the first folder that holds it, else downloaded into the repository's `data/`."""
    from torchvision import datasets

    kind = {"mnist": datasets.MNIST, "fashion_mnist": datasets.FashionMNIST, "cifar10": datasets.CIFAR10}[name]
    for folder in _folders():
        try:
            return kind(root=folder, train=train, download=False)
        except RuntimeError:  # torchvision's word for «not here»
            continue
    try:
        return kind(root=ROOT / "data", train=train, download=True)
    except (RuntimeError, OSError) as error:
        looked = " and ".join(str(folder) for folder in _folders())
        raise FaithkdError(
            f"the data set {kind.__name__} is not in {looked}, and downloading it failed ({error}). "
            "Connect to the internet and try again, or set FAITHKD_DATA to a folder that holds it "
            f"(torchvision's layout{', or cifar10.npz' if name == 'cifar10' else ''}). "
            "The profiles digits and smoke need no download."
        ) from None
