"""Trains MTMamba.

    python train.py                                                # laptop: a small model, synthetic scenes, minutes
    python train.py --dataset nyud                                 # the paper's recipe on one GPU
    torchrun --nproc_per_node=8 train.py --dataset pascal          # on eight: the same run, whatever the number
    torchrun --nnodes=2 --nproc_per_node=4 --rdzv_backend=c10d --rdzv_endpoint=HOST:29500 \\
        train.py --dataset pascal                                  # on two nodes: this line on each
    python train.py --dataset nyud --resume                        # goes on after an interruption
    python train.py --dataset nyud --init-from X --out runs/tuned  # fine-tunes a checkpoint, ours or a published one

Losses, optimiser and schedule are the paper's and, where it is silent, the published implementation's. A run writes to
runs/DATASET (elsewhere with --out): last.pt, previous.pt, best.pt, log.jsonl, pictures/, and at its end results.json.
"""

import argparse
import contextlib
import functools
import json
import math
import os
import platform
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import timm
import torch
import torch.distributed as dist
import torch.nn.functional as F
from timm.layers import DropPath
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from datasets import DATASETS, IGNORE, Parser, Synthetic
from evaluate import (MAX_DIST, PAPER, SINGLE_TASK, Results, add_up, choose_backend, compare, constant_baseline,
                      evaluate, held_out, load_weights, open_dataset, print_paper_table, print_table, rank_and_world,
                      read_checkpoint, save_contact_sheet, start, write_json)
from metrics import PRIMARY, delta_m
from mtmamba import BACKENDS, ENCODERS, VARIANTS, MTMamba

WEIGHT_DECAY = 1e-5
LR_POWER = 0.9

# What each data set is trained with; the flags of the same names override it.
RECIPE = dict(encoder=ENCODERS["swin-large"], encoder_kwargs=None, pretrained=True, d_state=16, iterations=50_000,
              batch_size=8, lr=1e-4, workers=8, save_every=1000, log_every=50)
PRESETS = {
    # A model small enough to learn six tasks on two CPU cores in minutes: small images, a narrow encoder trained from
    # scratch (hence the higher learning rate), and 2 states instead of 16. Rendering takes a tenth of the time, and a
    # process of its own for it would take a core from the network.
    "synthetic": dict(img_size=(64, 96), encoder="convnext_atto", pretrained=False,
                      encoder_kwargs=dict(dims=(16, 32, 64, 96), depths=(1, 1, 2, 1), drop_path_rate=0.0),
                      d_state=2, iterations=300, batch_size=8, lr=1e-2, workers=0, save_every=100, log_every=10,
                      eval_every=0),
    "nyud": dict(RECIPE, img_size=(448, 576), eval_every=2000),
    "pascal": dict(RECIPE, img_size=(512, 512), eval_every=5000),
}
# Flags that may change when a run is resumed. All others must be as they were: they decide what is computed.
FREE = {"data_root", "device", "backend", "out", "resume", "workers", "save_every", "eval_every", "log_every", "compile",
        "checkpoint_activations", "tensorboard"}

CHECKPOINTS = ("last.pt", "previous.pt", "best.pt")    # of a run

# Weights of --loss weighted, the usual ones of the multi-task literature.
TASK_WEIGHTS = {"semseg": 1.0, "parsing": 2.0, "saliency": 5.0, "normal": 10.0, "boundary": 50.0, "depth": 1.0}
AMP = {"bf16": torch.bfloat16, "fp16": torch.float16, "off": None}


class RunError(Exception):
    """Ends a run with one line."""


def main(argv: list[str] | None = None) -> dict[str, Results]:
    """The scores on the held-out images, {"trained": ...} and what it is compared with; empty after an interruption.

    Exit code 2 on bad input, 1 where the run had to stop.
    """
    parser = Parser(prog="train.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    args = parser.parse_args(argv)
    try:
        device = start(args.device)
        with contextlib.redirect_stdout(sys.stdout if rank_and_world()[0] == 0 else None):    # None: print is silent
            try:
                run = Run(args, device)
            except (ValueError, OSError, RuntimeError) as error:    # RuntimeError: timm's, of pretrained weights
                raise ValueError(" ".join(str(error).split())) from error
            return run.execute()
    except (ValueError, OSError) as error:
        parser.error(str(error).strip().splitlines()[-1])    # a worker's error has its traceback above that line
    except RunError as error:
        parser.exit(1, f"train.py: {error}\n")
    except torch.OutOfMemoryError as error:
        parser.exit(1, f"train.py: {str(error).splitlines()[0]} Try --checkpoint-activations, --accumulate 2 or a "
                       "smaller --encoder\n")
    finally:
        if dist.is_available() and dist.is_initialized():
            dist.destroy_process_group()


def add_arguments(parser: argparse.ArgumentParser):
    add = parser.add_argument
    add("--dataset", choices=PRESETS, default="synthetic")
    add("--data-root", type=Path, help="default: data/NYUDv2 or data/PASCALContext")
    add("--tasks", nargs="+", metavar="TASK", help="a subset of the data set's tasks (default: all)")
    add("--out", type=Path, help="folder of everything that is written (default: runs/DATASET)")
    add("--resume", action="store_true", help="go on from the newest checkpoint in --out, if there is one")
    add("--init-from", type=Path, metavar="FILE", help="start from a checkpoint's weights, ours or published")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--workers", type=int, help="processes that load data, per training process")
    group = parser.add_argument_group("model: rows of Tables 2-6")
    group.add_argument("--variant", choices=VARIANTS, default="mtmamba")
    group.add_argument("--encoder", help=f"{', '.join(ENCODERS)} or any hierarchical timm model")
    group.add_argument("--encoder-kwargs", type=json.loads, metavar="JSON", help="further arguments of the encoder")
    group.add_argument("--pretrained", action=argparse.BooleanOptionalAction, help="start from timm's encoder weights")
    group = parser.add_argument_group("optimisation")
    group.add_argument("--img-size", nargs=2, type=int, metavar=("H", "W"), help="of the training crops")
    group.add_argument("--iterations", type=int)
    group.add_argument("--batch-size", type=int, help="of all processes together")
    group.add_argument("--accumulate", type=int, default=1, metavar="N", help="compute each batch in N parts, for less "
                       "memory; the logarithms of --loss log are then of a part's losses")
    group.add_argument("--lr", type=float, help="at the start; falls to 0 as (1 - it / iterations)^0.9")
    group.add_argument("--loss", choices=("log", "weighted"), default="log", help="total of the tasks' losses: the sum "
                       "of their logarithms, or " + ", ".join(f"{w:g} {t}" for t, w in TASK_WEIGHTS.items()))
    group.add_argument("--seed", type=int, default=0)
    group = parser.add_argument_group("speed and memory")
    group.add_argument("--backend", choices=BACKENDS, help="of the scan (default: by the device)")
    group.add_argument("--amp", choices=AMP, help="precision (default: bf16 on CUDA, off elsewhere); the scan, norms, "
                       "softmax and losses stay in float32")
    group.add_argument("--compile", action=argparse.BooleanOptionalAction, help="torch.compile (default: on CUDA)")
    group.add_argument("--checkpoint-activations", action="store_true", help="less memory, about a third more time")
    group = parser.add_argument_group("what is written, every so many iterations")
    group.add_argument("--save-every", type=int)
    group.add_argument("--eval-every", type=int, help="0: only at the end")
    group.add_argument("--log-every", type=int)
    group.add_argument("--tensorboard", action="store_true", help="logs for TensorBoard, too (pip install tensorboard)")


def resolve(args: argparse.Namespace, device: torch.device, world: int):
    """Fills the flags that were not given from the data set's preset. Raises ValueError for values that cannot be."""
    preset = dict(PRESETS[args.dataset])
    if args.encoder not in (None, preset["encoder"]):
        preset["encoder_kwargs"] = None    # they belong to the preset's encoder
    args.d_state = preset.pop("d_state")
    for name, value in preset.items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    args.img_size = tuple(args.img_size)
    args.out = args.out or Path("runs") / args.dataset
    args.amp = args.amp or ("bf16" if device.type == "cuda" else "off")
    if args.compile is None:
        args.compile = device.type == "cuda"
    args.pretrained = args.pretrained and args.init_from is None    # the encoder's weights are in that file, too
    for names, least in ((("iterations", "batch_size", "accumulate", "save_every", "log_every"), 1),
                         (("eval_every", "workers", "seed"), 0)):
        for name in names:
            if getattr(args, name) < least:
                flag = "--" + name.replace("_", "-")
                raise ValueError(f"expected {flag} of at least {least}, found {getattr(args, name)}")
    if not 0 < args.lr < math.inf:
        raise ValueError(f"expected --lr above 0, found {args.lr}")
    if not isinstance(args.encoder_kwargs or {}, dict):
        raise ValueError(f"expected --encoder-kwargs like '{{\"embed_dim\": 96}}', found {args.encoder_kwargs}")
    pieces = world * args.accumulate
    if args.batch_size % pieces:
        nearest = sorted({max(1, args.batch_size // pieces) * pieces, (args.batch_size // pieces + 1) * pieces})
        raise ValueError(f"--batch-size {args.batch_size} cannot be split over {world} processes x --accumulate "
                         f"{args.accumulate}; sizes that work are multiples of {pieces}, such as "
                         f"{' or '.join(map(str, nearest))}")


class Run:
    """One training run: what it consists of, and in execute what happens in which order."""

    def __init__(self, args: argparse.Namespace, device: torch.device):
        """Raises ValueError, OSError or RuntimeError for what cannot be trained."""
        self.args, self.device = args, device
        self.rank, self.world = rank_and_world()
        resolve(args, device, self.world)
        found = find_checkpoint(args.out) if args.resume else None
        if not args.resume and any((args.out / name).exists() for name in CHECKPOINTS):
            raise ValueError(f"{args.out} holds a run; go on with it with --resume, or give another folder with --out")

        torch.manual_seed(args.seed)
        self.train_set, self.held_out = build_datasets(args)
        self.model_config = dict(tasks=self.train_set.tasks, img_size=args.img_size, encoder=args.encoder,
                                 encoder_kwargs=args.encoder_kwargs, variant=args.variant, d_state=args.d_state)
        self.model = MTMamba(**self.model_config, pretrained=args.pretrained and found is None)
        if args.init_from and found is None:
            load_weights(self.model, read_checkpoint(args.init_from), args.init_from)
        self.model.to(device)
        self.backend = choose_backend(self.model, args.backend, device)
        share_stochastic_depth(self.model)
        if args.checkpoint_activations:
            checkpoint_activations(self.model)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=args.lr, weight_decay=WEIGHT_DECAY,
                                           betas=(0.9, 0.999), fused=device.type == "cuda")
        self.scaler = torch.amp.GradScaler(device.type, enabled=args.amp == "fp16")    # otherwise it does nothing
        self.iteration, self.evaluated, self.best = 0, 0, -math.inf

        self.config = {key: str(value) if isinstance(value, Path) else value for key, value in vars(args).items()}
        self.versions = dict(python=platform.python_version(), torch=str(torch.__version__), timm=timm.__version__,
                             commit=git_commit())
        args.out.mkdir(parents=True, exist_ok=True)
        if found:
            self.restore(*found)
        self.tensorboard = open_tensorboard(args.out) if args.tensorboard and self.rank == 0 else None

        network = torch.compile(self.model, fullgraph=True) if args.compile else self.model
        self.network = network if self.world == 1 else DistributedDataParallel(
            network, [device] if device.type == "cuda" else None, broadcast_buffers=False, gradient_as_bucket_view=True)

    def execute(self) -> dict[str, Results]:
        """Trains to the end and scores the result; or until SIGTERM or Ctrl-C, then saves."""
        args = self.args
        parameters = sum(p.numel() for p in self.model.parameters())
        print(f"{args.variant} on {args.encoder}: {parameters / 1e6:.2f} M parameters; scan backend: "
              f"{self.backend}; {self.world} x {self.device.type}, {args.batch_size // self.world} "
              "images per process and iteration")
        print("configuration:", json.dumps(self.config))
        self.log(dict(config=self.config, versions=self.versions, processes=self.world, iteration=self.iteration))
        others = {}
        if args.dataset not in PAPER:    # what the benchmarks' figures mean is known, and these cost hours
            if self.iteration == 0:
                others["untrained"] = self.evaluate("evaluating, untrained", final=True)
            others["best constant"] = constant_baseline(self.held_out, MAX_DIST.get(args.dataset))
        self.baseline = selection_baseline(args.dataset, self.model.tasks, others.get("best constant"))
        print("best.pt will be the evaluation with the highest delta_m against", self.baseline)

        with Interruption() as interruption:
            finished = self.train(interruption)
        if not finished:
            print(f"stopped after iteration {self.iteration} of {args.iterations}; go on with the same command and "
                  "--resume")
            return {}
        results = {"trained": self.evaluate_and_keep_best(final=True), **others}
        if self.rank == 0:
            self.print_results(results)
        return results

    def train(self, interruption: "Interruption") -> bool:
        """Iterates from self.iteration to the end; False where it was interrupted. Saves in either case."""
        args = self.args
        order = batch_shares(self.train_set, args, self.iteration, self.rank, self.world)
        loader = iter(DataLoader(self.train_set, batch_sampler=order, num_workers=args.workers,
                                 pin_memory=self.device.type == "cuda", worker_init_fn=ignore_signals))
        bar = tqdm(total=args.iterations * args.batch_size, initial=self.iteration * args.batch_size, desc="training",
                   unit="img", disable=self.rank > 0, dynamic_ncols=True)
        window, unread, stop, saving = [], [], False, True    # losses since the last line of the log; reports to read

        def read_reports():
            nonlocal stop
            while unread:
                report = unread.pop()
                *losses, interrupted = report.read(list(self.model.tasks))
                stop |= interrupted > 0
                window.append(losses)
                if (report.iteration + 1) % args.log_every == 0:
                    self.log_losses(report.iteration + 1, np.mean(window, axis=0), bar)
                    window.clear()

        self.model.train()
        try:
            with bar:
                while self.iteration < args.iterations and not stop:
                    if self.evaluation_is_due():
                        self.evaluate_and_keep_best()
                    report = self.step(loader, interruption.noted)
                    # An iteration's losses are read during the next one, so that the device always has work queued.
                    read_reports()
                    unread.append(report)
                    self.iteration += 1
                    saving = self.iteration % args.save_every == 0 or self.evaluation_is_due()
                    if saving or self.iteration == args.iterations:
                        read_reports()    # before weights are saved: never those after a loss that is not finite
                    bar.update(args.batch_size)
                    if saving:
                        self.save("last.pt")
                read_reports()
        finally:
            if args.workers:    # they ignore signals, so nothing else would end them
                loader._shutdown_workers()
        if not saving:
            self.save("last.pt")
        return self.iteration == args.iterations

    def evaluation_is_due(self) -> bool:
        """Not at the end, which is scored in any case."""
        every = self.args.eval_every
        return every > 0 and self.iteration % every == 0 and self.evaluated < self.iteration < self.args.iterations

    def step(self, loader: Iterator[dict], interrupted: bool) -> "Report":
        """One iteration: forward, backward, update. Returns the batch's losses, those of all processes together."""
        args, parts = self.args, []
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(args.lr, self.iteration, args.iterations)
        self.optimizer.zero_grad(set_to_none=True)
        for part in range(args.accumulate):
            batch = next_batch(loader)
            targets = {task: batch[task].to(self.device, non_blocking=True) for task in self.model.tasks}
            # What stochastic depth draws is a pure function of (seed, iteration, part), so nothing has to be stored.
            torch.manual_seed(int(np.random.SeedSequence([args.seed, self.iteration, part]).generate_state(1)[0]))
            last = part == args.accumulate - 1
            with contextlib.nullcontext() if last or self.world == 1 else self.network.no_sync():
                with autocast(self.device, args.amp):
                    outputs = self.network(batch["image"].to(self.device, non_blocking=True))
                losses = {task: task_loss(task, outputs[task], target, add_up) for task, target in targets.items()}
                # DDP averages the gradients, but the processes' shares of the batch's gradient add up.
                total = total_loss(losses, args.loss) * (self.world / args.accumulate)
                self.scaler.scale(total).backward()
            parts.append(torch.stack(list(losses.values())).detach())
        self.scaler.step(self.optimizer)
        self.scaler.update()
        flag = add_up(torch.full((1,), float(interrupted), device=self.device))    # all processes stop together
        return Report(self.iteration, torch.cat([torch.stack(parts).mean(0), flag]))

    def evaluate(self, description: str = "evaluating", final: bool = False) -> Results:
        """On all held-out images, in float32; with odsF only in the final one, as it takes longer than the rest."""
        return evaluate(self.model, self.held_out, self.device, description, self.args.workers,
                        MAX_DIST.get(self.args.dataset) if final else None)

    def evaluate_and_keep_best(self, final: bool = False) -> Results:
        """Scores the weights as they are; the best ones by delta_m are kept in best.pt."""
        results = self.evaluate(final=final)
        figures = {task: metrics[PRIMARY[task]] for task, metrics in results.items()}
        score = delta_m(figures, {task: self.baseline[task] for task in figures})
        self.evaluated = self.iteration
        self.log(dict(iteration=self.iteration, results=results, delta_m=score))
        self.plot({f"{task}/{name}": value for task, metrics in results.items() for name, value in metrics.items()})
        if self.rank == 0:
            folder = self.args.out / "pictures"
            folder.mkdir(exist_ok=True)
            save_contact_sheet(self.model, self.held_out, self.device, folder / f"{self.iteration:06d}.png")
        if score > self.best:
            self.best = score
            self.save("best.pt")
        return results

    def print_results(self, results: dict[str, Results]):
        args, trained = self.args, results["trained"]
        if args.dataset in PAPER:
            print_paper_table(trained, PAPER[args.dataset])
        else:
            print_table(results)
        improvement = compare(trained, SINGLE_TASK.get(args.dataset))
        if improvement is not None:
            print(f"delta_m against the single-task row of Table 2: {improvement:+.2f} %")
        write_json(args.out / "results.json", dict(dataset=args.dataset, checkpoint=str(args.out / "last.pt"),
                                                   images=len(self.held_out), results=trained, delta_m=improvement))
        print("checkpoint:", args.out / "last.pt", "(the best one: best.pt)")
        print("results:   ", args.out / "results.json")
        print("pictures:  ", save_contact_sheet(self.model, self.held_out, self.device, args.out / "contact_sheet.png"))

    # ------------------------------------------------------------------------------------------ checkpoints and logs

    def save(self, name: str):
        """Writes everything that a run goes on from. From last.pt, the file before is kept as previous.pt."""
        if self.rank == 0:
            content = dict(model=self.model.state_dict(), config=self.model_config, training=self.config,
                           versions=self.versions, optimizer=self.optimizer.state_dict(),
                           scaler=self.scaler.state_dict(), iteration=self.iteration, evaluated=self.evaluated,
                           best=self.best)
            previous = self.args.out / "previous.pt" if name == "last.pt" else None
            save_checkpoint(self.args.out / name, content, previous)

    def restore(self, path: Path, content: dict):
        """Raises ValueError where the run was another one."""
        different = [f"--{key.replace('_', '-')} {content['training'].get(key)} (now {value})"
                     for key, value in self.config.items()
                     if key not in FREE and content["training"].get(key) != value]
        if different:
            raise ValueError(f"{path} is of a run with {', '.join(different)}; resume with the same flags, or start "
                             "anew in another folder with --out")
        load_weights(self.model, content, path)
        self.optimizer.load_state_dict(content["optimizer"])
        self.scaler.load_state_dict(content["scaler"])
        self.iteration, self.evaluated, self.best = (content[key] for key in ("iteration", "evaluated", "best"))
        print(f"resuming {path} after iteration {self.iteration}")

    def log(self, line: dict):
        if self.rank == 0:
            with open(self.args.out / "log.jsonl", "a") as file:
                file.write(json.dumps(line) + "\n")

    def log_losses(self, iteration: int, means: np.ndarray, bar: tqdm):
        """Means over the iterations since the last line: to the progress bar, log.jsonl and TensorBoard."""
        if self.rank > 0:
            return
        losses = dict(zip(self.model.tasks, means.tolist()))
        lr = learning_rate(self.args.lr, iteration - 1, self.args.iterations)
        memory = torch.cuda.max_memory_allocated(self.device) / 2**30 if self.device.type == "cuda" else None
        shown = " ".join(f"{task} {loss:.3f}" for task, loss in losses.items())
        bar.set_postfix_str(f"{shown} lr {lr:.1e}" + (f" {memory:.1f} GiB" if memory else ""), refresh=False)
        rate = bar.format_dict["rate"] or (bar.n - bar.initial) / max(bar.format_dict["elapsed"], 1e-9)
        self.log(dict(iteration=iteration, losses=losses, lr=lr, images_per_second=rate, peak_memory_gib=memory,
                      time=time.time()))
        self.plot({**{f"loss/{task}": loss for task, loss in losses.items()}, "lr": lr}, iteration)

    def plot(self, values: dict[str, float], iteration: int | None = None):
        """In TensorBoard."""
        if self.tensorboard:
            for name, value in values.items():
                self.tensorboard.add_scalar(name, value, self.iteration if iteration is None else iteration)
            self.tensorboard.flush()


class Report:
    """An iteration's losses and its flag of interruption, on their way from the device."""

    def __init__(self, iteration: int, values: Tensor):
        self.iteration, self.values = iteration, values.to("cpu", non_blocking=True)
        self.arrived = None
        if values.is_cuda:
            self.arrived = torch.cuda.Event()
            self.arrived.record()

    def read(self, tasks: list[str]) -> list[float]:
        """Waits for them. Raises RunError where a loss is not finite."""
        if self.arrived:
            self.arrived.synchronize()
        values = self.values.tolist()
        for task, loss in zip(tasks, values):
            if not math.isfinite(loss):
                raise RunError(f"the loss of {task} is {loss} in iteration {self.iteration}; nothing was saved since. "
                               "Go on from the last checkpoint (--init-from) with a lower --lr or --amp off")
        return values


class Interruption:
    """Notes SIGTERM and Ctrl-C, so that the run can finish its step and save; a second one ends it at once."""

    def __enter__(self):
        self.noted = False
        self.handlers = {number: signal.signal(number, self.note) for number in (signal.SIGTERM, signal.SIGINT)}
        return self

    def note(self, number, frame):
        self.noted = True
        self.__exit__()

    def __exit__(self, *_):
        for number, handler in self.handlers.items():
            signal.signal(number, handler)


def ignore_signals(worker: int):
    """Ctrl-C and a cluster's SIGTERM reach a loader's processes, too; they are to go on until the step is done."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


# ------------------------------------------------------------------------------------------------------------- data

def build_datasets(args: argparse.Namespace) -> tuple[Dataset, Dataset]:
    """The training and the held-out data set."""
    if args.dataset == "synthetic":    # every scene is new; even seeds train, odd ones evaluate: the two never meet
        train_set = Synthetic(args.iterations * args.batch_size, args.img_size, seed=2 * args.seed, tasks=args.tasks)
        return train_set, held_out(args.img_size, train_set.tasks)
    data_set = DATASETS[args.dataset]
    root = args.data_root or data_set.ROOT
    train_set = data_set(root, "train", args.tasks, args.img_size, seed=args.seed)
    return train_set, open_dataset(args.dataset, train_set.tasks, {}, root)


def batch_shares(dataset: Dataset, args: argparse.Namespace, start: int, rank: int, world: int) -> Iterator[list]:
    """This process's share of each part of each batch from iteration `start` on, as indices of the data set.

    The samples stand in one order, a pure function of the seed: epoch after epoch, each shuffled anew. An iteration
    takes the next `batch_size` of them, whatever the number of processes, parts and workers.
    """
    @functools.lru_cache(maxsize=2)
    def shuffled(epoch: int) -> np.ndarray:
        return np.random.default_rng([args.seed, epoch]).permutation(len(dataset))

    def sample(position: int) -> int | tuple[int, int]:
        if isinstance(dataset, Synthetic):    # has a scene for each position
            return position
        epoch, i = divmod(position, len(dataset))
        return epoch, int(shuffled(epoch)[i])

    part = args.batch_size // args.accumulate
    share = part // world
    for first in range(start * args.batch_size, args.iterations * args.batch_size, part):
        yield [sample(position) for position in range(first + rank * share, first + (rank + 1) * share)]


def next_batch(loader: Iterator[dict]) -> dict:
    """Raises RunError, naming the file, where a sample cannot be loaded."""
    try:
        return next(loader)
    except (ValueError, OSError) as error:
        raise RunError(str(error).strip().splitlines()[-1]) from error    # a worker's traceback stands above


# ----------------------------------------------------------------------------------------------------- optimisation

def learning_rate(initial: float, iteration: int, iterations: int) -> float:
    """Polynomial decay without warm-up. A pure function of the iteration, so nothing has to be stored to resume."""
    return initial * (1 - iteration / iterations) ** LR_POWER


def total_loss(losses: dict[str, Tensor], kind: str = "log") -> Tensor:
    """The tasks' losses (scalars) in one.

    "log": sum over tasks of log(loss + 1e-8), the published runs' total: a task counts by its relative, not its
    absolute, improvement, so no weights are needed. The paper does not state the total. "weighted": the sum with
    TASK_WEIGHTS.
    """
    if kind == "log":
        return sum(torch.log(loss + 1e-8) for loss in losses.values())
    return sum(TASK_WEIGHTS[task] * loss for task, loss in losses.items())


def task_loss(task: str, output: Tensor, target: Tensor, add_up=lambda sums: sums) -> Tensor:
    """The task's loss, a scalar: float32 whatever the output's type, a mean over the valid pixels of the batch.

    output: raw output (B, C_t, H, W). target: labels (B, 1 or 3, H, W), 255 where to ignore. A batch without any
    valid pixel has loss 0 (and zero gradients). Raises ValueError on an unknown task.
    add_up: sums a tensor over the processes, in place, where they share a batch. The loss is then that of the whole
    batch in each of them, and its gradient is this process's share: the shares add up to the whole batch's gradient.

    semseg, parsing   cross-entropy
    saliency          cross-entropy, salient pixels weighted with the share of the others in the batch and vice versa
    boundary          binary cross-entropy, boundary pixels weighted 0.95, the others 0.05
    normal            absolute difference of the unit-length prediction, summed over the three channels
    depth             absolute difference
    """
    output = output.float()
    valid = (target != IGNORE).all(1)                                    # (B, H, W)
    positive = (target[:, 0] == 1) & valid
    pixels, positives = add_up(torch.stack([valid.sum(), positive.sum()]))
    pixels = pixels.clamp(min=1)
    if task in ("semseg", "parsing"):
        loss = F.cross_entropy(output, target[:, 0].long(), ignore_index=IGNORE, reduction="none")
    elif task == "saliency":
        w1 = 1 - positives / pixels
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
    own = torch.where(valid, loss, 0).sum()
    everywhere = own + (add_up(own.detach().clone()) - own.detach())     # the sum's value, with the own part's gradient
    return everywhere / pixels


def autocast(device: torch.device, amp: str):
    return torch.autocast(device.type, AMP[amp], enabled=amp != "off")


class SharedDropPath(DropPath):
    """Stochastic depth, drawn per sample for the batch of all processes, of which this one takes its share: so a run
    does not depend on their number."""

    def forward(self, x: Tensor) -> Tensor:
        if self.drop_prob == 0 or not self.training:
            return x
        keep = 1 - self.drop_prob
        kept = x.new_empty(self.world, len(x), *(1,) * (x.ndim - 1)).bernoulli_(keep)[self.rank]
        return x * (kept / keep)


def share_stochastic_depth(model: MTMamba):
    for module in model.modules():
        if type(module) is DropPath:
            module.__class__ = SharedDropPath
            module.rank, module.world = rank_and_world()


def checkpoint_activations(model: MTMamba):
    """Encoder blocks, decoder stages and heads keep their inputs alone and run again in the backward pass."""
    for encoder in [model.encoder] if model.shared_encoder else model.encoder.values():
        encoder.backbone.set_grad_checkpointing(True)
    for module in (*model.stages, *model.heads.values()):
        module.forward = functools.partial(checkpoint, module.forward, use_reentrant=False)


def selection_baseline(dataset: str, tasks: dict[str, int], constant: Results | None) -> dict[str, float]:
    """What the best checkpoint is chosen against by delta_m, by task.

    NYUDv2: Table 2's single-task row; PASCAL-Context, which has none in the paper: its own row of Table 1; any other
    data set: the best constant prediction. While training, boundaries are scored by pixelF in place of odsF.
    """
    if constant:
        return {task: constant[task][PRIMARY[task]] for task in tasks}
    return {task: SINGLE_TASK.get(dataset, PAPER[dataset])[task] for task in tasks}


# ------------------------------------------------------------------------------------------------------------- files

def save_checkpoint(path: Path, content: dict, previous: Path | None = None):
    """Replaces an existing file only by a whole one that is on the disk; with previous, keeps the old one there."""
    temporary = path.with_suffix(".tmp")
    with open(temporary, "wb") as file:
        torch.save(content, file)
        file.flush()
        os.fsync(file.fileno())
    if previous and path.exists():
        os.replace(path, previous)
    os.replace(temporary, path)


def find_checkpoint(folder: Path) -> tuple[Path, dict] | None:
    """The newest readable checkpoint of a run and its content, None where it has not saved any yet. Reports the
    unreadable ones; raises ValueError where all are."""
    paths = [path for name in CHECKPOINTS if (path := folder / name).exists()]
    for path in sorted(paths, key=lambda path: path.stat().st_mtime_ns, reverse=True):
        try:
            content = read_checkpoint(path)
            if "optimizer" not in content:
                raise ValueError(f"{path} has weights alone; start from it with --init-from {path}")
            return path, content
        except ValueError as error:
            print(f"cannot resume from {path}: {error}", file=sys.stderr)
    if paths:
        raise ValueError(f"none of the checkpoints in {folder} can be read; start anew with another --out")
    print(f"nothing to resume in {folder}: starting")
    return None


def git_commit() -> str | None:
    """Of the folder of this file, None where it is no checkout."""
    try:
        return subprocess.run(["git", "rev-parse", "HEAD"], cwd=Path(__file__).parent, capture_output=True, text=True,
                              check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def open_tensorboard(folder: Path):
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ValueError("--tensorboard needs TensorBoard; pip install tensorboard") from error
    return SummaryWriter(folder)


if __name__ == "__main__":
    main()
