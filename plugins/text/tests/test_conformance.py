"""The conformance suite on families of the text package."""

from __future__ import annotations

from typing import ClassVar

from qeff_proxy.testing import Capabilities, FamilySuite
from qeff_proxy.testing.tiny import join_rows, pad_row
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


class Seq2SeqSuite(FamilySuite):
    """An encoder's texts are padded on the right; the decoder's ids are its own."""

    task = "seq2seq"
    auto_class = "AutoModelForSeq2SeqLM"
    capabilities = Capabilities(chunks=False)

    def supplies(self, name):
        return name.startswith("encoder_")

    def pad(self, row, count):
        return pad_row(row, count, left=False)

    def join(self, rows):
        return join_rows(rows, left=False)

    def one_pass(self, model, row, fed):
        import torch

        with torch.no_grad():
            outputs = model(**row, decoder_input_ids=torch.from_numpy(fed), use_cache=False)
        return outputs.logits.numpy()


class TestT5(Seq2SeqSuite):
    model_type = "t5"
    sizes: ClassVar = {"num_decoder_layers": 2, "d_kv": 8, "d_ff": 40, "decoder_start_token_id": 0}


class TestBart(Seq2SeqSuite):
    model_type = "bart"
    # Its positions are counted from the cache, so qnn, whose fixed shapes pad that, refuses it.
    verified_on = ("onnxruntime", "torch", "openvino")
    sizes: ClassVar = {
        "encoder_layers": 1,
        "decoder_layers": 2,
        "encoder_attention_heads": 4,
        "decoder_attention_heads": 4,
        "encoder_ffn_dim": 40,
        "decoder_ffn_dim": 48,
        "decoder_start_token_id": 2,
        "forced_eos_token_id": None,
    }
