"""The output cache (L2): whole answers of requests whose answer is determined.

`key` (pure) decides which requests are cacheable and what tells them apart; `answer` (pure) is a stored
answer; `store` bounds them in bytes and time; `flight` lets equal requests under way share one computation;
`cache` puts these together, and `measures` counts what it did.
"""
