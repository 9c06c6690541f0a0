"""Plans: their cells, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from qeff_proxy.errors import UsageError
from qeff_proxy.sweep import read_plan
from qeff_proxy.sweep.identify_cells import identify_cells
from safetensors.torch import save_file

WritePlan = Callable[..., Path]

PLAN = """
exclude = ["b/onnxruntime/*/ids"]
memory_limit = 4.5
[models]
a = "./a"
b = {source = "org/b", settings = ["plain"], override = {max_new_tokens = 2}, time_limit = 5}
[backends.onnxruntime]
[backends.soc]
backend = "qnn"
options = {soc = "SM8650", level = 1}
[settings.plain]
[settings.half]
dtype = "float16"
options = {soc = {level = 3}}
[inputs.text]
prompts = ["Hello"]
[inputs.ids]
ids = [[1, 2, 3]]
"""


def test_cells_are_the_product_without_what_is_excluded(write_plan: WritePlan) -> None:
    plan = read_plan(write_plan(PLAN))
    assert [cell.name for cell in plan.cells] == [
        *(f"a/onnxruntime/{setting}/{i}" for setting in ("plain", "half") for i in ("text", "ids")),
        *(f"a/soc/{setting}/{i}" for setting in ("plain", "half") for i in ("text", "ids")),
        "b/onnxruntime/plain/text",
        "b/soc/plain/text",
        "b/soc/plain/ids",
    ]
    cells = {cell.name: cell for cell in plan.cells}
    soc = cells["a/soc/half/ids"]
    assert (soc.backend, soc.options, soc.memory_limit) == (
        "qnn",
        {"soc": "SM8650", "level": 3},
        4.5,
    )
    assert cells["a/soc/plain/ids"].options["level"] == 1
    assert soc.source == str(plan.path.parent / "a")
    assert cells["b/soc/plain/ids"].source == "org/b"
    assert cells["b/soc/plain/ids"].setting.max_new_tokens == 2
    assert (cells["b/soc/plain/ids"].time_limit, soc.time_limit) == (5, 1800)


def test_a_glob_is_every_folder_and_tasks_have_cells_of_their_own(write_plan: WritePlan) -> None:
    path = write_plan('[models.all]\nsource = "zoo/*"\ntasks = ["text", "embedding"]')
    for name in ("x", "y"):
        (path.parent / "zoo" / name).mkdir(parents=True)
    names = [cell.name for cell in read_plan(path).cells]
    assert names == [
        f"{name}:{task}/onnxruntime/default/example"
        for name in ("x", "y")
        for task in ("text", "embedding")
    ]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("modles = 1", "unknown key 'modles'. The nearest is 'models'"),
        (
            '[models]\na = {sorce = "x"}',
            r"\[models.a\] of .*unknown key 'sorce'. The nearest is 'source'",
        ),
        ('[models]\na="x"\n[settings.s]\ndtpye="float16"', "unknown key 'dtpye'.*'dtype'"),
        ('[models]\na={source="x", override={ctxlen=3}}', "unknown key 'ctxlen'.*'ctx_len'"),
        ('[models]\na="x"\n[settings.s]\ndtype="float8"', "'dtype' of .*: invalid enum value"),
        (
            '[models]\na={source="x", backends=["qn?"]}',
            "names 'qn\\?', which is none of onnxruntime",
        ),
        ('[models]\na="x"\n[settings.s]\noptions={qnn={a=1}}', "names 'qnn', which is none of"),
        ('exclude=["*"]\n[models]\na="x"', "has no cells"),
        ('[models]\na="zoo/*"', "no folder matches"),
        ('ledger="results"\n[models]\na="x"', "the ledger .*results of .* is no .jsonl file"),
        ("[models", "is no TOML"),
        ('[models]\n"a/b"="x"', "a name in 'models'"),
        ("", "required field `?'?models|lacks"),
    ],
)
def test_a_plan_that_cannot_be_right_is_refused_by_name(
    write_plan: WritePlan, text: str, said: str
) -> None:
    with pytest.raises(UsageError, match=said):
        read_plan(write_plan(text))


def test_an_identity_changes_with_what_the_verdict_depends_on(
    write_plan: WritePlan, saved_gpt2: Path, toys: Path
) -> None:
    """And with nothing else: limits and names are no part of it."""
    base = {"source": f'"{saved_gpt2}"', "toy": "", "tokens": "4", "limit": "60", "name": "m"}

    def ids(**changes: str) -> list[str]:
        values = {**base, **changes}
        text = (
            "time_limit = {limit}\n[models]\n{name} = {source}\n[backends]\ntoy = {{{toy}}}\n"
            "onnxruntime = {{}}\n[settings.s]\nmax_new_tokens = {tokens}"
        ).format(**values)
        cells = read_plan(write_plan(text)).cells
        return [identity.id for identity in identify_cells(cells).values()]

    toy, plain = first = ids()
    assert ids() == first
    assert ids(limit="9", name="other") == first
    assert ids(tokens="5")[0] != toy
    assert ids(toy="options = {level = 2}") != first
    assert ids(toy="options = {level = 2}")[1] == plain
    backend = toys / "toy_backend.py"
    text = backend.read_text()
    try:
        backend.write_text(text + "\n# edited\n")
        edited = ids()
        assert (edited[0] != toy, edited[1]) == (True, plain)
    finally:
        backend.write_text(text)
    config = saved_gpt2 / "config.json"
    before = config.read_bytes()
    try:
        config.write_bytes(before + b" ")
        assert not set(ids()) & set(first)
    finally:
        config.write_bytes(before)


def test_an_adapter_that_changed_is_another_cell(
    write_plan: WritePlan, saved_gpt2: Path, tmp_path: Path
) -> None:
    """A folder with an adapter only stands for its base model, merged with it."""
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    settings = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": ["c_attn"]}
    settings["base_model_name_or_path"] = str(saved_gpt2)
    (adapter / "adapter_config.json").write_text(json.dumps(settings))

    def ids(value: float) -> set[str]:
        save_file({"x": torch.full((4,), value)}, adapter / "adapter_model.safetensors")
        cells = read_plan(write_plan(f'[models]\nm = "{adapter}"\n[backends]\ntorch = {{}}')).cells
        return {identity.id for identity in identify_cells(cells).values()}

    assert ids(1.0) != ids(2.0)


def test_the_plans_that_come_with_the_program_are_right(write_plan: WritePlan) -> None:
    root = Path(__file__).parents[2]
    page = (root / "docs" / "sweeps.md").read_text(encoding="utf-8")
    code = page.partition("```toml\n")[2].partition("```")[0]
    path = write_plan(code)
    (path.parent / "checkpoints" / "tiny").mkdir(parents=True)
    names = [cell.name for cell in read_plan(path).cells]
    assert {"gpt2/qnn/plain/text", "tiny/onnxruntime/half/long"} <= set(names)
    assert "embedder/qnn/plain/text" not in names
    assert "gpt2/qnn/half/text" not in names
    demos = read_plan(root / "examples" / "demos.toml")
    assert {cell.backend for cell in demos.cells} == {"onnxruntime", "openvino", "qnn"}


def test_what_a_cell_takes_is_that_of_its_model_and_backend(
    write_plan: Callable[..., Path],
) -> None:
    plan = write_plan(
        """
        cores = 2
        [models]
        a = "x"
        b = {source = "y", cores = 4, resources = {disk = 0.5}}
        [backends.one]
        [backends.two]
        resources = {npu = 1, disk = 1}
        """
    )
    cells = {cell.name.rsplit("/", 2)[0]: cell for cell in read_plan(plan).cells}
    assert {name: (cell.cores, cell.resources) for name, cell in cells.items()} == {
        "a/one": (2, {}),
        "a/two": (2, {"npu": 1, "disk": 1}),
        "b/one": (4, {"disk": 0.5}),
        "b/two": (4, {"npu": 1, "disk": 0.5}),
    }
