"""Pairs in files: .pt2 without unpickling, images, `faithkd bound` and what it refuses."""

import io
import pickle
import zipfile

import numpy as np
import pytest
import torch
from torch import nn

import faithkd
from faithkd.pairs import files


class Small(nn.Module):
    """Uses what graphs have beside layers: sizes, views, a residual sum, normalisation."""

    def __init__(self, seed):
        super().__init__()
        torch.manual_seed(seed)
        self.conv, self.norm, self.last = nn.Conv2d(2, 2, 3, padding=1), nn.BatchNorm2d(2), nn.Linear(32, 3)
        self.drop = nn.Dropout()

    def forward(self, x):
        h = torch.relu(self.norm(self.conv(x))) + x
        return self.last(self.drop(h.view(x.size(0), -1)))


class Parts(nn.Module):
    """An operation with two results, one with a list, and a softmax at the end."""

    def forward(self, x):
        first, second = x.flatten(1).chunk(2, 1)
        return torch.cat([second, 2 * first], 1).softmax(1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A teacher that takes any number of images, a student exported for one, and images."""
    folder, batch = tmp_path_factory.mktemp("pair"), ({0: torch.export.Dim.AUTO},)
    pair = Small(0).eval(), Small(1).eval()
    teacher = torch.export.export(pair[0], (torch.zeros(2, 2, 4, 4),), dynamic_shapes=batch)
    torch.export.save(teacher, folder / "teacher.pt2")
    torch.export.save(torch.export.export(pair[1], (torch.zeros(1, 2, 4, 4),)), folder / "student.pt2")
    x = np.random.default_rng(0).random((12, 2, 4, 4), dtype=np.float32)
    np.savez(folder / "images.npz", x=x, y=np.arange(12))
    np.save(folder / "last.npy", x.transpose(0, 2, 3, 1))
    np.save(folder / "flat.npy", x.reshape(12, 32))
    np.save(folder / "pixels.npy", (x * 255).astype("uint8"))
    np.save(folder / "objects.npy", np.array([None, folder], dtype=object))
    (folder / "cut.npy").write_bytes((folder / "flat.npy").read_bytes()[:-9])
    torch.save(pair[0].state_dict(), folder / "student.pt")
    (folder / "text.pt2").write_text("no network")
    (folder / "empty.npy").touch()
    np.save(folder / "none.npy", np.zeros((0, 1, 8, 8)))
    return folder


def test_exported_networks_are_what_they_were_and_nothing_is_unpickled(folder, monkeypatch):
    for module, name in ((pickle, "loads"), (pickle, "load"), (torch, "load")):
        monkeypatch.setattr(module, name, lambda *_, **__: pytest.fail("unpickled"))
    for seed, name in enumerate(("teacher", "student")):
        x, network = torch.randn(5, 2, 4, 4), files.load_network(folder / f"{name}.pt2")
        torch.testing.assert_close(network(x), Small(seed).eval()(x))


def test_a_graph_with_lists_and_a_softmax(tmp_path):
    torch.export.save(torch.export.export(Parts(), (torch.zeros(1, 2, 2),)), tmp_path / "parts.pt2")
    with pytest.warns(UserWarning, match="parts.pt2 ends in a softmax; it is taken off"):
        network = faithkd.load_pt2(tmp_path / "parts.pt2")
    x = torch.randn(3, 2, 2)
    torch.testing.assert_close(network(x).softmax(1), Parts()(x))


class Tokens(nn.Module):
    """What a graph for one image writes down as of one image: a class token, a view, a type, an assertion about it."""

    def __init__(self):
        super().__init__()
        self.embed, self.last = nn.Linear(16, 4), nn.Linear(12, 3)
        self.token, self.place = nn.Parameter(torch.randn(1, 1, 4)), nn.Parameter(torch.randn(1, 3, 4))

    def forward(self, x):
        z = self.embed(x.to(torch.float32).flatten(2))
        z = torch.cat([self.token.expand(x.shape[0], -1, -1), z], 1) + self.place
        return self.last((z * torch.sigmoid(z)).view(x.shape[0], -1))


class Normalised(nn.Module):
    def forward(self, x):
        return (x - 0.5) / 0.25


@pytest.mark.parametrize("count", [1, 2])
def test_a_graph_for_some_images_is_for_any_number_also_inside_another_network(count, tmp_path):
    torch.manual_seed(0)
    whole, x = Tokens().eval(), torch.rand(5, 2, 4, 4)
    torch.export.save(torch.export.export(whole, (x[:count],)), tmp_path / "tokens.pt2")
    network, other = faithkd.load_pt2(tmp_path / "tokens.pt2"), nn.Sequential(nn.Flatten(), nn.Linear(32, 3))
    with torch.inference_mode():
        torch.testing.assert_close(network(x), whole(x))
    for mine, true in ((network, whole), (nn.Sequential(Normalised(), network), nn.Sequential(Normalised(), whole))):
        lower = faithkd.empirical_lower_bound(mine, other, x, 0.1, steps=5)
        upper = faithkd.faithfulness_upper_bound(mine, other, x, 0.1)
        at = [each(lower.witnesses).softmax(1).double() for each in (true, other)]
        torch.testing.assert_close((at[0] - at[1]).abs().amax(1).detach(), lower.values, rtol=0, atol=1e-5)
        assert (lower.values <= upper.values).all()
    with pytest.raises(faithkd.FaithkdError, match=r"takes images of shape \(2, 4, 4\), not \(2, 4, 5\)"):
        network(torch.rand(5, 2, 4, 5))


class Mixing(nn.Module):
    """Of a batch of two, each image sees the other."""

    def forward(self, x):
        return (x - x.mean(0, keepdim=True)).view(2, -1)


def test_a_graph_that_mixes_its_images_is_refused(tmp_path):
    torch.export.save(torch.export.export(Mixing(), (torch.zeros(2, 2, 2),)), tmp_path / "mixing.pt2")
    with pytest.raises(faithkd.FaithkdError, match="mixing.pt2.*mean mixes the images of a batch"):
        faithkd.load_pt2(tmp_path / "mixing.pt2")


def changed(path, target, old: str, new: str):
    """The same archive with another text in its graph or its lists of weights."""
    content = io.BytesIO()
    with zipfile.ZipFile(path) as archive, zipfile.ZipFile(content, "w") as other:
        for name in archive.namelist():
            text = archive.read(name)
            other.writestr(name, text.replace(old.encode(), new.encode()) if name.endswith(".json") else text)
    target.write_bytes(content.getvalue())
    return target


@pytest.mark.parametrize(
    ("old", "new", "told"),
    [
        ("torch.ops.aten.relu.default", "torch.os.system", "it calls torch.os.system, which is none"),
        ("torch.ops.aten.relu.default", "torch.ops.aten.from_file.default", "it calls torch.ops.aten.from_file"),
        ("torch.ops.aten.relu.default", "torch.ops.aten.relu.__class__", "which is none of torch's operations"),
        ('"use_pickle": false', '"use_pickle": true', "unpickling a file can execute anything"),
        ('"major": 8', '"major": 9', "is of format"),
    ],
)
def test_a_file_that_could_execute_something_is_refused(old, new, told, folder, tmp_path):
    with pytest.raises(faithkd.FaithkdError, match=told):
        files.load_network(changed(folder / "student.pt2", tmp_path / "other.pt2", old, new))


def test_the_table_its_csv_and_the_witnesses(folder, call, tmp_path):
    pair = [str(folder / f"{name}.pt2") for name in ("teacher", "student")]
    options = ["--eps", "0.02", "--clip", "0", "1", "--csv", f"{tmp_path}/out.csv", "--witnesses", f"{tmp_path}/w.npz"]
    printed = call("bound", *pair, str(folder / "images.npz"), *options, "--method", "best", "--nodes", "8")
    rows = np.genfromtxt(tmp_path / "out.csv", delimiter=",", names=True, dtype=None, encoding="utf-8")
    assert len(rows) == 12 and (rows["EmpLB"] <= rows["FaithUB"]).all() and (rows["FaithUB"] < 1).all()
    assert f"{rows['FaithUB'].mean():.4f}" in printed and rows["status"][0] in printed
    found, x = files.load_images(tmp_path / "w.npz"), files.load_images(folder / "images.npz")
    assert ((found - x).abs() <= 0.02).all() and (found >= 0).all() and (found <= 1).all()
    both = [Small(seed).eval().double()(found).softmax(1) for seed in (0, 1)]
    np.testing.assert_allclose((both[0] - both[1]).abs().amax(1).detach(), rows["EmpLB"], atol=1e-9)


def test_check_says_what_a_pair_is(folder, call):
    pair = [str(folder / f"{name}.pt2") for name in ("teacher", "student")]
    printed = call("bound", *pair, str(folder / "pixels.npy"), "--check")
    assert "teacher: 141 weights, images (2, 4, 4), 3 classes" in printed and "Conv2d" in printed
    assert "they look like pixels from 0 to 255" in printed and "the networks agree on" in printed
    assert "from 0 to 1 (--clip 0 1)" in call("bound", *pair, str(folder / "images.npz"), "--check")


@pytest.mark.parametrize(
    ("student", "images", "options", "told"),
    [
        ("student.pt2", "images.npz", [], "--eps is missing"),
        ("student.pt2", "images.npz", ["--eps", "-1"], "eps must be one finite number >= 0"),
        ("student.pt2", "images.npz", ["--eps", "1", "--method", "besst"], "did you mean 'best'"),
        ("student.pt2", "images.npz", ["--eps", "1", "--csv", "nowhere/out.csv"], "folder nowhere is not there"),
        ("student.pt2", "images.npz", ["--eps", "1", "--clip", "0", "0.1"], "x lies outside clip"),
        ("student.pt2", "last.npy", ["--check"], "images.transpose(0, 3, 1, 2)"),
        ("student.pt2", "flat.npy", ["--check"], "images.reshape(-1, 2, 4, 4)"),
        ("student.pt2", "objects.npy", ["--check"], "allow_pickle=False"),
        ("student.pt2", "cut.npy", ["--check"], "no images can be read from it"),
        ("student.pt2", "empty.npy", ["--check"], "no images can be read from it"),
        ("student.pt2", "none.npy", ["--check"], "no image; needed are (N, *shape) with N > 0"),
        ("student.pt2", "missing.npy", ["--check"], "no such file"),
        ("student.pt", "images.npz", ["--check"], "would execute whatever is pickled in it"),
        ("text.pt2", "images.npz", ["--check"], "save it again: torch.export.save"),
        ("missing.pt2", "images.npz", ["--check"], "no such file"),
        ("missing.onnx", "images.npz", ["--check"], "no such file"),
    ],
)
def test_a_mistake_is_one_message(student, images, options, told, folder, call):
    printed = call("bound", str(folder / "teacher.pt2"), str(folder / student), str(folder / images), *options, code=2)
    assert told in printed and printed.startswith("error: ") and printed.count("\n") == 1
