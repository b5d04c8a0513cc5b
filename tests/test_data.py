"""Data sets: digits offline, the real sets where they are, and what must never enter a subset."""

import gzip
import pickle
import shutil
from http.client import IncompleteRead

import numpy as np
import pytest
import torch

from faithkd import params
from faithkd.core import data
from faithkd.errors import FaithkdError


@pytest.fixture
def digits():
    return params.load("digits")


def test_digits_splits_are_disjoint_and_complete(digits):
    train, held_out, test = data.training(digits), data.validation(digits), data.test(digits)
    assert len(held_out) == digits.data.validation
    assert len(train) + len(held_out) == 1797 - data.DIGITS_TEST == 1797 - len(test)
    assert not set(train.index.tolist()) & set(held_out.index.tolist())
    pictures = [{picture.numpy().tobytes() for picture in split.x} for split in (train, held_out)]
    assert not pictures[0] & pictures[1], "no picture is both trained on and held out"


def test_standardised_training_pixels_have_mean_0_and_deviation_1(digits):
    train = data.training(digits)
    assert abs(float(train.x.mean())) < 0.01 and abs(float(train.x.std()) - 1) < 0.01
    assert train.x.shape[1:] == data.SHAPES["digits"] and train.x.dtype == torch.float32


def test_pixels_come_back(digits):
    pixels = data.to_pixels(digits, data.test(digits).x)
    raw = data._raw("digits", False)[0].squeeze(1).numpy() / 16
    assert np.allclose(pixels, raw, atol=1e-6)


def test_pixel_space_is_unstandardised_and_clipped_on_request():
    p = params.load("digits", {"data.space": "pixel", "data.clip": True})
    x = data.test(p).x
    assert float(x.min()) == 0 and float(x.max()) == 1
    low, high = data.clip_range(p)
    assert (float(low), float(high)) == (0, 1)
    assert data.clip_range(params.load("digits")) is None


def test_the_subset_follows_the_seed(digits):
    again, other = data.test_subset(digits), data.test_subset(params.load("digits", {"seed": 1}))
    assert torch.equal(data.test_subset(digits).index, again.index)
    assert not torch.equal(again.index, other.index)
    assert len(again.index.unique()) == len(again) == digits.data.test_images
    fewer = data.test_subset(params.load("digits", {"data.test_images": 20}))
    assert torch.equal(fewer.index, again.index[:20]) and (fewer.index.diff() < 0).any(), "the first are a sample too"


def test_labels_belong_to_their_images(digits):
    """A nearest-neighbour classifier would fail if labels and images were shuffled apart."""
    train, test = data.training(digits), data.test(digits)
    nearest = torch.cdist(test.x.flatten(1), train.x.flatten(1)).argmin(1)
    assert float((train.y[nearest] == test.y).double().mean()) > 0.95


@pytest.fixture
def given(tmp_path, monkeypatch):
    """FAITHKD_DATA with each set as a file of six training and four test images, labelled 0 to 5 and 9, 1, 2, 3."""
    folder = tmp_path / "given"
    monkeypatch.setenv("FAITHKD_DATA", str(folder))
    monkeypatch.setattr(data, "ROOT", tmp_path)  # no data/ there, and what is downloaded goes there
    monkeypatch.setattr(data, "IMAGES", {name: (6, 4, shape) for name, (_, _, shape) in params.IMAGES.items()})
    labels = {"train": [*range(6)], "test": [9, 1, 2, 3]}
    for name in ("MNIST", "FashionMNIST"):
        (folder / name / "raw").mkdir(parents=True)
        for part, y in (("train", labels["train"]), ("t10k", labels["test"])):
            count = len(y).to_bytes(4, "big")
            pixels = b"\0\0\x08\x03" + count + 2 * (28).to_bytes(4, "big") + bytes(len(y) * 784)
            (folder / name / "raw" / f"{part}-images-idx3-ubyte").write_bytes(pixels)
            (folder / name / "raw" / f"{part}-labels-idx1-ubyte").write_bytes(b"\0\0\x08\x01" + count + bytes(y))
    rewrite(folder / "cifar10.npz", {})
    data._raw.cache_clear()
    yield folder
    data._raw.cache_clear()


def rewrite(file, changes):
    arrays = {"x_test": np.zeros((4, 32, 32, 3), np.uint8), "y_test": np.array([9, 1, 2, 3], np.uint8), **changes}
    np.savez(file, **{name: array for name, array in arrays.items() if array is not None})


def refused(name, file, *told):
    with pytest.raises(FaithkdError, match="put a sound copy there, or unset FAITHKD_DATA") as caught:
        data._raw(name, False)
    assert all(text in str(caught.value) for text in (str(file), *told)), caught.value


def labels(name):
    pixels, found = data._raw(name, False)
    assert pixels.shape == (4, *data.SHAPES[name]) and pixels.dtype == torch.uint8 and found.dtype == torch.int64
    return found.tolist()


X, Y = "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"


@pytest.mark.parametrize("name", ["MNIST", "FashionMNIST"])
@pytest.mark.parametrize(
    ("file", "change", "told"),
    [
        (X, lambda b: b"", "it is empty"),
        (X, lambda b: b"<html>404</html>" * 100, "it begins with b'<html>40'"),
        (X, lambda b: b[:2] + b"\x0d" + b[3:], "not as a file of MNIST's format"),
        (X, lambda b: b[:10], "buffer size"),
        (X, lambda b: b[:3000], "holds 4 x 28 x 28 bytes, but has 2984"),
        (X, lambda b: b + b"x", "holds 4 x 28 x 28 bytes, but has 3137"),
        (X, lambda b: gzip.compress(b)[:-9], "ended before"),
        (X, lambda b: gzip.compress(b"no")[:10] + b"nonsense", "invalid"),
        (
            X,
            lambda b: b[:8] + (56).to_bytes(4, "big") + (14).to_bytes(4, "big") + b[16:],
            "(4, 56, 14), not (4, 28, 28)",
        ),
        (X, lambda b: b[:4] + (3).to_bytes(4, "big") + b[8:-784], "(3, 28, 28), not (4, 28, 28)"),
        (X, lambda b: b"\0\0\x08\x01" + (4).to_bytes(4, "big") + bytes(4), "(4,), not (4, 28, 28)"),
        (Y, lambda b: b[:4] + (3).to_bytes(4, "big") + b[8:-1], "(3,), not (4,)"),
        (Y, lambda b: b[:-1] + b"\xc8", "holds 1 to 200, not 0 to 9"),
    ],
)
def test_damaged_files_of_mnists_format(given, name, file, change, told):
    path = given / name / "raw" / file
    path.write_bytes(change(path.read_bytes()))
    refused({"MNIST": "mnist", "FashionMNIST": "fashion_mnist"}[name], path, told)


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_compressed_files_are_read_under_either_name(given, suffix):
    assert labels("mnist") == [9, 1, 2, 3]
    for path in (given / "FashionMNIST" / "raw").iterdir():
        path.with_name(path.name + suffix).write_bytes(gzip.compress(path.read_bytes()))
        if suffix:
            path.unlink()
    assert labels("fashion_mnist") == [9, 1, 2, 3]


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"y_test": None}, "y_test is not a file in the archive"),
        ({"x_test": np.zeros((4, 32, 32, 3))}, "x_test: the array in it holds float64, not whole numbers"),
        ({"x_test": np.zeros((4, 3, 32, 32), np.uint8)}, "(4, 3, 32, 32), not (4, 32, 32, 3)"),
        ({"x_test": np.zeros((5, 32, 32, 3), np.uint8)}, "(5, 32, 32, 3), not (4, 32, 32, 3)"),
        ({"x_test": np.full((4, 32, 32, 3), 256)}, "holds 256 to 256, not 0 to 255"),
        ({"x_test": np.full((4, 32, 32, 3), None)}, "allow_pickle=False"),
        ({"y_test": np.array([0, 1, 2, 10])}, "y_test: the array in it holds 0 to 10, not 0 to 9"),
        ({"y_test": np.array([0, 1, 2, -1])}, "holds -1 to 2, not 0 to 9"),
        ({"y_test": np.array([0.0, 1, 2, 3])}, "holds float64"),
        ({"y_test": np.array(["0", "1", "2", "3"])}, "holds <U1"),
        ({"y_test": np.zeros((4, 1), np.uint8)}, "(4, 1), not (4,)"),
    ],
)
def test_array_files_of_another_form(given, changes, told):
    rewrite(given / "cifar10.npz", changes)
    refused("cifar10", given / "cifar10.npz", told)


@pytest.mark.parametrize("text", [b"", b"<html>", pickle.dumps([1]), "cut", "hole"])
def test_array_files_that_are_none(given, text):
    file = given / "cifar10.npz"
    whole = file.read_bytes()
    file.write_bytes({"cut": whole[:-30], "hole": whole[:90] + bytes(200) + whole[290:]}.get(text, text))
    refused("cifar10", file, "it is no .npz archive" if text != "hole" else "")


def test_labels_of_other_whole_numbers_are_the_same(given):
    rewrite(given / "cifar10.npz", {"y_test": np.array([9, 1, 2, 3], np.int64)})
    assert labels("cifar10") == [9, 1, 2, 3]


@pytest.mark.parametrize("name", ["mnist", "cifar10"])
def test_what_is_no_file(given, name):
    """A folder, a dangling link, a file in a folder's place, missing: never silently another set."""
    file = given / ("MNIST/raw/" + X if name == "mnist" else "cifar10.npz")
    file.unlink()
    file.mkdir()
    refused(name, file, "Is a directory")
    file.rmdir()
    file.symlink_to(given / "nowhere")
    refused(name, file, f"it is a link to {given / 'nowhere'}, where nothing is")
    file.unlink()
    if name == "mnist":
        refused(name, file, "No such file")
        shutil.rmtree(given / "MNIST")
        (given / "MNIST").write_text("in the way")
        refused(name, file, "Not a directory")
    else:
        (given / "cifar-10-batches-py").mkdir()
        refused(name, given / "cifar-10-batches-py", "not found or corrupted")


def test_a_folder_of_data_that_is_none(given, monkeypatch):
    (given / "file").write_text("")
    for place in ("/nowhere/at/all", str(given / "file")):
        monkeypatch.setenv("FAITHKD_DATA", place)
        with pytest.raises(FaithkdError, match=f"FAITHKD_DATA is '{place}', which is not a folder"):
            data._raw("mnist", False)
    monkeypatch.setattr(data.os, "access", lambda path, mode: False)  # as root may read everything
    monkeypatch.setenv("FAITHKD_DATA", str(given))
    with pytest.raises(FaithkdError, match="not a folder that can be read"):
        data._raw("mnist", False)


@pytest.mark.parametrize("error", [OSError("no route"), RuntimeError("corrupted"), EOFError(), IncompleteRead(b"")])
def test_a_failed_download_says_what_to_do_and_is_tried_again(given, monkeypatch, error):
    from torchvision import datasets

    tried = []

    def refuse(self):
        tried.append((data.ROOT / "data" / "MNIST" / "raw").mkdir(parents=True, exist_ok=True))
        raise error

    monkeypatch.setattr(datasets.MNIST, "download", refuse)
    shutil.rmtree(given / "MNIST")
    for count in (1, 2):  # what the first left behind is not taken for the set
        with pytest.raises(
            FaithkdError, match=r"MNIST is not in .*, and downloading it failed \(\w.*FAITHKD_DATA"
        ) as told:
            data._raw("mnist", False)
        assert len(tried) == count and "digits and smoke need no download" in str(told.value)
    shutil.copytree(given / "FashionMNIST", data.ROOT / "data" / "MNIST", dirs_exist_ok=True)
    assert labels("mnist") == [9, 1, 2, 3]
    (data.ROOT / "data" / "MNIST" / "raw" / Y).write_bytes(b"")
    data._raw.cache_clear()
    with pytest.raises(FaithkdError, match="it is empty; delete it to download it again"):
        data._raw("mnist", False)


def test_too_many_test_images(digits):
    small = digits.model_copy(update={"data": digits.data.model_copy(update={"test_images": 401})})
    with pytest.raises(FaithkdError, match="only 400 test images"):
        data.test_subset(small)


@pytest.mark.parametrize(("name", "mean_label"), [("mnist", 4.4434), ("fashion_mnist", 4.5)])
def test_real_grey_sets(real_data, name, mean_label):
    p = params.load(name)
    train, held_out, test = data.training(p), data.validation(p), data.test(p)
    assert (len(train), len(held_out), len(test)) == (55_000, 5_000, 10_000)
    assert train.x.shape[1:] == (1, 28, 28)
    assert abs(float(train.x.mean())) < 0.01 and abs(float(train.x.std()) - 1) < 0.01
    assert float(test.y.double().mean()) == pytest.approx(mean_label, abs=1e-3)


def test_real_cifar10(real_data):
    p = params.load("cifar10")
    test = data.test(p)
    assert len(test) == 10_000 - 20
    assert test.x.shape[1:] == (3, 32, 32)
    assert abs(float(test.x.mean())) < 0.05 and abs(float(test.x.std()) - 1) < 0.05
    for seed in range(3):
        subset = data.test_subset(params.load("cifar10", {"seed": seed}))
        assert not set(subset.index.tolist()) & set(data.CIFAR10_APPROXIMATE)


def test_the_approximate_images_are_those_the_file_names(real_data):
    file = real_data / "cifar10.npz"
    if not file.is_file():
        pytest.skip("this data folder has no array file of CIFAR-10")
    with np.load(file, allow_pickle=False) as arrays:
        assert sorted(arrays["test_inexact"].tolist()) == sorted(data.CIFAR10_APPROXIMATE)
