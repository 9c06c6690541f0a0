"""Generating from the exported parts gives what the uncut model generates."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from qeff_proxy import QEFFAutoModelForCausalLM
from qeff_proxy.backends.compile_export import compile_export
from qeff_proxy.cli import main
from qeff_proxy.compile_options import CompileOptions
from qeff_proxy.dump import DumpOptions, read_dump
from qeff_proxy.errors import BackendError, UsageError
from qeff_proxy.families.model_cache import cache_of
from qeff_proxy.plugins.manager import Plugins
from qeff_proxy.request import Request
from qeff_proxy.run.run_compiled import run_compiled
from transformers import GenerationConfig

PROMPTS = ("Anna went to the market", "One evening, Clara")
HOOKS = Plugins.discover().hooks_for("gpt2")


def generate(export: Path, request: Request, *, options: Any = None, **settings: Any) -> Any:
    from qeff_proxy.artifact.export_folder import read_export
    from qeff_proxy.load.load_processor import load_processor

    backend = settings.pop("backend", "onnxruntime")
    io_folder = settings.pop("io_folder", None)
    io_options = settings.pop("io_options", None)
    compiled = compile_export(read_export(export), backend, options or CompileOptions())
    return run_compiled(
        compiled,
        HOOKS,
        request,
        processor=load_processor(export / "processor"),
        settings=settings,
        write_io=io_folder is not None,
        io_folder=io_folder,
        io_options=io_options,
    )


def expected_ids(eager: Any, tokenizer: Any, prompts: Any, **settings: Any) -> Any:
    batch = tokenizer(list(prompts), return_tensors="pt", padding=True)
    with torch.no_grad():
        ids = eager.generate(**batch, **settings)
    return ids[:, batch["input_ids"].shape[1] :].numpy()


@pytest.mark.parametrize("backend", ["onnxruntime", "torch"])
@pytest.mark.parametrize("prompts", [PROMPTS[:1], PROMPTS])
@pytest.mark.parametrize("chunk", [None, 2])
def test_greedy_tokens_are_equal(
    backend: str, prompts: Any, chunk: Any, demo_export: Path, eager: Any, tokenizer: Any
) -> None:
    settings = {"max_new_tokens": 40, "do_sample": False}
    result = generate(
        demo_export,
        Request(prompts=prompts),
        backend=backend,
        options=CompileOptions(prefill_seq_len=chunk),
        **settings,
    )
    expected = expected_ids(eager, tokenizer, prompts, **settings)
    assert np.array_equal(result.outputs["generated_ids"], expected)
    assert result.decoded == tokenizer.batch_decode(expected, skip_special_tokens=True)


@pytest.mark.parametrize(
    "settings",
    [
        {"num_beams": 3, "do_sample": False, "max_new_tokens": 20},
        {"num_beams": 2, "num_return_sequences": 2, "do_sample": False, "max_new_tokens": 12},
        {"do_sample": False, "max_new_tokens": 20, "repetition_penalty": 1.3},
        {"do_sample": False, "max_new_tokens": 20, "eos_token_id": 15},
    ],
)
def test_transformers_other_ways_to_generate_work(
    settings: dict[str, Any], demo_export: Path, eager: Any, tokenizer: Any
) -> None:
    result = generate(demo_export, Request(prompts=PROMPTS), **settings)
    assert np.array_equal(
        result.outputs["generated_ids"], expected_ids(eager, tokenizer, PROMPTS, **settings)
    )


def test_sampling_follows_its_seed_beside_other_threads(demo_export: Path) -> None:
    settings = {"do_sample": True, "max_new_tokens": 12}

    def sample(seed: int | None, beams: int) -> Any:
        request = Request(prompts=PROMPTS[:1])
        result = generate(demo_export, request, seed=seed, num_beams=beams, **settings)
        return result.outputs["generated_ids"].tolist()

    wanted = [(5, 1), (5, 1), (None, 1), (5, 2), (6, 1)]
    alone = [sample(*one) for one in wanted]
    with ThreadPoolExecutor(len(wanted)) as pool:
        together = list(pool.map(lambda one: sample(*one), wanted))
    assert alone[0] == alone[1] != alone[4]
    del alone[2], together[2]  # without a seed each is another
    assert together == alone


def test_a_seed_gives_transformers_own_tokens(
    demo_export: Path, eager: Any, tokenizer: Any
) -> None:
    settings = {"do_sample": True, "max_new_tokens": 12}
    result = generate(demo_export, Request(prompts=PROMPTS), seed=11, **settings)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(11)
        expected = expected_ids(eager, tokenizer, PROMPTS, **settings)
    assert np.array_equal(result.outputs["generated_ids"], expected)


def test_sampling_follows_its_seed_and_leaves_the_global_one_alone(demo_export: Path) -> None:
    settings = {"do_sample": True, "temperature": 1.0, "max_new_tokens": 24}
    state = torch.random.get_rng_state()
    runs = [
        generate(demo_export, Request(prompts=PROMPTS), seed=seed, **settings) for seed in (3, 3, 4)
    ]
    ids = [run.outputs["generated_ids"].tolist() for run in runs]
    assert ids[0] == ids[1]
    assert ids[0] != ids[2]
    assert torch.equal(torch.random.get_rng_state(), state)


def test_stop_strings_and_streaming(demo_export: Path, tokenizer: Any) -> None:
    class Listener:
        def __init__(self) -> None:
            self.ids: list[int] = []
            self.ended = False

        def put(self, value: torch.Tensor) -> None:
            self.ids += value.flatten().tolist()

        def end(self) -> None:
            self.ended = True

    listener = Listener()
    result = generate(
        demo_export,
        Request(prompts=PROMPTS[:1]),
        stop_strings=["sunny"],
        streamer=listener,
        max_new_tokens=60,
        do_sample=False,
    )
    assert result.decoded[0].endswith("sunny")
    prompt = tokenizer(PROMPTS[0])["input_ids"]
    assert listener.ids == [*prompt, *result.outputs["generated_ids"][0].tolist()]
    assert listener.ended


def test_token_ids_need_no_tokenizer(demo_export: Path, tokenizer: Any, eager: Any) -> None:
    ids = tokenizer(PROMPTS[0])["input_ids"]
    for form in (torch.tensor([ids]), np.array([ids]), [ids]):
        result = generate(
            demo_export, Request(inputs={"input_ids": form}), max_new_tokens=8, do_sample=False
        )
        expected = expected_ids(eager, tokenizer, PROMPTS[:1], max_new_tokens=8, do_sample=False)
        assert np.array_equal(result.outputs["generated_ids"], expected)


def test_the_command_takes_token_ids(demo_export: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ids = "342,270,263"
    assert main(["generate", str(demo_export), ids, ids, "--ids", "--max-new-tokens", "4"]) == 0
    first, second = capsys.readouterr().out.splitlines()
    assert first == second
    expected = generate(
        demo_export,
        Request(inputs={"input_ids": [[342, 270, 263]]}),
        max_new_tokens=4,
        do_sample=False,
    )
    assert first == ",".join([ids, *map(str, expected.outputs["generated_ids"][0])])


def test_timings_are_of_this_run(demo_export: Path) -> None:
    perf = generate(
        demo_export, Request(prompts=PROMPTS[:1]), max_new_tokens=20, do_sample=False
    ).outputs["perf_metrics"]
    assert 0 < perf.prefill_time < perf.total_time
    decode = perf.total_time - perf.prefill_time
    assert perf.decode_perf >= 19 / decode * 0.99
    assert perf.total_perf == pytest.approx(20 / perf.total_time)


@pytest.mark.parametrize("kv", ["delta", "full"])
def test_a_dump_holds_every_step_and_equals_the_uncut_model(
    kv: Any, demo_export: Path, eager: Any, tokenizer: Any, tmp_path: Path
) -> None:
    folder = tmp_path / "dump"
    generate(
        demo_export,
        Request(prompts=PROMPTS[:1]),
        options=CompileOptions(prefill_seq_len=2),
        max_new_tokens=6,
        do_sample=False,
        io_folder=folder,
        io_options=DumpOptions(kv=kv),
    )
    dump = read_dump(folder)
    count = len(tokenizer(PROMPTS[0])["input_ids"])
    chunks = -(-count // 2)
    steps = [(step.phase, step.index) for step in dump.steps]
    assert steps == [("prefill", i) for i in range(chunks)] + [("decode", i) for i in range(5)]
    assert dump.provenance["backend"] == "onnxruntime"
    assert dump.provenance["prompts"] == list(PROMPTS[:1])
    assert "onnxruntime" in dump.provenance["versions"]
    # Inputs and outputs of a chunk belong together.
    second = dump.array("prefill", 1, "body.in.inputs_embeds")
    assert second.shape == (1, 2, 96)
    assert dump.array("prefill", 1, "body.out.last_hidden_state").shape == (1, 2, 96)
    assert dump.array("prefill", 1, "body.in.position_ids").tolist() == [[2, 3]]
    # The cache of the last step is the uncut model's.
    last = dump.array("decode", 4, "body.out.present_key.layer-01")
    ids = np.concatenate(
        [dump.array(phase, index, "embedding.in.input_ids") for phase, index in steps], axis=1
    )
    with torch.no_grad():
        uncut = eager(input_ids=torch.from_numpy(ids), use_cache=True)
    cache = cache_of(uncut)
    assert np.abs(last - cache.layers[1].keys.numpy()).max() < 1e-4
    past = dump.array("decode", 4, "body.in.past_key_values_key.layer-01")
    assert np.array_equal(past, last[:, :, :-1])
    # So are the logits of the last chunk and of each decode step.
    deciding = steps[chunks - 1 :]
    actual = np.stack([dump.array(*step, "lm_head.out.logits")[0, -1] for step in deciding])
    expected = uncut.logits[0, -len(deciding) :].numpy()
    assert len(deciding) == 6
    assert (actual.argmax(-1) == expected.argmax(-1)).all()
    assert np.abs(actual - expected).max() < 1e-4


@pytest.mark.parametrize(
    ("request_", "options", "settings", "message"),
    [
        (Request(prompts=[""]), {}, {}, "is empty"),
        (Request(prompts=["One day " * 200]), {}, {}, "do not fit into a context of 256"),
        (Request(prompts=PROMPTS), {"ctx_len": 4}, {}, "do not fit into a context of 4"),
        (
            Request(prompts=PROMPTS),
            {"ctx_len": 30},
            {"max_new_tokens": 64},
            "and 64 new ones do not fit into a context of 30",
        ),
        (Request(prompts=PROMPTS), {}, {"max_new_tokens": 0}, "max_new_tokens is 0"),
        (Request(prompts=PROMPTS), {}, {"no_such_setting": 1}, "no_such_setting"),
        (Request(prompts=PROMPTS), {}, {"prompt_lookup_num_tokens": 2}, "prompt_lookup_num_tok"),
        (Request(prompts=PROMPTS), {}, {"guidance_scale": 1.5}, "guidance_scale cannot be used"),
        (Request(prompts=PROMPTS), {}, {"return_dict_in_generate": True}, "return_dict_in_gener"),
        (Request(prompts=PROMPTS), {}, {"use_cache": False}, "always uses its cache"),
        (Request(prompts=PROMPTS), {}, {"num_beams": 0}, "num_beams is 0"),
        (Request(prompts=PROMPTS), {}, {"num_beams": 10**8}, "from 1 to 1024"),
        (Request(prompts=PROMPTS), {}, {"do_sample": True, "temperature": 1e-300}, "temperature"),
        (Request(prompts=PROMPTS), {}, {"seed": 10**23}, "seed is 1000000"),
        (Request(prompts=PROMPTS), {}, {"stop_strings": ""}, "a stop string is empty"),
        (Request(prompts=PROMPTS), {}, {"generation_config": {}}, "generation_config is a dict"),
        (
            Request(prompts=PROMPTS),
            {},
            {"generation_config": GenerationConfig(penalty_alpha=0.6, top_k=4)},
            "penalty_alpha cannot be used",
        ),
        (Request(prompts=["\ud800"]), {}, {}, "is no text"),
        (Request(prompts=[5]), {}, {}, "the prompt 5 is no text"),
        (Request(inputs={"input_ids": [[5, 2**70]]}), {}, {}, "'input_ids' is no tensor"),
        (Request(inputs={"input_ids": [[5], [5, 6]]}), {}, {}, "'input_ids' is no tensor"),
        (Request(inputs={"input_ids": "no"}), {}, {}, "'input_ids' is no tensor"),
        (
            Request(inputs={"input_ids": torch.zeros(1, 0, dtype=torch.int64)}),
            {},
            {},
            r"shape \[1, 0\]",
        ),
        (Request(inputs={"input_ids": [[5, 4000]]}), {}, {}, "4000 is no token of this model"),
        (Request(inputs={"input_ids": [[5, -1]]}), {}, {}, "-1 is no token of this model"),
        (Request(inputs={"ids": [[5]]}), {}, {}, "nothing uses the input 'ids'"),
        (Request(), {}, {}, "makes no tensors"),
        (Request(inputs={"input_ids": [[5.0]]}), {}, {}, "Token ids are whole numbers"),
        (
            Request(inputs={"input_ids": [[5, 6]], "attention_mask": [[1]]}),
            {},
            {},
            "attention_mask has shape",
        ),
    ],
)
def test_a_request_that_cannot_be_served_is_one_clear_line(
    request_: Any, options: Any, settings: Any, message: str, demo_export: Path
) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        generate(demo_export, request_, options=CompileOptions(**options), **settings)
    assert "\n" not in str(caught.value)


def test_a_generation_config_is_followed(demo_export: Path) -> None:
    request = Request(inputs={"input_ids": [[5, 6, 7]]})
    config = GenerationConfig(max_new_tokens=5, suppress_tokens=list(range(900)))
    ids = generate(demo_export, request, generation_config=config).outputs["generated_ids"]
    assert ids.shape == (1, 5)
    assert ids.min() >= 900
    longer = generate(demo_export, request, generation_config=config, max_new_tokens=6)
    assert longer.outputs["generated_ids"][0, :5].tolist() == ids[0].tolist()
    short = generate(demo_export, request, generation_config=GenerationConfig(max_length=5))
    assert short.outputs["generated_ids"].shape == (1, 2)


@pytest.mark.parametrize("mask", [[1, 1, 1, 0], [0, 0, 0, 0], [2, 1, 1, 1]])
def test_masks_that_generation_cannot_serve_are_refused(mask: Any, demo_export: Path) -> None:
    inputs = {"input_ids": [[5, 6, 7, 8]], "attention_mask": [mask]}
    with pytest.raises(UsageError, match="must hold 0 and 1, and end with 1"):
        generate(demo_export, Request(inputs=inputs), max_new_tokens=2)


def test_logits_that_are_no_numbers_are_no_tokens(make_model: Any) -> None:
    source = make_model("gpt2")
    source.transformer.wpe.weight.data[20:] = float("inf")  # beyond what the cut is verified on
    model = QEFFAutoModelForCausalLM(source, proxy="split")
    ids = {"input_ids": [[5] * 18]}
    assert model.generate(inputs=ids, generation_len=2).generated_ids.shape == (1, 2)
    with pytest.raises(BackendError, match="logits of step 3 are not finite"):
        model.generate(inputs=ids, generation_len=6)


def test_longrope_is_kept_to_one_side_of_its_limit(make_model: Any) -> None:
    factors = [1.0 + 0.5 * i for i in range(8)]
    source = make_model(
        "phi3",
        rope_parameters={
            "rope_type": "longrope",
            "rope_theta": 10000.0,
            "short_factor": [1.0] * 8,
            "long_factor": factors,
            "original_max_position_embeddings": 24,
        },
        original_max_position_embeddings=24,
    )
    model = QEFFAutoModelForCausalLM(source, proxy="split")
    model.compile(prefill_seq_len=8)
    with pytest.raises(UsageError, match="cross position 24"):
        model.generate(inputs={"input_ids": [[5] * 20]}, generation_len=9)
    generator = torch.Generator().manual_seed(3)
    for length in (12, 40):
        ids = torch.randint(3, 131, (1, length), generator=generator)
        with torch.no_grad():
            expected = source.generate(ids, max_new_tokens=8, do_sample=False, pad_token_id=0)
        result = model.generate(inputs={"input_ids": ids}, generation_len=8, do_sample=False)
        assert np.array_equal(result.generated_ids, expected[:, length:].numpy())
