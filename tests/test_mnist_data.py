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
    images, labels = load_mnist(real_data, train=True, device=CPU)
    counts = [5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949]
    assert images.shape == (60000, 1, 28, 28)
    assert labels.bincount().tolist() == counts
    assert (images.mean().item(), images.std().item()) == pytest.approx((0, 1), abs=1e-3)


@pytest.mark.parametrize("train", [True, False])
def test_images_are_what_torchvision_would_give(train, tiny_data):
    transform = Compose([ToTensor(), Normalize((0.1307,), (0.3081,))])
    dataset = torchvision.datasets.MNIST(tiny_data, train, transform)
    expected_images, expected_labels = zip(*dataset, strict=True)
    images, labels = load_mnist(tiny_data, train, CPU)
    assert_close(images, torch.stack(expected_images))  # shape and type, too
    assert_close(labels, torch.tensor(expected_labels))


def test_a_larger_side_adds_a_black_border(tiny_data, monkeypatch):
    images, _ = load_mnist(tiny_data, True, CPU)
    monkeypatch.setattr(mnist_data, "IMAGE_SIDE", 32)
    larger, _ = load_mnist(tiny_data, True, CPU)
    assert larger.shape == (200, 1, 32, 32)
    black = -0.1307 / 0.3081
    assert_close(larger, F.pad(images, [2] * 4, value=black))


def test_held_out_images():
    labels = torch.tensor([0] * 50 + [1] * 25 + [2] * 20 + [3] * 5)[torch.randperm(100)]
    (kept, kept_labels), (held, held_labels) = hold_out(torch.arange(100), labels, 30)
    assert held_labels.bincount().tolist() == [15, 8, 6, 1]  # of 15, 7.5, 6 and 1.5
    assert torch.cat([kept, held]).sort().values.equal(torch.arange(100))
    assert kept_labels.equal(labels[kept])
    assert held_labels.equal(labels[held])
    for digit in range(4):  # the last ones
        assert held[held_labels == digit].min() > kept[kept_labels == digit].max()


def test_augment():
    image = torch.full((1, 1, 28, 28), -0.4)
    image[0, 0, 14, 20] = 3.0  # 6.5 pixels right of the centre
    torch.manual_seed(0)
    images = augment(image.expand(2000, -1, -1, -1))
    assert images.shape == (2000, 1, 28, 28)
    weights = (images[:, 0] + 0.4).clamp(min=0)  # bicubic interpolation undershoots
    assert (weights[:, :, :10] < 1e-6).all()  # the background stays
    # Shifted by 3; moved across by 10 % of 6.5, and up and down by 6.5 * sin(10 degrees) = 1.1
    for summed, start, reach in ((1, 20, 0.75), (2, 14, 2 * 1.15)):
        centre = (weights.sum(summed) * torch.arange(28.0)).sum(1) / weights.sum((1, 2))
        moved = centre - start
        assert 3 < moved.abs().max() < 3 + reach + 0.4
        assert abs(moved.mean()) < 0.2


def test_augmentation_keeps_thin_strokes():
    images = torch.zeros(2000, 1, 28, 28)
    images[..., 14] = 1.0
    torch.manual_seed(0)
    brightest = augment(images)[:, 0, 10:18].amax(2)
    assert brightest.mean() > 0.8  # with bilinear interpolation 0.75


def test_augmentation_is_none_at_zero(monkeypatch):
    def middle(tensor, low, high):
        return tensor.fill_((low + high) / 2)

    monkeypatch.setattr(torch.Tensor, "uniform_", middle)
    images = torch.randn(3, 1, 28, 28)
    assert torch.allclose(augment(images), images, atol=1e-4)
