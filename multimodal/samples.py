"""Pictures to try the model on, without any download.

What it does: lists the pictures that this project drew (`assets/samples`) and real photographs and scans that lie in
installed packages, each with a caption and a prompt that suits it.

What it does not know: how to open a picture (`images.load_image` does), or what the model answers.

What always holds: every path listed exists; no package is imported to find out, since importing Gradio takes seconds.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

_ASSETS = Path(__file__).parent.parent / "assets" / "samples"


@dataclass(frozen=True)
class SamplePicture:
    """A picture to click on.

    Attributes:
        name: short and unique, fit for an option or a URL.
        path: the file; PNG, JPEG or DICOM, to be opened with `load_image`.
        caption: what it shows.
        prompt: a question that suits it.
        source: who it comes from.
    """

    name: str
    path: Path
    caption: str
    prompt: str
    source: str


# Where it lies: our own folder, or a folder inside an installed package.
_OWN = "drawn for this project"
_PICTURES = (
    (_OWN, "", "chest_film.png", "Synthetic chest film", "What is abnormal in this X-ray?"),
    (_OWN, "", "product_shot.png", "Carton of orange juice on a shelf", "Describe this product for a shop."),
    (_OWN, "", "label.png", "Nutrition label of oat biscuits", "How much sugar is in one serving?"),
    ("gradio", "media_assets/images", "cheetah1.jpg", "Cheetah, close up", "What animal is this?"),
    ("gradio", "media_assets/images", "lion.jpg", "Lion resting on a rock", "What animal is this?"),
    ("gradio", "media_assets/images", "cheetah.jpg", "Cheetah running", "What is the animal doing?"),
    ("gradio", "media_assets/images", "tower.jpg", "Eiffel Tower at dusk", "Describe this picture."),
    ("pydicom", "data/test_files", "CT_small.dcm", "CT slice (DICOM)", "What modality is used to take this image?"),
    ("pydicom", "data/test_files", "MR_small.dcm", "MR slice (DICOM)", "What modality is used to take this image?"),
)


def sample_images() -> list[SamplePicture]:
    """Lists the sample pictures that are here.

    Returns:
        Ours first, then those of Gradio and pydicom. Both packages are optional: without one, or where a version of it
        carries other pictures, those are left out silently; so are ours where the package was installed without the
        repository's `assets`. The list may thus be short, or empty.
    """
    samples = []
    for source, folder, file, caption, prompt in _PICTURES:
        root = _ASSETS if source == _OWN else _package_folder(source)
        if root and (path := root / folder / file).is_file():
            name = Path(file).stem.replace("_", "-").lower()
            samples.append(SamplePicture(name=name, path=path, caption=caption, prompt=prompt, source=source))
    return samples


def _package_folder(package: str) -> Path | None:
    spec = find_spec(package)
    return Path(spec.submodule_search_locations[0]) if spec and spec.submodule_search_locations else None
