--- Loss curves: for a terminal, in braille dots, and as an SVG. Pure functions from points { { step, value } … } to text.
-- @module wane.train.curve
local M = {}

-- The range of all series: first and last step, least and largest value; and x0 to x1, y0 to y1 that are apart even where these are not: what is
-- equal stands in the middle.
local function range_of(series)
  local r = { x0 = math.huge, x1 = -math.huge, y0 = math.huge, y1 = -math.huge }
  for _, s in ipairs(series) do
    for _, p in ipairs(s.points) do
      r.x0, r.x1, r.y0, r.y1 = math.min(r.x0, p[1]), math.max(r.x1, p[1]), math.min(r.y0, p[2]), math.max(r.y1, p[2])
    end
  end
  if r.x0 == math.huge then return nil end
  r.first, r.last = r.x0, r.x1
  if r.x1 == r.x0 then r.x0, r.x1 = r.x0 - 0.5, r.x1 + 0.5 end
  if r.y1 - r.y0 < 1e-9 then r.y0, r.y1 = r.y0 - 0.5, r.y1 + 0.5 end
  return r
end

-- ---------------------------------------------------------------- terminal

-- Bit of dot (column 0-1, row 0-3) in a braille character.
local DOTS = { [0] = { [0] = 1, 2, 4, 64 }, { [0] = 8, 16, 32, 128 } }

local function utf8(code)
  return string.char(0xe0 + math.floor(code / 4096), 0x80 + math.floor(code / 64) % 64, 0x80 + code % 64)
end

-- Values at every column of dots: the mean of the points that fall on it, between neighbours in a straight line.
local function columns_of(points, r, columns)
  local sum, count, out = {}, {}, {}
  for _, p in ipairs(points) do
    local c = math.floor((p[1] - r.x0) / (r.x1 - r.x0) * (columns - 1) + 0.5)
    sum[c], count[c] = (sum[c] or 0) + p[2], (count[c] or 0) + 1
  end
  local last
  for c = 0, columns - 1 do
    if count[c] then
      out[c] = sum[c] / count[c]
      for k = (last or c) + 1, c - 1 do out[k] = out[last] + (out[c] - out[last]) * (k - last) / (c - last) end
      last = c
    end
  end
  return out
end

--- Draws curves with braille dots.
-- @param series table[] { { name = "loss", points = { { step, value } … } } … }
-- @param width integer characters of the whole drawing
-- @param height integer lines of the plot (the axis takes two more)
-- @return string lines, or "" where there are no points
function M.terminal(series, width, height)
  local r = range_of(series)
  if not r then return "" end
  local label = math.max(#("%.4g"):format(r.y0), #("%.4g"):format(r.y1)) + 2
  local columns, rows, cells = math.max(8, width - label), height * 4, {}
  for _, s in ipairs(series) do
    for c, value in pairs(columns_of(s.points, r, columns * 2)) do
      local row = math.floor((r.y1 - value) / (r.y1 - r.y0) * (rows - 1) + 0.5)
      local key = math.floor(row / 4) * columns + math.floor(c / 2)
      local bit = DOTS[c % 2][row % 4]
      if math.floor((cells[key] or 0) / bit) % 2 == 0 then cells[key] = (cells[key] or 0) + bit end
    end
  end
  local lines = {}
  for y = 0, height - 1 do
    local text = y == 0 and ("%.4g"):format(r.y1) or y == height - 1 and ("%.4g"):format(r.y0) or ""
    local parts = { (" "):rep(label - 1 - #text), text, "\226\148\130" }
    for x = 0, columns - 1 do parts[#parts + 1] = cells[y * columns + x] and utf8(0x2800 + cells[y * columns + x]) or " " end
    lines[#lines + 1] = (table.concat(parts):gsub("%s+$", ""))
  end
  lines[#lines + 1] = (" "):rep(label - 1) .. "\226\148\148" .. ("\226\148\128"):rep(columns)
  local first, last = ("%d"):format(r.first), ("%d"):format(r.last)
  if first == last then lines[#lines + 1] = (" "):rep(label + math.floor((columns - #first) / 2)) .. first
  else lines[#lines + 1] = (" "):rep(label) .. first .. (" "):rep(math.max(1, columns - #first - #last)) .. last end
  return table.concat(lines, "\n")
end

-- ---------------------------------------------------------------- SVG

-- About n round numbers in [a, b], `least` apart or more.
local function ticks(a, b, n, least)
  local raw = (b - a) / n
  local power = 10 ^ math.floor(math.log10(raw))
  local step = raw / power
  step = math.max(least, (step < 1.5 and 1 or step < 3.5 and 2 or step < 7.5 and 5 or 10) * power)
  local list, at = {}, math.ceil(a / step) * step
  while at <= b + step * 1e-6 do
    list[#list + 1] = at
    at = at + step
  end
  return list
end

local function escape(text) return (text:gsub("[&<>\"]", { ["&"] = "&amp;", ["<"] = "&lt;", [">"] = "&gt;", ['"'] = "&quot;" })) end

local colours = { "#2f7ebc", "#d9632a", "#3a9a5b", "#8a56b8" }
local W, H, LEFT, TOP, RIGHT, BOTTOM = 720, 360, 64, 40, 16, 44

--- Draws curves as an SVG that stands by itself, legible on light and dark grounds.
-- @param series table[] as for terminal
-- @param title string
-- @return string
function M.svg(series, title)
  local r = range_of(series) or { x0 = 0, x1 = 1, y0 = 0, y1 = 1 }
  local function x(v) return LEFT + (v - r.x0) / (r.x1 - r.x0) * (W - LEFT - RIGHT) end
  local function y(v) return H - BOTTOM - (v - r.y0) / (r.y1 - r.y0) * (H - TOP - BOTTOM) end
  local out = { ('<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 %d %d" font-family="sans-serif" font-size="12" fill="#808080">'):format(W, H),
    ('<text x="%d" y="22" font-size="15">%s</text>'):format(LEFT, escape(title)) }
  local function add(format, ...) out[#out + 1] = format:format(...) end
  for _, v in ipairs(ticks(r.y0, r.y1, 5, 0)) do
    add('<path d="M%d %.1fH%d" stroke="#808080" stroke-opacity="0.25"/>', LEFT, y(v), W - RIGHT)
    add('<text x="%d" y="%.1f" text-anchor="end">%.4g</text>', LEFT - 6, y(v) + 4, v)
  end
  for _, v in ipairs(ticks(r.x0, r.x1, 8, 1)) do add('<text x="%.1f" y="%d" text-anchor="middle">%.6g</text>', x(v), H - BOTTOM + 18, v) end
  add('<path d="M%d %dV%dH%d" fill="none" stroke="#808080"/>', LEFT, TOP, H - BOTTOM, W - RIGHT)
  add('<text x="%d" y="%d" text-anchor="middle">step</text>', (LEFT + W) / 2, H - 8)
  for i, s in ipairs(series) do
    local colour, points = colours[(i - 1) % #colours + 1], {}
    for k, p in ipairs(s.points) do points[k] = ("%.1f,%.1f"):format(x(p[1]), y(p[2])) end
    if #points == 1 then add('<circle cx="%.1f" cy="%.1f" r="2.5" fill="%s"/>', x(s.points[1][1]), y(s.points[1][2]), colour)
    elseif #points > 1 then add('<polyline points="%s" fill="none" stroke="%s" stroke-width="1.6"/>', table.concat(points, " "), colour) end
    add('<text x="%d" y="22" fill="%s" text-anchor="end">%s</text>', W - RIGHT - (#series - i) * 80, colour, escape(s.name))
  end
  out[#out + 1] = "</svg>\n"
  return table.concat(out, "\n")
end

return M
