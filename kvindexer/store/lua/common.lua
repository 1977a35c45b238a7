-- What all scripts of a shard share; put in front of each of them.
--
-- KEYS[1] is the shard's meta hash, '{namespace:tag}:meta'.  Blocks lie in '{namespace:tag}:<generation>:<bucket>'.
-- Numbers that may pass 2^53 (epoch, next, registration) are decimal texts, compared as such.

local meta = KEYS[1]
local prefix = string.sub(meta, 1, -5)

local function less(one, other)
  if #one ~= #other then
    return #one < #other
  end
  return one < other
end

local function buckets_of(generation)
  return prefix .. generation .. ':'
end

-- Lua passes at most 8,000 values to a call.
local AT_ONCE = 2000

-- Puts packed records into the buckets of a generation; returns by how many its entries grew.
-- Packed: for each bucket u32 number, u32 bytes of its records, then each one's 8 bytes of hash, u16 length, value; no
-- value: gone.  A hash stands in it once.
local function put(generation, packed)
  local keys = buckets_of(generation)
  local position, grown, size = 1, 0, #packed
  while position <= size do
    local bucket, bytes
    bucket, bytes, position = struct.unpack('<I4I4', packed, position)
    local key, behind = keys .. string.format('%d', bucket), position + bytes
    while position < behind do
      local kept, gone, kept_count, gone_count = {}, {}, 0, 0
      while position < behind and kept_count < AT_ONCE and gone_count < AT_ONCE do
        local field = string.sub(packed, position, position + 7)
        local low, high = string.byte(packed, position + 8, position + 9)
        local length = low + 256 * high
        position = position + 10
        if length == 0 then
          gone_count = gone_count + 1
          gone[gone_count] = field
        else
          kept[kept_count + 1] = field
          kept_count = kept_count + 2
          kept[kept_count] = string.sub(packed, position, position + length - 1)
          position = position + length
        end
      end
      if kept_count > 0 then
        grown = grown + redis.call('HSET', key, unpack(kept))
      end
      if gone_count > 0 then
        grown = grown - redis.call('HDEL', key, unpack(gone))
      end
    end
  end
  return grown
end

-- Why nothing may be written, or nil.
local function refusal(layout, registration)
  local found = redis.call('HMGET', meta, 'layout', 'removed')
  if found[1] and found[1] ~= layout then
    return 'layout'
  end
  if found[2] and not less(found[2], registration) then
    return 'removed'
  end
  return nil
end

-- Whether a reader of the whole shard has asked for a moment's rest: 'hold' expires by itself.
local function held()
  return redis.call('EXISTS', prefix .. 'hold') == 1
end

local function seconds()
  return redis.call('TIME')[1]
end
