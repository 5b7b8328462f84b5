-- One text for SQLite and Postgres. BYTES becomes BLOB or BYTEA. Times are microseconds since 1970, ids UUIDv7 as text, flags 0 or 1,
-- and whatever has structure and is never searched is JSON as text.

CREATE TABLE meta (
    name TEXT PRIMARY KEY,
    value TEXT NOT NULL
);

-- One row per answer that the API gave.
CREATE TABLE inferences (
    id TEXT PRIMARY KEY,
    created BIGINT NOT NULL,
    endpoint TEXT NOT NULL,
    model TEXT NOT NULL,
    adapter BIGINT NOT NULL,
    variant TEXT,
    conversation TEXT,
    key_id TEXT,
    user_key TEXT,
    status TEXT NOT NULL,
    compare BIGINT NOT NULL,
    prompt_tokens BIGINT NOT NULL,
    cached_tokens BIGINT NOT NULL,
    output_tokens BIGINT NOT NULL,
    first_token_us BIGINT,
    duration_us BIGINT NOT NULL,
    config_hash TEXT NOT NULL,
    metadata TEXT NOT NULL,
    params TEXT,
    messages TEXT,
    prompt_text TEXT,
    prompt_ids BYTES,
    bytes BIGINT NOT NULL
);
-- With the size, so that retention sums and picks without touching the rows.
CREATE INDEX inferences_created ON inferences (created, bytes);
CREATE INDEX inferences_user ON inferences (user_key);
CREATE INDEX inferences_conversation ON inferences (conversation);

-- One row per choice of an answer. The first choice has the answer's own id.
CREATE TABLE choices (
    id TEXT PRIMARY KEY,
    inference_id TEXT NOT NULL,
    position BIGINT NOT NULL,
    finish_reason TEXT,
    output_text TEXT,
    output_ids BYTES,
    logprobs BYTES,
    raw_logprobs BYTES,
    mean_logprob DOUBLE PRECISION,
    tokens BIGINT NOT NULL
);
CREATE INDEX choices_inference ON choices (inference_id);

CREATE TABLE feedback (
    id TEXT PRIMARY KEY,
    created BIGINT NOT NULL,
    updated BIGINT NOT NULL,
    revision BIGINT NOT NULL,
    withdrawn BIGINT NOT NULL,
    target TEXT NOT NULL,
    target_kind TEXT NOT NULL,
    kind TEXT NOT NULL,
    metric TEXT,
    value TEXT NOT NULL,
    number DOUBLE PRECISION,
    author TEXT,
    source TEXT,
    latency_ms BIGINT,
    tags TEXT NOT NULL,
    key_id TEXT,
    idempotency_key TEXT,
    task_id TEXT
);
CREATE UNIQUE INDEX feedback_idempotency ON feedback (idempotency_key);
CREATE INDEX feedback_target ON feedback (target);
CREATE INDEX feedback_created ON feedback (created);
CREATE INDEX feedback_author ON feedback (author);

-- What a feedback's targets are, one row each: a comparison has several.
CREATE TABLE feedback_targets (
    feedback_id TEXT NOT NULL,
    target TEXT NOT NULL,
    PRIMARY KEY (feedback_id, target)
);
CREATE INDEX feedback_targets_target ON feedback_targets (target);

-- What a feedback was before an edit.
CREATE TABLE feedback_revisions (
    feedback_id TEXT NOT NULL,
    revision BIGINT NOT NULL,
    at BIGINT NOT NULL,
    body TEXT NOT NULL,
    PRIMARY KEY (feedback_id, revision)
);

CREATE TABLE api_keys (
    id TEXT PRIMARY KEY,
    created BIGINT NOT NULL,
    name TEXT NOT NULL,
    prefix TEXT NOT NULL,
    hash TEXT NOT NULL,
    scopes TEXT NOT NULL,
    revoked BIGINT
);
CREATE UNIQUE INDEX api_keys_hash ON api_keys (hash);

CREATE TABLE audit (
    id TEXT PRIMARY KEY,
    at BIGINT NOT NULL,
    actor TEXT NOT NULL,
    action TEXT NOT NULL,
    subject TEXT NOT NULL,
    detail TEXT NOT NULL
);

-- Who and what has been erased, as pseudonyms: records from before `at` that arrive late, out of a spill log, are left out.
CREATE TABLE erasures (
    subject TEXT PRIMARY KEY,
    at BIGINT NOT NULL
);

CREATE TABLE label_queues (
    id TEXT PRIMARY KEY,
    name TEXT NOT NULL,
    created BIGINT NOT NULL,
    closed BIGINT,
    rule TEXT NOT NULL,
    guidelines TEXT NOT NULL,
    overlap BIGINT NOT NULL,
    gold_share DOUBLE PRECISION NOT NULL,
    lease_seconds BIGINT NOT NULL,
    filled_until TEXT NOT NULL
);
CREATE UNIQUE INDEX label_queues_name ON label_queues (name);

-- A pair of answers to compare. `source` says where it came from and keeps a pair from entering a queue twice. One person at a time
-- holds the lease; `verdicts` counts judgements that stand, and `done` is set when there are as many as the queue's overlap.
CREATE TABLE label_tasks (
    id TEXT PRIMARY KEY,
    queue_id TEXT NOT NULL,
    created BIGINT NOT NULL,
    source TEXT NOT NULL,
    prompt TEXT NOT NULL,
    answer_a TEXT NOT NULL,
    answer_b TEXT NOT NULL,
    candidate_a TEXT,
    candidate_b TEXT,
    gold TEXT,
    verdicts BIGINT NOT NULL,
    done BIGINT NOT NULL,
    leased_by TEXT,
    leased_until BIGINT NOT NULL
);
CREATE UNIQUE INDEX label_tasks_source ON label_tasks (queue_id, source);
CREATE INDEX label_tasks_open ON label_tasks (queue_id, done, verdicts);

-- One person's work on one task: leased, then done or skipped; an undone one is leased again or waits as undone.
CREATE TABLE label_assignments (
    id TEXT PRIMARY KEY,
    queue_id TEXT NOT NULL,
    task_id TEXT NOT NULL,
    annotator TEXT NOT NULL,
    state TEXT NOT NULL,
    a_is_left BIGINT NOT NULL,
    verdict TEXT,
    reason TEXT,
    feedback_id TEXT,
    started BIGINT NOT NULL,
    finished BIGINT,
    external TEXT
);
CREATE UNIQUE INDEX label_assignments_one ON label_assignments (task_id, annotator);
CREATE INDEX label_assignments_annotator ON label_assignments (queue_id, annotator, finished);

-- What people said of tasks in other tools, as last seen: their assignments are made from it. A row stays when the judgement is deleted.
CREATE TABLE label_external (
    queue_id TEXT NOT NULL,
    tool TEXT NOT NULL,
    external TEXT NOT NULL,
    version BIGINT,
    state TEXT NOT NULL,
    verdict TEXT,
    comment TEXT,
    task_id TEXT NOT NULL,
    annotator TEXT NOT NULL,
    a_is_left BIGINT NOT NULL,
    finished BIGINT NOT NULL,
    latency_ms BIGINT,
    PRIMARY KEY (queue_id, tool, external)
);
CREATE INDEX label_external_task ON label_external (task_id, annotator);

-- A pair to be: one of its answers, or both, must still be generated.
CREATE TABLE label_drafts (
    id TEXT PRIMARY KEY,
    queue_id TEXT NOT NULL,
    created BIGINT NOT NULL,
    source TEXT NOT NULL,
    prompt TEXT NOT NULL,
    answer_a TEXT,
    candidate_a TEXT,
    model TEXT,
    failure TEXT
);
CREATE UNIQUE INDEX label_drafts_source ON label_drafts (queue_id, source);

CREATE TABLE snapshots (
    id TEXT PRIMARY KEY,
    name TEXT NOT NULL,
    version BIGINT NOT NULL,
    created BIGINT NOT NULL,
    query TEXT NOT NULL,
    content_hash TEXT NOT NULL,
    location TEXT NOT NULL,
    table_version BIGINT NOT NULL,
    row_counts TEXT NOT NULL,
    verdict TEXT NOT NULL,
    report TEXT NOT NULL,
    tainted TEXT
);
CREATE UNIQUE INDEX snapshots_version ON snapshots (name, version);

-- Which records a snapshot was made from; erasure asks by source.
CREATE TABLE snapshot_sources (
    snapshot_id TEXT NOT NULL,
    kind TEXT NOT NULL,
    source TEXT NOT NULL,
    PRIMARY KEY (snapshot_id, kind, source)
);
CREATE INDEX snapshot_sources_source ON snapshot_sources (source);

CREATE TABLE jobs (
    id TEXT PRIMARY KEY,
    created BIGINT NOT NULL,
    updated BIGINT NOT NULL,
    kind TEXT NOT NULL,
    state TEXT NOT NULL,
    spec TEXT NOT NULL,
    progress TEXT NOT NULL,
    error TEXT
);

CREATE TABLE adapters (
    id TEXT PRIMARY KEY,
    created BIGINT NOT NULL,
    name TEXT NOT NULL,
    generation BIGINT NOT NULL,
    base TEXT NOT NULL,
    content_hash TEXT NOT NULL,
    location TEXT NOT NULL,
    snapshot_id TEXT,
    job_id TEXT,
    metrics TEXT NOT NULL,
    tainted TEXT
);
CREATE UNIQUE INDEX adapters_generation ON adapters (name, generation);

CREATE TABLE rollouts (
    id TEXT PRIMARY KEY,
    created BIGINT NOT NULL,
    updated BIGINT NOT NULL,
    name TEXT NOT NULL,
    state TEXT NOT NULL,
    spec TEXT NOT NULL
);
