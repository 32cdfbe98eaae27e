"""The scores of the best prediction that is the same at every pixel: what a model must beat to have learned anything.
Prints the column "best constant" of the README's table.

    python tests/constants.py                                            # 100 held-out synthetic scenes of 64x96
    python tests/constants.py --dataset rooms.py:Rooms --images 50

The constants are fitted to the very labels that they are scored on. Tasks without a label are left out.
"""

import argparse
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parents[1]))

from datasets import DenseDataset, find_dataset_class
from evaluate import Results, own_area, print_table
from metrics import Boundary, Classes, Kind, Meter, Normal, OdsMeter, Saliency


def constant(kind: Kind, labels: list[torch.Tensor]) -> torch.Tensor:
    """The raw output (C,) that scores best if it is given at every pixel. labels: known pixels, (1 or C, n) each."""
    values = torch.cat(labels, dim=1)
    if isinstance(kind, Boundary):    # everything is positive
        return torch.tensor([0.0, 100.0] if isinstance(kind, Saliency) else [100.0])
    if isinstance(kind, Classes):     # the most frequent class
        return F.one_hot(values[0].bincount(minlength=kind.channels).argmax(), kind.channels).float()
    if isinstance(kind, Normal):      # the one of many directions whose mean angle to a sample of the labels is least
        generator = torch.Generator().manual_seed(0)
        sample = values[:, torch.randperm(values.shape[1], generator=generator)[::97]]
        directions = F.normalize(torch.randn(3, 2000, generator=generator), dim=0)
        candidates = torch.cat([directions, F.normalize(sample.mean(1, keepdim=True), dim=0), torch.eye(3)], dim=1)
        angles = torch.stack([torch.acos((c @ sample).clamp(-1, 1)).mean() for c in candidates.T])
        return candidates[:, angles.argmin()].nan_to_num(0)
    return values.double().mean(1).nan_to_num(0).float()


def score_constants(dataset: DenseDataset, images: int = 100, odsf: bool = True) -> Results:
    """Of the first images; odsf: whether odsF is scored, too. The images are read twice, as they may not fit into
    memory."""
    kinds, indices = dataset.kinds, range(min(len(dataset), images))
    labels = {task: [] for task in kinds}
    for sample in (dataset[i] for i in tqdm(indices, "labels for the best constant", unit="img", leave=False)):
        for task, kind in kinds.items():
            labels[task].append(sample[task][:, kind.valid(sample[task][None])[0]])
    constants = {task: constant(kind, labels[task]) for task, kind in kinds.items()}
    meters = {task: Meter(kind) for task, kind in kinds.items()}
    ods = {task: OdsMeter(dataset.BOUNDARY_TOLERANCE) for task, kind in kinds.items()
           if "odsF" in kind.metrics and odsf and dataset.BOUNDARY_TOLERANCE is not None}
    for i in tqdm(indices, "scoring the best constant", unit="img", leave=False):
        sample = dataset[i]
        for task, meter in meters.items():
            label = sample[task][None]
            meter.update(constants[task].view(1, -1, 1, 1).expand(-1, -1, *label.shape[2:]), label)
        for task, meter in ods.items():
            truth = dataset.boundary_truth(i, task)
            label = sample[task][own_area(sample["image"], sample["size"], dataset.LABEL_SCALE)]
            meter.update(np.full(truth.shape, 255, np.uint8), truth, kinds[task].valid(label[None])[0].numpy())
    return {task: (ods[task].compute() if task in ods else {}) | meter.compute() for task, meter in meters.items()
            if not meter.empty()}


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", default="synthetic")
    parser.add_argument("--data-root", type=Path)
    parser.add_argument("--images", type=int, default=100)
    parser.add_argument("--img-size", type=int, nargs=2, default=(64, 96))
    args = parser.parse_args(argv)
    dataset = find_dataset_class(args.dataset).open("val", tuple(args.img_size), root=args.data_root)
    print_table({"best constant": score_constants(dataset, args.images)}, dataset.labels, {}, primary_only=True)


if __name__ == "__main__":
    main()
