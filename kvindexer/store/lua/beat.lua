-- "I am alive", and who else is.  KEYS: '{namespace}:replicas', '{namespace}:sources'.
-- ARGV: replica, seconds after which one that is not heard is forgotten, '1' to be forgotten at once
-- Answers: {the server's time in seconds, version of the directory or '', replica, ...}

local now = redis.call('TIME')[1]
redis.call('ZADD', KEYS[1], ARGV[3] == '1' and 0 or now, ARGV[1])
redis.call('ZREMRANGEBYSCORE', KEYS[1], '-inf', '(' .. string.format('%d', now - ARGV[2]))
return {now, redis.call('HGET', KEYS[2], '#version') or '', unpack(redis.call('ZRANGE', KEYS[1], 0, 999))}
