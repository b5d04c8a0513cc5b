"""`faithkd bound`: the bracket of a pair of networks in files, image by image."""

import csv
from pathlib import Path
from typing import Annotated

import typer

from faithkd.errors import FaithkdError

ROUNDING = 1e-9  # of float64, where EmpLB is evaluated
COLUMNS = ("image", "EmpLB", "FaithUB", "status", "seconds")


def bound(
    teacher: Annotated[Path, typer.Argument(help="A network: .onnx, or .pt2 by torch.export.save.")],
    student: Annotated[Path, typer.Argument(help="Another one, on the same images and classes.")],
    images: Annotated[Path, typer.Argument(help="Images (N, *shape) as the networks take them: .npy or .npz.")],
    eps: Annotated[float | None, typer.Option(help="Radius of the ball, in the units of the images.")] = None,
    method: Annotated[
        str, typer.Option(help="interval, crown, alpha-crown, lp, milp, rows, joint, bab or best.")
    ] = "crown",
    budget: Annotated[float | None, typer.Option(help="Seconds per image (bab, best).")] = None,
    nodes: Annotated[int | None, typer.Option(help="Parts of the ball per image (bab, best); repeats exactly.")] = None,
    clip: Annotated[
        tuple[float, float] | None, typer.Option(metavar="LOW HIGH", help="The range of valid images.")
    ] = None,
    device: Annotated[str | None, typer.Option(help="Where to compute: cpu, cuda, …")] = None,
    table: Annotated[Path | None, typer.Option("--csv", help="Write the table there as well.")] = None,
    witnesses: Annotated[
        Path | None, typer.Option(help="Write the images at which EmpLB is attained there, as .npz.")
    ] = None,
    check: Annotated[
        bool, typer.Option("--check", help="Say what the pair is and whether the images fit it, and stop.")
    ] = False,
) -> None:
    """How far two networks differ around each image: EmpLB (found) and FaithUB (proved) of networks in files."""
    if eps is None and not check:
        raise FaithkdError("--eps is missing: the radius of the ball, in the units of the images; or ask with --check")
    import numpy as np  # and torch, only now: help comes at once

    import faithkd
    from faithkd import arguments
    from faithkd.bounds import METHODS
    from faithkd.pairs import files

    arguments.choice("method", method, METHODS)
    for target in (table, witnesses):
        if target is not None and not target.parent.is_dir():
            raise FaithkdError(f"{target}: the folder {target.parent} is not there; make it, or name another one")
    pair = {"teacher": files.load_network(teacher), "student": files.load_network(student)}
    x = files.fitting(pair, files.load_images(images))
    if check:
        print("\n".join(files.report(pair, x)))
        return
    upper = faithkd.faithfulness_upper_bound(
        *pair.values(), x, eps, method=method, budget=budget, nodes=nodes, clip=clip, device=device, progress=True
    )
    lower = faithkd.empirical_lower_bound(*pair.values(), x, eps, clip=clip, device=device)
    found, points = lower.values, lower.witnesses.double().cpu()
    if upper.lower is not None:  # these methods search as well
        better = upper.lower > found
        found, points[better] = found.maximum(upper.lower), upper.witnesses.cpu()[better]
    if (found > upper.values + ROUNDING).any():
        raise FaithkdError("EmpLB is above FaithUB: one of them is wrong; please report it, with the files")
    numbers = found.tolist(), upper.values.tolist(), upper.status, upper.seconds.tolist()
    rows = list(zip(range(len(x)), *numbers, strict=True))
    print("image   EmpLB  FaithUB  seconds  status")
    for number, low, high, status, seconds in rows:
        print(f"{number:>5}  {low:.4f}   {high:.4f}  {seconds:>7.3f}  {status}")
    print(f" mean  {found.mean():.4f}   {upper.values.mean():.4f}  {upper.seconds.mean():>7.3f}  {method}, eps {eps:g}")
    if table is not None:
        with open(table, "w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([COLUMNS, *rows])
    if witnesses is not None:
        np.savez(witnesses, x=points.numpy(), EmpLB=found.numpy())
