"""Trains MTMamba.

    python train.py                                                # laptop: a small model, synthetic scenes, minutes
    python train.py --dataset nyud                                 # the paper's recipe on one GPU
    torchrun --nproc_per_node=8 train.py --dataset pascal          # on eight: the same run, whatever the number
    torchrun --nnodes=2 --nproc_per_node=4 --rdzv_backend=c10d --rdzv_endpoint=HOST:29500 \\
        train.py --dataset pascal                                  # on two nodes: this line on each
    python train.py --dataset cityscapes --variant mtmamba++       # MTMamba++
    python train.py --dataset nyud --resume                        # goes on after an interruption
    python train.py --dataset nyud --init-from X --out runs/tuned  # fine-tunes a checkpoint, ours or a published one

Losses, optimiser and schedule are the paper's and, where it is silent, the published implementation's. A run writes to
runs/DATASET (elsewhere with --out): last.pt, previous.pt, best.pt, log.jsonl, pictures/, and at its end results.json.
"""

# Reads top-down: presets; main and its flags; Run, from its set-up to its evaluations; data; losses and optimisation;
# checkpoints; log. evaluate.py has the reading of checkpoints, scores, tables and, last, processes and files.

import os

# Bounds the spinning of PyTorch's threads on a CPU, for the reason told in evaluate.py; before torch is imported.
if not {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY", "GOMP_CPU_AFFINITY"} & os.environ.keys():
    os.environ["GOMP_SPINCOUNT"] = "2000"

import argparse
import contextlib
import functools
import json
import math
import platform
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import timm
import torch
import torch.distributed as dist
import torch.nn.functional as F
from timm.layers import DropPath, convert_sync_batchnorm
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, Dataset, default_collate
from tqdm import tqdm

from datasets import (
    DATASETS,
    IGNORE,
    Parser,
    Synthetic,
    WriteError,
    append,
    check_sample,
    check_samples,
    checks_itself,
    find_dataset_class,
    interrupt,
    replacing,
)
from evaluate import (
    MAX_DIST,
    PAPER,
    SINGLE_TASK,
    Results,
    add_up,
    allow_open_files,
    check_writable,
    choose_backend,
    compare,
    constant_baseline,
    depth_name,
    evaluate,
    held_out,
    is_published,
    load_checkpoint,
    load_weights,
    open_dataset,
    open_own_dataset,
    print_paper_table,
    print_table,
    rank_and_world,
    read_checkpoint,
    save_contact_sheet,
    start,
    write_json,
)
from metrics import PRIMARY, SIGNALS, delta_m, follow_main
from mtmamba import BACKENDS, ENCODERS, VARIANTS, DenseHead, MTMamba

LR_POWER = 0.9

# What each data set is trained with; the flags of the same names override it.
RECIPE = dict(encoder=ENCODERS["swin-large"], encoder_kwargs=None, pretrained=True, d_state=16, iterations=50_000,
              batch_size=8, lr=1e-4, weight_decay=1e-5, loss="log", workers=8, save_every=1000, log_every=50)
PRESETS = {
    # A model small enough to learn six tasks on two CPU cores in minutes: small images, a narrow encoder trained from
    # scratch (hence the higher learning rate), and 1 state instead of 16. Rendering takes a tenth of the time, and a
    # process of its own for it would take a core from the network.
    "synthetic": dict(img_size=(64, 96), encoder="convnext_atto", pretrained=False,
                      encoder_kwargs=dict(dims=(16, 32, 96, 160), depths=(1, 1, 3, 2), drop_path_rate=0.0),
                      d_state=1, iterations=350, batch_size=8, lr=1e-2, weight_decay=1e-5, loss="log", workers=0,
                      save_every=100, log_every=10, eval_every=0),
    "nyud": dict(RECIPE, img_size=(448, 576), eval_every=2000),
    "pascal": dict(RECIPE, img_size=(512, 512), eval_every=5000),
    "cityscapes": dict(RECIPE, img_size=(512, 1024), iterations=40_000, weight_decay=1e-6, eval_every=2000),
}
OWN_PRESET = dict(RECIPE, img_size=(480, 640), eval_every=2000)    # of path/to/file.py:Class
VARIANT_PRESETS = {    # what a variant changes in these rows
    ("nyud", "mtmamba++"): dict(iterations=40_000, lr=2e-5, weight_decay=1e-6, loss="weighted"),
    ("pascal", "mtmamba++"): dict(iterations=40_000, lr=8e-5, weight_decay=1e-6),
}
# Flags that may change when a run is resumed. All others must be as they were: they decide what is computed.
FREE = {"data_root", "device", "backend", "out", "resume", "accumulate", "workers", "save_every", "eval_every",
        "log_every", "compile", "checkpoint_activations", "tensorboard"}

CHECKPOINTS = ("last.pt", "previous.pt", "best.pt")    # of a run

# Weights of --loss weighted, the usual ones of the multi-task literature.
TASK_WEIGHTS = {"semseg": 1.0, "parsing": 2.0, "saliency": 5.0, "normal": 10.0, "boundary": 50.0, "depth": 1.0}
AMP = {"bf16": torch.bfloat16, "fp16": torch.float16, "off": None}


class RunError(Exception):
    """Ends a run with one line."""


def main(argv: list[str] | None = None) -> dict[str, Results]:
    """The scores on the held-out images, {"trained": ...} and what it is compared with; empty after an interruption.

    Exit code 2 on bad input, 1 where the run had to stop, 130 after Ctrl-C or SIGTERM where nothing could be saved.
    """
    parser = Parser(prog="train.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    args = parser.parse_args(argv)
    try:
        try:
            device = start(args.device)
            silence = contextlib.redirect_stdout(sys.stdout if rank_and_world()[0] == 0 else None)    # None: no output
            with silence:
                run = Run(args, device)
        except (ValueError, OSError, RuntimeError) as error:    # RuntimeError: timm's, of pretrained weights
            parser.error(" ".join(str(error).split()))
        with silence:
            return run.execute()
    except KeyboardInterrupt:
        parser.exit(130, "train.py: interrupted\n")
    except (RunError, ValueError, OSError, RuntimeError) as error:
        if (message := explain(error)) is None:
            raise
        parser.exit(1, f"train.py: {message}\n")
    finally:
        if dist.is_available() and dist.is_initialized():
            dist.destroy_process_group()


def explain(error: Exception) -> str | None:
    """One line for what stops a run from outside, None for what needs its traceback."""
    text = str(error).strip() or type(error).__name__
    if isinstance(error, WriteError):
        return f"{text}; what was saved before is as it was. Make room, then go on with --resume"
    if isinstance(error, torch.cuda.OutOfMemoryError):
        return f"{text.splitlines()[0]} Try --checkpoint-activations, --accumulate 2 or a smaller --encoder"
    if "Too many open files" in text or "ancdata" in text:    # the second is how a process learns of the first
        return "too many open files; raise the limit (ulimit -n 65536) or give fewer --workers"
    if "closed by peer" in text:
        return "another process of the run ended"
    if isinstance(error, torch._dynamo.exc.TorchDynamoException):
        reason = " ".join(text.splitlines()[:2])
        return f"--compile failed ({reason}); install a C++ compiler, or train with --no-compile"
    if isinstance(error, (RunError, ValueError, OSError)) or "DataLoader worker" in text:
        return text.splitlines()[-1]    # a worker's error has its traceback above that line
    return None


def add_arguments(parser: argparse.ArgumentParser):
    add = parser.add_argument
    add("--dataset", default="synthetic", metavar="NAME", help=f"{', '.join(PRESETS)}, or path/to/file.py:Class, a "
        "data set of one's own with TASKS and a constructor (split, size) (default: synthetic)")
    add("--data-root", type=Path, help=f"default: {' or '.join(d.ROOT for d in DATASETS.values())}")
    add("--tasks", nargs="+", metavar="TASK", help="a subset of the data set's tasks (default: all)")
    add("--out", type=Path, help="folder of everything that is written (default: runs/DATASET)")
    add("--resume", action="store_true", help="go on from the newest checkpoint in --out, if there is one")
    add("--init-from", type=Path, metavar="FILE", help="start from a checkpoint's weights, ours or published")
    add("--init-partial", action="store_true", help="of --init-from take what fits this model and list the rest: for "
        "other tasks or classes; the cross-task blocks are taken where the tasks are the same")
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
    group.add_argument("--accumulate", type=int, default=1, metavar="N", help="compute each batch in N parts: less "
                       "memory, the same result (but batch norm, as in mtmamba++, is of a part)")
    group.add_argument("--lr", type=float, help="at the start; falls to 0 as (1 - it / iterations)^0.9")
    group.add_argument("--weight-decay", type=float)
    group.add_argument("--loss", choices=("log", "weighted"), help="an image's total of the tasks' losses: the sum of "
                       "their logarithms, or " + ", ".join(f"{w:g} {t}" for t, w in TASK_WEIGHTS.items()))
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
    if args.dataset not in PRESETS:
        find_dataset_class(args.dataset)    # raises, with what it could be
    preset = PRESETS.get(args.dataset, OWN_PRESET) | VARIANT_PRESETS.get((args.dataset, args.variant), {})
    if args.encoder not in (None, preset["encoder"]):
        preset["encoder_kwargs"] = None    # they belong to the preset's encoder
    args.d_state = preset.pop("d_state")
    for name, value in preset.items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    args.img_size = tuple(args.img_size)
    args.out = args.out or Path("runs") / args.dataset.rpartition(":")[2]
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
    if not 0 <= args.weight_decay < math.inf:
        raise ValueError(f"expected --weight-decay of at least 0, found {args.weight_decay}")
    if args.init_partial and args.init_from is None:
        raise ValueError("--init-partial says what to take of a checkpoint; name it with --init-from FILE")
    if not isinstance(args.encoder_kwargs or {}, dict):
        raise ValueError(f"expected --encoder-kwargs like '{{\"embed_dim\": 96}}', found {args.encoder_kwargs}")
    pieces = world * args.accumulate
    if args.batch_size % pieces:
        nearest = sorted({max(1, args.batch_size // pieces) * pieces, (args.batch_size // pieces + 1) * pieces})
        raise ValueError(f"--batch-size {args.batch_size} cannot be split over {world} processes x --accumulate "
                         f"{args.accumulate}; sizes that work are multiples of {pieces}, such as "
                         f"{' or '.join(map(str, nearest))}")


# -------------------------------------------------------------------------------------------------------------- run

class Run:
    """One training run: what it consists of, and in execute what happens in which order."""

    def __init__(self, args: argparse.Namespace, device: torch.device):
        """Raises ValueError, OSError or RuntimeError for what cannot be trained."""
        self.args, self.device = args, device
        self.rank, self.world = rank_and_world()
        resolve(args, device, self.world)
        allow_open_files(args.workers)
        found = find_checkpoint(args.out) if args.resume else None
        if not args.resume and any((args.out / name).exists() for name in CHECKPOINTS):
            raise ValueError(f"{args.out} holds a run; go on with it with --resume, or give another folder with --out")

        torch.manual_seed(args.seed)
        self.train_set, self.held_out = build_datasets(args)
        model_config = dict(tasks=self.train_set.tasks, img_size=args.img_size, encoder=args.encoder,
                            encoder_kwargs=args.encoder_kwargs, variant=args.variant,
                            output_scale=getattr(self.train_set, "LABEL_SCALE", 1), d_state=args.d_state)
        self.model = MTMamba(**model_config, pretrained=args.pretrained and found is None)
        if args.init_from and found is None:
            load = load_fitting_weights if args.init_partial else load_all_weights
            load(self.model, args.init_from, args.encoder, args.encoder_kwargs)
        self.model.to(device)
        if self.world > 1 and device.type == "cuda":    # elsewhere PyTorch has none
            convert_sync_batchnorm(self.model)
        self.backend = choose_backend(self.model, args.backend, device)
        self.share = share_stochastic_depth(self.model, args.accumulate * self.world, device)
        if args.checkpoint_activations:
            checkpoint_activations(self.model)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=args.lr, weight_decay=args.weight_decay,
                                           betas=(0.9, 0.999), fused=device.type in ("cuda", "cpu"))
        self.scaler = torch.amp.GradScaler(device.type, enabled=args.amp == "fp16")    # otherwise it does nothing
        self.iteration, self.evaluated = 0, 0    # the iterations that are done, and when they were last evaluated

        self.config = {key: str(value) if isinstance(value, Path) else value for key, value in vars(args).items()}
        self.versions = dict(python=platform.python_version(), torch=str(torch.__version__), timm=timm.__version__,
                             commit=git_commit())
        about = dict(config=model_config, training=self.config, versions=self.versions)
        self.checkpoints = Checkpoints(args.out, self.rank, self.model, self.optimizer, self.scaler, about)
        if found:
            self.iteration, self.evaluated = self.checkpoints.restore(*found)
        check_writable(args.out)
        self.log = Log(args, self.rank, self.model, self.held_out, device)

        synchronised = any(isinstance(module, torch.nn.SyncBatchNorm) for module in self.model.modules())
        # PyTorch cannot trace its synchronised batch norm, which leaves the rest in several graphs.
        self.network = self.model
        if args.compile:    # images have one size here
            self.network = torch.compile(self.model, fullgraph=not synchronised, dynamic=False)
        if self.world > 1:
            self.between_cpus = dist.new_group(backend="gloo")    # the flag of interruption waits for no device
            align_gradients(self.model)
            self.network = DistributedDataParallel(self.network, [device] if device.type == "cuda" else None,
                                                   broadcast_buffers=False, gradient_as_bucket_view=True)

    def execute(self) -> dict[str, Results]:
        """Trains to the end and scores the result; or until SIGTERM or Ctrl-C, then saves."""
        args = self.args
        parameters = sum(p.numel() for p in self.model.parameters())
        print(f"{args.variant} on {args.encoder}: {parameters / 1e6:.2f} M parameters; scan backend: "
              f"{self.backend}; {self.world} x {self.device.type}, {args.batch_size // self.world} "
              "images per process and iteration")
        print("configuration:", json.dumps(self.config))
        self.log.write(dict(config=self.config, versions=self.versions, processes=self.world, iteration=self.iteration))
        others = {}
        if args.dataset not in PAPER:    # what the benchmarks' figures mean is known, and these cost hours
            if self.iteration == 0:
                others["untrained"] = self.evaluate("evaluating, untrained", final=True)
            others["best constant"] = constant_baseline(self.held_out, MAX_DIST.get(args.dataset))
        self.baseline = selection_baseline(args.dataset, self.model.tasks, others.get("best constant"))
        print("best.pt will be the evaluation with the highest delta_m against", self.baseline)

        with Interruption() as interruption:
            finished = self.train(interruption)
            trained = self.evaluate("evaluating", final=True, interruption=interruption) if finished else None
            if trained is None:
                print(f"stopped after iteration {self.iteration} of {args.iterations}; go on with the same command and "
                      "--resume")
                return {}
            results = {"trained": trained, **others}
            self.log.print_results(results)    # before anything is written, which may fail
            self.keep(trained)
            self.log.write_results(trained)
        return results

    def train(self, interruption: "Interruption") -> bool:
        """Iterates from self.iteration to the end; False where it was interrupted. Saves in either case."""
        args, saved = self.args, True
        loader = open_loader(self.train_set, args, self.iteration, self.rank, self.world, self.device)
        self.model.train()
        try:
            with self.log.open_bar(self.iteration) as bar:
                while self.iteration < args.iterations:
                    if self.evaluation_is_due():
                        results = self.evaluate("evaluating", interruption=interruption)
                        if results is not None:
                            self.keep(results)
                    if self.any_process(interruption.noted):
                        break
                    self.log.add(self.step(loader))
                    self.iteration += 1
                    saved = self.iteration % args.save_every == 0 or self.evaluation_is_due()
                    bar.update(args.batch_size)
                    if saved:
                        self.save_last()
                if not saved:
                    self.save_last()
        finally:
            if args.workers:    # they ignore signals, so nothing else would end them
                loader._shutdown_workers()
        return self.iteration == args.iterations

    def save_last(self):
        self.log.read()    # before weights are saved: never those after a loss that is not finite
        self.checkpoints.save("last.pt", self.iteration, self.evaluated)

    def evaluation_is_due(self) -> bool:
        """Not at the end, which is scored in any case."""
        every = self.args.eval_every
        return every > 0 and self.iteration % every == 0 and self.evaluated < self.iteration < self.args.iterations

    def any_process(self, noted: bool) -> bool:
        """Whether it is so in any process: all of them have to stop after the same iteration."""
        if self.world == 1:
            return noted
        flag = torch.tensor(int(noted))
        dist.all_reduce(flag, group=self.between_cpus)
        return bool(flag)

    def step(self, loader: Iterator[dict]) -> "Report":
        """One iteration: forward, backward, update. Reports the losses of the batch, of all processes together."""
        args, sums = self.args, 0
        lr = learning_rate(args.lr, self.iteration, args.iterations)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.zero_grad(set_to_none=True)
        for part in range(args.accumulate):
            batch = next_batch(loader)
            targets = {task: batch[task].to(self.device, non_blocking=True) for task in self.model.tasks}
            # What stochastic depth draws is a pure function of (seed, iteration), so nothing has to be stored.
            torch.manual_seed(int(np.random.SeedSequence([args.seed, self.iteration]).generate_state(1)[0]))
            self.share.fill_(part * self.world + self.rank)
            last = part == args.accumulate - 1
            with contextlib.nullcontext() if last or self.world == 1 else self.network.no_sync():
                with autocast(self.device, args.amp):
                    outputs = self.network(batch["image"].to(self.device, non_blocking=True))
                losses = {task: task_loss(task, outputs[task], target) for task, target in targets.items()}
                # DDP averages the gradients over the processes.
                self.scaler.scale(total_loss(losses, args.loss) / args.accumulate).backward()
            labelled = [valid_pixels(target).flatten(1).any(1) for target in targets.values()]    # (B,) each
            sums += torch.stack([torch.stack([loss.detach().sum() for loss in losses.values()]),
                                 torch.stack([images.sum() for images in labelled])])
        self.scaler.step(self.optimizer)
        self.scaler.update()
        return Report(self.iteration, lr, add_up(sums))

    def evaluate(self, description: str, final: bool = False,
                 interruption: "Interruption | None" = None) -> Results | None:
        """Scores the weights as they are on all held-out images, in float32; with odsF only in the final one, as it
        takes longer than the rest. None where it was interrupted: the weights are in last.pt."""
        if self.world > 1:
            for name, buffer in self.model.named_buffers():
                if "running_" in name:    # of batch norm: where it is not synchronised, the first process's count
                    dist.broadcast(buffer, 0)
        return evaluate(self.model, self.held_out, self.device, description, self.args.workers,
                        MAX_DIST.get(self.args.dataset) if final else None,
                        stop=interruption and (lambda: interruption.noted))

    def keep(self, results: Results):
        """Logs the scores of the weights as they are; the best weights by delta_m are kept in best.pt."""
        figures = {task: metrics[PRIMARY[task]] for task, metrics in results.items() if task in self.baseline}
        score = delta_m(figures, {task: self.baseline[task] for task in figures}) if figures else None
        self.evaluated = self.iteration
        self.log.write_scores(self.iteration, results, score)
        self.checkpoints.keep_best(score, self.iteration)


class Interruption:
    """Notes signals, so that the run can finish its step and save: the SIGTERM of a cluster or of torchrun, USR1 as
    Slurm warns with, HUP of a closed terminal, all of them however often; and Ctrl-C, of which a second one ends the
    run at once."""

    def __enter__(self):
        self.noted = False
        self.handlers = {number: signal.signal(number, self.note) for number in SIGNALS
                         if signal.getsignal(number) != signal.SIG_IGN}    # nohup's stays ignored
        return self

    def note(self, number, frame):
        self.noted = True
        if number == signal.SIGINT:
            signal.signal(number, self.handlers[number])

    def __exit__(self, *_):
        for number, handler in self.handlers.items():
            # Once it was noted the process is ending, which another SIGTERM must not turn into being killed.
            if number == signal.SIGINT or not self.noted:
                signal.signal(number, handler)


# ------------------------------------------------------------------------------------------------------------- data

def build_datasets(args: argparse.Namespace) -> tuple[Dataset, Dataset]:
    """The training and the held-out data set. Raises RunError where one of their first samples is wrong."""
    if args.dataset == "synthetic":    # every scene is new; even seeds train, odd ones evaluate: the two never meet
        train_set = Synthetic(args.iterations * args.batch_size, args.img_size, seed=2 * args.seed, tasks=args.tasks)
        return train_set, held_out(args.img_size, train_set.tasks)
    data_set = find_dataset_class(args.dataset)
    if args.dataset in DATASETS:
        train_set = data_set(args.data_root or data_set.ROOT, "train", args.tasks, args.img_size, seed=args.seed)
    else:
        train_set = open_own_dataset(data_set, "train", args.img_size, args.tasks)
        train_set.seed = args.seed
    config = dict(img_size=args.img_size, output_scale=getattr(data_set, "LABEL_SCALE", 1))
    held_out_set = open_dataset(args.dataset, train_set.tasks, config, args.data_root)
    for split, dataset in (("train", train_set), ("val", held_out_set)):    # what would train to nothing shows now
        try:
            messages = check_samples(dataset)
        except (ValueError, OSError) as error:
            raise RunError(error) from error
        for message in messages:
            print(f"look at the {split} labels: {message}")
    return train_set, held_out_set


def open_loader(dataset: Dataset, args: argparse.Namespace, start: int, rank: int, world: int,
                device: torch.device) -> Iterator[dict]:
    """Loads what batch_shares lists."""
    collate = None if checks_itself(dataset) else functools.partial(collate_checked, tasks=dataset.tasks,
                                                                    label_scale=getattr(dataset, "LABEL_SCALE", 1))
    return iter(DataLoader(dataset, batch_sampler=batch_shares(dataset, args, start, rank, world),
                           num_workers=args.workers, collate_fn=collate, pin_memory=device.type == "cuda",
                           worker_init_fn=follow_main))


def collate_checked(samples: list[dict], tasks: dict[str, int], label_scale: int) -> dict:
    """A batch of a data set that does not check its samples itself. Raises ValueError that names sample and task."""
    for sample in samples:
        check_sample(sample, tasks, label_scale)
        size, first = (tuple(one["image"].shape[1:]) for one in (sample, samples[0]))
        if size != first:
            raise ValueError(f"{sample['name']}: expected an image of {first[0]}x{first[1]} pixels as that of "
                             f"{samples[0]['name']}, found {size[0]}x{size[1]}; give all that train one size")
    return default_collate([{key: sample[key] for key in ("image", *tasks)} for sample in samples])


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
    """The tasks' losses (B,) in one scalar, the mean over the images of an image's total.

    "log": sum over tasks of log(loss + 1e-8), the published runs' total: a task counts by its relative, not its
    absolute, improvement, so no weights are needed. The paper does not state the total. "weighted": the sum with
    TASK_WEIGHTS.
    """
    if kind == "log":
        return sum(torch.log(loss + 1e-8) for loss in losses.values()).mean()
    return sum(TASK_WEIGHTS[task] * loss for task, loss in losses.items()).mean()


def task_loss(task: str, output: Tensor, target: Tensor) -> Tensor:
    """The task's loss of each image, (B,): float32 whatever the output's type, a mean over the image's valid pixels.

    output: raw output (B, C_t, H, W). target: labels (B, 1 or 3, H, W), 255 where to ignore. An image without any
    valid pixel has loss 0 (and zero gradients). Raises ValueError on an unknown task.
    Nothing is shared between the images: the published runs had one image in each of 8 processes.

    semseg, parsing   cross-entropy
    saliency          cross-entropy, salient pixels weighted with the share of the others in the image and vice versa
    boundary          binary cross-entropy, boundary pixels weighted 0.95, the others 0.05
    normal            absolute difference of the unit-length prediction, summed over the three channels
    depth             absolute difference
    """
    output = output.float()
    valid = valid_pixels(target)                                         # (B, H, W)
    pixels = valid.sum((1, 2)).clamp(min=1)                              # (B,)
    if task in ("semseg", "parsing"):
        loss = F.cross_entropy(output, target[:, 0].long(), ignore_index=IGNORE, reduction="none")
    elif task == "saliency":
        positive = (target[:, 0] == 1) & valid
        w1 = 1 - positive.sum((1, 2), keepdim=True) / pixels[:, None, None]
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
    return torch.where(valid, loss, 0).sum((1, 2)) / pixels


def valid_pixels(target: Tensor) -> Tensor:
    """Where labels (B, 1 or 3, H, W) count: bool (B, H, W)."""
    return (target != IGNORE).all(1)


def autocast(device: torch.device, amp: str):
    return torch.autocast(device.type, AMP[amp], enabled=amp != "off")


class SharedDropPath(DropPath):
    """Stochastic depth, drawn per sample for the whole batch, of which this process takes the share of the part that
    it computes: so a run depends neither on the number of processes nor on --accumulate."""

    def forward(self, x: Tensor) -> Tensor:
        if self.drop_prob == 0 or not self.training:
            return x
        keep = 1 - self.drop_prob
        kept = x.new_empty(self.shares, len(x), *(1,) * (x.ndim - 1)).bernoulli_(keep).index_select(0, self.share)
        return x * (kept[0] / keep)


def share_stochastic_depth(model: MTMamba, shares: int, device: torch.device) -> Tensor:
    """Returns the number (1,), to be set in place, of the share of the batch that is computed next."""
    share = torch.zeros(1, dtype=torch.int64, device=device)    # a tensor, so that a compiled model need not be again
    for module in model.modules():
        if type(module) is DropPath:
            module.__class__ = SharedDropPath
            module.shares = shares
            module.register_buffer("share", share, persistent=False)
    return share


def checkpoint_activations(model: MTMamba):
    """Encoder blocks, decoder stages and heads keep their inputs alone and run again in the backward pass. Not so lite
    heads: they are small, and run twice their batch norm would count every batch twice."""
    for encoder in [model.encoder] if model.shared_encoder else model.encoder.values():
        encoder.backbone.set_grad_checkpointing(True)
    for module in (*model.stages, *(head for head in model.heads.values() if isinstance(head, DenseHead))):
        module.forward = functools.partial(checkpoint, module.forward, use_reentrant=False)


def align_gradients(model: MTMamba):
    """Gradients of depthwise weights (D, 1, 3, 3) come with another stride in the dimension of size 1 than the weights
    have, of which DDP warns. A view mends it."""
    for weight in model.parameters():
        if weight.ndim == 4 and weight.shape[1] == 1:
            weight.register_hook(lambda gradient: gradient.flatten(1).view(gradient.shape))


# ------------------------------------------------------------------------------------------------------ checkpoints

class Checkpoints:
    """last.pt, previous.pt and best.pt, which the first process writes: each has everything that a run goes on from."""

    def __init__(self, folder: Path, rank: int, model: MTMamba, optimizer: torch.optim.Optimizer,
                 scaler: torch.amp.GradScaler, about: dict):
        """about: what else a checkpoint tells: MTMamba's arguments (config), the run's flags (training), versions."""
        self.folder, self.active, self.about = folder, rank == 0, about
        self.model, self.optimizer, self.scaler = model, optimizer, scaler
        self.best = -math.inf    # delta_m of best.pt

    def save(self, name: str, iteration: int, evaluated: int):
        """From last.pt, the file before is kept as previous.pt."""
        if self.active:
            content = dict(model=self.model.state_dict(), **self.about, optimizer=self.optimizer.state_dict(),
                           scaler=self.scaler.state_dict(), iteration=iteration, evaluated=evaluated, best=self.best)
            previous = self.folder / "previous.pt" if name == "last.pt" else None
            save_checkpoint(self.folder / name, content, previous)

    def keep_best(self, score: float | None, iteration: int):
        """Saves the weights that were just evaluated, if they are the best so far. score: their delta_m."""
        if score is not None and score > self.best:
            self.best = score
            self.save("best.pt", iteration, iteration)

    def restore(self, path: Path, content: dict) -> tuple[int, int]:
        """The iterations that are done and when they were last evaluated. Raises ValueError where the run was another
        one."""
        stored = content["training"]
        different = [f"--{key.replace('_', '-')} {stored[key]} (now {value})"
                     for key, value in self.about["training"].items()
                     if key not in FREE and key in stored and stored[key] != value]
        if different:
            raise ValueError(f"{path} is of a run with {', '.join(different)}; resume with the same flags, or start "
                             "anew in another folder with --out")
        load_weights(self.model, content, path)
        self.optimizer.load_state_dict(content["optimizer"])
        self.scaler.load_state_dict(content["scaler"])
        self.best = content["best"]
        print(f"resuming {path} after iteration {content['iteration']}")
        return content["iteration"], content["evaluated"]


def save_checkpoint(path: Path, content: dict, previous: Path | None = None):
    """Replaces an existing file only by a whole one that is on the disk; with previous, keeps the old one there. Raises
    WriteError."""
    with replacing(path) as file:
        torch.save(content, file)
        file.flush()
        os.fsync(file.fileno())
        if previous and path.exists():
            os.replace(path, previous)


def find_checkpoint(folder: Path) -> tuple[Path, dict] | None:
    """A run's readable checkpoint of the highest iteration and its content, None where it has not saved any yet.

    Not the youngest file, as copying a run may give its files any order in time. Reports the unreadable ones; raises
    ValueError where all are.
    """
    paths = [path for name in CHECKPOINTS if (path := folder / name).exists()]
    iterations = {}
    for path in paths:
        try:
            content = read_checkpoint(path)
            if "optimizer" not in content:
                raise ValueError(f"{path} has weights alone; start from it with --init-from {path}")
            iterations[path] = content["iteration"]
        except ValueError as error:
            print(f"cannot resume from {path}: {error}", file=sys.stderr)
    if iterations:
        newest = max(iterations, key=iterations.get)    # of equal ones the first: last.pt
        return newest, read_checkpoint(newest)
    if paths:
        raise ValueError(f"none of the checkpoints in {folder} can be read; start anew with another --out")
    print(f"nothing to resume in {folder}: starting")
    return None


def load_all_weights(model: MTMamba, path: Path, encoder: str, encoder_kwargs: dict | None):
    """--init-from: as load_weights. Raises ValueError that names --init-partial where they do not fit."""
    try:
        load_weights(model, read_checkpoint(path), path)
    except ValueError as error:
        raise ValueError(f"{error}; to take what fits, add --init-partial") from error


def load_fitting_weights(model: MTMamba, path: Path, encoder: str, encoder_kwargs: dict | None):
    """--init-from with --init-partial: what a checkpoint, ours or published, shares with the model.

    Taken are tensors of the same name and shape: of the encoder, and of the decoders of the tasks that both have. The
    cross-task blocks concatenate the tasks' features, so they are taken where the tasks and their order are the same.
    Prints what is left. Raises FileNotFoundError, or ValueError for another kind of file and where nothing fits.
    encoder, encoder_kwargs: of a published checkpoint, which does not name its own.
    """
    named = {} if not is_published(read_checkpoint(path)) else dict(encoder=encoder, encoder_kwargs=encoder_kwargs)
    source, _ = load_checkpoint(path, torch.device("cpu"), **named)
    state, own = source.state_dict(), model.state_dict()
    for tensors in (state, own):
        del tensors["_extra_state"]    # of whole models
    same_tasks = list(source.tasks) == list(model.tasks)
    taken = {key for key, value in own.items() if key in state and state[key].shape == value.shape
             and (same_tasks or ".ctm." not in key)}
    if not taken:
        raise ValueError(f"{path} has nothing that fits this model; start without --init-from")
    model.load_state_dict({key: state[key] if key in taken else value for key, value in own.items()})
    print(f"took {len(taken)} tensors of {path}")
    for what, keys in (("new, not in the file", own.keys() - taken), ("left in the file", state.keys() - taken)):
        groups = Counter(re.match(r"stages\.\d\.(ctm|\w+\.\w+)|\w+\.\w+(\.\w+)?", key)[0] for key in sorted(keys))
        if groups:
            print(f"  {what}: " + ", ".join(f"{group} ({count})" for group, count in groups.items()))


def selection_baseline(dataset: str, tasks: dict[str, int], constant: Results | None) -> dict[str, float]:
    """What the best checkpoint is chosen against by delta_m, by task.

    NYUDv2: Table 2's single-task row; PASCAL-Context, which has none in the paper: its own row of Table 1; Cityscapes,
    which has neither: round figures of the size to expect, so that relative changes of its tasks count alike; any other
    data set: the best constant prediction, less the tasks, named here, of which it has no figure to divide by. While
    training, boundaries are scored by pixelF in place of odsF.
    """
    if constant is None:
        rows = {**PAPER, **SINGLE_TASK, "cityscapes": {"semseg": 80.0, "depth": 5.0}}
        return {task: rows[dataset][task] for task in tasks}
    figures = {task: constant[task][PRIMARY[task]] if task in constant else None for task in tasks}
    for task, figure in figures.items():
        if not figure:
            found = "no pixel with a label" if figure is None else f"a {PRIMARY[task]} of 0 of the best constant"
            print(f"{task} plays no part in choosing best.pt: {found} in the held-out images. If that is not meant, "
                  "check their labels; --tasks trains without it")
    return {task: figure for task, figure in figures.items() if figure}


def git_commit() -> str | None:
    """Of the folder of this file, None where it is no checkout."""
    try:
        return subprocess.run(["git", "rev-parse", "HEAD"], cwd=Path(__file__).parent, capture_output=True, text=True,
                              check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


# -------------------------------------------------------------------------------------------------------------- log

class Log:
    """What the first process tells of a run: log.jsonl, TensorBoard's if asked for, pictures and the final table."""

    def __init__(self, args: argparse.Namespace, rank: int, model: MTMamba, held_out: Dataset, device: torch.device):
        self.args, self.model, self.held_out, self.device, self.active = args, model, held_out, device, rank == 0
        self.tensorboard = open_tensorboard(args.out) if args.tensorboard and self.active else None
        self.unread = None    # the last report
        self.sums = np.zeros((2, len(model.tasks)))    # of reports since the last line

    def write(self, line: dict):
        if self.active:
            append(self.args.out / "log.jsonl", json.dumps(line) + "\n")

    def open_bar(self, iteration: int) -> tqdm:
        size = self.args.batch_size
        self.bar = tqdm(total=self.args.iterations * size, initial=iteration * size, desc="training", unit="img",
                        disable=not self.active, dynamic_ncols=True)
        return self.bar

    def add(self, report: "Report"):
        """An iteration's losses are read during the next one, so that the device always has work queued."""
        self.read()
        self.unread = report

    def read(self):
        """Writes a line where one is due. Raises RunError where a loss is not finite."""
        if self.unread:
            report, self.unread = self.unread, None
            self.sums += report.read(list(self.model.tasks))
            if (report.iteration + 1) % self.args.log_every == 0:
                self.write_losses(report.iteration + 1, report.lr)

    def write_losses(self, iteration: int, lr: float):
        """Means over the images since the last line, None for a task of which none had a label; also to the bar."""
        losses = {task: total / n if n else None for task, (total, n) in zip(self.model.tasks, self.sums.T)}
        self.sums[:] = 0
        if not self.active:
            return
        memory = torch.cuda.max_memory_allocated(self.device) / 2**30 if self.device.type == "cuda" else None
        shown = " ".join(f"{task} {loss:.3f}" for task, loss in losses.items() if loss is not None)
        self.bar.set_postfix_str(f"{shown} lr {lr:.1e}" + (f" {memory:.1f} GiB" if memory else ""), refresh=False)
        state = self.bar.format_dict
        rate = state["rate"] or (self.bar.n - self.bar.initial) / max(state["elapsed"], 1e-9)
        self.write(dict(iteration=iteration, losses=losses, lr=lr, images_per_second=rate, peak_memory_gib=memory,
                        time=time.time()))
        self.plot({**{f"loss/{task}": loss for task, loss in losses.items()}, "lr": lr}, iteration)

    def write_scores(self, iteration: int, results: Results, score: float | None):
        self.write(dict(iteration=iteration, results=results, delta_m=score))
        self.plot({f"{task}/{name}": value for task, metrics in results.items() for name, value in metrics.items()},
                  iteration)
        if self.active:
            folder = self.args.out / "pictures"
            folder.mkdir(exist_ok=True)
            save_contact_sheet(self.model, self.held_out, self.device, folder / f"{iteration:06d}.png")

    def print_results(self, results: dict[str, Results]):
        """The final table: of the trained model, and what it is compared with."""
        dataset, trained = self.args.dataset, results["trained"]
        if dataset in PAPER:
            print_paper_table(trained, PAPER[dataset], depth_name(self.model))
        else:
            print_table(results)
        improvement = compare(trained, SINGLE_TASK.get(dataset))
        if improvement is not None:
            print(f"delta_m against the single-task row of Table 2: {improvement:+.2f} %")

    def write_results(self, trained: Results):
        """results.json and the last contact sheet."""
        if not self.active:
            return
        args, improvement = self.args, compare(trained, SINGLE_TASK.get(self.args.dataset))
        write_json(args.out / "results.json", dict(dataset=args.dataset, checkpoint=str(args.out / "last.pt"),
                                                   images=len(self.held_out), results=trained, delta_m=improvement))
        print("checkpoint:", args.out / "last.pt", "(the best one: best.pt)")
        print("results:   ", args.out / "results.json")
        print("pictures:  ", save_contact_sheet(self.model, self.held_out, self.device, args.out / "contact_sheet.png"))

    def plot(self, values: dict[str, float | None], iteration: int):
        """In TensorBoard."""
        if self.tensorboard:
            for name, value in values.items():
                if value is not None:
                    self.tensorboard.add_scalar(name, value, iteration)
            self.tensorboard.flush()


class Report:
    """An iteration's losses on their way from the device: their sums over the batch's images, and the numbers of
    images with a label, which are those that count in a mean; both by task, (2, T)."""

    def __init__(self, iteration: int, lr: float, values: Tensor):
        self.iteration, self.lr, self.arrived = iteration, lr, None
        # Only CUDA has an event to wait for here; on other devices the copy itself waits.
        self.values = values.to("cpu", non_blocking=values.is_cuda)
        if values.is_cuda:
            self.arrived = torch.cuda.Event()
            self.arrived.record()

    def read(self, tasks: list[str]) -> np.ndarray:
        """Waits for them. Raises RunError where a loss is not finite."""
        if self.arrived:
            self.arrived.synchronize()
        for task, loss in zip(tasks, self.values[0].tolist()):
            if not math.isfinite(loss):
                raise RunError(f"the loss of {task} is {loss} in iteration {self.iteration}; nothing was saved since. "
                               "Go on from the last checkpoint (--init-from) with a lower --lr or --amp off")
        return self.values.double().numpy()


def open_tensorboard(folder: Path):
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ValueError("--tensorboard needs TensorBoard; pip install tensorboard") from error
    return SummaryWriter(folder)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, interrupt)    # until a run knows what to do with it
    main()
