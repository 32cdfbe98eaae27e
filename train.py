"""Trains MTMamba.

    python train.py                                                # laptop: a small model, synthetic scenes, minutes
    python train.py --dataset nyud                                 # the paper's recipe on one GPU
    torchrun --nproc_per_node=8 train.py --dataset pascal          # eight GPUs: the same run, faster
    torchrun --nnodes=2 --nproc_per_node=4 --rdzv_backend=c10d --rdzv_endpoint=HOST:29500 \\
        train.py --dataset pascal                                  # two nodes: this command on each
    python train.py --dataset cityscapes --variant mtmamba++       # MTMamba++
    python train.py --dataset rooms.py:Rooms                       # your own data, see the README
    python train.py --dataset nyud --resume                        # continues an interrupted run
    python train.py --dataset nyud --init-from X --out runs/tuned  # fine-tunes a checkpoint, ours or a published one

Losses, optimiser and schedule are the paper's. Where it is silent, they are the published implementation's. A run
writes to runs/DATASET, or to --out: last.pt, best.pt, log.jsonl, pictures/, and at its end results.json,
contact_sheet.png and curves.png.

Under torchrun the exit code after SIGTERM is 1, and torchrun kills 30 s after it: a step and a save must finish by then
(3.7 GB with Swin-Large). For Slurm, 120 s before the time is up:

    #SBATCH --signal=B:USR1@120 --gpus-per-node=8
    trap 'stopped=1; kill -TERM $run' USR1
    srun torchrun --nproc_per_node=8 train.py --dataset pascal --resume & run=$!
    wait $run; wait $run    # the first one ends with the trap
    [ -z "$stopped" ] || scontrol requeue $SLURM_JOB_ID
"""

# Order: recipes; main and its flags; Run, with its set-up, loop, step and files; losses; schedule and batches; weights
# to start from; what makes a run independent of the number of processes.

import os

# Limits the spinning of PyTorch's threads on a CPU, see evaluate.py. It must be set before torch is imported.
if not {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY", "GOMP_CPU_AFFINITY"} & os.environ.keys():
    os.environ["GOMP_SPINCOUNT"] = "2000"

import argparse
import contextlib
import errno
import functools
import json
import math
import re
import signal
import sys
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from timm.layers import DropPath
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

try:
    import fcntl
except ImportError:    # on Windows there is no lock
    fcntl = None

from datasets import (
    DATASETS,
    SIGNALS,
    DenseDataset,
    Parser,
    check_samples,
    check_writable,
    find_dataset_class,
    loader,
    replacing,
    usable_cpus,
)
from evaluate import (
    Evaluation,
    add_up,
    choose_backend,
    digest_names,
    evaluate,
    load_checkpoint,
    load_weights,
    print_scores,
    rank_and_world,
    read_baseline,
    read_checkpoint,
    save_contact_sheet,
    start,
    versions,
    write_results,
)
from metrics import TASKS, Labels
from mtmamba import BACKENDS, ENCODERS, VARIANTS, MTMamba

# What is trained, unless flags of the same names, the data set's RECIPE or its row of PAPER say otherwise.
RECIPE = dict(encoder=ENCODERS["swin-large"], encoder_kwargs=None, pretrained=True, d_state=16, iterations=50_000,
              batch_size=8, lr=1e-4, weight_decay=1e-5, loss="log", workers=8, save_every=1000, log_every=50,
              eval_every=2000)
# What the published runs have in its place, by data set or (data set, variant).
PAPER = {
    "cityscapes": dict(iterations=40_000, weight_decay=1e-6),
    ("nyud", "mtmamba++"): dict(iterations=40_000, lr=2e-5, weight_decay=1e-6, loss="weighted"),
    ("pascal", "mtmamba++"): dict(iterations=40_000, lr=8e-5, weight_decay=1e-6),
}
# Small enough to learn six tasks from small images in minutes on two CPU cores: a narrow encoder trained from scratch
# (hence the higher learning rate), 1 state instead of 16.
SMALL = dict(encoder="convnext_atto", pretrained=False,
             encoder_kwargs=dict(dims=(16, 32, 96, 160), depths=(1, 1, 3, 2), drop_path_rate=0.0), d_state=1,
             iterations=350, batch_size=8, lr=1e-2, weight_decay=1e-5, loss="log", save_every=100, log_every=10)
REFERENCE_IMAGES = 100    # on which an untrained model is scored
AMP = {"bf16": torch.bfloat16, "fp16": torch.float16, "off": None}


def main(argv: list[str] | None = None) -> dict[str, dict]:
    """The scores on the validation images, {task: {metric: figure}}: of "trained" and what it is compared with. Empty
    after an interruption.

    Exit code 2 on bad input, 1 where the run had to stop, 130 after Ctrl-C or SIGTERM where nothing could be saved.
    """
    parser = Parser("train.py", __doc__)
    add_arguments(parser)
    args = parser.parse_args(argv)
    with parser.told("earlier checkpoints are unchanged; make room, then continue with --resume"):
        if args.resume and args.out:
            args = take_flags(parser, args, argv)
        with start(args.device) as device, contextlib.ExitStack() as held:
            return Run(args, device, held).execute()


def take_flags(parser: Parser, args: argparse.Namespace, argv: list[str] | None) -> argparse.Namespace:
    """For --resume: the flags that the run in args.out was last started with, unless they are given again. Raises
    ValueError where they would make a file run that is neither given by hand nor in or below the current folder."""
    flags = {}
    for line in read_log(args.out / "log.jsonl"):
        flags = line.get("config", flags)
    parser.set_defaults(**{key: flags[key] for key in flags.keys() - {"resume", "out", "device"}})
    taken = parser.parse_args(argv)
    if taken.dataset != args.dataset:
        find_dataset_class(taken.dataset, said_by=f"the run in {args.out}")
    return taken


# The flags that decide what is computed. They must stay as they were when a run is resumed, and results.json has them.
DECISIVE = """dataset tasks init_from init_partial variant encoder encoder_kwargs pretrained d_state freeze_encoder
    img_size iterations batch_size lr weight_decay loss seed amp val_images""".split()


def add_arguments(parser: argparse.ArgumentParser):
    add = parser.add_argument
    add("--dataset", default="synthetic", metavar="NAME", help=f"{', '.join(DATASETS)}, or path/to/file.py:Class, your "
        "own subclass of LabelledDataset (default: synthetic)")
    add("--recipe", choices=["small"], help="the model and the optimisation of the default run, for any data set: on "
        "CPUs, or to try out your own data (default: by the data set)")
    add("--data-root", type=Path, help="folder of a benchmark's files (default: "
        f"{' or '.join(str(data_set.ROOT) for data_set in DATASETS.values() if hasattr(data_set, 'ROOT'))})")
    add("--tasks", nargs="+", metavar="TASK", help="a subset of the data set's tasks (default: all)")
    add("--out", type=Path, help="folder for everything that is written (default: runs/DATASET)")
    add("--resume", action="store_true", help="continue from the last checkpoint in --out, if there is one")
    add("--init-from", type=Path, metavar="FILE", help="start from the weights of a checkpoint, ours or published")
    add("--init-partial", action="store_true", help="take only the weights of --init-from that fit this model, and "
        "list the others: for other tasks or classes. Cross-task blocks fit where the tasks are the same")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--workers", type=int, help="processes that load data, for each training process")
    add = parser.add_argument_group("model: rows of Tables 2-6").add_argument
    add("--variant", choices=VARIANTS, default="mtmamba")
    add("--encoder", help=f"{', '.join(ENCODERS)} or any hierarchical timm model or plain ViT")
    add("--encoder-kwargs", type=dict, metavar="JSON", help="further arguments of the encoder")
    add("--pretrained", action=argparse.BooleanOptionalAction, help="start from timm's encoder weights")
    add("--d-state", type=int, metavar="N", help="states of the scan per channel")
    add("--freeze-encoder", action="store_true", help="train all but the encoder's backbone")
    add = parser.add_argument_group("optimisation").add_argument
    add("--img-size", nargs=2, type=int, metavar=("H", "W"), help="size of the training crops")
    add("--iterations", type=int)
    add("--batch-size", type=int, help="images per iteration, over all processes")
    add("--accumulate", type=int, default=1, metavar="N", help="compute each batch in N parts: less memory, the same "
        "result (except batch norm, as in mtmamba++, which sees one part)")
    add("--lr", type=float, help="initial learning rate; it falls to 0 as (1 - it / iterations)^0.9")
    add("--weight-decay", type=float)
    weights = ", ".join(f"{kind.weight:g} {task}" for task, kind in TASKS.items())
    add("--loss", choices=TOTALS, help="the total loss of an image. log: the sum of the logarithms of its tasks' "
        f"losses. weighted: the sum of the losses with the weights {weights}")
    add("--seed", type=int, default=0)
    add = parser.add_argument_group("speed and memory").add_argument
    add("--backend", choices=BACKENDS, help="implementation of the scan (default: by the device)")
    add("--amp", choices=AMP, help="precision (default on CUDA: bf16, or fp16 before compute capability 8.0; elsewhere "
        "off); the scan, norms, softmax and losses stay in float32")
    add("--compile", action=argparse.BooleanOptionalAction, help="torch.compile (default: on CUDA)")
    add("--checkpoint-activations", action="store_true", help="less memory, about a third more time")
    add = parser.add_argument_group("output").add_argument
    add("--save-every", type=int, help="iterations from one last.pt to the next")
    add("--eval-every", type=int, help="iterations from one evaluation to the next; 0: only at the end")
    add("--log-every", type=int, help="iterations from one line of the log to the next")
    add("--baseline", type=Path, nargs="+", metavar="FILE", help="results.json to take delta_m against at the end, one "
        "or one per task (NYUDv2: the paper's)")
    add("--val-images", type=int, metavar="N", help="score the first N validation images alone, for quick trials "
        "(default: all)")
    add("--no-references", action="store_true", help="without the scores of the untrained model, of the first "
        f"{REFERENCE_IMAGES} validation images")
    add("--tensorboard", action="store_true", help="also log for TensorBoard (pip install tensorboard)")


def complete_flags(args: argparse.Namespace, data_set: type[DenseDataset], device: torch.device, world: int):
    """Fills flags that were not given from the data set's recipe, and checks all."""
    preset, own, cuda = dict(RECIPE, img_size=data_set.SIZE), dict(data_set.RECIPE), device.type == "cuda"
    preset |= SMALL if own.pop("recipe", None) else {}
    if unknown := own.keys() - preset.keys():
        raise ValueError(f"expected flags of {', '.join(preset)} in {data_set.__name__}.RECIPE, found {unknown}")
    preset |= own | PAPER.get(args.dataset, {}) | PAPER.get((args.dataset, args.variant), {})
    preset |= SMALL if args.recipe else {}
    # GPUs before 8.0 only emulate bf16.
    amp = "off" if not cuda else "fp16" if torch.cuda.get_device_capability(device) < (8, 0) else "bf16"
    cpus = max(1, usable_cpus() // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))
    preset |= dict(workers=min(preset["workers"], cpus), compile=cuda, amp=amp,
                   out=Path("runs") / args.dataset.rpartition(":")[2])
    if args.init_from and not args.init_partial:
        if args.pretrained:
            print(f"--pretrained has no effect: {args.init_from} has the encoder's weights, too")
        args.pretrained = False
    if args.encoder not in (None, preset["encoder"]):
        preset["encoder_kwargs"] = None    # they belong to the recipe's encoder
    vars(args).update({name: value for name, value in preset.items() if getattr(args, name) is None})
    args.img_size = tuple(args.img_size)
    args.baseline = [Path(path) for path in args.baseline or ()]    # text if a resumed run's log has them
    check_flags(args, world)


def check_flags(args: argparse.Namespace, world: int):
    """Raises ValueError for impossible values."""
    Parser.expect_least(args, d_state=1, iterations=1, batch_size=1, accumulate=1, save_every=1, log_every=1,
                        val_images=1, eval_every=0, workers=0, seed=0, weight_decay=0)
    if not 0 < args.lr < math.inf:
        raise ValueError(f"expected --lr above 0, found {args.lr}")
    if args.freeze_encoder and not args.pretrained and args.init_from is None:
        raise ValueError("--freeze-encoder needs trained weights; give --pretrained or --init-from FILE")
    if args.init_partial and args.init_from is None:
        raise ValueError("--init-partial needs a checkpoint to take weights from; name it with --init-from FILE")
    if args.batch_size % (parts := world * args.accumulate):
        raise ValueError(f"--batch-size {args.batch_size} cannot be split over {world} processes x --accumulate "
                         f"{args.accumulate}; give a multiple of {parts}")


# -------------------------------------------------------------------------------------------------------------- run

class Run:
    """A training run. __init__ builds everything and raises errors for bad input; execute trains and scores."""

    def __init__(self, args: argparse.Namespace, device: torch.device, held: contextlib.ExitStack):
        """held: keeps the lock of the folder until the run ends."""
        self.args, self.device = args, device
        self.rank, self.world = rank_and_world()
        self.noted = False                       # a signal
        # Iterations done, and at the last evaluation; selection_score of best.pt
        self.iteration, self.evaluated, self.best = 0, 0, -math.inf
        data_set = find_dataset_class(args.dataset)
        complete_flags(args, data_set, device, self.world)
        if self.rank == 0:
            held.enter_context(locked(args.out))
        checkpoint = find_checkpoint(args.out, args.resume)
        self.flags = json.loads(json.dumps(vars(args), default=str))    # paths as text
        self.description = dict(training={name: self.flags[name] for name in DECISIVE}, versions=versions())
        self.build_data(data_set)
        self.build_model(new=checkpoint is None)
        self.optimizer = self.build_optimizer()
        self.rates = [group["lr"] for group in self.optimizer.param_groups]    # initial ones
        self.scaler = torch.amp.GradScaler(device.type, enabled=args.amp == "fp16")    # otherwise it does nothing
        if checkpoint:
            self.restore(checkpoint)
        check_writable(args.out)
        self.tensorboard = None
        if args.tensorboard and self.rank == 0:
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError as error:
                raise ValueError(f"{error}; pip install tensorboard") from error
            self.tensorboard = SummaryWriter(args.out, purge_step=self.iteration + 1)

    def build_data(self, data_set: type[DenseDataset]):
        """The images to train and to evaluate on."""
        args = self.args
        self.train_set = data_set.open("train", args.img_size, args.tasks, args.data_root, args.seed)
        if not self.train_set.SHUFFLED:
            self.train_set.set_length(args.iterations * args.batch_size)
        self.val_set = data_set.open("val", data_set.VAL_SIZE or args.img_size, list(self.train_set.tasks),
                                     args.data_root)
        self.kinds = self.train_set.kinds
        self.scored = min(len(self.val_set), args.val_images or len(self.val_set))    # validation images
        self.single_task = read_baseline(args.baseline, args.dataset, self.val_set, args.out)
        self.train_set.refuse_folder(args.out)
        self.description |= dict(labels=self.train_set.labels.plain(), names={
            "train": digest_names(self.train_set), "val": digest_names(self.val_set)})

    def build_model(self, new: bool):
        """The model and, where the total loss is a module, that; on the device, compiled, and a part of several
        processes. new: without a checkpoint that gives the weights."""
        args, device = self.args, self.device
        torch.manual_seed(args.seed)
        config = self.description["config"] = dict(
            tasks={task: kind.channels for task, kind in self.kinds.items()}, img_size=args.img_size,
            encoder=args.encoder, encoder_kwargs=args.encoder_kwargs, variant=args.variant,
            output_scale=self.train_set.LABEL_SCALE, d_state=args.d_state)
        self.model = MTMamba(**config, pretrained=args.pretrained and new)
        self.model.labels = self.train_set.labels
        if args.init_from and new:
            init_weights(self.model, args)
        self.model.to(device)
        self.part = args.batch_size // args.accumulate // self.world    # images that are computed at a time
        self.backend = choose_backend(self.model, args.backend, AMP[args.amp], args.compile)
        self.depth, self.dropout = StochasticDepth(self.model, self.part, device), False
        # Of the generator that the model draws from
        self.random_state = (torch if device.type == "cpu" else torch.get_device_module(device)).get_rng_state
        if args.checkpoint_activations:
            self.model.set_grad_checkpointing()
        if args.freeze_encoder:
            self.model.freeze_encoder()
        total = TOTALS[args.loss]
        self.learned = nn.ModuleList([total(self.kinds)] if isinstance(total, type) else []).to(device)
        self.total = self.learned[0] if self.learned else functools.partial(total, self.kinds)

        self.network = self.model
        if args.compile:
            self.network = torch.compile(self.model, fullgraph=True, dynamic=False)    # images of one size
        self.distributed = dist.is_available() and dist.is_initialized()
        if self.distributed:
            self.between_cpus = dist.new_group(backend="gloo")    # to agree on stopping without waiting for a GPU
            align_gradients(self.model)
            self.network = DistributedDataParallel(self.network, [device] if device.type == "cuda" else None,
                                                   gradient_as_bucket_view=True)
            self.network.broadcast_buffers = False    # `kept` differs by process. DDP's argument is deprecated

    def build_optimizer(self) -> torch.optim.Optimizer:
        """The place for another optimiser, or for groups of parameters with rates of their own. learning_rate is the
        place for another schedule: it scales the rate of each group."""
        trained = [p for part in (self.model, self.learned) for p in part.parameters() if p.requires_grad]
        return torch.optim.AdamW(trained, lr=self.args.lr, weight_decay=self.args.weight_decay,
                                 fused=self.device.type != "mps")

    def restore(self, checkpoint: dict):
        """Continues from last.pt. Raises ValueError where it belongs to a run with other flags or images."""
        path, stored = self.args.out / "last.pt", checkpoint["training"]
        different = [f"--{name.replace('_', '-')} {stored[name]} (now {value})"
                     for name, value in self.description["training"].items() if stored[name] != value]
        for split, now in self.description["names"].items():    # their number and digest
            then = checkpoint["names"][split]
            if now != then:
                different.append(f"other {split} images, or in another order ({then[0]} then, {now[0]} now)")
        if different:
            raise ValueError(f"{path} is of a run with {', '.join(different)}; that decides what each iteration "
                             "computes (--iterations, the learning rate), so resume with the same, or start another "
                             "run with --init-from and another --out")
        load_weights(self.model, checkpoint, path)
        for part in ("learned", "optimizer", "scaler"):
            getattr(self, part).load_state_dict(checkpoint[part])
        for state in self.optimizer.state.values():    # on a CPU tensors are the file's, which would stay open
            state.update({key: value.clone() for key, value in state.items() if isinstance(value, Tensor)})
        self.iteration, self.evaluated, self.best = (checkpoint[key] for key in ("iteration", "evaluated", "best"))
        print(f"resuming {path} after iteration {self.iteration}")

    def execute(self) -> dict[str, dict]:
        """Trains and scores the result. After SIGTERM or Ctrl-C: saves, and returns nothing."""
        args = self.args
        for split, data_set in (("train", self.train_set), ("val", self.val_set)):    # labels that would train nothing
            for message in check_samples(data_set, args.workers):
                print(f"look at the {split} labels: {message}")
        millions = sum(p.numel() for p in self.model.parameters()) / 1e6
        print(f"{args.variant} on {args.encoder}: {millions:.2f} M parameters; scan backend: {self.backend}; "
              f"{self.world} x {self.device.type}, {args.batch_size // self.world} images per process and iteration")
        if args.accumulate > 1 and any(isinstance(m, nn.BatchNorm2d) and m.training for m in self.model.modules()):
            print(f"--accumulate: batch norm sees {self.part * self.world} images of a batch at a time")
        print("configuration:", json.dumps(self.flags))
        if self.rank == 0 and (log := args.out / "log.jsonl").is_file():
            cut_log(log, self.iteration or -1)
        self.log(dict(config=self.flags, versions=self.description["versions"], processes=self.world,
                      iteration=self.iteration))
        references, images = {}, min(self.scored, REFERENCE_IMAGES)
        if self.train_set.REFERENCES and not args.no_references and self.iteration == 0:
            references["untrained"] = self.evaluate(odsf=True, limit=images)

        with self.noting_signals():
            self.train()
            if self.iteration < args.iterations:
                print(f"stopped after iteration {self.iteration} of {args.iterations}; continue with the same command "
                      "and --resume")
                return {}
            trained = self.evaluate(odsf=True)
            if trained is None:
                print(f"trained; scoring was interrupted. Do it with: python train.py --resume --out {args.out}")
                return {}
            note = "" if images == self.scored else f" ({images})"
            self.finish({"trained": trained} | {name + note: scores for name, scores in references.items()})
        return {"trained": trained} | references

    def train(self):
        """The loop, from self.iteration on. It ends with a save, at the last iteration or after an interruption."""
        args, self.losses, self.seconds = self.args, {}, 0.0    # of the iterations since the last line of the log
        indices = batch_indices(self.train_set, args, self.iteration, self.rank, self.world)
        batches = iter(loader(self.train_set, indices, args.workers, self.part,
                              pin_memory=self.device.type == "cuda"))
        stopping = False
        self.model.train()
        with tqdm(total=args.iterations * args.batch_size, initial=self.iteration * args.batch_size, desc="training",
                  unit="img", disable=self.rank > 0, dynamic_ncols=True) as bar:
            while self.iteration < args.iterations and not stopping:
                if self.evaluation_is_due():
                    scores = self.evaluate()
                    if scores is None:    # interrupted; last.pt has these weights
                        break
                    self.keep(scores)
                    self.model.train()
                begun = time.perf_counter()
                self.losses[self.iteration] = self.step(batches)
                self.iteration += 1
                stopping = self.interrupted()
                logging = self.iteration % args.log_every == 0
                saving = (self.iteration % args.save_every == 0 or self.iteration == args.iterations or stopping
                          or self.evaluation_is_due())
                if logging or saving:
                    sums = self.read_losses()
                self.seconds += time.perf_counter() - begun
                bar.update(args.batch_size)
                if logging:
                    self.log_losses(sums, bar)
                if saving:
                    self.save("last.pt")

    def step(self, batches: Iterator[dict]) -> Tensor:
        """One iteration: forward, backward, update. Returns (2, T), on the device: by task the sum of the losses over
        the batch's images, of all processes, and the number of images with a label, which alone count in a mean."""
        args, sums = self.args, 0
        for group, initial in zip(self.optimizer.param_groups, self.rates):
            group["lr"] = learning_rate(initial, self.iteration, args.iterations)
        self.optimizer.zero_grad()
        kept = self.depth.draw(args.seed, self.iteration, args.batch_size)
        # For an encoder's dropout: the same after resuming, other numbers in each process.
        torch.manual_seed(int(np.random.SeedSequence([args.seed, self.iteration, self.rank]).generate_state(1)[0]))
        for i in range(args.accumulate):
            loaded = next(batches)
            batch = {key: loaded[key].to(self.device, non_blocking=True) for key in ("image", *self.kinds)}
            first = (i * self.world + self.rank) * self.part
            self.depth.kept.copy_(kept[:, first:first + self.part], non_blocking=True)
            with self.network.no_sync() if self.distributed and i < args.accumulate - 1 else contextlib.nullcontext():
                before = self.random_state()
                with torch.autocast(self.device.type, AMP[args.amp], enabled=args.amp != "off"):
                    outputs = self.network(batch["image"])
                if not self.dropout and not torch.equal(before, self.random_state()):
                    self.dropout = True
                    print("the network draws random numbers of its own, such as an encoder's dropout: with another "
                          "number of processes, or another --accumulate, the run is another one")
                losses = {task: kind.image_losses(outputs[task], batch[task]) for task, kind in self.kinds.items()}
                # DDP averages the gradients over the processes.
                self.scaler.scale(self.total(losses) / args.accumulate).backward()
            counted = [(losses[task].detach().sum(), kind.valid(batch[task]).flatten(1).any(1).sum())
                       for task, kind in self.kinds.items()]
            sums += torch.stack([torch.stack(pair) for pair in counted], dim=1)
        for parameter in self.learned.parameters():    # the total loss is no part of DDP's module
            if parameter.grad is not None:
                add_up(parameter.grad).div_(self.world)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        return add_up(sums)

    def evaluation_is_due(self) -> bool:
        """Not at the end: the final evaluation follows."""
        every = self.args.eval_every
        return every > 0 and self.iteration % every == 0 and self.evaluated < self.iteration < self.args.iterations

    @contextlib.contextmanager
    def noting_signals(self) -> Iterator[None]:
        """Notes signals, so that the run can finish its step and save: SIGTERM, of a cluster or torchrun; SIGUSR1, with
        which Slurm warns; SIGHUP, of a closed terminal; SIGINT, of Ctrl-C. Only a second Ctrl-C ends it at once."""
        def note(number, frame):
            self.noted = True
            if number == signal.SIGINT:
                signal.signal(number, handlers[number])

        handlers = {}
        if threading.current_thread() is threading.main_thread():
            handlers |= {number: signal.signal(number, note) for number in SIGNALS
                         if signal.getsignal(number) != signal.SIG_IGN}    # nohup's stays ignored
        else:
            print("not in the main thread: SIGTERM and Ctrl-C will not save this run")
        try:
            yield
        finally:
            for number, handler in handlers.items():
                # After a signal was noted, the process is ending: another SIGTERM must not kill it.
                if number == signal.SIGINT or not self.noted:
                    signal.signal(number, handler)

    def interrupted(self) -> bool:
        """Whether any process has noted a signal. All of them must stop after the same iteration."""
        noted = torch.tensor(int(self.noted))
        if self.world > 1:
            dist.all_reduce(noted, group=self.between_cpus)
        return bool(noted)

    def evaluate(self, odsf: bool = False, limit: int | None = None) -> dict | None:
        """Scores the present weights on the validation images, in float32. None where it was interrupted. odsf: with
        odsF, which takes longer than all the rest. limit: number of images."""
        self.evaluation = Evaluation(self.val_set, self.device, self.args.workers, None if odsf else (),
                                     limit or self.scored)
        return evaluate(self.model, self.evaluation, stop=self.interrupted)

    def read_losses(self) -> list[list[float]]:
        """The sums of what step returned since the last line of the log. Waits for the device. One that is not finite
        raises FloatingPointError, so that later weights are never saved."""
        values = torch.stack(list(self.losses.values())).cpu().double()    # (iterations, 2, T)
        for iteration, losses in zip(self.losses, values[:, 0].tolist()):
            for task, loss in zip(self.kinds, losses):
                if not math.isfinite(loss):
                    raise FloatingPointError(
                        f"the loss of {task} is {loss} in iteration {iteration}; nothing was saved since. Start from "
                        "the last checkpoint (--init-from) with a lower --lr or --amp off")
        return values.sum(0).tolist()

    def log_losses(self, sums: list[list[float]], bar: tqdm):
        """The means since the last line, None for a task of which no image had a label; to the log and the bar."""
        losses = {task: total / images if images else None for task, total, images in zip(self.kinds, *sums)}
        lr = self.optimizer.param_groups[0]["lr"]
        memory = torch.cuda.max_memory_allocated(self.device) / 2**30 if self.device.type == "cuda" else None
        shown = " ".join(f"{task} {loss:.3f}" for task, loss in losses.items() if loss is not None)
        bar.set_postfix_str(f"{shown} lr {lr:.1e}" + (f" {memory:.1f} GiB" if memory else ""))
        self.log(dict(iteration=self.iteration, losses=losses, lr=lr, peak_memory_gib=memory, time=time.time(),
                      images_per_second=len(self.losses) * self.args.batch_size / self.seconds))
        self.losses, self.seconds = {}, 0.0

    def keep(self, results: dict):
        """Logs the scores of the present weights, draws pictures, and saves best.pt if they are the best."""
        score = selection_score(results, self.kinds) if results else None
        self.evaluated = self.iteration
        self.log(dict(iteration=self.iteration, results=results, selection=score, seconds=self.evaluation.seconds,
                      validation_losses=self.evaluation.record()["validation_losses"]))
        if self.rank == 0:
            folder = self.args.out / "pictures"
            folder.mkdir(exist_ok=True)
            save_contact_sheet(self.model, self.evaluation, folder / f"{self.iteration:06d}.png")
        if score is not None and score > self.best:
            self.best = score
            self.save("best.pt")

    def log(self, line: dict):
        """A line of log.jsonl, whose numbers TensorBoard gets, too."""
        if self.rank == 0:
            append(self.args.out / "log.jsonl", json.dumps(line) + "\n")
        if self.tensorboard and "config" not in line:
            for name, value in numbers(line):
                self.tensorboard.add_scalar(name, value, self.iteration)
            self.tensorboard.flush()

    def finish(self, results: dict[str, dict]):
        """The final table, results.json and the last contact sheet."""
        out = self.args.out
        delta = print_scores(results, self.val_set, self.description["config"], self.single_task, primary_only=True)
        self.keep(results["trained"])    # after the table, as writing may fail
        if self.rank == 0:
            entries = dict(dataset=self.args.dataset, checkpoint=str(out / "last.pt"), delta_m=delta,
                           results=results["trained"])
            write_results(out / "results.json", entries, self.model, self.evaluation,
                          self.description | {"iteration": self.iteration})
            draw_curves(out, self.val_set.labels)
            print("checkpoint:", out / "last.pt", "(the best one: best.pt)" * (out / "best.pt").exists())
            print("results:   ", out / "results.json")
            with replacing(out / "contact_sheet.png") as file:    # `keep` has just drawn it
                file.write((out / f"pictures/{self.iteration:06d}.png").read_bytes())
            print("pictures:  ", out / "contact_sheet.png")

    def save(self, name: str):
        """A checkpoint, with everything that is needed to continue."""
        if self.rank == 0:
            states = {part: getattr(self, part).state_dict() for part in ("model", "learned", "optimizer", "scaler")}
            save_checkpoint(self.args.out / name, dict(self.description, **states, iteration=self.iteration,
                                                       evaluated=self.evaluated, best=self.best))


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keeps other runs out of the folder. The system releases the lock when this process ends, however it ends. Raises
    ValueError where another run is in the folder. Some file systems have no locks."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / ".lock", "w") as file:
        try:
            if fcntl:    # a lock of this process alone, which the processes that it forks do not hold
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError) as error:
            raise ValueError(f"another run writes to {folder}; wait, or give another --out") from error
        except OSError as error:
            print(f"{folder} cannot be locked ({error.strerror}): let no other run write to it", file=sys.stderr)
        try:
            yield
        finally:
            if os.listdir(folder) == [".lock"]:    # the run has not started
                os.remove(folder / ".lock")
                os.rmdir(folder)


def save_checkpoint(path: Path, content: dict):
    """Replaces an existing file only when the new one is completely on the disk. Raises OSError."""
    with replacing(path) as file:
        torch.save(content, file)
        file.flush()
        os.fsync(file.fileno())


def find_checkpoint(folder: Path, resume: bool) -> dict | None:
    """The content of the run's last.pt; None where a run begins. Raises ValueError where the folder holds another run,
    or last.pt cannot be read."""
    path = folder / "last.pt"
    if resume and path.exists():
        checkpoint = read_checkpoint(path)
        if "learned" in checkpoint:
            return checkpoint
        raise ValueError(f"{path} has weights alone or is of an earlier version; start from it with --init-from {path}")
    if path.exists() or (folder / "best.pt").exists():
        raise ValueError(f"{folder} holds a run; continue it with --resume, which needs its last.pt, or give another "
                         "folder with --out")
    if resume:
        print(f"nothing to resume in {folder}: starting")
    return None


def append(path: Path, text: str):
    """Adds the whole text to the end of a file. If that fails, it adds nothing and raises an OSError."""
    data = text.encode()
    try:
        with open(path, "ab", buffering=0) as file:
            end = file.tell()
            if file.write(data) < len(data):    # what a disk still has room for
                file.truncate(end)
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    except OSError as error:
        error.filename = str(path)
        raise


def cut_log(path: Path, last: int):
    """Leaves the lines up to that iteration. After a kill there may be later ones, and one that is cut off."""
    with replacing(path) as file:
        for line in read_log(path):
            if line["iteration"] <= last:
                file.write(f"{json.dumps(line)}\n".encode())


def read_log(path: Path) -> Iterator[dict]:
    """The lines of log.jsonl, without those that a kill has cut off."""
    for line in path.read_text(errors="replace").splitlines() if path.is_file() else ():
        with contextlib.suppress(ValueError):
            yield json.loads(line)


def numbers(line: dict, path: str = "") -> Iterator[tuple[str, float]]:
    """The numbers in a line of the log: ("losses/depth", 0.3) and so on."""
    for key, value in line.items():
        if isinstance(value, dict):
            yield from numbers(value, f"{path}{key}/")
        elif isinstance(value, int | float):
            yield path + key, value


def draw_curves(folder: Path, labels: Labels):
    """curves.png from log.jsonl: a column per task, its losses above a score; the last one has what all tasks share."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        print("curves.png is not drawn: pip install -e '.[plot]', or draw log.jsonl yourself")
        return
    curves = defaultdict(list)    # points by name
    for line in read_log(folder / "log.jsonl"):
        for name, value in numbers(line):
            curves[name].append((line["iteration"], value))
    panels = []    # title and names of curves, column by column
    for task, kind in labels.kinds.items():
        metric = kind.primary(kind.metrics, odsf=False)
        panels += [(f"{kind.title}: losses", f"losses/{task}", f"validation_losses/{task}"),
                   (f"{kind.title}: {metric}{kind.unit}", f"results/{task}/{metric}")]
    panels += [("lr", "lr"), ("selection", "selection")]

    figure = Figure(figsize=(2 * len(panels), 6), layout="constrained")
    for axes, (title, *names) in zip(figure.subplots(2, len(panels) // 2, sharex=True).T.flat, panels):
        for name in filter(curves.get, names):
            axes.plot(*zip(*curves[name]), marker=".", label=name.partition("/")[0])
        axes.set(title=title, xlabel="iteration")
        if axes.lines and names[1:]:
            axes.set(ylim=(0, None))
            axes.legend()
    with replacing(folder / "curves.png") as file:
        figure.savefig(file, format="png")
    print("curves:    ", folder / "curves.png")


def selection_score(results: dict, kinds: Mapping) -> float:
    """What best.pt is chosen by: the mean over the tasks of log(metric), of -log(metric) if lower is better; to first
    order, delta_m against any baseline. For boundaries pixelF counts, as evaluations during the training lack odsF. A
    metric of 0 counts as 1e-6."""
    logs = [(-1) ** kinds[task].lower_is_better * math.log(max(scores[kinds[task].primary(scores, odsf=False)], 1e-6))
            for task, scores in results.items()]
    return sum(logs) / len(logs)


# ----------------------------------------------------------------------------------------------------------- losses

def total_loss(losses: Mapping[str, Tensor], kind: str = "log", rows: Mapping = TASKS) -> Tensor:
    """The tasks' losses (B,) in one scalar: the mean over the images of an image's total. kind: a key of TOTALS. rows:
    the tasks' kinds, which have their weights."""
    total = TOTALS[kind]
    return total(rows)(losses) if isinstance(total, type) else total(rows, losses)


def log_total(rows: Mapping, losses: Mapping[str, Tensor]) -> Tensor:
    """The sum of log(loss + 1e-8), as in the published runs; the paper does not state the total. A task counts by its
    relative improvement, so it needs no weight."""
    return sum(torch.log(loss + 1e-8) for loss in losses.values()).mean()


def weighted_total(rows: Mapping, losses: Mapping[str, Tensor]) -> Tensor:
    """The sum of weight * loss, with the weights of the rows."""
    return sum(rows[task].weight * loss for task, loss in losses.items()).mean()


# The total losses by --loss: a function of the tasks' rows and losses, or a class of nn.Module that takes the rows and
# is called with the losses. Its parameters are trained, and saved in checkpoints.
TOTALS = {"log": log_total, "weighted": weighted_total}


def task_loss(task: str, output: Tensor, target: Tensor) -> Tensor:
    """The loss of each image, (B,), of a task of metrics.TASKS (ValueError for another). output: raw output
    (B, C_t, H, W); target: labels (B, 1 or C_t, H, W), 255 or NaN where unknown."""
    return Labels({"task": (task, output.shape[1])}).kinds["task"].image_losses(output, target)


# ---------------------------------------------------------------------------------------------- schedule and batches

def learning_rate(initial: float, iteration: int, iterations: int) -> float:
    """Polynomial decay without warm-up. A pure function of the iteration, so nothing has to be stored to resume."""
    return initial * (1 - iteration / iterations) ** 0.9


def batch_indices(data_set: DenseDataset, args: argparse.Namespace, first: int, rank: int, world: int) -> Iterator:
    """The indices that this process loads, for each part of each batch from iteration `first` on. All samples stand in
    one order, a pure function of the seed: epoch after epoch, each shuffled again. An iteration takes the next
    `batch_size` of them, whatever the number of processes, parts and workers."""
    @functools.lru_cache(maxsize=2)
    def shuffled(epoch):
        return np.random.default_rng([args.seed, epoch]).permutation(len(data_set))

    def index(position):
        epoch, i = divmod(position, len(data_set))
        # Unshuffled, there is a new sample for each position.
        return (epoch, int(shuffled(epoch)[i])) if data_set.SHUFFLED else position

    own = args.batch_size // args.accumulate // world
    for begin in range(first * args.batch_size + rank * own, args.iterations * args.batch_size, own * world):
        yield [index(position) for position in range(begin, begin + own)]


# -------------------------------------------------------------------------------------------- weights to start from

def init_weights(model: MTMamba, args: argparse.Namespace):
    """--init-from. Raises FileNotFoundError, or ValueError where the weights do not fit, and where an encoder would be
    frozen that is not trained."""
    path = args.init_from
    if not args.init_partial:
        try:
            return load_weights(model, read_checkpoint(path), path)
        except ValueError as error:
            raise ValueError(f"{error}; to take what fits, add --init-partial") from error
    taken = load_fitting_weights(model, path, args.encoder, args.encoder_kwargs)
    untrained = {name for name, _ in model.named_parameters() if ".backbone." in name} - taken
    if args.freeze_encoder and untrained and not args.pretrained:
        raise ValueError(f"--freeze-encoder would freeze {len(untrained)} tensors of the encoder that are not trained: "
                         f"{path} does not have them; leave it out, or add --pretrained")


def load_fitting_weights(model: MTMamba, path: Path, encoder: str, encoder_kwargs: dict | None) -> set[str]:
    """--init-from with --init-partial: takes the tensors of the same name and shape, those of the encoder and of
    the decoders of tasks that both models have. Returns their names, and prints which ones were not taken.

    A cross-task block is taken only where the tasks and their order are the same. encoder, encoder_kwargs: of a
    published checkpoint, which does not name its own. Raises FileNotFoundError, or ValueError where nothing fits.
    """
    published = "published" in read_checkpoint(path)
    source, _ = load_checkpoint(path, torch.device("cpu"), *((encoder, encoder_kwargs) if published else ()))
    state, own = source.state_dict(), model.state_dict()
    del state["_extra_state"], own["_extra_state"]    # it describes a whole model
    taken = {key for key, value in own.items() if key in state and state[key].shape == value.shape
             and (".ctm." not in key or list(source.tasks) == list(model.tasks))}
    if not taken:
        raise ValueError(f"{path} has nothing that fits this model; start without --init-from")
    model.load_state_dict({key: state[key] for key in taken}, strict=False)
    print(f"took {len(taken)} tensors of {path}")
    for what, keys in (("new, not in the file", own.keys() - taken), ("left in the file", state.keys() - taken)):
        groups = Counter(re.match(r"stages\.\d\.(ctm|\w+\.[\w-]+)|\w+\.[\w-]+(\.\w+)?", key)[0] for key in sorted(keys))
        if groups:
            print(f"  {what}: " + ", ".join(f"{group} ({count})" for group, count in groups.items()))
    return taken


# ------------------------------------------------------------------- the same run on any number of processes and parts

class DrawnDropPath(DropPath):
    """Stochastic depth that reads what was drawn outside of the network. Where a block of timm's calls its DropPath
    several times, it drops all these branches of an image or none."""

    def forward(self, x: Tensor) -> Tensor:
        """x: (images, ...), or (images * windows, ...) inside some encoders."""
        if not self.training:
            return x
        kept = self.kept[self.row].repeat_interleave(len(x) // self.kept.shape[1])
        return torch.where(kept.view(-1, *[1] * (x.ndim - 1)), x / (1 - self.drop_prob), 0)


class StochasticDepth:
    """What all DropPaths of a model draw in an iteration, for the images of the whole batch: a pure function of (seed,
    iteration), made on the CPU, whatever the device, compilation, number of processes or --accumulate."""

    def __init__(self, model: MTMamba, images: int, device: torch.device):
        """images: of a part, which is what the model computes at a time."""
        paths = [path for path in model.modules() if type(path) is DropPath and path.drop_prob]
        self.rates = np.array([path.drop_prob for path in paths]).reshape(-1, 1)
        self.kept = torch.ones(len(paths), images, dtype=torch.bool, device=device)
        for row, path in enumerate(paths):
            path.__class__, path.row = DrawnDropPath, row
            path.register_buffer("kept", self.kept, persistent=False)

    def draw(self, seed: int, iteration: int, images: int) -> Tensor:
        """Which images of a batch keep which block: bool (blocks, images), on the CPU."""
        drawn = np.random.default_rng([seed, iteration, 1]).random((len(self.rates), images))
        return torch.from_numpy(drawn >= self.rates)


def align_gradients(model: MTMamba):
    """Gives the gradients of weights like (D, 1, 3, 3) the strides of the weights, by a view. Else they differ in
    the dimension of size 1, and DDP warns."""
    for weight in model.parameters():
        if 1 in weight.shape[1:] and weight.requires_grad:
            weight.register_hook(lambda gradient: gradient.flatten(1).view(gradient.shape))


if __name__ == "__main__":
    main()
