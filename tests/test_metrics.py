"""Losses and metrics against hand-computed cases and against plain loops in numpy."""

import re

import numpy as np
import pytest
import torch

from metrics import COLOUR_MAP, IGNORE, Labels, Meter, delta_m, make_meters
from metrics import TASKS as ROWS
from train import task_loss


def make_meter(task, channels):
    name = "albedo" if task == "values" else task    # no task can be called values
    return make_meters({name: (task, channels)})[name]


def score(task, channels, output, target):
    meter = make_meter(task, channels)
    meter.update(torch.as_tensor(output), torch.as_tensor(target))
    return meter.compute()


class OnMPS(torch.Tensor):
    """Stands for a tensor on Apple's GPU, which has no float64."""

    device = property(lambda self: torch.device("mps"))

    def cpu(self):
        return self.as_subclass(torch.Tensor)


def test_meters_count_on_the_cpu_where_the_device_has_no_float64():
    output, target = random_case("depth", 1)
    meter = make_meters({"depth": 1})["depth"]
    meter.update(*(torch.as_tensor(array).as_subclass(OnMPS) for array in (output, target)))
    assert type(meter.sums) is torch.Tensor and meter.sums.dtype == torch.float64
    assert meter.compute() == score("depth", 1, output, target)


def random_case(task, channels, batch=5):
    """Random raw outputs and labels of every value, about a fifth of the pixels unknown."""
    rng = np.random.default_rng(0)
    shape = (batch, 1, 6, 7)
    output = rng.standard_normal((batch, channels, 6, 7)).astype(np.float32)
    target = {"normal": lambda: rng.standard_normal((batch, 3, 6, 7)), "depth": lambda: rng.uniform(0.5, 9, shape),
              "values": lambda: rng.standard_normal(output.shape)}.get(
        task, lambda: rng.integers(0, max(channels, 2), shape))()
    if task == "normal":
        target /= np.linalg.norm(target, axis=1, keepdims=True)
        target[:, :, :2] *= 0.7    # too short for a unit vector
    return output, np.where(rng.random(shape) < 0.2, unknown(task), target).astype(
        np.int64 if task in ("semseg", "parsing", "saliency") else np.float32)


def unknown(task):
    return np.nan if task in ("normal", "depth", "values") else IGNORE


def pixels(output, target):
    """The valid pixels' (output, label) vectors."""
    flat = [np.moveaxis(a, 1, -1).reshape(-1, a.shape[1]) for a in (output, target)]
    return [(o.astype(np.float64), t) for o, t in zip(*flat) if not np.isnan(t).any() and t[0] != IGNORE]


def f_measure(scores, labels, threshold, beta2):
    found = [s > threshold for s in scores]
    hit = sum(f and label for f, label in zip(found, labels))
    if not hit:
        return 0.0
    precision, recall = hit / sum(found), hit / sum(labels)
    return 100 * (1 + beta2) * precision * recall / (beta2 * precision + recall)


def brute_force(task, channels, output, target):
    cases = pixels(output, target)
    if task in ("semseg", "parsing"):
        pairs = [(int(np.argmax(o)), int(t[0])) for o, t in cases]
        ious, accuracies = {}, []
        for c in range(channels):
            union, labelled = sum(p == c or t == c for p, t in pairs), [p == c for p, t in pairs if t == c]
            if union:
                ious[f"IoU class {c}"] = 100 * sum(p == t == c for p, t in pairs) / union
            if labelled:
                accuracies.append(100 * np.mean(labelled))
        return {"mIoU": np.mean(list(ious.values())), "pixel_accuracy": 100 * np.mean([p == t for p, t in pairs]),
                "mean_accuracy": np.mean(accuracies), **ious}
    if task == "saliency":
        p = [np.float32(np.exp(o[1]) / np.exp(o).sum()) for o, _ in cases]
        t = [bool(t[0]) for _, t in cases]
        twice = [1 / (1 + np.exp(-float(v))) for v in p]
        return {"maxF": max(f_measure(p, t, i / 256, 0.3) for i in range(1, 256)),
                "maxF_published": max(f_measure(twice, t, i / 20, 0.3) for i in range(1, 20)),
                "IoU": 100 * sum(o[1] > o[0] and y for (o, _), y in zip(cases, t))
                / sum(o[1] > o[0] or y for (o, _), y in zip(cases, t))}
    if task == "boundary":
        p, t = [1 / (1 + np.exp(-o[0])) for o, _ in cases], [bool(t[0]) for _, t in cases]
        return {"pixelF": max(f_measure(p, t, i / 256, 1) for i in range(1, 256))}
    if task == "normal":
        angles = np.array([np.degrees(np.arccos(np.clip(o @ t / np.linalg.norm(o) / np.linalg.norm(t), -1, 1)))
                           for o, t in cases])
        unit = np.array([abs(np.linalg.norm(t) - 1) < 0.25 for _, t in cases])
        return {"mErr": angles.mean(), "mErr_unit": angles[unit].mean(), "rmse": np.sqrt((angles ** 2).mean()),
                "median": np.sort(angles)[(len(angles) - 1) // 2],
                **{f"below_{limit}": 100 * np.mean(angles < float(limit)) for limit in ("11.25", "22.5", "30")}}
    if task == "values":
        errors = np.array([o - t for o, t in cases])
        return {"RMSE": np.sqrt(np.mean(errors ** 2)), "MAE": np.mean(abs(errors))}
    o, t = (np.array(column, dtype=np.float64)[:, 0] for column in zip(*cases))
    floored = np.maximum(o, 1e-9)
    return {"RMSE": np.sqrt(np.mean((np.maximum(o, 0) - t) ** 2)), "abs_rel": np.mean(abs(floored - t) / t),
            "sq_rel": np.mean((floored - t) ** 2 / t),
            "log_rmse": np.sqrt(np.mean((np.log(floored) - np.log(t)) ** 2)),
            "log10": np.mean(abs(np.log10(floored) - np.log10(t))), "SILog": 100 * np.std(np.log(floored) - np.log(t)),
            **{f"delta_{k}": np.mean(np.maximum(floored / t, t / floored) < 1.25 ** k) for k in (1, 2, 3)}}


TASKS = {"semseg": 5, "parsing": 7, "saliency": 2, "normal": 3, "boundary": 1, "depth": 1, "values": 2}


@pytest.mark.paper("Table 1", against="brute force, the other metrics")
@pytest.mark.parametrize("task, channels", TASKS.items())
def test_equals_brute_force(task, channels, compare):
    case = random_case(task, channels)
    ours, expected = score(task, channels, *case), brute_force(task, channels, *case)
    assert ours.keys() == expected.keys() and next(iter(ours)) in ROWS[task].metrics
    for name, value in expected.items():
        if name == "median":    # of a histogram
            assert abs(ours[name] - value) <= 0.0051
        else:
            compare(ours[name], value, rtol=1e-5, atol=0)


def brute_force_loss(task, output, target):
    cases = pixels(output, target)
    if task in ("semseg", "parsing"):
        return np.mean([np.log(np.exp(o).sum()) - o[t[0]] for o, t in cases])
    if task == "saliency":
        w1 = np.mean([t[0] == 0 for _, t in cases])
        return np.mean([(w1 if t[0] else 1 - w1) * (np.log(np.exp(o).sum()) - o[t[0]]) for o, t in cases])
    if task == "boundary":
        p = [1 / (1 + np.exp(-o[0])) for o, _ in cases]
        return np.mean([-0.95 * np.log(p) if t[0] else -0.05 * np.log(1 - p) for p, (_, t) in zip(p, cases)])
    if task == "normal":
        return np.mean([abs(o / np.linalg.norm(o) - t).sum() for o, t in cases])
    return np.mean([abs(o - t).mean() for o, t in cases])


@pytest.mark.parametrize("task, channels", TASKS.items())
def test_loss_of_each_image_equals_brute_force(task, channels):
    output, target = random_case(task, channels)
    ours = task_loss(task, torch.as_tensor(output), torch.as_tensor(target))
    assert ours.shape == (len(output),) and len(output) > 1
    for i, loss in enumerate(ours.tolist()):
        assert loss == pytest.approx(brute_force_loss(task, output[i:i + 1], target[i:i + 1]), rel=1e-5)
    alone = task_loss(task, torch.as_tensor(output[1:2]), torch.as_tensor(target[1:2]))
    assert alone.item() == pytest.approx(ours[1].item(), rel=1e-6)
    rounded = task_loss(task, torch.as_tensor(output).bfloat16(), torch.as_tensor(target))
    assert rounded.dtype == torch.float32
    meter, target = make_meter(task, channels), target.copy()
    target[0] = unknown(task)
    meter.update(torch.as_tensor(output), torch.as_tensor(target), with_losses=True)
    assert meter.losses.tolist() == [pytest.approx(ours[1:].sum().item(), rel=1e-6), len(output) - 1]


def test_median_of_many_angles_and_shares_below_limits():
    """To half a bin of 0.01 degrees; an angle that is the limit is not below it."""
    angles = np.random.default_rng(0).uniform(0, 60, (1, 1, 100, 101))
    angles[0, 0, 0, :3] = 11.25, 22.5, 30
    radians = torch.deg2rad(torch.tensor(angles))
    output = torch.cat([radians.sin(), torch.zeros_like(radians), radians.cos()], dim=1)
    target = torch.tensor([0.0, 0.0, 1.0]).view(1, 3, 1, 1).expand_as(output)
    meter = make_meters({"normal": 3})["normal"]
    meter.sums = meter.sums + meter.kind.count(output, target.double(), torch.ones(1, 100, 101, dtype=bool))
    scores = meter.compute()
    assert abs(scores["median"] - np.median(angles)) <= 0.0051
    for limit in (11.25, 22.5, 30):
        assert scores[f"below_{limit:g}"] == 100 * np.mean(angles < limit)


def test_classes_are_named():
    meter = Meter(Labels({"semseg": 3}, classes={"semseg": ("wall", "floor", "bed")}).kinds["semseg"])
    meter.update(torch.eye(3).view(1, 3, 1, 3), torch.tensor([[[[0, 0, IGNORE]]]]))
    assert meter.compute() == {"mIoU": 25, "pixel_accuracy": 50, "mean_accuracy": 50, "IoU wall": 50, "IoU floor": 0}


@pytest.mark.parametrize("task, channels", TASKS.items())
def test_batches_do_not_matter(task, channels):
    output, target = map(torch.as_tensor, random_case(task, channels))
    whole = score(task, channels, output, target)
    for sizes in ([1] * 5, [3, 2], [1, 4]):
        meter = make_meter(task, channels)
        for o, t in zip(output.split(sizes), target.split(sizes)):
            meter.update(o, t)
        assert meter.compute() == pytest.approx(whole, rel=1e-8)    # float32 rounds a little by shape


def test_miou_leaves_out_classes_that_occur_nowhere():
    target = torch.tensor([[[[0, 0, 1, 1, IGNORE]]]])
    output = torch.nn.functional.one_hot(torch.tensor([[[0, 1, 1, 1, 3]]]), 4).permute(0, 3, 1, 2).float()
    assert score("semseg", 4, output, target)["mIoU"] == pytest.approx(100 * (1 / 2 + 2 / 3) / 2)


def test_thresholds_are_strict():
    """P(salient) is exactly 1/2 everywhere, so at the threshold 128/256 nothing is found; all is at 127/256."""
    meter = make_meters({"saliency": 2})["saliency"]
    meter.update(torch.zeros(1, 2, 1, 4), torch.tensor([[[[1, 0, 0, 0]]]]))
    f = meter.kind.f_measure(meter.sums, beta2=0.3)
    at = {round(float(t) * 256): float(v) for t, v in zip(meter.kind.thresholds, f) if (float(t) * 256).is_integer()}
    assert at[128] == 0 and at[127] == pytest.approx(100 * 1.3 * 0.25 / (0.3 * 0.25 + 1))


def test_normal_error_of_known_angles():
    target = torch.tensor([0.0, 0.0, 1.0]).view(1, 3, 1, 1).expand(1, 3, 1, 5)
    angles = torch.deg2rad(torch.tensor([0.0, 1e-3, 90.004, 180.0, 180.0]))
    output = 7 * torch.stack([angles.sin(), torch.zeros(5), angles.cos()]).view(1, 3, 1, 5)
    scores = score("normal", 3, output, target)
    assert scores["mErr"] == pytest.approx((1e-3 + 90.004 + 360) / 5, rel=1e-6) and scores["below_11.25"] == 40
    assert scores["median"] == pytest.approx(90.005, abs=1e-4)    # the middle of its bin


def test_depth_counts_inside_an_open_range():
    target = torch.tensor([-1.0, 0.0, 2.0, 80.0, 79.0, torch.nan]).view(1, 1, 1, 6)
    meter = make_meters({"depth": 1}, depth_range=(0, 80))["depth"]
    meter.update(torch.full((1, 1, 1, 6), 4.0), target)
    scores = meter.compute()
    assert scores["RMSE"] == pytest.approx(((2**2 + 75**2) / 2) ** 0.5)
    assert scores["sq_rel"] == pytest.approx((2**2 / 2 + 75**2 / 79) / 2, rel=1e-6)
    with pytest.raises(ValueError, match="low below high"):
        make_meters({"depth": 1}, depth_range=(80, 0))


def test_a_batch_of_another_size_than_its_labels_is_an_error():
    with pytest.raises(ValueError):
        make_meters({"depth": 1})["depth"].update(torch.ones(2, 1, 4, 4), torch.ones(1, 1, 4, 4))


def test_negative_depth_is_clamped():
    assert score("depth", 1, torch.full((1, 1, 1, 1), -3.0), torch.full((1, 1, 1, 1), 2.0))["RMSE"] == 2


@pytest.mark.parametrize("task, channels", TASKS.items())
def test_nothing_valid_is_an_error(task, channels):
    output, target = random_case(task, channels)
    with pytest.raises(ValueError, match="valid pixels of .*found none"):
        score(task, channels, output, np.full_like(target, unknown(task)))


def test_unknown_task():
    with pytest.raises(ValueError, match="found 'pose': 17"):
        make_meters({"pose": 17})


def test_tasks_of_other_names_are_treated_like_one_of_the_six():
    labels = Labels({"semseg": np.int64(12), "material": ("semseg", 5), "height": ["depth", 1]})
    kinds = labels.kinds
    assert {task: kind.channels for task, kind in kinds.items()} == {"semseg": 12, "material": 5, "height": 1}
    assert type(kinds["material"]) is ROWS["semseg"] and type(kinds["height"]) is ROWS["depth"]
    assert kinds["height"].lower_is_better and kinds["height"].suffix == ".npy"
    meters = make_meters({"material": ("semseg", 5), "semseg": 12, "height": ("depth", 1)}, depth_range=(0, 80))
    output, target = map(torch.as_tensor, random_case("semseg", 5))
    meters["material"].update(output, target)
    assert meters["material"].compute() == score("semseg", 5, output, target) and meters["semseg"].empty()
    assert meters["height"].kind.labels.depth_range == (0, 80)
    gains = [delta_m({task: 1.0}, {task: 2.0}, kinds) for task in ("height", "material")]
    assert gains == [50, -50]


@pytest.mark.parametrize("table, message", [
    ({"pose": 17}, "found 'pose': 17"), ({"pose": ("pose", 17)}, "with like one of these"),
    ({"depth": 2}, "1 to 1 channels"), ({"material": ("semseg", 1)}, "2 to 255 channels"),
    ({"semseg": "12"}, "found '12'"), ({"semseg": 12.0}, "found 12.0"),
    ({"a/b": ("depth", 1)}, "found 'a/b'"), ({"image": ("depth", 1)}, "found 'image'"), ({3: ("depth", 1)}, "found 3"),
    ({"..": ("depth", 1)}, "found '..'"), ({"material": ("semseg", 5, 1)}, "like one of these")])
def test_impossible_tasks_are_named(table, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        Labels(table).kinds  # noqa: B018


NYUD_BASELINE = (54.32, 0.5166, 19.21, 77.30)    # Table 2, single-task


@pytest.mark.paper("Table 2-5", against="the paper's Delta_m")
@pytest.mark.parametrize("row, expected", [
    ((53.72, 0.5239, 19.97, 76.50), -1.87), ((54.61, 0.5059, 19.00, 77.40), 0.95),    # Table 2
    ((54.66, 0.4984, 18.81, 78.20), 1.84), ((54.75, 0.5054, 18.81, 78.20), 1.55),
    ((55.82, 0.5066, 18.63, 78.70), 2.38), (NYUD_BASELINE, 0.0),
    ((54.57, 0.5109, 19.95, 76.60), -0.79),                                           # Table 3
    ((55.01, 0.4990, 18.73, 78.20), 2.08),                                            # Table 4
    ((55.37, 0.5087, 18.76, 78.30), 1.77), ((54.50, 0.4981, 18.83, 78.20), 1.76),     # Table 5
])
def test_delta_m_of_the_papers_tables(row, expected, compare):
    tasks = ("semseg", "depth", "normal", "boundary")
    compare(delta_m(dict(zip(tasks, row)), dict(zip(tasks, NYUD_BASELINE))), expected, rtol=0, atol=0.01)


def test_delta_m_of_other_tasks_is_an_error():
    with pytest.raises(ValueError, match="the same tasks in"):
        delta_m({"semseg": 1.0}, {"semseg": 1.0, "depth": 1.0})


@pytest.mark.parametrize("task, channels", TASKS.items())
def test_outputs_that_are_not_finite_are_an_error(task, channels):
    output, target = random_case(task, channels)
    output[0, 0, 0, 0] = np.nan
    with pytest.raises(ValueError, match=r"finite outputs of the model for \w+, found others"):
        score(task, channels, output, target)


@pytest.mark.parametrize("label", [4, 7, -1])
def test_labels_that_there_are_not_are_an_error(label):
    target = np.array([0, 3, label, IGNORE]).reshape(1, 1, 2, 2)
    with pytest.raises(ValueError, match="semseg in 0..3 or 255, found 1 other pixels"):
        score("semseg", 4, np.ones((1, 4, 2, 2), np.float32), target)


def test_meters_keep_no_graph():
    output, target = (torch.as_tensor(a) for a in random_case("normal", 3))
    meter = make_meters({"normal": 3})["normal"]
    meter.update(output.requires_grad_(), target)
    assert not meter.sums.requires_grad


def test_thresholds_stay_on_the_device():
    meter = make_meters({"boundary": 1})["boundary"]
    moved = []
    for _ in range(2):
        meter.update(torch.empty(1, 1, 2, 2, device="meta"), torch.empty(1, 1, 2, 2, device="meta"))
        moved.append(meter.kind.thresholds)
    assert moved[0] is moved[1] and moved[0].device.type == "meta"


def test_scores_that_are_not_finite_are_an_error():
    with pytest.raises(ValueError, match="finite scores of depth, found .*inf"):
        score("depth", 1, torch.ones(1, 1, 1, 1), torch.zeros(1, 1, 1, 1))


def test_delta_m_against_zero_is_an_error():
    with pytest.raises(ValueError, match="other than 0, found"):
        delta_m({"depth": 1.0}, {"depth": 0.0})


def kind_of(task, channels, **labels):
    name = "albedo" if task == "values" else task
    return Labels({name: (task, channels)}, **labels).kinds[name]


def test_what_differs_by_task():
    """Weight of the loss, unit, digits, suffix, scaling, and the fewest and most channels."""
    found = {task: (kind.weight, kind.unit, kind.digits, kind.suffix, kind.scaling, kind.limits)
             for task, kind in ROWS.items()}
    assert found == {
        "semseg": (1, " %", 2, ".png", 0, (2, 255)), "parsing": (2, " %", 2, ".png", 0, (2, 255)),
        "saliency": (5, " %", 2, ".png", 0, (2, 2)), "normal": (10, "°", 2, ".npy", 0, (3, 3)),
        "boundary": (50, " %", 2, ".png", 0, (1, 1)), "depth": (1, " m", 4, ".npy", -1, (1, 1)),
        "disparity": (1, " px", 4, ".npy", 1, (1, 1)), "values": (1, "", 4, ".npy", 0, (1, 255))}
    assert [task for task, kind in ROWS.items() if kind.lower_is_better] == ["normal", "depth", "disparity", "values"]
    assert [task for task, kind in ROWS.items() if kind.binary] == ["saliency", "boundary"]


@pytest.mark.parametrize("table, fits, other", [
    ("colours", [(0, 1, 255), (2, 3, 4)], [(0, 1, 256), (2, 3, 4)]), ("colours", [(0, 0, 0)] * 2, [(0, 0, 0)] * 3),
    ("label_ids", [0, 255], [0, 256]), ("label_ids", [7, 8], [-1, 8])])
def test_colours_and_ids_are_numbers_of_a_byte_for_each_class(table, fits, other):
    kind_of("semseg", 2, **{table: {"semseg": fits}})
    with pytest.raises(ValueError, match=r"numbers of 0\.\.255, of the shape"):
        kind_of("semseg", 2, **{table: {"semseg": other}})


@pytest.mark.parametrize("task, channels, values, fits", [
    ("semseg", 3, [0, 2, 255], True), ("semseg", 3, [3], False), ("semseg", 3, [254], False),
    ("semseg", 3, [-1], False), ("semseg", 3, [0.0], False),
    ("saliency", 2, [0, 1, 255], True), ("saliency", 2, [2], False),
    ("boundary", 1, [0.0, 1.0, 255.0], True), ("boundary", 1, [0.5], False), ("boundary", 1, [np.nan], False),
    ("boundary", 1, [2], False), ("depth", 1, [0.0, 1.5, np.nan], True), ("depth", 1, [-0.1], False),
    ("depth", 1, [np.inf], False), ("depth", 1, [1], False)])
def test_values_of_labels(task, channels, values, fits):
    kind, label = kind_of(task, channels), np.array([values])
    if fits:
        for given in (label, label[None]):
            checked = kind.check(given, label.shape)
            expected = np.where(label == 0, np.nan, label) if task == "depth" else label
            np.testing.assert_array_equal(checked[0], expected)
            assert checked.dtype == kind.stored and checked.shape == (1, *label.shape)
    else:
        with pytest.raises(ValueError, match="expected"):
            kind.check(label, label.shape)
    with pytest.raises(ValueError, match=r"the shape \(2, 9\)"):
        kind.check(label, (2, 9))
    missing = kind.check(None, (2, 3))
    assert missing.shape == (1, 2, 3) and missing.dtype == kind.stored and not kind.valid(torch.tensor(missing)).any()


def test_normals_of_other_lengths():
    """Between 0.75 and 1.25 a vector counts as a unit vector; with two fifths far from it, no label is an image of
    normals. Shorter ones than 0.1 stand where there is no normal."""
    lengths = np.array([0.76, 1.24, 1, 0.74, 1.26, 0.09, 0])
    label = np.zeros((3, 1, 7))
    label[0], label[2] = 0.6 * lengths, -0.8 * lengths
    kept = {unit: ~np.isnan(kind_of("normal", 3, unit_normals=unit).check(label, (1, 7))).any(0)[0]
            for unit in (True, False)}
    assert kept[True].tolist() == [True] * 3 + [False] * 4 and kept[False].tolist() == [True] * 6 + [False]
    label[:, 0, 2] *= 0.11    # 3 of 6 vectors
    with pytest.raises(ValueError, match="vectors of length 1, found 43% of other lengths"):
        kind_of("normal", 3).check(label, (1, 7))
    label[:, 0, 3:5] = [[0], [0.6], [0.8]]
    kind_of("normal", 3).check(label, (1, 7))
    with pytest.raises(ValueError, match="grey"):
        kind_of("normal", 3).check(np.full((3, 2, 2), 3 ** -0.5), (2, 2))


def test_what_augmentation_does_to_values():
    label = np.float32([[[1, 2, 5]]])
    for task, factor in (("depth", 0.5), ("disparity", 2), ("values", 1)):
        for flipped in (False, True):
            np.testing.assert_array_equal(kind_of(task, 1).augment(label.copy(), 2.0, flipped), factor * label)
    normal = np.arange(6, dtype=np.float32).reshape(3, 1, 2)
    for flipped, signs in ((False, [1, 1, 1]), (True, [-1, 1, 1])):
        moved = kind_of("normal", 3).augment(normal.copy(), 2.0, flipped)
        np.testing.assert_array_equal(moved, normal * np.reshape(signs, (3, 1, 1)))
    sided = kind_of("semseg", 4, classes={"semseg": ("bed", "left arm", "right arm", "leg")},
                    flip_pairs={"semseg": [("left arm", "right arm")]})
    classes = np.uint8([[[0, 1, 2, 3, 255]]])
    assert sided.augment(classes, 2.0, True).tolist() == [[[0, 2, 1, 3, 255]]]
    assert sided.augment(classes, 2.0, False).tolist() == classes.tolist()


def test_what_an_owner_should_look_at():
    normal, depth = kind_of("normal", 3), kind_of("depth", 1)
    vectors = np.tile(np.float32([[0], [0], [1]]), 8)
    vectors[2, :2] = -1
    assert normal.remarks(vectors, True) == []    # a quarter looks away
    vectors[2, 2] = -1
    assert "38% of the normals look away" in normal.remarks(vectors, True)[0]
    for metres, said in ((0.04, True), (0.05, False), (100, False), (101, True)):
        remarks = depth.remarks(np.array([[metres, metres, 7e3, np.nan, 1e-4]]), True)
        assert ("metres are expected" in "".join(remarks)) == said
    assert kind_of("disparity", 1).remarks(np.array([[400.0]]), True) == []
    assert depth.remarks(np.array([[np.nan]]), True) == ["no pixel has a label"]
    assert kind_of("boundary", 1).remarks(np.uint8([[0, 255]]), True) == ["no positive pixel has a label"]
    classes = kind_of("semseg", 8, classes={"semseg": (*"abcdefg", "leftmost")})
    assert classes.remarks(np.uint8([[7]]), False) == ["7 classes never occur, first a, b, c, d, e, f"]
    assert len(classes.remarks(np.uint8([[7]]), True)) == 2 and classes.remarks(np.uint8([range(8)]), False) == []
    assert depth.examples(np.arange(1024.0).reshape(1, 32, 32)).tolist() == [list(range(0, 1024, 4))]


def test_maps_at_another_size():
    """Numbers between the pixels' centres; classes of the nearest pixel; directions of unit length."""
    row = torch.tensor([[[0.0, 1.0]]])
    assert kind_of("depth", 1).resize(row, (1, 4)).tolist() == [[[0, 0.25, 0.75, 1]]]
    assert kind_of("semseg", 2).resize(row.byte(), (1, 4)).tolist() == [[[0, 0, 1, 1]]]
    normals = kind_of("normal", 3).resize(torch.cat([row, 1 - row, 0 * row]), (1, 4))
    torch.testing.assert_close(normals[:, 0, 1], torch.tensor([0.1, 0.9, 0.0]).sqrt())
    torch.testing.assert_close(normals.norm(dim=0), torch.ones(1, 4))


def test_maps_as_they_are_stored():
    maps = np.float32([[[1, 2]], [[3, 4]]])
    assert kind_of("depth", 1).raw(maps[:1]).tolist() == [[1, 2]]
    assert kind_of("values", 2).raw(maps).tolist() == maps.tolist()
    semseg, classes = kind_of("semseg", 2, label_ids={"semseg": [7, 8]}), np.uint8([[[0, 1, 255]]])
    assert semseg.raw(classes).tolist() == [[0, 1, 255]]
    assert semseg.raw(classes[..., :2], label_ids=True).tolist() == [[7, 8]]


def test_pictures():
    """Colours by hand, and the legend's line for unknown pixels."""
    viridis = "440154 46327e 365c8d 277f8e 1fa187 4ac16d a0da39 fde725"
    assert COLOUR_MAP.tolist() == [list(bytes.fromhex(colour)) for colour in viridis.split()]
    colours, lines = kind_of("values", 1).picture(np.float32([[[0, 3, np.nan, 6]]]), np.float32([[0, 6]]))
    assert colours.tolist() == [[[68, 1, 84], [35, 143, 138], [224, 224, 192], [253, 231, 37]]]
    assert [text for text, _ in lines] == ["0.00 to 6.00", "unknown"]
    close = np.float32([[[0, 1.2e-6]]])
    assert kind_of("values", 1).picture(close, close[0])[0].tolist() == [[[68, 1, 84], [253, 231, 37]]]
    colours, lines = kind_of("values", 2).picture(np.float32([[[3]], [[4]]]), np.float32([[0, 6], [0, 8]]))
    assert colours.tolist() == [[[35, 143, 138]]] and [text for text, _ in lines] == ["0.00 to 10.00"]
    colours, lines = kind_of("normal", 3).picture(np.float32([[[-1, 0]], [[0, 1]], [[0, 0]]]), np.ones((3, 1)))
    assert colours.tolist() == [[[0, 127, 127], [127, 255, 127]]]
    assert dict(lines) == {"left": [0, 127, 127], "right": [255, 127, 127], "up": [127, 255, 127],
                           "down": [127, 0, 127], "to the viewer": [127, 127, 255]}
    colours, lines = kind_of("boundary", 1).picture(np.float32([[[0, 0.5, 1, 255]]]), np.float32([[0]]))
    assert colours.tolist() == [[[0] * 3, [127] * 3, [255] * 3, [224, 224, 192]]]
    assert lines == [("probability 0 to 1", [(0, 0, 0), (255, 255, 255)]), ("unknown", (224, 224, 192))]
    colours, _ = kind_of("disparity", 1).picture(np.float32([[[-1, 0.5]]]), np.float32([[0.5, 4]]))
    assert colours.tolist() == [[[224, 224, 192], [68, 1, 84]]]
    colours, lines = kind_of("semseg", 9).picture(np.uint8([[[0, 1, 8]]]), np.uint8([[255]]))
    assert colours.tolist() == [[[0, 0, 0], [128, 0, 0], [64, 0, 0]]]
    assert [text for text, _ in lines] == ["class 0", "class 1", "class 8", "unknown"]
    assert kind_of("boundary", 1).raw(np.float32([[[0.999, 0.2]]])).tolist() == [[254, 51]]
