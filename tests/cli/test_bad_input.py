"""What goes wrong is one line that says what to do, an exit code, and nothing half-written."""

from __future__ import annotations

import json
import os
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from qeff_proxy.cli import main

pytestmark = pytest.mark.one_home


@pytest.fixture
def checkpoint(saved_gpt2: Path, tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    folder = tmp_path / "checkpoint"
    shutil.copytree(saved_gpt2, folder)
    return folder


def fails(capsys: Any, *arguments: str, code: int) -> str:
    """Run the command; give its one line on stderr."""
    assert main(arguments) == code
    out, err = capsys.readouterr()
    if "--json" in arguments:
        assert json.loads(out)["error"]["exit_code"] == code
    else:
        assert out == ""
    assert err.startswith("qeff-proxy: error: ")
    assert err.count("\n") == 1
    assert "Traceback" not in err
    return err.removeprefix("qeff-proxy: error: ").strip()


def edit_config(**changes: Any) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        path = folder / "config.json"
        value = json.loads(path.read_text())
        value.update(changes)
        path.write_text(json.dumps({k: v for k, v in value.items() if v is not None}))

    return edit


def truncate(folder: Path) -> None:
    path = folder / "model.safetensors"
    os.truncate(path, path.stat().st_size - 1000)


def scramble_header(folder: Path) -> None:
    with (folder / "model.safetensors").open("r+b") as file:
        file.seek(8)
        file.write(b"\xff\xfe{{{")


def huge_header(folder: Path) -> None:
    with (folder / "model.safetensors").open("r+b") as file:
        file.write(struct.pack("<Q", 2**60))


def drop_a_tensor(folder: Path) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    del tensors["transformer.h.1.mlp.c_fc.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def change_a_shape(folder: Path) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    tensors["transformer.h.1.ln_1.weight"] = tensors["transformer.h.1.ln_1.weight"][:7].clone()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def add_a_tensor(name: str) -> Callable[[Path], None]:
    def add(folder: Path) -> None:
        import torch
        from safetensors.torch import load_file, save_file

        tensors = load_file(folder / "model.safetensors")
        tensors[name] = torch.ones(64)
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})

    return add


def integers_for_floats(folder: Path) -> None:
    """A header that says other things of the same bytes."""
    path = folder / "model.safetensors"
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    header["transformer.h.1.mlp.c_fc.weight"]["dtype"] = "I32"
    text = json.dumps(header, separators=(",", ":")).encode().ljust(length)
    path.write_bytes(data[:8] + text + data[8 + length :])


def only_pickles(folder: Path) -> None:
    import torch
    from safetensors.torch import load_file

    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def missing_shard(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    index = {
        "weight_map": {
            "transformer.wpe.weight": "model-00001-of-00002.safetensors",
            "transformer.wte.weight": "model-00002-of-00002.safetensors",
        }
    }
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def lying_index(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "model-00001-of-00001.safetensors")
    index = {"weight_map": {"no.such.weight": "model-00001-of-00001.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def escaping_index(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    index = {"weight_map": {"transformer.wte.weight": "../../secret.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


@pytest.mark.parametrize(
    ("damage", "code", "words"),
    [
        (lambda f: (f / "config.json").unlink(), 3, "has no config.json"),
        (lambda f: (f / "config.json").write_text("{"), 3, "is no JSON"),
        (lambda f: (f / "config.json").write_text("[1]"), 3, "is no JSON object"),
        (lambda f: (f / "config.json").write_text("[" * 100_000), 3, "config.json is no JSON"),
        (edit_config(n_layer=10**9), 3, "n_layer 1000000000, and the weights are of 2 layers"),
        (edit_config(n_layer=2**40), 3, "n_layer 1099511627776. It must be from 1 to"),
        (edit_config(n_head=-1), 3, "n_head -1. It must be from 1"),
        (edit_config(vocab_size=0), 3, "vocab_size 0. It must be from 1"),
        (edit_config(n_embd="x"), 3, "config.json cannot be used: StrictDataclassFieldValidat"),
        (edit_config(n_embd="x"), 3, "Field 'n_embd' expected int, got str"),
        (edit_config(activation_function="nope"), 3, "says activation_function 'nope'"),
        (edit_config(model_type="llama"), 3, "model_type 'llama' and architecture GPT2LMHeadMo"),
        (edit_config(architectures="GPT2LMHeadModel"), 3, "It must be a list of names"),
        (edit_config(model_type="gpt22"), 4, "nearest is 'gpt2'. A plugin package"),
        (edit_config(model_type=None), 4, "model type None"),
        (
            edit_config(model_type="own", auto_map={"AutoModelForCausalLM": "m.C"}),
            3,
            "--trust-remote-code",
        ),
        (truncate, 3, "is damaged: truncated"),
        (scramble_header, 3, "model.safetensors is damaged"),
        (huge_header, 3, "truncated, or no safetensors file"),
        (lambda f: (f / "model.safetensors").write_bytes(b""), 3, "too short"),
        (lambda f: (f / "model.safetensors").unlink(), 3, "has no weights"),
        (only_pickles, 3, "pass --allow-pickle if you trust the source"),
        (missing_shard, 3, "model-00002-of-00002.safetensors is missing"),
        (lying_index, 3, "says that no.such.weight is in"),
        (escaping_index, 3, "is not a file name"),
        (drop_a_tensor, 3, "transformer.h.1.mlp.c_fc.weight"),
        (change_a_shape, 3, "model.safetensors has shape"),
        (change_a_shape, 3, "transformer.h.1.ln_1.weight"),
        (integers_for_floats, 3, "transformer.h.1.mlp.c_fc.weight in "),
        (add_a_tensor("transformer.h.1.ln_1.scale"), 3, "does not use"),
        (edit_config(n_layer=1), 3, "transformer.h.1."),
    ],
)
def test_a_bad_checkpoint(
    damage: Callable[[Path], None],
    code: int,
    words: str,
    checkpoint: Path,
    home: Path,
    capsys: Any,
) -> None:
    damage(checkpoint)
    assert words in fails(capsys, "export", str(checkpoint), code=code)
    assert not list(home.rglob("*.onnx"))


def test_a_pickle_that_cannot_be_read_brings_no_bad_advice(checkpoint: Path, capsys: Any) -> None:
    import torch

    (checkpoint / "model.safetensors").unlink()
    torch.save({"weight": print}, checkpoint / "pytorch_model.bin")
    message = fails(capsys, "inspect", str(checkpoint), "--allow-pickle", code=3)
    assert "damaged, or hold more than tensors" in message
    assert "weights_only" not in message


@pytest.mark.parametrize("opset", ["99", "17", "-1"])
def test_an_opset_that_cannot_be_written(opset: str, saved_gpt2: Path, capsys: Any) -> None:
    message = fails(capsys, "export", str(saved_gpt2), "--opset", opset, code=2)
    assert message.startswith(f"opset is {opset}. It must be a whole number from 18 to ")


@pytest.mark.parametrize("command", [("export",), ("verify",), ("generate", "x")])
def test_a_name_that_can_be_no_path(command: tuple[str, ...], capsys: Any) -> None:
    name, *rest = command
    assert "File name too long" in fails(capsys, name, "a" * 5000, *rest, code=3)


def test_a_tokenizer_does_not_speak_beside_the_error(
    demo_export: Path, forked: Callable[..., Any]
) -> None:
    done = forked(main, ["generate", str(demo_export), "word " * 1500])
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "do not fit into a context of 256" in done.stderr


@pytest.mark.filterwarnings("default:GPT2LMHeadModel does not use:UserWarning")
def test_leftovers_that_change_nothing_are_no_error(checkpoint: Path, capsys: Any) -> None:
    add_a_tensor("score.weight")(checkpoint)
    assert main(["inspect", str(checkpoint), "--json"]) == 0
    printed = capsys.readouterr()
    assert json.loads(printed.out)["architecture"] == "GPT2LMHeadModel"
    assert "warning: GPT2LMHeadModel does not use score.weight" in printed.err


def test_pickles_are_read_when_allowed(checkpoint: Path, capsys: Any) -> None:
    only_pickles(checkpoint)
    assert main(["inspect", str(checkpoint), "--allow-pickle", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["tied"] is True


@pytest.mark.parametrize(
    ("model", "words"),
    [
        ("./nowhere", "there is no folder './nowhere'"),
        ("/no/such/folder", "there is no folder"),
        ("", "there is no folder ''"),
        ("a/b/c", "there is no folder 'a/b/c'"),
    ],
)
def test_no_such_model(model: str, words: str, capsys: Any) -> None:
    assert words in fails(capsys, "export", model, code=3)


def test_a_hub_id_that_cannot_be_reached(capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    message = fails(capsys, "export", "no-such-org/no-such-model", code=3)
    assert "is no local folder, and the model hub does not give it" in message


def test_a_file_is_no_checkpoint(checkpoint: Path, capsys: Any) -> None:
    assert "is a file" in fails(capsys, "export", str(checkpoint / "config.json"), code=3)


def test_missing_tokenizer_files(checkpoint: Path, capsys: Any) -> None:
    message = fails(capsys, "generate", str(checkpoint), "Hello", code=3)
    assert "has no tokenizer that can be loaded" in message
    assert "tokenizer.json" in message


def test_an_empty_prompt(demo_export: Path, capsys: Any) -> None:
    assert "the prompt '' is empty" in fails(capsys, "generate", str(demo_export), "", code=2)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--ctx-len", "0"), "ctx_len is 0"),
        (("--batch-size", "-1"), "batch_size is -1"),
        (("--ctx-len", "4", "--prefill-seq-len", "8"), "larger than ctx_len"),
        (("--ctx-len", "3", "--max-new-tokens", "1"), "do not fit into a context of 3"),
        (("-O", "optimization"), "is not NAME=VALUE"),
        (("-O", "speed=1"), "has no option 'speed'"),
        (("-O", "save_optimized=maybe"), "save_optimized is 'maybe'. It must be true or false"),
        (("-O", "optimization=nope"), "must be one of none, basic, extended, all"),
        (("--backend", "openvino", "-O", "static_shapes=x"), "static_shapes is 'x'"),
        (("--backend", "openvino", "-O", "save_compiled=1"), "save_compiled is 1"),
        (("--temperature", "0.5"), "--temperature needs --sample"),
        (("--stream", "--json"), "exclude each other"),
        (("--write-io", "--io-steps", "often"), "often"),
        (("--ids",), "'Anna went to the market' is no list of token ids"),
    ],
)
def test_wrong_arguments(
    arguments: tuple[str, ...], words: str, demo_export: Path, capsys: Any
) -> None:
    command = ("generate", str(demo_export), "Anna went to the market", *arguments)
    assert words in fails(capsys, *command, code=2)


def test_an_unknown_backend(demo_export: Path, capsys: Any) -> None:
    assert "no backend 'npu'" in fails(
        capsys, "compile", str(demo_export), "--backend", "npu", code=8
    )


def test_an_unwritable_place(saved_gpt2: Path, tmp_path: Path, capsys: Any) -> None:
    (tmp_path / "file").write_text("x")
    target = tmp_path / "file" / "below"
    message = fails(capsys, "export", str(saved_gpt2), "--output", str(target), code=7)
    assert "cannot write" in message
    assert (tmp_path / "file").read_text() == "x"


def test_a_folder_in_use(saved_gpt2: Path, tmp_path: Path, capsys: Any) -> None:
    from qeff_proxy.common.atomic_folder import locked

    target = tmp_path / "out"
    with locked(target):
        arguments = (str(saved_gpt2), "--output", str(target), "--no-wait")
        message = fails(capsys, "export", *arguments, code=7)
    assert "in use by another run" in message


def test_debug_shows_the_trace() -> None:
    from qeff_proxy.errors import CheckpointError

    with pytest.raises(CheckpointError):
        main(["export", "./nowhere", "--debug"])


def test_no_command_prints_help(capsys: Any) -> None:
    assert main([]) == 2
    assert "COMMAND" in capsys.readouterr().out


def test_the_version_is_the_distributions(capsys: Any) -> None:
    from importlib_metadata import version

    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"qeff-proxy {version('qeff-proxy')}\n"


@pytest.mark.parametrize("name", ["speech.wav", "speech"])
def test_a_sound_file_is_no_prompt(
    name: str, demo_export: Path, tmp_path: Path, capsys: Any
) -> None:
    path = tmp_path / name
    path.write_bytes(b"RIFF\x24\0\0\0WAVEfmt ")
    assert "is a sound, image or video file" in fails(
        capsys, "generate", str(demo_export), str(path), code=2
    )


def test_a_name_that_is_not_utf8(saved_gpt2: Path, tmp_path: Path, capsys: Any) -> None:
    folder = tmp_path / "caf\udce9"
    shutil.copytree(saved_gpt2, folder)
    assert "is not UTF-8. Rename the file or folder" in fails(capsys, "export", str(folder), code=2)


def test_a_home_in_a_loop_of_links(
    saved_gpt2: Path, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    monkeypatch.setenv("QEFF_HOME", str(tmp_path / "loop"))
    assert "loop" in fails(capsys, "export", str(saved_gpt2), code=7)
