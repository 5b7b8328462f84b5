-- What an adapter is beyond its files: the weights it was made for, whether it is served, and where it comes from. `parent` is the id of
-- the adapter that its training went on from, `lineage` is JSON, `served` the last time it was put into service.
ALTER TABLE adapters ADD COLUMN updated BIGINT NOT NULL DEFAULT 0;
ALTER TABLE adapters ADD COLUMN base_hash TEXT;
ALTER TABLE adapters ADD COLUMN state TEXT NOT NULL DEFAULT 'candidate';
ALTER TABLE adapters ADD COLUMN served BIGINT;
ALTER TABLE adapters ADD COLUMN parent TEXT;
ALTER TABLE adapters ADD COLUMN lineage TEXT NOT NULL DEFAULT '{}';
-- The same factors may be an adapter of two forms of one base.
DROP INDEX adapters_generation;
CREATE UNIQUE INDEX adapters_generation ON adapters (base, name, generation);
CREATE INDEX adapters_state ON adapters (state);
-- Erasure looks for the adapters behind a snapshot, and for those behind these.
CREATE INDEX adapters_snapshot ON adapters (snapshot_id);
CREATE INDEX adapters_parent ON adapters (parent);

-- Names that lead to adapters and can be moved from one to another.
CREATE TABLE adapter_aliases (
    base TEXT NOT NULL,
    name TEXT NOT NULL,
    adapter_id TEXT NOT NULL,
    updated BIGINT NOT NULL,
    PRIMARY KEY (base, name)
);
CREATE INDEX adapter_aliases_adapter ON adapter_aliases (adapter_id);
