"""PascalContext, NYUDv2, your own data: label conventions on files made by hand, augmentation, checks, archives."""

import copy
import errno
import json
import locale
import os
import re
import shutil
import signal
import struct
import subprocess
import sys
import warnings
import zlib
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from pathlib import Path
from traceback import format_exc
from types import SimpleNamespace

import numpy as np
import pytest
import scipy.io
import torch
from PIL import Image, ImageOps
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch.utils.data import DataLoader

import archives
import datasets
import evaluate
import metrics
from datasets import (
    IGNORE,
    INDOOR,
    Cityscapes,
    FileDataset,
    LabelledDataset,
    NYUDv2,
    PascalContext,
    Synthetic,
    augment,
    centred,
    check_samples,
    find_dataset_class,
    main,
    read_image,
)
from metrics import Labels, boundary_ground_truth, delta_m, thin
from mtmamba import ENCODERS, VARIANTS

SIZE = (40, 48)
KINDS = Labels({"semseg": 21, "saliency": 2, "normal": 3, "boundary": 1, "depth": 1}).kinds


@pytest.fixture(scope="module")
def pascal(tmp_path_factory):
    return exported(tmp_path_factory, "pascal", count=8)


@pytest.fixture(scope="module")
def nyud(tmp_path_factory):
    return exported(tmp_path_factory, "nyud", count=2)


def exported(tmp_path_factory, kind, count):
    root = tmp_path_factory.mktemp(kind) / "data set"
    archives.export(kind, root, count, SIZE)
    return root


def assert_equal(a, b):
    assert a.keys() == b.keys()
    for key in a:
        assert same(a[key], b[key]) if torch.is_tensor(a[key]) else a[key] == b[key], key


def same(a, b):
    return a.dtype == b.dtype and np.array_equal(a, b, equal_nan=True)


def save(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".npy":
        np.save(path, content)
    elif path.suffix == ".mat":
        scipy.io.savemat(path, content)
    elif path.suffix == ".txt":
        path.write_text(content)
    else:
        Image.fromarray(content).save(path)


def objects(*things):
    """human_parts from (class_ind, [(part name, mask)])."""
    array = np.empty((1, len(things)), [(name, object) for name in ("class", "class_ind", "mask", "parts")])
    for i, (index, parts) in enumerate(things):
        inner = np.empty((1, len(parts)), [("part_name", object), ("mask", object)])
        for j, part in enumerate(parts):
            inner[0, j] = part
        array[0, i] = ("thing", index, np.zeros((1, 1), np.uint8), inner if parts else [])
    anno = np.empty((1, 1), [("imname", object), ("objects", object)])
    anno[0, 0] = ("a.jpg", array)
    return {"anno": anno}


def by_hand(root, files, names="a\n"):
    """The data set of one image "a" with files over those of an image of 6x8 pixels in one class and nothing else."""
    grey = np.full((6, 8), 127, np.uint8)
    facing = np.stack([grey, grey, grey + 128], 2)
    if any(path.startswith("segmentation") for path in files):
        defaults = {"images/a.png": np.stack([grey] * 3, 2), "segmentation/a.png": grey // 127, "edge/a.png": grey * 0,
                    "depth/a.npy": grey / 127, "normals/a.png": facing}
        kind, size, listed = NYUDv2, (8, 12), "gt_sets/val.txt"
    else:
        defaults = {"JPEGImages/a.jpg": np.stack([grey] * 3, 2), "semseg/VOC12/a.png": grey // 127,
                    "pascal-context/trainval/a.mat": {"LabelMap": grey // 127}, "human_parts/a.mat": objects((3, [])),
                    "normals_distill/a.png": facing, "sal_distill/a.png": grey * 0}
        kind, size, listed = PascalContext, (8, 12), "ImageSets/Context/val.txt"
    for path, content in {**defaults, listed: names, **files}.items():
        if content is not None:
            save(root / path, content)
    return kind(root, "val", size=size)


def unit_normals(rng, h, w):
    """Random directions as pixels, uint8 (h, w, 3)."""
    vectors = rng.normal(size=(h, w, 3))
    return np.rint((vectors / np.linalg.norm(vectors, axis=2, keepdims=True) + 1) * 127.5).astype(np.uint8)


def inner(sample, task):
    """The label without its padding, as numpy (C, h, w)."""
    H, W = sample[task].shape[1:]
    rows, columns = centred((H, W), sample["size"])
    return sample[task][:, rows, columns].numpy()


# ---------------------------------------------------------------------------------------------------- conventions

def test_nyudv2_labels(tmp_path):
    values = np.arange(48, dtype=np.uint8).reshape(6, 8)
    normal = unit_normals(np.random.default_rng(0), 6, 8)
    data = by_hand(tmp_path, {"segmentation/a.png": np.minimum(values, 40), "depth/a.npy": values / 10,
                              "normals/a.png": normal, "edge/a.png": (values % 2 * 255).astype(np.uint8)})
    sample = data[0]
    semseg, depth = inner(sample, "semseg")[0], inner(sample, "depth")[0]
    assert semseg[0, 0] == IGNORE                               # 0 in the file
    assert semseg.ravel()[1:41].tolist() == list(range(40))
    assert np.isnan(depth[0, 0])
    np.testing.assert_allclose(depth.ravel()[1:], np.arange(1, 48) / 10, rtol=1e-6)
    np.testing.assert_allclose(inner(sample, "normal"), normal.transpose(2, 0, 1) / 127.5 - 1, atol=1e-6)
    assert (inner(sample, "boundary")[0] == values % 2).all()
    assert list(data.tasks.items()) == [("semseg", 40), ("depth", 1), ("normal", 3), ("boundary", 1)]


def test_pascal_semseg_comes_from_voc12_or_else_from_pascal_context(tmp_path):
    values = np.resize([*range(21), IGNORE], (6, 8)).astype(np.uint8)
    other = {"semseg/pascal-context/a.png": values}
    assert (inner(by_hand(tmp_path / "both", other)[0], "semseg") == 1).all()
    data = by_hand(tmp_path / "one", {**other, "semseg/VOC12/a.png": None})
    assert (inner(data[0], "semseg")[0] == values).all()
    palette = Image.fromarray(values, "P")
    palette.putpalette(np.random.default_rng(0).integers(0, 256, 768, np.uint8).tobytes())
    palette.save(tmp_path / "one/semseg/pascal-context/a.png")   # as PASCAL VOC stores it
    assert (inner(data[0], "semseg")[0] == values).all()
    assert list(data.tasks.items()) == [("semseg", 21), ("parsing", 7), ("saliency", 2), ("normal", 3), ("boundary", 1)]


def test_saliency_of_a_soft_map_is_what_lies_above_127(tmp_path):
    values = np.resize([*range(0, 240, 8), 127, 128, 254, 255], (6, 8)).astype(np.uint8)
    saliency = inner(by_hand(tmp_path, {"sal_distill/a.png": values})[0], "saliency")
    assert (saliency[0] == (values > 127)).all()
    for steps in (32, 33):
        values = np.resize(np.arange(110, 110 + steps), (6, 8)).astype(np.uint8)
        save(tmp_path / "few.png", values)
        if steps == 33:
            assert (read_image(tmp_path / "few.png", "soft mask") == (values > 127)).all()
        else:
            with pytest.raises(ValueError, match="0 and 1 or 0 and 255, found 110, 111, 112, 113, 114, 115, ...$"):
                read_image(tmp_path / "few.png", "soft mask")


PARTS = {"hair": 1, "head": 1, "lear": 1, "rear": 1, "lebrow": 1, "rebrow": 1, "leye": 1, "reye": 1, "mouth": 1,
         "nose": 1, "neck": 2, "torso": 2, "luarm": 3, "ruarm": 3, "llarm": 4, "rlarm": 4, "lhand": 4, "rhand": 4,
         "luleg": 5, "ruleg": 5, "llleg": 6, "rlleg": 6, "lfoot": 6, "rfoot": 6}


def test_part_table_name_by_name(tmp_path):
    cells = np.arange(48).reshape(6, 8)
    persons = [(name, np.uint8(cells == i)) for i, name in enumerate(PARTS)]
    horse = [("head", np.ones((6, 8), np.uint8))]                # not of a person
    overlap = [("torso", np.uint8(cells >= 40)), ("lhand", np.uint8(cells == 47))]
    anno = objects((15, persons[:9]), (13, horse), (15, persons[9:]), (15, []), (15, overlap))
    parsing = inner(by_hand(tmp_path, {"human_parts/a.mat": anno})[0], "parsing")[0].ravel()
    assert parsing[:24].tolist() == list(PARTS.values())
    assert (parsing[24:40] == 0).all() and (parsing[40:47] == 2).all() and parsing[47] == 4


@pytest.mark.parametrize("things", [[(3, [])], [(15, []), (3, [])], [(12, [("head", np.ones((6, 8), np.uint8))])], []])
def test_an_image_without_a_part_of_a_person_is_ignored_whole(tmp_path, things):
    sample = by_hand(tmp_path, {"human_parts/a.mat": objects(*things)})[0]
    assert (sample["parsing"] == IGNORE).all() and (inner(sample, "saliency") != IGNORE).all()


def test_training_boundaries_by_brute_force(tmp_path):
    rng = np.random.default_rng(5)    # a seed by which the way of mirroring shows
    h, w = 24, 30
    label_map = rng.integers(1, 460, (4, 5)).repeat(6, 0).repeat(6, 1).astype(np.uint16)
    label_map[3:9, 10:20] = [[100], [200], [300]] * 2            # 200 between 100 and 300: the Laplacian cancels
    label_map[:, :4] = rng.choice([100, 200, 300], (h, 4), p=[0.1, 0.8, 0.1])    # some cancel at the border
    expected, repeated = np.zeros((2, h, w), bool)
    for y in range(h):
        for x in range(w):
            around = (y - 1, x), (y + 1, x), (y, x - 1), (y, x + 1)
            mirror = [int(label_map[h - 2 if v == h else abs(v), w - 2 if u == w else abs(u)]) for v, u in around]
            nearest = [int(label_map[min(max(v, 0), h - 1), min(max(u, 0), w - 1)]) for v, u in around]
            expected[y, x], repeated[y, x] = (sum(labels) != 4 * int(label_map[y, x]) for labels in (mirror, nearest))
    assert not expected[4, 14] and expected[5, 14] and (thin(expected) != thin(repeated)).any()
    image = np.zeros((h, w, 3), np.uint8)
    by_hand(tmp_path, {"JPEGImages/a.jpg": image, "pascal-context/trainval/a.mat": {"LabelMap": label_map}})
    data = PascalContext(tmp_path, "val", ["boundary"])
    boundary, truth = inner(data[0], "boundary")[0], data.boundary_truth(0)
    assert (boundary == thin(expected)).all() and 20 < boundary.sum() < expected.sum()
    assert truth.dtype == bool and (truth == boundary_ground_truth(label_map)).all()
    assert (truth != boundary).any()                             # scored against another map than trained on


def test_nyudv2_boundaries_to_score_against(nyud):
    data = NYUDv2(nyud, "val")
    for i, sample in enumerate(data):
        truth, edge = data.boundary_truth(i), inner(sample, "boundary")[0]
        assert truth.shape == SIZE and (truth == boundary_ground_truth(edge)).all() and truth.any()


def test_normals_count_only_in_classes_that_exist_indoors(tmp_path):
    label_map = np.arange(1, 481).reshape(20, 24)
    label_map[label_map > 459] = 1
    pixels = unit_normals(np.random.default_rng(0), 20, 24)
    by_hand(tmp_path, {"JPEGImages/a.jpg": pixels, "normals_distill/a.png": pixels,
                       "pascal-context/trainval/a.mat": {"LabelMap": label_map.astype(np.uint16)}})
    normal = inner(PascalContext(tmp_path, "val", ["normal"])[0], "normal")
    valid = ~np.isnan(normal).any(0)
    assert (valid == ~np.isnan(normal).all(0)).all()
    np.testing.assert_allclose(normal[:, valid], pixels.transpose(2, 0, 1)[:, valid] / 127.5 - 1, atol=1e-6)
    classes = set(label_map[valid])
    assert len(classes) == 170 and sum(classes) == 37556
    assert {3, 158, 284, 440, 457} <= classes and not {1, 2, 189, 360, 458, 459} & classes    # no sky, ground, wood


def short_normals():
    """Pixels of random directions, but for one of length 0.007 and one of 0.5."""
    pixels = unit_normals(np.random.default_rng(0), 6, 8)
    pixels[0, :2] = (127, 128, 127), (127, 128, 191)
    return pixels


def test_normals_of_any_length_count_in_the_benchmarks(tmp_path):
    """As published: only vectors that are exactly 0 are ignored, which 8 bits cannot store."""
    pixels = short_normals()
    vectors = pixels.transpose(2, 0, 1) / 127.5 - 1
    for kind, path in (("nyud", "normals/a.png"), ("pascal", "normals_distill/a.png")):
        files = {path: pixels, **({"segmentation/a.png": np.ones((6, 8), np.uint8)} if kind == "nyud" else {
            "pascal-context/trainval/a.mat": {"LabelMap": np.full((6, 8), 3, np.uint8)}})}    # 3 exists indoors
        np.testing.assert_allclose(inner(by_hand(tmp_path / kind, files)[0], "normal"), vectors, atol=1e-6)


def test_normals_far_from_unit_length_are_ignored_in_your_own_data(monkeypatch):
    pixels = short_normals()[:4, :6]
    vectors = pixels.transpose(2, 0, 1) / 127.5 - 1
    ignored = np.zeros((4, 6), bool)
    ignored[0, :2] = True
    for label in (vectors, np.float32(vectors)):
        monkeypatch.setattr(Own, "content", {"normal": label})
        monkeypatch.setattr(Own, "UNIT_NORMALS", True)
        np.testing.assert_allclose(Own("val", (4, 6))[0]["normal"], np.where(ignored, np.nan, vectors), atol=1e-6)
        monkeypatch.setattr(Own, "UNIT_NORMALS", False)
        np.testing.assert_allclose(Own("val", (4, 6))[0]["normal"], vectors, atol=1e-6)
    monkeypatch.setattr(Own, "content", {"normal": np.where(ignored, 0, vectors)})
    np.testing.assert_allclose(Own("val", (4, 6))[0]["normal"], np.where(ignored, np.nan, vectors), atol=1e-6)


def test_a_label_may_be_a_function_that_reads_it(monkeypatch):
    monkeypatch.setattr(Own, "content", {"semseg": lambda: np.full((4, 6), 1)})
    assert (Own("val", (4, 6))[0]["semseg"] == 1).all()


def test_evaluation_pads_around_the_image_in_the_middle(tmp_path):
    data = by_hand(tmp_path, {"segmentation/a.png": np.ones((6, 8), np.uint8)})
    sample = data[0]
    assert sample["size"] == (6, 8) and sample["name"] == "a" and data.augment is False
    assert list(sample) == ["image", "semseg", "depth", "normal", "boundary", "name", "size"]
    inside = torch.zeros(8, 12, dtype=torch.bool)
    inside[1:7, 2:10] = True
    assert (sample["image"][:, ~inside] == 0).all() and (sample["image"][:, inside] != 0).all()
    expected = (127 / 255 - torch.tensor(datasets.IMAGE_MEAN)) / torch.tensor(datasets.IMAGE_STD)
    assert torch.allclose(sample["image"][:, 1, 2], expected)
    for task, channels in data.tasks.items():
        channels = 1 if task == "semseg" else channels
        assert sample[task].shape == (channels, 8, 12) and sample[task].is_contiguous()
        assert sample[task].dtype == (torch.int64 if task == "semseg" else torch.float32)
        assert (unknown(sample[task]) == ~inside).all(), task


def unknown(label):
    return label == IGNORE if label.dtype == torch.int64 else label.isnan() | (label == IGNORE)


def test_centred_of_an_odd_remainder():
    assert centred((9, 7), (4, 7)) == (slice(2, 6), slice(0, 7))


# ---------------------------------------------------------------------------------------------------- image files

GRID = np.arange(0, 240, 5).reshape(6, 8)    # 48 grey values
RAMP = GRID.astype(np.uint8)
COLOURS = np.stack([RAMP, RAMP[::-1], 255 - RAMP], 2)


def png(path, size, bits, kind, rows):
    """A PNG that Pillow cannot write. size: (h, w); kind: 0 grey, 2 RGB; rows: bytes each."""
    def chunk(name, data):
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
    header = struct.pack(">IIBBBBB", size[1], size[0], bits, kind, 0, 0, 0)
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header)
                     + chunk(b"IDAT", zlib.compress(b"".join(b"\0" + row for row in rows))) + chunk(b"IEND", b""))


def png16(values):
    return lambda path: png(path, values.shape, 16, 2, [row.astype(">u2").tobytes() for row in values])


def palette(indices, *colours):
    image = Image.new("P", indices.shape[::-1])
    image.putdata(indices.ravel().tolist())
    image.putpalette([value for colour in colours for value in colour])
    return image


def turned(array, orientation=6):
    exif = Image.Exif()
    exif[0x0112] = orientation
    return lambda path: Image.fromarray(array).save(path, exif=exif)


GREY_RGB = np.stack([RAMP] * 3, 2)
PICTURES = {    # what is stored, and the RGB that is read, or the message
    "1.png": (Image.fromarray(RAMP > 100), np.where(GREY_RGB > 100, 255, 0)),
    "L.png": (Image.fromarray(RAMP), GREY_RGB),
    "16.png": (Image.fromarray(np.uint16(GRID * 257)), GREY_RGB),
    "16 low bits.png": (Image.fromarray(np.uint16(GRID * 256 + 255)), GREY_RGB),
    "16.tif": (Image.fromarray(np.uint16(GRID * 257)), "8 bits per channel, found mode I;16 of TIFF"),
    "16.pgm": (lambda path: path.write_bytes(b"P5 8 6 65535\n" + (GRID * 257).astype(">u2").tobytes()),
               "8 bits per channel"),
    "RGB 16.png": (png16(np.uint16(COLOURS) * 257), COLOURS),
    "P.png": (palette(np.uint8(GRID % 2), (10, 20, 30), (200, 0, 90)),
              np.where(GRID[..., None] % 2, (200, 0, 90), (10, 20, 30))),
    "LA.png": (Image.merge("LA", [Image.fromarray(RAMP), Image.fromarray(np.uint8(RAMP > 100) * 255)]),
               np.where(GREY_RGB > 100, GREY_RGB, 255)),
    "RGBA.png": (Image.fromarray(np.dstack([COLOURS, np.uint8(RAMP > 100) * 255])),
                 np.where(GREY_RGB > 100, COLOURS, 255)),
    "CMYK.tif": (Image.fromarray(np.dstack([255 - COLOURS, 0 * RAMP]), "CMYK"), COLOURS),
    "CMYK of Adobe.jpg": (lambda path: Image.new("CMYK", (8, 6), (255, 0, 0, 0)).save(path),
                          np.broadcast_to((0, 255, 255), (6, 8, 3))),
    "32.tif": (Image.fromarray(np.int32(GRID)), "8 bits per channel, found mode I of TIFF"),
    "float.tif": (Image.fromarray(np.float32(GRID / 255)), "8 bits per channel, found mode F of TIFF"),
    "cut.png": (lambda path: path.write_bytes(b"\x89PNG\r\n\x1a\n"), "unreadable file"),
    "turned.jpg": (turned(COLOURS), "an upright image, found EXIF"),
    "turned.png": (turned(COLOURS), "an upright image, found EXIF"),
    "turned.tif": (turned(COLOURS, 3), "an upright image, found EXIF"),
    "not turned.png": (turned(COLOURS, 1), COLOURS),
}


def store(path, content):
    content(path) if callable(content) else content.save(path)


@pytest.mark.parametrize("name", PICTURES)
def test_pictures_are_what_a_viewer_shows_or_refused(name, tmp_path):
    content, expected = PICTURES[name]
    store(tmp_path / name, content)
    if not isinstance(expected, str):
        pixels = read_image(tmp_path / name)
        assert pixels.dtype == np.uint8 and abs(pixels.astype(int) - expected).max() <= 1
        assert (read_image(tmp_path / name, turn=True) == pixels).all()
    else:
        with pytest.raises(ValueError, match=expected) as raised:
            read_image(tmp_path / name)
        assert str(tmp_path / name) in str(raised.value)


@pytest.mark.parametrize("name", ["a.png", "a.tif", "a.webp"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_pictures_are_turned_upright_as_pillow_does(orientation, name, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(COLOURS).save(tmp_path / name, exif=exif, **{"lossless": True} if name == "a.webp" else {})
    upright = ImageOps.exif_transpose(Image.open(tmp_path / name))
    assert (read_image(tmp_path / name, turn=True) == np.array(upright)).all()
    if orientation > 1:
        with pytest.raises(ValueError, match="an upright image"):
            read_image(tmp_path / name)
    if name == "a.png":
        assert (read_image(tmp_path / name, turn=True).shape == (8, 6, 3)) == (orientation > 4)


BINARY = (GRID // 5) % 3 == 0
ONES = BINARY.astype(np.uint8)
BLACK, WHITE, RED = (0, 0, 0), (255, 255, 255), (128, 0, 0)
MASKS = {
    "0 and 1.png": Image.fromarray(ONES),
    "0 and 255.png": Image.fromarray(ONES * 255),
    "1 bit.png": Image.fromarray(BINARY),
    "16 bits, 0 and 1.png": Image.fromarray(np.uint16(ONES)),
    "16 bits, 0 and 255.png": Image.fromarray(np.uint16(ONES) * 255),
    "16 bits, 0 and 65535.tif": Image.fromarray(np.uint16(ONES) * 65535),
    "black and white.png": palette(ONES, BLACK, WHITE),
    "white and black.png": palette(1 - ONES, WHITE, BLACK),
    "colours.png": palette(ONES, BLACK, RED),
    "colours of 255.png": palette(ONES * 255, *[RED] * 256),
    "RGB.png": Image.fromarray(np.stack([ONES * 255] * 3, 2)),
}
NO_MASKS = {
    "three values.png": (Image.fromarray(ONES + np.uint8(GRID > 200)), "found 0, 1, 2"),
    "0 and 128.png": (Image.fromarray(ONES * 128), "found 0, 128"),
    "indices.png": (palette(ONES * 2, BLACK, WHITE, RED), "found 0, 2"),
    "red.png": (Image.fromarray(np.dstack([ONES * 255, 0 * ONES, 0 * ONES])), "one channel, found mode RGB"),
    "alpha.png": (Image.fromarray(np.dstack([ONES, ONES])), "one channel, found mode LA"),
    "float.tif": (Image.fromarray(np.float32(ONES)), "one channel, found mode F"),
    "lossy.jpg": (Image.fromarray(ONES * 255), "a label without loss"),
    "lossy.webp": (Image.fromarray(ONES * 255), "a label without loss"),
    "lossy.tif": (lambda path: Image.fromarray(ONES * 255).save(path, compression="jpeg"), "a label without loss"),
    "inverted.tif": (lambda path: Image.fromarray(ONES * 255).save(path, tiffinfo={262: 0}), "0 as black"),
    **{f"frames.{ending}": (lambda path: Image.fromarray(ONES * 255).save(path, save_all=True, append_images=[
        Image.fromarray(ONES * 0)]), "one frame, found 2") for ending in ("png", "tif")},
}


@pytest.mark.parametrize("role", ["mask", "soft mask"])
@pytest.mark.parametrize("name", [*MASKS, *NO_MASKS])
def test_masks_mean_the_same_however_they_are_stored(name, role, tmp_path):
    store(tmp_path / name, MASKS[name] if name in MASKS else NO_MASKS[name][0])
    if name in MASKS:
        mask = read_image(tmp_path / name, role)
        assert mask.dtype == np.uint8 and (mask == BINARY).all()
    else:
        with pytest.raises(ValueError, match=NO_MASKS[name][1]):
            read_image(tmp_path / name, role)


def test_classes_are_the_numbers_that_are_stored(tmp_path):
    for name, image in {"L.png": Image.fromarray(RAMP), "16.png": Image.fromarray(np.uint16(GRID)), "P.png": palette(
            RAMP, *[(255 - i, 0, 0) for i in range(256)]), "32.tif": Image.fromarray(np.int32(GRID))}.items():
        image.save(tmp_path / name)
        assert (read_image(tmp_path / name, "classes") == GRID).all(), name
    for name, image, message in (("RGB.png", Image.fromarray(COLOURS), "one channel of integers, found mode RGB"),
                                 ("1.png", Image.fromarray(BINARY), "found mode 1"),
                                 ("F.tif", Image.fromarray(np.float32(GRID)), "found mode F"),
                                 ("lossy.jpg", Image.fromarray(RAMP), "a label without loss"),
                                 ("turned.png", turned(RAMP), "an upright image")):
        store(tmp_path / name, image)
        with pytest.raises(ValueError, match=message):
            read_image(tmp_path / name, "classes")
    png(tmp_path / "4.png", (1, 2), 4, 0, [b"\x12"])    # 1 and 2, which Pillow gives as 17 and 34
    with pytest.raises(ValueError, match="8 or 16 bits per pixel, 0 as black, or a palette, found the layout L;4"):
        read_image(tmp_path / "4.png", "classes")


# --------------------------------------------------------------------------------------------------- augmentation

def coordinates(h, w):
    """An image whose red and green are 2 x and 2 y, and labels that are x and y."""
    y, x = np.mgrid[:h, :w].astype(np.uint8)
    labels = {"boundary": x[None], "saliency": y[None], "depth": np.full((1, h, w), 3, np.float32),
              "normal": np.float32([x, y, x])}
    return np.stack([2 * x, 2 * y, 0 * x], 2), labels


def data_of(size, cropped_by=""):
    """What augment takes of a data set."""
    return SimpleNamespace(kinds=KINDS, size=size, FLIP=True, SCALES=(0.5, 2.0), cropped_by=cropped_by)


def test_labels_stay_with_the_image_and_depth_and_normals_follow(monkeypatch):
    monkeypatch.setattr(datasets, "JITTER", ())
    h, w, size = 90, 120, (80, 100)
    source, labels = coordinates(h, w)
    scales, flips, lefts = [], [], []
    for seed in range(300):
        image, moved = augment(source, labels, data_of(size), np.random.default_rng(seed))
        x, y = moved["boundary"][0].astype(float), moved["saliency"][0].astype(float)
        scale = 3 / moved["depth"][0, 0, 0]
        expected = tuple(min(round(a * scale), b) for a, b in zip((h, w), size))
        assert x.shape == y.shape == image.shape[1:] == expected and (moved["depth"] == moved["depth"][0, 0, 0]).all()
        # The nearest label is at most half a pixel off, and the image a quarter, being rounded to 8 bits.
        for colour, label in zip(255 / 2 * image.numpy(), (x, y)):
            assert abs(colour - label).max() <= 0.76
        step = (x[0, -1] - x[0, 0]) / (x.shape[1] - 1)
        assert abs(abs(step) * scale - 1) < 2.2 / (x.shape[1] - 1) * scale
        assert (np.diff(y, axis=0) >= 0).all() and (np.diff(x, axis=1) * step >= 0).all()
        flipped = step < 0
        assert (moved["normal"][0] == (-x if flipped else x)).all()
        assert (moved["normal"][1] == y).all() and (moved["normal"][2] == x).all()
        scales.append(scale), flips.append(flipped)
        if scale > 1.5:
            lefts.append(x.min() / (w - 100 / scale))
    assert 0.5 <= min(scales) < 0.53 and 1.97 < max(scales) <= 2 and abs(np.mean(scales) - 1.25) < 0.08
    assert abs(np.mean(flips) - 0.5) < 0.09
    assert min(lefts) < 0.05 and max(lefts) > 0.95 and abs(np.mean(lefts) - 0.5) < 0.1    # crops reach both sides


def test_an_image_of_one_pixel_keeps_it():
    for seed in range(20):
        image, _ = augment(np.zeros((1, 1, 3), np.uint8), {}, data_of((4, 4)), np.random.default_rng(seed))
        assert image.shape == ((3, 1, 1) if np.random.default_rng(seed).uniform(0.5, 2) < 1.5 else (3, 2, 2))


def test_colours_are_drawn_half_the_time_in_range_and_in_order(monkeypatch):
    drawn = []
    bounds = [(-32 / 255, 32 / 255), (0.5, 1.5), (0.5, 1.5), (-0.1, 0.1)]
    assert [b for _, b in datasets.JITTER] == bounds
    monkeypatch.setattr(datasets, "JITTER", [
        (lambda image, value, i=i: drawn[-1].append((i, value)) or image, b) for i, b in enumerate(bounds)])
    image, labels = coordinates(4, 4)
    for seed in range(400):
        drawn.append([])
        augment(image, labels, data_of((4, 4)), np.random.default_rng(seed))
    for i, (low, high) in enumerate(bounds):
        values = [value for one in drawn for j, value in one if i == j]
        assert abs(len(values) / 400 - 0.5) < 0.08
        assert low <= min(values) < low + 0.05 * (high - low) and high - 0.05 * (high - low) < max(values) <= high
    assert all(one == sorted(one) for one in drawn)
    assert len({tuple(i for i, _ in one) for one in drawn}) == 16    # independent of each other


def test_what_the_colour_changes_do():
    brightness, contrast, saturation, hue = (adjust for adjust, _ in datasets.JITTER)
    image = torch.tensor([[0.2, 0.8], [0.2, 0.8], [0.2, 0.8]]).view(3, 1, 2)
    assert torch.allclose(brightness(image, 0.1), image + 0.1) and brightness(image, 0.5).max() == 1
    assert brightness(image, -0.5).min() == 0
    assert torch.allclose(contrast(image, 0.5), 0.5 * image) and contrast(image, 1.5).max() == 1
    red = torch.tensor([1.0, 0, 0]).view(3, 1, 1)
    assert torch.allclose(saturation(image, 0.5), image, atol=1e-3)    # grey stays
    grey = 0.299
    assert torch.allclose(saturation(red, 0.5).flatten(), torch.tensor([1 + grey, grey, grey]) / 2, atol=1e-3)
    assert torch.allclose(hue(red, 0.1).flatten(), torch.tensor([1, 0.6, 0]), atol=1e-3)    # 36 degrees


def test_dominated_counts_labelled_pixels_only():
    assert not datasets.dominated(np.repeat([3, 9], (75, 25)))
    assert datasets.dominated(np.repeat([3, 9], (76, 24)))
    assert not datasets.dominated(np.repeat([IGNORE, 3, 9], (500, 50, 50)))
    assert datasets.dominated(np.repeat([IGNORE, 3], (50, 2)))


def test_crops_are_tried_again_while_one_class_dominates():
    class Ordered(Own):
        TASKS = {"depth": 1, "saliency": 2, "semseg": 3, "other": ("semseg", 3)}
    data = data_of((20, 20), Ordered("train", tasks=["depth"]).cropped_by)
    data.SCALES = 1.0, 1.0
    semseg = np.repeat([1, 2], (90, 10)).astype(np.uint8).reshape(1, 1, 100).repeat(20, 1)
    image = np.zeros((20, 100, 3), np.uint8)
    kept = alone = 0
    for seed in range(200):
        for labels in ({"semseg": semseg}, {"saliency": semseg}):
            found = augment(image, labels, data, np.random.default_rng(seed))[1]
            alone += "saliency" in found and not datasets.dominated(found["saliency"])
            kept += "semseg" in found and not datasets.dominated(found["semseg"])
    share = 6 / 81                                               # of 81 crops: 5 to 10 columns of class 2, 10 at most
    assert abs(alone / 200 - share) < 0.06 and abs(kept / 200 - (1 - (1 - share) ** 10)) < 0.12


def test_samples_depend_on_seed_epoch_and_index_alone(pascal):
    data, again, other = (PascalContext(pascal, size=(32, 64), seed=seed) for seed in (0, 0, 1))
    assert data.augment is True
    assert_equal(data[3], again[0, 3])
    assert_equal(data[2, 3], again[2, 3])
    assert not torch.equal(data[0, 3]["image"], data[1, 3]["image"])
    assert not torch.equal(data[0, 3]["image"], other[0, 3]["image"])
    single = PascalContext(pascal, size=(32, 64), tasks=["boundary", "semseg"])
    assert list(single[3]) == ["image", "boundary", "semseg", "name", "size"]
    assert_equal(single[3], {key: data[3][key] for key in single[3]})


@pytest.mark.parametrize("kind", [PascalContext, NYUDv2])
def test_workers_do_not_change_the_data(kind, pascal, nyud):
    data = kind(pascal if kind is PascalContext else nyud, size=(32, 64))
    pairs = [(epoch, index) for epoch in (0, 1) for index in range(2)]
    alone, shared = (list(DataLoader(data, 2, sampler=pairs, num_workers=n)) for n in (0, 2))
    assert len(alone) == len(shared) == 2
    for a, b in zip(alone, shared):
        assert a["image"].shape == (2, 3, 32, 64) and a["name"] == b["name"]
        for key in ("image", *data.tasks):
            assert same(a[key], b[key]), key
    assert not torch.equal(alone[0]["image"], alone[1]["image"])


# ------------------------------------------------------------------------------------------- export and preparation

def test_exported_pascal_files_hold_the_scenes(pascal):
    data, people = PascalContext(pascal), 0
    data.augment = False
    for i, sample in enumerate(data):
        shape = SIZE[::-1] if i == 3 or i == 7 else SIZE
        maps = Synthetic(8, shape).render(i)
        assert sample["size"] == shape
        assert (inner(sample, "semseg") == archives.VOC[maps["semseg"]]).all()
        assert (inner(sample, "saliency") == maps["saliency"]).all()
        people += (maps["parsing"] != IGNORE).any()
        assert (inner(sample, "parsing") == maps["parsing"]).all()
        indoor = INDOOR[archives.LABEL_MAP[maps["semseg"]]][0]
        normal = inner(sample, "normal")
        np.testing.assert_allclose(normal[:, indoor], maps["normal"][:, indoor], atol=1 / 254)
        assert np.isnan(normal[:, ~indoor]).all()
        assert abs(inner(sample, "image") - Synthetic(8, shape)[i]["image"].numpy()).mean() < 0.3    # JPEG
    assert 0 < people < len(data)
    folders = [len(list((pascal / "semseg" / folder).iterdir())) for folder in ("VOC12", "pascal-context")]
    assert min(folders) > 0 and sum(folders) == 10 and len(PascalContext(pascal, "val")) == 2


def test_exported_nyudv2_files_hold_the_scenes(nyud):
    for split, seed in (("train", 0), ("val", 1)):
        data = NYUDv2(nyud, split)
        data.augment = False
        assert len(data) == 2
        for i, sample in enumerate(data):
            maps = Synthetic(2, SIZE, seed).render(i)
            expected = np.where(maps["semseg"] == datasets.SKY, IGNORE, archives.NYUD[maps["semseg"]] - 1)
            assert (inner(sample, "semseg") == expected).all()
            np.testing.assert_array_equal(inner(sample, "depth"), maps["depth"])
            assert (inner(sample, "boundary") == maps["boundary"]).all()
            valid = ~np.isnan(maps["normal"])
            np.testing.assert_allclose(inner(sample, "normal")[valid], maps["normal"][valid], atol=1 / 254)


def test_exported_mat_files_are_nested_as_the_originals(pascal):
    seen = set()
    for path in sorted((pascal / "human_parts").iterdir()):
        anno = scipy.io.loadmat(path)["anno"]
        assert anno[0][0][0][0] == path.stem
        for i in range(len(anno[0][0][1][0])):
            name, index, mask, parts = anno[0][0][1][0][i]
            assert index[0][0] == {"person": 15, "bottle": 5, "pottedplant": 16, "table": 11}[name[0]]
            assert mask.dtype == np.uint8 and mask.shape in (SIZE, SIZE[::-1]) and mask.any()
            seen.add((str(name[0]), bool(parts.size)))
            for j in range(parts.size):
                part_name, part_mask = parts[0][j]
                assert part_name[0] in PARTS and (part_mask <= mask).all() and part_mask.any()
    assert ("person", True) in seen and ("bottle", False) in seen and ("bottle", True) not in seen
    path = next((pascal / "pascal-context/trainval").iterdir())
    assert scipy.io.loadmat(path)["LabelMap"].dtype == np.uint16


# ----------------------------------------------------------------------------------------------------- what is wrong

def shortened(path):
    path.write_bytes(path.read_bytes()[:len(path.read_bytes()) * 2 // 3])


GREY = np.zeros(SIZE, np.uint8)
MASK = np.ones(SIZE, np.uint8)
FAULTS = [    # kind, folder, suffix, what to do to the file, task, message
    ("nyud", "edge", ".png", GREY // 255 + 2, "boundary", "expected 0 and 1 or 0 and 255, found 2"),
    ("pascal", "JPEGImages", ".jpg", Path.unlink, "image", "no file"),
    ("pascal", "JPEGImages", ".jpg", shortened, "image", "unreadable file"),
    ("pascal", "semseg/pascal-context", ".png", Path.unlink, "semseg", "no file"),
    ("pascal", "semseg/pascal-context", ".png", shortened, "semseg", "unreadable file"),
    ("pascal", "semseg/pascal-context", ".png", GREY + 21, "semseg", "expected classes in 0..20 or 255, found 21"),
    ("pascal", "semseg/pascal-context", ".png", GREY[1:], "semseg", r"expected the image\'s size .*, found \(39, 48\)"),
    ("pascal", "semseg/pascal-context", ".png", np.zeros((*SIZE, 3), np.uint8), "semseg", "expected one channel"),
    ("pascal", "sal_distill", ".png", Path.unlink, "saliency", "no file"),
    ("pascal", "sal_distill", ".png", GREY.T, "saliency", r"found \(48, 40\)"),
    ("pascal", "normals_distill", ".png", shortened, "normal", "unreadable file"),
    ("pascal", "pascal-context/trainval", ".mat", Path.unlink, "boundary", "no file"),
    ("pascal", "pascal-context/trainval", ".mat", shortened, "normal", "unreadable file"),
    ("pascal", "pascal-context/trainval", ".mat", {"Labels": GREY}, "boundary", "unreadable file .*LabelMap"),
    ("pascal", "pascal-context/trainval", ".mat", {"LabelMap": GREY + 500.0}, "boundary", "0..459, found 500"),
    ("pascal", "pascal-context/trainval", ".mat", {"LabelMap": np.dstack([GREY] * 3)}, "normal", r"\(40, 48, 3\)"),
    ("pascal", "pascal-context/trainval", ".mat", {"LabelMap": GREY[:, 2:]}, "normal", r"found \(40, 46\)"),
    ("pascal", "human_parts", ".mat", Path.unlink, "parsing", "no file"),
    ("pascal", "human_parts", ".mat", shortened, "parsing", "unreadable file"),
    ("pascal", "human_parts", ".mat", {"anno": 3}, "parsing", "unreadable file"),
    ("pascal", "human_parts", ".mat", objects((15, [("wing", MASK)])), "parsing", "unreadable file .*KeyError: 'wing'"),
    ("pascal", "human_parts", ".mat", objects((15, [("head", MASK.T)])), "parsing", "unreadable .*boolean"),
    ("nyud", "images", ".png", shortened, "image", "unreadable file"),
    ("nyud", "segmentation", ".png", GREY + 41, "semseg", "expected values in 0..40, found 41"),
    ("nyud", "depth", ".npy", Path.unlink, "depth", "no file"),
    ("nyud", "depth", ".npy", shortened, "depth", "unreadable file"),
    ("nyud", "depth", ".npy", GREY - 1.0, "depth", "expected values in 0..100, found -1"),
    ("nyud", "depth", ".npy", np.full(SIZE, np.nan), "depth", "found nan"),
    ("nyud", "depth", ".npy", GREY + 2500.0, "depth", "found 2500"),
    ("nyud", "depth", ".npy", np.zeros((1, *SIZE)), "depth", r"found \(1, 40, 48\)"),
    ("nyud", "normals", ".png", GREY, "normal", "expected three channels, RGB, found mode L"),
    ("nyud", "normals", ".png", np.zeros((9, 48, 3), np.uint8), "normal", r"found \(9, 48\)"),
    ("nyud", "edge", ".png", Path.unlink, "boundary", "no file"),
]


@pytest.mark.parametrize("kind, folder, suffix, fault, task, message", FAULTS)
def test_faults_are_named_by_loader_and_check(kind, folder, suffix, fault, task, message, request, tmp_path, capsys):
    root = shutil.copytree(request.getfixturevalue(kind), tmp_path / "copy")
    dataset = datasets.DATASETS[kind]
    path = root / folder / f"synthetic_train_00000{suffix}"
    assert path.exists()
    fault(path) if callable(fault) else save(path, fault)
    data = dataset(root, tasks=None if task == "image" else [task], size=(32, 40))
    with pytest.raises((FileNotFoundError, ValueError), match=message) as raised:
        data[0]
    assert path.stem in str(raised.value) and "\n" not in str(raised.value)
    data[1]
    assert main(["check", "--dataset", kind, "--root", str(root), "--workers", "1"]) == 1
    printed = capsys.readouterr().out
    assert str(raised.value) in printed and printed.endswith("\n1 problems\n")


def test_check_counts_and_shows_the_first_few(pascal, tmp_path, capsys):
    command = ["check", "--dataset", "pascal", "--workers", "1", "--root"]
    assert main([*command, str(pascal)]) == 0
    rare = "  look at semseg: 16 classes never occur, first aeroplane, bicycle, bird, boat, bus, car"
    assert capsys.readouterr().out.splitlines() == [
        "train: 8 images; published: 4998", rare, "val: 2 images; published: 5105", rare, "no problems"]
    root = shutil.copytree(pascal, tmp_path / "copy")
    ids = root / "ImageSets/Context/train.txt"
    listed = ids.read_text()
    (root / "JPEGImages/2008_000002.jpg").write_bytes(b"")
    ids.write_text("2008_000002\n")    # an image of the archive, so its list has been cut
    assert main([*command, str(root)]) == 1
    assert "train.txt: expected 4998 images" in capsys.readouterr().out
    ids.write_text(listed)
    for path in (root / "sal_distill").glob("*_train_*"):
        path.unlink()
    (root / "human_parts/synthetic_val_00001.mat").unlink()
    assert main([*command, str(root)]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[1] == "  saliency: 8 problems" and lines[5] == "    and 5 more" and lines[-1] == "9 problems"
    assert [line.split("synthetic_")[1][:11] for line in lines[2:5]] == ["train_00000", "train_00001", "train_00002"]
    assert "synthetic_val_00001.mat" in lines[lines.index("  parsing: 1 problems") + 1]


def test_an_image_larger_than_the_evaluation_size_is_padded_to_a_multiple_of_32(tmp_path):
    """In the dimension in which it is larger."""
    files = {"images/a.png": np.zeros((33, 10, 3), np.uint8), "segmentation/a.png": np.ones((33, 10), np.uint8),
             "normals/a.png": unit_normals(np.random.default_rng(0), 33, 10), "depth/a.npy": np.ones((33, 10)),
             "edge/a.png": np.zeros((33, 10), np.uint8)}
    sample = by_hand(tmp_path, files)[0]
    assert sample["size"] == (33, 10) and sample["image"].shape == (3, 64, 12)
    inside = torch.zeros(64, 12, dtype=torch.bool)
    inside[15:48, 1:11] = True
    for task in NYUDv2.TASKS:
        assert sample[task].shape[1:] == (64, 12) and (unknown(sample[task]) == ~inside).all(), task


@pytest.mark.parametrize("content, message", [
    ("a\n../b\n", "names for files below a folder, of up to 240 bytes, found '../b'"),
    ("a\n/b\n", "found '/b'"),
    ("a\nb\0\n", r"found 'b\x00'"),
    ("a\nb\na\n", "expected a name of its own for each image, found 'a' 2 times"),
    (" \n", "val.txt: expected names of images, found none"),
])
def test_lists_hold_one_id_per_line(content, message, tmp_path):
    with pytest.raises(ValueError, match=re.escape(message)) as raised:
        by_hand(tmp_path, {}, content)
    assert "val" in str(raised.value) and "\n" not in str(raised.value)


def test_a_missing_image_is_named(tmp_path):
    data = by_hand(tmp_path, {}, "a\n\n  b 1 \r\n")
    assert data.names == ["a", "b 1"]
    with pytest.raises(FileNotFoundError, match="no file .*JPEGImages/b 1.jpg"):
        data[1]


def test_lists_are_utf8_whatever_the_locale(tmp_path):
    names = ["a", "living room 1", "Küche"]
    by_hand(tmp_path, {})
    path, image = tmp_path / "ImageSets/Context/val.txt", tmp_path / "JPEGImages/a.jpg"
    for name in names[1:]:
        shutil.copy(image, image.with_name(f"{name}.jpg"))
    before = locale.setlocale(locale.LC_CTYPE)
    try:
        locale.setlocale(locale.LC_CTYPE, "C")
        assert sys.flags.utf8_mode or open(path).encoding.lower() != "utf-8"
        for mark, end in (("", "\n"), ("\ufeff", "\r\n")):
            path.write_bytes((mark + end.join([*names, ""])).encode())
            assert PascalContext(tmp_path, "val").names == names
    finally:
        locale.setlocale(locale.LC_CTYPE, before)
    path.write_bytes("Küche".encode("latin-1"))
    with pytest.raises(ValueError, match="unreadable file .*val.txt .*utf-8"):
        PascalContext(tmp_path, "val")


def test_check_names_each_kind_of_problem_in_a_line(pascal, nyud, tmp_path, capsys):
    """One of each, each in an image of its own."""
    root = shutil.copytree(pascal, tmp_path / "pascal")
    listed = root / "ImageSets/Context/train.txt"
    listed.write_text(listed.read_text() + "synthetic_val_00000\n")
    files = {f"{folder}/synthetic_train_0000{i}.{kind}": content for i, (folder, kind, content) in enumerate([
        ("JPEGImages", "jpg", lambda path: Image.fromarray(np.float32(GREY)).save(path, "TIFF")),
        ("JPEGImages", "jpg", turned(np.zeros((*SIZE, 3), np.uint8))),
        ("semseg/pascal-context", "png", lambda path: Image.fromarray(GREY).save(path, "JPEG")),
        ("sal_distill", "png", Image.fromarray(MASK * 7)),
        ("normals_distill", "png", Image.fromarray(GREY)),
        ("normals_distill", "png", Image.fromarray(np.full((*SIZE, 3), 90, np.uint8))),
    ])}
    for path, content in files.items():
        content(root / path) if callable(content) else content.save(root / path, "PNG")
    scipy.io.savemat(root / "pascal-context/trainval/synthetic_train_00006.mat", {"LabelMap": np.dstack([MASK] * 3)})
    assert main(["check", "--dataset", "pascal", "--root", str(root), "--workers", "1"]) == 1
    lines = capsys.readouterr().out.splitlines()
    names = *files, "trainval/synthetic_train_00006.mat"
    names = [name.replace("normals_distill/synthetic_train_00005.png", "train_00005, normal") for name in names]
    for name, message in zip(names, (
            "8 bits per channel", "an upright image", "a label without loss", "0 and 1 or 0 and 255, found 7",
            "three channels, RGB", "vectors of length 1", "(40, 48, 3)")):
        assert sum(name in line and message in line for line in lines) == 1, (name, message, lines)
    assert any("synthetic_val_00000 occurs in the lists of both splits" in line for line in lines)
    root = shutil.copytree(nyud, tmp_path / "nyud")
    np.save(root / "depth/synthetic_train_00000.npy", np.ones((*SIZE, 3)))
    (root / "gt_sets/val.txt").write_text("synthetic_val_00000.png\nsynthetic_val_00001\n")
    assert main(["check", "--dataset", "nyud", "--root", str(root), "--workers", "1"]) == 1
    printed = capsys.readouterr().out
    assert re.search(r"depth/synthetic_train_00000.npy: expected .* found \(40, 48, 3\)", printed)
    assert re.search("no file .*synthetic_val_00000.png.png", printed)


# ------------------------------------------------------------------------------------------- data sets of one's own

class Own(LabelledDataset):
    """One image of 4x6 pixels; `content` replaces what is read."""

    TASKS = {"semseg": 3, "saliency": 2, "normal": 3, "boundary": 1, "depth": 1}
    content = {}

    def list_names(self):
        return ["one"]

    def read(self, name):
        facing = np.zeros((3, 4, 6))
        facing[2] = 1
        labels = {"semseg": np.full((4, 6), 2), "saliency": np.ones((4, 6), bool), "normal": facing,
                  "boundary": np.zeros((1, 4, 6), np.uint8), "depth": np.full((4, 6), 1.5)}
        labels |= self.content
        return labels.pop("image", np.zeros((4, 6, 3), np.uint8)), labels


WRONG = [    # task, label, message
    ("semseg", np.full((8, 12), 1), r"expected the shape \(4, 6\), as the image, found \(8, 12\)"),
    ("semseg", np.full((2, 3), 1), r"found \(2, 3\)"),
    ("semseg", np.full((4, 6, 3), 1), r"found \(4, 6, 3\)"),
    ("semseg", np.full((4, 6), 3), "expected classes in 0..2 or 255, found 3"),
    ("semseg", np.full((4, 6), -1), "found -1"),
    ("semseg", np.full((4, 6), 257), "found 257"),
    ("semseg", np.full((4, 6), 1.0), "expected integers, found float64"),
    ("saliency", np.full((4, 6), 2), "expected classes in 0..1 or 255, found 2"),
    ("boundary", np.full((4, 6), 0.5), "expected classes in 0..1 or 255, found 0.5"),
    ("depth", np.full((4, 6), 1500), "expected floats, NaN where unknown, found int64"),
    ("depth", np.full((4, 6), np.inf), "found inf"),
    ("depth", np.full((4, 6), -1.0), "found -1"),
    ("depth", np.full((4, 6, 3), 1.0), r"found \(4, 6, 3\)"),
    ("normal", np.full((3, 4, 6), 0.2), "expected vectors of length 1, found 100% of other lengths"),
    ("normal", np.full((4, 6), 1.0), r"found float64 \(4, 6\)|found \(4, 6\)"),
    ("normal", np.full((3, 4, 6), np.inf), "found inf"),
    ("image", np.zeros((4, 6), np.uint8), "expected an image of uint8"),
    ("image", np.zeros((4, 6, 3)), "expected an image of uint8"),
]


@pytest.mark.parametrize("task, label, message", WRONG)
@pytest.mark.parametrize("split", ["train", "val"])
def test_wrong_arrays_are_named_with_image_and_task(task, label, message, split, monkeypatch):
    monkeypatch.setattr(Own, "content", {task: label})
    with pytest.raises(ValueError, match=message) as raised:
        Own(split, (8, 8))[0]
    assert str(raised.value).startswith("one: " if task == "image" else f"one, {task}: ")


def test_arrays_become_samples(monkeypatch):
    """Values survive the way, and what has none is unknown."""
    rng = np.random.default_rng(0)
    normal = rng.normal(size=(3, 4, 6))
    normal /= np.linalg.norm(normal, axis=0)
    normal[:, 0, 0], normal[:, 0, 1] = 0, np.nan
    depth = rng.uniform(1, 9, (4, 6))
    depth[0, :3] = 0, np.nan, IGNORE    # the last is a distance like others
    monkeypatch.setattr(Own, "content", {"normal": normal, "depth": depth, "semseg": np.resize([0, 2, 255], (4, 6))})
    data = Own("val", (4, 6))
    sample = data[0]
    unknown = np.zeros((4, 6), bool)
    unknown[0, :2] = True
    np.testing.assert_allclose(sample["normal"].numpy(), np.where(unknown, np.nan, normal), atol=1e-6)
    np.testing.assert_allclose(sample["depth"][0].numpy(), np.where(unknown, np.nan, depth), rtol=1e-6)
    assert (sample["semseg"][0].numpy() == np.resize([0, 2, 255], (4, 6))).all() and (sample["saliency"] == 1).all()


def test_a_sample_may_be_changed_in_place():
    """Though its files are read once, the next one is as before."""
    for data in (Own("val", (8, 8)), Own("train", (8, 8))):
        first = {key: value.clone() for key, value in data[0].items() if torch.is_tensor(value)}
        for value in (sample := data[0]):
            if torch.is_tensor(sample[value]):
                sample[value].fill_(9)
        assert_equal({key: data[0][key] for key in first}, first)


def test_arrays_as_libraries_give_them(monkeypatch):
    """Other strides, read-only memory, byte order and tensors change nothing."""
    rng = np.random.default_rng(0)
    normal = rng.normal(size=(3, 4, 6))
    plain = {"image": rng.integers(0, 256, (4, 6, 3), np.uint8), "semseg": rng.integers(0, 3, (4, 6)),
             "normal": normal / np.linalg.norm(normal, axis=0), "depth": rng.uniform(1, 9, (4, 6)).astype(np.float32)}

    def read_only(array):
        array = array.copy()
        array.flags.writeable = False
        return array
    forms = {"negative strides": lambda a: a[..., ::-1].copy()[..., ::-1], "Fortran": np.asfortranarray,
             "read-only": read_only, "big-endian": lambda a: a.astype(a.dtype.newbyteorder(">")),
             "tensor": torch.from_numpy, "transposed": lambda a: np.ascontiguousarray(a.T).T}
    monkeypatch.setattr(Own, "content", plain)
    expected = [Own("val", (4, 6))[0], Own("train", (8, 8))[3, 0]]
    for name, form in forms.items():
        monkeypatch.setattr(Own, "content", {key: form(array) for key, array in plain.items()})
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            for found, wanted in zip([Own("val", (4, 6))[0], Own("train", (8, 8))[3, 0]], expected):
                assert_equal(found, wanted), name


class Mixed(LabelledDataset):
    """Images of 6x8 pixels, of which some lack labels; two tasks each of one kind."""

    TASKS = {"semseg": np.int64(12), "material": ("semseg", 5), "depth": 1, "height": ("depth", 1)}
    CLASSES = {"material": ("wood", "steel", "glass", "stone", "cloth")}
    UNITS = {"height": " cm"}
    left_out = {"a": (), "b": ("semseg", "height"), "c": ("material", "depth")}

    def list_names(self):
        return list(self.left_out)

    def read(self, name):
        labels = {"semseg": GRID // 5 % 12, "material": GRID // 5 % 5, "depth": GRID / 10 + 1, "height": GRID / 2 + 1}
        for i, task in enumerate(self.left_out[name]):    # left out, or None
            labels[task] = None
            if i:
                del labels[task]
        return COLOURS, labels


def test_tasks_of_other_names_and_labels_that_are_missing():
    data = Mixed("val", (6, 8))
    channels = {task: kind.channels for task, kind in data.kinds.items()}
    assert channels == {"semseg": 12, "material": 5, "depth": 1, "height": 1}
    assert type(data.kinds["semseg"].channels) is int and type(data.kinds["height"]) is metrics.Depth
    for sample in data:
        assert list(sample) == ["image", *Mixed.TASKS, "name", "size"]
        for task, expected in (("semseg", GRID // 5 % 12), ("material", GRID // 5 % 5), ("depth", GRID / 10 + 1),
                               ("height", GRID / 2 + 1)):
            assert sample[task].dtype == (torch.int64 if task in ("semseg", "material") else torch.float32)
            if task in Mixed.left_out[sample["name"]]:
                assert sample[task].shape == (1, 6, 8) and unknown(sample[task]).all()
            else:
                np.testing.assert_allclose(sample[task][0], expected, rtol=1e-6)
    assert check_samples(data) == []
    train, ratios = Mixed("train", (6, 8)), []
    for epoch in range(20):    # both distances are divided by the scale
        sample = train[epoch, 0]
        valid = ~sample["depth"].isnan()
        assert (valid == ~sample["height"].isnan()).all()
        ratios.append((sample["height"][valid] / sample["depth"][valid]).max().item())
    assert max(ratios) <= (235 / 2 + 1) / (235 / 10 + 1) * (1 + 1e-5)


def test_a_task_that_no_sample_has_is_named(monkeypatch):
    monkeypatch.setattr(Mixed, "left_out", {"a": ("height",), "b": ("height", "depth")})
    message, = check_samples(Mixed("val", (6, 8)))
    assert message.startswith("height: no pixel counts in the first 2 samples, a to b")


def test_the_first_16_samples_are_looked_at(monkeypatch):
    monkeypatch.setattr(Mixed, "left_out", {f"{i:02d}": ("height",) * (i < 16) for i in range(17)})
    message, = check_samples(Mixed("val", (6, 8)))
    assert message.startswith("height: no pixel counts in the first 16 samples, 00 to 15")
    monkeypatch.setattr(Mixed, "left_out", {f"{i:02d}": ("height",) * (i < 15) for i in range(17)})
    assert check_samples(Mixed("val", (6, 8))) == []


def test_check_names_a_task_that_no_sample_has(monkeypatch, capsys):
    monkeypatch.setattr(Mixed, "left_out", {"a": ("height",), "b": ("height", "depth")})
    monkeypatch.setattr(datasets, "find_dataset_class", lambda name: Mixed)
    assert main(["check", "--dataset", "Mixed", "--workers", "0"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines.count("  look at height: no pixel has a label") == 2 and lines[-1] == "no problems"


@pytest.mark.parametrize("name", ["sheet", "size", "type", "values", "training", "_modules", "a b"])
def test_names_that_have_other_uses_are_refused(name):
    with pytest.raises(ValueError, match=f"found '{name}'; rename the task"):
        Labels({name: ("depth", 1)}).kinds  # noqa: B018


def test_what_pictures_need_to_know():
    labels = Mixed("val", (6, 8), ["height", "material", "semseg"]).labels
    stored = json.loads(json.dumps(labels.plain()))
    again = datasets.Labels(**stored)
    assert again.plain() == stored and stored["units"] == {"height": " cm"}
    height, material, semseg = again.kinds.values()
    assert list(labels.kinds) == list(again.kinds) == ["height", "material", "semseg"] and height.title == "height"
    assert height.unit == " cm" and semseg.unit == " %" and height.scaling == -1
    assert material.names == ["wood", "steel", "glass", "stone", "cloth"]
    assert semseg.names == [f"class {i}" for i in range(12)]
    # The first colours of PASCAL VOC's development kit, and its last.
    assert semseg.palette[[0, 1, 2, 15, 255]].tolist() == [
        [0, 0, 0], [128, 0, 0], [0, 128, 0], [192, 128, 128], [224, 224, 192]]
    labels = datasets.Labels({"semseg": 2}, colours={"semseg": [(1, 2, 3), (4, 5, 6)]}, titles={"semseg": "classes"})
    assert labels.kinds["semseg"].palette[[0, 1, 255]].tolist() == [[1, 2, 3], [4, 5, 6], [224, 224, 192]]
    assert labels.kinds["semseg"].title == "classes"


@pytest.mark.parametrize("attribute, value, message", [
    ("CLASSES", {"material": ("wood", "steel")}, r"5 different names in CLASSES\['material'\], found \['wood'"),
    ("CLASSES", {"material": (*"abcd", "a")}, "different names"),
    ("COLOURS", {"material": [(0, 0, 0)] * 4}, r"0..255, of the shape \(5, 3\), in COLOURS\['ma"),
    ("COLOURS", {"material": np.full((5, 3), 0.4)}, "COLOURS"), ("COLOURS", {"material": ["red"] * 5}, "COLOURS"),
    ("COLOURS", {"material": [(0, 0, 256)] * 5}, "COLOURS"), ("COLOURS", {"material": {0: (1, 2, 3)}}, "COLOURS"),
    ("LABEL_IDS", {"material": (1, 2, 3, 4, 256)}, r"of the shape \(5,\), in LABEL_IDS"),
    ("LABEL_IDS", {"material": (1,)}, "LABEL_IDS"),
    ("SCALES", (2.0, 0.5), r"SCALES above 0, the smaller one first, found \(2.0, 0.5\)"), ("SCALES", (0, 1), "SCALES"),
    ("BOUNDARY_TOLERANCE", 2, "BOUNDARY_TOLERANCE as a fraction, found 2")])
def test_what_a_data_set_says_is_checked_at_the_start(attribute, value, message, monkeypatch):
    monkeypatch.setattr(Mixed, attribute, value)
    with pytest.raises(ValueError, match=message):
        Mixed("val", (6, 8))


def test_larger_labels_are_not_augmented(monkeypatch):
    assert Mixed("train", (6, 8)).augment and not Mixed("val", (6, 8)).augment
    monkeypatch.setattr(Mixed, "LABEL_SCALE", 2)
    assert not Mixed("train", (6, 8)).augment


@pytest.mark.parametrize("kind", [Synthetic, PascalContext, NYUDv2, Cityscapes])
def test_what_data_sets_say_about_themselves(kind):
    channels = {task: found.channels for task, found in Labels(kind.TASKS).kinds.items()}
    for table in (kind.CLASSES, kind.COLOURS):
        assert all(len(table[task]) == channels[task] for task in table)
        assert all(len(set(table[task])) == channels[task] for task in table)
    for figures in [*kind.PAPER.values(), *filter(None, [kind.SINGLE_TASK])]:
        assert list(figures) == list(kind.TASKS)
    assert set(kind.PAPER) <= {(variant, encoder) for variant in VARIANTS for encoder in ENCODERS}
    assert kind.REFERENCES is (kind is Synthetic)


def test_facts_of_the_data_sets():
    assert (datasets.IMAGE_MEAN, datasets.IMAGE_STD) == (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD)
    assert [(data.COUNTS["train"], data.COUNTS["val"], data.SIZE, data.VAL_SIZE, data.BOUNDARY_TOLERANCE,
             data.DEPTH_RANGE, data.LABEL_SCALE, data.RECIPE) for data in (PascalContext, NYUDv2, Cityscapes)] == [
        (4998, 5105, (512, 512), (512, 512), 0.0075, None, 1, {"eval_every": 5000}),
        (795, 654, (448, 576), (448, 576), 0.011, None, 1, {}), (2975, 500, (512, 1024), None, None, (0, 80), 2, {})]
    assert (Own.SIZE, Own.SCALES, Own.LABEL_SCALE) == ((480, 640), (0.5, 2.0), 1)
    assert Own.FLIP and Own.SHUFFLED and Own.REFERENCES and Own.UNIT_NORMALS and not FileDataset.UNIT_NORMALS
    assert Synthetic.RECIPE == dict(recipe="small", img_size=[64, 96], workers=0, eval_every=0)
    assert (Synthetic.SIZE, Synthetic.BOUNDARY_TOLERANCE, Synthetic.SHUFFLED) == ((128, 160), 0.02, False)
    assert np.sum(Synthetic.COLOURS["semseg"], axis=0).tolist() == [1190, 1000, 940]
    assert Synthetic(1).seed == Synthetic.open("train").seed == Own().seed == Own.open("val").seed == 0
    assert Synthetic(1, (32, 33)).size == (32, 33) and Own(size=(1, 1)).size == (1, 1)


@pytest.mark.parametrize("variant, published", [("mtmamba", 2.38), ("swin-multi-task", -1.87), ("stm1", 0.95), (
    "stm2", 1.84), ("stm3", 1.55), ("mfe-wmsa", -0.79), ("gate-wmsa", 2.08), ("fusion-specific", 1.77), (
    "fusion-shared", 1.76), ("mtmamba++", 4.82), ("swin-single-task", 0)])
def test_the_papers_rows_give_its_delta_m(variant, published):
    """Tables 2 to 5 print it beside the figures, rounded or cut."""
    assert delta_m(NYUDv2.PAPER[variant, "swin-large"], NYUDv2.SINGLE_TASK) == pytest.approx(published, abs=0.01)


def test_data_sets_are_opened_alike(pascal, nyud):
    """As train.py and evaluate.py do it."""
    assert list(datasets.DATASETS) == ["synthetic", "pascal", "nyud", "cityscapes"]
    train, val = (Synthetic.open(split, (32, 40), ["depth"], seed=3) for split in ("train", "val"))
    train.set_length(7)
    assert (len(train), train.seed, len(val), val.seed) == (7, 6, 100, 1) and val.tasks == {"depth": 1}
    assert train.names[6] == train[6]["name"] == "synthetic-000006"
    data = NYUDv2.open("train", (32, 64), ["depth"], nyud, seed=2)
    assert data.augment and data.size == (32, 64) and data.seed == 2
    data = PascalContext.open("val", None, root=pascal)
    assert not data.augment and data.size == (512, 512) and list(data.tasks) == list(PascalContext.TASKS)
    data = Own.open("train", (32, 64), ["depth"], seed=2)
    assert data.augment and data.size == (32, 64) and data.seed == 2
    for kind in (Own, Synthetic):
        with pytest.raises(ValueError, match="expected no folder, .* found data; leave it out"):
            kind.open("val", (32, 64), root=Path("data"))

    class Rooted(Own):
        def __init__(self, root, **arguments):
            self.root = root
            super().__init__(**arguments)
    assert Rooted.open("val", root=Path("data")).root == Path("data")
    with pytest.raises(ValueError, match="expected Rooted's folder"):
        Rooted.open("val")


@pytest.mark.parametrize("names, message", [
    (["a", "../b"], "found '../b'"),
    (["/a"], "found '/a'"),
    (["."], "found '.'"),
    (["a\nb"], r"found 'a\\nb'"),
    (["a\udcff"], "found 'a.udcff'"),
    (["a" * 241], "of up to 240 bytes"),
    (["a/b", "c", "a//b"], "expected a name of its own for each image, found 'a/b' 2 times"),
    ([Path("a"), "a"], "found 'a' 2 times"),
    ([], "expected names of images, found none"),
])
def test_names_can_be_names_of_files(names, message, monkeypatch):
    monkeypatch.setattr(Own, "list_names", lambda self: names)
    with pytest.raises(ValueError, match=message) as raised:
        Own("val", (8, 8))
    assert str(raised.value).startswith("Own, split 'val': expected")


def test_read_gets_what_list_names_gives(monkeypatch):
    given = [Path("hall") / "1", 2, "a b", np.int64(4), "a" * 240]
    seen, read = [], Own.read
    monkeypatch.setattr(Own, "list_names", lambda self: iter(given))
    monkeypatch.setattr(Own, "read", lambda self, name: seen.append(name) or read(self, name))
    data = Own("val", (8, 8))
    assert data.names == ["hall/1", "2", "a b", "4", "a" * 240] == [sample["name"] for sample in data]
    assert seen == given and isinstance(seen[0], Path)


def test_labels_that_teach_nothing_are_reported(monkeypatch):
    monkeypatch.setattr(Own, "content", {"saliency": np.uint8(BINARY[:4, :6]) * 255, "semseg": np.full((4, 6), 255)})
    semseg, saliency, boundary = check_samples(Own("val", (32, 32)))
    assert semseg == "semseg: no pixel counts in the first 1 samples, one to one: their values are [255]"
    assert saliency.startswith("saliency: no positive pixel counts") and saliency.endswith("their values are [0, 255]")
    assert boundary.startswith("boundary: no positive pixel")


ROOT = Path(datasets.__file__).parent


def test_the_readmes_data_set(tmp_path, monkeypatch):
    """As it stands there, on three files, and four in training."""
    code = (ROOT / "README.md").read_text().split("**Your own data**")[1].split("```python\n")[1].split("```")[0]
    (tmp_path / "rooms.py").write_text(code)
    monkeypatch.chdir(tmp_path)
    for folder, pixels in (("rgb", COLOURS), ("class", np.uint8(GRID % 12)), ("depth", np.uint16(GRID * 20))):
        for split in ("train", "val"):
            save(tmp_path / f"rooms/{split}/{folder}/a room.png", pixels)
    save(tmp_path / "rooms/train/material/a room.png", np.uint8(GRID % 5))
    kind = find_dataset_class("rooms.py:Rooms")
    data = kind("val", (8, 8))
    sample = data[0]
    assert sample["name"] == "a room" and len(data) == 1 and list(data.tasks) == ["semseg", "material", "depth"]
    assert (sample["material"] == IGNORE).all()
    assert (inner(sample, "semseg") == GRID % 12).all()
    np.testing.assert_allclose(inner(sample, "depth")[0], np.where(GRID, GRID / 50, np.nan), rtol=1e-6)
    train = kind("train", (8, 8))
    assert train.augment and train[1, 0]["image"].shape == (3, 8, 8) and check_samples(train) == []


MINE = """
from datasets import LabelledDataset
from helper import SIZE
import numpy as np

class Pair:
    pass

class A(LabelledDataset):
    TASKS = {"depth": 1}
    def list_names(self):
        self.pair = Pair()
        return ["x", "y"]
    def read(self, name):
        if name == self.damaged:
            raise OSError(f"damaged {name}")
        return np.zeros((*SIZE, 3), np.uint8), {"depth": np.ones(SIZE)}
    damaged = None

class B(A):
    damaged = "y"
class C(A):
    TASKS = {"depth": 7}
class E(LabelledDataset):
    TASKS = {"depth": 1}
class F:
    TASKS = {"depth": 1}
class G(E):
    TASKS = {}
    read = list_names = None
"""


@pytest.fixture
def mine(tmp_path):
    """A file with data sets whose name is no identifier, beside one that it imports."""
    (tmp_path / "my own-data.py").write_text(MINE)
    (tmp_path / "helper.py").write_text("SIZE = 4, 6")
    return tmp_path / "my own-data.py"


def test_your_own_class_is_found_by_its_file(mine):
    assert find_dataset_class("nyud") is NYUDv2
    folder = mine.parent
    for name in ("json.py", "a.b.py"):
        (folder / name).touch()
    found = find_dataset_class(f"{mine}:A")
    assert found.TASKS == {"depth": 1} and find_dataset_class(f"{mine}:A") is found
    for name, message in (("coco", "'synthetic', 'pascal', 'nyud'.* or path/to/file.py:Class, found 'coco'"),
                          (f"{folder}/none.py:A", "a file .no other dot in the file's name., found .*none.py"),
                          (f"{folder}/json.py:A", "no other module has .json., found .*json.py; rename"),
                          (f"{folder}/a.b.py:A", "no other dot in the file's name., found .*a.b.py:A"),
                          (f"{mine}:Z", "expected a subclass 'Z' of LabelledDataset .*data.py, .*found None"),
                          (f"{mine}:C", "expected 1 to 1 channels for the task 'depth', found 7"),
                          (f"{mine}:E", "with all its abstract methods"),
                          (f"{mine}:F", "expected a subclass 'F'"),
                          (f"{mine}:G", "expected tasks from")):
        with pytest.raises((ValueError, FileNotFoundError), match=message) as raised:
            find_dataset_class(name).open("val")
        assert "\n" not in str(raised.value)


def test_your_own_data_set_goes_to_a_new_process(mine):
    """With what the file's own classes made; the process knows nothing of the file."""
    data = find_dataset_class(f"{mine}:A")("val", (8, 8))
    with datasets.Helpers(1) as helpers:
        names, module, kept = helpers.submit(describe, data).result()
    assert names == ["x", "y"] and module == type(data).__module__ and kept == "Pair"
    assert_equal(copy.copy(data)[1], data[1])


def describe(data):
    return [sample["name"] for sample in data], type(data).__module__, type(data.pair).__name__


def test_your_own_data_set_is_checked(mine, script, monkeypatch, capsys):
    """By the script, whose LabelledDataset is that of the file."""
    run = script(datasets.__file__, "check", "--dataset", f"{mine}:B", "--workers", "2")
    output, errors = run.communicate()
    assert run.returncode == 1 and "2/2" in errors, errors
    both = "  look at the names: 2 occur in train, too, first x"
    assert [line for line in output.splitlines() if line != both] == [line for split in ("train", "val") for line in (
        f"{split}: 2 images", "  image: 1 problems", "    damaged y")] + ["2 problems"]
    monkeypatch.chdir(mine.parent)
    assert main(["check", "--dataset", f"{mine.name}:A", "--workers", "1"]) == 0
    assert capsys.readouterr().out.splitlines() == ["train: 2 images", "val: 2 images", both, "no problems"]


FAULTY = """
from datasets import LabelledDataset
import numpy as np

class Broken(LabelledDataset):
    TASKS = {"depth": 1}
    def list_names(self):
        return ["x", "y"]
    def read(self, name):
        return np.zeros((3, 2)) + np.zeros((4, 5))

class Missing(Broken):
    def read(self, name):
        raise ValueError(
            f"no depth "
            f"of {name}")

class Lookup(Broken):
    def read(self, name):
        raise KeyError(name)    # as pandas does

class Absent(Broken):
    def read(self, name):
        open("absent.png")
"""


def load_here(data):
    data[0]


def load_in_loader(data):
    next(iter(DataLoader(data, num_workers=1)))


def load_in_pool(data):
    with ProcessPoolExecutor(1, get_context("fork")) as pool:
        pool.submit(load_here, data).result()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="processes are forked")
@pytest.mark.parametrize("load", [load_here, load_in_loader, load_in_pool])
def test_a_fault_keeps_its_traceback_and_bad_input_is_one_line(load, tmp_path, capsys):
    file = tmp_path / "faulty.py"
    file.write_text(FAULTY)
    for name, code, message in (("Missing", 2, "no depth of x"), ("Absent", 2, "absent.png.*"), ("Broken", 1, ""),
                                ("Lookup", 1, "")):
        data = find_dataset_class(f"{file}:{name}")("val", (8, 8))
        try:
            with datasets.Parser(prog="script.py").told():
                load(data)
        except SystemExit as ended:
            assert ended.code == code and re.fullmatch(f"script.py: .*{message}\n", capsys.readouterr().err)
        except Exception:    # Python prints the traceback and ends with code 1
            assert code == 1
            assert re.search(r'faulty.py", line \d+, in read\n    (return np.zeros|raise KeyError)', format_exc())
        else:
            raise AssertionError(name)


def test_check_keeps_the_traceback_of_a_fault(tmp_path):
    (tmp_path / "faulty.py").write_text(FAULTY)
    assert main(["check", "--dataset", f"{tmp_path}/faulty.py:Missing", "--workers", "1"]) == 1
    with pytest.raises(ValueError, match="broadcast"):
        main(["check", "--dataset", f"{tmp_path}/faulty.py:Broken", "--workers", "1"])


class Sided(Own):
    """A person whose left arm is red and stands at the left."""

    TASKS = {"semseg": 3, "limb": ("semseg", 3)}
    CLASSES = {"semseg": ("body", "left arm", "right arm"), "limb": np.array(["body", "armLeft", "upright"])}
    FLIP_PAIRS = {"semseg": [("left arm", "right arm")]}

    def read(self, name):
        image, label = np.zeros((16, 24, 3), np.uint8), np.zeros((16, 24), np.int64)
        image[:, :12, 0], label[:, :12], label[:, 12:] = 255, 1, 2
        return image, {"semseg": label, "limb": label}


class Unmirrored(Sided):
    FLIP, SCALES = False, np.float32([1, 1])


def test_pairs_are_exchanged_where_the_image_is_mirrored(monkeypatch):
    monkeypatch.setattr(datasets, "JITTER", ())
    flips = 0
    for epoch in range(60):
        sample = Sided("train", (16, 24))[epoch, 0]
        rows, columns = centred((16, 24), sample["size"])
        red, sides, limb = (sample[key][0, rows, columns] for key in ("image", "semseg", "limb"))
        if sides.unique().numel() > 1:    # both arms are in the crop
            flipped = red[0, 0] < red[0, -1]
            assert sides[0].tolist() == sorted(sides[0].tolist())    # what is at the left is the left arm
            assert (limb[0, 0] > limb[0, -1]) == flipped             # which has no pairs
            flips += flipped
    assert 10 < flips < 50
    plain, changed = Unmirrored("val", (16, 24))[0], [Unmirrored("train", (16, 24))[epoch, 0] for epoch in range(20)]
    for sample in changed:
        assert_equal(sample, plain)


class Twice(Own):
    """Labels of twice the image's size tell where each pixel of the image lies."""

    TASKS, LABEL_SCALE = {"semseg": 100, "row": ("semseg", 100), "where": ("values", 2)}, 2

    def __init__(self, height, width, **arguments):
        self.shape = height, width
        super().__init__(**arguments)

    def read(self, name):
        y, x = np.indices([2 * n for n in self.shape])
        image = np.dstack([y, x, x])[::2, ::2].astype(np.uint8)
        return image, {"semseg": x, "row": y, "where": np.float32([y, x])}


@pytest.mark.parametrize("inner", [(10, 12), (11, 12), (10, 13), (11, 13), (12, 16), (13, 15), (17, 21)])
def test_larger_labels_lie_where_their_image_lies(inner):
    sample = Twice(*inner, split="val", size=(12, 16))[0]
    outer, mean, std = (torch.tensor(v) for v in (sample["image"].shape[1:], datasets.IMAGE_MEAN, datasets.IMAGE_STD))
    pixels = (255 * (sample["image"] * std.view(3, 1, 1) + mean.view(3, 1, 1))).round()[:2]
    inside = torch.zeros(*outer, dtype=torch.bool)
    inside[centred(outer.tolist(), inner)] = True
    for label in (torch.cat([sample["row"], sample["semseg"]]).float(), sample["where"]):
        assert (label[:, ::2, ::2] == pixels)[:, inside].all()
    known = sample["semseg"][0] != IGNORE
    assert (known == inside.repeat_interleave(2, 0).repeat_interleave(2, 1)).all()
    assert (known == ~sample["where"].isnan().any(0)).all()


def test_samples_are_drawn_as_training_sees_them(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(datasets, "find_dataset_class", lambda name: Sided)
    monkeypatch.setattr(Sided, "list_names", lambda self: ["one", "two", "three", "four"])
    sheets = []
    monkeypatch.setattr(evaluate, "draw_sheet", lambda *drawn, draw=evaluate.draw_sheet: (
        sheets.append(drawn), draw(*drawn))[1])
    assert main(["check", "--dataset", "Sided", "--workers", "1", "--img-size", "16", "24", "--pictures",
                 str(tmp_path / "a.png")]) == 0
    (blocks, legends), = sheets
    assert [[[title for title, _ in column] for column in columns] for columns in blocks] == [
        [[f"{title}: {name}" for title in titles], ["semseg"] * len(titles), ["limb"] * len(titles)]
        for titles in (("train", "in training"), ("val",)) for name in ("one", "two", "three")]
    assert [text for text, _ in legends[0]][:3] == ["semseg", "left arm", "right arm"]
    palette = Sided("val").kinds["semseg"].palette
    for block, row, split in (0, 0, "val"), (0, 1, "train"), (3, 0, "val"):
        (_, image), (_, drawn) = blocks[block][0][row], blocks[block][1][row]
        assert (np.array(drawn) == palette[Sided(split, (16, 24))[0]["semseg"][0]]).all()
        assert np.array(image).shape == (16, 24, 3)
    assert Image.open(tmp_path / "a.png").width > 100 and capsys.readouterr().out.endswith("a.png\n")


class Numbers(Own):
    """Attributes as numpy has them."""

    TASKS = {"semseg": np.int64(3), "depth": 1}
    CLASSES = {"semseg": np.array(["a", "b", "c"])}
    LABEL_IDS = {"semseg": np.array([4, 7, 9])}
    COLOURS = {"semseg": np.eye(3, dtype=np.uint8)}
    DEPTH_RANGE = np.float32([0, 80])
    FLIP_PAIRS = {"semseg": np.array([["a", "b"]])}
    SIZE, VAL_SIZE, SCALES = np.array([8, 16]), (np.int64(8), np.int64(16)), np.float64([0.5, 2])
    BOUNDARY_TOLERANCE, LABEL_SCALE = np.float64(0.02), np.int64(1)
    RECIPE = {"lr": np.float64(1e-3), "iterations": np.int64(7), "img_size": np.array([8, 16])}


def test_attributes_of_numpy_are_plain_values(tmp_path):
    data = Numbers("val")
    torch.save(data.labels.plain(), tmp_path / "labels.pt")
    labels = datasets.Labels(**torch.load(tmp_path / "labels.pt", weights_only=True))
    assert labels.kinds["semseg"].label_ids == [4, 7, 9] and labels == datasets.Labels(**data.labels.plain())
    assert json.loads(json.dumps(data.labels.plain())) == data.labels.plain() and data.size == (8, 16)
    attributes = [Numbers.SIZE, Numbers.VAL_SIZE, Numbers.SCALES, Numbers.BOUNDARY_TOLERANCE, Numbers.LABEL_SCALE,
                  Numbers.RECIPE]
    assert repr(attributes) == repr([(8, 16), (8, 16), (0.5, 2.0), 0.02, 1,
                                     {"lr": 1e-3, "iterations": 7, "img_size": [8, 16]}])
    assert data.labels.depth_range == [0, 80] and data[0]["image"].shape == (3, 8, 16)


class Odd(Own):
    """Each label may be right, and looks wrong."""

    TASKS = {"semseg": 5, "normal": 3, "depth": 1, "far": ("depth", 1), "boundary": 1}
    CLASSES = {"semseg": ("a", "b", "left hand", "RightHand", "bright")}

    def read(self, name):
        image, labels = super().read(name)
        away = np.zeros((3, 4, 6))
        away[2] = -1
        return image, {
            "semseg": labels["semseg"], "normal": away, "depth": labels["depth"] / 100, "far": 1000 * labels["depth"],
            "boundary": np.full((4, 6), 255)}


def test_check_tells_what_looks_wrong(monkeypatch, capsys):
    monkeypatch.setattr(datasets, "find_dataset_class", lambda name: Odd)
    assert main(["check", "--dataset", "Odd", "--workers", "0"]) == 0
    remarks = [
        "semseg: 4 classes never occur, first a, b, RightHand, bright",
        "semseg: left hand, RightHand: training mirrors images, which makes left of right; name the pairs in "
        "FLIP_PAIRS, or give FLIP = False",
        "normal: 100% of the normals look away from the viewer; usual reasons: OpenCV's axes (negate y and z), the "
        "world's axes (turn them into the camera's), or blue and red exchanged",
        "depth: half of the depths are above 0.015 m; metres are expected",
        "far: half of the depths are above 1.5e+03 m; metres are expected",
        "boundary: no positive pixel has a label"]
    remarks = [f"  look at {remark}" for remark in remarks]
    assert capsys.readouterr().out.splitlines() == [
        "train: 1 images", *remarks, "val: 1 images",
        "  look at the names: 1 occur in train, too, first one", *remarks, "no problems"]


HANDLES = """
from datasets import LabelledDataset
import numpy as np
import os
import zipfile

KEPT = {}

class Own(LabelledDataset):
    TASKS = {"semseg": 255}
    def list_names(self):
        return [f"{i:02d}" for i in range(24)]
    def read(self, name):
        where = self.where()
        if "file" not in where:
            where["file"] = open(os.path.join(os.path.dirname(__file__), "labels"), "rb", buffering=0)
            where["pid"] = os.getpid()
        assert where["pid"] == os.getpid(), "opened by another process"
        where["file"].seek(20_000 * int(name))
        label = np.frombuffer(b"".join(where["file"].read(5_000) for _ in range(4)), np.uint8).reshape(100, 200)
        return np.zeros((100, 200, 3), np.uint8), {"semseg": label}

class OfSelf(Own):
    def where(self):
        return self.__dict__

class OfModule(Own):
    def where(self):
        return KEPT

class Early(Own):    # opened before any process is started
    def list_names(self):
        self.file, self.pid = open(os.path.join(os.path.dirname(__file__), "labels"), "rb", buffering=0), None
        return super().list_names()
    def read(self, name):
        self.pid = os.getpid()
        return super().read(name)
    def where(self):
        return self.__dict__
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="processes are forked")
@pytest.mark.parametrize("name", ["OfSelf", "OfModule", "Early"])
def test_no_process_reads_from_what_another_has_opened(name, tmp_path, capsys):
    """While each moves the position in its file. Samples that the main process needs come first."""
    (tmp_path / "handles.py").write_text(HANDLES)
    labels = np.arange(24, dtype=np.uint8).repeat(20_000)
    labels.tofile(tmp_path / "labels")
    data = find_dataset_class(f"{tmp_path}/handles.py:{name}")("val", (100, 200))
    first = datasets.fetch(data, [3, 1], 2)
    assert [sample["name"] for sample in first] == ["03", "01"] and (first[1]["semseg"] == 1).all()
    loading = datasets.loader(data, [[i] for i in range(24)], 2)
    assert [batch["semseg"].unique().tolist() for batch in loading] == [[i] for i in range(24)]
    if name != "Early":
        assert main(["check", "--dataset", f"{tmp_path}/handles.py:{name}", "--workers", "2"]) == 0, capsys.readouterr()


def test_a_data_set_that_cannot_be_sent_to_processes_is_told_before_they_start(monkeypatch):
    monkeypatch.setattr(datasets, "get_start_method", lambda: "spawn")
    data = Own()
    data.convert = lambda image: image
    for given in (dict(dataset=data), dict(dataset=range(2), collate_fn=data.check)):
        with pytest.raises(ValueError, match="cannot be sent to a loading process .*lambda.*; open files in `read`"):
            datasets.loader(**given, batches=[[0]], workers=1)
        datasets.loader(**given, batches=[[0]], workers=0)
    del data.convert
    datasets.loader(data, [[0]], 1)


@pytest.mark.parametrize("free, fitting", [(10 ** 9, 3), (8 * 2 * 4 * 100, 3), (8 * 2 * 4 * 100 - 1, 2), (100, 0)])
def test_loading_processes_fit_into_shared_memory(free, fitting, monkeypatch, capsys):
    """Two batches of each process wait, and two more are in use: 8 batches of 2 images for 3 processes."""
    monkeypatch.setattr(datasets.shutil, "disk_usage", lambda path: SimpleNamespace(free=free))
    monkeypatch.setattr(datasets, "fetch", lambda dataset, indices, workers: [{"image": torch.zeros(100), "name": "a"}])
    assert datasets.fit_workers(3, None, 2) == fitting
    assert ("--shm-size" in capsys.readouterr().out) == (fitting < 3)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")    # training processes, which share it
    assert datasets.fit_workers(3, None, 1) == fitting


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no such limit")
def test_open_files_are_allowed_as_loading_processes_need_them(monkeypatch):
    import resource
    given = []
    monkeypatch.setattr(resource, "setrlimit", lambda what, limits: given.append(limits))
    for limits, expected in (((95, 500), [(96, 500)]), ((0, 96), [(96, 96)]), ((96, 96), []), ((-1, -1), []),
                             ((45, -1), [(96, -1)])):
        monkeypatch.setattr(resource, "getrlimit", lambda what: limits)
        datasets.allow_open_files(1)
        assert given == expected, limits
        given.clear()
    monkeypatch.setattr(resource, "getrlimit", lambda what: (45, 95))
    with pytest.raises(ValueError, match="at least 96 open files for --workers 1, found 95"):
        datasets.allow_open_files(1)


def killed():
    os.kill(os.getpid(), signal.SIGTERM if sys.platform == "win32" else signal.SIGKILL)


def test_helpers_that_fail(forked_pools, monkeypatch):
    with pytest.raises(BrokenProcessPool), datasets.Helpers(1) as helpers:
        helpers.submit(killed).result()
    with datasets.Helpers(1) as helpers, pytest.raises(ZeroDivisionError):
        helpers.submit(divmod, 7, 0).result()
    assert 1 <= datasets.usable_cpus() <= os.cpu_count()
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(100)), raising=False)
    for limit, expected in (("max 100000", 100), ("150000 100000", 2), ("200000 100000", 2)):    # of a container
        monkeypatch.setattr(Path, "read_text", lambda path: limit)
        assert datasets.usable_cpus() == expected
    monkeypatch.undo()
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(100)), raising=False)
    monkeypatch.setattr(Path, "read_text", lambda path: "max 100000")
    monkeypatch.setattr(sys, "platform", "win32")
    assert datasets.usable_cpus() == 61


def test_boundaries_of_ones_own_are_scored_as_the_label_thinned():
    label = np.uint8(np.kron([[0, 0, 0], [1, 1, 0], [0, 0, 255]], np.ones((4, 4))))

    class Edges(datasets.LabelledDataset):
        TASKS = {"boundary": 1}

        def list_names(self):
            return ["x"]

        def read(self, name):
            return np.zeros((12, 12, 3), np.uint8), {"boundary": label}
    truth = Edges("val", (12, 12)).boundary_truth(0)
    assert truth.any() and np.array_equal(truth, thin(label == 1))


def test_a_damaged_file_stops_a_run_with_workers(pascal, tmp_path):
    root = shutil.copytree(pascal, tmp_path / "copy")
    shortened(root / "human_parts/synthetic_train_00002.mat")
    with pytest.raises(ValueError, match="unreadable file .*human_parts/synthetic_train_00002.mat"):
        list(DataLoader(PascalContext(root, size=(32, 40)), 4, num_workers=1))
    datasets.end_loaders()    # as at the end of a script; a loader that is collected waits 5 s for its process


@pytest.mark.parametrize("arguments, message", [
    (dict(tasks=[]), "expected tasks from"),
    (dict(tasks=["semseg", "depth"]), r"expected tasks from .*found \['semseg', 'depth'\]"),
    (dict(size=(0, 512)), "expected size"),
    (dict(size=(512,)), "expected size"),
])
def test_bad_arguments_are_refused(pascal, arguments, message):
    with pytest.raises(ValueError, match=message):
        PascalContext(pascal, **arguments)


@pytest.mark.parametrize("index", [8, (0, 8)])
def test_indices_outside_are_refused(pascal, index):
    data = PascalContext(pascal)
    with pytest.raises(IndexError):
        data[index]
    with pytest.raises(IndexError):
        data.boundary_truth(8)


def test_incomplete_trees_are_refused(pascal, tmp_path):
    with pytest.raises(FileNotFoundError, match="no folder .*nowhere.*unpack"):
        PascalContext(tmp_path / "nowhere")
    assert main(["check", "--dataset", "pascal", "--root", str(tmp_path / "nowhere"), "--workers", "1"]) == 1
    root = shutil.copytree(pascal, tmp_path / "copy")
    shutil.rmtree(root / "human_parts")
    with pytest.raises(FileNotFoundError, match="no file .*human_parts"):
        PascalContext(root)[0]
    assert len(PascalContext(root, tasks=["semseg", "normal"])[0]) == 5    # which need no human_parts
    listed = root / "ImageSets/Context/train.txt"
    listed.write_text("\n")
    with pytest.raises(ValueError, match="train.txt: .*found none"):
        PascalContext(root, tasks=["semseg"])
    listed.unlink()
    for split in ("train", "test"):
        with pytest.raises(FileNotFoundError, match=f"no file .*{split}.txt"):
            PascalContext(root, split, tasks=["semseg"])
    assert main(["check", "--dataset", "pascal", "--root", str(root), "--workers", "1"]) == 1


# ------------------------------------------------------------------------------------------------------ command line

@pytest.mark.parametrize("arguments, message", [
    (["prepare", "--dataset", "pascal"], "invalid choice: 'prepare'"),
    (["check", "--dataset", "coco"], "path/to/file.py:Class, found 'coco'"),
    (["check", "--dataset", "synthetic"], "a data set of files, found synthetic"),
    ([], "required: command"),
])
def test_bad_input_ends_with_one_line(arguments, message, capsys):
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    lines = capsys.readouterr().err.splitlines()
    assert ended.value.code == 2 and len(lines) == 1 and message in lines[0], lines


def raised(error, cause=None):
    raise error from cause


@pytest.mark.parametrize("error, cause, code, message", [
    (KeyboardInterrupt(), None, 130, "interrupted"),
    (OSError(errno.ENOSPC, "No space left on device", "run/last.pt"), None, 1,
     "cannot write run/last.pt: No space left on device; make room"),
    (RuntimeError("unexpected pos 64"), OSError(errno.EFBIG, "File too large", "x"), 1,
     "cannot write x: File too large"),
    (OSError(errno.EMFILE, "Too many open files", "x"), None, 1, "ulimit -n 65536"),
    (RuntimeError("received 0 items of ancdata"), None, 1, "ulimit -n 65536"),
    (RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed. "), None, 1,
     "DataLoader worker (pid 7) is killed by signal: Killed; if memory is short, give fewer --workers"),
    (BrokenProcessPool("terminated abruptly"), None, 1, "the system killed a process"),
    (torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), None, 1,
     "out of memory (OutOfMemoryError: CUDA out of memory. Tried to allocate 2 GiB); try smaller images"),
    (RuntimeError("DefaultCPUAllocator: can't allocate memory: 3 bytes"), None, 1, "out of memory (DefaultCPU"),
    (MemoryError(), None, 1, "out of memory (MemoryError"),
    (RuntimeError("Connection closed by peer [::1]"), None, 1, "another process of the run ended"),
    (torch._dynamo.exc.Unsupported("no such branch\n  Developer debug context: is_x()", None), None, 1,
     "script.py: --compile failed (is_x()); train with --no-compile"),
    (torch._dynamo.exc.Unsupported("no branch\nin here\nat all", None), None, 1, "failed (no branch in here);"),
    (subprocess.CalledProcessError(1, "gcc"), None, 1, "install gcc, g++ and python3-dev"),
    (FloatingPointError("the loss of depth is nan"), None, 1, "the loss of depth is nan"),
    (ValueError("expected 1,\nfound 2"), None, 2, "expected 1, found 2"),
    (FileNotFoundError(errno.ENOENT, "No such file or directory", "x"), None, 2, "x: No such file or directory"),
])
def test_what_the_machine_or_the_input_causes_is_one_line(error, cause, code, message, capsys):
    with pytest.raises(SystemExit) as ended, datasets.Parser(prog="script.py").told():
        raised(error, cause)
    lines = capsys.readouterr().err.splitlines()
    assert ended.value.code == code and len(lines) == 1 and lines[0].startswith("script.py: ") and message in lines[0]



@pytest.mark.parametrize("arguments, message", [
    (["pascal", "."], "expected an empty or a new folder"),
    (["nyud", "new", "--count", "0"], "expected count"),
    (["nyud", "new", "--size", "9", "40"], "expected size"),
    (["cityscapes", "new", "--size", "33", "40"], "expected an even height"),
    (["coco", "new"], "invalid choice: 'coco'"),
])
def test_archives_are_not_written_over_files(arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    save(tmp_path / "some.txt", "")
    with pytest.raises(SystemExit) as ended:
        archives.main(arguments)
    lines = capsys.readouterr().err.splitlines()
    assert ended.value.code == 2 and len(lines) == 1 and message in lines[0], lines
    assert [path.name for path in tmp_path.iterdir()] == ["some.txt"]
    assert archives.main(["nyud", "new", "--count", "1", "--size", "32", "40"]) == 0
    assert len(NYUDv2("new")) == 1 and len(NYUDv2("new", "val")) == 2
