"""Tiny data sets in their published layouts, and the folder of the real ones where this machine has it."""

import json
import os
import random
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

REAL = Path(os.environ.get("MULTIMODAL_DATA") or Path(__file__).resolve().parents[2].parent / "shared" / "data")
CLASSES_HEADER = (
    "Class Name (str),Class ID (int),Coarse Class Name (str),Coarse Class ID (int),"
    "Iconic Image Path (str),Product Description Path (str)"
)


@pytest.fixture
def real_data() -> Path:
    """The folder that holds the data sets as published, or a skip."""
    if missing := [name for name in ("slake", "vqa-rad", "grocery", "clothing") if not (REAL / name).is_dir()]:
        pytest.skip(f"no {', '.join(missing)} in {REAL}: set MULTIMODAL_DATA to the folder that holds them")
    return REAL


def save_picture(path: Path, size: tuple[int, int] = (4, 3)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, "red").save(path)
    return path


def save_drawing(path: Path, seed: int, size: int = 96) -> Path:
    """A picture of its own: no two seeds look alike, and one seed looks the same at every size."""
    path.parent.mkdir(parents=True, exist_ok=True)
    chance = random.Random(seed)
    image = Image.new("L", (8, 8))
    image.putdata([chance.randrange(256) for _ in range(64)])
    image.resize((size, size), Image.Resampling.BICUBIC).convert("RGB").save(path)
    return path


def slake_record(**changes: Any) -> dict[str, Any]:
    record = {
        "img_id": 1,
        "img_name": "xmlab1/source.jpg",
        "question": "Which plane is this?",
        "answer": "Transverse  Plane",
        "q_lang": "en",
        "location": "Abdomen",
        "modality": "MRI",
        "answer_type": "OPEN",
        "base_type": "vqa",
        "content_type": "Plane",
        "triple": ["vhead", "_", "_"],
        "qid": 7,
    }
    return record | changes


def write_slake(folder: Path, records: list[Any], split: str = "train") -> Path:
    save_picture(folder / "imgs" / "xmlab1" / "source.jpg")
    (folder / f"{split}.json").write_text(json.dumps(records, indent=0, ensure_ascii=False), encoding="utf-8")
    return folder


@pytest.fixture
def grocery(tmp_path: Path) -> Path:
    """Two products, two photographs each in train and one each in val; returns the folder that holds dataset/."""
    dataset = tmp_path / "dataset"
    products = {"Golden-Delicious": ("Fruit", "Apple"), "Oatly-Oat-Milk": ("Packages", "Oat-Milk")}
    classes = [CLASSES_HEADER]
    lists: dict[str, list[str]] = {"train": [], "val": []}
    for number, (name, (kind, coarse)) in enumerate(products.items()):
        iconic = f"/iconic-images-and-descriptions/{kind}/{coarse}/{name}/{name}"
        classes.append(f"{name},{number},{coarse},{number},{iconic}_Iconic.jpg,{iconic}_Description.txt")
        save_picture(dataset / f"{iconic[1:]}_Iconic.jpg")
        text = f"\ufeff{name} tastes  good.\nFrom Arlagårdar.\n"
        (dataset / f"{iconic[1:]}_Description.txt").write_text(text, encoding="utf-8")
        for split, count in (("train", 2), ("val", 1)):
            for shot in range(count):
                path = f"{split}/{kind}/{coarse}/{name}/{name}_{shot:03}.jpg"
                save_picture(dataset / path)
                lists[split].append(f"{path}, {number}, {number}")
    (dataset / "classes.csv").write_text("\n".join(classes) + "\n")
    for split, lines in lists.items():
        (dataset / f"{split}.txt").write_text("\n".join(lines) + "\n")
    return tmp_path


def vqa_rad_record(**changes: Any) -> dict[str, Any]:
    record = {
        "qid": 4,
        "image_name": "a.jpg",
        "image_organ": "CHEST ",
        "answer": "ultra\tsound",
        "answer_type": "OPEN ",
        "question_type": "MODALITY",
        "question": " What type  of imaging is this?",
        "phrase_type": "freeform",
    }
    return record | changes


def write_vqa_rad(folder: Path, records: list[Any], name: str = "trainset.json") -> Path:
    for record in records:
        if isinstance(record, dict) and "image_name" in record:
            save_picture(folder / "images" / record["image_name"])
    (folder / name).write_text(json.dumps(records, indent=0))
    return folder


@pytest.fixture
def clothing(tmp_path: Path) -> Path:
    """Three classes with two pictures each in train, one class with one in validation."""
    for number, name in enumerate(("longsleeve", "t-shirt", "hat")):
        for shot in range(2):
            save_drawing(tmp_path / "train" / name / f"{name}{shot}.jpg", seed=10 * number + shot)
    save_drawing(tmp_path / "validation" / "hat" / "new.PNG", seed=99)
    return tmp_path
