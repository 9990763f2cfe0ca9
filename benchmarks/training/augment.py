"""Images on the device, uint8, become a batch: cropped, flipped, normalised. All chance is a function of seed and step.

torchvision's random transforms draw once per call, which would be once per batch: here the draws are made, one per image.
"""

import hashlib

import torch
from torch import Tensor

from training.data import Data

TUTORIAL_CROP = 24


def seeded(seed: int, stream: str, counter: int, device: torch.device) -> torch.Generator:
    """A generator for one purpose at one point of the run. Hashed, because a CPU generator uses 32 bits of its seed."""
    digest = hashlib.blake2b(f"{seed} {stream} {counter}".encode(), digest_size=4).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest, "little"))


def augment(images: Tensor, data: Data, model: str, generator: torch.Generator) -> Tensor:
    """Training images: (B, 3, 32, 32) uint8 -> float32, (B, 3, 32, 32) for resnet, (B, 3, 24, 24) for the tutorial."""
    from torchvision.transforms.v2 import functional as transforms

    def uniform(low: float, high: float) -> Tensor:
        return torch.empty(len(images), 1, 1, 1, device=images.device).uniform_(low, high, generator=generator)

    flips = data.name == "cifar10"  # a mirrored digit is another digit, or none
    if model == "resnet":
        images = transforms.to_dtype(images, torch.float32, scale=True)
        images = transforms.normalize(images, data.mean, data.std)
        images = random_crop(transforms.pad(images, [4], padding_mode="reflect"), 32, generator)
        if flips:
            images = torch.where(uniform(-1, 1) < 0, transforms.horizontal_flip(images), images)
            images = cutout(images, 8, generator)
        return images
    images = random_crop(images, TUTORIAL_CROP, generator).float()
    if flips:
        images = torch.where(uniform(-1, 1) < 0, transforms.horizontal_flip(images), images)
    images = images + uniform(-63, 63)
    average = images.mean(dim=(2, 3), keepdim=True)
    images = (images - average) * uniform(0.2, 1.8) + average
    return standardise(images)


def for_test(images: Tensor, data: Data, model: str) -> Tensor:
    """Test images: as `augment`, without chance."""
    from torchvision.transforms.v2 import functional as transforms

    if model == "resnet":
        return transforms.normalize(transforms.to_dtype(images, torch.float32, scale=True), data.mean, data.std)
    return standardise(transforms.center_crop(images, [TUTORIAL_CROP]).float())


def random_crop(images: Tensor, size: int, generator: torch.Generator) -> Tensor:
    n, channels, height, width = images.shape
    device = images.device
    top = torch.randint(height - size + 1, (n, 1), device=device, generator=generator)
    left = torch.randint(width - size + 1, (n, 1), device=device, generator=generator)
    span = torch.arange(size, device=device)
    image, channel = torch.arange(n, device=device), torch.arange(channels, device=device)
    rows, cols = (top + span)[:, None, :, None], (left + span)[:, None, None, :]
    return images[image[:, None, None, None], channel[:, None, None], rows, cols]


def cutout(images: Tensor, size: int, generator: torch.Generator) -> Tensor:
    """Blanks a square in each image (DeVries and Taylor 2017, arXiv:1708.04552)."""
    n, _, height, width = images.shape
    top = torch.randint(height - size + 1, (n, 1, 1, 1), device=images.device, generator=generator)
    left = torch.randint(width - size + 1, (n, 1, 1, 1), device=images.device, generator=generator)
    rows, cols = torch.arange(height, device=images.device)[:, None], torch.arange(width, device=images.device)
    inside = (rows >= top) & (rows < top + size) & (cols >= left) & (cols < left + size)
    return images.masked_fill(inside, 0)


def standardise(images: Tensor) -> Tensor:
    """tf.image.per_image_standardization: the floor keeps a uniform image finite."""
    std, mean = torch.std_mean(images, dim=(1, 2, 3), correction=0, keepdim=True)
    return (images - mean) / std.clamp(min=images[0].numel() ** -0.5)
