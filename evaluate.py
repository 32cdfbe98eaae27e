"""Scores a checkpoint and draws what it predicts.

    python evaluate.py --checkpoint runs/synthetic/last.pt

prints the metric of every task beside that of the best constant prediction, and writes a contact sheet next to the
checkpoint (elsewhere with --out).
"""

import argparse
from pathlib import Path
from typing import NoReturn

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from datasets import IGNORE, IMAGE_MEAN, IMAGE_STD, Synthetic
from metrics import LOWER_IS_BETTER, PRIMARY, make_meters
from mtmamba import MTMamba, default_backend

EVALUATION_IMAGES = 100          # of the synthetic data set
EVALUATION_SEED = 1              # training uses other seeds, so these scenes are held out
EVALUATION_BATCH = 10

Results = dict[str, dict[str, float]]    # {task: {metric: value}}


class Parser(argparse.ArgumentParser):
    """Ends a run on bad input with one line and exit code 2."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}\n")


def main(argv: list[str] | None = None) -> Results:
    parser = Parser(prog="evaluate.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, required=True, help="written by train.py")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, help="folder of the contact sheet (default: the checkpoint's)")
    args = parser.parse_args(argv)
    try:
        device = torch.device(args.device)
        model, config = load_checkpoint(args.checkpoint, device)
    except (ValueError, OSError, RuntimeError) as error:
        parser.error(str(error))
    print(f"scan backend: {default_backend(device)}")
    dataset = held_out(config["img_size"], config["tasks"])
    results = evaluate(model, dataset, device)
    print_table({"model": results, "best constant": constant_baseline(dataset)})
    out = args.out or args.checkpoint.parent
    out.mkdir(parents=True, exist_ok=True)
    print("pictures:", save_contact_sheet(model, dataset, device, out / "contact_sheet.png"))
    return results


def held_out(img_size: tuple[int, int], tasks: dict[str, int]) -> Synthetic:
    return Synthetic(EVALUATION_IMAGES, img_size, seed=EVALUATION_SEED, tasks=list(tasks))


def load_checkpoint(path: Path, device: torch.device) -> tuple[MTMamba, dict]:
    """The model of a checkpoint of train.py, in evaluation mode, and MTMamba's arguments for it.

    Raises FileNotFoundError, or ValueError where the file is something else or its weights do not fit its
    configuration.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no checkpoint at {path}; give the path of a last.pt that train.py wrote")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:    # the unpickler and the zip reader raise many kinds
        raise ValueError(f"{path} is not a readable checkpoint ({type(error).__name__}); it may be truncated or "
                         "something else than a file of train.py") from error
    if not isinstance(checkpoint, dict) or not {"model", "config"} <= set(checkpoint):
        found = list(checkpoint)[:5] if isinstance(checkpoint, dict) else type(checkpoint).__name__
        raise ValueError(f"{path} is not a checkpoint of train.py: expected the entries model and config, found {found}")
    model = MTMamba(**checkpoint["config"])
    expected, found = ({key: value.shape for key, value in state.items()}
                       for state in (model.state_dict(), checkpoint["model"]))
    wrong = [key for key in {**expected, **found} if expected.get(key) != found.get(key)]
    if wrong:
        raise ValueError(f"{path} holds weights of another architecture than its configuration says: {len(wrong)} "
                         f"tensors are missing, left over or of another shape, first {wrong[0]}")
    model.load_state_dict(checkpoint["model"])
    return model.to(device).eval(), checkpoint["config"]


# --------------------------------------------------------------------------------------------------------- scores

@torch.inference_mode()
def evaluate(model: MTMamba, dataset: Dataset, device: torch.device, description: str = "evaluating") -> Results:
    """Every metric of every task over a data set. The model's mode (train or eval) is left as it was."""
    meters = make_meters(model.tasks)
    training = model.training
    model.eval()
    with tqdm(total=len(dataset), desc=description, unit="img", leave=False) as bar:
        for batch in DataLoader(dataset, EVALUATION_BATCH):
            outputs = model(batch["image"].to(device))
            for task, meter in meters.items():
                meter.update(outputs[task], batch[task].to(device))
            bar.update(len(batch["image"]))
    model.train(training)
    return {task: meter.compute() for task, meter in meters.items()}


def constant_baseline(dataset: Synthetic) -> Results:
    """The scores of the best prediction that is the same everywhere: what a model must beat to have learned anything.

    Fitted to the very labels that it is scored on: the most frequent class, everything salient or boundary, the mean
    depth, and the direction with the least mean angle.
    """
    samples = list(tqdm(dataset, desc="labels for the best constant", unit="img", leave=False))
    meters = make_meters(dataset.tasks)
    for task in dataset.tasks:
        label = torch.stack([sample[task] for sample in samples])
        output = torch.tensor(best_constant(task, label, dataset.tasks[task])).view(1, -1, 1, 1)
        meters[task].update(output.expand(len(label), -1, *label.shape[2:]), label)
    return {task: meter.compute() for task, meter in meters.items()}


def best_constant(task: str, label: Tensor, channels: int) -> list[float]:
    """The raw output (channels,) that scores best on the labels (B, 1 or 3, H, W) when given at every pixel."""
    if task in ("semseg", "parsing"):
        frequency = label[label != IGNORE].bincount(minlength=channels)
        return F.one_hot(frequency.argmax(), channels).tolist()
    if task == "saliency":
        return [0.0, 100.0]
    if task == "boundary":
        return [100.0]
    if task == "depth":
        return [label[label != IGNORE].mean().item()]
    normals = label.transpose(0, 1).flatten(1)
    normals = normals[:, (normals != IGNORE).all(0)][:, ::97]                             # (3, M), a sample
    directions = F.normalize(torch.randn(3, 2000, generator=torch.Generator().manual_seed(0)), dim=0)
    candidates = torch.cat([directions, F.normalize(normals.mean(1, keepdim=True), dim=0), torch.eye(3)], dim=1)
    angles = torch.stack([torch.acos((c @ normals).clamp(-1, 1)).mean() for c in candidates.T])
    return candidates[:, angles.argmin()].tolist()


def print_table(columns: dict[str, Results]):
    """One row per task with its primary metric, one column per set of results."""
    print(f"\n{'task':<10}{'metric':<8}" + "".join(f"{name:>16}" for name in columns))
    for task in next(iter(columns.values())):
        metric = PRIMARY[task]
        better = "lower" if task in LOWER_IS_BETTER else "higher"
        values = "".join(f"{results[task][metric]:>16.{3 if task == 'depth' else 2}f}" for results in columns.values())
        print(f"{task:<10}{metric:<8}{values}   {better} is better")
    print()


# ------------------------------------------------------------------------------------------------------- pictures

# Anchors of a colour map of even perceived steps, dark blue over green to yellow, for depth from near to far.
DEPTH_COLORS = np.array([(68, 1, 84), (70, 50, 126), (54, 92, 141), (39, 127, 142), (31, 161, 135), (74, 193, 109),
                         (160, 218, 57), (253, 231, 37)])


def voc_palette(classes: int = 256) -> np.ndarray:
    """PASCAL VOC's colours, (classes, 3): the class's bits, taken by threes, are the colour's highest bits first."""
    index = np.arange(classes)
    palette = np.zeros((classes, 3), np.uint8)
    for bit in range(8):
        for channel in range(3):
            palette[:, channel] |= ((index >> (3 * bit + channel) & 1) << (7 - bit)).astype(np.uint8)
    return palette


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


def colorize(task: str, label: np.ndarray, depth_range: tuple[float, float]) -> np.ndarray:
    """A map in the form of the task's labels (1 or 3, H, W) -> uint8 (H, W, 3); ignored pixels are black.

    depth_range: metres, (nearest, farthest).
    """
    if task in ("semseg", "parsing"):
        return voc_palette()[np.where(label[0] == IGNORE, 0, label[0])]
    valid = (label != IGNORE).all(0)[..., None]
    if task == "depth":
        near, far = depth_range
        position = np.clip((label[0] - near) / max(far - near, 1e-6), 0, 1) * (len(DEPTH_COLORS) - 1)
        channels = [np.interp(position, np.arange(len(DEPTH_COLORS)), DEPTH_COLORS[:, c]) for c in range(3)]
        picture = np.stack(channels, axis=-1)
    elif task == "normal":
        picture = 255 * (label.transpose(1, 2, 0) + 1) / 2
    else:
        picture = 255 * np.repeat(label.transpose(1, 2, 0), 3, axis=2)
    return np.where(valid, picture, 0).astype(np.uint8)


@torch.inference_mode()
def save_contact_sheet(model: MTMamba, dataset: Dataset, device: torch.device, path: Path, images: int = 4) -> Path:
    """Writes a PNG of the first images: the image, and each task's prediction above its ground truth, in colour."""
    gap, caption = 4, 16
    H, W = dataset[0]["image"].shape[1:]
    tasks = list(model.tasks)
    sheet = Image.new("RGB", ((W + gap) * (1 + len(tasks)), caption + 2 * (H + gap) * images), "white")
    draw = ImageDraw.Draw(sheet)
    for column, title in enumerate(["image", *tasks]):
        draw.text((column * (W + gap), 2), title, fill="black")
    training = model.training
    model.eval()
    for i in range(min(images, len(dataset))):
        sample = dataset[i]
        outputs = model(sample["image"][None].to(device))
        top = caption + 2 * (H + gap) * i
        mean, std = (np.reshape(v, (3, 1, 1)) for v in (IMAGE_MEAN, IMAGE_STD))
        image = 255 * np.clip(sample["image"].numpy() * std + mean, 0, 1)
        sheet.paste(Image.fromarray(image.transpose(1, 2, 0).astype(np.uint8)), (0, top))
        draw.text((gap, top + H + gap), "above: prediction\nbelow: ground truth", fill="black")
        for column, task in enumerate(tasks, start=1):
            truth = sample[task].numpy()
            metres = truth[truth != IGNORE] if task == "depth" else np.zeros(1)
            depth_range = (metres.min(), metres.max()) if metres.size else (0.0, 1.0)
            for row, label in enumerate([prediction(task, outputs[task].float())[0].cpu().numpy(), truth]):
                picture = Image.fromarray(colorize(task, label, depth_range))
                sheet.paste(picture, (column * (W + gap), top + row * (H + gap)))
    model.train(training)
    sheet.save(path)
    return path


if __name__ == "__main__":
    main()
