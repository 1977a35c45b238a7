-- Brings a shard from anywhere in [base, end] to end: absolute records, so that doing it twice is doing it once.
-- The records are packed for the buckets of one generation, and are of no use in those of another.
-- ARGV: layout, registration, epoch, base, end, digest, level, first, facts, writer, generation, packed records
-- Answers: {'ok', entries} or {why not}

local layout, registration, epoch, base, upto = ARGV[1], ARGV[2], ARGV[3], ARGV[4], ARGV[5]
local no = refusal(layout, registration)
if no or held() then
  return {no or 'held'}
end
local found = redis.call('HMGET', meta, 'epoch', 'next', 'level', 'first', 'generation', 'entries')
if not found[1] or not found[5] then
  return {'absent'}
end
if found[1] ~= epoch then
  return {'epoch'}
end
if found[5] ~= ARGV[11] then
  return {'generation'}
end
if less(found[2], base) then
  return {'behind'}
end
if less(upto, found[2]) then
  return {'ahead'}
end
if found[2] == upto and base ~= upto then
  return {'ok', found[6]}
end
if ARGV[7] ~= found[3] or ARGV[8] ~= found[4] then
  return {'coverage'}  -- with less it would be wrong, with more it would not become right
end
local entries = tonumber(found[6]) + put(found[5], ARGV[12])
entries = string.format('%d', entries)
redis.call('HSET', meta, 'next', upto, 'digest', ARGV[6], 'level', ARGV[7], 'first', ARGV[8], 'facts', ARGV[9],
  'writer', ARGV[10], 'entries', entries)
return {'ok', entries}
