"""The kinds of tasks, the table of tasks, and the metrics of multi-task dense prediction (Table 1).

    meters = make_meters({"semseg": 40, "depth": 1})
    for task, meter in meters.items():
        meter.update(outputs[task], targets[task])       # raw outputs (B, C_t, H, W), labels (B, 1 or C_t, H, W)
    results = {task: meter.compute() for task, meter in meters.items()}

    counts = sum(boundary_counts(u8, truth, max_dist=0.0075) for u8, truth in images)
    odsF = 100 * ods_f(counts)

    delta_m({"semseg": 55.82, ...}, baseline={"semseg": 54.32, ...})

Every metric is one figure over all pixels of the data set, never a mean over images. A meter's state is sums, which add
up over batches and processes. No update waits for the device. The boundary score odsF has functions of its own.
"""

# Order: the base of all kinds; the kinds; the table of tasks, and Labels; Meter and delta_m; odsF, from the score down.

import abc
import copy
import importlib
import inspect
import json
import math
import numbers
import os
import re
import sys
from collections import deque
from collections.abc import Collection, Iterator, Mapping
from concurrent.futures import Executor
from dataclasses import asdict, dataclass, field
from functools import cached_property, partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from scipy import ndimage
from scipy.spatial import KDTree
from torch import Tensor

IGNORE = 255    # unknown pixels in maps of classes. In maps of numbers they are NaN.


class Unfit(ValueError):
    """A file or an array holds something else than it should. datasets.about adds which one."""


def expect(condition: bool, expected: str, found: object, advice: str = ""):
    """Raises Unfit unless the condition holds. found: if it is an array, the message shows its first value."""
    if not condition:
        found = found.flat[0] if isinstance(found, np.ndarray) else found
        raise Unfit(f"expected {expected}, found {found}{'; ' if advice else ''}{advice}")


class Kind(abc.ABC):
    """A kind of task: its loss, predictions and scores, the form of its label, its picture. An instance is one task.

    For a kind of your own, subclass it in the file of your data set, whose TASKS then has {"flow": (Flow, 2)}. Define
    metrics, shape, loss, count and scores. The other methods are those of plain numbers: labels are floats (C, h, w),
    NaN where unknown, and augmentation moves them but does not change them.
    """

    metrics: tuple[str, ...] = ()    # the primary one first; the next one counts where that is not computed
    lower_is_better = False
    unit, digits = "", 2             # of the primary metric; the unit of numbers is also that of their values
    weight = 1.0                     # of the loss with --loss weighted, as usual in the multi-task literature
    shape: tuple[int, ...] = ()      # of the sums from which the scores are computed
    limits = 1, IGNORE               # the fewest and most output channels
    unknown, dtype = math.nan, torch.float32    # of labels
    stored, suffix = np.float32, ".npy"         # the labels' type before augmentation; of files of raw predictions
    scaling = 0                      # of values where the image is enlarged: 1 multiplies by the factor, -1 divides
    binary = False                   # whether the label says yes (1) or no (0)

    def __init__(self, task: str, channels: int, labels: "Labels"):
        self.task, self.channels, self.labels = task, channels, labels
        self.title, self.unit = labels.titles.get(task, task), labels.units.get(task, self.unit)

    @abc.abstractmethod
    def loss(self, output: Tensor, target: Tensor, valid: Tensor) -> Tensor:
        """The loss of each pixel, (B, H, W). output: raw (B, C, H, W); target: labels (B, 1 or C, H, W), 0 where
        unknown; valid: (B, H, W), where they are known. Other pixels' losses are not used."""

    def predict(self, output: Tensor) -> Tensor:
        """Raw output (B, C, H, W) -> a map in the form of the label, with the probability in place of yes and no."""
        return output

    def probability(self, output: Tensor) -> Tensor | None:
        """Raw output -> the probability of each class, (B, C, H, W), or of yes, (B, 1, H, W), where there is one."""
        return None

    @abc.abstractmethod
    def count(self, prediction: Tensor, target: Tensor, valid: Tensor) -> Tensor:
        """What an image adds to the sums, float64. prediction: of predict; target and valid: as in loss."""

    @abc.abstractmethod
    def scores(self, sums: Tensor) -> dict[str, Tensor]:
        """The metrics by name."""

    def primary(self, scores: Collection[str], odsf: bool = True) -> str:
        """The metric by which the task is compared, among those that were computed. odsf=False: other than odsF."""
        return next(metric for metric in self.metrics if metric in scores and (odsf or metric != "odsF"))

    def valid(self, target: Tensor) -> Tensor:
        """Where labels (B, 1 or C, H, W) are known: bool (B, H, W)."""
        return ~target.isnan().any(1)

    def image_losses(self, output: Tensor, target: Tensor) -> Tensor:
        """The loss of each image, (B,): the mean over its valid pixels, in float32. An image without a valid pixel has
        loss 0 and no gradient. Images share nothing: the published runs had one image in each of 8 processes."""
        valid = self.valid(target)
        loss = self.loss(output.float(), known(target, valid), valid)                         # (B, H, W)
        return torch.where(valid, loss, 0).sum((1, 2)) / valid.sum((1, 2)).clamp(min=1)

    def check(self, label: np.ndarray | None, size: tuple[int, int]) -> np.ndarray:
        """A label as it is read (None: unknown everywhere) -> an array (1 or C, h, w) of the type `stored`. size: its
        (h, w). Raises Unfit for another shape, kind of number or range."""
        channels = 1 if self.unknown == IGNORE else self.channels
        shape = (channels, *size)
        if label is None:
            return np.full(shape, self.unknown, self.stored)
        label, usual = np.asarray(label), shape[channels == 1:]
        expect(label.shape in (shape, usual), f"the shape {usual}, as the image", label.shape)
        return self.check_values(label.reshape(shape))

    def check_values(self, label: np.ndarray) -> np.ndarray:
        expect(label.dtype.kind == "f", "floats, NaN where unknown", label.dtype)
        expect(not np.isinf(label).any(), "finite numbers, or NaN where unknown", "inf")
        return label.astype(np.float32, copy=False)

    def augment(self, label: np.ndarray, scale: float, flipped: bool) -> np.ndarray:
        """The values of a label (1 or C, h, w) whose image was enlarged by `scale` and, if flipped, mirrored, as its
        pixels already are. The array may be changed."""
        scale = np.float32(scale)
        return label / scale if self.scaling < 0 else label * scale if self.scaling > 0 else label

    def examples(self, label: np.ndarray) -> np.ndarray:
        """Some values of a label (1 or C, h, w), as `check` returns it: (1 or C, n)."""
        return label.reshape(len(label), -1)[:, ::max(1, label[0].size // 256)]

    def remarks(self, values: np.ndarray, flips: bool) -> list[str]:
        """What its owner should look at in a whole split. values: all examples, (1 or C, n); flips: whether training
        mirrors images."""
        learned = self.teaches(torch.from_numpy(values)[None]).any()
        return [] if learned else [f"no {'positive ' * self.binary}pixel has a label"]

    def teaches(self, target: Tensor) -> Tensor:
        """The pixels without which a label teaches nothing."""
        return self.valid(target)

    def resize(self, values: Tensor, size: tuple[int, int]) -> Tensor:
        """A map (1 or C, h, w) at another size (h', w')."""
        return F.interpolate(values[None], size, mode="bilinear")[0]

    def confusion(self, sums: Tensor) -> dict | None:
        """The confusion matrix in the sums, [label][prediction], and what its rows are called, where there is one."""
        return None

    def describe(self) -> dict:
        """What a program that runs an exported model has to know of a map."""
        return dict(kind=type(self).__name__.lower())

    def raw(self, values: np.ndarray, label_ids: bool = False) -> np.ndarray:
        """A map as it is stored: uint8 (h, w), for a PNG, or floats (h, w) or (C, h, w). label_ids: of Labels."""
        return values[0] if len(values) == 1 else values

    def picture(self, values: np.ndarray, shown: np.ndarray) -> tuple[np.ndarray, list[tuple]]:
        """A map (1 or C, h, w) -> its colours, uint8 (h, w, 3), and the lines of its legend, (text, a colour or a bar's
        colours). shown: all values that the legend is for, (1 or C, n): the images of a sheet have one legend."""
        colours, lines = self.paint(values, shown)
        unknown, others = (~self.valid(torch.from_numpy(map)[None])[0].numpy() for map in (values, shown))
        colours = np.where(unknown[..., None], UNKNOWN, np.nan_to_num(colours)).astype(np.uint8)
        return colours, lines + [("unknown", UNKNOWN)] * bool(unknown.any() or others.any())

    def paint(self, values: np.ndarray, shown: np.ndarray) -> tuple[np.ndarray, list[tuple]]:
        """picture, but for unknown pixels."""
        values, shown = (map[0] if len(map) == 1 else np.linalg.norm(map, axis=0) for map in (values, shown))
        found = shown if np.isfinite(shown).any() else values
        found = found[~np.isnan(found)]
        low, high = (float(found.min()), float(found.max())) if found.size else (0.0, 1.0)
        return colour_map(values, low, high), [(f"{low:.2f} to {high:.2f}{self.unit}", COLOUR_MAP)]


def known(target: Tensor, valid: Tensor) -> Tensor:
    """Labels with 0 where they are unknown: NaN times 0 would be NaN, also in gradients."""
    return torch.where(valid[:, None], target, 0)


def colour_map(values: np.ndarray, low: float, high: float) -> np.ndarray:
    """(...) -> uint8 (..., 3), from the first to the last colour of COLOUR_MAP."""
    anchors = np.linspace(0, 255, len(COLOUR_MAP))
    table = np.stack([np.interp(range(256), anchors, channel) for channel in COLOUR_MAP.T], axis=1)
    position = np.clip((values - low) / max(high - low, 1e-6), 0, 1)
    return np.uint8(table)[np.uint8(255 * np.nan_to_num(position))]


# Anchors of a perceptually uniform colour map, dark blue over green to yellow.
COLOUR_MAP = np.array([(68, 1, 84), (70, 50, 126), (54, 92, 141), (39, 127, 142), (31, 161, 135), (74, 193, 109),
                       (160, 218, 57), (253, 231, 37)])
UNKNOWN = 224, 224, 192    # of PASCAL VOC's colours; black is a class, or the probability 0


def rounded(x: Tensor, bits: int) -> Tensor:
    """x to a multiple of 2^-bits. Sums of such numbers are exact in float64 up to 2^(53 - bits), so the figure does not
    depend on the order in which batches and processes are added."""
    return torch.round(x * 2**bits) / 2**bits


def totals(terms: tuple, valid: Tensor, bits: int) -> Tensor:
    """The sum of each term, rounded, over the valid pixels: float64 (terms,)."""
    return torch.stack([torch.where(valid, rounded(term, bits), 0).sum(dtype=torch.float64) for term in terms])


def histogram(index: Tensor, valid: Tensor, bins: int) -> Tensor:
    """How often each of 0..bins-1 occurs among the valid pixels, float64 (bins,). Unlike bincount and indexing by a
    mask, this does not wait for the device."""
    counts = torch.zeros(bins, dtype=torch.float64, device=index.device)
    return counts.scatter_add_(0, index.flatten(), valid.flatten().double())


# ---------------------------------------------------------------------------------------------------- kinds of tasks

class Marked(Kind):
    """The base of the kinds whose labels are classes: integers (h, w) or (1, h, w), IGNORE where unknown."""

    unit = " %"
    unknown, dtype, stored, suffix = IGNORE, torch.int64, np.uint8, ".png"

    def valid(self, target):
        return (target != IGNORE).all(1)

    def check_values(self, label):
        last = max(self.channels - 1, 1)
        expect(label.dtype.kind in ("uibf" if self.dtype.is_floating_point else "uib"), "integers", label.dtype)
        wrong = (label < 0) | (label > last) & (label != IGNORE) | (label != np.floor(label))
        expect(not wrong.any(), f"classes in 0..{last} or {IGNORE}", label[wrong])
        return label.astype(np.uint8)

    def examples(self, label):
        return np.unique(label)[None]    # all of them


class Classes(Marked):
    """Cross-entropy. mIoU in percent: the mean over classes of IoU = TP / (TP + FP + FN). The background is a class.
    Also the share of pixels that are right, the mean of that share over classes, and each class's IoU.

    Differs: a class that occurs neither in the labels nor in the predictions is left out of the means. The published
    implementation counts it as 0. On the full benchmarks every class occurs.
    """

    metrics = ("mIoU",)
    limits = 2, IGNORE

    def __init__(self, task, n, labels):
        super().__init__(task, n, labels)
        self.names = list(labels.classes.get(task) or [f"class {i}" for i in range(n)])
        self.shape = n + 1, n    # [label, prediction]; the last row: labels out of range
        self.label_ids, colours = labels.label_ids.get(task), labels.colours.get(task)
        pairs = labels.flip_pairs.get(task, ())
        expect(len(self.names) == len(set(self.names)) == n, f"{n} different names in CLASSES[{task!r}]", self.names)
        for table, found, shape in ("COLOURS", colours, (n, 3)), ("LABEL_IDS", self.label_ids, (n,)):
            fits = found is None or np.shape(found) == shape and np.isin(found, range(256)).all()
            expect(fits, f"numbers of 0..255, of the shape {shape}, in {table}[{task!r}]", found)
        named = all(len(pair) == 2 and {*pair} <= {*self.names} for pair in pairs)
        expect(named, f"pairs of names from CLASSES[{task!r}] in FLIP_PAIRS", pairs)
        self.mirrored = np.arange(256, dtype=np.uint8)    # by class: what it is called in a mirror
        for a, b in (map(self.names.index, pair) for pair in pairs):
            self.mirrored[[a, b]] = b, a
        # PASCAL VOC's colours, unless the data set has its own: bits 0, 1 and 2 of the class are the highest bits of
        # red, green and blue, bits 3, 4 and 5 the next ones, and so on. Unknown is (224, 224, 192).
        self.palette = np.packbits(np.arange(256)[:, None, None] >> np.arange(24).reshape(8, 3).T & 1, axis=2)[..., 0]
        if colours is not None:
            self.palette[:n] = colours

    def loss(self, output, target, valid):
        return F.cross_entropy(output, target[:, 0].long(), reduction="none")

    def predict(self, output):
        return output.argmax(1, keepdim=True)

    def probability(self, output):
        return output.softmax(1)

    def count(self, prediction, target, valid):
        classes, target = self.channels, target[:, 0].long()
        label = torch.where((target >= 0) & (target < classes), target, classes)
        return histogram(label * classes + prediction[:, 0], valid, (classes + 1) * classes).view(self.shape)

    def scores(self, sums):
        sums, outside = sums[:-1], int(sums[-1].sum())
        expect(not outside, f"labels of {self.task} in 0..{self.channels - 1} or {IGNORE}", f"{outside} other pixels")
        right, labelled = sums.diag(), sums.sum(1)
        iou = 100 * right / (sums.sum(0) + labelled - right)    # nan where a class does not occur
        return {"mIoU": iou.nanmean(), "pixel_accuracy": 100 * right.sum() / sums.sum(),
                "mean_accuracy": (100 * right / labelled).nanmean(),
                **{f"IoU {name}": value for name, value in zip(self.names, iou) if not value.isnan()}}

    def augment(self, label, scale, flipped):
        return self.mirrored[label] if flipped else label

    def remarks(self, values, flips):
        missing = [name for i, name in enumerate(self.names) if i not in values]
        sides = [name for i, name in enumerate(self.names) if self.mirrored[i] == i and re.search(
            r"(?<![A-Za-z])(left|right)|Left|Right|LEFT|RIGHT", name)]
        remarks = [f"{len(missing)} classes never occur, first {', '.join(missing[:6])}"] if missing else []
        if sides and flips:
            remarks.append(f"{', '.join(sides)}: training mirrors images, which makes left of right; name the pairs in "
                           "FLIP_PAIRS, or give FLIP = False")
        return remarks

    def resize(self, values, size):
        return F.interpolate(values[None].float(), size, mode="nearest-exact")[0].to(values.dtype)

    def confusion(self, sums):
        return dict(classes=self.names, pixels=sums[:-1].long().tolist())

    def describe(self):
        return dict(kind="classes", classes=self.names)

    def raw(self, values, label_ids=False):
        ids = self.label_ids if label_ids and self.label_ids else range(256)
        return np.uint8(ids)[values[0]]

    def paint(self, values, shown):
        lines = [(self.names[i], self.palette[i]) for i in np.union1d(values, shown) if i != IGNORE]
        return self.palette[values[0]], lines


class Parsing(Classes):
    weight = 2.0


class Boundary(Marked):
    """Binary cross-entropy; boundary pixels (1 in labels) have the weight 0.95, the others (0) 0.05. pixelF in percent:
    the best F-measure over the thresholds 1/256 .. 255/256, pixel by pixel. A pixel is positive where its probability
    is strictly above the threshold. pixelF is a cheap stand-in for odsF and not comparable with it.
    """

    metrics = ("odsF", "pixelF")
    weight = 50.0
    limits = 1, 1
    dtype = torch.float32
    binary = True
    thresholds = torch.arange(1, 256) / 256
    shape = 2, len(thresholds) + 1    # [false or true pixel, number of thresholds below its probability]

    def loss(self, output, target, valid):
        x, y = output[:, 0], target[:, 0].float()
        return 0.95 * y * F.softplus(-x) + 0.05 * (1 - y) * F.softplus(x)

    def probability(self, output):
        return output.sigmoid()

    def predict(self, output):
        return self.probability(output)

    def count(self, prediction, target, valid):
        self.thresholds = self.thresholds.to(prediction.device)    # stays there
        below = torch.bucketize(prediction[:, 0].contiguous(), self.thresholds)
        index = (target[:, 0] > 0).long() * self.shape[1] + below
        return histogram(index, valid, 2 * self.shape[1]).view(self.shape)

    def f_measure(self, sums: Tensor, beta2: float) -> Tensor:
        """(1 + beta^2) P R / (beta^2 P + R) at each threshold in percent, 0 where nothing is found."""
        false_positive, true_positive = sums.flip(1).cumsum(1).flip(1)[:, 1:]
        precision, recall = true_positive / (true_positive + false_positive), true_positive / sums[1].sum()
        return (100 * ((1 + beta2) * precision * recall / (beta2 * precision + recall))).nan_to_num(0)

    def scores(self, sums):
        return {"pixelF": self.f_measure(sums, beta2=1).max()}

    def teaches(self, target):
        return (target == 1).all(1)

    def raw(self, values, label_ids=False):
        return np.uint8(255 * values[0])    # truncated, as odsF sees it

    def paint(self, values, shown):
        return 255 * values.transpose(1, 2, 0), [("probability 0 to 1", [(0, 0, 0), (255, 255, 255)])]


class Saliency(Boundary):
    """Cross-entropy; a salient pixel's weight is the share of the others in the image, and vice versa. maxF in percent:
    beta^2 = 0.3, the maximum over the thresholds 1/256 .. 255/256 on P(salient).

    maxF_published: the published implementation's figure. It applies a sigmoid to the probability before it compares
    with 0.05, 0.10 .. 0.95; only thresholds in [0.5, 0.73] act. IoU: TP / (TP + FP + FN) in percent, at 1/2.
    """

    metrics = ("maxF",)
    weight = 5.0
    limits = 2, 2
    dtype = torch.int64
    thresholds, origin = torch.cat([Boundary.thresholds, torch.logit(torch.arange(1, 20, dtype=torch.float64) / 20)]
                                   ).float().sort()
    shape = 2, len(thresholds) + 1

    def loss(self, output, target, valid):
        salient = (target[:, 0] == 1) & valid
        others = 1 - salient.sum((1, 2), keepdim=True) / valid.sum((1, 2), keepdim=True).clamp(min=1)    # (B, 1, 1)
        return torch.where(salient, others, 1 - others) * F.cross_entropy(
            output, target[:, 0].long(), reduction="none")

    def probability(self, output):
        return output.softmax(1)[:, 1:]

    def scores(self, sums):
        f, published = self.f_measure(sums, beta2=0.3), self.origin >= 255
        above = sums[:, (self.thresholds <= 0.5).sum():].sum(1)    # false and true pixels above 1/2
        return {"maxF": f[~published].max(), "maxF_published": f[published].max(),
                "IoU": 100 * above[1] / (above[0] + sums[1].sum()).clamp(min=1)}


class Normal(Kind):
    """The absolute difference of the unit-length prediction, summed over the three channels. mErr: the mean angle in
    degrees between prediction and label. mErr_unit: over labels of about unit length alone, see nearly_unit. Also the
    median (to 0.01 degrees), the root of the mean square, and the percentage of pixels below some angles.

    A label is floats (3, h, w): x to the right, y up, z towards the viewer. Unknown are NaN, zero vectors and, if the
    data set has UNIT_NORMALS, vectors far from unit length.
    """

    BINS = 18_000           # of 0.01 degrees
    metrics = ("mErr",)
    lower_is_better = True
    unit, weight = "\N{DEGREE SIGN}", 10.0
    limits = 3, 3
    shape = (BINS + 5,)     # the histogram (180 degrees have a bin of their own), and four sums

    def loss(self, output, target, valid):
        return (self.predict(output) - target).abs().sum(1)

    def predict(self, output):
        return F.normalize(output, dim=1)

    def count(self, prediction, target, valid):
        p, t = prediction, F.normalize(target.float(), dim=1)
        # Exact also for small angles, where the arc cosine of the product is not.
        angle = torch.rad2deg(2 * torch.atan2((p - t).norm(dim=1), (p + t).norm(dim=1)))
        angle = torch.where(valid, rounded(angle, bits=16), 0)    # exact up to 2^37 degrees, all of PASCAL-Context
        unit = nearly_unit(target.square().sum(1))    # PyTorch's norm is 20 times slower
        terms = angle, rounded(angle ** 2, bits=8), torch.where(unit, angle, 0), unit
        index = (100 * angle.nan_to_num()).long()
        return torch.cat([histogram(index, valid, self.BINS + 1), totals(terms, valid, bits=16)])

    def scores(self, sums):
        below, (total, squares, unit_total, units) = sums[:-4].cumsum(0), sums[-4:]
        pixels, middle = below[-1], (below < below[-1] / 2).sum()    # the bin in which half of the pixels are reached
        return {"mErr": total / pixels, **({"mErr_unit": unit_total / units} if units else {}),
                "median": (middle + 0.5) / 100, "rmse": (squares / pixels).sqrt(),
                **{f"below_{angle:g}": 100 * below[round(100 * angle) - 1] / pixels for angle in (11.25, 22.5, 30)}}

    def check_values(self, label):
        label = super().check_values(label)
        x, y, z = label
        squared = x * x + y * y + z * z    # of the length
        known, unit = squared > 0, nearly_unit(squared)    # not NaN
        off = ~unit & (squared > 0.01)    # many files store shorter ones where there is no normal
        expect(off.sum() <= 0.4 * known.sum(), "vectors of length 1", f"{np.mean(off):.0%} of other lengths")
        expect(not unit.any() or ((x != y) | (y != z))[unit].any(), "x, y and z in red, green and blue", "a grey image")
        return np.where(unit if self.labels.unit_normals else known, label, np.float32(np.nan))

    def augment(self, label, scale, flipped):
        if flipped:
            label[0] *= -1    # x points the other way
        return label

    def remarks(self, values, flips):
        away = np.sum(values[2] < 0) / max(1, np.isfinite(values[2]).sum())
        remarks = super().remarks(values, flips)
        if away > 0.25:    # a sixth of right ones does: at the borders of wide images
            remarks.append(f"{away:.0%} of the normals look away from the viewer; usual reasons: OpenCV's axes (negate "
                           "y and z), the world's axes (turn them into the camera's), or blue and red exchanged")
        return remarks

    def resize(self, values, size):
        return F.normalize(super().resize(values, size), dim=0)

    def paint(self, values, shown):
        directions = {"left": (-1, 0, 0), "right": (1, 0, 0), "up": (0, 1, 0), "down": (0, -1, 0),
                      "to the viewer": (0, 0, 1)}
        lines = [(name, [255 * (x + 1) // 2 for x in direction]) for name, direction in directions.items()]
        return 255 * (values.transpose(1, 2, 0) + 1) / 2, lines


def nearly_unit(squared):
    """Where vectors, stored in 8 bits, count as unit vectors. squared: squares of the lengths, of torch or numpy."""
    return (squared > 0.75 ** 2) & (squared < 1.25 ** 2)


class Values(Kind):
    """Plain numbers, C channels: the absolute difference, RMSE and MAE, each of a channel on average."""

    metrics = ("RMSE", "MAE")
    lower_is_better = True
    digits = 4
    shape = (3,)

    def loss(self, output, target, valid):
        return (output - target).abs().mean(1)

    def count(self, prediction, target, valid):
        error = prediction - target
        return totals((torch.ones_like(error), error ** 2, error.abs()), valid[:, None], bits=20)

    def scores(self, sums):
        return {"RMSE": (sums[1] / sums[0]).sqrt(), "MAE": sums[2] / sums[0]}

    def describe(self):
        return super().describe() | dict(unit=self.unit.strip())


class Depth(Values):
    """The absolute difference. RMSE in the label's unit, metres for depth (prediction clamped at 0). With the
    prediction floored at 1e-9: abs_rel, sq_rel, log_rmse, log10 (mean absolute difference of the logarithms to base
    10), SILog (deviation of the difference of natural logarithms, times 100) and delta_1, delta_2, delta_3 (share of
    pixels where the larger of prediction and label is less than 1.25, 1.25^2, 1.25^3 times the other).

    A label is floats (h, w) or (1, h, w) above 0; 0 and NaN where unknown. With Labels.depth_range (low, high) only
    pixels with low < target < high are scored.
    """

    metrics = ("RMSE",)
    unit, scaling = " m", -1    # what looks larger is nearer
    limits = 1, 1
    shape = (10,)

    def predict(self, output):
        return output.clamp(min=0)

    def count(self, prediction, target, valid):
        valid = valid[:, None]
        if limits := self.labels.depth_range:
            valid = valid & (target > limits[0]) & (target < limits[1])
        target = torch.where(valid, target.float(), 1)
        floored = prediction.clamp(min=1e-9)
        error, log = floored - target, floored.log() - target.log()
        ratio = torch.maximum(floored / target, target / floored)
        terms = (torch.ones_like(target), (prediction - target) ** 2, error.abs() / target, error ** 2 / target,
                 log ** 2, log, log.abs(), *(ratio < 1.25 ** i for i in (1, 2, 3)))
        bits = 16 if limits else 20    # exact to 2^33 m^2, or to 2^37 square pixels: Cityscapes
        return totals(terms, valid, bits)

    def scores(self, sums):
        squares, abs_rel, sq_rel, log_squares, log, abs_log, *deltas = sums[1:] / sums[0]
        return {"RMSE": squares.sqrt(), "abs_rel": abs_rel, "sq_rel": sq_rel, "log_rmse": log_squares.sqrt(),
                "log10": abs_log / math.log(10), "SILog": 100 * (log_squares - log ** 2).clamp(min=0).sqrt(),
                **{f"delta_{i}": delta for i, delta in enumerate(deltas, start=1)}}

    def check_values(self, label):
        label = super().check_values(label)
        negative = label[label < 0]
        expect(not negative.size, f"values above 0{self.unit and ' in'}{self.unit}, or 0 where unknown", negative)
        return np.where(label > 0, label, np.float32(np.nan))

    def remarks(self, values, flips):
        known = values[~np.isnan(values)]
        middle = np.median(known) if known.size else 1
        remarks = super().remarks(values, flips)
        if self.unit == " m" and not 0.05 <= middle <= 100:
            remarks.append(f"half of the depths are above {middle:.3g} m; metres are expected")
        return remarks

    def picture(self, values, shown):    # disparities that were not measured are negative
        return super().picture(*(np.where(map < 0, np.nan, map) for map in (values, shown)))


class Disparity(Depth):
    unit, scaling = " px", 1


# ------------------------------------------------------------------------- the table of tasks, and labels of a data set

# The tasks of the paper (Table 1), and two for your own data.
TASKS = {"semseg": Classes, "parsing": Parsing, "saliency": Saliency, "normal": Normal, "boundary": Boundary,
         "depth": Depth, "disparity": Disparity, "values": Values}
TaskTable = Mapping[str, int | tuple[str | type[Kind], int]]    # output channels, or (like, channels), by task
# Other entries of a sample; the sheet beside the tasks' pictures; attributes of the model's heads.
RESERVED = {"image", "name", "size", "truths", "sheet", *dir(torch.nn.ModuleDict())}


@dataclass(frozen=True)
class Labels:
    """What a data set says of its labels. The tables are by task; see datasets.DenseDataset for each.

    tasks: {"semseg": 12, "material": ("semseg", 5), "flow": (Flow, 2)}. A task is one of TASKS, with its output
    channels; or has another name and is treated like one of these; or has a kind of your own, a class or, in a
    checkpoint, "path/to/file.py:Flow".
    """

    tasks: TaskTable
    classes: dict = field(default_factory=dict)
    colours: dict = field(default_factory=dict)
    titles: dict = field(default_factory=dict)
    units: dict = field(default_factory=dict)
    label_ids: dict = field(default_factory=dict)
    flip_pairs: dict = field(default_factory=dict)
    depth_range: tuple[float, float] | None = None
    unit_normals: bool = True

    def __post_init__(self):
        low, high = self.depth_range or (0, 1)
        expect(low < high, "depth_range (low, high) with low below high", self.depth_range)

    @cached_property
    def kinds(self) -> dict[str, Kind]:
        """Each task as an instance of its kind, which checks what is said of it."""
        kinds = {}
        for task, value in self.tasks.items():
            free = isinstance(task, str) and re.fullmatch(r"\w[\w-]*", task) and task not in RESERVED
            expect(free, "a task's name of letters, digits, _ and -, not in RESERVED", repr(task), "rename the task")
            like, channels = value if isinstance(value, (tuple, list)) and len(value) == 2 else (task, value)
            if isinstance(like, str) and ".py:" in like:
                like = find_class(like, Kind, said_by="a checkpoint")
            kind = like if isinstance(like, type) and issubclass(like, Kind) else TASKS.get(like)
            expect(kind, f"a task of {', '.join(TASKS)}, or (like, channels) with like one of these or a subclass of "
                   "metrics.Kind", f"{task!r}: {value!r}")
            low, high = kind.limits
            fits = isinstance(channels, numbers.Integral) and low <= channels <= high
            expect(fits, f"{low} to {high} channels for the task {task!r}", repr(channels))
            kinds[task] = kind(task, int(channels), self)
        return kinds

    def plain(self) -> dict:
        """For checkpoints; Labels(**plain) is the same again."""
        return plain(asdict(self))


def plain(value: object) -> object:
    """Numbers, texts, lists and dictionaries alone. A class becomes path/to/file.py:Class, from the current folder."""
    def simpler(value):
        if isinstance(value, type):
            return f"{os.path.relpath(inspect.getfile(value))}:{value.__qualname__}"
        if isinstance(value, range):
            return list(value)
        return value.tolist() if hasattr(value, "tolist") else str(value)    # numpy's
    return json.loads(json.dumps(value, default=simpler))


def find_class(name: str, base: type, said_by: object = None) -> type:
    """The subclass of `base` that "path/to/file.py:Class" names.

    said_by: the file that gives the name, where the user does not. No code runs on its word: the Python file must be in
    or below the current folder, or loaded already."""
    file, _, class_name = name.rpartition(":")
    path = Path(file).expanduser().resolve()
    expect(not said_by or path.is_relative_to(Path.cwd()) or is_file_of(sys.modules.get(path.stem), path),
           "a Python file in or below the current folder", f"{path}, named by {said_by}",
           "to run it, name the data set yourself with --dataset")
    expect(path.is_file() and path.suffix == ".py" and "." not in path.stem,
           "path/to/file.py:Class, a file (no other dot in the file's name)", repr(name))
    if str(path.parent) not in sys.path:    # which new processes get, too
        sys.path.append(str(path.parent))
    module = importlib.import_module(path.stem)
    expect(is_file_of(module, path), f"a file whose name no other module has ({path.stem})", path, "rename the file")
    found = getattr(module, class_name, None)
    expect(isinstance(found, type) and issubclass(found, base) and not inspect.isabstract(found),
           f"a subclass {class_name!r} of {base.__name__} in {path}, with all its abstract methods", found)
    return found


def is_file_of(module: object, path: Path) -> bool:
    """Whether a module, or None, was loaded from the file."""
    return Path(getattr(module, "__file__", None) or "").resolve() == path


# ------------------------------------------------------------------------------------------------- meters and delta_m

def make_meters(tasks: TaskTable, depth_range: tuple[float, float] | None = None) -> dict[str, "Meter"]:
    """tasks: see Labels; depth_range: see Depth."""
    return {task: Meter(kind) for task, kind in Labels(tasks, depth_range=depth_range).kinds.items()}


class Meter:
    """The scores of a task. update(output, target) adds a batch, compute() gives the metrics by name. with_losses: adds
    the images' losses to `losses`, too. output, target: see Kind.loss, but unknown is 255 or NaN."""

    def __init__(self, kind: Kind):
        self.kind = copy.copy(kind)    # it may keep a tensor on the device of the outputs
        self.sums = torch.zeros(kind.shape, dtype=torch.float64)    # exact for counts up to 2^53
        self.losses = torch.zeros(2, dtype=torch.float64)           # of images with a label, and their number

    @torch.no_grad()
    def update(self, output: Tensor, target: Tensor, with_losses: bool = False):
        if output.device.type == "mps":    # which has no float64
            output, target = output.cpu(), target.cpu()
        for image, label in zip(output.split(1), target.split(1), strict=True):    # a whole batch takes more memory
            image, valid = image.float(), self.kind.valid(label)
            counted = self.kind.count(self.kind.predict(image), known(label, valid), valid)
            self.sums = self.sums.to(image.device) + counted + (image - image).sum()    # NaN if one is not finite
            if with_losses:    # whose labels must be in range
                loss = rounded(self.kind.image_losses(image, label).double(), bits=32)
                self.losses = self.losses.to(image.device) + torch.stack([loss[0], valid.any()])

    def empty(self) -> bool:
        """Whether no pixel has counted yet."""
        return not self.sums.any()

    def compute(self) -> dict[str, float]:
        expect(not self.sums.isnan().any(), f"finite outputs of the model for {self.kind.task}", "others",
               "the training has diverged, or the precision is too low")
        expect(not self.empty(), f"valid pixels of {self.kind.task}", "none", "check the labels")
        scores = {name: float(value) for name, value in self.kind.scores(self.sums.cpu()).items()}
        finite = all(map(math.isfinite, scores.values()))
        expect(finite, f"finite scores of {self.kind.task}", scores, "check the labels' range")
        return scores


def delta_m(results: Mapping[str, float], baseline: Mapping[str, float], rows: Mapping = TASKS) -> float:
    """The mean relative improvement over a baseline, in percent. Both give the primary metric of each task.

    Delta_m = 100 / T * sum_t (-1)^(l_t) (M_t - S_t) / S_t, l_t = 1 where lower is better. The paper's baseline S for
    NYUDv2 is Table 2's single-task row. rows: the tasks' kinds.
    """
    same = results and results.keys() == baseline.keys()
    expect(same, "the same tasks in results and baseline", f"{sorted(results)} and {sorted(baseline)}")
    expect(all(baseline.values()), "figures of the baseline other than 0", baseline)
    gains = [(-1) ** rows[t].lower_is_better * (results[t] - baseline[t]) / baseline[t] for t in results]
    return 100 * sum(gains) / len(gains)


# ------------------------------------------------------------------------------------------------------------- odsF
# The SEISM protocol with one ground truth per image. Per image: the prediction, 8 bits per pixel, is thinned to its
# ridges (suppress_non_maxima), cut at 101 THRESHOLDS, and each of the 101 maps is thinned to lines (thin). Predicted
# and true boundary pixels are matched one to one within max_dist of the image's diagonal (match_boundaries). The counts
# are summed over the images, threshold by threshold, and the largest F-measure of the sums is the score (ods_f).

THRESHOLDS = np.array([0.001, *(np.arange(1, 100) / 100), 0.999])


class OdsMeter:
    """The boundary scores of BSDS in percent. update(...) adds an image, see boundary_counts; compute() gives them.

    odsF: the best F over thresholds that are the same for all images. oisF: F of the counts of each image at its own
    best threshold. AP: the area under the curve of precision over recall, at recalls 0, 0.01 .. 1.
    executor: whose processes match (None: this one). An update waits until at most `waiting` images are pending.
    """

    def __init__(self, max_dist: float, executor: Executor | None = None, waiting: int = 0):
        self.max_dist, self.executor, self.waiting = max_dist, executor, waiting
        self.counts = np.zeros((len(THRESHOLDS) + 1, 4), np.int64)    # the last row: at each image's best threshold
        self.pending = deque()    # functions that give the counts

    def update(self, prediction_u8: np.ndarray, ground_truth: np.ndarray, known: np.ndarray | None = None):
        count = partial(boundary_counts, prediction_u8, ground_truth, self.max_dist, known)
        self.pending.append(self.executor.submit(count).result if self.executor else count)
        self.collect(self.waiting)

    def collect(self, left: int = 0):
        """Adds the counts of pending images until only `left` are pending."""
        while len(self.pending) > left:
            counts = self.pending.popleft()()
            best = precision_recall(counts)[2].argmax()
            self.counts += np.concatenate([counts, counts[[best]]])

    def compute(self) -> dict[str, float]:
        self.collect()
        precision, recall, _ = precision_recall(self.counts[:-1])
        recalls, first = np.unique(recall, return_index=True)
        area = np.interp(np.arange(101) / 100, recalls, precision[first], left=0, right=0).sum()
        return {"odsF": 100 * ods_f(self.counts[:-1]), "oisF": 100 * ods_f(self.counts[-1:]), "AP": float(area)}


def precision_recall(counts: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """P = matched predicted / predicted, R = matched true / true and F = 2 P R / (P + R) of counts (thresholds, 4).
    0 where nothing is matched, which covers images without true pixels and thresholds without predicted ones."""
    matched_true, true, matched_predicted, predicted = np.transpose(counts)
    precision, recall = matched_predicted / np.maximum(predicted, 1), matched_true / np.maximum(true, 1)
    total = precision + recall
    return precision, recall, 2 * precision * recall / np.where(total > 0, total, 1)


def ods_f(counts: np.ndarray) -> float:
    """The largest F-measure over the thresholds, as a fraction, without interpolation. counts: (thresholds, 4), of
    boundary_counts, summed over the images."""
    expect(np.shape(counts)[1:] == (4,), "counts of the shape (thresholds, 4)", np.shape(counts), "sum over the images")
    return float(precision_recall(counts)[2].max())


def boundary_counts(prediction_u8: np.ndarray, ground_truth: np.ndarray, max_dist: float,
                    known: np.ndarray | None = None) -> np.ndarray:
    """Pixels counted at the 101 thresholds: (101, 4) of matched true, true, matched predicted, predicted.

    prediction_u8: (H, W) uint8, the probability times 255, truncated, at the image's own size. ground_truth: (H, W)
    bool, thinned (boundary_ground_truth). max_dist: as a fraction of the diagonal, 0.0075 for PASCAL-Context, 0.011 for
    NYUDv2. known: (H, W) bool, where there is a label; boundaries predicted elsewhere are not counted.

    A pixel is on where its suppressed value in float32 is strictly greater than the threshold in float64, as in the
    reference: 51 / 255 is on at 0.2.
    """
    expect(prediction_u8.dtype == np.uint8, "255 times the probability as uint8", prediction_u8.dtype)
    _check_pair(prediction_u8, ground_truth, max_dist)
    value = suppress_non_maxima(prediction_u8)
    active = value > THRESHOLDS[0]
    on = _thin_pixels(value[active] > THRESHOLDS[:, None], active)
    if known is not None:
        on &= known[active]
    used = on.any(0)
    matchings = _matchings(on[:, used], np.argwhere(active)[used], ground_truth, max_dist)
    matched = np.array([len(mates) - mates.count(-1) for mates in matchings])
    return np.stack([matched, np.full_like(matched, np.count_nonzero(ground_truth)), matched, on.sum(1)], axis=1)


def boundary_ground_truth(label_map: np.ndarray) -> np.ndarray:
    """boundary_pixels, thinned. label_map: of PASCAL-Context that of 459 classes, not the training label; of NYUDv2 the
    0/255 edge image."""
    return thin(boundary_pixels(label_map))


def boundary_pixels(label_map: np.ndarray) -> np.ndarray:
    """Where the label of a map (H, W) differs from that of the right, lower or lower-right neighbour: (H, W) bool; the
    last row and column repeat."""
    padded = np.pad(label_map, ((0, 1), (0, 1)), mode="edge")
    return (label_map != padded[:-1, 1:]) | (label_map != padded[1:, :-1]) | (label_map != padded[1:, 1:])


def suppress_non_maxima(prediction_u8: np.ndarray) -> np.ndarray:
    """Keeps the ridges of a boundary map: (H, W) uint8 -> (H, W) float32 in [0, 1], 0 where suppressed.

    E is the map in [0, 1]. The direction across a ridge comes from second derivatives of E smoothed by a triangle
    filter of radius 4 (weights 1 .. 5 .. 1, symmetric border): theta = atan(E_yy sign(-E_xy) / (E_xx + 1e-5)). A pixel
    survives where 1.01 E is not smaller than E one pixel to either side along theta, bilinear and clamped to the image.
    Survivors within 5 pixels of a border are multiplied by their distance to it / 5, the outermost being at 0.
    """
    value = prediction_u8.astype(np.float32) / np.float32(255)
    if min(value.shape) < 3:    # all pixels lie on a border
        return np.zeros_like(value)
    triangle = np.array([1, 2, 3, 4, 5, 4, 3, 2, 1]) / 25
    smooth = value
    for axis in (0, 1):
        smooth = ndimage.correlate1d(smooth, triangle, axis, mode="reflect")    # scipy's name of the symmetric border
    dy, dx = np.gradient(smooth)
    (dyy, dxy), dxx = np.gradient(dy), np.gradient(dx, axis=1)
    theta = np.arctan(dyy * np.sign(-dxy) / (dxx + np.float32(1e-5)))

    y, x = np.nonzero(prediction_u8)
    ridge, step = value[y, x], np.stack([np.sin(theta[y, x]), np.cos(theta[y, x])])
    aside = [ndimage.map_coordinates(value, place, order=1, mode="nearest") for place in ((y, x) - step, (y, x) + step)]
    ridges = np.zeros_like(value)
    ridges[y, x] = np.where(np.float32(1.01) * ridge >= np.maximum(*aside), ridge, 0)
    fade_y, fade_x = (np.minimum(np.arange(n), np.arange(n)[::-1]).clip(max=5).astype(np.float32) / 5
                      for n in value.shape)
    return ridges * fade_y[:, None] * fade_x


def thin(maps: np.ndarray) -> np.ndarray:
    """Thins the shapes of each map to lines, until nothing changes: (..., H, W) -> (..., H, W) bool.

    The algorithm of Guo and Hall, MATLAB's bwmorph(map, "thin", Inf). x1 .. x8 are a pixel's neighbours anticlockwise
    from the right one, x9 = x1, 0 outside the image. Two passes alternate; each deletes at once all pixels where
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
    """thin for M maps given at the n pixels where active (H, W) is true: (M, n) bool -> (M, n) bool. One bit of a word
    is one map, so that 64 maps take one bitwise operation."""
    inside = np.pad(active, 1)    # so that the neighbours of a pixel are at fixed distances in the flat map
    row, inside = inside.shape[1], inside.ravel()
    around = np.array([1, 1 - row, -row, -row - 1, -1, row - 1, row, row + 1])[:, None]    # to x1 .. x8
    bits = np.zeros((-(-len(on) // 64), len(inside)), np.uint64)                           # (words, pixels)
    bits[:, inside] = np.packbits(np.pad(on, ((0, -len(on) % 64), (0, 0))), axis=0).T.copy().view(np.uint64).T
    changed = np.stack([inside, inside])    # by pass: pixels next to a deletion since it last ran
    step = 0
    while changed.any():
        todo = np.flatnonzero(changed[step])
        changed[step] = False
        todo = todo[bits.take(todo, axis=1).any(0)]
        deleted = bits.take(todo, axis=1) & _deletable(bits.take(todo + around, axis=1), step)
        bits[:, todo] ^= deleted
        changed[:, todo[deleted.any(0)] + around] = True
        step = 1 - step
    return np.unpackbits(bits[:, inside].T.copy().view(np.uint8), axis=1, count=len(on)).T.astype(bool)


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
    where their Euclidean distance is at most max_dist * sqrt(H^2 + W^2).
    Differs: the SEISM protocol's matcher solves a minimum-cost assignment to which it adds random outlier edges, so
    its counts vary by a few pixels from run to run. They never exceed this exact and deterministic maximum.
    """
    prediction, target = np.asarray(prediction, bool), np.asarray(target, bool)
    _check_pair(prediction, target, max_dist)
    points = np.argwhere(prediction)
    mates, = map(np.array, _matchings(np.ones((1, len(points)), bool), points, target, max_dist))
    matched_prediction, matched_target = prediction.copy(), target.copy()
    matched_prediction[prediction] = np.isin(range(len(points)), mates)
    matched_target[target] = mates >= 0
    return matched_prediction, matched_target


def _matchings(on: np.ndarray, points: np.ndarray, target: np.ndarray, max_dist: float) -> Iterator[list[int]]:
    """For each of M maps a largest matching: the point of every true pixel, -1 without one (one list, reused).

    on: (M, points) bool, the points in each map; points: (.., 2) pixel coordinates; target: (H, W) bool.
    Each matching starts from the one before, as neighbouring thresholds differ little. First the points that went are
    taken out: an augmenting path can then only begin at a truth that lost its point. With those searched, the new
    points come in, and a path can only begin at one of them. Taking both steps at once would miss pairs.
    """
    truths, radius = np.argwhere(target), max_dist * np.hypot(*target.shape)
    point_tree, truth_tree = KDTree(points), KDTree(truths)
    near_truth = truth_tree.query_ball_tree(point_tree, radius)
    near_point = point_tree.query_ball_tree(truth_tree, radius)
    truth_mates, point_mates = [-1] * len(truths), [-1] * len(points)
    before = np.zeros(len(points), bool)
    for now in on:
        freed = [point_mates[point] for point in np.flatnonzero(before & ~now).tolist() if point_mates[point] >= 0]
        for truth in freed:
            point_mates[truth_mates[truth]] = -1
            truth_mates[truth] = -1
        closed = bytearray((~(before & now)).tobytes())
        for truth in freed:
            _extend(truth, near_truth, truth_mates, point_mates, closed)
        closed = bytearray(len(truths))
        for point in np.flatnonzero(now & ~before).tolist():
            _extend(point, near_point, point_mates, truth_mates, closed)
        yield truth_mates
        before = now


def _extend(start: int, near: list[list[int]], mates: list[int], far_mates: list[int], closed: bytearray):
    """Adds a pair to the matching, in place, if an augmenting path leads from the unmatched node start to the far side.

    near: for each node of start's side its neighbours on the far side. mates, far_mates: the partners of the nodes on
    start's side and on the far side, or -1. closed: 1 for the far nodes to leave out. If the breadth-first search
    fails, all that it reached stays closed, as no later augmenting path can pass through it.
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
    expect(prediction.ndim == 2 and prediction.shape == target.shape, "prediction and truth of one shape (H, W)",
           f"{prediction.shape} and {target.shape}", "crop the padding off the prediction and resize it to the image")
    expect(0 <= max_dist <= 1, "max_dist as a fraction of the image's diagonal, from 0 to 1", max_dist)
