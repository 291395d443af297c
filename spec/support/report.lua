--- busted's output for scripts/test: a line a spec file, failures in full where they happen, totals for the caller to add up.
-- Environment: WANE_TALLY names a file to which "passed failed skipped" is appended; WANE_VERBOSE=1 prints every test's name (some
-- carry the largest difference to the golden data).

return function(options)
  local busted = require "busted"
  local handler = require "busted.outputHandlers.base"()
  local verbose = os.getenv "WANE_VERBOSE" == "1"
  local file                                   -- counts and start of the file being run

  -- What busted hands over as a message: a string, or any value that was thrown.
  local function text(message)
    return type(message) == "string" and message or message == nil and "nil error" or require "pl.pretty".write(message)
  end

  local function print_problem(kind, element, message, trace)
    local place = trace and trace.short_src and (" (%s:%s)"):format(trace.short_src, trace.currentline) or ""
    io.write("  ", kind, " ", handler.getFullName(element), place, "\n")
    io.write("    ", (text(message):gsub("\n", "\n    ")), "\n")
    if trace and trace.traceback and kind == "ERROR" then io.write("    ", (trace.traceback:gsub("\n", "\n    ")), "\n") end
    io.flush()
  end

  local function on_file_start(element)
    file = { name = element.name, passed = handler.successesCount, failed = handler.failuresCount + handler.errorsCount,
             skipped = handler.pendingsCount, time = os.time() }
    return nil, true
  end

  local function on_file_end()
    local passed = handler.successesCount - file.passed
    local failed = handler.failuresCount + handler.errorsCount - file.failed
    local skipped = handler.pendingsCount - file.skipped
    local seconds = os.difftime(os.time(), file.time)
    io.write(("%-48s %4d passed%s%s%s\n"):format(file.name, passed, failed > 0 and (", %d FAILED"):format(failed) or "",
      skipped > 0 and (", %d skipped"):format(skipped) or "", seconds >= 1 and (", %d s"):format(seconds) or ""))
    io.flush()
    return nil, true
  end

  local function on_test_end(element, _, status, trace)
    if status == "pending" then
      local why = element.message or (trace and trace.message)
      io.write("  skip ", handler.getFullName(element), why and (": " .. text(why)) or "", "\n")
    elseif verbose and status == "success" then
      io.write("  ok   ", handler.getFullName(element), "\n")
    end
    return nil, true
  end

  local function on_pending(element, _, message)
    element.message = message
    return nil, true
  end

  local function on_failure(element, _, message, trace)
    print_problem("FAIL ", element, message, trace)
    return nil, true
  end

  local function on_error(element, _, message, trace)
    print_problem("ERROR", element, message, trace)
    return nil, true
  end

  local function on_suite_end()
    local path = os.getenv "WANE_TALLY"
    if not path then return nil, true end
    local out = assert(io.open(path, "a"))
    out:write(("%d %d %d\n"):format(handler.successesCount, handler.failuresCount + handler.errorsCount, handler.pendingsCount))
    out:close()
    return nil, true
  end

  function handler:subscribe(given)
    require "busted.languages.en"
    self.options = given or options
    busted.subscribe({ "suite", "reset" }, self.baseSuiteReset, { priority = 1 })
    busted.subscribe({ "suite", "start" }, self.baseSuiteStart, { priority = 1 })
    busted.subscribe({ "test", "start" }, self.baseTestStart, { priority = 1 })
    busted.subscribe({ "pending" }, on_pending, { priority = 1 })
    busted.subscribe({ "pending" }, self.basePending, { priority = 2 })
    busted.subscribe({ "test", "end" }, self.baseTestEnd, { priority = 1 })
    busted.subscribe({ "failure", "it" }, self.baseTestFailure, { priority = 1 })
    busted.subscribe({ "error", "it" }, self.baseTestError, { priority = 1 })
    busted.subscribe({ "failure" }, self.baseError, { priority = 1 })
    busted.subscribe({ "error" }, self.baseError, { priority = 1 })
    busted.subscribe({ "failure" }, on_failure, { priority = 2 })
    busted.subscribe({ "error" }, on_error, { priority = 2 })
    busted.subscribe({ "test", "end" }, on_test_end, { priority = 2 })
    busted.subscribe({ "file", "start" }, on_file_start)
    busted.subscribe({ "file", "end" }, on_file_end)
    busted.subscribe({ "suite", "end" }, on_suite_end)
  end

  return handler
end
