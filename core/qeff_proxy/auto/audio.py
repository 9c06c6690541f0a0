"""The face of speech recognizers."""

from __future__ import annotations

from qeff_proxy.auto.base import NeedsPlugins

__all__ = ["QEFFAutoModelForCTC", "QEFFAutoModelForSpeechSeq2Seq"]


class QEFFAutoModelForSpeechSeq2Seq(NeedsPlugins):
    """A speech recognizer with encoder and decoder."""

    auto_class = "AutoModelForSpeechSeq2Seq"
    flows = frozenset({"speech-seq2seq"})
    extra = "audio"


class QEFFAutoModelForCTC(NeedsPlugins):
    """A speech recognizer with a CTC head."""

    auto_class = "AutoModelForCTC"
    flows = frozenset({"ctc"})
    extra = "audio"
