"""odsF against the original C++ matcher's results (data/boundary_*.npz), brute force and hand-computed cases."""

from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest

from datasets import Helpers
from metrics import (
    THRESHOLDS,
    OdsMeter,
    boundary_counts,
    boundary_ground_truth,
    match_boundaries,
    ods_f,
    suppress_non_maxima,
    thin,
)

DATA = Path(__file__).parent / "data"
CHAIN = np.load(DATA / "boundary_chain.npz")
PAIRS = np.load(DATA / "boundary_pairs.npz")
PROTOCOLS = {"pascal": (0, "seg", 0.0075), "nyud": (1, "edge_u8", 0.011)}    # row of the counts, source, max_dist


@pytest.fixture(scope="module")
def chain_counts():
    """boundary_counts of the two recorded images under both protocols, by protocol: (2, 101, 4)."""
    return {name: np.stack([boundary_counts(CHAIN[f"{i}_pred_u8"], CHAIN[f"{i}_gt_{name}"], max_dist) for i in "01"])
            for name, (_, _, max_dist) in PROTOCOLS.items()}


@pytest.mark.parametrize("image", "01")
@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_ground_truth_is_the_reference(protocol, image):
    _, source, _ = PROTOCOLS[protocol]
    truth = boundary_ground_truth(CHAIN[f"{image}_{source}"])
    np.testing.assert_array_equal(truth, CHAIN[f"{image}_gt_{protocol}"])


@pytest.mark.paper("Table 1", against="the original C++ matcher, odsF")
@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_counts_agree_with_the_reference(protocol, chain_counts, compare):
    row, _, _ = PROTOCOLS[protocol]
    found, reference = chain_counts[protocol], np.stack([CHAIN[f"{i}_counts"][row] for i in "01"])
    np.testing.assert_array_equal(THRESHOLDS, CHAIN["thr"])
    np.testing.assert_array_equal(found[..., 1], reference[..., 1])
    # Another machine's arctangent may move a pixel. At 0.2 and 0.4 comparing in float32 would be off by 30 pixels.
    assert np.abs(found[..., 3] - reference[..., 3]).max() <= 2
    # The reference's matching falls a few pixels short of the largest.
    missed = found[..., 0] - reference[..., 0]
    assert missed.min() >= -2 and missed.max() <= 8
    np.testing.assert_array_equal(found[..., 0], found[..., 2])
    compare(ods_f(found.sum(0)), CHAIN["ref_odsF"][row], rtol=0, atol=1e-3)
    assert ods_f(reference.sum(0)) == pytest.approx(CHAIN["ref_odsF"][row], abs=1e-9)


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_matching_from_the_threshold_before_loses_nothing(protocol, chain_counts):
    _, _, max_dist = PROTOCOLS[protocol]
    for i, counts in zip("01", chain_counts[protocol]):
        maps = thin(suppress_non_maxima(CHAIN[f"{i}_pred_u8"]) > THRESHOLDS[:, None, None])
        np.testing.assert_array_equal(maps.sum((1, 2)), counts[:, 3])
        alone = [match_boundaries(each, CHAIN[f"{i}_gt_{protocol}"], max_dist)[1].sum() for each in maps]
        np.testing.assert_array_equal(alone, counts[:, 0])


@pytest.mark.parametrize("pair", range(12))
def test_matched_counts_are_the_recorded_maxima(pair):
    for max_dist, maximum in zip(PAIRS["max_dist"], PAIRS["max_cardinality"][pair]):
        matched_prediction, matched_target = match_boundaries(PAIRS["pred"][pair], PAIRS["gt"][pair], max_dist)
        assert matched_prediction.sum() == matched_target.sum() == maximum


def largest_matching(prediction, target, max_dist):
    """The size of the largest one-to-one matching within max_dist, by Kuhn's algorithm."""
    points, targets = np.argwhere(prediction), np.argwhere(target)
    squared = ((points[:, None] - targets) ** 2).sum(-1)
    near = [np.flatnonzero(row).tolist() for row in squared <= max_dist ** 2 * (np.array(target.shape) ** 2).sum()]
    owner = {}

    def place(point, tried):
        for t in near[point]:
            if t not in tried:
                tried.add(t)
                if t not in owner or place(owner[t], tried):
                    owner[t] = point
                    return True
        return False

    return sum(place(point, set()) for point in range(len(points)))


@pytest.mark.parametrize("seed", range(40))
def test_matching_against_brute_force(seed):
    rng = np.random.default_rng(seed)
    shape = rng.integers(4, 15, 2)
    prediction, target = rng.random(shape) < rng.uniform(0, 0.7), rng.random(shape) < rng.uniform(0, 0.7)
    max_dist = rng.uniform(0, 0.3)
    matched_prediction, matched_target = match_boundaries(prediction, target, max_dist)
    assert matched_prediction.dtype == matched_target.dtype == bool
    assert not (matched_prediction & ~prediction).any() and not (matched_target & ~target).any()
    maximum = largest_matching(prediction, target, max_dist)
    assert matched_prediction.sum() == matched_target.sum() == maximum
    # The matched pixels can be paired one to one within the distance.
    assert largest_matching(matched_prediction, matched_target, max_dist) == maximum


def test_matching_is_one_to_one_and_within_the_distance():
    prediction, target = np.zeros((2, 30, 40), bool)    # diagonal 50
    target[10, 10] = prediction[10, 12] = prediction[10, 13] = prediction[12, 10] = True
    for max_dist, count in ((0.039, 0), (0.041, 1), (1, 1)):
        matched_prediction, matched_target = match_boundaries(prediction, target, max_dist)
        assert matched_prediction.sum() == matched_target.sum() == count
    assert match_boundaries(target, target, 0)[0].sum() == 1


def thin_pixel_by_pixel(image):
    """Guo and Hall's thinning, one pixel after the other."""
    image = np.pad(image.astype(int), 1)
    changing = True
    while changing:
        changing = False
        for step in (0, 1):
            deleted = []
            for y, x in np.argwhere(image):
                n = [None] + [image[y + dy, x + dx] for dy, dx in
                              ((0, 1), (-1, 1), (-1, 0), (-1, -1), (0, -1), (1, -1), (1, 0), (1, 1), (0, 1))]
                crossings = sum(n[k] == 0 and (n[k + 1] == 1 or n[k + 2] == 1) for k in (1, 3, 5, 7))
                n1 = sum(n[k] or n[k + 1] for k in (1, 3, 5, 7))
                n2 = sum(n[k] or n[k + 1] for k in (2, 4, 6, 8))
                side = (n[2] or n[3] or not n[8]) and n[1] if step == 0 else (n[6] or n[7] or not n[4]) and n[5]
                if crossings == 1 and 2 <= min(n1, n2) <= 3 and not side:
                    deleted.append((y, x))
            for pixel in deleted:
                image[pixel] = 0
            changing |= bool(deleted)
    return image[1:-1, 1:-1].astype(bool)


@pytest.mark.parametrize("density", [0.3, 0.6, 0.8, 0.95, 1])
def test_thinning_against_pixel_by_pixel(density):
    maps = np.random.default_rng(0).random((70, 13, 17)) < density    # more maps than a word has bits
    thinned = thin(maps)
    np.testing.assert_array_equal(thinned[::7], [thin_pixel_by_pixel(image) for image in maps[::7]])
    np.testing.assert_array_equal(thinned, [thin(image) for image in maps])
    np.testing.assert_array_equal(thinned, thin(maps.reshape(7, 10, 13, 17)).reshape(70, 13, 17))


def test_thinned_maps_are_subsets_and_stay():
    maps = suppress_non_maxima(CHAIN["0_pred_u8"]) > THRESHOLDS[:, None, None]
    thinned = thin(maps)
    assert not (thinned & ~maps).any()
    assert thinned.sum() < maps.sum()
    np.testing.assert_array_equal(thin(thinned), thinned)


def test_ground_truth_by_hand():
    labels = np.zeros((6, 8), np.uint8)
    labels[:, 5:] = 1
    expected = np.zeros((6, 8), bool)
    expected[:, 4] = True
    np.testing.assert_array_equal(boundary_ground_truth(labels), expected)
    assert not boundary_ground_truth(np.full((5, 5), 7)).any()


@pytest.mark.parametrize("slope", [-1, -0.4, 0, 0.4, 1])
def test_suppression_keeps_ridges(slope):
    y, x = np.mgrid[:61, :61]
    distance = (x - 30 - slope * (y - 30)) / np.hypot(1, slope)
    kept = suppress_non_maxima((200 * np.exp(-distance ** 2 / 18)).astype(np.uint8))
    assert kept.dtype == np.float32
    inside = (slice(5, -5), slice(5, -5))
    assert np.abs(distance[inside][kept[inside] > 0.1]).max() < 1
    assert (kept[inside] > 0.1).any(1).all()


def test_suppression_fades_towards_the_border():
    kept = suppress_non_maxima(np.full((12, 30), 255, np.uint8))
    fade_y, fade_x = (np.minimum(np.minimum(np.arange(n), np.arange(n)[::-1]), 5) / 5 for n in (12, 30))
    np.testing.assert_allclose(kept, np.outer(fade_y, fade_x), rtol=1e-6)


def test_a_pixel_is_on_strictly_above_the_threshold():
    truth = np.zeros((40, 40), bool)
    # 51 / 255 in float32 is a little more than 0.2, THRESHOLDS[20].
    on = {level: boundary_counts(np.full((40, 40), level, np.uint8), truth, 0.1)[:, 3] > 0
          for level in (0, 50, 51, 255)}
    assert not on[0].any()
    assert on[50][:20].all() and not on[50][20:].any()
    assert on[51][:21].all() and not on[51][21:].any()
    assert on[255].all()


@pytest.mark.parametrize("shape", [(1, 1), (1, 9), (2, 2), (3, 3), (4, 30)])
def test_tiny_images(shape):
    prediction = np.full(shape, 255, np.uint8)
    truth = boundary_ground_truth(np.arange(np.prod(shape)).reshape(shape))
    counts = boundary_counts(prediction, truth, 1)
    on = thin(suppress_non_maxima(prediction) > THRESHOLDS[:, None, None]).sum((1, 2))
    assert (on[0] > 0) == (min(shape) > 2)    # the outermost pixels are faded to 0
    np.testing.assert_array_equal(counts[:, 3], on)
    np.testing.assert_array_equal(counts[:, 1], truth.sum())
    np.testing.assert_array_equal(counts[:, 0], np.minimum(on, truth.sum()))    # at max_dist 1 any pair is near enough


def test_nothing_predicted_or_nothing_true():
    prediction, truth = CHAIN["0_pred_u8"], CHAIN["0_gt_pascal"]
    no_prediction, no_truth = np.zeros_like(prediction), np.zeros_like(truth)
    np.testing.assert_array_equal(boundary_counts(no_prediction, truth, 0.0075), [[0, truth.sum(), 0, 0]] * 101)
    np.testing.assert_array_equal(boundary_counts(no_prediction, no_truth, 0.0075), np.zeros((101, 4)))
    counts = boundary_counts(prediction, no_truth, 0.0075)
    assert not counts[:, :3].any() and counts[:, 3].all()
    for a, b in ((truth, no_truth), (no_truth, truth), (no_truth, no_truth)):
        assert not np.any(match_boundaries(a, b, 0.0075))


def test_ods_f_by_hand():
    assert ods_f([[3, 4, 3, 6], [2, 4, 2, 2], [0, 4, 0, 0]]) == pytest.approx(2 / 3)    # 2 * 2 / (4 + 2)
    assert ods_f([[0, 0, 0, 5], [0, 3, 0, 0], [0, 0, 0, 0]]) == 0


@pytest.mark.parametrize("workers, waiting, repeats", [(0, 0, 1), (1, 4, 3), (2, 8, 1)])    # more than wait; fewer
def test_the_meter_adds_up_the_images_counts(workers, waiting, repeats, chain_counts, forked_pools):
    expected = repeats * chain_counts["pascal"].sum(0)
    with Helpers(workers) if workers else nullcontext() as helpers:
        meter = OdsMeter(0.0075, helpers, waiting)
        for i in "01" * repeats:
            meter.update(CHAIN[f"{i}_pred_u8"], CHAIN[f"{i}_gt_pascal"])
            assert len(meter.pending) <= waiting
        assert meter.compute()["odsF"] == 100 * ods_f(expected)
    np.testing.assert_array_equal(meter.counts[:-1], expected)


@pytest.mark.parametrize("best", [0, -1])
def test_the_first_and_the_last_threshold_count(best):
    counts = np.tile([1, 2, 1, 2], (len(THRESHOLDS), 1))
    counts[best] = 2
    meter = OdsMeter(0.0075, None, 1)
    meter.pending.append(lambda: counts)
    scores = meter.compute()
    assert scores["odsF"] == scores["oisF"] == 100


def test_ois_and_ap_by_hand():
    """As BSDS defines them: OIS of each image's best threshold, AP of precision at recalls 0, 0.01 .. 1."""
    def images():
        rng = np.random.default_rng(0)
        for _ in range(5):
            matched = np.sort(rng.integers(0, 80, 101))[::-1]
            yield np.stack([matched, np.full(101, 90), matched, matched + np.sort(rng.integers(0, 60, 101))[::-1]], 1)

    meter, best, total = OdsMeter(0.0075, None, 9), np.zeros(4), np.zeros((101, 4))
    for counts in images():
        meter.pending.append(lambda counts=counts: counts)
        f = [2 * a / d * c / b / max(a / d + c / b, 1e-9) if d else 0 for c, b, a, d in counts]
        best, total = best + counts[int(np.argmax(f))], total + counts
    scores = meter.compute()
    recall, precision = best[0] / best[1], best[2] / best[3]
    assert scores["oisF"] == pytest.approx(100 * 2 * precision * recall / (precision + recall))
    assert scores["oisF"] >= scores["odsF"] == pytest.approx(100 * ods_f(total))
    curve = {}
    for a, b, c, d in total:
        curve.setdefault(a / b, c / d)
    recalls, area = sorted(curve), 0
    for i in range(101):
        for low, high in zip(recalls, recalls[1:]):
            if low <= i / 100 <= high:
                area += (curve[low] + (curve[high] - curve[low]) * (i / 100 - low) / (high - low)) / 100
                break
    assert scores["AP"] == pytest.approx(100 * area)


def test_errors_say_what_to_do(forked_pools):
    prediction, truth = np.zeros((6, 8), np.uint8), np.zeros((6, 8), bool)
    with pytest.raises(ValueError, match=r"found \(6, 8\) and \(6, 7\); crop"):
        boundary_counts(prediction, truth[:, 1:], 0.0075)
    with pytest.raises(ValueError, match=r"found \(1, 6, 8\) and \(1, 6, 8\)"):
        match_boundaries(truth[None], truth[None], 0.0075)
    with pytest.raises(ValueError, match="uint8, found float64"):
        boundary_counts(prediction / 255, truth, 0.0075)
    with pytest.raises(ValueError, match="diagonal, from 0 to 1, found 4.3"):
        match_boundaries(truth, truth, 4.3)
    with pytest.raises(ValueError, match=r"\(thresholds, 4\), found \(2, 101, 4\)"):
        ods_f(np.zeros((2, 101, 4)))
    with pytest.raises(ValueError, match="uint8, found float64"):    # as it comes back from another process
        with Helpers(1) as helpers:
            helpers.submit(boundary_counts, prediction / 255, truth, 0.0075).result()
