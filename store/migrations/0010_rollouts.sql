-- What an operator asked for, where it stands, and every decision with the numbers that it stood on. `version` counts the states: who takes
-- a rollout on says which one was seen, and of two who saw the same one wins. `latest` is the newest decision, also where it was not
-- worth a row of its own. spec, state, latest and body are JSON.
-- The first migration made a table of this name that nothing was ever written to.
DROP TABLE rollouts;
CREATE TABLE rollouts (
    id TEXT PRIMARY KEY,
    created BIGINT NOT NULL,
    updated BIGINT NOT NULL,
    ended BIGINT,
    name TEXT NOT NULL,
    model TEXT NOT NULL,
    spec TEXT NOT NULL,
    state TEXT NOT NULL,
    version BIGINT NOT NULL,
    latest TEXT NOT NULL
);
-- A name is free again when its rollout is over.
CREATE UNIQUE INDEX rollouts_running ON rollouts (name) WHERE ended IS NULL;

CREATE TABLE rollout_decisions (
    rollout_id TEXT NOT NULL,
    version BIGINT NOT NULL,
    at BIGINT NOT NULL,
    action TEXT NOT NULL,
    actor TEXT,
    body TEXT NOT NULL,
    PRIMARY KEY (rollout_id, version)
);

-- What a unit was answered with, where the answer counts in a rollout: recorded with the answer, so when it was served. `unit` is a hash
-- of the key that keeps the arm, `refused` says whether the answer's words refuse.
ALTER TABLE inferences ADD COLUMN rollout_id TEXT;
ALTER TABLE inferences ADD COLUMN arm BIGINT;
ALTER TABLE inferences ADD COLUMN unit BIGINT;
ALTER TABLE inferences ADD COLUMN refused BIGINT;
CREATE INDEX inferences_rollout ON inferences (rollout_id, created);
