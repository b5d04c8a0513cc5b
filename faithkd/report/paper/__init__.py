"""The paper's own numbers, as printed in its tables and §6, to be laid beside ours."""

from pathlib import Path

STUDENTS = ("SD", "ARD", "RSLAD", "FD")
IMAGES = {"mnist": 1000, "fashion_mnist": 1000, "cifar10": 100}  # §6: the test images behind Tables 1, 2 and 5


def table(name: str):
    """The paper's `accuracy`, `table1`, `table2`, `table3` or `table5` as a DataFrame; radii ε stay text, "8/255"."""
    import pandas

    return pandas.read_csv(Path(__file__).parent / f"{name}.csv", dtype={"eps": str})
