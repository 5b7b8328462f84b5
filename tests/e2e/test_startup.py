"""Starting: what is printed, and a clear end for each way in which files and settings can be wrong."""

import ctypes.util
import json
import re
import shutil
import struct
import subprocess
from pathlib import Path

import pytest

from conftest import GOLDENS, MODEL
from server import PATIENCE, binary, default_model


def refused(start, model: Path, *arguments: str) -> str:
    """Starts with the model, expects a quick end that is not 0 and no panic; returns what was printed."""
    server = start(*arguments, models={"m": model}, ready=False)
    try:
        status = server.process.wait(PATIENCE)
    except subprocess.TimeoutExpired:
        pytest.fail(f"the server runs with {model}:\n{server.log()}")
    log = server.log()
    assert status > 0, f"exit status {status}: {log}"
    assert "panicked" not in log and "RUST_BACKTRACE" not in log, log
    return log


@pytest.fixture
def folder(tmp_path) -> Path:
    """A copy of the tiny llama model that a test may damage."""
    copy = tmp_path / "damaged-model"
    shutil.copytree(GOLDENS / "llama", copy)
    (copy / "llama.gguf").unlink()
    return copy


def edit(path: Path, change) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


# GGUF


def gguf_bytes() -> bytearray:
    return bytearray((GOLDENS / "llama" / "llama.gguf").read_bytes())


def replaced(data: bytearray, old: bytes, new: bytes) -> bytearray:
    assert len(old) == len(new) and old in data
    return data.replace(old, new)


@pytest.mark.parametrize("size", [0, 3, 20, 100, 5_000, 20_000, 300_000, -1])
def test_a_truncated_gguf_file(start, tmp_path, size):
    path = tmp_path / "short.gguf"
    path.write_bytes(gguf_bytes()[:size])
    assert "short.gguf" in refused(start, path)


def test_a_truncated_default_model(start, tmp_path):
    path = tmp_path / "short.gguf"
    with default_model().open("rb") as file:
        path.write_bytes(file.read(60_000_000))
    assert "short.gguf" in refused(start, path)


def overwrite(at: int, data: bytes):
    def change(file: bytearray) -> bytearray:
        file[at : at + len(data)] = data
        return file

    return change


def tensor_dimension_of(name: bytes, value: int):
    """Overwrites the first dimension of a tensor: name, u32 dimensions, then u64 each."""

    def change(file: bytearray) -> bytearray:
        at = file.index(struct.pack("<Q", len(name)) + name) + 8 + len(name) + 4
        file[at : at + 8] = struct.pack("<Q", value)
        return file

    return change


def tensor_type_of(name: bytes, value: int, dimensions: int = 2):
    def change(file: bytearray) -> bytearray:
        at = file.index(struct.pack("<Q", len(name)) + name) + 8 + len(name) + 4 + 8 * dimensions
        file[at : at + 4] = struct.pack("<I", value)
        return file

    return change


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (overwrite(0, b"GGML"), "GGUF"),
        (overwrite(4, struct.pack("<I", 77)), "77"),
        (overwrite(4, struct.pack("<I", 1)), "version"),
        (overwrite(8, struct.pack("<Q", 2**60)), "tensor"),
        (overwrite(16, struct.pack("<Q", 2**60)), ""),
        (overwrite(24, struct.pack("<Q", 2**63)), ""),
        (lambda data: replaced(data, b"general.architecture\x08\0\0\0\x05\0\0\0\0\0\0\0llama", b"general.architecture\x08\0\0\0\x05\0\0\0\0\0\0\0lxama"), "lxama"),
        (lambda data: replaced(data, b"llama.embedding_length", b"llama.embedding_lengtx"), "embedding_length"),
        (lambda data: replaced(data, b"tokenizer.ggml.tokens", b"tokenizer.ggml.tokenx"), "tokenizer"),
        (lambda data: replaced(data, b"tokenizer.ggml.merges", b"tokenizer.ggml.mergex"), "merges"),
        (lambda data: replaced(data, b"blk.1.attn_q.weight", b"blk.1.attn_x.weight"), "attn_q"),
        (tensor_dimension_of(b"blk.0.attn_q.weight", 2**62), "attn_q"),
        (tensor_dimension_of(b"blk.0.attn_q.weight", 32), "attn_q"),
        (tensor_type_of(b"blk.0.attn_q.weight", 999), "attn_q"),
        (tensor_type_of(b"blk.0.attn_q.weight", 26), "attn_q"),
    ],
    ids=["magic", "version 77", "version 1", "tensor count", "metadata count", "key length", "unknown architecture", "no embedding length",
         "no tokens", "no merges", "missing tensor", "huge shape", "wrong shape", "unknown type", "integer type"],
)
def test_a_corrupt_gguf_file(start, tmp_path, change, says):
    path = tmp_path / "corrupt.gguf"
    path.write_bytes(change(gguf_bytes()))
    log = refused(start, path)
    assert "corrupt.gguf" in log
    assert says in log, log


# safetensors directories


def in_header(change):
    """Rewrites the JSON header of the first shard."""

    def apply(folder: Path) -> None:
        path = folder / "model-00001-of-00003.safetensors"
        data = path.read_bytes()
        length = struct.unpack("<Q", data[:8])[0]
        header = json.loads(data[8 : 8 + length])
        change(header)
        text = json.dumps(header).encode()
        path.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])

    return apply


def in_config(**values):
    return lambda folder: edit(folder / "config.json", lambda config: config.update(values))


def cut(name: str, size: int):
    def apply(folder: Path) -> None:
        path = folder / name
        path.write_bytes(path.read_bytes()[:size])

    return apply


def written(name: str, data: bytes):
    return lambda folder: (folder / name).write_bytes(data)


SHARD = "model-00001-of-00003.safetensors"
QUERY = "model.layers.0.self_attn.q_proj.weight"


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda folder: (folder / "tokenizer.json").unlink(), "tokenizer.json"),
        (written("tokenizer.json", b"{}"), "tokenizer.json"),
        (written("tokenizer.json", b"\xff\xfe"), "tokenizer.json"),
        (lambda folder: (folder / "config.json").unlink(), "config.json"),
        (written("config.json", b"{"), "config.json"),
        (in_config(model_type="mamba", architectures=["MambaForCausalLM"]), "Mamba"),
        (in_config(hidden_size=128), "shape"),
        (in_config(num_hidden_layers=4), "layers.3"),
        (in_config(num_attention_heads=0), "num_attention_heads"),
        (in_config(num_key_value_heads=3), "num_key_value_heads"),
        (in_config(hidden_size=2**40), "hidden_size"),
        (in_config(hidden_act="gelu"), "gelu"),
        (in_config(rope_scaling={"rope_type": "spiral", "factor": 2}), "spiral"),
        (lambda folder: (folder / "model-00002-of-00003.safetensors").unlink(), "model-00002-of-00003.safetensors"),
        (cut(SHARD, 5), SHARD),
        (cut(SHARD, 500), SHARD),
        (cut(SHARD, 100_000), SHARD),
        (written(SHARD, struct.pack("<Q", 2**62) + b"{}"), SHARD),
        (written(SHARD, struct.pack("<Q", 4) + b"\xff\xff\xff\xff"), SHARD),
        (in_header(lambda header: header[QUERY].update(dtype="I64", shape=[32, 64])), "q_proj"),
        (in_header(lambda header: header[QUERY].update(shape=[64, 32, 2])), "q_proj"),
        (in_header(lambda header: header[QUERY].update(shape=[2**40, 2**40])), "q_proj"),
        (in_header(lambda header: header[QUERY].update(data_offsets=[0, 2**50])), "q_proj"),
        (in_header(lambda header: header[QUERY].update(data_offsets=[100, 50])), "q_proj"),
        (in_header(lambda header: header.pop(QUERY)), "q_proj"),
        (written("model.safetensors.index.json", b"[]"), "index"),
        (lambda folder: edit(folder / "model.safetensors.index.json", lambda index: index["weight_map"].update({QUERY: "../../etc/passwd"})), ""),
        (lambda folder: edit(folder / "tokenizer_config.json", lambda config: config.update(chat_template="{% for m in messages %}")), "template"),
    ],
    ids=["no tokenizer", "empty tokenizer", "binary tokenizer", "no config", "broken config", "unknown architecture", "wrong hidden size",
         "too many layers", "no heads", "uneven heads", "huge hidden size", "unknown activation", "unknown rope", "missing shard", "cut length",
         "cut header", "cut data", "huge header", "binary header", "integer dtype", "three dimensions", "huge shape", "offsets beyond",
         "offsets reversed", "tensor missing", "broken index", "index leaves the folder", "broken template"],
)
def test_a_damaged_model_folder(start, folder, damage, says):
    damage(folder)
    log = refused(start, folder)
    assert says in log, log


def test_a_path_that_is_no_model(start, tmp_path):
    empty = tmp_path / "empty-folder"
    empty.mkdir()
    assert "empty-folder" in refused(start, empty)
    assert "not-there" in refused(start, tmp_path / "not-there.gguf")
    assert "passwd" in refused(start, Path("/etc/passwd"))


# Settings


def tidemill(*arguments: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run([binary(), *arguments], cwd=cwd, env={"PATH": "/usr/bin:/bin", **environment}, capture_output=True, text=True, timeout=PATIENCE)


def assert_fails(result: subprocess.CompletedProcess, *says: str) -> None:
    assert result.returncode > 0, result
    assert "panicked" not in result.stderr
    for text in says:
        assert text in result.stderr + result.stdout, result


def test_an_unknown_key_names_file_and_line(tmp_path):
    (tmp_path / "tidemill.toml").write_text("# settings\nport = 8081\nprot = 9\n")
    assert_fails(tidemill("serve", cwd=tmp_path), "tidemill.toml:3", "prot")


def test_a_bad_value_names_where_it_stood(tmp_path):
    (tmp_path / "tidemill.toml").write_text("kv_memory = \"lots\"\n")
    assert_fails(tidemill("serve", cwd=tmp_path), "tidemill.toml:1", "kv_memory")
    (tmp_path / "tidemill.toml").unlink()
    assert_fails(tidemill("serve", cwd=tmp_path, TIDEMILL_PORT="seventy"), "TIDEMILL_PORT", "seventy")
    assert_fails(tidemill("serve", "--max-seqs", "0", cwd=tmp_path), "max-seqs")
    assert_fails(tidemill("serve", "--no-such-flag", cwd=tmp_path), "no-such-flag")


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({}, ["`loop.a.base`", "`none` is no model that is served here; name one of m"]),
        ({"base": '"m"', "text": '"nowhere.txt"'}, ["`loop.a.evaluate.text`", "nowhere.txt", "name a file of ordinary text"]),
        ({"base": '"m"', "metric": "judge.helpful"}, ["`loop.a.rollout.metrics`", "nothing records", '[metrics."judge.helpful"]']),
    ],
)
def test_what_a_loop_names_must_be_there_before_anybody_waits_for_it(start, tmp_path, change, says):
    fields = {"base": '"none"', "text": json.dumps(__file__), "metric": "feedback.thumb"} | change
    config = tmp_path / "loops.toml"
    config.write_text(
        f"""[loop.a]
model = "m"
base = {fields["base"]}
when = {{ preferences = 1 }}
evaluate = {{ text = {fields["text"]} }}
rollout = {{ kind = "ab", metrics = [{{ metric = "{fields["metric"]}", goal = {{ min = 0 }} }}] }}
"""
    )
    log = refused(start, GOLDENS / "llama", "--config", str(config))
    assert all(part in log for part in says), log


def test_a_device_that_is_no_device(tmp_path):
    assert_fails(tidemill("serve", "--device", "gpu", cwd=tmp_path), "--device", "cuda:N")


@pytest.mark.skipif(ctypes.util.find_library("cuda") is not None, reason="this machine has a driver")
@pytest.mark.parametrize("command", ["serve", "bench"])
def test_a_card_without_a_driver(tmp_path, command):
    arguments = [command, "--device", "cuda", "--model", str(GOLDENS / "llama"), "--data", str(tmp_path / "data")]
    port = ["--port", "0"] if command == "serve" else []
    assert_fails(tidemill(*arguments, *port, cwd=tmp_path), "no NVIDIA driver found", "libcuda.so.1", "--device cpu")


def test_numbers_of_cards_that_make_no_sense(tmp_path):
    model = ["--model", str(GOLDENS / "llama"), "--data", str(tmp_path / "data")]

    def refused(*arguments, words):
        assert_fails(tidemill("serve", *arguments, *model, "--port", "0", cwd=tmp_path), "--tensor-parallel", *words)

    # The model's 4 heads.
    refused("--device", "cuda", "--tensor-parallel", "3", words=["cannot be 3", "1, 2, 4"])
    refused("--device", "cuda:0,1", "--tensor-parallel", "4", words=["must be 2, not 4"])
    refused("--tensor-parallel", "2", words=["must be 1 with --device cpu"])
    assert_fails(tidemill("serve", "--device", "cuda:1,1", *model, cwd=tmp_path), "--device", "card 1 twice")


def test_without_a_model_the_next_step_is_named(tmp_path):
    assert_fails(tidemill("serve", "--data", str(tmp_path / "data"), cwd=tmp_path), "tidemill pull")


def test_a_port_in_use_is_named(server, tmp_path):
    result = tidemill("serve", "--model", str(GOLDENS / "llama"), "--port", str(server.port), "--data", str(tmp_path / "data"), cwd=tmp_path)
    assert_fails(result, str(server.port))


def test_two_models_of_one_name(tmp_path):
    path = str(GOLDENS / "llama")
    assert_fails(tidemill("serve", "--model", path, "--model", path, "--data", str(tmp_path / "data"), cwd=tmp_path), "llama")


def test_help_and_version(tmp_path):
    for arguments in [["--help"], ["serve", "--help"], ["pull", "--help"], ["chat", "--help"], ["bench", "--help"]]:
        result = tidemill(*arguments, cwd=tmp_path)
        assert result.returncode == 0 and "Usage" in result.stdout, (arguments, result)
    assert re.search(r"\d+\.\d+\.\d+", tidemill("--version", cwd=tmp_path).stdout)


# What a good start looks like


def test_start_up_prints_what_was_loaded_and_a_curl_line_that_works(start):
    server = start()
    log = server.log()
    assert MODEL in log
    assert re.search(r"\d+(\.\d+)? ?[MG]i?B", log), log
    # The line may be continued with backslashes.
    command = re.search(r"curl (?:[^\n]*\\\n)*[^\n]*", log)
    assert command, log
    result = subprocess.run(["bash", "-c", command[0]], capture_output=True, text=True, timeout=240)
    assert result.returncode == 0, (command[0], result.stderr)
    assert '"choices"' in result.stdout, result.stdout


def test_settings_come_from_the_file_too(start, tmp_path):
    config = tmp_path / "tidemill.toml"
    config.write_text('max_model_len = 1024\n')
    server = start("--config", str(config))
    with server.client() as client:
        assert client.models.retrieve(MODEL).max_model_len == 1024
