"""PascalContext and NYUDv2: label conventions on files made by hand, augmentation, preparation, checking, export."""

import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import scipy.io
import torch
from PIL import Image
from torch.utils.data import DataLoader

import datasets
from datasets import IGNORE, INDOOR, NYUDv2, PascalContext, Synthetic, augment, centred, main
from metrics import boundary_ground_truth, thin

SIZE = (40, 48)


@pytest.fixture(scope="module")
def pascal(tmp_path_factory):
    return exported(tmp_path_factory, "pascal", count=8)


@pytest.fixture(scope="module")
def nyud(tmp_path_factory):
    return exported(tmp_path_factory, "nyud", count=2)


def exported(tmp_path_factory, kind, count):
    root = tmp_path_factory.mktemp(kind) / "data set"
    size = map(str, SIZE)
    assert main(["export", "--format", kind, "--root", str(root), "--count", str(count), "--size", *size]) == 0
    return root


def assert_equal(a, b):
    assert a.keys() == b.keys()
    for key in a:
        assert torch.equal(a[key], b[key]) if torch.is_tensor(a[key]) else a[key] == b[key], key


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
    assert depth[0, 0] == IGNORE
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
    valid = (normal != IGNORE).all(0)
    assert (valid == (normal != IGNORE).any(0)).all()
    np.testing.assert_allclose(normal[:, valid], pixels.transpose(2, 0, 1)[:, valid] / 127.5 - 1, atol=1e-6)
    classes = set(label_map[valid])
    assert len(classes) == 170 and sum(classes) == 37556
    assert {3, 158, 284, 440, 457} <= classes and not {1, 2, 189, 360, 458, 459} & classes    # no sky, ground, wood


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
        assert ((sample[task] == IGNORE) == ~inside).all(), task


def test_centred_of_an_odd_remainder():
    assert centred((9, 7), (4, 7)) == (slice(2, 6), slice(0, 7))


# --------------------------------------------------------------------------------------------------- augmentation

def coordinates(h, w):
    """An image whose red and green are 2 x and 2 y, and labels that are x and y."""
    y, x = np.mgrid[:h, :w].astype(np.uint8)
    labels = {"boundary": x[None], "saliency": y[None], "depth": np.full((1, h, w), 3, np.float32),
              "normal": np.stack([x, y, x, np.ones_like(x)])}
    return np.stack([2 * x, 2 * y, 0 * x], 2), labels


def test_labels_stay_with_the_image_and_depth_and_normals_follow(monkeypatch):
    monkeypatch.setattr(datasets, "JITTER", ())
    h, w, size = 90, 120, (80, 100)
    source, labels = coordinates(h, w)
    scales, flips, lefts = [], [], []
    for seed in range(300):
        image, moved = augment(source, labels, size, np.random.default_rng(seed))
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
        assert (moved["normal"][0] == (255 - x if flipped else x)).all()
        assert (moved["normal"][1] == y).all() and (moved["normal"][2] == x).all() and (moved["normal"][3] == 1).all()
        scales.append(scale), flips.append(flipped)
        if scale > 1.5:
            lefts.append(x.min() / (w - 100 / scale))
    assert 0.5 <= min(scales) < 0.53 and 1.97 < max(scales) <= 2 and abs(np.mean(scales) - 1.25) < 0.08
    assert abs(np.mean(flips) - 0.5) < 0.09
    assert min(lefts) < 0.05 and max(lefts) > 0.95 and abs(np.mean(lefts) - 0.5) < 0.1    # crops reach both sides


def test_a_flipped_normal_is_the_negative_in_x():
    pixels = np.uint8([[[0]], [[51]], [[255]], [[1]]])
    for x, expected in ((0, -1), (255 - 0, 1), (51, -0.6), (255 - 51, 0.6)):
        pixels[0] = x
        np.testing.assert_allclose(datasets.decode("normal", pixels).ravel(), [expected, -0.6, 1], atol=1e-6)


def test_colours_are_drawn_half_the_time_in_range_and_in_order(monkeypatch):
    drawn = []
    bounds = [(-32 / 255, 32 / 255), (0.5, 1.5), (0.5, 1.5), (-0.1, 0.1)]
    assert [b for _, b in datasets.JITTER] == bounds
    monkeypatch.setattr(datasets, "JITTER", [
        (lambda image, value, i=i: drawn[-1].append((i, value)) or image, b) for i, b in enumerate(bounds)])
    image, labels = coordinates(4, 4)
    for seed in range(400):
        drawn.append([])
        augment(image, labels, (4, 4), np.random.default_rng(seed))
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


def test_crops_are_tried_again_while_one_class_dominates(monkeypatch):
    monkeypatch.setattr(datasets, "SCALE", (1.0, 1.0))
    semseg = np.repeat([1, 2], (90, 10)).astype(np.uint8).reshape(1, 1, 100).repeat(20, 1)
    image = np.zeros((20, 100, 3), np.uint8)
    kept = first = alone = 0
    for seed in range(200):
        for labels in ({"semseg": semseg}, {"saliency": semseg}):
            found = augment(image, labels, (20, 20), np.random.default_rng(seed))[1]
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
            assert torch.equal(a[key], b[key]), key
    assert not torch.equal(alone[0]["image"], alone[1]["image"])


# ------------------------------------------------------------------------------------------- export and preparation

def test_exported_pascal_files_hold_the_scenes(pascal):
    data, people = PascalContext(pascal, augment=False), 0
    for i, sample in enumerate(data):
        shape = SIZE[::-1] if i == 3 or i == 7 else SIZE
        maps = Synthetic(8, shape).render(i)
        assert sample["size"] == shape
        assert (inner(sample, "semseg") == datasets.VOC[maps["semseg"]]).all()
        assert (inner(sample, "saliency") == maps["saliency"]).all()
        people += (maps["parsing"] != IGNORE).any()
        assert (inner(sample, "parsing") == maps["parsing"]).all()
        indoor = INDOOR[datasets.LABEL_MAP[maps["semseg"]]][0]
        normal = inner(sample, "normal")
        np.testing.assert_allclose(normal[:, indoor], maps["normal"][:, indoor], atol=1 / 254)
        assert (normal[:, ~indoor] == IGNORE).all()
        assert abs(inner(sample, "image") - Synthetic(8, shape)[i]["image"].numpy()).mean() < 0.3    # JPEG
    assert 0 < people < len(data)
    folders = [len(list((pascal / "semseg" / folder).iterdir())) for folder in ("VOC12", "pascal-context")]
    assert min(folders) > 0 and sum(folders) == 10 and len(PascalContext(pascal, "val")) == 2


def test_exported_nyudv2_files_hold_the_scenes(nyud):
    for split, seed in (("train", 0), ("val", 1)):
        data = NYUDv2(nyud, split, augment=False)
        assert len(data) == 2
        for i, sample in enumerate(data):
            maps = Synthetic(2, SIZE, seed).render(i)
            expected = np.where(maps["semseg"] == datasets.SKY, IGNORE, datasets.NYUD[maps["semseg"]] - 1)
            assert (inner(sample, "semseg") == expected).all()
            assert (inner(sample, "depth") == maps["depth"]).all()
            assert (inner(sample, "boundary") == maps["boundary"]).all()
            valid = maps["normal"] != IGNORE
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


def state(root):
    return {path: (hashlib.sha1(path.read_bytes()).hexdigest(), path.stat().st_mtime_ns)
            for path in root.rglob("*") if path.is_file()}


def test_prepared_labels_equal_the_originals(pascal, tmp_path, monkeypatch, capsys):
    root = shutil.copytree(pascal, tmp_path / "copy")
    command = ["prepare", "--dataset", "pascal", "--root", str(root), "--workers", "1"]
    plain, before = everything(root), state(root)
    assert main(command) == 0
    after = state(root)
    assert {p: s for p, s in after.items() if "prepared" not in p.parts} == before and len(after) == len(before) + 10

    assert main(command) == 0 and state(root) == after           # nothing is left to do
    lost, stale = sorted((root / "prepared").iterdir())[:2]
    lost.rename(lost.with_suffix(".123.tmp"))                    # as an interrupted run leaves it
    os.utime(root / "human_parts" / f"{stale.stem}.mat")         # newer than what was made of it
    half = everything(root)
    assert main(command) == 0
    assert {p.name for p, s in state(root).items() if after.get(p) != s} == {
        lost.name, stale.name, f"{stale.stem}.mat", lost.with_suffix(".123.tmp").name}

    def refuse(*args, **kwargs):
        raise AssertionError("an original was read")
    monkeypatch.setattr(scipy.io, "loadmat", refuse)
    for one, other, third in zip(plain, half, everything(root), strict=True):
        assert_equal(one, other)
        assert_equal(one, third)


def everything(root):
    splits = [PascalContext(root, "train", size=(32, 40)), PascalContext(root, "train", augment=False),
              PascalContext(root, "val")]
    return [{**data[i], "truth": torch.from_numpy(data.boundary_truth(i))} for data in splits for i in range(len(data))]


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
    ("pascal", "semseg/pascal-context", ".png", GREY + 21, "semseg", "expected values in 0..20 or 255, found 21"),
    ("pascal", "semseg/pascal-context", ".png", GREY[1:], "semseg", r"expected the size of .*, found \(39, 48\)"),
    ("pascal", "semseg/pascal-context", ".png", np.zeros((*SIZE, 3), np.uint8), "semseg", "expected one channel"),
    ("pascal", "sal_distill", ".png", Path.unlink, "saliency", "no file"),
    ("pascal", "sal_distill", ".png", GREY.T, "saliency", r"found \(48, 40\)"),
    ("pascal", "normals_distill", ".png", shortened, "normal", "unreadable file"),
    ("pascal", "pascal-context/trainval", ".mat", Path.unlink, "boundary", "no file"),
    ("pascal", "pascal-context/trainval", ".mat", shortened, "normal", "unreadable file"),
    ("pascal", "pascal-context/trainval", ".mat", {"Labels": GREY}, "boundary", "unreadable file .*LabelMap"),
    ("pascal", "pascal-context/trainval", ".mat", {"LabelMap": GREY + 500.0}, "boundary", "0..459, found 500"),
    ("pascal", "pascal-context/trainval", ".mat", {"LabelMap": GREY[:, 2:]}, "normal", r"found \(40, 46\)"),
    ("pascal", "human_parts", ".mat", Path.unlink, "parsing", "no file"),
    ("pascal", "human_parts", ".mat", shortened, "parsing", "unreadable file"),
    ("pascal", "human_parts", ".mat", {"anno": 3}, "parsing", "unreadable file"),
    ("pascal", "human_parts", ".mat", objects((15, [("wing", MASK)])), "parsing", "expected parts .*found 'wing'"),
    ("pascal", "human_parts", ".mat", objects((15, [("head", MASK.T)])), "parsing", r"found \(48, 40\)"),
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
    assert str(path) in str(raised.value) and "\n" not in str(raised.value)
    data[1]
    assert main(["check", "--dataset", kind, "--root", str(root), "--workers", "1"]) == 1
    printed = capsys.readouterr().out
    assert str(raised.value) in printed and printed.endswith("\n1 problems\n")


def test_check_counts_and_shows_the_first_few(pascal, tmp_path, capsys):
    command = ["check", "--dataset", "pascal", "--workers", "1", "--root"]
    assert main([*command, str(pascal)]) == 0
    assert capsys.readouterr().out == ("train: 8 images; published: 4998\nval: 2 images; published: 5105\nno problems, "
                                       "but train has 8 of 4998 images and val has 2 of 5105 images\n")
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
    assert "  parsing: 1 problems" in lines and "synthetic_val_00001.mat" in lines[-2]


def test_prepared_files_are_checked_too(pascal, tmp_path, capsys):
    root = shutil.copytree(pascal, tmp_path / "copy")
    arguments = ["--dataset", "pascal", "--workers", "1", "--root", str(root)]
    damaged = root / "human_parts/synthetic_val_00000.mat"
    content = damaged.read_bytes()
    shortened(damaged)
    assert main(["prepare", *arguments]) == 1
    assert str(damaged) in capsys.readouterr().out and len(list((root / "prepared").iterdir())) == 9
    damaged.write_bytes(content)
    assert main(["prepare", *arguments]) == 0 and main(["check", *arguments]) == 0
    broken, other = (root / f"prepared/synthetic_train_0000{i}.png" for i in (0, 1))
    shortened(broken)
    save(other, np.asarray(Image.open(other)) ^ 8)
    with pytest.raises(ValueError, match=f"unusable file .*{broken.name}; delete"):
        PascalContext(root)[0]
    capsys.readouterr()
    assert main(["check", *arguments]) == 1
    printed = capsys.readouterr().out
    assert "  prepared: 2 problems" in printed and f"unusable file {broken}" in printed
    assert f"other labels than the originals' in {other}" in printed


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
        assert sample[task].shape[1:] == (64, 12) and ((sample[task] == IGNORE) == ~inside).all(), task


def test_a_damaged_file_stops_a_run_with_workers(pascal, tmp_path):
    root = shutil.copytree(pascal, tmp_path / "copy")
    shortened(root / "human_parts/synthetic_train_00002.mat")
    with pytest.raises(ValueError, match="unreadable file .*human_parts/synthetic_train_00002.mat"):
        list(DataLoader(PascalContext(root, size=(32, 40)), 4, num_workers=1))


@pytest.mark.parametrize("arguments, message", [
    (dict(split="test"), "expected split from .*'train', 'val'.*, found 'test'"),
    (dict(tasks=[]), "expected tasks from"),
    (dict(tasks=["semseg", "depth"]), r"expected tasks from .*found \['semseg', 'depth'\]"),
    (dict(size=(0, 512)), "expected size"),
    (dict(size=(512,)), "expected size"),
    (dict(seed=-1), "expected seed"),
])
def test_bad_arguments_are_refused(pascal, arguments, message):
    with pytest.raises(ValueError, match=message):
        PascalContext(pascal, **arguments)


@pytest.mark.parametrize("index", [-1, 8, (0, 8), (1, -1)])
def test_indices_outside_are_refused(pascal, index):
    data = PascalContext(pascal)
    with pytest.raises(IndexError, match=r"0\.\.7, found (8|-1)"):
        data[index]
    with pytest.raises(IndexError, match=r"0\.\.7, found 8"):
        data.boundary_truth(8)


def test_incomplete_trees_are_refused(pascal, tmp_path):
    with pytest.raises(FileNotFoundError, match="no folder .*nowhere.*unpack"):
        PascalContext(tmp_path / "nowhere")
    root = shutil.copytree(pascal, tmp_path / "copy")
    shutil.rmtree(root / "human_parts")
    with pytest.raises(FileNotFoundError, match="no folder .*human_parts"):
        PascalContext(root)
    assert len(PascalContext(root, tasks=["semseg", "normal"])[0]) == 5    # which need no human_parts
    listed = root / "ImageSets/Context/train.txt"
    listed.write_text("\n")
    with pytest.raises(ValueError, match="found none in .*train.txt"):
        PascalContext(root, tasks=["semseg"])
    listed.unlink()
    with pytest.raises(FileNotFoundError, match="no file .*train.txt"):
        PascalContext(root, tasks=["semseg"])
    assert main(["check", "--dataset", "pascal", "--root", str(root), "--workers", "1"]) == 1


# ------------------------------------------------------------------------------------------------------ command line

def test_processes_and_the_script_itself(pascal, tmp_path):
    root = shutil.copytree(pascal, tmp_path / "copy")
    script = Path(datasets.__file__)
    run = subprocess.run([sys.executable, script, "prepare", "--dataset", "pascal", "--root", root, "--workers", "2"],
                         capture_output=True, text=True)
    assert run.returncode == 0 and "10/10" in run.stderr, run.stderr
    alone = shutil.copytree(pascal, tmp_path / "alone")
    main(["prepare", "--dataset", "pascal", "--root", str(alone), "--workers", "1"])
    for path in (alone / "prepared").iterdir():
        assert (root / "prepared" / path.name).read_bytes() == path.read_bytes()


@pytest.mark.parametrize("arguments, message", [
    (["check", "--dataset", "pascal", "--root", "nowhere"], "no folder nowhere"),
    (["prepare", "--dataset", "pascal", "--root", "nowhere"], "no folder nowhere"),
    (["prepare", "--dataset", "pascal", "--root", ".", "--workers", "1"], "no folder JPEGImages"),
    (["check", "--dataset", "pascal", "--root", ".", "--workers", "0"], "--workers of at least 1, found 0"),
    (["check", "--dataset", "coco"], "invalid choice: 'coco'"),
    (["export", "--format", "pascal", "--root", "."], "expected an empty or a new folder"),
    (["export", "--format", "nyud", "--root", "new", "--count", "0"], "expected count"),
    (["export", "--format", "nyud", "--root", "new", "--size", "9", "40"], "expected size"),
    ([], "required: command"),
])
def test_bad_input_ends_with_one_line(arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    save(tmp_path / "some.txt", "")
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    lines = capsys.readouterr().err.splitlines()
    assert ended.value.code == 2 and len(lines) == 1 and message in lines[0], lines
    assert not (tmp_path / "new").exists()


def test_nyudv2_needs_no_preparation(nyud, capsys):
    before = state(nyud)
    assert main(["prepare", "--dataset", "nyud", "--root", str(nyud)]) == 0
    assert "nothing to prepare" in capsys.readouterr().out and state(nyud) == before
