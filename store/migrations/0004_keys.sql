-- What a key is granted beside its scopes, as JSON, and when it ends.
ALTER TABLE api_keys ADD COLUMN expires BIGINT;
ALTER TABLE api_keys ADD COLUMN terms TEXT;

-- Secrets that a rotation has replaced and that still work for a while.
CREATE TABLE key_secrets (
    hash TEXT PRIMARY KEY,
    key_id TEXT NOT NULL,
    expires BIGINT NOT NULL
);
CREATE INDEX key_secrets_key ON key_secrets (key_id);

-- What one process has counted for a subject on a day, as absolute numbers: writing them twice changes nothing. A subject is a key, a
-- model, or a key's use of a model; `day` counts days since 1970 in universal time; `cost` is in billionths of a dollar.
CREATE TABLE usage_days (
    subject TEXT NOT NULL,
    day BIGINT NOT NULL,
    writer TEXT NOT NULL,
    requests BIGINT NOT NULL,
    input_tokens BIGINT NOT NULL,
    cached_tokens BIGINT NOT NULL,
    output_tokens BIGINT NOT NULL,
    cost BIGINT NOT NULL,
    PRIMARY KEY (subject, day, writer)
);
