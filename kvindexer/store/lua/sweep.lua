-- Gives back some buckets of a generation that is no shard's content any more, a few at a time.
-- ARGV: generation, first bucket, behind the last bucket, '1' if these are the last ones
-- Answers: {'ok'} or {why not}

local generation = ARGV[1]
if redis.call('HGET', meta, 'generation') == generation then
  return {'in_use'}
end
local keys = {}
for bucket = tonumber(ARGV[2]), tonumber(ARGV[3]) - 1 do
  local key = buckets_of(generation) .. string.format('%d', bucket)
  if redis.call('TYPE', key).ok == 'hash' then -- anything else is another program's
    keys[#keys + 1] = key
  end
end
if #keys > 0 then
  redis.call('UNLINK', unpack(keys))
end
if ARGV[4] == '1' then
  redis.call('HDEL', meta, 'stage:' .. generation, 'staged:' .. generation)
end
return {'ok'}
