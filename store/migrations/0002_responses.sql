-- What clients asked to be kept, to be read again under its id. `owner` is the id of the key that asked, or empty on a server without
-- keys: nobody else can read it.

-- Chat answers with `store: true`. `body` is the answer, `messages` what it answers.
CREATE TABLE stored_chats (
    id TEXT PRIMARY KEY,
    created BIGINT NOT NULL,
    owner TEXT NOT NULL,
    user_key TEXT,
    model TEXT NOT NULL,
    metadata TEXT NOT NULL,
    messages TEXT NOT NULL,
    body TEXT NOT NULL,
    bytes BIGINT NOT NULL
);
CREATE INDEX stored_chats_owner ON stored_chats (owner, id);
CREATE INDEX stored_chats_created ON stored_chats (created, bytes);
CREATE INDEX stored_chats_user ON stored_chats (user_key);

-- The metadata once more, a row for each `["key","value"]`, for those who look for it.
CREATE TABLE stored_chat_metadata (
    chat_id TEXT NOT NULL,
    pair TEXT NOT NULL,
    PRIMARY KEY (chat_id, pair)
);

-- Responses. `input` is what was new in the request; what went before is in `previous` and those before it. While a response is made in
-- the background, `alive_until` says until when its server has promised to be there: after that, nobody works on it any more.
CREATE TABLE responses (
    id TEXT PRIMARY KEY,
    created BIGINT NOT NULL,
    owner TEXT NOT NULL,
    user_key TEXT,
    previous TEXT,
    status TEXT NOT NULL,
    alive_until BIGINT,
    input TEXT NOT NULL,
    body TEXT NOT NULL,
    bytes BIGINT NOT NULL
);
CREATE INDEX responses_previous ON responses (previous);
CREATE INDEX responses_created ON responses (created, bytes);
CREATE INDEX responses_user ON responses (user_key);
