-- The arm that has the traffic since its rollout ended, where one was promoted: what a public model name serves is its newest one.
ALTER TABLE rollouts ADD COLUMN promoted BIGINT;
CREATE INDEX rollouts_promoted ON rollouts (model, ended) WHERE promoted IS NOT NULL;

-- Which state of the rollouts each server assigns by, so that who ends one can wait until all of them do. `seen` is the database's clock.
CREATE TABLE rollout_readers (
    reader TEXT PRIMARY KEY,
    serves BIGINT NOT NULL,
    seen BIGINT NOT NULL
);
