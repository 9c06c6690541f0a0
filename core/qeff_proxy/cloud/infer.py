"""``python -m qeff_proxy.cloud.infer``: QEfficient's, as ``qeff-proxy generate``."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from qeff_proxy.cloud.program import Program, model_of, prompts_of, run_program

#: Its options → those of ``generate``.
_OBEYED = {
    "batch_size": "--batch-size",
    "prompt_len": "--prefill-seq-len",
    "ctx_len": "--ctx-len",
    "generation_len": "--max-new-tokens",
    "num_cores": "--num-cores",
}


def translate(argv: Sequence[str]) -> list[str]:
    """The arguments of ``qeff-proxy`` for those of QEfficient's program.

    Raises:
        UsageError: There is no prompt, or an argument would change the answers.
        ArtifactError: The file with prompts cannot be read.
    """
    program = Program("infer")
    program.model()
    program.prompts()
    program.option("trust_remote_code", action="store_true")
    program.options(*(name for name in _OBEYED if name != "generation_len"))
    args = program.read(argv, refused=("image_url", "full_batch_size", "config"))
    prompts = prompts_of(args)
    words = ["generate"]
    for name, option in _OBEYED.items():
        if getattr(args, name) is not None:
            words += [option, getattr(args, name)]
    if args.trust_remote_code:
        words.append("--trust-remote-code")
    return [*words, "--", model_of(args), *prompts]


def main(argv: Sequence[str]) -> int:
    """Run it; returns the exit code."""
    return run_program(translate, argv)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
