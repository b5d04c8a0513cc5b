"""Mistakes planted in copies of the bounds: the checks of `soundness` must notice every one of them.

A mistake that survives means that a check is missing. Each is a piece of text that must be found exactly once, so none
can become a copy without a mistake when the code changes.
"""

import importlib
import shutil
import sys
from pathlib import Path

import pytest
import soundness

import faithkd.bounds

PACKAGE = Path(faithkd.bounds.__file__).parent
SEEN = ("agreement", "apart", "branch", "joint", "ladder", "linear", "network", "patches", "softmax", "tree")

MISTAKES = {
    # one layer
    "the upper line's shift has the wrong sign": ("linear", "-slope * lower, 0.0)", "slope * lower, 0.0)"),
    "the upper line's slope is the other end's": ("linear", "upper / (upper - lower)", "-lower / (upper - lower)"),
    "a settled unit may have any slope": ("linear", "line.free & (slopes >= 0) & (slopes <= 1)", "(slopes >= 0)"),
    "slopes above 1 are allowed": ("linear", "(slopes >= 0) & (slopes <= 1)", "(slopes >= 0)"),
    "the radius goes through signed weights": (
        "linear",
        "affine(layer, radius, layer.weight.abs(), None) + slack",
        "affine(layer, radius, layer.weight, None) + slack",
    ),
    "a pool's chord begins too low": ("linear", "second - slope * low_first", "low_first - slope * low_first"),
    "a pool forgets its rivals": ("linear", "decided = low_first >= second", "decided = first >= second"),
    "weights over a window do not sum to 1": ("linear", "weights / total.clamp(min=1e-6)", "weights"),
    # one network
    "rows above and below are exchanged": (
        "linear",
        "positive * line.above + negative * allowed(slopes.get(k), line)",
        "negative * line.above + positive * allowed(slopes.get(k), line)",
    ),
    "the shift is dropped": ("linear", "dot(positive, line.shift)", "0 * dot(positive, line.shift)"),
    "the bias is dropped": (
        "linear",
        "if layer.bias is not None:\n                total",
        "if False:\n                total",
    ),
    "the ball has no radius": ("linear", "dot(rows.abs(), radius + slack)", "dot(rows, radius + slack)"),
    "no slack for rounding": ("linear", "return 2 * (terms + 16) * 2.0**-53", "return 0.0 * terms"),
    "lower ends are not turned round": ("linear", "torch.maximum(low, -lowest)", "torch.maximum(low, lowest)"),
    "differences are taken the other way round": (
        "linear",
        "unit[pairs[:, 1]] - unit[pairs[:, 0]]",
        "unit[pairs[:, 0]] - unit[pairs[:, 1]]",
    ),
    "a box's differences use one end twice": (
        "linear",
        "upper.unsqueeze(1) - lower.unsqueeze(2)",
        "upper.unsqueeze(1) - upper.unsqueeze(2)",
    ),
    # one network, patch by patch
    "a shared pixel counts once only": ("patches", "there += here", "there += 0 * here"),
    "patches go to the wrong neighbour": (
        "patches",
        "narrow(2 + axis, 0, shared)",
        "narrow(2 + axis, patches.size[axis] - shared, shared)",
    ),
    "a patch has no radius": ("patches", "pixels.abs_()", "pixels"),
    "the middle of a patch is dropped": ("patches", "return (value + radius", "return (0 * value + radius"),
    "no noise in patches": ("linear", "up, down = up + noise, down + noise", ""),
    "a pool's shift is dropped in patches": (
        "linear",
        "up, down = line.shift[:, 0], None",
        "up, down = 0 * line.shift[:, 0], None",
    ),
    # softmax and what both networks share
    "lowest and highest differences are exchanged": (
        "softmax",
        "lowest = -highest.transpose(-1, -2)",
        "lowest = highest",
    ),
    "the entropy is dropped": ("joint", "constant - k_upper * entropy", "constant"),
    "the entropy has the wrong sign": ("joint", "-(logs.exp() * logs", "(logs.exp() * logs"),
    "a chord starts at the wrong end": (
        "joint",
        "torch.maximum(low.exp() - slope * low, high.exp() - slope * high)",
        "low.exp() - slope * high",
    ),
    "a chord is a tangent": (
        "joint",
        "(high.exp() - low.exp()) / (high - low)",
        "low.exp() * (high - low) / (high - low)",
    ),
    "the extremum inside is forgotten": ("joint", "for m in (low, high, inside)", "for m in (low, high)"),
    "maximum and minimum of the tangent are exchanged": (
        "joint",
        "values.amax(0) if sign > 0",
        "values.amin(0) if sign > 0",
    ),
    "the tangent of ln has the wrong sign": ("joint", '+ rows["s"] - 1)', '- rows["s"] - 1)'),
    "the tangent of ln lacks its -1": ("joint", '+ rows["s"] - 1)', '+ rows["s"])'),
    "the reference class is dropped": (
        "joint",
        "ref - own + slope - ref * slope.sum(1, keepdim=True)",
        "ref - own + slope",
    ),
    "multipliers take the nearer end": (
        "joint",
        'torch.maximum(cut * rows["near"][:, 0], cut * rows["near"][:, 1])',
        'torch.minimum(cut * rows["near"][:, 0], cut * rows["near"][:, 1])',
    ),
    "teacher and student are exchanged": (
        "joint",
        "torch.where(first, upper, lower), ",
        "torch.where(first, lower, upper), ",
    ),
    "phases push the wrong way": ("joint", "push * signs[k] *", "-push * signs[k] *"),
    "eq. (11) takes the wrong end": (
        "joint",
        'torch.sigmoid(rows["range"][:, 2])',
        'torch.sigmoid(rows["range"][:, 3])',
    ),
    "the range of m takes one side twice": ("joint", "high = -(-down)", "high = -(-up)"),
    "the range of z_j - z_r is turned round": (
        "joint",
        "[-highest[here, :, ref], highest[here, ref]]",
        "[-highest[here, ref], highest[here, :, ref]]",
    ),
    "the order of the pair is exchanged in L": (
        "joint",
        "of_lower = torch.where(first, highest[1][image], highest[0][image])",
        "of_lower = torch.where(first, highest[0][image], highest[1][image])",
    ),
    "ranges of U and L are exchanged": (
        "joint",
        "torch.cat([torch.where(first, teacher, student), torch.where(first, student, teacher)], 1)",
        "torch.cat([torch.where(first, student, teacher), torch.where(first, teacher, student)], 1)",
    ),
    # parts of the ball
    "one order of a pair is left out": (
        "apart",
        "torch.stack([high_t - low_s, high_s - low_t], 1)",
        "torch.stack([high_t - low_s, high_t - low_s], 1)",
    ),
    "on is off": ("tree", "= 1.0, -1.0", "= -1.0, 1.0"),
    "a half is cut too far": (
        "tree",
        "torch.minimum(column[hit + count, unit[hit]], cut[hit])",
        "torch.minimum(column[hit + count, unit[hit]], cut[hit] - 0.1)",
    ),
    "an input is halved at 0": ("tree", "torch.where(network == BOTH, middle, cut)", "cut"),
    "the input's boxes are other domains'": (
        "tree",
        'return domains[f"low.{INPUT}"], domains[f"high.{INPUT}"]',
        'return domains[f"low.{INPUT}"].flip(0), domains[f"high.{INPUT}"].flip(0)',
    ),
    "a domain that is nearly empty is dropped": ("tree", "low > high + 1e-9", "low > high - 0.3"),
    "another image's ball": (
        "tree",
        'tuple(end[domains["image"]] for end in root.bounds[0])',
        'tuple(end[0 * domains["image"]] for end in root.bounds[0])',
    ),
    "the range of a tree is its smallest": (
        "apart",
        'over(tree, "high", images, "amax")',
        'over(tree, "high", images, "amin")',
    ),
    "differences of a tree are its smallest": (
        "apart",
        'over(tree, "highest", images, "amax")',
        'over(tree, "highest", images, "amin")',
    ),
    "one half of a tree's split is lost": (
        "apart",
        "pick(join(parents, parents) | halves, ~empty)",
        "pick(join(parents, parents) | halves, ~empty & (torch.arange(len(empty)) < len(layer)))",
    ),
    "a network whose turn it is not loses its tree": (
        "apart",
        "return tree, image[chosen]",
        "return pick(tree, chosen), image[chosen]",
    ),
    "up and down are exchanged": ("apart", "up, down = backward", "down, up = backward"),
    # branch and bound
    "the bound is the smallest leaf": (
        "branch",
        'self.closed.scatter_reduce(0, image, self.rows["value"], "amax")',
        'torch.full_like(self.closed, 2.0).scatter_reduce(0, image, self.rows["value"], "amin")',
    ),
    "closed rows are forgotten": (
        "branch",
        'rows | {"domain": number}, closed, leaves.lower',
        'rows | {"domain": number}, leaves.closed, leaves.lower',
    ),
    "one half of a split is lost": (
        "branch",
        'pick(moved, ~empty[moved["domain"]])',
        'pick(moved, moved["domain"] < int(whole.sum()))',
    ),
    "rows not worth a descent are lost": (
        "branch",
        "rows = join(pick(rows, stays), pick(moved, ~worth))",
        "rows = pick(rows, stays)",
    ),
    "rows that were not split are lost": (
        "branch",
        "rows = join(pick(rows, stays), pick(moved, ~worth))",
        "rows = join(pick(rows, stays)[:0] if False else pick(rows, stays & False), pick(moved, ~worth))",
    ),
    "one half of a cut is lost": ("branch", "halves = join(below, above)", "halves = join(below, below)"),
    "a difference is cut at the wrong end": (
        "branch",
        'above["near"][hit, 0, unit[hit]]',
        'above["near"][hit, 1, unit[hit]]',
    ),
    "a new reference class keeps the old one's range": (
        "branch",
        "low - high[here, to][:, None], high - low[here, to][:, None]",
        "low - low[here, to][:, None], high - high[here, to][:, None]",
    ),
    "the other network's range is narrowed": ("branch", "torch.where(of_upper, 0, 2)", "torch.where(of_upper, 2, 0)"),
    "what is inherited is another order's": (
        "branch",
        "torch.where(first, teacher, student), torch.where",
        "torch.where(first, student, teacher), torch.where",
    ),
    "a corner outside the ball is a witness": ("branch", "(x - middle) * (1 - 1e-12)", "(x - middle) * (1 + 1e-12)"),
    "a witness is never moved": (
        "branch",
        "witnesses[image[better]] = found[better], x[better]",
        "witnesses[image[better]] = found[better], witnesses[image[better]]",
    ),
    # the ends
    "agreement forgives a small disagreement": ("agreement", "(highest < 0)", "(highest < 0.5)"),
    "agreement confuses winner and rival": ("agreement", "(highest < 0).any(1)", "(highest < 0).any(2)"),
    "agreement looks at one rival": ("agreement", "True).all(1)", "True).sum(1) > 1"),
    "agreement asks the teacher only": ("agreement", "for root in roots:", "for root in roots[:1]:"),
    "agreement is claimed when the nodes run out": ("agreement", "return asked & (left == 0)", "return asked"),
    "what is not finite is certified": ("ladder", "torch.where(finite, bound, 1.0)", "torch.where(finite, bound, 0.5)"),
    "each method stands alone": ("ladder", ".cummin(0).values", ""),
    "the largest rung but one": ("ladder", 'torch.minimum(whole["joint"][some], leaves.upper)', "leaves.lower"),
}


@pytest.fixture
def copied(tmp_path, monkeypatch):
    """A function from a mistake to the package with it, under a name of its own."""
    monkeypatch.syspath_prepend(str(tmp_path))
    before = set(sys.modules)

    def copy(module=None, text="", instead=""):
        shutil.copytree(PACKAGE, tmp_path / "copied", ignore=shutil.ignore_patterns("__pycache__"))
        for path in (tmp_path / "copied").glob("*.py"):
            code = path.read_text()
            if path.stem == module:
                assert code.count(text) == 1, f"{module}.py no longer holds exactly one {text!r}: adapt the mistake"
                code = code.replace(text, instead)
            path.write_text(code.replace("faithkd.bounds", "copied"))
        importlib.invalidate_caches()
        for name in SEEN:
            importlib.import_module(f"copied.{name}")
        return sys.modules["copied"]

    yield copy
    for name in set(sys.modules) - before:
        if name.partition(".")[0] == "copied":
            del sys.modules[name]


def noticed(package, module):
    """The first check that fails, those of the changed module before all others.

    Only an assertion counts: a mistake must not be found because it happens to crash.
    """
    for check in sorted(soundness.CHECKS, key=lambda check: soundness.CHECKS[check] != module):
        try:
            check(package)
        except AssertionError:
            return check.__name__
    return None


def test_a_copy_is_the_package_itself(copied):
    package = copied()
    assert Path(package.__file__).parent != PACKAGE
    for check in (soundness.lines_hold, soundness.forms_hold, soundness.trees_hold):
        check(package)


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistake_is_noticed(copied, mistake):
    module = MISTAKES[mistake][0]
    assert noticed(copied(*MISTAKES[mistake]), module) is not None
