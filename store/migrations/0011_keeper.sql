-- Which of all promotions a rollout ended in, counted from 1, where it did: a public model name serves the newest. Not by the time, since
-- the clocks of servers differ.
ALTER TABLE rollouts ADD COLUMN promoted BIGINT;
CREATE INDEX rollouts_promoted ON rollouts (model, promoted) WHERE promoted IS NOT NULL;

-- Which state of the rollouts each server assigns by, so that who ends one can wait until all of them do. `seen` is the database's clock.
CREATE TABLE rollout_readers (
    reader TEXT PRIMARY KEY,
    serves BIGINT NOT NULL,
    seen BIGINT NOT NULL
);
