"""Completion for each shell: its script, how to parse the line that it sends, and how to quote the words.

`completing` finds the words. Many come from files (names of tensors, files, state dicts), so this module trusts none:
it never offers a word with a control character, and quotes every other word such that the shell passes exactly this
word to the program.

    bash        inserts the word as it is, so this module quotes it, to fit the quotes that are already typed
    zsh, fish   quote the words themselves, like file names
    PowerShell  inserts the word as it is, so this module quotes it

The scripts are modelcli's own. The scripts that Typer installed for earlier versions still ask for `complete_bash`,
`complete_zsh` and `complete_fish`, and get answers that are safe for them.
"""

from __future__ import annotations

import itertools
import os
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

BASH = r"""
_modelcli_completion() {
    local IFS=$' \t\n' line
    COMPREPLY=()
    while IFS= read -r line; do
        COMPREPLY+=("$line")
    done < <(env _MODELCLI_COMPLETE=complete_bash_line "$1" \
        "${COMP_LINE:0:${COMP_POINT:-0}}" "${2-}" "${COMP_WORDS[@]:0:COMP_CWORD+1}")
    if [[ ${#COMPREPLY[@]} -eq 1 && ${COMPREPLY[0]} == */ ]]; then
        compopt -o nospace 2>/dev/null
    fi
    return 0
}

complete -o default -F _modelcli_completion modelcli
"""

# zsh runs the text of the file inside the autoloaded function `_modelcli` at its first call, so it must complete then.
ZSH = r"""
#compdef modelcli

_modelcli_completion() {
    emulate -L zsh
    local word=$PREFIX line
    local -a folders shown_folders others shown_others
    case $compstate[quote] in
        (\') ;;
        (\") word=${(Q):-\"$PREFIX\"} ;;
        (*) word=${(Q)PREFIX} ;;
    esac
    for line in "${(@f)$(env _MODELCLI_COMPLETE=complete_zsh_words modelcli \
            "${(@Q)words[2,CURRENT-1]}" "$word")}"; do
        [[ -n $line ]] || continue
        if [[ ${line%%$'\t'*} == */ ]]; then
            folders+=("${line%%$'\t'*}")
            shown_folders+=("${line/$'\t'/  -- }")
        else
            others+=("${line%%$'\t'*}")
            shown_others+=("${line/$'\t'/  -- }")
        fi
    done
    if (( $#folders + $#others == 0 )); then
        _files
        return
    fi
    if [[ "$shown_folders$shown_others" == *'  -- '* ]]; then
        compadd -l -S '' -d shown_folders -a -- folders
        compadd -l -d shown_others -a -- others
    else
        compadd -S '' -a -- folders
        compadd -a -- others
    fi
}

if [[ $funcstack[1] == _modelcli ]]; then
    _modelcli_completion "$@"
else
    compdef _modelcli_completion modelcli
fi
"""

FISH = r"""
function __modelcli_finds_words
    set -l words (commandline -opc)[2..-1] (commandline -ct)
    set -g __modelcli_words (env _MODELCLI_COMPLETE=complete_fish_words modelcli $words)
    test (count $__modelcli_words) -gt 0
end

complete --command modelcli --no-files --condition __modelcli_finds_words --arguments '$__modelcli_words'
"""

SCRIPTS = {"bash": BASH, "zsh": ZSH, "fish": FISH}

#: Characters that are not special for any of the shells, anywhere in a word.
_PLAIN = re.compile(r"[\w./:=@%+,-]*", re.ASCII)


@dataclass(frozen=True)
class Word:
    """A word on the command line, as far as it is typed.

    Attributes:
        text: The text that the shell would pass to the program.
        quote: The quotation mark that is still open, or an empty string.
        literal: Whether the text is known; False if the shell would expand something in it.
        opened: The position of the open quotation mark in the line.
    """

    text: str
    quote: str = ""
    literal: bool = True
    opened: int = -1


def answer(instruction: str, arguments: Sequence[str]) -> int:
    """Print the words or the script that a shell asks for.

    Args:
        instruction: The value of `_MODELCLI_COMPLETE`: `complete_bash_line`, `source_zsh`.
        arguments: The words of the typed line that the shell passes.

    Returns:
        The exit code.
    """
    action, _, shell = instruction.partition("_")
    if action == "source" and shell in SCRIPTS:
        _write(SCRIPTS[shell].strip() + "\n")
        return 0
    if action == "source" and shell in ("powershell", "pwsh"):
        from typer._completion_shared import get_completion_script

        _write(get_completion_script(prog_name="modelcli", complete_var="_MODELCLI_COMPLETE", shell=shell) + "\n")
        return 0
    if action != "complete" or shell not in _ANSWERS:
        sys.stderr.write(f"modelcli: no completion of this kind: {instruction!r}\n")
        return 1
    return _ANSWERS[shell](arguments)


def hand_out_scripts() -> None:
    """Make Typer's `--install-completion` and `--show-completion` use the scripts of this module."""
    from typer import _completion_shared

    _completion_shared._completion_scripts |= {shell: script.replace("%", "%%") for shell, script in SCRIPTS.items()}


def _write(text: str) -> None:
    """Write bytes to standard output, because file names need not be valid text in the locale."""
    sys.stdout.flush()
    sys.stdout.buffer.write(os.fsencode(text))
    sys.stdout.buffer.flush()


def _offered(words: Sequence[str], incomplete: str) -> list[tuple[str, str]]:
    """Return the completions of the last word, each with its help, that are safe to show and insert.

    `--model=al` becomes `--model=alexnet`. Returns nothing if an error occurs, because a message would disturb the
    line that the user is typing.
    """
    import typer
    from typer._click.shell_completion import _resolve_context, _resolve_incomplete

    from modelcli.cli.app import app

    try:
        context = _resolve_context(typer.main.get_command(app), {}, "modelcli", list(words))
        asked, rest = _resolve_incomplete(context, list(words), incomplete)
        before = incomplete.removesuffix(rest)
        items = [(str(item.value), item.help or "") for item in asked.shell_complete(context, rest)]
    except Exception:
        return []
    is_option = rest.startswith("-") and "--" not in words
    return [
        (before + value, " ".join(help_text.split()))
        for value, help_text in items
        # The program would read a name that looks like an option as an option.
        if value.isprintable() and (is_option or before or not value.startswith("-"))
    ]


# --- the line as it is typed -----------------------------------------------------------------------------------------


def split_line(line: str) -> list[Word]:
    """Split a line up to the cursor into words, as bash and zsh do. The last one is the word being typed.

    Args:
        line: One command, from its name to the cursor.
    """
    words: list[Word] = []
    text, quote, literal, begun, opened = "", "", True, False, -1
    place = 0
    while place < len(line):
        character = line[place]
        place += 1
        if quote == "'":
            quote, text = ("", text) if character == "'" else ("'", text + character)
        elif quote:
            if character == '"':
                quote = ""
            elif character == "\\" and line[place : place + 1] in ("$", "`", '"', "\\"):
                text += line[place]
                place += 1
            else:
                literal &= character not in "$`"
                text += character
        elif character in " \t\n":
            if begun:
                words.append(Word(text, literal=literal))
            text, literal, begun = "", True, False
            continue
        elif character == "\\":
            text += line[place : place + 1]
            place += 1
        elif character in "'\"":
            quote, opened = character, place - 1
        else:
            literal &= character not in "$`;&|<>()" and not (character == "~" and not begun)
            text += character
        begun = True
    return [*words, Word(text, quote, literal, opened if quote else -1)]


def fish_word(typed: str) -> Word:
    """Parse the word that is being typed in fish."""
    text, quote, literal = "", "", not typed.startswith("~")
    place = 0
    while place < len(typed):
        character = typed[place]
        following = typed[place + 1 : place + 2]
        place += 1
        if character == "\\" and (not quote or following in ("\\", quote) or (quote == '"' and following == "$")):
            # An escape for a control character (`\n`, `\x0a`): such words are never offered.
            literal &= bool(quote) or not following.isalnum()
            text += following
            place += 1
        elif quote:
            quote, text = ("", text) if character == quote else (quote, text + character)
            literal &= character != "$" or quote != '"'
        elif character in "'\"":
            quote = character
        else:
            literal &= character not in "$()<>|;&"
            text += character
    return Word(text, quote, literal)


def _joined(words: Iterable[str]) -> list[str]:
    """Join the words that bash has split at `=` and `:`."""
    joined: list[str] = []
    for before, word in itertools.pairwise(["", *words]):
        if len(joined) > 1 and word and (_is_break(word) or _is_break(before)):
            joined[-1] += word
        else:
            joined.append(word)
    return joined


def _is_break(word: str) -> bool:
    return bool(word) and not word.strip("=:")


# --- answers ---------------------------------------------------------------------------------------------------------

#: Returns what the shell must insert for a text after an open quotation mark (or none); None if that is not certain.
_Quoting = Callable[[str, str], str | None]


def _answer_bash(arguments: Sequence[str]) -> int:
    """Arguments: the line up to the cursor, the end of it that readline will replace, and bash's own words."""
    line, replaced, *words = [*arguments, "", ""][: max(len(arguments), 2)]
    if line:
        return _write_lines(_insertions(line, replaced, quoted_for_bash) if line.endswith(replaced) else [])
    return _answer_bash_words(words, quoted_for_bash)


def _answer_old_bash(_arguments: Sequence[str]) -> int:
    """For Typer's script, which sends only the words."""
    place = int(os.environ.get("COMP_CWORD") or 0)
    words = os.environ.get("COMP_WORDS", "").split("\n")
    return _answer_bash_words([*words, ""][: place + 1], quoted_for_old_bash)


def _answer_bash_words(words: Sequence[str], quoted: _Quoting) -> int:
    """For bash's own words: readline replaces the last one, or the part of it after a quotation mark."""
    line = " ".join(_joined(words))
    last = "" if _is_break(words[-1]) else words[-1]
    start = max(len(line) - len(last), split_line(line)[-1].opened + 1)
    return _write_lines(_insertions(line, line[start:], quoted))


def _insertions(line: str, replaced: str, quoted: _Quoting) -> list[str]:
    """Return the texts with which readline may replace the end of a line."""
    *before, typed = split_line(line)
    kept = split_line(line.removesuffix(replaced))[-1]
    if not typed.literal or typed.quote != kept.quote:
        return []
    words = (word for word, _ in _offered([word.text for word in before[1:]], typed.text))
    made = (quoted(word.removeprefix(kept.text), kept.quote) for word in words if word.startswith(kept.text))
    return [text for text in made if text]


def quoted_for_bash(text: str, quote: str) -> str | None:
    """Quote a text as bash quotes a file name, to follow the open quotation mark `quote`, if any.

    If this is the only word, readline adds the closing quotation mark, unless the text ends with one; and it drops one
    of two quotation marks that meet where it inserts the text.
    """
    if not quote:
        return re.sub(r"[^\w./:=@%+,-]", r"\\\g<0>", text)
    if quote == "'":
        inside = text.replace("'", "'\\''")
    else:  # within double quotes, bash cannot escape an exclamation mark
        inside = re.sub(r'[$`"\\]', r"\\\g<0>", text).replace("!", "\"'!'\"")
    inside = inside + quote if inside.endswith(quote) else inside
    return quote + inside if inside.startswith(quote) else inside


def quoted_for_old_bash(text: str, quote: str) -> str | None:
    """Quote for a shell that treats the answer as file name patterns; a matching pattern would lose its quotes."""
    if _PLAIN.fullmatch(text):
        return text
    if quote or re.search(r"['\\*?\[\]]|[@+!]\(", text):
        return None
    return f"'{text}'"


def _answer_zsh(arguments: Sequence[str]) -> int:
    """Arguments: the words up to the cursor. zsh quotes what it inserts."""
    return _write_lines(_described(_offered(arguments[:-1], arguments[-1])) if arguments else [])


def _answer_old_zsh(_arguments: Sequence[str]) -> int:
    """For Typer's script, whose shell runs the answer as code."""
    *before, typed = split_line(os.environ.get("_TYPER_COMPLETE_ARGS", ""))
    offered = _offered([word.text for word in before[1:]], typed.text) if typed.literal else []
    if not offered:
        _write("_files\n")
    elif all(_PLAIN.fullmatch(word) and "=" not in word for word, _ in offered):
        from typer._click.shell_completion import CompletionItem
        from typer._completion_classes import ZshComplete

        form = ZshComplete.format_completion
        made = [form(None, CompletionItem(word, help=text)) for word, text in offered]  # type: ignore[arg-type]
        _write("_arguments '*: :((" + "\n".join(made) + "))'\n")
    else:
        _write(f"compadd -- {' '.join(_in_codes(word) for word, _ in offered)}\n")
    return 0


def _in_codes(text: str) -> str:
    """Write a text in zsh's notation of character codes, in which nothing is special."""
    return "$'" + "".join(char if char.isalnum() and char.isascii() else f"\\U{ord(char):08x}" for char in text) + "'"


def _answer_fish(arguments: Sequence[str]) -> int:
    """Arguments: the words before the cursor, and the typed text of the word at it. fish quotes what it inserts."""
    if not arguments:
        return _write_lines([])
    typed = fish_word(arguments[-1])
    return _write_lines(_described(_offered(arguments[:-1], typed.text)) if typed.literal else [])


def _answer_old_fish(_arguments: Sequence[str]) -> int:
    """For Typer's script, which asks whether there are words, and then for the words. fish quotes what it inserts."""
    *before, typed = split_line(os.environ.get("_TYPER_COMPLETE_ARGS", ""))
    offered = _offered([word.text for word in before[1:]], typed.text) if typed.literal else []
    if os.environ.get("_TYPER_COMPLETE_FISH_ACTION") == "is-args":
        return 0 if offered else 1
    return _write_lines(_described(offered))


def _described(offered: Iterable[tuple[str, str]]) -> list[str]:
    return [f"{word}\t{text}" if text else word for word, text in offered]


def _answer_powershell(_arguments: Sequence[str]) -> int:
    """For Typer's script. PowerShell inserts the answer as it is, and several characters are quotation marks there."""
    words = split_line(os.environ.get("_TYPER_COMPLETE_ARGS", ""))
    incomplete = os.environ.get("_TYPER_COMPLETE_WORD_TO_COMPLETE", "")
    offered = _offered([word.text for word in (words[1:-1] if incomplete else words[1:]) if word.text], incomplete)
    lines = []
    for word, text in offered:
        if not re.fullmatch(r"[\w./\\:=+-]*", word, re.ASCII):
            if re.search("['\"\u2018-\u201e]|:::", word):
                continue
            word = f"'{word}'"
        lines.append(f"{word}:::{text or ' '}")
    return _write_lines(lines)


def _write_lines(lines: Iterable[str]) -> int:
    _write("".join(f"{line}\n" for line in lines))
    return 0


_ANSWERS: dict[str, Callable[[Sequence[str]], int]] = {
    "bash_line": _answer_bash,
    "bash": _answer_old_bash,
    "zsh_words": _answer_zsh,
    "zsh": _answer_old_zsh,
    "fish_words": _answer_fish,
    "fish": _answer_old_fish,
    "powershell": _answer_powershell,
    "pwsh": _answer_powershell,
}
