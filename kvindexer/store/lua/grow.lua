-- Copies some buckets of the content into a generation with more of them, and with the last ones puts it in place.
-- A bucket's records stay together or part by higher bits of their hashes, so each is read and written once.
-- ARGV: layout, registration, epoch, next, generation, new generation, its buckets, first bucket, behind the last one
-- Answers: {'ok', entries copied} or {why not}; 'lost' if the content is not what the meta hash says, too

local layout, registration, epoch, upto, old, new = ARGV[1], ARGV[2], ARGV[3], ARGV[4], ARGV[5], ARGV[6]
local wide, first, behind = tonumber(ARGV[7]), tonumber(ARGV[8]), tonumber(ARGV[9])
local no = refusal(layout, registration)
if no then
  return {no}
end
local stage, staged = 'stage:' .. new, 'staged:' .. new
local found = redis.call('HMGET', meta, 'epoch', 'next', 'generation', 'buckets', 'entries', stage)
if not found[1] or not found[3] then
  return {'absent'}
end
if found[1] ~= epoch then
  return {'epoch'}
end
if found[3] ~= old then
  return {'generation'}
end
if found[2] ~= upto then
  return {less(found[2], upto) and 'behind' or 'ahead'}  -- what was copied before this is not the content any more
end
if first > 0 and not found[6] then
  return {'lost'}
end
redis.call('HSET', meta, stage, ARGV[7] .. ':' .. seconds())

local copied = 0
for bucket = first, behind - 1 do
  local all = redis.pcall('HGETALL', buckets_of(old) .. string.format('%d', bucket))
  if all.err then
    return {'lost'}
  end
  local parts = {}
  for n = 1, #all, 2 do
    local field = all[n]
    if #field == 8 then -- anything else is another program's
      local low, middle, high = string.byte(field, 1, 3)
      local target = (low + 256 * middle + 65536 * high) % wide
      local part = parts[target]
      if not part then
        part = {}
        parts[target] = part
      end
      part[#part + 1] = field
      part[#part + 1] = all[n + 1]
    end
  end
  for target, part in pairs(parts) do
    local key = buckets_of(new) .. string.format('%d', target)
    for n = 1, #part, 2000 do
      copied = copied + redis.call('HSET', key, unpack(part, n, math.min(n + 1999, #part)))
    end
  end
end
copied = string.format('%d', redis.call('HINCRBY', meta, staged, copied))
if behind < tonumber(found[4]) then
  return {'ok', copied}
end

if held() then
  return {'held'}
end
if copied ~= found[5] then
  return {'lost'}
end
redis.call('HDEL', meta, stage, staged)
redis.call('HSET', meta, 'stage:' .. old, found[4] .. ':0', 'generation', new, 'buckets', ARGV[7])
return {'ok', copied}
