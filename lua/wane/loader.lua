--- Brings tensors of a checkpoint into memory: mapped as they lie, or read in chunks and converted on the way.
--
--     local tensors = assert(loader.load(ckpt, {
--       { entry = ckpt:find "model.norm.weight", dtype = "f32" },
--       { entry = ckpt:find "model.layers.0.mlp.up_proj.weight", scheme = { type = "nf4", block_size = 64, double_quant = true } },
--     }, { progress = function(done, total, tensors) … end }))
-- @module wane.loader
local ffi = require "ffi"
local core = require "wane.core"
local C = core.C
local Tensor = require "wane.tensor"

local M = {}

local PARTS = C.WANE_PARTS

-- ---------------------------------------------------------------- sources: one stored tensor each

local arrangements = { rope = C.WANE_ARRANGE_ROPE, qkv = C.WANE_ARRANGE_QKV, transpose = C.WANE_ARRANGE_TRANSPOSE }

--- What a stored kind is read as where nothing else is asked for: no tensor holds it.
M.read_as = { f64 = "f32", i16 = "i32" }
local read_as = M.read_as

local source

-- Values that do not lie in the shape's order (a transposed view that torch saved as it was): all from the first to the last are
-- brought in as a vector, and put in order, and quantized, in memory.
local function strided_source(job, entry, options)
  if options.shape then
    return nil, ("'%s': the quantized codes of '%s' do not lie in the order of its shape: save its .contiguous()"):format(job.path, entry.name),
      "WANE_E_UNSUPPORTED"
  end
  local stride, last = entry.stride or { entry.shape[1], 1 }, 1
  if entry.arrange == "transpose" then stride = { stride[2], stride[1] } end         -- the shape has been turned already
  for d, size in ipairs(entry.shape) do last = last + (size - 1) * stride[d] end
  local span = setmetatable({ stride = false, arrange = false, shape = { last } }, { __index = entry })
  local quantized = options.block_size ~= nil
  local s, message, code = source(job, span, { target = not quantized and options.target or nil })
  if not s then return nil, message, code end
  s.stride, s.full_shape = stride, entry.shape
  s.scheme = quantized and { options.target, options.block_size, options.nested } or nil
  return s
end

-- A stored tensor that becomes one tensor: mapped, or item `item` of the load. options: source, shape, target (dtype name), and for
-- quantized targets block_size, nested.
function source(job, entry, options)
  -- C turns float matrices round while it reads them; f64 and i16 ones go the way of the strided.
  if entry.stride or (entry.arrange == "transpose" and read_as[entry.dtype]) then return strided_source(job, entry, options) end
  local dtype = options.source or entry.dtype
  local target = options.target or read_as[dtype] or dtype
  if not dtype then
    return nil, ("tensor '%s' of '%s' is %s, a dtype that wane does not compute with"):format(
      entry.file_name or entry.name, job.path, entry.file_dtype), "WANE_E_UNSUPPORTED"
  end
  local shape = options.shape or entry.shape
  if target == dtype and not entry.arrange and job.io == "mmap" then
    return { map = entry, dtype = dtype, shape = shape }
  end
  local item = ffi.new "wane_load_item"
  item.entry, item.source, item.target = entry.i, core.dtype(dtype), core.dtype(target)
  item.block_size, item.nested = options.block_size or 0, options.nested and 1 or 0
  item.arrange, item.heads = arrangements[entry.arrange] or 0, entry.heads or 0
  item.kv_heads, item.piece, item.pieces = entry.kv_heads or 0, entry.piece or 0, entry.pieces or 1
  item.ndim = #shape
  for i, size in ipairs(shape) do item.shape[i - 1] = size end
  local status = C.wane_load_add(job.load, entry.index:live(), item)
  if status < 0 then return core.failure(status) end
  job.items = job.items + 1
  return { item = job.items - 1 }
end

local function wrap(h) return Tensor.wrap(h) end

-- The tensor of a strided source from the vector of its values.
local function put_in_order(s, vector)
  local stream, view, h = core.stream(), core.handle_type(), core.handle_type()
  local sizes, n = core.shape(s.full_shape)
  local status = C.wane_view_strided(stream, view, vector.h, n, sizes, ffi.new("int64_t[8]", s.stride))
  if status >= 0 then
    status = C.wane_cast(stream, h, view, core.dtype(vector:dtype()))
    C.wane_tensor_free(view)
  end
  vector:close()
  if status < 0 or not s.scheme then return status, h end
  local values = wrap(h)
  h = core.handle_type()
  status = C.wane_quantize(stream, h, values.h, core.dtype(s.scheme[1]), s.scheme[2], s.scheme[3] and 1 or 0)
  values:close()
  return status, h
end

-- The tensor of a source, once the load has run.
local function resolve(job, s)
  local h = core.handle_type()
  local status
  if s.map then
    local shape, n = core.shape(s.shape)
    status = C.wane_index_map(core.stream(), h, s.map.index:live(), s.map.i, s.map.piece or 0, s.map.pieces or 1, core.dtype(s.dtype), n,
      shape)
  else
    status = C.wane_load_take(job.handle, s.item, core.stream(), h)
  end
  if status >= 0 and s.stride then status, h = put_in_order(s, wrap(h)) end
  if status < 0 then return core.failure(status) end
  return wrap(h)
end

-- ---------------------------------------------------------------- what a scheme asks for

local kinds = { nf4 = true, fp4 = true, int8 = true, ["int8-blockwise"] = true }

-- Name of the quantized dtype of a scheme, its block size, nested or not.
local function kind_of(scheme)
  if type(scheme) ~= "table" or not kinds[scheme.type] then core.raise("loader.load: a scheme needs type nf4, fp4, int8 or int8-blockwise") end
  if scheme.type == "int8-blockwise" then
    return scheme.signed == false and "int8-blockwise-unsigned" or "int8-blockwise", scheme.block_size or 4096, false
  end
  return scheme.type, scheme.block_size or 64, scheme.double_quant or false
end

-- ---------------------------------------------------------------- plans: a request's sources and how they become its tensor

-- Plans a request over an entry that is quantized in its file: its parts, put together.
local function plan_quantized(job, request)
  local e, q = request.entry, request.entry.quant
  local plan, message, code = { request = request, parts = {} }
  local codes_shape, codes_dtype = { math.ceil(q.shape[1] * (q.shape[2] or 1) * (q.shape[3] or 1) / 2) }, "u8"
  if q.type == "int8" then codes_shape, codes_dtype = q.shape, "i8" elseif q.type == "int8-blockwise" then codes_shape = q.shape end
  plan.parts[C.WANE_PART_CODES], message, code = source(job, e, { source = codes_dtype, shape = codes_shape })
  if message then return nil, message, code end
  local numbers = { absmax = C.WANE_PART_ABSMAX, nested_absmax = C.WANE_PART_NESTED_ABSMAX, nested_code = C.WANE_PART_NESTED_CODE, code = C.WANE_PART_CODE }
  for name, part in pairs(q.parts) do
    plan.parts[numbers[name]], message, code = source(job, part, {})
    if message then return nil, message, code end
  end
  return plan
end

local function plan(job, request)
  local e = request.entry
  if type(e) ~= "table" or not e.index then core.raise("loader.load: a request needs an entry of ckpt:find") end
  if e.invalid then return nil, ("'%s': %s"):format(job.path, e.invalid), "WANE_E_FORMAT" end
  if e.quant then return plan_quantized(job, request) end
  local options = { target = e.shift and "f32" or request.dtype }
  if request.scheme then
    options.target, options.block_size, options.nested = kind_of(request.scheme)
  end
  local s, message, code = source(job, e, options)
  if not s then return nil, message, code end
  return { request = request, whole = s }
end

-- ---------------------------------------------------------------- putting together

-- A scale part as a contiguous f32 vector, whatever it is stored as; `transposed`: [K/bs, N] (see quantized.lua).
local function as_scales(t, dtype, transposed)
  local s = core.stream()
  local plain, viewed = t, nil
  if transposed then
    local order = ffi.new("int32_t[2]", 1, 0)
    local h = core.handle_type()
    core.check(C.wane_view_permute(s, h, plain.h, order))
    viewed = wrap(h)
    plain = viewed
  end
  local flat = core.handle_type()
  core.check(C.wane_cast(s, flat, plain.h, core.dtype(dtype)))
  local cast = wrap(flat)
  local h = core.handle_type()
  core.check(C.wane_view_reshape(s, h, cast.h, 1, ffi.new("int64_t[1]", -1)))
  if viewed then viewed:close() end
  t:close()
  cast:close()
  return wrap(h)
end

local function assemble_quantized(job, p)
  local q = p.request.entry.quant
  local tensors, given = {}, ffi.new("const wane_handle *[?]", PARTS)
  local function drop() for number = 0, PARTS - 1 do if tensors[number] then tensors[number]:close() end end end
  -- By number, not by pairs: the same order every time. (Once in many loads a part stood in another's place; LuaJIT of 2022 has known faults in
  -- compiled loops over pairs.)
  for number = 0, PARTS - 1 do
    local s = p.parts[number]
    if s then
      local t, message, code = resolve(job, s)
      if not t then drop() return nil, message, code end
      if number ~= C.WANE_PART_CODES then
        local dtype = t:dtype()
        if dtype ~= "u8" and (dtype ~= "f32" or #t:shape() ~= 1) then t = as_scales(t, "f32", number == C.WANE_PART_ABSMAX and q.transposed) end
      end
      tensors[number] = t
    end
  end
  for number = 0, PARTS - 1 do given[number] = tensors[number] and tensors[number].h or nil end
  local h = core.handle_type()
  local shape, n = core.shape(q.shape)
  local status = C.wane_quantized_new(core.stream(), h, core.dtype(q.type), n, shape, q.block_size or 0, q.offset or 0, given)
  if status < 0 then
    local _, message, code = core.failure(status)
    drop()
    return nil, message, code
  end
  drop()
  return wrap(h)
end

-- A quantized tensor as plain values, or quantized another way: dequantized first.
local function reworked(t, request)
  local h = core.handle_type()
  local s = core.stream()
  core.check(C.wane_dequantize(s, h, t.h, core.dtype(request.dtype or "f32")))
  t:close()
  local values = wrap(h)
  if not request.scheme then return values end
  local kind, block_size, nested = kind_of(request.scheme)
  h = core.handle_type()
  core.check(C.wane_quantize(s, h, values.h, core.dtype(kind), block_size, nested and 1 or 0))
  values:close()
  return wrap(h)
end

local function same_scheme(q, scheme)
  local kind, block_size, nested = kind_of(scheme)
  return kind == q.type and (kind == "int8" or block_size == q.block_size) and nested == (q.double_quant or false)
end

-- Values that a file stores with a constant added (GGUF: Gemma's norms hold 1 + weight), read as f32.
local function shifted(t, by, dtype)
  local s, sum, h = core.stream(), core.handle_type(), core.handle_type()
  core.check(C.wane_binary_scalar(s, sum, t.h, by, C.WANE_ADD, 0))
  t:close()
  local values = wrap(sum)
  core.check(C.wane_cast(s, h, values.h, core.dtype(dtype)))
  values:close()
  return wrap(h)
end

local function assemble(job, p)
  if p.whole then
    local t, message, code = resolve(job, p.whole)
    local r = p.request
    if t and r.entry.shift then return shifted(t, r.entry.shift, r.dtype or r.entry.dtype) end
    return t, message, code
  end
  local t, message, code = assemble_quantized(job, p)
  if not t then return nil, message, code end
  local r = p.request
  if r.scheme and not same_scheme(r.entry.quant, r.scheme) or (r.dtype and not r.scheme) then return reworked(t, r) end
  return t
end

-- ---------------------------------------------------------------- load

-- Runs the load's job to its end; progress and cancel are looked after whenever the waiting wakes.
local function run(job, opts)
  local box = ffi.new "wane_job *[1]"
  local load = ffi.gc(job.load, nil)
  job.load = nil
  local status = C.wane_load_start(load, box)                -- the load is the job's now
  if status < 0 then return core.failure(status) end
  job.handle = ffi.gc(box[0], C.wane_job_free)
  if opts.started then opts.started(function() if job.handle then C.wane_job_cancel(job.handle) end end) end
  local watch = (opts.progress or opts.cancelled) and function(done, total)
    if opts.progress then opts.progress(done, total, tonumber(C.wane_load_done(job.handle))) end
    if opts.cancelled and opts.cancelled() then C.wane_job_cancel(job.handle) end
  end
  status = core.wait_job(job.handle, watch)
  if status < 0 then return core.failure(status) end
  return true
end

-- The tensors of all plans, made outside any scope: they are weights.
local function finish(job, plans)
  local s = core.stream()
  local scope = C.wane_scope_swap(s, nil)
  local tensors, message, code = {}, nil, nil
  local ok, raised = pcall(function()
    for i, p in ipairs(plans) do
      tensors[i], message, code = assemble(job, p)
      if not tensors[i] then return end
    end
  end)
  C.wane_scope_swap(s, scope)
  if ok and not message then return tensors end
  for _, t in pairs(tensors) do t:close() end
  if not ok then error(raised, 0) end
  return nil, message, code
end

--- Loads tensors. Entries that are wanted as they lie are mapped (or copied: io = "read"); the rest is read in chunks by libuv and
-- converted on the workers. Waits as core.wait_job does: a coroutine of a host yields.
-- @param ckpt wane.Checkpoint
-- @param requests table[] each { entry, dtype = nil | "f32" …, scheme = nil | { type, block_size, double_quant, signed },
--   on_done = nil | function(tensor, request) }
-- @param opts table|nil { io = "mmap" | "read", progress = function(bytes_done, bytes_total, tensors_done), cancelled = function() -> boolean,
--   started = function(cancel) }: `cancel()` may be called from anywhere in this Lua state while the load runs
-- @return table|nil list of Tensors in the order of the requests, string|nil message, string|nil code
function M.load(ckpt, requests, opts)
  opts = opts or {}
  local io_mode = opts.io or "mmap"
  if io_mode ~= "mmap" and io_mode ~= "read" then core.raise("loader.load: io is 'mmap' or 'read', found '%s'", tostring(io_mode)) end
  local box = ffi.new "wane_load *[1]"
  local status = C.wane_load_new(box)
  if status < 0 then return core.failure(status) end
  local job = { path = ckpt.path, io = io_mode, items = 0, load = ffi.gc(box[0], C.wane_load_free) }
  local plans = {}
  for i, request in ipairs(requests) do
    local message, code
    plans[i], message, code = plan(job, request)
    if not plans[i] then return nil, message, code end
  end
  if job.items > 0 then
    local ok, message, code = run(job, opts)
    if not ok then
      if job.handle then C.wane_job_free(ffi.gc(job.handle, nil)) end
      job.handle = nil
      return nil, message, code
    end
  end
  local tensors, message, code = finish(job, plans)
  if job.handle then C.wane_job_free(ffi.gc(job.handle, nil)) end
  job.handle = nil
  if not tensors then return nil, message, code end
  for i, request in ipairs(requests) do
    if request.on_done then request.on_done(tensors[i], request) end
  end
  return tensors
end

return M
