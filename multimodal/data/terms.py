# ruff: noqa: RUF001
"""The words of SLAKE's organs, findings, regions and places, in English and Chinese, under one name each.

SLAKE writes one thing in several ways ("Large Bowel" and "Colon", "Effusion" and "Pleural Effusion", 脑瘤 and 脑肿瘤,
"Noudle"). Here each has one name, in English, so that facts said in either language can be compared. Knows nothing of
questions and reports: it finds names in a text.
"""

import re
from dataclasses import dataclass
from functools import cache


@dataclass(frozen=True)
class Term:
    """A thing that a text can name.

    Attributes:
        name: Our name for it, in English.
        english: How a report says it.
        chinese: How a Chinese report says it.
        words: Other ways to write it, in lower case, as patterns.
    """

    name: str
    english: str
    chinese: str
    words: tuple[str, ...] = ()


# In the order in which a report lists them. A plural is the name of an organ that comes in pairs, not a count.
ORGANS = (
    Term("brain", "brain", "大脑", (r"brian", r"脑(?!干)")),
    Term("brain stem", "brain stem", "脑干"),
    Term("temporal lobe", "temporal lobes", "颞叶", (r"temporal lobes?",)),
    Term("eye", "eyes", "眼睛", (r"eyes?", r"眼")),
    Term("ear", "ears", "耳朵", (r"ears?",)),
    Term("tooth", "teeth", "牙齿", (r"tooth", r"teeth")),
    Term("mandible", "mandible", "下颌骨", (r"mandibles?", r"下颚")),
    Term("parotid", "parotids", "腮腺", (r"parotids?",)),
    Term("larynx", "larynx", "喉", (r"喉部",)),
    Term("trachea", "trachea", "气管"),
    Term("esophagus", "esophagus", "食管", (r"食道",)),
    Term("spinal cord", "spinal cord", "脊髓", (r"spine cord",)),
    Term("lung", "lungs", "肺", (r"lungs?", r"肺脏?(?!支气管)")),
    Term("bronchus", "bronchi", "支气管", (r"pulmonary bronch(?:us|i)", r"肺支气管")),
    Term("heart", "heart", "心脏"),
    Term("liver", "liver", "肝脏", (r"肝",)),
    Term("spleen", "spleen", "脾脏", (r"脾",)),
    Term("kidney", "kidneys", "肾脏", (r"kidneys?", r"肾")),
    Term("stomach", "stomach", "胃"),
    Term("duodenum", "duodenum", "十二指肠"),
    Term("small bowel", "small bowel", "小肠"),
    Term("colon", "colon", "结肠", (r"large bowel", r"大肠")),
    Term("rectum", "rectum", "直肠"),
    Term("bladder", "bladder", "膀胱"),
    Term("femoral head", "femoral heads", "股骨头", (r"femoral heads?",)),
    Term("humerus head", "humerus head", "肱骨头"),
)
FINDINGS = (
    Term("cardiomegaly", "cardiomegaly", "心脏肥大", (r"cardiomegal?\w*",)),
    Term("pneumonia", "pneumonia", "肺炎"),
    Term("atelectasis", "atelectasis", "肺不张"),
    Term("pneumothorax", "pneumothorax", "气胸"),
    Term("effusion", "pleural effusion", "胸腔积液", (r"(?:pleural )?effusion", r"(?<!脑)积液")),
    Term("infiltration", "infiltration", "肺浸润", (r"(?:(?:pulmonary|pleural) )?infiltrat(?:ion|e)", r"浸润")),
    Term("nodule", "pulmonary nodule", "肺结节", (r"(?:pulmonary )?(?:nodules?|noudle)", r"结节")),
    Term("mass", "pulmonary mass", "肺肿块", (r"(?:pulmonary )?mass", r"肿块")),
    Term("lung cancer", "lung cancer", "肺癌"),
    Term("liver cancer", "liver cancer", "肝癌"),
    Term("kidney cancer", "kidney cancer", "肾癌"),
    Term("brain edema", "brain edema", "脑水肿", (r"bra?i?an? edema", r"brian edema")),
    Term(
        "brain enhancing tumor",
        "enhancing tumor",
        "增强型肿瘤",
        (r"(?:brain )?enhancing (?:brain )?tumor", r"脑?部?增强型?脑?部?肿?瘤"),
    ),
    Term(
        "brain non-enhancing tumor",
        "non-enhancing tumor",
        "非增强型肿瘤",
        (r"(?:brain )?non-?\s?enhancing (?:brain )?tumor", r"脑?部?非增强型?脑?部?肿?瘤"),
    ),
    Term("brain tumor", "brain tumor", "脑瘤", (r"脑部?肿?瘤",)),
)
MODALITIES = (
    Term("X-ray", "X-ray", "X光片", (r"x-?\s?rays?", r"x\s?光片?", r"x\s?射线")),
    Term("CT", "CT scan", "CT图像", (r"ct",)),
    Term("MRI", "MRI scan", "MRI图像", (r"mri", r"核磁共振")),
)
PLANES = (
    Term("transverse", "transverse", "横断面", (r"axial",)),
    Term("coronal", "coronal", "冠状面"),
    Term("sagittal", "sagittal", "矢状面"),
)
REGIONS = (
    Term("head", "head", "头部", (r"brain", r"大脑", r"brain_\w+")),
    Term("neck", "neck", "颈部"),
    Term("chest", "chest", "胸部", (r"胸腔", r"lung", r"chest_\w+")),
    Term("abdomen", "abdomen", "腹部"),
    Term("pelvis", "pelvis", "盆腔", (r"pelvic cavity", r"pelvic", r"骨盆")),
)
WEIGHTINGS = ("T1", "T2")
SIDES = {"left": "左", "right": "右", "both": "双"}
LEVELS = {"upper": "上", "lower": "下"}
PARTS = {"lung": "肺", "lobe": "叶", "chest": "胸", "liver": "肝脏", "heart": "心脏", "kidney": "肾脏"}
PART_WORDS = {
    r"lungs?|肺脏?": "lung",
    r"lobes?|brain|hemispheres?|叶|脑部?|半球": "lobe",
    r"chest|胸腔?": "chest",
    r"liver|肝脏?": "liver",
    r"heart|心脏": "heart",
    r"kidneys?|肾脏?": "kidney",
}
# Places in the picture that name no part of the body.
BARE_PLACES = {
    r"cent(?:er|re)|中[部心间]": "center",
    r"top|upper|顶部|上[部方]": "top",
    r"bottom|底部|下[部方]": "bottom",
}
SIDE_PATTERN = re.compile(r"\b(left|right|both)\b|([左右双])")
LEVEL_PATTERN = re.compile(r"\b(upper|lower)\b|(?<=[左右])([上下])")


@cache
def pattern(terms: tuple[Term, ...]) -> re.Pattern[str]:
    """Returns a pattern with one group per term, which prefers the longest way to write it."""
    ways = [
        (way, index)
        for index, term in enumerate(terms)
        for way in {re.escape(term.name.lower()), re.escape(term.english.lower()), re.escape(term.chinese.lower())}
        | set(term.words)
    ]
    ways.sort(key=lambda pair: (-len(pair[0]), pair))
    # English words end where a letter does; Chinese ones, and English ones beside Chinese, need no space.
    return re.compile("|".join(f"(?P<t{index}_{n}>{edged(way)})" for n, (way, index) in enumerate(ways)))


def edged(way: str) -> str:
    """Keeps an English way of writing from matching inside a longer word."""
    return rf"(?<![a-z])(?:{way})(?![a-z])" if re.search("[a-z]", way) else way


def names(text: str, terms: tuple[Term, ...]) -> list[str]:
    """Returns the names of the terms that a text holds, each once, in the order of the text."""
    return list(dict.fromkeys(terms[int((m.lastgroup or "t0_0")[1:].split("_")[0])].name for m in found(text, terms)))


def found(text: str, terms: tuple[Term, ...]) -> list[re.Match[str]]:
    """Returns the matches of terms in a text."""
    return list(pattern(terms).finditer(text.lower()))


def without(text: str, terms: tuple[Term, ...]) -> str:
    """Returns the text without what names these terms: 肺炎 is no mention of a lung."""
    return pattern(terms).sub(" ", text.lower())


def word(name: str, terms: tuple[Term, ...], language: str) -> str:
    """Returns how a report in this language says a term."""
    term = next(term for term in terms if term.name == name)
    return term.english if language == "en" else term.chinese


def places(text: str, part: str = "") -> list[str]:
    """Finds places: level, side and part of the body ("lower left lung"), or a place in the picture ("center").

    "Left Lung, Lower Right" is how SLAKE says that something in the left lung is low, and on the right of the picture
    because the patient faces us: it becomes "lower left lung".

    Args:
        text: An answer, or a phrase of a question or report.
        part: The part of the body that is meant where the text names only a side.
    """
    result: list[str] = []
    anatomical = False
    for piece in re.split(r"[,，、]| and |和", text.lower()):
        level, side = (first(pattern, piece) for pattern in (LEVEL_PATTERN, SIDE_PATTERN))
        named = next((name for words, name in PART_WORDS.items() if re.search(edged(words), piece)), "")
        if not named and anatomical:
            if level and result and not result[-1].startswith(tuple(LEVELS)):
                result[-1] = f"{level} {result[-1]}"
            continue
        if named or (part and side):
            anatomical = True
            result.append(" ".join(word for word in (level, side, named or part) if word))
        elif side:
            result.append(" ".join(word for word in (level, side) if word))
        else:
            result += [name for words, name in BARE_PLACES.items() if re.search(edged(words), piece)][:1]
    return [place for place in dict.fromkeys(result) if place not in ("lobe", "chest")]


def first(pattern: re.Pattern[str], text: str) -> str:
    """Returns the side or level that a pattern finds, in English."""
    match = pattern.search(text)
    if not match:
        return ""
    chinese = {sign: name for name, sign in (SIDES | LEVELS).items()}
    return match[1] or chinese[match[2]]


def says(said: str, stated: str) -> bool | None:
    """Tells whether a place agrees with one that is stated; `None` where the two can't be compared.

    A coarser place agrees with a finer one and the other way round, a side agrees with both sides.
    """
    first_words, second_words = said.split(), stated.split()
    parts = [next((word for word in words if word in PARTS), "") for words in (first_words, second_words)]
    if parts[0] != parts[1]:
        return None
    for choices in (tuple(SIDES), tuple(LEVELS), ("center", "top", "bottom")):
        one, other = (next((word for word in words if word in choices), "") for words in (first_words, second_words))
        if one and other and one != other and other != "both":
            return False
        if not parts[0] and bool(one) != bool(other):
            return None
    return True
