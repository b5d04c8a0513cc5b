"""Data sets: digits offline, the real sets where they are, and what must never enter a subset."""

import numpy as np
import pytest
import torch

from faithkd import data, params
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


def test_missing_folder_is_a_clear_error(monkeypatch):
    monkeypatch.setenv("FAITHKD_DATA", "/nowhere/at/all")
    data._raw.cache_clear()
    with pytest.raises(FaithkdError, match="FAITHKD_DATA is '/nowhere/at/all'"):
        data.test(params.load("mnist"))


def test_a_failed_download_says_what_to_do(monkeypatch, tmp_path):
    from torchvision import datasets

    def refuse(self):
        raise OSError("no route to host")

    monkeypatch.setenv("FAITHKD_DATA", str(tmp_path))
    monkeypatch.setattr(data, "ROOT", tmp_path)
    monkeypatch.setattr(datasets.MNIST, "download", refuse)
    data._raw.cache_clear()
    with pytest.raises(FaithkdError, match="downloading it failed.*FAITHKD_DATA") as caught:
        data.test(params.load("mnist"))
    assert "digits and smoke need no download" in str(caught.value)


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
