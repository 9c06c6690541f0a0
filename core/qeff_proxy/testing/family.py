"""What a model family declares for its conformance suite."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import transformers
from transformers import PreTrainedConfig, PreTrainedModel

from qeff_proxy.arrays import Array, to_array, to_tensor
from qeff_proxy.compile_options import CompileOptions
from qeff_proxy.request import Request
from qeff_proxy.testing.tiny import (
    deepen_config,
    join_rows,
    pad_row,
    random_ids,
    random_weights,
    tiny_config,
)


@dataclass(frozen=True)
class Capabilities:
    """What a family has and can do.

    Attributes:
        embedding: The input is token ids, with an embedding that is cut out.
        head: The output is logits, with a head that is cut off.
        cache: It runs in prefill and decode steps.
        chunks: A prompt can be run in chunks.
        padding: A row can be padded: on the left with a cache, else on the right.
        batch: Several rows can run together.
        images: It takes images.
        audio: It takes sound.
        processor: The suite implements ``make_processor`` and ``make_request``.
        streams: The first layers can be exported without loading the others.
    """

    embedding: bool = True
    head: bool = True
    cache: bool = True
    chunks: bool = True
    padding: bool = True
    batch: bool = True
    images: bool = False
    audio: bool = False
    processor: bool = False
    streams: bool = True

    @property
    def no_embedding(self) -> bool:
        """The input is not token ids."""
        return not self.embedding

    @property
    def no_head(self) -> bool:
        """The output is not logits."""
        return not self.head

    @property
    def vocabulary(self) -> bool:
        """There is an embedding or a head to cut off."""
        return self.embedding or self.head


CAUSAL_LM = Capabilities()
ENCODER = Capabilities(head=False, cache=False, chunks=False)
CTC = Capabilities(embedding=False, cache=False, chunks=False, audio=True)
SPEECH_SEQ2SEQ = Capabilities(chunks=False, padding=False, audio=True)
IMAGE_TEXT_TO_TEXT = Capabilities(images=True)
LENGTHS = (7, 5)


class Family:
    """What the suite needs to know of a family; an author overrides what differs.

    Attributes:
        model_type: The model type whose plugin is tested.
        task: The flow, if a package claims ``MODEL_TYPE/TASK``.
        capabilities: What the family has and can do.
        auto_class: The transformers auto class that creates the model.
        plugin: The module or object with the hooks, if it is not installed.
        sizes: Changes to the sizes of the tiny config.
        layers: Layers of the tiny model: enough that some are streamed and cloned. An encoder or a
            tower has two fewer. 0 keeps the config's numbers.
        taps: Layer outputs to add to the export; ``""`` for a model without a list of layers.
        options: The options of ``build_proxy``.
        settings: The settings of the flow, such as the number of tokens.
        tolerance: Largest difference of an element, over the largest element of its tensor.
        backends: The backends whose results are compared element by element.
        verified_on: The backends that ``verify`` compares; by default all that are installed.
    """

    model_type: ClassVar[str]
    task: ClassVar[str | None] = None
    capabilities: ClassVar[Capabilities] = CAUSAL_LM
    auto_class: ClassVar[str] = "AutoModelForCausalLM"
    plugin: ClassVar[object | None] = None
    sizes: ClassVar[Mapping[str, Any]] = {}
    layers: ClassVar[int] = 6
    taps: ClassVar[str] = "layers"
    options: ClassVar[Mapping[str, Any]] = {}
    settings: ClassVar[Mapping[str, Any]] = {}
    tolerance: ClassVar[float] = 1e-4
    backends: ClassVar[Sequence[str]] = ("onnxruntime",)
    verified_on: ClassVar[Sequence[str]] = ()

    def make_config(self) -> PreTrainedConfig:
        """A config of small sizes (`tiny_config`)."""
        return tiny_config(self.model_type, **self.sizes)

    def make_model(self) -> PreTrainedModel:
        """A tiny model with random weights, norms and biases too."""
        config = self.make_config()
        if self.layers:
            config = deepen_config(config, self.layers)
        return random_weights(getattr(transformers, self.auto_class).from_config(config))

    def make_inputs(self, model: PreTrainedModel) -> Sequence[Mapping[str, torch.Tensor]]:
        """At least two inputs of one row each, of different lengths, by the parts' names."""
        ids = random_ids(self.vocabulary(model), LENGTHS)
        return [{"input_ids": row, "attention_mask": torch.ones_like(row)} for row in ids]

    def make_processor(self) -> Any:
        """The processor; needed with the capability ``processor``."""
        return None

    def make_request(self) -> Request:
        """A user's request; needed with the capability ``processor``."""
        return Request(prompts=["a text"])

    def vocabulary(self, model: PreTrainedModel) -> int:
        """The size of the vocabulary, which must differ from all other sizes of the model."""
        return int(model.config.get_text_config(decoder=True).vocab_size)

    def supplies(self, name: str) -> bool:  # noqa: ARG002 (what an override goes by)
        """Whether the flow creates this input of a part itself."""
        return False

    def pad(self, row: Mapping[str, torch.Tensor], count: int) -> Mapping[str, torch.Tensor]:
        """The row, padded by ``count`` positions on the family's side of padding."""
        return pad_row(row, count, left=self.capabilities.cache)

    def join(self, rows: Sequence[Mapping[str, torch.Tensor]]) -> Mapping[str, torch.Tensor]:
        """The rows as one batch."""
        return join_rows(rows, left=self.capabilities.cache)

    def other_input(self, row: Mapping[str, torch.Tensor]) -> Mapping[str, torch.Tensor]:
        """An input of the same shapes that must lead to another output."""
        changed = dict(row)
        for name, value in row.items():
            if value.is_floating_point():
                changed[name] = value.flip(-1) * 1.5
            elif name == "input_ids":
                changed[name] = torch.cat([value[:, :1], value[:, 1:].flip(1)], dim=1)
        return changed

    def one_pass(
        self, model: PreTrainedModel, row: Mapping[str, torch.Tensor], fed: Array
    ) -> Array:
        """Logits of the uncut model for a prompt and its generated tokens, in one pass.

        Args:
            model: The uncut model.
            row: The input from which the tokens were generated.
            fed: The token ids that the parts got, prompt included, ``[1, positions]``.

        Returns:
            ``[1, positions, vocabulary]`` float32.
        """
        known = inspect.signature(model.forward).parameters
        arguments = {name: value for name, value in row.items() if name in known}
        ids = to_tensor(fed)
        if "input_ids" in row:
            prompt = row["input_ids"]
            new = ids[:, prompt.shape[1] :]
            for name, value in arguments.items():
                if value.shape[:2] == prompt.shape:
                    fill = (
                        torch.ones_like(new) if name == "attention_mask" else torch.zeros_like(new)
                    )
                    arguments[name] = torch.cat([value, fill.to(value.dtype)], dim=1)
            arguments["input_ids"] = torch.cat([prompt, new], dim=1)
        else:
            arguments["decoder_input_ids"] = ids
        with torch.no_grad():
            return to_array(model(**arguments, use_cache=False).logits.float())

    def compile_options(self) -> CompileOptions:
        """Fixed sizes for the backends that need them."""
        if self.capabilities.cache:
            return CompileOptions(prefill_seq_len=8 if self.capabilities.chunks else None)
        return CompileOptions()
