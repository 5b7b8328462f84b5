-- Which key acted; older acts, and those of nobody's key, have none.
ALTER TABLE audit ADD COLUMN key_id TEXT;
-- Where an answer stood among those that one person got at once.
ALTER TABLE inferences ADD COLUMN place BIGINT;
-- Lineage counts the answers of an adapter; those of base models, which are generation 0, are not looked for.
CREATE INDEX inferences_adapter ON inferences (adapter, created) WHERE adapter <> 0;
