# ruff: noqa: RUF001
"""Short questions about a scan in the words that people type, answered from what SLAKE states about the picture.

SLAKE asks for the modality in a dozen ways, and a model trained on these takes another wording for another question.
Here each fact is asked for in many ways, and the answer is the word that SLAKE itself uses. Like a report
(`compose`), an answer says nothing that the data doesn't state.
"""

from collections.abc import Collection
from pathlib import Path
from random import Random

from multimodal.data.compose import Language, check_language, one, pictures, seen_organs
from multimodal.data.facts import Fact, picture_facts
from multimodal.data.sample import DataError, Sample
from multimodal.data.slake import read_slake
from multimodal.data.terms import ORGANS, word

COUNT = 2  # questions about a picture
PROMPTS = {
    "en": {
        "modality": (
            "What is the modality of this picture?",
            "What is the modality of this image?",
            "Which modality is this?",
            "modality?",
            "What kind of image is this?",
            "What kind of scan is this?",
            "What type of scan is this?",
            "Is this an X-ray, a CT or an MRI?",
            "CT, MRI or X-ray?",
            "How was this picture made?",
            "Which imaging technique is this?",
            "What sort of medical image is it?",
        ),
        "plane": (
            "What is the plane of this picture?",
            "Which plane is this?",
            "In which plane was this scan taken?",
            "Is this transverse, coronal or sagittal?",
            "What is the orientation of the slice?",
        ),
        "region": (
            "Which body part is this?",
            "What body part is shown?",
            "Which part of the body do you see?",
            "What part of the body is it?",
            "Is this the head, the chest or the abdomen?",
            "Which region of the body was scanned?",
        ),
        "organs": (
            "Which organs can you see?",
            "Which organs are visible?",
            "What organs are in this picture?",
            "List the organs.",
            "Name the organs in this image.",
        ),
        "lung": ("anything wrong with the lungs?", "Do the lungs look abnormal?", "Is there a problem in the lungs?"),
        "heart": ("is the heart too big?", "Is the heart enlarged?", "Does the heart look too large?"),
    },
    "zh": {
        "modality": (
            "这是什么类型的图像？",
            "这是什么检查？",
            "这是哪种成像方式？",
            "这是CT、核磁共振还是X光？",
            "这张图片是怎么拍的？",
        ),
        "plane": ("这是哪个平面？", "扫描平面是什么？", "这是横断面还是冠状面？"),
        "region": ("这是身体的哪个部位？", "拍的是哪个部位？", "这是头部、胸部还是腹部？"),
        "organs": ("能看到哪些器官？", "图片里有哪些器官？", "列出可见的器官。"),
        "lung": ("肺部有问题吗？", "肺看起来异常吗？"),
        "heart": ("心脏是不是太大了？", "心脏有没有增大？"),
    },
}
# SLAKE's own words for what `terms` has under one name.
ANSWERS = {
    "en": {
        **{"X-ray": "X-Ray", "CT": "CT", "MRI": "MRI"},
        **{"transverse": "Transverse Plane", "coronal": "Coronal Plane", "sagittal": "Sagittal Plane"},
        **{"head": "Head", "neck": "Neck", "chest": "Chest", "abdomen": "Abdomen", "pelvis": "Pelvic Cavity"},
        **{"yes": "Yes", "no": "No"},
    },
    "zh": {
        **{"X-ray": "X光", "CT": "CT", "MRI": "核磁共振"},
        **{"transverse": "横断面", "coronal": "冠状面", "sagittal": "矢状面"},
        **{"head": "头部", "neck": "颈部", "chest": "胸腔", "abdomen": "腹部", "pelvis": "盆腔"},
        **{"yes": "是的", "no": "不是"},
    },
}


def read_slake_typed(
    folder: str | Path,
    split: str = "train",
    language: Language = "en",
    *,
    seed: int = 0,
    skip_bad: list[DataError] | None = None,
) -> list[Sample]:
    """Reads one split of SLAKE as short questions in other words than its own.

    Args:
        folder: Holds `train.json` and its kin, and `imgs/`.
        split: `"train"`, `"validate"` or `"test"`.
        language: The language of questions and answers.
        seed: Another seed asks other things, in other words.
        skip_bad: Where given, rows that can't be read are put here, as errors, instead of being raised.

    Returns:
        Two samples per picture, fewer where the data states less, in the order of the pictures' first questions. `meta`
        has what SLAKE's questions have, with the content_type `Typed`.

    Raises:
        DataError: The split's file is missing or isn't a JSON list, or (without `skip_bad`) a row is broken.
        ValueError: SLAKE has no such split or language.
    """
    check_language(language)
    made = []
    for samples in pictures(read_slake(folder, split, None, skip_bad=skip_bad)).values():
        answers = typed_answers(picture_facts(samples), language)
        first, name = samples[0], samples[0].images[0].parent.name
        random = Random(f"typed/{seed}/{name}/{language}")
        made += [
            Sample(
                question=random.choice(PROMPTS[language][kind]),
                answer=answers[kind],
                images=first.images,
                id=f"slake/{name}/typed/{language}/{kind}",
                meta={**first.meta, "language": language, "content_type": "Typed", "answer_type": "OPEN"},
            )
            for kind in random.sample(sorted(answers), min(COUNT, len(answers)))
        ]
    return made


def typed_answers(facts: Collection[Fact], language: Language) -> dict[str, str]:
    """Returns the answer to each kind of question that the facts can answer."""
    said = ANSWERS[language]
    answers = {kind: said[value] for kind in ("modality", "plane", "region") if (value := one(facts, kind))}
    if organs := seen_organs(facts):
        names = [word(organ, ORGANS, language) for organ in organs]
        answers["organs"] = "、".join(names) if language == "zh" else ", ".join(name.title() for name in names)
    health = {fact.subject: fact.value for fact in facts if fact.kind == "health"}
    if "lung" in health:
        answers["lung"] = said["yes" if health["lung"] == "abnormal" else "no"]
    enlarged = {fact.value for fact in facts if (fact.kind, fact.subject) == ("finding", "cardiomegaly")}
    if enlarged or health.get("heart") == "healthy":
        answers["heart"] = said["yes" if enlarged == {"present"} else "no"]
    return answers
