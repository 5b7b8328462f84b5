-- A model to be made from files. Its folder in the data directory called `place` holds the training; the row says what was asked and
-- how far it is. `read_bytes` is how much of what the training says was taken over into this row and its events, in one transaction.
CREATE TABLE fine_tuning_jobs (
    id TEXT PRIMARY KEY,
    created BIGINT NOT NULL,
    key_id TEXT,
    model TEXT NOT NULL,
    base TEXT NOT NULL,
    method TEXT NOT NULL,
    suffix TEXT,
    seed BIGINT NOT NULL,
    training_file TEXT NOT NULL,
    validation_file TEXT,
    metadata TEXT,
    result_file TEXT NOT NULL,
    place TEXT NOT NULL,
    state TEXT NOT NULL,
    error TEXT,
    fine_tuned_model TEXT,
    served BIGINT NOT NULL,
    has_result BIGINT NOT NULL,
    finished BIGINT,
    estimated_finish BIGINT,
    trained_tokens BIGINT,
    step BIGINT NOT NULL,
    steps BIGINT NOT NULL,
    read_bytes BIGINT NOT NULL,
    attempts BIGINT NOT NULL,
    events BIGINT NOT NULL
);
CREATE INDEX fine_tuning_jobs_key ON fine_tuning_jobs (key_id, id);
CREATE INDEX fine_tuning_jobs_state ON fine_tuning_jobs (place, state);
CREATE INDEX fine_tuning_jobs_model ON fine_tuning_jobs (fine_tuned_model);
CREATE INDEX fine_tuning_jobs_training ON fine_tuning_jobs (training_file);
CREATE INDEX fine_tuning_jobs_validation ON fine_tuning_jobs (validation_file);

CREATE TABLE fine_tuning_metadata (
    job_id TEXT NOT NULL,
    pair TEXT NOT NULL,
    PRIMARY KEY (job_id, pair)
);
CREATE INDEX fine_tuning_metadata_pair ON fine_tuning_metadata (pair, job_id);

CREATE TABLE fine_tuning_events (
    job_id TEXT NOT NULL,
    number BIGINT NOT NULL,
    created BIGINT NOT NULL,
    level TEXT NOT NULL,
    message TEXT NOT NULL,
    data TEXT,
    PRIMARY KEY (job_id, number)
);

CREATE TABLE fine_tuning_checkpoints (
    job_id TEXT NOT NULL,
    step BIGINT NOT NULL,
    created BIGINT NOT NULL,
    model TEXT NOT NULL,
    metrics TEXT NOT NULL,
    PRIMARY KEY (job_id, step)
);
