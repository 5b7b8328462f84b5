-- A file that a client uploaded or a batch made. Its content lies in the data directory called `place`, under its id.
CREATE TABLE files (
    id TEXT PRIMARY KEY,
    created BIGINT NOT NULL,
    key_id TEXT,
    filename TEXT NOT NULL,
    purpose TEXT NOT NULL,
    bytes BIGINT NOT NULL,
    expires BIGINT,
    place TEXT NOT NULL
);
CREATE INDEX files_key ON files (key_id, id);
CREATE INDEX files_place ON files (place, expires);

-- Requests in a file, answered in the background by the server that has the file. What was answered is in the two files that the
-- batch names from its first day on; they become rows of `files` when it ends, and the counts here only say how far it is.
CREATE TABLE batches (
    id TEXT PRIMARY KEY,
    created BIGINT NOT NULL,
    key_id TEXT,
    endpoint TEXT NOT NULL,
    input_file TEXT NOT NULL,
    output_file TEXT NOT NULL,
    error_file TEXT NOT NULL,
    has_output BIGINT NOT NULL,
    has_errors BIGINT NOT NULL,
    metadata TEXT,
    keep_seconds BIGINT,
    state TEXT NOT NULL,
    errors TEXT,
    model TEXT,
    total BIGINT NOT NULL,
    completed BIGINT NOT NULL,
    failed BIGINT NOT NULL,
    token_usage TEXT,
    expires BIGINT NOT NULL,
    in_progress_at BIGINT,
    finalizing_at BIGINT,
    completed_at BIGINT,
    failed_at BIGINT,
    expired_at BIGINT,
    cancelling_at BIGINT,
    cancelled_at BIGINT,
    place TEXT NOT NULL
);
CREATE INDEX batches_key ON batches (key_id, id);
CREATE INDEX batches_state ON batches (place, state);
CREATE INDEX batches_input ON batches (input_file);
