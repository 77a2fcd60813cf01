"""`pointalign chat FILE [FILE ...]`: talk about one or several clouds in the terminal."""

from __future__ import annotations

import argparse
import os
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from pointalign import command_line

if TYPE_CHECKING:
    import numpy as np

    from pointalign.conversation import Conversation, Decoding
    from pointalign.models import PointAlignForConditionalGeneration, PointAlignProcessor


def main(arguments: list[str] | None = None) -> int:
    parser = command_line.Parser(
        "chat", description="Ask about point clouds or meshes (.npy .ply .obj .glb .stl ...), all in one conversation."
    )
    parser.add_argument("files", nargs="+", metavar="FILE", help="clouds or meshes")
    parser.add_argument("--question", action="append", help="ask this and exit; repeat for several questions")
    parser.add_argument(
        "--model",
        help="folder of a run or a model, stage file, or name of a shipped checkpoint (default: the newest of "
        "`make train`, else the shipped furniture)",
    )
    parser.add_argument(
        "--up_axis", help="vertical axis of the files: x y z -x -y -z (default: as the model was trained)"
    )
    parser.add_argument("--max_new_tokens", type=int, default=64, help="longest answer, in tokens (default: 64)")
    parser.add_argument(
        "--temperature", type=float, default=0.0, help="0 gives the most probable words; above, words are drawn"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the draw: the same seed gives the same answer")
    parser.add_argument(
        "--compile", action="store_true", help="compile the decoding step first (on a CPU many minutes)"
    )
    parser.add_argument("--quantization", choices=["nf4"], help="keep the language model in 4 bits (less memory)")
    options = parser.parse_args(arguments)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    return command_line.run(lambda: chat(options))


def chat(options: argparse.Namespace) -> int:
    with command_line.without_collector():
        model, processor, clouds = read(options)
        from pointalign.conversation import Conversation, Decoding
        from pointalign.models.serving import compiled_generation

    for path, cloud in zip(options.files, clouds, strict=True):
        print(f"{Path(path).name}: {len(cloud)} points")
    decoding = Decoding(options.max_new_tokens, options.temperature, options.seed)
    conversation = Conversation(model, processor, clouds, compiled_generation() if options.compile else None)
    if options.compile:
        compile_step(conversation)
    if options.question:
        for question in options.question:
            print(f"> {question}")
            print_answer(conversation, question, decoding)
        return 0
    print("Ask away; an empty line or Ctrl-D ends the conversation.")
    while True:
        try:
            question = input("> ").strip()
        except (EOFError, KeyboardInterrupt):
            print()
            return 0
        if not question:
            return 0
        print_answer(conversation, question, decoding)


def read(
    options: argparse.Namespace,
) -> tuple[PointAlignForConditionalGeneration, PointAlignProcessor, list[np.ndarray]]:
    """Model, processor and the clouds `[N, 6]` of the files, which are read first: a bad one is named at once.

    Raises:
        PointCloudError: a file is no cloud, or none that the model can read.
        FileNotFoundError, ValueError: see `build.load`.
    """
    from pointalign.data.point_cloud import PointCloudError, Reading, load_point_cloud

    reading = Reading(options.up_axis or "y")
    clouds = [load_point_cloud(path, **asdict(reading)) for path in options.files]
    from pointalign.build import load

    model, processor, _ = load(options.model, up_axis=options.up_axis, quantization=options.quantization)
    extractor = processor.feature_extractor
    trained = Reading(extractor.up_axis, **extractor.reading)
    if trained != reading:
        clouds = [load_point_cloud(path, **asdict(trained)) for path in options.files]
    for path, cloud in zip(options.files, clouds, strict=True):
        try:
            extractor.prepare(cloud)
        except PointCloudError as error:
            raise PointCloudError(f"{path}: {error}") from error
    return model, processor, clouds


def print_answer(conversation: Conversation, question: str, decoding: Decoding) -> None:
    """Print the answer: to a terminal word by word, else at once."""
    printed = ""

    def grow(text: str) -> None:
        nonlocal printed
        print(text[len(printed) :], end="", flush=True)
        printed = text

    answer = conversation.ask(question, decoding, grow if sys.stdout.isatty() else None).text
    # a tokenizer that tidies its text may yet change what is on the screen
    print(answer[len(printed) :] if answer.startswith(printed) else f"\n{answer}")


def compile_step(conversation: Conversation) -> None:
    """Answer once, so that what follows is compiled; prints how long that took and what a token takes now."""
    seconds = []
    for _ in range(2):  # the first compiles
        began = time.perf_counter()
        conversation.generate("What is this?", max_new_tokens=4, min_new_tokens=4)
        seconds.append(time.perf_counter() - began)
    print(f"compiled in {seconds[0] - seconds[1]:.0f} s; an answer of 4 tokens takes {seconds[1]:.2f} s now")


if __name__ == "__main__":
    sys.exit(main())
