"""Train the tiny LLaVA of the vision package, and measure it on held-out drawings.

    python tools/train_tiny_llava.py [--steps N] [--output FOLDER]

The model describes a drawing: one of six colours, four shapes and five places, on backgrounds from
white to light grey, in many sizes, slightly off its place, with noise. Drawings are generated from
a seed; the held-out drawings use another seed.
"""

from __future__ import annotations

import argparse
import random
import time
from pathlib import Path

import torch
from PIL import Image, ImageDraw
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    CLIPImageProcessor,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

COLOURS = {
    "red": (214, 39, 40),
    "green": (44, 160, 44),
    "blue": (31, 90, 200),
    "yellow": (240, 200, 30),
    "purple": (148, 60, 189),
    "black": (20, 20, 20),
}
SHAPES = ("circle", "square", "triangle", "cross")
PLACES = {
    "on the left": (0.24, 0.5),
    "on the right": (0.76, 0.5),
    "at the top": (0.5, 0.24),
    "at the bottom": (0.5, 0.76),
    "in the middle": (0.5, 0.5),
}
QUESTION = "What is this ?"
SIDE, PATCH = 48, 8
SPECIAL = ["<pad>", "<eos>", "<unk>", "<image>"]
WORDS = [*SPECIAL, "USER:", "ASSISTANT:", *QUESTION.split(), "a", *COLOURS, *SHAPES]
WORDS += sorted({word for place in PLACES for word in place.split()} - set(WORDS))
TEMPLATE = (
    "{% for message in messages %}{{ message['role'].upper() + ':' }} "
    "{% for item in message['content'] %}{% if item['type'] == 'image' %}<image> "
    "{% else %}{{ item['text'] }} {% endif %}{% endfor %}{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)
OUTPUT = Path(__file__).parents[1] / "plugins/vision/qeff_proxy_vision/checkpoints/tiny-llava"


def draw(generator: random.Random, size: int = 96) -> tuple[Image.Image, str]:
    """A drawing of ``size`` x ``size`` pixels, and what it shows."""
    colour, shape = generator.choice(list(COLOURS)), generator.choice(SHAPES)
    place = generator.choice(list(PLACES))
    background = generator.randint(225, 255)
    image = Image.new("RGB", (size, size), (background,) * 3)
    shade = tuple(min(255, max(0, part + generator.randint(-18, 18))) for part in COLOURS[colour])
    x, y = (part * size + generator.uniform(-0.04, 0.04) * size for part in PLACES[place])
    radius = generator.uniform(0.13, 0.2) * size
    pen = ImageDraw.Draw(image)
    if shape == "circle":
        pen.ellipse((x - radius, y - radius, x + radius, y + radius), fill=shade)
    elif shape == "square":
        pen.rectangle((x - radius, y - radius, x + radius, y + radius), fill=shade)
    elif shape == "triangle":
        points = [(x, y - radius), (x - radius, y + radius), (x + radius, y + radius)]
        pen.polygon(points, fill=shade)
    else:
        arm = radius * 0.35
        pen.rectangle((x - radius, y - arm, x + radius, y + arm), fill=shade)
        pen.rectangle((x - arm, y - radius, x + arm, y + radius), fill=shade)
    return image, f"a {colour} {shape} {place}"


def make_processor() -> LlavaProcessor:
    """A word-level tokenizer and CLIP's image processing, without torchvision."""
    tokenizer = Tokenizer(
        models.WordLevel({word: index for index, word in enumerate(WORDS)}, "<unk>")
    )
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        **{f"{name}_token": f"<{name}>" for name in ("pad", "eos", "unk")},
        additional_special_tokens=["<image>"],
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )
    size = {"height": SIDE, "width": SIDE}
    return LlavaProcessor(
        CLIPImageProcessor(size=size, crop_size=size),
        fast,
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=TEMPLATE,
    )


def make_model() -> LlavaForConditionalGeneration:
    """About 0.4 million weights."""
    config = LlavaConfig(
        vision_config={
            "model_type": "clip_vision_model",
            "hidden_size": 64,
            "intermediate_size": 192,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "image_size": SIDE,
            "patch_size": PATCH,
            "projection_dim": 64,
        },
        text_config={
            "model_type": "llama",
            "hidden_size": 96,
            "intermediate_size": 256,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "vocab_size": len(WORDS),
            "max_position_embeddings": 256,
            "tie_word_embeddings": False,
            "pad_token_id": 0,
            "bos_token_id": None,
            "eos_token_id": 1,
        },
        image_token_id=WORDS.index("<image>"),
        image_seq_length=(SIDE // PATCH) ** 2,
        vision_feature_layer=-2,
    )
    model = LlavaForConditionalGeneration(config)
    model.generation_config.eos_token_id = 1
    model.generation_config.pad_token_id = 0
    return model


def pixels_of(processor: LlavaProcessor, images: list[Image.Image]) -> torch.Tensor:
    """``[images, 3, SIDE, SIDE]``, like the processor's output."""
    return processor.image_processor(images, return_tensors="pt")["pixel_values"]


def train(
    model: LlavaForConditionalGeneration, processor: LlavaProcessor, steps: int, batch: int
) -> None:
    """Train on the tokens of the answers only."""
    generator = random.Random(0)  # noqa: S311 (drawings, not secrets)
    content = [{"type": "image"}, {"type": "text", "text": QUESTION}]
    prompt = processor.apply_chat_template(
        [{"role": "user", "content": content}], add_generation_prompt=True
    )
    blank = Image.new("RGB", (SIDE, SIDE))
    question = processor(images=blank, text=prompt, return_tensors="pt")["input_ids"]
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps)
    model.train()
    start = time.monotonic()
    for step in range(steps):
        drawn = [draw(generator) for _ in range(batch)]
        pixels = pixels_of(processor, [image for image, _ in drawn])
        pixels = pixels + torch.randn_like(pixels) * 0.05
        answers = processor.tokenizer([f"{text} <eos>" for _, text in drawn], return_tensors="pt")
        ids = torch.cat([question.expand(batch, -1), answers["input_ids"]], dim=1)
        length = answers["input_ids"].shape[1]
        logits = model(input_ids=ids, pixel_values=pixels).logits[:, -length - 1 : -1]
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, -length:].flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 100 == 0 or step == steps - 1:
            print(
                f"step {step} loss {loss.item():.4f} {time.monotonic() - start:.0f} s", flush=True
            )
    model.eval()


def measure(model: LlavaForConditionalGeneration, processor: LlavaProcessor, count: int) -> float:
    """The share of held-out drawings whose description is entirely right."""
    generator = random.Random(1)  # noqa: S311 (drawings, not secrets)
    content = [{"type": "image"}, {"type": "text", "text": QUESTION}]
    prompt = processor.apply_chat_template(
        [{"role": "user", "content": content}], add_generation_prompt=True
    )
    right = 0
    for _ in range(count // 50):
        drawn = [draw(generator, generator.choice((48, 96, 200))) for _ in range(50)]
        images = [[image] for image, _ in drawn]
        inputs = processor(images=images, text=[prompt] * 50, return_tensors="pt")
        with torch.no_grad():
            output = model.generate(**inputs, max_new_tokens=8, do_sample=False)
        texts = processor.batch_decode(
            output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True
        )
        right += sum(text == answer for text, (_, answer) in zip(texts, drawn, strict=True))
    return right / (count // 50 * 50)


def main() -> None:
    """Train, measure and save."""
    parser = argparse.ArgumentParser(description="Train the tiny LLaVA.")
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--batch", type=int, default=40)
    parser.add_argument("--output", type=Path, default=OUTPUT)
    args = parser.parse_args()
    torch.manual_seed(0)
    processor = make_processor()
    model = make_model()
    count = sum(parameter.numel() for parameter in model.parameters())
    print(f"{count} weights, {len(WORDS)} words")
    train(model, processor, args.steps, args.batch)
    print(f"right on {measure(model, processor, 1000):.1%} of 1000 held-out drawings")
    model.save_pretrained(args.output)
    processor.save_pretrained(args.output)


if __name__ == "__main__":
    main()
