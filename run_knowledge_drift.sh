#!/usr/bin/env bash
# Generate with drift detection on, and evaluate: a thin shell over `dart-llm run`, `perplexity`,
# `eval` and `summarize` (docs/scripts.md).
# Set a variable here, in front of the command (MODEL=gpt2 ./run_knowledge_drift.sh), or with
# export; an empty one is not given.  Text with quotes, $, backticks or braces goes on a line of
# its own below the list: CUSTOM_PROMPT_TEXT='...'.  Arguments are handed on, such as --fresh.
# With --methods, --mode, --prompts or --passages among them it is a shell over `dart-llm drift`:
# methods side by side on many prompts or passages (docs/drift.md).

: "${METHOD:=}"                       # preset (published, dense, ...); empty: dart, if it can
: "${MODEL:=smollm2-135m}"            # hub id, folder, .gguf file, or the embedded default
: "${CACHE_DIR:=}"                    # where weights are kept; empty: the hub's own cache
: "${DEVICE:=}"                       # 0, cuda:0, cpu, mps; empty: GPU 0 if any, else CPU
: "${LAYER_TOPK:=all:auto}"           # keep ratios: all:auto, 0-5:0.6,6-11:0.8, 3:#512 or @FILE
: "${TOTAL_PRUNE_PERCENT:=50}"        # percent of FFN neurons to remove, over layers marked auto
: "${MASKING_STEP:=0}"                # dense decode tokens before the first mask
: "${RELEASE_STEP:=}"                 # decode step from which everything runs dense; empty: never
: "${EMA_DECAY:=}"                    # decay of averaged activations; empty: sums
: "${RANKING_METHOD:=}"               # max, mean, combined, product, magnitude; empty: the preset's
: "${PRUNE_STRATEGY:=topk}"           # topk, or auto: keep scores above the mean
: "${KNOWLEDGE_DRIFT:=true}"          # true: re-mask on drift; false: never; empty: as the preset
: "${PROMPT_TYPE:=custom}"            # custom, or mmlu: questions of PROMPT_SUBJECT, no answers
: "${PROMPT_SUBJECT:=}"               # one or several MMLU subjects, with commas or spaces
: "${CUSTOM_PROMPT_TEXT:=}"           # the prompt, a shipped prompt's name or a text in datasets/
: "${PROMPT_LENGTH:=}"                # cut the prompt to so many tokens; empty: model's context
: "${GENERATION:=300}"                # tokens to generate; with 0 an evaluation needs no prompt
: "${EVAL_PERPLEXITY:=false}"         # perplexity, dense beside pruned
: "${PPL_DATASETS:=embedded}"         # embedded, wikitext2, c4, mmlu, or a text file
: "${PPL_SUBJECTS:=}"                 # MMLU subjects for PPL_DATASETS=mmlu; empty: all
: "${PPL_MAX_SAMPLES:=}"              # slices per text; empty: all
: "${EVAL_MMLU:=false}"               # MMLU accuracy, dense beside pruned
: "${MMLU_DATASETS:=all}"             # MMLU subjects
: "${MMLU_SHOTS:=0}"                  # examples before each question
: "${MMLU_MAX_SAMPLES:=}"             # questions per subject; empty: all
: "${EVAL_GENERAL_NLP:=false}"        # BoolQ, RTE, HellaSwag, ..., dense beside pruned
: "${GENERAL_NLP_DATASETS:=}"         # which of the seven tasks; empty: all seven
: "${GENERAL_NLP_MAX_SAMPLES:=}"      # items per task; empty: all
: "${EVAL_SUMMARIZATION:=false}"      # ROUGE of summaries, dense beside pruned
: "${SUMMARIZATION_DATASETS:=xsum}"   # data sets to summarize
: "${SUMMARIZATION_MAX_SAMPLES:=}"    # documents per data set; empty: all
: "${SUMMARIZATION_MAX_OUTPUT:=256}"  # tokens per summary
: "${SEED:=0}"                        # seed of everything random
: "${VERBOSE:=false}"                 # log every mask and every drift window
: "${SAVE_ACTIVATIONS:=false}"        # save activations as safetensors
: "${EXPERIMENT_NAME:=}"              # name under RESULTS_DIR; empty: <model>-<method>-<sparsity>
: "${RESULTS_DIR:=results}"           # results go to RESULTS_DIR/EXPERIMENT_NAME/<time>/

set -euo pipefail
# shellcheck source=scripts/run_common.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/scripts/run_common.sh"
if is_study "$@"; then run_study "$@"; fi
run_dart_llm "$@"
