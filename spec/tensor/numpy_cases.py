"""Makes cases for numpy_spec.lua: random ops on random shapes, strides, broadcasts and dtypes, with numpy's results.

    python3 spec/tensor/numpy_cases.py OUT_PREFIX SEED COUNT [LARGEST]

writes OUT_PREFIX.safetensors (inputs and expected outputs) and OUT_PREFIX.json (what to do with them). COUNT: cases an op
group; LARGEST: bound of the elements of an input. Float results are computed in float64 from the inputs' exact values and
rounded once, integers in int64 with wrap-around, so that nothing here shares wane's way of computing. The fixture in the
repository was made with: spec/fixtures/tensor/cases 7 14 60
"""
import json
import math
import struct
import sys

import numpy as np

FLOATS, INTEGERS = ["f32", "f16", "bf16"], ["i8", "u8", "i32", "i64"]
PLAIN = FLOATS + INTEGERS + ["bool"]
NUMPY = {"f32": np.float32, "f16": np.float16, "i8": np.int8, "u8": np.uint8, "i32": np.int32, "i64": np.int64, "bool": np.bool_}
SAFE = {"f32": "F32", "f16": "F16", "bf16": "BF16", "i8": "I8", "u8": "U8", "i32": "I32", "i64": "I64", "bool": "BOOL"}
RTOL = {"f32": 3e-6, "f16": 1.1e-3, "bf16": 8e-3}
RANK = {"bool": 0, "u8": 1, "i8": 1, "i32": 2, "i64": 3, "f16": 4, "bf16": 4, "f32": 5}


# ---------------------------------------------------------------- dtypes

def bf16_bits(x):
    """Nearest bf16 (ties to even) of float64 values, through f32; as 16-bit patterns."""
    u = np.asarray(x, np.float32).view(np.uint32).astype(np.uint64)
    rounded = (u + 0x7FFF + ((u >> 16) & 1)) >> 16
    nan = (u & 0x7FFFFFFF) > 0x7F800000
    return np.where(nan, (u >> 16) | 0x40, rounded).astype(np.uint16)


def rounded(x, dtype):
    """Values as they are once stored as dtype: float64, or int64 for integers and bool."""
    if dtype == "bf16":
        return (bf16_bits(x).astype(np.uint32) << 16).view(np.float32).astype(np.float64)
    if dtype in FLOATS:
        with np.errstate(over="ignore"):
            return np.asarray(x, np.float64).astype(NUMPY[dtype]).astype(np.float64)
    if dtype == "bool":
        return (np.asarray(x) != 0).astype(np.int64)
    return np.asarray(x).astype(np.int64).astype(NUMPY[dtype]).astype(np.int64)


def stored(x, dtype):
    """Bytes of values in a safetensors file."""
    if dtype == "bf16":
        return bf16_bits(x).tobytes()
    if dtype in FLOATS:
        with np.errstate(over="ignore"):
            return np.asarray(x).astype(NUMPY[dtype]).tobytes()
    return np.asarray(x).astype(NUMPY[dtype]).tobytes()


def promote(a, b):
    if a == b:
        return a
    if RANK[a] == RANK[b]:
        return "i32" if RANK[a] == 1 else "f32"
    return a if RANK[a] > RANK[b] else b


def float_to_int(x, dtype):
    """Truncated, saturated, NaN to 0."""
    info = np.iinfo(NUMPY[dtype])
    flat = [0 if math.isnan(v) else info.max if v >= info.max else info.min if v <= info.min else int(v) for v in np.ravel(x).tolist()]
    return np.array(flat, np.int64).reshape(np.shape(x))


def cast(x, source, target):
    if source in FLOATS and target in INTEGERS:
        return float_to_int(x, target)
    return rounded(x, target)


# ---------------------------------------------------------------- the file

class Cases:
    def __init__(self, seed, largest):
        self.rng = np.random.default_rng(seed)
        self.largest = largest
        self.tensors, self.cases = {}, []

    def put(self, values, dtype):
        name = "t%d" % len(self.tensors)
        self.tensors[name] = (dtype, list(np.shape(values)), stored(values, dtype))
        return name

    def add(self, group, op, inputs, outputs, rtol=0.0, atol=0.0, **params):
        """inputs: Arg; outputs: (values, dtype)."""
        self.cases.append({
            "group": group, "op": op, "inputs": [a.spec for a in inputs], "params": params, "rtol": rtol, "atol": float(atol),
            "outputs": [{"tensor": self.put(v, d), "dtype": d} for v, d in outputs],
        })

    def write(self, prefix):
        header, at = {}, 0
        for name, (dtype, shape, data) in self.tensors.items():
            header[name] = {"dtype": SAFE[dtype], "shape": shape, "data_offsets": [at, at + len(data)]}
            at += len(data)
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        with open(prefix + ".safetensors", "wb") as f:
            f.write(struct.pack("<Q", len(text)) + text)
            for _, _, data in self.tensors.values():
                f.write(data)
        with open(prefix + ".json", "w") as f:
            f.write('{"cases":[\n' + ",\n".join(json.dumps(c, separators=(",", ":")) for c in self.cases) + "\n]}\n")

    # ---------------------------------------------------------------- random inputs

    def choice(self, options):
        return options[int(self.rng.integers(len(options)))]

    def shape(self, least=0, most=4):
        """A random shape: odd sizes, ones, now and then an empty dimension."""
        n = int(self.rng.integers(least, most + 1))
        sizes = [int(self.choice([1, 2, 3, 5, 7, 8, 13, 17, 33])) for _ in range(n)]
        if n and self.rng.random() < 0.03:
            sizes[int(self.rng.integers(n))] = 0
        while np.prod(sizes, initial=1) > self.largest:
            sizes[int(np.argmax(sizes))] //= 2
        return sizes

    def values(self, shape, dtype, kind="normal"):
        if dtype == "bool":
            return self.rng.integers(0, 2, shape)
        if dtype in INTEGERS:
            low, high = {"i8": (-128, 128), "u8": (0, 256), "i32": (-70000, 70000), "i64": (-2 ** 40, 2 ** 40)}[dtype]
            if kind in ("small", "positive"):
                low, high = 0 if dtype == "u8" or kind == "positive" else -5, 6
            return self.rng.integers(low, high, shape)
        if kind == "small":
            return rounded(self.rng.integers(-4, 5, shape) / 2.0, dtype)
        x = self.rng.standard_normal(shape) * self.choice([0.5, 1.0, 4.0])
        if kind == "positive":
            x = np.abs(x) + 0.01
        if kind == "special" and np.size(x):
            spots = self.rng.integers(0, np.size(x), max(1, np.size(x) // 8))
            flat = np.ravel(x)
            flat[spots] = self.rng.choice([np.nan, np.inf, -np.inf, 0.0, -0.0, 1e-30, 300.0], len(spots))
            x = flat.reshape(np.shape(x))
        return rounded(x, dtype)


class Arg:
    """An input: a stored tensor and the views taken of it, so that strides of every kind reach the op."""

    def __init__(self, cases, shape, dtype, kind="normal", views=True, values=None):
        rng, self.dtype = cases.rng, dtype
        steps, wanted = [], list(shape)
        order = list(range(len(wanted)))
        if views and values is None and len(wanted) > 1 and rng.random() < 0.4:
            order = [int(i) for i in rng.permutation(len(wanted))]
        base = [0] * len(wanted)
        for at, d in enumerate(order):
            base[d] = wanted[at]
        slices = []
        for d in range(len(base)):
            if views and values is None and base[d] > 0 and rng.random() < 0.3:
                step, start = int(rng.integers(1, 4)), int(rng.integers(0, 3))
                slices.append(["narrow", d + 1, start + 1, base[d], step])
                base[d] = start + (base[d] - 1) * step + 1 + int(rng.integers(0, 2))
        x = cases.values(base, dtype, kind) if values is None else values
        name = cases.put(x, dtype)
        for _, d, start, length, step in slices:
            index = [slice(None)] * x.ndim
            index[d - 1] = slice(start - 1, start - 1 + (length - 1) * step + 1, step)
            x = x[tuple(index)]
        steps += slices
        if order != list(range(len(wanted))):
            steps.append(["permute"] + [d + 1 for d in order])
            x = np.transpose(x, order)
        assert list(x.shape) == wanted
        self.x, self.spec = x, {"tensor": name, "views": steps}


def broadcast_pair(c):
    """Two shapes that broadcast."""
    full = c.shape(0, 4)
    def side():
        kept = full[int(c.rng.integers(0, len(full) + 1)):] if c.rng.random() < 0.3 else full
        return [1 if c.rng.random() < 0.25 else s for s in kept]
    return (full, side()) if c.rng.random() < 0.5 else (side(), full)


# ---------------------------------------------------------------- the op groups

def erf(x):
    return np.array([math.erf(v) for v in np.ravel(x).tolist()]).reshape(np.shape(x))


def sigmoid(x):
    return 1.0 / (1.0 + np.exp(-x))


UNARY = {
    "neg": lambda x: -x, "abs": np.abs, "sqrt": np.sqrt, "rsqrt": lambda x: 1 / np.sqrt(x), "exp": np.exp, "log": np.log, "sin": np.sin, "cos": np.cos,
    "tanh": np.tanh, "sigmoid": sigmoid, "floor": np.floor, "ceil": np.ceil, "round": np.round, "sign": np.sign, "logical_not": lambda x: x == 0,
    "isnan": np.isnan, "isfinite": np.isfinite, "reciprocal": lambda x: 1 / x, "square": lambda x: x * x, "relu": lambda x: np.where(x < 0, 0, x),
    "silu": lambda x: x * sigmoid(x), "gelu": lambda x: 0.5 * x * (1 + erf(x / math.sqrt(2))),
    "gelu_tanh": lambda x: 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x ** 3))), "quick_gelu": lambda x: x * sigmoid(1.702 * x), "erf": erf,
}
WHOLE, TRUTH = {"neg", "abs", "sign", "square", "relu"}, {"logical_not", "isnan", "isfinite"}


def unary(c):
    for op, f in UNARY.items():
        dtype = c.choice(PLAIN[:-1] if op in WHOLE else PLAIN)
        kind = c.choice(["normal", "special"]) if op in {"neg", "abs", "exp", "log", "tanh", "sign", "logical_not", "isnan", "isfinite", "relu", "erf", "floor"} else "normal"
        if op in ("sin", "cos", "rsqrt", "reciprocal") and dtype == "i64":
            dtype = "i32"
        a = Arg(c, c.shape(), dtype, kind)
        x = a.x if dtype in FLOATS or op in WHOLE | TRUTH else rounded(a.x.astype(np.float64), "f32")
        out = "bool" if op in TRUTH else dtype if dtype in FLOATS or op in WHOLE else "f32"
        y = f(x)
        loose = op in ("gelu", "gelu_tanh", "silu", "quick_gelu")
        exact = out not in FLOATS or op in ("neg", "abs", "floor", "ceil", "round", "sign", "relu")
        c.add("unary " + op, op, [a], [(rounded(y, out), out)], 0 if exact else RTOL[out], 1e-6 * np.max(np.abs(x), initial=0) if loose else 0 if exact else 1e-37)


def mod(a, b):
    with np.errstate(all="ignore"):
        return np.mod(a, b)


BINARY = {"add": np.add, "sub": np.subtract, "mul": np.multiply, "div": np.divide, "pow": np.power, "minimum": np.minimum, "maximum": np.maximum, "mod": mod,
          "atan2": np.arctan2, "eq": np.equal, "ne": np.not_equal, "lt": np.less, "le": np.less_equal, "gt": np.greater, "ge": np.greater_equal,
          "logical_and": np.logical_and, "logical_or": np.logical_or, "logical_xor": np.logical_xor}
COMPARE = {"eq", "ne", "lt", "le", "gt", "ge", "logical_and", "logical_or", "logical_xor"}


def result_of(op, wide):
    if op in COMPARE:
        return "bool"
    return "f32" if wide not in FLOATS and op in ("div", "atan2") else wide


def as_computed(x, dtype, integers):
    """An operand as wane computes with it: i64, or f32."""
    return x.astype(np.int64) if integers else rounded(x.astype(np.float64), "f32")


def binary_kinds(op):
    if op == "pow":
        return "positive", "small"
    return ("small", "small") if op in COMPARE else ("normal", "normal")


def binary(c):
    for op, f in BINARY.items():
        da, db = c.choice(PLAIN), c.choice(PLAIN)
        wide = promote(da, db)
        if wide not in FLOATS and op == "pow":
            da = db = wide = "f32"
        sa, sb = broadcast_pair(c)
        ka, kb = binary_kinds(op)
        a, b = Arg(c, sa, da, ka), Arg(c, sb, db, "positive" if op == "mod" else kb)
        integers, out = wide not in FLOATS and op not in ("div", "atan2"), result_of(op, wide)
        x, y = as_computed(a.x, da, integers), as_computed(b.x, db, integers)
        if op == "mod" and integers:
            r = np.where(y == 0, 0, np.mod(x, np.where(y == 0, 1, y)))
        else:
            r = f(x, y)
        c.add("binary " + op, op, [a, b], [(rounded(r, out), out)], RTOL.get(out, 0), 0 if out not in FLOATS else 1e-30)


def scalar(c):
    for op, f in BINARY.items():
        dtype, reverse = c.choice(PLAIN), bool(c.rng.random() < 0.4)
        value = float(c.choice([2, 3, 0.5, -1.5, 1])) if op != "pow" else float(c.choice([2, 0.5, 3]))
        ka, _ = binary_kinds(op)
        if op == "mod":
            ka = "positive"
            if reverse and dtype == "bool":
                dtype = "u8"
        a = Arg(c, c.shape(), dtype, ka)
        whole = value == int(value) and dtype not in FLOATS and op not in ("div", "atan2")
        wide = "i64" if dtype == "bool" else dtype
        out = "bool" if op in COMPARE else wide if whole else dtype if dtype in FLOATS else "f32"
        x, v = as_computed(a.x, dtype, whole), np.int64(value) if whole else value
        p, q = (v, x) if reverse else (x, v)
        r = np.where(np.asarray(q) == 0, 0, mod(p, np.where(np.asarray(q) == 0, 1, q))) if op == "mod" and whole else f(p, q)
        r = np.broadcast_to(r, a.x.shape)
        c.add("scalar " + op, "scalar_" + op, [a], [(rounded(r, out), out)], RTOL.get(out, 0), 0 if out not in FLOATS else 1e-30, value=value, reverse=reverse)


def where(c):
    full, other = broadcast_pair(c)
    shapes = [full, other, np.broadcast_shapes(full, other)]
    mask = Arg(c, c.choice(shapes), c.choice(["bool", "u8", "f32"]), "small")
    a, b = Arg(c, full, c.choice(PLAIN)), Arg(c, other, c.choice(PLAIN))
    wide = promote(a.dtype, b.dtype)
    r = np.where(mask.x != 0, rounded(a.x, wide), rounded(b.x, wide)) if wide not in FLOATS else np.where(
        mask.x != 0, rounded(rounded(a.x, "f32"), wide), rounded(rounded(b.x, "f32"), wide))
    c.add("where", "where", [mask, a, b], [(r, wide)])


REDUCE = {"sum": np.sum, "mean": np.mean, "amax": np.max, "amin": np.min, "prod": np.prod, "argmax": np.argmax, "argmin": np.argmin, "any": np.any,
          "all": np.all, "norm": lambda x, **k: np.sqrt(np.sum(x * x, **k)), "var0": np.var, "var": lambda x, **k: np.var(x, ddof=1, **k)}


def reduced_dtype(op, dtype):
    if op in ("argmax", "argmin"):
        return "i64"
    if op in ("any", "all"):
        return "bool"
    if op in ("amax", "amin") or dtype in FLOATS:
        return dtype
    return "i64" if op in ("sum", "prod") else "f32"


def reduce(c, sizes=None, views=True):
    for op, f in REDUCE.items():
        dtype = c.choice(PLAIN)
        shape = sizes or c.shape(1, 4)
        extreme = op in ("amax", "amin", "argmax", "argmin")
        if 0 in shape and (extreme or op.startswith("var")):
            shape = [3, 5]
        kind = "small" if op in ("prod", "any", "all") or c.rng.random() < 0.3 else c.choice(["normal", "special"]) if extreme else "normal"
        a = Arg(c, shape, dtype, kind, views)
        dim = None if c.rng.random() < 0.25 else int(c.rng.integers(len(shape)))
        n = a.x.size if dim is None else shape[dim]
        if op == "var" and n < 2:
            continue
        if op == "prod" and n > 40 and dtype in FLOATS:
            continue
        keep = dim is not None and bool(c.rng.random() < 0.3)
        integers = dtype not in FLOATS and op in ("sum", "prod", "amax", "amin", "argmax", "argmin", "any", "all", "mean")
        x = a.x.astype(np.int64) if integers else a.x.astype(np.float64)
        if not integers and dtype == "i64":
            x = rounded(x, "f32")
        arguments = {} if op in ("argmax", "argmin") else {"keepdims": keep}
        r = np.asarray(f(x, axis=dim, **arguments))
        if keep and op in ("argmax", "argmin"):
            r = np.expand_dims(r, dim)
        out = reduced_dtype(op, dtype)
        scale = np.sum(np.abs(x)) * 1e-9 if op in ("sum", "mean") and out in FLOATS else 0
        c.add("reduce " + op, op, [a], [(rounded(r, out), out)], RTOL.get(out, 0) if not extreme else 0, scale, dim=None if dim is None else dim + 1, keep=keep)


def cumsum(c):
    dtype, shape = c.choice(PLAIN), c.shape(1, 4)
    a, dim = Arg(c, shape, dtype), int(c.rng.integers(len(shape)))
    out = dtype if dtype in FLOATS else "i64"
    r = np.cumsum(a.x, axis=dim, dtype=np.float64 if dtype in FLOATS else np.int64)
    c.add("cumsum", "cumsum", [a], [(rounded(r, out), out)], RTOL.get(out, 0), np.sum(np.abs(a.x)) * 1e-9 if dtype in FLOATS else 0, dim=dim + 1)


def matmul(c, sizes=None):
    m, k, n = sizes or [int(c.choice([0, 1, 2, 5, 7, 16, 33])) for _ in range(3)]
    wide = c.choice(["f32", "f32", "f16", "bf16", "i32", "u8"])
    da, db = wide, c.choice([wide, "f32"])
    batch_a, batch_b = c.choice([([], []), ([3], []), ([], [2]), ([2, 1], [3]), ([2, 3], [2, 3])]) if not sizes else ([], [])
    sa, sb = batch_a + [m, k], batch_b + [k, n]
    if not sizes and c.rng.random() < 0.2:
        sa = [k]
    elif not sizes and c.rng.random() < 0.2:
        sb = [k]
    a, b = Arg(c, sa, da), Arg(c, sb, db)
    out = promote(da, db)
    if out in FLOATS:
        x, y = a.x.astype(np.float64), b.x.astype(np.float64)
        bound = np.max(np.matmul(np.abs(x), np.abs(y)), initial=0) * 2e-6
        c.add("matmul", "matmul", [a, b], [(rounded(np.matmul(x, y), out), out)], RTOL[out], bound)
    else:
        c.add("matmul", "matmul", [a, b], [(rounded(np.matmul(a.x.astype(np.int64), b.x.astype(np.int64)), out), out)])


def join(c):
    shape, dim, count = c.shape(1, 4), 0, int(c.rng.integers(1, 5))
    dim = int(c.rng.integers(len(shape)))
    parts, wide = [], None
    for _ in range(count):
        own = list(shape)
        own[dim] = int(c.rng.integers(0, 5))
        parts.append(Arg(c, own, c.choice(PLAIN)))
        wide = parts[-1].dtype if wide is None else promote(wide, parts[-1].dtype)
    values = [rounded(rounded(p.x, "f32"), wide) if wide in FLOATS else rounded(p.x, wide) for p in parts]
    c.add("cat", "cat", parts, [(np.concatenate(values, axis=dim), wide)], dim=dim + 1)
    same = [Arg(c, shape, wide) for _ in range(count)]
    at = int(c.rng.integers(len(shape) + 1))
    c.add("stack", "stack", same, [(np.stack([p.x for p in same], axis=at), wide)], dim=at + 1)


def sort(c, sizes=None):
    dtype, shape = c.choice(PLAIN), sizes or c.shape(1, 3)
    a, dim = Arg(c, shape, dtype, c.choice(["normal", "small", "special"])), int(c.rng.integers(len(shape)))
    down = bool(c.rng.random() < 0.5)
    x = a.x.astype(np.float64) if dtype in FLOATS else a.x.astype(np.int64)
    # A key whose ascending stable order is the one wanted: NaN last either way.
    key = np.where(np.isnan(x), np.inf, -x if down else x) if dtype in FLOATS else -x if down else x
    nan = np.isnan(x) if dtype in FLOATS else np.zeros(x.shape, bool)
    order = np.argsort(key, axis=dim, kind="stable")
    order = np.take_along_axis(order, np.argsort(np.take_along_axis(nan, order, dim), axis=dim, kind="stable"), dim)
    c.add("sort", "sort", [a], [(np.take_along_axis(a.x, order, dim), dtype), (order, "i64")], dim=dim + 1, descending=down)
    k = int(c.rng.integers(0, shape[dim] + 1))
    best = np.take(order, np.arange(k), axis=dim)
    c.add("topk", "topk", [a], [(np.take_along_axis(a.x, best, dim), dtype), (best, "i64")], dim=dim + 1, k=k, largest=down)


def pick(c):
    dtype, shape = c.choice(PLAIN), [max(s, 1) for s in c.shape(1, 3)]
    dim = int(c.rng.integers(len(shape)))
    a = Arg(c, shape, dtype)
    index_dtype = c.choice(["i32", "i64"])
    ids = c.rng.integers(-shape[dim], shape[dim], c.shape(0, 2))
    i = Arg(c, list(ids.shape), index_dtype, values=ids)
    c.add("index_select", "index_select", [a, i], [(np.take(a.x, ids, axis=dim), dtype)], dim=dim + 1)
    along = list(shape)
    along[dim] = int(c.rng.integers(1, 6))
    ids = c.rng.integers(-shape[dim], shape[dim], along)
    g = Arg(c, along, index_dtype, values=ids)
    c.add("gather", "gather", [a, g], [(np.take_along_axis(a.x, np.where(ids < 0, ids + shape[dim], ids), axis=dim), dtype)], dim=dim + 1)


def copies(c):
    source, target = c.choice(PLAIN), c.choice(PLAIN)
    a = Arg(c, c.shape(0, 6), source, c.choice(["normal", "special"]))
    x = rounded(a.x.astype(np.float64), "f32") if target in FLOATS and source == "i64" else a.x
    c.add("cast", "cast", [a], [(cast(x, source, target), target)], dtype=target)
    # Writing into a view: the stored tensor changes there and nowhere else.
    full, part = broadcast_pair(c)
    if len(part) > len(full):
        full, part = part, full
    full = [int(s) for s in np.broadcast_shapes(full, part)]
    dst, src = Arg(c, full, target), Arg(c, part, source)
    name = dst.spec["tensor"]
    _, base_shape, _ = c.tensors[name]
    marks = np.arange(int(np.prod(base_shape, initial=1))).reshape(base_shape)
    view = marks
    for step in dst.spec["views"]:
        if step[0] == "narrow":
            index = [slice(None)] * view.ndim
            index[step[1] - 1] = slice(step[2] - 1, step[2] - 1 + (step[3] - 1) * step[4] + 1, step[4])
            view = view[tuple(index)]
        else:
            view = np.transpose(view, [d - 1 for d in step[1:]])
    dtype, shape, data = c.tensors[name]
    if dtype == "bf16":
        whole = (np.frombuffer(data, np.uint16).astype(np.uint32) << 16).view(np.float32).astype(np.float64)
    else:
        whole = np.frombuffer(data, NUMPY[dtype]).astype(np.float64 if dtype in FLOATS else np.int64)
    y = rounded(src.x.astype(np.float64), "f32") if target in FLOATS and source == "i64" else src.x
    whole[np.ravel(view)] = np.ravel(np.broadcast_to(cast(y, source, target), full))
    c.add("copy", "copy", [dst, src], [(whole.reshape(shape), target)])
    shape = c.shape(1, 5)
    r = Arg(c, shape, c.choice(PLAIN))
    sizes = [int(s) for s in c.rng.permutation(shape)]
    c.add("reshape", "reshape", [r], [(np.reshape(r.x, sizes), r.dtype)], sizes=sizes)


def slices(c):
    """t[{ … }] with 1-based, inclusive, negative positions."""
    shape = [max(s, 1) for s in c.shape(1, 4)]
    a, key, index = Arg(c, shape, c.choice(PLAIN)), [], []
    for size in shape:
        kind = int(c.rng.integers(4))
        first, last = sorted(int(v) for v in c.rng.integers(0, size, 2))
        step = int(c.rng.integers(1, 4))
        away = size if c.rng.random() < 0.3 else -1     # negative positions: -1 is the last
        name = (lambda v: v - size) if away == size else (lambda v: v + 1)
        if kind == 0:
            key.append(name(first))
            index.append(first)
        elif kind == 1:
            key.append([name(first), name(last)])
            index.append(slice(first, last + 1))
        elif kind == 2:
            key.append([name(first), name(last), step])
            index.append(slice(first, last + 1, step))
        else:
            key.append([])
            index.append(slice(None))
    if all(not isinstance(i, slice) for i in index):
        return
    c.add("slice", "slice", [a], [(a.x[tuple(index)], a.dtype)], key=key)


def aranges(c):
    start, step = float(c.choice([0, 1, -3, 0.5])), float(c.choice([1, 2, -1, 0.25]))
    n, dtype = int(c.rng.integers(0, 200)), c.choice(PLAIN[:-1])
    stop = start + step * n
    x = start + step * np.arange(n)
    value = float_to_int(x, dtype) if dtype in INTEGERS else rounded(x, dtype)
    c.add("arange", "arange", [], [(value, dtype)], start=start, stop=stop, step=step, dtype=dtype)


def philox(seed, counters):
    """Four words a counter, from Salmon et al. 2011."""
    mask = np.uint64(0xFFFFFFFF)
    w = [counters & mask, counters >> np.uint64(32), np.zeros_like(counters), np.zeros_like(counters)]
    k = [seed & 0xFFFFFFFF, seed >> 32]
    for _ in range(10):
        a, b = np.uint64(0xD2511F53) * w[0], np.uint64(0xCD9E8D57) * w[2]
        w = [(b >> np.uint64(32)) ^ w[1] ^ np.uint64(k[0]), b & mask, (a >> np.uint64(32)) ^ w[3] ^ np.uint64(k[1]), a & mask]
        k = [(k[0] + 0x9E3779B9) & 0xFFFFFFFF, (k[1] + 0xBB67AE85) & 0xFFFFFFFF]
    return np.stack(w, axis=-1)


def random(c):
    seed, offset, shape = int(c.rng.integers(2 ** 53)), int(c.rng.integers(100)), c.shape(1, 3)
    n = int(np.prod(shape))
    counters = np.arange(offset // 4, (offset + n) // 4 + 1, dtype=np.uint64)
    words = philox(seed, counters).reshape(-1)[offset % 4:]
    first = offset % 2                                     # Box & Muller takes words in pairs
    pairs = philox(seed, counters).reshape(-1, 2)
    u = (np.floor(pairs[:, 0] / 256) + 1) * 2.0 ** -24
    turn = np.floor(pairs[:, 1] / 256) * 2.0 ** -24
    radius = np.sqrt(-2 * np.log(u))
    normal = np.stack([radius * np.cos(2 * np.pi * turn), radius * np.sin(2 * np.pi * turn)], axis=-1).reshape(-1)[offset % 4:][:n]
    assert first in (0, 1)
    options = {"seed": seed, "offset": offset, "sizes": shape}
    c.add("rand", "rand", [], [((words[:n] // np.uint64(256) * 2.0 ** -24).reshape(shape), "f32")], **options)
    c.add("randn", "randn", [], [((1 + 2 * normal).reshape(shape), "f32")], 1e-6, 1e-5, mean=1, std=2, **options)
    c.add("randint", "randint", [], [(np.floor(-7 + 20 * (words[:n] * 2.0 ** -32)).astype(np.int64).reshape(shape), "i64")], low=-7, high=13, **options)


def large(c):
    """Sizes at which work is cut into pieces, tiles and chunks."""
    for sizes in ([70001], [3, 30011], [20011, 3], [9000, 17], [2, 70001]):
        reduce(c, sizes, views=False)
    for sizes in ([97, 257, 259], [200, 300, 530], [1, 700, 600], [600, 513, 1]):
        matmul(c, sizes)
    for sizes in ([20000], [3, 5000], [4000, 3]):
        sort(c, sizes)


def main():
    prefix, seed, count = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    largest = int(sys.argv[4]) if len(sys.argv) > 4 else 3000
    c = Cases(seed, largest)
    np.seterr(all="ignore")
    for _ in range(max(count // 4, 1)):
        unary(c), binary(c), scalar(c), reduce(c)
    for _ in range(count):
        where(c), cumsum(c), matmul(c), join(c), sort(c), pick(c), copies(c), copies(c), slices(c), aranges(c), random(c)
    if largest > 1000:
        large(c)
    c.write(prefix)
    print("%d cases" % len(c.cases))


main()
