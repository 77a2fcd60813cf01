"""`pointalign demo [MODEL]`: a web page on this computer to ask about clouds and to see where the model looks."""

import importlib.util
import os
import sys
import tempfile
from pathlib import Path

from pointalign import command_line

PACKAGES = ("gradio", "plotly")


def main(arguments: list[str] | None = None) -> int:
    parser = command_line.Parser(
        "demo",
        description="Serve a web page on this computer: drop a cloud or mesh, ask about it, compare two, see where\n"
        "the model looks. No other computer reaches it but through a forwarded port: ssh -L 7860:localhost:7860 HOST.",
    )
    parser.add_argument(
        "model",
        nargs="?",
        metavar="MODEL",
        help="folder of a run or a model, stage file, or name of a shipped checkpoint (default: the newest of "
        "`make train`, else the shipped furniture)",
    )
    parser.add_argument("--quantization", choices=["nf4"], help="keep the language model in 4 bits (less memory)")
    parser.add_argument("--port", type=int, help="of the page (default: the first free from 7860 on)")
    options = parser.parse_args(arguments)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    return command_line.run(lambda: demo(options.model, options.quantization, options.port))


def demo(name: str | None, quantization: str | None, port: int | None) -> None:
    """Load a model and serve its page until Ctrl-C.

    Raises:
        ValueError: gradio or plotly is missing, or see `pointalign.build.load`.
        OSError: the port is taken.
    """
    if missing := [package for package in PACKAGES if importlib.util.find_spec(package) is None]:
        raise ValueError(f"the page needs {' and '.join(missing)}: pip install 'pointalign[demo]'")
    with command_line.without_collector():
        from pointalign import assets, build

        name = name or build.default_model()
        model, processor, _ = build.load(name, quantization=quantization)
        from pointalign.page.examples import load_examples

    try:
        examples = load_examples(assets.embedded_objects())
    except assets.AssetError as error:
        print(f"no examples on the page: {error}", file=sys.stderr)
        examples = []
    with tempfile.TemporaryDirectory(prefix="pointalign-demo-") as folder:
        from pointalign.page import serving

        serving.serve(model, processor, examples, Path(name).name, Path(folder), port)


if __name__ == "__main__":
    sys.exit(main())
