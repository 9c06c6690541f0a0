"""The conformance suite on a family of the text package."""

from __future__ import annotations

from qeff_proxy.testing import Capabilities, FamilySuite
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

WORDS = {word: index for index, word in enumerate(["<eos>", "a", "text", "of", "words"])}


class TestGpt2(FamilySuite):
    model_type = "gpt2"
    capabilities = Capabilities(processor=True)
    backends = ("onnxruntime", "torch")

    def make_processor(self):
        tokenizer = Tokenizer(models.WordLevel(WORDS))
        tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
        return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>")
