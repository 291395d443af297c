/* nn_attention_back_kernels.h: the gradient of attention, block by block (Dao 2022, appendix B.4): the weights are computed again from q, k and
 * the logarithm of their sums, so that nothing of size [T, keys] is kept.
 *
 *   P = 2^(S - lse)    dV = Pᵀ dO    dP = dO Vᵀ    dS = P ∘ (dP - delta), delta = sum of dO ∘ O    dQ = s dS K    dK = s dSᵀ Q
 *
 * The record is WANE_OP_ATTENTION's (p 0 to 8, n, stride, f, i 0 to 3) with i 4 = phase; p 6 is the workspace, see wane_attention_places. Phases:
 *   0  delta                p 0 out, 9 dout. Chunks: rows
 *   1  dq, and each query head's dk and dv into the workspace. p 0 dq, 9 dout. Chunks: (b, head), keys in the outer loop. i 5: dbias too, p 10, f32, zeros
 *      before, which dS is added to; stride k 4 is its own of dimension k, 0 where the bias repeats. Chunks are heads then, one for all where it
 *      repeats over them, so that no sum depends on who was first
 *   2  dk and dv            p 0 dk, 1 dv [B, keys, KV, D]: sums over the heads that share a kv head. Chunks: keys */
#ifndef WANE_NN_ATTENTION_BACK_KERNELS_H
#define WANE_NN_ATTENTION_BACK_KERNELS_H
#include "nn_attention_kernels.h"

/* Rows of q that meet a block of keys at once: KEYS, fewer for heads so wide that the scratch would not hold them. */
static inline int back_rows(int64_t D) { return D <= 512 ? KEYS : 16; }

/* Scratch of a chunk of phase 1. Rows of q, dout and k are `wide` floats apart, padded with zeros. */
typedef struct back_block {
  attention_block a;                   /* a.q: times the scale as scores want it; a.D = D, a.DP = wide, a.G = 1 */
  float *dout, *vt, *k;                /* [rows, wide], [D, KEYS], [KEYS, wide] */
  float *p, *ds, *pt, *dst;            /* [rows, KEYS] twice, [KEYS, rows] twice; pt serves as the softcap's slope first */
  float *dq, *dk, *dv;                 /* of this head in the workspace */
} back_block;

/* c[rows, n vectors] (+)= a[rows, k] b[k, n vectors], any number of rows. */
static void back_product(const float *a, int64_t lda, const float *b, int64_t ldb, float *c, int64_t ldc, int64_t k, int64_t width, int64_t rows, int add) {
  for (int64_t r = 0; r < rows; r += TILE)
    product(a + r * lda, lda, b, ldb, c + r * ldc, ldc, k, (int)(width / VW), rows - r < TILE ? (int)(rows - r) : TILE, add, (const char *)b);
}

/* out[n][m] = in[m][n] for a [rows, KEYS] matrix; rows a multiple of VW. */
static void back_transpose(const float *in, int64_t rows, float *out) {
  for (int64_t r = 0; r < rows; r += VW)
    for (int j = 0; j < KEYS; j += VW) {
      vf v[VW];
      for (int i = 0; i < VW; i++) v[i] = vf_load(in + (r + i) * KEYS + j);
      vec_transpose(v);
      for (int i = 0; i < VW; i++) vf_store(out + (j + i) * rows + r, v[i]);
    }
}

/* Rows of a strided tensor as f32 rows `wide` apart, times `scale`. */
static void back_pack(float *out, int64_t wide, const void *x, int dtype, int64_t at, int64_t stride, int64_t D, int64_t rows, float scale) {
  vf k = vf_set1(scale);
  for (int64_t r = 0; r < rows; r++, at += stride) {
    for (int64_t d = 0; d < D; d += VW) vf_store(out + r * wide + d, vf_mul(vf_get_n(x, dtype, at + d, vec_left(d, D)), k));
    for (int64_t d = (D + VW - 1) / VW * VW; d < wide; d += VW) vf_store(out + r * wide + d, vf_zero());
  }
}

/* The block's keys j0 .. j0 + n - 1: kᵀ and vᵀ for the scores, k as rows for dq. */
static void back_keys(back_block *z, int64_t j0, int n) {
  attention_block *a = &z->a;
  const wane_op *op = a->op;
  attention_block v = *a;
  wane_op as_keys = *op;
  pack_k(a, j0, n);
  as_keys.p[2] = op->p[3];                            /* v the way k is packed */
  as_keys.i[1] = op->i[2];
  memcpy(as_keys.stride[1], op->stride[2], sizeof op->stride[1]);
  v.op = &as_keys;
  v.kt = z->vt;
  pack_k(&v, j0, n);
  const int64_t *st = op->stride[1];
  back_pack(z->k, a->DP, op->p[2], op->i[1], a->b * st[0] + a->kv * st[1] + j0 * st[2], st[2], a->D, n, 1.0f);
}

/* The block's rows of q and dout. */
static void back_queries(back_block *z, int64_t row0, int64_t rows) {
  attention_block *a = &z->a;
  const wane_op *op = a->op;
  const int64_t *st = op->stride[0];
  a->row0 = row0; a->rows = rows;
  back_pack(a->q, a->DP, op->p[1], op->i[0], a->b * st[0] + row0 * st[1] + a->head * st[2], st[1], a->D, rows,
            op->f[1] != 0.0f ? op->f[0] : op->f[0] * 1.44269504f);
  int64_t row = op->n[1] * a->D;
  back_pack(z->dout, a->DP, op->p[9], op->i[0], (a->b * op->n[3] + row0) * row + a->head * a->D, row, a->D, rows, 1.0f);
}

/* p = weights of the rows for keys j0 .. j0 + n - 1; pt = the softcap's slope where there is one. */
static void back_weights(back_block *z, int64_t j0, int n) {
  attention_block *a = &z->a;
  const wane_op *op = a->op;
  const float *lse = (const float *)op->p[7] + (a->b * op->n[1] + a->head) * op->n[3] + a->row0;
  int masked = op->p[4] != NULL, all, capped = op->f[1] != 0.0f;
  back_product(a->q, a->DP, a->kt, KEYS, z->p, KEYS, a->D, KEYS, a->rows, 0);
  sees(a, 0, a->rows, j0, j0 + KEYS, &all);
  for (int64_t r = 0; r < a->rows; r++) {
    float *s = z->p + r * KEYS;
    if (capped) {
      cap_scores(a, s);
      vf inverse = vf_set1(1.0f / (op->f[1] * 1.44269504f)), one = vf_set1(1.0f);
      for (int j = 0; j < KEYS; j += VW) {
        vf t = vf_mul(vf_load(s + j), inverse);
        vf_store(z->pt + r * KEYS + j, vf_sub(one, vf_mul(t, t)));
      }
    }
    if (masked || !all || op->p[5] || n < KEYS) dress_scores(a, s, r, j0, n, masked);
    vf sum = vf_set1(lse[r]);
    for (int j = 0; j < KEYS; j += VW) vf_store(s + j, vec_exp2_negative(vf_sub(vf_load(s + j), sum)));
  }
}

/* Adds dS of a row to dbias. */
static void back_note(const back_block *z, int64_t r, int64_t j0, int n) {
  const wane_op *op = z->a.op;
  const float *ds = z->ds + r * KEYS;
  int64_t step = op->stride[3][4];
  float *to = (float *)op->p[10] + z->a.b * op->stride[0][4] + z->a.head * op->stride[1][4] + (z->a.row0 + r) * op->stride[2][4] + j0 * step;
  for (int j = 0; j < n; j++) to[j * step] += ds[j];
}

/* ds, times what q was divided by, so that dK = dsᵀ q and dQ = scale of q * ds k. */
static void back_scores(back_block *z, int64_t j0, int n, const float *delta) {
  attention_block *a = &z->a;
  int capped = a->op->f[1] != 0.0f;
  back_product(z->dout, a->DP, z->vt, KEYS, z->ds, KEYS, a->D, KEYS, a->rows, 0);
  vf factor = vf_set1(capped ? 1.0f : 0.69314718f);
  for (int64_t r = 0; r < a->rows; r++) {
    vf d = vf_set1(delta[a->row0 + r]);
    for (int j = 0; j < KEYS; j += VW) {
      float *ds = z->ds + r * KEYS + j;
      vf_store(ds, vf_mul(vf_load(z->p + r * KEYS + j), vf_sub(vf_load(ds), d)));
    }
    if (a->op->i[5]) back_note(z, r, j0, n);
    for (int j = 0; j < KEYS; j += VW) {
      float *ds = z->ds + r * KEYS + j;
      vf v = vf_mul(vf_load(ds), factor);
      vf_store(ds, capped ? vf_mul(v, vf_load(z->pt + r * KEYS + j)) : v);
    }
  }
}

/* One block of rows against one block of keys. */
static void back_meet(back_block *z, int64_t j0, int n, const float *delta) {
  attention_block *a = &z->a;
  int64_t rows = a->rows, padded = (rows + VW - 1) / VW * VW, wide = a->DP;
  back_weights(z, j0, n);
  back_scores(z, j0, n, delta);
  memset(z->p + rows * KEYS, 0, (size_t)(padded - rows) * KEYS * sizeof(float));
  memset(z->ds + rows * KEYS, 0, (size_t)(padded - rows) * KEYS * sizeof(float));
  back_transpose(z->p, padded, z->pt);
  back_transpose(z->ds, padded, z->dst);
  back_product(z->pt, padded, z->dout, wide, z->dv + j0 * wide, wide, rows, wide, n, 1);
  back_product(z->dst, padded, a->q, wide, z->dk + j0 * wide, wide, rows, wide, n, 1);
  back_product(z->ds, KEYS, z->k, wide, z->dq + a->row0 * wide, wide, n, wide, rows, 1);
}

static wane_attention_places back_places(const wane_op *op) { return wane_attention_place(op->n[0] * op->n[1], op->n[3], op->n[5], op->n[4]); }

/* Phase 0. */
static void back_delta(const wane_op *op, uint32_t chunk) {
  int64_t H = op->n[1], T = op->n[3], D = op->n[4], lo, hi;
  float *delta = (float *)op->p[6] + back_places(op).delta;
  wane_op_range(op, chunk, op->n[0] * T * H, 1, &lo, &hi);
  int64_t b = lo / (T * H), t = lo / H % T, h = lo % H;
  for (int64_t row = lo; row < hi; row++) {
    vf sum = vf_zero();
    for (int64_t d = 0; d < D; d += VW) {
      int n = vec_left(d, D);
      sum = vf_fma(vf_get_n(op->p[9], op->i[0], row * D + d, n), vf_get_n(op->p[0], op->i[0], row * D + d, n), sum);
    }
    delta[(b * H + h) * T + t] = vf_sum(sum);
    if (++h == H) h = 0, t++;
    if (t == T) t = 0, b++;
  }
}

static void back_open(back_block *z, const wane_op *op, int64_t b, int64_t head, int64_t wide) {
  int64_t D = op->n[4], rows = back_rows(D);
  float *p = wane_scratch();
  attention_block *a = &z->a;
  memset(z, 0, sizeof *z);
  a->op = op; a->b = b; a->head = head; a->kv = head / (op->n[1] / op->n[2]); a->D = D; a->DP = wide; a->G = 1;
  a->kt = p; p += D * KEYS;
  z->vt = p; p += D * KEYS;
  z->k = p; p += KEYS * wide;
  a->q = p; p += rows * wide;
  z->dout = p; p += rows * wide;
  z->p = p; p += rows * KEYS;
  z->ds = p; p += rows * KEYS;
  z->pt = p; p += rows * KEYS;
  z->dst = p;
}

/* Phase 1 of one (b, head). */
static void back_head(const wane_op *op, int64_t unit) {
  wane_attention_places l = back_places(op);
  back_block z;
  int64_t T = op->n[3], keys = op->n[5], D = op->n[4], H = op->n[1], step = back_rows(D);
  float *work = op->p[6];
  int all;
  back_open(&z, op, unit / H, unit % H, l.wide);
  z.dq = work + l.dq + unit * T * l.wide; z.dk = work + l.dk + unit * l.keys * l.wide; z.dv = work + l.dv + unit * l.keys * l.wide;
  memset(z.dq, 0, (size_t)(T * l.wide) * sizeof(float));
  memset(z.dk, 0, (size_t)(keys * l.wide) * sizeof(float));
  memset(z.dv, 0, (size_t)(keys * l.wide) * sizeof(float));
  for (int64_t j = 0; j < keys; j += KEYS) {
    int n = keys - j < KEYS ? (int)(keys - j) : KEYS, packed = 0;
    if (op->p[4]) {
      const uint8_t *mask = (const uint8_t *)op->p[4] + z.a.b * op->n[9] + j;
      for (int i = 0; i < KEYS; i++) z.a.mask[i] = i < n && mask[i] ? 1.0f : 0.0f;
    }
    for (int64_t r = 0; r < T; r += step) {
      z.a.row0 = r; z.a.rows = T - r < step ? T - r : step;
      if (!sees(&z.a, 0, z.a.rows, j, j + n, &all)) continue;
      if (!packed++) back_keys(&z, j, n);
      back_queries(&z, r, z.a.rows);
      back_meet(&z, j, n, work + l.delta + unit * T);
    }
  }
  vf scale = vf_set1(op->f[1] != 0.0f ? op->f[0] : op->f[0] * 1.44269504f);
  for (int64_t t = 0; t < T; t++)
    for (int64_t d = 0; d < D; d += VW)
      vf_put_n(op->p[0], op->i[0], ((z.a.b * T + t) * H + z.a.head) * D + d, vf_mul(vf_load(z.dq + t * l.wide + d), scale), vec_left(d, D));
}

/* Phase 2. */
static void back_reduce(const wane_op *op, uint32_t chunk) {
  wane_attention_places l = back_places(op);
  int64_t H = op->n[1], KV = op->n[2], G = H / KV, D = op->n[4], keys = op->n[5], lo, hi;
  wane_op_range(op, chunk, op->n[0] * keys, 1, &lo, &hi);
  for (int which = 0; which < 2; which++) {
    const float *work = (const float *)op->p[6] + (which ? l.dv : l.dk);
    for (int64_t row = lo; row < hi; row++)
      for (int64_t kv = 0; kv < KV; kv++)
        for (int64_t d = 0; d < D; d += VW) {
          const float *from = work + ((row / keys * H + kv * G) * l.keys + row % keys) * l.wide + d;
          vf sum = vf_load(from);
          for (int64_t g = 1; g < G; g++) sum = vf_add(sum, vf_load(from + g * l.keys * l.wide));
          vf_put_n(op->p[which], op->i[which ? 2 : 1], (row * KV + kv) * D + d, sum, vec_left(d, D));
        }
  }
}

/* Phase 1 of a chunk. */
static void back_heads(const wane_op *op, uint32_t chunk) {
  int64_t B = op->n[0], H = op->n[1], lo, hi;
  wane_op_range(op, chunk, op->i[5] ? H : B * H, 1, &lo, &hi);
  for (int64_t unit = lo; unit < hi; unit++) {
    if (!op->i[5]) back_head(op, unit);
    else for (int64_t b = 0; b < B; b++) back_head(op, b * H + unit);
  }
}

static void VEC_NAME(wane_nn_attention_backward)(const wane_op *op, uint32_t chunk) {
  switch (op->i[4]) {
  case 0: back_delta(op, chunk); break;
  case 1: back_heads(op, chunk); break;
  default: back_reduce(op, chunk);
  }
}
#endif
