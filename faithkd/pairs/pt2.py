"""Files of `torch.export.save`. torch.export.load unpickles and evaluates what stands in them; here nothing is: the
graph is JSON, the weights are bytes, and an operation must be one of torch's own on tensors.
"""

import json
import operator
import re
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from faithkd.bounds.graph import Operators, prepare
from faithkd.errors import FaithkdError
from faithkd.pairs.problems import about

SCHEMA = 8  # the first part of the number of torch's file format, from torch 2.8 on
DTYPES = {1: torch.uint8, 4: torch.int32, 5: torch.int64, 6: torch.float16, 7: torch.float32, 8: torch.float64}
DTYPES |= {12: torch.bool, 13: torch.bfloat16}
OF_SIZES = {f"_operator.{name}": getattr(operator, name) for name in ("add", "sub", "mul", "floordiv", "mod", "neg")}
SETTINGS = {"as_memory_format", "as_device", "as_layout"}  # arguments that change no value
PLAIN = {"as_int", "as_float", "as_bool", "as_string", "as_ints", "as_floats", "as_bools"}


def load_pt2(path: str | Path) -> Operators:
    """A network g from a file of `torch.export.save` (torch 2.8 or later): x `(N, *shape)` to logits `(N, C)`.

    It is for any N, whatever number it was exported for. A last softmax is taken off, with a warning. Raises
    FaithkdError for other files, for weights that would have to be unpickled, and for what cannot be bounded.
    """
    again = "save it again: torch.export.save(torch.export.export(network.eval(), (x,)), path)"
    with about(path, f"this is no whole file of torch.export.save by torch 2.8 or later; {again}"):
        with zipfile.ZipFile(path) as archive:
            graph, shape = read(archive)
        return Operators(prepare(graph, shape, str(path)))


class Graph(nn.Module):
    """What a file computes of `batch` images (None: any number), node by node; `where` says at which node."""

    where = ""

    def __init__(self, nodes: list[dict], first: str, last: str, weights: dict[str, Tensor], batch: int | None):
        super().__init__()
        self.nodes, self.first, self.last, self.weights, self.batch = nodes, first, last, weights, batch

    def forward(self, x: Tensor) -> Tensor:
        values = {**self.weights, self.first: x}
        for node in self.nodes:
            results = [value(entry) for entry in node["outputs"]]
            if not results:
                continue  # an assertion about sizes or types
            if isinstance(results[0], list):  # of one operation that returns several
                (results,) = results
            self.where = f"{node['target'].split('.')[-2]} {results[0]}"
            given = [entry for entry in node["inputs"] if not SETTINGS & entry["arg"].keys()]
            inputs = [value(entry["arg"], values) for entry in given if entry["kind"] == 1]
            options = {entry["name"]: value(entry["arg"], values) for entry in given if entry["kind"] != 1}
            found = operation(node["target"])(*inputs, **options)
            values.update(zip(results, found, strict=True) if len(results) > 1 else {results[0]: found})
        return values[self.last]


def read(archive: zipfile.ZipFile) -> tuple[Graph, tuple]:
    """The graph in a file, and the shape of its images."""
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
            images.append(entry["arg"])
        else:
            weights[entry["arg"]["name"]] = stored[entry[f"{kind}_name"]]
    if [list(end) for end in (*images, *graph["outputs"])] != [["as_tensor"], ["as_tensor"]]:
        raise FaithkdError("needed is one input, images, and one output, logits; export it in evaluation mode, .eval()")
    first, last = (value(end) for end in (images[0], graph["outputs"][0]))
    batch, *shape = [size.get("as_int") for size in graph["tensor_values"][first]["sizes"]] or [None]
    if not shape or None in shape:
        raise FaithkdError("its images have no fixed shape; export it again with a fixed one, only the batch may vary")
    return Graph(graph["nodes"], first, last, weights, batch), tuple(shape)


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
    found = flat.as_strided(sizes, strides, form["storage_offset"]["as_int"]).clone()
    if not found.isfinite().all():
        raise FaithkdError(f"the weight {name} holds NaN or infinity; train or export the network again")
    return found


def operation(target: str) -> Callable:
    """What a node calls: one of torch's operations on tensors, none of which can do anything else."""
    if target in OF_SIZES:
        return OF_SIZES[target]
    name = re.fullmatch(r"torch\.ops\.aten\.(_?[a-z]\w*)\.([A-Za-z]\w*)", target)
    function = getattr(getattr(torch.ops.aten, name[1], None), name[2], None) if name else None
    schema = getattr(function, "_schema", None)
    if not schema or not schema.arguments or str(schema.arguments[0].type) not in ("Tensor", "List[Tensor]"):
        raise FaithkdError(f"it calls {target}, which is none of torch's operations on tensors")
    return function


def value(entry: dict, values: Mapping | None = None) -> Any:
    """An argument: a number, a list of them, or what `values` has under its name. Without `values`, the name."""
    ((kind, content),) = entry.items()
    if kind in ("as_tensor", "as_tensors"):
        names = [each["name"] for each in (content if kind == "as_tensors" else [content])]
        found = names if values is None else [values[name] for name in names]
        return found if kind == "as_tensors" else found[0]
    if kind == "as_sym_ints":
        return [value({"as_sym_int": each}, values) for each in content]
    if kind == "as_sym_int" and "as_name" in content:
        return content["as_name"] if values is None else values[content["as_name"]]
    if kind == "as_sym_int":
        return content["as_int"]
    if kind == "as_scalar_type":
        return DTYPES[content]
    if kind in PLAIN or kind == "as_none":
        return content if kind in PLAIN else None
    raise FaithkdError(f"an argument of kind {kind} cannot be read")
