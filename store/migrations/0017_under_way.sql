-- When the oldest answer of a server began that will count in a rollout and has not ended, in microseconds since 1970.
ALTER TABLE rollout_readers ADD COLUMN under_way BIGINT;
