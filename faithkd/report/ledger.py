"""The ledger: the paper's numbers and claims beside ours, over several seeds.

Each seed draws teacher, students and test subset anew (`experiment.over_seeds`), so what differs from seed to seed
holds every source of chance that a single run, like the paper's, has. RULE says how claims are judged.
"""

from itertools import permutations

import numpy as np
import pandas as pd
from scipy.stats import norm, t

from faithkd.report import paper, tables
from faithkd.report.decide import HOLDS, JUDGED, MOST_SEEDS, UNDECIDED, decide, worst_first
from faithkd.report.paper import STUDENTS

# Fixed before the numbers were looked at, and printed on the claims page; `faithkd.report.decide` computes it.
RULE = """\
* **Pairs.** The students of a seed share teacher and test images. So a claim is judged by *margins*: favourite against
  rival, on the same images, averaged over them; positive where the claim is right. One number a seed.
* **Interval and test.** The mean margin over the seeds has a 95 % interval (BCa bootstrap over seeds) and beside it the
  p-value of a sign-flip permutation test, corrected for all rivals and radii of the claim by Holm's method. *Better* is
  the share of seeds with a positive margin: how likely a single run is to show the claim.
* **d**, the smallest difference that matters: one point of accuracy or agreement, 0.01 of confidence. That is one image
  of the hundred that the paper has for CIFAR-10, and on its thousand elsewhere one standard error of 90 % accuracy.
* *Holds*: the interval lies on the claimed side, and p < .05; *by more than d* where all of it lies beyond d. *The
  opposite holds*: the same on the other side. *No difference larger than d*: the 90 % interval lies inside ±d. As a
  bootstrap of few seeds is too sure of itself, a sign-flip test against d must agree. Where a difference is both shown
  and no larger than d, it is *real but negligible*. All else is *undecided*, with the seeds it would take (if mean and
  spread stay as they are, four of five repetitions decide) and the smallest margin that is supported.
* A claim is as good as its worst pair. Below six seeds, no p is below .05: all is undecided. FaithUB of two students at
  its ceiling is not compared. C6 says that an order *can* flip: one image shows it.
"""
VERDICTS = ("within", "above", "below", "undecided")  # on a number
LEVEL = 0.95  # of all intervals
KEYS = ["table", "dataset", "eps", "measure", "method"]  # what names a cell
NARROW = {"%": 5.0, "confidence": 0.25}  # up to ± 5 points, or ± a quarter of the paper's value, it says something
ROUNDING = {"accuracy": 0.005, "table1": 0.05, "table2": 5e-4, "table3": 0.0, "table5": 5e-4}  # of the paper's print
MARKS = dict(zip(JUDGED, "✗✗?≈✓✓✓", strict=True))
FLOAT_NOISE = 1e-4  # a smaller difference of two EmpLB may be rounding (claim C6)
LB_NOISE = 1e-12  # rounding when a lower bound is evaluated, in float64


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
        for _, part in () if frame is None else frame.groupby("seed"):
            count, size = part["image"].nunique(), paper.IMAGES.get(part["dataset"].iloc[0], np.inf)
            if count >= 2 * size:
                samples = [_long(make(few.drop(columns="seed")), name) for _, few in tables.parts(part, size)]
                found.append(pd.concat(samples).groupby(KEYS, sort=False)["value"].var() * (1 - size / count))
    if not found:
        return pd.DataFrame(columns=[*KEYS, "drawn"])
    return pd.concat(found).groupby(KEYS, sort=False).mean().pow(0.5).rename("drawn").reset_index()


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
    prediction interval for *one more run*, ± √(t² s² (1 + 1/k) + 1.96² `drawn`²), t of k − 1 degrees of freedom;
    `difference`, ours − paper; `relative`, its share of the paper's value; `verdict` on the paper's single run, rounded
    as printed:

    * "above", "below": the paper's value lies outside the prediction interval, and our mean is above or below it;
    * "within": it lies inside, and the interval is narrow: at most ± 5 points, or ± a quarter of the paper's value;
    * "undecided": it lies inside an interval too wide to say anything, or there is only one seed.
    """
    found = values.groupby(KEYS, sort=False)["value"].agg(ours="mean", spread="std", seeds="count").reset_index()
    found = found.merge(papers(), on=KEYS)
    drawn = 0.0 if fewer is None or fewer.empty else found.merge(fewer, "left", on=KEYS)["drawn"].fillna(0.0)
    percent, rounding = found["table"].isin(["accuracy", "table1", "table3"]), found["table"].map(ROUNDING)
    found["unit"] = np.where(percent, "%", "confidence")
    half = t.ppf(0.5 + LEVEL / 2, found["seeds"] - 1) * found["spread"]  # NaN for one seed, which has no spread
    error = half / np.sqrt(found["seeds"])
    reach = np.sqrt(half**2 * (1 + 1 / found["seeds"]) + (norm.ppf(0.5 + LEVEL / 2) * drawn) ** 2)
    found["low"], found["high"] = found["ours"] - error, found["ours"] + error
    found["least"], found["most"] = found["ours"] - reach, found["ours"] + reach
    found["difference"] = found["ours"] - found["paper"]
    found["relative"] = found["difference"] / found["paper"].where(found["paper"] != 0)
    limit = np.where(percent, NARROW["%"], NARROW["confidence"] * found["paper"])
    inside, narrow = found["difference"].abs() <= reach + rounding, reach <= np.maximum(limit, rounding)
    cases = [reach.isna() | (inside & ~narrow), inside, found["difference"] > 0]
    found["verdict"] = np.select(cases, ["undecided", "within", "above"], "below")
    numbers = ["paper", "ours", "low", "high", "least", "most", "difference", "relative"]
    return found[[*KEYS, "unit", "seeds", *numbers, "verdict"]]


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


def changes(readings: pd.DataFrame, shown: list[tuple[str, str, str]]) -> pd.DataFrame:
    """`experiment.readings`, or `settings`, for people: a row per reading, a column for each (measure, method, ε).

    First the paper, if it has these numbers, then the unchanged profile from the lowest to the highest of its seeds; a
    value outside this range stands between two stars.
    """
    theirs = papers().rename(columns={"paper": "value"}).assign(reading="paper")
    theirs = theirs[theirs["dataset"] == readings["dataset"].iloc[0]]
    both, as_is, columns = pd.concat([theirs, readings]), readings["reading"].iloc[0], {}
    for measure, method, eps in shown:
        part = both[(both["measure"] == measure) & (both["method"] == method) & (both["eps"] == eps)]
        ends = part.groupby("reading", sort=False)["value"].agg(["min", "max"])
        if as_is not in ends.index:  # a network that was not trained
            continue
        digits = 3 if measure in tables.BOUNDS else 1
        title = f"{method}: {measure}" + (f", ε = {eps}" if eps != "0" else "")
        columns[title] = {
            name: " to ".join(dict.fromkeys(f"{end:.{digits}f}" for end in (low, high)))
            if name == "paper" or ends.loc[as_is, "min"] <= low <= high <= ends.loc[as_is, "max"]
            else f"**{low:.{digits}f}**"
            for name, (low, high) in ends.iterrows()
        }
    return pd.DataFrame(columns).rename(index={as_is: f"{as_is}, all seeds"}).fillna("–")


# --- claims C1 to C8: what the paper concludes


def claims(dataset: str, robustness, faithfulness, steps=None, alphas=None) -> pd.DataFrame:
    """The paper's claims about a data set, judged by RULE: one row per claim and radius ε, that of the worst pair.

    The frames are those of `experiment.over_seeds`, image by image, or means over the images of each seed (but for
    `steps`). Columns: claim, text, dataset, eps, pair, unit, and those of `decide`. Where the paper does not use the
    data set, `claimed` is False: an illustration of the claim, no test of the paper.
    """
    parts = []
    for name, text, unit, margins in _claimed(dataset, robustness, faithfulness, steps, alphas):
        if margins.empty:  # a single radius, or none below the ceiling: nothing to compare
            continue
        known = decide(margins, unit).reset_index()
        if name == "C6":
            shown = known["most"] > 0
            known = known.assign(verdict=np.where(shown, HOLDS, UNDECIDED), p=np.nan, needed=np.nan)
        known["needed"] = known.groupby("eps")["needed"].transform("max")  # until all pairs are decided
        worst = worst_first(known).drop_duplicates("eps").set_index("eps").loc[known["eps"].unique()]
        parts.append(worst.reset_index().assign(claim=name, text=text, unit=unit))
    found = pd.concat(parts, ignore_index=True).assign(dataset=dataset, claimed=tables.is_papers(dataset))
    names = ["claim", "text", "dataset", "claimed", "eps", "pair", "unit"]
    return found[[*names, *(column for column in found if column not in names)]]


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
        yield "C7", "a larger α gives lower bounds", "confidence", pd.concat(both)
    yield "C8", "FaithUB − EmpLB is wider than at the first ε", "confidence", widening(faithfulness)


def lead(frame, measure: str, favourites, rivals=None, by: str = "method") -> pd.DataFrame:
    """By how much each favourite beats each rival (none given: all other students): rows (eps, pair), a column a seed.

    `measure`: "robust" or "agrees", in points, or "EmpLB" or "FaithUB", where low is good.
    """
    means, margins = _means(frame, measure, by), {}
    for one in favourites if len(means) else ():
        for other in rivals or [method for method in STUDENTS if method != one]:
            margin = (means[other] - means[one]) * (1 if measure in tables.BOUNDS else -100)
            if measure == "FaithUB":
                margin = margin[np.minimum(means[one].mean(axis=1), means[other].mean(axis=1)) <= tables.CEILING]
            margins[f"{measure}: {one} against {other}"] = margin
    return pd.concat(margins, names=["pair"]).swaplevel() if margins else pd.DataFrame()


def _means(frame: pd.DataFrame, measure: str, by: str = "method") -> pd.DataFrame:
    """The mean over the images of each seed: a row per ε, columns (by, seed)."""
    return frame.astype({measure: float}).pivot_table(measure, "eps", [by, "seed"], sort=False)


def widening(faithfulness: pd.DataFrame) -> pd.DataFrame:
    """How much wider FaithUB − EmpLB is than at the smallest ε, a pair for each student: as `lead`."""
    gap = _means(faithfulness, "FaithUB") - _means(faithfulness, "EmpLB")
    wider = gap.iloc[1:] - gap.iloc[0]
    return wider.stack("method", future_stack=True).rename_axis(index={"method": "pair"})


def flipping(steps: pd.DataFrame) -> pd.DataFrame:
    """The images (%) on which the order of RSLAD and FD changes with the steps, by no float noise: as `lead`."""
    shares = {}
    for seed, part in steps.groupby("seed"):
        found = tables.flips(part)
        shares[seed] = 100 * float(((found["flips"] > 0) & (found["margin"] > FLOAT_NOISE)).mean())
    row = pd.MultiIndex.from_tuples([(steps["eps"].iloc[0], "RSLAD and FD")], names=["eps", "pair"])
    return pd.DataFrame(shares, index=row)


# --- the claims page


def overview(judged: pd.DataFrame) -> pd.DataFrame:
    """One row a claim of `claims`: the one of its worst radius, with `mark` and the verdict at all radii in `words`.

    C5 says "nearly all": there it is that of the worst radius but one.
    """
    rows = []
    for claim, part in judged.groupby("claim", sort=False):
        ranked = worst_first(part)
        decides = ranked.iloc[1 if claim == "C5" and len(part) > 1 else 0]
        rows.append(decides.to_dict() | {"mark": MARKS[decides["verdict"]], "words": _words(part)})
    return pd.DataFrame(rows)


def _words(part: pd.DataFrame) -> str:
    """How often each verdict was given, the best first; for what is undecided, what would decide it."""
    d, digits = ("1 point", 1) if part["unit"].iloc[0] == "%" else ("0.01", 3)
    counts = part["verdict"].value_counts()
    text = "; ".join(
        f"{name.replace('than d', f'than {d}')}, at {counts[name]} of {len(part)} ε"
        for name in reversed(JUDGED)
        if name in counts
    )
    open_ = part[part["verdict"] == UNDECIDED]
    if open_["needed"].isna().all():
        return text
    seeds = f"{open_['needed'].max():.0f}" if open_["needed"].max() <= MOST_SEEDS else f"over {MOST_SEEDS}"
    apart = f"; so far: at most {open_['supported'].max():.{digits}f} apart" if open_["supported"].notna().all() else ""
    return f"{text} (it would take {seeds} seeds{apart})"


def interval(row) -> str:
    """A margin with its interval for people: "+0.012 [+0.004, +0.020]", in points or units of confidence."""
    digits, unit = (1, " points") if row["unit"] == "%" else (3, "")
    ends = "" if np.isnan(row["low"]) else f" [{row['low']:+z.{digits}f}, {row['high']:+z.{digits}f}]"
    return f"{row['margin']:+z.{digits}f}{ends}{unit}"


def page(found: dict[str, pd.DataFrame]) -> list[str]:
    """The claims page in Markdown from the `claims` of each profile: RULE, then a row a claim and data set."""
    found = {profile: table for profile, table in found.items() if table["claimed"].all()}
    summary = "<summary>The rule, fixed before the numbers were looked at</summary>"
    lines = [f"<details>{summary}", "", *RULE.splitlines(), "", "</details>", ""]
    lines += ["| claim | profile, seeds | margin where it is weakest | verdict |", "|---|---|---|---|"]
    rows = [row | {"profile": name} for name, table in found.items() for row in overview(table).to_dict("records")]
    for row in sorted(rows, key=lambda row: row["claim"]):  # stable: the profiles keep their order
        name, where = f"{row['mark']} {row['claim']}: {row['text']}", f"`{row['profile']}`, {row['seeds']}"
        lines.append(f"| {name} | {where} | {interval(row)} at ε = {row['eps']} | {row['words']} |")
    return lines


# --- proved, image by image


def proved(bounds: pd.DataFrame) -> pd.DataFrame:
    """On how many images one student is *proved* more faithful than another: its upper bound < the other's lower one.

    δ* lies between its bounds, so no statistics are needed. `bounds` has a row per (eps, method, image, perhaps
    seed) with EmpLB and FaithUB; tighter ends, from `experiment.best` and `strong`, are taken where they are. Returns a
    row per ε and ordered pair of students: `student`, `rival`, and of `images` the shares (%) that are `proved` for the
    student, `lost` (proved for the rival) and `open`. Raises AssertionError where a lower bound exceeds an upper one.
    """
    upper = bounds[bounds.columns.intersection(["FaithUB", "BestUB"])].min(axis=1)
    lower = bounds[bounds.columns.intersection(["EmpLB", "StrongLB", "BestLB"])].max(axis=1)
    if not (lower <= upper + LB_NOISE).all():
        raise AssertionError("a lower bound lies above an upper bound: one is wrong, please report it")
    names = [name for name in ("eps", "seed", "image") if name in bounds]
    ends = bounds.assign(upper=upper, lower=lower).pivot(index=names, columns="method", values=["lower", "upper"])
    rows = []
    for eps in bounds["eps"].unique():
        low, high = ends.loc[eps, "lower"], ends.loc[eps, "upper"] + LB_NOISE
        for one, other in permutations(bounds["method"].unique(), 2):
            won, lost = (100.0 * (high[a] < low[b]).mean() for a, b in ((one, other), (other, one)))
            rows.append((one, other, eps, won, lost, 100 - won - lost, len(low)))
    return pd.DataFrame(rows, columns=["student", "rival", "eps", "proved", "lost", "open", "images"])
