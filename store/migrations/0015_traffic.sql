-- Answers summed up by model and variant over stretches of time, so that nobody reads a month of answers to say what they cost. `width` is
-- the length of the stretch, and every answer is in one of each. The transaction that writes answers adds to them. An erasure takes a
-- person's away again, retention does not: numbers of many answers are nobody's, and what was paid was paid. No variant is ''.
CREATE TABLE traffic (
    width BIGINT NOT NULL,
    start BIGINT NOT NULL,
    model TEXT NOT NULL,
    variant TEXT NOT NULL,
    answers BIGINT NOT NULL,
    failed BIGINT NOT NULL,
    cancelled BIGINT NOT NULL,
    prompt_tokens BIGINT NOT NULL,
    cached_tokens BIGINT NOT NULL,
    output_tokens BIGINT NOT NULL,
    begun BIGINT NOT NULL,
    first_token_us BIGINT NOT NULL,
    PRIMARY KEY (width, start, model, variant)
);
INSERT INTO traffic SELECT grain.width, created / grain.width * grain.width, model, COALESCE(variant, ''), COUNT(*),
    CAST(SUM(CASE WHEN status = 'failed' THEN 1 ELSE 0 END) AS BIGINT),
    CAST(SUM(CASE WHEN status = 'cancelled' THEN 1 ELSE 0 END) AS BIGINT),
    CAST(SUM(prompt_tokens) AS BIGINT), CAST(SUM(cached_tokens) AS BIGINT), CAST(SUM(output_tokens) AS BIGINT),
    COUNT(first_token_us), CAST(COALESCE(SUM(first_token_us), 0) AS BIGINT)
    FROM inferences, (SELECT CAST(300000000 AS BIGINT) AS width UNION ALL SELECT 10800000000) AS grain GROUP BY 1, 2, 3, 4;

-- The newest complete answers of a variant and how long they took, without reading them.
CREATE INDEX inferences_latency ON inferences (model, (COALESCE(variant, '')), created, first_token_us, duration_us)
    WHERE status = 'ok';
