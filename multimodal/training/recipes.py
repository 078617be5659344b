"""Recipes: small TOML files that say all about a training run. The first line of each is the command that runs it.

A recipe names data sets relative to a root folder. What the command line says goes before what the recipe says.
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from multimodal.fusion import FusionConfig
from multimodal.training.train import VIEWS, TrainingSettings
from multimodal.training.vision_side import VisionSettings

FOLDER = Path(__file__).parent / "recipes"
SECTIONS = ("passes", "vision", "training", "views", "architecture")
TOP = ("model", "held_out", "refusals")


@dataclass(frozen=True)
class Recipe:
    """A recipe as it was read.

    Attributes:
        model: A preset, or a trained model to go on from.
        architecture: Fields of ``FusionConfig`` that differ from the preset's.
        settings: Everything for :class:`TrainingSettings` but the folders.
    """

    model: str = "embedded"
    architecture: Mapping[str, Any] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)


def names() -> list[str]:
    """The recipes that come with the package."""
    return sorted(path.stem for path in FOLDER.glob("*.toml"))


def read_recipe(name: str | Path, root: Path) -> Recipe:
    """Read a recipe.

    Args:
        name: One of :func:`names`, or a TOML file.
        root: Folder that the recipe's data sets are in.

    Raises:
        ValueError: If there is no such recipe, or it says something that nobody reads.
    """
    path = FOLDER / f"{name}.toml" if str(name) in names() else Path(name)
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError:
        raise ValueError(f"there is no recipe {str(name)!r}: give {', '.join(names())} or a TOML file") from None
    except tomllib.TOMLDecodeError as error:
        raise ValueError(f"{path}: not TOML ({error}): repair that line") from None
    _check(path, content, (*TOP, *SECTIONS), "the recipe")
    vision, training = content.get("vision"), content.get("training", {})
    _check(path, vision or {}, [field.name for field in fields(VisionSettings)], "[vision]")
    own = [field.name for field in fields(TrainingSettings) if field.name not in ("data", "output", "cache", *SECTIONS)]
    _check(path, training, own, "[training]")
    _check(path, content.get("architecture", {}), [field.name for field in fields(FusionConfig)], "[architecture]")
    _check(path, content.get("views", {}), VIEWS, "[views]")
    settings: dict[str, Any] = {
        "data": {_under(root, data): passes for data, passes in content.get("passes", {}).items()},
        "vision": None if vision is None else VisionSettings(**{"seed": training.get("seed", 0), **vision}),
        **training,
    }
    settings |= {key: content[key] for key in ("held_out", "refusals") if key in content}
    if "views" in content:
        settings["views"] = {**VIEWS, **content["views"]}
    return Recipe(content.get("model", "embedded"), content.get("architecture", {}), settings)


def _under(root: Path, data: str) -> str:
    """A data set's name with its folder or file under the root."""
    reader, colon, folder = data.partition(":")
    return f"{reader}:{root / folder}" if colon else str(root / data)


def _check(path: Path, found: Mapping[str, Any], known: Any, where: str) -> None:
    unknown = [key for key in found if key not in known]
    if unknown:
        raise ValueError(f"{path}: {where} says {', '.join(unknown)}, which nobody reads: use {', '.join(known)}")
