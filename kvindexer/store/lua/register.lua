-- Writes one line of the directory of sources.  KEYS[1]: '{namespace}:sources'.
-- A line is '<generation>:<kind>:<spec>'; the line with the higher generation is the newer one, whoever brings it.
-- ARGV: source, kind, spec, generation ('' for a new one, otherwise: publish again what may have been lost),
--       the newest generation of the source that the caller knows: a new one is above it, whatever is lost here
-- Answers: the line's generation, as text; '0' if another line is there that this one must not touch

local lines, source, kind, spec = KEYS[1], ARGV[1], ARGV[2], ARGV[3]
local known = redis.call('HGET', lines, source)
local known_generation = known and tonumber(string.match(known, '^(%d+):')) or 0
local counter = tonumber(redis.call('HGET', lines, '#generation') or '0')
local known_kind = known and string.match(known, '^%d+:(%a+):')
local generation
if kind == 'dropped' then
  -- the life that a local line names is over: the line goes, and what comes next counts from above it
  if known and known ~= string.format('%d', known_generation) .. ':local:' .. spec then
    return '0'
  end
  generation = math.max(counter, known_generation, tonumber(ARGV[5])) + 1
  local now = redis.call('TIME')
  redis.call('HDEL', lines, source)
  redis.call('HSET', lines, '#generation', string.format('%d', generation), '#version', now[1] .. '.' .. now[2])
  return string.format('%d', generation)
end
if kind == 'found' or (kind == 'local' and ARGV[4] == '') then
  if known_kind == 'registered' then
    return '0'
  end
  kind = 'local'
end
if ARGV[4] == '' then
  if known == string.format('%d', known_generation) .. ':' .. kind .. ':' .. spec and known_generation >= tonumber(ARGV[5]) then
    return string.format('%d', known_generation)
  end
  generation = math.max(counter, known_generation, tonumber(ARGV[5])) + 1
else
  generation = tonumber(ARGV[4])
  if known_generation >= generation then
    return string.format('%d', known_generation)
  end
end
local text = string.format('%d', generation)
local now = redis.call('TIME')
redis.call('HSET', lines, source, text .. ':' .. kind .. ':' .. spec,
  '#generation', string.format('%d', math.max(counter, generation)), '#version', now[1] .. '.' .. now[2])
return text
