"""Data sets for multi-task dense prediction: synthetic scenes that need no files, PASCAL-Context, NYUDv2, Cityscapes,
and LabelledDataset, which you subclass for your own data.

    python datasets.py check --dataset pascal --root data/PASCALContext      # what is missing or wrong
    python datasets.py check --dataset rooms.py:Rooms                        # the same for your own data
    python datasets.py check --dataset rooms.py:Rooms --pictures a.png       # and see samples as training sees them

Every data set yields one dictionary per image:

    "image"     float32 (3, H, W)   RGB, normalised by IMAGE_MEAN and IMAGE_STD
    "semseg"    int64   (1, H, W)   class
    "parsing"   int64   (1, H, W)   body part, an index into PARTS
    "saliency"  int64   (1, H, W)   1 salient, 0 not
    "normal"    float32 (3, H, W)   unit vector in camera space: x right, y up, z towards the viewer
    "boundary"  float32 (1, H, W)   1 on a boundary, 0 elsewhere
    "depth"     float32 (1, H, W)   metres along the optical axis, as a depth camera gives it
    "name"      str
    "size"      (h, w)              of the image in the middle of (H, W), see centred; the rest is padding

It has the labels of the chosen tasks only. A task with a name of your own has the form of the one that it is like.
Cityscapes' labels are twice as large as its images, (2H, 2W). Its depth is disparity, in pixels. Unknown pixels are
IGNORE, 255, in maps of classes and NaN in maps of numbers. They count neither in losses nor in metrics.

Files of the benchmarks, as their archives have them:

    data/PASCALContext/                                data/NYUDv2/
      JPEGImages/ID.jpg                                  images/ID.png
      semseg/VOC12/ID.png, semseg/pascal-context/ID.png  segmentation/ID.png      0 ignored, 1..40 the classes
      human_parts/ID.mat                                 depth/ID.npy             metres, 0 unknown
      pascal-context/trainval/ID.mat   LabelMap          normals/ID.png
      normals_distill/ID.png                             edge/ID.png
      sal_distill/ID.png                                 gt_sets/{train,val}.txt
      ImageSets/Context/{train,val}.txt
    data/Cityscapes/{leftImg8bit,gtFine,disparity}/{train,val}/CITY/CITY_SSSSSS_FFFFFF_*.png
"""

# Order: the base of all data sets; Synthetic and its renderer; data sets of files; reading files; samples and their
# augmentation; the command; files, processes and signals, which evaluate.py and train.py use, too.

import abc
import argparse
import ast
import atexit
import inspect
import json
import os
import pickle
import re
import shutil
import signal
import sys
import tempfile
import threading
import traceback
from collections import Counter, defaultdict, namedtuple
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager, suppress
from functools import lru_cache, partial
from math import ceil, cos, inf, pi, sin
from multiprocessing import active_children, get_context, get_start_method, parent_process
from pathlib import Path

import numpy as np
import scipy.io
import torch
import torchvision
import torchvision.transforms.v2.functional as TF
from PIL import ExifTags, Image, ImageColor, ImageOps
from scipy import ndimage
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from metrics import IGNORE, Labels, Unfit, boundary_ground_truth, boundary_pixels, expect, find_class, plain, thin

IMAGE_MEAN = (0.485, 0.456, 0.406)
IMAGE_STD = (0.229, 0.224, 0.225)
PARTS = tuple("background, head, torso, upper arm, lower arm, upper leg, lower leg".split(", "))
HEAD, TORSO, UPPER_ARM, LOWER_ARM, UPPER_LEG, LOWER_LEG = range(1, 7)


class DenseDataset(Dataset):
    """The base of all data sets. The attributes of a class describe its data to all scripts."""

    TASKS = {}                   # output channels, or (like, channels), by task: see metrics.Labels
    CLASSES = {}                 # names of the classes by task; "class 0" and so on where there are none
    LABEL_IDS = {}               # official numbers of the classes by task, where files have others than 0, 1, 2, ...
    COLOURS = {}                 # (r, g, b) of the classes by task; PASCAL VOC's colours where there are none
    TITLES = {}                  # what pictures and tables call a task, where that is not its name
    UNITS = {}                   # unit of a task, where that is not its row's
    FLIP = True                  # whether training mirrors every other image
    FLIP_PAIRS = {}              # by task: pairs of classes that a mirror exchanges, ("left arm", "right arm")
    SCALES = 0.5, 2.0            # training enlarges an image by a factor between these
    BOUNDARY_TOLERANCE = None    # of odsF, as a fraction of the image's diagonal; without it odsF is not computed
    DEPTH_RANGE = None           # (low, high) of the depths that are scored, see metrics.Depth
    LABEL_SCALE = 1              # size of the labels relative to the image: MTMamba's output_scale
    SIZE = (480, 640)            # (H, W) of the samples, where none is given
    VAL_SIZE = None              # (H, W) of the samples to evaluate on; None: the size of the samples in training
    PAPER = {}                   # published scores {task: figure}, of the primary metrics, by (variant, encoder)
    SINGLE_TASK = {}             # the scores {task: figure} against which the paper's delta_m is taken
    RECIPE = {}                  # flags of train.py that it is trained with, dict(iterations=20_000, lr=3e-4)
    SHUFFLED = True              # whether training visits the images in a new order in each epoch
    folders = ()                 # folders that the data set reads; nothing may be written there
    REFERENCES = True            # whether the untrained model is scored beside a trained one
    UNIT_NORMALS = True          # whether normals that are far from unit length are ignored, see metrics.nearly_unit

    def __init_subclass__(cls):
        for name in vars(cls).keys() & {"SIZE", "VAL_SIZE", "SCALES", "RECIPE", "LABEL_SCALE", "BOUNDARY_TOLERANCE"}:
            value = plain(vars(cls)[name])    # numbers of numpy cannot be read from a checkpoint
            setattr(cls, name, tuple(value) if isinstance(value, list) else value)

    def __init__(self, size, tasks, seed, smallest=1):
        """size: (H, W) in pixels, each at least `smallest`; tasks: names from TASKS, None for all."""
        tasks = list(self.TASKS if tasks is None else tasks)
        expect(tasks and set(tasks) <= set(self.TASKS), f"tasks from {list(self.TASKS)}", tasks)
        self.labels = self.describe({task: self.TASKS[task] for task in tasks})
        self.tasks, self.kinds = self.labels.tasks, self.labels.kinds
        expect(len(size) == 2 and min(size) >= smallest, f"size (H, W) of at least {smallest} pixels", size)
        expect(0 < self.SCALES[0] <= self.SCALES[-1] < inf, "SCALES above 0, the smaller one first", self.SCALES)
        expect(0 <= (self.BOUNDARY_TOLERANCE or 0) <= 1, "BOUNDARY_TOLERANCE as a fraction", self.BOUNDARY_TOLERANCE)
        self.size, self.seed = tuple(map(int, size)), seed

    @classmethod
    def describe(cls, tasks: Mapping) -> Labels:
        """What the attributes of the class say of these tasks. Numbers of any type become plain ones."""
        chosen = {name: {task: plain(value) for task, value in getattr(cls, name.upper()).items() if task in tasks}
                  for name in ("classes", "colours", "titles", "units", "label_ids", "flip_pairs")}
        return Labels(dict(tasks), **chosen, depth_range=plain(cls.DEPTH_RANGE), unit_normals=bool(cls.UNIT_NORMALS))

    def __len__(self):
        return len(self.names)

    def refuse_folder(self, folder: Path):
        """Refuses to write to a folder that is one that the data set reads or lies in one."""
        for path in map(Path, self.folders):
            if folder.resolve().is_relative_to(path.resolve()):
                raise ValueError(f"{folder} lies in the data set's folder {path}; give another folder")


# Keeps a method's last result, such as a file that several labels need. It must not be changed in place.
kept = lru_cache(maxsize=1)


# ------------------------------------------------------------------------------------------------- synthetic scenes

class Synthetic(DenseDataset):
    """Ray-cast rooms and open grounds with objects and people, and exact labels for all six tasks.

    An image depends on (seed, index, size) alone. So any number of workers gives the same data, and two seeds give two
    disjoint splits.

    semseg     CLASSES. "floor" is also the ground outdoors, "wall" also a building.
    parsing    PARTS; 0 away from people. An image without people is ignored whole, as in PASCAL-Context.
    saliency   1 on spheres, boxes, cylinders and people.
    normal     unknown on the sky.
    boundary   1 where the instance differs from that of the right, lower or lower-right neighbour. An instance is a
               plane of a room, the ground, the sky, a building, an object or a whole person. Edges inside an instance,
               such as those between the faces of a box, are no boundary.
    depth      unknown on the sky; valid values are below FAR.
    """

    CLASSES = {"semseg": "floor wall ceiling sky sphere box cylinder person".split(), "parsing": PARTS}
    COLOURS = {"semseg": list(map(ImageColor.getrgb, (
        "#8c643c #aaaaaa #646ea0 #82bef0 #dc2828 #f0aa1e #28a046 #963caa").split()))}
    TASKS = {"semseg": 8, "parsing": len(PARTS), "saliency": 2, "normal": 3, "boundary": 1, "depth": 1}
    BOUNDARY_TOLERANCE = 0.02    # 4 pixels at 128x160
    SIZE = (128, 160)
    # The main job's. Rendering takes a tenth of the time; a worker would take a core from the network.
    RECIPE = dict(recipe="small", img_size=(64, 96), workers=0, eval_every=0)
    SHUFFLED = False             # every training image is new

    def __init__(self, count, size=SIZE, seed=0, tasks=None):
        """count: images; size: (H, W) in pixels, each at least 32; tasks: names from TASKS, None for all."""
        super().__init__(size, tasks, seed, smallest=32)
        self.set_length(count)

    @classmethod
    def open(cls, split, size=None, tasks=None, root=None, seed=0):
        """100 images. Even seeds are for training, odd ones for evaluation."""
        expect(root is None, "no folder, as the synthetic scenes need no files", root, "leave it out")
        return cls(100, size or cls.SIZE, 2 * seed if split == "train" else 1, tasks)

    def set_length(self, count: int):
        expect(count >= 1, "count of at least 1", count)
        self.names = [f"synthetic-{i:06d}" for i in range(count)]

    def __getitem__(self, index):
        name, maps = self.names[index], self.render(index)
        labels = {task: torch.tensor(maps[task]) for task in self.tasks}
        return {"image": normalised(torch.from_numpy(maps["image"])), **labels, "name": name, "size": self.size}

    def boundary_truth(self, index, task="boundary"):
        """The boundaries that odsF scores against: bool (H, W), the label thinned."""
        return thin(self.render(index)[task][0] > 0)

    @kept
    def render(self, index):
        """Image `index` in numpy: "image" (3, H, W) in 0..1, the labels of all tasks, "instance" int64 (H, W), and
        "rays" float32 (3, H, W), directions in camera space with z = -1: depth times ray is the point seen."""
        rng = np.random.default_rng([self.seed, index])
        camera = draw_camera(rng, *self.size)
        light, groups = draw_scene(rng, camera)
        solids = sum(groups, [])
        with np.errstate(divide="ignore", invalid="ignore"):    # a ray that misses gives nan or inf
            depth, normal, number = trace(camera, solids)
            image = shade(rng, camera, solids, light, depth, normal, number)
        table = np.array([(s.label, s.part, i) for i, group in enumerate(groups) for s in group])
        label, part, instance = np.take(table.T, number, axis=1)
        sky = label == SKY
        return dict(
            image=image, instance=instance, rays=camera.rays, semseg=label[None],
            parsing=(part if part.any() else np.full_like(part, IGNORE))[None],
            saliency=np.int64(label >= SPHERE)[None], boundary=np.float32(boundary_pixels(instance))[None],
            normal=np.where(sky, np.nan, rotate(camera.turn, normal)), depth=np.where(sky, np.nan, depth)[None])


# The renderer, in float32. World axes: x right, y up, the camera above the origin looks along -z; the floor is y = 0.

FLOOR, WALL, CEILING, SKY, SPHERE, BOX, CYLINDER, PERSON = range(8)    # Synthetic.CLASSES["semseg"]
FAR = 16.0                                                              # metres; where the ground ends
UP = np.array([0.0, 1.0, 0.0])
PAINTS = {    # mean RGB and spread. The ranges overlap, so a colour alone does not tell the class.
    "floor": (0.50, 0.41, 0.33, 0.20), "ground": (0.36, 0.42, 0.24, 0.15), "wall": (0.74, 0.70, 0.64, 0.20),
    "ceiling": (0.85, 0.85, 0.83, 0.10), "sky": (0.45, 0.65, 0.92, 0.10), "sphere": (0.70, 0.35, 0.32, 0.32),
    "box": (0.52, 0.42, 0.30, 0.32), "cylinder": (0.32, 0.50, 0.58, 0.32), "cloth": (0.42, 0.40, 0.50, 0.38),
    "hair": (0.30, 0.22, 0.16, 0.20),
}


# rays: (3, H, W) in camera axes, z = -1, so that depth times ray is the point seen; world: the same in world axes;
# turn: (3, 3) from world axes to camera axes; eye: (3,) in world axes; pixel: its width at depth 1
Camera = namedtuple("Camera", "rays world turn eye pixel")
# hit(origin, rays, *args) -> distance (H, W), normal (3, H, W); args: as columns gives them. The solid lies within
# `radius` of the segment between the two `ends`, (3,) each. label: class; paint: (15,), see draw_paint; part: of a body
Solid = namedtuple("Solid", "hit args ends radius label paint part", defaults=[0])


def draw_camera(rng, h, w):
    pixel = rng.uniform(0.9, 1.35) / h                           # vertical field of view 48 to 68 degrees
    y, x = np.mgrid[:h, :w]
    rays = np.float32([(x + 0.5 - w / 2) * pixel, (h / 2 - y - 0.5) * pixel, 0 * x - 1])
    pitch = rng.uniform(-0.30, 0.05)
    turn = np.array([[1, 0, 0], [0, cos(pitch), sin(pitch)], [0, -sin(pitch), cos(pitch)]])
    return Camera(rays, rotate(turn.T, rays), turn, rng.uniform(1.1, 1.9) * UP, pixel)


def draw_scene(rng, camera):
    """The unit vector towards the light, and the solids in lists, one list per instance. The first is the sky."""
    azimuth, rise = rng.uniform(-pi, pi), rng.uniform(0.7, 1.3)
    light = np.array([cos(azimuth) * cos(rise), sin(rise), sin(azimuth) * cos(rise)])
    axes = x, up, z = yaw(rng.uniform(-0.6, 0.6))
    groups = [[plane(SKY, 25.0 * UP, -UP, draw_paint(rng, "sky", x, z, 12.0))]]    # not met
    if rng.random() < 0.6:                                       # a room, the camera near its back wall
        half = rng.uniform((1.8, 1.15, 2.2), (4.0, 1.6, 4.0))
        back = np.array([rng.uniform(-1, 1) * (half[0] - 0.6), 0, half[2] - rng.uniform(0.4, 1.2)])
        centre = half[1] * UP - back @ axes
        groups += [[plane(FLOOR, 0 * UP, UP, draw_paint(rng, "floor", x, z, 0.8))],
                   [plane(CEILING, 2 * centre, -UP, draw_paint(rng, "ceiling", x, z, 0.8))]]
        for axis, width, across in ((x, half[0], z), (z, half[2], x)):
            paint = draw_paint(rng, "wall", across, up, 0.6)
            groups += [[plane(WALL, centre + side * width * axis, -side * axis, paint)] for side in (-1, 1)]
    else:
        half, centre = np.full(3, 9.0), np.array([0.0, 0.0, -9.0])
        groups.append([plane(FLOOR, 0 * UP, UP, draw_paint(rng, "ground", x, z, 1.5))])
        if rng.random() < 0.5:                                   # a building, behind everything else
            place = np.array([rng.uniform(-6, 6), 0, -rng.uniform(11, 16)])
            paint = draw_paint(rng, "wall", x + z, up, 1.0)
            groups.append([box(WALL, place, rng.uniform((2.0, 1.2, 1.0), (5.0, 2.5, 2.0)), axes, paint)])

    taken = []                                                   # (position, radius) of the footprints so far
    slope = float(camera.rays[0].max())                          # of the view's edge

    def draw_place(radius, near, far):
        """A free place on the floor in the room and in view, or None."""
        for _ in range(20):
            depth = rng.uniform(near, far)
            place = np.array([rng.uniform(-0.9, 0.9) * slope * depth, 0, -depth])
            inside = abs(axes @ (place - centre)) < half - radius
            if inside[::2].all() and all(np.hypot(*(place - p)[::2]) > radius + r for p, r in taken):
                taken.append((place, radius))
                return place

    for _ in range(rng.choice(4, p=(0.2, 0.4, 0.25, 0.15))):
        if (place := draw_place(0.45, 1.8, 4.2)) is not None:
            groups += draw_person(rng, place)
    for _ in range(rng.integers(2, 7)):
        radius = rng.uniform(0.15, 0.45)
        if (place := draw_place(radius, 2.0, 6.5)) is not None:
            groups.append([draw_object(rng, place, radius)])
    return light, groups


def draw_object(rng, place, radius):
    """A sphere, box or cylinder on the floor at `place`, its footprint within `radius`."""
    axes, height = yaw(rng.uniform(0, pi)), rng.uniform(0.3, 1.2)
    label = rng.integers(SPHERE, CYLINDER + 1)
    paint = draw_paint(rng, Synthetic.CLASSES["semseg"][label], axes[0] + axes[2], UP, 0.3)
    if label == BOX:
        return box(label, place, np.array([0.7 * radius, height / 2, radius * rng.uniform(0.4, 0.7)]), axes, paint)
    hit, low, high = (hit_capsule, radius, radius) if label == SPHERE else (hit_cylinder, 0, height)
    return rod(hit, (label, paint), radius, place + low * UP, place + high * UP)


def draw_person(rng, place):
    """The instances of one person: the body, and a seat if sitting."""
    right, _, forward = axes = yaw(rng.uniform(-pi, pi))
    sitting = rng.random() < 0.2
    shirt, trousers, shoes = (draw_paint(rng, "cloth", UP, right, 0.12) for _ in range(3))
    tone = np.array([0.93, 0.76, 0.64]) - rng.random() * np.array([0.57, 0.53, 0.48])
    skin = draw_paint(rng, (*tone, 0.04), UP, right, 0.2)
    hair = draw_paint(rng, "hair", UP, right, 0.1)
    sleeve, shin = (shirt if rng.random() < 0.4 else skin), (trousers if rng.random() < 0.7 else skin)

    spine = -limb(axes, rng.uniform(-0.25, 0.1), rng.uniform(-0.1, 0.1))
    neck, head, crown = 0.50 * spine, 0.69 * spine, 0.76 * spine - 0.03 * forward    # the pelvis is the origin
    bones = [(TORSO, 0.06, neck, head, skin),                    # part, radius, start, end, paint
             (HEAD, 0.105, head, head + 0.07 * spine, skin),
             (HEAD, 0.115, crown, crown, hair)]
    for side in (-right, right):
        swing, bend = rng.uniform(-0.6, 1.0) + 1.8 * (rng.random() < 0.2), rng.uniform(0.0, 1.8)
        spread = rng.uniform(0.05, 0.9) * (side @ right)
        shoulder = neck - 0.06 * spine + 0.19 * side
        elbow = shoulder + 0.29 * limb(axes, swing, spread)
        fore = limb(axes, swing + bend, spread * rng.uniform(-0.5, 1.0))
        wrist = elbow + 0.25 * fore
        bones += [(TORSO, 0.115, 0.08 * side, shoulder - 0.09 * side, shirt),
                  (UPPER_ARM, 0.058, shoulder, elbow, shirt),
                  (LOWER_ARM, 0.048, elbow, wrist, sleeve),
                  (LOWER_ARM, 0.055, wrist, wrist + 0.07 * fore, skin)]
        swing, bend = (1.45, rng.uniform(1.2, 1.7)) if sitting else (rng.uniform(-0.5, 0.7), rng.uniform(0.0, 0.8))
        spread = rng.uniform(0.0, 0.3) * (side @ right)
        knee = 0.08 * side + 0.43 * limb(axes, swing, spread)
        ankle = knee + 0.40 * limb(axes, swing - bend, 0.3 * spread)
        bones += [(UPPER_LEG, 0.085, 0.08 * side, knee, trousers),
                  (LOWER_LEG, 0.065, knee, ankle, shin),
                  (LOWER_LEG, 0.055, ankle, ankle + 0.14 * forward, shoes)]
    scale = rng.uniform(0.85, 1.1)
    pelvis = place - scale * min(min(a[1], b[1]) - r for _, r, a, b, _ in bones) * UP    # the lowest bone on the floor
    body = [rod(hit_capsule, (PERSON, paint, part), scale * r, pelvis + scale * a, pelvis + scale * b)
            for part, r, a, b, paint in bones]
    if not sitting:
        return [body]
    half = np.array([0.22, (pelvis[1] - 0.08 * scale) / 2, 0.22])
    return [body, [box(BOX, place, half, axes, draw_paint(rng, "box", right, UP, 0.3))]]


def limb(axes, swing, spread):
    """Unit vector: straight down at (0, 0), forward at swing pi/2; spread tilts it to the right."""
    right, up, forward = axes
    return sin(spread) * right + cos(spread) * (sin(swing) * forward - cos(swing) * up)


def draw_paint(rng, colour, across, along, scale):
    """A texture with features of about `scale` metres along two directions: two colours (3 + 3), mixed by the product
    of two plane waves (wave vector 3, phase 1, each) times their hardness (1). colour: a key or a row of PAINTS."""
    *mean, spread = PAINTS.get(colour, colour)
    first, other = np.clip(mean + rng.uniform(-spread, spread, (2, 3)), 0.03, 0.97)
    other = first + rng.uniform(0.1, 0.6) * (other - first)
    waves = pi / (scale * rng.uniform(0.6, 1.6, (2, 1))) * np.stack([across, along])
    phases, hardness = rng.uniform(0, 2 * pi, 2), 8.0            # as it stands, a checkerboard
    kind = "checker plain stripes blotches".split()[rng.integers(4)]
    if kind == "plain":
        other = first
    elif kind == "stripes":
        waves[1], phases[1] = 0, pi / 2
    elif kind == "blotches":
        waves, hardness = pi / scale * rng.uniform(-1, 1, (2, 3)), 1.0
    return np.array([*first, *other, *waves[0], phases[0], *waves[1], phases[1], hardness])


def plane(label, point, normal, paint):
    return Solid(hit_plane, columns(point, normal), (point, point), inf, label, paint)


def box(label, place, half, axes, paint):
    """A box on the floor at `place`, `half` its widths along the rows of `axes`, the second of which is UP."""
    args = columns(place + half[1] * UP, half, axes)
    return Solid(hit_box, args, (place, place + 2 * half[1] * UP), np.hypot(half[0], half[2]), label, paint)


def rod(hit, kind, radius, start, end):
    """A capsule, all points within `radius` of the segment from `start` to `end` (a sphere where the two are one), or a
    cylinder between these points, by `hit`. kind: label, paint and part."""
    length = np.linalg.norm(end - start)
    axis = (end - start) / length if length else UP
    return Solid(hit, columns(start, axis, length, radius), (start, end), radius, *kind)


def trace(camera, solids):
    """The nearest solid of each pixel: its depth (H, W), its normal (3, H, W) in world axes, its number (H, W). A ray
    that meets nothing within FAR sees the sky: number 0, depth FAR, normal 0."""
    depth = np.full(camera.rays.shape[1:], FAR, np.float32)
    normal = np.zeros_like(camera.rays)
    number = np.zeros(depth.shape, np.int64)
    origin, = columns(camera.eye)
    for i, (y, x) in list(enumerate(bounds(camera, solids)))[1:]:
        t, n = solids[i].hit(origin, camera.world[:, y, x], *solids[i].args)
        nearer = (t > 0) & (t < depth[y, x])
        for found, value in (depth[y, x], t), (normal[:, y, x], n), (number[y, x], i):
            np.copyto(found, value, where=nearer)
    return depth, normal, number


def shade(rng, camera, solids, light, depth, normal, number):
    """The photograph (3, H, W) in 0..1: textures, sun and sky light, shadows on the floor, exposure and noise."""
    eye, light_ray = columns(camera.eye, light)
    points = eye + depth * camera.world
    floor = np.array([s.label == FLOOR for s in solids])[number]
    sun = np.maximum(dot(light_ray, normal), 0)
    for solid, (y, x) in zip(solids, bounds(camera, solids, light)):    # on the floor only, to show what stands where
        if solid.hit is not hit_plane and floor[y, x].any():
            t, _ = solid.hit(points[:, y, x], light_ray, *solid.args)
            sun[y, x][(t > 0) & floor[y, x]] = 0
    lamp = np.float32(rng.uniform(0.35, 0.65))
    glow = (1 - lamp) * (0.8 + 0.2 * normal[1]) + lamp * sun
    glow[number == 0] = 0.7                                      # the sky shines by itself
    gain = np.float32(rng.uniform(1.1, 1.7) * rng.uniform(0.93, 1.07, (3, 1, 1)))    # exposure and white balance

    paint = np.take(np.float32([s.paint for s in solids]).T, number, axis=1)         # (15, H, W)
    waves = np.sin(dot(paint[6:9], points) + paint[9]) * np.sin(dot(paint[10:13], points) + paint[13])
    mix = 0.5 + 0.5 * np.clip(paint[14] * waves, -1, 1)
    image = (paint[:3] + mix * (paint[3:6] - paint[:3])) * glow * gain
    image += np.float32(rng.uniform(0.005, 0.03)) * rng.standard_normal(image.shape, np.float32)
    return np.clip(image, 0, 1)


def bounds(camera, solids, light=None):
    """Slices (rows, columns) for each solid, inside which all of its image lies. With light: all of its shadow."""
    size, outward = np.reshape(camera.rays.shape[1:], (2, 1)), np.reshape([-1, 1], (2, 1, 1))
    ends, radius = np.array([s.ends for s in solids]), np.array([s.radius for s in solids])    # (n, 2, 3), (n,)
    if light is not None:                                        # a ball's shadow on the floor lies within
        ends = ends - ends[..., 1:2] * light / light[1]          # radius / light[1] of its centre's shadow
        radius = radius / light[1]
    x, y, z = ((ends - camera.eye) @ camera.turn.T).T            # (2, n) each
    side = np.stack([-y, x])                                     # (2, 2, n): axis of the image, end, solid
    angle, width = np.arctan2(side, -z), np.arcsin(radius / np.hypot(side, z))
    edges = np.tan([(angle - width).min(1), (angle + width).max(1)])    # (2, 2, n): low and high, axis, solid
    near = (-z < radius + 0.05).any(0)                           # reaches behind the camera: may be anywhere
    edges = size / 2 + np.where(near, outward * inf, edges) / camera.pixel + outward
    return [(slice(top, bottom + 1), slice(left, right + 1))
            for (top, bottom), (left, right) in edges.clip(0, size).astype(int).T]


# Intersections. Each takes origin (3, 1, 1) or (3, H, W), rays (3, H, W) or (3, 1, 1) of any length, and a solid. It
# returns the distance (H, W) in units of the ray's length and the outward unit normal (3, H, W). Without a hit ahead
# the distance is nan or negative and the normal has no meaning. The origin must be outside the solid.

def hit_plane(origin, rays, point, normal):
    return dot(point - origin, normal) / dot(rays, normal), normal


def hit_box(origin, rays, centre, half, axes):
    offset, rays = rotate(axes, centre - origin), rotate(axes, rays)
    reach = np.copysign(half, rays)
    enter, leave = (offset - reach) / rays, (offset + reach) / rays    # (3, H, W) for the three pairs of faces
    t = enter.max(0)
    normal = (enter == t) * -np.sign(rays)
    return np.where(t < leave.min(0), t, np.nan), rotate(axes.swapaxes(0, 1), normal)


def hit_cylinder(origin, rays, base, axis, length, radius):
    offset, rise = base - origin, dot(axis, rays)
    foot = dot(axis, offset)
    across, offset = rays - axis * rise, offset - axis * foot
    near, far = hit_ball(offset, across, radius)
    low, high = np.sort([foot / rise, (foot + length) / rise], axis=0)
    t = np.maximum(near, low)
    normal = np.where(near > low, (t * across - offset) / radius, -np.sign(rise) * axis)
    return np.where(t < np.minimum(far, high), t, np.nan), normal


def hit_capsule(origin, rays, start, axis, length, radius):
    """The ray enters the endless cylinder somewhere. The point of the segment that is nearest to this place is the
    centre of a sphere; where the ray enters that, it enters the capsule."""
    offset, rise = start - origin, dot(axis, rays)
    foot = dot(axis, offset)
    near, _ = hit_ball(offset - axis * foot, rays - axis * rise, radius)
    offset = offset + axis * np.clip(near * rise - foot, 0, length)
    near, _ = hit_ball(offset, rays, radius)
    return near, (near * rays - offset) / radius


def hit_ball(offset, rays, radius):
    """Where rays enter and leave |t * rays - offset| < radius, computed from the point of closest approach. With the
    textbook's discriminant, float32 rounding would lose a thin limb at ten metres."""
    square = dot(rays, rays)
    middle = dot(offset, rays) / square
    gap = middle * rays - offset
    half = np.sqrt((radius * radius - dot(gap, gap)) / square)
    return middle - half, middle + half


def dot(a, b):
    return a[0] * b[0] + a[1] * b[1] + a[2] * b[2]


def rotate(matrix, vectors):
    """matrix (3, 3) or (3, 3, 1, 1) times vectors (3, H, W). Not by BLAS: its rounding may change with the threads."""
    return np.stack([dot(row, vectors) for row in np.float32(matrix)])


def yaw(angle):
    """Axes x, up, z as rows, turned about the vertical."""
    return np.array([[cos(angle), 0, sin(angle)], UP, [-sin(angle), 0, cos(angle)]])


def columns(*values):
    """Numbers, vectors and matrices in the shapes (1, 1), (3, 1, 1), (3, 3, 1, 1), to be combined with maps."""
    return [np.float32(value)[..., None, None] for value in values]


# ------------------------------------------------------------- your own data, PASCAL-Context, NYUDv2, Cityscapes

class LabelledDataset(DenseDataset, abc.ABC):
    """Images and their labels: checks, augments, normalises and pads what `read` returns. Subclass it for your own
    data: give TASKS, list_names and read. The scripts take it as `--dataset path/to/file.py:Class`.

    dataset[index] is the sample of epoch 0, dataset[epoch, index] that of any epoch (a sampler may yield such pairs).
    What augmentation draws is a pure function of (seed, epoch, index), so workers and ranks change nothing.
    Without augmentation the image keeps its scale. It is padded to `size` on all sides (image 0, labels unknown). A
    side that is longer than that is padded to the next multiple of 32."""

    source = None    # the file or folder that list_names reads, if there is one, for messages

    def __init__(self, split="train", size=None, tasks=None, seed=0):
        """split: "train", "val" or whatever list_names knows; size: (H, W) of the samples in pixels, None for SIZE;
        tasks: names from TASKS, None for all; seed: of augmentation."""
        super().__init__(size or self.SIZE, tasks, seed)
        self.split, self.augment = split, split == "train" and self.LABEL_SCALE == 1
        self.cropped_by = next((task for task, kind in self.describe(self.TASKS).kinds.items()
                                if kind.unknown == IGNORE and not kind.binary), "")
        self._listed = list(self.list_names())    # what read takes
        with about(self.source or f"{type(self).__name__}, split {split!r}"):
            self.names = file_names(self._listed)

    @classmethod
    def open(cls, split, size=None, tasks=None, root=None, seed=0):
        """The data set as the scripts use it. root: of its files, for a class whose __init__ takes it."""
        wanted = inspect.signature(cls).parameters.get("root")
        expect(wanted or root is None, f"no folder, as {cls.__name__} knows its files itself", root, "leave it out")
        expect(root or not wanted or wanted.default is not wanted.empty, f"{cls.__name__}'s folder", root, "name it")
        return cls(split=split, size=size, tasks=tasks, seed=seed, **({"root": root} if root else {}))

    @abc.abstractmethod
    def list_names(self) -> Sequence[str]:
        """The names of the split's images, in the order of the data set, the same in each process. Files of predictions
        get these names. So each name is unique; it may have folders, "kitchen/0001"."""

    @abc.abstractmethod
    def read(self, name: str) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """The image, uint8 (h, w, 3), and its labels by task. name: an item of list_names. A label has the form that
        its kind takes (see metrics.py), or is a function that returns one. Where an image has no label of a task, leave
        the task out or give None. If a file is damaged, raise OSError or ValueError and name the file."""

    def __getitem__(self, index):
        """The dictionary of the module's docstring. index: an int, or (epoch, index)."""
        epoch, index = index if isinstance(index, tuple) else (0, index)
        image, labels = self.load(index)[0], {task: self.label(index, task) for task in self.tasks}
        if self.augment:
            image, labels = augment(image, labels, self, np.random.default_rng([self.seed, epoch, index]))
        else:
            image = to_tensor(image)
        inner = tuple(image.shape[1:])
        outer = tuple(length if n <= length else -n // 32 * -32 for n, length in zip(inner, self.size))
        image = pad(normalised(image).numpy(), outer, inner, 0)
        labels = {task: pad(label, outer, inner, self.kinds[task].unknown).to(self.kinds[task].dtype)
                  for task, label in labels.items()}
        return {"image": image, **labels, "name": self.names[index], "size": inner}

    @kept
    def load(self, index: int) -> tuple[np.ndarray, dict]:
        """What `read` gives; the image is checked."""
        image, labels = self.read(self._listed[index])
        image = np.require(image, requirements="CW")    # torch takes no other arrays
        found = f"{image.dtype} {image.shape}"
        with about(self.names[index]):
            expect(image.shape[2:] == (3,) and image.dtype == np.uint8, "an image of uint8 (h, w, 3)", found)
        return image, labels

    def label(self, index: int, task: str) -> np.ndarray:
        """A label, checked, as Kind.check returns it."""
        image, labels = self.load(index)
        label, size = labels.get(task), tuple(self.LABEL_SCALE * n for n in image.shape[:2])
        label = label() if callable(label) else label
        with about(f"{self.names[index]}, {task}"):
            return self.kinds[task].check(label, size)

    def boundary_truth(self, index: int, task: str = "boundary") -> np.ndarray:
        """The boundaries that odsF scores against: bool (h, w), at the image's own size; here the label, thinned."""
        return thin(self.label(index, task)[0] == 1)

    def check(self, batch: list[int]) -> dict[str, str | np.ndarray]:
        """Of an image, given as [index], and its labels: by "image" and by task, what is wrong, or Kind.examples."""
        index, = batch
        found, examples, name = {}, {}, self.names[index]
        for what in ("image", *self.tasks):
            try:
                self.load(index)
                if what != "image":
                    examples[what] = self.kinds[what].examples(self.label(index, what))
            except Exception as error:
                if not is_deliberate(error):
                    raise
                found.setdefault(str(error) if name in str(error) else f"{name}: {error}", what)
        return examples | {what: message for message, what in found.items()}    # two labels may come from one file


def file_names(names: Iterable) -> list[str]:
    """The names as text. Each must be a possible name of a file below a folder, and occur once."""
    paths = [Path(str(name)) for name in names]
    expect(paths, "names of images", "none")
    for path in paths:
        possible = path.parts and not path.anchor and ".." not in path.parts and not re.search(
            "[\0-\x1f\x7f-\x9f\ud800-\udfff]", str(path)) and max(len(part.encode()) for part in path.parts) <= 240
        expect(possible, "names for files below a folder, of up to 240 bytes", repr(path.as_posix()))
    path, count = Counter(paths).most_common(1)[0]
    expect(count == 1, "a name of its own for each image", f"{str(path)!r} {count} times")
    return [path.as_posix() for path in paths]


class FileDataset(LabelledDataset):
    """A folder of files, a list of each split's images, and what lies where. A label that is not simply what its file
    holds has a method, read_semseg(name) and so on. Each file is checked when it is read."""

    FILES = {}              # path of "image" and of each label, role (see read_image; of a .mat file: the variable) and
    #                         highest value, where it is checked. {} is the image's ID, {city} what it starts with
    LIST = ""               # the file with a split's image IDs, one per line
    COUNTS = {}             # images by split, as published
    ROOT = ""               # folder, where none is given
    REFERENCES = False      # scoring them takes hours, and most benchmarks have published figures
    UNIT_NORMALS = False    # as in the published runs

    def __init__(self, root=None, split="train", tasks=None, size=None, seed=0):
        """As LabelledDataset; root: folder."""
        self.root = Path(root or self.ROOT).expanduser()
        self.folders, self.source = (self.root,), self.root / self.LIST.format(split)
        if not self.root.is_dir():
            raise FileNotFoundError(f"no folder {self.root}; unpack {type(self).__name__} there or name another one")
        super().__init__(split, size, tasks, seed=seed)

    def list_names(self):
        """The image IDs in a list: UTF-8, one per line."""
        with reading(self.source):
            lines = map(str.strip, self.source.read_text("utf-8-sig").split("\n"))
        return list(filter(None, lines))

    def path(self, what: str, name: str) -> Path:
        """The file of "image" or of a label."""
        return self.root / self.FILES[what][0].format(name, split=self.split, city=name.split("_")[0])

    def read(self, name):
        readers = {task: getattr(self, f"read_{task}", partial(self.read_label, task)) for task in self.tasks}
        return self.picture(name), {task: partial(reader, name) for task, reader in readers.items()}

    @kept
    def picture(self, name: str) -> np.ndarray:
        """The image, uint8 (h, w, 3)."""
        return read_image(self.path("image", name))

    @kept
    def read_label(self, what: str, name: str) -> np.ndarray:
        """A label as it is in its file. It must have the image's size and no value above the highest in FILES."""
        path, size = self.path(what, name), self.picture(name).shape[:2]
        _, role, *last = self.FILES[what]
        label = read_image(path, role) if path.suffix == ".png" else read_array(path, role)
        with about(path):
            found = label.shape[1:] if role == "normal" else label.shape
            expect(found == size, f"the image's size {size}", found)
            if last:
                right = (label >= 0) & (label <= last[0])    # false for nan
                expect(right.all(), f"values in 0..{last[0]}", label[~right])
        return label

    def check_split(self) -> list[str]:
        """What is wrong with the split as a whole."""
        exported = all(name.startswith("synthetic_") for name in self.names)    # tests/archives.py, any number
        if exported or len(self) == self.COUNTS[self.split]:
            return []
        return [f"{self.source}: expected {self.COUNTS[self.split]} images, found {len(self)}"]


def paper_rows(tasks: Iterable[str], table: str) -> dict:
    """The attribute PAPER. A line has variant, encoder, the figures in the order of the tasks, and their source."""
    rows = map(str.split, table.strip().splitlines())
    return {(variant, encoder): dict(zip(tasks, map(float, figures))) for variant, encoder, *figures in rows}


class PascalContext(FileDataset):
    """PASCAL-Context with the labels of the multi-task literature: 4,998 images to train on, 5,105 to validate.

    semseg     PASCAL VOC's 20 classes and background 0.
    parsing    PARTS; an image in which no part of a person is marked is ignored whole. Where masks overlap, the part
               that is listed last counts.
    saliency   1 where the distilled map is above 127. Maps of 0 and 1 and other masks are read as read_image does it.
    normal     distilled, of any length. Known only in those of LabelMap's 459 classes that also exist indoors (INDOOR),
               IGNORE elsewhere.
    boundary   where the 4-neighbour Laplacian of LabelMap, mirrored at the border, is not 0, thinned. This is the label
               to train on; odsF scores against another map, boundary_truth.
    """

    TASKS = {"semseg": 21, "parsing": len(PARTS), "saliency": 2, "normal": 3, "boundary": 1}
    CLASSES = {"parsing": PARTS, "semseg": ("background aeroplane bicycle bird boat bottle bus car cat chair cow "
               "diningtable dog horse motorbike person pottedplant sheep sofa train tvmonitor").split()}
    BOUNDARY_TOLERANCE = 0.0075
    PAPER = paper_rows(TASKS, "mtmamba swin-large 81.11 72.62 84.14 14.14 78.80 Table 1")
    FILES = {"image": ("JPEGImages/{}.jpg",), "semseg": ("semseg/pascal-context/{}.png", "classes"),
             "semseg of VOC": ("semseg/VOC12/{}.png", "classes"), "parsing": ("human_parts/{}.mat", "anno"),
             "saliency": ("sal_distill/{}.png", "soft mask"), "normal": ("normals_distill/{}.png", "normal"),
             "boundary": ("pascal-context/trainval/{}.mat", "LabelMap", 459)}
    COUNTS = {"train": 4998, "val": 5105}
    LIST = "ImageSets/Context/{}.txt"
    ROOT = "data/PASCALContext"
    SIZE = VAL_SIZE = (512, 512)
    RECIPE = dict(eval_every=5000)

    def read_semseg(self, name):
        in_voc = self.path("semseg of VOC", name).exists()
        return self.read_label("semseg of VOC" if in_voc else "semseg", name)

    def read_parsing(self, name):
        path, label = self.path("parsing", name), np.zeros(self.picture(name).shape[:2], np.uint8)
        anno = read_array(path, "anno")
        with reading(path):    # whose structure may be another
            for thing in anno["objects"][0, 0].ravel():
                if thing["class_ind"].item() == PERSON_INDEX:
                    for part in thing["parts"].ravel():
                        label[part["mask"] > 0] = PART_NAMES[part["part_name"].item()]
        return label if label.any() else np.full_like(label, IGNORE)

    def read_normal(self, name):
        normal = self.read_label("normal", name)    # before the map, which read_boundary finds kept
        return np.where(INDOOR[self.read_label("boundary", name).astype(np.int32)], normal, np.nan)

    def read_boundary(self, name):
        label_map = self.read_label("boundary", name).astype(np.int32)    # 459 classes from 1
        return thin(ndimage.laplace(label_map, mode="mirror") != 0)

    def boundary_truth(self, index, task="boundary"):
        return boundary_ground_truth(self.read_label("boundary", self.names[index]))


class NYUDv2(FileDataset):
    """NYUDv2: 795 images to train on, 654 to validate, 425x560 each.

    semseg     40 classes: 1..40 in the file are 0..39 here, 0 there is IGNORE here.
    depth      metres; 0 in the file is IGNORE here.
    normal     as in the file, of any length.
    boundary   the edge image, as it is.
    """

    TASKS = {"semseg": 40, "depth": 1, "normal": 3, "boundary": 1}
    CLASSES = {"semseg": (
        "wall, floor, cabinet, bed, chair, sofa, table, door, window, bookshelf, picture, counter, blinds, desk, "
        "shelves, curtain, dresser, pillow, mirror, floor mat, clothes, ceiling, books, refrigerator, television, "
        "paper, towel, shower curtain, box, whiteboard, person, night stand, toilet, sink, lamp, bathtub, bag, "
        "other structure, other furniture, other prop").split(", ")}
    LABEL_IDS = {"semseg": range(1, 41)}
    BOUNDARY_TOLERANCE = 0.011
    # Table 5 is read as its text says: g = 0 is the task's own feature, g = 1 the shared one. By Eq. 24 it would be the
    # other way round. MTMamba++'s row is second-hand, from publications that compare with it.
    PAPER = paper_rows(TASKS, """
        mtmamba          swin-large  55.82  0.5066  18.63  78.70  Tables 1 to 6
        mtmamba          swin-base   53.62  0.5126  19.28  77.70  Table 6
        mtmamba          swin-small  51.93  0.5246  19.45  77.80  Table 6
        mtmamba          swin-tiny   49.25  0.5299  19.74  76.90  Table 6
        swin-single-task swin-large  54.32  0.5166  19.21  77.30  Table 2
        swin-multi-task  swin-large  53.72  0.5239  19.97  76.50  Table 2
        stm1             swin-large  54.61  0.5059  19.00  77.40  Table 2
        stm2             swin-large  54.66  0.4984  18.81  78.20  Table 2
        stm3             swin-large  54.75  0.5054  18.81  78.20  Table 2
        mfe-wmsa         swin-large  54.57  0.5109  19.95  76.60  Table 3
        gate-wmsa        swin-large  55.01  0.4990  18.73  78.20  Table 4
        fusion-specific  swin-large  55.37  0.5087  18.76  78.30  Table 5
        fusion-shared    swin-large  54.50  0.4981  18.83  78.20  Table 5
        mtmamba++        swin-large  57.01  0.4818  18.27  79.40  M2H, arXiv 2510.17363""")
    SINGLE_TASK = PAPER["swin-single-task", "swin-large"]
    FILES = {"image": ("images/{}.png",), "semseg": ("segmentation/{}.png", "classes", 40),
             "depth": ("depth/{}.npy", "depth", 100),    # not millimetres
             "normal": ("normals/{}.png", "normal"), "boundary": ("edge/{}.png", "mask")}
    COUNTS = {"train": 795, "val": 654}
    LIST = "gt_sets/{}.txt"
    ROOT = "data/NYUDv2"
    SIZE = VAL_SIZE = (448, 576)

    def read_semseg(self, name):
        return self.read_label("semseg", name).astype(np.uint8) - np.uint8(1)    # 0 becomes IGNORE by wrapping around

    def boundary_truth(self, index, task="boundary"):
        return boundary_ground_truth(self.label(index, task)[0])


CITYSCAPES = torchvision.datasets.Cityscapes.classes[:34]    # by label ID
SCORED = [entry for entry in CITYSCAPES if entry.train_id != IGNORE]
CLASS_BY_ID = np.uint8([entry.train_id for entry in CITYSCAPES])


class Cityscapes(FileDataset):
    """Cityscapes: 2,975 images to train on, 500 to validate, 1024x2048 each. A split is the images in its folder.

    As in the published runs, the network gets the image at half its size (`size`; Pillow's bilinear filter), labels
    keep their size, and nothing is cropped, flipped or recoloured.

    semseg     19 classes; all other label IDs are IGNORE.
    depth      disparity in pixels of the file's image: (p - 1) / 256, where p are its 16 bits. It is -1 where p is 0
               or 1, which means not measured, and 0 on label ID 10, rail track. Only values inside DEPTH_RANGE are
               scored, but all of them train; mask_invalid makes those at -1 unknown.
    """

    TASKS = {"semseg": 19, "depth": 1}
    LABEL_IDS = {"semseg": [entry.id for entry in SCORED]}
    COLOURS = {"semseg": [entry.color for entry in SCORED]}
    CLASSES = {"semseg": [entry.name for entry in SCORED]}
    TITLES, UNITS = {"depth": "disparity"}, {"depth": " px"}
    LABEL_SCALE = 2
    DEPTH_RANGE = (0, 80)
    FILES = {"image": ("leftImg8bit/{split}/{city}/{}_leftImg8bit.png",),
             "semseg": ("gtFine/{split}/{city}/{}_gtFine_labelIds.png", "classes", 33),
             "depth": ("disparity/{split}/{city}/{}_disparity.png", "classes")}
    COUNTS = {"train": 2975, "val": 500}
    LIST = "leftImg8bit/{}"
    ROOT = "data/Cityscapes"
    SIZE = (512, 1024)

    def __init__(self, root=None, split="train", tasks=None, size=None, seed=0, mask_invalid=False):
        super().__init__(root, split, tasks, size, seed)
        self.mask_invalid = mask_invalid

    def list_names(self):
        suffix = "_leftImg8bit.png"
        return sorted(path.name.removesuffix(suffix) for path in self.source.glob(f"*/[!.]*{suffix}"))

    def read(self, name):
        image, labels = super().read(name)
        twice = tuple(2 * n for n in self.size)
        with about(self.path("image", name)):
            expect(image.shape[:2] == twice, f"an image of the size {twice}, twice that of the network's input",
                   image.shape[:2], "give half the images' size as --img-size or size")
        return np.array(Image.fromarray(image).resize(self.size[::-1], Image.Resampling.BILINEAR)), labels

    def label(self, index, task):
        """Not checked as other labels are: disparities of 0 and -1 train, too."""
        return self.load(index)[1][task]()[None]

    def read_semseg(self, name):
        return CLASS_BY_ID[self.read_label("semseg", name)]

    def read_depth(self, name):
        rail_track = self.read_label("semseg", name) == 10    # first, as read_semseg leaves the file kept
        stored = self.read_label("depth", name)
        with about(self.path("depth", name)):
            expect(stored.dtype != np.uint8, "16 bits per pixel", 8)
        invalid = np.float32(np.nan if self.mask_invalid else -1)
        disparity = np.where(stored > 1, (stored.astype(np.float32) - 1) / 256, invalid)
        return np.where(rail_track, np.float32(0), disparity)

    def check_split(self):
        with suppress(OSError, ValueError):    # which are reported with the image
            if not any(self.read_label("semseg", name).max() > 18 for name in self.names):
                return [f"{self.root / 'gtFine' / self.split}: expected label IDs up to 33, found none above 18, as in "
                        "files of train IDs; take the archive's files *_labelIds.png"]
        return super().check_split()


PERSON_INDEX = 15                   # class_ind of a person in human_parts
PART_NAMES = {name: part for part, names in enumerate((
    "hair head lear rear lebrow rebrow leye reye mouth nose", "neck torso", "luarm ruarm", "llarm rlarm lhand rhand",
    "luleg ruleg", "llleg rlleg lfoot rfoot"), start=HEAD) for name in names.split()}
INDOOR = np.isin(np.arange(460), np.array("""
    3 4 6 9 10 11 13 15 17 18 22 23 29 30 33 34 36 37 38 39 41 43 46 49 50 51 53 55 56 59 61 62 65 66 68 69 72 73 78
    83 84 85 87 88 95 96 101 104 105 107 111 113 115 122 124 135 141 142 143 146 150 154 157 158 159 165 172 174 181
    183 184 191 193 195 197 199 202 213 215 216 219 220 223 225 228 230 232 233 238 239 242 243 246 250 251 252 255
    260 261 263 269 272 273 275 281 283 284 285 286 287 288 290 291 292 293 295 304 307 309 310 314 315 319 323 329
    330 331 336 342 345 349 350 351 352 355 357 368 370 371 374 379 380 383 384 397 401 403 405 407 408 411 412 413
    414 417 419 421 423 427 429 430 432 440 441 442 443 444 446 454 457""".split(), int))    # by class of LabelMap

DATASETS = {"synthetic": Synthetic, "pascal": PascalContext, "nyud": NYUDv2, "cityscapes": Cityscapes}


def find_dataset_class(name: str, said_by: object = None) -> type[DenseDataset]:
    """A class of DATASETS by its name, or a subclass of LabelledDataset by "path/to/file.py:Class". said_by: the file
    that gives the name, where the user does not, see find_class."""
    if name in DATASETS:
        return DATASETS[name]
    expect(".py:" in name, f"a data set from {list(DATASETS)} or path/to/file.py:Class", repr(name))
    return find_class(name, LabelledDataset, said_by)


# ---------------------------------------------------------------------------------------------------- reading files

@contextmanager
def about(what: object):
    """Adds to an Unfit which file or label it is about."""
    try:
        yield
    except Unfit as error:
        raise ValueError(f"{what}: {error}") from error


@contextmanager
def reading(path: Path):
    """Names the file where a library cannot read it, or where what it read has another structure."""
    try:
        yield
    except FileNotFoundError as error:
        raise FileNotFoundError(f"no file {path}; restore it from its archive") from error
    except Exception as error:    # on damaged files they raise many kinds
        raise ValueError(f"unreadable file {path} ({type(error).__name__}: {error}); restore it") from error


def read_image(path: Path, role: str = "picture", turn: bool = False) -> np.ndarray:
    """The pixels of an image file, by what they mean:

    picture     uint8 (h, w, 3), RGB: of 16 bits the upper 8, transparent parts white, of several frames the first;
                colour profiles are not applied
    classes     integers (h, w): grey of 8 or 16 bits as it is stored, of a palette the indices
    mask        uint8 (h, w), 0 and 1: from 0 and 1, 0 and 255 (65535), 1 bit, or a palette's black and white or 0 and 1
    soft mask   the same, and from grey in more than 32 steps: 1 above 127
    normal      float32 (3, h, w): 2 p / 255 - 1 of red, green and blue

    turn: whether to turn a picture upright if its EXIF data ask for it. Without it such a picture is refused, as nobody
    knows which way up its labels are. Errors name the file."""
    with reading(path), Image.open(path) as image:
        layout = str(image.tile[0][3]) if image.tile else ""    # Pillow's name of it, such as "L;4" for grey of 4 bits
        turned = image.getexif().get(ExifTags.Base.Orientation) in range(2, 9)
        frames = getattr(image, "n_frames", 1)
        image.load()
    with about(path):
        expect(turn or not turned, "an upright image", "EXIF data that turn it", "save it turned, without them")
        if role == "picture":
            return to_rgb(image)
        expect(frames == 1, "one frame", frames)
        lossless = image.format in ("PNG", "TIFF", "BMP") and image.info.get("compression") != "jpeg"
        expect(lossless, "a label without loss, of PNG, TIFF or BMP", image.format)
        white = getattr(image, "tag_v2", {}).get(ExifTags.Base.PhotometricInterpretation) == 0    # of TIFF: 0 is white
        as_is = not white and not re.match(r"\W*L;[24]", layout)
        expect(as_is, "8 or 16 bits per pixel, 0 as black, or a palette", f"the layout {layout}")
        pixels = np.array(image)
        if role == "normal":
            expect(image.mode == "RGB", "three channels, RGB", f"mode {image.mode}")
            return np.ascontiguousarray(pixels.transpose(2, 0, 1)) * np.float32(2 / 255) - np.float32(1)
        if role == "classes":
            expect(image.mode in ("L", "P") or image.mode[0] == "I", "one channel of integers", f"mode {image.mode}")
            return pixels
        colours = np.array(image.convert("RGB")) if image.mode == "P" else pixels
        if colours.ndim == 3 and (colours == colours[..., :1]).all() and np.isin(colours, (0, 255)).all():
            pixels = colours[..., 0]    # black and white
        expect(pixels.ndim == 2 and image.mode != "F", "one channel", f"mode {image.mode}")
        highest = pixels.max()
        if highest in (0, 1, 255, 65535) and ((pixels == 0) | (pixels == highest)).all():
            return (pixels > 0).astype(np.uint8)
        values = np.unique(pixels).tolist()
        soft = role == "soft mask" and image.mode == "L" and len(values) > 32
        expect(soft, "0 and 1 or 0 and 255", f"{str(values[:6])[1:-1]}{', ...' * (len(values) > 6)}")
        return (pixels > 127).astype(np.uint8)


def to_rgb(image: Image.Image) -> np.ndarray:
    """A loaded picture, upright, uint8 (h, w, 3). Of 16 bits in colour Pillow itself gives the upper 8."""
    grey16 = image.format == "PNG" and image.mode[0] == "I"
    expect(grey16 or image.mode[0] not in "IF", "8 bits per channel", f"mode {image.mode} of {image.format}")
    image = ImageOps.exif_transpose(image)
    if grey16:
        image = Image.fromarray((np.array(image) >> 8).astype(np.uint8))
    if image.mode[-1] in "Aa" or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return np.array(image.convert("RGB"))


def read_array(path: Path, variable: str) -> np.ndarray:
    """The array in a .npy file, or the variable in a MATLAB file. Structures become nested object arrays."""
    with reading(path), open(path, "rb") as file:
        return np.load(file) if path.suffix == ".npy" else scipy.io.loadmat(file, variable_names=[variable])[variable]


# ------------------------------------------------------------------------------------------------ from files to samples

def check_samples(dataset: DenseDataset, workers: int = 0) -> list[str]:
    """A message for each task without a labelled pixel in the first 16 samples, and for each binary task without a
    positive one. Raises what the data set raises. workers: see fetch."""
    samples = fetch(dataset, range(len(dataset))[:16], workers)
    messages = []
    for task, kind in dataset.kinds.items():
        if not any(kind.teaches(sample[task][None]).any() for sample in samples):
            values = torch.cat([sample[task].flatten() for sample in samples])
            found = values[~values.isnan()].unique().tolist()[:6] or "unknown"
            messages.append(f"{task}: no {'positive ' if kind.binary else ''}pixel counts in the first {len(samples)} "
                            f"samples, {samples[0]['name']} to {samples[-1]['name']}: their values are {found}")
    return messages


def to_tensor(image: np.ndarray) -> Tensor:
    """uint8 (h, w, 3) -> float32 (3, h, w) in 0..1."""
    return torch.from_numpy(image).permute(2, 0, 1).contiguous().float() / 255


def normalised(image: Tensor) -> Tensor:
    """(..., 3, h, w) in 0..1 -> normalised as encoders expect it."""
    return TF.normalize(image, IMAGE_MEAN, IMAGE_STD)


def centred(outer: tuple[int, int], inner: tuple[int, int], scale: int = 1) -> tuple[slice, slice]:
    """Rows and columns of an image of the size `inner` (h, w) in a padded one of the size `outer`, in maps that are
    `scale` times as large. All offsets come from here: the middle of a larger map may be another place."""
    return tuple(slice(scale * ((a - b) // 2), scale * ((a - b) // 2 + b)) for a, b in zip(outer, inner))


def pad(array, outer, inner, value):
    """Pads an image of the size `inner` (h, w) to the size `outer` (H, W), its label (C, s h, s w) to (C, s H, s W)."""
    scale = array.shape[1] // inner[0]
    padded = np.full((len(array), *(scale * n for n in outer)), value, array.dtype)
    padded[(..., *centred(outer, inner, scale))] = array
    return torch.from_numpy(padded)


# ---------------------------------------------------------------------------------------------------- augmentation

CROPS = 10                                                       # tries
LARGEST_SHARE = 0.75                                             # of one class among a crop's labelled pixels
JITTER = (                                                       # each with probability 0.5, in this order
    (lambda image, value: (image + value).clamp(0, 1), (-32 / 255, 32 / 255)),
    (TF.adjust_brightness, (0.5, 1.5)),                          # a factor: contrast, as in SSD's augmentation
    (TF.adjust_saturation, (0.5, 1.5)),
    (TF.adjust_hue, (-0.1, 0.1)),                                # 0.1 of a turn is 36 degrees
)


def augment(image, labels, data, rng):
    """Scales, crops, flips and recolours: image (3, h', w') float32 in 0..1, and labels (C, h', w').

    image: uint8 (h, w, 3); labels: by task, as Kind.check returns them; data: tells its kinds, FLIP, SCALES and the
    size (H, W) of the crop. Where the scaled image is smaller, h' < H or w' < W. Up to 10 crops are tried until no
    class of `cropped_by`, the first task with classes, covers more than 75 % of the labelled pixels. Without that label
    the first crop is taken. What is drawn does not depend on the image or the tasks."""
    scale = rng.uniform(*data.SCALES)
    corners = rng.random((CROPS, 2))
    flipped = rng.random() < 0.5 and data.FLIP
    values = [rng.uniform(*bounds) for _, bounds in JITTER]
    applied = rng.random(len(JITTER)) < 0.5
    scaled = np.array([max(1, round(length * scale)) for length in image.shape[:2]])
    for corner in corners:
        start = (corner * (np.maximum(scaled - data.size, 0) + 1)).astype(int)
        stop = np.minimum(start + data.size, scaled)
        # The pixels of the original that are nearest to those of the crop.
        y, x = (((np.arange(a, b) + 0.5) * (m / n)).astype(int) for a, b, m, n in zip(start, stop, image.shape, scaled))
        if data.cropped_by not in labels or not dominated(labels[data.cropped_by][:, y][:, :, x]):
            break

    image = TF.resize(torch.from_numpy(image).permute(2, 0, 1), scaled.tolist(), antialias=False)
    image = TF.crop(image, *start, *stop - start)
    if flipped:
        image, x = image.flip(2), x[::-1]
    image = image.contiguous().float() / 255
    for (adjust, _), value, chosen in zip(JITTER, values, applied):
        image = adjust(image, value) if chosen else image
    return image, {task: data.kinds[task].augment(label[:, y][:, :, x], scale, flipped)
                   for task, label in labels.items()}


def dominated(label: np.ndarray) -> bool:
    """Whether one class covers more than LARGEST_SHARE of the labelled pixels."""
    counts = np.bincount(label.ravel())[:IGNORE]
    return counts.max() > LARGEST_SHARE * counts.sum()


# ----------------------------------------------------------------------------------------------------------- check

def main(argv: list[str] | None = None) -> int:
    parser = Parser("datasets.py", __doc__)
    parser.add_argument("command", choices=["check"], help="reads every file; exit code 1 if one is missing or wrong")
    parser.add_argument("--dataset", required=True, help=f"{', '.join(DATASETS)} or path/to/file.py:Class")
    parser.add_argument("--root", type=Path, help="folder of a benchmark (default: data/...)")
    parser.add_argument("--workers", type=int, default=usable_cpus(), help="processes that read (default: one per CPU)")
    parser.add_argument("--img-size", type=int, nargs=2, metavar=("H", "W"),
                        help="size of the samples (Cityscapes: half that of the images, where it is not 512 1024)")
    parser.add_argument("--pictures", type=Path, metavar="FILE.png", help="draws samples, also as training sees them")
    args = parser.parse_args(argv)
    with parser.told():
        dataset = find_dataset_class(args.dataset)
        expect(issubclass(dataset, LabelledDataset), "a data set of files", args.dataset)
        found = check(dataset, args)
        if args.pictures:
            draw_samples(dataset, args)
        return int(found > 0)


def check(dataset: type[LabelledDataset], args: argparse.Namespace) -> int:
    """Reads every file of both splits and prints what is missing or wrong; returns the number of problems."""
    total, earlier = 0, {}
    for split in ("train", "val"):
        try:
            data = dataset.open(split, args.img_size, root=args.root)
        except Exception as error:
            if not is_deliberate(error):
                raise
            print(f"{split}: {error}")
            total += 1
            continue
        problems, values = defaultdict(list), defaultdict(list)
        found = loader(range(len(data)), [[i] for i in range(len(data))], args.workers, collate_fn=data.check)
        for results in tqdm(found, f"checking {split}", unit="img"):
            for what, result in results.items():
                (problems if isinstance(result, str) else values)[what].append(result)
        own = not issubclass(dataset, FileDataset)
        files = {name: (split, name) if own else data.path("image", name) for name in data.names}
        both = [name for name in files if name in earlier]
        same = [f"{name} occurs in the lists of both splits" for name in both if files[name] == earlier[name]]
        problems["list"] = same if own else data.check_split() + same
        print(f"{split}: {len(data)} images" + ("" if own else f"; published: {data.COUNTS[split]}"))
        for what, messages in problems.items():
            if messages:
                more = [f"and {len(messages) - 3} more"] * (len(messages) > 3)
                print(f"  {what}: {len(messages)} problems", *messages[:3], *more, sep="\n    ")
            total += len(messages)
        if both and not same:
            print(f"  look at the names: {len(both)} occur in train, too, first {both[0]}")
        for task, kind in data.kinds.items():
            for remark in kind.remarks(np.concatenate(values[task], 1), data.FLIP) if values[task] else ():
                print(f"  look at {task}: {remark}")
        earlier = files
    print(f"{total or 'no'} problems")
    return total


def draw_samples(dataset: type[LabelledDataset], args: argparse.Namespace):
    """A sheet of the first samples of each split, plain and, beside that, augmented, with a legend for each task."""
    from evaluate import draw_maps, to_picture  # which imports this module
    blocks, maps = [], []
    for split in ("train", "val"):
        data, versions = dataset.open(split, args.img_size, root=args.root), []
        for augmented in sorted({False, data.augment}):
            data.augment = augmented
            versions.append(fetch(data, range(len(data))[:3], args.workers))
        for samples in zip(*versions):
            blocks.append([[(f"{title}: {sample['name']}", to_picture(sample["image"]))
                            for title, sample in zip((split, "in training"), samples)]])
            maps.append({task: [sample[task].numpy() for sample in samples] for task in data.kinds})
    with replacing(args.pictures) as file:
        draw_maps(blocks, data.labels, maps, ("", "")).save(file, "PNG")
    print("pictures:", args.pictures)


# ------------------------------------- files, processes and signals, a section that evaluate.py and train.py use, too

class Parser(argparse.ArgumentParser):
    """Ends a script with one line and exit code 2 on bad input."""

    def __init__(self, prog: str, description: str | None = None):
        super().__init__(prog, description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
        self.register("type", Path, lambda text: Path(text).expanduser())    # shells leave --out=~/x as it is
        self.register("type", dict, lambda text: dict(json.loads(text)))

    def error(self, message: str):
        self.exit(2, f"{self.prog}: {message}\n")

    @staticmethod
    def expect_least(args: argparse.Namespace, **least: float):
        """Raises ValueError where a flag is given that is below the least value here, or not finite."""
        for name, value in least.items():
            found = getattr(args, name)
            expect(found is None or value <= found < inf, f"--{name.replace('_', '-')} of at least {value}", found)

    @contextmanager
    def told(self, on_full_disk: str = "make room, then run it again"):
        """A script's work is done inside this block. It ends with one line and exit code 130 on Ctrl-C or SIGTERM; 1 if
        the machine is the cause, see TROUBLES, or a loss is not finite; 2 on bad input: an OSError, or an error that
        our code, a library or the user's class raises on purpose. Anything else is a fault and keeps its traceback."""
        if in_main_thread() and signal.getsignal(signal.SIGTERM) == signal.SIG_DFL:
            signal.signal(signal.SIGTERM, interrupt)
        try:
            yield
        except KeyboardInterrupt:
            self.exit(130, f"{self.prog}: interrupted\n")
        except Exception as error:
            text = "\n".join(f"{type(cause).__module__}.{type(cause).__qualname__}: {origin(cause)[1]}"
                             for cause in causes(error))
            for pattern, line in TROUBLES.items():
                if found := re.search(pattern, text, re.M):
                    line = found.expand(line).replace("MAKE ROOM", on_full_disk)
                    self.exit(1, f"{self.prog}: {' '.join(line.split())}\n")
            if not is_deliberate(error):
                raise
            message = " ".join(origin(error)[1].split()) or type(error).__name__
            self.exit(1 if isinstance(error, FloatingPointError) else 2, f"{self.prog}: {message}\n")
        finally:
            end_loaders()
            if in_main_thread() and signal.getsignal(signal.SIGTERM) == interrupt:
                signal.signal(signal.SIGTERM, signal.SIG_DFL)


# What the machine is to blame for, by a pattern of an error's type and text ("ancdata": open files of another process).
TROUBLES = {
    r"OSError: (.*(?:No space left on device|Disk quota exceeded|File too large).*)": r"cannot write \1; MAKE ROOM",
    r"Too many open files|ancdata": "too many open files; raise the limit (ulimit -n 65536) or give fewer --workers",
    r"(DataLoader worker \(pid.*?)[. ]*\n?$": r"\1; if memory is short, give fewer --workers",
    r"BrokenProcessPool|ChildProcessError": "the system killed a process; if memory is short, give fewer --workers",
    r"(\w*MemoryError|DefaultCPUAllocator|Cannot allocate memory).*":
        r"out of memory (\g<0>); try smaller images or --encoder, in training --accumulate or --checkpoint-activations",
    r"closed by peer": "another process of the run ended",
    r"^subprocess.CalledProcessError.*|.*C(\+\+)? compiler.*":
        r"a compiler fails (\g<0>); install gcc, g++ and python3-dev, or give --no-compile or --backend torch",
    r"^torch\._(?:dynamo|inductor)\S+ (?:(?s:.*)Developer debug context: (.+)|(.+\n?.*))":
        r"--compile failed (\1\2); train with --no-compile",
}
# Errors of code. They keep their traceback, also where a library raises them on purpose.
FAULTS = AttributeError, LookupError, NameError, TypeError, AssertionError, NotImplementedError


def causes(error: BaseException | None) -> Iterator[BaseException]:
    """The error, its cause, and so on."""
    while error:
        yield error
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)


def origin(error: BaseException) -> tuple[str, str]:
    """The line of code in which an error was raised, and its message. An error of another process has its traceback in
    its text (of a DataLoader) or as its cause (of concurrent.futures)."""
    message = f"{error.filename}: {error.strerror}" if getattr(error, "filename", None) else str(error)
    remote = str(error.__cause__) if type(error.__cause__).__name__ == "_RemoteTraceback" else message
    frames = list(re.finditer(r'^ *File ".+", line \d+, in .*\n(?:    (.*)\n)?(?:    .*\n)*', remote, re.M))
    if frames and (remote is not message or "Original Traceback" in message):
        if remote is message:    # after the last frame: the type and the true message
            message = message[frames[-1].end():].partition(": ")[2]
        return frames[-1][1] or "", message
    frames = traceback.extract_tb(error.__traceback__)
    return frames[-1].line if frames else "", message


def is_deliberate(error: Exception) -> bool:
    """Whether an error says what is wrong with the input: an OSError, or one from a `raise` that is not of FAULTS."""
    raised = bool(re.search(r"(^|: )raise\b", origin(error)[0]))
    return isinstance(error, OSError) or raised and not isinstance(error, FAULTS)


def usable_cpus() -> int:
    """How many CPUs this process may use."""
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    with suppress(OSError, ValueError):    # a container's limit: microseconds per period, or "max"
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        cpus = min(cpus, ceil(int(quota) / int(period)))
    return min(cpus, 61) if sys.platform == "win32" else cpus    # Windows cannot wait for more processes


def expect_main_guard():
    """Refuses a script that calls this without a main guard: each process that we start would begin the run again."""
    for frame, line in traceback.walk_stack(None):
        path = Path(frame.f_code.co_filename)
        if frame.f_code.co_name == "<module>" and frame.f_globals["__name__"] == "__main__" and path.is_file():
            guarded = any(isinstance(node, ast.If) and "__name__" in ast.unparse(node.test)
                          and node.lineno <= line <= node.end_lineno for node in ast.parse(path.read_bytes()).body)
            if not guarded:
                raise ValueError(f"line {line} of {path} starts processes that import this file; put it below "
                                 "`if __name__ == '__main__':`, or give --workers 0")


def allow_open_files(workers: int):
    """Raises the limit on open files to what so many loading processes need. With fewer they would wait forever."""
    if sys.platform == "win32":    # which has no such limit
        return
    import resource
    needed, (soft, hard) = 64 + 32 * workers, resource.getrlimit(resource.RLIMIT_NOFILE)
    if 0 <= soft < needed:    # without a limit some systems give -1
        expect(not 0 <= hard < needed, f"a limit of at least {needed} open files for --workers {workers}", hard,
               f"raise it (ulimit -n {needed}) or give fewer --workers")
        resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))


def loader(dataset: Dataset, batches: Iterable, workers: int, images: int = 0, **options) -> DataLoader:
    """What loads the samples of each of the batches in `workers` processes, in order. images: of a batch; then there
    are no more processes than shared memory has room for. options: of DataLoader. The main process takes single samples
    from `fetch`: a file that `read` opens and keeps would be shared, with its position, by processes forked later."""
    if workers:
        expect_main_guard()
        allow_open_files(workers)
        if get_start_method() != "fork":    # DataLoader would fail amid starting its processes
            try:
                pickle.dumps((dataset, options))
            except Exception as error:
                raise ValueError(f"the data set cannot be sent to a loading process ({error}); open files in `read`, "
                                 "at its first call, and keep no lambda, or give --workers 0") from error
        workers = fit_workers(workers, dataset, images)
    return DataLoader(dataset, batch_sampler=batches, num_workers=workers, worker_init_fn=follow_main, **options)


def fit_workers(workers: int, dataset: Dataset, images: int) -> int:
    """The number of loading processes that shared memory has room for, `workers` at most. They pass batches through it;
    where it is full, they hang or are killed. Prints a line where the number is smaller."""
    if not images or not Path("/dev/shm").is_dir():
        return workers
    sample, = fetch(dataset, [0], workers)
    free = shutil.disk_usage("/dev/shm").free // int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    needed = images * sum(value.nbytes for value in sample.values() if isinstance(value, Tensor))
    fitting = max(0, (free // needed - 2) // 2)    # two batches of each process are waiting, two are in use
    if fitting < workers:
        print(f"shared memory (/dev/shm) has room for {fitting} of {workers} --workers: {free / 2**20:.1f} MiB of "
              f"{(2 * workers + 2) * needed / 2**20:.1f}. A container gets more with --shm-size")
    return min(workers, fitting)


def fetch(dataset: Dataset, indices: Sequence[int], workers: int) -> list[dict]:
    """A few samples, from loading processes if there are `workers`. They come as bytes, not by shared memory."""
    batches = loader(dataset, [[i] for i in indices], min(workers, len(indices)), collate_fn=pickle.dumps)
    return [sample for batch in batches for sample in pickle.loads(batch)]


@atexit.register
def end_loaders():
    """Ends loaders that an error has left. PyTorch and multiprocessing would send a SIGTERM, which they ignore."""
    loaders = [process for process in active_children() if process.daemon]
    if loaders and hasattr(signal, "SIGCHLD") and in_main_thread():
        before = signal.signal(signal.SIGCHLD, signal.SIG_DFL)    # PyTorch's handler would report that they were killed
        for process in loaders:
            process.kill()
            process.join()
        signal.signal(signal.SIGCHLD, before)


class Helpers(ProcessPoolExecutor):
    """Processes that compute. They are spawned: a forked copy of a process that uses CUDA or threads may hang. So a
    script uses them only under `if __name__ == "__main__":`."""

    def __init__(self, workers: int):
        super().__init__(workers, get_context("spawn"), follow_main)

    def submit(self, *arguments):
        if not hasattr(signal, "pthread_sigmask"):    # Windows, which sends no signals
            return super().submit(*arguments)
        # A process that this starts needs seconds until it runs follow_main. Until then it keeps signals waiting.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
        try:
            return super().submit(*arguments)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)


SIGNALS = [number for number in signal.Signals if number.name in ("SIGTERM", "SIGINT", "SIGHUP", "SIGUSR1")]


def follow_main(*_):
    """A loading or computing process calls this first."""
    for number in SIGNALS:    # Ctrl-C and a cluster's signals reach it, too, but only the main process acts on them
        signal.signal(number, signal.SIG_IGN)
    if main := parent_process():    # end with it, even if it is killed
        threading.Thread(target=lambda: (main.join(), os._exit(1)), daemon=True).start()
    if not os.path.isdir("/proc/self/fd"):
        return
    import fcntl  # not on Windows

    # A forked process shares the position in each open file with the process that it was forked from: while one reads,
    # the other one's position moves. This gives it positions of its own in the files that are open for reading.
    for number in map(int, os.listdir("/proc/self/fd")):
        with suppress(OSError):    # the folder itself was open, too
            path, mode = f"/proc/self/fd/{number}", fcntl.fcntl(number, fcntl.F_GETFL) & os.O_ACCMODE
            if mode == os.O_RDONLY and os.path.isfile(path):
                opened = os.open(path, os.O_RDONLY)
                os.lseek(opened, os.lseek(number, 0, os.SEEK_CUR), os.SEEK_SET)
                os.dup2(opened, number, inheritable=False)
                os.close(opened)


def in_main_thread() -> bool:
    """Whether signals can be handled here."""
    return threading.current_thread() is threading.main_thread()


def interrupt(number: int, frame: object):
    """The handler of SIGTERM. As after Ctrl-C, a script ends its processes and removes files that are not complete."""
    signal.signal(number, signal.SIG_IGN)    # launchers and clusters send several
    raise KeyboardInterrupt


@contextmanager
def replacing(path: Path):
    """A file to write bytes to. Once it is complete, it replaces path. If writing fails, it is removed, path stays as
    it was, and the OSError, perhaps the cause of a library's error, names path."""
    temporary = path.with_suffix(".tmp")
    try:
        with open(temporary, "wb") as file:
            yield file
        os.replace(temporary, path)
    except BaseException as error:
        for cause in causes(error):
            if isinstance(cause, OSError) and cause.filename in (None, str(temporary)):
                cause.filename = str(path)
        temporary.unlink(missing_ok=True)
        raise


def check_writable(folder: Path):
    """Makes the folder and writes to it once, so that a run fails now and not after hours. Raises OSError."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder, buffering=0) as file:
            file.write(bytes(2 ** 16))
            os.fsync(file.fileno())
    except OSError as error:
        raise OSError(f"cannot write to the folder {folder} ({error.strerror}); make room or name another") from error


if __name__ == "__main__":
    # A user's file imports this module, too. Both must mean the same LabelledDataset.
    import datasets

    sys.exit(datasets.main())
