from __future__ import annotations

import json
import shutil

import ml_dtypes
import numpy as np
import pytest
from qeff_proxy.compare import Tolerance, Tolerances, compare_dumps
from qeff_proxy.compare.verdict import describe_verdict
from qeff_proxy.dump import DumpOptions, DumpWriter
from qeff_proxy.dump.format import HEADER_BYTES
from qeff_proxy.errors import DumpError


def write(folder, *steps, **options):
    with DumpWriter(folder, {}, DumpOptions(**options)) as writer:
        for index, (inputs, outputs) in enumerate(steps):
            writer.step("decode", index, "body", inputs, outputs)
    return folder


def compare_arrays(tmp_path, reference, candidate, **keywords):
    """Compare two dumps of one output."""
    return compare_dumps(
        write(tmp_path / "r", ({}, {"y": np.asarray(reference)})),
        write(tmp_path / "c", ({}, {"y": np.asarray(candidate)})),
        **keywords,
    )


def test_a_dump_equals_itself(good):
    comparison = compare_dumps(good, good)
    assert comparison.passed
    assert comparison.first_divergence is None
    assert len(comparison.steps) == 5
    assert {str(t.name) for t in comparison.tensors} >= {
        "body.in.inputs_embeds",
        "body.out.present_key.layer-04",
        "body.out.hidden_states.layer-00",
    }
    assert all(t.worst.sqnr == np.inf and t.worst.cosine == 1 for t in comparison.tensors)


def test_one_tensor_of_one_step_is_told_as_one(tmp_path):
    said = describe_verdict(compare_arrays(tmp_path / "equal", np.ones(3), np.ones(3)))
    assert said[0] == "PASSED: 1 tensor in 1 step (1 array) is within tolerance."
    said = describe_verdict(compare_arrays(tmp_path / "other", np.ones(3), np.zeros(3)))
    assert said[0] == "FAILED: of 1 tensor in 1 step (1 array), 1 tensor differs, in 1 array."


@pytest.mark.parametrize("layer", range(5))
def test_the_first_divergence_is_the_layer_whose_weight_is_wrong(good, stack, tmp_path, layer):
    comparison = compare_dumps(good, stack(tmp_path / "c", wrong_layer=layer))
    first = comparison.first_divergence
    assert not comparison.passed
    assert (first.step, first.layer) == ("prefill-0000", layer)
    assert first.tensor == f"body.out.hidden_states.layer-{layer:02d}"
    assert first.before == f"body.out.present_key.layer-{layer:02d}"
    assert not first.is_input
    places = [at for at, _ in first.growth]
    assert places == [f"layer {n}" for n in range(layer, 5)] + ["body.out.last_hidden_state"]
    assert all(error > 0 for _, error in first.growth)


def test_without_taps_the_next_cache_rows_tell(stack, tmp_path):
    good = stack(tmp_path / "r", taps=False)
    first = compare_dumps(good, stack(tmp_path / "c", taps=False, wrong_layer=2)).first_divergence
    assert first.tensor == "body.out.present_key.layer-03"
    assert first.before == "body.out.present_key.layer-02"


def test_within_a_layer_attention_comes_before_the_mlp_and_the_whole(tmp_path):
    names = ("hidden_states.1", "hidden_states.1.mlp", "hidden_states.1.attention", "present.1.key")
    arrays = {name: np.zeros((1, 1, 1, 1)) for name in (*names, "hidden_states.0")}
    dump = write(tmp_path / "d", ({"inputs_embeds": np.zeros((1, 1, 4))}, arrays))
    assert [str(t.name).split(".", 2)[2] for t in compare_dumps(dump, dump).tensors] == [
        "inputs_embeds",
        "hidden_states.layer-00",
        "present_key.layer-01",
        "hidden_states_attention.layer-01",
        "hidden_states_mlp.layer-01",
        "hidden_states.layer-01",
    ]


def test_the_first_step_counts_before_the_first_layer(good, stack, tmp_path):
    candidate = stack(tmp_path / "c", wrong_layer=4, wrong_from=3, fault=0.5)
    first = compare_dumps(good, candidate).first_divergence
    assert (first.step, first.layer) == ("decode-0002", 4)


def _noise(share):
    """A tensor with a peak of 1000, and noise of at most ``share`` of it."""
    rng = np.random.default_rng(0)
    reference = rng.standard_normal(4096).astype(np.float32)
    reference[:64] *= 1000 / np.abs(reference[:64]).max()
    return reference, reference + 1000 * share * rng.uniform(-1, 1, 4096).astype(np.float32)


def test_rounding_of_a_tensor_with_a_large_peak_passes(tmp_path):
    reference, candidate = _noise(5e-7)
    assert np.abs(candidate - reference).max() > 4e-4  # beyond atol
    comparison = compare_arrays(tmp_path, reference, candidate)
    assert comparison.passed
    assert comparison.tensors[0].worst.outside > 500


def _spike(reference):
    """One element off by 20 times the limit, at an SQNR that is high enough."""
    candidate = reference.copy()
    candidate[100] += 2e-4 * np.abs(reference).max()
    return candidate


@pytest.mark.parametrize(
    "wrong",
    [
        lambda reference: _noise(2e-4)[1],
        lambda reference: reference + np.float32(0.9e-5 * np.abs(reference).max()),
        lambda reference: reference + np.float32(1e-2 * np.abs(reference).max()),
        lambda reference: np.where(np.abs(reference) < 2, 0, reference),
        _spike,
    ],
    ids=["more noise", "small offset", "offset", "small elements lost", "one element"],
)
def test_more_than_rounding_fails(tmp_path, wrong):
    reference, _ = _noise(0)
    comparison = compare_arrays(tmp_path, reference, wrong(reference))
    assert not comparison.passed
    assert "rounding:1e-05" in comparison.tensors[0].why


def test_rounding_is_not_excused_by_a_tolerance_that_does_not_name_it(tmp_path):
    reference, candidate = _noise(5e-7)
    told = Tolerances.parse(["*=atol:1e-4,rtol:1e-3"])
    assert not compare_arrays(tmp_path / "a", reference, candidate, tolerances=told).passed
    told = Tolerances.parse(["*=rounding:1e-5"])
    assert compare_arrays(tmp_path / "b", reference, candidate, tolerances=told).passed
    assert not compare_arrays(tmp_path / "c", *_noise(1e-4), tolerances=told).passed


@pytest.mark.parametrize("forms", [("delta", "full"), ("full", "delta"), ("full", "full")])
def test_the_delta_form_is_held_against_the_full_one(stack, tmp_path, forms):
    reference = stack(tmp_path / "r", kv=forms[0])
    assert compare_dumps(reference, stack(tmp_path / "c", kv=forms[1])).passed
    wrong = compare_dumps(reference, stack(tmp_path / "w", kv=forms[1], wrong_layer=1))
    assert wrong.first_divergence.layer == 1


def test_halves_are_held_to_the_coarser_dtype(good, stack, tmp_path):
    comparison = compare_dumps(good, stack(tmp_path / "c", dtype=np.float16))
    tensor = next(t for t in comparison.tensors if t.name.tensor == "last_hidden_state")
    assert (tensor.reference_dtype, tensor.candidate_dtype) == ("float32", "float16")
    assert tensor.tolerance == Tolerance(1e-2, 1e-2, rounding=1e-2)
    assert comparison.passed
    assert 0 < tensor.worst.max_abs < 1e-2


def test_bfloat16_is_read_as_what_it_is(tmp_path):
    values = np.linspace(-3, 3, 100, dtype=np.float32)
    comparison = compare_arrays(tmp_path, values, values.astype(ml_dtypes.bfloat16))
    assert comparison.passed
    assert comparison.tensors[0].worst.sqnr > 40


def test_the_worst_element_is_named(tmp_path):
    reference = np.ones((2, 3, 4), np.float32)
    candidate = reference.copy()
    candidate[1, 2, 0] = 1.5
    comparison = compare_arrays(tmp_path, reference, candidate)
    worst = comparison.tensors[0].worst
    assert worst.max_abs_at == worst.max_rel_at == (1, 2, 0)
    assert (worst.reference_there, worst.candidate_there, worst.max_abs) == (1.0, 1.5, 0.5)
    assert worst.mean_abs == pytest.approx(0.5 / 24)
    assert worst.outside == 1
    assert "[1, 2, 0] (1 became 1.5), 1 of 24" in comparison.tensors[0].why


def test_the_worst_element_of_a_tensor_of_many_blocks(tmp_path):
    reference = np.random.default_rng(0).standard_normal((3, 100_000), dtype=np.float32)
    candidate = reference.copy()
    candidate[2, 77_777] += 1
    worst = compare_arrays(tmp_path, reference, candidate).tensors[0].worst
    assert worst.max_abs_at == (2, 77_777)
    assert worst.count == 300_000


@pytest.mark.parametrize(
    ("reference", "candidate", "passed"),
    [
        ([1, np.nan], [1, np.nan], True),
        ([1, -np.inf], [1, -np.inf], True),
        ([1, 2], [1, np.nan], False),
        ([1, np.inf], [1, -np.inf], False),
        ([1, np.inf], [1, 3e38], False),
        ([np.nan, 2], [1, 2], False),
    ],
)
def test_nan_and_infinity_are_judged_apart(tmp_path, reference, candidate, passed):
    comparison = compare_arrays(tmp_path, np.float32(reference), np.float32(candidate))
    assert comparison.passed is passed
    if not passed:
        assert "1 NaN or infinite element against others" in comparison.tensors[0].why
        assert comparison.first_divergence.error == np.inf


def test_integers_and_booleans_must_be_equal(tmp_path):
    assert compare_arrays(tmp_path, np.array([1, 2]), np.array([1, 2], np.int32)).passed
    assert not compare_arrays(tmp_path, np.array([1, 2]), np.array([1, 3])).passed
    assert not compare_arrays(tmp_path, np.array([True, True]), np.array([True, False])).passed


def test_mismatched_shapes_and_dtypes_fail_and_say_so(tmp_path):
    comparison = compare_arrays(
        tmp_path, np.zeros((2, 3), np.float32), np.zeros((3, 2), np.float32)
    )
    assert not comparison.passed
    assert comparison.tensors[0].problem == "shapes differ in decode-0000: [2, 3] against [3, 2]"
    comparison = compare_arrays(tmp_path, np.zeros(2, np.float32), np.zeros(2, np.int64))
    assert comparison.tensors[0].problem == "dtypes differ: float32 against int64"
    assert json.dumps(comparison.to_json(), allow_nan=False)


def test_a_shape_that_differs_in_one_step_leaves_the_others(tmp_path):
    steps = [({}, {"y": np.ones(n, np.float32)}) for n in (2, 3, 4)]
    other = [({}, {"y": np.ones(n, np.float32)}) for n in (2, 9, 4)]
    comparison = compare_dumps(write(tmp_path / "r", *steps), write(tmp_path / "c", *other))
    assert comparison.tensors[0].step_passed.tolist() == [True, False, True]
    assert comparison.first_divergence.step == "decode-0001"


def test_an_input_that_differs_is_called_one(tmp_path):
    steps = [({"input_ids": np.array([n])}, {"y": np.float32([n])}) for n in (1, 2)]
    other = [({"input_ids": np.array([n])}, {"y": np.float32([n])}) for n in (1, 9)]
    comparison = compare_dumps(write(tmp_path / "r", *steps), write(tmp_path / "c", *other))
    first = comparison.first_divergence
    assert first.is_input
    assert (first.step, first.tensor) == ("decode-0001", "body.in.input_ids")


def test_another_number_of_steps_fails_unless_partial(good, stack, tmp_path):
    longer = stack(tmp_path / "c", steps=6)
    comparison = compare_dumps(good, longer)
    assert not comparison.passed
    assert comparison.problems == ["only the candidate has 2 steps (decode-0004, decode-0005)"]
    partial = compare_dumps(good, longer, partial=True)
    assert partial.passed
    assert partial.notes == comparison.problems


def test_a_missing_tensor_fails_unless_partial(good, stack, tmp_path):
    fewer = stack(tmp_path / "c", taps=False)
    comparison = compare_dumps(good, fewer)
    assert not comparison.passed
    assert comparison.problems[0].startswith("only the reference has 10 tensors (prefill/body")
    assert compare_dumps(good, fewer, partial=True).passed


def test_a_tensor_missing_in_one_step_is_noticed(tmp_path):
    y = np.ones(2, np.float32)
    reference = write(tmp_path / "r", ({}, {"x": y, "y": y}), ({}, {"x": y, "y": y}))
    candidate = write(tmp_path / "c", ({}, {"x": y, "y": y}), ({}, {"x": y}))
    comparison = compare_dumps(reference, candidate)
    assert comparison.problems == ["only the reference has 1 tensor (decode/body.out.y in 1 steps)"]


def test_nothing_in_common_is_an_error(good, tmp_path):
    other = write(tmp_path / "c", ({}, {"nothing_like_it": np.ones(1)}))
    with pytest.raises(DumpError, match="nothing to compare"):
        compare_dumps(good, other)
    with pytest.raises(DumpError, match="nothing to compare"):
        compare_dumps(good, good, tensors=["vision.*"])


def test_another_model_is_named(good, stack, tmp_path):
    comparison = compare_dumps(good, stack(tmp_path / "c", model="other"))
    assert comparison.notes == ["the dumps are of different models: 'stack' and 'other'"]


@pytest.mark.parametrize("side", [0, 1])
@pytest.mark.parametrize("tensor", ["present_key.layer-02", "hidden_states.layer-01"])
def test_damage_is_found_while_comparing(good, tmp_path, side, tensor):
    shutil.copytree(good, tmp_path / "d")
    with (tmp_path / "d" / "decode" / f"body.out.{tensor}.npy").open("r+b") as file:
        file.seek(HEADER_BYTES + 64)
        file.write(b"\x01")
    pair = (good, tmp_path / "d") if side else (tmp_path / "d", good)
    with pytest.raises(DumpError, match="rule CHECKSUM"):
        compare_dumps(*pair)


@pytest.mark.parametrize("damaged", ["r", "c"])
def test_damage_in_a_large_tensor_is_found(tmp_path, damaged):
    array = np.zeros(200_000, np.float32)
    reference = write(tmp_path / "r", ({}, {"y": array}))
    candidate = write(tmp_path / "c", ({}, {"y": array}))
    with (tmp_path / damaged / "decode" / "body.out.y.npy").open("r+b") as file:
        file.seek(HEADER_BYTES + 700_001)
        file.write(b"\x01")
    with pytest.raises(DumpError, match="rule CHECKSUM"):
        compare_dumps(reference, candidate)


def test_inputs_that_repeat_are_compared(tmp_path):
    cross = np.random.default_rng(0).standard_normal((1, 2, 9, 4), dtype=np.float32)
    name = "cross_past_key_values.0.key"
    reference = write(tmp_path / "r", *[({name: cross}, {}) for _ in range(3)])
    off = cross + np.float32(0.1)
    candidate = write(tmp_path / "c", *[({name: x}, {}) for x in (cross, off, off)])
    (tensor,) = compare_dumps(reference, candidate).tensors
    assert tensor.step_passed.tolist() == [True, False, False]
    assert compare_dumps(reference, reference).passed


@pytest.mark.parametrize(
    ("limits", "passed"),
    [
        ("atol:0.02", True),
        ("atol:0.001", False),
        ("rtol:0.02", True),
        ("rtol:0.001", False),
        ("peak:0.002", True),
        ("peak:0.0001", False),
        ("sqnr:50", True),
        ("sqnr:90", False),
        ("cosine:0.9999", True),
        ("cosine:0.99999999999", False),
        ("peak:0.002,sqnr:90", False),
    ],
)
def test_each_limit_passes_and_fails(tmp_path, limits, passed):
    reference = np.float32([1, 2, 10])
    candidate = reference + np.float32([0.01, 0, 0])
    tolerances = Tolerances.parse([f"body.out.*={limits}"])
    assert compare_arrays(tmp_path, reference, candidate, tolerances=tolerances).passed is passed


def test_the_api_gives_plain_json(good, bad):
    value = compare_dumps(good, bad).to_json()
    assert json.loads(json.dumps(value, allow_nan=False)) == value
    assert value["first_divergence"]["layer"] == 2
    assert value["passed"] is False
    tensor = next(t for t in value["tensors"] if t["name"] == value["first_divergence"]["tensor"])
    assert len(tensor["by_step"]["step"]) == tensor["steps_compared"]


@pytest.mark.parametrize("layer", [0, 2, 4])
def test_a_fault_too_small_for_a_tolerance_is_named_when_all_before_it_is_equal(
    good, stack, tmp_path, layer
):
    """Runs of one backend: what is within tolerance in its own layer may fail in a later one."""
    candidate = stack(tmp_path / "c", wrong_layer=layer, fault=1e-6)
    comparison = compare_dumps(good, candidate)
    assert comparison.passed
    assert comparison.first_difference.layer == layer
    assert comparison.origin is comparison.first_difference
    (line,) = [line for line in describe_verdict(comparison) if line.startswith("First difference")]
    name = f"body.out.hidden_states.layer-{layer:02d}"
    assert line.startswith(f"First difference: layer {layer}, {name} in prefill-0000, by ")
    assert comparison.to_json()["first_difference"]["layer"] == layer


def test_a_first_difference_that_may_be_rounding_is_not_pointed_out(good, stack, tmp_path):
    candidate = stack(tmp_path / "c", wrong_layer=0, fault=1e-6)
    manifest = candidate / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"backend": "numpy"', '"backend": "other"'))
    comparison = compare_dumps(good, candidate)
    assert comparison.first_difference.layer == 0
    assert comparison.origin is None
    assert compare_dumps(good, good).first_difference is None
    large = compare_dumps(good, stack(tmp_path / "d", wrong_layer=2))
    assert large.first_difference.tensor == large.first_divergence.tensor
    assert large.origin is None


def test_an_old_row_that_a_whole_cache_spoils_is_seen(tmp_path):
    rng, cache = np.random.default_rng(0), np.zeros((1, 2, 0, 4), np.float32)
    with (
        DumpWriter(tmp_path / "delta", {}) as delta,
        DumpWriter(tmp_path / "full", {}, DumpOptions(kv="full")) as full,
        DumpWriter(tmp_path / "spoilt", {}, DumpOptions(kv="full")) as spoilt,
    ):
        for index in range(4):
            inputs = {"inputs_embeds": np.ones((1, 1, 3), np.float32)}
            inputs["past_key_values.0.key"] = cache
            row = rng.standard_normal((1, 2, 1, 4)).astype(np.float32)
            cache = np.concatenate([cache, row], axis=2)
            wrong = cache.copy()
            if index == 3:
                wrong[0, 1, 1, 2] += 1
            for writer, array in ((delta, cache), (full, cache), (spoilt, wrong)):
                writer.step("decode", index, "body", inputs, {"present.0.key": array})
    globs = ["*.out.*"]
    assert compare_dumps(tmp_path / "delta", tmp_path / "full", tensors=globs).passed
    for one, two in (("delta", "spoilt"), ("spoilt", "delta")):
        comparison = compare_dumps(tmp_path / one, tmp_path / two, tensors=globs)
        assert not comparison.passed
        (tensor,) = comparison.tensors
        assert tensor.first_failure.step == "decode-0003"
        assert tensor.first_failure.max_abs_at == (0, 1, 1, 2)


def test_a_dump_of_a_lower_precision_has_the_limits_of_that(tmp_path):
    def dump(name, **provenance):
        values = np.linspace(-1, 1, 64, dtype=np.float32).reshape(1, 64)
        values = values.astype(np.float16).astype(np.float32) + (name != "one") * 0.002
        with DumpWriter(tmp_path / name, provenance) as writer:
            writer.step("prefill", 0, "body", {"x": values}, {"y": values}, past_length=0)
        return tmp_path / name

    one = dump("one")
    assert not compare_dumps(one, dump("plain")).passed
    comparison = compare_dumps(one, dump("half", precision="float16"))
    assert comparison.passed
    assert comparison.notes == ["the candidate computes in float16: limits peak:0.03,sqnr:40"]
    assert not compare_dumps(one, dump("unknown", precision="float4")).passed
    strict = Tolerances.parse(["*=peak:0.0001"])
    assert not compare_dumps(one, tmp_path / "half", tolerances=strict).passed
