"""Networks and images from files, none of which can execute anything, and whether they fit each other."""

from collections import Counter
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from faithkd import arguments
from faithkd.bounds.graph import Operators
from faithkd.errors import FaithkdError
from faithkd.pairs.onnx import load_onnx
from faithkd.pairs.problems import about
from faithkd.pairs.pt2 import load_pt2

LOADERS = {".onnx": load_onnx, ".pt2": load_pt2}
PICKLED = (".pt", ".pth", ".pkl", ".ckpt", ".bin", ".tar")


def load_network(path: str | Path) -> Operators:
    """A network from a file: .onnx, or .pt2 as torch.export.save writes it. Raises FaithkdError for all others."""
    suffix = Path(path).suffix.lower()
    if suffix in LOADERS:
        return LOADERS[suffix](path)
    why = "to read it would execute whatever is pickled in it" if suffix in PICKLED else "that is none of these"
    raise FaithkdError(
        f"{path}: networks are read from .onnx and .pt2 files; {why}. Where the network is a torch module: "
        "torch.export.save(torch.export.export(network.eval(), (x,)), 'network.pt2'), or hand the module itself to "
        "faithkd.faithfulness_upper_bound"
    )


def load_images(path: str | Path) -> Tensor:
    """Images `(N, *shape)` from a .npy file, or from a .npz file: its array `x` or `images`, or its only one."""
    with about(path, "no images can be read from it, only from .npy and .npz files"):
        found = np.load(path, allow_pickle=False)
        if isinstance(found, np.lib.npyio.NpzFile):
            with found as arrays:
                names = [name for name in ("x", "images") if name in arrays.files] or arrays.files
                if len(names) != 1:
                    raise FaithkdError(f"it holds {', '.join(names) or 'nothing'}; name the images x")
                found = arrays[names[0]]
        if not found.size:
            raise FaithkdError(f"it holds an array of shape {found.shape}, no image; needed are (N, *shape) with N > 0")
        return torch.from_numpy(found.astype(found.dtype.newbyteorder("="), copy=False))


def fitting(networks: dict[str, Operators], x: Tensor) -> Tensor:
    """The images as the networks take them; raises FaithkdError, with what to do, where they do not fit."""
    x = arguments.images(x)
    for name, network in networks.items():
        given, shape = tuple(x.shape[1:]), network.shape
        if given == shape:
            continue
        remedy = "give images of that shape"
        if len(given) == 3 and (given[2], *given[:2]) == shape:
            remedy = "they are channels last (NHWC), the network takes NCHW: images.transpose(0, 3, 1, 2)"
        elif len(given) == 3 and (*given[1:], given[0]) == shape:
            remedy = "they are channels first (NCHW), the network takes NHWC: images.transpose(0, 2, 3, 1)"
        elif np.prod(given) == np.prod(shape):
            remedy = f"they have as many numbers: images.reshape(-1, {', '.join(map(str, shape))})"
        raise FaithkdError(f"the {name} takes images of shape {shape}, these have shape {given}; {remedy}")
    return x


def report(networks: dict[str, Operators], x: Tensor) -> list[str]:
    """What a pair is and how it sees the images, in sentences: what to look at before asking for a bound."""
    low, high, centre, spread = (float(each) for each in (x.min(), x.max(), x.double().mean(), x.double().std()))
    lines, seen = [], []
    arguments.same_classes(*(network.network.classes for network in networks.values()))
    for name, network in networks.items():
        operators = [node.operator for node in network.network.nodes]
        kinds = ", ".join(
            f"{count} {kind}" for kind, count in Counter(type(each).__name__ for each in operators).items()
        )
        held = [getattr(each, part, None) for each in operators for part in ("weight", "bias")]
        count = sum(part.numel() for part in held if part is not None and part.ndim)
        lines.append(f"{name}: {count:,} weights, images {network.shape}, {network.network.classes} classes; {kinds}")
        with torch.no_grad():
            seen.append(torch.cat([network(part).softmax(1) for part in x.double().split(100)]).max(1))
    lines.append(f"{len(x)} images: from {low:.4g} to {high:.4g}, mean {centre:.4g}, standard deviation {spread:.4g}")
    if low >= 0 and high > 2 and bool((x == x.round()).all()):
        lines.append("they look like pixels from 0 to 255; most networks take x / 255, or that standardised")
    elif low >= 0 and high <= 1:
        lines.append("they look like pixels from 0 to 1 (--clip 0 1); standardise them first where networks expect it")
    elif low < 0:
        lines.append("they look standardised; eps is in these units, and --clip are their black and white")
    alike = (seen[0].indices == seen[1].indices).double().mean()
    sure = ", ".join(f"the {name} {each.values.mean():.0%}" for name, each in zip(networks, seen, strict=True))
    lines.append(f"the networks agree on {alike:.0%} of the images; their mean confidence: {sure}")
    if max(float((each.indices == each.indices[0]).double().mean()) for each in seen) == 1 and len(x) > 9:
        lines.append("one of them puts all images into one class: are they scaled and laid out as in its training?")
    return lines
