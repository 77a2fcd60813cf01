"""`pointalign convert`: the published weights (MiniGPT-3D, PointAlign, Phi-2, BLIP-2) become one folder.

In front of another language model than Phi-2 the published point branch gets a new projector, which is to be trained.

Tensors are read, translated and written one at a time. `conversion.json` accounts for every tensor of every file. A
tensor that no rule explains or that a part lacks ends the conversion before anything is written.
"""

import argparse
import json
import sys
from collections import Counter
from pathlib import Path

from pointalign import command_line


def main(arguments: list[str] | None = None) -> int:
    parser = command_line.Parser(
        "convert",
        description="Convert published weights into a folder for from_pretrained. Without --llm the parts are only\n"
        "translated, into parts.safetensors, which a later --checkpoint takes.",
    )
    sources = parser.add_argument_group("What is converted")
    sources.add_argument(
        "--llm", metavar="DIR", help="folder of Phi-2, in either format, or of any causal language model"
    )
    sources.add_argument("--qformer", metavar="FILE", help="BLIP-2 file, for the Q-Former")
    sources.add_argument("--point_encoder", metavar="FILE", help="PointBERT file, of MiniGPT-3D or PointLLM")
    sources.add_argument(
        "--checkpoint", action="append", default=[], metavar="FILE",
        help="stage file of MiniGPT-3D or PointAlign; may be repeated: where two hold a tensor, the last one counts",
    )  # fmt: skip
    written = parser.add_argument_group("What is written")
    written.add_argument("--output", metavar="DIR", help="folder to write")
    written.add_argument("--merge_adapters", action="store_true", help="fold LoRA into the weights, for inference")
    written.add_argument(
        "--dtype", choices=["float16", "bfloat16", "float32"], help="of the language model (default: as stored)"
    )
    unstored = parser.add_argument_group("Values that no tensor holds")
    unstored.add_argument(
        "--lora_alpha", type=int, metavar="N", help="of the language model's adapters (default: as published)"
    )
    unstored.add_argument(
        "--head_size", type=int, default=64, metavar="N", help="width of an attention head of the Q-Former and the "
        "point encoder (default: 64)",
    )  # fmt: skip
    unstored.add_argument(
        "--num_groups", type=int, default=512, metavar="N", help="groups of the point encoder (default: 512)"
    )
    unstored.add_argument("--group_size", type=int, default=32, metavar="N", help="points per group (default: 32)")
    unstored.add_argument(
        "--query_routing", default="sparse", metavar="KIND",
        help="sparse, soft or constant, with query experts (default: sparse)",
    )  # fmt: skip
    unstored.add_argument(
        "--query_top_k", type=int, default=2, metavar="N", help="experts in use under sparse routing (default: 2)"
    )
    again = parser.add_argument_group("Instead of a conversion")
    again.add_argument("--check", metavar="DIR", help="run the self-test of a converted folder again and compare")
    options = parser.parse_args(arguments)
    if (options.output is None) == (options.check is None):
        parser.error("give either --output DIR or --check DIR")
    return command_line.run(lambda: run(options))


def run(options: argparse.Namespace) -> int:
    from pointalign.convert import write
    from pointalign.convert.conversion import REPORT_FILE, convert

    if options.check:
        report = json.loads((Path(options.check) / REPORT_FILE).read_text(encoding="utf-8"))
        write.compare(Path(options.check), report["fingerprint"])
        print(f"{options.check}: answers as it did when it was converted")
        return 0
    report = convert(options)
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
