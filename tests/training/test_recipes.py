"""Recipes: the first line of each is a command that works, and nothing in one is read by nobody."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest

from multimodal import cli, presets
from multimodal.data.sources import find
from multimodal.training.recipes import FOLDER, Recipe, names, read_recipe
from multimodal.training.train import TrainingSettings, kind_of
from multimodal.training.vision_side import VisionSettings

ROOT = Path(__file__).parent.parent.parent


def write(folder: Path, text: str) -> Path:
    (folder / "own.toml").write_text(text)
    return folder / "own.toml"


def test_these_come_with_the_package() -> None:
    assert names() == ["blind", "commerce", "general", "medical", "text_only"]
    assert '"training/recipes/*.toml"' in (ROOT / "pyproject.toml").read_text()  # and are in its wheel


@pytest.mark.parametrize("name", names())
class TestShipped:
    def test_the_first_line_is_the_command_that_runs_it(self, name: str) -> None:
        first = (FOLDER / f"{name}.toml").read_text().splitlines()[0]
        program, *words = shlex.split(first.removeprefix("# "))
        assert program == "multimodal"
        options = cli._parser().parse_args(words)
        assert options.run is cli._train and options.recipe == name
        assert options.root == Path("DATA") and options.output == Path("runs") / name

    def test_all_it_says_can_be_used(self, name: str) -> None:
        recipe = read_recipe(name, Path("DATA"))
        assert recipe.model in presets.PRESETS
        settings = TrainingSettings(output=Path("out"), cache=Path("cache"), **recipe.settings)
        assert settings.data
        if name in ("blind", "text_only"):  # of the decoder alone
            assert settings.vision is None and settings.pipeline == name and settings.lora_rank
        else:
            assert isinstance(settings.vision, VisionSettings) and not settings.pipeline
        for data, passes in settings.data.items():
            source, folder = find(data)
            assert source is not None and folder.parent == Path("DATA") and passes > 0
            assert settings.views[kind_of(data)] >= 1


def test_the_root_is_applied(tmp_path: Path) -> None:
    file = write(tmp_path, '[passes]\n"slake:a/b" = 1\n"mine.jsonl" = 0.5\n"/other/c.csv" = 2')
    assert read_recipe(file, Path("/data")).settings["data"] == {
        "slake:/data/a/b": 1,
        "/data/mine.jsonl": 0.5,
        "/other/c.csv": 2,
    }


def test_what_is_not_said_stays_as_it_is(tmp_path: Path) -> None:
    recipe = read_recipe(write(tmp_path, '[passes]\n"slake:a" = 1'), tmp_path)
    assert (recipe.model, recipe.architecture) == ("embedded", {})
    assert recipe.settings["vision"] is None
    settings = TrainingSettings(output=tmp_path, cache=tmp_path, **recipe.settings)
    assert settings == TrainingSettings(output=tmp_path, cache=tmp_path, data=recipe.settings["data"])


def test_everything_a_recipe_may_say(tmp_path: Path) -> None:
    file = write(
        tmp_path,
        """
        model = "resnet101-12l"
        held_out = 0.1
        refusals = 0.2
        [passes]
        "slake:a" = 1
        [architecture]
        gate = "tanh"
        cross_attention_layers = [1, 3]
        [vision]
        stages = 2
        [training]
        epochs = 3
        seed = 5
        ema = 0.999
        validate_steps = 100
        patience = 3
        validate_limit = 50
        lora_rank = 8
        [views]
        medical = 2
        """,
    )
    recipe = read_recipe(file, tmp_path)
    assert isinstance(recipe, Recipe) and recipe.model == "resnet101-12l"
    assert recipe.architecture == {"gate": "tanh", "cross_attention_layers": [1, 3]}
    settings = TrainingSettings(output=tmp_path, cache=tmp_path, **recipe.settings)
    assert settings.vision == VisionSettings(stages=2, seed=5)  # one seed for everything
    assert (settings.held_out, settings.refusals, settings.views) == (0.1, 0.2, {"medical": 2, "shop": 4})
    assert (settings.ema, settings.validate_steps, settings.patience, settings.validate_limit) == (0.999, 100, 3, 50)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("epoch = 3", "the recipe says epoch, which nobody reads: use model, held_out"),
        ("[training]\nepoch = 3", r"\[training\] says epoch, which nobody reads: use epochs, batch_size"),
        ("[training]\noutput = 'a'", r"\[training\] says output"),
        ("[vision]\nstage = 1", r"\[vision\] says stage, which nobody reads: use stages"),
        ("[architecture]\nnum_latent = 3", r"\[architecture\] says num_latent, which nobody reads"),
        ("[views]\nmedica = 3", r"\[views\] says medica, which nobody reads: use medical, shop"),
        ("a = [", "own.toml: not TOML"),
    ],
)
def test_what_nobody_reads_is_refused(text: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        read_recipe(write(tmp_path, text), tmp_path)


def test_a_recipe_that_is_not_there(tmp_path: Path) -> None:
    known = "blind, commerce, general, medical, text_only"
    with pytest.raises(ValueError, match=f"there is no recipe 'medicine': give {known} or a TOML file"):
        read_recipe("medicine", tmp_path)
