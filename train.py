"""Trains MTMamba.

    python train.py                                     # laptop: a small model on synthetic scenes, a few minutes
    python train.py --variant stm2 --iterations 600     # any row of the paper's tables, trained longer
    python train.py --dataset nyud                      # the paper's recipe on one GPU; see the README on the data
    python train.py --dataset pascal --data-root DIR

Losses, optimiser and schedule are the paper's and, where it is silent, the published implementation's.
"""

import argparse
import itertools
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from datasets import IGNORE, NYUDv2, PascalContext, Synthetic
from evaluate import Parser, Results, constant_baseline, evaluate, held_out, print_table, save_contact_sheet
from mtmamba import ENCODERS, VARIANTS, MTMamba, default_backend

WEIGHT_DECAY = 1e-5
LR_POWER = 0.9

# What each data set is trained with; the flags of the same names override it.
PAPER = dict(encoder=ENCODERS["swin-large"], encoder_kwargs=None, pretrained=True, d_state=16, iterations=50_000,
             batch_size=8, lr=1e-4, workers=8)
PRESETS = {
    # A model small enough to learn six tasks on two CPU cores in minutes: small images, a narrow encoder trained from
    # scratch (hence the higher learning rate), and 2 states instead of 16. Rendering takes a tenth of the time, and a
    # process of its own for it would take a core from the network.
    "synthetic": dict(img_size=(64, 96), encoder="convnext_atto", pretrained=False,
                      encoder_kwargs=dict(dims=(16, 32, 64, 96), depths=(1, 1, 2, 1), drop_path_rate=0.0),
                      d_state=2, iterations=180, batch_size=8, lr=1e-2, workers=0),
    "nyud": dict(PAPER, img_size=(448, 576)),
    "pascal": dict(PAPER, img_size=(512, 512)),
}
FLAGS = ("img_size", "encoder", "pretrained", "iterations", "batch_size", "lr", "workers")


def main(argv: list[str] | None = None) -> dict[str, Results]:
    parser = Parser(prog="train.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", choices=PRESETS, default="synthetic")
    parser.add_argument("--data-root", type=Path, help="default: data/NYUDv2 or data/PASCALContext")
    parser.add_argument("--tasks", nargs="+", metavar="TASK", help="a subset of the data set's tasks (default: all)")
    parser.add_argument("--img-size", nargs=2, type=int, metavar=("H", "W"))
    parser.add_argument("--encoder", help=f"{', '.join(ENCODERS)} or any hierarchical timm model")
    parser.add_argument("--pretrained", action=argparse.BooleanOptionalAction, help="start from timm's encoder weights")
    parser.add_argument("--variant", choices=VARIANTS, default="mtmamba")
    parser.add_argument("--iterations", type=int)
    parser.add_argument("--batch-size", type=int)
    parser.add_argument("--lr", type=float, help="at the start; falls to 0 as (1 - it / iterations)^0.9")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, help="processes that load data")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, help="folder of the checkpoint and pictures (default: runs/DATASET)")
    args = parser.parse_args(argv)
    try:
        preset = resolve(args)
        device = torch.device(args.device)
        torch.manual_seed(args.seed)
        train_set, held_out_set = build_datasets(args)
        config = dict(tasks=train_set.tasks, img_size=args.img_size, encoder=args.encoder,
                      encoder_kwargs=preset["encoder_kwargs"], variant=args.variant, d_state=preset["d_state"])
        model = MTMamba(**config, pretrained=args.pretrained).to(device)
        args.out.mkdir(parents=True, exist_ok=True)
    except (ValueError, OSError, RuntimeError) as error:
        parser.error(str(error))
    parameters = sum(p.numel() for p in model.parameters())
    print(f"{args.variant} on {args.encoder}: {parameters / 1e6:.2f} M parameters; scan backend: "
          f"{default_backend(device)}; {args.iterations} iterations of {args.batch_size} images on {device}")

    results = {}
    if args.dataset == "synthetic":    # what the figures mean is known for the benchmarks, and costs hours there
        results["untrained"] = evaluate(model, held_out_set, device, "evaluating, untrained")
        results["best constant"] = constant_baseline(held_out_set)
    train(model, train_set, args, device)
    save_checkpoint(args.out / "last.pt", model, config, args.iterations)
    print("checkpoint:", args.out / "last.pt")
    results = {"trained": evaluate(model, held_out_set, device), **results}
    print_table(results)
    print("pictures:  ", save_contact_sheet(model, held_out_set, device, args.out / "contact_sheet.png"))
    return results


def resolve(args: argparse.Namespace) -> dict:
    """Fills the flags that were not given from the data set's preset; returns the preset with what no flag sets."""
    preset = dict(PRESETS[args.dataset])
    if args.encoder not in (None, preset["encoder"]):
        preset["encoder_kwargs"] = None    # they belong to the preset's encoder
    for name in FLAGS:
        if getattr(args, name) is None:
            setattr(args, name, preset[name])
    for name in ("iterations", "batch_size", "lr"):
        if getattr(args, name) <= 0:
            raise ValueError(f"expected --{name.replace('_', '-')} above 0, found {getattr(args, name)}")
    args.img_size = tuple(args.img_size)
    args.out = args.out or Path("runs") / args.dataset
    return preset


def build_datasets(args: argparse.Namespace) -> tuple[Dataset, Dataset]:
    """The training and the held-out data set."""
    if args.dataset == "synthetic":    # every scene is new; even seeds train, odd ones evaluate: the two never meet
        train_set = Synthetic(args.iterations * args.batch_size, args.img_size, seed=2 * args.seed, tasks=args.tasks)
        return train_set, held_out(args.img_size, train_set.tasks)
    build = {"nyud": NYUDv2, "pascal": PascalContext}[args.dataset]
    options = dict(tasks=args.tasks, size=args.img_size, seed=args.seed)
    if args.data_root is not None:
        options["root"] = args.data_root
    return build(split="train", **options), build(split="val", **options)


def sample_order(dataset: Dataset, seed: int, samples: int) -> Iterator[int | tuple[int, int]]:
    """What to draw, sample by sample: a pure function of (seed, epoch), whatever the workers and their number."""
    if isinstance(dataset, Synthetic):
        return iter(range(samples))
    epochs = (((epoch, int(i)) for i in np.random.default_rng([seed, epoch]).permutation(len(dataset)))
              for epoch in itertools.count())
    return itertools.islice(itertools.chain.from_iterable(epochs), samples)


def train(model: MTMamba, train_set: Dataset, args: argparse.Namespace, device: torch.device):
    """Minimises the sum of the tasks' log losses with AdamW and polynomial decay."""
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, weight_decay=WEIGHT_DECAY, betas=(0.9, 0.999))
    samples = args.iterations * args.batch_size
    loader = DataLoader(train_set, args.batch_size, sampler=list(sample_order(train_set, args.seed, samples)),
                        num_workers=args.workers, pin_memory=device.type == "cuda")
    with tqdm(total=samples, desc="training", unit="img") as bar:
        for iteration, batch in enumerate(loader):
            lr = learning_rate(args.lr, iteration, args.iterations)
            for group in optimizer.param_groups:
                group["lr"] = lr
            outputs = model(batch["image"].to(device, non_blocking=True))
            losses = {task: task_loss(task, output, batch[task].to(device, non_blocking=True))
                      for task, output in outputs.items()}
            optimizer.zero_grad(set_to_none=True)
            total_loss(losses).backward()
            optimizer.step()
            if iteration % 5 == 0 or iteration == args.iterations - 1:    # reading a loss waits for the device
                shown = " ".join(f"{task} {loss.item():.3f}" for task, loss in losses.items())
                bar.set_postfix_str(f"{shown} lr {lr:.1e}", refresh=False)
            bar.update(args.batch_size)


def learning_rate(initial: float, iteration: int, iterations: int) -> float:
    """Polynomial decay without warm-up. A pure function of the iteration, so nothing has to be stored to resume."""
    return initial * (1 - iteration / iterations) ** LR_POWER


def total_loss(losses: dict[str, Tensor]) -> Tensor:
    """Sum over tasks of log(loss + 1e-8), the published runs' total: a task counts by its relative, not its absolute,
    improvement, so no weights are needed. The paper does not state the total."""
    return sum(torch.log(loss + 1e-8) for loss in losses.values())


def task_loss(task: str, output: Tensor, target: Tensor) -> Tensor:
    """The task's loss, a scalar: float32 whatever the output's type, a mean over the valid pixels of the batch.

    output: raw output (B, C_t, H, W). target: labels (B, 1 or 3, H, W), 255 where to ignore. A batch without any
    valid pixel has loss 0 (and zero gradients). Raises ValueError on an unknown task.

    semseg, parsing   cross-entropy
    saliency          cross-entropy, salient pixels weighted with the share of the others in the batch and vice versa
    boundary          binary cross-entropy, boundary pixels weighted 0.95, the others 0.05
    normal            absolute difference of the unit-length prediction, summed over the three channels
    depth             absolute difference
    """
    output = output.float()
    valid = (target != IGNORE).all(1)                                    # (B, H, W)
    pixels = valid.sum().clamp(min=1)
    if task in ("semseg", "parsing"):
        loss = F.cross_entropy(output, target[:, 0].long(), ignore_index=IGNORE, reduction="none")
    elif task == "saliency":
        positive = (target[:, 0] == 1) & valid
        w1 = 1 - positive.sum() / pixels
        weight = torch.where(positive, w1, 1 - w1)
        loss = weight * F.cross_entropy(output, target[:, 0].long(), ignore_index=IGNORE, reduction="none")
    elif task == "boundary":
        y, x = target[:, 0].float(), output[:, 0]
        loss = 0.95 * y * F.softplus(-x) + 0.05 * (1 - y) * F.softplus(x)
    elif task == "normal":
        loss = (F.normalize(output, dim=1) - target).abs().sum(1)
    elif task == "depth":
        loss = (output - target)[:, 0].abs()
    else:
        raise ValueError(f"no loss for the task {task!r}")
    return torch.where(valid, loss, 0).sum() / pixels


def save_checkpoint(path: Path, model: MTMamba, config: dict, iteration: int):
    """Writes the weights, MTMamba's arguments and the iteration; an existing file is replaced only by a whole one."""
    temporary = path.with_suffix(".tmp")
    torch.save({"model": model.state_dict(), "config": config, "iteration": iteration}, temporary)
    os.replace(temporary, path)


if __name__ == "__main__":
    main()
