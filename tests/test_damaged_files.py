"""Whatever is in a file, its reader returns or raises its own error: changed at random, or made to hurt."""

import json
import os
import random
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from pointalign import feature_cache, options, run_checkpoints, stage_file, storage
from pointalign.convert.files import ConversionError, Source

CASES = int(os.environ.get("POINTALIGN_FUZZ_CASES", 100))


def mutations(data: bytes, count: int = CASES, seed: int = 0):
    """Bytes flipped, overwritten, cut out or repeated, at one place or several."""
    draw = random.Random(seed)
    for _ in range(count):
        changed = bytearray(data)
        for _ in range(draw.choice((1, 1, 1, 4))):
            if not changed:
                break
            at, length = draw.randrange(len(changed)), draw.choice((1, 1, 2, 8, 64))
            kind = draw.randrange(5)
            if kind == 0:
                changed[at] ^= 1 << draw.randrange(8)
            elif kind == 1:
                changed[at : at + length] = draw.randbytes(length)
            elif kind == 2:
                del changed[at : at + length]
            elif kind == 3:
                changed[at:at] = changed[at : at + length]
            else:
                del changed[at + 1 :]
        yield bytes(changed)


def test_stage_files(tmp_path):
    path = tmp_path / "stage.safetensors"
    settings = {"adapters": {"language_model": {"lora_alpha": 8}}, "query_routing": "sparse", "query_top_k": 2}
    save_file({"a": torch.zeros(2, 3), "b": torch.ones(2)}, path, metadata={"model": json.dumps(settings)})
    assert stage_file.adapted_parts(path) == {"language_model"}
    for data in mutations(path.read_bytes()):
        path.write_bytes(data)
        try:
            stage_file.adapted_parts(path)
            storage.load_tensors(path)
        except ValueError as error:
            assert path.name in str(error)


HEADERS = [
    "[]",
    "x",
    "[" * 100_000,
    '{"adapters": [1]}',
    '{"adapters": {"qformer": {}}}',
    '{"adapters": {"qformer": {"lora_alpha": "8"}}}',
    '{"query_routing": "other"}',
]


@pytest.mark.parametrize("header", HEADERS, ids=range(len(HEADERS)))
def test_a_header_that_no_stage_has_is_refused(header, tmp_path):
    save_file({"a": torch.zeros(1)}, tmp_path / "s.safetensors", metadata={"model": header})
    with pytest.raises(ValueError, match=r"s\.safetensors: the settings in its header are damaged"):
        stage_file.adapted_parts(tmp_path / "s.safetensors")


@pytest.mark.parametrize("text", ["[]", "{", '{"model": 5}', '{"model": {"lora_rank": "x"}}', '{"model": {"llm": 5}}'])
def test_a_description_that_no_stage_has_is_refused(text, tmp_path):
    (tmp_path / "s.json").write_text(text)
    with pytest.raises(ValueError, match=r"s\.json"):
        stage_file.trained_options(tmp_path / "s.safetensors")


@pytest.mark.parametrize("zipped", [True, False])
def test_published_weights(zipped, tmp_path):
    path = tmp_path / "x.pth"
    torch.save({"model": {"query_tokens": torch.zeros(2, 3), "step": 5}}, path, _use_new_zipfile_serialization=zipped)
    assert list(Source("checkpoint", path).shapes) == ["query_tokens"]
    for number, data in enumerate(mutations(path.read_bytes())):
        changed = tmp_path / f"{number}.pth"  # read files are remembered by name
        changed.write_bytes(data)
        try:
            source = Source("checkpoint", changed)
            for name in source.shapes:
                source.read(name)
        except ConversionError as error:
            assert changed.name in str(error)
        changed.unlink()


def test_published_weights_that_name_more_than_they_hold_are_refused(tmp_path):
    torch.save({"model": {"query_tokens": torch.zeros(1).expand(1 << 40)}}, tmp_path / "expanded.pth")
    with pytest.raises(ConversionError, match=r"expanded\.pth: refused, 'query_tokens'"):
        Source("checkpoint", tmp_path / "expanded.pth")
    plain, bomb = tmp_path / "plain.pth", tmp_path / "bomb.pth"
    torch.save({"model": {"query_tokens": torch.zeros(1 << 20)}}, plain)
    with zipfile.ZipFile(plain) as source, zipfile.ZipFile(bomb, "w", zipfile.ZIP_DEFLATED) as target:
        for entry in source.infolist():
            target.writestr(entry.filename, source.read(entry))
    assert bomb.stat().st_size < plain.stat().st_size / 100
    with pytest.raises(ConversionError, match=r"bomb\.pth: refused, its entries are compressed"):
        Source("checkpoint", bomb)


def test_feature_caches(tmp_path):
    names = [f"o{place}" for place in range(6)]
    made = tmp_path / "made"

    def encode(ids):
        return {"queries": np.random.default_rng(0).random((len(ids), 4, 16), dtype=np.float32)}

    feature_cache.write(made, names, encode, "fp", shard_size=4)
    expected = feature_cache.FeatureCache(made, "fp").batch(names)["query_features"]
    for path in sorted(made.iterdir()):
        for data in mutations(path.read_bytes(), CASES // 4, seed=len(path.name)):
            folder = tmp_path / "spoiled"
            shutil.copytree(made, folder, dirs_exist_ok=True)
            (folder / path.name).write_bytes(data)
            try:
                batch = feature_cache.FeatureCache(folder, "fp").batch(names)
            except ValueError as error:
                assert "spoiled" in str(error)
            else:  # spaces in JSON, say
                assert torch.equal(batch["query_features"], expected)


def test_checkpoint_folders(tmp_path):
    folder = tmp_path / "checkpoint-1"
    parameter = torch.nn.Parameter(torch.zeros(3))
    optimizer = torch.optim.AdamW([parameter])
    scheduler = torch.optim.lr_scheduler.ConstantLR(optimizer)
    run_checkpoints.save_optimizer(tmp_path / "new", optimizer, scheduler)
    run_checkpoints.save_random(tmp_path / "new" / "random_0")
    run_checkpoints.publish(tmp_path / "new", folder, {"model": {"lora_alpha": 1}})
    for path in sorted(folder.iterdir()):
        written = path.read_bytes()
        for data in mutations(written, CASES // 4, seed=len(path.name)):
            path.write_bytes(data)
            try:
                run_checkpoints.verify(folder)
            except run_checkpoints.CheckpointError as error:
                assert path.name in str(error) or path.name == run_checkpoints.MANIFEST
            else:
                assert path.name == run_checkpoints.MANIFEST or data == written
            for read in (
                lambda: run_checkpoints.load_optimizer(folder, optimizer, scheduler),
                lambda: run_checkpoints.load_random(folder / "random_0"),
            ):
                try:
                    read()  # verified before in a run; still without other errors
                except run_checkpoints.CheckpointError as error:
                    assert path.name in str(error)
        path.write_bytes(written)


def test_recipes(tmp_path, capsys):
    path = tmp_path / "recipe.yaml"
    text = (options.RECIPES / "align.yaml").read_bytes()
    for data in mutations(text, max(20, CASES // 50)):
        path.write_bytes(data)
        try:
            options.parse([str(path), "--training.use_cpu", "true"])
        except SystemExit as stop:
            assert stop.code == 2
    capsys.readouterr()


LAUGHS = ["data:", "  types:", "    - &a [x,x,x,x,x,x,x,x,x]"]
LAUGHS += [f"    - &{chr(98 + n)} [{','.join(['*' + chr(97 + n)] * 9)}]" for n in range(8)]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("\n".join(LAUGHS).encode(), "aliases such as"),
        (b"model: {llm: caf\xe9}\n", "expected text in UTF-8"),
        (b"model: " + b"[" * 50_000, "nested deeper"),
        (b"# long\n" * 200_000, "at most"),
        (b"- 1\n", "expected sections and names"),
        (b"model: {1: 2}\n", "expected names of options, got 1"),
    ],
)
def test_a_recipe_made_to_hurt_is_refused(content, message, tmp_path, capsys):
    path = tmp_path / "recipe.yaml"
    path.write_bytes(content)
    with pytest.raises(SystemExit):
        options.parse([str(path)])
    assert message in capsys.readouterr().err


def test_a_language_model_folder_brings_no_code(tmp_path, tokenizer):
    """A folder whose config names its own classes: even `y` on standard input does not run them."""
    folder, ran = tmp_path / "llm", tmp_path / "ran"
    tokenizer.save_pretrained(folder)
    classes = {
        "AutoConfig": "own.Config",
        "AutoModelForCausalLM": "own.Model",
        "AutoTokenizer": ["own.Words", None],
    }
    (folder / "config.json").write_text(json.dumps({"model_type": "own", "auto_map": classes}))
    (folder / "own.py").write_text(f"open({str(ran)!r}, 'w')\n")
    code = (
        "from pointalign.build import build_model\nfrom pointalign.options import DataOptions, ModelOptions\n"
        f"build_model(ModelOptions(llm={str(folder)!r}), DataOptions())"
    )
    path = os.pathsep.join([*sys.path, str(Path(__file__).parents[1])])
    environment = os.environ | {"HF_MODULES_CACHE": str(tmp_path / "modules"), "PYTHONPATH": path}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, input="y\n" * 9, text=True, capture_output=True, env=environment)
    assert done.returncode != 0 and "trust_remote_code" in done.stderr
    assert not ran.exists()
