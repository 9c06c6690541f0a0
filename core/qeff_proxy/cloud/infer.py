"""``python -m qeff_proxy.cloud.infer``: QEfficient's, as ``qeff-proxy generate``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from qeff_proxy.common.file_errors import reading
from qeff_proxy.errors import ProxyError, UsageError

#: Its options → those of ``generate``.
_OBEYED = {
    "batch_size": "--batch-size",
    "prompt_len": "--prefill-seq-len",
    "ctx_len": "--ctx-len",
    "generation_len": "--max-new-tokens",
    "num_cores": "--num-cores",
}
#: What would change the answers: there is an option of ``generate`` for some.
_REFUSED = ("image_url", "full_batch_size", "config")


def translate(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """The arguments of ``qeff-proxy`` for those of QEfficient's program, and those left out.

    Raises:
        UsageError: There is no prompt, or an argument would change the answers.
        ArtifactError: The file with prompts cannot be read.
    """
    parser = argparse.ArgumentParser(prog="qeff_proxy.cloud.infer", allow_abbrev=False)
    parser.add_argument("--model-name", "--model_name", required=True)
    parser.add_argument("--prompt", type=lambda text: text.split("|"), default=[])
    parser.add_argument("--prompts_txt_file_path", "--prompts-txt-file-path", type=Path)
    parser.add_argument("--trust_remote_code", "--trust-remote-code", action="store_true")
    for name in (*_OBEYED, *_REFUSED):
        parser.add_argument(f"--{name}", f"--{name.replace('_', '-')}", dest=name)
    args, others = parser.parse_known_args(argv)
    for name in _REFUSED:
        if getattr(args, name) is not None:
            raise UsageError(f"--{name} cannot be obeyed", "See qeff-proxy generate --help.")
    prompts = [*args.prompt]
    if args.prompts_txt_file_path is not None:
        with reading(args.prompts_txt_file_path):
            text = args.prompts_txt_file_path.read_text(encoding="utf-8")
        prompts += [line.strip() for line in text.splitlines() if line.strip()]
    if not prompts:
        raise UsageError("there is no prompt", "Give --prompt TEXT.")
    words = ["generate"]
    for name, option in _OBEYED.items():
        if getattr(args, name) is not None:
            words += [option, getattr(args, name)]
    if args.trust_remote_code:
        words.append("--trust-remote-code")
    words += ["--", args.model_name, *prompts]
    return words, [word for word in others if word.startswith("-")]


def main(argv: Sequence[str]) -> int:
    """Run it; returns the exit code."""
    from qeff_proxy.cli import main as run
    from qeff_proxy.cli.output import report_error

    try:
        words, left_out = translate(argv)
    except ProxyError as error:
        report_error(str(error))
        return error.exit_code
    if left_out:
        said = ", ".join(left_out)
        sys.stderr.write(f"qeff-proxy: warning: ignored, as they are for Cloud AI 100: {said}\n")
    return run(words)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
