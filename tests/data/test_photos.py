"""One decoder for all photos: whatever way an image comes in, it has the same pixels."""

from __future__ import annotations

import io
import warnings

import numpy as np
import pytest
import torch
from PIL import Image, ImageFile
from tests_data import everything

from sfm_fast import Bundle, InputError
from sfm_fast.backbones.load import load_backbone
from sfm_fast.data.datasets import open_dataset
from sfm_fast.data.decoder import endings, open_image, plain
from sfm_fast.data.photos import photo_batches
from sfm_fast.data.sources import from_iterable
from sfm_fast.data.transforms import ImageTransform
from sfm_fast.evaluation.classifier import train_on_source
from sfm_fast.synthetic import SyntheticSet

ORIENTATION = 0x0112
GREY, COLOUR = ImageTransform(12, 12, 1), ImageTransform(12, 12, 3)


def picture(channels=3, side=12, seed=0):
    values = np.random.default_rng(seed).integers(0, 256, (side, side, channels), dtype=np.uint8)
    return Image.fromarray(values[..., 0] if channels == 1 else values)


def turned(image, orientation):
    """What a camera held otherwise stores of ``image``."""
    back = {
        1: [],
        2: [Image.Transpose.FLIP_LEFT_RIGHT],
        3: [Image.Transpose.ROTATE_180],
        4: [Image.Transpose.FLIP_TOP_BOTTOM],
        5: [Image.Transpose.TRANSPOSE],
        6: [Image.Transpose.ROTATE_90],
        7: [Image.Transpose.TRANSVERSE],
        8: [Image.Transpose.ROTATE_270],
    }[orientation]
    for step in back:
        image = image.transpose(step)
    return image


def stored(image, orientation, **options):
    """As a PNG with an EXIF tag; ``image`` is what it shows."""
    exif = image.getexif()
    exif[ORIENTATION] = orientation
    file = io.BytesIO()
    turned(image, orientation).save(file, "PNG", exif=exif, **options)
    return file.getvalue()


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("channels", [1, 3])
def test_every_road_turns_a_photo_upright(tmp_path, channels, orientation):
    shown = picture(channels)
    transform = GREY if channels == 1 else COLOUR
    expected = transform(shown)
    data = stored(shown, orientation)
    for split in ("train", "test"):
        for name in "ab":
            (tmp_path / split / name).mkdir(parents=True)
            (tmp_path / split / name / "0.png").write_bytes(data)
    path = tmp_path / "train" / "a" / "0.png"
    roads = {
        "folder": everything(open_dataset(str(tmp_path), "train", workers=0), transform)[0][0],
        "photos": next(photo_batches(path, transform, 1))[0],
        "list of images": everything(from_iterable([(Image.open(path), 0)], ["a"], channels), transform)[0][0],
        "list of paths": everything(from_iterable([(path, 0)], ["a"], channels), transform)[0][0],
        "bytes": everything(from_iterable([({"bytes": data, "path": None}, 0)], ["a"], channels), transform)[0][0],
        "stream": everything(from_iterable(iter([(io.BytesIO(data), 0)]), ["a"], channels), transform)[0][0],
    }
    for road, found in roads.items():
        assert torch.equal(found, expected), road


def test_a_classifier_finds_in_turned_photos_what_its_evaluation_does(tmp_path):
    for split, orientation in (("train", 1), ("test", 3)):
        for label, name in enumerate(("above", "below")):
            (tmp_path / split / name).mkdir(parents=True)
            for index in range(6):
                values = np.random.default_rng(10 * label + index).integers(0, 90, (48, 48), dtype=np.uint8)
                values[24 * label : 24 * label + 24] = 220
                (tmp_path / split / name / f"{index}.png").write_bytes(stored(Image.fromarray(values), orientation))
    train, test = (open_dataset(str(tmp_path), split, workers=0) for split in ("train", "test"))
    backbone = load_backbone()
    synthetic = SyntheticSet(
        torch.rand(2, 1, 28, 28), torch.arange(2), train.class_names, {"backbone": backbone.describe()}
    )
    bundle = Bundle.create(synthetic, train_on_source(train, backbone, progress=False), backbone)
    files = sorted((tmp_path / "test").rglob("*.png"))
    answers = [best[0][0] for best in bundle.classify(files)]
    assert answers == [file.parent.name for file in files]
    assert bundle.evaluate(test)["top1"] == 1


def forms():
    """Images that all show the same colours, or the same greys, as `(name, image, what it shows)`."""
    colour, grey = picture(3), picture(1)
    alpha = Image.fromarray(np.random.default_rng(1).integers(0, 256, (12, 12), dtype=np.uint8))
    few = colour.quantize(16)
    with_transparency = few.copy()
    with_transparency.info["transparency"] = bytes(range(0, 160, 10))
    grey_palette = grey.quantize(16)
    deep = Image.fromarray(np.asarray(grey).astype(np.uint16) << 8)
    yield "RGBA", Image.merge("RGBA", (*colour.split(), alpha)), colour
    yield "palette", few, few.convert("RGB")
    yield "palette with transparency", with_transparency, few.convert("RGB")
    yield "CMYK", colour.convert("CMYK"), colour
    yield "LAB", colour.convert("LAB"), colour.convert("LAB").convert("RGB")
    yield "YCbCr", colour.convert("YCbCr"), colour.convert("YCbCr").convert("RGB")
    yield "grey with alpha", Image.merge("LA", (grey, alpha)), grey
    yield "grey palette", grey_palette, grey_palette.convert("RGB").convert("L")
    yield "16 bit", deep, grey
    yield "bits", grey.convert("1"), grey.convert("1").convert("L")


@pytest.mark.parametrize("transform", [GREY, COLOUR], ids=["as grey", "as colour"])
@pytest.mark.parametrize(("name", "image", "shows"), list(forms()), ids=[form[0] for form in forms()])
def test_modes(name, image, shows, transform):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = transform(image)
    torch.testing.assert_close(found, transform(shows), rtol=0, atol=1.01 / 255)


def test_sixteen_bit_files(tmp_path):
    values = np.linspace(0, 65535, 144).reshape(12, 12).astype(np.uint16)
    expected = torch.from_numpy((values >> 8).astype(np.float32) / 255)
    for name in ("deep.png", "deep.tiff", "deep.pgm"):
        Image.fromarray(values).save(tmp_path / name)
        torch.testing.assert_close(GREY(open_image(tmp_path / name))[0], expected, rtol=0, atol=1.01 / 255)
    Image.fromarray(values.astype(np.int32)).save(tmp_path / "ranges.tiff")
    with pytest.raises(InputError, match="no fixed range"):
        open_image(tmp_path / "ranges.tiff")


@pytest.mark.parametrize("ending", [".gif", ".png", ".webp", ".tiff"])
def test_the_first_frame_of_several(tmp_path, ending):
    first, second = picture(3, seed=1).quantize(8), picture(3, seed=2).quantize(8)
    frames = (first, second) if ending == ".gif" else (first.convert("RGB"), second.convert("RGB"))
    options = {"lossless": True} if ending == ".webp" else {}
    frames[0].save(tmp_path / f"two{ending}", save_all=True, append_images=[frames[1]], **options)
    assert Image.open(tmp_path / f"two{ending}").n_frames == 2
    assert torch.equal(COLOUR(open_image(tmp_path / f"two{ending}")), COLOUR(first.convert("RGB")))


def test_a_cut_photo_is_an_error_even_where_others_were_allowed(tmp_path, monkeypatch):
    picture(3, side=64).save(tmp_path / "whole.jpg")
    data = (tmp_path / "whole.jpg").read_bytes()
    (tmp_path / "cut.jpg").write_bytes(data[: len(data) * 2 // 3])
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)  # as some packages do when they are imported
    with pytest.raises(InputError, match="unreadable image"):
        open_image(tmp_path / "cut.jpg")
    assert ImageFile.LOAD_TRUNCATED_IMAGES


def test_damaged_exif_data_turn_nothing(tmp_path):
    shown = picture(3)
    shown.save(tmp_path / "x.jpg", exif=b"Exif\x00\x00MM\x00*\x00\x00\x00\x08\xff\xff" + b"\x01" * 30, quality=95)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert open_image(tmp_path / "x.jpg").size == shown.size


def test_endings_are_those_of_photos():
    assert {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm"} <= endings()
    assert not {".pdf", ".mpg", ".h5", ".eps", ".txt", ""} & endings()


@pytest.mark.parametrize("compression", [None, "tiff_lzw"])
@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("mode", ["L", "I;16", "P", "RGB", "RGBA", "CMYK"])
def test_tiffs_are_the_same_by_path_and_by_bytes(tmp_path, mode, orientation, compression):
    values = np.random.default_rng(0).integers(0, 256, (30, 40, 3), dtype=np.uint8)
    image = Image.fromarray(values[..., 0].astype(np.uint16) << 8) if mode == "I;16" else Image.fromarray(values)
    image = image if mode == "I;16" else image.quantize(9) if mode == "P" else image.convert(mode)
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    path = tmp_path / "x.tif"
    image.save(path, exif=exif, compression=compression)
    by_bytes = np.asarray(open_image(io.BytesIO(path.read_bytes())))
    assert by_bytes.shape[:2] == ((30, 40) if orientation < 5 else (40, 30))
    assert np.array_equal(np.asarray(open_image(path)), by_bytes)
    with Image.open(path) as opened:
        assert np.array_equal(np.asarray(plain(opened)), by_bytes)
