"""The command line: ``multimodal ask | train | evaluate | models | pull``.

Each command parses, calls one function of the library and prints. Errors that a user can mend are one line, not a stack
trace. Heavy imports wait until a command needs them.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; return 0, or 1 after an error that the user can mend."""
    options = _parser().parse_args(arguments)
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
    ask.add_argument("--max-new-tokens", type=_count, default=128, help="length limit of the answer (default: 128)")
    ask.add_argument(
        "--trace", type=Path, metavar="PNG", help="draw where the model looked, and its gates, into a file"
    )
    ask.add_argument("--json", action="store_true", help="print the answer with its figures as JSON")
    ask.set_defaults(run=_ask)

    train = command("train", "train a fused model; the same command goes on after an interruption")
    train.add_argument("--data", action="append", required=True, metavar="DATA", help=_DATA_HELP + "; may be repeated")
    train.add_argument("--output", type=Path, required=True, help="folder for checkpoints and the trained model")
    train.add_argument(
        "--model",
        default="embedded",
        help="a preset, to start anew (see `multimodal models`), or a trained folder or hub id, to go on from "
        "(default: embedded)",
    )
    train.add_argument(
        "--vision-stages",
        type=int,
        metavar="K",
        help="also train the last K stages of the image encoder; several times slower, since pictures then go through "
        "it in every step (default: what the model says; embedded: 0)",
    )
    train.add_argument("--cache", type=Path, help="folder for picture features (default: in the output folder)")
    train.add_argument("--epochs", type=float, default=6, help="passes over the data (default: 6)")
    train.add_argument("--batch-size", type=_count, default=32, help="questions in a step (default: 32)")
    train.add_argument("--learning-rate", type=float, default=1e-3, help="peak learning rate (default: 1e-3)")
    train.add_argument("--save-steps", type=_count, default=200, help="steps between checkpoints (default: 200)")
    train.add_argument("--max-steps", type=int, default=-1, help="stop after so many steps (default: never)")
    train.add_argument("--seed", type=int, default=0, help="of everything random (default: 0)")
    train.add_argument(
        "--tensorboard", action="store_true", help="write curves for TensorBoard, beside the checkpoints"
    )
    train.set_defaults(run=_train)

    evaluate = command("evaluate", "exact match of greedy answers on a data set")
    evaluate.add_argument("--data", action="append", required=True, metavar="DATA", help=_DATA_HELP)
    evaluate.add_argument("--split", default="validation", help="which split (default: validation)")
    evaluate.add_argument("--model", default="embedded", help="'embedded', a folder or a hub id (default: embedded)")
    evaluate.add_argument("--shuffle-images", action="store_true", help="give every question another one's pictures")
    evaluate.add_argument("--limit", type=_count, help="only the first so many questions")
    evaluate.add_argument("--batch-size", type=_count, default=32, help="questions at a time (default: 32)")
    evaluate.add_argument("--output", type=Path, metavar="JSONL", help="write every answer into a file")
    evaluate.set_defaults(run=_evaluate)

    models = command("models", "list models and pretrained parts, and what is here")
    models.set_defaults(run=_models)

    pull = command("pull", "fetch pretrained parts, so that nothing later needs a network")
    pull.add_argument("names", nargs="*", help="parts or hub ids (default: what the embedded model needs)")
    pull.set_defaults(run=_pull)
    return parser


def _count(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} is not 1 or more")
    return number


_DATA_HELP = "slake:FOLDER, grocery:FOLDER, grocery-descriptions:FOLDER or a .jsonl file"


def _ask(options: argparse.Namespace) -> int:
    from multimodal.images import load_image

    image = load_image(options.image)  # a bad picture is told before the model is loaded
    _quiet()
    from multimodal.model import MultiModalModel

    model = MultiModalModel.from_pretrained(options.model)
    tracing = options.trace is not None
    stream = model.stream(options.prompt, image, max_new_tokens=options.max_new_tokens, trace=tracing)
    for piece in stream:
        if not options.json:
            print(piece, end="", flush=True)
    answer = stream.answer
    assert answer is not None
    if options.json:
        print(json.dumps(_answer_as_dict(answer), indent=2, ensure_ascii=False))
    else:
        print()
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
        "finished": answer.finished,
        "timings": {name: round(seconds, 4) for name, seconds in asdict(answer.timings).items()},
        "usage": asdict(answer.usage),
    }
    if answer.trace is not None:
        openness = answer.trace.openness()[0].tolist()
        found["gates"] = [[token, round(gate, 4)] for token, gate in zip(answer.tokens, openness, strict=True)]
    return found


def _train(options: argparse.Namespace) -> int:
    _quiet()
    import torch
    from transformers import set_seed

    from multimodal.model import fastest_dtype, load
    from multimodal.presets import PRESETS, build
    from multimodal.training.train import TrainingSettings, train

    set_seed(options.seed)  # new weights are random
    model, processor = build(options.model) if options.model in PRESETS else load(options.model)
    model.to(fastest_dtype("cuda" if torch.cuda.is_available() else "cpu"))
    if options.vision_stages is not None:
        model.set_trainable(vision_stages=options.vision_stages, decoder=model.config.trainable_decoder)
    _print_table(
        ["part", "parameters", "trained"],
        [[part.name, f"{part.parameters:,}", f"{part.trainable:,}"] for part in model.trainable_parts()],
    )
    settings = TrainingSettings(
        data=options.data,
        output=options.output,
        cache=options.cache or options.output / "features",
        epochs=options.epochs,
        batch_size=options.batch_size,
        learning_rate=options.learning_rate,
        seed=options.seed,
        save_steps=options.save_steps,
        max_steps=options.max_steps,
        tensorboard=options.tensorboard,
    )
    try:
        train(model, processor, settings)
    except KeyboardInterrupt as interruption:
        said = interruption.args or ["interrupted: the same command goes on where it stopped"]
        raise KeyboardInterrupt(*said) from None
    data = "".join(f" --data {shlex.quote(name)}" for name in options.data)
    print(f"saved in {options.output}; how good it is, and how much of that it owes to the pictures:")
    print(f"  multimodal evaluate --model {shlex.quote(str(options.output))}{data}")
    print(f"  multimodal evaluate --model {shlex.quote(str(options.output))}{data} --shuffle-images")
    return 0


def _evaluate(options: argparse.Namespace) -> int:
    _quiet()
    from multimodal.data import read
    from multimodal.model import MultiModalModel
    from multimodal.training.evaluation import accuracy_by, predict, shuffle_images

    splits = [(name, read(name, options.split)) for name in options.data]  # told before the model is loaded
    if options.output:
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.write_text("")
    model = MultiModalModel.from_pretrained(options.model)
    for name, samples in splits:
        if options.shuffle_images:
            samples = shuffle_images(samples)
        predictions = predict(model, samples[: options.limit], batch_size=options.batch_size)
        rows = [[group, str(count), f"{100 * share:.1f} %"] for group, count, share in accuracy_by(predictions)]
        print(f"{name}, {options.split}{', pictures shuffled' if options.shuffle_images else ''}")
        _print_table(["questions", "number", "exact match"], rows)
        if options.output:
            with options.output.open("a", encoding="utf-8") as file:
                for prediction in predictions:
                    file.write(json.dumps(_prediction_as_dict(prediction), ensure_ascii=False) + "\n")
    return 0


def _prediction_as_dict(prediction: Any) -> dict[str, Any]:
    sample = prediction.sample
    return {
        "id": sample.id,
        "question": sample.question,
        "images": [str(path) for path in sample.images],
        "answer": sample.answer,
        "said": prediction.text,
        "correct": prediction.correct,
    }


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
    from multimodal.weights import pull

    pull(options.names or None)
    return 0


def _quiet() -> None:
    """No progress bars of the loading of weights, which takes a second."""
    from transformers.utils import logging

    logging.disable_progress_bar()


def _print_table(head: list[str], rows: list[list[str]]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(*head)
    for row in rows:
        table.add_row(*row)
    Console().print(table)


if __name__ == "__main__":
    sys.exit(main())
