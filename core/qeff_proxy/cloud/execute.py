"""``python -m qeff_proxy.cloud.execute``: QEfficient's; runs what was compiled, by its folder."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from qeff_proxy.cloud.program import Program, model_of, prompts_of
from qeff_proxy.errors import ProxyError, UsageError


def main(argv: Sequence[str]) -> int:
    """Run it; returns the exit code."""
    from qeff_proxy.cli.output import plain_warnings, print_text, report_error

    try:
        with plain_warnings():
            texts = _run(argv)
    except ProxyError as error:
        report_error(str(error))
        return error.exit_code
    for text in texts:
        print_text(text)
    return 0


def _run(argv: Sequence[str]) -> list[str]:
    """The prompts with their texts."""
    program = Program("execute")
    program.model(required=False)
    program.option("qpc_path", required=True)
    program.prompts()
    args = program.read(argv, refused=("full_batch_size",))
    prompts = prompts_of(args)
    length = args.generation_len
    if length is not None and not length.isdigit():
        raise UsageError(f"--generation_len is {length!r}", "Give a number.")
    from qeff_proxy.auto.exec_kv import cloud_ai_100_exec_kv
    from qeff_proxy.auto.on_disk import compiled_in
    from qeff_proxy.utils.tokenizers import load_hf_tokenizer

    folder = Path(args.qpc_path).expanduser()
    compiled_in(folder)  # before a tokenizer is fetched
    named = args.local_model_dir or args.model_name
    tokenizer = None if named is None else load_hf_tokenizer(model_of(args))
    result = cloud_ai_100_exec_kv(
        tokenizer, folder, prompts, generation_len=None if length is None else int(length)
    )
    texts = result.generated_texts
    assert texts is not None  # noqa: S101 (there are prompts, so there is a tokenizer)
    return [f"{prompt}{text}" for prompt, text in zip(prompts, texts, strict=True)]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
