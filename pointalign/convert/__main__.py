"""`python -m pointalign.convert`: the published weights (MiniGPT-3D, PointAlign, Phi-2, BLIP-2) become one folder.

In front of another language model than Phi-2 the published point branch gets a new projector, which is to be trained.

Tensors are read, translated and written one at a time. `conversion.json` accounts for every tensor of every file. A
tensor that no rule explains or that a part lacks ends the conversion before anything is written.
"""

import argparse
import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import torch

from pointalign import storage
from pointalign.convert import sizes, write
from pointalign.convert.files import ConversionError, Source, collect
from pointalign.models.adapters import LLM_ALPHA

PARTS_FILE = "parts.safetensors"  # written without a language model
REPORT_FILE = "conversion.json"


def convert(options: argparse.Namespace) -> dict[str, Any]:
    """Run the conversion that the options describe and return the content of `conversion.json`.

    Raises: ConversionError: a file is refused, or tensors are missing, unexplained or of the wrong shape.
    """
    llm = None if options.llm is None else Path(options.llm)
    phi = llm is None or sizes.is_phi(llm)
    paths = [("llm", options.llm), ("qformer", options.qformer), ("point_encoder", options.point_encoder)]
    paths += [("checkpoint", path) for path in options.checkpoint]
    sources = [Source(role, Path(path)) for role, path in paths if path is not None]
    if not sources:
        raise ConversionError("nothing to convert: give --llm, --qformer, --point-encoder or --checkpoint")
    if options.merge_adapters and options.llm is None:
        raise ConversionError("--merge-adapters needs --llm, the weights to merge into")
    collected = collect(sources, other_llm=not phi)
    config = sizes.configure(collected, llm, options)
    shapes = sizes.expected_shapes(config, collected)
    absent = sizes.verify(collected, shapes, config.num_query_experts, with_llm=llm is not None)
    adapters = sizes.adapter_options(collected, options)
    report = {
        "sources": [source.describe() for source in sources],
        "adapters": {} if options.merge_adapters else adapters,
        "merged_adapters": adapters if options.merge_adapters else {},
        "random": [] if llm is None else absent,
    }
    with storage.replacing(Path(options.output)) as folder:
        folder.mkdir()
        if llm is None:
            storage.write_tensors(folder / PARTS_FILE, {name: piece.read() for name, piece in collected.pieces.items()})
        else:
            dtype = options.dtype and getattr(torch, options.dtype)
            write.write(folder, llm, collected, config, shapes, adapters, options.merge_adapters, dtype)
            report["fingerprint"] = write.self_test(folder)
        report["tensors"] = collected.report
        storage.write_json(folder / REPORT_FILE, report)
        readme = write.card(report["sources"], report["random"], report["adapters"], phi)
        (folder / "README.md").write_text(readme)
    return report


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m pointalign.convert",
        description="Convert published weights into a folder for from_pretrained. Without --llm the parts are only "
        f"translated, into {PARTS_FILE}, which a later --checkpoint takes.",
    )
    parser.add_argument("--llm", help="folder of Phi-2, in either format, or of any causal language model")
    parser.add_argument("--qformer", help="BLIP-2 file, for the Q-Former")
    parser.add_argument("--point-encoder", help="PointBERT file, of MiniGPT-3D or PointLLM")
    parser.add_argument("--checkpoint", action="append", default=[], help="stage file; of several, the last one counts")
    parser.add_argument("--output", help="folder to write")
    parser.add_argument("--merge-adapters", action="store_true", help="fold LoRA into the weights, for inference")
    parser.add_argument("--dtype", choices=["float16", "bfloat16", "float32"], help="of the language model (as stored)")
    parser.add_argument("--lora-alpha", type=int, default=LLM_ALPHA, help="of the language model's adapters")
    parser.add_argument("--head-size", type=int, default=64, help="of Q-Former and point encoder (default: 64)")
    parser.add_argument("--num-groups", type=int, default=512, help="groups of the point encoder (default: 512)")
    parser.add_argument("--group-size", type=int, default=32, help="points per group (default: 32)")
    parser.add_argument("--query-routing", default="sparse", help="sparse, soft or constant, with query experts")
    parser.add_argument("--query-top-k", type=int, default=2, help="experts in use under sparse routing (default: 2)")
    parser.add_argument("--check", metavar="DIR", help="run the self-test of a converted folder again and compare")
    options = parser.parse_args(arguments)
    if (options.output is None) == (options.check is None):
        parser.error("give either --output DIR or --check DIR")
    try:
        if options.check:
            report = json.loads((Path(options.check) / REPORT_FILE).read_text())
            write.compare(Path(options.check), report["fingerprint"])
            print(f"{options.check}: answers as it did when it was converted")
            return 0
        report = convert(options)
    except (ConversionError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    counts = Counter(entry["status"] for entry in report["tensors"])
    print(f"{options.output}: " + ", ".join(f"{count} {status}" for status, count in counts.items()))
    if report["random"]:
        print(f"in no file, so drawn at random and to be trained: {', '.join(report['random'])}")
    if options.point_encoder:
        print(
            "clouds: the published encoders saw PointLLM's 8192_npy as stored, z up: leave up_axis at y for them, and "
            "read files with y up, such as .glb, with up_axis -z"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
