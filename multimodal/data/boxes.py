"""Where to look: the boxes that SLAKE draws around organs and findings, and which of them a question is about.

Beside each picture lies `detection.json`, a list of `{label: [x, y, width, height]}` in pixels of the picture as it
lies there. `boxes_for` looks for the labels' names in the question; where it names none that has a box, it takes the
findings if health is asked about, and last the names in the answer. It reads words and understands nothing: what it
can't match, it leaves without a box, since a wrong box does more harm than a missing one. "Left" is the patient's
left, as in the labels.
"""

import json
import re
from functools import cache
from pathlib import Path

from multimodal.data.sample import Box, DataError, read_text

FILE = "detection.json"
REMEDY = 'Write a list like [{"Liver": [x, y, width, height]}] in pixels, or delete the file'
SIDES = {"left": "left", "right": "right", "左": "left", "右": "right"}
BOTH = frozenset(SIDES.values())
# The words between a side and the name that it belongs to: "left and right kidney", "lower left lung", 左侧肾脏.
SIDED = re.compile(r"(?:(?:\b(?:left|right|upper|lower|middle|both|and|or)\b[\s,]*)+|[左右上下中双侧部和或、]+)$", re.I)

TUMORS = ("brain tumor", "tumor", "脑肿瘤", "脑部肿瘤", "脑瘤", "肿瘤")
# What people call each label that occurs, its side left out: English, then Chinese. A name that is part of a longer one
# (liver in "liver cancer", 气管 in 支气管) never counts inside it. A label that is not here goes by its own name.
NAMES: dict[str, tuple[str, ...]] = {
    "atelectasis": ("atelectasis", "肺不张"),
    "bladder": ("bladder", "膀胱"),
    "brain edema": ("brain edema", "edema", "脑水肿", "水肿"),
    "brain enhancing tumor": (
        "brain enhancing tumor",
        "enhancing tumor",
        "增强型脑肿瘤",
        "脑部增强型肿瘤",
        "脑部增强肿瘤",
        *TUMORS,
    ),
    "brain non-enhancing tumor": (
        "brain non-enhancing tumor",
        "non-enhancing tumor",
        "非增强型脑肿瘤",
        "脑部非增强型肿瘤",
        "脑部非增强肿瘤",
        *TUMORS,
    ),
    "brain stem": ("brain stem", "brainstem", "脑干"),
    "cardiomegaly": ("cardiomegaly", "心脏肥大", "心脏增大"),
    "colon": ("colon", "large bowel", "large intestine", "bowel", "intestine", "结肠", "大肠", "肠"),
    "duodenum": ("duodenum", "十二指肠"),
    "ear": ("ear", "耳朵", "耳"),
    "effusion": ("effusion", "pleural effusion", "胸腔积液", "积液"),
    "esophagus": ("esophagus", "oesophagus", "食管", "食道"),
    "eye": ("eye", "眼睛", "眼"),
    "femoral head": ("femoral head", "股骨头"),
    "heart": ("heart", "心脏"),
    "infiltrate": ("infiltrate", "infiltration", "pulmonary infiltration", "肺浸润", "浸润"),
    "kidney": ("kidney", "肾脏", "肾"),
    "larynx": ("larynx", "喉部", "喉"),
    "liver": ("liver", "肝脏", "肝"),
    "liver cancer": ("liver cancer", "肝癌"),
    "lung": ("lung", "肺脏", "肺部", "肺"),
    "lung cancer": ("lung cancer", "肺癌"),
    "mandible": ("mandible", "下颌骨", "下颚"),
    "mass": ("mass", "pulmonary mass", "lung mass", "肺肿块", "肿块"),
    "nodule": ("nodule", "pulmonary nodule", "lung nodule", "肺结节", "结节"),
    "parotid": ("parotid", "parotid gland", "腮腺"),
    "pneumonia": ("pneumonia", "肺炎"),
    "pneumothorax": ("pneumothorax", "气胸"),
    "rectum": ("rectum", "直肠"),
    "small bowel": ("small bowel", "small intestine", "bowel", "intestine", "小肠", "肠"),
    "spinal cord": ("spinal cord", "脊髓"),
    "spleen": ("spleen", "脾脏", "脾"),
    "stomach": ("stomach", "胃"),
    "temporal lobe": ("temporal lobe", "颞叶"),
    "tooth": ("tooth", "teeth", "牙齿"),
    "trachea": ("trachea", "气管"),
}
# Names of other things that hold one of the names above.
OTHERS = ("kidney cancer", "lung tumor", "lung disease", "liver disease", "支气管", "肺支气管", "肾癌", "胃癌")

# Findings, and what a question calls the place where they occur: "Is the lung healthy?" is about a pneumonia.
PLACES = {
    "brain": ("brain", "head", "脑", "头"),
    "liver": ("liver", "abdomen", "肝", "腹"),
    "heart": ("heart", "chest", "心脏", "胸"),
    "lung": ("lung", "chest", "肺", "胸"),
    "elsewhere": ("kidney", "spleen", "pelvi", "neck", "肾", "脾", "盆", "颈"),
}
FINDINGS = {
    "brain": ("brain edema", "brain enhancing tumor", "brain non-enhancing tumor"),
    "liver": ("liver cancer",),
    "heart": ("cardiomegaly",),
    "lung": ("atelectasis", "effusion", "infiltrate", "lung cancer", "mass", "nodule", "pneumonia", "pneumothorax"),
}
HEALTH = re.compile(
    r"\b(?:ab)?normal|\b(?:un)?healthy\b|\bdiseases?\b|\blesions?\b|异常|正常|健康|疾病|病变|是什么病|有什么病", re.I
)

# "Which lobe is normal?" asks for the place where no finding is.
SOUND = re.compile(r"\bwhich\b.*\bis normal\b|哪.*(?:是|为)正常", re.I)
# "Which is bigger, lung or liver?" is not answered by looking at the smaller one, if the other has no box.
COMPARISON = re.compile(r"\b(?:bigger|biggest|smaller|smallest|larger|largest)\b|体积|更大|更小|最大|最小", re.I)


def read_boxes(picture_path: str | Path) -> tuple[Box, ...]:
    """Reads all boxes of a picture: `detection.json` beside it, scaled to the picture and clipped to it.

    Args:
        picture_path: The picture. Only its header is read, for its size.

    Returns:
        The boxes in the file's order; none where there is no such file, or where a box lies outside the picture.

    Raises:
        DataError: The file isn't a list of labels with four numbers each, or the picture's size can't be read.
    """
    file = Path(picture_path).with_name(FILE)
    if not file.is_file():
        return ()
    text = read_text(file, remedy=REMEDY)
    try:
        entries = json.loads(text)
    except json.JSONDecodeError as error:
        raise DataError(f"broken JSON: {error.msg}", file=file, line=error.lineno, remedy=REMEDY) from None
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise DataError("expected a list of objects, label to box", file=file, remedy=REMEDY)
    pairs = [pair for entry in entries for pair in entry.items()]
    for label, corners in pairs:
        numbers = corners if isinstance(corners, list) else []
        if len(numbers) != 4 or any(isinstance(n, bool) or not isinstance(n, int | float) for n in numbers):
            raise DataError(f"the box of {label!r} is not four numbers: {corners!r}", file=file, remedy=REMEDY)
    size = picture_size(Path(picture_path)) if pairs else (1, 1)
    boxes = (clipped(label, corners, size) for label, corners in pairs)
    return tuple(box for box in boxes if box.width > 0 and box.height > 0)


def picture_size(path: Path) -> tuple[int, int]:
    """Returns width and height in pixels, from the picture's header."""
    from PIL import Image

    from multimodal.images import FORMATS

    try:
        with Image.open(path, formats=FORMATS) as image:
            return image.size
    except (OSError, Image.DecompressionBombError) as error:
        remedy = "Save the picture again, or get it from its source again"
        raise DataError(f"can't read the picture's size ({error})", file=path, remedy=remedy) from None


def clipped(label: str, corners: list[float], size: tuple[int, int]) -> Box:
    """Turns pixels into shares of the picture and leaves out what lies beyond its edges."""
    x, y, width, height = corners
    left, right = (min(max(edge / size[0], 0.0), 1.0) for edge in (x, x + width))
    top, bottom = (min(max(edge / size[1], 0.0), 1.0) for edge in (y, y + height))
    return Box(label, left, top, right - left, bottom - top)


def boxes_for(question: str, answer: str, boxes: tuple[Box, ...]) -> tuple[Box, ...]:
    """Chooses the boxes of what a question is about.

    Args:
        question: In English or Chinese.
        answer: Counts where the question leads to no box, and only where it lists names and little else ("Left Lung,
            Lower Right", but not "Above the rectum").
        boxes: All boxes of the picture.

    Returns:
        The chosen ones in their order, every instance of a chosen label. None where nothing matches.
    """
    if not boxes:
        return ()
    vocabulary = names_of(frozenset(split_label(box.label)[1] for box in boxes))
    answered = listed(answer, vocabulary)
    if chosen := matching(named(question, vocabulary), boxes):
        return chosen if not COMPARISON.search(question) or matching(answered, boxes) else ()
    findings = asked_findings(question)
    if told := {name: sides for name, sides in answered.items() if name in findings}:
        return matching(told, boxes)
    return matching(dict.fromkeys(findings, BOTH), boxes) or matching(answered, boxes)


def matching(wanted: dict[str, frozenset[str]], boxes: tuple[Box, ...]) -> tuple[Box, ...]:
    """Returns the boxes that have a wanted name and lie on a wanted side; a label without a side fits any."""
    chosen = []
    for box in boxes:
        side, name = split_label(box.label)
        if name in wanted and (side is None or side in wanted[name]):
            chosen.append(box)
    return tuple(chosen)


def split_label(label: str) -> tuple[str | None, str]:
    """Splits "Left Lung" into its side and its name, both in lower case."""
    first, _, rest = label.lower().partition(" ")
    return (first, rest) if first in BOTH and rest else (None, label.lower())


@cache
def names_of(labels: frozenset[str]) -> tuple[dict[str, tuple[str, ...]], re.Pattern[str]]:
    """Returns each name with the labels that it means, and the pattern that finds names, the longest first."""
    means: dict[str, tuple[str, ...]] = dict.fromkeys(OTHERS, ())
    for label, names in (NAMES | {label: (label,) for label in labels if label not in NAMES}).items():
        for name in names:
            means[name] = (*means.get(name, ()), label)
    parts = [
        rf"\b{re.escape(name)}(?=(?:e?s)?\b)" if name.isascii() else re.escape(name)
        for name in sorted(means, key=len, reverse=True)
    ]
    return means, re.compile("|".join(parts), re.I)


def named(text: str, vocabulary: tuple[dict[str, tuple[str, ...]], re.Pattern[str]]) -> dict[str, frozenset[str]]:
    """Returns the names in a text, each with the sides that it speaks of: "lung" speaks of both, "left lung" of one."""
    means, pattern = vocabulary
    wanted: dict[str, frozenset[str]] = {}
    for match in pattern.finditer(text):
        before = SIDED.search(text[: match.start()])
        words = before.group().lower() if before else ""
        sides = frozenset(side for word, side in SIDES.items() if word in words) or BOTH
        for label in means[match.group().lower()]:
            wanted[label] = wanted.get(label, frozenset()) | sides
    return wanted


def listed(answer: str, vocabulary: tuple[dict[str, tuple[str, ...]], re.Pattern[str]]) -> dict[str, frozenset[str]]:
    """Returns the names in an answer, leaving out every part of it that says more than a name and its side."""
    wanted: dict[str, frozenset[str]] = {}
    for part in re.split("[,、;和\N{FULLWIDTH COMMA}\N{FULLWIDTH SEMICOLON}]|\\band\\b", answer):
        for match in vocabulary[1].finditer(part):
            before, after = part[: match.start()].strip(), part[match.end() :].strip().lower()
            if after in ("", "s", "es") and (
                not before or SIDED.fullmatch(f"{before} " if before.isascii() else before)
            ):
                wanted |= named(part, vocabulary)
    return wanted


def asked_findings(question: str) -> tuple[str, ...]:
    """Returns the findings that a question about health may mean: those of the place that it names, or all."""
    if not HEALTH.search(question) or SOUND.search(question):
        return ()
    lower = question.lower()
    places = [place for place, words in PLACES.items() if any(word in lower for word in words)] or list(FINDINGS)
    return tuple(label for place in places for label in FINDINGS.get(place, ()))
