"""``sartor completion``: scripts by which a shell completes commands, options and model names.

Each asks ``sartor _complete`` what may follow, so that it need not be installed again when Sartor
changes.
"""

from __future__ import annotations

from typing import Annotated, Literal

import typer

_BASH = r"""# Put this into ~/.bashrc: eval "$(sartor completion bash)"
_sartor() {
    local text="${COMP_LINE:0:COMP_POINT}" begun colon="" word help other=""
    local -a words
    # From the line itself: bash would divide the words at the colons of model names.
    read -r -a words <<< "$text"
    [[ "$text" == *[[:space:]] ]] && words+=("")
    begun="${words[${#words[@]}-1]}"
    [[ "$begun" == *:* && "$COMP_WORDBREAKS" == *:* ]] && colon="${begun%"${begun##*:}"}"
    [[ "$begun" == *=* && "$COMP_WORDBREAKS" == *=* ]] && colon="${begun%"${begun##*=}"}"
    COMPREPLY=()
    while IFS=$'\t' read -r word help; do
        if [[ "$word" == :files ]]; then
            while IFS= read -r word; do COMPREPLY+=("$word"); done < <(compgen -f -- "$begun")
        else
            COMPREPLY+=("${word#"$colon"}")
            other=1
        fi
    done < <("${words[0]}" _complete -- "${words[@]:1}" 2> /dev/null)
    # Folders get a slash, but a colon in a name would get a backslash.
    [[ -n "$other" ]] || compopt -o filenames 2> /dev/null
}
complete -F _sartor sartor
"""

_ZSH = r"""#compdef sartor
# Put this into ~/.zshrc, below compinit: eval "$(sartor completion zsh)"
_sartor() {
    local -a found
    local word help files=""
    while IFS=$'\t' read -r word help; do
        if [[ "$word" == :files ]]; then
            files=1
        else
            found+=("${word//:/\\:}:$help")
        fi
    done < <("${words[1]}" _complete -- "${(@)words[2,CURRENT]}" 2> /dev/null)
    (( $#found )) && _describe -V sartor found
    [[ -n "$files" ]] && _files
}
if [[ "${funcstack[1]}" == _sartor ]]; then
    _sartor "$@"
else
    compdef _sartor sartor
fi
"""

_FISH = r"""# Put this into ~/.config/fish/config.fish: sartor completion fish | source
function __sartor_complete
    set -l words (commandline -opc)
    set -l begun (commandline -ct)
    for line in ($words[1] _complete -- $words[2..-1] "$begun" 2> /dev/null)
        if test "$line" = :files
            __fish_complete_path "$begun"
        else
            echo $line
        end
    end
end
complete -c sartor -f -a '(__sartor_complete)'
"""

_SCRIPTS = {"bash": _BASH, "zsh": _ZSH, "fish": _FISH}


def completion(
    shell: Annotated[
        Literal["bash", "zsh", "fish"],
        typer.Argument(metavar="SHELL", help="bash, zsh or fish.", show_default=False),
    ],
) -> None:
    """Print a script that lets a shell complete commands, options and model names.

    Its first lines say where to put it.
    """
    print(_SCRIPTS[shell], end="")
