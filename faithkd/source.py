"""What code says apart from its comments, docstrings and layout: to notice when a result was made by other code."""

import ast
import hashlib
import inspect
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from textwrap import dedent
from types import CodeType

CONSTANTS = (bool, int, float, complex, str, bytes, tuple)
DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


def structure(node):
    """A syntax tree as nested lists, without docstrings; `ast.dump` is not the same in all versions of Python."""
    if isinstance(node, list):
        return [structure(entry) for entry in node]
    if not isinstance(node, ast.AST):
        return ascii(node)
    fields = dict(ast.iter_fields(node))
    if isinstance(node, DOCUMENTED) and ast.get_docstring(node):
        fields["body"] = node.body[1:]
    if isinstance(node, ast.JoinedStr):  # 3.12 adds empty pieces
        fields["values"] = [piece for piece in node.values if getattr(piece, "value", None) != ""]
    kept = [[name, structure(value)] for name, value in fields.items() if value is not None and value != []]
    return [type(node).__name__, *kept]


def digest(*functions: Callable) -> str:
    """16 hexadecimal digits that change with what the functions do, wherever they are written, notebooks included.

    The functions of the same module that they use count too, and so do plain constants that they name. A
    functools.partial counts as its function and what it fills in. Empty where the source of one cannot be read, as for
    functions typed into a bare interpreter.
    """
    todo, seen, said = list(functions), [], []
    while todo:
        function = todo.pop(0)
        if isinstance(function, partial):
            used = list(function.keywords.items())
            todo += [function.func, *(f for _, f in used if callable(f))]
        elif function in seen:
            continue
        else:
            seen.append(function)
            try:
                said.append(structure(ast.parse(dedent(inspect.getsource(function)))))
            except (OSError, TypeError, SyntaxError):  # a lambda inside an expression does not parse by itself
                return ""
            used = _used(function)
            todo += [f for _, f in used if inspect.isfunction(f) and f.__module__ == function.__module__]
        said.append([[name, repr(value)] for name, value in used if isinstance(value, CONSTANTS)])
    return hashlib.sha256(json.dumps(said).encode()).hexdigest()[:16]


def _used(function) -> list[tuple[str, object]]:
    """What a function takes from around it, by name: module's names, variables that it encloses, defaults."""
    codes, names = [function.__code__], set()
    while codes:
        code = codes.pop()
        names |= set(code.co_names)
        codes += [inner for inner in code.co_consts if isinstance(inner, CodeType)]
    enclosed = inspect.getclosurevars(function).nonlocals
    defaults = {name: p.default for name, p in inspect.signature(function).parameters.items()}
    around = {name: value for name, value in function.__globals__.items() if name in names}
    return [pair for space in (around, enclosed, defaults) for pair in sorted(space.items(), key=lambda pair: pair[0])]


def digest_files(*files: Path) -> str:
    """16 hexadecimal digits that change with what the modules in `files` do."""
    trees = [[file.name, structure(ast.parse(file.read_bytes()))] for file in files]
    return hashlib.sha256(json.dumps(trees).encode()).hexdigest()[:16]
