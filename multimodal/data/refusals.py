# ruff: noqa: RUF001
"""Questions that a picture can't answer, with the one answer to all of them.

A model trained only on questions that have an answer makes one up for the others. Here pictures meet questions that
they can't answer: a medical question about a shop's picture and the other way round, an organ of another part of the
body, a price, a name, the weather; and pictures of nothing (noise, one color, gradients) meet questions that a picture
of something would answer. What the data itself asks about a picture is left alone: SLAKE asks whether a heart is in a
picture of the pelvis, and answers no.
"""

import os
from collections.abc import Sequence
from pathlib import Path
from random import Random

from multimodal.data.compose import ABNORMAL_PROMPTS, REPORT_PROMPTS, pictures
from multimodal.data.facts import organs_in
from multimodal.data.sample import Sample
from multimodal.data.terms import ORGANS, REGIONS, names, word

REFUSALS = {"en": "I cannot tell from this picture.", "zh": "无法从这张图片中判断。"}
CHINESE_SHARE = 0.3
# Asked about a picture of a shop.
MEDICAL = {
    "en": (
        "What disease is shown in the lung?",
        "Is the heart enlarged?",
        "Is the lung healthy?",
        "Is there pneumonia?",
        "Is there a tumor in the brain?",
        "Where is the tumor?",
        "Is there a fracture?",
        "What is abnormal in this X-ray?",
        "Which lobe is abnormal?",
        "What does this MRI show?",
        "Does the patient have liver cancer?",
        "What is the mr weighting in this image?",
        "How many kidneys are there?",
        "Is there fluid around the lung?",
        "What is the diagnosis?",
        "What treatment does the patient need?",
    ),
    "zh": (
        "肺部有什么疾病？",
        "心脏有没有增大？",
        "肺是健康的吗？",
        "有没有肺炎？",
        "大脑里有肿瘤吗？",
        "肿瘤在哪里？",
        "描述这张X光片的异常",
        "这张CT有什么异常？",
        "病人患有肝癌吗？",
        "诊断是什么？",
    ),
}
# Asked about a medical picture.
PRODUCT = {
    "en": (
        "What product is this?",
        "What brand is this?",
        "What is it and how does it taste?",
        "How does this product taste?",
        "What can I use it for?",
        "Write a shop description for this.",
        "Write a product listing with name, category and description.",
        "Write a one-line shop title for this.",
        "Which category does this product belong to?",
        "What garment is this?",
        "What kind of clothing is this?",
        "Which size is this shirt?",
        "What does the label say?",
        "Is this juice or milk?",
        "Is it organic?",
        "How many calories does it have?",
    ),
    "zh": (
        "这是什么商品？",
        "这是什么品牌？",
        "它的味道怎么样？",
        "为这件商品写一段描述。",
        "这是什么衣服？",
        "标签上写了什么？",
        "这个产品怎么用？",
        "它有多少卡路里？",
    ),
}
# Asked about any picture.
ANYWHERE = {
    "en": (
        "Who took this picture?",
        "When was this picture taken?",
        "Where was this picture taken?",
        "Who is the person in this picture?",
        "What is the name of the owner?",
        "What is the phone number?",
        "What is the weather like?",
        "What will the weather be tomorrow?",
        "How much does this cost?",
        "What is the price?",
        "What time is it?",
        "What is the doctor's name?",
        "What is the address of the shop?",
        "Which camera was used?",
        "What music is playing?",
        "Is the person happy?",
        "Who won the game?",
        "What is written on the back?",
    ),
    "zh": (
        "这张照片是谁拍的？",
        "这张照片是什么时候拍的？",
        "这是在哪里拍的？",
        "这个人是谁？",
        "电话号码是多少？",
        "天气怎么样？",
        "这个多少钱？",
        "现在几点了？",
        "医生叫什么名字？",
        "他在想什么？",
    ),
}
# Asked about a medical picture, of an organ from FAR.
ORGAN = {
    "en": (
        "What disease is shown in the {organ}?",
        "What is wrong with the {organ}?",
        "Is there a tumor in the {organ}?",
        "Describe the {organ}.",
        "How big is the tumor in the {organ}?",
        "Which part of the {organ} is abnormal?",
    ),
    "zh": (
        "{organ}有什么疾病？",
        "{organ}有什么问题？",
        "{organ}里有肿瘤吗？",
        "描述一下{organ}。",
        "{organ}的哪个部分异常？",
    ),
}
# Organs that are never in a picture of this part of the body.
FAR = {
    "head": ("liver", "spleen", "kidney", "bladder", "heart", "rectum"),
    "neck": ("liver", "spleen", "kidney", "bladder", "rectum"),
    "chest": ("brain", "bladder", "rectum", "eye", "femoral head"),
    "abdomen": ("brain", "eye", "tooth", "larynx"),
    "pelvis": ("brain", "eye", "tooth", "heart"),
}
VQA_RAD_REGIONS = {"HEAD": "head", "CHEST": "chest", "ABD": "abdomen"}  # codespell:ignore
# Asked about pictures of nothing.
OF_SOMETHING = (
    "What modality is used to take this image?",
    "What is the scanning plane of this image?",
    "What is the largest organ in the picture?",
    "Name this product.",
    "Describe this product for a shop.",
    "What kind of product is this?",
    "Name this item of clothing.",
    "What is this?",
)


def refusals(sources: Sequence[Sample], *, seed: int = 0, share: float = 0.1) -> list[Sample]:
    """Pairs some of the pictures with a question that they can't answer.

    Half of them are medical, as far as there are enough, since a shop's photographs outnumber scans.

    Args:
        sources: Samples of any data sets; all those about one picture should be here, so that nothing is refused that
            the data itself asks.
        seed: Another seed chooses other pictures and questions.
        share: Share of all pictures that get a question, 0 to 1.

    Returns:
        One sample per chosen picture, in the order of the sources. Its answer is one of `REFUSALS`.

    Raises:
        ValueError: The share is not between 0 and 1.
    """
    if not 0 <= share <= 1:
        raise ValueError(f"the share of pictures must be between 0 and 1, not {share}")
    by_picture = [samples for images, samples in pictures(sources).items() if images]
    random = Random(f"refusals/{seed}")
    medical = [index for index, samples in enumerate(by_picture) if is_medical(samples[0])]
    others = [index for index, samples in enumerate(by_picture) if not is_medical(samples[0])]
    wanted = round(share * len(by_picture))
    scans = min(len(medical), max(wanted // 2, wanted - len(others)))
    chosen = random.sample(medical, scans) + random.sample(others, wanted - scans)
    return [refusal(by_picture[index], random) for index in sorted(chosen)]


def refusal(samples: Sequence[Sample], random: Random) -> Sample:
    """Makes the sample of a question that a picture can't answer."""
    first = samples[0]
    language = "zh" if random.random() < CHINESE_SHARE else "en"
    pools: list[tuple[str, ...]] = [ANYWHERE[language]]
    if is_medical(first):
        pools += [PRODUCT[language], organ_questions(samples, language)]
    elif is_shop(first):
        pools += [MEDICAL[language], MEDICAL[language]]
    asked = {sample.question.lower() for sample in samples}
    new = [kept for pool in pools if (kept := [text for text in pool if text.lower() not in asked])]
    return refused(random.choice(random.choice(new)), language, first.images, f"refusal/{first.id}")


def refused(question: str, language: str, images: tuple[Path, ...], key: str) -> Sample:
    """Makes a sample whose answer is the refusal."""
    meta = {"language": language, "content_type": "Out of scope", "answer_type": "OPEN"}
    return Sample(question=question, answer=REFUSALS[language], images=images, id=key, meta=meta)


def organ_questions(samples: Sequence[Sample], language: str) -> tuple[str, ...]:
    """Returns questions about organs of another part of the body that the data doesn't mention for this picture."""
    meta = samples[0].meta
    location = names(meta.get("location", ""), REGIONS)
    region = location[0] if len(location) == 1 else VQA_RAD_REGIONS.get(meta.get("organ", ""), "")
    mentioned = {organ for sample in samples for organ in organs_in(f"{sample.question} {sample.answer}")}
    far = [word(organ, ORGANS, language) for organ in FAR.get(region, ()) if organ not in mentioned]
    return tuple(question.format(organ=organ) for organ in far for question in ORGAN[language])


def is_medical(sample: Sample) -> bool:
    """Tells whether a sample is SLAKE's or VQA-RAD's: they name the modality or the part of the body."""
    return "modality" in sample.meta or "organ" in sample.meta


def is_shop(sample: Sample) -> bool:
    """Tells whether a sample is Grocery Store's or Clothing's: they name the class."""
    return "class_id" in sample.meta or "class" in sample.meta


def plain_refusals(folder: str | Path, *, count: int = 40, seed: int = 0) -> list[Sample]:
    """Draws pictures of nothing and asks of each what a picture of something would answer.

    Args:
        folder: Where the pictures are put, as PNG; made where it isn't there. The same seed draws the same pictures.
        count: How many.
        seed: Another seed draws other pictures and asks other questions.

    Returns:
        One sample per picture.
    """
    random = Random(f"plain/{seed}")
    paths = draw_plain(folder, count=count, seed=seed)
    made = []
    for path in paths:
        language = "zh" if random.random() < CHINESE_SHARE else "en"
        own = OF_SOMETHING if language == "en" else ()
        pools = (REPORT_PROMPTS[language], ABNORMAL_PROMPTS[language], PRODUCT[language], MEDICAL[language], own)
        question = random.choice(random.choice([pool for pool in pools if pool]))
        called = random.choice(("image", "picture") if language == "en" else ("图片", "图像"))
        made.append(refused(question.format(picture=called), language, (path,), f"refusal/plain/{path.stem}"))
    return made


def draw_plain(folder: str | Path, *, count: int, seed: int, size: int = 128) -> list[Path]:
    """Draws noise, single colors, gradients and stripes in turn, gray and colored."""
    import numpy as np  # here, so that reading needs neither
    from PIL import Image

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for number in range(count):
        random = np.random.default_rng((seed, number))
        first, second = random.integers(0, 256, (2, 3))
        if number % 8 < 4:  # gray, as a scan is
            first, second = first[:1].repeat(3), second[:1].repeat(3)
        ramp = np.linspace(0, 1, size)[:, None, None] * np.ones((1, size, 1))  # (size, size, 1), from the top down
        kind = number % 4
        if kind == 0:
            ramp = random.random((size, size, 1 if number % 8 < 4 else 3))
        elif kind == 1:
            ramp = np.zeros((size, size, 1))
        elif kind == 3:
            ramp = (np.floor(ramp * random.integers(4, 17)) % 2).astype(float)
        if random.random() < 0.5:
            ramp = ramp.transpose(1, 0, 2)
        pixels = (first + (second - first) * ramp).round().astype(np.uint8)  # (size, size, 3)
        path = folder / f"plain-{seed}-{number:03}.png"
        unfinished = path.with_suffix(f".{os.getpid()}.unfinished")  # another process may read what lies there
        Image.fromarray(pixels).save(unfinished, format="PNG")
        unfinished.replace(path)
        paths.append(path)
    return paths
