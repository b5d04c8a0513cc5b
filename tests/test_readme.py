"""README.md keeps its promises: short, its numbers are those of the committed figures, its snippet runs as printed."""

import re

import pandas as pd
import pytest
from conftest import REPOSITORY

TEXT = (REPOSITORY / "README.md").read_text(encoding="utf-8")
PROSE = " ".join(TEXT.split())


def committed(profile: str, name: str) -> pd.DataFrame:
    return pd.read_csv(REPOSITORY / "figures" / profile / f"{name}.csv", dtype={"eps": str})


def ours(profile: str, measure: str, eps: str, method: str) -> str:
    """Our mean ± half its interval, and in brackets the paper's, as README writes them."""
    rows = committed(profile, "ledger").query("eps == @eps and measure == @measure and method == @method")
    (row,) = rows[rows["table"].isin(["table1", "table2"])].to_dict("records")
    digits, half = (1 if row["unit"] == "%" else 3), (row["high"] - row["low"]) / 2
    return f"{row['ours']:.{digits}f} ±{half:.{digits}f} [{row['paper']:.{digits}f}]"


def closed(profile: str, eps: str) -> str:
    """By how much branch and bound lowers FD's mean upper bound, and the share of the gap to EmpLB that this closes."""
    (row,) = committed(profile, "best").query("eps == @eps and method == 'FD'").to_dict("records")
    return f"from {row['FaithUB']:.3f} to {row['BestUB']:.3f}, {row['closed']:.0f} % of the gap"


def findings() -> list[str]:
    """What README must say, from the committed figures."""
    told = [f"{m} {ours('mnist', 'robust accuracy', '0.2', m)}" for m in ("SD", "ARD", "RSLAD", "FD")]
    told += [f"{m} {ours('mnist', 'EmpLB', '0.1', m)}" for m in ("SD", "ARD", "RSLAD", "FD")]
    told += [f"FD {ours('mnist', 'agreement', '0.2', 'FD')}", f"FD {ours('mnist', 'FaithUB', '0.1', 'FD')}"]
    said = committed("fashion_mnist", "claims").groupby("claim")["verdict"].agg("; ".join)
    bound = committed("mnist", "ledger").query("table == 'table2' and measure == 'FaithUB' and eps == '0.1'")
    told += [f"and lowest for {bound.set_index('method')['ours'].idxmin()}, not FD"]
    told += ["FaithUB is lowest for FD, as claimed" if re.fullmatch(r"(no .+?; )?holds.*", said["C5"]) else "C5?"]
    told += ["so is EmpLB, where the paper has RSLAD" if re.fullmatch(r"(the opp[^;]+(; )?)+", said["C4"]) else "C4?"]
    return [*told, closed("mnist", "0.1"), closed("cifar10", "4/255")]


@pytest.mark.parametrize("sentence", findings())
def test_what_was_found_is_what_the_figures_say(sentence):
    assert sentence in PROSE


def test_it_is_short():
    assert len(TEXT.splitlines()) <= 140


def test_its_snippet_runs_as_printed(capsys):
    names = {}
    for code in re.findall(r"^```python\n(.*?)^```$", TEXT, re.MULTILINE | re.DOTALL):
        exec(compile(code, "README.md", "exec"), names)
    assert (names["lower"].values <= names["both"].values + 1e-9).all()
    assert (names["both"].values <= names["upper"].values + 1e-9).all()
    assert capsys.readouterr().out
