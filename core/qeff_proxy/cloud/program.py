"""What QEfficient's programs have in common: options of two spellings, prompts, and errors."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from qeff_proxy.common.file_errors import reading
from qeff_proxy.errors import ProxyError, UsageError

#: Options of Hugging Face's hub → where it reads them.
_HUB = {"cache_dir": "HF_HUB_CACHE", "hf_token": "HF_TOKEN"}


class Program(argparse.ArgumentParser):
    """The parser of a program; each option has dashes or underscores."""

    def __init__(self, name: str) -> None:
        super().__init__(prog=f"qeff_proxy.cloud.{name}", allow_abbrev=False)

    def option(self, name: str, **settings: object) -> None:
        """Declare an option."""
        spellings = dict.fromkeys((f"--{name}", f"--{name.replace('_', '-')}"))
        self.add_argument(*spellings, dest=name, **settings)  # type: ignore[arg-type]

    def options(self, *names: str) -> None:
        """Declare options with a value each."""
        for name in names:
            self.option(name)

    def model(self, *, required: bool = True) -> None:
        """Declare the options that say which model it is."""
        self.option("model_name", required=required)
        self.options("local_model_dir", *_HUB)

    def prompts(self) -> None:
        """Declare the options that say what is run."""
        self.option("prompt", type=lambda text: text.split("|"), default=[])
        self.options("prompts_txt_file_path", "generation_len")

    def read(self, argv: Sequence[str], refused: Sequence[str] = ()) -> argparse.Namespace:
        """Read the arguments; one line names those that mean nothing here.

        Args:
            argv: The arguments.
            refused: Options that would change the answers.

        Raises:
            UsageError: One of those was given.
        """
        self.options(*refused)
        args, others = self.parse_known_args(argv)
        for name in refused:
            if getattr(args, name) is not None:
                raise UsageError(f"--{name} cannot be obeyed", "Leave it out.")
        if left_out := [word for word in others if word.startswith("-")]:
            warn(f"ignored, as they are for Cloud AI 100: {', '.join(left_out)}")
        for name, variable in _HUB.items():
            if getattr(args, name, None) is not None:
                warn(f"--{name} is ignored: set {variable}")
        return args


def warn(message: str) -> None:
    """Print a warning of one line."""
    sys.stderr.write(f"qeff-proxy: warning: {message}\n")


def model_of(args: argparse.Namespace) -> str:
    """The model, by the folder or hub id that was given."""
    return str(args.local_model_dir or args.model_name)


def prompts_of(args: argparse.Namespace) -> list[str]:
    """The prompts that were given, and those of a file.

    Raises:
        ArtifactError: The file cannot be read.
        UsageError: There is no prompt.
    """
    prompts = [*args.prompt]
    if args.prompts_txt_file_path is not None:
        path = Path(args.prompts_txt_file_path)
        with reading(path):
            text = path.read_text(encoding="utf-8")
        prompts += [line.strip() for line in text.splitlines() if line.strip()]
    if not prompts:
        raise UsageError("there is no prompt", "Give --prompt TEXT.")
    return prompts


def run_program(translate: Callable[[Sequence[str]], list[str]], argv: Sequence[str]) -> int:
    """Run a program as a command of ``qeff-proxy``; returns the exit code.

    Args:
        translate: Gives the command's arguments for those of the program.
        argv: The program's arguments.
    """
    from qeff_proxy.cli import main
    from qeff_proxy.cli.output import report_error

    try:
        words = translate(argv)
    except ProxyError as error:
        report_error(str(error))
        return error.exit_code
    return main(words)
