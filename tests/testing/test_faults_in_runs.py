"""Each check of runs fails on a plugin that is made wrong for it; a sound one passes them all.

A fault is a plugin, a suite, a flow or sessions that differ from sound ones in one thing, on the
sound export.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from conformance_faults import Fault, checks_of, cut_like, expect_seen, run_check, subject_of
from qeff_proxy.artifact.hashes import hash_weights_file
from qeff_proxy.load.safetensors_header import read_header
from qeff_proxy.testing import FamilySuite
from qeff_proxy.testing.run_checks import RunChecks


class Wrapped:
    """A session that does something else than it is asked."""

    def __init__(self, session, change):
        self.session, self.change = session, change

    def run(self, feeds):
        return self.change(self.session, dict(feeds))

    def close(self):
        self.session.close()


def on(part, change):
    return lambda session, name: Wrapped(session, change) if name == part else session


def scaled(session, feeds):
    return {name: value * np.float32(1.01) for name, value in session.run(feeds).items()}


def positions_of_decode_steps_moved(session, feeds):
    if feeds["past_key_values.0.key"].shape[2]:
        feeds["position_ids"] = feeds["position_ids"] + 1
    return session.run(feeds)


def deaf(session, feeds):
    return {name: np.zeros_like(value) for name, value in session.run(feeds).items()}


def blind_to_earlier_chunks(session, feeds):
    past = feeds["past_key_values.0.key"].shape[2]
    if past and feeds["inputs_embeds"].shape[1] > 1:
        feeds["attention_mask"][..., :past] = np.finfo(np.float32).min
    return session.run(feeds)


def padding_is_seen(session, feeds):
    total = feeds["attention_mask"].shape[-1]
    query = feeds["attention_mask"].shape[-2]
    later = np.triu(np.ones((query, total), bool), total - query + 1)
    lowest = np.finfo(np.float32).min
    feeds["attention_mask"] = np.broadcast_to(
        np.where(later, lowest, np.float32(0)), feeds["attention_mask"].shape
    ).astype(np.float32)
    return session.run(feeds)


def rows_mixed(session, feeds):
    feeds["inputs_embeds"] = (
        feeds["inputs_embeds"].mean(0, keepdims=True).repeat(len(feeds["inputs_embeds"]), 0)
    )
    return session.run(feeds)


def noisy(session, feeds):
    noise = np.random.default_rng().standard_normal()
    return {name: value + np.float32(noise * 1e-3) for name, value in session.run(feeds).items()}


def preprocess_anything(processor, request):
    return {"input_ids": torch.ones(1, 3, dtype=torch.int64)}


def preprocess_ever_more(processor, request):
    """It keeps what it was asked, in the processor."""
    processor.model_max_length -= 1
    return {"input_ids": torch.ones(1, processor.model_max_length % 7 + 1, dtype=torch.int64)}


def decode_with_a_processor(processor, outputs):
    return processor.batch_decode(outputs["generated_ids"])


def reseed(proxy, **_):
    torch.manual_seed(torch.initial_seed() + 1)


def exchange_the_last_layers(export):
    """A fault of an export that only depth can have: two layers got each other's weights."""
    path = export.folder / "body.safetensors"
    data, places = bytearray(path.read_bytes()), read_header(path)
    for name in [name for name in places if ".h.3." in name]:
        one, other = (
            slice(place.offset, place.offset + place.length)
            for place in (places[name], places[name.replace(".h.3.", ".h.4.")])
        )
        data[one], data[other] = data[other], data[one]
    path.write_bytes(data)
    export = dataclasses.replace(
        export, hashes={**export.hashes, path.name: hash_weights_file(path)}
    )
    export.write_manifest()
    return export


RUNS = [
    Fault(
        "onnx_runtime_gives_what_pytorch_gives",
        "ONNX Runtime and PyTorch differ",
        session=on("lm_head", scaled),
    ),
    Fault(
        "prefill_and_decode_steps_equal_one_pass",
        "decode steps differ from one pass",
        session=on("body", positions_of_decode_steps_moved),
    ),
    Fault("the_input_matters", "two different inputs give the same", session=on("embedding", deaf)),
    Fault(
        "a_prompt_in_chunks_gives_the_same",
        "in chunks gives something else",
        session=on("body", blind_to_earlier_chunks),
    ),
    Fault(
        "padding_changes_nothing",
        "padding changes what a row gives",
        session=on("body", padding_is_seen),
    ),
    Fault(
        "a_batch_gives_what_its_rows_give_alone",
        "row 0 gives something else in a batch",
        session=on("body", rows_mixed),
    ),
    Fault(
        "a_batch_gives_what_its_rows_give_alone",
        "Let make_inputs give at least two",
        suite={"make_inputs": lambda self, model: FamilySuite.make_inputs(self, model)[:1]},
    ),
    Fault(
        "two_runs_give_the_same_bits",
        "the same run again gives something else",
        session=on("body", noisy),
    ),
    Fault(
        "a_dump_is_complete_and_can_be_read",
        "lacks .'last_hidden_state'.* of the lm_head part",
        flow="faulty-headless",
    ),
    Fault(
        "recorded_inputs_and_outputs_belong_together",
        "does not give its recorded outputs",
        flow="faulty-late",
    ),
    Fault("a_stub_is_not_decoded", "running a stub said 'nothing'", flow="faulty-careless"),
    Fault(
        "a_request_without_input_is_refused",
        "a request without input was run",
        {"preprocess": preprocess_anything},
    ),
    Fault(
        "every_backend_gives_the_same",
        "gives something else than ONNX Runtime",
        flow="faulty-unsteady",
    ),
    Fault(
        "verify_passes",
        "verify failed on onnxruntime: FAILED.*layer 3",
        suite={"plugin": None},
        export=exchange_the_last_layers,
    ),
    Fault(
        "the_processors_request_becomes_tensors",
        "other tensors when it is called again",
        {"preprocess": preprocess_ever_more},
    ),
    Fault(
        "outputs_become_what_the_user_wanted",
        "failed in decode.*NoneType",
        {"decode": decode_with_a_processor},
    ),
    Fault("outputs_become_what_the_user_wanted", "decode gave None", suite={"silent": True}),
    Fault("no_global_state_is_left", "torch's random seed", cut_like(reseed)),
]

FAULTS = [dataclasses.replace(fault, runs=True) for fault in RUNS]


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.check)
def test_a_check_fails_on_its_fault(fault, sound, tmp_path):
    expect_seen(fault, sound, tmp_path)


def test_every_check_has_its_fault():
    assert {fault.check for fault in FAULTS} == checks_of([RunChecks])


def test_a_sound_family_passes_every_check(sound, tmp_path):
    subject = subject_of(Fault("", ""), sound, tmp_path / "sound", type(sound.suite))
    subject.__dict__.update(
        model=sound.model, loaded=sound.loaded, cut=sound.cut, sessions=sound.sessions
    )
    subject.__dict__.update(checkpoint=sound.checkpoint, export=sound.export)
    unneeded = {"that_there_is_no_token_embedding_is_said", "that_there_is_no_lm_head_is_said"}
    by_whom = {"the_manifest_names_the_plugin"}  # the sound export was made by the generic plugin
    for name in sorted(checks_of([FamilySuite]) - unneeded - by_whom):
        folder = tmp_path / name
        folder.mkdir()
        run_check(name, subject, folder)
