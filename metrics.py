"""Metrics of multi-task dense prediction, as NYUDv2 and PASCAL-Context are scored (Table 1 of the paper).

    meters = make_meters({"semseg": 40, "depth": 1})
    for task, meter in meters.items():
        meter.update(outputs[task], targets[task])       # raw outputs (B, C_t, H, W), labels (B, 1 or 3, H, W)
    results = {task: meter.compute() for task, meter in meters.items()}

    counts = sum(boundary_counts_each(pairs, max_dist=0.0075, workers=8))    # (prediction_u8, ground_truth) of images
    odsF = 100 * ods_f(counts)

    delta_m({"semseg": 55.82, ...}, baseline={"semseg": 54.32, ...})

Every metric is one figure over the pixels of the whole data set, never a mean of per-image figures. A meter's state
is two tensors of sums, on the device of what it is fed: they add up over batches, data splits and processes alike, and
no update waits for the device. The boundary score odsF has its own functions.

Reads: delta_m; Meter, a kind of it for each task, and make_meters, which chooses; odsF, from the score down to thinning
and matching; processes beside the main one.
"""

import math
import os
import signal
import threading
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing import get_context, parent_process

import numpy as np
import torch
import torch.nn.functional as F
from scipy import ndimage
from scipy.spatial import KDTree
from torch import Tensor

IGNORE = 255    # marks the pixels of a label that do not count

# The metric by which each task is compared (Table 1), and the tasks where lower is better.
PRIMARY = {"semseg": "mIoU", "parsing": "mIoU", "saliency": "maxF", "normal": "mErr", "boundary": "pixelF",
           "depth": "RMSE"}
LOWER_IS_BETTER = {"normal", "depth"}


def delta_m(results: dict[str, float], baseline: dict[str, float]) -> float:
    """The mean relative improvement over a baseline, in percent; both by task, their primary metrics.

    Delta_m = 100 / T * sum_t (-1)^(l_t) (M_t - S_t) / S_t, l_t = 1 where lower is better. The paper's baseline S for
    NYUDv2 is Table 2's single-task row. Raises ValueError where the tasks differ or a figure of the baseline is 0.
    """
    if not results or results.keys() != baseline.keys():
        raise ValueError(f"delta_m compares the same tasks, found {sorted(results)} against {sorted(baseline)}")
    if not all(baseline.values()):
        raise ValueError(f"delta_m divides by the baseline's figures, found a 0 in {baseline}; take another baseline")
    gains = [(baseline[t] - results[t] if t in LOWER_IS_BETTER else results[t] - baseline[t]) / baseline[t]
             for t in results]
    return 100 * sum(gains) / len(gains)


class Meter:
    """Sums over pixels. update(output, target) adds a batch, compute() gives the metrics by name.

    output: the network's raw output (B, C_t, H, W). target: labels (B, 1 or 3, H, W), 255 where to ignore.
    compute raises ValueError where no pixel has counted yet, an output was not finite or a label cannot be.
    A kind of meter defines count(output, target), a batch's contribution to the sums, and scores(sums).
    """

    task = ""    # set by make_meters

    def __init__(self, *shape: int):
        self.sums = torch.zeros(shape, dtype=torch.float64)    # exact for counts up to 2^53
        self.not_finite = torch.zeros((), dtype=torch.int64)   # how many outputs were nan or infinite

    @torch.no_grad()
    def update(self, output: Tensor, target: Tensor):
        if output.device.type == "mps":    # which has no float64
            output, target = output.cpu(), target.cpu()
        for one, label in zip(output.split(1), target.split(1), strict=True):    # of a batch, the steps would be large
            one = one.float()
            self.sums = self.sums.to(one.device) + self.count(one, label)
            self.not_finite = self.not_finite.to(one.device) + (~one.isfinite()).sum()

    def empty(self) -> bool:
        """Whether no pixel has counted yet."""
        return not self.sums.any()

    def compute(self) -> dict[str, float]:
        if self.not_finite:
            raise ValueError(f"{int(self.not_finite)} of the model's outputs for {self.task} are not finite, so there "
                             "is no score; the training has diverged, or the precision is too low")
        if self.empty():
            raise ValueError(f"no valid pixel of {self.task}, so there is nothing to score; check the labels")
        scores = {name: float(value) for name, value in self.scores(self.sums.cpu()).items()}
        if not all(map(math.isfinite, scores.values())):
            raise ValueError(f"the scores of {self.task} are not finite, {scores}; check the labels' range")
        return scores


def rounded(x: Tensor, bits: int) -> Tensor:
    """To a multiple of 2^-bits: then float64 sums up to 2^(53 - bits) are exact, whatever the order in which batches
    and processes are added, and so is the figure."""
    return torch.round(x * 2**bits) / 2**bits


class SegmentationMeter(Meter):
    """mIoU in percent: the mean over classes of TP / (TP + FP + FN), the background being a class.

    A class that occurs neither in the labels nor in the predictions is left out of the mean.
    Differs: the published implementation counts it as 0. On the full benchmarks every class occurs.
    """

    def __init__(self, classes: int):
        super().__init__(classes + 1, classes)    # [label, prediction]; the last row: labels that there are not
        self.classes = classes

    def count(self, output, target):
        # Ignored pixels go to one more row, which is cut off: indexing by a mask would wait for the device.
        label = torch.where((target >= 0) & (target < self.classes), target, self.classes)
        label = torch.where(target == IGNORE, self.classes + 1, label).long()
        pair = label * self.classes + output.argmax(1, keepdim=True)
        counts = torch.zeros((self.classes + 2) * self.classes, dtype=torch.float64, device=output.device)
        counts.scatter_add_(0, pair.flatten(), torch.ones_like(pair.flatten(), dtype=torch.float64))
        return counts.view(self.classes + 2, self.classes)[:-1]

    def scores(self, sums):
        sums, outside = sums[:-1], int(sums[-1].sum())
        if outside:
            raise ValueError(f"expected labels of {self.task} in 0..{self.classes - 1} or {IGNORE}, found others at "
                             f"{outside} pixels")
        intersection = sums.diag()
        union = sums.sum(0) + sums.sum(1) - intersection
        present = union > 0
        return {"mIoU": 100 * (intersection[present] / union[present]).mean()}


class ThresholdMeter(Meter):
    """Positives among true and false pixels at each of a score's thresholds; a pixel is positive strictly above one."""

    def __init__(self, thresholds: Tensor):
        super().__init__(2, len(thresholds) + 1)    # [false or true pixel, number of thresholds below its score]
        self.thresholds = thresholds

    def histogram(self, score: Tensor, target: Tensor) -> Tensor:
        """score: (B, 1, H, W) -> (2, thresholds + 1)"""
        bins = len(self.thresholds) + 1
        self.thresholds = self.thresholds.to(score.device)    # stays there
        below = torch.bucketize(score.contiguous(), self.thresholds)
        index = torch.where(target == IGNORE, 2 * bins, (target > 0).long() * bins + below)
        counts = torch.zeros(2 * bins + 1, dtype=torch.float64, device=score.device)
        counts.scatter_add_(0, index.flatten(), torch.ones_like(index.flatten(), dtype=torch.float64))
        return counts[:-1].view(2, bins)

    def f_measure(self, sums: Tensor, beta2: float) -> Tensor:
        """(1 + beta^2) P R / (beta^2 P + R) at each threshold, 0 where nothing is found."""
        false_positive, true_positive = sums.flip(1).cumsum(1).flip(1)[:, 1:]
        found = true_positive.clamp(min=1)
        precision = found / (true_positive + false_positive).clamp(min=1)
        recall = found / sums[1].sum().clamp(min=1)
        f = (1 + beta2) * precision * recall / (beta2 * precision + recall)
        return torch.where(true_positive > 0, f, 0)


class SaliencyMeter(ThresholdMeter):
    """maxF in percent: beta^2 = 0.3, the maximum over the thresholds 1/256 .. 255/256 on P(salient).

    maxF_published: the published implementation's figure. It applies a sigmoid to the probability before it compares
    with 0.05, 0.10 .. 0.95; as the result lies within [0.5, 0.73], the other thresholds take all pixels or none.
    """

    def __init__(self):
        uniform = torch.arange(1, 256, dtype=torch.float64) / 256
        published = torch.logit(torch.arange(1, 20, dtype=torch.float64) / 20)
        thresholds, origin = torch.cat([uniform, published]).float().sort()
        super().__init__(thresholds)
        self.is_published = origin >= len(uniform)

    def count(self, output, target):
        return self.histogram(output.softmax(1)[:, 1:], target)

    def scores(self, sums):
        f = 100 * self.f_measure(sums, beta2=0.3)
        return {"maxF": f[~self.is_published].max(), "maxF_published": f[self.is_published].max()}


class BoundaryMeter(ThresholdMeter):
    """pixelF in percent: the best F-measure over the thresholds 1/256 .. 255/256, pixel by pixel.

    A cheap stand-in for odsF, which matches boundaries within a tolerance; the two are not comparable.
    """

    def __init__(self):
        super().__init__(torch.arange(1, 256) / 256)

    def count(self, output, target):
        return self.histogram(output.sigmoid(), target)

    def scores(self, sums):
        return {"pixelF": 100 * self.f_measure(sums, beta2=1).max()}


class NormalMeter(Meter):
    """mErr in degrees: the mean angle between the prediction, scaled to unit length, and the label."""

    def __init__(self):
        super().__init__(2)

    def count(self, output, target):
        valid = (target != IGNORE).all(1)
        p, t = F.normalize(output, dim=1), F.normalize(target.float(), dim=1)
        # Exact also for small angles, where the arc cosine of the product is not.
        angle = torch.rad2deg(2 * torch.atan2((p - t).norm(dim=1), (p + t).norm(dim=1)))
        angle = rounded(angle, bits=16)    # 2^37 degrees, as all of PASCAL-Context can have
        return torch.stack([torch.where(valid, angle, 0).sum(dtype=torch.float64), valid.sum()])

    def scores(self, sums):
        return {"mErr": sums[0] / sums[1]}


class DepthMeter(Meter):
    """RMSE in metres (prediction clamped at 0); abs_rel, sq_rel and log_rmse (prediction floored at 1e-9).

    bounds: (low, high), only pixels with low < target < high count; None for all. Cityscapes' are (0, 80), its depth
    being disparity: then RMSE is in pixels.
    """

    def __init__(self, bounds: tuple[float, float] | None = None):
        super().__init__(5)
        self.bounds = bounds

    def count(self, output, target):
        target = target.float()
        valid = target != IGNORE
        if self.bounds:
            valid = valid & (target > self.bounds[0]) & (target < self.bounds[1])
        target = torch.where(valid, target, 1)
        error = output.clamp(min=0) - target
        floored = output.clamp(min=1e-9)
        terms = (error ** 2, (floored - target).abs() / target, (floored - target) ** 2 / target,
                 (floored.log() - target.log()) ** 2, torch.ones_like(target))
        bits = 16 if self.bounds else 20    # sums up to 2^33 square metres, or 2^37 square pixels of all Cityscapes
        return torch.stack([torch.where(valid, rounded(term, bits), 0).sum(dtype=torch.float64) for term in terms])

    def scores(self, sums):
        squares, relative, relative_squares, log_squares, pixels = sums
        return {"RMSE": (squares / pixels).sqrt(), "abs_rel": relative / pixels, "sq_rel": relative_squares / pixels,
                "log_rmse": (log_squares / pixels).sqrt()}


def make_meters(tasks: dict[str, int], depth_range: tuple[float, float] | None = None) -> dict[str, Meter]:
    """tasks: output channels by task name. depth_range: see DepthMeter. Raises ValueError on a task without a metric or
    a range whose low is not below its high."""
    if depth_range and not depth_range[0] < depth_range[1]:
        raise ValueError(f"expected depth_range (low, high) with low below high, found {depth_range}")
    builders = {"semseg": SegmentationMeter, "parsing": SegmentationMeter, "saliency": lambda _: SaliencyMeter(),
                "normal": lambda _: NormalMeter(), "boundary": lambda _: BoundaryMeter(),
                "depth": lambda _: DepthMeter(depth_range)}
    unknown = [task for task in tasks if task not in builders]
    if unknown:
        raise ValueError(f"no metric for the task {unknown[0]!r}; there are metrics for {', '.join(builders)}")
    meters = {task: builders[task](channels) for task, channels in tasks.items()}
    for task, meter in meters.items():
        meter.task = task
    return meters


# ------------------------------------------------------------------------------------------------------------- odsF
# The SEISM protocol with one ground truth per image. Per image: the prediction, 8 bits per pixel, is thinned to its
# ridges (suppress_non_maxima), cut at 101 THRESHOLDS, and each of the 101 maps is thinned to lines (thin). Predicted
# and true boundary pixels are matched one to one within max_dist of the image's diagonal (match_boundaries). The counts
# are summed over the images, threshold by threshold, and the largest F-measure of the sums is the score (ods_f).

THRESHOLDS = np.array([0.001, *(np.arange(1, 100) / 100), 0.999])


def ods_f(counts: np.ndarray) -> float:
    """The largest F-measure over the thresholds, as a fraction, from boundary_counts summed over the images.

    counts: (thresholds, 4). F = 2 P R / (P + R) of precision P = matched predicted / predicted and recall
    R = matched true / true, without interpolation between thresholds; 0 where nothing is matched, which covers a data
    set without true pixels and a threshold without predicted ones. Raises ValueError on another shape.
    """
    counts = np.asarray(counts)
    if counts.ndim != 2 or counts.shape[1] != 4:
        raise ValueError(f"counts must have the shape (thresholds, 4), found {counts.shape}; sum what boundary_counts "
                         "returns over the images only")
    matched_true, true, matched_predicted, predicted = counts.T
    recall = matched_true / np.maximum(true, 1)
    precision = matched_predicted / np.maximum(predicted, 1)
    total = precision + recall
    return float((2 * precision * recall / np.where(total > 0, total, 1)).max())


def boundary_counts_each(items: Iterable, max_dist: float, workers: int) -> Iterator[np.ndarray]:
    """boundary_counts (101, 4) of each image, in their order, on `workers` processes (0: in this one).

    items: yields the pairs (prediction_u8, ground_truth) and is read only a few images ahead, so it may load or predict
    as it goes. The processes are spawned (a forked copy of a process that uses CUDA or threads may hang), so a script
    calls this under `if __name__ == "__main__":`.
    """
    if workers == 0:
        for prediction, truth in items:
            yield boundary_counts(prediction, truth, max_dist)
        return
    pool = ProcessPoolExecutor(workers, mp_context=get_context("spawn"), initializer=follow_main)
    try:
        pending = deque()
        for prediction, truth in items:
            with signals_waiting():    # a process that this starts needs seconds until it runs follow_main
                pending.append(pool.submit(boundary_counts, prediction, truth, max_dist))
            if len(pending) == 4 * workers:    # enough to keep the processes busy, and little memory
                yield pending.popleft().result()
        for future in pending:
            yield future.result()
    finally:
        pool.shutdown(cancel_futures=True)


def boundary_counts(prediction_u8: np.ndarray, ground_truth: np.ndarray, max_dist: float) -> np.ndarray:
    """Pixels counted at the 101 thresholds: (101, 4) of matched true, true, matched predicted, predicted.

    prediction_u8: (H, W) uint8, the probability times 255, truncated, at the image's own size. ground_truth: (H, W)
    bool, thinned (boundary_ground_truth). max_dist: as a fraction of the diagonal, 0.0075 for PASCAL-Context, 0.011 for
    NYUDv2. Raises ValueError on another dtype, on shapes that differ and on a max_dist outside [0, 1].

    A pixel is on where its suppressed value, in float32, is strictly greater than the threshold in float64, as in the
    reference: 51 / 255 in float32 is a little more than 0.2, and on at the threshold 0.2.
    """
    prediction_u8, ground_truth = np.asarray(prediction_u8), np.asarray(ground_truth, bool)
    if prediction_u8.dtype != np.uint8:
        raise ValueError(f"prediction_u8 must be uint8, found {prediction_u8.dtype}; pass (255 * probability) cast to "
                         "uint8")
    _check_pair(prediction_u8, ground_truth, max_dist)
    value = suppress_non_maxima(prediction_u8)
    active = value > THRESHOLDS[0]
    on = _thin_pixels(value[active] > THRESHOLDS[:, None], active)
    used = on.any(0)
    truths = np.argwhere(ground_truth)
    matchings = _matchings(on[:, used], np.argwhere(active)[used], truths, max_dist * np.hypot(*ground_truth.shape))
    matched = np.array([len(truths) - mates.count(-1) for mates in matchings])
    return np.stack([matched, np.full_like(matched, len(truths)), matched, on.sum(1)], axis=1)


def boundary_ground_truth(label_map: np.ndarray) -> np.ndarray:
    """True boundaries of a label map (H, W): (H, W) bool, boundary_pixels thinned.

    PASCAL-Context: the map of 459 classes, not the training label. NYUDv2: the 0/255 edge image.
    """
    return thin(boundary_pixels(label_map))


def boundary_pixels(label_map: np.ndarray) -> np.ndarray:
    """Where the label of a map (H, W) differs from that of the right, lower or lower-right neighbour: (H, W) bool; the
    last row and column repeat. Raises ValueError on an array that is not 2-dimensional."""
    label_map = np.asarray(label_map)
    if label_map.ndim != 2:
        raise ValueError(f"a label map must have the shape (H, W), found {label_map.shape}; pass one image, without "
                         "batch or channel axes")
    padded = np.pad(label_map, ((0, 1), (0, 1)), mode="edge")
    return (label_map != padded[:-1, 1:]) | (label_map != padded[1:, :-1]) | (label_map != padded[1:, 1:])


def suppress_non_maxima(prediction_u8: np.ndarray) -> np.ndarray:
    """Keeps the ridges of a boundary map: (H, W) uint8 -> (H, W) float32 in [0, 1], 0 where suppressed.

    E is the map in [0, 1]. The direction across a ridge comes from second derivatives of E smoothed by a triangle
    filter of radius 4 (weights 1 .. 5 .. 1, symmetric border): theta = atan(E_yy sign(-E_xy) / (E_xx + 1e-5)). A pixel
    survives where 1.01 E is not smaller than E one pixel to either side along theta, bilinear and clamped to the image.
    Survivors within 5 pixels of a border are multiplied by their distance to it / 5, the outermost being at 0.
    """
    height, width = prediction_u8.shape
    value = prediction_u8.astype(np.float32) / np.float32(255)
    if min(height, width) < 3:    # all pixels lie on a border
        return np.zeros_like(value)
    triangle = np.array([1, 2, 3, 4, 5, 4, 3, 2, 1]) / 25
    smooth = ndimage.correlate1d(ndimage.correlate1d(value, triangle, axis=0, mode="reflect"), triangle, axis=1,
                                 mode="reflect")    # "reflect" is scipy's name of the symmetric border
    dy, dx = np.gradient(smooth)
    dxx = np.gradient(dx, axis=1)
    dyy, dxy = np.gradient(dy)
    theta = np.arctan(dyy * np.sign(-dxy) / (dxx + np.float32(1e-5)))

    y, x = np.nonzero(prediction_u8)
    raised, theta = np.float32(1.01) * value[y, x], theta[y, x]
    for side in (-1, 1):
        aside = (y + side * np.sin(theta), x + side * np.cos(theta))
        keep = raised >= ndimage.map_coordinates(value, aside, order=1, mode="nearest")
        y, x, raised, theta = y[keep], x[keep], raised[keep], theta[keep]
    ridges = np.zeros_like(value)
    ridges[y, x] = value[y, x]
    fade_y, fade_x = (np.minimum(np.minimum(np.arange(n), np.arange(n)[::-1]), 5).astype(np.float32) / 5
                      for n in (height, width))
    return ridges * fade_y[:, None] * fade_x


def thin(maps: np.ndarray) -> np.ndarray:
    """Thins the shapes of each map to lines, until nothing changes: (..., H, W) -> (..., H, W) bool.

    The algorithm of Guo and Hall as in MATLAB's bwmorph(map, "thin", Inf). Let x1 .. x8 be the neighbours of a pixel
    anticlockwise from the right one, x9 = x1, 0 outside the image. Two passes alternate; each deletes at once all
    pixels where
      1. exactly one of the k = 1, 3, 5, 7 has x_k = 0 and x_(k+1) or x_(k+2) = 1: deleting breaks no connection;
      2. 2 <= min(n1, n2) <= 3, n1 counting the true ones of x1|x2, x3|x4, x5|x6, x7|x8, n2 those of x2|x3, x4|x5,
         x6|x7, x8|x9: not the end of a line;
      3. in the first pass not (x1 and (x2 or x3 or not x8)), in the second not (x5 and (x6 or x7 or not x4)).
    """
    maps = np.asarray(maps, bool)
    stack = maps.reshape(-1, *maps.shape[-2:])
    active = stack.any(0)
    thinned = np.zeros_like(stack)
    thinned[:, active] = _thin_pixels(stack[:, active], active)
    return thinned.reshape(maps.shape)


def _thin_pixels(on: np.ndarray, active: np.ndarray) -> np.ndarray:
    """thin for M maps given at the n pixels where active (H, W) is true: (M, n) bool -> (M, n) bool.

    One bit of a word is one map, so that 64 maps take one bitwise operation. A pixel is looked at again only after a
    neighbour's deletion.
    """
    n = on.shape[1]
    index = np.full((active.shape[0] + 2, active.shape[1] + 2), n)    # n: a pixel that is off in all maps
    index[1:-1, 1:-1][active] = np.arange(n)
    y, x = np.nonzero(active)
    around = ((0, 1), (-1, 1), (-1, 0), (-1, -1), (0, -1), (1, -1), (1, 0), (1, 1))
    neighbours = np.stack([index[y + 1 + dy, x + 1 + dx] for dy, dx in around])            # (8, n)
    bits = np.zeros((-(-len(on) // 64), n + 1), np.uint64)                                 # (words, n + 1)
    for i, row in enumerate(on):
        bits[i // 64, :n] |= row.astype(np.uint64) << np.uint64(i % 64)

    changed = np.ones((2, n + 1), bool)    # pixels next to a deletion since the first or second pass last ran
    step = 0
    while changed[:, :n].any():
        todo = np.flatnonzero(changed[step, :n])
        changed[step] = False
        todo = todo[bits.take(todo, axis=1).any(0)]
        deleted = bits.take(todo, axis=1) & _deletable(bits.take(neighbours[:, todo], axis=1), step)
        bits[:, todo] ^= deleted
        changed[:, neighbours[:, todo[deleted.any(0)]]] = True
        step = 1 - step

    thinned = np.empty_like(on)
    for i in range(len(on)):
        thinned[i] = (bits[i // 64, :n] & np.uint64(1 << i % 64)) != 0
    return thinned


def _deletable(neighbours: np.ndarray, step: int) -> np.ndarray:
    """The three conditions of thin, bit by bit. neighbours: (words, 8, n), x1 .. x8; step: 0 or 1, the pass."""
    x1, x2, x3, x4, x5, x6, x7, x8 = neighbours.swapaxes(0, 1)
    a, b, c, d = ~x1 & (x2 | x3), ~x3 & (x4 | x5), ~x5 & (x6 | x7), ~x7 & (x8 | x1)
    exactly_one = (a ^ b) & ~(c | d) | (c ^ d) & ~(a | b)
    two_of_n1, four_of_n1 = _two_or_four(x1 | x2, x3 | x4, x5 | x6, x7 | x8)
    two_of_n2, four_of_n2 = _two_or_four(x2 | x3, x4 | x5, x6 | x7, x8 | x1)
    kept_side = x1 & (x2 | x3 | ~x8) if step == 0 else x5 & (x6 | x7 | ~x4)
    return exactly_one & two_of_n1 & two_of_n2 & ~(four_of_n1 & four_of_n2) & ~kept_side


def _two_or_four(a: np.ndarray, b: np.ndarray, c: np.ndarray, d: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Bit by bit: whether at least two are set, and whether all four are."""
    both_ab, both_cd = a & b, c & d
    return both_ab | both_cd | (a | b) & (c | d), both_ab & both_cd


def match_boundaries(prediction: np.ndarray, target: np.ndarray, max_dist: float) -> tuple[np.ndarray, np.ndarray]:
    """The largest one-to-one matching of predicted with true boundary pixels: (matched_prediction, matched_target).

    prediction, target: (H, W) bool, as are the results, which have equally many true pixels. Two pixels may be matched
    where their Euclidean distance is at most max_dist * sqrt(H^2 + W^2). Raises ValueError on shapes that differ and on
    a max_dist outside [0, 1].
    Differs: the SEISM protocol's matcher solves a minimum-cost assignment to which it adds random outlier edges, so
    its counts vary by a few pixels from run to run. They never exceed this exact and deterministic maximum.
    """
    prediction, target = np.asarray(prediction, bool), np.asarray(target, bool)
    _check_pair(prediction, target, max_dist)
    points, truths = np.argwhere(prediction), np.argwhere(target)
    everything_on = np.ones((1, len(points)), bool)
    mates = np.array(next(_matchings(everything_on, points, truths, max_dist * np.hypot(*target.shape))), int)
    matched_prediction, matched_target = np.zeros_like(prediction), np.zeros_like(target)
    matched_prediction[tuple(points[mates[mates >= 0]].T)] = True
    matched_target[tuple(truths[mates >= 0].T)] = True
    return matched_prediction, matched_target


def _matchings(on: np.ndarray, points: np.ndarray, truths: np.ndarray, radius: float) -> Iterator[list[int]]:
    """For each of M maps a largest matching within radius: every truth's point, -1 without one (one list, reused).

    on: (M, points) bool, the points in each map; points, truths: (.., 2) pixel coordinates.
    Each matching starts from the one before, as neighbouring thresholds differ little. First the points that went are
    taken out: an augmenting path can then only begin at a truth that lost its point. With those searched, the new
    points come in, and a path can only begin at one of them. Taking both steps at once would miss pairs.
    """
    point_tree, truth_tree = KDTree(points), KDTree(truths)
    near_truth = truth_tree.query_ball_tree(point_tree, radius)
    near_point = point_tree.query_ball_tree(truth_tree, radius)
    truth_mates, point_mates = [-1] * len(truths), [-1] * len(points)
    before = np.zeros(len(points), bool)
    for now in on:
        bereft = [point_mates[point] for point in np.flatnonzero(before & ~now).tolist() if point_mates[point] >= 0]
        for truth in bereft:
            point_mates[truth_mates[truth]] = -1
            truth_mates[truth] = -1
        closed = bytearray((~(before & now)).tobytes())
        for truth in bereft:
            _extend(truth, near_truth, truth_mates, point_mates, closed)
        closed = bytearray(len(truths))
        for point in np.flatnonzero(now & ~before).tolist():
            _extend(point, near_point, point_mates, truth_mates, closed)
        yield truth_mates
        before = now


def _extend(start: int, near: list[list[int]], mates: list[int], far_mates: list[int], closed: bytearray):
    """Adds a pair to the matching, in place, if an augmenting path leads from the unmatched node start to the far side.

    near: per node of start's side its neighbours on the far side; mates, far_mates: the partners on either side, or -1;
    closed: 1 for the far nodes to leave out. Where the breadth-first search fails it leaves what it reached closed,
    for no later augmenting path can pass through.
    """
    reached_from = {}
    queue = [start]
    for node in queue:
        for far in near[node]:
            if closed[far]:
                continue
            closed[far] = 1
            reached_from[far] = node
            if far_mates[far] >= 0:
                queue.append(far_mates[far])
                continue
            for other in reached_from:
                closed[other] = 0
            while far >= 0:    # exchange the pairs along the path, back to start
                node = reached_from[far]
                far_mates[far] = node
                mates[node], far = far, mates[node]
            return


def _check_pair(prediction: np.ndarray, target: np.ndarray, max_dist: float):
    if prediction.ndim != 2 or prediction.shape != target.shape:
        raise ValueError(f"expected a prediction and a ground truth of one shape (H, W), found {prediction.shape} and "
                         f"{target.shape}; crop the padding off the prediction and resize it to the image")
    if not 0 <= max_dist <= 1:
        raise ValueError(f"max_dist is a fraction of the image's diagonal, from 0 to 1, found {max_dist}; divide "
                         "pixels by sqrt(H^2 + W^2)")


# ------------------------------------------------------------------------------------ processes beside the main one

SIGNALS = [getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGHUP", "SIGUSR1") if hasattr(signal, name)]


def follow_main(*_):
    """The first thing that a process of a pool or a loader does. Ctrl-C and a cluster's signals reach it, too: what
    they mean is for the main process to decide, with which this one ends, even where that is killed."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    if main := parent_process():
        threading.Thread(target=lambda: (main.join(), os._exit(1)), daemon=True).start()


@contextmanager
def signals_waiting():
    """Signals arrive after it; a process that is started in it inherits that they wait."""
    if not hasattr(signal, "pthread_sigmask"):    # Windows, which sends none
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
