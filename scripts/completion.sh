# Completes the options of the scripts beside this file, also behind `accelerate launch`: source scripts/completion.sh
# For bash and zsh. Other words are completed as file names.

if [ -n "${ZSH_VERSION-}" ]; then
  whence compdef >/dev/null || { autoload -U +X compinit && compinit; }
  autoload -U +X bashcompinit && bashcompinit
  _charlm_folder=${0:A:h}
else
  _charlm_folder=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
fi

_charlm() {
  local word line script='' option='' before='' python=python3 current=${COMP_WORDS[COMP_CWORD]}
  COMPREPLY=()
  [ -z "${BASH_VERSION-}" ] || compopt +o nospace  # after a file
  case $1 in *python*) python=$1 ;; esac
  for word in "${COMP_WORDS[@]:0:$COMP_CWORD}"; do  # no script but those beside this file is ever run
    case $word in *.py) [ "$word" -ef "$_charlm_folder/${word##*/}" ] && script=$word ;; esac
  done
  [ -n "$script" ] || return 0
  if [ "${_charlm_script-}" != "${script##*/}" ]; then
    _charlm_options=$("$python" "$script" --print-completion 2>/dev/null) || return 0
    _charlm_script=${script##*/}
  fi

  # What the word is the value of. bash makes three words of --option=value.
  word=${COMP_WORDS[COMP_CWORD-1]}
  case $current in
    --*=*) option=${current%%=*} before=${current%%=*}= current=${current#*=} ;;
    =) option=$word current='' ;;
    *) if [ "$word" = = ]; then option=${COMP_WORDS[COMP_CWORD-2]}; else option=$word; fi ;;
  esac

  while IFS= read -r line; do
    case $line in
      "$option="/*) COMPREPLY=(); return 0 ;;
      "$option="*)
        COMPREPLY=()
        for word in $(echo "${line#*=}"); do
          case $word in "$current"*) COMPREPLY+=("$before$word ") ;; esac
        done
        [ -z "${BASH_VERSION-}" ] || compopt -o nospace +o default
        return 0 ;;
      "${current:-no option}"*) case $line in *=*) COMPREPLY+=("${line%%=*}=") ;; *) COMPREPLY+=("$line ") ;; esac ;;
    esac
  done <<EOF
$_charlm_options
EOF
  [ -z "${BASH_VERSION-}" ] || [ -z "${COMPREPLY[0]}" ] || compopt -o nospace
}

complete -o nospace -o default -F _charlm python python3 accelerate
