"""The question "is δ* ≤ d?" for other verifiers: both networks on one input as ONNX, the ball as VNN-LIB."""

import warnings
from decimal import Decimal
from pathlib import Path

import torch
from torch import Tensor, nn

from faithkd import arguments
from faithkd.bounds.graph import check_images, outer_ball, prepare_pair
from faithkd.errors import FaithkdError
from faithkd.frozen import Logits, frozen, own_settings
from faithkd.pairs.onnx import compare
from faithkd.pairs.problems import about

OPSET = 18  # the oldest that torch writes


class Product(nn.Module):
    """Both networks on one input: f_t(x) − f_s(x) `(N, C)`, or all logits, the teacher's first, `(N, 2C)`.

    `ends`: which of them end in a softmax; their logits are the logarithms of what they return.
    """

    def __init__(self, pair: tuple[nn.Module, ...], ends: list[bool], confidences: bool) -> None:
        super().__init__()
        self.pair, self.ends, self.confidences = nn.ModuleList(pair), ends, confidences

    def forward(self, x: Tensor) -> Tensor:
        both = [(network(x), end) for network, end in zip(self.pair, self.ends, strict=True)]
        if not self.confidences:
            return torch.cat([z.log() if end else z for z, end in both], 1)
        teacher, student = (z if end else z.softmax(1) for z, end in both)
        return teacher - student


def export_question(
    teacher: nn.Module, student: nn.Module, x: Tensor, eps: float, d: float, folder: str | Path, clip=None
) -> list[Path]:
    """Write "is ‖f_t(x') − f_s(x')‖∞ ≤ d on all of B_ε(x)?", eq. (8), for other verifiers; returns the files' paths.

    `x` `(N, *shape)`, `eps` and `clip` as in `faithfulness_upper_bound`. `differences.onnx` maps one image to f_t − f_s
    `(1, C)`; `image-n.vnnlib` asks for a counterexample in the ball around image n, rounded outwards: "unsat" proves
    δ* ≤ d. `logits.onnx` returns both networks' logits `(1, 2C)`, for tools that know no softmax and question of their
    own. Both are compared with the networks by onnxruntime in the balls. Raises FaithkdError as the bounds do.
    """
    d, x = arguments.number("d", d), check_images(x).cpu()
    box, one = outer_ball(x, eps, clip), x[:1].float()
    if not len(one):
        raise FaithkdError("x holds no image to ask about")
    with own_settings(), torch.device("cpu"):
        classes = prepare_pair(teacher, student, x)[0].classes
        given = {"teacher": arguments.as_module(teacher), "student": arguments.as_module(student)}
        pair = frozen(given, torch.float32, one).networks
        ends = [ends_in_softmax(network, one) for network in pair]
    with about(folder, "no folder can be made there"):
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
    share = torch.rand(x.shape, generator=torch.Generator().manual_seed(0), dtype=x.dtype, device="cpu")
    points, paths = (box[0] + share * (box[1] - box[0])).float(), []
    for name, confidences in (("differences", True), ("logits", False)):
        paths.append(folder / f"{name}.onnx")
        write(Product(pair, ends, confidences), points, paths[-1])
    for number, corners in enumerate(zip(*box, strict=True)):
        paths.append(folder / f"image-{number}.vnnlib")
        paths[-1].write_text(question(*corners, d, classes), encoding="ascii")
    return paths


def ends_in_softmax(network: nn.Module, x: Tensor) -> bool:
    seen = Logits(network)
    seen(x)
    return seen.softmax == "softmax"


def question(lower: Tensor, upper: Tensor, d: float, classes: int) -> str:
    """One ball as VNN-LIB: inputs X_0 … row by row, outputs Y_0 … Y_{C-1}; satisfied where a |Y_i| exceeds d."""
    ends = list(zip(lower.flatten().tolist(), upper.flatten().tolist(), strict=True))
    most = decimal(str(d))
    lines = [f"; is there a point of the ball where the two confidences in a class differ by {most} or more?"]
    lines += [f"(declare-const X_{k} Real)" for k in range(len(ends))]
    lines += [f"(declare-const Y_{i} Real)" for i in range(classes)]
    for k, (low, high) in enumerate(ends):
        lines += [f"(assert (>= X_{k} {decimal(low)}))", f"(assert (<= X_{k} {decimal(high)}))"]
    parts = [part for i in range(classes) for part in (f"(and (>= Y_{i} {most}))", f"(and (<= Y_{i} -{most}))")]
    return "\n".join([*lines, "(assert (or", *(f"    {part}" for part in parts), "))", ""])


def decimal(number: float | str) -> str:
    """A number in full, without an exponent, which VNN-LIB does not know; floats exactly, so that no ball shrinks."""
    return f"{Decimal(number):f}"


def write(product: Product, x: Tensor, path: Path) -> None:
    """The product network for one image, all in one file, compared with what onnxruntime makes of it at points `x`."""
    options = {"input_names": ["X"], "output_names": ["Y"], "opset_version": OPSET, "external_data": False}
    # torch's own warnings are about parts of it that the exporter happens to use
    with about(path, "torch cannot export the pair"), warnings.catch_warnings(action="ignore"):
        import onnxscript  # noqa: F401, which torch's exporter needs

        torch.onnx.export(product, (x[:1],), path, dynamo=True, verbose=False, **options)
        compare(path, product, x, 1)
