-- Makes a staged generation the shard's content: compare and set on its epoch.
-- ARGV: layout, registration, generation, expected epoch ('' if there is no content), epoch, end, digest, birth, level,
--       first, facts, writer, source, spec, '1' to accept less coverage, packed last records
-- Answers: {'ok', entries} or {why not}

local no = refusal(ARGV[1], ARGV[2])
if no or held() then
  return {no or 'held'}
end
local generation, expected, epoch, upto = ARGV[3], ARGV[4], ARGV[5], ARGV[6]
local stage, staged = 'stage:' .. generation, 'staged:' .. generation
local found = redis.call('HMGET', meta, 'epoch', 'next', 'level', 'first', 'generation', 'buckets', stage, staged)
if not found[7] then
  return {'lost'}
end
if (found[1] or '') ~= expected then
  return {'epoch'}
end
if expected == epoch then
  if less(upto, found[2]) then
    return {'ahead'}
  end
  if ARGV[15] ~= '1' and (less(ARGV[9], found[3]) or (ARGV[9] == found[3] and less(found[4], ARGV[10]))) then
    return {'coverage'}
  end
end
local entries = string.format('%d', tonumber(found[8]) + put(generation, ARGV[16]))
local buckets = string.match(found[7], '^%d+')
redis.call('HDEL', meta, stage, staged, 'removed')
redis.call('PERSIST', meta)
if found[5] then
  redis.call('HSET', meta, 'stage:' .. found[5], found[6] .. ':0')
end
redis.call('HSET', meta, 'registration', ARGV[2], 'epoch', epoch, 'next', upto, 'digest', ARGV[7], 'birth', ARGV[8],
  'level', ARGV[9], 'first', ARGV[10], 'facts', ARGV[11], 'writer', ARGV[12], 'source', ARGV[13], 'spec', ARGV[14],
  'generation', generation, 'buckets', buckets, 'entries', entries)
return {'ok', entries}
