-- wrk script: posts the bodies of a file (one a line) in turn; checks each answer's length against the file of lengths.
-- One thread per connection, so an answer belongs to the last request.  Usage: wrk -s throughput.lua URL -- BODIES LENGTHS
local bodies, lengths, at = {}, {}, 0
wrong = 0
local threads = {}

function setup(thread)
  table.insert(threads, thread)
  thread:set("first", #threads)
end

function init(args)
  for line in io.lines(args[1]) do table.insert(bodies, line) end
  for line in io.lines(args[2]) do table.insert(lengths, tonumber(line)) end
  wrk.method = "POST"
  wrk.headers["Content-Type"] = "application/json"
  at = first
  for i, body in ipairs(bodies) do bodies[i] = wrk.format(nil, nil, nil, body) end
end

function request()
  at = at % #bodies + 1
  return bodies[at]
end

function response(status, headers, body)
  if status ~= 200 or #body ~= lengths[at] then wrong = wrong + 1 end
end

function done(summary, latency, requests)
  local total = 0
  for _, thread in ipairs(threads) do total = total + thread:get("wrong") end
  print(string.format("RESULT %d %d %d", summary.requests, summary.duration, total))
end
