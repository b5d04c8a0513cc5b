"""What the bounds are computed on: a float64 copy of a network as a list of operators, and the ball around each image.

Place 0 is the image, place k + 1 the output of node k; each node says which places it reads. How they are found in a
torch module is in `reading`.
"""

import functools
import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from faithkd import arguments
from faithkd.bounds.operators import Affine, Linear, Matrix, MaxPool2d, Operator, ReLU, Shape
from faithkd.bounds.reading import read
from faithkd.errors import FaithkdError
from faithkd.frozen import untouched

MATRIX = 2**15  # entries of a matrix, at most: with more, a convolution is faster


@dataclass(frozen=True)
class Node:
    """An operator and the places that it reads."""

    operator: Operator
    inputs: tuple[int, ...]


def spatial(node: Node) -> bool:
    """Whether it adds up numbers of some places, as convolutions and means do, not as a product with a matrix."""
    return isinstance(node.operator, Affine) and node.operator.mixes and not isinstance(node.operator, Linear)


@dataclass(frozen=True, eq=False)
class Network:
    """Nodes in an order in which they can be computed, and the shape of one image at every place, `(C,)` last."""

    nodes: tuple[Node, ...]
    shapes: tuple[Shape, ...]

    @property
    def classes(self) -> int:
        return self.shapes[-1][0]

    @functools.cached_property
    def splits(self) -> tuple[int, ...]:
        """The nodes at which a branch and bound can split."""
        return tuple(k for k, node in enumerate(self.nodes) if node.operator.splits)

    @functools.cached_property
    def small(self) -> bool:
        """Whether there are convolutions or means, all of images so small that matrices are faster."""
        return any(map(spatial, self.nodes)) and max(map(math.prod, self.shapes)) ** 2 <= MATRIX

    @functools.cached_property
    def single(self) -> "Network":
        """The same network in float32, with matrices where it is `small`: for looking around, never for a bound."""
        nodes = self.nodes
        if self.small:
            nodes = [
                replace(node, operator=Matrix(node.operator, self.shapes[node.inputs[0]])) if spatial(node) else node
                for node in nodes
            ]
        return replace(self, nodes=tuple(nodes)).to(torch.float32)

    def to(self, dtype: torch.dtype | None = None, device: torch.device | str | None = None) -> "Network":
        """The same in another precision, or on another device."""
        return replace(self, nodes=tuple(Node(node.operator.to(dtype, device), node.inputs) for node in self.nodes))

    def place(self, k: int) -> int:
        """The place that node k reads first."""
        return self.nodes[k].inputs[0]

    def before(self, place: int) -> list[int]:
        """The nodes that a place depends on."""
        needed = {place}
        for k in reversed(range(place)):
            if k + 1 in needed:
                needed.update(self.nodes[k].inputs)
        return [k for k in range(place) if k + 1 in needed]

    def values(self, z: Tensor) -> list[Tensor]:
        """What stands at every place for a batch of images `(N, *shape)`."""
        found = [z]
        for node in self.nodes:
            found.append(node.operator(*(found[place] for place in node.inputs)))
        return found

    def __call__(self, z: Tensor) -> Tensor:
        """The logits `(N, C)`, as the bounds understand the network."""
        return self.values(z)[-1]


class Operators(nn.Module):
    """A network that is read already, as those of files are: images `(N, *shape)` to logits `(N, C)`, for any N."""

    def __init__(self, network: Network) -> None:
        super().__init__()
        self.network = network

    @property
    def shape(self) -> Shape:
        """Of one image."""
        return self.network.shapes[0]

    def forward(self, x: Tensor) -> Tensor:
        """In the precision of the images, and where they are."""
        if tuple(x.shape[1:]) != self.shape:
            raise FaithkdError(f"it takes images of shape {self.shape}, not {tuple(x.shape[1:])}")
        return self.network.to(x.dtype, x.device)(x)


def prepare(network: nn.Module, shape: Shape, name: str = "network") -> Network:
    """The operators of `network` for images of `shape`, in float64 on the default device; the original is left alone.

    Raises FaithkdError, with the layer's position, for anything that cannot be bounded.
    """
    if untouched(network, Operators) and network.shape == tuple(shape):
        return network.network.to(device=torch.get_default_device())
    arguments.network(arguments.as_module(network), name)
    with torch.device("cpu"):
        nodes, shapes = read(network, shape, name)
    logits = shapes[-1]
    if len(logits) != 1 or logits[0] < 2:
        raise FaithkdError(
            f"{name} returns {('N', *logits)} for images of shape {tuple(shape)}; "
            "bounds need logits of shape (N, C) with C >= 2 classes"
        )
    nodes, shapes = used([Node(*node) for node in nodes], shapes)
    return behind_pools(nodes, shapes).to(device=torch.get_default_device())


def used(nodes: list[Node], shapes: list[Shape]) -> tuple[list[Node], list[Shape]]:
    """Only the nodes that the last one depends on."""
    kept = Network(tuple(nodes), tuple(shapes)).before(len(nodes))
    places = {0: 0} | {k + 1: place for place, k in enumerate(kept, 1)}
    nodes = [replace(nodes[k], inputs=tuple(places[place] for place in nodes[k].inputs)) for k in kept]
    return nodes, [shapes[place] for place in places]


def behind_pools(nodes: list[Node], shapes: list[Shape]) -> Network:
    """The network with max-pools before ReLUs: max(relu(z)) = relu(max(z)), where fewer units are not settled."""
    nodes, shapes = list(nodes), list(shapes)
    readers = [place for node in nodes for place in node.inputs]
    for k in range(1, len(nodes)):
        first, second = nodes[k - 1], nodes[k]
        kinds = type(first.operator), type(second.operator)
        if kinds == (ReLU, MaxPool2d) and second.inputs == (k,) and readers.count(k) == 1:
            nodes[k - 1], nodes[k] = replace(second, inputs=first.inputs), replace(first, inputs=(k,))
            shapes[k] = shapes[k + 1]
    return Network(tuple(nodes), tuple(shapes))


def prepare_pair(teacher: nn.Module, student: nn.Module, x: Tensor) -> tuple[Network, Network]:
    """Both networks checked for the images `x` `(N, *shape)` and against each other."""
    shape = tuple(x.shape[1:])
    both = prepare(teacher, shape, "teacher"), prepare(student, shape, "student")
    arguments.same_classes(both[0].classes, both[1].classes)
    return both


def check_images(x: Tensor) -> Tensor:
    """The images as float64 where they are, all finite, `(N, *shape)`, in the usual layout."""
    return arguments.images(x).to(dtype=torch.float64, copy=True).contiguous()  # nor made in inference mode


def outer_ball(x: Tensor, eps: float, clip: tuple | None = None) -> tuple[Tensor, Tensor]:
    """Ends of the ball B_eps(x) of Def. 2, each one ulp outwards: two tensors like `x`.

    `clip=(low, high)`, broadcastable to `x`, cuts the ball to the range of valid images. An image that leaves
    that range by no more than rounding keeps its own point; one that leaves it further is an error.
    """
    eps, (low, high) = arguments.radius(eps), arguments.clip_range(clip, x)
    infinity = torch.full_like(x, math.inf)
    lower, upper = torch.nextafter(x - eps, -infinity), torch.nextafter(x + eps, infinity)
    return torch.maximum(lower, torch.minimum(low, x)), torch.minimum(upper, torch.maximum(high, x))


def inner_ball(x: Tensor, eps: float, clip: tuple | None = None) -> tuple[Tensor, Tensor]:
    """Ends of what is certainly in the ball B_eps(x) and in `clip`, each rounded inwards: where a witness may lie.

    Of checked arguments. An image that leaves `clip` by rounding is moved into it, though not out of the ball.
    """
    # x - eps is rounded by less than one ulp, and is x itself where eps vanishes beside it
    lower, upper = torch.nextafter(x - float(eps), x), torch.nextafter(x + float(eps), x)
    low, high = arguments.clip_range(clip, x)
    return torch.minimum(torch.maximum(lower, low), upper), torch.maximum(torch.minimum(upper, high), lower)
