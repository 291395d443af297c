--- Runs a program on a pseudo-terminal: what a person at a keyboard would see and do.
local ffi = require "ffi"

ffi.cdef [[
struct wane_spec_winsize { unsigned short row, column, x, y; };
struct wane_spec_pollfd { int fd; short events; short revents; };
int forkpty(int *master, char *name, const void *termios, const struct wane_spec_winsize *size);
int execvp(const char *file, char *const argv[]);
int setenv(const char *name, const char *value, int overwrite);
int unsetenv(const char *name);
void _exit(int status);
int poll(struct wane_spec_pollfd *fds, unsigned long n, int timeout);
ptrdiff_t read(int fd, void *buffer, size_t length);
ptrdiff_t write(int fd, const void *buffer, size_t length);
int close(int fd);
int posix_openpt(int flags);
int grantpt(int fd);
int unlockpt(int fd);
char *ptsname(int fd);
int open(const char *path, int flags, ...);
int kill(int pid, int signal);
int waitpid(int pid, int *status, int options);
]]
local C = ffi.C

local M = {}
local Pty = {}
Pty.__index = Pty

--- Whether this system has pseudo-terminals: a chroot without /dev/pts has none.
-- @return boolean
function M.available()
  local master = C.posix_openpt(2)                       -- O_RDWR
  if master < 0 then return false end
  local name = C.grantpt(master) == 0 and C.unlockpt(master) == 0 and C.ptsname(master) or nil
  local slave = name ~= nil and C.open(name, 258) or -1  -- O_RDWR | O_NOCTTY
  if slave >= 0 then C.close(slave) end
  C.close(master)
  return slave >= 0
end

--- `it` where there are pseudo-terminals; elsewhere the test is skipped and says why.
-- @param it function busted's
-- @param pending function busted's
function M.it(it, pending)
  if M.available() then return it end
  return function(name) pending(name .. " (no pseudo-terminals here: mount /dev/pts)") end
end

--- Starts a program.
-- @param command string[] program and arguments
-- @param options table|nil columns, rows; env (names to values; false removes)
-- @return table with send, expect, wait, close
function M.spawn(command, options)
  options = options or {}
  local argv = ffi.new("const char *[?]", #command + 1)
  for i, word in ipairs(command) do argv[i - 1] = word end
  local size = ffi.new("struct wane_spec_winsize", options.rows or 24, options.columns or 80)
  local master = ffi.new "int[1]"
  local pid = C.forkpty(master, nil, nil, size)
  if pid == 0 then
    for name, value in pairs(options.env or {}) do
      if value then C.setenv(name, value, 1) else C.unsetenv(name) end
    end
    C.execvp(argv[0], ffi.cast("char *const *", argv))
    C._exit(127)
  end
  assert(pid > 0, "forkpty failed")
  return setmetatable({ pid = pid, fd = master[0], seen = "", all = "" }, Pty)
end

--- Types keys.
function Pty:send(text)
  assert(C.write(self.fd, text, #text) == #text)
end

-- Reads what is there within `milliseconds`; false at the end of the program or when nothing came.
function Pty:pump(milliseconds)
  local p = ffi.new "struct wane_spec_pollfd[1]"
  p[0].fd, p[0].events = self.fd, 1
  if C.poll(p, 1, milliseconds) <= 0 then return false end
  local buffer = ffi.new "char[4096]"
  local n = tonumber(C.read(self.fd, buffer, 4096))
  if n <= 0 then
    self.ended = true
    return false
  end
  local text = ffi.string(buffer, n)
  self.seen, self.all = self.seen .. text, self.all .. text
  return true
end

--- Waits until the output since the last expect holds a pattern; raises after `seconds` (default 20).
-- @return the captures
function Pty:expect(pattern, seconds)
  local deadline = os.time() + (seconds or 20)
  while true do
    local found = { self.seen:find(pattern) }
    if found[1] then
      self.seen = self.seen:sub(found[2] + 1)
      return unpack(found, 3)
    end
    if self.ended or os.time() > deadline then
      error(("'%s' never came; what came was:\n%s"):format(pattern, self.seen:gsub("\27", "^[")), 2)
    end
    self:pump(100)
  end
end

--- Waits for the program to end. Returns its exit status, or 128 + the signal that ended it; kills it after `seconds`.
function Pty:wait(seconds)
  local deadline = os.time() + (seconds or 20)
  local status = ffi.new "int[1]"
  while C.waitpid(self.pid, status, 1) == 0 do
    self:pump(50)
    if os.time() > deadline then C.kill(self.pid, 9) end
  end
  self:pump(0)
  C.close(self.fd)
  self.pid = nil
  local signal = bit.band(status[0], 127)
  return signal ~= 0 and 128 + signal or bit.band(bit.rshift(status[0], 8), 255)
end

--- Ends the program if it still runs.
function Pty:close()
  if self.pid then
    C.kill(self.pid, 9)
    self:wait()
  end
end

return M
