"""What models read: corpora, conversations, generated tasks, tokens."""
