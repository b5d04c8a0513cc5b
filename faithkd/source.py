"""What code says apart from its comments, docstrings and layout: to notice when a result was made by other code."""

import ast
import hashlib
import inspect
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from textwrap import dedent

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

    A functools.partial counts as its function and the functions it fills in. Empty where the source of one cannot be
    read, as for functions typed into a bare interpreter.
    """
    written = []
    for function in functions:
        written += [function.func, *function.keywords.values()] if isinstance(function, partial) else [function]
    try:
        trees = [structure(ast.parse(dedent(inspect.getsource(function)))) for function in written]
    except (OSError, TypeError, SyntaxError):  # a lambda inside an expression does not parse by itself
        return ""
    return hashlib.sha256(json.dumps(trees).encode()).hexdigest()[:16]


def digest_files(*files: Path) -> str:
    """16 hexadecimal digits that change with what the modules in `files` do."""
    trees = [[file.name, structure(ast.parse(file.read_bytes()))] for file in files]
    return hashlib.sha256(json.dumps(trees).encode()).hexdigest()[:16]
