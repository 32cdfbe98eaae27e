"""Data sets for multi-task dense prediction.

Every data set yields one dictionary per image:

    "image"     float32 (3, H, W)   RGB, normalised by IMAGE_MEAN and IMAGE_STD
    "semseg"    int64   (1, H, W)   class
    "parsing"   int64   (1, H, W)   body part, an index into PARTS
    "saliency"  int64   (1, H, W)   1 salient, 0 not
    "normal"    float32 (3, H, W)   unit vector in camera space: x right, y up, z towards the viewer
    "boundary"  float32 (1, H, W)   1 on a boundary, 0 elsewhere
    "depth"     float32 (1, H, W)   metres along the optical axis, as a depth camera gives it
    "name"      str
    "size"      (h, w)

with only those labels that were asked for. IGNORE marks label pixels that count neither in losses nor in metrics.
"""

from math import cos, pi, sin
from typing import Callable, NamedTuple

import numpy as np
import torch

IMAGE_MEAN = (0.485, 0.456, 0.406)
IMAGE_STD = (0.229, 0.224, 0.225)
IGNORE = 255
PARTS = ("background", "head", "torso", "upper arm", "lower arm", "upper leg", "lower leg")
HEAD, TORSO, UPPER_ARM, LOWER_ARM, UPPER_LEG, LOWER_LEG = range(1, 7)


class Synthetic(torch.utils.data.Dataset):
    """Ray-cast rooms and open grounds with objects and people, and exact labels for all six tasks.

    Needs no files. An image depends on (seed, index, size) alone, so any number of workers gives the same data, and
    two seeds give two disjoint splits.

    semseg     CLASSES. "floor" is also the ground outdoors, "wall" also a building.
    parsing    PARTS; 0 away from people. An image without people counts in full (PASCAL-Context ignores such images).
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
        tasks = list(self.TASKS) if tasks is None else list(tasks)
        if not tasks or not set(tasks) <= set(self.TASKS):
            raise ValueError(f"expected tasks from {list(self.TASKS)}, found {tasks}; name at least one, None for all")
        if count < 1:
            raise ValueError(f"expected count of at least 1, found {count}; ask for one image or more")
        if len(size) != 2 or min(size) < 32:
            raise ValueError(f"expected size (H, W) of at least 32 pixels each, found {size}; give a larger size")
        if seed < 0:
            raise ValueError(f"expected seed of at least 0, found {seed}; give a non-negative integer")
        self.count, self.size, self.seed, self.tasks = count, tuple(size), seed, {t: self.TASKS[t] for t in tasks}

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        """The dictionary of the module's docstring. Raises IndexError outside 0..count-1."""
        maps = self.render(index)
        mean, std = (np.float32(v).reshape(3, 1, 1) for v in (IMAGE_MEAN, IMAGE_STD))
        sample = {"image": torch.from_numpy((maps["image"] - mean) / std)}
        sample |= {task: torch.from_numpy(maps[task]) for task in self.tasks}
        return sample | {"name": f"synthetic-{index:06d}", "size": self.size}

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
            "parsing": part[None],
            "saliency": np.int64(label >= SPHERE)[None],
            "normal": np.where(sky, np.float32(IGNORE), rotate(camera.turn, normal)),
            "boundary": instance_boundary(instance)[None],
            "depth": np.where(sky, np.float32(IGNORE), depth)[None],
            "instance": instance,
            "rays": camera.rays,
        }


# The renderer of Synthetic. World axes: x right, y up, the camera above the origin looks along -z; the floor is y = 0.
# Vectors that meet maps of pixels have shape (3, 1, 1). All maps are float32.

FLOOR, WALL, CEILING, SKY, SPHERE, BOX, CYLINDER, PERSON = range(8)    # Synthetic.CLASSES
FAR = 25.0                                                              # metres; where the ground ends
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
    groups = [[plane(SKY, FAR * UP, -UP, draw_paint(rng, COLOURS["sky"], x, z, 12.0))]]
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


def instance_boundary(instance):
    """(H, W) integers -> float32 (H, W): 1 where a pixel differs from its right, lower or lower-right neighbour."""
    padded = np.pad(instance, ((0, 1), (0, 1)), mode="edge")
    return np.float32((instance != padded[:-1, 1:]) | (instance != padded[1:, :-1]) | (instance != padded[1:, 1:]))
