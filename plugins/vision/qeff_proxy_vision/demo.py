"""The demos of this package.

``llava`` describes a drawing. The other families have no small trained checkpoint: they run with
tiny random weights and an image of noise, to show that they compute the same as PyTorch.
"""

from __future__ import annotations

import shutil
import tempfile
import weakref
from pathlib import Path
from typing import TYPE_CHECKING

from qeff_proxy.demo.demos import Demo
from qeff_proxy.request import Request

from qeff_proxy_vision.images import DRAWING, QUESTION

if TYPE_CHECKING:
    from qeff_proxy.run.run_compiled import RunResult
    from transformers import PreTrainedModel

__all__ = ["gemma3", "granite4_vision", "internvl", "llava", "llava_next", "molmo2"]

_CHECKPOINT = Path(__file__).parent / "checkpoints" / "tiny-llava"


def llava() -> Demo:
    """LLaVA 1.5: an image file and a question to a sentence."""
    return Demo(
        checkpoint=_CHECKPOINT,
        request=Request(prompts=(QUESTION,), images=(DRAWING,)),
        given=f"{DRAWING.name}: {QUESTION}",
        shown=lambda result: f"{DRAWING}\n{QUESTION} {result.decoded[0]}",
        max_new_tokens=12,
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
        shown=_tokens,
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
