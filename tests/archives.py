"""Writes synthetic scenes in the files of a benchmark, to try things without its archive.

    python tests/archives.py nyud data/NYUDv2 --count 40
    python tests/archives.py cityscapes data/Cityscapes --size 128 256    # smaller images, (H, W)
"""

import signal
import sys
from functools import partial
from pathlib import Path

import numpy as np
import scipy.io
from PIL import Image
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parent.parent))

from datasets import (
    DATASETS,
    IGNORE,
    PERSON_INDEX,
    SPHERE,
    Parser,
    Synthetic,
    interrupt,
    replacing,
)

SIZES = {"pascal": (375, 500), "nyud": (425, 560), "cityscapes": (1024, 2048)}    # (h, w) of the images

# By class of Synthetic: those of LabelMap, PASCAL VOC and NYUDv2 that come closest. Sphere, box, cylinder: potted
# plant, table, bottle; for NYUDv2 other prop, box, lamp.
LABEL_MAP = np.array([158, 440, 68, 360, 308, 397, 34, 284])
CITYSCAPES = np.array([7, 11, 12, 23, 21, 26, 17, 24])    # road, building, wall, sky, vegetation, car, pole, person
VOC = np.array([0, 0, 0, 0, 16, 11, 5, PERSON_INDEX])
VOC_NAMES = {16: "pottedplant", 11: "table", 5: "bottle", PERSON_INDEX: "person"}
NYUD = np.array([2, 1, 22, 0, 40, 29, 35, 31])
PART_FILES = ("", "head", "torso", "luarm", "llarm", "luleg", "llleg")    # one name for each of PARTS


def export(kind: str, root: Path, count: int, size: tuple[int, int] | None = None):
    """Writes `count` synthetic scenes to train on and a quarter as many (at least 2) to validate, below root, in the
    files of a benchmark: "pascal", "nyud" or "cityscapes". size: (h, w) of the images in pixels, None for that of
    SIZES; of PASCAL-Context's images every fourth is upright.

    Raises FileExistsError where root holds anything, ValueError for a count or size that Synthetic refuses, OSError.
    """
    root, size = Path(root), size or SIZES[kind]
    if root.exists() and (not root.is_dir() or any(root.iterdir())):
        raise FileExistsError(f"expected an empty or a new folder, found {root}; name another one or remove it")
    if kind == "cityscapes" and any(length % 2 for length in size):
        raise ValueError(f"expected an even height and width, as Cityscapes' images are halved, found {size}")
    for seed, (split, images) in enumerate({"train": count, "val": max(2, count // 4)}.items()):
        scenes, upright = Synthetic(images, size, seed), Synthetic(images, size[::-1], seed)
        scene_files = {"pascal": pascal_files, "nyud": nyud_files, "cityscapes": partial(cityscapes_files, split)}[kind]
        names = [f"synthetic_{seed}{i:05d}_000019" if kind == "cityscapes" else f"synthetic_{split}_{i:05d}"
                 for i in range(images)]
        for i, name in enumerate(tqdm(names, desc=f"exporting {split}", unit="img")):
            maps = (upright if kind == "pascal" and i % 4 == 3 else scenes).render(i)
            for path, content in scene_files(name, maps).items():
                save_file(root / path, content)
        if kind != "cityscapes":
            save_file(root / DATASETS[kind].LIST.format(split), "\n".join(names) + "\n")


def nyud_files(name: str, maps: dict[str, np.ndarray]) -> dict:
    """What save_file takes, by path; maps: of Synthetic.render."""
    return {
        f"images/{name}.png": 255 * maps["image"],
        f"segmentation/{name}.png": NYUD[maps["semseg"]],
        f"depth/{name}.npy": np.nan_to_num(maps["depth"][0]),
        f"normals/{name}.png": normal_pixels(maps["normal"]),
        f"edge/{name}.png": 255 * maps["boundary"],
    }


def pascal_files(name: str, maps: dict[str, np.ndarray]) -> dict:
    """As nyud_files. As in the archive, VOC12 has the semseg of only a part of the images."""
    folder = "VOC12" if int(name[-1]) % 2 else "pascal-context"
    return {
        f"JPEGImages/{name}.jpg": 255 * maps["image"],
        f"semseg/{folder}/{name}.png": VOC[maps["semseg"]],
        f"pascal-context/trainval/{name}.mat": {"LabelMap": LABEL_MAP[maps["semseg"][0]].astype(np.uint16)},
        f"human_parts/{name}.mat": {"anno": struct([(name, part_objects(maps))], "imname", "objects")},
        f"normals_distill/{name}.png": normal_pixels(maps["normal"]),
        f"sal_distill/{name}.png": 255 * maps["saliency"],
    }


def cityscapes_files(split: str, name: str, maps: dict[str, np.ndarray]) -> dict:
    """As nyud_files. The disparity is that of a camera with 100 pixels times metres (the real one has about 470); the
    sky has none."""
    depth = maps["depth"]
    disparity = np.nan_to_num(1 + 256 * 100 / depth).clip(max=2**16 - 1)
    return {f"{folder}/{split}/{name.split('_')[0]}/{name}_{suffix}.png": content for folder, suffix, content in (
        ("leftImg8bit", "leftImg8bit", 255 * maps["image"]), ("gtFine", "gtFine_labelIds", CITYSCAPES[maps["semseg"]]),
        ("disparity", "disparity", np.rint(disparity).astype(np.uint16)))}


def save_file(path: Path, content):
    """content: variables by name (.mat), an array (.npy), text (.txt), or pixels (1 or 3, h, w) in 0..255 or
    of 16 bits."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as file:
        if path.suffix == ".mat":
            scipy.io.savemat(file, content, do_compression=True)
        elif path.suffix == ".npy":
            np.save(file, content)
        elif path.suffix == ".txt":
            file.write(content.encode())
        else:
            pixels = content if content.dtype == np.uint16 else np.rint(content).astype(np.uint8)
            picture = Image.fromarray(pixels[0] if len(pixels) == 1 else pixels.transpose(1, 2, 0))
            picture.save(file, {".png": "PNG", ".jpg": "JPEG"}[path.suffix], quality=95)


def part_objects(maps: dict[str, np.ndarray]) -> np.ndarray:
    """The objects of a scene as human_parts stores them; only persons have parts here. The scene does not know left
    from right, nor a hand from an arm, so each body part has one name."""
    semseg, instance, parsing = maps["semseg"][0], maps["instance"], maps["parsing"][0]
    objects = []
    for mask in (instance == number for number in np.unique(instance[semseg >= SPHERE])):
        index = VOC[semseg[mask][0]]
        parts = [(PART_FILES[part], np.uint8(mask & (parsing == part))) for part in np.unique(parsing[mask])
                 if part not in (0, IGNORE)]
        objects.append((VOC_NAMES[index], index, np.uint8(mask), struct(parts, "part_name", "mask") if parts else []))
    return struct(objects, "class", "class_ind", "mask", "parts")


def struct(rows: list[tuple], *fields: str) -> np.ndarray:
    """A MATLAB structure array, (1, rows)."""
    array = np.empty((1, len(rows)), [(field, object) for field in fields])
    array[0] = rows
    return array


def normal_pixels(normal: np.ndarray) -> np.ndarray:
    """Unit vectors (3, h, w) -> pixels in 0..255; unknown ones become the normal that faces the viewer."""
    normal = np.where(np.isnan(normal), np.reshape([0, 0, 1], (3, 1, 1)), normal)
    return (normal + 1) * 255 / 2


def main(argv: list[str] | None = None) -> int:
    parser = Parser("archives.py", __doc__)
    parser.add_argument("kind", choices=SIZES)
    parser.add_argument("root", type=Path, help="a new or empty folder")
    parser.add_argument("--count", type=int, default=40, help="images to train on; a quarter as many to validate")
    parser.add_argument("--size", type=int, nargs=2, metavar=("H", "W"), help=f"of the images; default: {SIZES}")
    args = parser.parse_args(argv)
    with parser.told():
        export(args.kind, args.root, args.count, args.size)
    return 0


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, interrupt)
    sys.exit(main())
