"""Blocks of README and docs that are marked `<!-- run -->` run: here with a tiny model, in the long tests as written.

A marked block is Python, or lines `pointalign COMMAND ...`. The blocks of a document run in their order in one folder,
and its Python blocks share their variables. `<!-- run: LLaVA -->` gives a block a tiny `model` and a `batch`.
"""

import contextlib
import io
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from conftest import tiny_text_config
from made_multimodal import make
from test_train import TINY
from transformers import AutoModelForCausalLM

from pointalign import __main__ as door
from pointalign import assets, build
from pointalign.models import configuration

ROOT = Path(__file__).parents[1]
MARK = re.compile(r"^<!-- run\b", re.MULTILINE)
MARKED = re.compile(r"^<!-- run(?:: (\w+))? -->\n```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
OWN_DATA = "docs/own_data.md"
SMALL = {  # what a command gets beside what is written, with a tiny model
    "train": "--model.llm llm --model.checkpoint start.safetensors --training.use_cpu true --training.max_steps 2 "
    "--training.report_to none --training.save_strategy no",
    "chat": "--max_new_tokens 2",
    "evaluate": "--sentence_models none --generation.max_new_tokens 2",
}


class Block(NamedTuple):
    """A marked block: the name behind `run:`, its language and its text."""

    given: str
    language: str
    text: str

    def commands(self) -> list[list[str]]:
        """The lines of a block of commands, as arguments of `pointalign`."""
        lines = [shlex.split(line, comments=True) for line in self.text.replace("\\\n", " ").splitlines()]
        assert all(line[:1] == ["pointalign"] for line in lines if line), f"only `pointalign ...` runs: {self.text}"
        return [line[1:] for line in lines if line]


def marked(document: str) -> list[Block]:
    return [Block(*groups) for groups in MARKED.findall((ROOT / document).read_text(encoding="utf-8"))]


DOCUMENTS = [
    path.relative_to(ROOT).as_posix()
    for pattern in ("*.md", "docs/*.md", "examples/**/*.md")
    for path in sorted(ROOT.glob(pattern))
    if MARK.search(path.read_text(encoding="utf-8"))
]


@pytest.fixture
def small(tmp_path, tokenizer, monkeypatch):
    """A folder with the examples, a tiny language model, a stage to start from and, where none is named, its model."""
    from pointalign.model_options import DataOptions, ModelOptions
    from pointalign.stage_file import save_stage

    monkeypatch.setitem(configuration.PRESETS, "mini", TINY)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(tiny_text_config("llama")).save_pretrained("llm")
    tokenizer.save_pretrained("llm")
    model, processor = build.build_model(
        ModelOptions(llm="llm", lora_rank=8, lora_alpha=16, train=[]), DataOptions(num_points=256)
    )
    save_stage(model, Path("start.safetensors"), {})
    build.export(model, processor, tmp_path / "model")
    monkeypatch.setattr(build, "default_model", lambda: str(tmp_path / "model"))
    return tmp_path


def test_every_mark_stands_before_a_block_that_can_run():
    assert {"README.md", "docs/quick_start.md", OWN_DATA, "docs/alignment.md", "docs/attach.md"} <= set(DOCUMENTS)
    for document in DOCUMENTS:
        blocks = marked(document)
        assert len(blocks) == len(MARK.findall((ROOT / document).read_text(encoding="utf-8"))), document
        for block in blocks:
            assert block.language in ("", "python") and (block.language or block.commands()), document


@pytest.mark.parametrize("document", DOCUMENTS)
def test_the_marked_blocks_of_a_document_run(document, small, capsys):
    variables: dict = {"__name__": "__main__"}
    for block in marked(document):
        if block.language == "python":
            if block.given:
                model, batch, _ = make(block.given)
                variables |= {"model": model, "batch": batch}
            exec(compile(block.text, document, "exec"), variables)
            continue
        for command in block.commands():
            assert door.main([*command, *SMALL.get(command[0], "").split()]) == 0, capsys.readouterr().err
    if document == OWN_DATA:
        names = sorted(path.stem for path in Path("my_clouds").glob("*.ply"))
        assert len(names) == 10 and "red_ball" in names
        assert Path("runs/finetune/model/config.json").exists() and Path("runs/evaluation/answers.json").exists()
        printed = capsys.readouterr().out
        assert "red_ball.ply: 3000 points" in printed and "10 questions about 10 objects" in printed


@pytest.mark.skipif(
    not os.environ.get("POINTALIGN_LONG_TESTS"), reason="minutes of training: run it by `make test-long`"
)
@pytest.mark.parametrize("document", [name for name in DOCUMENTS if any(not b.language for b in marked(name))])
def test_marked_blocks_run_as_written_with_the_shipped_model(document, tmp_path):
    """In processes of their own, as a reader runs them; after the page about own objects, their names are known."""
    if not (assets.home() / "llm" / "smollm2-135m-instruct").is_dir():
        pytest.skip(f"no embedded model in {assets.home()}: run `pointalign assets`")
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    (tmp_path / "my_clouds").mkdir()
    paths = [str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths)}

    def run(*arguments: str) -> str:
        done = subprocess.run(
            [sys.executable, *arguments], cwd=tmp_path, env=environment, capture_output=True, text=True
        )
        assert done.returncode == 0, f"{arguments}\n{done.stdout[-2000:]}\n{done.stderr[-3000:]}"
        return done.stdout

    for block in marked(document):
        if block.language == "python" and not block.given:
            run("-c", block.text)
        elif not block.language:
            for command in block.commands():
                run("-m", "pointalign", *command)
    if document == OWN_DATA:
        right = 0
        for path in sorted((tmp_path / "my_clouds").glob("*.ply")):
            chat = ("chat", str(path), "--model", "runs/finetune/model", "--question", "What is this?")
            right += path.stem.replace("_", " ") in run("-m", "pointalign", *chat).lower()
        assert right >= 9, f"{right} of 10"


def test_what_the_examples_of_the_readme_compute(small):
    variables: dict = {}
    asked, attached = [block for block in marked("README.md") if block.language == "python"]
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        exec(asked.text, variables)
    assert printed.getvalue().strip()
    assert variables["inputs"]["point_mask"].sum() == variables["processor"].num_query_tokens
    model, batch, _ = make(attached.given)
    variables = {"model": model, "batch": batch}
    exec(attached.text, variables)
    losses = variables["handle"].losses
    assert variables["loss"] == losses["token_loss"] + 0.1 * losses["alignment_loss"]
    assert all(parameter.grad.abs().sum() > 0 for parameter in variables["handle"].parameters())
