import io
from functools import partial

import numpy as np
import pytest
from PIL import Image, ImageDraw

from flaxnets import InputError
from flaxnets.data.crops import Crop, fit_box, resized_box
from flaxnets.data.images import PIXELS_FOR_ONE, _cut, _decode, decode_crop, open_image

pytestmark = pytest.mark.unit


def decode_image(data: bytes, channels: int, at_least=None) -> Image.Image:
    """The whole picture, as `decode_crop` decodes it before it crops."""
    return _decode(open_image(io.BytesIO(data)), channels, at_least)


def fit(image: Image.Image, height: int, width: int, fraction=1.0) -> np.ndarray:
    """The centre of a picture, as in evaluation."""
    return _cut(image, fit_box(*image.size, height, width, fraction), height, width)


def encoded(image: Image.Image, kind="png", **options) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def picture(width=61, height=40) -> Image.Image:
    """Smooth, and different in each corner and channel."""
    y, x = np.mgrid[0:height, 0:width]
    red, green = 255 * x / width, 255 * y / height
    return Image.fromarray(np.stack([red, green, 255 - (red + green) / 2], -1).astype(np.uint8))


def torchvision_transforms():
    pytest.importorskip("torch")
    from tests.reference import torchvision

    return torchvision.transforms


@pytest.mark.parametrize("kind", ["jpeg", "png", "webp", "bmp"])
@pytest.mark.parametrize("channels", [1, 3])
def test_every_format(kind, channels):
    image = picture()
    decoded = decode_image(encoded(image, kind), channels)
    assert decoded.mode == {1: "L", 3: "RGB"}[channels]
    expected = np.asarray(image.convert(decoded.mode), int)
    assert abs(np.asarray(decoded) - expected).mean() < (0.01 if kind in ("png", "bmp") else 4)


@pytest.mark.parametrize(
    ("mode", "kind"),
    [
        ("1", "png"),
        ("L", "jpeg"),
        ("LA", "png"),
        ("P", "png"),
        ("P", "bmp"),
        ("RGBA", "png"),
        ("RGBA", "webp"),
        ("CMYK", "jpeg"),
        ("I;16", "png"),
    ],
)
def test_every_mode(mode, kind):
    image = picture()
    if mode == "I;16":
        values = np.asarray(image.convert("L"), np.uint16) * 256 + 200
        stored = Image.fromarray(values)
    else:
        stored = image.convert(mode)
    for channels, target in ((1, "L"), (3, "RGB")):
        decoded = decode_image(encoded(stored, kind), channels)
        assert decoded.mode == target
        if mode == "1":
            assert set(np.unique(np.asarray(decoded))) == {0, 255}
            continue
        expected = stored.convert("RGB") if mode in ("RGBA", "CMYK", "P") else image.convert("L")
        difference = np.asarray(decoded, int) - np.asarray(expected.convert(target))
        assert abs(difference).mean() < 3, channels


def test_opacity_is_dropped():
    image = picture().convert("RGBA")
    image.putalpha(0)
    assert (np.asarray(decode_image(encoded(image), 3)) == np.asarray(picture())).all()


@pytest.mark.filterwarnings("error")
def test_a_palette_with_opacity_keeps_its_colours():
    image = picture().convert("P")
    expected = np.asarray(image.convert("RGB"))
    data = encoded(image, transparency=bytes(range(256)))
    assert (np.asarray(decode_image(data, 3)) == expected).all()


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["jpeg", "png", "webp"])
def test_exif_makes_pictures_upright(orientation, kind):
    # What a camera stores whose picture is upright after it has been turned back.
    undo = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}
    upright = picture(160, 96)
    stored = upright.transpose(Image.Transpose(undo[orientation])) if orientation > 1 else upright
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(stored, kind, exif=exif)
    decoded = decode_image(data, 3)
    assert decoded.size == (160, 96)
    assert abs(np.asarray(decoded, int) - np.asarray(upright)).mean() < 4
    # Also when it is not decoded in full.
    sizes = []

    def draw(width, height):
        sizes.append((width, height))
        return (0, 0, 80, 96)

    part = decode_crop(data, 3, 12, 10, draw)
    assert sizes == [(160, 96)]
    expected = upright.resize((10, 12), Image.Resampling.BILINEAR, box=(0, 0, 80, 96))
    assert abs(part.astype(int) - np.asarray(expected)).mean() < 4


def test_damaged_exif_is_not_a_damaged_picture():
    data = encoded(picture(), "jpeg", exif=b"Exif\0\0MM\0\x2a\0\0\0\x08\0\xff\x01\x12\0\x03\0")
    assert decode_image(data, 3).size == (61, 40)


@pytest.mark.parametrize("kind", ["jpeg", "png", "webp", "bmp"])
@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.97])
def test_truncated_files_are_refused(kind, share):
    noise = np.random.RandomState(0).randint(0, 256, (64, 64, 3)).astype(np.uint8)
    data = encoded(Image.fromarray(noise), kind)
    with pytest.raises(ValueError, match=r"^[^\n]+$"):
        decode_image(data[: int(share * len(data))], 3)


@pytest.mark.parametrize("data", [b"", b"text", b"GIF89a" + bytes(100), b"\xff\xd8\xff" * 9])
def test_other_files_are_refused(data):
    with pytest.raises(ValueError, match=r"^not a JPEG, PNG, WebP or BMP picture$"):
        decode_image(data, 3)


def test_other_formats_are_refused():
    with pytest.raises(ValueError, match="not a JPEG"):
        decode_image(encoded(picture(), "tiff"), 3)


def test_other_numbers_of_channels_are_refused():
    with pytest.raises(InputError, match="1 or 3 channels, not 4"):
        decode_image(encoded(picture()), 4)


def test_big_jpegs_are_decoded_at_a_part_of_their_size():
    image = picture(801, 600)
    data = encoded(image, "jpeg")
    for at_least, size in [((801, 600), (801, 600)), ((400, 300), (401, 300)), ((9, 9), (101, 75))]:
        assert decode_image(data, 3, at_least).size == size
    assert decode_image(encoded(image), 3, (9, 9)).size == (801, 600)
    # Stored on its side.
    exif = Image.Exif()
    exif[0x0112] = 6
    data = encoded(image.transpose(Image.Transpose.ROTATE_90), "jpeg", exif=exif)
    assert decode_image(data, 3, (400, 300)).size == (401, 300)


@pytest.mark.parametrize("channels", [1, 3])
def test_a_crop_of_a_big_jpeg_is_that_of_the_whole(channels):
    image = picture(1600, 1200)
    ImageDraw.Draw(image).ellipse((300, 200, 900, 1000), outline="white", width=60)
    data = encoded(image, "jpeg", quality=95)
    box = (100.5, 200.0, 1101.0, 1200.0)
    part = decode_crop(data, channels, 100, 110, lambda *_: box)
    assert part.shape == (100, 110, channels)
    assert PIXELS_FOR_ONE * 110 * 2 < 1000  # it was decoded at half its size or less
    whole = decode_image(data, channels)
    expected = np.asarray(whole.resize((110, 100), Image.Resampling.BILINEAR, box=box), int)
    assert abs(part - expected.reshape(part.shape)).mean() < 1.5
    mirrored = decode_crop(data, channels, 100, 110, lambda *_: box, mirrored=True)
    assert (mirrored == part[:, ::-1]).all()


def test_fit_of_the_right_size_changes_nothing():
    image = picture(20, 14)
    assert (fit(image, 14, 20) == np.asarray(image)).all()
    grey = image.convert("L")
    assert (fit(grey, 14, 20) == np.asarray(grey)[..., None]).all()


@pytest.mark.parametrize(
    ("size", "new", "fraction", "box"),
    [
        ((200, 100), (50, 50), 1.0, (50, 0, 150, 100)),
        ((100, 200), (50, 50), 0.5, (25, 75, 75, 125)),
        ((300, 100), (25, 50), 1.0, (50, 0, 250, 100)),
        ((7, 3), (3, 7), 1.0, (0, 0, 7, 3)),
    ],
)
def test_fit_takes_the_centre(size, new, fraction, box):
    assert fit_box(*size, *new, fraction=fraction) == pytest.approx(box)


@pytest.mark.parametrize("size", [(1, 1), (1, 500), (3, 7), (49, 49), (500, 1)])
def test_crops_of_pictures_of_any_size(size):
    rng = np.random.default_rng(0)
    image = picture(*size)
    data = encoded(image)
    for _ in range(50):
        assert fit(image, 49, 49, 0.875).shape == (49, 49, 3)
        for crop in Crop:
            draw = partial(crop.draw_box, rng, 8)
            assert decode_crop(data, 3, 8, 8, draw).shape == (8, 8, 3)
            assert decode_crop(data, 1, 8, 8, draw).shape == (8, 8, 1)


def test_resized_crops_have_the_areas_and_shapes_of_the_definition():
    rng = np.random.default_rng(0)
    width, height = 500, 375
    boxes = np.array([resized_box(rng, width, height) for _ in range(5000)])
    left, top, right, bottom = boxes.T
    assert (left >= 0).all()
    assert (top >= 0).all()
    assert (right <= width).all()
    assert (bottom <= height).all()
    areas = (right - left) * (bottom - top) / (width * height)
    shapes = (right - left) / (bottom - top)
    assert 0.078 < areas.min() < 0.09
    assert 0.95 < areas.max() <= 1
    assert 0.73 < shapes.min() < 0.76
    assert 1.31 < shapes.max() < 1.36
    # Below the areas that do not fit in some shapes all are as frequent.
    counts = np.histogram(areas, 6, (0.08, 0.56))[0]
    assert counts.max() < 1.25 * counts.min()
    assert abs(np.log(shapes[areas < 0.56]).mean()) < 0.02
    assert left.std() > 50
    assert top.std() > 40


def test_the_last_resort_is_the_centre():
    rng = np.random.default_rng(0)
    # Ten times an area that is larger than the picture.
    assert resized_box(rng, 400, 100, (9, 9)) == pytest.approx((400 / 3, 0, 800 / 3, 100), abs=1)
    assert resized_box(rng, 90, 400, (9, 9)) == pytest.approx((0, 140, 90, 260))
    assert resized_box(rng, 90, 90, (9, 9)) == (0, 0, 90, 90)


def test_resized_crops_are_torchvisions():
    torch, transforms = pytest.importorskip("torch"), torchvision_transforms()
    rng = np.random.default_rng(0)
    torch.manual_seed(0)
    image = torch.zeros(3, 150, 200)
    draws = (
        transforms.RandomResizedCrop.get_params(image, (0.08, 1), (3 / 4, 4 / 3))
        for _ in range(3000)
    )
    theirs = np.array([(left, top, left + w, top + h) for top, left, h, w in draws], float)
    ours = np.array([resized_box(rng, 200, 150) for _ in range(3000)])
    for share in (0.05, 0.25, 0.5, 0.75, 0.95):
        np.testing.assert_allclose(
            np.quantile(ours, share, 0), np.quantile(theirs, share, 0), atol=8
        )


def test_scaled_crops_have_the_scales_of_the_paper():
    rng = np.random.default_rng(0)
    boxes = np.array([Crop.SCALED.draw_box(rng, 224, 640, 512) for _ in range(2000)])
    left, top, right, bottom = boxes.T
    np.testing.assert_allclose(right - left, bottom - top)
    # Where the shorter side has 256 to 480 pixels, a crop has 224.
    shorter = 512 / ((right - left) / 224)
    assert 256 <= shorter.min() < 258
    assert 478 < shorter.max() <= 480
    assert abs(shorter.mean() - 368) < 5
    assert left.min() >= 0
    assert right.max() <= 640
    assert abs((left + right).mean() - 640) < 15
    assert bottom.max() <= 512


def test_crops_are_the_pixels_of_their_box():
    image = picture(200, 150)
    data = encoded(image)
    for seed in range(5):
        box = map(round, resized_box(np.random.default_rng(seed), 200, 150))
        left, top, right, bottom = box
        part = decode_crop(data, 3, 24, 32, partial(resized_box, np.random.default_rng(seed)))
        expected = image.crop((left, top, right, bottom)).resize(
            (32, 24), Image.Resampling.BILINEAR
        )
        assert abs(part.astype(int) - np.asarray(expected)).mean() < 1
        left, top, right, bottom = Crop.SCALED.draw_box(np.random.default_rng(seed), 24, 200, 150)
        draw = partial(Crop.SCALED.draw_box, np.random.default_rng(seed), 24)
        part = decode_crop(data, 3, 24, 24, draw)
        # Red grows from left to right, green from top to bottom.
        assert abs(part[..., 0].mean() - 255 * (left + right) / 2 / 200) < 2
        assert abs(part[..., 1].mean() - 255 * (top + bottom) / 2 / 150) < 2


def test_fit_is_torchvisions_resize_and_centre_crop():
    transforms = torchvision_transforms()
    image = picture(500, 375)
    ImageDraw.Draw(image).ellipse((100, 100, 300, 300), outline="white", width=10)
    theirs = transforms.Compose([transforms.Resize(256), transforms.CenterCrop(224)])(image)
    ours = fit(image, 224, 224, 0.875)
    assert abs(ours.astype(int) - np.asarray(theirs)).mean() < 2
