"""Adapters: small sets of LoRA weights beside those of a fused model, made for one task, and the switch between them.

Attaching goes through transformers' own interface (``add_adapter``, ``set_adapter``, ``disable_adapters``), which needs
PEFT; it is imported when a first adapter is. An adapter's folder holds PEFT's two files and ``base.json``, which says
which model it was made for: on another one it is refused, since its numbers mean nothing there. No pickle is read.

What always holds: an answer is computed with one adapter from its first token to its last (see :class:`AdapterSwitch`),
and with no adapter a model gives what it gave before any was loaded, bit for bit.
"""

from __future__ import annotations

import hashlib
import json
import re
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from multimodal.fusion import FusionForConditionalGeneration
from multimodal.fusion.low_rank import CONFIG, WEIGHTS, LowRank, read_low_rank

BASE = "base.json"
INSTALL = "pip install 'multimodal[train]'"
LOOK_EVERY = 0.05  # seconds, while waiting, to see whether the question was withdrawn
SAMPLED = 97  # of a decoder's and an encoder's numbers, every 97th counts in a model's digest: they are many


class AdapterError(RuntimeError):
    """An adapter that cannot be used; the message names it and the remedy."""


def attach(
    model: FusionForConditionalGeneration, layers: Sequence[str], *, name: str, rank: int, scale: float, seed: int = 0
) -> None:
    """Add a fresh adapter, which changes nothing yet, and make it the active one. What is trained stays as it is.

    Args:
        model: The fused model.
        layers: Full names of linear layers.
        name: Letters, digits, "_" and "-".
        rank: Of the two matrices.
        scale: What their product is multiplied by.
        seed: Of their first values.

    Raises:
        AdapterError: If PEFT is not there, or too old for this transformers.
    """
    try:
        from peft import LoraConfig
        from peft.tuners.tuners_utils import BaseTunerLayer
    except ImportError:
        raise AdapterError(f"adapters need PEFT, which is not installed: {INSTALL}") from None
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    # A pattern: of a long list of names PEFT would make its own, shorter one.
    pattern = "|".join(map(re.escape, layers))
    alpha: Any = scale * rank  # PEFT says int, and takes any number
    config = LoraConfig(r=rank, lora_alpha=alpha, lora_dropout=0.0, target_modules=pattern)
    with torch.random.fork_rng(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Already found a `peft_config`")  # several adapters are what is wanted
        torch.manual_seed(seed)
        try:
            model.add_adapter(config, name)
        except ImportError as error:  # transformers compares versions
            raise AdapterError(f"{error} To get it: {INSTALL}") from None
    for module in model.modules():
        if isinstance(module, BaseTunerLayer):
            module.enable_adapters(True)  # they may have been off, and fresh layers follow the others
    model.set_adapter(name)
    model.requires_grad_(False)
    for parameter in trained:
        parameter.requires_grad_(True)


def layers_of(model: nn.Module, name: str) -> dict[str, Any]:
    """The layers that an attached adapter adds to, by name."""
    return {key: module for key, module in model.named_modules() if name in getattr(module, "lora_A", {})}


def weights_of(model: nn.Module, name: str) -> LowRank:
    """The weights of an attached adapter, as they are: not a copy."""
    found = layers_of(model, name)
    pairs = {key: (layer.lora_A[name].weight, layer.lora_B[name].weight) for key, layer in found.items()}
    return LowRank(pairs, next(iter(found.values())).scaling[name])


def train_adapter(model: nn.Module, name: str) -> None:
    """Make an attached adapter's weights trained ones, in float32."""
    for part in _parts(model, name):
        part.float().requires_grad_(True)


def _parts(model: nn.Module, name: str) -> list[nn.Module]:
    return [part for layer in layers_of(model, name).values() for part in (layer.lora_A[name], layer.lora_B[name])]


def detach(model: FusionForConditionalGeneration, name: str) -> None:
    """Take an attached adapter away again; layers that have no other one are as before any was attached."""
    model.delete_adapter(name)
    for key, module in list(model.named_modules()):
        if hasattr(module, "lora_A") and not module.lora_A:
            parent, _, child = key.rpartition(".")
            setattr(model.get_submodule(parent), child, module.base_layer)


def save_adapter(model: FusionForConditionalGeneration, name: str, folder: Path, *, base: str) -> None:
    """Write an attached adapter's folder.

    Args:
        model: The fused model.
        name: Of the adapter.
        folder: Made if needed.
        base: The fused model's name, for people to read.
    """
    weights_of(model, name).save(folder, dtype=torch.float32, base_model_name_or_path=base)
    said = {"name": base, "digest": digest_of(model)}
    (folder / BASE).write_text(json.dumps(said, indent=2) + "\n", encoding="utf-8")


def read_adapter(folder: Path, model: FusionForConditionalGeneration, *, base: str) -> LowRank:
    """Read an adapter's folder and make sure that it fits a model.

    Args:
        folder: Its folder.
        model: The fused model.
        base: Its name, for the error message.

    Raises:
        AdapterError: If there is no adapter, it is broken, or it was made for another model.
    """
    for file in (CONFIG, WEIGHTS, BASE):
        if not (folder / file).is_file():
            raise AdapterError(f"{folder} holds no adapter ({file} is missing): give one that `multimodal adapt` made")
    try:
        said = json.loads((folder / BASE).read_text(encoding="utf-8"))
        name, digest = str(said["name"]), str(said["digest"])
        weights = read_low_rank(str(folder))
        assert weights is not None  # its files are there
    except (ValueError, KeyError, TypeError, OSError) as error:
        raise AdapterError(f"the adapter in {folder} cannot be read ({error}): make or copy it again") from None
    if digest != (own := digest_of(model)):
        raise AdapterError(
            f"the adapter in {folder} was made for the model {name!r} ({digest[:8]}), and this is "
            f"{base or 'another one'!r} ({own[:8]}): load that model, or make an adapter for this one with "
            "`multimodal adapt`"
        )
    for layer, (a, b) in weights.pairs.items():
        try:
            found = model.get_submodule(layer)
        except AttributeError:
            found = None
        found = getattr(found, "base_layer", found)
        shape = tuple(found.weight.shape) if isinstance(found, nn.Linear) else None
        if shape != (len(b), a.shape[1]):
            raise AdapterError(
                f"the adapter in {folder} adds {(len(b), a.shape[1])} to {layer}, and the model has "
                f"{'no such layer' if shape is None else f'one of {shape}'} there: make it again"
            )
    return weights


def load_adapter(model: FusionForConditionalGeneration, weights: LowRank, name: str) -> None:
    """Attach an adapter that was read; it is the active one then."""
    attach(model, list(weights.pairs), name=name, rank=weights.rank, scale=weights.scale)
    with torch.no_grad():
        for key, layer in layers_of(model, name).items():
            a, b = weights.pairs[key]
            for part, values in ((layer.lora_A[name], a), (layer.lora_B[name], b)):
                part.weight.copy_(values)
                part.to(layer.base_layer.weight.dtype)


def digest_of(model: FusionForConditionalGeneration) -> str:
    """What tells models apart for an adapter: a digest of their weights, the same in float32 and in bfloat16."""
    digest = hashlib.sha256(str(list(model.config.cross_attention_layers)).encode())
    for name, tensor in sorted(model.state_dict().items()):
        if "lora_" in name or not tensor.is_floating_point() or name.startswith("lm_head."):
            continue
        name = name.replace(".base_layer.", ".")
        step = SAMPLED if name.startswith(("model.language_model.", "model.vision_encoder.")) else 1
        values = tensor.detach().flatten()[::step].to("cpu", torch.bfloat16)
        digest.update(f"{name} {tuple(tensor.shape)}".encode())
        digest.update(values.clone(memory_format=torch.contiguous_format).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


class AdapterSwitch:
    """The adapters of a model that answers in several threads.

    Layers have one active adapter at a time. So what is computed in them (pictures and traces; whole answers where the
    engine has no flat weights) is computed side by side with the same adapter, and with another one it waits for its
    turn, in the order of asking. Choosing an adapter waits for nothing: it counts for the answers that begin later.

    Args:
        model: The fused model.

    Attributes:
        names: What people call an adapter, and what PEFT calls it.
        chosen: What answers use that name none; None is the model as it came.
    """

    def __init__(self, model: FusionForConditionalGeneration) -> None:
        self.model = model
        self.names: dict[str, str] = {}
        self.chosen: str | None = None
        self._changed = threading.Condition()
        self._waiting: list[object] = []
        self._running = 0
        self._active: object = None

    def new_name(self, name: str) -> str:
        """What PEFT is to call a new adapter: as a part of a module's name.

        Raises:
            AdapterError: If there is one of this name.
        """
        inner = re.sub(r"\W", "_", name)
        if inner in self.names.values():
            raise AdapterError(f"an adapter called {name!r} is loaded already: give this one another name")
        return inner

    def inner_name(self, name: str | None) -> str | None:
        """What PEFT calls an adapter."""
        return None if name is None else self.names[name]

    def choose(self, name: str | None) -> None:
        """What answers use from now on."""
        with self._changed:
            self.chosen = name
            self._rest()

    @contextmanager
    def use(self, name: str | None, *, given_up: Callable[[], bool] = lambda: False) -> Iterator[bool]:
        """Compute with an adapter, when its turn has come.

        Args:
            name: The adapter.
            given_up: Asked while waiting; if true, the turn does not come.

        Yields:
            Whether the turn has come.
        """
        with self._turn(name, given_up) as come:
            yield come

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Change the layers: nothing is being computed, and nothing begins. Not to be used inside itself."""
        with self._turn(object(), lambda: False):
            yield

    @contextmanager
    def _turn(self, wanted: object, given_up: Callable[[], bool]) -> Iterator[bool]:
        if not self._wait(wanted, given_up):
            yield False
            return
        try:
            yield True
        finally:
            with self._changed:
                self._running -= 1
                self._rest()
                self._changed.notify_all()

    def _wait(self, wanted: object, given_up: Callable[[], bool]) -> bool:
        ticket = object()
        with self._changed:
            self._waiting.append(ticket)
            try:
                while self._waiting[0] is not ticket or (self._running and self._active != wanted):
                    if given_up():
                        return False
                    self._changed.wait(LOOK_EVERY)
                self._activate(wanted)
                self._running += 1
                return True
            finally:
                self._waiting.remove(ticket)
                self._changed.notify_all()

    def _rest(self) -> None:
        """With nothing to compute, be what was chosen: for those who use the fused model itself."""
        if not self._running and not self._waiting:
            self._activate(self.chosen)

    def _activate(self, wanted: object) -> None:
        if wanted == self._active:
            return
        if not isinstance(wanted, str) and self.names:
            self.model.disable_adapters()
        elif isinstance(wanted, str):
            self.model.enable_adapters()
            self.model.set_adapter(self.names[wanted])
            for part in _parts(self.model, self.names[wanted]):
                part.requires_grad_(False)  # PEFT takes an adapter that is set for one that is trained
        self._active = wanted
