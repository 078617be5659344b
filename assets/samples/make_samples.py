"""Draws the sample pictures beside this file: a chest film, a product shot, a label with text.

Everything here is drawn from numbers: no photograph, no scan, no font file of the machine (Pillow carries its own).
The same Pillow gives the same pixels every time, which a test checks.

    python assets/samples/make_samples.py [FOLDER]
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageChops, ImageDraw, ImageFilter, ImageFont

SCALE = 2  # drawn at twice the size, then reduced: smooth edges
Point = tuple[float, float]


def font(size: float) -> ImageFont.FreeTypeFont:
    """Pillow's own font, in final pixels."""
    return ImageFont.load_default(size * SCALE)  # type: ignore[return-value]


def scaled(points: list[Point]) -> list[Point]:
    """Final pixels to drawn ones."""
    return [(x * SCALE, y * SCALE) for x, y in points]


def reduced(image: Image.Image) -> Image.Image:
    """The drawn picture at its final size."""
    return image.resize((image.width // SCALE, image.height // SCALE), Image.Resampling.LANCZOS)


def smooth(points: list[Point], closed: bool = True, steps: int = 16) -> list[Point]:
    """A Catmull-Rom curve through the points."""
    p = np.array(points, dtype=float)
    p = np.concatenate([p[-1:], p, p[:2]]) if closed else np.concatenate([p[:1], p, p[-1:]])
    t = np.linspace(0, 1, steps, endpoint=False)[:, None]
    pieces = [
        0.5 * (2 * b + (c - a) * t + (2 * a - 5 * b + 4 * c - d) * t**2 + (3 * b - a - 3 * c + d) * t**3)
        for a, b, c, d in zip(p, p[1:], p[2:], p[3:], strict=False)
    ]
    curve = [(float(x), float(y)) for x, y in np.concatenate(pieces)]
    return curve if closed else [*curve, points[-1]]


def texture(random: np.random.Generator, grain: int, size: tuple[int, int]) -> np.ndarray:
    """Noise of about unit variance, in grains of so many pixels: ``(height, width)``."""
    noise = random.normal(size=(size[1] // grain, size[0] // grain)).astype(np.float32)
    return np.asarray(Image.fromarray(noise).resize(size, Image.Resampling.BICUBIC))


# ------------------------------------------------------------------------------------------------ chest film


def chest_film() -> Image.Image:
    """A frontal film, 512 x 560.

    What each part adds to or takes from the ray's path is summed, then put through a film's exponential curve. The
    heart is drawn clearly too wide (0.57 of the thorax).
    """
    width, height = 512, 560

    def layer(
        *polygons: list[Point], blur: float, lines: list[tuple[list[Point], float]] | None = None
    ) -> np.ndarray[Any, Any]:
        """A mask from 0 to 1 with soft edges."""
        image = Image.new("L", (width * SCALE, height * SCALE))
        draw = ImageDraw.Draw(image)
        for polygon in polygons:
            draw.polygon(scaled(polygon), fill=255)
        for points, thick in lines or ():
            draw.line(scaled(points), fill=255, width=round(thick * SCALE), joint="curve")
        return np.array(reduced(image.filter(ImageFilter.GaussianBlur(blur * SCALE))), dtype=float) / 255

    def mirrored(points: list[Point]) -> list[Point]:
        return [(width - x, y) for x, y in points]

    body = smooth(
        [(212, -30), (206, 40), (176, 66), (96, 86), (34, 118), (-20, 190), (-30, 330), (24, 350), (40, 440), (44, 590),
         (468, 590), (472, 440), (488, 350), (542, 330), (532, 190), (478, 118), (416, 86), (336, 66), (306, 40),
         (300, -30)]
    )  # fmt: skip
    lung_right = smooth(
        [(206, 86), (168, 98), (128, 140), (100, 206), (84, 290), (76, 380), (80, 446), (104, 426), (146, 408),
         (190, 412), (216, 428), (218, 380), (226, 300), (230, 200), (228, 120)]
    )  # fmt: skip
    lung_left = smooth(
        [(306, 86), (344, 98), (384, 140), (412, 206), (428, 290), (436, 380), (432, 462), (408, 442), (370, 430),
         (326, 436), (300, 446), (296, 380), (288, 300), (284, 200), (284, 120)]
    )  # fmt: skip
    heart = smooth(
        [(252, 236), (226, 268), (208, 318), (202, 372), (216, 420), (262, 446), (330, 446), (392, 432), (408, 404),
         (392, 352), (356, 300), (318, 262), (290, 236)]
    )  # fmt: skip
    vessels = smooth([(242, 110), (236, 180), (236, 260), (300, 260), (306, 214), (310, 186), (298, 166), (276, 150),
                      (272, 110)])  # fmt: skip
    domes = [*smooth([(64, 452), (104, 424), (148, 406), (196, 412), (236, 436)], closed=False),
             *smooth([(300, 448), (344, 432), (384, 432), (418, 450), (448, 474)], closed=False), (470, 600),
             (40, 600)]  # fmt: skip

    lungs = layer(lung_right, lung_left, blur=3.5)
    silhouette = layer(body, blur=5)
    ray = silhouette.copy()
    # The chest is an oval from above: its rim is thinner than its middle, and skin folds lie at the sides.
    x, y = np.meshgrid(np.linspace(-1, 1, width), np.linspace(-1, 1, height))
    ray *= 0.80 + 0.30 * np.sqrt(np.clip(1 - (x / 1.15) ** 2, 0, 1)) + 0.10 * np.clip(y, -1, 1)
    ray -= 0.74 * lungs * (0.97 + 0.06 * np.clip(y + 0.5, -1, 1))
    ray += 0.44 * layer(heart, blur=3.5)
    ray += 0.26 * layer(vessels, blur=4)
    ray += 0.42 * layer(domes, blur=3) * silhouette * (1 - 0.35 * np.clip((y - 0.55) * 2, 0, 1))
    stomach = smooth([(336, 458), (366, 450), (392, 462), (392, 486), (360, 492), (338, 480)])
    ray -= 0.16 * layer(stomach, blur=5)
    breast = smooth([(70, 396), (150, 410), (214, 384), (206, 300), (140, 280), (84, 320)])
    ray += 0.045 * layer(breast, mirrored(breast), blur=14)

    # Ribs: hoops seen from the front. The back half falls outwards, the front half falls inwards and is fainter.
    for index in range(10):
        top, reach = 92 + 35 * index, 92 + 82 * np.sin(min(index + 1.2, 7.5) / 7.5 * np.pi / 2)
        fall = 10 + 5.5 * index
        back = smooth(
            [(256 - 14, top - 4), (256 - 0.45 * reach, top - 10 + 0.1 * fall), (256 - 0.82 * reach, top + 0.5 * fall),
             (256 - reach, top + fall + 14)],
            closed=False,
        )  # fmt: skip
        front = smooth(
            [(256 - reach, top + fall + 14), (256 - 0.90 * reach, top + fall + 42),
             (256 - 0.62 * reach, top + fall + 66), (256 - 0.40 * reach, top + fall + 74)],
            closed=False,
        )  # fmt: skip
        for curve, thick, weight in ((back, 11.0, 0.165), (front, 12.5, 0.085)):
            if curve is front and index > 6:
                continue
            both = (curve, mirrored(curve))
            ray += weight * layer(blur=1.2, lines=[(points, thick) for points in both])
            ray -= 0.45 * weight * layer(blur=1.6, lines=[(points, thick * 0.45) for points in both])  # marrow

    clavicle = smooth([(240, 122), (200, 114), (156, 104), (112, 106), (72, 112)], closed=False)
    scapula = smooth([(70, 104), (112, 130), (124, 190), (112, 252), (98, 270), (82, 210), (66, 150)])
    humerus = smooth([(44, 92), (62, 98), (60, 116), (40, 160), (28, 230), (10, 350), (-24, 350), (0, 220), (16, 140)])
    collarbones = (clavicle, mirrored(clavicle))
    bones = 0.26 * layer(blur=1.5, lines=[(curve, 13.0) for curve in collarbones])
    bones -= 0.12 * layer(blur=2.5, lines=[(curve, 6.5) for curve in collarbones])  # marrow
    bones += 0.30 * layer(humerus, mirrored(humerus), blur=2) - 0.13 * layer(humerus, mirrored(humerus), blur=9)
    ray += bones * silhouette
    ray += 0.10 * layer(scapula, mirrored(scapula), blur=2.5)

    # Spine: vertebral bodies and the dark discs between them, spinous processes; the windpipe lies before it.
    bodies: list[list[Point]] = [
        [(238, 20 + 27 * i), (274, 20 + 27 * i), (272, 40 + 27 * i), (240, 40 + 27 * i)] for i in range(20)
    ]
    ray += 0.20 * layer([(236, -10), (276, -10), (278, 570), (234, 570)], blur=4) + 0.12 * layer(*bodies, blur=2)
    knobs = [
        smooth([(252, 30 + 27 * i), (256, 26 + 27 * i), (260, 30 + 27 * i), (256, 40 + 27 * i)]) for i in range(20)
    ]
    ray += 0.10 * layer(*knobs, blur=1.2)
    windpipe = smooth([(256, -10), (255, 60), (257, 130), (260, 196)], closed=False)
    bronchi = [smooth([(260, 190), (238, 214), (214, 236)], closed=False),
               smooth([(260, 190), (290, 216), (316, 234)], closed=False)]  # fmt: skip
    ray -= 0.30 * layer(blur=2.5, lines=[(windpipe, 17.0)]) + 0.16 * layer(
        blur=3, lines=[(branch, 10.0) for branch in bronchi]
    )

    # Vessels of the lungs: from each hilum outwards, thinner at every fork.
    random = np.random.default_rng(7)
    branches: list[tuple[list[Point], float]] = []
    for hilum, side in (((220.0, 246.0), -1), ((300.0, 240.0), 1)):
        angles = np.linspace(-1.3, 1.3, 9)
        ends = [((hilum[0], hilum[1] + 20 * float(a)), np.pi / 2 * (1 - side) + side * a, 5.5) for a in angles]
        while ends:
            start, angle, thick = ends.pop()
            length = float(random.uniform(20, 36))
            end = (start[0] + length * float(np.cos(angle)), start[1] + 1.25 * length * float(np.sin(angle)))
            branches.append(([start, end], thick))
            if thick > 1.3:
                spread = random.uniform(0.12, 0.45, 2)
                ends += [(end, angle - spread[0], thick * 0.68), (end, angle + spread[1], thick * 0.68)]
    for least, most, weight in ((0.0, 1.3, 0.025), (1.3, 2.6, 0.045), (2.6, 9.0, 0.055)):
        ray += weight * lungs * layer(blur=1.0, lines=[branch for branch in branches if least < branch[1] <= most])
    haze = smooth([(226, 216), (198, 226), (194, 262), (212, 292), (230, 280)])
    ray += 0.16 * layer(haze, [(x + 2, y - 6) for x, y in mirrored(haze)], blur=10)

    film = 1 - np.exp(-0.95 * np.clip(ray, 0, None))
    film = np.clip((film - 0.03) / 0.80, 0, 1) ** 1.25
    # No tissue is smooth: soft structure, a few pixels wide, where the rays met any, and the film's grain.
    tissue = 5 * texture(random, 3, (width, height)) + 6 * texture(random, 8, (width, height))
    grain = random.normal(0, 1, (height, width))
    grey = 6 + 238 * film + np.clip(3 * film, 0, 1) * tissue + 3 * grain
    grey = np.clip(grey, 0, 255).round().astype(np.uint8)

    marks = Image.new("L", (width * SCALE, height * SCALE))
    draw = ImageDraw.Draw(marks)
    draw.text((468 * SCALE, 24 * SCALE), "L", fill=235, font=font(30), stroke_width=SCALE // 2)
    draw.text((14 * SCALE, 16 * SCALE), "SYNTHETIC", fill=190, font=font(13))
    return ImageChops.lighter(Image.fromarray(grey), reduced(marks))


# ---------------------------------------------------------------------------------------------- product shot


def ramp(size: tuple[int, int], top: tuple[int, int, int], bottom: tuple[int, int, int]) -> Image.Image:
    """A vertical run of colour."""
    t = np.linspace(0, 1, size[1])[:, None, None]
    rows = np.array(top) * (1 - t) + np.array(bottom) * t
    return Image.fromarray(np.broadcast_to(rows.round(), (size[1], size[0], 3)).astype(np.uint8))


def orange(picture: Image.Image, centre: Point, radius: float) -> None:
    """An orange: a lit ball with dimples, a stem scar and a shadow on the shelf."""
    shade = Image.new("L", picture.size)
    x0, y0, r = centre[0] * SCALE, centre[1] * SCALE, radius * SCALE
    ImageDraw.Draw(shade).ellipse((x0 - r, y0 + 0.72 * r, x0 + 1.15 * r, y0 + 1.12 * r), fill=150)
    picture.paste((70, 48, 30), mask=shade.filter(ImageFilter.GaussianBlur(r / 7)))
    n = int(2 * r)
    v, u = np.mgrid[-1 : 1 : n * 1j, -1 : 1 : n * 1j]
    inside = np.clip(1 - u**2 - v**2, 0, None)
    w = np.sqrt(inside)
    random = np.random.default_rng(int(radius * 10 + centre[0]))
    spots = Image.fromarray(random.integers(0, 256, (n, n), dtype=np.uint8)).filter(ImageFilter.GaussianBlur(2.2))
    dimples = (np.asarray(spots, dtype=float) - 127.5) / 127.5
    light = np.clip(-0.45 * u - 0.6 * v + 0.66 * w, 0, 1) + 0.25 * dimples * w
    base = np.array([[[238, 128, 18]]]) * (0.42 + 0.66 * light[..., None])
    base += 150 * np.clip(-0.40 * u - 0.52 * v + 0.755 * w - 0.93, 0, None)[..., None] * 10  # the lamp's reflection
    base += np.array([[[60, 22, 0]]]) * (1 - w[..., None]) * 0.5
    ball = Image.fromarray(np.clip(base, 0, 255).astype(np.uint8))
    mask = Image.new("L", (n, n))
    ImageDraw.Draw(mask).ellipse((1, 1, n - 2, n - 2), fill=255)
    picture.paste(ball, (int(x0 - r), int(y0 - r)), mask)
    draw = ImageDraw.Draw(picture)
    sx, sy = x0 + 0.12 * r, y0 - 0.66 * r
    draw.ellipse((sx - 0.10 * r, sy - 0.06 * r, sx + 0.10 * r, sy + 0.06 * r), fill=(96, 92, 30))
    draw.ellipse((sx - 0.05 * r, sy - 0.04 * r, sx + 0.05 * r, sy + 0.02 * r), fill=(150, 140, 60))


def product_shot() -> Image.Image:
    """A carton of orange juice with two oranges on a shop's shelf, 512 x 512."""
    size = 512 * SCALE
    picture = ramp((size, size), (226, 232, 233), (196, 206, 209))
    draw = ImageDraw.Draw(picture)

    def polygon(points: list[Point], fill: tuple[int, int, int]) -> None:
        draw.polygon(scaled(points), fill=fill)

    # Neighbours out of focus, then the shelf's board and its rail.
    for x, colour in ((4, (176, 196, 150)), (92, (208, 176, 160)), (372, (166, 186, 206)), (454, (206, 198, 150))):
        polygon([(x, 150), (x + 74, 150), (x + 74, 430), (x, 430)], colour)
        polygon([(x, 150), (x + 16, 112), (x + 58, 112), (x + 74, 150)], tuple(c - 14 for c in colour))  # type: ignore[arg-type]
        polygon([(x + 12, 230), (x + 62, 230), (x + 62, 300), (x + 12, 300)], tuple(c + 22 for c in colour))  # type: ignore[arg-type]
    picture = picture.filter(ImageFilter.GaussianBlur(7 * SCALE))
    picture.paste(ramp((size, 62 * SCALE), (206, 178, 142), (176, 144, 106)), (0, 394 * SCALE))
    picture.paste(ramp((size, 56 * SCALE), (244, 244, 242), (208, 210, 210)), (0, 456 * SCALE))

    shadow = Image.new("L", picture.size)
    ImageDraw.Draw(shadow).polygon(scaled([(170, 436), (330, 440), (420, 418), (352, 404), (180, 410)]), fill=170)
    picture.paste((64, 44, 28), mask=shadow.filter(ImageFilter.GaussianBlur(9 * SCALE)))
    draw = ImageDraw.Draw(picture)

    # Carton: front, side, the gable that leans back, the fin on top, the cap.
    front = Image.new("L", picture.size)
    ImageDraw.Draw(front).polygon(scaled([(160, 150), (290, 150), (290, 436), (160, 436)]), fill=255)
    picture.paste(ramp(picture.size, (255, 176, 40), (246, 128, 16)), mask=front)
    polygon([(290, 150), (344, 136), (344, 412), (290, 436)], (200, 96, 10))
    polygon([(160, 150), (176, 92), (300, 92), (290, 150)], (255, 196, 84))
    polygon([(290, 150), (300, 92), (344, 136)], (176, 82, 8))
    polygon([(174, 70), (302, 70), (302, 94), (174, 94)], (255, 210, 120))
    polygon([(174, 84), (302, 84), (302, 87), (174, 87)], (226, 150, 60))
    draw.ellipse([c * SCALE for c in (208, 104, 252, 140)], fill=(28, 112, 58))
    draw.ellipse([c * SCALE for c in (208, 98, 252, 132)], fill=(46, 150, 82))
    draw.ellipse([c * SCALE for c in (217, 104, 243, 125)], fill=(70, 176, 106))

    # Print on the front: a white band with the name, a sliced orange, the volume.
    polygon([(160, 176), (290, 176), (290, 258), (160, 258)], (255, 252, 244))
    polygon([(290, 176), (344, 160), (344, 238), (290, 258)], (214, 204, 186))
    for text, y, points, fill, stroke in (
        ("SUNNY", 180, 34, (222, 92, 8), 1.2), ("ORANGE JUICE", 221, 15.5, (30, 110, 58), 0.5),
        ("100 % fruit", 239, 11.5, (90, 90, 84), 0), ("1 litre", 410, 15, (255, 250, 236), 0.5),
    ):  # fmt: skip
        draw.text((225 * SCALE, y * SCALE), text, fill, font(points), "ma", stroke_width=round(stroke * SCALE))
    cx, cy = 225 * SCALE, 334 * SCALE
    for r, fill in ((58, (236, 108, 6)), (54, (255, 240, 206)), (50, (255, 168, 36))):
        draw.ellipse((cx - r * SCALE, cy - r * SCALE, cx + r * SCALE, cy + r * SCALE), fill=fill)
    for k in range(10):
        a = 2 * np.pi * k / 10
        end = (cx + 50 * SCALE * float(np.cos(a)), cy + 50 * SCALE * float(np.sin(a)))
        draw.line([(cx, cy), end], fill=(255, 240, 206), width=3 * SCALE)
    draw.ellipse((cx - 6 * SCALE, cy - 6 * SCALE, cx + 6 * SCALE, cy + 6 * SCALE), fill=(255, 240, 206))
    leaf = smooth([(262, 284), (276, 264), (300, 262), (290, 282), (270, 292)])
    polygon([(x - 18, y) for x, y in leaf], (46, 140, 70))
    draw.line(scaled([(246, 288), (276, 266)]), fill=(24, 96, 48), width=SCALE)
    gloss = Image.new("L", picture.size)
    ImageDraw.Draw(gloss).polygon(scaled([(166, 152), (186, 152), (186, 434), (166, 434)]), fill=70)
    picture.paste((255, 255, 255), mask=gloss.filter(ImageFilter.GaussianBlur(6 * SCALE)))

    orange(picture, (392, 384), 46)
    orange(picture, (104, 396), 42)

    draw = ImageDraw.Draw(picture)
    draw.rounded_rectangle([c * SCALE for c in (176, 462, 336, 506)], 5 * SCALE, (255, 222, 60), (190, 160, 30), SCALE)
    draw.text((186 * SCALE, 467 * SCALE), "Orange juice 1 l", (30, 30, 30), font(11))
    draw.text((186 * SCALE, 481 * SCALE), "2.49", (190, 20, 20), font(21), stroke_width=SCALE // 2)
    draw.text((326 * SCALE, 487 * SCALE), "per carton", (30, 30, 30), font(10), "ra")
    return reduced(picture)


# ---------------------------------------------------------------------------------------------------- label


def label() -> Image.Image:
    """A nutrition label as it stands on a packet of oat biscuits, 480 x 600."""
    width, height = 480, 600
    picture = Image.new("RGB", (width * SCALE, height * SCALE), (232, 220, 196))
    draw = ImageDraw.Draw(picture)
    ink = (24, 24, 24)

    def text(x: float, y: float, words: str, size: float, bold: bool = False, right: bool = False) -> None:
        anchor = "ra" if right else "la"
        draw.text((x * SCALE, y * SCALE), words, ink, font(size), anchor, stroke_width=SCALE // 2 if bold else 0)

    def rule(y: float, thick: float) -> None:
        draw.rectangle((40 * SCALE, y * SCALE, 440 * SCALE, (y + thick) * SCALE - 1), fill=ink)

    draw.rounded_rectangle([c * SCALE for c in (24, 20, 456, 580)], 10 * SCALE, (253, 252, 248), ink, 2 * SCALE)
    text(40, 32, "Oat Biscuits", 36, bold=True)
    text(40, 78, "Nutrition facts", 25, bold=True)
    text(40, 111, "8 servings per packet", 16)
    text(40, 132, "Serving size", 16, bold=True)
    text(440, 132, "2 biscuits (25 g)", 16, right=True, bold=True)
    rule(158, 9)
    text(40, 174, "Energy per serving", 20, bold=True)
    text(440, 168, "115 kcal", 28, bold=True, right=True)
    rule(206, 4)
    rows = [
        ("Fat", "4.5 g", True), ("of which saturated", "0.8 g", False), ("Carbohydrate", "16 g", True),
        ("of which sugars", "4.2 g", False), ("Fibre", "2.1 g", True), ("Protein", "2.0 g", True),
        ("Salt", "0.15 g", True),
    ]  # fmt: skip
    for index, (name, amount, bold) in enumerate(rows):
        y = 217 + 31 * index
        text(40 if bold else 60, y, name, 18, bold=bold)
        text(440, y, amount, 18, right=True)
        rule(y + 25, 1)
    rule(434, 5)
    text(40, 446, "Ingredients: whole oats (62 %), wheat flour,", 15)
    text(40, 466, "sunflower oil, sugar, honey, sea salt.", 15)
    text(40, 488, "Contains: oats, wheat (gluten).", 15, bold=True)
    text(40, 510, "May contain traces of nuts.", 15)
    text(40, 544, "Best before: 30 June 2027", 16, bold=True)
    text(440, 545, "Net 200 g", 16, right=True)
    return reduced(picture)


PICTURES = {"chest_film.png": chest_film, "product_shot.png": product_shot, "label.png": label}


def main(folder: Path) -> None:
    """Writes every picture into `folder`."""
    for name, draw in PICTURES.items():
        draw().save(folder / name, optimize=True)
        print(f"{folder / name}: {(folder / name).stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent)
