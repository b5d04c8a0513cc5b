"""The ledger: the paper's numbers and claims beside ours, over several seeds.

Each seed draws teacher, students and test subset anew (`experiment.over_seeds`), so what differs from seed to seed
holds every source of chance that a single run, like the paper's, has.
"""

import numpy as np
import pandas as pd
from scipy.stats import norm
from scipy.stats import t as student_t

from faithkd.report import paper, tables
from faithkd.report.paper import STUDENTS

VERDICTS = ("within", "above", "below", "undecided")
LEVEL = 0.95  # of all intervals
KEYS = ["table", "dataset", "eps", "measure", "method"]  # what names a cell
NARROW = {"%": 5.0, "confidence": 0.25}  # up to ± 5 points, or ± a quarter of the paper's value, it says something
ROUNDING = {"accuracy": 0.005, "table1": 0.05, "table2": 5e-4, "table3": 0.0, "table5": 5e-4}  # of the paper's print
FLOAT_NOISE = 1e-4  # a smaller difference of two EmpLB may be rounding (claim C6)


# --- cells: every number that the paper prints and a run can repeat


def per_seed(accuracy=None, robustness=None, faithfulness=None, steps=None, alphas=None) -> pd.DataFrame:
    """Every cell of accuracy and Tables 1, 2, 3 and 5 from each seed: columns KEYS, `seed`, `value`.

    The frames come from `experiment.over_seeds` of `accuracy`, `robustness`, `faithfulness`, `pgd_steps` (here with a
    column `eps`) and `faithfulness(alphas=True)`. Percentages are in %, bounds in units of confidence.
    """
    made = [("accuracy", accuracy, lambda part: part), *_sampled(robustness, faithfulness, alphas)]
    made.append(("table3", steps, _table3))
    return pd.concat(
        [
            _long(make(part.drop(columns="seed")), name).assign(seed=seed)
            for name, frame, make in made
            if frame is not None
            for seed, part in frame.groupby("seed")
        ],
        ignore_index=True,
    )


def fewer(robustness, faithfulness, alphas=None) -> pd.DataFrame:
    """What the paper's smaller number of test images adds to the chance in each cell: columns KEYS and `drawn`.

    Where a seed has n images, at least twice the paper's m (`paper.IMAGES`, §6), they are cut into parts of m. If d is
    the standard deviation of the cell from part to part, a run with m images scatters by d √(1 − m/n) more than one
    with n. Frames as for `per_seed`. Empty where the paper has more images than half of ours.
    """
    found = []
    for name, frame, make in _sampled(robustness, faithfulness, alphas):
        dataset = None if frame is None else frame["dataset"].iloc[0]
        size = paper.IMAGES.get(dataset, np.inf)
        for seed, part in () if frame is None else frame.groupby("seed"):
            count = part["image"].nunique()
            for number, images in tables.parts(part, size) if count >= 2 * size else ():
                cell = _long(make(images.drop(columns="seed")), name)
                found.append(cell.assign(seed=seed, part=number, share=1 - size / count))
    if not found:
        return pd.DataFrame(columns=[*KEYS, "drawn"])
    each = pd.concat(found).groupby([*KEYS, "seed", "share"], sort=False)["value"].var().reset_index()
    each["drawn"] = each["share"] * each["value"]
    return each.groupby(KEYS, sort=False)["drawn"].mean().pow(0.5).reset_index()


def _sampled(robustness, faithfulness, alphas):
    """The tables that average over test images: (name, frame of measurements image by image, what makes it)."""
    return [
        ("table1", robustness, tables.table1),
        ("table2", faithfulness, tables.table2),
        ("table5", alphas, lambda part: tables.table2(part, by="alpha")),
    ]


def papers() -> pd.DataFrame:
    """Every cell of the paper that can be compared: columns KEYS and `paper`."""
    where = {"table3": {"dataset": "fashion_mnist", "eps": "8/255"}}  # §6.1, not in the table itself
    parts = [_long(paper.table(name).assign(**where.get(name, {})), name) for name in ROUNDING]
    return pd.concat(parts, ignore_index=True).rename(columns={"value": "paper"})


def _table3(steps: pd.DataFrame) -> pd.DataFrame:
    count = paper.table("table3")["example"].nunique()
    chosen = tables.table3(steps, tables.examples(steps, count))
    return chosen.assign(dataset=steps["dataset"].iloc[0], eps=steps["eps"].iloc[0])


def _long(table: pd.DataFrame, name: str) -> pd.DataFrame:
    """A table in the columns of the paper's CSV files as one row per cell: KEYS and `value`."""
    if name == "accuracy":
        long = table.melt(["dataset"], var_name="method").assign(eps="0", measure="accuracy")
    elif name == "table1":
        long = table.melt(["dataset", "eps"], var_name="column")
        long[["measure", "method"]] = long.pop("column").str.rsplit("_", n=1, expand=True)
        long["measure"] = long["measure"].str.replace("_", " ")
    elif name == "table3":
        long = _gained(table)
    else:
        by = "method" if "method" in table else "alpha"
        long = table.melt(["dataset", "eps", "bound", by], ["mean", "std"], var_name="what")
        long["measure"] = long["bound"].where(long["what"] == "mean", "std of " + long["bound"])
        long["method"] = long[by] if by == "method" else long[by].map("α = {:g}".format)
    return long.assign(table=name)[[*KEYS, "value"]]


def _gained(table3: pd.DataFrame) -> pd.DataFrame:
    """What can be compared of Table 3: the share (%) of its last EmpLB that fewer steps find, over its examples.

    The paper does not tell which images its examples are, so the values themselves mean nothing beside ours.
    """
    *fewer, last = (column for column in table3 if column.startswith("pgd"))
    names = {column: f"PGD-{column[3:]} of PGD-{last[3:]}" for column in fewer}
    shares = 100 * table3[fewer].div(table3[last], axis=0).rename(columns=names)
    frame = pd.concat([table3[["dataset", "eps", "method"]], shares], axis=1)
    keys = ["dataset", "eps", "method"]
    return frame.groupby(keys).mean().reset_index().melt(keys, var_name="measure")


def cells(values: pd.DataFrame, fewer: pd.DataFrame | None = None) -> pd.DataFrame:
    """The paper's value beside ours, cell by cell, and whether its run could have been one of ours.

    `values`: from `per_seed`; `fewer`: from the function of that name. Columns: KEYS; `unit`; `paper`; `ours`, the mean
    over k `seeds`; `low` and `high`, the 95 % interval of that mean, mean ± t s / √k; `least` and `most`, the 95 %
    prediction interval for *one more run*, mean ± t s √(1 + 1/k), with the t distribution of k − 1 degrees of freedom,
    or with fewer images in the paper ± √(t² s² (1 + 1/k) + 1.96² `drawn`²); `difference`, ours − paper; `relative`, its
    share of the paper's value; `verdict` on the paper's single run, rounded as printed:

    * "above", "below": the paper's value lies outside the prediction interval, and our mean is above or below it;
    * "within": it lies inside, and the interval is narrow: at most ± 5 points, or ± a quarter of the paper's value;
    * "undecided": it lies inside an interval too wide to say anything, or there is only one seed.
    """
    found = values.groupby(KEYS, sort=False)["value"].agg(ours="mean", spread="std", seeds="count").reset_index()
    found = found.merge(papers(), on=KEYS)
    percent = found["table"].isin(["accuracy", "table1", "table3"])
    found["unit"] = np.where(percent, "%", "confidence")
    half = _quantile(found["seeds"]) * found["spread"]
    drawn = 0.0 if fewer is None or fewer.empty else found.merge(fewer, "left", on=KEYS)["drawn"].fillna(0.0)
    error = half / np.sqrt(found["seeds"])
    reach = np.sqrt(half**2 * (1 + 1 / found["seeds"]) + (norm.ppf(0.5 + LEVEL / 2) * drawn) ** 2)
    found["low"], found["high"] = found["ours"] - error, found["ours"] + error
    found["least"], found["most"] = found["ours"] - reach, found["ours"] + reach
    found["difference"] = found["ours"] - found["paper"]
    found["relative"] = found["difference"] / found["paper"].where(found["paper"] != 0)
    limit = np.where(percent, NARROW["%"], NARROW["confidence"] * found["paper"])
    rounding = found["table"].map(ROUNDING)
    inside = found["difference"].abs() <= reach + rounding
    decided = np.where(inside, "within", np.where(found["difference"] > 0, "above", "below"))
    narrow = reach <= np.maximum(limit, rounding)
    found["verdict"] = np.where(reach.isna() | (inside & ~narrow), "undecided", decided)
    numbers = ["paper", "ours", "low", "high", "least", "most", "difference", "relative"]
    return found[[*KEYS, "unit", "seeds", *numbers, "verdict"]]


def _quantile(seeds, tests=1):
    """The two-sided t quantile for a mean over `seeds` values, with Bonferroni's correction for `tests` of them."""
    seeds = np.asarray(seeds, dtype=float)
    return np.where(seeds > 1, student_t.ppf(1 - (1 - LEVEL) / 2 / tests, np.maximum(seeds - 1, 1)), np.nan)


def summary(cells: pd.DataFrame) -> pd.DataFrame:
    """How many cells of each table and measure have which verdict, and `off`, the mean size of the difference.

    That is in points where the cells are percentages, else in % of the paper's value.
    """
    off = cells["difference"].abs().where(cells["unit"] == "%", 100 * cells["relative"].abs())
    groups = cells.assign(off=off).groupby(["table", "measure"], sort=False)
    counts = {v: groups["verdict"].agg(lambda column, v=v: int((column == v).sum())) for v in VERDICTS}
    parts = {"cells": groups.size(), **counts, "off": groups["off"].mean(), "unit": groups["unit"].first()}
    return pd.DataFrame(parts).reset_index()


def distances(readings: pd.DataFrame) -> pd.DataFrame:
    """How far each reading lies from the paper: the mean of |value − paper| over its cells, by measure.

    `readings` is that of `experiment.readings`; deviations (the paper's ±) are left out. One row per `reading`, a
    column per measure, in points, for bounds in units of confidence. Empty where the paper does not use the data set.
    """
    beside = readings[~readings["measure"].str.startswith("std")].merge(papers(), on=KEYS)
    off = (beside["value"] - beside["paper"]).abs()
    return beside.assign(off=off).pivot_table(index="reading", columns="measure", values="off", sort=False)


# --- claims C1 to C8: what the paper concludes


def claims(dataset: str, robustness, faithfulness, steps=None, alphas=None) -> pd.DataFrame:
    """The paper's claims about a data set, each tested at every radius ε and judged: one row per claim and radius.

    A margin is favourite minus rival (where low is good, rival minus favourite), image by image, averaged over the
    images of a seed: positive where the claim holds. Its mean over k `seeds` has the 95 % interval mean ± t s / √k,
    where s, the spread from seed to seed, counts as no less than what the draw of the images alone would give.

    * At a radius a claim `holds` ("yes") if the interval of *every* pair lies above 0, and fails ("no") if that of any
      pair, widened for their number, lies below 0; else it is "open". `pair`, `margin`, `low` and `high` are those of
      the pair that decides, whose interval reaches lowest; `shown` counts the seeds that alone would show the claim,
      with all margins above 0. FaithUB of a pair that has reached its ceiling is not compared.
    * `verdict`: "reproduced" if it holds at all radii that the paper claims; "not reproduced" if it fails at one, or
      if no seed shows it at more than half of them; else, and with one seed, "undecided". C5 says "nearly all": there
      one radius may differ.
    * C6 says that an order *can* flip: it holds if every seed has an image where it does, also with one seed.

    Where the paper does not use the data set, `claimed` is False: an illustration of the claim, no test of the paper.
    """
    parts = []
    for name, text, unit, margins in _claimed(dataset, robustness, faithfulness, steps, alphas):
        if margins.empty:  # a single radius, or none below the ceiling: nothing to compare
            continue
        radii = _existence(margins) if name == "C6" else by_radius(margins)
        verdict = judge(radii, exceptions=1 if name == "C5" else 0)
        parts.append(radii.assign(claim=name, text=text, unit=unit, verdict=verdict))
    found = pd.concat(parts, ignore_index=True).assign(dataset=dataset, claimed=tables.is_papers(dataset))
    columns = ["claim", "text", "dataset", "claimed", "eps", "pair", "unit", "margin", "low", "high", "seeds", "shown"]
    return found[[*columns, "holds", "verdict"]]


def _claimed(dataset: str, robustness, faithfulness, steps, alphas):
    """Yield (claim, sentence, unit, margins) for what the paper says of a data set; of unknown ones, as of MNIST."""
    best = "RSLAD" if dataset == "fashion_mnist" else "FD"
    attacked = agreed = robustness[robustness["eps"] != "0"]
    if dataset not in ("fashion_mnist", "cifar10"):  # C3 leaves out the smallest ε on MNIST
        agreed = attacked[attacked["eps"] != attacked["eps"].iloc[0]]
    yield "C1", "ARD, RSLAD, FD are more robust than SD", "%", lead(attacked, "robust", STUDENTS[1:], ["SD"])
    if dataset != "cifar10":
        yield "C2", "RSLAD is the most robust student", "%", lead(attacked, "robust", ["RSLAD"])
    yield "C3", f"{best} agrees best with RT", "%", lead(agreed, "agrees", [best])
    yield "C4", f"EmpLB is lowest for {best}", "confidence", lead(faithfulness, "EmpLB", [best])
    yield "C5", "FaithUB is lowest for FD, nearly always", "confidence", lead(faithfulness, "FaithUB", ["FD"])
    if steps is not None:
        yield "C6", "more PGD steps can flip RSLAD and FD (images)", "%", flipping(steps)
    if alphas is not None:
        most, least = alphas["alpha"].max(), alphas["alpha"].min()
        both = [lead(alphas, bound, [most], [least], by="alpha") for bound in tables.BOUNDS]
        yield "C7", "a larger α gives lower bounds", "confidence", pd.concat(both, ignore_index=True)
    yield "C8", "FaithUB − EmpLB is wider than at the first ε", "confidence", widening(faithfulness)


def lead(frame, measure: str, favourites, rivals=None, by: str = "method") -> pd.DataFrame:
    """By how much each favourite beats each rival (none given: all other students), image by image.

    `measure`: "robust" or "agrees", in points, or "EmpLB" or "FaithUB", where low is good. Returns a row per (eps,
    pair, seed, image) with `margin`.
    """
    radii = list(dict.fromkeys(frame["eps"]))
    wide = frame.pivot(index=["eps", "seed", "image"], columns=by, values=measure).astype(float)
    means = wide.groupby("eps").transform("mean")
    margins = {}
    for one in favourites if radii else ():
        for other in rivals or [method for method in STUDENTS if method != one]:
            margin = wide[other] - wide[one] if measure in tables.BOUNDS else 100 * (wide[one] - wide[other])
            if measure == "FaithUB":
                margin = margin[means[[one, other]].min(axis=1) <= tables.CEILING]
            margins[f"{measure}: {one} against {other}"] = margin
    return _long_margins(margins, ["pair", "eps", "seed", "image"], radii)


def widening(faithfulness: pd.DataFrame) -> pd.DataFrame:
    """How much wider FaithUB − EmpLB is than at the smallest ε, image by image, a pair for each student."""
    radii = list(dict.fromkeys(faithfulness["eps"]))
    gap = faithfulness.assign(gap=faithfulness["FaithUB"] - faithfulness["EmpLB"])
    wide = gap.pivot(index=["method", "seed", "image"], columns="eps", values="gap")
    margins = {eps: wide[eps] - wide[radii[0]] for eps in radii[1:]}
    return _long_margins(margins, ["eps", "pair", "seed", "image"], radii)


def flipping(steps: pd.DataFrame) -> pd.DataFrame:
    """100 for images on which the order of RSLAD and FD changes with the number of steps, by no float noise; else 0."""
    parts = {}
    for seed, part in steps.groupby("seed"):
        found = tables.flips(part).set_index("image")
        parts[seed] = 100.0 * ((found["flips"] > 0) & (found["margin"] > FLOAT_NOISE))
    frame = pd.concat(parts, names=["seed", "image"]).rename("margin").reset_index()
    return frame.assign(eps=steps["eps"].iloc[0], pair="RSLAD and FD")


def _long_margins(margins: dict, names: list[str], radii: list[str]) -> pd.DataFrame:
    if not margins:
        return pd.DataFrame(columns=["eps", "pair", "seed", "image", "margin"])
    frame = pd.concat(margins, names=names).rename("margin").reset_index()
    order = {eps: place for place, eps in enumerate(radii)}
    return frame.sort_values("eps", key=lambda eps: eps.map(order), kind="stable", ignore_index=True)


def by_radius(margins: pd.DataFrame) -> pd.DataFrame:
    """Per ε the pair that decides, its mean margin with the 95 % interval over seeds, and whether all pairs hold.

    `margins` has a row per (eps, pair, seed, image); the rule is that of `claims`.
    """
    seeds = margins.groupby(["eps", "pair", "seed"], sort=False)["margin"].agg(["mean", "sem"]).reset_index()
    seeds["drawn"] = seeds["sem"].fillna(0) ** 2  # the variance that the draw of the images alone gives a seed's mean
    groups = seeds.groupby(["eps", "pair"], sort=False)
    pairs = groups.agg(
        margin=("mean", "mean"), between=("mean", "var"), drawn=("drawn", "mean"), seeds=("seed", "size")
    )
    error = np.sqrt(np.fmax(pairs["between"], pairs["drawn"]) / pairs["seeds"])
    pairs["low"] = pairs["margin"] - _quantile(pairs["seeds"]) * error
    pairs["high"] = pairs["margin"] + _quantile(pairs["seeds"]) * error
    count = pairs.groupby("eps")["margin"].transform("size")
    pairs["fails"] = pairs["margin"] + _quantile(pairs["seeds"], count) * error < 0
    radii = pairs.groupby("eps", sort=False)
    holds = pd.Series("open", radii.size().index)
    holds[radii["low"].agg(lambda low: (low > 0).all())] = "yes"
    holds[radii["fails"].any()] = "no"
    shown = (seeds.groupby(["eps", "seed"])["mean"].min() > 0).groupby("eps").sum()
    order = pairs.sort_values(["fails", "low", "margin"], ascending=[False, True, True])  # one seed: no low, no fails
    decides = order.reset_index("pair").groupby("eps").head(1).loc[holds.index]
    return decides.assign(holds=holds, shown=shown).reset_index()[
        ["eps", "pair", "margin", "low", "high", "seeds", "shown", "holds"]
    ]


def _existence(margins: pd.DataFrame) -> pd.DataFrame:
    """As `by_radius`, for a claim that something exists: it does if every seed has it, and fails if none has."""
    radii = by_radius(margins)
    holds = ["yes" if row.shown == row.seeds else "open" if row.shown else "no" for row in radii.itertuples()]
    return radii.assign(holds=holds)


def judge(radii: pd.DataFrame, exceptions: int = 0) -> str:
    """The verdict on a claim from its radii (columns `seeds`, `shown`, `holds`); the rule is that of `claims`."""
    holds, count = radii["holds"].value_counts(), len(radii)
    against = (radii["shown"] == 0).sum() > count / 2 and radii["seeds"].min() > 1
    if holds.get("no", 0) > exceptions or against:
        return "not reproduced"
    return "reproduced" if holds.get("yes", 0) >= max(1, count - exceptions) else "undecided"
