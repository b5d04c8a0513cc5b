"""ONNX: every operation as onnxruntime computes it, files that torch writes, what is refused, questions for others."""

import re

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import numpy_helper
from torch import nn

import faithkd
from faithkd.bounds import graph
from faithkd.pairs import onnx as reading

RANDOM = np.random.default_rng(0)
SHAPES = {"w": (3, 32), "b": 3, "k": (2, 2, 3, 3), "c": 2, "left": (5, 16), "right": (32, 3), "four": (3, 8)}
WEIGHTS = {name: RANDOM.normal(size=shape).astype(np.float32) for name, shape in SHAPES.items()}
WEIGHTS["v"] = WEIGHTS["c"] ** 2 + 0.5
END = "f = Flatten(h) y = Gemm<transB=1>(f, w, b)"
GRAPHS = {
    "convolution with uneven padding": (13, f"h = Conv<pads=[1,0,1,2]>(x, k, c) {END}"),
    "same padding": (13, f'h = Conv<auto_pad="SAME_UPPER", strides=[3,2]>(x, k) {END.replace("f, w", "f, four")}'),
    "batch normalisation": (9, f"h = BatchNormalization(x, v, c, c, v) {END}"),
    "average of opset 19": (19, f"h = AveragePool<kernel_shape=[3,3], pads=[1,1,1,1], dilations=[1,1]>(x) {END}"),
    "maximum": (12, f"h = MaxPool<kernel_shape=[3,3], pads=[1,1,1,1]>(x) {END}"),
    "means": (
        18,
        f"""p = GlobalAveragePool(x) q = ReduceMean(x, two) s = Add(p, q) h = Add(x, s) n = Neg(h) r = Sub(one, n)
        t = Div(r, three) {END.replace("h", "t", 1)}""",
    ),
    "activations": (
        13,
        f"""i = LeakyRelu<alpha=0.2>(x) j = Elu(i) a = Tanh(j) l = Clip(a, low, one) m = Softplus(l)
        h = Sigmoid(m) {END}""",
    ),
    "old clip, pad and slice": (
        9,
        f"""i = Clip<min=-0.5, max=0.5>(x) j = Pad<pads=[0,0,1,0,0,0,0,1]>(i)
        h = Slice<axes=[2,3], starts=[0,1], ends=[4,5]>(j) {END}""",
    ),
    "one-sided clip": (10, f"h = Clip<max=0.5>(x) {END}"),
    "constant nodes, allowzero": (
        14,
        """s = Constant<value_ints=[-1, 32]>() half = Constant<value_float=0.5>() r = Reshape<allowzero=1>(x, s)
        m = Mul(r, half) y = Gemm(m, right, b)""",
    ),
    "new pad and slice": (18, f"j = Pad(x, wide) h = Slice(j, zeros, fours, two) {END}"),
    "slopes": (16, f"h = PRelu(x, slope) {END}"),
    "swish": (13, f"s = Sigmoid(x) h = Mul(x, s) {END}"),
    "GELU in parts": (
        14,
        f"d = Div(x, root) e = Erf(d) a = Add(e, one) m = Mul(x, a) h = Mul(m, part) {END}",
    ),
    "softplus as torch writes it": (18, f"s = Softplus(x) g = Greater(x, twenty) h = Where(g, x, s) {END}"),
    "shapes computed": (
        14,
        """s = Shape(x) n = Gather(s, zero) u = Unsqueeze(n, axis) z = Concat<axis=0>(u, rest)
        r = Reshape<allowzero=1>(x, z) y = Gemm<transB=1, alpha=0.5, beta=2.0>(r, w, b)""",
    ),
    "parts": (
        13,
        f"""p, q = Split<axis=1>(x, ones) j = Concat<axis=1>(q, p) t = Transpose<perm=[0,1,3,2]>(j)
        h = Dropout(t) {END}""",
    ),
    "columns": (
        11,
        """r = Reshape(x, tall) m = MatMul(left, r) g = Gather<axis=2>(m, zero) u = Unsqueeze<axes=[1]>(g)
        s = Squeeze<axes=[1]>(u) y = Add(s, g)""",
    ),
    "matrix and sum": (13, "f = Flatten(x) m = MatMul(f, right) n = Add(b, m) y = Identity(n)"),
}
NUMBERS = {"zero": 0, "axis": [0], "rest": [32], "two": [2, 3], "zeros": [0, 1], "fours": [4, 5], "ones": [1, 1]}
NUMBERS |= {"wide": [0, 0, 1, 0, 0, 0, 0, 1], "tall": [-1, 16, 2]}
FLOATS = {
    "one": 1.0,
    "part": 0.5,
    "root": 2**0.5,
    "low": -0.5,
    "three": 3.0,
    "twenty": 20.0,
    "slope": [[[0.25]], [[-0.5]]],
}


def write(path, body, opset=13, shape="N,2,4,4", ends="float[N,3] y", more=""):
    """A file from ONNX's own text form."""
    text = f'<ir_version: 8, opset_import: ["" : {opset}]> g (float[{shape}] x{more}) => ({ends}) {{ {body} }}'
    model = onnx.parser.parse_model(text.replace(") ", ")\n"))
    stored = {**WEIGHTS, **{n: np.array(v, np.int64) for n, v in NUMBERS.items()}}
    stored |= {n: np.array(v, np.float32) for n, v in FLOATS.items()}
    used = {name for node in model.graph.node for name in node.input}
    model.graph.initializer.extend(numpy_helper.from_array(v, n) for n, v in stored.items() if n in used)
    onnx.save(model, path)
    return path


def theirs(path, x):
    session = onnxruntime.InferenceSession(path)
    return torch.from_numpy(session.run(None, {session.get_inputs()[0].name: x.numpy()})[0])


@pytest.mark.parametrize("name", GRAPHS)
def test_an_operation_is_what_onnxruntime_computes(name, tmp_path):
    opset, body = GRAPHS[name]
    columns = {"ends": "float[N,5] y"} if name == "columns" else {}
    path = write(tmp_path / "net.onnx", body, opset, **columns)
    network, x = faithkd.load_onnx(path), 3 * torch.randn(7, 2, 4, 4)
    torch.testing.assert_close(network(x), theirs(path, x), rtol=1e-4, atol=1e-4)
    if " as torch writes it" in name or name == "swish":
        assert len(network.network.nodes) == 3  # one activation, with nothing left of its parts


def test_a_file_for_one_image_takes_any_number(tmp_path):
    body = "r = Reshape(x, line) y = Gemm<transB=1>(r, w, b)"
    NUMBERS["line"] = [1, 32]
    path, x = write(tmp_path / "one.onnx", body, shape="1,2,4,4", ends="float[1,3] y"), torch.randn(3, 2, 4, 4)
    network = faithkd.load_onnx(path)
    torch.testing.assert_close(network(x), torch.cat([theirs(path, each[None]) for each in x]), rtol=1e-4, atol=1e-5)
    upper = faithkd.faithfulness_upper_bound(network, nn.Sequential(nn.Flatten(), nn.Linear(32, 3)), x, 0.1)
    found = faithkd.empirical_lower_bound(network, nn.Sequential(nn.Flatten(), nn.Linear(32, 3)), x, 0.0)
    assert (upper.values <= 1).all() and (found.values > 0).all()
    network.register_forward_pre_hook(lambda _, inputs: (3 * inputs[0] - 1,))
    torch.testing.assert_close(graph.prepare(network, (2, 4, 4))(x.double()).float(), network(x), rtol=1e-4, atol=1e-5)
    with torch.inference_mode(), torch.autocast("cpu"):
        assert torch.equal(faithkd.load_onnx(path)(x), network.network.to(torch.float32)(x))


def test_a_last_softmax_is_taken_off_and_said(tmp_path):
    path = write(tmp_path / "soft.onnx", f"{END.replace('y =', 'z =').replace('h', 'x')} y = Softmax(z)")
    with pytest.warns(UserWarning, match=r"soft.onnx ends in a softmax; it is taken off"):
        network = faithkd.load_onnx(path)
    x = torch.randn(4, 2, 4, 4)
    torch.testing.assert_close(network(x).softmax(1), theirs(path, x))


EIGHT = END.replace("f, w", "f, four")
FLAT = "f = Flatten(x) y = Gemm<transB=1>(f, w, b)"


@pytest.mark.parametrize(
    ("body", "options", "told"),
    [
        ("e = Erf(x) " + END.replace("h", "e"), {}, r"node 'e' \(Erf\) cannot be read; export it with opset"),
        (f"h = Clip<max=0.5>(x) {END}", {"opset": 6}, "of opset 6, which ONNX's own converter cannot bring to 18"),
        (FLAT, {"shape": "N,2,h,w"}, r"has shape \(N, 2, h, w\).*for images of one size"),
        (FLAT, {"more": ", float[N,3] second"}, "inputs x, second"),
        (FLAT, {"ends": "float[N,3] y, float[N,32] f"}, "outputs y, f"),
        (f"h = Relu(x) {EIGHT}", {}, r"node 'y' \(Gemm\) does not fit images of shape \(2, 4, 4\)"),
        ("f = Flatten(x) g = Softmax<axis=0>(f) y = Gemm<transB=1>(g, w, b)", {}, "Softmax.*no bound for _softmax"),
        ("m = ReduceMean<axes=[0]>(x) h = Add(x, m) " + END, {}, "mean mixes the images of a batch"),
        (f"m = GlobalAveragePool(x) h = Mul(x, m) {END}", {}, r"node 'h' \(Mul\): only numbers can be multiplied by"),
        (f"g = Greater(x, one) h = Where(g, x, low) {END}", {}, "Where is known only as part of a softplus"),
        (f"h = AveragePool<kernel_shape=[2,2], pads=[0,0,1,1]>(x) {END}", {}, "differs from what onnxruntime computes"),
    ],
)  # fmt: skip
def test_what_cannot_be_read_is_an_error_that_says_why(body, options, told, tmp_path):
    path = write(tmp_path / "bad.onnx", body, **options)
    with pytest.raises(faithkd.FaithkdError, match=told):
        faithkd.load_onnx(path)


def test_weights_that_are_no_numbers(tmp_path, monkeypatch):
    monkeypatch.setitem(WEIGHTS, "b", np.array([0, np.nan, 1], np.float32))
    with pytest.raises(faithkd.FaithkdError, match="the weight b holds NaN or infinity"):
        faithkd.load_onnx(write(tmp_path / "nan.onnx", FLAT))


def test_damaged_files(tmp_path):
    whole = write(tmp_path / "net.onnx", FLAT)
    model = onnx.load(whole)
    onnx.save(model, tmp_path / "apart.onnx", save_as_external_data=True, location="apart.data", size_threshold=0)
    (tmp_path / "apart.data").unlink()
    (tmp_path / "cut.onnx").write_bytes(whole.read_bytes()[:-200])
    (tmp_path / "text.onnx").write_text("no network")
    (tmp_path / "empty.onnx").write_bytes(b"")
    for name in ("missing", "cut", "text", "empty", "apart"):
        told = {"missing": "no such file", "apart": "apart.data"}.get(name, "no whole ONNX file")
        with pytest.raises(faithkd.FaithkdError, match=told):
            faithkd.load_onnx(tmp_path / f"{name}.onnx")


def test_a_wrong_operation_is_caught(tmp_path, monkeypatch):
    path = write(tmp_path / "net.onnx", f"h = Relu(x) {END}")
    monkeypatch.setitem(reading.OPERATIONS, "Relu", lambda z: z.clamp(min=0.001))
    with pytest.raises(faithkd.FaithkdError, match="differs from what onnxruntime computes"):
        faithkd.load_onnx(path)


class Residual(nn.Module):
    """A network whose file by torch's own exporter onnx2torch cannot read: AveragePool, Reshape with allowzero=1."""

    def __init__(self):
        super().__init__()
        self.first, self.norm, self.pool = nn.Conv2d(2, 2, 3, padding=1), nn.BatchNorm2d(2), nn.AvgPool2d(2)
        self.last = nn.Linear(8, 3)

    def forward(self, x):
        h = torch.relu(self.norm(self.first(x))) + x
        return self.last(self.pool(h).reshape(len(x), -1))


def test_a_question_for_others(tmp_path):
    """The files say what the pair does; as torch's exporter wrote them, its files are read back here too."""
    torch.manual_seed(0)
    pair = Residual().eval(), nn.Sequential(nn.Flatten(), nn.Linear(32, 3))
    x, eps = torch.rand(2, 2, 4, 4), 1e-5
    files = faithkd.export_question(*pair, x, eps, 0.25, tmp_path / "asked", clip=(0, 1))
    assert [file.name for file in files] == ["differences.onnx", "logits.onnx", "image-0.vnnlib", "image-1.vnnlib"]
    with torch.no_grad():
        both = [network(x) for network in pair]
    torch.testing.assert_close(faithkd.load_onnx(files[1])(x), torch.cat(both, 1), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(
        theirs(files[0], x[:1]), both[0][:1].softmax(1) - both[1][:1].softmax(1), rtol=1e-4, atol=1e-5
    )
    lines = files[3].read_text().splitlines()
    assert sum(line.startswith("(declare-const X_") for line in lines) == 32
    ends = [float(line.split()[-1].rstrip(")")) for line in lines if line.startswith("(assert (") and "X_" in line]
    lower, upper = np.array(ends).reshape(32, 2).T
    exact = x[1].double().flatten().numpy()
    assert (lower <= np.maximum(exact - eps, 0)).all() and (upper >= np.minimum(exact + eps, 1)).all()
    assert (upper - lower <= 2.1 * eps).all() and not re.search(r"\d[eE]", "".join(lines))
    assert "    (and (>= Y_2 0.25))" in lines and "    (and (<= Y_0 -0.25))" in lines
    ends = torch.export.export(nn.Sequential(pair[0], nn.Softmax(1)), (x,)), pair[1]
    with pytest.warns(UserWarning, match="ends in a softmax"):
        again = faithkd.export_question(*ends, x, eps, 0.25, tmp_path / "again", clip=(0, 1))
    torch.testing.assert_close(theirs(again[0], x[:1]), theirs(files[0], x[:1]), rtol=1e-4, atol=1e-5)
    with pytest.raises(faithkd.FaithkdError, match="no folder can be made"):
        faithkd.export_question(*pair, x, eps, 0.25, files[0])
