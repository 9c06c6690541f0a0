"""Adapters that peft makes and merges, and the base models that they are for."""

from __future__ import annotations

import string
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast


def eager(base: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(base, attn_implementation="eager")


def make_adapter(base: Path, folder: Path, seed: int = 0, **settings: Any) -> Path:
    """A saved adapter whose tensors are all random."""
    config = LoraConfig(
        task_type="CAUSAL_LM", lora_alpha=settings.pop("lora_alpha", 16), **settings
    )
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    model.save_pretrained(folder)
    return folder


def merged_by_peft(base: Path, *adapters: Path) -> Any:
    model = PeftModel.from_pretrained(eager(base), adapters[0])
    for index, adapter in enumerate(adapters[1:]):
        model.load_adapter(adapter, str(index))
    names = ["default", *map(str, range(len(adapters) - 1))]
    return model.merge_and_unload(adapter_names=names).eval()


def letters() -> Any:
    """A tokenizer of letters."""
    vocabulary = {letter: index + 3 for index, letter in enumerate(string.printable[10:90])}
    tokenizer = Tokenizer(models.WordLevel({"<unk>": 0, **vocabulary}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="<unk>",
        pad_token="<unk>",
        return_token_type_ids=False,
    )
