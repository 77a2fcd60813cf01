"""`pointalign COMMAND`, or `python -m pointalign COMMAND`: the one door to every command."""

import importlib
import sys

from pointalign.command_line import entry, suggestion

COMMANDS = {  # name -> module and what it does, in the order of a first day
    "assets": ("pointalign.assets", "fetch the small language model and the embedded objects, once"),
    "chat": ("pointalign.chat", "ask about a point cloud or mesh in the terminal"),
    "demo": ("pointalign.demo", "the same on a web page of this computer, with a view of where the model looks"),
    "annotate": ("pointalign.annotate", "write the annotation file of your clouds, from file names or a table"),
    "check": ("pointalign.check", "check clouds and annotations before training"),
    "train": ("pointalign.train", "train from a recipe: finetune on your own clouds, or the paper's stages"),
    "evaluate": ("pointalign.evaluate", "ask held-out questions, with metrics and intervals"),
    "compare": ("pointalign.compare", "paired differences of two evaluations"),
    "probe": ("pointalign.probe", "what can be read about a cloud from each layer of the language model"),
    "audit": ("pointalign.audit.__main__", "does a model look at the cloud, or guess from the question?"),
    "features": ("pointalign.features", "compute the frozen point features of a data set once"),
    "export": ("pointalign.export", "write the merged language model and the point branch apart, to serve them"),
    "convert": ("pointalign.convert.__main__", "turn published weights into a folder for from_pretrained"),
}


def main(arguments: list[str] | None = None) -> int:
    arguments = sys.argv[1:] if arguments is None else arguments
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(usage())
        return 0
    if arguments[0] == "--version":
        from pointalign import __version__

        print(f"pointalign {__version__}")
        return 0
    name, *rest = arguments
    if name not in COMMANDS:
        near = suggestion(name, COMMANDS).replace("--", "")
        print(f"error: no command {name!r}{near}\nsee: pointalign --help", file=sys.stderr)
        return 2
    return importlib.import_module(COMMANDS[name][0]).main(rest)


def usage() -> str:
    lines = ["usage: pointalign COMMAND ...", "", "Ask a language model about 3D point clouds, and train it.", ""]
    lines += [entry(name, text) for name, (_, text) in COMMANDS.items()]
    return "\n".join([*lines, "", "Each with --help, and also as `python -m pointalign.COMMAND`."])


if __name__ == "__main__":
    sys.exit(main())
