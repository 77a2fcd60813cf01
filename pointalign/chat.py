"""`pointalign chat FILE [FILE ...]`: talk about one or several clouds in the terminal."""

import argparse
import os
import sys
import time
from pathlib import Path
from typing import Any

from pointalign import command_line


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
        "--compile", action="store_true", help="compile the decoding step first (on a CPU many minutes)"
    )
    parser.add_argument("--quantization", choices=["nf4"], help="keep the language model in 4 bits (less memory)")
    options = parser.parse_args(arguments)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    return command_line.run(lambda: chat(options))


def chat(options: argparse.Namespace) -> int:
    from pointalign.data.point_cloud import PointCloudError, load_point_cloud

    clouds = [load_point_cloud(path, up_axis=options.up_axis or "y") for path in options.files]
    from pointalign.build import load
    from pointalign.certainty import generate_answers
    from pointalign.models.serving import compiled_generation

    model, processor, _ = load(options.model, up_axis=options.up_axis, quantization=options.quantization)
    extractor = processor.feature_extractor
    if extractor.up_axis != (options.up_axis or "y") or extractor.reading:
        clouds = [load_point_cloud(path, extractor.up_axis, **extractor.reading) for path in options.files]
    for path, cloud in zip(options.files, clouds, strict=True):
        try:
            extractor.prepare(cloud)
        except PointCloudError as error:
            raise PointCloudError(f"{path}: {error}") from error
        print(f"{Path(path).name}: {len(cloud)} points")
    messages: list[dict] = []
    opening: list[dict] = [{"type": "point", "point": cloud} for cloud in clouds]

    generation: dict = {"max_new_tokens": options.max_new_tokens, "do_sample": False}
    if options.compile:
        generation |= compiled_generation()
        compile_step(model, processor, opening, generation)

    def ask(question: str) -> str:
        messages.append({"role": "user", "content": [*opening, {"type": "text", "text": question}]})
        opening.clear()  # the clouds come before the first question only
        batch = processor.apply_chat_template(messages, tokenize=True, add_generation_prompt=True).to(model.device)
        (answer,) = generate_answers(model, processor, batch, **generation)
        messages.append({"role": "assistant", "content": answer.text})
        return answer.text

    if options.question:
        for question in options.question:
            print(f"> {question}\n{ask(question)}")
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
        print(ask(question))


def compile_step(model: Any, processor: Any, opening: list[dict], generation: dict) -> None:
    """Answer once, so that what follows is compiled; prints how long that took and what a token takes now."""
    content = [*opening, {"type": "text", "text": "What is this?"}]
    messages = [{"role": "user", "content": content}]
    batch = processor.apply_chat_template(messages, tokenize=True, add_generation_prompt=True).to(model.device)
    seconds = []
    for _ in range(2):  # the first compiles
        began = time.perf_counter()
        model.generate(**batch, **generation | {"max_new_tokens": 4, "min_new_tokens": 4})
        seconds.append(time.perf_counter() - began)
    print(f"compiled in {seconds[0] - seconds[1]:.0f} s; an answer of 4 tokens takes {seconds[1]:.2f} s now")


if __name__ == "__main__":
    sys.exit(main())
