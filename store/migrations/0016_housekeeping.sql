-- The step of the last evaluation that was taken over, so that one that is made again after a kill is told once.
ALTER TABLE fine_tuning_jobs ADD COLUMN evaluated BIGINT NOT NULL DEFAULT 0;
-- When the adapter's files were removed, in microseconds since 1970. The row stays, since lineage leads through it.
ALTER TABLE adapters ADD COLUMN files_removed BIGINT;
-- Adapters of one folder are held together while it goes.
CREATE INDEX adapters_location ON adapters (location);
