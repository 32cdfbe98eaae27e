"""Data sets for multi-task dense prediction: synthetic scenes that need no files, one's own (LabelledDataset),
PASCAL-Context, NYUDv2 and Cityscapes.

    python datasets.py check   --dataset pascal --root data/PASCALContext              # what is missing or wrong
    python datasets.py prepare --dataset pascal --root data/PASCALContext              # once, to load faster
    python datasets.py export  --format pascal --root data/PASCALContext --count 40    # synthetic scenes as its files

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

with only those labels that were asked for. Cityscapes' are twice as large as its images, (2H, 2W), and its depth is
disparity, in pixels. IGNORE marks label pixels that count neither in losses nor in metrics.

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

# Reads top-down: Synthetic and its renderer; LabelledDataset, for one's own, and the three benchmarks; how the files of
# one image are read; labels and their checks; augmentation; the three commands, from main on; how scripts write and
# end, a section that evaluate.py and train.py share.

import abc
import argparse
import errno
import importlib
import inspect
import os
import re
import signal
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager, suppress
from functools import cached_property, partial
from math import cos, pi, sin
from pathlib import Path
from typing import BinaryIO, NamedTuple, NoReturn

import numpy as np
import scipy.io
import torch
import torchvision.transforms.v2.functional as TF
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from metrics import IGNORE, boundary_ground_truth, boundary_pixels, follow_main, thin

IMAGE_MEAN = (0.485, 0.456, 0.406)
IMAGE_STD = (0.229, 0.224, 0.225)
PARTS = ("background", "head", "torso", "upper arm", "lower arm", "upper leg", "lower leg")
HEAD, TORSO, UPPER_ARM, LOWER_ARM, UPPER_LEG, LOWER_LEG = range(1, 7)


class Synthetic(torch.utils.data.Dataset):
    """Ray-cast rooms and open grounds with objects and people, and exact labels for all six tasks.

    Needs no files. An image depends on (seed, index, size) alone, so any number of workers gives the same data, and
    two seeds give two disjoint splits.

    semseg     CLASSES. "floor" is also the ground outdoors, "wall" also a building.
    parsing    PARTS; 0 away from people. An image without people is ignored whole, as in PASCAL-Context.
    saliency   1 on spheres, boxes, cylinders and people.
    normal     IGNORE on the sky.
    boundary   1 where the instance differs from that of the right, lower or lower-right neighbour (the last row and
               column repeat). One instance is: each plane of a room, the ground, the sky, a building, an object, a
               whole person. Edges inside an instance, as between the faces of a box, are no boundary.
    depth      IGNORE on the sky; valid values are below FAR.
    """

    CLASSES = ("floor", "wall", "ceiling", "sky", "sphere", "box", "cylinder", "person")
    TASKS = {"semseg": len(CLASSES), "parsing": len(PARTS), "saliency": 2, "normal": 3, "boundary": 1, "depth": 1}

    def __init__(self, count, size=(128, 160), seed=0, tasks=None):
        """count: images; size: (H, W) in pixels, each at least 32; tasks: names from TASKS, None for all.

        Raises ValueError for anything else.
        """
        tasks = choose_tasks(self.TASKS, tasks)
        if count < 1:
            raise ValueError(f"expected count of at least 1, found {count}; ask for one image or more")
        if len(size) != 2 or min(size) < 32:
            raise ValueError(f"expected size (H, W) of at least 32 pixels each, found {size}; give a larger size")
        if seed < 0:
            raise ValueError(f"expected seed of at least 0, found {seed}; give a non-negative integer")
        self.count, self.size, self.seed, self.tasks = count, tuple(size), seed, tasks
        self.last = None, None    # the image last given and its boundaries, which are wanted next to score it

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        """The dictionary of the module's docstring. Raises IndexError outside 0..count-1."""
        maps = self.render(index)
        self.last = index, maps["boundary"][0] > 0
        mean, std = (np.float32(v).reshape(3, 1, 1) for v in (IMAGE_MEAN, IMAGE_STD))
        sample = {"image": torch.from_numpy((maps["image"] - mean) / std)}
        sample |= {task: torch.from_numpy(maps[task]) for task in self.tasks}
        return sample | {"name": f"synthetic-{index:06d}", "size": self.size}

    def boundary_truth(self, index):
        """The boundaries that odsF scores against: bool (H, W), the label thinned. Raises as [index]."""
        last, boundary = self.last
        return thin(boundary if last == index else self.render(index)["boundary"][0] > 0)

    def render(self, index):
        """Image `index` in numpy: "image" (3, H, W) in 0..1, the labels of all tasks, "instance" int64 (H, W), and
        "rays" float32 (3, H, W), directions in camera space with z = -1: depth times ray is the point seen.

        Raises IndexError outside 0..count-1.
        """
        if not 0 <= index < self.count:
            raise IndexError(f"expected an index in 0..{self.count - 1}, found {index}")
        rng = np.random.default_rng([self.seed, index])
        camera = draw_camera(rng, *self.size)
        light, groups = draw_scene(rng, camera)
        solids = [solid for group in groups for solid in group]
        with np.errstate(divide="ignore", invalid="ignore"):    # a ray that misses gives nan or inf
            depth, normal, number = trace(camera, solids)
            image = shade(rng, camera, solids, light, depth, normal, number)

        table = np.array([(s.label, s.part, i) for i, group in enumerate(groups) for s in group])
        label, part, instance = np.take(table.T, number, axis=1)
        sky = label == SKY
        return {
            "image": image,
            "semseg": label[None],
            "parsing": (part if part.any() else np.full_like(part, IGNORE))[None],
            "saliency": np.int64(label >= SPHERE)[None],
            "normal": np.where(sky, np.float32(IGNORE), rotate(camera.turn, normal)),
            "boundary": np.float32(boundary_pixels(instance))[None],
            "depth": np.where(sky, np.float32(IGNORE), depth)[None],
            "instance": instance,
            "rays": camera.rays,
        }


# The renderer of Synthetic. World axes: x right, y up, the camera above the origin looks along -z; the floor is y = 0.
# Vectors that meet maps of pixels have shape (3, 1, 1). All maps are float32.

FLOOR, WALL, CEILING, SKY, SPHERE, BOX, CYLINDER, PERSON = range(8)    # Synthetic.CLASSES
FAR = 16.0                                                              # metres; where the ground ends
UP = np.array([0.0, 1.0, 0.0])
COLOURS = {    # mean RGB and spread. A hint at the class that never settles it: the ranges overlap.
    "floor": (0.50, 0.41, 0.33, 0.20), "ground": (0.36, 0.42, 0.24, 0.15), "wall": (0.74, 0.70, 0.64, 0.20),
    "ceiling": (0.85, 0.85, 0.83, 0.10), "sky": (0.45, 0.65, 0.92, 0.10), "sphere": (0.70, 0.35, 0.32, 0.32),
    "box": (0.52, 0.42, 0.30, 0.32), "cylinder": (0.32, 0.50, 0.58, 0.32), "cloth": (0.42, 0.40, 0.50, 0.38),
    "hair": (0.30, 0.22, 0.16, 0.20),
}


class Camera(NamedTuple):
    rays: np.ndarray     # (3, H, W) camera axes, z = -1, so that depth times ray is the point seen
    world: np.ndarray    # (3, H, W) the same in world axes
    turn: np.ndarray     # (3, 3) world axes to camera axes
    eye: np.ndarray      # (3,) world
    pixel: float         # width of a pixel at depth 1


class Solid(NamedTuple):
    hit: Callable        # hit(origin, rays, *args) -> distance (H, W), normal (3, H, W)
    args: tuple
    start: np.ndarray    # the solid lies within `radius` of the segment from start to end, (3,) each
    end: np.ndarray
    radius: float
    label: int           # class
    part: int            # body part
    paint: np.ndarray    # (15,), see draw_paint


def draw_camera(rng, h, w):
    pixel = rng.uniform(0.9, 1.35) / h                           # vertical field of view 48 to 68 degrees
    y, x = np.mgrid[:h, :w]
    rays = np.float32([(x + 0.5 - w / 2) * pixel, (h / 2 - y - 0.5) * pixel, np.full((h, w), -1.0)])
    pitch = rng.uniform(-0.30, 0.05)
    turn = np.array([[1, 0, 0], [0, cos(pitch), sin(pitch)], [0, -sin(pitch), cos(pitch)]])
    return Camera(rays, rotate(turn.T, rays), turn, rng.uniform(1.1, 1.9) * UP, pixel)


def draw_scene(rng, camera):
    """The unit vector towards the light, and the solids in lists, one list per instance. The first is the sky."""
    azimuth, rise = rng.uniform(-pi, pi), rng.uniform(0.7, 1.3)
    light = np.array([cos(azimuth) * cos(rise), sin(rise), sin(azimuth) * cos(rise)])
    axes = x, up, z = yaw(rng.uniform(-0.6, 0.6))
    groups = [[plane(SKY, 25.0 * UP, -UP, draw_paint(rng, COLOURS["sky"], x, z, 12.0))]]    # not met
    if rng.random() < 0.6:                                       # a room, the camera near its back wall
        half = rng.uniform((1.8, 1.15, 2.2), (4.0, 1.6, 4.0))
        back = np.array([rng.uniform(-1, 1) * (half[0] - 0.6), 0, half[2] - rng.uniform(0.4, 1.2)])
        centre = half[1] * UP - back @ axes
        groups.append([plane(FLOOR, 0 * UP, UP, draw_paint(rng, COLOURS["floor"], x, z, 0.8))])
        groups.append([plane(CEILING, 2 * centre, -UP, draw_paint(rng, COLOURS["ceiling"], x, z, 0.8))])
        for axis, width, across in ((x, half[0], z), (z, half[2], x)):
            paint = draw_paint(rng, COLOURS["wall"], across, up, 0.6)
            groups += [[plane(WALL, centre + side * axis, -np.sign(side) * axis, paint)] for side in (-width, width)]
    else:
        half, centre = np.full(3, 9.0), np.array([0.0, 0.0, -9.0])
        groups.append([plane(FLOOR, 0 * UP, UP, draw_paint(rng, COLOURS["ground"], x, z, 1.5))])
        if rng.random() < 0.5:                                   # a building, behind everything else
            place = np.array([rng.uniform(-6, 6), 0, -rng.uniform(11, 16)])
            paint = draw_paint(rng, COLOURS["wall"], x + z, up, 1.0)
            groups.append([box(WALL, place, rng.uniform((2.0, 1.2, 1.0), (5.0, 2.5, 2.0)), axes, paint)])

    taken = []                                                   # (position, radius) of the footprints so far
    slope = float(camera.rays[0].max())                          # of the view's edge

    def draw_place(radius, near, far):
        """A free place on the floor in the room and in view, or None."""
        for _ in range(20):
            depth = rng.uniform(near, far)
            place = np.array([rng.uniform(-0.9, 0.9) * slope * depth, 0, -depth])
            inside = abs(axes @ (place - centre)) < half - radius
            if inside[0] and inside[2] and all(np.hypot(*(place - p)[::2]) > radius + r for p, r in taken):
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
    paint = draw_paint(rng, COLOURS[Synthetic.CLASSES[label]], axes[0] + axes[2], UP, 0.3)
    if label == SPHERE:
        return capsule(label, 0, radius, place + radius * UP, place + radius * UP, paint)
    if label == BOX:
        return box(label, place, np.array([0.7 * radius, height / 2, radius * rng.uniform(0.4, 0.7)]), axes, paint)
    args = column(place), column(UP), np.float32(height), np.float32(radius)
    return Solid(hit_cylinder, args, place, place + height * UP, radius, label, 0, paint)


def draw_person(rng, place):
    """The instances of one person: the body, and a seat if sitting."""
    right, _, forward = axes = yaw(rng.uniform(-pi, pi))
    sitting = rng.random() < 0.2
    shirt, trousers, shoes = (draw_paint(rng, COLOURS["cloth"], UP, right, 0.12) for _ in range(3))
    tone = np.array([0.93, 0.76, 0.64]) - rng.random() * np.array([0.57, 0.53, 0.48])
    skin = draw_paint(rng, (*tone, 0.04), UP, right, 0.2)
    hair = draw_paint(rng, COLOURS["hair"], UP, right, 0.1)
    sleeve, shin = (shirt if rng.random() < 0.4 else skin), (trousers if rng.random() < 0.7 else skin)

    def limb(swing, spread):
        """Unit vector: straight down at (0, 0), forward at swing pi/2; spread tilts it to the right."""
        return sin(spread) * right + cos(spread) * (sin(swing) * forward - cos(swing) * UP)

    spine = -limb(rng.uniform(-0.25, 0.1), rng.uniform(-0.1, 0.1))
    neck, head, crown = 0.50 * spine, 0.69 * spine, 0.76 * spine - 0.03 * forward    # the pelvis is the origin
    bones = [(TORSO, 0.06, neck, head, skin),                    # part, radius, start, end, paint
             (HEAD, 0.105, head, head + 0.07 * spine, skin),
             (HEAD, 0.115, crown, crown, hair)]
    for side in (-right, right):
        swing, bend = rng.uniform(-0.6, 1.0) + 1.8 * (rng.random() < 0.2), rng.uniform(0.0, 1.8)
        spread = rng.uniform(0.05, 0.9) * (side @ right)
        shoulder = neck - 0.06 * spine + 0.19 * side
        elbow = shoulder + 0.29 * limb(swing, spread)
        fore = limb(swing + bend, spread * rng.uniform(-0.5, 1.0))
        wrist = elbow + 0.25 * fore
        bones += [(TORSO, 0.115, 0.08 * side, shoulder - 0.09 * side, shirt),
                  (UPPER_ARM, 0.058, shoulder, elbow, shirt),
                  (LOWER_ARM, 0.048, elbow, wrist, sleeve),
                  (LOWER_ARM, 0.055, wrist, wrist + 0.07 * fore, skin)]
        swing, bend = (1.45, rng.uniform(1.2, 1.7)) if sitting else (rng.uniform(-0.5, 0.7), rng.uniform(0.0, 0.8))
        spread = rng.uniform(0.0, 0.3) * (side @ right)
        knee = 0.08 * side + 0.43 * limb(swing, spread)
        ankle = knee + 0.40 * limb(swing - bend, 0.3 * spread)
        bones += [(UPPER_LEG, 0.085, 0.08 * side, knee, trousers),
                  (LOWER_LEG, 0.065, knee, ankle, shin),
                  (LOWER_LEG, 0.055, ankle, ankle + 0.14 * forward, shoes)]
    scale = rng.uniform(0.85, 1.1)
    pelvis = place - scale * min(min(a[1], b[1]) - r for _, r, a, b, _ in bones) * UP    # the lowest bone on the floor
    body = [capsule(PERSON, part, scale * r, pelvis + scale * a, pelvis + scale * b, paint)
            for part, r, a, b, paint in bones]
    if not sitting:
        return [body]
    half = np.array([0.22, (pelvis[1] - 0.08 * scale) / 2, 0.22])
    return [body, [box(BOX, place, half, axes, draw_paint(rng, COLOURS["box"], right, UP, 0.3))]]


def draw_paint(rng, colour, across, along, scale):
    """A texture with features of about `scale` metres along two directions: two colours (3 + 3), mixed by the product
    of two plane waves (wave vector 3, phase 1, each) times the hardness of their edges (1). colour: mean RGB, spread.
    """
    *mean, spread = colour
    first, other = np.clip(mean + rng.uniform(-spread, spread, (2, 3)), 0.03, 0.97)
    other = first + rng.uniform(0.1, 0.6) * (other - first)
    waves = pi / (scale * rng.uniform(0.6, 1.6, (2, 1))) * np.stack([across, along])
    phases, hardness = rng.uniform(0, 2 * pi, 2), 8.0            # as it stands, a checkerboard
    kind = ("checker", "plain", "stripes", "blotches")[rng.integers(4)]
    if kind == "plain":
        other = first
    elif kind == "stripes":
        waves[1], phases[1] = 0, pi / 2
    elif kind == "blotches":
        waves, hardness = pi / scale * rng.uniform(-1, 1, (2, 3)), 1.0
    return np.array([*first, *other, *waves[0], phases[0], *waves[1], phases[1], hardness])


def plane(label, point, normal, paint):
    return Solid(hit_plane, (column(point), column(normal)), point, point, np.inf, label, 0, paint)


def box(label, place, half, axes, paint):
    """A box on the floor at `place`, `half` its widths along the rows of `axes`, the second of which is UP."""
    args = column(place + half[1] * UP), column(half), np.float32(axes)
    return Solid(hit_box, args, place, place + 2 * half[1] * UP, np.hypot(half[0], half[2]), label, 0, paint)


def capsule(label, part, radius, start, end, paint):
    """All points within `radius` of the segment from `start` to `end`; a sphere where the two are one."""
    length = np.linalg.norm(end - start)
    axis = (end - start) / length if length else UP
    args = column(start), column(axis), np.float32(length), np.float32(radius)
    return Solid(hit_capsule, args, start, end, radius, label, part, paint)


def trace(camera, solids):
    """The nearest solid of each pixel: its depth (H, W), its normal (3, H, W) in world axes, its number (H, W).

    Number 0, the sky, is what a ray meets that meets nothing within FAR: depth FAR, normal 0.
    """
    depth = np.full(camera.rays.shape[1:], FAR, np.float32)
    normal = np.zeros_like(camera.rays)
    number = np.zeros(depth.shape, np.int64)
    origin = column(camera.eye)
    for i, (y, x) in enumerate(bounds(camera, solids)):
        if i > 0 and depth[y, x].size:
            t, n = solids[i].hit(origin, camera.world[:, y, x], *solids[i].args)
            nearer = (t > 0) & (t < depth[y, x])
            np.copyto(depth[y, x], t, where=nearer)
            np.copyto(normal[:, y, x], n, where=nearer)
            np.copyto(number[y, x], i, where=nearer)
    return depth, normal, number


def shade(rng, camera, solids, light, depth, normal, number):
    """The photograph (3, H, W) in 0..1: textures, sun and sky light, shadows on the floor, exposure and noise."""
    points = column(camera.eye) + depth * camera.world
    floor = np.array([s.label == FLOOR for s in solids])[number]
    sun = np.maximum(dot(column(light), normal), 0)
    for solid, (y, x) in zip(solids, bounds(camera, solids, light)):    # on the floor only, to show what stands where
        if solid.hit is not hit_plane and floor[y, x].any():
            t, _ = solid.hit(points[:, y, x], column(light), *solid.args)
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
    """One pair of slices (rows, columns) per solid, sure to hold all of its image; with light, of its shadow's."""
    h, w = camera.rays.shape[1:]
    start, end, radius = (np.array(v) for v in zip(*((s.start, s.end, s.radius) for s in solids)))
    ends = np.stack([start, end])                                # (2, n, 3)
    if light is not None:                                        # on the floor, where a ball's shadow lies within
        ends = ends - ends[..., 1:2] * light / light[1]          # radius / light[1] of that of its centre
        radius = radius / light[1]
    x, y, z = np.moveaxis((ends - camera.eye) @ camera.turn.T, -1, 0)
    near = (-z < radius + 0.05).any(0)                           # reaches behind the camera: may be anywhere

    def extent(side, length):
        angle, width = np.arctan2(side, -z), np.arcsin(radius / np.hypot(side, z))
        low, high = np.tan((angle - width).min(0)), np.tan((angle + width).max(0))
        low = np.where(near, 0, length / 2 + low / camera.pixel - 1).clip(0, length)
        high = np.where(near, length, length / 2 + high / camera.pixel + 1).clip(0, length)
        return [slice(int(a), int(b) + 1) for a, b in zip(low, high)]

    return list(zip(extent(-y, h), extent(x, w)))


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
    return np.where(t < leave.min(0), t, np.nan), rotate(axes.T, normal)


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
    """Enters the sphere about that point of the segment which is nearest to the entry into the endless cylinder."""
    offset, rise = start - origin, dot(axis, rays)
    foot = dot(axis, offset)
    near, _ = hit_ball(offset - axis * foot, rays - axis * rise, radius)
    offset = offset + axis * np.clip(near * rise - foot, 0, length)
    near, _ = hit_ball(offset, rays, radius)
    return near, (near * rays - offset) / radius


def hit_ball(offset, rays, radius):
    """Where rays enter and leave |t * rays - offset| < radius. By the closest approach, not the textbook discriminant:
    that loses a thin limb at ten metres to float32 rounding.
    """
    square = dot(rays, rays)
    middle = dot(offset, rays) / square
    gap = middle * rays - offset
    half = np.sqrt((radius * radius - dot(gap, gap)) / square)
    return middle - half, middle + half


def dot(a, b):
    return a[0] * b[0] + a[1] * b[1] + a[2] * b[2]


def rotate(matrix, vectors):
    """matrix (3, 3) times vectors (3, H, W). Not by BLAS, whose rounding may change with the number of threads."""
    return np.stack([dot(row, vectors) for row in np.float32(matrix)])


def yaw(angle):
    """Axes x, up, z as rows, turned about the vertical."""
    return np.array([[cos(angle), 0, sin(angle)], UP, [-sin(angle), 0, cos(angle)]])


def column(vector):
    return np.float32(vector).reshape(3, 1, 1)


# -------------------------------------------------------------------- one's own, PASCAL-Context, NYUDv2, Cityscapes

class LabelledDataset(torch.utils.data.Dataset, abc.ABC):
    """A data set of images and their labels: checks, augments, normalises and pads what `read` gives.

    One of one's own derives from it, with TASKS, list_names and read; `--dataset path/to/file.py:Class` of train.py and
    evaluate.py then makes it with (split, size).

    dataset[index] is the sample of epoch 0, dataset[epoch, index] that of any epoch (a sampler may yield such pairs).
    What augmentation draws is a pure function of (seed, epoch, index), so workers and ranks change nothing.
    Without augmentation the image keeps its scale and is padded to `size` on all sides (image 0, labels IGNORE). Where
    it is larger than that, it is padded to the next multiple of 32.
    """

    TASKS = {}            # output channels by task; the tasks of the module's docstring
    LABEL_SCALE = 1       # height and width of the labels in those of the image: MTMamba's output_scale
    DEPTH_RANGE = None    # of the depths that are scored, see make_meters

    def __init__(self, split="train", size=(480, 640), tasks=None, augment=None, seed=0):
        """split: "train", "val" or whatever list_names knows; size: (H, W) of the samples in pixels; tasks: names from
        TASKS, None for all; augment: None for the split "train" only; seed: of the augmentation.

        Raises ValueError for other values, and where there are no names.
        """
        check_task_table(type(self))
        self.tasks = choose_tasks(self.TASKS, tasks)
        if len(size) != 2 or min(size) < 1:
            raise ValueError(f"expected size (H, W) of at least 1 pixel each, found {size}; give a larger size")
        if seed < 0:
            raise ValueError(f"expected seed of at least 0, found {seed}; give a non-negative integer")
        self.split, self.size, self.seed = split, tuple(size), seed
        self.augment = split == "train" if augment is None else augment
        if self.augment and self.LABEL_SCALE != 1:
            raise ValueError("expected augment=False, as the labels are larger than the images")
        self.names = list(self.list_names())
        if not self.names:
            raise ValueError(f"expected images of the split {split!r} in {type(self).__name__}, found none")

    @abc.abstractmethod
    def list_names(self) -> list[str]:
        """The names of the split's images, in the order of the data set."""

    @abc.abstractmethod
    def read(self, name: str) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """The image, uint8 (h, w, 3), and at least the labels of self.tasks, in the forms that as_label takes.

        Raises FileNotFoundError or ValueError, naming the file.
        """

    def __len__(self):
        return len(self.names)

    def __getitem__(self, index):
        """The dictionary of the module's docstring. index: an int, or (epoch, index).

        Raises IndexError outside 0..len-1, what `read` raises, and ValueError, naming image and task, for a label of
        another size than the image's or with values out of range.
        """
        epoch, index = index if isinstance(index, tuple) else (0, index)
        name = self.name(index)
        image, labels = self.load(name)
        size = self.size
        if self.augment:
            image, labels = augment(image, labels, size, np.random.default_rng([self.seed, epoch, index]))
        else:
            size = tuple(length if n <= length else -n // 32 * -32 for n, length in zip(image.shape, size))
            image = to_tensor(image)
        mean, std = (torch.tensor(v).view(3, 1, 1) for v in (IMAGE_MEAN, IMAGE_STD))
        sample = {"image": torch.from_numpy(pad(((image - mean) / std).numpy(), size, 0))}
        size = tuple(self.LABEL_SCALE * n for n in size)
        sample |= {task: decode(task, pad(label, size, PADDING[task])) for task, label in labels.items()}
        return sample | {"name": name, "size": tuple(image.shape[1:])}

    def name(self, index: int) -> str:
        """Raises IndexError outside 0..len-1."""
        if not 0 <= index < len(self):
            raise IndexError(f"expected an index in 0..{len(self) - 1}, found {index}")
        return self.names[index]

    def load(self, name: str) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """What `read` gives, checked: the image, and the labels of self.tasks in the forms that as_label returns."""
        image, labels = self.read(name)
        if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8:
            raise ValueError(f"{name}: expected an image of uint8 (h, w, 3), found {image.dtype} {image.shape}")
        size = tuple(self.LABEL_SCALE * n for n in image.shape[:2])
        checked = {}
        for task, channels in self.tasks.items():
            with naming(f"{name}, {task}"):
                expect(task in labels, "a label", f"those of {list(labels)}")
                checked[task] = as_label(task, labels[task], channels, size)
        return image, checked

    def boundary_truth(self, index: int) -> np.ndarray:
        """The boundaries that odsF scores against: bool (h, w), at the image's own size; here the label, thinned.
        Raises as [index]."""
        return thin(self.load(self.name(index))[1]["boundary"][0] == 1)


class FileDataset(LabelledDataset):
    """What PascalContext, NYUDv2 and Cityscapes share: folders and a list of the split's images.

    The files themselves are first looked at when a sample is loaded; `python datasets.py check` looks at them all.
    """

    FOLDERS = {}    # folders by task, below the root, {} for the split; "image" for the images
    COUNTS = {}     # images by split, as published
    LIST = ""       # the file with a split's image IDs, one per line
    FILES = None    # the class that reads one image and its labels

    def __init__(self, root, split, tasks, size, augment, seed):
        """As LabelledDataset; root: folder, split: from COUNTS.

        Raises FileNotFoundError where the list or a folder is missing, too.
        """
        if split not in self.COUNTS:
            raise ValueError(f"expected split from {list(self.COUNTS)}, found {split!r}; choose one of them")
        self.root, self.last = Path(root), None
        for folder in ("", *dict.fromkeys(folder for key in ("image", *choose_tasks(self.TASKS, tasks))
                                          for folder in self.FOLDERS[key])):
            folder = self.root / folder.format(split)
            if not folder.is_dir():
                raise FileNotFoundError(f"no folder {folder}; unpack the archive of {type(self).__name__}, or give the "
                                        "place where it is unpacked as the root")
        super().__init__(split, size, tasks, augment, seed)

    def list_names(self):
        path = self.root / self.LIST.format(self.split)
        names = read_names(path, lambda name: self.files(name).image_path.exists())
        if not names:
            raise ValueError(f"expected image IDs, found none in {path}; unpack the archive again")
        return names

    def read(self, name):
        self.last = self.files(name)
        return self.last.image, {task: self.last.label(task) for task in self.tasks}

    load = read    # ImageFiles checks as it reads, and its labels are as as_label returns them

    def files(self, name: str, prepared: bool = True):
        """What reads an image's files; prepared: whether from prepared labels where there are any."""
        return self.FILES(self.root, name, prepared)

    def boundary_truth(self, index):
        name = self.name(index)    # most often of the sample just loaded: its files need not be read again
        return (self.last if self.last and self.last.name == name else self.files(name)).boundary_truth()


class PascalContext(FileDataset):
    """PASCAL-Context with the labels of the multi-task literature: 4,998 images to train on, 5,105 to validate.

    semseg     PASCAL VOC's 20 classes and background 0.
    parsing    PARTS; an image in which no part of a person is marked is ignored whole. Where masks overlap, the part
               that is listed later stands.
    saliency   1 where the distilled map is above 127, or of a mask (0 and 1, or as the role "mask" of read_image).
    normal     distilled; valid only inside those of LabelMap's 459 classes that also exist indoors (INDOOR), and where
               the vector is of about unit length. Differs: the published implementation does not look at the length.
    boundary   where the 4-neighbour Laplacian of LabelMap is not 0, thinned. This is the label to train on; odsF
               scores against another map, boundary_truth.
    """

    TASKS = {"semseg": 21, "parsing": len(PARTS), "saliency": 2, "normal": 3, "boundary": 1}
    FOLDERS = {"image": ["JPEGImages"], "semseg": ["semseg"], "parsing": ["human_parts"], "saliency": ["sal_distill"],
               "normal": ["normals_distill", "pascal-context/trainval"], "boundary": ["pascal-context/trainval"]}
    COUNTS = {"train": 4998, "val": 5105}
    LIST = "ImageSets/Context/{}.txt"
    ROOT = "data/PASCALContext"

    def __init__(self, root=ROOT, split="train", tasks=None, size=(512, 512), augment=None, seed=0):
        super().__init__(root, split, tasks, size, augment, seed)
        if {"parsing", "normal", "boundary"} & set(self.tasks) and any(self.files(n).outdated() for n in self.names):
            warnings.warn(f"{self.root / 'prepared'} holds labels that are older than their originals and so are not "
                          "used; run `python datasets.py prepare` again", stacklevel=2)


class NYUDv2(FileDataset):
    """NYUDv2: 795 images to train on, 654 to validate, 425x560 each.

    semseg     40 classes: 1..40 in the file are 0..39 here, 0 there is IGNORE here.
    depth      metres; 0 in the file is IGNORE here.
    normal     valid where the vector is of about unit length. Differs: the published implementation counts all.
    boundary   the edge image, as it is.
    """

    TASKS = {"semseg": 40, "depth": 1, "normal": 3, "boundary": 1}
    FOLDERS = {"image": ["images"], "semseg": ["segmentation"], "depth": ["depth"], "normal": ["normals"],
               "boundary": ["edge"]}
    COUNTS = {"train": 795, "val": 654}
    LIST = "gt_sets/{}.txt"
    ROOT = "data/NYUDv2"

    def __init__(self, root=ROOT, split="train", tasks=None, size=(448, 576), augment=None, seed=0):
        super().__init__(root, split, tasks, size, augment, seed)


class Cityscapes(FileDataset):
    """Cityscapes: 2,975 images to train on, 500 to validate, 1024x2048 each; a split is what lies in its folder.

    The network gets the image at half its size (`size`; Pillow's bilinear filter). Labels keep theirs, and nothing is
    cropped, flipped or recoloured. All as in the published runs.

    semseg     19 classes; all other label IDs are IGNORE.
    depth      disparity in pixels of the file's image: (p - 1) / 256 of its 16 bits p, -1 where p is 0 or 1, which is
               not measured; then 0 on label ID 10, rail track. Only what lies inside DEPTH_RANGE is scored, but all
               of it trains; mask_invalid makes the pixels at -1 IGNORE.
    """

    TASKS = {"semseg": 19, "depth": 1}
    FOLDERS = {"image": ["leftImg8bit/{}"], "semseg": ["gtFine/{}"], "depth": ["disparity/{}", "gtFine/{}"]}
    COUNTS = {"train": 2975, "val": 500}
    LIST = "leftImg8bit/{}"
    ROOT = "data/Cityscapes"
    LABEL_SCALE = 2
    DEPTH_RANGE = (0, 80)

    def __init__(self, root=ROOT, split="train", tasks=None, size=(512, 1024), seed=0, mask_invalid=False):
        super().__init__(root, split, tasks, size, augment=False, seed=seed)
        self.mask_invalid = mask_invalid
        self.FILES = partial(CityscapesFiles, split, self.size)

    def __getitem__(self, index):
        files = self.files(self.name(index[1] if isinstance(index, tuple) else index))
        image = Image.fromarray(files.image).resize(self.size[::-1], Image.Resampling.BILINEAR)
        mean, std = (torch.tensor(v).view(3, 1, 1) for v in (IMAGE_MEAN, IMAGE_STD))
        sample = {"image": (to_tensor(np.array(image)) - mean) / std}
        sample |= {task: torch.from_numpy(files.label(task)) for task in self.tasks}
        if self.mask_invalid and "depth" in self.tasks:
            sample["depth"][sample["depth"] < 0] = IGNORE
        return sample | {"name": files.name, "size": self.size}

    def list_names(self):
        folder = self.root / self.LIST.format(self.split)
        names = sorted(path.name.removesuffix("_leftImg8bit.png") for path in folder.glob("*/[!.]*_leftImg8bit.png"))
        if not names:
            raise ValueError(f"expected images CITY/CITY_..._leftImg8bit.png, found none in {folder}; unpack the "
                             "archive again")
        return names


DATASETS = {"pascal": PascalContext, "nyud": NYUDv2, "cityscapes": Cityscapes}


def find_dataset_class(name: str) -> type:
    """A class of DATASETS by its name; one of one's own by "path/to/file.py:Class", with TASKS and a constructor that
    takes (split, size). Raises FileNotFoundError, or ValueError where there is none."""
    if name in DATASETS:
        return DATASETS[name]
    file, _, class_name = name.rpartition(":")
    path = Path(file).resolve()
    if path.suffix != ".py":
        raise ValueError(f"expected a data set from {list(DATASETS)} or path/to/file.py:Class, found {name!r}")
    if not path.is_file():
        raise FileNotFoundError(f"no file {path}, in which {class_name} was expected")
    if str(path.parent) not in sys.path:
        sys.path.append(str(path.parent))    # where the processes of a loader find the class, too
    try:
        module = importlib.import_module(path.stem)
    except Exception as error:
        raise ValueError(f"cannot import {path}: {type(error).__name__}: {error}") from error
    if not getattr(module, "__file__", None) or Path(module.__file__).resolve() != path:
        raise ValueError(f"another module is named as {path}; rename the file")
    found = getattr(module, class_name, None)
    if not isinstance(found, type):
        raise ValueError(f"expected a class {class_name!r} in {path}, found {found}; its classes: "
                         f"{[key for key, value in vars(module).items() if isinstance(value, type)]}")
    check_task_table(found)
    try:
        inspect.signature(found).bind("train", (32, 32))
    except TypeError as error:
        raise ValueError(f"expected a constructor {class_name}(split, size) in {path}, found {class_name}"
                         f"{inspect.signature(found)}") from error
    return found


CHANNELS = {"saliency": 2, "normal": 3, "boundary": 1, "depth": 1}    # the other tasks have one per class


def check_task_table(dataset: type):
    """Raises ValueError where a data set's class has no table of tasks, or an impossible one."""
    table = getattr(dataset, "TASKS", None)
    known = isinstance(table, dict) and table and set(table) <= set(PADDING) and all(
        isinstance(n, int) and (n == CHANNELS[task] if task in CHANNELS else 2 <= n <= IGNORE)
        for task, n in table.items())
    if not known:
        raise ValueError(f"expected {dataset.__name__}.TASKS with output channels by task, {list(PADDING)}: as many as "
                         f"classes (2 to {IGNORE}), {CHANNELS}; found {table}")


def choose_tasks(table: dict[str, int], tasks: Iterable[str] | None) -> dict[str, int]:
    """The chosen rows of {task: channels}, in the order asked for; None for all. Raises ValueError on other names."""
    tasks = list(table) if tasks is None else list(tasks)
    if not tasks or not set(tasks) <= set(table):
        raise ValueError(f"expected tasks from {list(table)}, found {tasks}; name at least one, None for all")
    return {task: table[task] for task in tasks}


# ---------------------------------------------------------------------------------------------- one image's files

class ImageFiles:
    """Reads one image and its labels, each file at most once. Raises FileNotFoundError or ValueError naming the file.

    The label of a task is an array close to its file, so that scaling and cropping move few bytes; decode makes the
    final label of it.

    semseg, parsing, saliency, boundary   uint8 (1, h, w), as in the module's docstring
    normal                                uint8 (4, h, w): x, y, z as 255 (v + 1) / 2, and 1 where valid, else 0
    depth                                 float32 (1, h, w), 0 where unknown
    """

    IMAGE = ()      # folder, suffix

    def __init__(self, root: Path, name: str, prepared: bool = True):
        self.root, self.name, self.prepared = root, name, prepared
        self.image_path = self.path(*self.IMAGE)

    def path(self, folder: str, suffix: str) -> Path:
        return self.root / folder / (self.name + suffix)

    @cached_property
    def image(self) -> np.ndarray:
        """RGB, uint8 (h, w, 3)."""
        return read_image(self.image_path)

    def label(self, task: str) -> np.ndarray:
        return getattr(self, task)()

    def read(self, path: Path, role: str) -> np.ndarray:
        """A label image of the image's size: see read_image."""
        label = read_image(path, role)
        self.sized(label[0] if role == "normal" else label, path)
        return label

    def sized(self, label: np.ndarray, path: Path) -> np.ndarray:
        """label (h, w) itself. Raises ValueError where that is not the image's size."""
        if label.shape != self.image.shape[:2]:
            raise ValueError(f"expected the size of {self.image_path.name}, {self.image.shape[:2]}, found "
                             f"{label.shape} in {path}; unpack the archive again")
        return label

    def boundary_truth(self) -> np.ndarray:
        return boundary_ground_truth(self.boundary()[0])


class NYUDv2Files(ImageFiles):
    IMAGE = "images", ".png"

    def semseg(self):
        path = self.path("segmentation", ".png")
        label = in_range(self.read(path, "classes"), 40, path)
        return (label.astype(np.uint8) - np.uint8(1))[None]    # 0 becomes IGNORE by wrapping around

    def depth(self):
        path = self.path("depth", ".npy")
        with reading(path):
            depth = np.load(path).astype(np.float32)
        return in_range(self.sized(depth, path), 100, path)[None]    # catches millimetres

    def normal(self):
        path = self.path("normals", ".png")
        normal = self.read(path, "normal")
        with reading(path):
            return as_normal(normal, self.image.shape[:2])

    def boundary(self):
        return self.read(self.path("edge", ".png"), "mask")[None]


class PascalFiles(ImageFiles):
    IMAGE = "JPEGImages", ".jpg"
    ORIGINALS = ("human_parts", ".mat"), ("pascal-context/trainval", ".mat")    # of what is prepared
    PREPARED = "prepared", ".png"    # rename the folder when the packing changes, or old files will be misread

    def semseg(self):
        paths = [self.path(folder, ".png") for folder in ("semseg/VOC12", "semseg/pascal-context")]
        path = paths[0] if paths[0].exists() else paths[1]
        label = self.read(path, "classes")
        return np.uint8(in_range(label, 20, path, IGNORE))[None]

    def parsing(self):
        if self.packed is not None:
            part = self.packed & 7
            return np.where(part == 7, np.uint8(IGNORE), part)[None]
        path = self.path("human_parts", ".mat")
        label = np.zeros(self.image.shape[:2], np.uint8)
        for name, mask in person_parts(path):
            if name not in PART_NAMES:
                raise ValueError(f"expected parts of a person from {list(PART_NAMES)}, found {name!r} in {path}")
            label[self.sized(mask, path) > 0] = PART_NAMES[name]
        return (label if label.any() else np.full_like(label, IGNORE))[None]

    def saliency(self):
        return self.read(self.path("sal_distill", ".png"), "soft mask")[None]

    def normal(self):
        path = self.path("normals_distill", ".png")
        normal = self.read(path, "normal")
        normal[3] = INDOOR[self.label_map] if self.packed is None else self.packed >> 3 & 1
        with reading(path):
            return as_normal(normal, self.image.shape[:2])

    def boundary(self):
        edges = label_edges(self.label_map) if self.packed is None else self.packed >> 4 & 1
        return np.uint8(edges)[None]

    def boundary_truth(self):
        if self.packed is None:
            return boundary_ground_truth(self.label_map)
        return (self.packed >> 5 & 1).astype(bool)

    @cached_property
    def label_map(self) -> np.ndarray:
        """459 classes from 1, int32 (h, w)."""
        path = self.path("pascal-context/trainval", ".mat")
        label = in_range(self.sized(read_mat(path, "LabelMap"), path), 459, path)
        with reading(path):
            expect((label == label.astype(np.int32)).all(), "whole numbers as classes", label[label % 1 > 0])
        return label.astype(np.int32)

    @cached_property
    def packed(self) -> np.ndarray | None:
        """The prepared labels, uint8 (h, w), or None where there are none of these originals; see pack."""
        path = self.path(*self.PREPARED)
        if not self.prepared or not path.exists() or self.outdated():
            return None
        try:
            return self.read(path, "classes")
        except ValueError as error:
            raise ValueError(f"unusable file {path}; delete it and run `python datasets.py prepare` again") from error

    def outdated(self) -> bool:
        """Whether there are prepared labels, but of other originals than those that are there now."""
        path, *originals = (self.path(*place) for place in (self.PREPARED, *self.ORIGINALS))
        return path.exists() and any(p.exists() and p.stat().st_mtime > path.stat().st_mtime for p in originals)

    def pack(self) -> np.ndarray:
        """The labels that are slow to make from the originals, in the bits of one image, uint8 (h, w):
        0-2 part of a person (7: ignored), 3 normal is valid, 4 boundary, 5 boundary to score against."""
        masks = INDOOR[self.label_map], self.boundary()[0], self.boundary_truth()
        return self.parsing()[0] & 7 | sum(np.uint8(mask) << bit for bit, mask in enumerate(masks, start=3))


class CityscapesFiles(ImageFiles):
    IMAGE = "leftImg8bit", "_leftImg8bit.png"

    def __init__(self, split: str, size: tuple[int, int], root: Path, name: str, prepared: bool = True):
        self.split, self.size = split, size    # half that of the files
        super().__init__(root, name, prepared)

    def path(self, folder, suffix):
        return super().path(f"{folder}/{self.split}/{self.name.split('_')[0]}", suffix)

    @cached_property
    def image(self):
        image = read_image(self.image_path)
        found, expected = ("x".join(map(str, size)) for size in (image.shape[:2], [2 * n for n in self.size]))
        if found != expected:
            raise ValueError(f"expected an image of {expected} (HxW), twice the size that the network gets, found "
                             f"{found} in {self.image_path}; give --img-size or size half the images' size")
        return image

    def semseg(self):
        return LABEL_IDS[self.label_ids].astype(np.int64)[None]

    def depth(self):
        path = self.path("disparity", "_disparity.png")
        stored = self.read(path, "classes")
        if stored.dtype == np.uint8:
            raise ValueError(f"expected 16 bits per pixel, found 8 in {path}; unpack the archive again")
        disparity = np.where(stored > 1, (stored.astype(np.float32) - 1) / 256, np.float32(-1))
        disparity[self.label_ids == 10] = 0
        return disparity[None]

    @cached_property
    def label_ids(self) -> np.ndarray:
        """uint8 (h, w)."""
        path = self.path("gtFine", "_gtFine_labelIds.png")
        return in_range(self.read(path, "classes"), 33, path)


PascalContext.FILES, NYUDv2.FILES = PascalFiles, NYUDv2Files

LABEL_IDS = np.full(34, IGNORE, np.uint8)    # class by label ID of Cityscapes
LABEL_IDS[[7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33]] = range(19)

PERSON_INDEX = 15                   # class_ind of a person in human_parts
PART_NAMES = {name: part for part, names in enumerate((
    "hair head lear rear lebrow rebrow leye reye mouth nose", "neck torso", "luarm ruarm", "llarm rlarm lhand rhand",
    "luleg ruleg", "llleg rlleg lfoot rfoot"), start=HEAD) for name in names.split()}
INDOOR = np.isin(np.arange(460), [    # by class of LabelMap
    3, 4, 6, 9, 10, 11, 13, 15, 17, 18, 22, 23, 29, 30, 33, 34, 36, 37, 38, 39, 41, 43, 46, 49, 50, 51, 53, 55, 56, 59,
    61, 62, 65, 66, 68, 69, 72, 73, 78, 83, 84, 85, 87, 88, 95, 96, 101, 104, 105, 107, 111, 113, 115, 122, 124, 135,
    141, 142, 143, 146, 150, 154, 157, 158, 159, 165, 172, 174, 181, 183, 184, 191, 193, 195, 197, 199, 202, 213, 215,
    216, 219, 220, 223, 225, 228, 230, 232, 233, 238, 239, 242, 243, 246, 250, 251, 252, 255, 260, 261, 263, 269, 272,
    273, 275, 281, 283, 284, 285, 286, 287, 288, 290, 291, 292, 293, 295, 304, 307, 309, 310, 314, 315, 319, 323, 329,
    330, 331, 336, 342, 345, 349, 350, 351, 352, 355, 357, 368, 370, 371, 374, 379, 380, 383, 384, 397, 401, 403, 405,
    407, 408, 411, 412, 413, 414, 417, 419, 421, 423, 427, 429, 430, 432, 440, 441, 442, 443, 444, 446, 454, 457])


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turns whatever a reader raises into FileNotFoundError or ValueError that names the file."""
    try:
        yield
    except FileNotFoundError as error:
        raise FileNotFoundError(f"no file {path}; restore it from its archive") from error
    except Unfit as error:
        raise ValueError(f"{error} in {path}{error.advice}") from error
    except Exception as error:    # on damaged files the readers raise many kinds
        reason = f"{type(error).__name__}: {error}"
        raise ValueError(f"unreadable file {path} ({reason}); restore it from its archive") from error


def read_names(path: Path, exists: Callable[[str], bool] = lambda name: True) -> list[str]:
    """The image IDs in a list: UTF-8, one per line.

    exists: whether there is an image of an ID, which tells an ID with a space in it from a pair. Raises
    FileNotFoundError, or ValueError, with its number, for a line that is no ID.
    """
    names = []
    with reading(path):
        for number, line in enumerate(path.read_bytes().decode("utf-8-sig").split("\n"), start=1):
            if name := line.strip():
                kind = other_than_name(name, exists)
                expect(kind is None, "one image ID per line", f"{kind}, {name!r}, in line {number}")
                names.append(name)
    return names


def other_than_name(line: str, exists: Callable[[str], bool]) -> str | None:
    """What a line of a list is if it is no image ID."""
    if not line.replace("\t", " ").isprintable():
        return "control characters"
    if re.search(r"^[#%]|\s#", line):
        return "a comment"
    if "/" in line or "\\" in line:
        return "a path"
    if re.search(r"\.(jpe?g|png|bmp|gif|webp|tiff?|mat|npy|txt)$", line, re.IGNORECASE):
        return "a name with an ending"
    parts = re.split(r"[\s,;]+", line)
    if "\t" in line or len(parts) > 1 and not exists(line) and any(map(exists, parts)):
        return "a pair"
    return None


class Unfit(ValueError):
    """What a file holds is not what it should: `reading` adds its name."""


@contextmanager
def naming(what: str) -> Iterator[None]:
    """Begins the message with what it is about."""
    try:
        yield
    except Unfit as error:
        raise ValueError(f"{what}: {error}{error.advice}") from error


def expect(condition: bool, expected: str, found: object, advice: str = ""):
    """found: an array for its first value."""
    if not condition:
        error = Unfit(f"expected {expected}, found {found.flat[0] if isinstance(found, np.ndarray) else found}")
        error.advice = f"; {advice}" if advice else ""
        raise error


LOSSLESS = "PNG", "TIFF", "BMP"    # the formats of labels
BITS, PHOTOMETRIC, ORIENTATION, HIGHEST, SAMPLE_FORMAT = 258, 262, 274, 281, 339    # tags of TIFF and EXIF


def read_image(path: Path, role: str = "picture", turn: bool = False) -> np.ndarray:
    """The pixels of an image file, by what they mean:

    picture     uint8 (h, w, 3), RGB as a viewer shows it: 16 bits become 8 by the range of the format or the one that
                the file declares, transparent parts white; of several frames the first
    classes     integers (h, w): grey of 8 or more bits as it is stored, of a palette the indices
    mask        uint8 (h, w), 0 and 1: from 0 and 1, 0 and 255 (65535), 1 bit, or a palette's black and white or 0 and 1
    soft mask   the same, and from grey in more than 32 steps: 1 above 127
    normal      uint8 (4, h, w): RGB and 1, as as_label takes it

    turn: whether a picture is turned upright as its EXIF data say. Otherwise one that has to be is refused: nobody
    knows which way up the labels beside it are.
    Raises FileNotFoundError, or ValueError, naming the file, where it is damaged or its meaning not certain.
    """
    with reading(path), Image.open(path) as image:
        stored = image.tile[0][3] if image.tile else ""    # Pillow's name of the layout of the file's pixels
        stored = str(stored[0] if isinstance(stored, tuple) else stored)
        turned = image.getexif().get(ORIENTATION) in range(2, 9)
        expect(turn or not turned, "an upright image", "EXIF data that turn it", "save it turned, without them")
        tags = image.tag_v2 if image.format == "TIFF" else {}
        image.load()
        if role == "picture":
            picture = to_rgb(image, stored, tags)
            if turned and image.format != "TIFF":    # which Pillow turns by itself
                picture = picture.transpose(TURNS[image.getexif()[ORIENTATION]])
            return np.array(picture)
        expect(image.format in LOSSLESS and image.info.get("compression") != "jpeg", "a label without loss, in a file "
               f"of {', '.join(LOSSLESS)}", f"one of {image.format}")
        expect(getattr(image, "n_frames", 1) == 1, "one frame", getattr(image, "n_frames", 1))
        expect(tags.get(PHOTOMETRIC) != 0, "0 as black", "a TIFF with 0 as white")
        if role == "normal":
            expect(image.mode == "RGB", "three channels, RGB", f"mode {image.mode}")
            pixels = np.array(image)
            return np.stack([*pixels.transpose(2, 0, 1), np.ones(pixels.shape[:2], np.uint8)])
        if role != "classes":
            return mask_pixels(image, role == "soft mask")
        expect(image.mode in ("L", "P") or image.mode.startswith("I"), "one channel of integers", f"mode {image.mode}")
        expect(stored[:3] not in ("L;2", "L;4"), "8 or 16 bits per pixel, or a palette", f"grey of {stored[2:3]} bits")
        return np.array(image)


TURNS = {2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
         5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE,
         8: Image.Transpose.ROTATE_90}    # by EXIF's orientation


def to_rgb(image: Image.Image, stored: str, tags: dict) -> Image.Image:
    """A loaded picture in 8 bits per channel. tags: of TIFF."""
    expect(set(tags.get(SAMPLE_FORMAT, (1,))) == {1} and image.mode != "F", "unsigned integers",
           "signed ones or floats", TO_8_BITS)
    if image.mode.startswith("I"):
        expect(image.mode != "I" or image.format in ("PNG", "PPM"), "1, 8 or 16 bits per channel", "32", TO_8_BITS)
        expect(tags.get(PHOTOMETRIC) != 0 and "transparency" not in image.info, "16 bits from black to "
               "white", "a transparent value, or white as 0", TO_8_BITS)
        pixels = np.array(image)
        limit = max(tags.get(HIGHEST, (2 ** tags.get(BITS, (16,))[0] - 1,)))
        expect(pixels.max() <= limit, f"values up to the declared {limit}", pixels.max())
        certain(pixels.max(), limit, 4096)
        return Image.fromarray(np.rint(pixels * (255 / limit)).astype(np.uint8)).convert("RGB")
    if ";16" in stored and image.mode.startswith("RGB"):    # of which Pillow gives the higher byte
        certain(max(high for _, high in image.getextrema()[:3]), 255, 16)
    if image.mode == "La":
        image = image.convert("LA")
    if image.mode in ("LA", "PA", "RGBA", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


TO_8_BITS = "convert it to 8 bits per channel"


def certain(highest: int, limit: int, least: int):
    """Raises Unfit for a picture in 16 bits that may have 12 and does not say so: nearly black, or not."""
    expect(highest == 0 or highest >= least or limit not in (255, 65535), "a range that is declared, or all 16 bits",
           "12 bits or fewer in use", TO_8_BITS)


def mask_pixels(image: Image.Image, soft: bool) -> np.ndarray:
    """A loaded mask: uint8 (h, w), 0 and 1."""
    pixels = np.array(image)
    if image.mode == "P":
        colours = np.array(image.convert("RGB"))
        if (np.isin(colours, (0, 255)) & (colours == colours[..., :1])).all():    # black and white
            pixels = colours[..., 0]
    elif image.mode == "RGB" and (pixels == pixels[..., :1]).all():
        pixels = pixels[..., 0]
    expect(pixels.ndim == 2 and image.mode != "F", "one channel", f"mode {image.mode}")
    highest = pixels.max()
    if highest in (0, 1, 255, 65535) and ((pixels == 0) | (pixels == highest)).all():
        return (pixels > 0).astype(np.uint8)
    values = np.unique(pixels)
    expect(soft and image.mode == "L" and len(values) > 32, "0 and 1 or 0 and 255",
           f"{', '.join(map(str, values[:6]))}{', ...' if len(values) > 6 else ''}")
    return (pixels > 127).astype(np.uint8)


def read_mat(path: Path, name: str) -> np.ndarray:
    """The variable of a MATLAB file, structures as nested object arrays."""
    with reading(path), open(path, "rb") as file:
        return scipy.io.loadmat(file, variable_names=[name])[name]


def person_parts(path: Path) -> list[tuple[str, np.ndarray]]:
    """The parts of all persons in a file of human_parts, in its order: (name, mask (h, w))."""
    anno = read_mat(path, "anno")
    with reading(path):
        persons = [thing for thing in anno["objects"][0, 0].ravel() if thing["class_ind"].item() == PERSON_INDEX]
        return [(part["part_name"].item(), part["mask"]) for person in persons for part in person["parts"].ravel()]


def in_range(label: np.ndarray, last: int, path: Path, ignore: int = 0) -> np.ndarray:
    """label itself. Raises ValueError where a value is neither in 0..last nor `ignore`, so also for nan."""
    right = (label >= 0) & (label <= last) | (label == ignore)
    if not right.all():
        raise ValueError(f"expected values in 0..{last}{f' or {ignore}' if ignore else ''}, found {label[~right][0]} "
                         f"in {path}; unpack the archive again")
    return label


def label_edges(label_map: np.ndarray) -> np.ndarray:
    """Where the 4-neighbour Laplacian of a label map, mirrored at the border, is not 0; thinned: bool (h, w).

    label_map: signed integers (h, w).
    """
    padded = np.pad(label_map, 1, mode="reflect")
    neighbours = padded[:-2, 1:-1] + padded[2:, 1:-1] + padded[1:-1, :-2] + padded[1:-1, 2:]
    return thin(neighbours != 4 * padded[1:-1, 1:-1])


# ----------------------------------------------------------------------------------------------------------- labels

def as_label(task: str, label: np.ndarray, channels: int, size: tuple[int, int]) -> np.ndarray:
    """A label as a data set reads it -> a compact array that augment, pad and decode work on.

    semseg, parsing, saliency, boundary   integers (h, w) or (1, h, w), IGNORE where unknown -> uint8 (1, h, w)
    depth                                 floats (h, w) or (1, h, w), metres, 0 or IGNORE where unknown
                                          -> float32 (1, h, w), 0 where unknown
    normal                                floats (3, h, w), unit vectors, 0 or IGNORE in all three where unknown, or
                                          uint8 (4, h, w): 255 (v + 1) / 2, and 1 where known
                                          -> the latter, in float32 if it was floats

    size: (h, w). A normal that is far from unit length has no direction: unknown. Raises ValueError where there are
    many of them, for another shape or kind of number, and for values out of range.
    """
    label = np.asarray(label)
    if task == "normal":
        return as_normal(label, size)
    expected = f"({size[0]}, {size[1]})"
    expect(label.shape in (size, (1, *size)), f"the shape {expected}, as the image", label.shape)
    label = label.reshape(1, *size)
    if task == "depth":
        expect(label.dtype.kind == "f", "metres as floats", label.dtype)
        wrong = ~(label >= 0) | (label == np.inf)
        expect(not wrong.any(), "depths above 0, or 0 where unknown", label[wrong])
        return np.where(label == IGNORE, 0, label).astype(np.float32)
    last = max(channels, 2) - 1
    if task == "boundary" and label.dtype.kind == "f":
        wrong = ~np.isin(label, (0, 1, IGNORE))
        expect(not wrong.any(), f"0, 1 or {IGNORE}", label[wrong])
        return label.astype(np.uint8)
    expect(label.dtype.kind in "uib", "integers", label.dtype)
    wrong = (label > last) & (label != IGNORE)
    if label.dtype.kind == "i":
        wrong |= label < 0
    expect(not wrong.any(), f"classes in 0..{last} or {IGNORE}", label[wrong])
    return label.astype(np.uint8)


def check_sample(sample: dict, tasks: dict[str, int], label_scale: int = 1):
    """Raises ValueError, naming the sample and the task, where a sample is not as the module's docstring has it.

    tasks: output channels by task; label_scale: height and width of the labels in those of the image.
    """
    name, image = sample.get("name"), sample.get("image")
    if not isinstance(name, str) or image is None or "size" not in sample:
        raise ValueError(f"{name}: expected the entries image, name and size in a sample, found {sorted(sample)}")
    if not isinstance(image, Tensor):
        raise ValueError(f"{name}: expected the image as a tensor, found {type(image).__name__}")
    if image.ndim != 3 or len(image) != 3 or image.dtype != torch.float32 or not image.isfinite().all():
        raise ValueError(f"{name}: expected an image of finite float32 (3, H, W), found {image.dtype} "
                         f"{tuple(image.shape)} with {(~image.isfinite()).sum()} values that are not finite")
    size = tuple(label_scale * n for n in image.shape[1:])
    for task, channels in tasks.items():
        with naming(f"{name}, {task}"):
            expect(task in sample, "a label", f"those of {sorted(set(sample) & set(PADDING))}")
            label = sample[task]
            expect(isinstance(label, Tensor), "a tensor", type(label).__name__)
            label = label.numpy()
            expect(label.ndim == 3, f"the shape (C, {size[0]}, {size[1]})", label.shape)
            known = as_label(task, label, channels, size)
            if task == "normal":
                wrong = label[:, (known[3] == 0) & (label != IGNORE).any(0)]
                expect(wrong.size == 0, f"vectors of length 1, or {IGNORE} in all channels", wrong.T[:1].tolist())
            if task == "depth":
                expect((label > 0).all(), f"depths above 0, or {IGNORE} where unknown", label[label <= 0])


def checks_itself(dataset: torch.utils.data.Dataset) -> bool:
    """Whether its samples are those of a class of this module, which checks what it reads."""
    return type(dataset).__getitem__.__module__ == __name__


def check_samples(dataset: torch.utils.data.Dataset, count: int = 16) -> list[str]:
    """What is odd about the first `count` samples: one message for each label of which no pixel counts, and for each of
    saliency and boundary without a positive pixel. Raises ValueError as check_sample, and what the data set raises."""
    tasks = dict(getattr(dataset, "tasks", dataset.TASKS))
    samples = [dataset[i] for i in range(min(count, len(dataset)))]
    messages = []
    for sample in samples if not checks_itself(dataset) else ():
        check_sample(sample, tasks, getattr(dataset, "LABEL_SCALE", 1))
    for task in tasks:
        labels, positive = [sample[task] for sample in samples], task in ("saliency", "boundary")
        if not any(((label == 1) if positive else (label != IGNORE)).any() for label in labels):
            values = torch.cat([label.unique() for label in labels]).unique().tolist()
            messages.append(f"{task}: no {'positive ' * positive}pixel counts in the first {len(samples)} samples, "
                            f"{samples[0]['name']} to {samples[-1]['name']}: their values are {values[:6]}")
    return messages


LENGTHS = 0.75, 1.25    # of what passes for a unit vector
MANY = 0.4              # of the normals with another length: this is no image of normals


def as_normal(label: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """See as_label."""
    if label.dtype.kind == "f":
        expect(label.shape == (3, *size), f"the shape {(3, *size)}, as the image", label.shape)
        expect(np.isfinite(label).all(), "finite vectors", "nan or inf")
        known = (label != IGNORE).any(0)
        label = np.float32([*((label + 1) * 127.5), known])
    expect(label.shape == (4, *size) and label.dtype in (np.uint8, np.float32), f"floats {(3, *size)} or uint8 "
           f"{(4, *size)}, as the image", f"{label.dtype} {label.shape}")
    vectors = label[:3].astype(np.float32)
    vectors -= 127.5
    vectors *= vectors
    square = (vectors[0] + vectors[1] + vectors[2]) / 127.5 ** 2    # of the length
    known = label[3] > 0
    kept = known & (square > LENGTHS[0] ** 2) & (square < LENGTHS[1] ** 2)
    off = known & ~kept & (square > 0.01)
    expect(np.count_nonzero(off) <= MANY * np.count_nonzero(known), "vectors of length 1",
           f"{np.mean(off):.0%} of other lengths")
    grey = label.dtype == np.uint8 and kept.any() and (label[:3] == label[0]).all()
    expect(not grey, "x, y and z in red, green and blue", "a grey image")
    return np.concatenate([label[:3], kept[None].astype(label.dtype)])


PADDING = {"semseg": IGNORE, "parsing": IGNORE, "saliency": IGNORE, "boundary": IGNORE, "normal": 0, "depth": 0}


def decode(task: str, label: np.ndarray) -> Tensor:
    """A label of ImageFiles, padded with PADDING or not -> that of the module's docstring. Normals keep the length
    that they have in the file, 1 up to its 8 bits."""
    if task == "depth":
        label = np.where(label > 0, label, np.float32(IGNORE))
    elif task == "normal":
        valid, label = label[3], label[:3] * np.float32(2 / 255)
        label -= 1
        np.copyto(label, IGNORE, where=valid == 0)
    else:
        label = label.astype(np.float32 if task == "boundary" else np.int64)
    return torch.from_numpy(label)


def to_tensor(image: np.ndarray) -> Tensor:
    """uint8 (h, w, 3) -> float32 (3, h, w) in 0..1."""
    return torch.from_numpy(image).permute(2, 0, 1).contiguous().float() / 255


def centred(outer: tuple[int, int], inner: tuple[int, int]) -> tuple[slice, slice]:
    """Rows and columns of an area of the size `inner` (h, w) in the middle of one of the size `outer`."""
    return tuple(slice((a - b) // 2, (a - b) // 2 + b) for a, b in zip(outer, inner))


def pad(array: np.ndarray, size: tuple[int, int], value: float) -> np.ndarray:
    """(C, h, w) -> (C, H, W), in the middle. Raises ValueError where it is larger."""
    if array.ndim != 3 or array.shape[1] > size[0] or array.shape[2] > size[1]:
        raise ValueError(f"expected (C, h, w) of at most {size[0]}x{size[1]}, found {array.shape}")
    padded = np.full((len(array), *size), value, array.dtype)
    rows, columns = centred(size, array.shape[1:])
    padded[:, rows, columns] = array
    return padded


# ---------------------------------------------------------------------------------------------------- augmentation

SCALE = 0.5, 2.0
CROPS = 10                                                       # tries
LARGEST_SHARE = 0.75                                             # of one class among a crop's labelled pixels
JITTER = (                                                      # each with probability 0.5, in this order
    (lambda image, value: (image + value).clamp(0, 1), (-32 / 255, 32 / 255)),
    (lambda image, value: (image * value).clamp(0, 1), (0.5, 1.5)),    # contrast, as in SSD's augmentation
    (TF.adjust_saturation, (0.5, 1.5)),
    (TF.adjust_hue, (-0.1, 0.1)),                                # 0.1 of a turn is 36 degrees
)


def augment(image: np.ndarray, labels: dict[str, np.ndarray], size: tuple[int, int], rng: np.random.Generator):
    """Scales, crops, flips and recolours: image (3, h', w') float32 in 0..1, and labels (C, h', w').

    image: uint8 (h, w, 3); labels: of ImageFiles, as are those returned; size: (H, W) of the crop, h' < H or w' < W
    where the scaled image is smaller. Up to 10 crops are tried until no class of semseg covers more than 75 % of the
    labelled pixels; without semseg the first one is taken. What is drawn does not depend on the image or the tasks.
    """
    check_shapes(image, labels)
    scale = rng.uniform(*SCALE)
    corners = rng.random((CROPS, 2))
    flipped = rng.random() < 0.5
    colours = [(adjust, rng.uniform(*bounds)) for adjust, bounds in JITTER]
    colours = [colour for colour, applied in zip(colours, rng.random(len(JITTER)) < 0.5) if applied]

    scaled = [max(1, round(length * scale)) for length in image.shape[:2]]
    for corner in corners:
        rows, columns = crop = [window(*lengths) for lengths in zip(corner, scaled, size)]
        # The pixels of the original that are nearest to those of the crop.
        y, x = (((np.arange(n)[part] + 0.5) * (m / n)).astype(int) for n, m, part in zip(scaled, image.shape, crop))
        if "semseg" not in labels or not dominated(labels["semseg"][:, y][:, :, x]):
            break

    image = TF.resize(torch.from_numpy(image).permute(2, 0, 1), scaled, antialias=False)[:, rows, columns]
    if flipped:
        image, x = image.flip(2), x[::-1]
    image = image.contiguous().float() / 255
    for adjust, value in colours:
        image = adjust(image, value)

    labels = {task: label[:, y][:, :, x] for task, label in labels.items()}
    if "depth" in labels:
        labels["depth"] /= np.float32(scale)    # what looks larger is nearer
    if "normal" in labels and flipped:
        labels["normal"][0] = 255 - labels["normal"][0]    # x points the other way
    return image, labels


def check_shapes(image: np.ndarray, labels: dict[str, np.ndarray]):
    """Raises ValueError where a label is not of the image's size."""
    for task, label in labels.items():
        if label.shape != (4 if task == "normal" else 1, *image.shape[:2]):
            raise ValueError(f"{task}: expected {4 if task == 'normal' else 1} channels of the image's size "
                             f"{image.shape[:2]}, found {label.shape}")


def window(position: float, length: int, size: int) -> slice:
    """`size` consecutive ones of 0..length-1, or all of them; position in [0, 1) chooses where it starts."""
    start = int(position * (max(length - size, 0) + 1))
    return slice(start, min(start + size, length))


def dominated(semseg: np.ndarray) -> bool:
    """Whether one class covers more than LARGEST_SHARE of the labelled pixels."""
    counts = np.bincount(semseg.ravel(), minlength=IGNORE + 1)[:IGNORE]
    return counts.max() > LARGEST_SHARE * counts.sum()


# ------------------------------------------------------------------------------------------- check, prepare, export

def main(argv: list[str] | None = None) -> int:
    parser = Parser(prog="datasets.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    for name, purpose in (("check", "read every file; exit code 1 where something is missing or wrong"),
                          ("prepare", "store the labels that are slow to make; may be interrupted and run again")):
        command = commands.add_parser(name, help=purpose, description=purpose)
        command.add_argument("--dataset", choices=DATASETS, required=True)
        command.add_argument("--workers", type=int, default=os.cpu_count(), help="processes (default: one per core)")
    purpose = "write synthetic scenes in the files of a data set"
    command = commands.add_parser("export", help=purpose, description=purpose)
    command.add_argument("--format", dest="dataset", choices=DATASETS, required=True)
    command.add_argument("--count", type=int, default=40, help="images to train on; a quarter as many to validate")
    command.add_argument("--size", type=int, nargs=2, metavar=("H", "W"), help="default: 375 500, 425 560 or 1024 2048")
    for command in commands.choices.values():
        command.add_argument("--root", type=Path, help=f"default: {' or '.join(d.ROOT for d in DATASETS.values())}")
    args = parser.parse_args(argv)
    dataset = DATASETS[args.dataset]
    root = args.root or Path(dataset.ROOT)
    try:
        if args.command == "export":
            export(args.dataset, root, args.count, args.size)
            return 0
        if args.workers < 1:
            raise ValueError(f"expected --workers of at least 1, found {args.workers}")
        if not root.is_dir():
            raise FileNotFoundError(f"no folder {root}; give the place where the archive is unpacked with --root")
        if args.command == "check":
            return int(check(dataset, root, args.workers) > 0)
        if dataset is not PascalContext:
            print(f"nothing to prepare: {dataset.__name__}'s labels are read fast enough as they are")
            return 0
        messages = prepare(root, args.workers)
        print_problems("not prepared", messages)
        return int(bool(messages))
    except KeyboardInterrupt:
        parser.exit(130, "datasets.py: interrupted\n")
    except WriteError as error:
        parser.exit(1, f"datasets.py: {error}; make room, then run it again\n")
    except (ValueError, OSError) as error:
        parser.error(str(error))


def prepare(root: Path, workers: int) -> list[str]:
    """Writes the labels of PASCAL-Context that are slow to make, one image each, to the folder prepared below root.

    May be interrupted and run again: it skips what is newer than its originals, and a file is there whole or not at
    all. Returns the messages about images that could not be prepared.
    """
    splits = [PascalContext(root, split, ["parsing", "boundary"]) for split in PascalContext.COUNTS]
    names = [name for split in splits for name in split.names]
    PascalFiles(root, "").path(*PascalFiles.PREPARED).parent.mkdir(exist_ok=True)
    return list(filter(None, parallel(partial(prepare_image, root), names, workers, "preparing")))


def prepare_image(root: Path, name: str) -> str | None:
    """Returns a message where the image's files are missing or wrong. Raises WriteError."""
    files = PascalFiles(root, name, prepared=False)
    target = files.path(*files.PREPARED)
    if target.exists() and all(files.path(*place).exists() for place in files.ORIGINALS) and not files.outdated():
        return None
    try:
        packed = files.pack()
    except (FileNotFoundError, ValueError) as error:
        return str(error)
    with replacing(target, f".{os.getpid()}.tmp") as file:    # of its own, as somebody else may be preparing, too
        Image.fromarray(packed).save(file, "PNG")


def check(dataset: type[FileDataset], root: Path, workers: int) -> int:
    """Reads every file of both splits and prints what is missing or wrong; returns the number of problems."""
    total, differing, listed = 0, [], {}
    for split, published in dataset.COUNTS.items():
        try:
            data = dataset(root, split)
            exported = all(name.startswith(EXPORTED) for name in data.names)
            if exported and dataset is Cityscapes:    # of any size, but all of the same
                size = [length // 2 for length in read_image(data.files(data.names[0]).image_path).shape[:2]]
                data = Cityscapes(root, split, size=size)
        except (FileNotFoundError, ValueError) as error:
            print(f"{split}: {error}")
            total += 1
            continue
        indices = list({name: i for i, name in enumerate(data.names)}.values())    # each image once
        found = parallel(partial(image_problems, data), indices, workers, f"checking {split}")
        print(f"{split}: {len(data)} images; published: {published}")
        if len(data) != published:
            differing.append(f"{split} has {len(data)} of {published} images")
            if not exported:
                print(f"  {data.root / data.LIST.format(split)}: expected {published} images; unpack the archive again")
                total += 1
        problems_by_kind = {"list": list_problems(data, listed)}
        problems_by_kind |= {kind: [problems[kind] for problems in found if kind in problems]
                             for kind in ("image", *data.tasks, "prepared")}
        for kind, messages in problems_by_kind.items():
            total += len(messages)
            print_problems(kind, messages)
    print(f"{total} problems" if total else "no problems" + (f", but {' and '.join(differing)}" if differing else ""))
    return total


def list_problems(data: FileDataset, listed: dict[str, Path]) -> list[str]:
    """Messages about IDs that occur twice, in the split's list or in that of another one. listed: the lists by ID, to
    which this one's are added."""
    path, counts = data.root / data.LIST.format(data.split), Counter(data.names)
    messages = [f"{name} occurs {count} times in {path}" for name, count in counts.items() if count > 1]
    messages += [f"{name} occurs in {listed[name]} and in {path}" for name in counts if name in listed]
    listed |= dict.fromkeys(counts, path)
    return messages


def image_problems(data: FileDataset, index: int) -> dict[str, str]:
    """Messages by task, and of the "image" and "prepared" labels. An image that cannot be read is all that is said."""
    name, problems = data.names[index], {}
    files = data.files(name, prepared=False)
    steps = {"image": lambda: files.image}
    steps |= {task: partial(files.label, task) for task in data.tasks}
    steps |= {"prepared": partial(check_prepared, data.files(name), files)}
    for kind, step in steps.items():
        try:
            step()
        except (FileNotFoundError, ValueError) as error:
            if str(error) not in problems.values():    # two labels may come from one file
                problems[kind] = str(error)
            if kind == "image":
                break
    return problems


def check_prepared(files: ImageFiles, originals: ImageFiles):
    """Raises ValueError where the prepared labels are not those of the originals."""
    if isinstance(files, PascalFiles) and files.outdated():
        raise ValueError(f"older than its originals: {files.path(*files.PREPARED)}; run `python datasets.py prepare` "
                         "again")
    if isinstance(files, PascalFiles) and files.packed is not None and (files.packed != originals.pack()).any():
        path = files.path(*files.PREPARED)
        raise ValueError(f"other labels than the originals' in {path}; delete it and run `python datasets.py prepare` "
                         "again")


def print_problems(kind: str, messages: list[str], shown: int = 3):
    if messages:
        print(f"  {kind}: {len(messages)} problems")
        print("\n".join(f"    {message}" for message in messages[:shown]))
        if len(messages) > shown:
            print(f"    and {len(messages) - shown} more")


def parallel(function: Callable, items: Iterable, workers: int, description: str) -> list:
    """[function(item) for item in items] on `workers` processes (1: in this one), with a progress bar."""
    pool = ProcessPoolExecutor(workers, initializer=follow_main) if workers > 1 else None
    results = pool.map(function, items, chunksize=8) if pool else map(function, items)
    try:
        with tqdm(results, description, len(items), unit="img") as bar:
            return list(bar)
    finally:
        if pool:
            pool.shutdown(cancel_futures=True)


# By class of Synthetic: those of LabelMap, PASCAL VOC and NYUDv2 that come closest. Sphere, box, cylinder: potted
# plant, table, bottle; for NYUDv2 other prop, box, lamp.
LABEL_MAP = np.array([158, 440, 68, 360, 308, 397, 34, 284])
CITYSCAPES = np.array([7, 11, 12, 23, 21, 26, 17, 24])    # road, building, wall, sky, vegetation, car, pole, person
VOC = np.array([0, 0, 0, 0, 16, 11, 5, PERSON_INDEX])
VOC_NAMES = {16: "pottedplant", 11: "table", 5: "bottle", PERSON_INDEX: "person"}
NYUD = np.array([2, 1, 22, 0, 40, 29, 35, 31])
EXPORTED = "synthetic_"    # the names of exported images begin with it
PART_FILES = ("", "head", "torso", "luarm", "llarm", "luleg", "llleg")    # one name for each of PARTS


def export(kind: str, root: Path, count: int, size: tuple[int, int] | None = None):
    """Writes `count` synthetic scenes to train on and a quarter as many (at least 2) to validate, in the files of
    a data set of DATASETS below root. size: (h, w) of the images in pixels, None for 375x500, 425x560 or 1024x2048; of
    PASCAL-Context's images every fourth is upright.

    Raises FileExistsError where root holds anything, ValueError for a count or size that Synthetic refuses, WriteError.
    """
    if root.exists() and (not root.is_dir() or any(root.iterdir())):
        raise FileExistsError(f"expected an empty or a new folder, found {root}; name another one or remove it")
    size = size or {"pascal": (375, 500), "nyud": (425, 560), "cityscapes": (1024, 2048)}[kind]
    if kind == "cityscapes" and any(length % 2 for length in size):
        raise ValueError(f"expected an even height and width, as Cityscapes' images are halved, found {size}")
    for seed, (split, images) in enumerate({"train": count, "val": max(2, count // 4)}.items()):
        scenes, upright = Synthetic(images, size, seed), Synthetic(images, size[::-1], seed)
        scene_files = {"pascal": pascal_files, "nyud": nyud_files, "cityscapes": partial(cityscapes_files, split)}[kind]
        names = [f"{EXPORTED}{seed}{i:05d}_000019" if kind == "cityscapes" else f"{EXPORTED}{split}_{i:05d}"
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
        f"depth/{name}.npy": np.where(maps["depth"] == IGNORE, 0, maps["depth"])[0],
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
    disparity = np.where(depth == IGNORE, 0, 1 + 256 * 100 / depth).clip(max=2**16 - 1)
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
    """Unit vectors (3, h, w) -> pixels in 0..255; IGNORE becomes the normal that faces the viewer."""
    normal = np.where(normal == IGNORE, np.reshape([0, 0, 1], (3, 1, 1)), normal)
    return (normal + 1) * 255 / 2


# --------------------------------------------- how scripts write and end, shared with evaluate.py and train.py

class Parser(argparse.ArgumentParser):
    """Ends a run on bad input with one line and exit code 2."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}\n")


def interrupt(number: int, frame: object):
    """The handler of SIGTERM: ends a script as Ctrl-C does, so that it ends its processes and clears away what it has
    written half."""
    signal.signal(number, signal.SIG_IGN)    # launchers and clusters send several
    raise KeyboardInterrupt


class WriteError(OSError):
    """Names what could not be written, and why."""


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turns what a full disk and the like raise into a WriteError, also where a library raises another error for it."""
    try:
        yield
    except Exception as error:
        reason, cause = None, error
        while cause:
            reason = cause if isinstance(cause, OSError) else reason
            cause = cause.__cause__ or cause.__context__
        if reason is None:
            raise
        raise WriteError(f"cannot write {path} ({reason.strerror or reason})") from error


@contextmanager
def replacing(path: Path, suffix: str = ".tmp") -> Iterator[BinaryIO]:
    """A file to write to, which then takes the place of path: an existing one is replaced only by a whole one, and
    nothing is left where writing fails. Raises WriteError then."""
    temporary = path.with_suffix(suffix)
    try:
        with writing(path):
            with open(temporary, "wb") as file:
                yield file
            os.replace(temporary, path)
    except BaseException:
        with suppress(OSError):
            temporary.unlink()
        raise


def append(path: Path, text: str):
    """Adds the whole text to the end of a file, or nothing. Raises WriteError then."""
    data = text.encode()
    with writing(path), open(path, "ab", buffering=0) as file:
        end = file.seek(0, os.SEEK_END)
        if file.write(data) < len(data):    # what a disk still has room for
            file.truncate(end)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, interrupt)
    warnings.filterwarnings("ignore", ".*older than their originals")    # `check` says it, and `prepare` ends it
    sys.exit(main())
