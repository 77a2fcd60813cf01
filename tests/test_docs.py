"""README and docs name what exists: links, paths, modules, options, messages, make targets."""

import ast
import contextlib
import importlib
import importlib.util
import io
import re
import shlex
from pathlib import Path

import pytest

from pointalign.__main__ import COMMANDS

ROOT = Path(__file__).parents[1]
DOCUMENTS = sorted(
    path.relative_to(ROOT).as_posix()
    for pattern in ("README.md", "CONTRIBUTING.md", "docs/*.md", "examples/**/*.md")
    for path in ROOT.glob(pattern)
)
ROOMS = ("pointalign", "kernels", "csrc", "benchmarks", "experiments", "tests", "docs", "examples")
COMMAND = re.compile(r"(?:^|torchrun .*?)(?:python )?-m ((?:pointalign|experiments)[\w.]*)\b(.*)")
DOOR = re.compile(r"^pointalign ([a-z]+)\b(.*)")


def read(document: str) -> str:
    return (ROOT / document).read_text()


def blocks(document: str, language: str) -> list[str]:
    """Fenced blocks of a language, "" for those without one; a block inside a list may be indented."""
    fenced = re.findall(r"^( *)```(\w*)\n(.*?)^ *```$", read(document), re.DOTALL | re.MULTILINE)
    return [text for _, name, text in fenced if name == language]


def command_lines() -> list[tuple[str, str, list[str]]]:
    """(document, module, arguments) of every `python -m` line in blocks and in backticks."""
    lines = []
    for document in DOCUMENTS:
        code = [line for block in blocks(document, "") for line in block.replace("\\\n", " ").splitlines()]
        code += re.findall(r"`((?:python -m|pointalign) [^`]+)`", read(document).replace("\n", " "))
        for line in code:
            if match := DOOR.search(line.strip()):
                assert match[1] in COMMANDS, f"{document}: {line}"
                lines.append((document, f"pointalign.{match[1]}", shlex.split(match[2], comments=True)))
            elif match := COMMAND.search(line.strip()):
                lines.append((document, match[1], shlex.split(match[2], comments=True)))
    return lines


def help_text(module: str, arguments: list[str]) -> str:
    """What a command prints for --help, under the subcommand that the arguments name."""
    program = importlib.import_module(f"{module}.__main__" if _is_package(module) else module)
    subcommand = arguments[:1] if arguments[:1] and arguments[0] in getattr(program, "COMMANDS", ()) else []
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), pytest.raises(SystemExit) as stopped:
        program.main([*subcommand, "--help"])
    assert stopped.value.code in (0, None)
    return printed.getvalue()


def _is_package(module: str) -> bool:
    spec = importlib.util.find_spec(module)
    assert spec is not None, f"no module {module}"
    return spec.submodule_search_locations is not None


@pytest.mark.parametrize("document", DOCUMENTS)
def test_links_lead_somewhere(document):
    for target in re.findall(r"\]\(([^)]+)\)", read(document)):
        if not target.startswith(("http", "#")):
            assert ((ROOT / document).parent / target.partition("#")[0]).exists(), f"{document}: {target}"


@pytest.mark.parametrize("document", DOCUMENTS)
def test_named_paths_exist(document):
    text = re.sub(r"<!-- \w+:begin -->.*?<!-- \w+:end -->", "", read(document), flags=re.DOTALL)
    words = re.findall(rf"(?<![\w./-])(?:{'|'.join(ROOMS)})/[\w./*-]*", text)
    for word in {word.rstrip(".") for word in words}:
        assert list(ROOT.glob(word)), f"{document} names {word}, which does not exist"


@pytest.mark.parametrize("document", DOCUMENTS)
def test_make_targets_exist(document):
    targets = set(re.findall(r"^([\w-]+):", read("Makefile"), re.MULTILINE))
    code = "\n".join(blocks(document, "")) + "\n".join(re.findall(r"`[^`]+`", read(document)))
    assert set(re.findall(r"(?:^|`|&& )make ([\w-]+)", code, re.MULTILINE)) <= targets


def test_command_lines_are_found():
    modules = {module for _, module, _ in command_lines()}
    assert {"pointalign.train", "pointalign.chat", "pointalign.convert", "experiments.ablation"} <= modules


@pytest.mark.parametrize(
    ("document", "module", "arguments"),
    [pytest.param(*line, id=f"{line[0]}:{line[1]}:{number}") for number, line in enumerate(command_lines())],
)
def test_command_lines_parse(document, module, arguments, tmp_path):
    if module in ("pointalign.train", "pointalign.features"):
        from pointalign.options import parse

        if "--help" in arguments or (not arguments and module != "pointalign.train"):
            return
        if arguments and arguments[0].endswith(".yaml"):  # a recipe of the reader's own
            (tmp_path / arguments[0]).write_text("training: {max_steps: 1}\n")
            arguments = [str(tmp_path / arguments[0]), *arguments[1:]]
        parse(arguments)
        return
    if not [argument for argument in arguments if argument.startswith("-")]:
        _is_package(module)  # the module exists
        return
    printed = help_text(module, arguments)
    for option in [argument.partition("=")[0] for argument in arguments if argument.startswith("--")]:
        assert re.search(rf"{re.escape(option)}\b", printed), f"{document}: {module} has no {option}"


@pytest.mark.parametrize("document", DOCUMENTS)
def test_imports_of_examples_exist(document):
    for block in blocks(document, "python"):
        for module, names in re.findall(r"^from ([\w.]+) import (.+)$", block, re.MULTILINE):
            for name in names.split(", "):
                assert hasattr(importlib.import_module(module), name), f"{document}: {module} has no {name}"


def test_the_readme_is_short():
    assert len(read("README.md").splitlines()) <= 200


def test_the_results_are_told_on_two_pages():
    """Full tables belong on the detail pages."""
    lines = [line for line in read("docs/results.md").splitlines() if line and not line.startswith("<!--")]
    assert len(lines) <= 150 and len(" ".join(lines).split()) <= 2500


def test_the_options_page_is_that_of_the_dataclasses():
    specification = importlib.util.spec_from_file_location("generate_options", ROOT / "docs" / "generate_options.py")
    assert specification is not None and specification.loader is not None
    generator = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(generator)
    assert read("docs/options.md") == generator.page(), "run `python docs/generate_options.py`"


def texts_of_the_sources() -> str:
    """Every string in the sources without backticks, with `...` in the place of what is filled in."""
    texts = []
    for path in [ROOT / "setup.py", *(ROOT / "pointalign").rglob("*.py"), *(ROOT / "kernels").rglob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.JoinedStr):
                texts.append("".join(v.value if isinstance(v, ast.Constant) else "..." for v in node.values))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                texts.append(node.value)
    return "\n".join(texts).replace("`", "")


def test_the_messages_in_troubleshooting_are_those_of_the_sources():
    sources = texts_of_the_sources()
    rows = re.findall(r"^\| (.*?) \|", read("docs/troubleshooting.md"), re.MULTILINE)
    messages = [message for row in rows for message in re.findall(r"`([^`]*[a-z] [^`]*)`", row)]
    assert len(messages) > 30
    foreign = {"contains custom code", "refusing multiply-linked file"}  # messages of transformers and nltk
    missing = {
        message
        for message in set(messages) - foreign
        if not all(part.strip() in sources for part in message.split("..."))
    }
    assert not missing


def test_the_pages_are_in_the_navigation_once():
    """Without mkdocs: `make docs` checks links and builds the site."""
    named = re.findall(r"([\w]+\.md)$", read("mkdocs.yml"), re.MULTILINE)
    assert sorted(named) == sorted(path.name for path in (ROOT / "docs").glob("*.md"))
