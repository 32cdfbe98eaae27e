"""Scores a checkpoint, draws what it predicts, exports it, and recomputes the paper's cost tables.

    python evaluate.py --checkpoint runs/synthetic/last.pt                       # held-out synthetic scenes
    python evaluate.py --checkpoint X --dataset nyud --data-root data/NYUDv2     # beside Table 1 of the paper
    torchrun --nproc-per-node 8 evaluate.py --checkpoint X --dataset pascal      # the images shared by eight GPUs
    python evaluate.py --checkpoint X --image a.jpg folder/ --out pictures       # one's own pictures
    python evaluate.py --checkpoint X --export model.onnx --img-size 448 576     # a file that runs without this project
    python evaluate.py --cost --variant all                                      # Tables 2-4: parameters and FLOPs

X is a checkpoint of train.py or of the published implementation. Scores are printed and written to results.json, beside
contact sheets, next to the checkpoint (elsewhere with --out).
"""

# Reads top-down: the paper's figures; main and its flags; models and checkpoints; scores and tables; pictures, then
# their colours, legends and sheets; export; cost; processes and files, a section that train.py shares whole.

import os

# PyTorch's threads on a CPU (libgomp's) wait for each other by spinning, which takes the core from the very thread they
# wait for where other processes are busy. Bounded here, before torch is imported, unless the user decides: to what
# costs an idle machine less than a tenth, and keeps a run beside one busy process per core within four times its time
# alone (tests/benchmark.py busy).
if not {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY", "GOMP_CPU_AFFINITY"} & os.environ.keys():
    os.environ["GOMP_SPINCOUNT"] = "2000"

import argparse
import atexit
import contextlib
import hashlib
import io
import itertools
import json
import multiprocessing
import re
import signal
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageOps
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from datasets import (
    DATASETS,
    IGNORE,
    IMAGE_MEAN,
    IMAGE_STD,
    PARTS,
    Cityscapes,
    NYUDv2,
    Parser,
    Synthetic,
    WriteError,
    append,
    centred,
    check_sample,
    checks_itself,
    choose_tasks,
    find_dataset_class,
    interrupt,
    read_image,
    read_names,
    replacing,
    to_tensor,
    writing,
)
from metrics import (
    LOWER_IS_BETTER,
    PRIMARY,
    THRESHOLDS,
    boundary_counts,
    boundary_counts_each,
    delta_m,
    follow_main,
    make_meters,
    ods_f,
)
from mtmamba import (
    BACKENDS,
    ENCODERS,
    PUBLISHED_TASKS,
    SS2D,
    VARIANTS,
    K,
    MTMamba,
    count_cost,
    default_backend,
    load_published_checkpoint,
    published_variant,
    read_tensors,
    selective_scan_2d,
)

EVALUATION_IMAGES = 100          # of the synthetic data set
EVALUATION_SEED = 1              # training uses other seeds, so these scenes are held out
EVALUATION_BATCH = 8             # images at most, and pixels at most, by the first image's size; memory grows with both
EVALUATION_PIXELS = 2 ** 20

Results = dict[str, dict[str, float]]    # {task: {metric: value}}

# Table 1, MTMamba's rows (it has none for Cityscapes); Table 2's single-task row, against which the paper's delta_m is
# taken (it has none for PASCAL-Context); how far a predicted boundary may be off, as a fraction of the diagonal.
PAPER = {"nyud": {"semseg": 55.82, "depth": 0.5066, "normal": 18.63, "boundary": 78.70},
         "pascal": {"semseg": 81.11, "parsing": 72.62, "saliency": 84.14, "normal": 14.14, "boundary": 78.80},
         "cityscapes": {}}
SINGLE_TASK = {"nyud": {"semseg": 54.32, "depth": 0.5166, "normal": 19.21, "boundary": 77.30}}
MAX_DIST = {"nyud": 0.011, "pascal": 0.0075, "synthetic": 0.02}    # the synthetic images are small: 2 pixels

# Tables 2-4, NYUDv2 at 448x576 with Swin-Large: parameters in millions, FLOPs in 1e9.
PAPER_COST = {"mtmamba": (307.99, 540.81), "stm1": (252.51, 354.13), "stm2": (276.48, 435.47),
              "stm3": (300.45, 516.82), "swin-multi-task": (303.18, 466.35), "swin-single-task": (888.77, 1074.79),
              "mfe-wmsa": (451.81, 884.61), "gate-wmsa": (345.33, 659.29)}


def main(argv: list[str] | None = None) -> Results:
    """The scores; empty with --cost, --export and --image. Exit code 2 on bad input, 1 where a picture was skipped or
    something could not be written, 130 after Ctrl-C or SIGTERM."""
    parser = Parser(prog="evaluate.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    args = parser.parse_args(argv)
    try:
        check_arguments(args)
        if args.cost:
            print_cost(args)
            return {}
        if args.export:
            export(args)
            return {}
        device = start(args.device)
        rank, _ = rank_and_world()
        with contextlib.redirect_stdout(sys.stdout if rank == 0 else None):    # None: print is silent
            model, config = load_checkpoint(args.checkpoint, device, args.encoder, args.encoder_kwargs)
            print("scan backend:", choose_backend(model, args.backend, device))
            if not args.image:
                return score(args, model, config, device)
            # The sum is a barrier, too: torchrun ends the others when a process fails.
            skipped = int(add_up(torch.tensor(draw_pictures(args, model, device), device=device)))
    except KeyboardInterrupt:
        parser.exit(130, "evaluate.py: interrupted\n")
    except WriteError as error:
        parser.exit(1, f"evaluate.py: {error}; make room, or name another folder with --out\n")
    except (ValueError, OSError) as error:
        parser.error(str(error).strip().splitlines()[-1])    # a worker's error has its traceback above that line
    finally:
        if dist.is_available() and dist.is_initialized():
            dist.destroy_process_group()
    if skipped:
        parser.exit(1, f"evaluate.py: {skipped} of the pictures skipped\n" if rank == 0 else None)
    return {}


def add_arguments(parser: argparse.ArgumentParser):
    add = parser.add_argument
    add("--checkpoint", type=Path, help="of train.py or of the published implementation")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--backend", choices=BACKENDS, help="of the scan (default: by the device)")
    add("--out", type=Path, help="folder of everything that is written (default: the checkpoint's; with --image, "
        "predictions/ in it)")
    add("--workers", type=int, help="processes that load images, and as many that match boundaries (default: one per "
        "core, at most 16; 0 for synthetic scenes)")
    group = parser.add_argument_group("scores")
    group.add_argument("--dataset", metavar="NAME", help=f"synthetic, {', '.join(DATASETS)}, or path/to/file.py:Class "
                       "as in train.py (default: the one with the model's tasks)")
    group.add_argument("--data-root", type=Path, help="where the data set is unpacked")
    group.add_argument("--baseline", type=Path, help="results.json to take delta_m against (NYUDv2: the paper's)")
    group.add_argument("--boundary-list", type=Path, help="score odsF on these images only, one ID per line")
    group.add_argument("--save-images", type=int, default=4, metavar="N", help="contact sheets of the first N images")
    group.add_argument("--save-predictions", type=Path, metavar="DIR", help="the raw maps, at the images' own sizes")
    group = parser.add_argument_group("one's own pictures")
    group.add_argument("--image", type=Path, nargs="+", metavar="PATH", help="pictures, or folders of them")
    group.add_argument("--max-side", type=int, default=MAX_SIDE, metavar="N", help="pixels of a picture's longer side "
                       "that the model sees; larger ones are reduced for it, and their maps enlarged again (default: "
                       "%(default)s)")
    group.add_argument("--features", action="store_true", help="draw each task's final decoder feature, too (Figure 3)")
    group = parser.add_argument_group("export")
    group.add_argument("--export", type=Path, metavar="FILE", help="write the model, for images normalised with "
                       "ImageNet's mean and deviation, as .onnx or .pt2 (torch.export), and check it")
    group.add_argument("--img-size", nargs=2, type=int, metavar=("H", "W"), help="of its images (default: as "
                       "the model was trained)")
    group = parser.add_argument_group("cost, and the encoder of a published checkpoint")
    group.add_argument("--cost", action="store_true", help="parameters and FLOPs; needs no checkpoint")
    group.add_argument("--variant", choices=["all", *VARIANTS], help="of --cost (default: mtmamba)")
    group.add_argument("--encoder", help=f"{', '.join(ENCODERS)} (default) or any hierarchical timm model")
    group.add_argument("--encoder-kwargs", type=json.loads, metavar="JSON", help="further arguments of the encoder")


def check_arguments(args: argparse.Namespace):
    """Raises ValueError for flags that would be ignored, and where there is nothing to do."""
    if args.checkpoint is None and not args.cost:
        raise ValueError("expected --checkpoint FILE, or --cost")
    ignored = {"--variant": args.variant and not args.cost, "--features": args.features and not args.image,
               "--baseline": args.baseline and args.image, "--boundary-list": args.boundary_list and args.image,
               "--img-size": args.img_size and not args.export, "--image": args.image and args.export}
    for flag in (flag for flag, given in ignored.items() if given):
        raise ValueError(f"{flag} has no effect here; see --help for what it belongs to")
    if args.max_side < 32:
        raise ValueError(f"expected --max-side of at least 32, found {args.max_side}")
    if min(args.workers or 0, args.save_images) < 0:
        raise ValueError("expected --workers and --save-images of at least 0")
    if args.export and args.export.suffix not in EXPORTS:
        raise ValueError(f"expected --export to a file that ends with {' or '.join(EXPORTS)}, found {args.export}")
    if not isinstance(args.encoder_kwargs or {}, dict):
        raise ValueError(f"expected --encoder-kwargs like '{{\"embed_dim\": 96}}', found {args.encoder_kwargs}")


# ------------------------------------------------------------------------------------------- models and checkpoints

def load_checkpoint(path: Path, device: torch.device, encoder: str | None = None,
                    encoder_kwargs: dict | None = None) -> tuple[MTMamba, dict]:
    """The model of a checkpoint, in evaluation mode, and MTMamba's arguments for it.

    encoder, encoder_kwargs: of a published checkpoint, which does not name them; None for Swin-Large. A checkpoint of
    train.py knows its own. Raises FileNotFoundError, or ValueError where the file is something else or its weights do
    not fit its configuration.
    """
    checkpoint = read_checkpoint(path)
    if is_published(checkpoint):
        config = dict(published_config(checkpoint.get("model", checkpoint)), encoder=encoder or "swin-large",
                      encoder_kwargs=encoder_kwargs)
    elif encoder or encoder_kwargs:
        raise ValueError(f"{path} knows its encoder; leave out --encoder and --encoder-kwargs")
    else:
        config = checkpoint["config"]
    model = build_model(config)
    load_weights(model, checkpoint, path)
    return model.to(device).eval(), config


def choose_backend(model: MTMamba, backend: str | None, device: torch.device) -> str:
    """Lets the model's scans run on a backend (None: by the device) and returns its name. Raises ValueError where it
    cannot run here."""
    for module in model.modules():
        if isinstance(module, SS2D):
            module.backend = backend
    one, each, matrix = (torch.zeros(shape, device=device) for shape in ((1, 1, 1, 1), (1, 1, 1, K, 1), (K, 1, 1)))
    try:
        selective_scan_2d(one, each, matrix, each, each, matrix[:, 0], matrix[:, 0], backend)
    except RuntimeError as error:
        raise ValueError(" ".join(str(error).split())) from error
    return backend or default_backend(device)


def read_checkpoint(path: Path) -> dict:
    """A checkpoint of train.py or a published one. Raises FileNotFoundError, or ValueError for another kind of file."""
    if not path.is_file():
        raise FileNotFoundError(f"no checkpoint at {path}; give the path of a last.pt that train.py wrote, or of a "
                                "published checkpoint")
    checkpoint = read_tensors(path)
    if not is_published(checkpoint) and not (isinstance(checkpoint, dict) and {"model", "config"} <= set(checkpoint)):
        found = list(checkpoint)[:5] if isinstance(checkpoint, dict) else type(checkpoint).__name__
        raise ValueError(f"{path} is not a checkpoint of train.py: expected the entries model and config, found "
                         f"{found}; nor a published one, which has final_project.")
    return checkpoint


def load_weights(model: MTMamba, checkpoint: dict, path: Path):
    """The weights of a checkpoint, strictly. Raises ValueError, naming path, where they are not the model's."""
    if is_published(checkpoint):
        state = checkpoint.get("model", checkpoint)
        try:
            print(f"loaded {load_published_checkpoint(model, state)}/{len(state)} tensors of {path}")
        except ValueError as error:
            summary, first, *_ = str(error).splitlines()
            raise ValueError(f"{path}: {summary} {first.strip()}, ...; the model has the tasks {model.tasks}; give its "
                             "encoder with --encoder") from error
        return
    state = checkpoint["model"]
    expected, found = ({key: value.shape for key, value in tensors.items() if key != "_extra_state"}
                       for tensors in (model.state_dict(), state))
    wrong = [key for key in {**expected, **found} if expected.get(key) != found.get(key)]
    if wrong:
        raise ValueError(f"{path} holds weights of another architecture or other tasks: {len(wrong)} tensors are "
                         f"missing, left over or of another shape, first {wrong[0]}")
    order = list(checkpoint["config"]["tasks"])
    if order != list(model.tasks):    # which no shape shows
        raise ValueError(f"{path} has the tasks in the order {order}, in which the cross-task blocks concatenate their "
                         f"features, the model in the order {list(model.tasks)}; use the former")
    try:
        model.load_state_dict(state)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    print(f"loaded {len(found)}/{len(expected)} tensors of {path}")


def build_model(config: dict) -> MTMamba:
    try:
        return MTMamba(**config)
    except TypeError as error:    # arguments that MTMamba or the encoder does not have
        raise ValueError(f"cannot build a model of {config}: {error}") from error


def is_published(checkpoint: object) -> bool:
    state = checkpoint.get("model", checkpoint) if isinstance(checkpoint, dict) else None
    return isinstance(state, dict) and any(re.match(r"(module\.)?final_project\.", str(key)) for key in state)


def published_config(state: dict[str, Tensor]) -> dict:
    """MTMamba's tasks, variant and output_scale for a published checkpoint. The heads' channels tell the data set, and
    so the order of the tasks and the scale; of another data set the heads' own order counts. The other keys tell the
    variant. Raises ValueError for tasks that there are not."""
    heads = {m[1]: len(value) for key, value in state.items()
             if (m := re.fullmatch(r"(?:module\.)?final_project\.(\w+)\.weight", key))}
    found = {PUBLISHED_TASKS.get(task, task): channels for task, channels in heads.items()}
    if not found.keys() <= PRIMARY.keys():
        raise ValueError(f"expected heads of the tasks {', '.join(PRIMARY)}, found {', '.join(found)}")
    fitting = [dataset for dataset in DATASETS.values() if found.items() <= dataset.TASKS.items()]
    if len(fitting) == 1:
        found = {task: channels for task, channels in fitting[0].TASKS.items() if task in found}
    return dict(tasks=found, variant=published_variant(state),
                output_scale=fitting[0].LABEL_SCALE if len(fitting) == 1 else 1)


# --------------------------------------------------------------------------------------------------------- scores

def score(args: argparse.Namespace, model: MTMamba, config: dict, device: torch.device) -> Results:
    """Prints the table and writes results.json and the contact sheets, all from the first process."""
    name = args.dataset or find_dataset(model.tasks, ["synthetic", *DATASETS])
    dataset = open_dataset(name, model.tasks, config, args.data_root)
    scored = read_boundary_list(args.boundary_list, dataset)
    baseline = read_baseline(args.baseline, name, model.tasks) or SINGLE_TASK.get(name)
    out = args.out or args.checkpoint.parent
    for folder in filter(None, (out, args.save_predictions)):
        check_writable(folder)
    rank, world = rank_and_world()
    workers = args.workers
    if workers is None:
        workers = 0 if name == "synthetic" else min(16, max(1, os.cpu_count() // world))
    allow_open_files(workers)
    results = evaluate(model, dataset, device, workers=workers, max_dist=MAX_DIST.get(name), scored=scored,
                       predictions=args.save_predictions)
    if not results:
        raise ValueError(f"nothing to score: no pixel of {name}'s images has a label of {', '.join(model.tasks)}")
    if rank > 0:
        return results
    improvement = compare(results, baseline)
    print(f"{name}: {len(dataset)} images" + (f", odsF on {len(scored)} of them" if scored else ""))
    if name not in PAPER:
        print_table({"model": results, "best constant": constant_baseline(dataset, MAX_DIST.get(name))})
    else:
        print_paper_table(results, PAPER[name], depth_name(model))
    if improvement is not None:
        print(f"delta_m against {args.baseline or 'the single-task row of Table 2'}: {improvement:+.2f} %"
              + (" (paper: +2.38 %)" if not args.baseline and len(results) == len(PAPER[name]) else ""))
    elif name in PAPER:
        print("no delta_m: the paper has no single-task row for this data set; give one's results with --baseline")
    write_json(out / "results.json", dict(dataset=name, checkpoint=str(args.checkpoint), images=len(dataset),
                                          boundary_images=len(scored or dataset), results=results, delta_m=improvement))
    print("results:", out / "results.json")
    for first in range(0, min(args.save_images, len(dataset)), 4):
        path = out / (f"contact_sheet_{first // 4 + 1}.png" if first else "contact_sheet.png")
        shown = range(first, min(first + 4, args.save_images, len(dataset)))
        print("pictures:", save_contact_sheet(model, dataset, device, path, shown))
    return results


def open_dataset(name: str, tasks: dict[str, int], config: dict, root: Path | None) -> Dataset:
    """What the model is scored on. Raises ValueError where it has other tasks than the model, or labels of another size
    than its outputs."""
    if not tasks.items() <= task_table(name).items():
        raise ValueError(f"the model's tasks (channels) are {tasks}, those of {name} {task_table(name)}; choose "
                         "another --dataset")
    if name == "synthetic":
        return held_out(config["img_size"], tasks)
    dataset, scale = find_dataset_class(name), config.get("output_scale", 1)
    expected = getattr(dataset, "LABEL_SCALE", 1)
    if scale != expected:
        raise ValueError(f"the model's outputs are {scale} times as large as its images, the labels of {name} "
                         f"{expected} times; build it with that output_scale")
    if name not in DATASETS:
        return open_own_dataset(dataset, "val", config["img_size"], list(tasks))
    sizes = {"size": config["img_size"]} if dataset is Cityscapes and "img_size" in config else {}    # not padded to it
    return dataset(root or dataset.ROOT, "val", list(tasks), **sizes)


def open_own_dataset(dataset: type, split: str, size: tuple[int, int], tasks: list[str] | None) -> Dataset:
    """One of one's own, with the attribute tasks. Raises ValueError where it cannot be made or is empty."""
    try:
        opened = dataset(split, tuple(size))
    except TypeError as error:
        raise ValueError(f"expected a constructor {dataset.__name__}(split, size), found: {error}") from error
    if len(opened) == 0:
        raise ValueError(f"expected samples of the split {split!r} in {dataset.__name__}, found none")
    opened.tasks = choose_tasks(dataset.TASKS, tasks)
    return opened


def held_out(img_size: tuple[int, int], tasks: dict[str, int]) -> Synthetic:
    return Synthetic(EVALUATION_IMAGES, img_size, seed=EVALUATION_SEED, tasks=list(tasks))


def find_dataset(tasks: dict[str, int], names: Iterable[str]) -> str:
    """The data set with these tasks. Raises ValueError where none or several have them."""
    fitting = [name for name in names if tasks.items() <= task_table(name).items()]
    if len(fitting) != 1:
        raise ValueError(f"expected the tasks (channels) of one data set, found {tasks}, which fit "
                         f"{' and '.join(fitting) or 'none'}; name the data set with --dataset")
    return fitting[0]


def task_table(name: str) -> dict[str, int]:
    return Synthetic.TASKS if name == "synthetic" else find_dataset_class(name).TASKS


def read_boundary_list(path: Path | None, dataset: Dataset) -> set[str] | None:
    """The IDs in the file. Raises FileNotFoundError, or ValueError for those that the data set does not have."""
    if path is None:
        return None
    known = set(getattr(dataset, "names", ()))
    names = set(read_names(path, known.__contains__))
    unknown = sorted(names - known)
    if unknown or not names:
        raise ValueError(f"expected IDs of the data set's images in {path}, one per line, found "
                         f"{f'{len(unknown)} others, first {unknown[0]}' if unknown else 'none'}")
    return names


def read_baseline(path: Path | None, dataset: str, tasks: Iterable[str]) -> dict[str, float] | None:
    """The primary metrics by task in a results.json. Raises FileNotFoundError, or ValueError for another kind of file,
    another data set, and figures that delta_m cannot be taken against."""
    if path is None:
        return None
    try:
        content = json.loads(path.read_text())
        found, results = content["dataset"], content["results"]
        figures = {task: results[task]["odsF" if task == "boundary" else PRIMARY[task]] for task in tasks}
        positive = all(value > 0 for value in figures.values())
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is not a results.json of evaluate.py with the tasks {', '.join(tasks)} "
                         f"({type(error).__name__}: {error})") from error
    if found != dataset or not positive:
        raise ValueError(f"expected a baseline on {dataset} with figures above 0, as delta_m divides by them, found "
                         f"{figures} on {found} in {path}")
    return figures


def compare(results: Results, baseline: dict[str, float] | None) -> float | None:
    """delta_m over the tasks that were scored; None where there are none, or no baseline."""
    figures = {task: metrics[primary(task, metrics)] for task, metrics in results.items()}
    return delta_m(figures, {task: baseline[task] for task in figures}) if baseline and figures else None


def primary(task: str, metrics: dict[str, float]) -> str:
    """The metric by which the task is compared: odsF where it was computed."""
    return "odsF" if "odsF" in metrics else PRIMARY[task]


@torch.inference_mode()
def evaluate(model: MTMamba, dataset: Dataset, device: torch.device, description: str = "evaluating", workers: int = 0,
             max_dist: float | None = None, scored: set[str] | None = None, predictions: Path | None = None,
             stop: Callable[[], bool] | None = None) -> Results | None:
    """Every metric of every task over a data set, but those without a label in it, which are named. The model's mode
    (train or eval) is left as it was.

    workers: processes that load, and as many that match boundaries (0: none). max_dist: of odsF, None for pixelF only.
    scored: names of the images that odsF is scored on, None for all. predictions: folder for the raw maps. stop: asked
    before every batch whether to give up; the result is None where it says so in any process.
    Where a process group runs, every process has to call this: they share the images, and all return the same figures.
    What is shared out are whole batches, as a model's outputs differ in the last digits with the batch: so the figures
    are exactly the same for any number of processes.
    """
    rank, world = rank_and_world()
    with_odsf = max_dist is not None and "boundary" in model.tasks
    samples = WithTruth(dataset, with_odsf, scored)
    H, W = samples[0]["image"].shape[1:]
    size = min(EVALUATION_BATCH, max(1, EVALUATION_PIXELS // (H * W)))
    batches = [range(i, min(i + size, len(dataset))) for i in range(0, len(dataset), size)[rank::world]]
    loader = DataLoader(samples, batch_sampler=batches, collate_fn=of_one_size, num_workers=workers,
                        worker_init_fn=follow_main)
    meters = make_meters(model.tasks, getattr(dataset, "DEPTH_RANGE", None))

    def boundaries() -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Feeds the meters, and yields what odsF compares."""
        with tqdm(total=sum(map(len, batches)), desc=description, unit="img", leave=False, disable=rank > 0) as bar:
            for batch in itertools.chain.from_iterable(loader):
                if stop and stop():
                    return
                outputs = model(batch["image"].to(device))
                for task, meter in meters.items():
                    meter.update(outputs[task], batch[task].to(device))
                for i, (name, truth) in enumerate(zip(batch["name"], batch["boundary_truth"])):
                    area = own_area(batch["image"], batch["size"][i], model.output_scale)
                    own = {task: prediction(task, output[i:i + 1].float())[0][area]
                           for task, output in outputs.items() if predictions or task == "boundary"}
                    if predictions:
                        save_raw(predictions, name, own)
                    if truth is not None:
                        yield to_bytes(own["boundary"][0]), truth
                bar.update(len(batch["image"]))

    training = model.training
    model.eval()
    counts = np.zeros((len(THRESHOLDS), 4), np.int64)
    with contextlib.closing(boundaries()) as pairs:
        for image_counts in boundary_counts_each(pairs, max_dist, workers if with_odsf else 0):
            counts += image_counts
    model.train(training)

    shared = device if device.type == "cuda" else "cpu"    # where processes add up
    if stop and add_up(torch.tensor(int(stop()), device=shared)):
        return None
    for meter in meters.values():
        meter.sums, meter.not_finite = add_up(meter.sums.to(shared)), add_up(meter.not_finite.to(shared))
    empty = [task for task, meter in meters.items() if meter.empty()]
    if empty:    # one task without labels is no reason to lose the others' scores
        print(f"not scored, as no pixel has a label: {', '.join(empty)}")
    results = {task: meter.compute() for task, meter in meters.items() if task not in empty}
    counts = add_up(torch.from_numpy(counts).to(shared)).cpu().numpy()
    if with_odsf and "boundary" in results:
        results["boundary"] = {"odsF": 100 * ods_f(counts), **results["boundary"]}
    return results


class WithTruth(Dataset):
    """A data set's samples, checked, each with the boundaries that odsF scores against (None where it does not)."""

    def __init__(self, dataset: Dataset, truths: bool, scored: set[str] | None):
        self.dataset, self.truths, self.scored = dataset, truths, scored

    def __getitem__(self, index):
        sample = self.dataset[index]
        if not checks_itself(self.dataset):
            check_sample(sample, self.dataset.tasks, getattr(self.dataset, "LABEL_SCALE", 1))
        wanted = self.truths and (self.scored is None or sample["name"] in self.scored)
        needed = {key: sample[key] for key in ("image", "name", "size", *self.dataset.tasks)}
        return needed | {"boundary_truth": self.dataset.boundary_truth(index) if wanted else None}


@atexit.register
def end_loaders():
    """After an error some may be left, to which multiprocessing would send a SIGTERM and then wait for them forever."""
    if (loaders := [p for p in multiprocessing.active_children() if p.daemon]) and hasattr(signal, "SIGCHLD"):
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)    # PyTorch's handler would report that they were killed
        for process in loaders:
            process.kill()


def of_one_size(samples: list[dict]) -> list[dict]:
    """The samples in batches of equal size, in order: an image larger than the data set's size makes one of its own.
    Tensors are stacked, which also spares open files: one that comes from another process holds one."""
    batches = []
    for _, group in itertools.groupby(samples, lambda sample: sample["image"].shape):
        group = list(group)
        batch = {key: [sample[key] for sample in group] for key in group[0]}
        batches.append({key: torch.stack(values) if isinstance(values[0], Tensor) else values
                        for key, values in batch.items()})
    return batches


def own_area(image: Tensor, size: tuple[int, int], scale: int = 1) -> tuple:
    """Where an image of the size (h, w) lies in the maps (..., scale H, scale W) of the padded one (..., H, W)."""
    return (..., *(slice(scale * part.start, scale * part.stop) for part in centred(image.shape[-2:], size)))


def prediction(task: str, output: Tensor) -> Tensor:
    """Raw output (B, C_t, H, W) -> a map in the form of the task's labels (B, 1 or 3, H, W); probabilities for
    saliency and boundary."""
    if task in ("semseg", "parsing"):
        return output.argmax(1, keepdim=True)
    if task == "saliency":
        return output.softmax(1)[:, 1:]
    if task == "boundary":
        return output.sigmoid()
    return F.normalize(output, dim=1) if task == "normal" else output.clamp(min=0)


def to_bytes(probability: Tensor) -> np.ndarray:
    """The 8 bits per pixel that boundaries are scored in: truncated, not rounded."""
    return (255 * probability).to(torch.uint8).cpu().numpy()


def save_raw(folder: Path, name: str, maps: dict[str, Tensor]):
    """Writes TASK/NAME.png (class, or probability times 255) or .npy (metres or, for Cityscapes, pixels of disparity
    (h, w), unit vectors (3, h, w)).

    maps: of `prediction`, (1 or 3, h, w). Raises WriteError.
    """
    for task, values in maps.items():
        suffix = "npy" if task in ("depth", "normal") else "png"
        path = folder / task / f"{name}.{suffix}"
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as file:
            if suffix == "npy":
                np.save(file, values.squeeze(0).cpu().numpy())
            else:
                pixels = to_bytes(values[0]) if values.is_floating_point() else values[0].to(torch.uint8).cpu().numpy()
                Image.fromarray(pixels).save(file, "PNG")


def constant_baseline(dataset: Dataset, max_dist: float | None = None) -> Results:
    """The scores of the best prediction that is the same everywhere: what a model must beat to have learned anything.
    Without the tasks that have no label.

    Fitted to the very labels that it is scored on: the most frequent class, everything salient or boundary, the mean
    depth, and the direction with the least mean angle. Reads the data set twice, as it may not fit into memory.
    max_dist: of odsF, None for pixelF only.
    """
    def samples(purpose: str) -> Iterator[dict]:
        return (dataset[i] for i in tqdm(range(len(dataset)), f"{purpose} the best constant", unit="img", leave=False))
    statistics = {task: [] for task in dataset.tasks}
    for sample in samples("labels for"):
        for task, channels in dataset.tasks.items():
            statistics[task].append(label_statistics(task, sample[task], channels))
    constants = {task: torch.tensor(best_constant(task, found)) for task, found in statistics.items()}
    meters = make_meters(dataset.tasks)
    with_odsf, counts = max_dist is not None and "boundary" in meters, 0
    for i, sample in enumerate(samples("scoring")):
        for task, meter in meters.items():
            label = sample[task][None]
            meter.update(constants[task].view(1, -1, 1, 1).expand(-1, -1, *label.shape[2:]), label)
        if with_odsf:
            truth = dataset.boundary_truth(i)
            counts += boundary_counts(np.full(truth.shape, 255, np.uint8), truth, max_dist)
    results = {task: meter.compute() for task, meter in meters.items() if not meter.empty()}
    if with_odsf and "boundary" in results:
        results["boundary"] = {"odsF": 100 * ods_f(counts), **results["boundary"]}
    return results


def label_statistics(task: str, label: Tensor, channels: int) -> Tensor:
    """What best_constant needs of a label (1 or 3, H, W)."""
    valid = label[:, (label != IGNORE).all(0)]                                            # (1 or 3, pixels)
    if task in ("semseg", "parsing"):
        return valid[0].bincount(minlength=channels)[:channels]
    if task == "depth":
        return torch.stack([valid.double().sum(), torch.tensor(valid.numel())])
    if task == "normal":    # a sample is enough
        return valid[:, torch.randperm(valid.shape[1], generator=torch.Generator().manual_seed(0))[::97]]
    return torch.empty(0)


def best_constant(task: str, statistics: list[Tensor]) -> list[float]:
    """The raw output (channels,) that scores best when given at every pixel; statistics: of the labels."""
    if task in ("semseg", "parsing"):
        frequency = sum(statistics)
        return F.one_hot(frequency.argmax(), len(frequency)).tolist()
    if task == "saliency":
        return [0.0, 100.0]
    if task == "boundary":
        return [100.0]
    if task == "depth":
        total, pixels = sum(statistics).tolist()
        return [total / max(pixels, 1)]
    normals = torch.cat(statistics, dim=1)                                                # (3, M)
    directions = F.normalize(torch.randn(3, 2000, generator=torch.Generator().manual_seed(0)), dim=0)
    candidates = torch.cat([directions, F.normalize(normals.mean(1, keepdim=True), dim=0), torch.eye(3)], dim=1)
    angles = torch.stack([torch.acos((c @ normals).clamp(-1, 1)).mean() for c in candidates.T])
    return candidates[:, angles.argmin()].nan_to_num(0).tolist()


def print_table(columns: dict[str, Results]):
    """One row per task with its primary metric, one column per set of results."""
    print(f"\n{'task':<10}{'metric':<8}" + "".join(f"{name:>16}" for name in columns))
    for task, metrics in next(iter(columns.values())).items():
        metric = primary(task, metrics)
        better = "lower" if task in LOWER_IS_BETTER else "higher"
        values = "".join(f"{results[task][metric]:>16.{3 if task == 'depth' else 2}f}" for results in columns.values())
        print(f"{task:<10}{metric:<8}{values}   {better} is better")
    print()


def print_paper_table(results: Results, paper: dict[str, float], depth: str = "depth"):
    """One row per metric, the paper's beside the one that it tells, and the difference. depth: what it is called."""
    print(f"\n{'task':<10}{'metric':<16}{'model':>10}{'paper':>10}{'difference':>12}")
    for task, metrics in results.items():
        better, digits = "lower" if task in LOWER_IS_BETTER else "higher", 4 if task == "depth" else 2
        for metric, value in metrics.items():
            row = f"{depth if task == 'depth' else task:<10}{metric:<16}{value:>10.{digits}f}"
            # The paper's maxF is computed as maxF_published.
            if task in paper and metric in (primary(task, metrics), "maxF_published"):
                row += f"{paper[task]:>10.{digits}f}{value - paper[task]:>+12.{digits}f}   {better} is better"
            print(row)
    print()


# ------------------------------------------------------------------------------------------------------- pictures

PICTURES = ("apng avif bmp cr2 dng gif heic heif j2k jfif jp2 jpe jpeg jpg jxl nef pbm pgm png pnm ppm tga tif tiff "
            "webp").split()    # what is taken for a picture in folders; those that Pillow cannot read are skipped
MAX_SIDE = 1024    # pixels
CELL = 512    # pixels, the longer side of a picture in the contact sheet of one's own
SMALL_CELL = 240    # pictures of a data set are enlarged as far as they stay within it


@torch.inference_mode()
def save_contact_sheet(model: MTMamba, dataset: Dataset, device: torch.device, path: Path,
                       images: Iterable[int] = range(4)) -> Path:
    """Writes a PNG of some images: the image, and each task's prediction above its ground truth, in colour, small ones
    enlarged; below them a legend per task with its score on these images."""
    training = model.training
    model.eval()
    meters = make_meters(model.tasks, getattr(dataset, "DEPTH_RANGE", None))
    pictures, maps, scale = [], [], model.output_scale
    for i in (i for i in images if i < len(dataset)):
        sample = dataset[i]
        outputs = model(sample["image"][None].to(device))
        inner = own_area(sample["image"], sample["size"])
        mean, std = (torch.tensor(v).view(3, 1, 1) for v in (IMAGE_MEAN, IMAGE_STD))
        image = 255 * (sample["image"] * std + mean).clamp(0, 1)[inner]
        pictures.append(Image.fromarray(image.permute(1, 2, 0).numpy().astype(np.uint8)))
        maps.append({})
        for task, output in outputs.items():
            meters[task].update(output, sample[task][None].to(device))
            guess = prediction(task, output.float())[0].cpu()
            # (prediction, truth), at the image's size
            maps[-1][task] = [values.numpy()[:, ::scale, ::scale][inner] for values in (guess, sample[task])]
    model.train(training)
    titles = {task: depth_name(model) if task == "depth" else task for task in model.tasks}
    unit = "px" if "disparity" in titles.values() else "m"
    truths = {task: np.concatenate([one[task][1].reshape(len(one[task][1]), 1, -1) for one in maps], axis=2)
              for task in titles}    # of all images, (1 or 3, 1, pixels)
    rows = []
    for image, one in zip(pictures, maps):
        upper, lower = [image], [legend([("above: prediction", None), ("below: ground truth", None)])]
        for task, labels in one.items():
            for row, label in zip((upper, lower), labels):
                bounds = value_range(truths[task]) if task == "depth" else (0, 1)
                row.append(Image.fromarray(colorize(task, label, model.tasks[task], bounds)))
        factor = max(1, SMALL_CELL // max(image.size))
        rows += [[ImageOps.scale(picture, factor, Image.Resampling.NEAREST) if picture is not lower[0] else picture
                  for picture in row] for row in (upper, lower)]
    legends = []
    for task, channels in model.tasks.items():
        metric, score = PRIMARY[task], "" if meters[task].empty() else meters[task].compute()[PRIMARY[task]]
        suffix = {"RMSE": f" {unit}", "mErr": "\N{DEGREE SIGN}"}.get(metric, " %")
        legends.append(explain(task, truths[task], channels, unit, score and f"{metric} here: {score:.2f}{suffix}"))
    sheet = contact_sheet(["image", *titles.values()], [*rows, [legend([]), *legends]])
    with replacing(path) as file:
        sheet.save(file, "PNG")
    return path


def draw_pictures(args: argparse.Namespace, model: MTMamba, device: torch.device) -> int:
    """Writes the predictions for one's own pictures and a contact sheet of each; returns how many it skipped."""
    paths = find_pictures(args.image)
    out = args.out or args.checkpoint.parent / "predictions"
    rank, world = rank_and_world()
    stems = distinct_stems(paths)
    drawn = [*model.tasks, *(f"{task}_feature" for task in model.tasks if args.features), "sheet"]
    claim(out, [f"{stem}_{name}.png" for stem in stems for name in drawn], args.image)
    raw = [f"{task}/{{}}.{'npy' if task in ('depth', 'normal') else 'png'}" for task in model.tasks]
    if args.save_predictions:
        claim(args.save_predictions, [name.format(stem) for stem in stems for name in raw], args.image)
    skipped = 0
    for path, stem in list(zip(paths, stems))[rank::world]:
        try:
            image = read_picture(path)
            maps, heat = predict_picture(model, image, device, args.max_side)
        except (ValueError, OSError, MemoryError, RuntimeError) as error:
            if isinstance(error, RuntimeError) and not out_of_memory(error):
                raise
            reason, *_ = (str(error) or type(error).__name__).splitlines()    # a MemoryError may say nothing
            print("skipped", reason if str(path) in reason else f"{path}: {reason}", file=sys.stderr)
            skipped += 1
            continue
        if args.save_predictions:
            with placing(args.save_predictions) as folder:
                save_raw(folder, stem, maps)
        with placing(out) as folder:
            draw_picture(folder, stem, path.name, image, maps, heat if args.features else {}, model)
        print("pictures:", out / f"{stem}_sheet.png")
    return skipped


def draw_picture(folder: Path, stem: str, title: str, image: Image.Image, maps: dict[str, Tensor],
                 heat: dict[str, Tensor], model: MTMamba):
    """Writes STEM_TASK.png, STEM_TASK_feature.png and the contact sheet STEM_sheet.png. maps, heat: of
    predict_picture."""
    labels = {task: values.cpu().numpy() for task, values in maps.items()}
    drawn = {task: Image.fromarray(colorize(task, label, model.tasks[task], value_range(label)))
             for task, label in labels.items()}
    heat = {f"{task}_feature": overlay(image, values) for task, values in heat.items()}
    for name, picture in (drawn | heat).items():
        picture.save(folder / f"{stem}_{name}.png")
    unit = "px" if depth_name(model) == "disparity" else "m"
    legends = [explain(task, label, model.tasks[task], unit) for task, label in labels.items()]
    empty = legend([])
    rows = [[image, *drawn.values()], *([[empty, *heat.values()]] if heat else [])]
    for picture in (picture for row in rows for picture in row):
        picture.thumbnail((CELL, CELL))
    titles = [title, *(depth_name(model) if task == "depth" else task for task in drawn)]
    contact_sheet(titles, [*rows, [empty, *legends]]).save(folder / f"{stem}_sheet.png")


MANIFEST = "written_by_evaluate.txt"    # SHA-256 and name of the files that --image has written to a folder


def claim(folder: Path, names: list[str], inputs: list[Path]):
    """Makes the folder that these files are to be written to. Raises ValueError where the pictures themselves lie in
    it, or one of the files is there and no earlier run wrote it."""
    if folder.resolve() in {(path if path.is_dir() else path.parent).resolve() for path in inputs}:
        raise ValueError(f"{folder} holds the pictures themselves; give a folder of its own with --out (or "
                         "--save-predictions)")
    found = [name for name in names if os.path.lexists(folder / name)]
    written = read_manifest(folder / MANIFEST)    # after that, as another process may be writing: first a name here
    others = [name for name in found if (digest(folder / name), name) not in written]
    if others:
        raise ValueError(f"{folder / others[0]}{f' and {len(others) - 1} others' if others[1:] else ''} would be "
                         "overwritten, but no earlier run wrote that; give another folder with --out (or "
                         "--save-predictions)")
    folder.mkdir(parents=True, exist_ok=True)


@contextlib.contextmanager
def placing(folder: Path) -> Iterator[Path]:
    """A new folder to write to, whose files are then moved to the same places in `folder`: whole, and first entered in
    its list. Raises WriteError."""
    with writing(folder), tempfile.TemporaryDirectory(dir=folder) as new:
        yield Path(new)
        for path in sorted(path for path in Path(new).rglob("*") if path.is_file()):
            name = path.relative_to(new)
            append(folder / MANIFEST, f"{digest(path)}  {name.as_posix()}\n")
            (folder / name).parent.mkdir(exist_ok=True)
            os.replace(path, folder / name)


def read_manifest(path: Path) -> set[tuple[str, str]]:
    """{(SHA-256, name)} Raises ValueError where the file is something else."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    found = [re.fullmatch(r"([0-9a-f]{64})  (.+)", line) for line in lines]
    if not all(found):
        raise ValueError(f"expected the files that an earlier run wrote, found something else in {path}; give another "
                         "folder with --out")
    return {match.groups() for match in found}


def digest(path: Path) -> str | None:
    """None where there is no file."""
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else None


def out_of_memory(error: RuntimeError) -> bool:
    """On a CPU, PyTorch has no error of its own for that."""
    return isinstance(error, torch.cuda.OutOfMemoryError) or "allocate memory" in str(error)


def find_pictures(paths: list[Path]) -> list[Path]:
    """The files, and those in the folders that have a picture's ending. Raises ValueError where there is none."""
    found = [file for path in paths for file in (
        sorted(f for f in path.iterdir() if f.suffix.lower()[1:] in PICTURES) if path.is_dir() else [path])]
    if not found:
        raise ValueError(f"no pictures in {', '.join(map(str, paths))}; their names must end with one of "
                         f"{' '.join(PICTURES)}")
    return found


def distinct_stems(paths: list[Path]) -> list[str]:
    """A name for the output of each file: its own without the ending, numbered where others have the same."""
    stems = []
    for path in paths:
        stem, number = path.stem, 2
        while stem in stems:
            stem, number = f"{path.stem}_{number}", number + 1
        stems.append(stem)
    return stems


def read_picture(path: Path) -> Image.Image:
    """RGB, upright: see datasets.read_image. Raises FileNotFoundError, or ValueError where it cannot be read."""
    return Image.fromarray(read_image(path, turn=True))


@torch.inference_mode()
def predict_picture(model: MTMamba, image: Image.Image, device: torch.device,
                    max_side: int = MAX_SIDE) -> tuple[dict[str, Tensor], ...]:
    """({task: map as of `prediction`, (1 or 3, h, w)}, {task: (h, w) norm of the final decoder feature})

    max_side: the model sees the image reduced to that, if it is larger, and the maps are enlarged to its size again.
    Where the model's outputs are larger than its images, it sees the picture smaller by as much, as in training.
    """
    size, scale = (image.height, image.width), model.output_scale
    shrink = min(1, scale * max_side / max(size))
    if shrink < 1:    # the model takes no side below 32
        image = image.resize([max(32 * scale, round(n * shrink)) for n in image.size], Image.Resampling.BICUBIC)
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (IMAGE_MEAN, IMAGE_STD))
    seen = [-(-n // scale) for n in image.size]
    small = image.resize(seen, Image.Resampling.BILINEAR) if scale > 1 else image
    pixels = ((to_tensor(np.array(small)) - mean) / std)[None].to(device)
    features = model.decode(pixels)
    outputs = model.predict(features, pixels.shape[2:])
    heat = {}
    for task, z in features.items():
        norm = z.float().norm(dim=-1)[:, None]                                               # (1, 1, H / 4, W / 4)
        norm = F.interpolate(norm, scale_factor=4 * scale, mode="bilinear", align_corners=False)
        heat[task] = enlarge("feature", norm[0, :, :image.height, :image.width], size)[0]
    return {task: enlarge(task, prediction(task, output.float())[0, :, :image.height, :image.width], size)
            for task, output in outputs.items()}, heat


def enlarge(task: str, values: Tensor, size: tuple[int, int]) -> Tensor:
    """A map (1 or 3, h, w) at the size (h', w'): of classes the nearest, others bilinear, normals of unit length."""
    if values.shape[1:] == size:
        return values
    if not values.is_floating_point():
        return F.interpolate(values[None].float(), size, mode="nearest-exact")[0].to(values.dtype)
    values = F.interpolate(values[None], size, mode="bilinear", align_corners=False)[0]
    return F.normalize(values, dim=0) if task == "normal" else values


# ----------------------------------------------------------------------------------------- colours, legends, sheets

# Anchors of a colour map of even perceived steps, dark blue over green to yellow, for depth from near to far.
COLOR_MAP = np.array([(68, 1, 84), (70, 50, 126), (54, 92, 141), (39, 127, 142), (31, 161, 135), (74, 193, 109),
                      (160, 218, 57), (253, 231, 37)])

VOC_CLASSES = ("background aeroplane bicycle bird boat bottle bus car cat chair cow diningtable dog horse motorbike "
               "person pottedplant sheep sofa train tvmonitor").split()
NYUD_CLASSES = ("wall, floor, cabinet, bed, chair, sofa, table, door, window, bookshelf, picture, counter, blinds, "
                "desk, shelves, curtain, dresser, pillow, mirror, floor mat, clothes, ceiling, books, refrigerator, "
                "television, paper, towel, shower curtain, box, whiteboard, person, night stand, toilet, sink, lamp, "
                "bathtub, bag, other structure, other furniture, other prop").split(", ")
CITYSCAPES_CLASSES = {
    "road": (128, 64, 128), "sidewalk": (244, 35, 232), "building": (70, 70, 70), "wall": (102, 102, 156),
    "fence": (190, 153, 153), "pole": (153, 153, 153), "traffic light": (250, 170, 30), "traffic sign": (220, 220, 0),
    "vegetation": (107, 142, 35), "terrain": (152, 251, 152), "sky": (70, 130, 180), "person": (220, 20, 60),
    "rider": (255, 0, 0), "car": (0, 0, 142), "truck": (0, 0, 70), "bus": (0, 60, 100), "train": (0, 80, 100),
    "motorcycle": (0, 0, 230), "bicycle": (119, 11, 32)}
CLASSES = {len(names): list(names) for names in (Synthetic.CLASSES, VOC_CLASSES, NYUD_CLASSES, PARTS,
                                                 CITYSCAPES_CLASSES)}    # by channels


def voc_palette(classes: int = 256) -> np.ndarray:
    """PASCAL VOC's colours, (classes, 3): the class's bits, taken by threes, are the colour's highest bits first."""
    index = np.arange(classes)
    palette = np.zeros((classes, 3), np.uint8)
    for bit in range(8):
        for channel in range(3):
            palette[:, channel] |= ((index >> (3 * bit + channel) & 1) << (7 - bit)).astype(np.uint8)
    return palette


def palette(channels: int) -> np.ndarray:
    """The colours of classes, (256, 3): Cityscapes' own with black for what is ignored, or PASCAL VOC's."""
    if channels != len(CITYSCAPES_CLASSES):
        return voc_palette()
    return np.array([*CITYSCAPES_CLASSES.values(), *[(0, 0, 0)] * (256 - channels)], np.uint8)


def depth_name(model: MTMamba) -> str:
    """What to call the model's depth: on Cityscapes it is disparity, in pixels."""
    on_cityscapes = model.output_scale == Cityscapes.LABEL_SCALE and model.tasks.items() <= Cityscapes.TASKS.items()
    return "disparity" if on_cityscapes else "depth"


def colorize(task: str, label: np.ndarray, channels: int, depth_range: tuple[float, float]) -> np.ndarray:
    """A map in the form of the task's labels (1 or 3, H, W) -> uint8 (H, W, 3); ignored pixels and those without a
    disparity are black, of classes as in the palette.

    channels: C_t. depth_range: metres or pixels of disparity, (lowest, highest).
    """
    if task in ("semseg", "parsing"):
        return palette(channels)[label[0]]
    valid = ((label != IGNORE) & ((label >= 0) | (task != "depth"))).all(0)[..., None]
    if task == "depth":
        picture = color_map(label[0], depth_range)
    elif task == "normal":
        picture = 255 * (label.transpose(1, 2, 0) + 1) / 2
    else:
        picture = 255 * np.repeat(label.transpose(1, 2, 0), 3, axis=2)
    return np.where(valid, picture, 0).astype(np.uint8)


def color_map(values: np.ndarray, bounds: tuple[float, float]) -> np.ndarray:
    """(H, W) -> (H, W, 3) in 0..255, from the first to the last colour of COLOR_MAP."""
    low, high = bounds
    position = np.clip((values - low) / max(high - low, 1e-6), 0, 1) * (len(COLOR_MAP) - 1)
    return np.stack([np.interp(position, np.arange(len(COLOR_MAP)), COLOR_MAP[:, c]) for c in range(3)], axis=-1)


def value_range(depth: np.ndarray) -> tuple[float, float]:
    """Of the valid pixels."""
    valid = depth[(depth != IGNORE) & (depth >= 0)]
    return (float(valid.min()), float(valid.max())) if valid.size else (0.0, 1.0)


def overlay(image: Image.Image, heat: Tensor) -> Image.Image:
    """A heat map (h, w), from its minimum to its maximum, in colour over the image."""
    colors = color_map(heat.cpu().numpy(), (heat.min().item(), heat.max().item()))
    return Image.blend(image, Image.fromarray(colors.astype(np.uint8)), 0.6)


def contact_sheet(titles: list[str], rows: list[list[Image.Image]]) -> Image.Image:
    """Pictures in columns with titles; cells are as large as the column's and row's largest."""
    gap, caption = 4, 16
    widths = [max(96, *(picture.width for picture in column)) + gap for column in zip(*rows)]
    heights = [max(picture.height for picture in row) + gap for row in rows]
    sheet = Image.new("RGB", (sum(widths), caption + sum(heights)), "white")
    for column, title in enumerate(titles):
        ImageDraw.Draw(sheet).text((sum(widths[:column]) + 2, 2), title, fill="black")
        for i, row in enumerate(rows):
            sheet.paste(row[column], (sum(widths[:column]), caption + sum(heights[:i])))
    return sheet


def legend(lines: list[tuple[str, tuple[int, int, int] | None]]) -> Image.Image:
    """Lines of text, each behind a square of its colour if it has one."""
    picture = Image.new("RGB", (160, 16 * len(lines) + 2), "white")
    draw = ImageDraw.Draw(picture)
    for i, (text, color) in enumerate(lines):
        if color is not None:
            draw.rectangle((2, 16 * i + 3, 13, 16 * i + 14), fill=color, outline="gray")
        draw.text((18 if color is not None else 2, 16 * i + 2), text, fill="black")
    return picture


def explain(task: str, label: np.ndarray, channels: int, unit: str = "m", more: str = "") -> Image.Image:
    """The legend of a map (1 or 3, H, W): the classes that occur in it, the depth's range in its unit, directions, or
    probabilities; and one more line."""
    if task in ("semseg", "parsing"):
        names = CLASSES.get(channels, [f"class {i}" for i in range(channels)])
        lines = [("ignored" if i == IGNORE else names[i], tuple(palette(channels)[i].tolist()))
                 for i in np.unique(label)]
    elif task == "depth":
        steps = np.linspace(*value_range(label), 5)
        colors = color_map(steps[None], value_range(label))[0].astype(int).tolist()
        lines = [(f"{value:.2f} {unit}", tuple(color)) for value, color in zip(steps, colors)]
    elif task == "normal":
        directions = {"left": (-1, 0, 0), "right": (1, 0, 0), "up": (0, 1, 0), "down": (0, -1, 0),
                      "to the viewer": (0, 0, 1)}
        lines = [(name, tuple(255 * (x + 1) // 2 for x in direction)) for name, direction in directions.items()]
    else:
        lines = [("probability 0", (0, 0, 0)), ("probability 1", (255, 255, 255))]
    return legend(lines + [(more, None)] * bool(more))


# --------------------------------------------------------------------------------------------------------- export

def export(args: argparse.Namespace):
    """Writes the model for one image of one size as a file that runs without this project, once its outputs for a
    random image are those of the model. Raises ValueError where they are not, or what it needs is not installed."""
    model, config = load_checkpoint(args.checkpoint, torch.device("cpu"), args.encoder, args.encoder_kwargs)
    choose_backend(model, "loop", torch.device("cpu"))
    size = args.img_size or config.get("img_size")
    if size is None:
        raise ValueError(f"{args.checkpoint} does not tell the size of its images; give it with --img-size H W")
    image = torch.randn(1, model.in_chans, *size, generator=torch.Generator().manual_seed(0))
    write, run = EXPORTS[args.export.suffix]
    args.export.parent.mkdir(parents=True, exist_ok=True)
    with torch.inference_mode(), tempfile.TemporaryDirectory(dir=args.export.parent) as folder:
        path = Path(folder) / args.export.name
        expected = model(image)
        try:
            with writing(args.export):
                write(model, image, path)
            outputs = run(path, image)
        except ImportError as error:
            raise ValueError(f"{error}; pip install -e '.[export]'") from error
        for task, output in expected.items():
            difference = ((outputs[task] - output).abs().max() / output.abs().max()).item()
            print(f"{task}: {tuple(output.shape)}, off by {difference:.1e} of its largest value")
            if not difference < EXPORT_TOLERANCE:
                raise ValueError(f"the exported model is off by {difference:.1e} of {task}'s largest value; nothing "
                                 "was written")
        for file in sorted(Path(folder).iterdir(), reverse=True):    # beside a large .onnx lie its weights
            os.replace(file, args.export.parent / file.name)
    print("exported:", args.export)


def write_pt2(model: MTMamba, image: Tensor, path: Path):
    buffer = io.BytesIO()    # PyTorch's writer of these files aborts the process where a disk is full
    torch.export.save(torch.export.export(model, (image,)), buffer)
    path.write_bytes(buffer.getbuffer())


def run_pt2(path: Path, image: Tensor) -> dict[str, Tensor]:
    return torch.export.load(path).module()(image)


def write_onnx(model: MTMamba, image: Tensor, path: Path):
    large = sum(p.numel() * p.element_size() for p in model.parameters()) > 1.9e9    # more than the format holds
    torch.onnx.export(model, (image,), path, input_names=["image"], output_names=list(model.tasks), dynamo=True,
                      external_data=large, verbose=False)


def run_onnx(path: Path, image: Tensor) -> dict[str, Tensor]:
    import onnxruntime
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    outputs = session.run(None, {"image": image.numpy()})
    return {output.name: torch.from_numpy(values) for output, values in zip(session.get_outputs(), outputs)}


EXPORTS = {".onnx": (write_onnx, run_onnx), ".pt2": (write_pt2, run_pt2)}
EXPORT_TOLERANCE = 1e-3    # float32's rounding, through some dozens of layers, is a hundredth of that


# ----------------------------------------------------------------------------------------------------------- cost

def print_cost(args: argparse.Namespace):
    """Parameters and FLOPs of NYUDv2's four tasks at 448x576; the paper's figures are for Swin-Large."""
    encoder = args.encoder or "swin-large"
    as_in_paper = ENCODERS.get(encoder, encoder) == ENCODERS["swin-large"] and not args.encoder_kwargs
    print(f"NYUDv2's tasks, 448x576, {encoder}; parameters in millions, FLOPs in 1e9 (the paper cuts after two digits)")
    print(f"{'variant':<18}{'parameters':>12}{'paper':>10}{'FLOPs':>12}{'paper':>10}")
    for variant in VARIANTS if args.variant == "all" else [args.variant or "mtmamba"]:
        with torch.device("meta"):
            model = MTMamba(NYUDv2.TASKS, (448, 576), encoder, encoder_kwargs=args.encoder_kwargs, variant=variant)
        parameters, flops = count_cost(model, (448, 576))
        paper = [f"{value:.2f}" for value in PAPER_COST.get(variant, ())] if as_in_paper else []
        first, second = paper or ("", "")
        print(f"{variant:<18}{parameters / 1e6:>12.4f}{first:>10}{flops / 1e9:>12.4f}{second:>10}".rstrip())


# ------------------------------------------------------------------------ processes and files, shared with train.py

def start(name: str) -> torch.device:
    """The device, and under torchrun the process group. Raises ValueError for a device that there is not."""
    distributed = "WORLD_SIZE" in os.environ
    if distributed and name == "cuda":
        name = f"cuda:{os.environ['LOCAL_RANK']}"
    try:
        device = torch.device(name)
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:    # of a name, of a build without CUDA
        raise ValueError(f"cannot use --device {name}: {str(error).splitlines()[0]}") from error
    if distributed and not dist.is_initialized():
        if device.type == "cuda":
            torch.cuda.set_device(device)
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    return device


def rank_and_world() -> tuple[int, int]:
    """This process's number and how many there are."""
    running = dist.is_available() and dist.is_initialized()
    return (dist.get_rank(), dist.get_world_size()) if running else (0, 1)


def add_up(sums: Tensor) -> Tensor:
    """The sum over the processes, in place."""
    if rank_and_world()[1] > 1:
        dist.all_reduce(sums)
    return sums


def allow_open_files(workers: int):
    """Lifts the limit on open files, as far as it may be lifted, to what so many processes for loading need. Raises
    ValueError where that is too little: they would fail amid the run, and wait for each other forever."""
    if workers == 0 or sys.platform == "win32":    # which has no such limit
        return
    import resource
    needed, (soft, hard) = 64 + 32 * workers, resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < needed:
        raise ValueError(f"expected a limit of at least {needed} open files for --workers {workers}, found {hard}; "
                         f"raise it (ulimit -n {needed}) or give fewer --workers")
    if soft != resource.RLIM_INFINITY and soft < needed:
        resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))


def check_writable(folder: Path):
    """Makes the folder. Raises OSError, naming it, where nothing can be written there: now, and not after hours."""
    probe = folder / f".{os.getpid()}.tmp"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with open(probe, "wb") as file:
            file.write(bytes(2 ** 16))
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        reason = error.strerror
        raise OSError(f"cannot write to the folder {folder} ({reason}); make room or name another one") from error
    finally:
        with contextlib.suppress(OSError):
            probe.unlink()


def write_json(path: Path, content: dict):
    with replacing(path) as file:
        file.write((json.dumps(content, indent=2) + "\n").encode())


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, interrupt)
    main()
