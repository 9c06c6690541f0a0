"""A processor with the habits of Molmo's own, written for these tests.

Like that, it imports torchvision for nothing, resizes with TensorFlow, which it imports as it runs,
fails without an image, and places the features of each image at the first one's tokens.
"""

import numpy as np
import torch
import torchvision.transforms  # noqa: F401
from torchvision.transforms import InterpolationMode  # noqa: F401
from torchvision.transforms.functional import convert_image_dtype  # noqa: F401
from transformers import AutoTokenizer
from transformers.processing_utils import ProcessorMixin

PATCH, SIDE, TOKEN, START = 7, 28, 126, 127


def resize(image):
    import tensorflow as tf

    image = tf.image.convert_image_dtype(tf.constant(image), dtype=tf.float32)
    method = tf.image.ResizeMethod.BILINEAR
    image = tf.image.resize(image, [SIDE, SIDE], method=method, antialias=True)
    return tf.clip_by_value(image, 0.0, 1.0).numpy()


class MolmoProcessor(ProcessorMixin):
    tokenizer_class = "AutoTokenizer"

    def __init__(self, tokenizer: AutoTokenizer = None, **kwargs):
        super().__init__(tokenizer)

    def get_tokens_input(self, prompt, message_format, always_start_with_space):
        prompt = "User: " + prompt + " Assistant:" if message_format == "role" else prompt
        return self.tokenizer.encode(prompt, add_special_tokens=False)

    def process(self, text=None, images=None, **kwargs):
        tokens = self.get_tokens_input(text, "role", True)
        crops, places, ids = [], [], []
        for image in images:
            pixels = resize(np.array(image).astype(np.uint8))
            across = SIDE // PATCH
            pixels = pixels.reshape(across, PATCH, across, PATCH, 3).transpose(0, 2, 1, 3, 4)
            crops.append(pixels.reshape(1, across * across, -1))
            places.append(np.arange(4)[None])
            ids += [TOKEN] * 4 + [START]
        out = {
            "input_ids": np.pad(np.array(ids + tokens), [[1, 0]], constant_values=START),
            "images": np.concatenate(crops),
            "image_masks": np.ones((len(crops), 16), np.float32),
            "image_input_idx": np.concatenate(places) + 1,
        }
        return {name: torch.from_numpy(value) for name, value in out.items()}
