"""faithkd: the executable companion of the paper «Faithful Knowledge Distillation».

>>> import faithkd
>>> lower = faithkd.empirical_lower_bound(teacher, student, x, eps)
>>> upper = faithkd.faithfulness_upper_bound(teacher, student, x, eps)
"""

from importlib import import_module

from faithkd.errors import FaithkdError

_PUBLIC = {
    "empirical_lower_bound": "evaluation",
    "LowerBound": "evaluation",
    "faithfulness_upper_bound": "bounds",
    "faithfulness_upper_bounds": "bounds",
    "UpperBound": "bounds",
    "certified_agreement": "bounds",
}

__all__ = ["FaithkdError", *_PUBLIC]


def __getattr__(name: str):
    """Import torch and the rest only when they are asked for: the command line answers at once."""
    if name not in _PUBLIC:
        raise AttributeError(f"module 'faithkd' has no attribute {name!r}")
    return getattr(import_module(f"faithkd.{_PUBLIC[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
