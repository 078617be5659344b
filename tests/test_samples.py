"""The sample pictures are there, load safely, and are what their script draws."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from multimodal import samples
from multimodal.images import load_image
from multimodal.samples import SamplePicture, sample_images

ASSETS = Path(__file__).parent.parent / "assets" / "samples"
OURS = ("chest_film.png", "label.png", "product_shot.png")


@pytest.mark.parametrize("sample", sample_images(), ids=lambda sample: sample.name)
def test_every_sample_loads_and_says_what_it_is(sample: SamplePicture) -> None:
    picture = load_image(sample.path)
    assert picture.mode == "RGB" and min(picture.size) >= 64
    assert np.asarray(picture).std() > 10, "nothing to see"
    assert sample.caption and sample.prompt[-1] in "?." and sample.source


def test_ours_come_first_and_names_are_unique() -> None:
    found = sample_images()
    assert sorted(sample.path.name for sample in found[:3]) == sorted(OURS)
    assert len({sample.name for sample in found}) == len(found)


@pytest.mark.parametrize("package", ["gradio", "pydicom"])
def test_installed_packages_add_real_pictures(package: str) -> None:
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed")
    assert any(sample.source == package for sample in sample_images())


def test_absent_packages_and_assets_are_left_out(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(samples, "find_spec", lambda package: None)
    assert len(sample_images()) == 3
    monkeypatch.setattr(samples, "_ASSETS", tmp_path)
    assert sample_images() == []


def test_listing_imports_no_package() -> None:
    code = (
        "import sys; from multimodal.samples import sample_images; assert sample_images();"
        "print([name for name in ('gradio', 'pydicom', 'torch', 'numpy') if name in sys.modules])"
    )
    root = Path(samples.__file__).parent.parent
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=root).stdout
    assert printed.strip() == "[]"


def test_the_script_draws_the_committed_files(tmp_path: Path) -> None:
    spec = importlib.util.spec_from_file_location("make_samples", ASSETS / "make_samples.py")
    assert spec and spec.loader
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    script.main(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == list(OURS)
    for name in OURS:
        with Image.open(tmp_path / name) as drawn, Image.open(ASSETS / name) as committed:
            assert drawn.mode == committed.mode and drawn.size == committed.size
            difference = np.abs(np.asarray(drawn, dtype=int) - np.asarray(committed, dtype=int))
            assert not difference.any(), f"{name}: largest difference {difference.max()}"


@pytest.mark.parametrize("name", OURS)
def test_committed_files_are_small_and_bare(name: str) -> None:
    assert (ASSETS / name).stat().st_size < 200_000
    with Image.open(ASSETS / name) as picture:
        assert picture.info == {} and picture.mode == ("L" if name == "chest_film.png" else "RGB")
