"""Colour conversion, crop and value range."""

import numpy as np
import pytest
import torch
from PIL import Image
from torch.testing import assert_close

from grpo.data import normalize, to_image, to_pixels, to_uint8
from grpo.data.images import center_crop, to_rgb


def stripes(width: int, height: int) -> Image.Image:
    """Red is the column, green the row."""
    rows, columns = np.mgrid[:height, :width]
    return Image.fromarray(np.stack([columns, rows, 0 * rows], axis=-1).astype(np.uint8))


def test_crop_without_scaling_takes_the_centre():
    pixels = to_pixels(center_crop(stripes(40, 16), 16))
    assert pixels.shape == (3, 16, 16)
    assert pixels[0, 0].tolist() == list(range(12, 28))
    assert pixels[1, :, 0].tolist() == list(range(16))


@pytest.mark.parametrize("size", [(16, 16), (17, 31), (100, 37), (15, 9), (300, 16), (1, 5)])
def test_every_size_gives_a_square(size):
    assert center_crop(stripes(*size), 16).size == (16, 16)


def test_large_images_are_halved_by_averaging():
    pixels = 16 * np.random.default_rng(0).integers(0, 16, (64, 64, 3), dtype=np.uint8)  # block means are whole numbers
    expected = pixels.reshape(16, 4, 16, 4, 3).mean(axis=(1, 3))
    found = to_pixels(center_crop(Image.fromarray(pixels), 16))
    assert found.permute(1, 2, 0).tolist() == expected.tolist()


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "PA", "RGBA", "CMYK", "YCbCr", "HSV", "I", "F"])
def test_every_mode_becomes_rgb(mode):
    assert to_rgb(stripes(8, 8).convert("L").convert(mode)).mode == "RGB"


@pytest.mark.parametrize("dtype", [np.uint16, np.int32])
def test_sixteen_bit_gray_is_scaled_not_clipped(dtype):
    image = Image.fromarray(np.array([[0, 257 * 100, 65535]], dtype=dtype))
    assert np.asarray(to_rgb(image))[0].tolist() == [[0, 0, 0], [100, 100, 100], [255, 255, 255]]


def test_transparent_palette_keeps_its_colours(recwarn):
    image = Image.fromarray(np.array([[0, 1]], dtype=np.uint8)).convert("P")
    image.putpalette([10, 20, 30, 40, 50, 60])
    image.info["transparency"] = b"\x00\xff"
    image.putdata([0, 1])
    assert np.asarray(to_rgb(image))[0].tolist() == [[10, 20, 30], [40, 50, 60]]
    assert not recwarn.list


def test_normalize_maps_bytes_onto_minus_one_to_one():
    values = normalize(torch.arange(256, dtype=torch.uint8))
    assert values.dtype == torch.float32
    assert values[0] == -1
    assert values[255] == 1
    assert torch.equal(((values + 1) * 127.5).round().to(torch.uint8), torch.arange(256, dtype=torch.uint8))


def test_to_uint8_rounds_and_clamps():
    images = torch.tensor([-2.0, -1.0, -1 + 0.6 / 127.5, 0.0, 1 - 0.4 / 127.5, 1.0, 5.0])
    assert to_uint8(images).tolist() == [0, 0, 1, 128, 255, 255, 255]


def test_to_uint8_undoes_normalize():
    pixels = torch.arange(256, dtype=torch.uint8)
    assert_close(to_uint8(normalize(pixels)), pixels)
    assert_close(to_uint8(normalize(pixels).bfloat16()), pixels, atol=1, rtol=0)


def test_pixels_and_images_are_each_other():
    pixels = torch.randint(0, 256, (3, 4, 5), dtype=torch.uint8)
    assert to_image(pixels).size == (5, 4)
    assert torch.equal(to_pixels(to_image(pixels)), pixels)
