"""Scores a checkpoint, draws what it predicts, exports it, and recomputes the paper's cost tables.

    python evaluate.py --checkpoint runs/synthetic/last.pt                       # held-out synthetic scenes
    python evaluate.py --checkpoint X --dataset nyud --data-root data/NYUDv2     # beside the paper's figures
    torchrun --nproc_per_node=8 evaluate.py --checkpoint X --dataset pascal      # the images are split over eight GPUs
    python evaluate.py --checkpoint X --image a.jpg folder/ --out pictures       # your own pictures
    python evaluate.py --checkpoint X --export model.onnx --img-size 448 576     # a file that runs without this project
    python evaluate.py --cost --checkpoint X                                     # parameters, FLOPs, time and memory
    python evaluate.py --cost --variant all                                      # Tables 2-4: parameters and FLOPs

X is a checkpoint of train.py or of the published implementation. Scores are printed. They are also written to
results.json, with contact sheets, in the folder evaluation_NAME beside the checkpoint NAME, or in --out.
"""

# Order: main and its flags; checkpoints; scores; pictures; export; cost; processes of torchrun, as train.py needs them.

import os

# PyTorch's threads on a CPU (libgomp's) wait for each other by spinning. Where other processes are busy, that takes the
# core from the very thread that they wait for: an iteration of the main job lasted more than a minute. So we limit it
# before torch is imported, unless the user has decided. An idle machine stays as fast (tests/benchmark.py busy).
if not {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY", "GOMP_CPU_AFFINITY"} & os.environ.keys():
    os.environ["GOMP_SPINCOUNT"] = "2000"

import argparse
import contextlib
import copy
import functools
import glob
import hashlib
import io
import itertools
import json
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Collection, Iterator
from pathlib import Path

import numpy as np
import timm
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont, ImageOps
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

from datasets import (
    DATASETS,
    IMAGE_MEAN,
    IMAGE_STD,
    DenseDataset,
    Helpers,
    Parser,
    centred,
    check_writable,
    fetch,
    find_dataset_class,
    is_deliberate,
    loader,
    normalised,
    read_image,
    replacing,
    to_tensor,
    usable_cpus,
)
from metrics import Labels, Meter, OdsMeter, colour_map, delta_m
from mtmamba import (
    BACKENDS,
    ENCODERS,
    VARIANTS,
    MTMamba,
    check_scan,
    default_backend,
    load_published_checkpoint,
    published_config,
    read_tensors,
    set_backend,
)

EVALUATION_BATCH = 8             # images at most, and pixels at most, by the first image's size
EVALUATION_PIXELS = 2 ** 20

Results = dict[str, dict[str, float]]    # {task: {metric: value}}, the primary metric first

# Tables 2-4, NYUDv2 at 448x576 with Swin-Large: parameters in millions, FLOPs in 1e9.
PAPER_COST = {"mtmamba": (307.99, 540.81), "stm1": (252.51, 354.13), "stm2": (276.48, 435.47),
              "stm3": (300.45, 516.82), "swin-multi-task": (303.18, 466.35), "swin-single-task": (888.77, 1074.79),
              "mfe-wmsa": (451.81, 884.61), "gate-wmsa": (345.33, 659.29)}


def main(argv: list[str] | None = None) -> Results:
    """The scores; {} with --cost, --export and --image. Exit code 2: bad input; 1: a picture was skipped or something
    could not be written; 130: Ctrl-C or SIGTERM."""
    parser = Parser("evaluate.py", __doc__)
    add_arguments(parser)
    args = parser.parse_args(argv)
    with parser.told("make room, or name another folder with --out"):
        check_arguments(args, parser)
        if args.dataset:
            find_dataset_class(args.dataset)    # the user names its file, which may define the checkpoint's kinds
        if args.export:
            export(args)
            return {}
        with start(args.device) as device:
            if args.cost:
                print_cost(args, device)
                return {}
            model, checkpoint = load_checkpoint(args.checkpoint, device, args.encoder, args.encoder_kwargs)
            print("scan backend:", choose_backend(model, args.backend))
            if not args.image:
                return score(args, model, checkpoint, device)
            skipped = draw_pictures(args, model, device)
    if skipped:
        parser.exit(1, f"evaluate.py: {skipped} of the pictures skipped\n")
    return {}


def add_arguments(parser: argparse.ArgumentParser):
    add = parser.add_argument
    add("--checkpoint", type=Path, help="of train.py or of the published implementation")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--backend", choices=BACKENDS, help="of the scan (default: by the device)")
    add("--out", type=Path, help="folder of all files (default: evaluation_NAME or predictions, beside the checkpoint)")
    add("--overwrite", action="store_true", help="replace files of an earlier --image or --save-predictions")
    add("--save-predictions", type=Path, metavar="DIR", help="raw maps of the data set or of --image, at the images' "
        "own sizes: TASK/NAME.png of 8 bits (classes; 255 p of saliency and boundaries) or .npy of float32 (depth in "
        "metres, of Cityscapes disparity in pixels; normals (3, h, w): x right, y up, z to the viewer)")
    add("--probabilities", action="store_true", help='beside them .npz, whose float16 array "probability" is (C, h, w) '
        "of classes, (1, h, w) of saliency and boundaries")
    add("--label-ids", action="store_true", help="raw maps hold the data set's official label IDs")
    add("--img-size", nargs=2, type=int, metavar=("H", "W"), help="size of the images; not for --image (default: as "
        "the model was trained, or as the data set is scored)")
    add("--encoder", help="of a published checkpoint or --cost, which do not name it: "
        f"{', '.join(ENCODERS)} (default), or another timm model")
    add("--encoder-kwargs", type=dict, metavar="JSON", help="further arguments of the encoder")
    add = parser.add_argument_group("scores").add_argument
    add("--dataset", metavar="NAME", help=f"{', '.join(DATASETS)}, or path/to/file.py:Class (default: that of the "
        "training; of a published checkpoint, the one with its tasks)")
    add("--data-root", type=Path, help="where the data set is unpacked")
    add("--workers", type=int, help="processes that load images, and as many that match boundaries (default: one per "
        "core, at most 16; 0 for synthetic scenes)")
    add("--baseline", type=Path, nargs="+", metavar="FILE", help="results.json for delta_m, one or one per task")
    add("--boundary-list", type=Path, help="score odsF on these images only, one ID per line")
    add("--save-images", type=int, default=4, metavar="N", help="contact sheets of the first N images")
    add = parser.add_argument_group("your own pictures").add_argument
    add("--image", type=Path, nargs="+", metavar="PATH", help="pictures, or folders of them")
    add("--max-side", type=int, default=MAX_SIDE, metavar="N", help="larger pictures are reduced to N pixels for the "
        "model, and their maps enlarged again (default: %(default)s)")
    add("--features", action="store_true", help="draw each task's final decoder feature, too (Figure 3)")
    add = parser.add_argument_group("export").add_argument
    add("--export", type=Path, metavar="FILE", help="write the model as .onnx or .pt2 (torch.export), and check it: "
        "float32 RGB (1, 3, H, W), normalised with ImageNet's mean and deviation -> an output of each task's name; the "
        "file's metadata, image and tasks, say the rest")
    add("--with-preprocessing", action="store_true", help="for stored images, uint8 RGB (1, H, W, 3); gives classes, "
        "probabilities, metres and unit normals")
    add = parser.add_argument_group("cost").add_argument
    add("--cost", action="store_true", help="parameters, FLOPs, time and memory of --checkpoint, or of an untrained "
        "model by --variant, --encoder and --dataset (default: nyud)")
    add("--variant", choices=["all", *VARIANTS], help="all: parameters and FLOPs of Tables 2-4")
    add("--batch-size", type=int, help="images at a time, to measure images per second (default: 8 on CUDA, else 1)")


# The flags that have an effect, by what is asked for. The others are refused.
FLAGS = {"cost": "cost checkpoint device backend dataset variant batch_size img_size encoder encoder_kwargs",
         "export": "export with_preprocessing checkpoint dataset img_size encoder encoder_kwargs",
         "image": "image checkpoint dataset device backend out overwrite save_predictions probabilities label_ids "
                  "max_side features encoder encoder_kwargs",
         "": "checkpoint device backend out overwrite save_predictions probabilities label_ids workers dataset "
             "data_root baseline boundary_list save_images img_size encoder encoder_kwargs"}


def check_arguments(args: argparse.Namespace, parser: Parser):
    """Raises ValueError for flags without an effect or with impossible values, and where there is nothing to do."""
    if args.checkpoint is None and not args.cost:
        raise ValueError("expected --checkpoint FILE, or --cost")
    mode = next((mode for mode in FLAGS if mode and getattr(args, mode)), "")
    useful = set(FLAGS[mode].split())
    if args.variant == "all":
        useful -= {"device", "backend", "batch_size"}
    if args.cost and args.checkpoint:    # which knows them
        useful -= {"variant", "dataset"}
    if not args.save_predictions:
        useful -= {"probabilities", "label_ids"}
    for name, value in vars(args).items():
        if name not in useful and value != parser.get_default(name):
            raise ValueError(f"--{name.replace('_', '-')} has no effect here; see --help for what it belongs to")
    parser.expect_least(args, max_side=32, workers=0, save_images=0, batch_size=1)
    if args.export and args.export.suffix not in EXPORTS:
        raise ValueError(f"expected --export to a file that ends with {' or '.join(EXPORTS)}, found {args.export}")


# ------------------------------------------------------------------------------------------- models and checkpoints

def load_checkpoint(path: str | Path, device: torch.device, encoder: str | None = None,
                    encoder_kwargs: dict | None = None) -> tuple[MTMamba, dict]:
    """The model of a checkpoint, in evaluation mode, and what else the file says: "config", MTMamba's arguments, and of
    train.py "training", "versions" and "iteration". `model.labels` (Labels) is what its data set says of the tasks.

    encoder, encoder_kwargs: of a published checkpoint, which does not name them; None for Swin-Large. Raises
    FileNotFoundError, or ValueError for another kind of file or weights that do not fit its configuration.
    """
    checkpoint = read_checkpoint(path)
    config = checkpoint["config"]
    if "encoder" not in config:
        config |= dict(encoder=encoder or "swin-large", encoder_kwargs=encoder_kwargs)
    elif encoder or encoder_kwargs:
        raise ValueError(f"{path} knows its encoder; leave out --encoder and --encoder-kwargs")
    try:
        model = MTMamba(**config | {"pretrained": False})    # the weights are in the file
    except TypeError as error:    # arguments that MTMamba or the encoder does not have
        raise ValueError(f"cannot build a model of {config}: {error}") from error
    load_weights(model, checkpoint, path)
    model.labels = checkpoint["labels"]
    for key in ("model", "optimizer", "scaler", "published"):    # which keep the file open; a training may replace it
        checkpoint.pop(key, None)
    return model.to(device).eval(), checkpoint


def read_checkpoint(path: str | Path) -> dict:
    """A checkpoint of train.py: its entries, with "labels" as Labels. Of a published one: "published", its state_dict,
    and what describe_published gives. Raises FileNotFoundError, or ValueError for another kind of file."""
    checkpoint = read_tensors(path)
    entries = checkpoint if isinstance(checkpoint, dict) else {}
    state = entries.get("model", entries)
    if any(re.match(r"(module\.)?final_project\.", str(key)) for key in state):
        return describe_published(state) | {"published": state}
    if not {"model", "config", "labels"} <= entries.keys():
        raise ValueError(f"{path}: expected the entries model, config and labels of train.py, found "
                         f"{list(entries)[:5] or type(checkpoint)}")
    return dict(checkpoint, labels=Labels(**checkpoint["labels"]))


def describe_published(state: dict[str, Tensor]) -> dict:
    """Of a published checkpoint: "config" (tasks, variant, output_scale), "dataset" and "labels". The heads' channels
    show the data set, and so the order of the tasks. If they fit none, that is the heads', and "dataset" is None."""
    config = published_config(state)
    tasks = config["tasks"]
    fitting = [name for name, data_set in DATASETS.items() if tasks.items() <= data_set.TASKS.items()]
    name = fitting[0] if len(fitting) == 1 else None
    data_set = DATASETS.get(name, DenseDataset)
    tasks = {task: tasks[task] for task in data_set.TASKS or tasks if task in tasks}
    config |= dict(tasks=tasks, output_scale=data_set.LABEL_SCALE)
    return dict(config=config, dataset=name, labels=data_set.describe(tasks))


def load_weights(model: MTMamba, checkpoint: dict, path: str | Path):
    """Loads the weights of a read_checkpoint, strictly. Raises ValueError, naming path, if they are not the model's."""
    published = "published" in checkpoint
    state = checkpoint["published" if published else "model"]
    try:
        load_published_checkpoint(model, state) if published else model.load_state_dict(state)
    except (RuntimeError, ValueError) as error:
        raise ValueError(f"{path} holds weights of another architecture or of other tasks than {model.tasks}: "
                         f"{str(error)[:300]}{'; give its encoder with --encoder' * published}") from error
    count = len(state) - ("_extra_state" in state)
    print(f"loaded {count}/{count} tensors of {path}")


def choose_backend(model: MTMamba, backend: str | None, dtype: torch.dtype | None = None,
                   compiled: bool = False) -> str:
    """Sets the backend of the model's scans (None: by the device) and returns its name, once the scan has proved itself
    on this device; arguments as in check_scan. Raises ValueError where it is wrong or cannot run."""
    name = backend or default_backend(next(model.parameters()).device)
    set_backend(model, backend)
    try:
        check_scan(model, dtype or torch.float32, compiled)
    except RuntimeError as error:    # also of the machine, such as a GPU for which PyTorch has no kernels
        raise ValueError(str(error)) from error
    return name


# --------------------------------------------------------------------------------------------------------- scores

def score(args: argparse.Namespace, model: MTMamba, checkpoint: dict, device: torch.device) -> Results:
    """Prints the table and writes results.json and the contact sheets, all from the first process."""
    name, dataset = open_dataset(args, model, checkpoint)
    scored = read_boundary_list(args.boundary_list, dataset) if args.boundary_list else None
    out = args.out or args.checkpoint.parent / f"evaluation_{args.checkpoint.stem}"
    baseline = read_baseline(args.baseline, name, dataset, out)
    if (out / "log.jsonl").exists():
        raise ValueError(f"{out} holds a run of train.py and its results.json; give another folder with --out")
    for folder in {out, args.save_predictions or out}:
        dataset.refuse_folder(folder)
    check_writable(out)
    save = RawMaps(args, dataset.labels, dataset.names, []).save_outputs if args.save_predictions else None
    workers = min(16, usable_cpus() // rank_and_world()[1]) if dataset.SHUFFLED else 0
    evaluation = Evaluation(dataset, device, workers if args.workers is None else args.workers, scored)
    results = evaluate(model, evaluation, save)
    if not results:
        raise ValueError(f"nothing to score: no pixel of {name}'s images has a label of {', '.join(model.tasks)}")
    if rank_and_world()[0] > 0:
        return results
    print(f"{name}: {len(dataset)} images, {len(dataset) / evaluation.seconds:.3g} per second"
          + (f", odsF on {len(scored)} of them" if scored else ""))
    improvement = print_scores({"model": results}, dataset, checkpoint["config"], baseline)
    entries = dict(dataset=name, checkpoint=str(args.checkpoint), delta_m=improvement, results=results)
    write_results(out / "results.json", entries, model, evaluation, checkpoint)
    print("results:", out / "results.json")
    shown = range(min(args.save_images, len(dataset)))
    for first in shown[::4]:
        path = out / (f"contact_sheet_{first // 4 + 1}.png" if first else "contact_sheet.png")
        print("pictures:", save_contact_sheet(model, evaluation, path, shown[first:first + 4]))
    return results


def print_scores(columns: dict[str, Results], dataset: DenseDataset, config: dict, baseline: dict[str, float] | None,
                 primary_only: bool = False) -> float | None:
    """Prints the table, with the paper's figures where known, and returns the first column's delta_m or None."""
    encoder = {timm_name: key for key, timm_name in ENCODERS.items()}.get(config["encoder"], config["encoder"])
    paper = dataset.PAPER.get((config["variant"], encoder), {})
    print_table(columns, dataset.labels, paper, primary_only)
    single, results = baseline or dataset.SINGLE_TASK, next(iter(columns.values()))
    figures = {task: metrics[dataset.kinds[task].primary(metrics)] for task, metrics in results.items()}
    if not figures or not figures.keys() <= single.keys():
        if not primary_only:
            print("no delta_m: no single-task row is known here for this data set; give one's results with --baseline")
        return None
    improvement = delta_m(figures, {task: single[task] for task in figures}, dataset.kinds)
    published = ""
    if not baseline and paper.keys() == figures.keys():
        published = f" (paper: {delta_m(paper, single, dataset.kinds):+.2f} %)"
    print(f"delta_m against {'--baseline' if baseline else 'the single-task row of Table 2'}: {improvement:+.2f} %"
          f"{published}")
    return improvement


def open_dataset(args: argparse.Namespace, model: MTMamba, checkpoint: dict) -> tuple[str, DenseDataset]:
    """The data set's name and its images. Raises ValueError where its tasks or classes are not those of the model."""
    name, labels = args.dataset or checkpoint.get("training", checkpoint).get("dataset"), model.labels
    if not name:
        raise ValueError(f"the model's tasks {labels.tasks} are not those of one data set; give it with --dataset")
    data_set = find_dataset_class(name, said_by=None if args.dataset else args.checkpoint)
    size = args.img_size or data_set.VAL_SIZE or checkpoint["config"].get("img_size")
    dataset = data_set.open("val", size, list(labels.tasks), args.data_root)
    sides = labels, dataset.labels
    forms = [{task: (kind.metrics, kind.channels) for task, kind in side.kinds.items()} for side in sides]
    if forms[0] != forms[1]:
        raise ValueError(f"the model's tasks are {forms[0]}, those of {name} {forms[1]}; another --dataset?")
    if model.output_scale != dataset.LABEL_SCALE:
        raise ValueError(f"expected a model with the output_scale {dataset.LABEL_SCALE} of {name}'s labels")
    for task in labels.kinds:
        trained, scored = (side.classes.get(task, ()) for side in sides)
        for i, (a, b) in enumerate(zip(trained, scored)):
            if a != b:
                raise ValueError(f"class {i} of {task} is {a!r} in {args.checkpoint} and {b!r} in {name}")
        if len(trained) != len(scored):
            print(f"{task}: only the {'model' if trained else 'data set'} names its classes; taken to be the same")
    return name, dataset


def read_boundary_list(path: Path, dataset: DenseDataset) -> set[str]:
    """The IDs in the file. Raises FileNotFoundError, or ValueError for those that the data set does not have."""
    names = {line.strip() for line in path.read_text("utf-8-sig").splitlines()} - {""}
    unknown = sorted(names.difference(dataset.names))
    if unknown or not names:
        raise ValueError(f"expected IDs of the data set's images in {path}, found {len(unknown)} others {unknown[:1]}")
    return names


def read_baseline(paths: list[Path] | None, name: str, dataset: DenseDataset, out: Path) -> dict[str, float] | None:
    """The primary metrics by task in one or several results.json. Raises ValueError where they are of another data set,
    where one is missing, and for the file that will be written to out."""
    keep_inputs(out / "results.json", paths or ())
    figures = {}
    for path in paths or ():
        try:
            content = json.loads(path.read_text())
            figures |= {task: content["results"][task][kind.primary(kind.metrics, bool(dataset.BOUNDARY_TOLERANCE))]
                        for task, kind in dataset.kinds.items() if task in content["results"]
                        if content["dataset"] == name}
        except (ValueError, LookupError, TypeError) as error:
            raise ValueError(f"{path} is not a results.json of evaluate.py or train.py ({error!r})") from error
    missing = [task for task in dataset.kinds if not figures.get(task)]
    if paths and missing:
        raise ValueError(f"expected figures above 0 of every task of {name} in --baseline, found none of {missing}")
    return figures or None


def write_results(path: Path, entries: dict, model: MTMamba, evaluation: "Evaluation", checkpoint: dict):
    """results.json of train.py and evaluate.py: the entries, what else a paper states of a run, and the record of the
    evaluation. checkpoint: as of load_checkpoint. What a published one does not know is null."""
    config, training, dataset = checkpoint["config"], checkpoint.get("training", {}), evaluation.dataset
    trained_in = training.get("amp")
    parameters, flops = count_cost(model, dataset.size)
    content = entries | dict(
        images=evaluation.images, boundary_images=len(evaluation.scored), split="val",
        variant=config["variant"], encoder=config["encoder"], encoder_kwargs=config["encoder_kwargs"],
        tasks=list(model.tasks), seed=training.get("seed"), training=training or None,
        iteration=checkpoint.get("iteration"), parameters=parameters, flops=flops, image_size=dataset.size,
        precision=dict(training="float32" if trained_in == "off" else trained_in, scoring="float32"),
        versions=dict(training=checkpoint.get("versions"), scoring=versions()), **evaluation.record())
    with replacing(path) as file:
        file.write((json.dumps(content, indent=2) + "\n").encode())


def versions() -> dict[str, str | None]:
    """The versions that results depend on. commit: None where this folder is no git checkout."""
    found = dict(python=sys.version.split()[0], torch=str(torch.__version__), timm=timm.__version__, commit=None)
    with contextlib.suppress(OSError):
        found["commit"] = subprocess.run(["git", "rev-parse", "HEAD"], cwd=Path(__file__).parent, capture_output=True,
                                         text=True).stdout.strip() or None
    return found


@torch.inference_mode()
def evaluate(model: MTMamba, evaluation: "Evaluation", save: Callable | None = None,
             stop: Callable | None = None) -> Results | None:
    """The scores of a model, which is then in evaluation mode. Tasks without a label are left out.
    Every process of a group has to call this: they share the images, and all return the same figures. They share whole
    batches, as outputs differ in the last digits with the batch: the figures are the same for any number of processes.
    save: called with each image's name, its outputs {task: (1, C_t, H, W)} and its own_area. stop: asked before each
    batch whether to give up, then the result is None; it must answer the same in every process."""
    model.eval()
    with evaluation.running() as loaded:
        for batches in loaded:
            if stop and stop():
                break
            for batch in batches:
                evaluation.update(batch, model(batch["image"].to(evaluation.device)), save)
    return None if stop and stop() else evaluation.results()


class Evaluation:
    """The sums of an evaluation, which give scores and losses. update(...) adds a batch, results() the other processes.
    workers: processes that load images, and as many that match boundaries. scored: names of the images that odsF is
    scored on, None for all, () for none. limit: the number of images, the first ones."""

    def __init__(self, dataset: DenseDataset, device: torch.device, workers: int = 0,
                 scored: Collection[str] | None = None, limit: int | None = None):
        self.dataset, self.device, self.workers = dataset, device, workers
        self.images = min(len(dataset), limit or len(dataset))
        self.scored = dataset.names[:self.images] if scored is None else scored
        self.meters = {task: Meter(kind) for task, kind in dataset.kinds.items()}

    @contextlib.contextmanager
    def running(self) -> Iterator[Iterator[list[dict]]]:
        """Loads this process's images, in lists of batches of one size: as many lists as in other processes, of which
        the last may be empty. Matches boundaries."""
        dataset, tolerance = self.dataset, self.dataset.BOUNDARY_TOLERANCE if self.scored else None
        digest_names(dataset)
        rank, world = rank_and_world()
        boundaries = [task for task, kind in dataset.kinds.items() if "odsF" in kind.metrics and tolerance is not None]
        samples = WithTruths(dataset, boundaries, self.scored)
        first, = fetch(samples, [0], self.workers)
        size = min(EVALUATION_BATCH, max(1, EVALUATION_PIXELS // first["image"][0].numel()))
        batches = [range(i, min(i + size, self.images)) for i in range(0, self.images, size)]
        batches += [range(0)] * (-len(batches) % world)
        loaded = loader(samples, batches[rank::world], self.workers, size, collate_fn=collate_by_size)
        begun, workers = time.perf_counter(), loaded.num_workers
        with Helpers(workers) if workers and boundaries else contextlib.nullcontext() as helpers:
            self.ods = {task: OdsMeter(tolerance, helpers, 4 * workers) for task in boundaries}
            yield tqdm(loaded, "evaluating", leave=False, disable=rank > 0)
            for meter in self.ods.values():
                meter.collect()
        self.seconds = time.perf_counter() - begun

    def update(self, batch: dict, outputs: dict[str, Tensor], save: Callable | None = None):
        """outputs: of the network (B, C_t, H, W) for a batch of `running`. save: see evaluate."""
        for task, meter in self.meters.items():
            meter.update(outputs[task], batch[task].to(self.device), with_losses=True)
        for i, truths in enumerate(batch["truths"]):
            own = {task: output[i:i + 1].float() for task, output in outputs.items()}
            area = own_area(batch["image"], batch["size"][i], self.dataset.LABEL_SCALE)
            for task, truth in truths.items():
                kind = self.dataset.kinds[task]
                prediction = kind.predict(own[task])[0][area].cpu().numpy()
                self.ods[task].update(kind.raw(prediction), truth, kind.valid(batch[task][i:i + 1])[0][area].numpy())
            if save:
                save(batch["name"][i], own, area)

    def results(self) -> Results:
        """The scores of the tasks that have any, over all processes, the primary metric first."""
        for meter in self.meters.values():
            meter.sums, meter.losses = add_up(meter.sums), add_up(meter.losses)
        for meter in self.ods.values():
            meter.counts = add_up(torch.from_numpy(meter.counts)).cpu().numpy()
        empty = [task for task, meter in self.meters.items() if meter.empty()]
        if empty:    # one task without labels is no reason to lose the others' scores
            print(f"not scored, as no pixel has a label: {', '.join(empty)}")
        return {task: (self.ods[task].compute() if task in self.ods else {}) | meter.compute()
                for task, meter in self.meters.items() if task not in empty}

    def record(self) -> dict:
        """What results.json tells beside the scores. validation_losses: means over the images with a label."""
        losses = {task: (m.losses[0] / m.losses[1]).item() for task, m in self.meters.items() if m.losses[1]}
        confusion = {task: found for task, meter in self.meters.items() if (found := meter.kind.confusion(meter.sums))}
        return dict(images_per_second=self.images / self.seconds, validation_losses=losses, confusion=confusion)


class WithTruths:
    """A data set's samples with the boundaries that odsF is scored against, {task: bool (h, w)}."""

    def __init__(self, dataset, boundaries, scored):
        self.dataset, self.boundaries, self.scored = dataset, boundaries, scored

    def __getitem__(self, index):
        sample = self.dataset[index]
        wanted = self.boundaries if sample["name"] in self.scored else ()
        return sample | {"truths": {task: self.dataset.boundary_truth(index, task) for task in wanted}}


def collate_by_size(samples: list[dict]) -> list[dict]:
    """The samples in batches of equal size, in order: an image larger than the data set's size is a batch of its own.
    Tensors are stacked, which also needs fewer open files: a tensor that comes from another process holds one."""
    groups = [list(group) for _, group in itertools.groupby(samples, lambda sample: sample["image"].shape)]
    batches = [{key: [sample[key] for sample in group] for key in group[0]} for group in groups]
    return [{key: torch.stack(values) if isinstance(values[0], Tensor) else values for key, values in batch.items()}
            for batch in batches]


def own_area(image: Tensor, size: tuple[int, int], scale: int = 1) -> tuple:
    """Where an image of the size (h, w) lies in the maps (..., scale H, scale W) of the padded one (..., H, W)."""
    return (..., *centred(image.shape[-2:], size, scale))


class RawMaps:
    """The files of --save-predictions, with --probabilities and --label-ids."""

    def __init__(self, args: argparse.Namespace, labels: Labels, names: list[str], read: Collection[Path]):
        """names: of the images. read: see claim. Raises ValueError as claim, and if the data set has no label IDs."""
        self.args, self.labels = args, labels
        if args.label_ids and not labels.label_ids:
            raise ValueError("--label-ids has no effect here: the data set states no LABEL_IDS of its classes")
        files = [f"{task}/{name}{suffix}" for name in names for task, kind in labels.kinds.items()
                 for suffix in (kind.suffix, ".npz")[:1 + args.probabilities]]
        claim(args.save_predictions, files, read, args.overwrite)

    def save_outputs(self, name: str, outputs: dict[str, Tensor], area: tuple):
        """See evaluate."""
        self.save(name, *({task: values[0][area].cpu() for task, values in of(self.labels, outputs).items()}
                          for of in (predict_maps, probabilities)))

    def save(self, name: str, maps: dict[str, Tensor], shares: dict[str, Tensor] | None = None):
        """maps, shares: as of predict_picture, (C, h, w)."""
        for task, values in maps.items():
            kind = self.labels.kinds[task]
            values = kind.raw(values.numpy(), self.args.label_ids)
            path = self.args.save_predictions / task / f"{name}{kind.suffix}"
            path.parent.mkdir(parents=True, exist_ok=True)
            with replacing(path) as file:
                Image.fromarray(values).save(file, "PNG") if values.dtype == np.uint8 else np.save(file, values)
            if self.args.probabilities and task in shares:
                with replacing(path.with_suffix(".npz")) as file:
                    np.savez_compressed(file, probability=shares[task].half().numpy())


def print_table(columns: dict[str, Results], labels: Labels, paper: dict[str, float], primary_only: bool):
    """A line per metric, a column per set of results; if known, the paper's figures and the first column's gap."""
    titles = [*columns, *(["paper", "difference"] if paper else [])]
    print(f"\n{'task':<12}{'metric':<17}" + "".join(f"{title:>20}" for title in titles))
    for task, metrics in next(iter(columns.values())).items():
        row = labels.kinds[task]
        for metric in [row.primary(metrics)] if primary_only else metrics:
            primary = metric == row.primary(metrics)
            line = f"{row.title if primary else '':<11} {metric:<17}" + "".join(
                f"{results[task][metric]:>20.{row.digits}f}" if metric in results.get(task, ()) else 20 * " "
                for results in columns.values())
            # The paper's maxF is computed as maxF_published.
            if task in paper and (primary or metric == "maxF_published"):
                line += f"{paper[task]:>20.{row.digits}f}{metrics[metric] - paper[task]:>+20.{row.digits}f}"
            print(f"{line}   {'lower' if row.lower_is_better else 'higher'} is better" if primary else line)
    print()


# ------------------------------------------------------------------------------------------------------- pictures

PICTURE_FILES = ("apng avif bmp cr2 dng gif heic heif j2k jfif jp2 jpe jpeg jpg jxl nef pbm pgm png pnm ppm tga tif "
                 "tiff webp").split()    # endings; those that Pillow cannot read are skipped
MAX_SIDE = 1024     # pixels
SHEET = 1600                      # pixels of a sheet's width: its letters stay readable on a screen
LETTERS, LINE, GAP = 16, 24, 8    # heights of letters and lines, and what lies between pictures
FONTS = "/usr/share/fonts", "~/.local/share/fonts", "/System/Library/Fonts", "C:/Windows/Fonts"


def predict_maps(labels: Labels, outputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Raw outputs (B, C_t, H, W) -> maps in the form of the labels (B, 1 or C_t, H, W), see Kind.predict."""
    return {task: labels.kinds[task].predict(output.float()) for task, output in outputs.items()}


def probabilities(labels: Labels, outputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Of the tasks that have them: of classes (B, C_t, H, W), or of yes (B, 1, H, W)."""
    return {task: share for task, output in outputs.items()
            if (share := labels.kinds[task].probability(output.float())) is not None}


@torch.inference_mode()
def save_contact_sheet(model: MTMamba, evaluation: Evaluation, path: Path, images: range = range(4)) -> Path:
    """A PNG of some images of an evaluation that has run: each image, each task's prediction above its ground truth."""
    dataset, scale, blocks, maps = evaluation.dataset, model.output_scale, [], []
    for sample in fetch(dataset, images[:len(dataset)], evaluation.workers):
        predicted = predict_maps(dataset.labels, model(sample["image"][None].to(evaluation.device)))
        inner = own_area(sample["image"], sample["size"])
        blocks.append([[(sample["name"], to_picture(sample["image"][inner]))]])
        maps.append({task: [both[:, ::scale, ::scale][inner].numpy() for both in (values[0].cpu(), sample[task])]
                     for task, values in predicted.items()})    # at the image's size
    with replacing(path) as file:
        draw_maps(blocks, dataset.labels, maps, (", predicted", ", true"), 1).save(file, "PNG")
    return path


def draw_maps(blocks: list[list], labels: Labels, maps: list[dict[str, list]], titles: tuple[str, ...],
              first: int = 0) -> Image.Image:
    """A sheet of images, each with a column of maps per task, and a legend per task, whose range is that of the maps
    [first:]. blocks: as of draw_sheet. maps: of each image {task: [map (1 or C, h, w), ...]}, with their titles."""
    legends = []
    for task, kind in labels.kinds.items():
        drawn, shown = (np.concatenate([map.reshape(len(map), 1, -1) for own in maps for map in own[task][start:]], 2)
                        for start in (0, first))
        legends.append([(kind.title, ()), *kind.picture(drawn, shown)[1]])
        for columns, own in zip(blocks, maps):
            columns.append([(kind.title + title, Image.fromarray(kind.picture(map, shown)[0]))
                            for title, map in zip(titles, own[task])])
    return draw_sheet(blocks, legends)


def to_picture(image: Tensor) -> Image.Image:
    """A normalised image (3, h, w)."""
    pixels = image.permute(1, 2, 0) * torch.tensor(IMAGE_STD) + torch.tensor(IMAGE_MEAN)
    return Image.fromarray((255 * pixels.clamp(0, 1)).byte().numpy())


def draw_pictures(args: argparse.Namespace, model: MTMamba, device: torch.device) -> int:
    """Writes the predictions for the user's pictures, and a sheet of each. Returns how many were skipped, or 0 in other
    processes than the first."""
    paths, kinds, skipped = find_pictures(args.image), model.labels.kinds, 0
    out = args.out or args.checkpoint.parent / "predictions"
    rank, world = rank_and_world()
    drawn = [*kinds, *(f"{task}_feature" for task in kinds if args.features), "sheet"]
    stems = distinct_stems(paths, drawn)
    inputs = {path if path.is_dir() else path.parent for path in args.image}
    claim(out, [f"{stem}_{name}.png" for stem in stems for name in drawn], inputs, args.overwrite)
    raw = RawMaps(args, model.labels, stems, inputs) if args.save_predictions else None
    for path, stem in list(zip(paths, stems))[rank::world]:
        try:
            image = read_picture(path)
            maps, heat, *shares = predict_picture(model, image, device, args.max_side, args.probabilities)
        except Exception as error:
            # PyTorch has no type of its own for too little memory of a CPU. Other errors are faults in the code.
            if not (re.search("MemoryError|allocate memory", repr(error)) or is_deliberate(error)):
                raise
            reason = str(error) or repr(error)
            print("skipped", printable(reason if str(path) in reason else f"{path}: {reason}"), file=sys.stderr)
            skipped += 1
            continue
        if raw:
            raw.save(stem, maps, *shares)
        files = draw_prediction(printable(path.name), image, maps, heat if args.features else {}, model.labels)
        for name, picture in files.items():
            with replacing(out / f"{stem}_{name}.png") as file:
                picture.save(file, "PNG")
        print("pictures:", printable(out / f"{stem}_sheet.png"))
    # This also waits for all processes: torchrun ends the others when one has failed.
    return int(add_up(torch.tensor(skipped))) * (rank == 0)


def draw_prediction(title: str, image: Image.Image, maps: dict[str, Tensor], heat: dict[str, Tensor],
                    labels: Labels) -> dict[str, Image.Image]:
    """The picture of each map, of heat's maps over the image, and a sheet of all. maps, heat: of predict_picture."""
    columns, legends, files = [[(title, image)]], [], {}
    for task, kind in labels.kinds.items():
        picture, lines = kind.picture(maps[task].numpy(), maps[task].numpy())
        files[task] = Image.fromarray(picture)
        columns.append([(kind.title, files[task])])
        legends.append([(kind.title, ()), *lines])
        if task in heat:
            norm = heat[task].numpy()
            low, high = float(norm.min()), float(norm.max())
            files[f"{task}_feature"] = Image.blend(image, Image.fromarray(colour_map(norm, low, high)), 0.6)
            columns[-1].append((f"feature's norm: {low:.3g} (dark) to {high:.3g}", files[f"{task}_feature"]))
    return files | {"sheet": draw_sheet([columns], legends)}


def keep_inputs(written: Path, read: Collection[Path]):
    """Raises ValueError where a file or a folder that is read would be written to."""
    if written.resolve() in {path.resolve() for path in read}:
        raise ValueError(f"{written} is read here; write to another place")


def claim(folder: Path, names: list[str], read: Collection[Path], overwrite: bool):
    """Makes the folder for these files. Raises ValueError if it is also read, or if a file is there already."""
    keep_inputs(folder, read)
    found = [name for name in names if os.path.lexists(folder / name)]
    if found and not overwrite:
        raise ValueError(f"{folder / found[0]} would be overwritten, one of {len(found)}; add --overwrite if it may be")
    check_writable(folder)
    add_up(torch.zeros(1))    # no process writes before all have looked


def find_pictures(paths: list[Path]) -> list[Path]:
    """The files, and those in the folders that have a picture's ending. Raises ValueError where there is none."""
    found = []
    for path in paths:
        if path.is_dir():
            found += sorted(f for f in path.iterdir() if f.suffix.lower()[1:] in PICTURE_FILES and f.is_file())
        else:    # a quoted pattern, too
            found += [path] if path.exists() else map(Path, sorted(glob.glob(str(path))) or [path])
    if not found:
        raise ValueError(f"no pictures in {', '.join(map(str, paths))}, with names in {' '.join(PICTURE_FILES)}")
    return found


def distinct_stems(paths: list[Path], endings: list[str]) -> list[str]:
    """The files' names without their endings, cut to 200 bytes, as more is added to them. They are numbered where two
    would get a file NAME_ENDING in common, also on a file system that takes capitals for small letters."""
    stems, taken = [], set()
    for path in paths:
        own = stem = os.fsdecode(os.fsencode(path.stem)[:200])
        numbers = itertools.count(2)
        while (files := {f"{stem}_{ending}".casefold() for ending in endings}) & taken:
            stem = f"{own}_{next(numbers)}"
        stems.append(stem)
        taken |= files
    return stems


def printable(text: object) -> str:
    """Names of files may hold line breaks, and bytes that are no text."""
    return "".join(c if c.isprintable() else "?" for c in str(text))


def read_picture(path: str | Path) -> Image.Image:
    """RGB, upright: see datasets.read_image. Raises FileNotFoundError, or ValueError where it cannot be read."""
    if Path(path).is_fifo():    # whose reading may never end
        raise ValueError(f"{path} is a pipe, not a picture's file")
    return Image.fromarray(read_image(path, turn=True))


@torch.inference_mode()
def predict_picture(model: MTMamba, image: Image.Image, device: torch.device, max_side: int = MAX_SIDE,
                    with_probabilities: bool = False) -> tuple[dict[str, Tensor], ...]:
    """({task: map as of Kind.predict, (1 or C, h, w)}, {task: (h, w) norm of the final decoder feature}), and
    {task: as of Kind.probability} if asked for. model: of load_checkpoint. max_side: the model sees a larger image
    reduced to that, and the maps are enlarged again. With an output_scale it sees the picture reduced by that."""
    size, scale, labels = (image.height, image.width), model.output_scale, model.labels
    shrink = scale * max_side / max(size)
    if shrink < 1:    # the model takes no side below 32
        image = image.resize([max(32 * scale, round(n * shrink)) for n in image.size], Image.Resampling.BICUBIC)
    small = image.resize(tuple(-(-n // scale) for n in image.size), Image.Resampling.BILINEAR)
    pixels = normalised(to_tensor(np.array(small)))[None].to(device)
    features = model.decode(pixels)
    outputs = model.predict(features, pixels.shape[2:])

    def enlarged(values, resize=None):
        values = values[0, :, :image.height, :image.width].cpu()
        if values.shape[1:] == size:
            return values
        return resize(values, size) if resize else F.interpolate(values[None], size, mode="bilinear")[0]
    maps = {task: enlarged(values, labels.kinds[task].resize) for task, values in predict_maps(labels, outputs).items()}
    heat = {task: enlarged(F.interpolate(z.float().norm(dim=-1)[:, None], scale_factor=4 * scale, mode="bilinear"))[0]
            for task, z in features.items()}    # z: (1, H / 4, W / 4, C_1)
    if not with_probabilities:
        return maps, heat
    return maps, heat, {task: enlarged(values) for task, values in probabilities(labels, outputs).items()}


def draw_sheet(blocks: list[list], legends: list[list[tuple]]) -> Image.Image:
    """A sheet of pictures that can be read at a screen's width. Columns that do not fit go on below. blocks: columns of
    each image, [(title, picture), ...]. legends: a title and the lines of Kind.picture."""
    widest = max(picture.width for columns in blocks for column in columns for _, picture in column)
    abreast = min(len(blocks[0]), SHEET // min(max(150, 2 * widest), 300))    # 150: of titles; small ones are doubled
    step = min(SHEET // abreast, 512)
    cell, rows = step - GAP, []
    for columns in blocks:
        drawn = []
        for column in columns:
            parts = []
            for title, picture in column:    # at most `cell` wide and twice as high; enlarged by a whole number
                factor = min(cell // picture.width, 2 * cell // picture.height)
                shown = (ImageOps.scale(picture, factor, Image.Resampling.NEAREST) if factor else
                         ImageOps.contain(picture, (cell, 2 * cell)))
                parts += [draw_lines([(title, ())], step), ImageOps.expand(shown, (0, 0, 0, GAP), "white")]
            drawn.append(join(parts, axis=1))
        rows += [join(drawn[i:i + abreast], axis=0) for i in range(0, len(drawn), abreast)]
    return join(rows + [draw_lines(lines, SHEET) for lines in legends], axis=1)


def join(pictures: list[Image.Image], axis: int) -> Image.Image:
    """Side by side (axis 0) or one above the other (axis 1), on white."""
    size, corner = np.max([picture.size for picture in pictures], axis=0), [0, 0]
    size[axis] = sum(picture.size[axis] for picture in pictures)
    joined = Image.new("RGB", tuple(size), "white")
    for picture in pictures:
        joined.paste(picture, tuple(corner))
        corner[axis] += picture.size[axis]
    return joined


def draw_lines(lines: list[tuple], width: int) -> Image.Image:
    """Texts one after the other, in as many lines as they need, each behind its colour: (), a square of (r, g, b), or
    a bar that runs through (n, 3)."""
    picture, x, y = Image.new("RGB", (width, LINE * len(lines)), "white"), 0, 0
    pen = ImageDraw.Draw(picture)
    for text, colour in lines:
        colours, font = np.uint8(colour).reshape(-1, 3), font_of(text)
        bar = LETTERS * min(len(colours), 8)
        step = bar + GAP // 2 + round(font.getlength(text)) + 2 * GAP
        if x and x + step > width:
            x, y = 2 * GAP, y + LINE
        if bar:
            area = x, y + 3, x + bar, y + 3 + LETTERS
            picture.paste(Image.fromarray(colours[None]).resize((bar, LETTERS), Image.Resampling.BILINEAR), area)
            pen.rectangle(area, outline="gray")
        pen.text((x + bar + GAP // 2, y), text, fill="black", font=font)
        x += step
    return picture.crop((0, 0, width, y + LINE))


@functools.cache
def font_of(text: str) -> ImageFont.FreeTypeFont:
    """Pillow's own font, or the first of this machine that has all letters of the text."""
    own = ImageFont.load_default(LETTERS)
    found = (path for folder in FONTS for path in Path(folder).expanduser().rglob("*.[ot]t[cf]"))
    for path in itertools.chain([None], found):
        with contextlib.suppress(OSError):    # of a file that is no font
            font = ImageFont.truetype(str(path), LETTERS) if path else own
            if bytes(font.getmask("\uffff")) not in {bytes(font.getmask(letter)) for letter in text}:
                return font
    return own


# --------------------------------------------------------------------------------------------------------- export

def export(args: argparse.Namespace):
    """Writes the model for one image of one size as a file that runs without this project, once its outputs for a
    random image are those of the model. Raises ValueError where they are not, or what it needs is not installed."""
    keep_inputs(args.export, [args.checkpoint])
    model, checkpoint = load_checkpoint(args.checkpoint, torch.device("cpu"), args.encoder, args.encoder_kwargs)
    choose_backend(model, "loop")
    size = args.img_size or checkpoint["config"].get("img_size")
    if size is None:
        raise ValueError(f"{args.checkpoint} does not tell the size of its images; give it with --img-size H W")
    torch.manual_seed(0)
    network, image = model, torch.randn(1, model.in_chans, *size)
    form = "float32 RGB (1, 3, H, W): (pixel / 255 - mean) / std"
    if args.with_preprocessing:
        network, image = Prepared(model).eval(), torch.randint(256, (1, *size, 3), dtype=torch.uint8)
        form = "uint8 RGB (1, H, W, 3)"
    metadata = {"image": dict(size=list(size), input=form, mean=IMAGE_MEAN, std=IMAGE_STD),
                "tasks": {task: kind.describe() for task, kind in model.labels.kinds.items()}}
    folder, write = args.export.parent, EXPORTS[args.export.suffix]
    folder.mkdir(parents=True, exist_ok=True)
    with torch.inference_mode(), tempfile.TemporaryDirectory(dir=folder) as temporary:
        path = Path(temporary) / args.export.name
        try:
            outputs = write(network, image, path, metadata)
        except ImportError as error:
            raise ValueError(f"{error}; pip install -e '.[export]'") from error
        for task, output in network(image).items():
            if output.is_floating_point():
                of, off = "its largest value", (outputs[task] - output).abs().max() / output.abs().max().clamp(min=1e-9)
            else:
                of, off = "its pixels", (outputs[task] != output).double().mean()
            print(f"{task}: {tuple(output.shape)}, off by {off:.1e} of {of}")
            if not off < 1e-3:    # float32's rounding, through some dozens of layers, is a hundredth of that
                raise ValueError(f"the exported model's {task} is off by {off:.1e} of {of}; nothing was written")
        names = sorted(os.listdir(temporary))    # beside a large .onnx lie its weights, which are moved first
        for name in reversed(names):
            os.replace(Path(temporary, name), folder / name)
    print("exported:", " and ".join(str(folder / name) for name in names) + "; keep them together" * (len(names) > 1))


class Prepared(nn.Module):
    """A model behind its preprocessing: uint8 RGB (1, H, W, 3) -> maps {task: (1, 1 or C, s H, s W)}, s the scale."""

    def __init__(self, model: MTMamba):
        super().__init__()
        self.model = model

    def forward(self, image: Tensor) -> dict[str, Tensor]:
        return predict_maps(self.model.labels, self.model(normalised(image.permute(0, 3, 1, 2).float() / 255)))


def write_pt2(network: nn.Module, image: Tensor, path: Path, metadata: dict[str, dict]) -> dict[str, Tensor]:
    """Writes the file, and returns its outputs for the image."""
    buffer = io.BytesIO()    # PyTorch's writer of these files aborts the process where a disk is full
    files = {f"{name}.json": json.dumps(content) for name, content in metadata.items()}
    torch.export.save(torch.export.export(network, (image,)), buffer, extra_files=files)
    with replacing(path) as file:
        file.write(buffer.getbuffer())
    return torch.export.load(path).module()(image)


def write_onnx(network, image, path, metadata):
    """The same. PyTorch puts weights of more than 1.5 GB into a second file."""
    import onnxruntime
    program = torch.onnx.export(network, (image,), input_names=["image"], output_names=list(metadata["tasks"]),
                                dynamo=True, verbose=False)
    program.model.metadata_props.update({name: json.dumps(content) for name, content in metadata.items()})
    program.save(path)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return dict(zip(metadata["tasks"], map(torch.from_numpy, session.run(None, {"image": image.numpy()}))))


EXPORTS = {".onnx": write_onnx, ".pt2": write_pt2}


# ----------------------------------------------------------------------------------------------------------- cost

@torch.inference_mode()
def print_cost(args: argparse.Namespace, device: torch.device):
    """Parameters and FLOPs of the paper's variants; or of one model, with its time and memory on this device."""
    from torch.utils.benchmark import Timer  # which looks for compilers
    data_set, everything = find_dataset_class(args.dataset or "nyud"), args.variant == "all"
    if args.checkpoint:
        model, checkpoint = load_checkpoint(args.checkpoint, device, args.encoder, args.encoder_kwargs)
        config = checkpoint["config"]
        models = {config["variant"]: model}
    else:
        tasks = {task: kind.channels for task, kind in data_set.describe(data_set.TASKS).kinds.items()}
        config = dict(tasks=tasks, img_size=args.img_size or data_set.SIZE, output_scale=data_set.LABEL_SCALE,
                      encoder=args.encoder or "swin-large", encoder_kwargs=args.encoder_kwargs)
        with torch.device("meta" if everything else device):
            models = {variant: MTMamba(variant=variant, **config).eval()
                      for variant in (VARIANTS if everything else [args.variant or "mtmamba"])}
    size = tuple(args.img_size or config.get("img_size") or data_set.SIZE)
    changed = args.checkpoint, args.dataset, args.img_size, args.encoder, args.encoder_kwargs
    paper = {} if any(changed) else PAPER_COST
    print("parameters in millions, FLOPs in 1e9 (the paper's are of NYUDv2 and Swin-Large, cut after two digits)")
    print(f"{'variant':<18}{'parameters':>12}{'paper':>10}{'FLOPs':>12}{'paper':>10}")
    for variant, model in models.items():
        parameters, flops = count_cost(model, size)
        first, second = paper.get(variant, ("", ""))
        print(f"{variant:<18}{parameters / 1e6:>12.4f}{first:>10}{flops / 1e9:>12.4f}{second:>10}".rstrip())
    if everything:
        return
    cuda, threads = device.type == "cuda", torch.get_num_threads()
    backend, batch = choose_backend(model, args.backend), args.batch_size or (8 if cuda else 1)
    encoder, heads = (sum(p.numel() for p in part.parameters()) / 1e6 for part in (model.encoder, model.heads))
    print(f"encoder {encoder:.4f} ({config['encoder']}), decoder {parameters / 1e6 - encoder - heads:.4f}, heads "
          f"{heads:.4f} ({', '.join(model.tasks)}); images of {size[0]}x{size[1]}")
    name = torch.cuda.get_device_name(device) if cuda else f"{threads} threads of a CPU"
    images = torch.randn(batch, model.in_chans, *size, device=device)
    one, several = (Timer("model(images)", globals=dict(model=model, images=images[:n]), num_threads=threads)
                    .blocked_autorange(min_run_time=5) for n in (1, batch))
    print(f"on {name}, float32, scan backend {backend}: one image takes {1e3 * one.median:.1f} ms (median of "
          f"{len(one.times)}; 90 % within {1e3 * np.quantile(one.times, 0.9):.1f} ms); {batch} at a time, "
          f"{batch / several.median:.3g} images per second; peak memory {peak_memory(device)}")


def count_cost(model: MTMamba, img_size: tuple[int, int]) -> tuple[int, int]:
    """(parameters, FLOPs) of one image (height, width), by the rules that reproduce the paper's Tables 2-4.

    A multiply-add of a linear map, convolution or attention product counts 1; LayerNorm 5 per element; a scan
    9 B L (K D) N + B L (K D); the bilinear resize to the outputs' size 4 per output element; all else 0. Nothing is
    computed: the model runs on PyTorch's meta device.
    The paper's counter reads the operations of SS2D's two projections (2 per multiply-add) from a report that gives
    four significant digits. Without that rounding, Table 2's 435.47 would be 435.48, so we round, too.
    """
    rounding = []

    def count_rounding(ss2d, inputs):
        for columns in (ss2d.dt_rank + 2 * ss2d.d_state, ss2d.dt_rank):
            operations = 2 * inputs[0].numel() * len(ss2d.D) * columns
            rounding.append(int(float(f"{operations:.3e}")) - operations)

    # FlopCounterMode counts a multiply-add as 2, so everything is counted double and halved at the end.
    counter = FlopCounterMode(display=False, custom_mapping={
        torch.ops.aten.native_layer_norm: lambda shape, *_, **__: 2 * 5 * shape.numel()})
    meta = {id(t): t.detach().to("meta") for t in (*model.parameters(), *model.buffers())}
    copied = copy.deepcopy(model, meta).eval()    # with these weights, which hold no numbers
    set_backend(copied, "torch")    # the operator that is counted, and that runs on the meta device
    for module in copied.modules():
        if hasattr(module, "dt_rank"):    # SS2D
            module.register_forward_pre_hook(count_rounding)
    with counter, torch.no_grad():
        outputs = copied(torch.empty(1, model.in_chans, *img_size, device="meta",
                                     dtype=next(model.parameters()).dtype))
    resize = 4 * sum(output.numel() for output in outputs.values())
    return sum(p.numel() for p in model.parameters()), (counter.get_total_flops() + sum(rounding)) // 2 + resize


def peak_memory(device: torch.device) -> str:
    if device.type == "cuda":
        return f"{torch.cuda.max_memory_allocated(device) / 2**30:.2f} GiB of the device"
    if sys.platform == "win32":
        return "not known on Windows"
    import resource
    unit = 1 if sys.platform == "darwin" else 1024
    return f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30:.2f} GiB of the process"


# ------------------------------------------------------------------------ processes of torchrun, shared with train.py

@contextlib.contextmanager
def start(name: str) -> Iterator[torch.device]:
    """The device, and under torchrun the process group, of which only the first process prints. Raises ValueError for a
    device that does not exist, and for several processes that cannot find each other."""
    distributed = "RANK" in os.environ
    if not distributed and os.environ.get("WORLD_SIZE", "1") != "1":
        raise ValueError("WORLD_SIZE is set, but not RANK; start with torchrun, or unset WORLD_SIZE for one process")
    if distributed and name == "cuda":
        name = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    try:
        device = torch.device(name)
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:    # of a name, of a build without CUDA
        raise ValueError(f"cannot use --device {name}: {str(error).splitlines()[0]}") from error
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False    # true float32
    if device.type == "cuda" and device.index is not None:
        torch.cuda.set_device(device)    # events and streams belong to the current device
    if distributed and not dist.is_initialized():
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    with contextlib.redirect_stdout(sys.stdout if rank_and_world()[0] == 0 else None):    # None: print is silent
        yield device
    if distributed:    # not after an error: NCCL would wait for the others, which wait for this process
        dist.destroy_process_group()


def rank_and_world() -> tuple[int, int]:
    """This process's number and how many there are."""
    running = dist.is_available() and dist.is_initialized()
    return (dist.get_rank(), dist.get_world_size()) if running else (0, 1)


def add_up(sums: Tensor) -> Tensor:
    """The sum over the processes; in place if it lies on the device where they add up."""
    if rank_and_world()[1] > 1:
        sums = sums.to("cuda" if dist.get_backend() == "nccl" else "cpu")
        dist.all_reduce(sums)
    return sums


def digest_names(dataset: DenseDataset) -> list:
    """[number of images, digest of their names in order]. Raises ValueError where processes have other lists."""
    digest = int(hashlib.sha256("\n".join(dataset.names).encode()).hexdigest()[:12], 16)
    if int(add_up(torch.tensor(digest))) != rank_and_world()[1] * digest:
        raise ValueError(f"the processes list different images of {type(dataset).__name__}, or another order: "
                         f"{len(dataset)} here, first {dataset.names[0]!r}. Sort what list_names gives")
    return [len(dataset), digest]


if __name__ == "__main__":
    main()
