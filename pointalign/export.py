"""`pointalign export MODEL FOLDER`: the merged language model for any engine, and the point branch apart."""

import argparse
import sys
from pathlib import Path

from pointalign import command_line


def main(arguments: list[str] | None = None) -> int:
    parser = command_line.Parser(
        "export",
        description="Write FOLDER/llm, the language model with its adapters merged, as transformers and vLLM read it,\n"
        "and FOLDER/point_branch.safetensors, which turns clouds into its prompt embeddings (docs/serving.md).",
    )
    parser.add_argument("model", help="a run's folder, a model's folder, a stage file, or a shipped checkpoint")
    parser.add_argument("folder", type=Path, help="to write; it must not exist")
    options = parser.parse_args(arguments)
    return command_line.run(lambda: export(options))


def export(options: argparse.Namespace) -> None:
    if options.folder.exists():
        raise ValueError(f"{options.folder} exists: choose another folder")
    from pointalign import build, storage
    from pointalign.models import split_folder

    model, processor, _ = build.load(options.model, device="cpu")
    build.merge_adapters(model)
    with storage.replacing(options.folder) as temporary:
        temporary.mkdir()
        split_folder.save(model, processor, temporary)
    branch = options.folder / split_folder.POINT_BRANCH
    print(f"written: {options.folder / split_folder.LLM_FOLDER}, {branch} ({branch.stat().st_size / 1e6:.0f} MB)")
    language_model = type(model.model.language_model)
    if not language_model.__module__.startswith("transformers."):
        print(f"{language_model.__name__} is a class of pointalign: other engines do not know it")


if __name__ == "__main__":
    sys.exit(main())
