-- What a queue's progress and statistics read of its tasks, without the texts: a count looks at this index alone.
CREATE INDEX label_tasks_progress ON label_tasks (queue_id, done, gold, verdicts, leased_until, id);
