"""Compiling: what is refused, what is looked up, and what is made anew."""

from __future__ import annotations

import shutil
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from qeff_proxy.artifact.export_folder import check_weights_of, read_export
from qeff_proxy.backends.compile_export import compile_export
from qeff_proxy.common.atomic_folder import locked
from qeff_proxy.compile_options import CompileOptions
from qeff_proxy.errors import ArtifactError, BackendError, UsageError


@pytest.mark.parametrize("name", ["batch_size", "prefill_seq_len", "ctx_len", "num_cores"])
@pytest.mark.parametrize("value", [0, -3, 1.5])
def test_sizes_must_be_whole_numbers_above_zero(name: str, value: Any) -> None:
    with pytest.raises(UsageError, match=f"{name} is"):
        CompileOptions(**{name: value})


def test_unknown_backends_and_options_name_the_known_ones(demo_export: Path) -> None:
    export = read_export(demo_export)
    with pytest.raises(BackendError, match=r"no backend 'npu'.*onnxruntime.*torch"):
        compile_export(export, "npu")
    with pytest.raises(UsageError, match=r"no option 'level'.*optimization"):
        compile_export(export, options=CompileOptions(backend={"level": 3}))


def test_compiling_again_is_a_lookup_and_other_options_are_not(demo_export: Path) -> None:
    export = read_export(demo_export)
    options = CompileOptions(num_cores=16, ctx_len=64)
    first = compile_export(export, options=options)
    again = compile_export(export, options=options)
    assert (again.folder, again.was_there) == (first.folder, True)
    assert compile_export(export, options=CompileOptions(ctx_len=65)).folder != first.folder
    assert (first.folder / "body.onnx").is_file()


def test_a_second_run_waits_for_the_first_and_takes_what_it_compiled(
    demo_export: Path, tmp_path: Path
) -> None:
    export, options = read_export(demo_export), CompileOptions(ctx_len=62)
    target, stages, lock = compile_export(export, options=options).folder, [], ExitStack()
    made = target.rename(tmp_path / "made")

    def finish_the_first(stage: str) -> None:
        stages.append(stage)
        made.rename(target)
        lock.close()

    lock.enter_context(locked(target))
    with pytest.raises(ArtifactError, match="in use by another run"):
        compile_export(export, options=options, wait=False)
    assert compile_export(export, options=options, progress=finish_the_first).was_there
    assert stages == ["waiting for another run to finish this compilation"]


def test_what_was_compiled_and_then_changed_is_compiled_again(demo_export: Path) -> None:
    export = read_export(demo_export)
    options = CompileOptions(ctx_len=63)
    weights = compile_export(export, options=options).folder / "body.data"
    whole = weights.read_bytes()
    weights.write_bytes(bytes(len(whole)))
    assert not compile_export(export, options=options).was_there
    assert weights.read_bytes() == whole


def test_a_context_beyond_the_models_positions_is_cut_to_them(demo_export: Path) -> None:
    options = CompileOptions(ctx_len=2048, prefill_seq_len=300)
    with pytest.warns(UserWarning, match="2048 is more than the 256 positions that .* has; 256 a"):
        compiled = compile_export(read_export(demo_export), options=options)
    assert (compiled.options.ctx_len, compiled.options.prefill_seq_len) == (256, 256)


def test_a_file_that_is_removed_while_it_is_used_is_named(
    demo_export: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(demo_export, folder)
    export = read_export(folder)
    (folder / "body.safetensors").unlink()
    for use in (check_weights_of, compile_export):
        with pytest.raises(ArtifactError, match=r"body\.safetensors was removed while it was used"):
            use(export)
    shutil.copyfile(demo_export / "body.safetensors", folder / "body.safetensors")
    monkeypatch.setattr(Path, "is_file", lambda _path: True)  # there when it is looked for
    (folder / "body.onnx").unlink()
    with pytest.raises(ArtifactError, match=r"body\.onnx was removed while it was used"):
        read_export(folder)


def test_changed_weights_are_not_compiled(demo_export: Path, tmp_path: Path) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(demo_export, folder)
    compile_export(read_export(folder))
    with (folder / "body.safetensors").open("r+b") as file:
        file.seek(-100, 2)
        file.write(b"\0" * 64)
    for backend in ("onnxruntime", "torch"):
        with pytest.raises(ArtifactError, match="its bytes have changed"):
            compile_export(read_export(folder), backend)
