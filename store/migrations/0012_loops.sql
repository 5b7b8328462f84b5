-- Where each loop stands, and every state that it entered with the numbers that it stood on. `version` counts: who takes a loop on says
-- which one was seen, and of two who saw the same one wins. body is JSON.
CREATE TABLE loops (
    name TEXT PRIMARY KEY,
    created BIGINT NOT NULL,
    updated BIGINT NOT NULL,
    cycle BIGINT NOT NULL,
    state TEXT NOT NULL,
    version BIGINT NOT NULL,
    body TEXT NOT NULL
);

CREATE TABLE loop_steps (
    name TEXT NOT NULL,
    version BIGINT NOT NULL,
    at BIGINT NOT NULL,
    cycle BIGINT NOT NULL,
    state TEXT NOT NULL,
    actor TEXT NOT NULL,
    body TEXT NOT NULL,
    PRIMARY KEY (name, version)
);
CREATE INDEX loop_steps_cycle ON loop_steps (name, cycle);
