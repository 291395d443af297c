/* nn_kernels.h: all kernels of the neural network ops for the vectors of the including file, and their registration. */
#include "nn_attention_back_kernels.h"
#include "nn_attention_kernels.h"
#include "nn_choose_kernels.h"
#include "nn_place_kernels.h"
#include "nn_row_kernels.h"
#include "nn_gradient_kernels.h"
#include "optim_kernels.h"

/* Puts this instruction set's kernels into the table. */
static void nn_kernels_register(wane_backend *b) {
  b->ops[WANE_OP_RMS_NORM] = VEC_NAME(wane_nn_rms_norm);
  b->ops[WANE_OP_LAYER_NORM] = VEC_NAME(wane_nn_layer_norm);
  b->ops[WANE_OP_RMS_NORM_BACKWARD] = VEC_NAME(wane_nn_norm_backward);
  b->ops[WANE_OP_LAYER_NORM_BACKWARD] = VEC_NAME(wane_nn_norm_backward);
  b->ops[WANE_OP_ROPE] = VEC_NAME(wane_nn_rope);
  b->ops[WANE_OP_KV_APPEND] = VEC_NAME(wane_nn_kv_append);
  b->ops[WANE_OP_ATTENTION] = VEC_NAME(wane_nn_attention);
  b->ops[WANE_OP_ATTENTION_MERGE] = VEC_NAME(wane_nn_attention_merge);
  b->ops[WANE_OP_ATTENTION_BACKWARD] = VEC_NAME(wane_nn_attention_backward);
  b->ops[WANE_OP_GLU] = VEC_NAME(wane_nn_glu);
  b->ops[WANE_OP_SOFTMAX] = VEC_NAME(wane_nn_softmax);
  b->ops[WANE_OP_NLL] = VEC_NAME(wane_nn_nll);
  b->ops[WANE_OP_NLL_BACKWARD] = VEC_NAME(wane_nn_nll_backward);
  b->ops[WANE_OP_OPTIMIZER] = VEC_NAME(wane_nn_optimizer);
  b->ops[WANE_OP_UNARY_BACKWARD] = VEC_NAME(wane_nn_unary_backward);
  b->ops[WANE_OP_GLU_BACKWARD] = VEC_NAME(wane_nn_glu_backward);
  b->ops[WANE_OP_SOFTMAX_BACKWARD] = VEC_NAME(wane_nn_softmax_backward);
  b->ops[WANE_OP_SCATTER_ADD] = VEC_NAME(wane_nn_scatter_add);
  b->ops[WANE_OP_TOPK_BACKWARD] = VEC_NAME(wane_nn_topk_backward);
  b->ops[WANE_OP_DROPOUT] = VEC_NAME(wane_nn_dropout);
  b->ops[WANE_OP_ADD_INTO] = VEC_NAME(wane_nn_add_into);
  b->ops[WANE_OP_EXPERTS_WEIGHT] = VEC_NAME(wane_nn_experts_weight);
  b->ops[WANE_OP_PENALTY] = VEC_NAME(wane_nn_penalty);
  b->ops[WANE_OP_SAMPLE_FILTER] = VEC_NAME(wane_nn_filter);
  b->ops[WANE_OP_SAMPLE] = VEC_NAME(wane_nn_sample);
}
