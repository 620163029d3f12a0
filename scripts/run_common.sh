# shellcheck shell=bash
# Sourced by run_experiment.sh and run_knowledge_drift.sh, which set the variables.  Turns them into
# flags of `dart-llm run`, `perplexity`, `eval` and `summarize`, or of `dart-llm drift`.  Uses only
# features of bash 3.2, macOS's version.

# A variable's flag is its name in kebab case.  These are flags of every command.
common_variables=(
  METHOD MODEL CACHE_DIR DEVICE LAYER_TOPK TOTAL_PRUNE_PERCENT MASKING_STEP RELEASE_STEP EMA_DECAY
  RANKING_METHOD PRUNE_STRATEGY SEED EXPERIMENT_NAME RESULTS_DIR
)
# These are flags of `dart-llm run` only.
prompt_variables=(PROMPT_TYPE PROMPT_SUBJECT CUSTOM_PROMPT_TEXT PROMPT_LENGTH GENERATION)
run_switches=(VERBOSE SAVE_ACTIVATIONS)
evaluation_switches=(EVAL_PERPLEXITY EVAL_MMLU EVAL_GENERAL_NLP EVAL_SUMMARIZATION)
# These are flags of `dart-llm drift` (run_study); the other variables apply to a single run.
study_variables=(
  MODEL CACHE_DIR DEVICE LAYER_TOPK TOTAL_PRUNE_PERCENT MASKING_STEP RELEASE_STEP EMA_DECAY
  RANKING_METHOD PRUNE_STRATEGY GENERATION EXPERIMENT_NAME RESULTS_DIR
)
default_total=50
here="$(CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)"

say() { printf '%s: %s\n' "${0##*/}" "$1" >&2; }

kebab() { printf '%s' "$1" | LC_ALL=C tr 'A-Z_' 'a-z-'; }

# The published scripts separate list items by spaces, dart-llm by commas: both are accepted.  A
# file name with a space, and a list that has commas already, are not changed.
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

# A list of MMLU subjects as dart-llm names them: mmlu:astronomy+anatomy, or mmlu for all.
mmlu_name() { # SUBJECTS
  local subjects
  subjects="$(with_commas "$1")"
  subjects="${subjects//[[:space:]]/}"
  subjects="${subjects//mmlu_/}"
  case "$subjects" in '' | all) printf mmlu ;; *) printf 'mmlu:%s' "${subjects//,/+}" ;; esac
}

# The texts of PPL_DATASETS, with the subjects of PPL_SUBJECTS.
perplexity_texts() {
  local texts subjects
  texts="$(with_commas "${PPL_DATASETS-}")"
  if [[ -n ${PPL_SUBJECTS-} ]]; then
    subjects="$(mmlu_name "$PPL_SUBJECTS")"
    case "$texts" in '' | embedded) texts=mmlu ;; esac
    texts=",$texts,"
    texts="${texts//,mmlu,/,$subjects,}"
    texts="${texts#,}"
    texts="${texts%,}"
  fi
  printf '%s' "${texts:-embedded}"
}

add_text() { # NAME
  local value="${!1-}"
  [[ $1 != PROMPT_SUBJECT ]] || value="$(with_commas "$value")"
  # --flag=value, so that a value that starts with a dash is not read as a flag.
  [[ -z $value ]] || arguments+=("--$(kebab "$1")=$value")
}

add_limit() { # VALUE
  case "$1" in '' | all) ;; *) arguments+=("--limit=$1") ;; esac
}

# Status 0 if a switch is on, 1 if it is off, 2 if it is not set.
switched_on() { # NAME
  case "${!1-}" in
    '') return 2 ;;
    [Tt][Rr][Uu][Ee] | [Yy][Ee][Ss] | 1) ;;
    [Ff][Aa][Ll][Ss][Ee] | [Nn][Oo] | 0) return 1 ;;
    *)
      say "$1=${!1} is neither true nor false: write true, false, yes, no, 1 or 0"
      exit 2
      ;;
  esac
}

add_switch() { # NAME
  local state=0
  switched_on "$1" || state=$?
  case "$state" in
    0) arguments+=("--$(kebab "$1")") ;;
    1) arguments+=("--no-$(kebab "$1")") ;;
  esac
}

# Whether a layer specification lets the budget choose counts of some layers.  An unreadable table
# file counts as yes, and dart-llm then reports the error.
has_auto() { # SPECIFICATION
  case "$1" in
    @*)
      [[ -r ${1#@} ]] || return 0
      sed -e 's/^[[:space:]]*#.*//' -e 's/ #.*//' <"${1#@}" | grep auto >/dev/null
      ;;
    '' | *auto*) ;;
    *) return 1 ;;
  esac
}

# Drop the default total if another setting fixes the counts.  Any other total was requested, and
# dart-llm reports a contradiction.
drop_default_total() { # ARGUMENTS...
  [[ ${TOTAL_PRUNE_PERCENT-} == "$default_total" ]] || return 0
  local argument why=''
  for argument in "$@"; do
    case "$argument" in --sparsity | --sparsity=* | --sparsities | --sparsities=*) why="$argument sets the amount" ;; esac
  done
  if [[ ${METHOD-} == dense ]]; then
    why="METHOD=$METHOD removes nothing"
  elif [[ ${PRUNE_STRATEGY-} == auto ]]; then
    why='PRUNE_STRATEGY=auto sets the counts itself'
  elif ! has_auto "${LAYER_TOPK-}"; then
    why="LAYER_TOPK=$LAYER_TOPK has no auto and fixes every count"
  fi
  [[ -n $why ]] || return 0
  TOTAL_PRUNE_PERCENT=''
  say "the default TOTAL_PRUNE_PERCENT=$default_total is ignored: $why"
}

find_dart_llm() {
  dart_llm="$(type -P dart-llm || true)"
  [[ -n $dart_llm ]] || dart_llm="$here/.venv/bin/dart-llm"
  [[ -x $dart_llm ]] && return
  say "dart-llm is neither on PATH nor in $here/.venv: run \"make setup\" in $here first"
  exit 127
}

# The default method of the scripts.  With a decay, dart-llm chooses, because dart's score has none.
set_default_method() { # ARGUMENTS...
  [[ -n ${METHOD+set} && -z $METHOD && -z ${EMA_DECAY-} ]] || return 0
  has_flag --ema-decay "$@" || METHOD=dart
}

# `launch` runs the pending command and stores its own; the last one replaces this shell (exec), so
# that signals reach it.
pending=()
launch() { # COMMAND ARGUMENTS...
  [[ ${#pending[@]} -eq 0 ]] || "$dart_llm" "${pending[@]}"
  pending=("$@")
}

begin() { # COMMAND
  local name
  arguments=("$1")
  for name in "${common_variables[@]}"; do add_text "$name"; done
  add_switch KNOWLEDGE_DRIFT
}

# Whether to generate a text, which is optional with an evaluation.
generates() { # ARGUMENTS...
  local name
  case "${GENERATION-}" in '' | 0) ;; *) return 0 ;; esac
  if has_flag --generation "$@" || has_flag --prompt "$@"; then return 0; fi
  for name in "${evaluation_switches[@]}"; do
    if switched_on "$name"; then return 1; fi
  done
}

run_dart_llm() { # ARGUMENTS...
  local name
  set_default_method "$@"
  drop_default_total "$@"
  find_dart_llm
  if generates "$@"; then
    begin run
    for name in "${prompt_variables[@]}"; do add_text "$name"; done
    for name in "${run_switches[@]}"; do add_switch "$name"; done
    launch "${arguments[@]}" "$@"
  else
    for name in "${run_switches[@]}"; do left_out "$name" 'applies only to a generated text'; done
  fi
  if switched_on EVAL_PERPLEXITY; then
    begin perplexity
    arguments+=("--data=$(perplexity_texts)")
    add_limit "${PPL_MAX_SAMPLES-}"
    launch "${arguments[@]}" "$@"
  fi
  if switched_on EVAL_MMLU; then
    begin eval
    arguments+=("--tasks=$(mmlu_name "${MMLU_DATASETS-}")" "--num-fewshot=${MMLU_SHOTS:-0}" --dense)
    add_limit "${MMLU_MAX_SAMPLES-}"
    launch "${arguments[@]}" "$@"
  fi
  if switched_on EVAL_GENERAL_NLP; then
    begin eval
    arguments+=("--tasks=$(with_commas "${GENERAL_NLP_DATASETS:-general-nlp}")" --dense)
    add_limit "${GENERAL_NLP_MAX_SAMPLES-}"
    launch "${arguments[@]}" "$@"
  fi
  if switched_on EVAL_SUMMARIZATION; then
    begin summarize
    arguments+=("--data=$(with_commas "${SUMMARIZATION_DATASETS:-xsum}")" --dense)
    [[ -z ${SUMMARIZATION_MAX_OUTPUT-} ]] || arguments+=("--max-output=$SUMMARIZATION_MAX_OUTPUT")
    add_limit "${SUMMARIZATION_MAX_SAMPLES-}"
    launch "${arguments[@]}" "$@"
  fi
  exec "$dart_llm" "${pending[@]}"
}

has_flag() { # FLAG ARGUMENTS...
  local flag="$1" argument
  shift
  for argument in "$@"; do
    case "$argument" in "$flag" | "$flag"=*) return 0 ;; esac
  done
  return 1
}

# Whether the arguments request a study of several methods or prompts.
is_study() { # ARGUMENTS...
  local flag
  for flag in --methods --mode --prompts --passages; do
    if has_flag "$flag" "$@"; then return 0; fi
  done
  return 1
}

left_out() { # NAME REASON
  if switched_on "$1"; then say "$1=${!1} $2 and is ignored"; fi
}

run_study() { # ARGUMENTS...
  local name
  arguments=(drift)
  drop_default_total "$@"
  for name in "${study_variables[@]}"; do add_text "$name"; done
  [[ -z ${SEED-} ]] || arguments+=("--seeds=$SEED")
  case "${METHOD-}" in '' | dart) ;; *) arguments+=("--methods=dense,never,$METHOD") ;; esac
  if [[ -n ${CUSTOM_PROMPT_TEXT-} ]] && ! has_flag --prompts "$@" && ! has_flag --passages "$@"; then
    arguments+=("--prompt=$CUSTOM_PROMPT_TEXT")
  fi
  for name in "${evaluation_switches[@]}" "${run_switches[@]}"; do
    left_out "$name" 'applies only to a single run'
  done
  find_dart_llm
  exec "$dart_llm" "${arguments[@]}" "$@"
}
