"""``vfiod completion bash|zsh|fish``: what a shell has to know to complete command lines of ``vfiod``.

Written from the argparse parsers and the catalogue: a script is all words, and starts no program when a key is hit.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from typing import Final

from vfiod.client.programs import FILES, Option, Program, options_of, programs
from vfiod.protocol.catalogue import COMMANDS

__all__ = ["SHELLS", "main", "parser", "script"]

EPILOG = """\
  bash:  vfiod completion bash > /usr/share/bash-completion/completions/vfiod
  zsh:   vfiod completion zsh > /usr/share/zsh/vendor-completions/_vfiod
  fish:  vfiod completion fish > /usr/share/fish/vendor_completions.d/vfiod.fish
For one session: source <(vfiod completion bash)
"""

FILE_OPTIONS: Final = frozenset({"--fd", "--all", "--state", "--sysfs", "--definitions"})
"""Options of the client's own programs whose value is a path, or ends in one."""


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(
        "vfiod completion", description="Print the completion of vfiod's command lines for a shell.", epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    made.add_argument("shell", choices=sorted(SHELLS), help="which shell")
    return made


def main(argv: list[str]) -> int:
    """Print it."""
    print(script(parser().parse_args(argv).shell), end="")
    return 0


def script(shell: str) -> str:
    """The script for one of :data:`SHELLS`."""
    return "\n".join(SHELLS[shell](list(programs()))) + "\n"


def _takes_value(option: Option) -> bool:
    return option.nargs != 0


def _values(program: Program, option: Option) -> list[str]:
    """The words an option or argument may have; none: any."""
    if option.choices is not None:
        return [str(one) for one in option.choices]
    if isinstance(option.metavar, str) and option.option_strings:
        words = option.metavar.split("|")
        if len(words) > 1 and all(word.isalpha() and word.islower() for word in words):
            return words
    if option.dest == "log_level":
        from vfiod.protocol.settings import LEVELS

        return list(LEVELS)
    if option.dest == "log_format":
        from vfiod.protocol.settings import LOG_FORMATS

        return list(LOG_FORMATS)
    if option.dest == "command" and program.words == ("call",):
        return sorted(COMMANDS)
    return []


def _is_file(program: Program, option: Option) -> bool:
    offered = any(name in program.offers for name in option.option_strings)
    return offered or option.dest in FILES or any(name in FILE_OPTIONS for name in option.option_strings)


def _first_line(text: str | None) -> str:
    return (text or "").replace("%%", "%").split(";")[0].split("\n")[0].strip()


def _verbs(words: tuple[str, ...], everything: list[Program]) -> list[Program]:
    return [one for one in everything if one.words[:-1] == words]


# --- bash ------------------------------------------------------------------------------------------

_BASH_BEGINNING: Final = """\
# bash completion for vfiod; written by 'vfiod completion bash'.
_vfiod() {
    local current=${COMP_WORDS[COMP_CWORD]} path="" word words="" option="" place=0 index value=0 glued=0
    COMPREPLY=()
    for ((index = 1; index < COMP_CWORD; index++)); do
        word=${COMP_WORDS[index]}
        # readline has cut "--option=value" and "name=path" into three words
        [[ $word == [=:] ]] && { glued=1; continue; }
        ((glued)) && { glued=0 value=0; continue; }
        ((value)) && { value=0; continue; }
        [[ $word == -- ]] && { compopt -o default 2>/dev/null; return; }
        option=""
        if [[ $word == -* ]]; then case "$path:$word" in"""

_BASH_END: Final = """\
_vfiod_files() {
    # Where readline does not break words at "=" and ":", a file stands behind NAME= or ro:.
    local IFS=$'\\n' prefix=""
    case $1 in *=*) prefix=${1%%=*}=;; ro:*) prefix=ro:;; esac
    compopt -o filenames 2>/dev/null
    COMPREPLY=($(compgen -f -- "${1#"$prefix"}"))
    [[ $prefix ]] && COMPREPLY=("${COMPREPLY[@]/#/$prefix}")
    return 0
}
complete -F _vfiod vfiod"""


def _bash(everything: list[Program]) -> Iterator[str]:
    yield _BASH_BEGINNING
    for one in everything:
        valued = [name for option in options_of(one)[0] if _takes_value(option) for name in option.option_strings]
        if valued:
            yield f'            {"|".join(_pattern(one, name) for name in valued)}) value=1 option="$path:$word";;'
    yield '        esac; else case "$path $word" in'
    yield f'            {"|".join(_quoted_path(one) for one in everything)}) path="$path $word" place=0;;'
    yield "            *) ((++place));;"
    yield "        esac; fi"
    yield "    done"
    yield '    [[ $current == [=:] ]] && glued=1 current=""'
    yield "    if ((value || glued)); then"
    yield "        case $option in"
    for one in everything:
        for option in options_of(one)[0]:
            patterns = "|".join(_pattern(one, name) for name in option.option_strings)
            words = _values(one, option)
            if words:
                yield f'            {patterns}) words="{" ".join(words)}";;'
            elif _takes_value(option) and _is_file(one, option):
                yield f'            {patterns}) _vfiod_files "$current"; return;;'
    yield "        esac"
    yield '        COMPREPLY=($(compgen -W "$words" -- "$current"))'
    yield "        return"
    yield "    fi"
    yield '    case "$path:$place" in'
    yield f'        :0) words="{" ".join(one.words[0] for one in _verbs((), everything))} --help --version";;'
    for one in everything:
        verbs = _verbs(one.words, everything)
        if verbs:
            yield f'        "{_path(one)}":0) words="{" ".join(verb.words[-1] for verb in verbs)}";;'
        for position, argument in enumerate(options_of(one)[1]):
            choices = _values(one, argument)
            where = f'"{_path(one)}":{"*" if argument.nargs in ("*", "+") else position}'
            if choices:
                yield f'        {where}) words="{" ".join(choices)}";;'
            elif _is_file(one, argument):
                yield f'        {where}) [[ $current == -* ]] || {{ _vfiod_files "$current"; return; }};;'
    yield "    esac"
    yield '    if [[ $current == -* ]]; then case "$path" in'
    for one in everything:
        names = [name for option in options_of(one)[0] for name in option.option_strings]
        yield f'        "{_path(one)}") words="{" ".join(names)}";;'
    yield "    esac; fi"
    yield '    COMPREPLY=($(compgen -W "$words" -- "$current"))'
    yield "}"
    yield _BASH_END


def _path(program: Program) -> str:
    return "".join(f" {word}" for word in program.words)


def _quoted_path(program: Program) -> str:
    return f'"{_path(program)}"'


def _pattern(program: Program, name: str) -> str:
    return f'"{_path(program)}:{name}"'


# --- zsh -------------------------------------------------------------------------------------------


def _zsh(everything: list[Program]) -> Iterator[str]:
    yield "#compdef vfiod"
    yield "# zsh completion for vfiod; written by 'vfiod completion zsh'."
    for one in [None, *everything]:
        words = () if one is None else one.words
        verbs = _verbs(words, everything)
        yield ""
        yield f"{_function(words)}() {{"
        yield "    local context state state_descr line; typeset -A opt_args"
        specs = [] if one is None else [*_zsh_specs(one)]
        if one is None:
            specs = ["'(- *)'{-h,--help}'[what there is]'", "'(- *)'{-V,--version}'[the version]'"]
        if verbs:
            specs += ["'1: :->verb'", "'*:: :->rest'"]
        yield "    _arguments -S \\"
        yield " \\\n".join(f"        {spec}" for spec in specs)
        if verbs:
            yield "    case $state in"
            yield "        verb) local -a verbs=("
            for verb in verbs:
                yield f"            {_zsh_text(verb.words[-1] + ':' + _first_line(verb.about))}"
            yield "            ); _describe -t commands 'command' verbs;;"
            yield "        rest) case $line[1] in"
            for verb in verbs:
                yield f"            {verb.words[-1]}) {_function(verb.words)};;"
            yield "        esac;;"
            yield "    esac"
        yield "}"
    yield ""
    yield 'if [[ $funcstack[1] == _vfiod ]]; then _vfiod "$@"; else compdef _vfiod vfiod; fi'


def _function(words: tuple[str, ...]) -> str:
    return "_".join(("_vfiod", *words))


def _zsh_text(text: str) -> str:
    return "'" + text.replace("'", "'\\''") + "'"


def _zsh_word(text: str) -> str:
    return text.replace("\\", "\\\\").replace("[", "\\[").replace("]", "\\]").replace(":", "\\:")


def _zsh_specs(program: Program) -> Iterator[str]:
    options, arguments = options_of(program)
    for option in options:
        about = _zsh_word(_first_line(option.help))
        value = f":{_zsh_word(str(option.metavar or option.dest))}:{_zsh_action(program, option)}"
        repeated = "*" if isinstance(option, argparse._AppendAction) else ""
        for name in option.option_strings:
            equals = "=" if _takes_value(option) and name.startswith("--") else ""
            yield _zsh_text(f"{repeated}{name}{equals}[{about}]{value if _takes_value(option) else ''}")
    for position, argument in enumerate(arguments, 1):
        label = _zsh_word(str(argument.metavar or argument.dest))
        place = "*" if argument.nargs in ("*", "+") else str(position)
        yield _zsh_text(f"{place}:{label}:{_zsh_action(program, argument)}")
    if program.words == ("run",):
        yield "'*::hypervisor:_normal'"


def _zsh_action(program: Program, option: Option) -> str:
    words = _values(program, option)
    if words:
        return f"({' '.join(words)})"
    return "_files" if _is_file(program, option) else ""


# --- fish ------------------------------------------------------------------------------------------


def _fish(everything: list[Program]) -> Iterator[str]:
    yield "# fish completion for vfiod; written by 'vfiod completion fish'."
    yield "complete -c vfiod -f"
    yield "complete -c vfiod -n __fish_use_subcommand -s h -l help -d 'what there is'"
    yield "complete -c vfiod -n __fish_use_subcommand -s V -l version -d 'the version'"
    for one in everything:
        parent, name = one.words[:-1], one.words[-1]
        yield f"complete -c vfiod -n {_fish_when(parent, everything)} -a {name} -d {_fish_text(_first_line(one.about))}"
    for one in everything:
        options, arguments = options_of(one)
        when = _fish_when(one.words, everything)
        for option in options:
            names = [f"-l {name[2:]}" if name.startswith("--") else f"-s {name[1:]}" for name in option.option_strings]
            line = f"complete -c vfiod -n {when} {' '.join(names)}"
            if _takes_value(option):
                words = _values(one, option)
                line += " -r" + (" -F" if _is_file(one, option) else " -f")
                line += f" -a {_fish_text(' '.join(words))}" if words else ""
            yield f"{line} -d {_fish_text(_first_line(option.help))}"
        for argument in arguments:
            words = _values(one, argument)
            if words:
                yield f"complete -c vfiod -n {when} -a {_fish_text(' '.join(words))}"
            elif _is_file(one, argument):
                yield f"complete -c vfiod -n {when} -F"


def _fish_text(text: str) -> str:
    return "'" + text.replace("\\", "\\\\").replace("'", "\\'") + "'"


def _fish_when(words: tuple[str, ...], everything: list[Program]) -> str:
    if not words:
        return "__fish_use_subcommand"
    seen = [f"__fish_seen_subcommand_from {word}" for word in words]
    # What comes next would be another program; and "mdev serve" is none of "serve".
    other = [verb.words[-1] for verb in _verbs(words, everything)]
    for one in everything:
        if one.words[-1] == words[-1] and set(words) < set(one.words):
            other += sorted(set(one.words) - set(words))
    if other:
        seen.append(f"not __fish_seen_subcommand_from {' '.join(other)}")
    return _fish_text("; and ".join(seen))


SHELLS: Final[dict[str, Callable[[list[Program]], Iterator[str]]]] = {"bash": _bash, "zsh": _zsh, "fish": _fish}
"""How each is written."""
