"""Describe an image with a proxy of a vision-language model, and write every tensor to disk.

    python image_model.py [standard|internvl|molmo] [MODEL] [--image FILE] [--prompt TEXT]

Choose by how the model is called: ``standard`` is any model with a processor in transformers
(LLaVA, Gemma3, Granite Vision, Molmo2, InternVL "-hf"); ``internvl`` and ``molmo`` are checkpoints
with code of their own, which is run. MODEL is a hub id or a local folder.
"""

from __future__ import annotations

import argparse
from typing import Any

from PIL import Image
from qeff_proxy import QEFFAutoModelForCausalLM, QEFFAutoModelForImageTextToText, Request
from qeff_proxy_vision.images import open_image
from qeff_proxy_vision.internvl_chat import preprocess as preprocess_internvl
from transformers import AutoProcessor, AutoTokenizer

MODELS = {
    "standard": "llava-hf/llava-1.5-7b-hf",
    "internvl": "OpenGVLab/InternVL2_5-1B",
    "molmo": "allenai/Molmo-7B-D-0924",
}


def compile_and_generate(model: Any, inputs: Any, tokenizer: Any, length: int) -> None:
    model.compile(num_devices=1, prefill_seq_len=128, ctx_len=2048, num_patches=1)
    result = model.generate(inputs=inputs, generation_len=length, write_io=True)
    print(tokenizer.batch_decode(result.generated_ids, skip_special_tokens=True)[0])
    print(f"inputs and outputs of every step: {result.io_folder}")


def run_standard(name: str, image: Image.Image, prompt: str, length: int) -> None:
    model = QEFFAutoModelForImageTextToText.from_pretrained(
        name, kv_offload=True, enable_proxy=True
    )
    processor = AutoProcessor.from_pretrained(name)
    content = [{"type": "image"}, {"type": "text", "text": prompt}]
    text = processor.apply_chat_template(
        [{"role": "user", "content": content}], add_generation_prompt=True
    )
    inputs = processor(images=image, text=text, return_tensors="pt")
    compile_and_generate(model, inputs, processor.tokenizer, length)


def run_internvl(name: str, image: Image.Image, prompt: str, length: int) -> None:
    model = QEFFAutoModelForCausalLM.from_pretrained(
        name, kv_offload=True, enable_proxy=True, trust_remote_code=True
    )
    tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=True)
    # These checkpoints have no processor: the plugin cuts the image into tiles.
    inputs = preprocess_internvl(tokenizer, Request(prompts=[prompt], images=[image]))
    compile_and_generate(model, inputs, tokenizer, length)


def run_molmo(name: str, image: Image.Image, prompt: str, length: int) -> None:
    model = QEFFAutoModelForCausalLM.from_pretrained(
        name, kv_offload=True, enable_proxy=True, trust_remote_code=True
    )
    # The checkpoint's own processor, made to run without torchvision and TensorFlow.
    processor = model.processor()
    inputs = processor.process(images=[image], text=prompt)
    compile_and_generate(model, inputs, processor.tokenizer, length)


def main() -> None:
    parser = argparse.ArgumentParser(description="Describe an image with a proxy.")
    parser.add_argument("flow", nargs="?", default="standard", choices=sorted(MODELS))
    parser.add_argument("model", nargs="?", help="hub id or local folder")
    parser.add_argument("--image", help="path or URL; by default a red disc")
    parser.add_argument("--prompt", default="Describe this image.")
    parser.add_argument("--generation-len", type=int, default=10)
    args = parser.parse_args()

    image = open_image(args.image) if args.image else red_disc()
    flows = {"standard": run_standard, "internvl": run_internvl, "molmo": run_molmo}
    flows[args.flow](args.model or MODELS[args.flow], image, args.prompt, args.generation_len)


def red_disc() -> Image.Image:
    from PIL import ImageDraw

    image = Image.new("RGB", (224, 224), "white")
    ImageDraw.Draw(image).ellipse((40, 40, 184, 184), fill="red")
    return image


if __name__ == "__main__":
    main()
