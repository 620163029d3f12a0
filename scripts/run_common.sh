# shellcheck shell=bash
# Sourced by run_experiment.sh and run_knowledge_drift.sh, which set the variables: turns them into
# flags and becomes `dart-llm run`, or `dart-llm drift`.  Keeps to bash 3.2, which macOS has.

# The flag of a variable is its name in kebab case.  Both lists together are all variables.
text_variables=(
  METHOD MODEL CACHE_DIR DEVICE LAYER_TOPK TOTAL_PRUNE_PERCENT MASKING_STEP RELEASE_STEP EMA_DECAY
  RANKING_METHOD PRUNE_STRATEGY PROMPT_TYPE PROMPT_SUBJECT CUSTOM_PROMPT_TEXT PROMPT_LENGTH
  GENERATION PPL_DATASETS PPL_SUBJECTS PPL_MAX_SAMPLES MMLU_DATASETS MMLU_SHOTS MMLU_MAX_SAMPLES
  GENERAL_NLP_DATASETS GENERAL_NLP_MAX_SAMPLES SUMMARIZATION_DATASETS SUMMARIZATION_MAX_SAMPLES
  SUMMARIZATION_MAX_OUTPUT SEED EXPERIMENT_NAME RESULTS_DIR
)
switch_variables=(
  KNOWLEDGE_DRIFT EVAL_PERPLEXITY EVAL_MMLU EVAL_GENERAL_NLP EVAL_SUMMARIZATION VERBOSE
  SAVE_ACTIVATIONS
)
# What a study takes (run_study); the others concern a single run.
study_variables=(
  MODEL CACHE_DIR DEVICE LAYER_TOPK TOTAL_PRUNE_PERCENT MASKING_STEP RELEASE_STEP EMA_DECAY
  RANKING_METHOD PRUNE_STRATEGY GENERATION EXPERIMENT_NAME RESULTS_DIR
)
# Lists of names or files.
list_variables=(
  PROMPT_SUBJECT PPL_DATASETS PPL_SUBJECTS MMLU_DATASETS GENERAL_NLP_DATASETS SUMMARIZATION_DATASETS
)
default_total=50
here="$(CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)"

say() { printf '%s: %s\n' "${0##*/}" "$1" >&2; }

kebab() { printf '%s' "$1" | LC_ALL=C tr 'A-Z_' 'a-z-'; }

# The published scripts part a list by spaces, dart-llm by commas: both will do.  A file whose name
# has a space, and a list that has commas already, stay as they are.
with_commas() { # VALUE
  local parts
  if [[ $1 == *,* || -e $1 ]]; then
    printf '%s' "$1"
  else
    IFS=$' \t\n' read -r -d '' -a parts <<<"$1" || true # 1 at the end of the text
    local IFS=,
    printf '%s' "${parts[*]-}"
  fi
}

add_text() { # NAME
  local value="${!1-}"
  case " ${list_variables[*]} " in *" $1 "*) value="$(with_commas "$value")" ;; esac
  # One word, --flag=value: a value that starts with a dash stays a value.
  [[ -z $value || $1,$value == *_MAX_SAMPLES,all ]] || arguments+=("--$(kebab "$1")=$value")
}

add_switch() { # NAME
  local value="${!1-}"
  case "$value" in
    '') ;;
    [Tt][Rr][Uu][Ee] | [Yy][Ee][Ss] | 1) arguments+=("--$(kebab "$1")") ;;
    [Ff][Aa][Ll][Ss][Ee] | [Nn][Oo] | 0) arguments+=("--no-$(kebab "$1")") ;;
    *)
      say "$1=$value is neither true nor false: write true, false, yes, no, 1 or 0"
      exit 2
      ;;
  esac
}

# Whether a layer specification hands layers to the allocator.  A table file that cannot be read
# counts as yes: dart-llm then says what is wrong with it.
holds_auto() { # SPECIFICATION
  case "$1" in
    @*)
      [[ -r ${1#@} ]] || return 0
      sed -e 's/^[[:space:]]*#.*//' -e 's/ #.*//' <"${1#@}" | grep auto >/dev/null
      ;;
    '' | *auto*) ;;
    *) return 1 ;;
  esac
}

# The default total must not contradict a setting that fixes the counts itself.  Any other total
# was asked for: dart-llm decides.
drop_default_total() { # ARGUMENTS...
  [[ ${TOTAL_PRUNE_PERCENT-} == "$default_total" ]] || return 0
  local argument why=''
  for argument in "$@"; do
    case "$argument" in --sparsity | --sparsity=* | --sparsities | --sparsities=*) why="$argument sets the amount" ;; esac
  done
  if [[ ${METHOD-} == dense* ]]; then
    why="METHOD=$METHOD removes nothing"
  elif [[ ${PRUNE_STRATEGY-} == auto ]]; then
    why='PRUNE_STRATEGY=auto sets the counts itself'
  elif ! holds_auto "${LAYER_TOPK-}"; then
    why="LAYER_TOPK=$LAYER_TOPK holds no auto and fixes every count"
  fi
  [[ -n $why ]] || return 0
  TOTAL_PRUNE_PERCENT=''
  say "the default TOTAL_PRUNE_PERCENT=$default_total is left out: $why"
}

find_dart_llm() {
  dart_llm="$(type -P dart-llm || true)"
  [[ -n $dart_llm ]] || dart_llm="$here/.venv/bin/dart-llm"
  [[ -x $dart_llm ]] && return
  say "there is no dart-llm on PATH and none in $here/.venv: run \"make setup\" in $here first"
  exit 127
}

# The scripts' own default; a decay is left to dart-llm, for dart's score cannot honour one.
set_default_method() { # ARGUMENTS...
  [[ -n ${METHOD+set} && -z $METHOD && -z ${EMA_DECAY-} ]] || return 0
  has_flag --ema-decay "$@" || METHOD=dart
}

run_dart_llm() { # ARGUMENTS...
  local name
  arguments=()
  set_default_method "$@"
  drop_default_total "$@"
  for name in "${text_variables[@]}"; do add_text "$name"; done
  for name in "${switch_variables[@]}"; do add_switch "$name"; done
  find_dart_llm
  exec "$dart_llm" run "${arguments[@]}" "$@"
}

has_flag() { # FLAG ARGUMENTS...
  local flag="$1" argument
  shift
  for argument in "$@"; do
    case "$argument" in "$flag" | "$flag"=*) return 0 ;; esac
  done
  return 1
}

# Whether the arguments ask for a study of several methods or sources.
is_study() { # ARGUMENTS...
  local flag
  for flag in --methods --mode --prompts --passages; do
    if has_flag "$flag" "$@"; then return 0; fi
  done
  return 1
}

left_out() { # NAME
  case "${!1-}" in
    [Tt][Rr][Uu][Ee] | [Yy][Ee][Ss] | 1) say "$1=${!1} concerns a single run and is left out" ;;
  esac
}

run_study() { # ARGUMENTS...
  local name
  arguments=()
  drop_default_total "$@"
  for name in "${study_variables[@]}"; do add_text "$name"; done
  [[ -z ${SEED-} ]] || arguments+=("--seeds=$SEED")
  case "${METHOD-}" in '' | dart) ;; *) arguments+=("--methods=dense,never,$METHOD") ;; esac
  if [[ -n ${CUSTOM_PROMPT_TEXT-} ]] && ! has_flag --prompts "$@" && ! has_flag --passages "$@"; then
    arguments+=("--prompt=$CUSTOM_PROMPT_TEXT")
  fi
  for name in "${switch_variables[@]}"; do
    [[ $name == KNOWLEDGE_DRIFT ]] || left_out "$name" # the methods say whether masks are rebuilt
  done
  find_dart_llm
  exec "$dart_llm" drift "${arguments[@]}" "$@"
}
