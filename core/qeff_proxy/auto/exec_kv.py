"""QEfficient's ``cloud_ai_100_exec_kv``: run what was compiled, by its folder."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from qeff_proxy.auto.causal_lm import GenerationResult, check_prompts, printer, prompts_of_file
from qeff_proxy.auto.on_disk import compiled_in
from qeff_proxy.auto.qefficient import EXEC, without_ignored
from qeff_proxy.common import arguments
from qeff_proxy.errors import UsageError
from qeff_proxy.plugins.manager import Plugins
from qeff_proxy.request import Request
from qeff_proxy.run.run_compiled import run_compiled


def cloud_ai_100_exec_kv(
    tokenizer: Any,
    qpc_path: str | Path,
    prompt: str | Sequence[str] | None = None,
    prompts_txt_file_path: str | Path | None = None,
    *,
    generation_len: int | None = None,
    stream: bool = False,
    write_io_dir: str | Path | None = None,
    iteration: int = 1,
    **ignored: Any,
) -> GenerationResult:
    """Generate text with what ``compile`` made.

    Args:
        tokenizer: The checkpoint's.
        qpc_path: The folder that ``compile`` returned, in its export.
        prompt: A prompt or several, which run together.
        prompts_txt_file_path: Instead, a text file with one on each line.
        generation_len: The number of new tokens.
        stream: Print the text of one prompt as it is generated.
        write_io_dir: Dump inputs and outputs of every part to this folder.
        iteration: Run so many times.
        ignored: QEfficient's other arguments, which are ignored with a warning.

    Raises:
        ArtifactError: The folder holds nothing that was compiled.
        UsageError: An argument is wrong or unknown.
    """
    others = without_ignored(ignored, EXEC, cloud_ai_100_exec_kv)
    if others:
        raise UsageError(f"cloud_ai_100_exec_kv takes no {min(others)}", "See its arguments.")
    if prompts_txt_file_path is not None:
        prompt = prompts_of_file(prompts_txt_file_path, prompt)
    request = Request(prompts=check_prompts(prompt, None))
    settings = {} if generation_len is None else {"max_new_tokens": generation_len}
    if arguments.flag("stream", stream):
        settings["streamer"] = printer(request, tokenizer)
    compiled = compiled_in(arguments.path("qpc_path", qpc_path))
    model = compiled.export.model
    hooks = Plugins.discover().hooks_for(model["model_type"], task=compiled.export.flow)
    for _ in range(arguments.whole_number("iteration", iteration)):
        result = run_compiled(
            compiled,
            hooks,
            request,
            processor=arguments.processor("tokenizer", tokenizer),
            settings=settings,
            write_io=write_io_dir is not None,
            io_folder=arguments.path("write_io_dir", write_io_dir),
        )
    return GenerationResult.of(result)
