"""Data sets: digits offline, the real sets where they are, what is damaged, and what must never enter a subset."""

import shutil

import numpy as np
import pytest
import torch
from torchvision import datasets

from faithkd import images, params
from faithkd.core import data
from faithkd.errors import FaithkdError


@pytest.fixture
def digits():
    return params.load("digits")


def test_digits_splits_are_disjoint_and_complete(digits):
    train, held_out, test = data.training(digits), data.validation(digits), data.test(digits)
    assert (len(train) + len(held_out), len(held_out), len(test)) == (1397, digits.data.validation, 400)
    assert not set(train.index.tolist()) & set(held_out.index.tolist())
    pictures = [{picture.numpy().tobytes() for picture in split.x} for split in (train, held_out)]
    assert not pictures[0] & pictures[1], "no picture is both trained on and held out"


def test_standardised_pixels_have_mean_0_and_deviation_1_and_come_back(digits):
    train = data.training(digits)
    assert abs(float(train.x.mean())) < 0.01 and abs(float(train.x.std()) - 1) < 0.01
    assert train.x.shape[1:] == data.SHAPES["digits"] and train.x.dtype == torch.float32
    raw = images.raw("digits", False)[0][:, 0] / data.pixels_range("digits")
    assert np.allclose(data.to_pixels(digits, data.test(digits).x), raw, atol=1e-6)


def test_pixel_space_is_unstandardised_and_clipped_on_request(digits):
    p = params.load("digits", {"data.space": "pixel", "data.clip": True})
    x = data.test(p).x
    assert (float(x.min()), float(x.max())) == (0, 1) == tuple(map(float, data.clip_range(p)))
    assert data.clip_range(digits) is None


def test_the_subset_follows_the_seed(digits):
    subsets = [data.test_subset(params.load("digits", {"seed": seed})).index.tolist() for seed in (0, 0, 1)]
    assert subsets[0] == subsets[1] != subsets[2] and len(set(subsets[0])) == digits.data.test_images
    assert subsets[0] != sorted(subsets[0]), "the first few are a random sample too"
    small = digits.model_copy(update={"data": digits.data.model_copy(update={"test_images": 401})})
    with pytest.raises(FaithkdError, match="only 400 test images"):
        data.test_subset(small)


def test_labels_belong_to_their_images(digits):
    """A nearest-neighbour classifier would fail if labels and images were shuffled apart."""
    train, test = data.training(digits), data.test(digits)
    nearest = torch.cdist(test.x.flatten(1), train.x.flatten(1)).argmin(1)
    assert float((train.y[nearest] == test.y).double().mean()) > 0.95


# --- files


X, Y = "MNIST/raw/t10k-images-idx3-ubyte", "MNIST/raw/t10k-labels-idx1-ubyte"


@pytest.fixture
def given(tmp_path, monkeypatch):
    """FAITHKD_DATA with MNIST and CIFAR-10 of four test images each, labelled 9, 1, 2, 3."""
    folder = tmp_path / "given"
    monkeypatch.setenv("FAITHKD_DATA", str(folder))
    monkeypatch.setattr(images, "ROOT", tmp_path)  # no data/ there, and what is downloaded goes there
    monkeypatch.setattr(images, "IMAGES", {name: (4, 4, shape) for name, shape in data.SHAPES.items()})
    (folder / X).parent.mkdir(parents=True)
    for file in (X, Y):  # torchvision asks for all four files before it reads two of them
        (folder / file.replace("t10k", "train")).touch()
    (folder / X).write_bytes(b"\0\0\x08\x03" + sizes(4, 28, 28) + bytes(4 * 784))
    (folder / Y).write_bytes(b"\0\0\x08\x01" + sizes(4) + bytes([9, 1, 2, 3]))
    rewrite(folder / "cifar10.npz")
    images.raw.cache_clear()
    yield folder
    images.raw.cache_clear()


def sizes(*values):
    return b"".join(value.to_bytes(4, "big") for value in values)


def rewrite(file, **changes):
    arrays = {"x_test": np.zeros((4, 32, 32, 3), np.uint8), "y_test": np.array([9, 1, 2, 3])} | changes
    np.savez(file, **{name: array for name, array in arrays.items() if array is not None})


def refused(name, file, told):
    """The set is refused, and the message names the file, the trouble and the remedy."""
    with pytest.raises(FaithkdError, match="set FAITHKD_DATA to a folder that holds a sound copy") as caught:
        images.raw(name, False)
    assert str(file) in str(caught.value) and told in str(caught.value), caught.value


@pytest.mark.parametrize("name", ["mnist", "cifar10"])
def test_sound_files_are_read(given, name):
    pixels, labels = images.raw(name, False)
    assert pixels.shape == (4, *data.SHAPES[name]) and pixels.dtype == np.uint8
    assert labels.tolist() == [9, 1, 2, 3] and labels.dtype == np.int64


DAMAGED_MNIST = [
    (X, lambda b: b"", "invalid literal"),
    (X, lambda b: b"<html>404</html>" * 100, "it has not the format of MNIST"),
    (X, lambda b: b[:3000], "shape '[4, 28, 28]' is invalid"),
    (
        X,
        lambda b: b[:4] + sizes(3) + b[8:-784],
        "images are uint8 of shape (3, 28, 28), not whole numbers of shape (4,",
    ),
    (Y, lambda b: b[:4] + sizes(3) + b[8:-1], "labels are int64 of shape (3,), not whole numbers of shape (4,)"),
    (Y, lambda b: b[:-1] + b"\xc8", "labels are 1 to 200, not 0 to 9"),
]
OTHER_CIFAR10 = [
    ("y_test", None, "y_test is not a file in the archive"),
    ("x_test", np.zeros((4, 32, 32, 3)), "images are float64"),
    ("x_test", np.zeros((4, 3, 32, 32), np.uint8), "shape (4, 3, 32, 32), not whole numbers of shape (4, 32, 32, 3)"),
    ("x_test", np.full((4, 32, 32, 3), None), "allow_pickle=False"),
    ("y_test", np.array([0, 1, 2, -1]), "labels are -1 to 2, not 0 to 9"),
    ("y_test", np.array(["0", "1", "2", "3"]), "labels are <U1"),
]


@pytest.mark.parametrize(("file", "change", "told"), DAMAGED_MNIST)
def test_damaged_files_of_mnists_format(given, file, change, told):
    (given / file).write_bytes(change((given / file).read_bytes()))
    refused("mnist", given / "MNIST" / "raw" / "t10k-*-ubyte", told)


@pytest.mark.parametrize(("part", "array", "told"), OTHER_CIFAR10)
def test_array_files_of_another_form(given, part, array, told):
    rewrite(given / "cifar10.npz", **{part: array})
    refused("cifar10", given / "cifar10.npz", told)


def test_what_is_no_such_file(given):
    """Its beginning, a dangling link, missing files, a folder: never silently another set."""
    file = given / "cifar10.npz"
    file.write_bytes(file.read_bytes()[:-30])
    refused("cifar10", file, "it is no .npz archive, or only its beginning")
    file.unlink()
    file.symlink_to(given / "nowhere")
    refused("cifar10", file, "it is no .npz archive")
    file.unlink()
    (given / "cifar-10-batches-py").mkdir()
    refused("cifar10", given / "cifar-10-batches-py", "not found or corrupted")
    (given / X).unlink()
    refused("mnist", given / "MNIST", "not found")


def test_a_folder_of_data_that_is_none(given, monkeypatch):
    for place in ("/nowhere/at/all", str(given / "cifar10.npz")):
        monkeypatch.setenv("FAITHKD_DATA", place)
        with pytest.raises(FaithkdError, match=f"FAITHKD_DATA is '{place}', which is not a folder that can be read"):
            images.raw("mnist", False)


@pytest.mark.parametrize("error", [OSError("no route"), EOFError()])
def test_a_failed_download_says_what_to_do_and_is_tried_again(given, monkeypatch, error):
    tried, own = [], images.ROOT / "data" / "MNIST"

    def refuse(self):
        tried.append((own / "raw").mkdir(parents=True, exist_ok=True))
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(datasets.MNIST, "download", refuse)
        (given / "MNIST").rename(given / "away")
        for count in (1, 2):  # what the first left behind is not taken for the set
            refused("mnist", own, "connect to the internet to download it. The profiles digits and smoke need no")
            assert len(tried) == count
    shutil.copytree(given / "away", own, dirs_exist_ok=True)
    assert images.raw("mnist", False)[1].tolist() == [9, 1, 2, 3]


@pytest.mark.parametrize(("name", "mean_label"), [("mnist", 4.4434), ("fashion_mnist", 4.5)])
def test_real_grey_sets(real_data, name, mean_label):
    p = params.load(name)
    train, held_out, test = data.training(p), data.validation(p), data.test(p)
    assert (len(train), len(held_out), len(test)) == (55_000, 5_000, 10_000)
    assert train.x.shape[1:] == (1, 28, 28)
    assert abs(float(train.x.mean())) < 0.01 and abs(float(train.x.std()) - 1) < 0.01
    assert float(test.y.double().mean()) == pytest.approx(mean_label, abs=1e-3)


def test_real_cifar10_without_the_images_that_its_file_calls_approximate(real_data):
    p = params.load("cifar10")
    test = data.test(p)
    assert test.x.shape == (10_000 - 20, 3, 32, 32)
    assert abs(float(test.x.mean())) < 0.05 and abs(float(test.x.std()) - 1) < 0.05
    assert not set(data.test_subset(p).index.tolist()) & set(data.CIFAR10_APPROXIMATE)
    if (file := real_data / "cifar10.npz").is_file():
        with np.load(file, allow_pickle=False) as arrays:
            assert sorted(arrays["test_inexact"].tolist()) == sorted(data.CIFAR10_APPROXIMATE)
