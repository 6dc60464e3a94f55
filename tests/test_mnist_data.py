"""MNIST as tensors: what torchvision would give, the validation set, augmentation."""

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch.testing import assert_close
from torchvision.transforms import Compose, Normalize, ToTensor

import mnist_data
from mnist_data import augment, hold_out, load_mnist

CPU = torch.device("cpu")


def test_real_mnist(real_data):
    images, labels = load_mnist(real_data, True, CPU)
    counts = [5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949]
    assert labels.bincount().tolist() == counts
    std, mean = torch.std_mean(images)
    assert abs(mean) < 1e-3
    assert abs(std - 1) < 1e-3


@pytest.mark.parametrize("train", [True, False])
def test_images_are_what_torchvision_would_give(train, tiny_data):
    normalize = Normalize((0.1307,), (0.3081,))
    transform = Compose([ToTensor(), normalize])
    dataset = torchvision.datasets.MNIST(tiny_data, train, transform)
    expected_images, expected_labels = zip(*dataset, strict=True)
    images, labels = load_mnist(tiny_data, train, CPU)
    assert_close(images, torch.stack(expected_images))  # shape and type, too
    assert_close(labels, torch.tensor(expected_labels))


def test_a_larger_side_adds_a_black_border(tiny_data, monkeypatch):
    images, _ = load_mnist(tiny_data, True, CPU)
    monkeypatch.setattr(mnist_data, "IMAGE_SIDE", 32)
    larger, _ = load_mnist(tiny_data, True, CPU)
    black = -0.1307 / 0.3081
    assert_close(larger, F.pad(images, [2, 2, 2, 2], value=black))


def test_held_out_images():
    counts = torch.tensor([50, 25, 20, 5])
    labels = torch.arange(4).repeat_interleave(counts)[torch.randperm(100)]
    numbers = torch.arange(100)  # in place of images
    training, validation = hold_out(numbers, labels, 30)
    kept, kept_labels = training
    held, held_labels = validation
    assert held_labels.bincount().tolist() == [15, 8, 6, 1]  # of 15, 7.5, 6 and 1.5
    assert torch.cat([kept, held]).sort().values.equal(numbers)
    assert kept_labels.equal(labels[kept])
    assert held_labels.equal(labels[held])
    for digit in range(4):
        first_held = held[held_labels == digit].min()
        assert first_held > kept[kept_labels == digit].max()


def test_augment():
    image = torch.full((1, 28, 28), -0.4)
    image[0, 14, 20] = 3.0  # 6.5 pixels right of the centre
    torch.manual_seed(0)
    images = augment(image.expand(2000, 1, 28, 28))
    weights = (images[:, 0] + 0.4).clamp(min=0)  # bicubic interpolation undershoots
    assert (weights[:, :, :10] < 1e-6).all()  # the background stays
    coordinates = torch.arange(28.0)
    total = weights.sum((1, 2))
    x = (weights.sum(1) * coordinates).sum(1) / total
    y = (weights.sum(2) * coordinates).sum(1) / total
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
