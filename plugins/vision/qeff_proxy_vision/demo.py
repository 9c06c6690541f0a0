"""The demos of this package.

``llava`` describes a drawing. The other families have no small trained checkpoint: they run with
tiny random weights and an image of noise, to show that they compute the same as PyTorch.
"""

from __future__ import annotations

import shutil
import tempfile
import weakref
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from qeff_proxy.arrays import to_array
from qeff_proxy.demo.demos import Demo
from qeff_proxy.demo.parity import Parity, parity_of_logits
from qeff_proxy.request import Request

from qeff_proxy_vision.images import DRAWING, QUESTION
from qeff_proxy_vision.reference import model_logits

if TYPE_CHECKING:
    import torch
    from qeff_proxy.dump import Dump
    from qeff_proxy.run.run_compiled import RunResult
    from transformers import PreTrainedModel

__all__ = ["gemma3", "granite4_vision", "internvl", "llava", "llava_next", "molmo2"]

_CHECKPOINT = Path(__file__).parent / "checkpoints" / "tiny-llava"
_NEW_TOKENS = 8


def llava() -> Demo:
    """LLaVA 1.5: an image file and a question to a sentence."""
    return Demo(
        checkpoint=_CHECKPOINT,
        request=Request(prompts=(QUESTION,), images=(DRAWING,)),
        given=f"{DRAWING.name}: {QUESTION}",
        parity=_drawing_parity,
        shown=lambda result: f"{DRAWING}\n{QUESTION} {result.decoded[0]}",
        settings={"max_new_tokens": 12, "do_sample": False},
    )


def llava_next() -> Demo:
    """LLaVA-NeXT with a Granite language model, like Granite Vision."""
    return _random_demo("llava_next")


def granite4_vision() -> Demo:
    """Granite 4 Vision."""
    return _random_demo("granite4_vision")


def gemma3() -> Demo:
    """Gemma 3."""
    return _random_demo("gemma3")


def internvl() -> Demo:
    """InternVL in transformers."""
    return _random_demo("internvl")


def molmo2() -> Demo:
    """Molmo 2."""
    return _random_demo("molmo2")


def _drawing_parity(model: PreTrainedModel, dump: Dump) -> Parity:
    """The checkpoint's processor and the uncut model, without anything of this package."""
    from PIL import Image
    from transformers import AutoProcessor

    processor = AutoProcessor.from_pretrained(_CHECKPOINT)
    content = [{"type": "image"}, {"type": "text", "text": QUESTION}]
    prompt = processor.apply_chat_template(
        [{"role": "user", "content": content}], add_generation_prompt=True
    )
    with Image.open(DRAWING) as image:
        tensors = processor(text=prompt, images=image, return_tensors="pt")
    return _parity(tensors, model, dump)


def _random_demo(family: str) -> Demo:
    from qeff_proxy_vision import tiny

    prompt = tiny.make_prompt(family, [2])
    base = Path(tempfile.mkdtemp(prefix="qeff-proxy-demo-"))
    folder = base / f"tiny-random-{family.replace('_', '-')}"
    _save(tiny.make_model(family), folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(_CHECKPOINT / name, folder / name)
    demo = Demo(
        checkpoint=folder,
        request=Request(inputs=prompt),
        given="two images of noise, and random tokens",
        parity=partial(_parity, prompt),
        shown=_tokens,
        settings={"max_new_tokens": _NEW_TOKENS, "do_sample": False, "eos_token_id": None},
    )
    weakref.finalize(demo, shutil.rmtree, base)
    return demo


def _save(model: PreTrainedModel, folder: Path) -> None:
    """Save a model without output on the terminal."""
    from transformers.utils import logging

    showed_bars = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        model.save_pretrained(folder)
    finally:
        if showed_bars:
            logging.enable_progress_bar()


def _tokens(result: RunResult) -> str:
    ids = " ".join(map(str, result.outputs["generated_ids"][0].tolist()))
    return f"Random weights and two images of noise give the tokens {ids}"


def _parity(tensors: Mapping[str, torch.Tensor], model: PreTrainedModel, dump: Dump) -> Parity:
    """The uncut model on the same prompt and, step by step, the tokens of the dump."""
    steps = [step for step in dump.steps if step.phase == "decode"]
    pieces = [dump.array(step.phase, step.index, "embedding.in.input_ids") for step in steps]
    new = np.concatenate(pieces, axis=1)
    arrays = {name: to_array(tensor) for name, tensor in tensors.items()}
    expected = model_logits(model, arrays, new)[0, -new.shape[1] - 1 :]
    last = [step for step in dump.steps if step.phase == "prefill"][-1]
    actual = [
        dump.array(step.phase, step.index, "lm_head.out.logits")[0, -1].astype(np.float32)
        for step in (last, *steps)
    ]
    return parity_of_logits(expected, np.stack(actual))
