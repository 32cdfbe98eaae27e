"""Synthetic: the data is reproducible, and every label agrees with something computed another way."""

import numpy as np
import pytest
import torch

import datasets
from datasets import BOX, CEILING, CYLINDER, FLOOR, IGNORE, PARTS, PERSON, SKY, SPHERE, WALL, Synthetic
from metrics import boundary_pixels, thin


@pytest.fixture(scope="module")
def scenes():
    data = Synthetic(60, size=(96, 120), seed=1)
    return [data.render(i) for i in range(len(data))]


def same(a, b):
    return np.array_equal(a, b, equal_nan=True)


def assert_equal(a, b):
    assert a.keys() == b.keys()
    for key in a:
        assert same(a[key], b[key]) if torch.is_tensor(a[key]) else a[key] == b[key], key


def test_same_seed_and_index_give_the_same_sample():
    first, second, other = Synthetic(4, seed=3), Synthetic(9, seed=3), Synthetic(4, seed=4)
    second[7]                                                    # what was drawn before must not matter
    for i in (3, 0):
        assert_equal(first[i], second[i])
        assert not torch.equal(first[i]["image"], other[i]["image"])
        assert not torch.equal(first[i]["depth"], other[i]["depth"])
    assert not torch.equal(first[0]["depth"], first[1]["depth"])


def test_workers_do_not_change_the_data():
    data = Synthetic(6, size=(32, 40))
    alone, shared = (list(torch.utils.data.DataLoader(data, batch_size=2, num_workers=n)) for n in (0, 2))
    assert len(alone) == len(shared) == 3
    for a, b in zip(alone, shared):
        for key in ("image", *data.TASKS):
            assert same(a[key], b[key]), key
        assert a["name"] == b["name"]


def test_samples_have_the_documented_form():
    data = Synthetic(5, size=(48, 64), seed=2)
    assert list(data.TASKS) == ["semseg", "parsing", "saliency", "normal", "boundary", "depth"]
    assert data.TASKS["semseg"] == len(data.CLASSES["semseg"]) and data.TASKS["parsing"] == len(PARTS) == 7
    assert len(data) == len(list(data)) == 5
    for i, sample in enumerate(data):
        assert list(sample) == ["image", *data.TASKS, "name", "size"]
        assert sample["name"] == f"synthetic-{i:06d}" and sample["size"] == (48, 64)
        for key, channels in dict(image=3, semseg=1, parsing=1, saliency=1, normal=3, boundary=1, depth=1).items():
            assert sample[key].shape == (channels, 48, 64), key
            assert sample[key].dtype == (torch.int64 if key in ("semseg", "parsing", "saliency") else torch.float32)
            assert sample[key].is_contiguous() and not sample[key].isinf().any()
        for key in ("semseg", "parsing", "saliency"):
            classes = sample[key][sample[key] != IGNORE] if key == "parsing" else sample[key]
            assert ((classes >= 0) & (classes < data.TASKS[key])).all()
        assert set(sample["boundary"].unique().tolist()) == {0, 1}


def test_image_is_the_photograph_normalised():
    data = Synthetic(1)
    std, mean = (torch.tensor(v).view(3, 1, 1) for v in (datasets.IMAGE_STD, datasets.IMAGE_MEAN))
    photograph = torch.from_numpy(data.render(0)["image"])
    assert 0 <= photograph.min() and photograph.max() <= 1 and photograph.std() > 0.05
    assert torch.allclose(data[0]["image"] * std + mean, photograph, atol=1e-5)


def test_tasks_choose_labels_and_nothing_else():
    everything, some = Synthetic(1), Synthetic(1, tasks=["depth", "semseg"])
    assert some.tasks == {"depth": 1, "semseg": 8}
    assert list(some[0]) == ["image", "depth", "semseg", "name", "size"]
    assert_equal(some[0], {key: everything[0][key] for key in some[0]})


def test_boundaries_to_score_against_are_the_labels_thinned(monkeypatch):
    """Right after a sample they are not rendered again, and what is done to the sample does not change them."""
    data = Synthetic(2, size=(48, 64))
    sample = data[1]
    expected = thin(sample["boundary"][0].numpy() > 0)
    sample["boundary"].fill_(0)
    monkeypatch.setattr(datasets, "trace", None)
    assert (data.boundary_truth(1) == expected).all() and expected.any()
    monkeypatch.undo()
    assert not np.array_equal(data.boundary_truth(0), expected)


def test_every_class_and_part_occurs(scenes):
    classes = sum(np.bincount(s["semseg"].ravel(), minlength=8) for s in scenes)
    parts = sum(np.bincount(s["parsing"][s["parsing"] != IGNORE], minlength=7) for s in scenes)
    assert len(classes) == 8 and len(parts) == 7
    assert (classes > 0.005 * classes.sum()).all(), classes
    assert (parts[1:] > 0.04 * parts[1:].sum()).all(), parts     # of the pixels on people
    with_people = np.mean([(s["semseg"] == PERSON).any() for s in scenes])
    assert 0.6 < with_people < 0.95


def figures_of(maps):
    """What a scene shows, in numbers of the order of 1."""
    normal = np.nan_to_num(maps["normal"])
    counts = [np.bincount(maps[task].ravel(), minlength=256)[:8] / maps[task].size for task in ("semseg", "parsing")]
    steps = abs(np.diff(maps["image"])).mean((1, 2))    # of the texture and the noise
    means = [maps[key].mean((1, 2)) for key in ("image", "boundary")] + [normal.mean((1, 2)), abs(normal).mean((1, 2))]
    return np.concatenate([*counts, *means, maps["image"].std((1, 2)), steps, [np.nanmean(maps["depth"]) / 10]])


def test_scenes_stay_as_they_are(request):
    """The README's figures are of these scenes. The file holds figures_of each, as they were at first."""
    data, recorded = Synthetic(160, (48, 64), seed=2), np.load(request.path.parent / "data" / "synthetic_scenes.npy")
    np.testing.assert_allclose([figures_of(data.render(i)) for i in range(160)], recorded, atol=1e-3)


def test_labels_agree_on_what_is_where(scenes):
    for s in scenes:
        semseg, sky = s["semseg"], s["semseg"][0] == SKY
        people = semseg == PERSON
        assert ((s["parsing"] > 0) == people).all() if people.any() else (s["parsing"] == IGNORE).all()
        assert ((s["saliency"] == 1) == np.isin(semseg, (SPHERE, BOX, CYLINDER, PERSON))).all()
        assert (np.isnan(s["depth"][0]) == sky).all()
        assert (np.isnan(s["normal"]) == sky).all()
        assert (0.3 < s["depth"][0][~sky]).all() and (s["depth"][0][~sky] < datasets.FAR).all()
        pairs = np.unique(8 * s["instance"] + semseg[0])
        assert len(pairs) == len(set(pairs // 8))                # one class per instance


def test_boundary_by_brute_force(scenes):
    maps = [np.random.default_rng(0).integers(0, 3, (9, 7)), scenes[0]["instance"]]
    for instance, boundary in zip(maps, [boundary_pixels(maps[0]), scenes[0]["boundary"][0]]):
        h, w = instance.shape
        for y in range(h):
            for x in range(w):
                right, below = min(x + 1, w - 1), min(y + 1, h - 1)
                others = {instance[y, right], instance[below, x], instance[below, right]}
                assert boundary[y, x] == (others != {instance[y, x]})


def test_normals_face_the_viewer_with_unit_length(scenes):
    for s in scenes:
        valid = s["semseg"][0] != SKY
        normal, ray = s["normal"][:, valid], s["rays"][:, valid]
        np.testing.assert_allclose(np.linalg.norm(normal, axis=0), 1, atol=1e-4)
        assert ((normal * ray).sum(0) < 1e-3).all()


def test_normals_are_those_of_the_surface_in_the_depth_map(scenes):
    """Column, row and depth give a point by the pinhole camera; its differences to the neighbours give the normal."""
    median = {kind: [] for kind in (FLOOR, WALL, CEILING, SPHERE, BOX, CYLINDER, PERSON)}
    for s in scenes:
        h, w = s["depth"].shape[1:]
        pixel = (s["rays"][0, 0, -1] - s["rays"][0, 0, 0]) / (w - 1)
        y, x = np.mgrid[:h, :w]
        z = s["depth"][0].astype(np.float64)
        points = np.stack([(x - (w - 1) / 2) * pixel * z, ((h - 1) / 2 - y) * pixel * z, -z])
        down, right = points[:, 2:, 1:-1] - points[:, :-2, 1:-1], points[:, 1:-1, 2:] - points[:, 1:-1, :-2]
        expected = np.cross(down, right, axis=0)
        agree = (s["normal"][:, 1:-1, 1:-1] * expected).sum(0) / np.linalg.norm(expected, axis=0)
        inner = [s["instance"][1:-1, 1:-1] == s["instance"][y:y + h - 2, x:x + w - 2] for y, x in
                 ((0, 1), (2, 1), (1, 0), (1, 2))]
        for kind in median:
            found = agree[np.all(inner, axis=0) & (s["semseg"][0, 1:-1, 1:-1] == kind)]
            if len(found) > 100:
                median[kind].append(np.median(found))
                assert kind not in (FLOOR, CEILING) or found.min() > 0.999    # these have no edges inside
    assert all(min(found) > 0.98 for found in median.values()), {k: min(v) for k, v in median.items()}


AXIS, AXES = np.array([0.48, 0.64, 0.6]), datasets.yaw(0.7)


def distance_to_capsule(p):
    height = np.clip(AXIS @ p, 0, 1.2)
    return np.linalg.norm(p - AXIS[:, None] * height, axis=0) - 0.4


def distance_to_cylinder(p):
    height = AXIS @ p
    gaps = np.stack([np.linalg.norm(p - AXIS[:, None] * height, axis=0) - 0.4, abs(height - 0.6) - 0.6])
    return np.linalg.norm(np.maximum(gaps, 0), axis=0) + np.minimum(gaps.max(0), 0)


def distance_to_box(p):
    gaps = abs(AXES @ p) - np.array([[0.3], [0.5], [0.8]])
    return np.linalg.norm(np.maximum(gaps, 0), axis=0) + np.minimum(gaps.max(0), 0)


@pytest.mark.parametrize("hit, args, distance", [
    (datasets.hit_capsule, (np.zeros((3, 1, 1)), AXIS.reshape(3, 1, 1), 1.2, 0.4), distance_to_capsule),
    (datasets.hit_cylinder, (np.zeros((3, 1, 1)), AXIS.reshape(3, 1, 1), 1.2, 0.4), distance_to_cylinder),
    (datasets.hit_box, (np.zeros((3, 1, 1)), np.reshape([0.3, 0.5, 0.8], (3, 1, 1)), AXES), distance_to_box),
])
def test_intersections_against_marching_along_the_ray(hit, args, distance):
    rng = np.random.default_rng(0)
    origin = rng.normal(size=(3, 1000))
    origin *= rng.uniform(2, 5, 1000) / np.linalg.norm(origin, axis=0)
    rays = rng.uniform(-1, 1, (3, 1000)) - origin                # not of unit length, nearly all towards the solid
    rays[:, ::10] *= -1                                          # some away from it
    with np.errstate(all="ignore"):
        t, normal = (v[..., 0, :] for v in hit(origin[:, None], rays[:, None], *args))
    marched, nearest, speed = np.zeros(1000), np.full(1000, np.inf), np.linalg.norm(rays, axis=0)
    for _ in range(200):                                         # a step as long as the distance never enters
        gap = distance(origin + marched * rays)
        marched += gap / speed
        nearest = np.minimum(nearest, gap)
    touched = nearest < 1e-5
    sure = touched | (nearest > 1e-3)                            # not those that graze it
    assert sure.mean() > 0.95 and 200 < touched.sum() < 900
    assert ((t > 0) == touched)[sure].all()
    np.testing.assert_allclose(t[touched], marched[touched], atol=1e-3)
    point = (origin + marched * rays)[:, touched]
    slope = [(distance(point + step) - distance(point - step)) / 2e-4 for step in 1e-4 * np.eye(3)[:, :, None]]
    smooth = abs(np.linalg.norm(slope, axis=0) - 1) < 1e-3       # not on an edge
    assert smooth.mean() > 0.9
    np.testing.assert_allclose(normal[:, touched][:, smooth], np.array(slope)[:, smooth], atol=1e-2)


def test_bounds_cut_nothing_off(monkeypatch):
    data = Synthetic(10, size=(96, 120), seed=7)                 # a seed with long shadows to the side
    clipped = [data[i] for i in range(10)]
    everywhere = slice(None), slice(None)
    monkeypatch.setattr(datasets, "bounds", lambda camera, solids, light=None: [everywhere] * len(solids))
    for i in range(10):
        assert_equal(clipped[i], data[i])


@pytest.mark.parametrize("arguments, message", [
    (dict(count=0), "count"),
    (dict(count=2, size=(31, 64)), "size"),
    (dict(count=2, size=(64, 64, 3)), "size"),
    (dict(count=2, tasks=[]), "tasks"),
    (dict(count=2, tasks=["depth", "edges"]), "edges"),
])
def test_bad_arguments_are_refused(arguments, message):
    with pytest.raises(ValueError, match=f"expected .*{message}"):
        Synthetic(**arguments)


def test_indices_outside_are_refused():
    with pytest.raises(IndexError):
        Synthetic(2, size=(32, 32))[2]
    with pytest.raises(ValueError, match="non-negative"):
        Synthetic(2, size=(32, 32))[-1]
