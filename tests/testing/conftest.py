"""A sound family, and flows that are not, installed as packages install theirs."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from qeff_proxy.testing import Capabilities, FamilySuite
from qeff_proxy.testing.subject import Subject
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

sys.path.append(str(Path(__file__).parent))  # for what both files of faults share

WORDS = {word: index for index, word in enumerate(["<eos>", "a", "text", "of", "words"])}
FLOWS = ("Unverified", "Forgetful", "Headless", "Late", "Careless", "Unsteady")


class SoundSuite(FamilySuite):
    """A causal LM that the core's own plugin cuts."""

    model_type = "gpt2"
    capabilities = Capabilities(processor=True)
    layers = 5
    verified_on = ("onnxruntime",)  # the faults are the flow's, not a backend's

    def make_processor(self):
        tokenizer = Tokenizer(models.WordLevel(WORDS))
        tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
        return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>")


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Subject]:
    """The sound family, exported; tests take copies of what they change."""
    subject = Subject(SoundSuite(), tmp_path_factory.mktemp("sound"))
    yield subject
    subject.close()


@pytest.fixture(scope="session", autouse=True)
def faulty_flows(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """The flows of `faulty_flows`, as entry points of a package on the path."""
    folder = tmp_path_factory.mktemp("faulty-flows")
    info = folder / "faulty_flows-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: faulty-flows\nVersion: 1.0\n")
    lines = [f"faulty-{name.lower()} = conformance_faulty_flows:{name}" for name in FLOWS]
    (info / "entry_points.txt").write_text("\n".join(["[qeff_proxy.flows]", *lines, ""]))
    source = Path(__file__).with_name("faulty_flows.py").read_text(encoding="utf-8")
    (folder / "conformance_faulty_flows.py").write_text(source, encoding="utf-8")
    sys.path.insert(0, str(folder))
    yield
    sys.path.remove(str(folder))
    sys.modules.pop("conformance_faulty_flows", None)
