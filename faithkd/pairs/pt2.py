"""Files of `torch.export.save` as torch modules. torch.export.load unpickles and evaluates what stands in them; here
nothing is: the graph is JSON, the weights are bytes, and an operation must be one of torch's own on tensors.
"""

import json
import operator
import re
import zipfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from faithkd.errors import FaithkdError
from faithkd.pairs.program import Name, Program, Step, resized

SCHEMA = 8  # the first part of the number of torch's file format, from torch 2.8 on
DTYPES = {1: torch.uint8, 4: torch.int32, 5: torch.int64, 6: torch.float16, 7: torch.float32, 8: torch.float64}
DTYPES |= {12: torch.bool, 13: torch.bfloat16}
OF_SIZES = {f"_operator.{name}": getattr(operator, name) for name in ("add", "sub", "mul", "floordiv")}
SETTINGS = {"as_memory_format", "as_device", "as_layout"}  # arguments that change no value
PLAIN = {"as_int", "as_float", "as_bool", "as_string", "as_ints", "as_floats", "as_bools"}


def load_pt2(path: str | Path) -> Program:
    """A network g from a file of `torch.export.save` (torch 2.8 or later): x `(N, *shape)` to logits `(N, C)`.

    Raises FaithkdError for other files, for weights that would have to be unpickled, and for unknown operations.
    """
    path = Path(path)
    try:
        with zipfile.ZipFile(path) as archive:
            return read(archive).without_softmax(path)
    except FileNotFoundError:
        raise FaithkdError(f"{path}: there is no such file") from None
    except FaithkdError as problem:
        raise FaithkdError(f"{path}: {problem}") from None
    except (zipfile.BadZipFile, OSError, LookupError, AttributeError, TypeError, ValueError, RuntimeError) as problem:
        raise FaithkdError(
            f"{path}: this is no whole file of torch.export.save by torch 2.8 or later ({type(problem).__name__}: "
            f"{problem}); save it again: torch.export.save(torch.export.export(network.eval(), (x,)), path)"
        ) from problem


def read(archive: zipfile.ZipFile) -> Program:
    (file,) = [name for name in archive.namelist() if re.fullmatch(r"[^/]+/models/\w+\.json", name)]
    root, model = file.split("/")[0], Path(file).stem
    content = json.loads(archive.read(file))
    if content["schema_version"]["major"] != SCHEMA:
        raise FaithkdError(
            f"it is of format {content['schema_version']}, known is {SCHEMA}; save it with another torch"
        )
    stored = {}
    for kind in ("weights", "constants"):
        config = json.loads(archive.read(f"{root}/data/{kind}/{model}_{kind}_config.json"))["config"]
        stored |= {name: tensor(archive, f"{root}/data/{kind}", name, entry) for name, entry in config.items()}
    graph, signature = content["graph_module"]["graph"], content["graph_module"]["signature"]
    weights, images = {}, []
    for spec in signature["input_specs"]:
        ((kind, entry),) = spec.items()
        if kind == "user_input":
            images.append(value(entry["arg"]))
        else:
            weights[entry["arg"]["name"]] = stored[entry[f"{kind}_name"]]
    outputs = [value(entry) for entry in graph["outputs"]]
    if [type(end) for end in (*images, *outputs)] != [Name, Name]:
        raise FaithkdError("needed is one input, images, and one output, logits; export it in evaluation mode, .eval()")
    batch, *shape = [size.get("as_int") for size in graph["tensor_values"][images[0]]["sizes"]]
    if None in shape:
        raise FaithkdError("its images have no fixed shape; export it again with a fixed one, only the batch may vary")

    def program(batch: int | None) -> Program:
        steps = [step(node, batch) for node in graph["nodes"]]
        return Program(tuple(shape), images[0], outputs[0], steps, weights).eval()

    if batch is not None:
        x = torch.randn(3 * batch, *shape, generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            expected = torch.cat([program(None)(part) for part in x.split(batch)])
            if not torch.allclose(program(batch)(x), expected, rtol=1e-4, atol=1e-4):
                raise FaithkdError(f"it is for {batch} images at once and mixes them; export it for any number of them")
    return program(batch)


def tensor(archive: zipfile.ZipFile, folder: str, name: str, entry: dict) -> Tensor:
    """A stored tensor, from its bytes."""
    if entry["use_pickle"] or not entry["tensor_meta"]:
        raise FaithkdError(f"{name!r} is pickled, and unpickling a file can execute anything; it is not read")
    form = entry["tensor_meta"]
    sizes, strides = ([part["as_int"] for part in form[name]] for name in ("sizes", "strides"))
    content = bytearray(archive.read(f"{folder}/{entry['path_name']}"))
    if not content:
        return torch.zeros(sizes, dtype=DTYPES[form["dtype"]])
    flat = torch.frombuffer(content, dtype=DTYPES[form["dtype"]])
    return flat.as_strided(sizes, strides, form["storage_offset"]["as_int"]).clone()


def step(node: dict, batch: int | None) -> Step:
    """One node of the graph."""
    given = [entry for entry in node["inputs"] if not SETTINGS & entry["arg"].keys()]
    inputs = [value(entry["arg"]) for entry in given if entry["kind"] == 1]
    options = {entry["name"]: value(entry["arg"]) for entry in given if entry["kind"] != 1}
    results = [value(entry) for entry in node["outputs"]]
    if isinstance(results[0], list):  # of one operation that returns several
        (results,) = results
    function = operation(node["target"], batch)
    return Step(f"{node['target'].split('.')[-2]} {results[0]}", function, inputs, options, results)


def operation(target: str, batch: int | None) -> Callable:
    """What a node calls: one of torch's operations on tensors, none of which can do anything else."""
    found = re.fullmatch(r"torch\.ops\.aten\.(_unsafe_view|[a-z]\w*)\.([A-Za-z]\w*)", target)
    if target in OF_SIZES:
        return OF_SIZES[target]
    if not found:
        raise FaithkdError(f"it calls {target}, which is none of torch's operations on tensors")
    if found[1] in ("view", "reshape", "_unsafe_view"):
        return partial(resized, batch=batch)
    function = getattr(getattr(torch.ops.aten, found[1]), found[2])
    if str(function._schema.arguments[0].type) not in ("Tensor", "List[Tensor]"):
        raise FaithkdError(f"it calls {target}, which is none of torch's operations on tensors")
    return function


def value(entry: dict) -> Any:
    """An argument or a result: a name, a number, or a list of them."""
    ((kind, content),) = entry.items()
    if kind in ("as_tensor", "as_tensors"):
        return Name(content["name"]) if kind == "as_tensor" else [Name(each["name"]) for each in content]
    if kind == "as_sym_ints":
        return [value({"as_sym_int": each}) for each in content]
    if kind == "as_sym_int":
        return Name(content["as_name"]) if "as_name" in content else content["as_int"]
    if kind == "as_scalar_type":
        return DTYPES[content]
    if kind in PLAIN or kind == "as_none":
        return content if kind in PLAIN else None
    raise FaithkdError(f"an argument of kind {kind} cannot be read")
