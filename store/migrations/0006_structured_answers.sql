-- An answer with reasoning or calls, taken apart. Its text stays as the model wrote it.
ALTER TABLE choices ADD COLUMN message TEXT;
