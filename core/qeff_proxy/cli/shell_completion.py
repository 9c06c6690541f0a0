"""``qeff-proxy shell-completion SHELL``: a script that completes commands and options."""

from __future__ import annotations

import argparse
import sys

from qeff_proxy.cli.output import add_json_option, print_json

_BASH = """\
# In ~/.bashrc: eval "$(qeff-proxy shell-completion bash)"
_qeff_proxy() {{
    local word="${{COMP_WORDS[COMP_CWORD]}}" options="{commands}"
    if [ "$COMP_CWORD" -gt 1 ]; then
        case "${{COMP_WORDS[1]}}" in
{cases}
            *) options="" ;;
        esac
        [[ "$word" == -* ]] || options=""
    fi
    COMPREPLY=($(compgen -W "$options" -- "$word"))
}}
complete -o default -F _qeff_proxy qeff-proxy
"""
_ZSH = """\
# In ~/.zshrc: eval "$(qeff-proxy shell-completion zsh)"
autoload -U bashcompinit
bashcompinit
"""
_SHELLS = ("bash", "fish", "zsh")


def configure(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument("shell", metavar="SHELL", choices=_SHELLS, help=", ".join(_SHELLS))
    parser.epilog = (
        'bash and zsh: eval "$(qeff-proxy shell-completion bash)" in ~/.bashrc, or zsh in '
        "~/.zshrc; fish: qeff-proxy shell-completion fish > "
        "~/.config/fish/completions/qeff-proxy.fish."
    )
    add_json_option(parser)


def run(args: argparse.Namespace) -> int:
    """Print the script."""
    from qeff_proxy.cli import COMMANDS

    options = {name: _options_of(name) for name in COMMANDS}
    script = _fish(options) if args.shell == "fish" else _bash(options)
    if args.shell == "zsh":
        script = _ZSH + script.partition("\n")[2]
    if args.json:
        print_json({"shell": args.shell, "script": script})
    else:
        sys.stdout.write(script)
    return 0


def _options_of(command: str) -> list[str]:
    """The options of a command, without its positional arguments."""
    from qeff_proxy.cli import build_parser

    usage = build_parser(command)
    for action in usage._actions:  # noqa: SLF001 (argparse tells it in no other way)
        if isinstance(action, argparse._SubParsersAction):  # noqa: SLF001
            actions = action.choices[command]._actions  # noqa: SLF001
            return sorted(name for one in actions for name in one.option_strings)
    return []


def _bash(options: dict[str, list[str]]) -> str:
    cases = "\n".join(
        f'            {name}) options="{" ".join(names)}" ;;' for name, names in options.items()
    )
    return _BASH.format(commands=" ".join(options), cases=cases)


def _fish(options: dict[str, list[str]]) -> str:
    from qeff_proxy.cli import COMMANDS

    lines = []
    for command, names in options.items():
        said = COMMANDS[command].replace("'", "")
        lines.append(f"complete -c qeff-proxy -n __fish_use_subcommand -a {command} -d '{said}'")
        for name in names:
            kind = f"-l {name[2:]}" if name.startswith("--") else f"-s {name[1:]}"
            seen = f"'__fish_seen_subcommand_from {command}'"
            lines.append(f"complete -c qeff-proxy -n {seen} {kind}")
    return "\n".join(lines) + "\n"
