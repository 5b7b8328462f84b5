-- Erasure looks for tasks and drafts by their answers, applications for the feedback of a task.
CREATE INDEX label_tasks_candidate_a ON label_tasks (candidate_a);
CREATE INDEX label_tasks_candidate_b ON label_tasks (candidate_b);
CREATE INDEX label_drafts_candidate_a ON label_drafts (candidate_a);
CREATE INDEX feedback_task ON feedback (task_id) WHERE task_id IS NOT NULL;

-- In the order in which open tasks are handed out, so that the first ones are found without sorting all of them.
DROP INDEX label_tasks_open;
CREATE INDEX label_tasks_open ON label_tasks (queue_id, done, verdicts DESC, id);

-- Of two that are made at once, one gets the name.
CREATE UNIQUE INDEX api_keys_name ON api_keys (name) WHERE revoked IS NULL;
