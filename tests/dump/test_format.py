from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from qeff_proxy.dump import TensorName
from qeff_proxy.dump.format import DTYPES, HEADER_BYTES, MAX_RANK, as_values, name_tensor
from qeff_proxy.dump.npy import build_header, parse_header
from qeff_proxy.errors import DumpError


@pytest.mark.parametrize(
    ("part", "side", "graph_name", "expected"),
    [
        ("body", "out", "present.7.key", "body.out.present_key.layer-07"),
        ("body", "in", "past_key_values.0.value", "body.in.past_key_values_value.layer-00"),
        ("body", "out", "hidden_states.11.attention", "body.out.hidden_states_attention.layer-11"),
        ("body", "out", "hidden_states.126", "body.out.hidden_states.layer-126"),
        ("body", "in", "inputs_embeds", "body.in.inputs_embeds"),
        ("encoder", "out", "cross_present.3.key", "encoder.out.cross_present_key.layer-03"),
        ("body", "out", "layers.2.experts.5.out", "body.out.layers_experts_5_out.layer-02"),
        ("body", "out", "past_key.0_RetainedState", "body.out.past_key_RetainedState.layer-00"),
        ("body", "out", "/model/Add_output_0", "body.out._model_Add_output_0"),
    ],
)
def test_graph_names_become_readable_names(part, side, graph_name, expected):
    name = name_tensor(part, side, graph_name)
    assert str(name) == expected
    assert TensorName.parse(expected) == name


@pytest.mark.parametrize("graph_name", ["", "7", "x" * 200])
def test_a_graph_name_without_letters_is_refused(graph_name):
    with pytest.raises(DumpError, match="no usable name"):
        name_tensor("body", "in", graph_name)


@pytest.mark.parametrize("part", ["", "Body", "a.b", "../x", "a b"])
def test_a_part_must_be_a_plain_word(part):
    with pytest.raises(DumpError, match="cannot name a part"):
        name_tensor(part, "in", "x")


@pytest.mark.parametrize(
    "text",
    ["body.out.x.layer-7", "body.out.x.layer-007", "body.side.x", "body.out.x\n", "body.out.é"],
)
def test_only_the_canonical_spelling_is_a_name(text):
    with pytest.raises(ValueError, match=r"form|canonical"):
        TensorName.parse(text)


@given(
    st.sampled_from([info.stored for info in DTYPES.values()]),
    st.lists(st.integers(0, 2**63 - 1), max_size=MAX_RANK + 1).map(tuple),
)
def test_every_header_has_one_size_and_is_read_back(stored, shape):
    header = build_header(stored, shape)
    assert len(header) == HEADER_BYTES
    assert parse_header(header) == (stored, shape)


def test_the_dtypes_of_ml_dtypes_survive_their_bits():
    for dtype in ("bfloat16", "float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz"):
        values = np.array([0.5, -2.0, 1.0], getattr(ml_dtypes, dtype))
        bits = values.view(DTYPES[dtype].stored)
        np.testing.assert_array_equal(as_values(bits, dtype), values)


@pytest.mark.parametrize("dtype", [d for d, info in DTYPES.items() if info.inexact])
def test_epsilon_is_the_step_after_one(dtype):
    kind = getattr(ml_dtypes, dtype, None) or np.dtype(dtype).type
    assert DTYPES[dtype].epsilon == float(ml_dtypes.finfo(kind).eps)
