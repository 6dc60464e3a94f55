"""MNIST as tensors: what torchvision would give, the validation set, augmentation."""

import pytest
import torch
import torchvision
from torch.testing import assert_close
from torchvision.transforms import Compose, Normalize, Pad, ToTensor

import mnist_data
from mnist_data import augment, hold_out, load_mnist

CPU = torch.device("cpu")


def test_real_mnist_is_normalized(real_data):
    images, _ = load_mnist(real_data, True, CPU)
    std, mean = torch.std_mean(images)
    assert abs(mean) < 1e-3
    assert abs(std - 1) < 1e-3


@pytest.mark.parametrize(("train", "side"), [(True, 28), (False, 32)])
def test_images_are_what_torchvision_would_give(train, side, tiny_data, monkeypatch):
    monkeypatch.setattr(mnist_data, "IMAGE_SIDE", side)
    border = Pad((side - 28) // 2)
    normalize = Normalize((0.1307,), (0.3081,))
    transform = Compose([border, ToTensor(), normalize])
    dataset = torchvision.datasets.MNIST(tiny_data, train, transform)
    expected_images, expected_labels = zip(*dataset, strict=True)
    images, labels = load_mnist(tiny_data, train, CPU)
    assert_close(images, torch.stack(expected_images))  # shape and type, too
    assert_close(labels, torch.tensor(expected_labels))


def test_held_out_images():
    digits = "00120120120120120000"  # of 10, 5 and 5, the share is 3, 1.5 and 1.5
    labels = torch.tensor([int(digit) for digit in digits])
    numbers = torch.arange(20)  # in place of images
    training, validation = hold_out(numbers, labels, 6)
    kept, kept_labels = training
    held, held_labels = validation
    assert held.tolist() == [11, 14, 15, 17, 18, 19]
    assert torch.cat([kept, held]).sort().values.equal(numbers)
    assert kept_labels.equal(labels[kept])
    assert held_labels.equal(labels[held])


def test_augment():
    image = torch.full((1, 28, 28), -0.4)
    image[0, 14, 20] = 3.0  # 6.5 pixels right of the centre
    torch.manual_seed(0)
    images = augment(image.expand(2000, 1, 28, 28))
    weights = (images[:, 0] + 0.4).clamp(min=0)  # bicubic interpolation undershoots
    assert (weights[:, :, :10] < 1e-6).all()  # the background stays
    coordinates = torch.arange(28.0)
    total = weights.sum((1, 2))
    x = weights.sum(1) @ coordinates / total
    y = weights.sum(2) @ coordinates / total
    # Shifted by 3, scaled by 10 % of 6.5, and turned up and down by 2 * 6.5 * sin(10 degrees)
    for moved, limit in ((x - 20, 4.15), (y - 14, 5.7)):
        assert 3 < moved.abs().max() < limit
        assert abs(moved.mean()) < 0.2
    assert total.max() > 1.6 * total.min()  # scaled; else 1.44, the interpolation


def test_augmentation_keeps_thin_strokes():
    images = torch.zeros(2000, 1, 28, 28)
    images[..., 14] = 1.0
    torch.manual_seed(0)
    middle_rows = augment(images)[:, 0, 10:18]
    assert middle_rows.amax(2).mean() > 0.8  # with bilinear interpolation 0.75


def test_augmentation_is_none_at_zero(monkeypatch):
    def middle(tensor, low, high):
        return tensor.fill_((low + high) / 2)

    monkeypatch.setattr(torch.Tensor, "uniform_", middle)
    images = torch.randn(3, 1, 28, 28)
    assert_close(augment(images), images, atol=1e-4, rtol=0)
