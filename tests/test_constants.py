"""The best constant against other constants."""

import torch
from constants import score_constants

from datasets import Synthetic
from metrics import Meter


def test_best_constant_beats_other_constants():
    torch.manual_seed(0)
    dataset = Synthetic(6, (48, 64), seed=5)
    best = score_constants(dataset, odsf=False)
    for task, kind in dataset.kinds.items():
        label, metric = torch.stack([sample[task] for sample in dataset]), kind.primary(best[task])
        for _ in range(20):
            output, meter = torch.randn(1, kind.channels, 1, 1) * (3 if task == "depth" else 1), Meter(kind)
            meter.update(output.expand(6, -1, 48, 64), label)
            other = meter.compute()[metric]
            if kind.lower_is_better:
                assert best[task][metric] <= other * 1.02    # the direction is searched on a sample
            else:
                assert best[task][metric] >= other - 1e-9
