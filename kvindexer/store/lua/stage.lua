-- Puts records into a generation that nobody reads yet: how a shard is written anew without blocking the server.
-- ARGV: layout, registration, generation, buckets, '1' to begin, packed records
-- Answers: {'ok'} or {why not}; 'lost' if the generation was swept or flushed away meanwhile

local no = refusal(ARGV[1], ARGV[2])
if no then
  return {no}
end
local stage = 'stage:' .. ARGV[3]
if ARGV[5] ~= '1' and redis.call('HEXISTS', meta, stage) == 0 then
  return {'lost'}
end
redis.call('HSET', meta, 'layout', ARGV[1], stage, ARGV[4] .. ':' .. seconds())
redis.call('HINCRBY', meta, 'staged:' .. ARGV[3], string.format('%d', put(ARGV[3], ARGV[6])))
return {'ok'}
