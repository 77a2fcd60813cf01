"""Whatever is in a file, its reader returns or raises its own error: changed at random, or made to hurt."""

import io
import json
import os
import sys
import zipfile
from contextlib import suppress

import pytest
import torch
from fuzz_readers import CACHED, CORPUS, READERS, Reader, executions, mutations, undocumented
from safetensors.torch import save_file
from transformers import dynamic_module_utils

from pointalign import feature_cache, options, run_checkpoints, stage_file
from pointalign.build import build_model
from pointalign.convert.files import ConversionError, Source

CASES = int(os.environ.get("POINTALIGN_FUZZ_CASES", 100))


@pytest.mark.parametrize("name", READERS)
def test_a_reader_raises_its_documented_error(name, tmp_path):
    done, wrong = executions(READERS[name], tmp_path, CASES)
    assert done and not wrong, [(str(file), data, error) for file, data, error in wrong[:3]]


@pytest.mark.parametrize("stored", sorted(CORPUS.glob("*/*")), ids=lambda path: f"{path.parent.name}/{path.name}")
def test_what_once_raised_another_error_raises_the_documented_one(stored, tmp_path):
    reader, name = READERS[stored.parent.name], stored.name.partition("-")[2]
    folder = tmp_path / "valid"
    folder.mkdir()
    file = next(file for file in reader.write(folder) if file.name == name)
    file.write_bytes(stored.read_bytes())
    assert undocumented(reader, folder, file) is None


def test_an_error_that_is_not_documented_is_seen(tmp_path):
    def read(folder, file):
        if file.read_bytes() != b"valid":
            raise KeyError

    def write(folder):
        (folder / "a").write_bytes(b"valid")
        return [folder / "a"]

    done, wrong = executions(Reader(write, read), tmp_path, 10)
    assert done == len(wrong) == 10 and all(isinstance(error, KeyError) for _, _, error in wrong)


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


def test_a_changed_cache_gives_the_same_features_or_an_error(tmp_path):
    reader = READERS["feature caches"]
    folder = tmp_path / "cache"
    folder.mkdir()
    files = reader.write(folder)
    expected = feature_cache.FeatureCache(folder, "fp").batch(CACHED)["query_features"]
    for path in files:
        written = path.read_bytes()
        for data in mutations(written, CASES // 4, seed=1):
            path.write_bytes(data)
            with suppress(ValueError):  # spaces in JSON, say, change nothing
                assert torch.equal(feature_cache.FeatureCache(folder, "fp").batch(CACHED)["query_features"], expected)
        path.write_bytes(written)


def test_a_changed_checkpoint_is_not_verified(tmp_path):
    folder = tmp_path / "checkpoint-1"
    for path in READERS["checkpoints"].write(folder):
        written = path.read_bytes()
        for data in mutations(written, CASES // 4, seed=1):
            path.write_bytes(data)
            if path.name != run_checkpoints.MANIFEST and data != written:
                with pytest.raises(run_checkpoints.CheckpointError, match=path.name):
                    run_checkpoints.verify(folder)
        path.write_bytes(written)


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


def test_a_language_model_folder_brings_no_code(tmp_path, tokenizer, monkeypatch):
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
    monkeypatch.setattr(sys, "stdin", io.StringIO("y\n" * 9))
    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    with pytest.raises(ValueError, match="trust_remote_code"):
        build_model(options.ModelOptions(llm=str(folder)), options.DataOptions())
    assert not ran.exists()
