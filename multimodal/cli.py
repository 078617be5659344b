"""The command line: one command each for asking, training, labelling, measuring and fetching (``multimodal --help``).

Each command parses, calls one function of the library and prints. Errors that a user can mend are one line, not a stack
trace. Heavy imports wait until a command needs them.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from multimodal.arguments import PRECISION_HELP, PRECISIONS, count, numbers, quiet, share
from multimodal.cli_cluster import add_batch, add_migrate, add_plan
from multimodal.cli_compare import add_advise, add_compare
from multimodal.cli_feedback import add_feedback
from multimodal.cli_service import add_keys, add_serve


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; return 0, or 1 after an error that the user can mend."""
    words = sys.argv[1:] if arguments is None else list(arguments)
    options = _parser().parse_args(words)
    options.command = shlex.join(["multimodal", *words])
    try:
        return options.run(options)
    except KeyboardInterrupt as interruption:
        print(f"multimodal: {interruption.args[0] if interruption.args else 'interrupted'}", file=sys.stderr)
        return 130
    except (ValueError, RuntimeError, OSError) as error:
        if options.debug:
            raise
        print(f"multimodal: {' '.join(str(error).split())}", file=sys.stderr)
        return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="multimodal", description="A fused model that answers about pictures.")
    parser.add_argument("--debug", action="store_true", help="show where an error comes from")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")

    def command(name: str, about: str) -> argparse.ArgumentParser:
        return commands.add_parser(name, help=about, description=f"{about[0].upper()}{about[1:]}.")

    ask = command("ask", "ask about a picture")
    ask.add_argument("image", type=Path, help="a picture: PNG, JPEG, WEBP, GIF, TIFF, BMP or DICOM")
    ask.add_argument("prompt", help="what to ask")
    ask.add_argument("--model", default="embedded", help="'embedded', a folder or a hub id (default: embedded)")
    ask.add_argument("--adapter", type=Path, metavar="FOLDER", help=_ADAPTER_HELP)
    ask.add_argument("--precision", choices=PRECISIONS, default="auto", help=PRECISION_HELP)
    ask.add_argument("--max-new-tokens", type=count, default=128, help="length limit of the answer (default: 128)")
    ask.add_argument(
        "--trace",
        type=Path,
        metavar="PNG",
        help="draw the gates of each word, and attention over the picture, into a file",
    )
    ask.add_argument(
        "--min-confidence",
        type=share,
        default=0.0,
        metavar="SHARE",
        help="say so, behind the answer, when the chance that it is right is below this, 0 to 1 (default: 0, never)",
    )
    ask.add_argument("--json", action="store_true", help="print the answer with its figures as JSON")
    ask.set_defaults(run=_ask)

    add_serve(command)
    add_keys(command)

    train = command("train", "train a fused model; the same command goes on after an interruption")
    train.add_argument(
        "--recipe", metavar="NAME", help="all that follows from a file: general, medical, commerce or TOML"
    )
    train.add_argument("--root", type=Path, default=Path(), help="folder that a recipe's data sets are in (default: .)")
    train.add_argument("--data", action="append", default=[], metavar="DATA", help=_DATA_HELP + "; may be repeated")
    train.add_argument("--output", type=Path, required=True, help="folder for checkpoints and the trained model")
    train.add_argument(
        "--model",
        help="a preset, to start anew (see `multimodal models`), or a trained folder or hub id, to go on from "
        "(default: what the recipe says, or embedded)",
    )
    train.add_argument("--gate", choices=["tanh", "dynamic"], help="static gates, or gates by token (default: dynamic)")
    train.add_argument(
        "--cross-layers",
        type=numbers,
        metavar="I,J,...",
        help="decoder layers before which a cross-attention block stands, from 0 (default: the preset's)",
    )
    train.add_argument("--latents", type=count, help="region tokens of a picture (default: the preset's)")
    train.add_argument(
        "--vision-stages",
        type=int,
        metavar="K",
        help="train the last K stages of the image encoder together with the rest; several times slower, as pictures "
        "then go through it in every step (default: none; a recipe's [vision] trains them first, which is cheap)",
    )
    train.add_argument("--cache", type=Path, help="folder for picture features (default: in the output folder)")
    train.add_argument("--epochs", type=float, help="passes over the data (default: 6)")
    train.add_argument("--batch-size", type=count, help="questions in a step (default: 32)")
    train.add_argument("--learning-rate", type=float, help="peak learning rate (default: 1e-3)")
    train.add_argument("--label-smoothing", type=float, help="of the answers' tokens, 0 to 1 (default: 0)")
    train.add_argument("--box-weight", type=float, help="of the loss that draws attention into boxes (default: 0)")
    train.add_argument(
        "--lora-rank",
        type=count,
        metavar="R",
        help="also train LoRA of this rank on the decoder's attention and feed-forward, from its first layer with "
        "cross-attention on; slower, as of the decoder only what is below is kept (default: it stays as it is)",
    )
    train.add_argument(
        "--validate-steps",
        type=count,
        metavar="N",
        help="answer validation questions every N steps, and take the best weights at the end; of an own file, a tenth "
        "of the pictures is kept for that (default: never)",
    )
    train.add_argument("--patience", type=count, help="stop after so many of these without a gain (default: never)")
    train.add_argument("--validate-limit", type=count, help="how many questions each time (default: 200)")
    train.add_argument(
        "--ema",
        type=share,
        metavar="DECAY",
        help="save an exponential moving average of the weights, such as 0.999 (default: the last step's)",
    )
    train.add_argument("--save-steps", type=count, help="steps between checkpoints (default: 200)")
    train.add_argument("--max-steps", type=int, help="stop after so many steps (default: never)")
    train.add_argument("--seed", type=int, help="of everything random (default: 0)")
    train.add_argument("--skip-bad", action="store_true", default=None, help="leave out broken rows, and list them")
    train.add_argument(
        "--streaming",
        action="store_true",
        default=None,
        help="read data as steps need it, for sets that memory does not hold; with --max-steps, without [vision]",
    )
    train.add_argument(
        "--shard-decoder",
        action="store_true",
        default=None,
        help="share a frozen decoder out between the processes of torchrun (FSDP2), where one GPU does not hold it",
    )
    train.add_argument(
        "--tensorboard", action="store_true", default=None, help="write curves for TensorBoard, beside the checkpoints"
    )
    train.set_defaults(run=_train)

    adapt = command("adapt", "adapt a trained model to about a hundred examples, in minutes")
    adapt.add_argument("data", metavar="DATA", help=f"{_DATA_HELP}, with a picture, a question and an answer each")
    adapt.add_argument("--model", default="embedded", help="'embedded', a folder or a hub id (default: embedded)")
    adapt.add_argument("--output", type=Path, help="folder for the adapter (default: the data's name and -adapter)")
    adapt.add_argument("--minutes", type=float, default=10, help="how long it may take, all in all (default: 10)")
    adapt.add_argument(
        "--augment",
        choices=["medical", "shop"],
        default="medical",
        help="how pictures are varied: medical keeps left and right, shop crops more and mirrors (default: medical)",
    )
    adapt.add_argument("--limit", type=count, help="draw so many examples, evenly over their answers")
    adapt.add_argument(
        "--held-out", type=share, default=0.2, metavar="SHARE", help="part to measure with, 0 for none (default: 0.2)"
    )
    adapt.add_argument("--seed", type=int, default=0, help="of everything random (default: 0)")
    adapt.add_argument("--skip-bad", action="store_true", help="leave out broken rows, and list them")
    adapt.set_defaults(run=_adapt)

    evaluate = command("evaluate", "how right greedy answers are, and where the model looks")
    evaluate.add_argument(
        "--data",
        action="append",
        default=[],
        metavar="DATA",
        help=f"exact match, with ROUGE-L where answers are long, on {_DATA_HELP}; may be repeated",
    )
    evaluate.add_argument(
        "--reports",
        action="append",
        default=[],
        metavar="DATA",
        help="facts right and facts missed in descriptions of the pictures of slake:FOLDER",
    )
    evaluate.add_argument("--language", choices=["en", "zh"], default="en", help="of those descriptions (default: en)")
    evaluate.add_argument(
        "--pointing",
        action="append",
        default=[],
        metavar="DATA",
        help="pointing game: how often the peak of the attention lies in the box of what slake:FOLDER asks about",
    )
    evaluate.add_argument("--form", action="store_true", help="forty prompts that people type: form of the answers")
    _add_answering(evaluate, split="validation")
    evaluate.add_argument("--adapter", type=Path, metavar="FOLDER", help=_ADAPTER_HELP)
    evaluate.add_argument(
        "--held-out", action="store_true", help="only questions about the pictures that training leaves out"
    )
    evaluate.add_argument(
        "--by",
        action="append",
        default=[],
        metavar="KEY",
        help="also by another entry beside the question, such as content_type; may be repeated",
    )
    pictures = evaluate.add_mutually_exclusive_group()
    pictures.add_argument("--shuffle-images", action="store_true", help="give every question another one's pictures")
    pictures.add_argument("--blind", action="store_true", help="give no pictures")
    pictures.add_argument("--floors", action="store_true", help="all three: pictures, shuffled and blind beside them")
    evaluate.add_argument("--output", type=Path, metavar="JSONL", help="write every answer into a file")
    evaluate.set_defaults(run=_evaluate)

    calibrate = command("calibrate", "turn a model's confidence into the chance that its answer is right")
    calibrate.add_argument(
        "--data", action="append", required=True, metavar="DATA", help=_DATA_HELP + "; may be repeated"
    )
    _add_answering(calibrate, split="train")
    calibrate.add_argument(
        "--held-out",
        action=argparse.BooleanOptionalAction,
        help="only questions about the pictures that training leaves out (default: yes for train, else no)",
    )
    calibrate.set_defaults(run=_calibrate)

    label = command("label", "have a stronger model answer questions about your own pictures, to train on its answers")
    label.add_argument("pictures", type=Path, metavar="FOLDER", help="folder with pictures, and folders in it")
    label.add_argument(
        "--teacher",
        required=True,
        metavar="TEACHER",
        help="a fused model, a folder or hub id that transformers' image-text-to-text pipeline runs, or the URL of an "
        "OpenAI-compatible endpoint, to which the pictures are sent (its key: OPENAI_API_KEY)",
    )
    label.add_argument("--teacher-model", metavar="NAME", help="what the endpoint calls the model")
    label.add_argument(
        "--question", action="append", required=True, metavar="TEXT", help="asked about each picture; may be repeated"
    )
    label.add_argument(
        "--instruction",
        default="",
        metavar="TEXT",
        help="told to the teacher with each question, and not written down, such as 'Answer in at most three words.'",
    )
    label.add_argument(
        "--output", type=Path, required=True, metavar="JSONL", help="for the answers; what it has is not asked again"
    )
    label.add_argument("--max-new-tokens", type=count, default=64, help="length limit of an answer (default: 64)")
    label.set_defaults(run=_label)

    add_compare(command)
    add_advise(command)
    add_feedback(command)
    add_batch(command)
    add_plan(command)
    add_migrate(command)

    describe = command("describe", "what is in data sets, and which pictures stand in two splits")
    describe.add_argument(
        "--data", action="append", required=True, metavar="DATA", help=_DATA_HELP + "; may be repeated"
    )
    describe.add_argument("--split", help="describe only this split; pictures are compared between all (default: all)")
    describe.add_argument("--json", action="store_true", help="print everything as JSON, with every pair of pictures")
    describe.set_defaults(run=_describe)

    models = command("models", "list models and pretrained parts, and what is here")
    models.set_defaults(run=_models)

    pull = command("pull", "fetch pretrained parts, so that nothing later needs a network")
    pull.add_argument("names", nargs="*", help="parts or hub ids (default: what the embedded model needs)")
    pull.set_defaults(run=_pull)
    return parser


def _add_answering(command: argparse.ArgumentParser, *, split: str) -> None:
    """Options of every command that answers a whole data set."""
    command.add_argument("--split", default=split, help=f"which split (default: {split})")
    command.add_argument("--model", default="embedded", help="'embedded', a folder or a hub id (default: embedded)")
    command.add_argument("--limit", type=count, help="only the first so many questions")
    command.add_argument("--batch-size", type=count, default=32, help="questions at a time (default: 32)")
    command.add_argument(
        "--max-new-tokens", type=count, help="length limit of an answer (default: what the data set's longest needs)"
    )
    command.add_argument("--skip-bad", action="store_true", help="leave out broken rows and pictures, and list them")


_DATA_HELP = (
    "slake:FOLDER, slake-zh:FOLDER, vqa-rad:FOLDER, vqa-rad/K:FOLDER (fold K of 0 to 4), grocery:FOLDER, "
    "grocery-categories:FOLDER, grocery-descriptions:FOLDER, clothing:FOLDER, or a .jsonl or .csv file"
)
_ADAPTER_HELP = "answer with this adapter, which `multimodal adapt` made"


def _ask(options: argparse.Namespace) -> int:
    from multimodal.images import load_image

    image = load_image(options.image)  # a bad picture is told before the model is loaded
    quiet()
    from multimodal.model import MultiModalModel

    model = MultiModalModel.from_pretrained(options.model, adapter=options.adapter, precision=options.precision)
    tracing = options.trace is not None
    stream = model.stream(
        options.prompt,
        image,
        max_new_tokens=options.max_new_tokens,
        trace=tracing,
        min_confidence=options.min_confidence,
    )
    for piece in stream:
        if not options.json:
            print(piece, end="", flush=True)
    answer = stream.answer
    assert answer is not None
    if options.json:
        print(json.dumps(_answer_as_dict(answer), indent=2, ensure_ascii=False))
    else:
        print(flush=True)
        if answer.unsure:
            sure, least = (f"{100 * share:.0f} %" for share in (answer.confidence, options.min_confidence))
            print(f"not sure: the chance that this is right is about {sure}, less than {least}", file=sys.stderr)
    if tracing:
        from multimodal.drawing import draw_trace

        draw_trace(image, answer, question=options.prompt).save(options.trace)
        print(f"drawn: {options.trace}", file=sys.stderr)
    return 0


def _answer_as_dict(answer: Any) -> dict[str, Any]:
    from dataclasses import asdict

    found: dict[str, Any] = {
        "text": answer.text,
        "confidence": round(answer.confidence, 4),
        "unsure": answer.unsure,
        "finished": answer.finished,
        "timings": {name: round(seconds, 4) for name, seconds in asdict(answer.timings).items()},
        "usage": asdict(answer.usage),
    }
    if answer.trace is not None:
        openness = answer.trace.openness()[0].tolist()
        found["gates"] = [[token, round(gate, 4)] for token, gate in zip(answer.tokens, openness, strict=True)]
    return found


_TRAINING_OPTIONS = (
    "epochs",
    "batch_size",
    "learning_rate",
    "label_smoothing",
    "box_weight",
    "validate_steps",
    "patience",
    "validate_limit",
    "ema",
    "save_steps",
    "max_steps",
    "seed",
    "skip_bad",
    "lora_rank",
    "streaming",
    "shard_decoder",
    "tensorboard",
)


def _train(options: argparse.Namespace) -> int:
    quiet()
    from dataclasses import replace

    import torch
    from transformers import set_seed

    from multimodal.model import fastest_dtype, load
    from multimodal.presets import PRESETS, build
    from multimodal.training.processes import is_main, say
    from multimodal.training.recipes import Recipe, read_recipe
    from multimodal.training.train import TrainingSettings, train

    recipe = Recipe() if options.recipe is None else read_recipe(options.recipe, options.root)
    said = {key: getattr(options, key) for key in _TRAINING_OPTIONS if getattr(options, key) is not None}
    chosen: dict[str, Any] = {**recipe.settings, **said}
    chosen["data"] = {**chosen.get("data", {}), **{name: 1.0 for name in options.data}}
    if not chosen["data"]:
        raise ValueError("nothing to train on: give --data or --recipe")
    if options.seed is not None and chosen.get("vision") is not None:
        chosen["vision"] = replace(chosen["vision"], seed=options.seed)
    settings = TrainingSettings(output=options.output, cache=options.cache or options.output / "features", **chosen)
    architecture = dict(recipe.architecture)
    if options.gate is not None:
        architecture["gate"] = options.gate
    if options.cross_layers is not None:
        architecture["cross_attention_layers"] = options.cross_layers
    if options.latents is not None:
        architecture["num_latents"] = options.latents

    set_seed(settings.seed)  # new weights are random
    name = options.model or recipe.model
    if name in PRESETS and not settings.pipeline:
        model, processor = build(name, dtype=torch.float32, **architecture)
    elif architecture:
        raise ValueError(f"{name} has its gates and its layers: only a preset takes {', '.join(architecture)}")
    else:
        model, processor = load(name, dtype=torch.float32)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    for frozen in (model.model.language_model, model.lm_head):
        frozen.to(fastest_dtype(device))
    if options.vision_stages is not None:
        model.set_trainable(vision_stages=options.vision_stages, decoder=model.config.trainable_decoder)
    if is_main():
        _print_table(
            ["part", "parameters", "trained"],
            [[part.name, f"{part.parameters:,}", f"{part.trainable:,}"] for part in model.trainable_parts()],
        )
    if settings.vision is not None:
        say(f"first the vision side: the encoder's last stages ({settings.vision.stages}) and the resampler")
    try:
        train(model, processor, settings)
    except KeyboardInterrupt as interruption:
        reason = interruption.args or ("interrupted: the same command goes on where it stopped",)
        raise KeyboardInterrupt(*reason) from None
    if settings.pipeline:
        tuned = shlex.quote(f"{settings.pipeline}_tuned={options.output}")
        say(f"saved in {options.output}, to be compared with what sees:")
        say(f"  multimodal compare --pipelines native,{settings.pipeline}_tuned --tuned {tuned} --tasks TASK")
        return 0
    data = "".join(f" --data {shlex.quote(name)}" for name in settings.data)
    say(f"saved in {options.output}; how good it is, and how much of that it owes to the pictures:")
    say(f"  multimodal evaluate --model {shlex.quote(str(options.output))}{data}")
    say(f"  multimodal evaluate --model {shlex.quote(str(options.output))}{data} --shuffle-images")
    return 0


def _adapt(options: argparse.Namespace) -> int:
    quiet()
    from multimodal.data import normalise_answer, read
    from multimodal.model import MultiModalModel
    from multimodal.training.adapt import AdaptSettings, adapt
    from multimodal.training.few import draw_evenly

    bad: list[Any] | None = [] if options.skip_bad else None
    samples = read(options.data, skip_bad=bad)
    _print_bad(bad)
    if options.limit is not None and options.limit < len(samples):
        drawn = draw_evenly(samples, options.limit, seed=options.seed)
        answers = len({normalise_answer(sample.answer) for sample in drawn})
        print(f"{len(drawn)} of {len(samples):,} examples, drawn evenly over {answers} answers")
        samples = drawn
    output = options.output or Path(f"{Path(options.data.rpartition(':')[2]).stem}-adapter")
    settings = AdaptSettings(
        output, minutes=options.minutes, augment=options.augment, held_out=options.held_out, seed=options.seed
    )
    print(adapt(MultiModalModel.from_pretrained(options.model), samples, settings))
    model, folder = shlex.quote(options.model), shlex.quote(str(output))
    for command in ("multimodal ask PICTURE PROMPT", "python -m demo.app"):
        print(f"to use it: {command} --model {model} --adapter {folder}")
    return 0


def _evaluate(options: argparse.Namespace) -> int:
    quiet()
    from multimodal.training.measuring import EvaluationSettings, evaluate

    return _show(evaluate(_settings(EvaluationSettings, options)))


def _calibrate(options: argparse.Namespace) -> int:
    quiet()
    from multimodal.training.measuring import CalibrationSettings, calibrate

    return _show(calibrate(_settings(CalibrationSettings, options)))


def _print_bad(bad: list[Any] | None) -> None:
    from multimodal.data import report_bad

    if bad:
        print(report_bad(bad))


def _settings(kind: Any, options: argparse.Namespace) -> Any:
    from dataclasses import fields

    return kind(**{entry.name: getattr(options, entry.name) for entry in fields(kind)})


def _show(told: Iterable[Any]) -> int:
    """Print lines and tables as they come."""
    for piece in told:
        if isinstance(piece, str):
            print(piece)
        else:
            _print_table(*piece)
    return 0


def _label(options: argparse.Namespace) -> int:
    from multimodal.data import report_bad
    from multimodal.training.teacher import label, pictures_in, teacher_of

    pictures = pictures_in(options.pictures)  # told before a teacher is loaded
    quiet()
    teacher = teacher_of(options.teacher, model=options.teacher_model, max_new_tokens=options.max_new_tokens)
    try:
        done = label(pictures, options.question, teacher, options.output, instruction=options.instruction)
    except KeyboardInterrupt:
        raise KeyboardInterrupt("interrupted: the same command goes on where it stopped") from None
    if done.bad:
        print(report_bad(done.bad))
    before = f", {done.there:,} were there" if done.there else ""
    print(f"{done.written:,} answers of {teacher.name} added to {options.output}{before}; to train on them:")
    print(f"  multimodal train --data {shlex.quote(str(options.output))} --output FOLDER")
    return 0


def _describe(options: argparse.Namespace) -> int:
    from multimodal.data import report_bad
    from multimodal.data.describe import describe, table_of, warnings_of

    description = describe(options.data, options.split, progress=True)
    if options.json:
        print(json.dumps(description.to_dict(), indent=2, ensure_ascii=False))
        return 0
    for name in dict.fromkeys(split.data for split in description.splits):
        print(name)
        _print_table(*table_of([split for split in description.splits if split.data == name]))
    unread = report_bad([*description.bad, *description.broken])
    for warning in filter(None, [unread, *warnings_of(description)]):
        print(warning)
    if not description.leaks:
        print("no picture stands in two splits")
    return 0


def _models(_options: argparse.Namespace) -> int:
    from multimodal.presets import PRESETS, trained_folder
    from multimodal.weights import parts

    rows = [
        [name, "trained" if trained_folder(name) else "to be trained", preset.about] for name, preset in PRESETS.items()
    ]
    _print_table(["model", "state", "about"], rows)
    _print_table(
        ["part", "state", "size", "licence", "about"],
        [[part.name, part.state, f"{part.size / 1e6:.0f} MB", part.licence, part.description] for part in parts()],
    )
    return 0


def _pull(options: argparse.Namespace) -> int:
    from multimodal.engine.build import BuildError, build
    from multimodal.weights import pull, say

    pull(options.names or None)
    try:
        build(say)
    except (BuildError, OSError) as error:  # answers come without it, more slowly
        say(f"the engine runs without its compiled step: {str(error).splitlines()[0]}")
    return 0


def _print_table(head: list[str], rows: list[list[str]]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(*head)
    for row in rows:
        table.add_row(*row)
    Console().print(table)


if __name__ == "__main__":
    sys.exit(main())
