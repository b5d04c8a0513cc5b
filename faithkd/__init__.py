"""faithkd: the executable companion of the paper «Faithful Knowledge Distillation».

>>> import faithkd
>>> lower = faithkd.empirical_lower_bound(teacher, student, x, eps)
>>> upper = faithkd.faithfulness_upper_bound(teacher, student, x, eps)
"""

from importlib import import_module

from faithkd.errors import FaithkdError

_PUBLIC = {
    "empirical_lower_bound": "core.evaluation",
    "LowerBound": "core.evaluation",
    "faithfulness_upper_bound": "bounds",
    "faithfulness_upper_bounds": "bounds",
    "UpperBound": "bounds",
    "certified_agreement": "bounds",
    "load_onnx": "pairs.onnx",
    "load_pt2": "pairs.pt2",
    "export_question": "pairs.question",
}
# Modules that notebooks import by their short names: `from faithkd import data, experiment, figures`.
_MODULES = {
    **{name: f"core.{name}" for name in ("data", "models", "attacks", "losses", "training", "evaluation")},
    "params": "reproduce.params",
    "experiment": "reproduce.experiment",
    "parallel": "workers",
    "notebooks": "reproduce.notebooks",
    "tables": "report.tables",
    "figures": "report.figures",
    "calibration": "report.calibration",
    "ledger": "report.ledger",
    "paper": "report.paper",
    "watch": "report.watch",
}

__all__ = ["FaithkdError", *_PUBLIC]


def __getattr__(name: str):
    """Import torch and the rest only when they are asked for: the command line answers at once."""
    if name in _PUBLIC:
        return getattr(import_module(f"faithkd.{_PUBLIC[name]}"), name)
    if name in _MODULES:
        return import_module(f"faithkd.{_MODULES[name]}")
    raise AttributeError(f"module 'faithkd' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
