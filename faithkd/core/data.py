"""MNIST, Fashion-MNIST, CIFAR-10 and scikit-learn's digits as tensors in the networks' own input space."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from faithkd.errors import FaithkdError
from faithkd.images import IMAGES, raw

if TYPE_CHECKING:
    from faithkd.reproduce.params import Params

CLASSES = {
    "digits": [str(digit) for digit in range(10)],
    "mnist": [str(digit) for digit in range(10)],
    "fashion_mnist": ["T-shirt", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Boot"],
    "cifar10": ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"],
}
SHAPES = {name: shape for name, (_, _, shape) in IMAGES.items()}

# Test images of CIFAR-10 that are only approximate in the array file `cifar10.npz` (see its README). They are left
# out whichever source is used, so that one seed draws one and the same subset everywhere.
CIFAR10_APPROXIMATE = (
    1259, 1369, 1422, 2245, 2737, 2935, 3695, 3718, 4085, 4496,
    5791, 5896, 6286, 7580, 7707, 7724, 7832, 8117, 8551, 9254,
)  # fmt: skip


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
    return _split(p, True, _drawn(p, IMAGES[p.data.name][0])[p.data.validation :])


def validation(p: "Params") -> Split:
    """The `data.validation` training images held out for early stopping, drawn by seed."""
    return _split(p, True, _drawn(p, IMAGES[p.data.name][0])[: p.data.validation])


def test(p: "Params") -> Split:
    """The whole test set; CIFAR-10 without the 20 images that its array file holds only approximately."""
    return _split(p, False, _test_rows(p))


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


def unseen(p: "Params") -> Split:
    """`test_subset` by its places alone, without pixels or labels: what was measured of it can be read all the same."""
    rows = _test_rows(p)
    index = rows[_drawn(p, len(rows))[: p.data.test_images]]
    return Split(torch.empty(0), torch.full_like(index, -1), index)


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


def _test_rows(p: "Params") -> torch.Tensor:
    rows = torch.arange(IMAGES[p.data.name][1])
    if p.data.name == "cifar10":
        rows = rows[~torch.isin(rows, torch.tensor(CIFAR10_APPROXIMATE))]
    return rows


def _drawn(p: "Params", count: int) -> torch.Tensor:
    """The numbers below `count`, shuffled by seed."""
    return torch.randperm(count, generator=torch.Generator().manual_seed(p.seed))


def _standardisation(p: "Params") -> tuple[torch.Tensor, torch.Tensor]:
    if p.data.space == "pixel":
        return torch.tensor(0.0), torch.tensor(1.0)
    return torch.tensor(p.data.mean).view(-1, 1, 1), torch.tensor(p.data.std).view(-1, 1, 1)


def _split(p: "Params", train: bool, rows: torch.Tensor) -> Split:
    rows = rows.sort().values
    pixels, labels = map(torch.from_numpy, raw(p.data.name, train))
    mean, std = _standardisation(p)
    x = pixels[rows].float().div_(pixels_range(p.data.name)).sub_(mean).div_(std)  # in place: a whole set is large
    return Split(x, labels[rows], rows)
