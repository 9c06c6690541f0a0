"""The tasks: what each is called in Python, what it loads with and what it may be told.

Importing this imports nothing else, so that the command line's help can say it, too.
"""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Task:
    """What is known of a task before any model is.

    Attributes:
        face: The class in Python.
        auto_class: The transformers auto class that its checkpoints are loaded with.
        flows: The flows that the face's ``generate`` can run.
        extra: The pip extra that brings its families.
        unused: Globs of weights that it does not use, so that a checkpoint may lack them.
        options: What its ``build_proxy`` hooks may be told.
        without_encoder: The flow of those of its models whose config says that they are no
            encoder-decoders: they take sounds in the place of tokens. Empty: there are none.
    """

    face: str
    auto_class: str
    flows: tuple[str, ...]
    extra: str
    unused: tuple[str, ...] = ()
    options: tuple[str, ...] = field(default=())
    without_encoder: str = ""


#: By the pip extra, or a word behind it; in the order in which a checkpoint's class is looked for,
#: the most particular first.
TASKS = {
    "speech": Task(
        "QEFFAutoModelForSpeechSeq2Seq",
        "AutoModelForSpeechSeq2Seq",
        ("speech-seq2seq", "audio-text-to-text"),
        "audio",
        options=("audio_frames", "composer"),
        without_encoder="audio-text-to-text",
    ),
    # What stands in for the sound that training hides is often missing.
    "ctc": Task(
        "QEFFAutoModelForCTC", "AutoModelForCTC", ("ctc",), "audio", ("*.masked_spec_embed",)
    ),
    "vision": Task(
        "QEFFAutoModelForImageTextToText",
        "AutoModelForImageTextToText",
        ("image-text-to-text",),
        "vision",
        options=("kv_offload", "image_size", "audio_frames"),
    ),
    "seq2seq": Task(
        "QEFFAutoModelForSeq2SeqLM",
        "AutoModelForSeq2SeqLM",
        ("seq2seq", "audio-text-to-text"),
        "text",
        options=("audio_frames",),
        without_encoder="audio-text-to-text",
    ),
    "text": Task(
        "QEFFAutoModelForCausalLM",
        "AutoModelForCausalLM",
        ("causal-lm", "image-text-to-text"),
        "text",
        options=("kv_offload",),
    ),
    "classification": Task(
        "QEFFAutoModelForSequenceClassification",
        "AutoModelForSequenceClassification",
        ("classification",),
        "embedding",
    ),
    "token-classification": Task(
        "QEFFAutoModelForTokenClassification",
        "AutoModelForTokenClassification",
        ("classification",),
        "embedding",
    ),
    "masked-lm": Task(
        "QEFFAutoModelForMaskedLM", "AutoModelForMaskedLM", ("masked-lm",), "embedding"
    ),
    # A pooler is made for a pretraining task, and often missing; no vector comes from it.
    "embedding": Task(
        "QEFFAutoModel",
        "AutoModel",
        ("encoder",),
        "embedding",
        ("pooler.*",),
        ("pooling", "normalize", "truncate_dim"),
    ),
}

#: What the hooks of some task may be told: of embedders, and of models that take images or sounds.
CUT_OPTIONS = tuple(
    dict.fromkeys(option for task in reversed(TASKS.values()) for option in task.options)
)
#: Weights that no task uses: what may be missing where the task is not known.
UNUSED_WEIGHTS = tuple(glob for task in TASKS.values() for glob in task.unused)
