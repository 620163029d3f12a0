#!/usr/bin/env bash
# Prune a model and evaluate it: a thin wrapper around `dart-llm run`, `perplexity`, `eval` and
# `summarize` (docs/scripts.md).
# Set a variable here, in front of the command (MODEL=gpt2 ./run_experiment.sh), or with
# export; an empty value means "not set".  Put text with quotes, $, backticks or braces on a
# separate line below the list: CUSTOM_PROMPT_TEXT='...'.  Arguments such as --fresh are passed on.

: "${METHOD:=}"                       # a method (published, dense, ...); empty: dart
: "${MODEL:=smollm2-135m}"            # hub id, folder, .gguf file, or the default model
: "${CACHE_DIR:=}"                    # cache of weights; empty: the hub's cache
: "${DEVICE:=}"                       # 0, cuda:0, cpu, mps; empty: GPU 0 if present, else CPU
: "${LAYER_TOPK:=all:auto}"           # keep ratios: all:auto, 0-5:0.6,6-11:0.8, 3:#512 or @FILE
: "${TOTAL_PRUNE_PERCENT:=50}"        # percent of FFN neurons to remove in layers marked auto
: "${MASKING_STEP:=0}"                # dense decode tokens before the first mask
: "${RELEASE_STEP:=}"                 # decode step from which everything runs dense; empty: never
: "${EMA_DECAY:=}"                    # decay of averaged activations; empty: sums
: "${RANKING_METHOD:=}"               # max, mean, combined, product, magnitude; empty: the method's
: "${PRUNE_STRATEGY:=topk}"           # topk, or auto: keep scores above the mean
: "${KNOWLEDGE_DRIFT:=}"              # true: re-mask on drift; false: never re-mask; empty: the method's rule
: "${PROMPT_TYPE:=custom}"            # custom, or mmlu: questions of PROMPT_SUBJECT, no answers
: "${PROMPT_SUBJECT:=}"               # MMLU subjects, separated by commas or spaces
: "${CUSTOM_PROMPT_TEXT:=}"           # the prompt, or the name of an included prompt or of a file in datasets/
: "${PROMPT_LENGTH:=}"                # maximum prompt length in tokens; empty: the model's context
: "${GENERATION:=0}"                  # tokens to generate; 0: evaluate only
: "${EVAL_PERPLEXITY:=false}"         # measure perplexity, dense and pruned
: "${PPL_DATASETS:=embedded}"         # embedded, wikitext2, c4, mmlu, or a text file
: "${PPL_SUBJECTS:=}"                 # MMLU subjects for PPL_DATASETS=mmlu; empty: all
: "${PPL_MAX_SAMPLES:=}"              # slices per text; empty: all
: "${EVAL_MMLU:=false}"               # measure MMLU accuracy, dense and pruned
: "${MMLU_DATASETS:=all}"             # MMLU subjects
: "${MMLU_SHOTS:=0}"                  # examples before each question
: "${MMLU_MAX_SAMPLES:=}"             # questions per subject; empty: all
: "${EVAL_GENERAL_NLP:=false}"        # measure BoolQ, RTE, HellaSwag, ..., dense and pruned
: "${GENERAL_NLP_DATASETS:=}"         # which of the seven tasks; empty: all seven
: "${GENERAL_NLP_MAX_SAMPLES:=}"      # items per task; empty: all
: "${EVAL_SUMMARIZATION:=false}"      # measure ROUGE of summaries, dense and pruned
: "${SUMMARIZATION_DATASETS:=xsum}"   # data sets to summarize
: "${SUMMARIZATION_MAX_SAMPLES:=}"    # documents per data set; empty: all
: "${SUMMARIZATION_MAX_OUTPUT:=256}"  # tokens per summary
: "${SEED:=0}"                        # seed of all randomness
: "${VERBOSE:=false}"                 # log every mask and every drift window
: "${SAVE_ACTIVATIONS:=false}"        # save activations as safetensors
: "${EXPERIMENT_NAME:=}"              # name under RESULTS_DIR; empty: <model>-<method>-<sparsity>
: "${RESULTS_DIR:=results}"           # results go to RESULTS_DIR/EXPERIMENT_NAME/<time>/

set -euo pipefail
# shellcheck source=scripts/run_common.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/scripts/run_common.sh"
run_dart_llm "$@"
