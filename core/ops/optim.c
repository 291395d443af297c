/* optim.c: what an optimizer step takes. The arithmetic is in optim_kernels.h. */
#include "nn.h"
#include <math.h>

/* What each kind keeps: the first moment, the second. */
static const struct { const char *name; int m, v; } kinds[WANE_OPTIMIZER_END] = {
  { "adam", 1, 1 }, { "sgd", 1, 0 }, { "lion", 1, 0 }, { "rmsprop", 0, 1 }, { "adagrad", 0, 1 },
};

/* A state and its scales: f32 alone, or u8 codes with one f32 for every 256. */
static int check_state(const char *name, const wane_tensor *state, const wane_tensor *absmax, int64_t n) {
  int64_t blocks = (n + 255) / 256;
  if (wane_numel(state) != n || !wane_is_contiguous(state) || state->dtype != (absmax ? WANE_U8 : WANE_F32))
    return wane_fail(WANE_E_SHAPE, "optimizer_step: expected %s of %lld contiguous values, %s, found %s", name, (long long)n,
                     absmax ? "u8 codes" : "f32", wane_shape_text(state));
  if (absmax && (wane_numel(absmax) != blocks || absmax->dtype != WANE_F32 || !wane_is_contiguous(absmax)))
    return wane_fail(WANE_E_SHAPE, "optimizer_step: expected %lld f32 scales of %s, found %s", (long long)blocks, name, wane_shape_text(absmax));
  return WANE_OK;
}

int wane_optimizer_step(wane_stream *s, const wane_handle *hparam, const wane_handle *hgrad, const wane_handle *hm, const wane_handle *hv, const wane_handle *hm_absmax,
                        const wane_handle *hv_absmax, const wane_handle *hfactor, const wane_optimizer_options *o) {
  int status = wane_enter(s);
  if (status) return status;
  wane_tensor *param = wane_use(s, hparam, "param"), *grad = param ? wane_use(s, hgrad, "grad") : NULL, *m, *v, *am, *av, *factor;
  if (!grad) return WANE_E_STALE;
  if ((status = wane_nn_optional(s, hm, "m", &m)) || (status = wane_nn_optional(s, hv, "v", &v)) || (status = wane_nn_optional(s, hm_absmax, "m's scales", &am)) ||
      (status = wane_nn_optional(s, hv_absmax, "v's scales", &av)) || (status = wane_nn_optional(s, hfactor, "factor", &factor))) return status;
  if (o->kind < 0 || o->kind >= WANE_OPTIMIZER_END) return wane_fail(WANE_E_ARG, "optimizer_step: there is no kind %d", o->kind);
  if (o->step < 1) return wane_fail(WANE_E_ARG, "optimizer_step: steps count from 1, found %lld", (long long)o->step);
  int64_t n = wane_numel(param);
  if (!wane_is_float(param->dtype) || !wane_is_contiguous(param)) return wane_fail(WANE_E_DTYPE, "optimizer_step: the parameter must be a contiguous float tensor, found %s", wane_shape_text(param));
  if (!wane_is_float(grad->dtype) || wane_numel(grad) != n) return wane_fail(WANE_E_SHAPE, "optimizer_step: gradient %s does not fit parameter %s", wane_shape_text(grad), wane_shape_text(param));
  if (!m != !kinds[o->kind].m || !v != !kinds[o->kind].v)
    return wane_fail(WANE_E_ARG, "optimizer_step: %s keeps%s%s", kinds[o->kind].name, kinds[o->kind].m ? " a first moment" : "", kinds[o->kind].v ? " a second moment" : "");
  if ((m && (status = check_state("m", m, am, n))) || (v && (status = check_state("v", v, av, n)))) return status;
  if (factor && (factor->dtype != WANE_F32 || wane_numel(factor) != 1)) return wane_fail(WANE_E_SHAPE, "optimizer_step: expected one f32 as factor, found %s", wane_shape_text(factor));
  wane_handle tmp = { NULL, 0, 0 };
  grad = wane_contiguous(s, grad, &tmp);
  if (!grad) return WANE_E_MEMORY;
  if (n > 0) {
    wane_op *op = wane_op_new(s, WANE_OP_OPTIMIZER);
    void *const p[7] = { param->data, grad->data, m ? m->data : NULL, v ? v->data : NULL, am ? am->data : NULL, av ? av->data : NULL, factor ? factor->data : NULL };
    for (int i = 0; i < 7; i++) op->p[i] = p[i];
    op->n[0] = n;
    op->i[0] = param->dtype; op->i[1] = grad->dtype; op->i[2] = o->kind; op->i[3] = o->step == 1; op->i[4] = o->upstream;
    op->f[0] = (float)o->lr; op->f[1] = (float)o->beta1; op->f[2] = (float)o->beta2; op->f[3] = (float)o->eps; op->f[4] = (float)o->weight_decay;
    op->f[5] = (float)(1.0 - o->beta1); op->f[6] = (float)(1.0 - o->beta2);
    op->d[0] = o->lr / (1.0 - pow(o->beta1, (double)o->step));
    op->d[1] = sqrt(1.0 - pow(o->beta2, (double)o->step));
    op->nchunks = wane_chunks(n, 8 << 10);
    wane_op_push(s, op, param, m ? m : v);
    wane_tensor *const others[3] = { v, am, av };      /* what else it writes */
    for (int i = 0; i < 3; i++) if (others[i]) others[i]->storage->ticket = param->storage->ticket;
  }
  wane_tensor_free(&tmp);
  return WANE_OK;
}
