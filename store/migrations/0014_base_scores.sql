-- What the base model says of an answer that counts in a rollout: how far the answer's model has moved from it (nats per token) and the
-- mean log-probability that it gives the answer's tokens itself. `scoring` is the time until which a server has promised to score it.
ALTER TABLE inferences ADD COLUMN kl_to_base DOUBLE PRECISION;
ALTER TABLE inferences ADD COLUMN logprob_to_base DOUBLE PRECISION;
ALTER TABLE inferences ADD COLUMN scoring BIGINT;

-- 1 where retention has taken texts, tokens and person and left what a rollout counts, until that rollout is over.
ALTER TABLE inferences ADD COLUMN stripped BIGINT;
CREATE INDEX inferences_stripped ON inferences (rollout_id) WHERE stripped = 1;
-- Erasure finds by its unit what names nobody.
CREATE INDEX inferences_unit ON inferences (unit) WHERE unit IS NOT NULL AND user_key IS NULL;
