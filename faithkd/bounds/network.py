"""What the bounds are computed on: a checked float64 copy of a network, and the ball around each image.

Every layer is used here as the plain mathematical map it stands for, in exact terms: a convolution is zero
padding followed by a linear map, max-pooling is a maximum over windows of indices. What cannot be read that
way is refused.
"""

import copy
import functools
import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from faithkd import arguments
from faithkd.errors import FaithkdError

AFFINE = (nn.Linear, nn.Conv2d)
LAYERS = (*AFFINE, nn.ReLU, nn.MaxPool2d, nn.Flatten)


@dataclass(frozen=True)
class Network:
    """Layers in float64 and their shapes: `shapes[k]` goes into `layers[k]`, `shapes[-1]` is `(C,)`."""

    layers: tuple[nn.Module, ...]
    shapes: tuple[tuple[int, ...], ...]

    @property
    def classes(self) -> int:
        return self.shapes[-1][0]


@functools.lru_cache(maxsize=16)
def single(network: Network) -> Network:
    """The same network in float32: twice as fast, for looking around, never for a bound."""
    return Network(tuple(copy.deepcopy(layer).float() for layer in network.layers), network.shapes)


def flatten(sequential: nn.Sequential, name: str, prefix: str = "") -> list[tuple[str, nn.Module]]:
    """The layers of a (nested) `nn.Sequential` in order, each with its position such as `2.0`."""
    if not isinstance(sequential, nn.Sequential) or type(sequential).forward is not nn.Sequential.forward:
        raise FaithkdError(
            f"{name} is a {type(sequential).__name__}; bounds need a torch.nn.Sequential of "
            f"{', '.join(layer.__name__ for layer in LAYERS)} that returns logits"
        )
    refuse_hooks(sequential, name)
    found = []
    # not .children(): that leaves out a module object that is used twice
    for key, module in sequential._modules.items():
        position = f"{prefix}{key}"
        if isinstance(module, nn.Sequential):
            found += flatten(module, f"{name}, layer {position}", f"{position}.")
        else:
            found.append((position, module))
    return found


def refuse_hooks(module: nn.Module, where: str) -> None:
    """A hook may change what a layer computes (pruning, weight norm): its weights are not all of it."""
    if module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module):
        raise FaithkdError(f"{where}: a forward hook changes this layer; remove it before asking for a bound")


def check_layer(module: nn.Module, where: str) -> None:
    """Refuse, with its position and class, every layer the bounds do not know."""
    if type(module) not in LAYERS:
        hint = " (leave it out: it does nothing in evaluation)" if isinstance(module, nn.Identity | nn.Dropout) else ""
        raise FaithkdError(
            f"{where} is a {type(module).__name__}, which cannot be bounded{hint}; "
            f"known layers: {', '.join(layer.__name__ for layer in LAYERS)}"
        )
    refuse_hooks(module, where)
    arguments.weights(module, where)
    if isinstance(module, nn.Conv2d) and module.padding_mode != "zeros":
        raise FaithkdError(f"{where}: padding_mode={module.padding_mode!r} is not supported, only 'zeros'")
    if isinstance(module, nn.MaxPool2d) and (module.ceil_mode or module.return_indices):
        raise FaithkdError(f"{where}: MaxPool2d with ceil_mode or return_indices is not supported")
    if isinstance(module, nn.Flatten) and (module.start_dim, module.end_dim) != (1, -1):
        raise FaithkdError(
            f"{where}: Flatten must have start_dim=1, end_dim=-1 (all of an image, nothing of the batch)"
        )


def prepare(network: nn.Sequential, shape: tuple[int, ...], name: str = "network") -> Network:
    """Check `network` for images of `shape` and copy it to float64 on the CPU; the original is left alone.

    Raises FaithkdError for anything that cannot be bounded, with the layer's position.
    """
    layers, shapes = [], [tuple(shape)]
    for position, module in flatten(network, name):
        where = f"{name}, layer {position}"
        check_layer(module, where)
        layer = copy.deepcopy(module).to(device="cpu", dtype=torch.float64).eval().requires_grad_(False)
        if isinstance(layer, nn.ReLU):
            layer.inplace = False  # else it would overwrite the very boxes it is asked about
        after = output_shape(layer, shapes[-1], where)
        if isinstance(layer, nn.MaxPool2d) and layers and isinstance(layers[-1], nn.ReLU):
            # max(relu(z)) = relu(max(z)), and the latter has fewer units that are not settled
            layers[-1:], shapes[-1:] = [layer, layers[-1]], [after, after]
        else:
            layers.append(layer)
            shapes.append(after)
    if len(shapes[-1]) != 1 or shapes[-1][0] < 2:
        raise FaithkdError(
            f"{name} returns {('N', *shapes[-1])} for images of shape {tuple(shape)}; "
            "bounds need logits of shape (N, C) with C >= 2 classes"
        )
    return Network(tuple(layers), tuple(shapes))


def output_shape(layer: nn.Module, shape: tuple[int, ...], where: str) -> tuple[int, ...]:
    """Shape of one image after `layer`, or an error that says what did not fit."""
    wanted = {nn.Linear: 1, nn.Conv2d: 3, nn.MaxPool2d: 3}.get(type(layer))
    if wanted is not None and len(shape) != wanted:
        kind = "a flat vector (put nn.Flatten() before it)" if wanted == 1 else "(channels, height, width)"
        raise FaithkdError(f"{where}: {type(layer).__name__} needs {kind}, but gets an input of shape {shape}")
    try:
        after = tuple(forward(layer, torch.zeros(1, *shape, dtype=torch.float64)).shape[1:])
    except RuntimeError as problem:
        raise FaithkdError(f"{where}: {layer} does not fit an input of shape {shape}: {problem}") from problem
    if math.prod(after) == 0:
        raise FaithkdError(f"{where}: {layer} leaves nothing of an input of shape {shape}")
    if isinstance(layer, nn.MaxPool2d) and (windows(layer, shape) < 0).all(dim=0).any():
        raise FaithkdError(f"{where}: a window of {layer} covers only padding, its maximum is -infinity")
    return after


def prepare_pair(teacher: nn.Sequential, student: nn.Sequential, x: Tensor) -> tuple[Network, Network]:
    """Both networks checked for the images `x` `(N, *shape)` and against each other."""
    shape = tuple(x.shape[1:])
    pair = prepare(teacher, shape, "teacher"), prepare(student, shape, "student")
    arguments.same_classes(pair[0].classes, pair[1].classes)
    return pair


def check_images(x: Tensor) -> Tensor:
    """The images as float64 on the CPU, all finite, `(N, *shape)`."""
    return arguments.images(x).to(device="cpu", dtype=torch.float64)


def ball(x: Tensor, eps: float, clip: tuple | None = None) -> tuple[Tensor, Tensor]:
    """Ends of the ball B_eps(x) of Def. 2, each one ulp outwards: two tensors like `x`.

    `clip=(low, high)`, broadcastable to `x`, cuts the ball to the range of valid images. An image that leaves
    that range by no more than rounding keeps its own point; one that leaves it further is an error.
    """
    eps, (low, high) = arguments.radius(eps), arguments.clip_range(clip, x)
    infinity = torch.full_like(x, math.inf)
    lower, upper = torch.nextafter(x - eps, -infinity), torch.nextafter(x + eps, infinity)
    return torch.maximum(lower, torch.minimum(low, x)), torch.minimum(upper, torch.maximum(high, x))


def padding(conv: nn.Conv2d) -> tuple[int, int, int, int]:
    """Zeros put left, right, above and below by a convolution, with 'same' and 'valid' worked out."""
    if conv.padding == "valid":
        return 0, 0, 0, 0
    sides = []
    for axis in (1, 0):
        if conv.padding == "same":
            total = conv.dilation[axis] * (conv.kernel_size[axis] - 1)
            sides += [total // 2, total - total // 2]
        else:
            sides += [conv.padding[axis]] * 2
    return tuple(sides)


def affine(layer: nn.Module, z: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`layer`'s map with other weights, e.g. their absolute values: `(N, *in)` to `(N, *out)`."""
    if isinstance(layer, nn.Linear):
        return F.linear(z, weight, bias)
    return F.conv2d(F.pad(z, padding(layer)), weight, bias, layer.stride, 0, layer.dilation, layer.groups)


def forward(layer: nn.Module, z: Tensor) -> Tensor:
    """One layer's output, computed as the bounds understand the layer."""
    return affine(layer, z, layer.weight, layer.bias) if isinstance(layer, AFFINE) else layer(z)


def transpose(layer: nn.Module, rows: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Rows on an affine layer's output as rows on its input of `shape`: `(M, *out)` to `(M, *shape)`."""
    if isinstance(layer, nn.Linear):
        return rows @ layer.weight
    left, right, top, bottom = padding(layer)
    channels, height, width = shape
    padded = (len(rows), channels, height + top + bottom, width + left + right)
    grad = torch.nn.grad.conv2d_input(padded, layer.weight, rows, layer.stride, 0, layer.dilation, layer.groups)
    return grad[:, :, top : top + height, left : left + width]


def windows(pool: nn.MaxPool2d, shape: tuple[int, ...]) -> Tensor:
    """The flat places (row * width + column) in the window of each output of a max-pool; -1 is padding.

    `(window size, output places)`, the same for all channels.
    """
    _, height, width = shape

    def pair(size):
        return (size, size) if isinstance(size, int) else tuple(size)

    down, across = pair(pool.padding)
    places = torch.arange(height * width, dtype=torch.float64).view(1, 1, height, width)
    places = F.pad(places, (across, across, down, down), value=-1)
    found = F.unfold(places, pair(pool.kernel_size), pair(pool.dilation), 0, pair(pool.stride))
    return found[0].long()
