"""The conversion: from files of published weights to a folder for `from_pretrained`."""

import argparse
from pathlib import Path
from typing import Any

import torch

from pointalign import storage
from pointalign.convert import sizes, write
from pointalign.convert.files import ConversionError, Source, collect

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
        raise ConversionError("nothing to convert: give --llm, --qformer, --point_encoder or --checkpoint")
    if options.merge_adapters and options.llm is None:
        raise ConversionError("--merge_adapters needs --llm, the weights to merge into")
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
        (folder / "README.md").write_text(readme, encoding="utf-8")
    return report
