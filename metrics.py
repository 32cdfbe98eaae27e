"""Metrics of multi-task dense prediction, as NYUDv2 and PASCAL-Context are scored (Table 1 of the paper).

    meters = make_meters({"semseg": 40, "depth": 1})
    for task, meter in meters.items():
        meter.update(outputs[task], targets[task])       # raw outputs (B, C_t, H, W), labels (B, 1 or 3, H, W)
    {task: meter.compute() for task, meter in meters.items()}

Every metric is one figure over the pixels of the whole data set, never a mean of per-image figures. A meter's state
is one tensor of sums, on the device of what it is fed: it adds up over batches, data splits and processes alike, and
no update waits for the device.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from datasets import IGNORE

# The metric by which each task is compared, and the tasks where lower is better.
PRIMARY = {"semseg": "mIoU", "parsing": "mIoU", "saliency": "maxF", "normal": "mErr", "boundary": "pixelF",
           "depth": "RMSE"}
LOWER_IS_BETTER = {"normal", "depth"}


class Meter:
    """Sums over pixels. update(output, target) adds a batch, compute() gives the metrics by name.

    output: the network's raw output (B, C_t, H, W). target: labels (B, 1 or 3, H, W), 255 where to ignore.
    compute raises ValueError where no pixel has counted yet.
    A kind of meter defines count(output, target), a batch's contribution to the sums, and scores(sums).
    """

    def __init__(self, *shape: int):
        self.sums = torch.zeros(shape, dtype=torch.float64)    # exact for counts up to 2^53

    def update(self, output: Tensor, target: Tensor):
        self.sums = self.sums.to(output.device) + self.count(output.float(), target)

    def compute(self) -> dict[str, float]:
        if not self.sums.any():
            raise ValueError(f"{type(self).__name__} has seen no valid pixel, so there is nothing to score; check the "
                             "labels")
        return {name: float(value) for name, value in self.scores(self.sums.cpu()).items()}


class SegmentationMeter(Meter):
    """mIoU in percent: the mean over classes of TP / (TP + FP + FN), the background being a class.

    A class that occurs neither in the labels nor in the predictions is left out of the mean.
    Differs: the published implementation counts it as 0. On the full benchmarks every class occurs.
    """

    def __init__(self, classes: int):
        super().__init__(classes, classes)    # [label, prediction]
        self.classes = classes

    def count(self, output, target):
        # Ignored pixels go to one more row, which is cut off: indexing by a mask would wait for the device.
        label = torch.where(target == IGNORE, self.classes, target).long()
        pair = label * self.classes + output.argmax(1, keepdim=True)
        counts = torch.zeros((self.classes + 1) * self.classes, dtype=torch.float64, device=output.device)
        counts.scatter_add_(0, pair.flatten(), torch.ones_like(pair.flatten(), dtype=torch.float64))
        return counts.view(self.classes + 1, self.classes)[:-1]

    def scores(self, sums):
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
        below = torch.bucketize(score.contiguous(), self.thresholds.to(score.device))
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
        return torch.stack([torch.where(valid, angle, 0).sum(dtype=torch.float64), valid.sum()])

    def scores(self, sums):
        return {"mErr": sums[0] / sums[1]}


class DepthMeter(Meter):
    """RMSE in metres (prediction clamped at 0), abs_rel, and log_rmse (prediction floored at 1e-9)."""

    def __init__(self):
        super().__init__(4)

    def count(self, output, target):
        valid = target != IGNORE
        target = torch.where(valid, target.float(), 1)
        error = output.clamp(min=0) - target
        floored = output.clamp(min=1e-9)
        terms = (error ** 2, (floored - target).abs() / target, (floored.log() - target.log()) ** 2,
                 torch.ones_like(target))
        return torch.stack([torch.where(valid, term, 0).sum(dtype=torch.float64) for term in terms])

    def scores(self, sums):
        squares, relative, log_squares, pixels = sums
        return {"RMSE": (squares / pixels).sqrt(), "abs_rel": relative / pixels,
                "log_rmse": (log_squares / pixels).sqrt()}


def make_meters(tasks: dict[str, int]) -> dict[str, Meter]:
    """tasks: output channels by task name. Raises ValueError on a task without a metric."""
    builders = {"semseg": SegmentationMeter, "parsing": SegmentationMeter, "saliency": lambda _: SaliencyMeter(),
                "normal": lambda _: NormalMeter(), "boundary": lambda _: BoundaryMeter(),
                "depth": lambda _: DepthMeter()}
    unknown = [task for task in tasks if task not in builders]
    if unknown:
        raise ValueError(f"no metric for the task {unknown[0]!r}; there are metrics for {', '.join(builders)}")
    return {task: builders[task](channels) for task, channels in tasks.items()}
