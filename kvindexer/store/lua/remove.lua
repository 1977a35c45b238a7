-- Ends a shard whose source was unregistered: late writers of this registration are refused for a day.
-- ARGV: layout, registration, seconds that the refusal is remembered
-- Answers: {'ok'} or {why not}; the buckets are swept afterwards

local no = refusal(ARGV[1], ARGV[2])
if no == 'layout' then
  return {no}
end
local found = redis.call('HMGET', meta, 'registration', 'generation', 'buckets')
if no or (found[1] and less(ARGV[2], found[1])) then
  return {'newer'}
end
redis.call('HDEL', meta, 'registration', 'epoch', 'next', 'digest', 'birth', 'level', 'first', 'facts', 'writer', 'source',
  'spec', 'generation', 'buckets', 'entries')
if found[2] then
  redis.call('HSET', meta, 'stage:' .. found[2], found[3] .. ':0')
end
redis.call('HSET', meta, 'layout', ARGV[1], 'removed', ARGV[2])
redis.call('EXPIRE', meta, ARGV[3])
return {'ok'}
