"""The miniature's world: one coloured shape moving over a patterned background, with its mask and its caption."""

from __future__ import annotations

import dataclasses
import math

import torch
from torch import Tensor

SHAPES = ("circle", "square", "triangle", "star")
COLOURS = {
    "red": (0.86, 0.10, 0.12),
    "green": (0.10, 0.62, 0.18),
    "blue": (0.12, 0.25, 0.88),
    "yellow": (0.97, 0.86, 0.10),
    "purple": (0.55, 0.12, 0.68),
    "orange": (0.98, 0.52, 0.06),
    "white": (0.98, 0.98, 0.98),
    "black": (0.04, 0.04, 0.05),
}
BACKGROUNDS = ("gradient", "striped", "checkered", "dotted")
DIRECTIONS = {"left": (0.0, -1.0), "right": (0.0, 1.0), "up": (-1.0, 0.0), "down": (1.0, 0.0)}

SIZE, FRAMES = 96, 17
HELD_OUT = 10**6  # first seed of the held-out scenes; training uses seeds from 0
MARGIN = 4  # pixels between the shape's radius and the edge of its box mask, the same for every shape


@dataclasses.dataclass(frozen=True)
class Scene:
    """One video, fully determined by its fields (lengths in pixels, positions are (y, x) of the shape's centre)."""

    shape: str
    colour: str
    background: str
    direction: str
    radius: float
    start: tuple[float, float]
    speed: float  # pixels per frame
    tones: tuple[tuple[float, float, float], tuple[float, float, float]]  # the background's two colours
    period: float  # of the background's pattern
    angle: float  # of the background's pattern, radians
    phase: float  # of the background's pattern, in periods

    @property
    def caption(self) -> str:
        what = f"{article(self.colour)} {self.colour} {self.shape}"
        return f"{what} moving {self.direction} over a {self.background} background"

    def centres(self, frames: int = FRAMES) -> Tensor:
        """Centre of the shape in every frame, [F, 2] as (y, x)."""
        step = torch.tensor(DIRECTIONS[self.direction]) * self.speed
        return torch.tensor(self.start) + step * torch.arange(frames)[:, None]


def article(word: str) -> str:
    return "an" if word[0] in "aeiou" else "a"


def sample(seed: int, size: int = SIZE, frames: int = FRAMES) -> Scene:
    """The scene of this seed. The shape stays inside the picture in every frame."""
    g = torch.Generator().manual_seed(seed)
    unit = lambda low, high: low + (high - low) * torch.rand((), generator=g).item()
    pick = lambda names: tuple(names)[int(torch.randint(len(names), (), generator=g))]
    shape, colour, background, direction = pick(SHAPES), pick(COLOURS), pick(BACKGROUNDS), pick(DIRECTIONS)
    radius, speed = unit(10.0, 14.0), unit(0.6, 1.6)
    low, high, travel = radius + 2, size - radius - 2, speed * (frames - 1)
    start = []
    for sign in DIRECTIONS[direction]:
        start.append(unit(low + travel * (sign < 0), high - travel * (sign > 0)))
    grey = unit(0.35, 0.65)  # muted tones: no background is mistaken for a shape's colour
    first = (grey + unit(-0.12, 0.12), grey + unit(-0.12, 0.12), grey + unit(-0.12, 0.12))
    contrast = unit(0.12, 0.24) * (1 if unit(0, 1) < 0.5 else -1)
    second = (first[0] + contrast, first[1] + contrast, first[2] + contrast)
    return Scene(
        shape=shape,
        colour=colour,
        background=background,
        direction=direction,
        radius=radius,
        start=(start[0], start[1]),
        speed=speed,
        tones=(first, second),
        period=unit(16.0, 28.0),
        angle=unit(0.0, math.pi),
        phase=unit(0.0, 1.0),
    )


def render(scene: Scene, size: int = SIZE, frames: int = FRAMES) -> Tensor:
    """The video, [F, H, W, 3] fp32 in [0, 1], edges anti-aliased over one pixel."""
    inside = torch.stack([_coverage(scene, centre, size) for centre in scene.centres(frames)])[..., None]
    return inside * torch.tensor(COLOURS[scene.colour]) + (1 - inside) * _background(scene, size)


def box_mask(
    scene: Scene, size: int = SIZE, frames: int = FRAMES, *, still: bool = False, margin: int = MARGIN
) -> Tensor:
    """The box around the shape, [F, H, W] bool, following it, or one box around its whole way (`still`).

    The box depends on the radius and the margin only, so it says nothing about the shape inside.
    """
    centres, reach = scene.centres(frames), scene.radius + margin
    low, high = centres - reach, centres + reach
    if still:
        low, high = low.amin(0).expand_as(low), high.amax(0).expand_as(high)
    grid = torch.arange(size) + 0.5
    inside = (grid >= low[..., None]) & (grid <= high[..., None])  # [F, 2, size]
    return inside[:, 0, :, None] & inside[:, 1, None, :]


def _grid(size: int) -> tuple[Tensor, Tensor]:
    axis = torch.arange(size) + 0.5
    return axis[:, None].expand(size, size), axis[None, :].expand(size, size)


def _background(scene: Scene, size: int) -> Tensor:
    y, x = _grid(size)
    cos, sin = math.cos(scene.angle), math.sin(scene.angle)
    u, w = (cos * x + sin * y) / scene.period + scene.phase, (cos * y - sin * x) / scene.period + scene.phase
    soft = lambda wave: (wave * scene.period / 3).clamp(-1, 1) / 2 + 0.5  # an edge about three pixels wide
    if scene.background == "gradient":
        mix = ((cos * (x / size - 0.5) + sin * (y / size - 0.5)) + 0.5).clamp(0, 1)
    elif scene.background == "striped":
        mix = soft((2 * math.pi * u).sin())
    elif scene.background == "checkered":
        mix = soft((math.pi * u).sin() * (math.pi * w).sin() * 2)
    else:
        mix = soft(2 * (0.3 - ((u - u.round()) ** 2 + (w - w.round()) ** 2).sqrt()))
    first, second = (torch.tensor(tone) for tone in scene.tones)
    return mix[..., None] * second + (1 - mix[..., None]) * first


def _coverage(scene: Scene, centre: Tensor, size: int) -> Tensor:
    """Share of each pixel that the shape covers, [H, W], from its signed distance (negative inside)."""
    y, x = _grid(size)
    y, x, r = y - centre[0], x - centre[1], scene.radius
    if scene.shape == "circle":
        distance = (x * x + y * y).sqrt() - 0.95 * r
    elif scene.shape == "square":
        distance = torch.maximum(x.abs(), y.abs()) - 0.82 * r
    elif scene.shape == "triangle":
        distance = _polygon_distance(x, y, 3, r * 1.05, r * 1.05 * math.cos(math.pi / 3), 0.18 * r)
    else:
        distance = _polygon_distance(x, y, 5, r * 1.05, r * 0.45, 0.0)
    return (0.5 - distance).clamp(0, 1)


def _polygon_distance(x: Tensor, y: Tensor, points: int, outer: float, inner: float, drop: float) -> Tensor:
    """Distance to the edges of a star with `points` tips at radius `outer` and notches at `inner`, one tip up.

    With inner = outer·cos(pi/points) it is the regular polygon. `drop` moves the centre down by so many pixels.
    """
    sector = math.pi / points
    angle = torch.atan2(x, -(y - drop))
    turns = angle / (2 * sector)
    folded = (turns - turns.round()).abs() * 2 * sector  # 0 at a tip, `sector` at a notch
    reach = (x * x + (y - drop) ** 2).sqrt()
    px, py = reach * folded.cos(), reach * folded.sin()
    tip, notch = (outer, 0.0), (inner * math.cos(sector), inner * math.sin(sector))
    ex, ey = notch[0] - tip[0], notch[1] - tip[1]
    return ((px - tip[0]) * ey - (py - tip[1]) * ex) / math.hypot(ex, ey)
